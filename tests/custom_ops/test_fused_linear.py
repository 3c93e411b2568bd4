"""fused_linear: every kernel equals the reference, whatever stands before and after the product.

Triton's interpreter cuts numbers off where a GPU rounds them to bfloat16, which costs some
times the error: there float16 is the sharper check.
"""

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.linear import add_linear, fused_linear, skinny_config, triton_linear
from autodeploy.custom_ops.linear.skinny_config import (
    Tiling,
    filled,
    narrow,
    tiling_of,
)
from autodeploy.custom_ops.op import Choice

pytestmark = pytest.mark.skipif(
    not gpu.has_triton() or not (gpu.interpreted() or torch.cuda.is_available()),
    reason="no triton",
)
DTYPES = [torch.bfloat16, torch.float16]
DEVICES = ["cuda"] if torch.cuda.is_available() else ["cpu"]
FORMS = {
    "plain": {},
    "bias": {"bias": True},
    "norm": {"norm": True, "norm_weight": True, "eps": 1e-5},
    "offset norm": {
        "norm": True, "norm_weight": True, "eps": 1e-5, "norm_offset": 1.0,
        "cast_before_weight": False,
    },
    "bare norm": {"norm": True, "eps": 1e-6},
    "gate": {"gated": True, "activation": "silu"},
    "normed gate with bias": {
        "norm": True, "norm_weight": True, "eps": 1e-5, "gated": True, "activation": "gelu",
        "bias": True,
    },
    "activation": {"activation": "gelu_pytorch_tanh", "bias": True},
    "residual": {"residual": True},
    "everything": {
        "norm": True, "norm_weight": True, "eps": 1e-5, "gated": True, "activation": "relu2",
        "bias": True, "residual": True,
    },
}  # fmt: skip


def arguments(tokens, rows, width, form, dtype=torch.bfloat16, device="cpu", scale=1.0):
    generator = torch.Generator().manual_seed(rows + width)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    given = dict(form)
    columns = rows // 2 if form.get("gated") else rows
    made = {
        "x": random(1, tokens, width) * scale,
        "weight": random(rows, width) * width**-0.5,
        "bias": random(rows),
        "norm_weight": random(width),
        "residual": random(1, tokens, columns),
    }
    for name, tensor in made.items():
        if name in ("x", "weight") or given.get(name):
            given[name] = tensor.to(dtype).to(device)
        else:
            given[name] = None
    return given


def exact(given):
    """The reference without rounding, float32 [..]."""
    wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    return fused_linear(**wide)


def assert_close(found, given):
    """As near to the exact result as the reference in the same dtype, or nearly so."""
    wanted = exact(given)
    ours = (found.float() - wanted).norm() / wanted.norm()
    theirs = (fused_linear(**given).float() - wanted).norm() / wanted.norm()
    residual = given["residual"]
    dtype = given["weight"].dtype
    assert found.dtype == (dtype if residual is None else residual.dtype)
    assert found.shape == wanted.shape
    cut_off = gpu.interpreted() and found.dtype is torch.bfloat16
    assert ours <= theirs * (10 if cut_off else 2) + 1e-6


def bound(given):
    return fused_linear.bind((), given)


@pytest.fixture
def tiled(monkeypatch):
    """Makes every product run with one tiling."""

    def use(tiling):
        monkeypatch.setattr(triton_linear, "tiling_of", lambda *_: tiling)

    return use


def run(given):
    return triton_linear.fused_linear_rows(*bound(given).values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("tokens", [1, 2])
def test_the_kernel_for_one_or_two_tokens_equals_the_reference(tiled, device, dtype, form, tokens):
    tiled(Tiling("gemv", block_n=4, block_k=64))
    given = arguments(tokens, 28, 120, form, dtype=dtype, device=device)
    assert_close(run(given), given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("split", [1, 3])
def test_the_kernel_for_some_tokens_equals_the_reference(tiled, device, dtype, form, split):
    tiled(Tiling("dot", block_n=16, block_k=32, split=split))
    given = arguments(5, 56, 136, form, dtype=dtype, device=device)
    assert_close(run(given), given)


class LaunchedTwice:
    """A kernel whose programs find, the second time, what all of them left the first time."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options):
            for _ in range(2):
                self.kernel[grid](*args, **options)

        return launch


@pytest.mark.skipif(not gpu.interpreted(), reason="on a GPU parts wait for each other themselves")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize(("tokens", "split"), [(5, 4), (40, 2), (16, 8)])
def test_each_part_of_a_tile_adds_up_its_share(tiled, monkeypatch, dtype, form, tokens, split):
    import triton
    import triton.language as tl

    from autodeploy.custom_ops.linear import dot_kernel, dot_linear

    @triton.jit
    def go_on(arrivals, SPLIT: tl.constexpr):
        pass

    # The interpreter runs programs one after the other: nobody can be waited for.
    monkeypatch.setattr(dot_kernel, "arrive", go_on)
    monkeypatch.setattr(dot_kernel, "dot_kernel", LaunchedTwice(dot_kernel.dot_kernel))
    monkeypatch.setattr(dot_linear, "_shared", lambda *_: True)
    tiled(Tiling("dot", block_n=16, block_k=32, split=split))
    given = arguments(tokens, 56, 256, FORMS[form], dtype=dtype)
    assert_close(run(given), given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["plain", "everything"])
@pytest.mark.parametrize("split", [1, 3])
def test_tokens_may_be_more_than_a_tile_has(tiled, device, form, split):
    tiled(Tiling("dot", block_n=16, block_k=32, split=split, block_m=16))
    given = arguments(37, 56, 136, FORMS[form], dtype=torch.float16, device=device)
    assert_close(run(given), given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("programs", [0, 5])
def test_the_kernel_for_many_tokens_equals_the_reference(tiled, device, dtype, form, programs):
    tiled(Tiling("wide", 64, 64, block_m=32, programs=programs, group=2))
    given = arguments(70, 216, 136, form, dtype=dtype, device=device)
    assert_close(run(given), given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("programs", [1, 2, 3, 4, 6, 7, 12, 13, 99])
def test_tiles_are_shared_among_any_number_of_programs(tiled, device, programs):
    # 3 x 2 tiles of 5 steps.
    tiled(Tiling("wide", block_n=32, block_k=64, block_m=32, programs=programs))
    given = arguments(64, 96, 320, FORMS["residual"], dtype=torch.float16, device=device)
    first = run(given)
    assert_close(first, given)
    assert torch.equal(run(given), first)


@pytest.mark.parametrize("device", DEVICES)
def test_operands_at_odd_addresses_go_through_a_library(tiled, device):
    tiled(Tiling("wide", block_n=32, block_k=64, block_m=32))
    given = arguments(70, 40, 64, FORMS["gate"], dtype=torch.float16, device=device)
    room = torch.empty(given["x"].numel() + 1, dtype=torch.float16, device=device)[1:]
    given["x"] = room.view(given["x"].shape).copy_(given["x"])
    assert_close(run(given), given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "tiling",
    [
        Tiling("gemv", block_n=16, block_k=64), Tiling("dot", 16, 32, split=3), Tiling("cublas"),
        Tiling("wide", 32, 64, block_m=32, programs=4),
    ],
    ids=lambda t: t.kernel,
)  # fmt: skip
@pytest.mark.parametrize("form", ["residual", "everything"])
def test_a_sum_in_place_is_the_sum(tiled, device, tiling, form):
    tiled(tiling)
    tokens = 2 if tiling.kernel == "gemv" else 5
    given = arguments(tokens, 56, 136, FORMS[form], dtype=torch.float16, device=device)
    expected = run(given)
    for name in ("reference", "triton"):
        residual = given["residual"].clone()
        function = add_linear.implementation(name).function
        assert function(**{**given, "residual": residual}) is None
        if name == "triton":
            assert torch.equal(residual, expected)
        assert_close(residual, given)
    # A residual with gaps between its rows.
    wide = torch.cat([given["residual"]] * 2, dim=-1)
    columns = expected.shape[-1]
    triton_linear.add_linear_rows(**{**given, "residual": wide[..., :columns]})
    assert torch.equal(wide[..., :columns], expected)
    assert torch.equal(wide[..., columns:], given["residual"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_many_tokens_go_through_a_library_and_equal_the_reference(tiled, device, form):
    tiled(Tiling("cublas"))
    given = arguments(9, 24, 64, form, device=device)
    assert_close(run(given), given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 40, 129])
@pytest.mark.parametrize("form", ["norm", "residual"])
def test_whatever_tiling_is_chosen_equals_the_reference(device, dtype, tokens, form):
    given = arguments(tokens, 96, 256, FORMS[form], dtype=dtype, device=device)
    assert_close(run(given), given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 40, 129])
@pytest.mark.parametrize("bias", [False, True])
def test_a_stream_in_float32_is_normed_and_added_to(device, dtype, tokens, bias):
    form = FORMS["norm"] | {"residual": True, "bias": bias}
    given = arguments(tokens, 96, 256, form, dtype=dtype, device=device)
    given |= {name: given[name].float() * 1.001 for name in ("x", "residual")}
    assert_close(run(given), given)
    without = given | {"residual": None}
    assert_close(run(without), without)
    total = given["residual"].clone()
    expected = run(given)
    operands = bound(given | {"residual": None})
    operands = {name: operands[name] for name in add_linear.arguments if name != "residual"}
    triton_linear.add_linear_rows(total, **operands)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_large_numbers_in_float16_stay_in_range(device):
    given = arguments(5, 32, 64, FORMS["norm"], dtype=torch.float16, device=device, scale=2e4)
    given["norm_weight"] *= 20
    found = run(given)
    assert found.isfinite().all()
    assert_close(found, given)


@pytest.mark.parametrize("device", DEVICES)
def test_a_split_product_is_the_same_every_time(tiled, device):
    tiled(Tiling("dot", block_n=32, block_k=32, split=4))
    given = arguments(7, 64, 512, FORMS["everything"], device=device)
    first = run(given)
    for _ in range(2):
        assert torch.equal(run(given), first)


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens_give_no_rows(device):
    given = arguments(0, 44, 64, FORMS["gate"], device=device)
    assert run(given).shape == (1, 0, 22)


def test_tilings_fit_and_fill_the_device():
    for rows, width in [(6144, 4096), (4096, 14336), (28672, 4096), (128256, 2048), (96, 80)]:
        for gated in (False, True):
            for tokens in (1, 2, 3, 16, 17, 64, 128, 129):
                tiling = tiling_of(tokens, rows, width, gated)
                if tiling.kernel != "dot":
                    continue
                tiles = tiling.block_n * (2 if gated else 1) + (
                    tiling.block_m or skinny_config.padded(tokens)
                )
                assert tiling.stages * 2 * tiling.block_k * tiles <= skinny_config.SHARED_BYTES
                assert tiling.stages >= 2
                assert tiling.block_n >= 16


def test_parts_are_equal_and_no_more_than_asked_for():
    for block_k in (64, 128):
        for rows, width in [(6144, 4096), (4096, 14336), (28672, 4096), (2048, 3072), (96, 80)]:
            for gated, tokens in [(False, 3), (True, 3), (False, 64), (True, 64)]:
                columns = rows // 2 if gated else rows
                tiling = filled(block_k, tokens, columns, width, gated, 132)
                tiles = -(-columns // tiling.block_n)
                assert tiling.split == 1 or width % (tiling.block_k * tiling.split) == 0
                assert tiling.split == 1 or tiles * tiling.split <= 132
                rows_of_tile = tiling.block_n * (2 if gated else 1)
                stage = (
                    2
                    * tiling.block_k
                    * (rows_of_tile + (tiling.block_m or skinny_config.padded(tokens)))
                )
                assert tiling.stages >= 2
                assert tiling.stages * stage <= skinny_config.SHARED_BYTES


def test_only_small_products_of_some_tokens_are_narrow():
    assert narrow(1, 128, 2048).block_m == 16
    assert narrow(64, 128, 2048).block_m == 64
    assert narrow(65, 128, 2048) is None
    assert narrow(8, 4096, 4096) is None
    assert narrow(8, 4, 64).split == 1


def test_the_kernels_are_chosen_where_they_hold():
    def chosen(**given):
        made = {**arguments(3, 64, 64, FORMS["residual"]), **given}
        choice = Choice(torch.device("cpu"), bound(made))
        return fused_linear.choose(choice).name

    assert chosen() == "reference"
    if gpu.interpreted():
        with gpu.interpreted_kernels():
            assert chosen() == "triton"
            assert chosen(residual=torch.zeros(1, 3, 64)) == "triton"
            assert chosen(residual=torch.zeros(1, 3, 64).half()) == "reference"
            assert chosen(x=torch.zeros(1, 3, 64)) == "reference"
            assert chosen(x=torch.zeros(1, 3, 64), norm=True) == "triton"
            assert chosen(**arguments(3, 64, 60, {})) == "reference"
            assert chosen(activation="hardswish") == "triton"


def test_the_shape_rule_knows_gates_and_wider_residuals():
    given = arguments(3, 64, 32, FORMS["gate"])
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    result = fused_linear(**meta)
    assert result.shape == (1, 3, 32)
    assert result.dtype is torch.bfloat16
    meta["residual"] = torch.empty(1, 3, 32, device="meta")
    assert fused_linear(**meta).dtype is torch.float32
