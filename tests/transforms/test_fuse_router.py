"""fuse_router rewrites softmax routers, spares others and holds at other sizes."""

import pytest
import torch
from test_library import Small, count, logits, op_names, program_of
from tiny_models import tiny_model
from torch import nn

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.moe import route
from autodeploy.transforms.pipeline import run_recipe, run_step
from autodeploy.transforms.recipe import Step, load_recipe
from autodeploy.transforms.transform import TRANSFORMS, is_call
from autodeploy.transforms.verify import SequenceCheck, reference_logits

aten = torch.ops.aten
ON_CPU = {"devices": ("cpu",)}


def rewritten(model, matches, tolerance=0.0):
    """The program after the step, which must find `matches` sites and keep the logits."""
    program = program_of(model, "canonicalize")
    expected = [logits(program, 5, 3), logits(program, 1)]
    step = run_step(program, Step("fuse_router", TRANSFORMS["fuse_router"](**ON_CPU)))
    assert step.matches == matches
    found = [logits(program, 5, 3), logits(program, 1)]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return program


def routes(program):
    """k, normalize and dtype of every route."""
    nodes = [n for n in program.graph.nodes if is_call(n, route.overload)]
    return [node.args[1:] for node in nodes]


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "normalize"), [("mixtral", True), ("qwen3_moe", True), ("olmoe", False)]
)
def test_softmax_routers_become_one_op(kind, normalize, dtype):
    options = {"norm_topk_prob": True} if kind == "qwen3_moe" else {}
    model = tiny_model(kind, **options).to(dtype)
    sparse = sum(hasattr(part, "_apply_gate") for part in model.modules())
    program = rewritten(model, sparse)
    assert op_names(program).count("route") == sparse > 0
    assert count(program, aten.topk.default) == count(program, aten.softmax.int) == 0
    assert count(program, aten.div.Tensor) == 0
    assert {made[1] for made in routes(program)} == {normalize}
    # One of the three keeps its weights in float32.
    assert {made[2] for made in routes(program)} <= {torch.float32, dtype}


def test_a_softmax_of_the_chosen_alone_is_a_normalized_one():
    program = rewritten(tiny_model("gpt_oss"), 2, tolerance=1e-5)
    assert [made[1] for made in routes(program)] == [True, True]
    assert count(program, aten.topk.default) == count(program, aten.softmax.int) == 0


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama"])
def test_other_routers_are_spared(kind):
    rewritten(tiny_model(kind), 0)


def choose(change):
    """A body that scales its input by a router's weights, found by `change`."""

    def body(self, x):
        weights, index = change(self.base.model.layers[0].mlp.gate_proj(x[0]))
        return x * weights.sum(-1)[:, None] + index.sum(-1)[:, None]

    return Small(body)


def smallest(x):
    return x.softmax(-1).topk(3, largest=False)


def along_tokens(x):
    values, index = x[:, :3].softmax(0).topk(2)
    return values, index


def softmax_read_twice(x):
    shares = x.softmax(-1)
    values, index = shares.topk(3)
    return values * shares[:, :1], index


def no_softmax(x):
    return x.sigmoid().topk(3)


def double(x):
    values, index = x.double().softmax(-1).topk(3)
    return values.float(), index


def chosen_read_twice(x):
    values, index = x.topk(3)
    return values.softmax(-1) + values, index


def softmax_along_tokens(x):
    values, index = x.topk(3)
    return values.softmax(0), index


@pytest.mark.parametrize(
    "change", [smallest, along_tokens, softmax_read_twice, no_softmax, double, chosen_read_twice,
               softmax_along_tokens],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_near_misses_are_spared(change):
    rewritten(choose(change), 0)


def another_sum(x):
    values, index = x.softmax(-1).topk(3)
    return values / (values.sum(-1, keepdim=True) + 1e-3), index


def sum_read_twice(x):
    values, index = x.softmax(-1).topk(3)
    total = values.sum(-1, keepdim=True)
    return values / total + total, index


def upside_down(x):
    values, index = x.softmax(-1).topk(3)
    return values.sum(-1, keepdim=True) / values, index


def values_read_twice(x):
    values, index = x.softmax(-1).topk(3)
    return values / values.sum(-1, keepdim=True) + values, index


@pytest.mark.parametrize(
    "change", [another_sum, sum_read_twice, upside_down, values_read_twice],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_weights_that_are_used_otherwise_are_only_chosen(change):
    assert [made[1] for made in routes(rewritten(choose(change), 1))] == [False]


def test_leading_dimensions_a_scale_and_any_order_stay():
    def body(self, x):
        shares = nn.functional.softmax(x * 3, dim=2, dtype=torch.float32)
        values, index = torch.topk(shares, 4, dim=2, sorted=False)
        return x * (values * 2.5).sum(-1, keepdim=True) + index.sum(-1, keepdim=True)

    (made,) = routes(rewritten(Small(body), 1, tolerance=1e-4))
    assert made[0] == 4


def test_nothing_is_done_on_devices_without_a_kernel():
    program = program_of(tiny_model("mixtral"), "canonicalize")
    assert run_step(program, Step("fuse_router", TRANSFORMS["fuse_router"]())).matches == 0


def test_a_lowered_model_runs_the_kernels_and_keeps_its_logits():
    model = tiny_model("mixtral", num_hidden_layers=1)
    check = SequenceCheck(reference_logits(model))
    program = program_of(model)
    with gpu.interpreted_kernels():
        run_recipe(program, load_recipe("default", {"fuse_router": ON_CPU}), check=check)
    chosen = {n.meta["op"]: n.meta["implementation"] for n in program.graph.nodes if "op" in n.meta}
    assert chosen["route"] == chosen["experts"] == "triton"
    assert not any("experts" in name for name in program.contract.eager)
