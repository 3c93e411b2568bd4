"""route in Triton equals its reference: in the interpreter here, on a GPU where one is."""

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.moe import route
from autodeploy.custom_ops.op import Choice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not gpu.has_triton() or (DEVICE == "cpu" and not gpu.interpreted()), reason="no triton"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def chosen(*args):
    choice = Choice(torch.device(DEVICE), route.bind(args, {}))
    if DEVICE == "cuda":
        return route.choose(choice)
    with gpu.interpreted_kernels():
        return route.choose(choice)


def logits_of(*shape, dtype=torch.float32):
    """No two logits of a token are equal, in any dtype."""
    generator = torch.Generator().manual_seed(len(shape))
    rows = torch.rand(shape, generator=generator).argsort(-1) - shape[-1] / 2
    return (rows / 32).to(DEVICE, dtype)


def assert_equal_to_reference(*args):
    implementation = chosen(*args)
    assert implementation.name == "triton"
    assert implementation.capturable
    (index, weights), (expected, shares) = implementation.function(*args), route.reference(*args)
    assert index.dtype is torch.int64
    assert torch.equal(index, expected)
    assert weights.dtype is shares.dtype is args[3]
    # The interpreter cuts bfloat16 off instead of rounding it.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[args[3]]
    torch.testing.assert_close(weights, shares, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("experts", "k"), [(4, 2), (60, 4), (128, 8), (7, 7), (257, 1)])
def test_every_size_equals_the_reference(experts, k, normalize, dtype):
    assert_equal_to_reference(logits_of(5, experts), k, normalize, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_may_be_narrow_strided_and_of_more_dimensions(dtype):
    wide = logits_of(3, 2, 64, dtype=dtype)
    for logits in (wide, wide[:, 0], wide[:, :, :40], wide.transpose(1, 2), wide[:0]):
        k = min(3, logits.shape[-1])
        if logits.shape[-1] > 2:
            assert_equal_to_reference(logits, k, True, dtype)


def test_many_tokens_share_a_program():
    assert_equal_to_reference(logits_of(515, 100), 3, True, torch.float32)


def test_of_equal_logits_the_lower_index_comes_first():
    logits = torch.zeros(2, 9, device=DEVICE)
    logits[1, 5] = 1
    index, weights = chosen(logits, 3, True, torch.float32).function(logits, 3, True, torch.float32)
    assert index.tolist() == [[0, 1, 2], [5, 0, 1]]
    torch.testing.assert_close(weights[0], torch.full((3,), 1 / 3, device=DEVICE))


def test_logits_far_apart_still_name_different_experts():
    logits = torch.full((1, 20), -300.0, device=DEVICE)
    logits[0, 11] = 300.0
    index, _ = chosen(logits, 4, True, torch.float32).function(logits, 4, True, torch.float32)
    assert index[0, 0] == 11
    assert len(set(index[0].tolist())) == 4


def test_more_experts_or_choices_than_a_program_holds_are_left_to_the_reference():
    assert chosen(logits_of(2, 600), 4, True, torch.float32).name == "reference"
    assert chosen(logits_of(2, 100), 40, True, torch.float32).name == "reference"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("shared", "k"), [(1, 8), (2, 6), (3, 1)])
def test_shared_experts_come_first_and_weigh_one_or_their_gate(shared, k, gate, dtype):
    logits = logits_of(5, 40, dtype=dtype)
    column = 33 if gate else 0
    assert_equal_to_reference(logits, k, True, torch.float32, shared, column)
    index, weights = route.reference(logits, k, True, torch.float32, shared, column)
    alone, rest = route.reference(logits[:, : column or None], k, True, torch.float32)
    assert index[:, :shared].tolist() == [list(range(shared))] * 5
    assert torch.equal(index[:, shared:], alone + shared)
    assert torch.equal(weights[:, shared:], rest)
    expected = logits[:, column, None].float().sigmoid() if gate else torch.ones_like(rest[:, :1])
    assert torch.equal(weights[:, :shared], expected.expand(-1, shared))


def test_many_tokens_with_shared_experts_share_a_program():
    assert_equal_to_reference(logits_of(515, 104), 3, True, torch.float32, 1, 100)
    assert_equal_to_reference(logits_of(515, 100), 3, False, torch.bfloat16, 2)


def test_a_gate_does_not_count_among_the_experts_that_a_program_holds():
    assert_equal_to_reference(logits_of(2, 520), 4, True, torch.float32, 1, 512)
    assert chosen(logits_of(2, 600), 4, True, torch.float32, 1, 513).name == "reference"
    assert chosen(logits_of(2, 100), 30, True, torch.float32, 3).name == "reference"
