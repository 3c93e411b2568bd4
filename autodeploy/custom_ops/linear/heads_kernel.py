"""Triton kernel of products by head, for few tokens: weights are there before the rows are."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def heads_linear_kernel(
    x_ptr, weight_ptr, out_ptr, tokens, x_token, x_head, w_head, w_row, w_column, out_token,
    out_head,
    N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N / BLOCK_N), H, ceil(T / BLOCK_T)): some rows of one head's weight, all of K.

    x [T, H, K], weight [H, N, K], out [T, H, N].
    """
    head = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    weight_at = weight_ptr + tl.cast(head, tl.int64) * w_head
    weight = tl.load(
        weight_at + k[:, None] * w_column + n[None, :] * w_row,
        mask=(k < K)[:, None] & (n < N)[None, :], other=0.0,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x_at = x_ptr + tl.cast(t, tl.int64)[:, None] * x_token + head * x_head + k[None, :]
    x = tl.load(x_at, mask=(t < tokens)[:, None] & (k < K)[None, :], other=0.0)
    y = tl.dot(x, weight, input_precision=PRECISION)
    out_at = out_ptr + tl.cast(t, tl.int64)[:, None] * out_token + head * out_head + n[None, :]
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=(t < tokens)[:, None] & (n < N)[None, :])
