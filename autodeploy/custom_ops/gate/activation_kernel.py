"""Activations for Triton kernels, by the names of `moe.gates.ACTIVATIONS`, and the gate kernel."""

import triton
import triton.language as tl


@triton.jit
def softplus(x):
    """log(1 + exp(x)) in float32, also where exp(x) is small; x itself above 20, as in torch."""
    grown = tl.exp(tl.minimum(x, 20.0))
    total = 1.0 + grown
    # log(total) loses what total was rounded by; the quotient puts it back.
    lost = tl.where(total == 1.0, 1.0, total - 1.0)
    near = tl.where(total == 1.0, grown, tl.log(total) * (grown / lost))
    return tl.where(x > 20.0, x, near)


@triton.jit
def tanh(x):
    """Of float32; the polynomial is for small x, where the quotient cancels."""
    return tl.where(tl.abs(x) < 0.02, x - x * x * x / 3, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """x float32, holding numbers of DTYPE, to float32 that is yet to be rounded to it.

    Rounds in between where torch's composition does.
    """
    tl.static_assert(
        ACTIVATION == "linear" or ACTIVATION == "silu" or ACTIVATION == "gelu"
        or ACTIVATION == "gelu_pytorch_tanh" or ACTIVATION == "quick_gelu" or ACTIVATION == "relu"
        or ACTIVATION == "relu2" or ACTIVATION == "relu6" or ACTIVATION == "leaky_relu"
        or ACTIVATION == "mish" or ACTIVATION == "hardswish" or ACTIVATION == "sigmoid"
        or ACTIVATION == "tanh"
    )  # fmt: skip
    y = x
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    if ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_pytorch_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u).
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if ACTIVATION == "quick_gelu":
        scaled = (x * 1.702).to(DTYPE).to(tl.float32)
        y = x * tl.sigmoid(scaled).to(DTYPE).to(tl.float32)
    if ACTIVATION == "relu":
        y = tl.maximum(x, 0.0)
    if ACTIVATION == "relu2":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    if ACTIVATION == "relu6":
        y = tl.minimum(tl.maximum(x, 0.0), 6.0)
    if ACTIVATION == "leaky_relu":
        y = tl.where(x > 0, x, 0.01 * x)
    if ACTIVATION == "mish":
        y = x * tanh(softplus(x))
    if ACTIVATION == "hardswish":
        y = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    if ACTIVATION == "sigmoid":
        y = tl.sigmoid(x)
    if ACTIVATION == "tanh":
        y = tanh(x)
    return y


@triton.jit(do_not_specialize=["rows", "scale_outer"])
def gate_kernel(
    x,
    out,
    scale,
    rows,
    inner,
    x_outer,
    x_inner,
    scale_outer,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    PDL: tl.constexpr,
):
    """x rows of 2 * WIDTH, out [rows, WIDTH]; one program per row and BLOCK columns.

    SCALED: each row times its number of scale, `inner` of which lie together.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    start = x + (row // inner) * x_outer + (row % inner) * x_inner
    narrow = x.dtype.element_ty
    gates = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    others = tl.load(start + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    active = activate(gates, ACTIVATION, narrow).to(narrow).to(tl.float32)
    result = active * others
    if SCALED:
        result *= tl.load(scale + (row // inner) * scale_outer + row % inner).to(tl.float32)
    tl.store(out + row * WIDTH + column, result.to(narrow), mask=inside)
