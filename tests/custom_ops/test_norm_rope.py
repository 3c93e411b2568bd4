"""Norms and rotary embeddings equal transformers' own, in float32 and bfloat16."""

import shutil

import pytest
import torch
from tiny_models import tiny_model
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    apply_rotary_emb as heads_first_complex,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    apply_rotary_pos_emb_interleave as deepseek_rotary,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotary
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox_rotary
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb as gpt_oss_rotary
from transformers.models.helium.modeling_helium import apply_rotary_pos_emb as helium_rotary
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.llama4.modeling_llama4 import apply_rotary_emb as tokens_first_complex
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from autodeploy.custom_ops.norm import rms_norm
from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.rope import rope
from autodeploy.ladder import build_runner
from autodeploy.transforms.capture.norms import prove_rms_norm
from autodeploy.transforms.capture.rotary import (
    Form,
    prove_complex,
    prove_rope,
    returns_dtype_of_heads,
    turn,
)
from autodeploy.transforms.recipe import load_recipe


def functions(op, *args):
    """The reference and every implementation that applies."""
    choice = Choice(torch.device("cpu"), op.bind(args, {}))
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
        for function in functions(rms_norm, x, module.weight, *form.values()):
            found = function(x, module.weight, *form.values())
            tolerance = 1e-6 if dtype is torch.float32 else 8e-3
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_has_the_bits_of_a_llama_norm(dtype):
    module = norm_of(LlamaRMSNorm, 96, dtype)
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(5)).to(dtype) * 3
    with torch.no_grad():
        assert torch.equal(rms_norm.reference(x, module.weight, 1e-5), module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("cast_first", [True, False])
def test_norms_of_heads_sliced_out_of_a_projection(dtype, offset, cast_first):
    generator = torch.Generator().manual_seed(6)
    projected = torch.randn(1, 700, 6 * 24, generator=generator).to(dtype)
    weight = torch.randn(24, generator=generator).to(dtype)
    heads = projected.unflatten(-1, (6, 24))
    rows = projected[0, :, :48:2]
    for x in (
        heads,
        heads[:, :, 2:4],
        heads.transpose(1, 2)[:, 1:],
        rows,
        heads[:, :0],
        heads[0, 0, 0],
    ):
        expected = rms_norm.reference(x, weight, 1e-5, offset, cast_first)
        for function in functions(rms_norm, x, weight, 1e-5, offset, cast_first):
            found = function(x, weight, 1e-5, offset, cast_first)
            tolerance = 1e-5 if dtype is torch.float32 else 1.6e-2
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_native_forms_are_there_when_one_dtype_is_used_and_not_when_two_are():
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    x, wide = torch.randn(2, 8).bfloat16(), torch.randn(8)
    assert len(functions(rms_norm, x, wide.bfloat16(), 1e-5)) == 2
    assert len(functions(rms_norm, x, wide, 1e-5)) == 1
    assert rms_norm(x, wide, 1e-5).dtype is torch.float32
    q, cos = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 3, 8)
    assert len(functions(rope, q, q, cos.bfloat16(), cos.bfloat16())) == 2
    assert len(functions(rope, q, q, cos, cos)) == 1
    assert rope(q, q, cos, cos)[0].dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize(("tokens", "rotated"), [(1, 32), (400, 32), (5, 12)])
def test_rotations_of_heads_sliced_out_of_a_projection(
    dtype, interleaved, unsqueeze_dim, tokens, rotated
):
    generator = torch.Generator().manual_seed(7)
    heads = torch.randn(1, tokens, 9 * 32, generator=generator).to(dtype).unflatten(-1, (9, 32))
    q, k = heads[:, :, :6], heads[:, :, 6:8]
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    tables = torch.randn(1, tokens, 2 * rotated, generator=generator).to(dtype)
    cos, sin = tables.split(rotated, -1)
    args = (q, k, cos, sin, interleaved, unsqueeze_dim)
    expected = rope.reference(*args)
    for function in functions(rope, *args):
        for found, wanted in zip(function(*args), expected, strict=True):
            assert found.is_contiguous()
            assert wanted.is_contiguous()
            exact = {} if dtype is torch.float32 else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(found, wanted, **exact)


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
    for function in functions(rms_norm, x, None, 1e-6):
        torch.testing.assert_close(function(x, None, 1e-6, 0.0, True), expected)


@pytest.mark.parametrize(
    ("function", "interleaved"),
    [(llama_rotary, False), (neox_rotary, False), (glm_rotary, True), (helium_rotary, True)],
    ids=["llama", "gpt_neox", "glm", "helium"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_proved_form_of_a_rotary_function_gives_its_numbers(function, interleaved, dtype):
    assert prove_rope(function) == Form(interleaved)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, 9, 16, generator=generator).to(dtype)
    k = torch.randn(1, 2, 9, 16, generator=generator).to(dtype)
    angles = torch.randn(1, 9, 8, generator=generator)
    table = torch.cat((angles, angles), -1)
    cos, sin = table.cos().to(dtype), table.sin().to(dtype)
    expected = function(q, k, cos, sin)
    for ours in functions(rope, q, k, cos, sin):
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


def test_a_table_of_a_wider_dtype_leaves_heads_in_the_dtype_that_the_function_gives():
    assert not returns_dtype_of_heads(llama_rotary)
    assert returns_dtype_of_heads(
        lambda q, k, cos, sin: tuple(x.to(q.dtype) for x in llama_rotary(q, k, cos, sin))
    )


def test_a_bfloat16_model_with_a_float32_table_is_captured_whole():
    runner = build_runner(tiny_model("olmo2").bfloat16(), load_recipe("default")).program
    assert runner is not None
    assert not any("module" in name for name in runner.contract.eager)


def test_forms_with_half_a_table_or_with_pairs_put_apart_are_known_too():
    angles = torch.randn(1, 9, 8)
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    once, twice = (angles.cos(), angles.sin()), torch.cat((angles, angles), -1)
    for function, form, table in [
        (gpt_oss_rotary, Form(False, once=True), once),
        (deepseek_rotary, Form(True, apart=True), (twice.cos(), twice.sin())),
    ]:
        assert prove_rope(function) == form
        for found, wanted in zip(turn(q, k, *table, form), function(q, k, *table), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_complex_numbers_is_a_rotation(dtype):
    assert prove_complex(heads_first_complex) == 1
    assert prove_complex(tokens_first_complex) == 2
    assert prove_complex(lambda xq, xk, turns: heads_first_complex(xq, xk, turns.conj())) is None
    angles = torch.randn(1, 9, 8)
    q, k = torch.randn(1, 4, 9, 16).to(dtype), torch.randn(1, 1, 9, 16).to(dtype)
    expected = heads_first_complex(q, k, torch.polar(torch.ones_like(angles), angles))
    found = turn(q, k, angles.cos(), angles.sin(), Form(True, once=True), 1, True)
    close = {"rtol": 1e-2 if dtype is torch.bfloat16 else 1e-6, "atol": 1e-6}
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, **close)
