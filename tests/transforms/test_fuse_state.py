"""Transforms around states and their projections rewrite, spare near misses, hold elsewhere."""

import pytest
import torch
from test_library import Small, count, logits, program_of
from tiny_models import tiny_model
from torch import nn

from autodeploy.custom_ops import gpu
from autodeploy.transforms.capture.export import capture
from autodeploy.transforms.pipeline import run_recipe, run_step
from autodeploy.transforms.recipe import Step, load_recipe
from autodeploy.transforms.transform import TRANSFORMS
from autodeploy.transforms.verify import SequenceCheck, reference_logits

aten = torch.ops.aten
ON_CPU = {"devices": ("cpu",)}
NAMES = ("arrange_columns", "fuse_conv_delta", "fuse_conv_ssd")
SUMS = ("fold_row_scale", "fuse_linear", "fuse_expert_sum")
RECIPE = load_recipe("default", dict.fromkeys((*NAMES, *SUMS), ON_CPU))


def deployed(model, recipe=RECIPE):
    """The program, checked after every step in prefill and decode, and matches of each step."""
    program = capture(model)
    report = run_recipe(program, recipe, check=SequenceCheck(reference_logits(model)))
    return program, {step.id: step.matches for step in report.steps}


def calls_of(program, name):
    return [n for n in program.graph.nodes if n.meta.get("op") == name]


def test_a_gated_delta_layer_is_one_op_between_its_projections():
    model = tiny_model("qwen3_next")
    program, matches = deployed(model)
    # The gate of shared experts is out of the way of the sums: none of them is left.
    assert matches["fold_row_scale"] == matches["fuse_expert_sum"] == len(model.config.layer_types)
    layers = model.config.layer_types.count("linear_attention")
    assert matches["fuse_conv_delta"] == layers
    fused = calls_of(program, "conv_delta_rule")
    assert len(fused) == layers
    assert not calls_of(program, "cached_causal_conv1d")
    assert not calls_of(program, "cached_gated_delta_rule")
    for node in fused:
        # Raw gates, and the norm with its gate.
        assert all(argument is not None for argument in node.args[3:9])
    # Columns are gathered by the order of the weight, and nothing else.
    assert matches["arrange_columns"] >= layers
    assert count(program, aten.repeat_interleave.self_int) == 0
    joined = [n for n in program.graph.nodes if n.target is aten.cat.default]
    assert not any("linear_attn" in str(n.meta.get("nn_module_stack")) for n in joined)


def test_a_state_space_layer_is_one_op_between_its_projections():
    model = tiny_model("mamba2")
    program, matches = deployed(model)
    assert matches["fuse_conv_ssd"] == model.config.num_hidden_layers
    fused = calls_of(program, "conv_ssd_scan")
    assert len(fused) == model.config.num_hidden_layers
    assert not calls_of(program, "cached_ssd_scan")
    for node in fused:
        assert node.args[7] is not None
        assert node.args[-1] is True
    assert count(program, aten.silu.default) == 0


def test_other_devices_are_spared_unless_asked_for():
    _, matches = deployed(tiny_model("mamba2"), load_recipe("default"))
    assert not any(matches[name] for name in NAMES)


@pytest.mark.skipif(
    not gpu.has_triton() or not (gpu.interpreted() or torch.cuda.is_available()), reason="no triton"
)
@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
def test_kernels_serve_a_whole_model_in_prefill_and_decode(name):
    model = tiny_model(name)
    if torch.cuda.is_available():
        deployed(model.cuda(), load_recipe("default"))
    else:
        with gpu.interpreted_kernels():
            program, _ = deployed(model)
        fused = calls_of(program, "conv_delta_rule") + calls_of(program, "conv_ssd_scan")
        assert {node.meta["implementation"] for node in fused} == {"triton"}


def gathered(y):
    """Queries and keys of two heads next to each other, taken apart."""
    q, k = y.view(*y.shape[:-1], 2, 32).split([16, 16], -1)
    q, k = (part.reshape(*y.shape[:-1], 32) for part in (q, k))
    return torch.sigmoid(q) * k


def read_in_place(y):
    q, k = y.view(*y.shape[:-1], 2, 32).split([16, 16], -1)
    return (torch.sigmoid(q) * torch.tanh(k)).reshape(*y.shape[:-1], 32)


def uneven(y):
    q, k, more = y.split([32, 32, 3], -1)
    return torch.sigmoid(q) * torch.tanh(k) + more.sum(-1, keepdim=True)


def read_twice(y):
    return gathered(y) + torch.tanh(y[..., :32])


class Reader(nn.Module):
    """A product of `width` columns that `read` makes 32 of."""

    def __init__(self, read, width, bias):
        super().__init__()
        self.read = read
        self.inner, self.outer = nn.Linear(64, width, bias=bias), nn.Linear(32, 64)

    def forward(self, x):
        return self.outer(self.read(self.inner(x)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("read", "width", "matches"),
    [(gathered, 64, 1), (uneven, 67, 1), (read_in_place, 64, 0), (read_twice, 64, 0)],
)
def test_columns_that_would_be_gathered_are_put_in_order(read, width, matches, bias):
    reader = Reader(read, width, bias)
    model = Small(lambda self, hidden: self.reader(hidden))
    model.reader = reader
    program = program_of(model, "canonicalize")
    before = [logits(program, 5, 3), logits(program, 9)]
    report = run_step(program, Step("a", TRANSFORMS["arrange_columns"](**ON_CPU)))
    assert report.matches == matches
    for after, expected in zip((logits(program, 5, 3), logits(program, 9)), before, strict=True):
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)
    widths = {w.shape[0] for n, w in program.weights.items() if n.endswith("_ordered")}
    assert widths == ({-(-width // 4) * 4} if matches else set())


class Scaled(nn.Module):
    """A gated product of rows, each times a number of its own, as `scale` says."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.gate, self.outer = nn.Linear(64, 1), nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.scale(self, x)


@pytest.mark.parametrize(
    ("scale", "matches"),
    [
        (lambda self, x: torch.sigmoid(self.gate(x)) * self.outer(torch.tanh(x) * x), 1),
        (lambda self, x: self.outer(torch.tanh(x) * x) * torch.sigmoid(self.gate(x)), 1),
        (lambda self, x: torch.sigmoid(x) * self.outer(torch.tanh(x) * x), 0),
        (lambda self, x: torch.sigmoid(self.gate(x)) * self.outer(torch.tanh(x)), 0),
    ],
    ids=["before", "after", "whole rows", "no pass to join"],
)
def test_a_number_per_row_is_multiplied_before_the_product(scale, matches):
    scaled = Scaled(scale)
    model = Small(lambda self, hidden: self.scaled(hidden))
    model.scaled = scaled
    program = program_of(model, "canonicalize")
    before = [logits(program, 5, 3), logits(program, 9)]
    report = run_step(program, Step("f", TRANSFORMS["fold_row_scale"](**ON_CPU)))
    assert report.matches == matches
    for after, expected in zip((logits(program, 5, 3), logits(program, 9)), before, strict=True):
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
