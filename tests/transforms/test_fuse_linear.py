"""fuse_linear rewrites what stands around linears, spares near misses and holds at other sizes."""

import pytest
import torch
from test_library import Small, count, logits, op_names, program_of
from tiny_models import tiny_model
from torch import nn

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.linear import fused_linear, triton_linear
from autodeploy.custom_ops.linear.skinny_config import Tiling
from autodeploy.transforms.capture.export import capture
from autodeploy.transforms.pipeline import run_recipe, run_step
from autodeploy.transforms.recipe import Step, load_recipe
from autodeploy.transforms.transform import TRANSFORMS
from autodeploy.transforms.verify import SequenceCheck, reference_logits

aten = torch.ops.aten


def rewritten(model, tolerance=0.0):
    """The arguments of every fused linear after the step, which must keep the logits."""
    program = program_of(model, "canonicalize", "gather_logits", "fuse_parallel_linears")
    linears = count(program, aten.linear.default)
    expected = [logits(program, 5, 3), logits(program, 1)]
    step = run_step(program, Step("f", TRANSFORMS["fuse_linear"](devices=("cpu",))))
    assert step.matches == linears
    found = [logits(program, 5, 3), logits(program, 1)]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert count(program, aten.linear.default) == 0
    return program, [
        fused_linear.bind(n.args, n.kwargs)
        for n in program.graph.nodes
        if n.target == fused_linear.overload
    ]


def test_a_layer_is_four_products_with_everything_inside():
    model = tiny_model("llama")
    layers = model.config.num_hidden_layers
    program, calls = rewritten(model, 1e-6)
    assert len(calls) == 4 * layers + 1
    assert "rms_norm" not in op_names(program)
    assert count(program, aten.add.Tensor) == 0
    qkv, out, gate_up, down = calls[:4]
    assert [c["norm"] for c in (qkv, out, gate_up, down)] == [True, False, True, False]
    assert [c["residual"] is not None for c in (qkv, out, gate_up, down)] == [0, 1, 0, 1]
    assert gate_up["gated"]
    assert gate_up["activation"] == "silu"
    assert qkv["eps"] == model.config.rms_norm_eps
    assert {c["norm_weight"].target for c in calls if c["norm"]} == {
        *(f"model_layers_{i}_{n}_weight" for i in range(layers)
          for n in ("input_layernorm", "post_attention_layernorm")), "model_norm_weight",
    }  # fmt: skip


def test_the_heads_rows_are_chosen_before_its_norm():
    _, calls = rewritten(tiny_model("llama", num_hidden_layers=1), 1e-6)
    head = calls[-1]
    assert head["norm"]
    assert head["x"].target in (aten.index.Tensor, aten.index_select.default)
    assert head["x"].args[0].target == fused_linear.overload


@pytest.mark.parametrize(("kind", "activation"), [("phi3", "silu"), ("gemma", "gelu_pytorch_tanh")])
def test_gates_of_other_spellings_are_found(kind, activation):
    _, calls = rewritten(tiny_model(kind, num_hidden_layers=1), 1e-5)
    assert [c["activation"] for c in calls if c["gated"]] == [activation]
    if kind == "gemma":
        assert {c["norm_offset"] for c in calls if c["norm"]} == {1.0}


def test_a_norm_that_several_read_and_layers_normed_last_stay_apart():
    _, calls = rewritten(tiny_model("olmo2", num_hidden_layers=1), 1e-6)
    # Only the head's norm stands before a product.
    assert [c["norm"] for c in calls].count(True) == 1
    assert all(c["residual"] is None for c in calls)

    def body(self, x):
        layer = self.base.model.layers[0]
        y = layer.input_layernorm(x)
        return layer.self_attn.q_proj(y) + y

    _, calls = rewritten(Small(body))
    assert not any(c["norm"] for c in calls)
    assert calls[0]["residual"] is not None


def test_sums_that_broadcast_or_scale_and_products_read_twice_are_spared():
    def body(self, x):
        q = self.base.model.layers[0].self_attn.q_proj
        scaled = torch.add(q(x), x, alpha=2)
        broadcast = q(x * 2) + x[:, :1]
        product = q(x * 3)
        twice = (product + x) * product
        itself = q(x * 4)
        return scaled + broadcast.sin() + twice.cos() + (itself + itself).sin()

    _, calls = rewritten(Small(body))
    assert all(c["residual"] is None for c in calls)


def test_a_sum_of_two_products_goes_with_one_of_them():
    def body(self, x):
        q = self.base.model.layers[0].self_attn.q_proj
        return q(x * 2) + q(x * 3)

    program, calls = rewritten(Small(body))
    assert [c["residual"] is not None for c in calls] == [False, True, False]
    assert count(program, aten.add.Tensor) == 0


def test_a_gate_whose_halves_are_read_elsewhere_stays_apart():
    def body(self, x):
        gate, up = self.base.model.layers[0].mlp.gate_proj(x).chunk(2, -1)
        return nn.functional.silu(gate) * up + up

    _, calls = rewritten(Small(body))
    assert not any(c["gated"] for c in calls)


def test_an_activation_alone_is_taken_in():
    def body(self, x):
        mlp = self.base.model.layers[0].mlp
        return mlp.down_proj(nn.functional.gelu(mlp.gate_proj(x)))

    _, calls = rewritten(Small(body))
    assert [c["activation"] for c in calls] == ["gelu", "", ""]


def test_nothing_is_done_on_devices_without_a_kernel():
    program = program_of(tiny_model("llama"), "canonicalize", "fuse_parallel_linears")
    assert run_step(program, Step("f", TRANSFORMS["fuse_linear"]())).matches == 0


@pytest.mark.skipif(not gpu.interpreted(), reason="kernels run on the device")
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_served_model_keeps_its_logits(kind):
    model = tiny_model(kind, num_hidden_layers=1)
    check = SequenceCheck(reference_logits(model))
    program = capture(model)
    run_recipe(program, load_recipe("default", {"fuse_linear": {"devices": ["cpu"]}}), check=check)
    assert not any("linear" in name for name in program.contract.eager)
    ops = [n.meta.get("op") for n in program.graph.nodes]
    assert [ops.count(name) for name in ("fused_linear", "add_linear")] == [3, 2]


@pytest.mark.skipif(not gpu.interpreted(), reason="kernels run on the device")
def test_kernels_in_half_precision_give_the_models_logits(monkeypatch):
    # Few and large tiles: the interpreter is slow.
    few, many = Tiling("gemv", block_n=128, block_k=128), Tiling("dot", block_n=128, block_k=64)
    monkeypatch.setattr(triton_linear, "tiling_of", lambda tokens, *_: few if tokens <= 2 else many)
    model = tiny_model("llama", num_hidden_layers=1).half()
    whole = SequenceCheck(reference_logits(model))
    program = capture(model)
    recipe = load_recipe("default", {"fuse_linear": {"devices": ["cpu"]}})

    def check(program, step):
        if step.id == "load":
            whole(program, step)

    with gpu.interpreted_kernels():
        run_recipe(program, recipe, check=check)
    names = ("fused_linear", "add_linear")
    fused = [n for n in program.graph.nodes if n.meta.get("op") in names]
    assert {n.meta["implementation"] for n in fused} == {"triton"}
