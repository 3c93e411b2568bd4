"""`launch` gives what `sample` gives, and on a GPU nothing in it waits for the device."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.runtime.device_sampler import DeviceSampler
from autodeploy.runtime.logprobs import token_logprobs
from autodeploy.runtime.messages import EngineRequest
from autodeploy.runtime.sampler import Sampler
from autodeploy.runtime.sampling_params import SamplingParams

VOCAB = 203
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EVERY = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.0},
    {"temperature": 1.3, "top_p": 0.95, "logprobs": 3},
    {"temperature": 0.0, "logprobs": 0},
    {"temperature": 0.9, "min_p": 0.1, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0.0, "logit_bias": {3: 50.0}, "bad_words_token_ids": [[9], [3, 3]]},
    {"temperature": 1.0, "allowed_token_ids": [4, 8, 100], "min_tokens": 2, "logprobs": 5},
]


def sampler_with(every) -> Sampler:
    sampler = Sampler(VOCAB, len(every))
    for row, params in enumerate(every):
        sampler.add(
            row,
            EngineRequest(
                request_id="r",
                prompt_token_ids=[1, 2, 3],
                params=SamplingParams(**params),
                eos_token_ids=[4],
                seed=row,
            ),
        )
    return sampler


def logits_of(count, seed=0, dtype=torch.float32):
    made = torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    return made.to(DEVICE, dtype)


@contextlib.contextmanager
def never_waiting():
    if DEVICE.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launch(sampler: Sampler, logits, rows):
    """Through the accelerator's code, in the interpreter where there is none."""
    if DEVICE.type == "cuda":
        with never_waiting():
            return sampler.launch(logits, rows)
    with gpu.interpreted_kernels() if gpu.interpreted() else contextlib.nullcontext():
        sampler._devices.setdefault(DEVICE, DeviceSampler(DEVICE, 2))
    table = sampler._entries(logits, rows)
    with torch.inference_mode():
        return sampler._on(DEVICE).launch(logits, table, rows, sampler._rules_of(table, rows))


def same(found, expected):
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert (found.bad_rows, found.reasons) == (expected.bad_rows, expected.reasons)
    for entries, others in zip(found.logprobs, expected.logprobs, strict=True):
        assert (entries is None) == (others is None)
        for entry, other in zip(entries or (), others or (), strict=True):
            assert (entry.token_id, entry.rank) == (other.token_id, other.rank)
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_on_the_cpu_launch_is_sample():
    sampler = sampler_with(EVERY)
    rows = np.arange(len(EVERY))
    logits = logits_of(len(EVERY)).cpu()
    sampling = sampler.launch(logits, rows)
    same(sampling.result(), sampler.sample(logits, rows))
    assert sampling.tokens.tolist() == sampling.result().token_ids.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_an_accelerator_steps_give_the_tokens_of_the_cpu(dtype):
    device, host = sampler_with(EVERY), sampler_with(EVERY)
    rows = np.array([5, 0, 7, 1, 2, 3, 4, 6])
    for step in range(5):
        logits = logits_of(len(rows), seed=step, dtype=dtype)
        sampling = launch(device, logits, rows)
        expected = host.sample(logits.cpu(), rows)
        same(sampling.result(), expected)
        assert sampling.tokens.tolist() == expected.token_ids.tolist()
        for row, token_id in zip(rows.tolist(), expected.token_ids.tolist(), strict=True):
            device.append(row, token_id)
            host.append(row, token_id)


def test_steps_may_be_collected_late_and_in_any_order():
    every = [{"temperature": 0.0}, {"temperature": 1.0, "logprobs": 1}]
    device, host = sampler_with(every), sampler_with(every)
    rows = np.arange(2)
    steps = [logits_of(2, seed=seed) for seed in range(7)]
    launched = [launch(device, logits, rows) for logits in steps]
    for at in (6, 0, 3, 1, 5, 2, 4):
        same(launched[at].result(), host.sample(steps[at].cpu(), rows))
    assert launched[0].result() is launched[0].result()


def test_more_rows_than_expected_and_rows_that_leave_are_fine():
    device, host = sampler_with(EVERY * 3), sampler_with(EVERY * 3)
    logits = logits_of(24)
    first = launch(device, logits[:1], np.array([23]))
    second = launch(device, logits, np.arange(24))
    for row in range(24):
        device.remove(row)
    same(first.result(), host.sample(logits[:1].cpu(), np.array([23])))
    same(second.result(), host.sample(logits.cpu(), np.arange(24)))


def test_rows_that_cannot_be_sampled_are_told_apart():
    every = [
        {"temperature": 0.0},
        {"temperature": 1.0, "logprobs": 2},
        {"temperature": 0.0, "allowed_token_ids": [4], "min_tokens": 2},
        {"temperature": 1.0, "allowed_token_ids": [4], "min_tokens": 2},
        {"temperature": 1.0, "repetition_penalty": 1.2},
        {"temperature": 1.0},
    ]
    device, host = sampler_with(every), sampler_with(every)
    logits = logits_of(6)
    logits[0, 5] = torch.nan
    logits[1] = -torch.inf
    logits[4, 0] = torch.inf
    rows = np.arange(6)
    found = launch(device, logits, rows).result()
    same(found, host.sample(logits.cpu(), rows))
    assert found.bad_rows == [0, 1, 2, 3, 4]


def test_warming_up_leaves_no_trace():
    every = [{"temperature": 1.0}]
    device, host = sampler_with(every), sampler_with(every)
    logits = logits_of(1, dtype=torch.bfloat16)
    launch(device, logits, np.arange(1)).result()
    device._on(DEVICE).warm_up(logits)
    same(launch(device, logits, np.arange(1)).result(), host.sample(logits.cpu(), np.arange(1)))


def test_prompt_logprobs_work_on_the_device():
    logits = logits_of(4)
    found = Sampler(VOCAB, 1).prompt_logprobs(logits, [1, 2, 3, 4], 2)
    for entries, others in zip(
        found, token_logprobs(logits.cpu(), [1, 2, 3, 4], [2] * 4), strict=True
    ):
        assert [e.token_id for e in entries] == [o.token_id for o in others]
