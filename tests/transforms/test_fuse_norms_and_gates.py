"""fuse_add_norm and fuse_gated_activation rewrite, spare near misses and hold at other sizes."""

import pytest
import torch
from test_library import Small, count, logits, op_names, program_of
from tiny_models import tiny_model
from torch import nn

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.norm import rms_norm
from autodeploy.transforms.capture.export import capture
from autodeploy.transforms.pipeline import run_recipe, run_step
from autodeploy.transforms.recipe import Step, load_recipe
from autodeploy.transforms.transform import TRANSFORMS
from autodeploy.transforms.verify import SequenceCheck, reference_logits

aten = torch.ops.aten
ON_CPU = {"devices": ("cpu",)}


def fused(program, name, **options):
    return run_step(program, Step(name, TRANSFORMS[name](**(ON_CPU | options)))).matches


def rewritten(name, model, matches, tolerance=0.0):
    """The program after a step, which must find `matches` sites and keep the logits."""
    program = program_of(model, "canonicalize", "fuse_parallel_linears")
    expected = [logits(program, 5, 3), logits(program, 1)]
    assert fused(program, name) == matches
    found = [logits(program, 5, 3), logits(program, 1)]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return program


class TestFuseAddNorm:
    def test_a_sum_before_a_norm_is_written_once_and_read_by_both(self):
        model = tiny_model("llama")
        layers = model.config.num_hidden_layers
        # Every norm but the first follows a sum.
        program = rewritten("fuse_add_norm", model, 2 * layers)
        assert op_names(program).count("add_rms_norm") == 2 * layers
        assert op_names(program).count("rms_norm") == 1
        assert count(program, aten.add.Tensor) == 0

    def test_layers_that_are_normed_last_add_the_residual_in_the_norm(self):
        model = tiny_model("olmo2")
        layers = model.config.num_hidden_layers
        program = rewritten("fuse_add_norm", model, 2 * layers)
        # The last sum goes with the final norm instead.
        assert op_names(program).count("rms_norm_add") == 2 * layers - 1
        assert op_names(program).count("add_rms_norm") == 1

    def test_sums_that_broadcast_scale_or_have_another_norm_between_are_spared(self):
        def body(self, x):
            norm = self.base.model.layers[0].input_layernorm
            scaled = norm(torch.add(x, x * 3, alpha=2))
            broadcast = norm(x + x[:, :1] * 2)
            read_twice = norm(x * 5)
            return scaled * broadcast + read_twice + (read_twice * 2)

        rewritten("fuse_add_norm", Small(body), 0)

    def test_a_weight_that_an_earlier_norm_reads_stays_before_it(self):
        def body(self, x):
            norm = self.base.model.layers[0].input_layernorm
            first = norm(x)
            total = first.sin() + x
            return norm(total) * total

        rewritten("fuse_add_norm", Small(body), 1)

    def test_nothing_is_done_on_devices_without_a_kernel(self):
        program = program_of(tiny_model("llama"), "canonicalize", "fuse_parallel_linears")
        for name in ("fuse_add_norm", "fuse_gated_activation"):
            assert fused(program, name, devices=("cuda",)) == 0


class TestFuseGatedActivation:
    @pytest.mark.parametrize(
        ("kind", "activation"),
        [("llama", "silu"), ("phi3", "silu"), ("gemma", "gelu_pytorch_tanh")],
    )
    def test_gates_of_joined_projections_become_one_op(self, kind, activation):
        model = tiny_model(kind)
        layers = model.config.num_hidden_layers
        program = rewritten("fuse_gated_activation", model, layers, tolerance=1e-6)
        assert op_names(program).count("gated_activation") == layers
        gates = [n for n in program.graph.nodes if "gated_activation" in str(n.target)]
        assert {n.args[1] for n in gates} == {activation}
        assert count(program, aten.mul.Tensor) <= 2

    def test_other_halves_other_widths_and_values_read_twice_are_spared(self):
        def body(self, x):
            first, second = x.split([24, 40], -1)
            uneven = nn.functional.silu(first) * second[..., :24]
            a, b = x.chunk(2, -1)
            swapped = nn.functional.silu(b) * a
            active = nn.functional.silu(a)
            twice = active * b + active
            c, d = x.transpose(1, 2).chunk(2, 1)
            rows = (nn.functional.silu(c) * d).transpose(1, 2)
            return torch.cat([uneven, swapped + twice + rows, uneven[..., :8]], -1)

        rewritten("fuse_gated_activation", Small(body), 0)


@pytest.mark.skipif(not gpu.interpreted(), reason="kernels run on the device")
def test_a_lowered_model_runs_the_kernels_and_keeps_its_logits():
    model = tiny_model("llama", num_hidden_layers=1)
    check = SequenceCheck(reference_logits(model))
    program = capture(model)
    recipe = load_recipe("default", {"fuse_add_norm": ON_CPU, "fuse_gated_activation": ON_CPU})
    with gpu.interpreted_kernels():
        run_recipe(program, recipe, check=check)
    chosen = {n.meta["op"]: n.meta["implementation"] for n in program.graph.nodes if "op" in n.meta}
    for name in ("add_rms_norm", "gated_activation", "rms_norm"):
        assert chosen[name] == "triton"
    assert rms_norm.implementation("triton").function in {n.target for n in program.graph.nodes}
