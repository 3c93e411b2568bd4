"""fuse_rest compiles what nothing recognised, spares what must stay and holds at other sizes."""

import logging

import pytest
import torch
from test_library import Small, count, logits, program_of
from tiny_models import tiny_model
from torch import nn

from autodeploy.transforms.capture.export import capture
from autodeploy.transforms.compiled_region import CompiledRegion
from autodeploy.transforms.library import fuse_rest
from autodeploy.transforms.pipeline import run_recipe, run_step
from autodeploy.transforms.recipe import Step, load_recipe
from autodeploy.transforms.regions import find_regions, refresh_values
from autodeploy.transforms.transform import TRANSFORMS
from autodeploy.transforms.verify import SequenceCheck, reference_logits

aten = torch.ops.aten


@pytest.fixture
def op_by_op(monkeypatch):
    """Regions are made, and run by the interpreter of the graph: a compiler takes seconds."""

    def compile(self, inputs, settings):
        self.launches = 1

    monkeypatch.setattr(CompiledRegion, "load", lambda self: False)
    monkeypatch.setattr(CompiledRegion, "compile", compile)


def fused(program, **options):
    values = {"devices": ("cpu",), "saves": 1, **options}
    return run_step(program, Step("fuse_rest", TRANSFORMS["fuse_rest"](**values)))


def called(program):
    return [n.target for n in program.graph.nodes if isinstance(n.target, CompiledRegion)]


def gated(self, x):
    norm = self.base.model.layers[0].input_layernorm
    parts = x.view(1, -1, 4, 16).split([4, 12], -1)
    gate = nn.functional.silu(parts[1].reshape(1, -1, 48))
    y = norm(x)[..., :48] * gate
    turned = torch.cat([parts[0] * 2, -parts[0]], -1).transpose(1, 2)
    return torch.cat([y, turned.transpose(1, 2).flatten(2)[..., :16] + y[..., :16]], -1)


class TestFuseRest:
    def test_ops_between_kernels_become_one_call_at_any_number_of_tokens(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path))
        program = program_of(Small(gated), "canonicalize")
        expected = [logits(program, n) for n in (5, 3, 1)]
        report = fused(program)
        assert report.matches == 1
        assert "of 1 kinds" in report.note
        assert count(program, aten.silu.default) == count(program, aten.cat.default) == 0
        found = [logits(program, n) for n in (5, 3, 1)]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # A second program finds it on disk.
        again = CompiledRegion(called(program)[0].key, called(program)[0].module.graph)
        assert again.load()
        assert again.launches == called(program)[0].launches

    def test_equal_layers_share_one_function(self, op_by_op):
        program = program_of(tiny_model("nanochat"), "canonicalize")
        expected = [logits(program, 5, 3), logits(program, 1)]
        fused(program, saves=5)
        functions = called(program)
        assert len(functions) == 2
        assert len(set(functions)) == 1
        found = [logits(program, 5, 3), logits(program, 1)]
        torch.testing.assert_close(found, expected)

    def test_a_gate_joins_the_product_it_gates(self, op_by_op):
        program = program_of(Small(gated), "canonicalize")
        refresh_values(program)
        (region,) = find_regions(program)
        assert {aten.silu.default, aten.mul.Tensor} <= {n.target for n in region.nodes}
        assert len(region.outputs) == 1

    def test_random_ops_reductions_over_tokens_and_lone_ops_are_spared(self, op_by_op):
        def body(self, x):
            norm = self.base.model.layers[0].input_layernorm
            return norm(x * 2) + x.mean(1, keepdim=True).cumsum(-1)

        program = program_of(Small(body), "canonicalize")
        assert fused(program).matches == 0

    def test_what_saves_too_little_is_not_compiled(self, op_by_op):
        program = program_of(Small(gated), "canonicalize")
        assert fused(program, saves=100).matches == 0

    def test_other_devices_are_left_alone(self):
        assert fused(program_of(Small(gated), "canonicalize"), devices=("cuda",)).matches == 0

    def test_a_region_that_does_not_compile_runs_op_by_op_and_says_why(self, monkeypatch, caplog):
        def compile(self, inputs, settings):
            raise RuntimeError("no compiler here")

        monkeypatch.setattr(CompiledRegion, "load", lambda self: False)
        monkeypatch.setattr(CompiledRegion, "compile", compile)
        program = program_of(Small(gated), "canonicalize")
        with caplog.at_level(logging.WARNING, "autodeploy"):
            assert fused(program).matches == 0
        assert "no compiler here" in caplog.text
        assert fuse_rest.FuseRest.name == "fuse_rest"


@pytest.mark.parametrize("kind", ["deepseek_v3", "mamba2"])
def test_models_keep_their_logits_with_caches(kind, op_by_op):
    model = tiny_model(kind)
    program = capture(model)
    recipe = load_recipe("default", {"fuse_rest": {"devices": ("cpu",), "saves": 1}})
    run_recipe(program, recipe, check=SequenceCheck(reference_logits(model)))
    assert called(program)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_next", "deepseek_v3", "mamba2", "gpt_oss", "falcon_h1"])
def test_compiled_models_keep_their_logits_with_caches(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path))
    model = tiny_model(kind)
    program = capture(model)
    recipe = load_recipe("default", {"fuse_rest": {"devices": ("cpu",), "saves": 1}})
    run_recipe(program, recipe, check=SequenceCheck(reference_logits(model)))
    assert called(program)
