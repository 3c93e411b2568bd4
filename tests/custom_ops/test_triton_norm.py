"""Norms and gates in Triton equal their references: in the interpreter here, on a GPU where one is.

The interpreter cuts numbers off where a GPU rounds them to bfloat16, so that here float16 shows
whether the roundings are in the right places.
"""

from contextlib import nullcontext

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.gate import gated_activation
from autodeploy.custom_ops.moe.gates import ACTIVATIONS
from autodeploy.custom_ops.norm import add_rms_norm, rms_norm, rms_norm_add
from autodeploy.custom_ops.norm.triton_norm import rows_of
from autodeploy.custom_ops.op import Choice, OpError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not gpu.has_triton() or (DEVICE == "cpu" and not gpu.interpreted()), reason="no triton"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMS = [(0.0, True), (1.0, True), (0.0, False), (1.0, False)]
FORM_NAMES = ["plain", "offset", "weight in float32", "offset in float32"]


def normal(*shape, dtype=torch.float32, seed=0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return made.to(DEVICE, dtype)


def choose(op, *args):
    with gpu.interpreted_kernels() if DEVICE == "cpu" else nullcontext():
        return op.choose(Choice(torch.device(DEVICE), op.bind(args, {})))


def kernel(op, *args):
    """The Triton implementation; it must be the one that is chosen."""
    chosen = choose(op, *args)
    assert chosen.name == "triton"
    assert chosen.capturable
    return chosen.function


def close(found, expected):
    assert found.dtype is expected.dtype
    assert found.shape == expected.shape
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-2}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("offset", "cast_first"), FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("shape", [(1, 5, 96), (1, 64), (2, 3, 2, 7), (1, 1, 5000)], ids=str)
def test_a_norm_equals_its_reference(shape, offset, cast_first, dtype):
    x, weight = normal(*shape, dtype=dtype) * 3, normal(shape[-1], dtype=dtype, seed=1)
    args = (x, weight, 1e-5, offset, cast_first)
    close(kernel(rms_norm, *args)(*args), rms_norm.reference(*args))


@pytest.mark.parametrize(("offset", "cast_first"), FORMS, ids=FORM_NAMES)
def test_roundings_are_where_the_reference_has_them(offset, cast_first):
    x, weight = normal(60, 128, dtype=torch.float16), normal(128, dtype=torch.float16, seed=1)
    args = (x, weight, 1e-6, offset, cast_first)
    found, expected = kernel(rms_norm, *args)(*args), rms_norm.reference(*args)
    # The mean is summed in another order: a number in a few hundred falls on another side.
    assert (found != expected).float().mean() < 0.01


def test_a_norm_without_weights_and_a_weight_of_another_dtype():
    x = normal(4, 48, dtype=torch.float16)
    for args in ((x, None, 1e-6), (x, normal(48), 1e-6), (x, normal(48), 1e-6, 1.0, False)):
        found, expected = kernel(rms_norm, *args)(*args), rms_norm.reference(*args)
        close(found.half(), expected.half())
        assert found.dtype is expected.dtype


def test_heads_are_normed_where_a_fused_projection_left_them():
    heads = normal(1, 7, 6 * 24).unflatten(-1, (6, 24))
    weight = normal(24, seed=1)
    views = (heads, heads[:, :, 2:4], heads.transpose(1, 2)[:, 1:], heads[0, :, 1], heads[0, 0, 0])
    for x in views:
        assert rows_of(x)[0] is x
        close(kernel(rms_norm, x, weight, 1e-5)(x, weight, 1e-5), rms_norm(x, weight, 1e-5))
    apart = normal(3, 4, 5, 48)[:2, :3, :4, ::2]
    assert rows_of(apart)[0] is not apart
    close(kernel(rms_norm, apart, weight, 1e-5)(apart, weight, 1e-5), rms_norm(apart, weight, 1e-5))
    none = heads[:, :0]
    assert kernel(rms_norm, none, weight, 1e-5)(none, weight, 1e-5).shape == none.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("offset", "cast_first"), FORMS, ids=FORM_NAMES)
@pytest.mark.parametrize("shape", [(1, 5, 96), (3, 1, 700)], ids=str)
def test_norms_with_a_residual_equal_their_references(shape, offset, cast_first, dtype):
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=2)
    weight = normal(shape[-1], dtype=dtype, seed=1)
    args = (x, residual, weight, 1e-5, offset, cast_first)
    for found, expected in zip(
        kernel(add_rms_norm, *args)(*args), add_rms_norm.reference(*args), strict=True
    ):
        close(found, expected)
    args = (x, weight, residual, 1e-5, offset, cast_first)
    close(kernel(rms_norm_add, *args)(*args), rms_norm_add.reference(*args))


def test_a_residual_may_have_gaps_of_its_own():
    x, weight = normal(1, 6, 32), normal(32, seed=1)
    wide = normal(1, 6, 2, 64, seed=2)
    for residual in (wide[:, :, 0, :32], wide[:, :3, :, 32:].reshape(1, 6, 32)):
        args = (x, residual, weight, 1e-5)
        for found, expected in zip(
            kernel(add_rms_norm, *args)(*args), add_rms_norm.reference(*args), strict=True
        ):
            close(found, expected)
    heads, residual = normal(6, 4, 24)[:, :2], normal(6, 2, 24, seed=3)
    args = (heads, normal(24), residual, 1e-5)
    close(kernel(rms_norm_add, *args)(*args), rms_norm_add.reference(*args))


def test_residuals_that_broadcast_or_differ_in_dtype_are_left_to_the_reference():
    x, weight = normal(1, 6, 32), normal(32)
    for residual in (normal(1, 1, 32), normal(1, 6, 32, dtype=torch.bfloat16)):
        assert choose(add_rms_norm, x, residual, weight, 1e-5).name == "reference"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_activation_equals_its_reference(activation, dtype):
    x = normal(3, 2 * 40, dtype=dtype) * 3
    x[0, :6] = torch.tensor([0.0, 1e-4, -30.0, 30.0, -1e-3, 1.5])
    found = kernel(gated_activation, x, activation)(x, activation)
    close(found, gated_activation.reference(x, activation))


def test_gated_rows_may_be_strided_and_wider_than_a_block():
    wide = normal(2, 3, 2, 2600)
    for x in (wide, wide[:, :, 1], wide[..., 600:], wide[:, :0], wide[0, 0, 0]):
        found = kernel(gated_activation, x, "silu")(x, "silu")
        close(found, gated_activation.reference(x, "silu"))


def test_an_unknown_activation_of_a_gate_is_refused():
    with pytest.raises(OpError, match="no activation 'softsign'"):
        gated_activation(normal(2, 4), "softsign")
