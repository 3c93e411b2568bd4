"""Triton kernel that puts each new token's key and value at its slot."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slot_stride"], do_not_specialize_on_alignment=["slot_ptr"])
def write_pages_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slot_ptr,
    k_token, k_head, v_token, v_head, k_page, k_slot, k_cache_head, v_page, v_slot, v_cache_head,
    slot_stride,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T * ceil(HKV / BLOCK_H)): some heads of one token, k [T, HKV, D] and v [T, HKV, DV]."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    PARTS: tl.constexpr = (HKV + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    head = tl.program_id(0) % PARTS * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    slot = tl.load(slot_ptr + token * slot_stride).to(tl.int64)
    page = slot // PAGE
    inside = slot % PAGE
    d = tl.arange(0, BLOCK_D)[None, :]
    kept = (head < HKV) & (d < D)
    k = tl.load(k_ptr + token * k_token + head * k_head + d, mask=kept)
    k_at = k_cache_ptr + page * k_page + inside * k_slot + head * k_cache_head + d
    tl.store(k_at, k, mask=kept)
    dv = tl.arange(0, BLOCK_DV)[None, :]
    kept_v = (head < HKV) & (dv < DV)
    v = tl.load(v_ptr + token * v_token + head * v_head + dv, mask=kept_v)
    v_at = v_cache_ptr + page * v_page + inside * v_slot + head * v_cache_head + dv
    tl.store(v_at, v, mask=kept_v)
