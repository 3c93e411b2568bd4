"""Greedy tokens equal `model.generate` under everything a server does to a batch.

24 ragged requests arrive at different steps; prompts run in chunks of 7 tokens through pages of
4; some share a prefix; pages run out, so requests are preempted; some are aborted midway.
"""

import random
import re

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autodeploy.ladder import build_runner
from autodeploy.runtime.engine import EngineConfig, EngineCore
from autodeploy.runtime.messages import EngineRequest, TokenOutput, one_by_one
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.scheduler import SchedulerConfig
from autodeploy.transforms.recipe import load_recipe
from autodeploy.zoo.measure import tiny_model as zoo_model

REQUESTS = 24
ABORTED = {5: 3, 13: 0, 20: 6}
"""Request -> how many tokens it may have made when it is aborted."""


def workload(vocab_size, seed=1, count=REQUESTS):
    """(prompt, output tokens, arrival step) of each request; every third shares a prefix."""
    source = random.Random(seed)
    prefix = [source.randrange(3, vocab_size) for _ in range(9)]
    requests = []
    for index in range(count):
        own = [source.randrange(3, vocab_size) for _ in range(source.randint(1, 30))]
        prompt = prefix + own if index % 3 == 0 else own
        requests.append((prompt, source.randint(2, 20), source.randint(0, 30)))
    return requests


def serve(engine, requests):
    """Runs all requests to their end; returns tokens and finish reasons by request."""
    tokens = {index: [] for index in range(len(requests))}
    reasons = {}
    waiting = sorted(range(len(requests)), key=lambda index: requests[index][2])
    step = 0
    while waiting or engine.has_work:
        while waiting and requests[waiting[0]][2] <= step:
            index = waiting.pop(0)
            prompt, count, _ = requests[index]
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            engine.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
            if ABORTED.get(index) == 0:
                engine.abort([str(index)])
        for output in one_by_one(engine.step()):
            assert isinstance(output, TokenOutput), output
            index = int(output.request_id)
            assert index not in reasons, "output after the end"
            tokens[index] += output.token_ids
            if output.finish_reason:
                reasons[index] = output.finish_reason
            elif len(tokens[index]) == ABORTED.get(index):
                engine.abort([str(index)])
        step += 1
        assert step < 5000, "the engine does not come to an end"
    return tokens, reasons


def expected_tokens(model, prompt, count, use_cache=True):
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=count,
            eos_token_id=None, pad_token_id=0, use_cache=use_cache,
        )  # fmt: skip
    return ids[0, len(prompt) :].tolist()


def check(model, engine, vocab_size, use_cache=True, count=REQUESTS):
    requests = workload(vocab_size, count=count)
    tokens, reasons = serve(engine, requests)
    for index, (prompt, count, _) in enumerate(requests):
        expected = expected_tokens(model, prompt, count, use_cache)
        if index in ABORTED and len(tokens[index]) < count:
            assert reasons[index] == "abort"
            assert tokens[index] == expected[: len(tokens[index])]
        else:
            assert reasons[index] == "length"
            assert tokens[index] == expected, f"request {index}"
    return engine.stats()


def tight_engine(runner, num_pages):
    scheduler = SchedulerConfig(max_num_seqs=8, max_prefill_chunk=7, page_size=4, max_model_len=88)
    return EngineCore(runner, EngineConfig(scheduler=scheduler, num_pages=num_pages))


@pytest.mark.parametrize("name", [*ARCHITECTURES, "deepseek_v2", "minicpm3", "kimi_linear"])
def test_every_architecture_gives_the_tokens_of_generate(name):
    model = tiny_model(name)
    # `verify` holds logits to 1e-4 of eager after every step: prefill, chunks, decode, mixed.
    built = build_runner(model, load_recipe("default"), verify=True)
    assert (built.rung, built.cause) == (1, "")
    engine = tight_engine(built.runner, num_pages=24)
    stats = check(model, engine, vocab_size=256)
    paged = bool(built.runner.contract.token_groups)
    assert (stats.preemptions > 0) == paged
    recurrent = bool(built.runner.contract.sequence_groups)
    assert (stats.prefix_hits > 0) == (paged and not recurrent)
    assert stats.pages_used == 0


def test_the_demo_model_gives_the_tokens_of_generate():
    model = AutoModelForCausalLM.from_pretrained("examples/demo_model", dtype=torch.float32).eval()
    built = build_runner(model, load_recipe("default"), verify=True)
    assert built.rung == 1
    stats = check(model, tight_engine(built.runner, num_pages=24), model.config.vocab_size)
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0


@pytest.mark.parametrize(
    ("name", "rung", "cause"),
    [
        # Attention over compressed blocks of keys, kept in a cache of the model's own.
        ("deepseek_v4", 2, "only for some lengths|export failed"),
        # Every token sees all others: only a forward over all of them says what comes next.
        ("cpmant", 3, "is not autoregressive"),
    ],
)
def test_a_model_below_the_top_rung_is_exact_and_says_why(name, rung, cause, caplog):
    model = zoo_model(CONFIG_MAPPING[name]())
    built = build_runner(model, load_recipe("default"))
    assert built.rung == rung
    assert re.search(cause, built.cause)
    assert any(built.cause in record.getMessage() for record in caplog.records)
    # A few: such models are slow.
    engine = tight_engine(built.runner, num_pages=None)
    check(model, engine, vocab_size=256, use_cache=rung < 3, count=9)


def test_a_second_order_of_arrival_gives_the_same_tokens():
    model = tiny_model("llama")
    built = build_runner(model, load_recipe("default"))
    first, _ = serve(tight_engine(built.runner, 24), workload(256))
    late = [(p, c, 40 - step) for p, c, step in workload(256)]
    second, _ = serve(tight_engine(built.runner, 64), late)
    for index in set(range(REQUESTS)) - set(ABORTED):
        assert first[index] == second[index]
