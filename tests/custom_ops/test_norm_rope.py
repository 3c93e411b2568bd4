"""Norms and rotary embeddings equal transformers' own, in float32 and bfloat16."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotary
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox_rotary
from transformers.models.helium.modeling_helium import apply_rotary_pos_emb as helium_rotary
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from autodeploy.custom_ops.norm import rms_norm
from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.rope import rope
from autodeploy.transforms.capture.norms import prove_rms_norm
from autodeploy.transforms.capture.rotary import prove_rope


def functions(op, **arguments):
    choice = Choice(torch.device("cpu"), arguments)
    return [op.reference, *(i.function for i in op.implementations if i.when(choice))]


def norm_of(kind, width, dtype):
    module = kind(width, eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.copy_(torch.randn(width, generator=torch.Generator().manual_seed(3)))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm])
def test_the_proved_form_of_a_norm_gives_its_numbers(kind, dtype):
    module = norm_of(kind, 40, dtype)
    form = prove_rms_norm(module)
    assert form == {
        "eps": 1e-5,
        "offset": 1.0 if kind is Gemma3RMSNorm else 0.0,
        "cast_before_weight": kind is LlamaRMSNorm,
    }
    x = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(4)).to(dtype) * 3
    with torch.no_grad():
        expected = module(x)
        for function in functions(rms_norm, x=x, weight=module.weight):
            found = function(x, module.weight, *form.values())
            tolerance = 1e-6 if dtype is torch.float32 else 8e-3
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "module",
    [torch.nn.LayerNorm(16, eps=1e-5), torch.nn.Linear(16, 16), torch.nn.SiLU()],
    ids=lambda m: type(m).__name__,
)
def test_what_is_no_rms_norm_is_not_taken_for_one(module):
    module.eps = 1e-5
    assert prove_rms_norm(module) is None


def test_a_norm_without_weights():
    x = torch.randn(4, 8)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    for function in functions(rms_norm, x=x, weight=None):
        torch.testing.assert_close(function(x, None, 1e-6, 0.0, True), expected)


@pytest.mark.parametrize(
    ("function", "interleaved"),
    [(llama_rotary, False), (neox_rotary, False), (glm_rotary, True), (helium_rotary, True)],
    ids=["llama", "gpt_neox", "glm", "helium"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proved_form_of_a_rotary_function_gives_its_numbers(function, interleaved, dtype):
    assert prove_rope(function) is interleaved
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 9, 16, generator=generator).to(dtype)
    k = torch.randn(1, 2, 9, 16, generator=generator).to(dtype)
    angles = torch.randn(1, 9, 8, generator=generator)
    table = torch.cat((angles, angles), -1)
    cos, sin = table.cos().to(dtype), table.sin().to(dtype)
    expected = function(q, k, cos, sin)
    for ours in functions(rope, q=q, k=k, cos=cos, sin=sin):
        for found, wanted in zip(ours(q, k, cos, sin, interleaved, 1), expected, strict=True):
            torch.testing.assert_close(
                found, wanted, rtol=1e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-6
            )


def test_a_narrower_table_leaves_the_rest_of_the_head_alone():
    q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    expected = glm_rotary(q, k, cos, sin)
    for found, wanted in zip(rope(q, k, cos, sin, True), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    turned, _ = rope(q, k, cos, sin)
    torch.testing.assert_close(turned[..., 8:], q[..., 8:])


def test_heads_last_layout():
    q, k = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16)
    cos, sin = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    expected = llama_rotary(q, k, cos, sin, unsqueeze_dim=2)
    for found, wanted in zip(rope(q, k, cos, sin, False, 2), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, cos, sin: (q * cos.unsqueeze(1), k * cos.unsqueeze(1)),
        lambda q, k, cos, sin: llama_rotary(k, q, cos, sin),
        lambda q, k, cos, sin: [2 * x for x in llama_rotary(q, k, cos, sin)],
    ],
)
def test_what_is_no_rotation_is_not_taken_for_one(function):
    assert prove_rope(function) is None
