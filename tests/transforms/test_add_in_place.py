"""add_in_place lets sums overwrite residuals, spares those still read, holds at other sizes."""

import pytest
import torch
from test_library import Small, logits, op_names, program_of
from tiny_models import tiny_model

from autodeploy.custom_ops.linear import add_linear, fused_linear
from autodeploy.errors import RecipeError
from autodeploy.transforms.capture.export import capture
from autodeploy.transforms.pipeline import run_recipe, run_step
from autodeploy.transforms.program import Fact
from autodeploy.transforms.recipe import Step, load_recipe
from autodeploy.transforms.transform import TRANSFORMS
from autodeploy.transforms.verify import SequenceCheck, reference_logits

aten = torch.ops.aten
ON_CPU = {"devices": ["cpu"]}


def rewritten(model):
    """The program after the step, which must keep the logits to the last bit, and its matches."""
    program = program_of(model, "canonicalize", "gather_logits", "fuse_parallel_linears")
    run_step(program, Step("fuse_linear", TRANSFORMS["fuse_linear"](devices=("cpu",))))
    expected = [logits(program, 5, 3), logits(program, 1)]
    step = run_step(program, Step("add_in_place", TRANSFORMS["add_in_place"]()))
    found = [logits(program, 5, 3), logits(program, 1)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert op_names(program).count("add_linear") == step.matches
    return program, step.matches


def with_layer(body):
    """A model whose forward gets one layer's projections and what they are to be made of."""
    return Small(lambda self, x: body(self.base.model.layers[0].self_attn, x))


def test_the_residual_stream_of_a_decoder_is_one_tensor():
    model = tiny_model("llama")
    program, matches = rewritten(model)
    assert matches == 2 * model.config.num_hidden_layers
    residuals = {n.args[0] for n in program.graph.nodes if n.target == add_linear.overload}
    assert [n.target for n in residuals] == [aten.embedding.default]
    assert not any(
        fused_linear.bind(n.args, n.kwargs)["residual"]
        for n in program.graph.nodes
        if n.target == fused_linear.overload
    )


def test_the_step_is_no_longer_open_to_fusing():
    program, _ = rewritten(tiny_model("llama", num_hidden_layers=1))
    assert not program.facts & {Fact.CANONICAL, Fact.FUNCTIONAL}
    with pytest.raises(RecipeError, match="fuse_add_norm"):
        load_recipe(
            {"extends": "default", "insert": [{"step": "fuse_add_norm", "after": "add_in_place"}]}
        )


def test_residuals_that_are_read_later_are_spared():
    _, matches = rewritten(with_layer(lambda a, x: (x * 2 + a.q_proj(x)).sin() * x))
    assert matches == 1  # x * 2 is read by the sum alone.

    def twice(attention, x):
        h = x * 2
        return (h + attention.q_proj(x)).sin() * (h + attention.q_proj(x.cos()))

    # The first of two sums leaves the residual for the second.
    program, matches = rewritten(with_layer(twice))
    assert matches == 1
    kinds = [n for n in op_names(program) if n in ("fused_linear", "add_linear")]
    assert kinds[:2] == ["fused_linear", "add_linear"]

    _, matches = rewritten(with_layer(lambda a, x: (x + a.q_proj(x.sin())) * x))
    assert matches == 0


def test_residuals_that_are_read_later_through_a_view_are_spared():
    def body(attention, x):
        h = x * 2
        half = h.transpose(1, 2)[:, :32]
        return (h + attention.q_proj(x)).sin() * half.sum()

    _, matches = rewritten(with_layer(body))
    assert matches == 0


def test_views_and_inputs_of_the_product_are_spared():
    # A view of x is no memory of its own, whoever reads it later.
    _, matches = rewritten(with_layer(lambda a, x: x.sin().view(x.shape) + a.q_proj(x)))
    assert matches == 0

    def itself(attention, x):
        h = x * 2
        return h + attention.q_proj(h)

    _, matches = rewritten(with_layer(itself))
    assert matches == 0

    def turned(attention, x):
        h = (x * 2)[:, :, :]
        return x * 2 + attention.q_proj(h.view(h.shape))

    _, matches = rewritten(with_layer(turned))
    assert matches == 0


def test_all_of_a_tensor_in_another_shape_is_that_tensor():
    def flat(attention, x):
        h = (x * 2).reshape(-1, x.shape[-1])
        return (h + attention.q_proj(x.reshape(-1, x.shape[-1]))).view(x.shape).sin()

    _, matches = rewritten(with_layer(flat))
    assert matches == 1

    def kept(attention, x):
        whole = x * 2
        h = whole.reshape(-1, x.shape[-1])
        y = h + attention.q_proj(x.reshape(-1, x.shape[-1]))
        return y.view(x.shape).sin() * whole

    _, matches = rewritten(with_layer(kept))
    assert matches == 0


def test_a_view_that_is_read_before_does_no_harm():
    def body(attention, x):
        h = x * 2
        early = h[:, :1].sum() + x
        return h + attention.q_proj(early)

    _, matches = rewritten(with_layer(body))
    assert matches == 1


@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2", "phi"])
def test_a_served_model_keeps_its_logits(kind):
    model = tiny_model(kind)
    check = SequenceCheck(reference_logits(model))
    program = capture(model)
    recipe = load_recipe("default", {"fuse_linear": ON_CPU, "fuse_add_norm": ON_CPU})
    run_recipe(program, recipe, check=check)
    added = [n for n in program.graph.nodes if n.meta.get("op") == "add_linear"]
    assert bool(added) == (kind in ("llama", "phi"))
    assert all(n.meta["mutates"] for n in added)


def test_a_compiler_can_follow():
    model = tiny_model("llama", num_hidden_layers=1)
    check = SequenceCheck(reference_logits(model))
    program = capture(model)
    recipe = load_recipe("default", {"fuse_linear": ON_CPU, "lower": {"through_dispatcher": True}})
    run_recipe(program, recipe, check=check)
    targets = [str(n.target) for n in program.graph.nodes]
    assert targets.count("autodeploy.add_linear.default") == 2


def test_nothing_is_added_in_place_where_no_linear_was_fused():
    program = program_of(tiny_model("llama"), "canonicalize")
    assert run_step(program, Step("add_in_place", TRANSFORMS["add_in_place"]())).matches == 0
