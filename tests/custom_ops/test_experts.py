"""Experts equal transformers' own layers, whatever their layout and gate."""

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from transformers.activations import ACT2FN
from transformers.integrations.moe import batched_mm_experts_forward

from autodeploy.custom_ops.moe import ACTIVATIONS, experts, gate
from autodeploy.custom_ops.op import OpError
from autodeploy.transforms.capture.experts import prove_gate

ON_CPU = [i for i in experts.implementations if i.name.endswith("cpu")]
FUNCTIONS = [experts.reference, *(i.function for i in ON_CPU)]
CASES = {
    "mixtral": {},
    "gpt_oss": {},
    "qwen3_next": {},
    "deepseek_v3": {},
    "nemotron_h": {
        "layers_block_type": ["moe", "moe"], "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "num_hidden_layers": 2,
        "moe_shared_expert_intermediate_size": 32,
    },
}  # fmt: skip


def experts_module(name):
    model = tiny_model(name, **CASES[name])
    return next(m for m in model.modules() if hasattr(m, "_apply_gate"))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 19])
def test_an_experts_layer_of_transformers_gives_the_same(name, function, tokens):
    module = experts_module(name)
    form = prove_gate(module)
    assert form is not None
    generator = torch.Generator().manual_seed(0)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    count, width = up.shape[0], module.down_proj.shape[2 if module.is_transposed else 1]
    x = torch.randn(tokens, width, generator=generator)
    index = torch.stack([torch.randperm(count, generator=generator)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2, generator=generator)
    bias = [getattr(module, n, None) for n in ("gate_up_proj_bias", "down_proj_bias")]
    with torch.no_grad():
        expected = batched_mm_experts_forward(module, x, index, weights)
        found = function(
            x, index, weights, up, module.down_proj, *bias,
            form["activation"], bool(module.has_gate), form.get("interleaved", False),
            bool(module.is_transposed), form.get("limit", 0.0), form.get("alpha", 0.0),
        )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_expert_of_another_rank_adds_nothing(function):
    x, up, down = torch.randn(3, 8), torch.randn(2, 12, 8), torch.randn(2, 8, 6)
    weights = torch.rand(3, 2)
    here = function(x, torch.tensor([[0, 1], [1, 0], [0, 1]]), weights, up, down)
    partly = function(x, torch.tensor([[0, 2], [2, 0], [2, 2]]), weights, up, down)
    only = weights * torch.tensor([[1.0, 0], [0, 1], [0, 0]])
    alone = function(x, torch.tensor([[0, 1], [1, 0], [0, 1]]), only, up, down)
    torch.testing.assert_close(partly, alone)
    assert not torch.allclose(partly, here)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", [{}, {"gated": False}, {"limit": 1.0, "alpha": 1.7}])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_implementations_equal_the_reference_in_bfloat16(transposed, form, weight_dtype):
    generator = torch.Generator().manual_seed(1)
    inner = 24 if form.get("gated", True) else 12
    shapes = ((5, 40), (9, 40), (5, inner, 40), (5, 40, 12), (5, inner), (5, 40))
    _, x, up, down, *bias = (torch.randn(n, generator=generator).bfloat16() / 3 for n in shapes)
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    index = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(9)])
    weights = torch.rand(9, 3, generator=generator).to(weight_dtype)
    expected = experts.reference(x, index, weights, up, down, *bias, transposed=transposed, **form)
    assert expected.dtype is torch.bfloat16
    for implementation in ON_CPU:
        found = implementation.function(
            x, index, weights, up, down, *bias, transposed=transposed, **form
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_tokens_give_no_rows(function):
    up, down = torch.randn(2, 12, 8), torch.randn(2, 8, 6)
    index = torch.zeros(0, 2, dtype=torch.int64)
    assert function(torch.empty(0, 8), index, torch.empty(0, 2), up, down).shape == (0, 8)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_transformers_own(name):
    x = torch.randn(200, generator=torch.Generator().manual_seed(2)) * 4
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x))


def test_a_gate_that_is_none_of_ours_is_not_guessed():
    module = experts_module("mixtral")
    module._apply_gate = lambda x: x.chunk(2, -1)[0].cos() * x.chunk(2, -1)[1]
    assert prove_gate(module) is None


def test_activations_are_told_apart():
    module = experts_module("mixtral")
    for name, function in ACTIVATIONS.items():
        module._modules.pop("act_fn", None)
        module.act_fn = function
        assert prove_gate(module)["activation"] == name


def test_an_unknown_activation_is_an_error_that_lists_the_known():
    with pytest.raises(OpError, match="known: silu"):
        gate(torch.randn(2, 8), "swash")


def test_a_gate_no_op_expresses_runs_as_batched_products_and_says_so(caplog):
    from autodeploy.transforms.capture.export import capture
    from autodeploy.transforms.verify import SequenceCheck, reference_logits

    model = tiny_model("mixtral")
    for module in model.modules():
        if hasattr(module, "_apply_gate"):
            module._apply_gate = lambda x: x.chunk(2, -1)[0].cos() * x.chunk(2, -1)[1]
    SequenceCheck(reference_logits(model)).prove(capture(model))
    assert "run as batched products" in caplog.text


def test_the_tiny_config_has_routed_experts():
    assert tiny_config("mixtral").num_local_experts == 4
