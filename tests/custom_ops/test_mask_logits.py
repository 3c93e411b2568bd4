"""Masks of packed bits: all implementations forbid what the bits forbid, in the rows they name."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.sampling import mask_logits
from autodeploy.custom_ops.sampling.mask_logits import mask_logits_table
from autodeploy.custom_ops.sampling.triton_sampling import mask_in_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = gpu.has_triton() and (DEVICE == "cuda" or gpu.interpreted())


def in_blocks(logits, bits, rows):
    mask_in_blocks(logits, bits, rows, block=128, num_warps=1)


WAYS = {"reference": (mask_logits.reference, DEVICE), "table": (mask_logits_table, "cpu")}
if TRITON:
    WAYS["triton"] = (in_blocks, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 300, 1000])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_without_a_bit_are_forbidden_and_nothing_else_changes(way, vocab, dtype):
    function, device = WAYS[way]
    random = np.random.default_rng(vocab)
    rows = [3, 0, 4]
    allowed = random.random((len(rows), vocab)) < 0.5
    words = -(-vocab // 32)
    padded = np.ones((len(rows), words * 32), dtype=bool)
    padded[:, :vocab] = allowed
    bits = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
    logits = torch.from_numpy(random.standard_normal((6, vocab))).to(device, dtype)
    expected = logits.clone()
    for row, mask in zip(rows, allowed, strict=True):
        expected[row, torch.from_numpy(~mask).to(device)] = -torch.inf
    function(logits, torch.from_numpy(bits).to(device), torch.tensor(rows, device=device))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("way", WAYS)
def test_no_rows_and_no_tokens_are_fine(way):
    function, device = WAYS[way]
    logits = torch.zeros(2, 40, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    function(logits, torch.zeros((0, 2), dtype=torch.int32, device=device), none)
    assert (logits == 0).all()
    bits = torch.zeros((1, 2), dtype=torch.int32, device=device)
    function(logits, bits, torch.tensor([1], device=device))
    assert (logits[0] == 0).all()
    assert (logits[1] == -torch.inf).all()


@pytest.mark.skipif(not TRITON, reason="no triton")
def test_the_triton_implementation_is_chosen_and_capturable():
    with gpu.interpreted_kernels() if DEVICE == "cpu" else nullcontext():
        chosen = mask_logits.choose(Choice(torch.device(DEVICE), {}))
    assert (chosen.name, chosen.capturable) == ("triton", True)


def test_without_a_gpu_bytes_are_looked_up():
    if not gpu.interpreted() and DEVICE == "cpu":
        assert mask_logits.choose(Choice(torch.device("cpu"), {})).name == "table"
