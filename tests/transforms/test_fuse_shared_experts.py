"""fuse_shared_experts joins what every token visits, spares other forms, holds at other sizes."""

import pytest
import torch
from test_library import logits, program_of
from tiny_models import tiny_model

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.moe import experts, route
from autodeploy.transforms import artifact
from autodeploy.transforms.cost import count as cost
from autodeploy.transforms.pipeline import run_recipe, run_step
from autodeploy.transforms.recipe import Step, load_recipe
from autodeploy.transforms.transform import TRANSFORMS, is_call
from autodeploy.transforms.verify import SequenceCheck, reference_logits

aten = torch.ops.aten
ON_CPU = {"devices": ("cpu",)}
STEPS = (
    "fuse_router", "fuse_shared_experts", "fold_row_scale", "fuse_linear", "fuse_expert_sum",
    "fuse_add_norm", "fuse_router_linear",
)  # fmt: skip
RECIPE = load_recipe("default", dict.fromkeys(STEPS, ON_CPU))
# Shared experts of a size that is no expert's, where a default would be; of one, of several.
MODELS = {
    "qwen3_next": {"num_experts": 4},
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
    },
    "deepseek_v2": {},
    "granitemoehybrid": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32,
        "shared_intermediate_size": 64, "layer_types": ["attention", "attention"],
    },
}  # fmt: skip


def routed_program(model):
    program = program_of(model, "canonicalize")
    run_step(program, Step("fuse_router", TRANSFORMS["fuse_router"](**ON_CPU)))
    return program


def rewritten(program, matches, devices=ON_CPU, note=""):
    """The program after the step, which must find `matches` sites and keep the logits."""
    expected = [logits(program, 5, 3), logits(program, 1)]
    step = Step("fuse_shared_experts", TRANSFORMS["fuse_shared_experts"](**devices))
    report = run_step(program, step)
    assert report.matches == matches
    assert note in report.note
    assert bool(report.note) == bool(note)
    found = [logits(program, 5, 3), logits(program, 1)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return program


def calls_of(program, op):
    return [op.bind(n.args, n.kwargs) for n in program.graph.nodes if is_call(n, op.overload)]


def nodes_named(program, target, part):
    """Calls whose arguments are weights of that name."""
    return [
        n for n in program.graph.nodes if is_call(n, target) and any(part in str(a) for a in n.args)
    ]


@pytest.mark.parametrize(
    ("kind", "shared", "gated"),
    [("qwen3_next", 1, True), ("qwen2_moe", 3, True), ("deepseek_v2", 2, False),
     ("granitemoehybrid", 2, False)],
)  # fmt: skip
def test_what_every_token_visits_is_among_the_experts(kind, shared, gated):
    program = routed_program(tiny_model(kind, **MODELS[kind]))
    before = calls_of(program, experts)
    total = before[0]["gate_up"].meta["val"].shape[0]
    rewritten(program, len(before))
    for form in calls_of(program, experts):
        assert form["shared"] == shared
        assert form["gate_up"].meta["val"].shape[0] == total + shared
        assert form["down"].meta["val"].shape[0] == total + shared
    for form in calls_of(program, route):
        assert form["shared"] == shared
        assert form["gate"] == (total if gated else 0)
        # The gate is a row of the router's weight, and rows of logits begin at whole addresses.
        assert form["logits"].meta["val"].shape[-1] % (8 if gated else 1) == 0
    assert not nodes_named(program, aten.linear.default, "shared")
    assert not any("shared_expert" in name and "and_shared" not in name for name in program.weights)


@pytest.mark.parametrize("kind", ["qwen3_next", "deepseek_v2"])
def test_the_cost_of_a_step_stays_what_it_was(kind):
    program = routed_program(tiny_model(kind, **MODELS[kind]))
    before = cost.cost_of(program)
    after = cost.cost_of(rewritten(program, len(calls_of(program, experts))))
    assert after.weight_bytes == before.weight_bytes
    assert after.experts == before.experts
    # But for the zeros that fill up the rows of a router with a gate.
    assert before.token_flops <= after.token_flops < before.token_flops * 1.05


def scaled(program, node):
    """What the routed experts return times a number."""
    more = program.call(aten.mul.Tensor, node, 2.5, before=node.next, like=node)
    node.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)


def scaled_weights(program, node):
    weights = node.args[2]
    more = program.call(aten.mul.Tensor, weights, 2.5, before=node, like=node)
    node.replace_input_with(weights, more)


def read_elsewhere(program, node):
    (product,) = nodes_named(program, aten.linear.default, "shared_expert_down_proj")
    (total,) = [n for n in node.users if is_call(n, aten.add.Tensor)]
    more = program.call(aten.add.Tensor, total, product, before=total.next, like=node)
    total.replace_all_uses_with(more, delete_user_cb=lambda user: user is not more)


def activated_otherwise(program, node):
    (product,) = nodes_named(program, aten.linear.default, "shared_expert_gate_proj")
    (active,) = product.users
    active.target = aten.relu.default


def of_other_rows(program, node):
    for part in ("gate_proj", "up_proj"):
        (product,) = nodes_named(program, aten.linear.default, f"shared_expert_{part}")
        x = product.args[0]
        turned = program.call(aten.neg.default, x, before=product, like=product)
        product.replace_input_with(x, turned)


def biased(program, node):
    (product,) = nodes_named(program, aten.linear.default, "mlp_gate_weight")
    (row,) = nodes_named(program, aten.linear.default, "shared_expert_gate_weight")
    bias = program.call(aten.select.int, product.args[1], 1, 0, before=product, like=row)
    product.args = (*product.args, bias)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (scaled, "scaled"),
        (scaled_weights, "router is of another form"),
        (read_elsewhere, "something else reads it"),
        (activated_otherwise, "another form"),
        (biased, "router is of another form"),
        (of_other_rows, ""),
    ],
)
def test_a_near_miss_is_spared_and_named(change, note):
    model = tiny_model("qwen3_next", **MODELS["qwen3_next"], num_hidden_layers=1)
    program = routed_program(model)
    (node,) = (n for n in program.graph.nodes if is_call(n, experts.overload))
    change(program, node)
    rewritten(program, 0, note=note)


def test_a_width_that_is_no_multiple_is_spared():
    model = tiny_model("qwen3_next", num_hidden_layers=1, shared_expert_intermediate_size=48)
    rewritten(routed_program(model), 0, note="1 spared: its width is no multiple")


@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2"])
def test_the_choice_of_any_router_is_padded_if_it_takes_no_gate(kind):
    program = routed_program(tiny_model(kind, **MODELS.get(kind, {})))
    (node,) = (n for n in program.graph.nodes if is_call(n, experts.overload))
    total = node.args[3].meta["val"].shape[0]
    if kind == "deepseek_v2":
        scaled_weights(program, node)
    (form,) = calls_of(rewritten(program, 1), experts)
    assert is_call(form["top_k_index"], aten.constant_pad_nd.default)
    assert is_call(form["top_k_weights"], aten.constant_pad_nd.default)
    assert form["shared"] == form["gate_up"].meta["val"].shape[0] - total > 0


@pytest.mark.parametrize("kind", ["mixtral", "llama"])
def test_layers_without_shared_experts_are_spared(kind):
    rewritten(routed_program(tiny_model(kind)), 0)


def test_nothing_is_done_on_devices_where_it_does_not_pay():
    rewritten(routed_program(tiny_model("deepseek_v2")), 0, devices={})


@pytest.mark.parametrize(
    ("kind", "layers", "dtype"),
    [("qwen2_moe", 2, torch.float32), ("qwen3_next", 1, torch.bfloat16),
     ("deepseek_v2", 2, torch.bfloat16)],
)  # fmt: skip
def test_the_whole_recipe_keeps_the_logits_in_prefill_and_decode(kind, layers, dtype):
    model = tiny_model(kind, **MODELS[kind], num_hidden_layers=layers).to(dtype)
    program = program_of(model)
    check = SequenceCheck(reference_logits(model))
    if dtype is torch.float32 or not gpu.interpreted():
        run_recipe(program, RECIPE, check=check)
    else:
        with gpu.interpreted_kernels():
            run_recipe(program, RECIPE)
            check(program, RECIPE.steps[-1])
        chosen = {n.meta["op"]: n.meta["implementation"] for n in program.graph.nodes
                  if "op" in n.meta}  # fmt: skip
        assert chosen["routed"] == chosen["experts"] == "triton"
    # The residual is all that is added to them, and they add it.
    found = [n for n in program.graph.nodes if n.meta.get("op") == "experts"]
    assert found
    assert all(node.args[-1] is not None for node in found)


@pytest.mark.parametrize("kind", ["qwen3_next", "deepseek_v2"])
def test_less_is_rounded_than_before(kind):
    model = tiny_model(kind, **MODELS[kind]).to(torch.bfloat16)
    wide = logits(program_of(tiny_model(kind, **MODELS[kind]).bfloat16().float()), 9, 8, 7)

    def error(program):
        """Of most rows: a choice of experts may fall the other way by rounding alone."""
        rows = (logits(program, 9, 8, 7).float() - wide).norm(dim=-1) / wide.norm(dim=-1)
        return rows.sort().values[:16].mean()

    program = routed_program(model)
    before = error(program)
    run_step(program, Step("f", TRANSFORMS["fuse_shared_experts"](**ON_CPU)))
    assert error(program) < 1.1 * before


@pytest.mark.parametrize("kind", ["qwen3_next", "granitemoehybrid"])
def test_a_kept_program_reads_joined_experts_from_the_checkpoint(kind, tmp_path):
    model = tiny_model(kind, **MODELS[kind])
    program = program_of(model)
    tensors = {name: tensor.clone() for name, tensor in program.source.originals.items()}
    run_recipe(program, RECIPE)
    path = tmp_path / "program"
    shapes = {n: t.shape for n, t in tensors.items() if n not in program.source.derived}
    assert artifact.store(program, shapes, tensors.__getitem__, {}, path) is None
    # What is read is given back to the system.
    restored, _ = artifact.restore(artifact.read(path), lambda name: tensors[name].clone())
    module = restored.function.__self__
    assert any("and_shared" in name for name in program.weights)
    for name in program.weights:
        torch.testing.assert_close(
            getattr(module, name), getattr(program.graph_module, name), rtol=0, atol=0
        )
