"""add_linear_scaled leaves what the next norm takes, and fused_linear is as right with it.

Triton's interpreter cuts numbers off where a GPU rounds them to bfloat16: there float16 is the
sharper check. Shares of a tile (`SHARED`) wait for each other, which only a GPU can run.
"""

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.linear import (
    add_linear,
    add_linear_scaled,
    fused_linear,
    skinny_config,
    triton_linear,
)
from autodeploy.custom_ops.linear.dot_linear import can_leave
from autodeploy.custom_ops.linear.skinny_config import (
    Tiling,
    scaled_ahead,
    tiling_of,
)
from autodeploy.custom_ops.op import Choice

pytestmark = pytest.mark.skipif(
    not gpu.has_triton() or not (gpu.interpreted() or torch.cuda.is_available()),
    reason="no triton",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
NORMS = {
    "weight": (True, 0.0, True),
    "offset": (True, 1.0, False),
    "rounded offset": (True, 1.0, True),
    "no weight": (False, 0.0, True),
}


def random(*shape, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def sums(tokens, columns=264, width=72, dtype=torch.bfloat16, stream=None, norm="weight", **more):
    """Arguments of a sum onto a residual stream whose next norm is given."""
    has_weight, offset, rounded = NORMS[norm]
    return {
        "residual": random(1, tokens, columns, dtype=stream or dtype, seed=1),
        "x": random(1, tokens, width, dtype=dtype),
        "weight": random(columns, width, dtype=dtype) * width**-0.5,
        "next_weight": random(columns, dtype=dtype) if has_weight else None,
        "next_offset": offset,
        "next_cast_before_weight": rounded,
        **more,
    }


def left(given):
    """The stream, scaled and squares that the kernels make of fresh arguments."""
    residual = given["residual"].clone()
    scaled, squares = triton_linear.add_linear_scaled_rows(**{**given, "residual": residual})
    return residual, scaled, squares


def assert_left(given):
    """Whether rows are scaled, and their squares summed up, as they were stored."""
    residual, scaled, squares = left(given)
    plain = given["residual"].clone()
    triton_linear.add_linear_rows(plain, given["x"], given["weight"], given.get("bias"))
    assert torch.equal(residual, plain)
    wide = residual.double()
    dtype = given["weight"].dtype
    if given["next_weight"] is not None:
        scale = given["next_offset"] + given["next_weight"].double()
        if given["next_cast_before_weight"]:
            scale = scale.to(dtype).double()
        wide = wide * scale
    assert scaled.dtype is dtype
    assert squares.dtype is torch.float32
    # Both the norm's weight and rows are cut off in the interpreter.
    error = (scaled.double() - wide).abs() / wide.abs().clamp_min(1e-6)
    assert error.max() < (2**-6 if dtype is torch.bfloat16 else 2**-9)
    torch.testing.assert_close(
        squares.double().sum(-1), residual.double().square().sum(-1), rtol=1e-5, atol=0
    )
    fake = add_linear_scaled(**{
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    })  # fmt: skip
    for made, ruled in zip((scaled, squares), fake, strict=True):
        assert made.shape == ruled.shape
        assert made.dtype is ruled.dtype


@pytest.fixture(autouse=True)
def rows_of_any_width_are_scaled_ahead(monkeypatch):
    monkeypatch.setattr(skinny_config, "AHEAD_WIDTH", 0)


@pytest.fixture
def tiled(monkeypatch):
    """Makes every product run with one tiling."""

    def use(tiling):
        monkeypatch.setattr(triton_linear, "tiling_of", lambda *_: tiling)

    return use


@pytest.mark.parametrize(
    ("tokens", "split", "norm", "stream"),
    [
        (2, 1, "weight", torch.float32), (2, 3, "no weight", torch.bfloat16),
        (7, 1, "offset", torch.bfloat16), (16, 3, "weight", torch.bfloat16),
        (33, 1, "rounded offset", torch.bfloat16), (33, 3, "offset", torch.float32),
        (64, 1, "weight", torch.bfloat16), (64, 3, "no weight", torch.float32),
    ],
)  # fmt: skip
def test_rows_are_left_scaled_with_their_squares(tiled, tokens, split, norm, stream):
    tiled(Tiling("dot", block_n=64, block_k=64, split=split))
    assert_left(sums(tokens, width=200, norm=norm, stream=stream))
    assert_left(sums(tokens, norm=norm, dtype=torch.float16))


@pytest.mark.parametrize("block_n", [64, 128])
def test_tiles_may_be_larger_and_tokens_more(tiled, block_n):
    tiled(Tiling("dot", block_n=block_n, block_k=128, block_m=16))
    for columns in (40, 328):
        assert_left(sums(20, columns=columns, bias=random(columns)))


@pytest.mark.parametrize("tokens", [3, 40])
def test_whatever_does_the_product_leaves_both(tiled, tokens):
    assert_left(sums(tokens))
    for tiling in (Tiling("cublas"), Tiling("dot", block_n=32, block_k=32)):
        tiled(tiling)
        assert_left(sums(tokens))
    given = sums(tokens)
    wide = torch.cat([given["residual"]] * 2, dim=-1)
    total = wide[..., : given["residual"].shape[-1]]
    expected, scaled, squares = left(given)
    found = triton_linear.add_linear_scaled_rows(**{**given, "residual": total})
    assert torch.equal(total, expected)
    assert torch.equal(found[0], scaled)
    assert torch.equal(found[1], squares)


def normed(tokens, form, norm, dtype, stream=None):
    """Arguments of a product that norms what was left, garbage in place of x, and the true x."""
    residual, scaled, squares = left(sums(tokens, dtype=dtype, stream=stream, norm=norm))
    has_weight, offset, rounded = NORMS[norm]
    width, rows = residual.shape[-1], 112
    given = {
        "weight": random(rows, width, dtype=dtype) * width**-0.5,
        "bias": random(rows, dtype=dtype),
        "norm": True, "norm_offset": offset, "cast_before_weight": rounded, "eps": EPS,
        "norm_weight": random(width, dtype=dtype) if has_weight else None,
        "scaled": scaled, "squares": squares, **form,
    }  # fmt: skip
    return given, torch.full_like(residual, 77.0), residual


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("split", "form", "tokens", "dtype"),
    [
        (1, {}, 33, torch.float16), (3, {}, 2, torch.bfloat16),
        (1, {"gated": True, "activation": "silu"}, 7, torch.bfloat16),
        (3, {"gated": True, "activation": "silu"}, 64, torch.float16),
    ],
    ids=["whole", "split", "gate", "split gate"],
)  # fmt: skip
def test_a_product_of_scaled_rows_is_that_of_normed_rows(tiled, split, form, tokens, dtype, norm):
    tiled(Tiling("dot", block_n=64, block_k=64, split=split))
    for stream in (None, torch.float32):
        given, garbage, residual = normed(tokens, form, norm, dtype, stream)
        wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in given.items()}
        wanted = fused_linear.reference(residual.double(), **wide)
        theirs = fused_linear(residual, **given).double()
        ours = triton_linear.fused_linear_rows(garbage, **given).double()
        bound = 10 if gpu.interpreted() and dtype is torch.bfloat16 else 2
        assert (ours - wanted).norm() <= bound * (theirs - wanted).norm()


@pytest.mark.parametrize("tokens", [1, 65])
def test_what_was_left_is_read_only_where_it_is_filled(tokens):
    assert not scaled_ahead(tokens, 4096)
    given, _, residual = normed(tokens, {}, "weight", torch.float16)
    for name in ("scaled", "squares"):
        given[name] = torch.full_like(given[name], torch.nan)
    found = triton_linear.fused_linear_rows(residual, **given)
    torch.testing.assert_close(found, fused_linear(residual, **given), rtol=1e-2, atol=1e-2)


def test_other_kernels_norm_rows_themselves(tiled):
    given, _, residual = normed(5, {}, "weight", torch.float16)
    given |= {name: torch.full_like(given[name], torch.nan) for name in ("scaled", "squares")}
    tiled(Tiling("cublas"))
    found = triton_linear.fused_linear_rows(residual, **given)
    torch.testing.assert_close(found, fused_linear(residual, **given), rtol=1e-2, atol=1e-2)


def test_every_sum_of_some_tokens_has_tiles_of_which_squares_are_left():
    for columns in (64, 1024, 2048, 2560, 3072, 4096, 5120, 8192, 16384):
        for tokens in (2, 16, 17, 33, 64):
            assert can_leave(tiling_of(tokens, columns, 4096, False))


def test_the_kernels_are_chosen_where_they_hold():
    def chosen(**more):
        given = add_linear_scaled.bind((), {**sums(3), **more})
        return add_linear_scaled.choose(Choice(torch.device("cpu"), given)).name

    assert chosen() == "reference"
    if gpu.interpreted():
        with gpu.interpreted_kernels():
            assert chosen() == "triton"
            assert chosen(next_weight=None) == "triton"
            assert chosen(next_weight=random(264).float()) == "reference"
            assert chosen(weight=random(264, 76)) == "reference"


def test_the_reference_is_the_sum_and_its_rows():
    given = sums(3, dtype=torch.float32)
    total, expected = (given["residual"].clone() for _ in range(2))
    scaled, squares = add_linear_scaled(**{**given, "residual": total})
    add_linear(expected, given["x"], given["weight"])
    assert torch.equal(total, expected)
    torch.testing.assert_close(scaled, total * given["next_weight"])
    torch.testing.assert_close(squares.sum(-1), total.square().sum(-1))
