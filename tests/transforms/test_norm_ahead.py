"""norm_ahead moves norms into products around them, spares near misses, holds at other sizes."""

import pytest
import torch
from test_library import Small, logits, op_names, program_of
from tiny_models import tiny_model

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.linear import add_linear_scaled, fused_linear, triton_linear
from autodeploy.custom_ops.linear.skinny_config import Tiling
from autodeploy.transforms.capture.export import capture
from autodeploy.transforms.pipeline import run_recipe, run_step
from autodeploy.transforms.recipe import Step, load_recipe
from autodeploy.transforms.transform import TRANSFORMS
from autodeploy.transforms.verify import SequenceCheck, reference_logits

ON_CPU = {"devices": ["cpu"]}


def before(model):
    """The program as the step finds it."""
    program = program_of(model, "canonicalize", "gather_logits", "fuse_parallel_linears")
    run_step(program, Step("fuse_linear", TRANSFORMS["fuse_linear"](devices=("cpu",))))
    run_step(program, Step("add_in_place", TRANSFORMS["add_in_place"]()))
    return program


def rewritten(model, matches):
    """The program after the step, which must find `matches` sites and keep every bit."""
    program = before(model.bfloat16())
    expected = [logits(program, 5, 3), logits(program, 1)]
    step = run_step(program, Step("norm_ahead", TRANSFORMS["norm_ahead"](devices=("cpu",))))
    found = [logits(program, 5, 3), logits(program, 1)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert step.matches == matches
    assert op_names(program).count("add_linear_scaled") == matches
    return program


def readers(program):
    """The arguments of every fused linear that is given scaled rows."""
    calls = [n for n in program.graph.nodes if n.target == fused_linear.overload]
    given = [fused_linear.bind(n.args, n.kwargs) for n in calls]
    return [g for g in given if g["scaled"] is not None]


def with_layer(body):
    """A model whose forward gets a layer's attention, its norm, and an embedding."""

    def forward(self, x):
        layer = self.base.model.layers[0]
        return body(layer.self_attn, layer.input_layernorm, x)

    return Small(forward)


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen3"])
def test_norms_between_layers_go_into_products(kind):
    model = tiny_model(kind)
    layers = model.config.num_hidden_layers
    # The first norm follows no product, and the last one's rows are chosen.
    program = rewritten(model, 2 * layers - 1)
    given = readers(program)
    assert len(given) == 2 * layers - 1
    made = [n for n in program.graph.nodes if n.target == add_linear_scaled.overload]
    for call, reader in zip(made, given, strict=True):
        left = add_linear_scaled.bind(call.args, call.kwargs)
        assert reader["scaled"].args == (call, 0)
        assert reader["squares"].args == (call, 1)
        assert left["next_weight"] is reader["norm_weight"]
        assert left["next_offset"] == reader["norm_offset"] == (1.0 if kind == "gemma" else 0.0)
        assert left["next_cast_before_weight"] == reader["cast_before_weight"]


def test_other_dtypes_and_devices_are_spared():
    program = before(tiny_model("llama"))
    step = Step("norm_ahead", TRANSFORMS["norm_ahead"](devices=("cpu",)))
    assert run_step(program, step).matches == 0
    program = before(tiny_model("llama").bfloat16())
    assert run_step(program, Step("norm_ahead", TRANSFORMS["norm_ahead"]())).matches == 0


@pytest.mark.parametrize("kind", ["gemma2", "olmo2"])
def test_norms_after_products_are_spared(kind):
    rewritten(tiny_model(kind), 0)


def test_what_wrote_last_counts():
    def once(attention, norm, x):
        h = x * 2
        h = h + attention.o_proj(x)
        return attention.q_proj(norm(h)) + h

    rewritten(with_layer(once), 1)

    def twice(attention, norm, x):
        h = x * 2
        h = h + attention.o_proj(x)
        h = h + attention.o_proj(x.sin())
        return attention.q_proj(norm(h)) + h

    program = rewritten(with_layer(twice), 1)
    kinds = [n for n in op_names(program) if n.startswith("add_linear")]
    assert kinds[:2] == ["add_linear", "add_linear_scaled"]

    def scaled(attention, norm, x):
        h = x * 2
        h = h + attention.o_proj(x)
        return attention.q_proj(norm(h * 0.5)) + h

    rewritten(with_layer(scaled), 0)

    def otherwise_written(attention, norm, x):
        h = x * 2
        h = h + attention.o_proj(x)
        h.mul_(0.5)
        return attention.q_proj(norm(h)) + h

    rewritten(with_layer(otherwise_written), 0)


def test_rows_that_are_cut_are_spared():
    def halves(attention, norm, x):
        h = x * 2
        h = (h + attention.o_proj(x)).reshape(1, -1, x.shape[-1])
        return attention.q_proj(norm(h)) + h

    rewritten(with_layer(halves), 1)

    def parts(attention, norm, x):
        h = x * 2
        h = h + attention.o_proj(x)
        return attention.q_proj(norm(h[:, :1])) + h

    rewritten(with_layer(parts), 0)


def test_the_first_of_several_norms_gets_the_rows():
    def different(self, x):
        attention, layer = self.base.model.layers[0].self_attn, self.base.model.layers[0]
        h = x * 2
        h = h + attention.o_proj(x)
        first, second = layer.input_layernorm(h), layer.post_attention_layernorm(h)
        return attention.q_proj(first).sin() * attention.o_proj(second).sin() + h

    model = Small(different)
    with torch.no_grad():
        model.base.model.layers[0].input_layernorm.weight.mul_(1.5)
    program = rewritten(model, 1)
    calls = [n for n in program.graph.nodes if n.target == fused_linear.overload]
    given = [fused_linear.bind(n.args, n.kwargs) for n in calls]
    assert [g["scaled"] is not None for g in given if g["norm"]][:2] == [True, False]


def test_a_norm_without_a_weight_is_moved():
    program = before(tiny_model("llama", num_hidden_layers=1).bfloat16())
    for node in program.graph.nodes:
        if node.target == fused_linear.overload:
            given = fused_linear.bind(node.args, node.kwargs)
            node.args, node.kwargs = (), {**given, "norm_weight": None}
    expected = logits(program, 5, 3)
    step = Step("norm_ahead", TRANSFORMS["norm_ahead"](devices=("cpu",)))
    assert run_step(program, step).matches == 1
    torch.testing.assert_close(logits(program, 5, 3), expected, rtol=0, atol=0)


@pytest.mark.parametrize("through_dispatcher", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma2"])
def test_a_served_model_keeps_its_logits(kind, through_dispatcher):
    model = tiny_model(kind, num_hidden_layers=2).bfloat16()
    check = SequenceCheck(reference_logits(model))
    program = capture(model)
    lower = {"through_dispatcher": through_dispatcher}
    recipe = {"fuse_linear": ON_CPU, "norm_ahead": ON_CPU, "lower": lower}
    run_recipe(program, load_recipe("default", recipe), check=check)
    ops = [n.meta.get("op") for n in program.graph.nodes]
    assert ops.count("add_linear_scaled") == (0 if kind == "gemma2" else 3)


@pytest.mark.skipif(not gpu.interpreted(), reason="kernels run on the device")
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_kernels_give_the_models_logits(kind, monkeypatch):
    # Few and large tiles: the interpreter is slow.
    few, many = Tiling("gemv", block_n=128, block_k=128), Tiling("dot", block_n=128, block_k=64)
    monkeypatch.setattr(triton_linear, "tiling_of", lambda tokens, *_: few if tokens == 1 else many)
    model = tiny_model(kind, num_hidden_layers=1).bfloat16()
    whole = SequenceCheck(reference_logits(model))
    program = capture(model)
    recipe = load_recipe("default", {"fuse_linear": ON_CPU, "norm_ahead": ON_CPU})

    def check(program, step):
        if step.id == "load":
            whole(program, step)

    with gpu.interpreted_kernels():
        run_recipe(program, recipe, check=check)
    names = ("fused_linear", "add_linear", "add_linear_scaled")
    fused = [n for n in program.graph.nodes if n.meta.get("op") in names]
    assert "add_linear_scaled" in {n.meta["op"] for n in fused}
    assert {n.meta["implementation"] for n in fused} == {"triton"}
