"""Tokens chosen in Triton are those of the references: in the interpreter, on a GPU where one is.

The draw is checked token by token: over evenly spaced numbers, which finds every kept set and
every probability.
"""

from contextlib import nullcontext

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.sampling import argmax_rows, sample_rows
from autodeploy.custom_ops.sampling.triton_sampling import argmax_parts, sample_by_search

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not gpu.has_triton() or (DEVICE == "cpu" and not gpu.interpreted()), reason="no triton"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape, dtype=torch.float32, seed=0, scale=3.0):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(DEVICE, dtype)


def column(values, dtype):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def drawn(function, logits, rows, numbers, **options):
    """Tokens [N] of one row of logits per entry (temperature, top_k, top_p, min_p) of rows."""
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    tokens = torch.full((len(rows),), -7, dtype=torch.int64, device=DEVICE)
    function(
        logits, column(temperature, torch.float32), column(top_k, torch.int32),
        column(top_p, torch.float64), column(min_p, torch.float32),
        column(numbers, torch.float64), tokens, **options,
    )  # fmt: skip
    return tokens.tolist()


def evenly(count):
    return [(i + 0.37) / count for i in range(count)]


@pytest.mark.parametrize("op", [argmax_rows, sample_rows], ids=lambda op: op.name)
def test_the_triton_implementation_is_chosen_and_capturable(op):
    with gpu.interpreted_kernels() if DEVICE == "cpu" else nullcontext():
        chosen = op.choose(Choice(torch.device(DEVICE), {}))
    assert (chosen.name, chosen.capturable) == ("triton", True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocab", "programs"), [(1, 5, 8), (3, 1000, 6), (2, 777, 1)])
def test_the_first_of_the_largest_is_found(rows, vocab, programs, dtype):
    # Rounded, so that the largest occurs several times.
    logits = normal(rows, vocab).round().to(dtype)
    found = argmax_parts(logits, block=128, programs=programs)
    assert found.tolist() == argmax_rows.reference(logits).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_a_likeliest_token_are_minus_one(dtype):
    logits = normal(6, 300, dtype=dtype)
    logits[0, 299] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    logits[3, :299] = -torch.inf
    logits[4, 0] = -torch.inf
    found = argmax_parts(logits, block=128).tolist()
    assert found == argmax_rows.reference(logits).tolist()
    assert found[:4] == [-1, -1, -1, 299]
    everything = [(1.0, 0, 1.0, 0.0)] * 6
    tokens = drawn(sample_by_search, logits, everything, [0.5] * 6, block=128)
    assert tokens[:4] == [-1, -1, -1, 299]
    assert min(tokens[4:]) >= 0


def test_rows_may_have_gaps_between_them():
    logits = normal(4, 512)[::2, :300]
    assert argmax_parts(logits).tolist() == argmax_rows.reference(logits).tolist()
    rows = [(1.0, 9, 0.9, 0.0)] * 2
    expected = drawn(sample_rows.reference, logits, rows, [0.2, 0.8])
    assert drawn(sample_by_search, logits, rows, [0.2, 0.8], block=128) == expected


RULES = {
    "none": (1.0, 0, 1.0, 0.0),
    "temperature": (0.6, 0, 1.0, 0.0),
    "coldest": (1e-30, 0, 1.0, 0.0),
    "hot": (40.0, 0, 0.5, 0.0),
    "top-k": (1.0, 7, 1.0, 0.0),
    "top-k of all": (1.0, 5000, 1.0, 0.0),
    "top-k of one": (1.3, 1, 1.0, 0.0),
    "top-p": (1.0, 0, 0.8, 0.0),
    "tiny top-p": (1.0, 0, 1e-9, 0.0),
    "top-p of nearly all": (2.0, 0, 1 - 1e-15, 0.0),
    "min-p": (1.0, 0, 1.0, 0.1),
    "min-p of one": (1.0, 0, 1.0, 1.0),
    "all": (0.8, 20, 0.7, 0.05),
}


@pytest.mark.parametrize(
    ("dtype", "rounded"),
    [(torch.float32, False), (torch.bfloat16, True)],
    ids=["float32", "bfloat16, many ties"],
)
@pytest.mark.parametrize("rule", RULES)
def test_the_tokens_drawn_are_those_of_the_reference(rule, dtype, rounded):
    logits = normal(1, 301)
    logits = (logits.round() if rounded else logits).to(dtype)
    logits[0, 11] = -torch.inf
    numbers = [0.0, *evenly(14), 1 - 2**-53]
    rows = [RULES[rule]] * len(numbers)
    many = logits.expand(len(numbers), -1)
    expected = drawn(sample_rows.reference, many, rows, numbers)
    assert drawn(sample_by_search, many, rows, numbers, block=128) == expected


def test_tokens_do_not_depend_on_the_batch():
    logits = normal(8, 500, dtype=torch.bfloat16)
    rows = [(0.9, 0, 0.95, 0.0), (1.1, 30, 1.0, 0.0), (0.7, 12, 0.9, 0.1), (1.0, 0, 1.0, 0.0)] * 2
    numbers = evenly(8)
    together = drawn(sample_by_search, logits, rows, numbers, block=128)
    for at in range(8):
        alone = drawn(
            sample_by_search, logits[at : at + 1], rows[at : at + 1], [numbers[at]], block=128
        )
        assert alone == together[at : at + 1]


def test_greedy_rows_and_tiny_vocabularies_are_left_in_peace():
    logits = normal(3, 3)
    rows = [(0.0, 0, 1.0, 0.0), (1.0, 2, 0.9, 0.0), (1.0, 0, 0.5, 0.2)]
    found = drawn(sample_by_search, logits, rows, [0.5] * 3)
    assert found == drawn(sample_rows.reference, logits, rows, [0.5] * 3)
    assert found[0] == -7
