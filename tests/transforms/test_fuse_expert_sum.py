"""fuse_expert_sum gives experts their residual, spares other sums and holds at other sizes."""

import pytest
import torch
from test_library import count, logits, program_of
from tiny_models import tiny_model

from autodeploy.custom_ops.linear import fused_linear
from autodeploy.custom_ops.moe import experts
from autodeploy.transforms.pipeline import run_step
from autodeploy.transforms.recipe import Step
from autodeploy.transforms.transform import TRANSFORMS, is_call

aten = torch.ops.aten
ON_CPU = {"devices": ("cpu",)}


def step_of(name):
    return Step(name, TRANSFORMS[name](**ON_CPU))


def rewritten(program, matches, devices=ON_CPU):
    """The program after the step, which must find `matches` sites and keep the logits."""
    expected = [logits(program, 5, 3), logits(program, 1)]
    step = Step("fuse_expert_sum", TRANSFORMS["fuse_expert_sum"](**devices))
    assert run_step(program, step).matches == matches
    found = [logits(program, 5, 3), logits(program, 1)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    return program


def residuals(program):
    """How many experts have one, and how many have none."""
    nodes = [n for n in program.graph.nodes if is_call(n, experts.overload)]
    given = [experts.bind(n.args, n.kwargs)["residual"] is not None for n in nodes]
    return sum(given), len(given) - sum(given)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_add_the_residual(kind):
    program = program_of(tiny_model(kind, num_hidden_layers=2), "canonicalize", "fuse_linear")
    run_step(program, step_of("fuse_linear"))
    sums = count(program, aten.add.Tensor)
    rewritten(program, 2)
    assert residuals(program) == (2, 0)
    assert count(program, aten.add.Tensor) == sums - 2


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3"])
def test_experts_beside_a_shared_one_add_the_residual(kind):
    program = program_of(tiny_model(kind), "canonicalize")
    run_step(program, step_of("fuse_linear"))
    sparse = sum(residuals(program))
    rewritten(program, sparse)
    assert residuals(program) == (sparse, 0)
    assert sparse > 0
    # What the shared expert's product adds now comes of the experts.
    linears = [n for n in program.graph.nodes if is_call(n, fused_linear.overload)]
    added = [n.kwargs.get("residual") for n in linears]
    views = [n for n in added if n is not None and is_call(n, aten.reshape.default)]
    assert any(is_call(view.args[0], experts.overload) for view in views)


def test_a_sum_that_is_scaled_or_read_between_is_spared():
    program = program_of(tiny_model("mixtral"), "canonicalize")
    (first, second) = (n for n in program.graph.nodes if is_call(n, experts.overload))
    for node, change in ((first, "scale"), (second, "read")):
        (view,) = node.users
        (total,) = view.users
        if change == "scale":
            total.kwargs = {"alpha": 2}
        else:
            more = program.call(aten.add.Tensor, total, view, before=total.next, like=total)
            total.replace_all_uses_with(
                more, delete_user_cb=lambda user, more=more: user is not more
            )
    rewritten(program, 0)


def test_nothing_is_done_on_devices_without_a_kernel():
    rewritten(program_of(tiny_model("mixtral"), "canonicalize"), 0, devices={})
