"""Gated delta layers as one op: one kernel for decoding, several for prompts, as the reference."""

from contextlib import nullcontext

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.state import conv_delta_rule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not gpu.has_triton() or (DEVICE == "cpu" and not gpu.interpreted()), reason="no triton"
)
STEPS = {
    "decode": ([1, 1], [0, 9]),
    "padded decode": ([1, 0], [4, 0]),
    "as many tokens as sequences": ([3, 0, 1, 0], [4, 1, 0, 0]),
    "mixed": ([10, 1, 0], [0, 3, 2]),
}
FORMS = {
    "whole layer": {},
    "one head a key": {"groups": 4},
    "no norm": {"norm": False},
    "no gates": {"gates": False, "activation": None},
    "three taps and a bias": {"taps": 3, "bias": True, "norm": False},
    "uneven sizes": {"keys": 12, "values": 20},
}


def arguments_of(
    step, dtype, heads=4, groups=2, keys=16, values=16, taps=4, bias=False, gates=True, norm=True,
    activation="silu",
):  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    lengths, past = STEPS[step]
    tokens = len(lengths) if step.endswith("decode") else sum(lengths)
    width = 2 * groups * keys + heads * values

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    # Slices of one projection: rows have gaps.
    x, gate, a, b = random(tokens, width + heads * values + 2 * heads).split(
        [width, heads * values, heads, heads], 1
    )
    given = {
        "x": x,
        "conv_weight": random(width, taps),
        "conv_bias": random(width) if bias else None,
        "g": a if gates else -a.float().abs(),
        "beta": b if gates else b.sigmoid(),
        "a_log": random(heads) if gates else None,
        "dt_bias": random(heads) if gates else None,
        "gate": gate if norm else None,
        "norm_weight": random(values) if norm else None,
        "conv_state": random(len(lengths) + 2, width, taps - 1),
        "delta_state": random(len(lengths) + 2, heads, keys, values).float(),
        "cu_q": torch.tensor([0, *lengths]).cumsum(0).int(),
        "kv_len": torch.tensor([n + p for n, p in zip(lengths, past, strict=True)]).int(),
        "state_slot": torch.arange(len(lengths)) + 1,
        "activation": activation,
        "qk_l2norm": True,
        "eps": 1e-6,
    }
    return {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("form", FORMS)
def test_a_delta_layer_in_one_kernel_equals_its_parts(form, step, dtype):
    given = arguments_of(step, dtype, **FORMS[form])
    expected_given = {n: v.clone() if n.endswith("_state") else v for n, v in given.items()}
    with gpu.interpreted_kernels() if DEVICE == "cpu" else nullcontext():
        chosen = conv_delta_rule.choose(Choice(torch.device(DEVICE), given))
    assert (chosen.name, chosen.capturable) == ("triton", True)
    expected = conv_delta_rule.reference(**expected_given)
    # Twice: the counters of a launch are zeros again after it.
    states = given["conv_state"].clone(), given["delta_state"].clone()
    chosen.function(*given.values())
    for name, before in zip(("conv_state", "delta_state"), states, strict=True):
        given[name].copy_(before)
    found = chosen.function(*given.values())
    assert found.dtype is expected.dtype
    used = int(given["cu_q"][-1])
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    assert torch.equal(given["conv_state"], expected_given["conv_state"])
    for ours, theirs in (
        (found[:used], expected[:used]), (given["delta_state"], expected_given["delta_state"]),
    ):  # fmt: skip
        assert (ours.float() - theirs.float()).norm() / theirs.float().norm() < tolerance
    assert (found[used:] == 0).all()
