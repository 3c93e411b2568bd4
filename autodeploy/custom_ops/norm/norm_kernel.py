"""The kernel of every RMS norm: rows of one or two strides, a residual before, after or not."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "eps", "offset"])
def norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    rows,
    inner,
    x_outer,
    x_inner,
    r_outer,
    r_inner,
    eps,
    offset,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Row r of x is at (r // inner) * x_outer + (r % inner) * x_inner; out and total have no gaps.

    ADD: "none", "before" (x + residual is normalised and written to `total`) or "after".
    """
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < WIDTH
    if HAS_WEIGHT:
        # Of the model: no kernel before this one writes it.
        scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = (row < rows)[:, None] & inside[None, :]
    start = (row // inner) * x_outer + (row % inner) * x_inner
    value = tl.load(x + start[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    place = row[:, None] * WIDTH + column[None, :]
    if ADD != "none":
        r_start = (row // inner) * r_outer + (row % inner) * r_inner
        other = tl.load(residual + r_start[:, None] + column[None, :], mask=mask, other=0.0)
        other = other.to(tl.float32)
    if ADD == "before":
        summed = (value + other).to(total.dtype.element_ty)
        tl.store(total + place, summed, mask=mask)
        value = summed.to(tl.float32)

    mean = tl.sum(value * value, axis=1) / WIDTH
    value = value * tl.rsqrt(mean + eps)[:, None]
    # Rounded where the reference rounds, and nowhere else.
    narrow = x.dtype.element_ty
    if HAS_WEIGHT:
        if CAST_BEFORE_WEIGHT:
            value = value.to(narrow).to(tl.float32)
            if HAS_OFFSET:
                scale = (scale + offset).to(weight.dtype.element_ty).to(tl.float32)
            value = value * scale[None, :]
        else:
            value = value * (scale + offset)[None, :]
    if ADD == "after":
        # `when` sees to it that the norm's own result has x's dtype here.
        value = value.to(narrow).to(tl.float32) + other
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)
