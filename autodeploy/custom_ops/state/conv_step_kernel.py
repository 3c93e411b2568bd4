"""A causal convolution inside another kernel: one token after another, inputs in registers.

At most 4 taps: the inputs of the three tokens before are values of their own.
"""

import triton
import triton.language as tl

from .conv_kernel import finish_total


@triton.jit
def old_inputs(row, column, mask, TAPS: tl.constexpr):
    """The inputs one, two and three tokens before the first new one, of a state [C, TAPS - 1]."""
    newest = row + column * (TAPS - 1) + (TAPS - 2)
    one = tl.load(newest, mask=mask, other=0.0).to(tl.float32)
    two = tl.zeros(column.shape, tl.float32)
    three = two
    if TAPS > 2:
        two = tl.load(newest - 1, mask=mask, other=0.0).to(tl.float32)
    if TAPS > 3:
        three = tl.load(newest - 2, mask=mask, other=0.0).to(tl.float32)
    return one, two, three


@triton.jit
def taps_of(weight, column, inside, TAPS: tl.constexpr):
    """The factors of the inputs now, one, two and three tokens ago, of a weight [C, TAPS]."""
    last = weight + column * TAPS + (TAPS - 1)
    now = tl.load(last, mask=inside, other=0.0).to(tl.float32)
    one = tl.load(last - 1, mask=inside, other=0.0).to(tl.float32)
    two = tl.zeros(column.shape, tl.float32)
    three = two
    if TAPS > 2:
        two = tl.load(last - 2, mask=inside, other=0.0).to(tl.float32)
    if TAPS > 3:
        three = tl.load(last - 3, mask=inside, other=0.0).to(tl.float32)
    return now, one, two, three


@triton.jit
def convolved(
    now, one, two, three, taps, bias, column, inside, weight, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """The output of a convolution whose inputs are now, one, two and three tokens ago."""
    total = now * taps[0] + one * taps[1] + two * taps[2] + three * taps[3]
    total = finish_total(total, bias, column, inside, weight, HAS_BIAS, ACTIVATION)
    return total.to(NARROW).to(tl.float32)


@triton.jit
def keep_inputs(row, column, mask, one, two, three, TAPS: tl.constexpr):
    """Writes the state of a convolution: the inputs one, two and three tokens ago."""
    place = row + column * (TAPS - 1) + (TAPS - 2)
    narrow = row.dtype.element_ty
    tl.store(place, one.to(narrow), mask=mask)
    if TAPS > 2:
        tl.store(place - 1, two.to(narrow), mask=mask)
    if TAPS > 3:
        tl.store(place - 2, three.to(narrow), mask=mask)
