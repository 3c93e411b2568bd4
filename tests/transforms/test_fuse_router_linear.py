"""fuse_router_linear takes in a router's product and norm, spares others, holds at other sizes."""

import pytest
import torch
from test_library import logits, op_names, program_of
from tiny_models import tiny_model

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.moe import routed
from autodeploy.transforms.pipeline import run_recipe, run_step
from autodeploy.transforms.recipe import Step, load_recipe
from autodeploy.transforms.transform import TRANSFORMS, is_call
from autodeploy.transforms.verify import SequenceCheck, reference_logits

ON_CPU = {"devices": ("cpu",)}


def rewritten(model, matches, change=None, devices=ON_CPU):
    """The program after the step, which must find `matches` sites and keep the logits."""
    program = program_of(model, "canonicalize")
    for name in ("fuse_linear", "fuse_add_norm", "fuse_router"):
        run_step(program, Step(name, TRANSFORMS[name](**ON_CPU)))
    if change is not None:
        change(program)
    expected = [logits(program, 5, 3), logits(program, 1)]
    step = Step("fuse_router_linear", TRANSFORMS["fuse_router_linear"](**devices))
    assert run_step(program, step).matches == matches
    found = [logits(program, 5, 3), logits(program, 1)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    return program


def forms(program):
    nodes = [n for n in program.graph.nodes if is_call(n, routed.overload)]
    return [routed.bind(n.args, n.kwargs) for n in nodes]


@pytest.mark.parametrize(
    ("kind", "wide", "bias"),
    [
        ("mixtral", False, False),
        ("qwen3_moe", False, False),
        ("gpt_oss", False, True),
        ("deepseek_v2", True, False),
    ],
)
def test_a_router_takes_in_its_product_and_the_norm(kind, wide, bias):
    model = tiny_model(kind, num_hidden_layers=2).to(torch.bfloat16)
    before = op_names(rewritten(model, 0, devices={})).count("rms_norm")
    sparse = 1 if kind == "deepseek_v2" else 2
    program = rewritten(model, sparse)
    assert "route" not in op_names(program)
    assert op_names(program).count("rms_norm") == before - sparse
    for form in forms(program):
        assert form["norm"]
        assert form["wide"] is wide
        assert (form["bias"] is not None) is bias


def test_without_a_norm_in_front_the_product_is_taken_in_alone():
    def change(program):
        for node in list(program.graph.nodes):
            if "post_attention_layernorm" in str(node.args[1:2]):
                # Another op between the norm and what reads it.
                (view,) = node.users
                between = program.call(
                    torch.ops.aten.relu.default, view, before=view.next, like=view
                )
                view.replace_all_uses_with(
                    between, delete_user_cb=lambda user, between=between: user is not between
                )

    program = rewritten(tiny_model("mixtral").to(torch.bfloat16), 2, change)
    assert not any(form["norm"] for form in forms(program))


def test_logits_that_something_else_reads_are_spared():
    def change(program):
        for node in list(program.graph.nodes):
            if is_call(node, torch.ops.autodeploy.route.default):
                source = node.args[0]
                program.call(torch.ops.aten.relu.default, source, before=node, like=node)

    rewritten(tiny_model("mixtral").to(torch.bfloat16), 0, change)


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama"])
def test_other_routers_are_spared(kind):
    rewritten(tiny_model(kind).to(torch.bfloat16), 0)


def test_models_in_float32_are_spared():
    rewritten(tiny_model("mixtral"), 0)


def test_a_lowered_model_runs_the_kernels_and_keeps_its_logits():
    model = tiny_model("qwen3_moe", num_hidden_layers=1).to(torch.bfloat16)
    check = SequenceCheck(reference_logits(model))
    program = program_of(model)
    names = ("fuse_linear", "fuse_expert_sum", "fuse_add_norm", "fuse_router", "fuse_router_linear")
    with gpu.interpreted_kernels():
        run_recipe(program, load_recipe("default", dict.fromkeys(names, ON_CPU)))
        # Once: interpreted kernels are slow, and the steps have checks of their own above.
        assert check.error(program) <= check.reference.limit(torch.bfloat16)
    chosen = {n.meta["op"]: n.meta["implementation"] for n in program.graph.nodes if "op" in n.meta}
    assert chosen["routed"] == chosen["experts"] == "triton"
