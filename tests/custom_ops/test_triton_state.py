"""State ops in Triton: chosen, strided and padded as a server calls them; on a GPU where one is."""

from contextlib import nullcontext

import pytest
import torch
from test_state_ops import CASES

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.op import Choice, OpError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not gpu.has_triton() or (DEVICE == "cpu" and not gpu.interpreted()), reason="no triton"
)
STEPS = {
    "decode": ([1, 1, 1], [4, 0, 9]),
    "padded decode": ([1, 1, 0, 0], [4, 0, 0, 0]),
    "mixed": ([40, 1, 0, 9], [0, 3, 2, 5]),
}


def arguments_of(case, lengths, past, dtype, padding=0, seed=0):
    """A call of the cached form in the middle of sequences, with `padding` rows after them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths) + padding
    arguments = case.make(tokens, generator)
    for name in case.per_token:
        if arguments[name] is not None:
            # As slices of one projection: a row is in one piece, and rows have gaps.
            value = arguments[name].to(dtype)
            wide = torch.cat([value.flatten(1)] * 2, 1)
            arguments[name] = wide[:, wide.shape[1] // 2 :].unflatten(1, value.shape[1:])
    ends = torch.tensor([0, *lengths]).cumsum(0)
    arguments |= {
        "cu_q": ends.int(),
        "kv_len": torch.tensor([n + p for n, p in zip(lengths, past, strict=True)]).int(),
        "state_slot": torch.arange(len(lengths)) + 1,
    }
    for spec in case.op.cached.caches(arguments):
        cache = torch.randn(len(lengths) + 2, *spec.shape, generator=generator)
        arguments[spec.name] = cache.to(spec.dtype)
    moved = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    return {n: moved[n] for n in case.op.cached.op.arguments}, spec.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", CASES)
def test_slices_of_projections_and_padded_steps_equal_the_reference(name, step, dtype):
    case = CASES[name]
    lengths, past = STEPS[step]
    padding = lengths.count(0) if step == "padded decode" else 2 * (step == "mixed")
    arguments, state = arguments_of(case, lengths, past, dtype, padding)
    op = case.op.cached.op
    with gpu.interpreted_kernels() if DEVICE == "cpu" else nullcontext():
        chosen = op.choose(Choice(torch.device(DEVICE), arguments))
    assert (chosen.name, chosen.capturable) == ("triton", True)
    expected_state = arguments[state].clone()
    expected = op.reference(**arguments | {state: expected_state})
    found = chosen.function(*arguments.values())
    assert found.dtype is expected.dtype
    used = sum(lengths)
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    for ours, theirs in ((found[:used], expected[:used]), (arguments[state], expected_state)):
        scale = theirs.float().abs().max()
        assert (ours.float() - theirs.float()).abs().max() / scale < tolerance
    # Whatever padding holds, it must not become NaN somewhere later.
    assert found[used:].isfinite().all()


def test_a_cache_that_would_have_to_be_copied_is_refused():
    arguments, state = arguments_of(CASES["ssd"], [1, 1], [1, 1], torch.float32)
    arguments[state] = arguments[state].transpose(-1, -2)
    function = CASES["ssd"].op.cached.op.implementation("triton").function
    with pytest.raises(OpError, match="rows of a cache of states must be contiguous"):
        function(*arguments.values())
