"""State-space layers as one op: one kernel for decoding, several for prompts, as the reference."""

from contextlib import nullcontext

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.state import conv_ssd_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not gpu.has_triton() or (DEVICE == "cpu" and not gpu.interpreted()), reason="no triton"
)
STEPS = {
    "decode": ([1, 1, 1], [4, 0, 9]),
    "padded decode": ([1, 0], [4, 0]),
    "as many tokens as sequences": ([3, 0, 1, 0], [4, 0, 0, 0]),
    "mixed": ([12, 1, 0], [0, 3, 2]),
}
FORMS = {
    "whole layer": {},
    "one group, logarithms": {"groups": 1, "log_rates": True},
    "bare": {"gate": False, "bias": False, "skip": False, "taps": 2},
    "uneven sizes": {"width": 20, "entries": 12},
}


def arguments_of(
    step, dtype, heads=4, groups=2, width=16, entries=16, taps=4, bias=True, gate=True, skip=True,
    log_rates=False,
):  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    lengths, past = STEPS[step]
    tokens = len(lengths) if step.endswith("decode") else sum(lengths)
    channels = heads * width + 2 * groups * entries

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    # Slices of one projection: rows have gaps.
    z, x, dt = random(tokens, channels + heads * width + heads).split(
        [heads * width, channels, heads], 1
    )
    rates = random(heads)
    given = {
        "x": x,
        "conv_weight": random(channels, taps),
        "conv_bias": random(channels) if bias else None,
        "dt": dt,
        "A": rates if log_rates else -rates.float().abs(),
        "D": random(heads) if skip else None,
        "dt_bias": random(heads) if bias else None,
        "gate": z if gate else None,
        "conv_state": random(len(lengths) + 2, channels, taps - 1),
        "ssm_state": random(len(lengths) + 2, heads, width, entries).float(),
        "cu_q": torch.tensor([0, *lengths]).cumsum(0).int(),
        "kv_len": torch.tensor([n + p for n, p in zip(lengths, past, strict=True)]).int(),
        "state_slot": torch.arange(len(lengths)) + 1,
        "activation": "silu",
        "dt_softplus": True,
        "dt_min": 0.001,
        "dt_max": 0.5,
        "log_rates": log_rates,
    }
    return {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("form", FORMS)
def test_a_state_space_layer_in_one_kernel_equals_its_parts(form, step, dtype):
    given = arguments_of(step, dtype, **FORMS[form])
    expected_given = {n: v.clone() if n.endswith("_state") else v for n, v in given.items()}
    with gpu.interpreted_kernels() if DEVICE == "cpu" else nullcontext():
        chosen = conv_ssd_scan.choose(Choice(torch.device(DEVICE), given))
    assert (chosen.name, chosen.capturable) == ("triton", True)
    expected = conv_ssd_scan.reference(**expected_given)
    found = chosen.function(*given.values())
    assert found.dtype is expected.dtype
    used = int(given["cu_q"][-1])
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    assert torch.equal(given["conv_state"], expected_given["conv_state"])
    for ours, theirs in (
        (found[:used], expected[:used]), (given["ssm_state"], expected_given["ssm_state"]),
    ):  # fmt: skip
        assert (ours.float() - theirs.float()).norm() / theirs.float().norm() < tolerance
    assert (found[used:] == 0).all()
