"""Every rope type gives the tokens of `generate`, for sequences below, across and far beyond the
length at which its frequencies change: in chunks, with prefix reuse and with preemption.
"""

import random
from functools import partial

import pytest
import torch
from rope_models import CASES, DROPS_ITS_CACHE, LONG, generated, rope_model

from autodeploy.ladder import Built, _lower_rung, build_runner
from autodeploy.runtime.engine import EngineConfig, EngineCore
from autodeploy.runtime.messages import EngineRequest, TokenOutput, one_by_one
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.scheduler import SchedulerConfig
from autodeploy.runtime.sequence_runner import RecomputeRunner
from autodeploy.transforms.capture.rope_lengths import length_rotaries, lengths_forgotten
from autodeploy.transforms.recipe import load_recipe
from autodeploy.transforms.verify import reference_logits


def workload(seed=1):
    """(prompt, output tokens, arrival step): lengths on both sides of 16, shared prefixes."""
    source = random.Random(seed)
    prefix = [source.randrange(3, 256) for _ in range(40)]
    requests = []
    for index, length in enumerate((3, 9, 13, 15, 16, 17, 18, 26, 33, 44, 58, 12, 16, 40, 41, 14)):
        shared = prefix[: length - 1] if index % 2 else []
        own = [source.randrange(3, 256) for _ in range(length - len(shared))]
        requests.append((shared + own, source.randint(4, 14), source.randint(0, 25)))
    # The same prompts again: all their pages are known by then.
    return requests + [(requests[at][0], 6, 70) for at in (3, 7, 9, 13)]


def serve(engine, requests, **params):
    """Output tokens of every request, and the prompt's log probabilities if asked for."""
    tokens = {index: [] for index in range(len(requests))}
    scores = {}
    waiting = sorted(tokens, key=lambda index: requests[index][2])
    step = 0
    while waiting or engine.has_work:
        while waiting and requests[waiting[0]][2] <= step:
            index = waiting.pop(0)
            prompt, count, _ = requests[index]
            sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **params)
            engine.add(
                EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=sampling)
            )
        for output in one_by_one(engine.step()):
            assert isinstance(output, TokenOutput), output
            tokens[int(output.request_id)] += output.token_ids
            if output.prompt_logprobs is not None:
                scores[int(output.request_id)] = output.prompt_logprobs
        step += 1
        assert step < 3000, "the engine does not come to an end"
    return tokens, scores


def tight_engine(runner, num_pages=32):
    scheduler = SchedulerConfig(max_num_seqs=6, max_prefill_chunk=7, page_size=4, max_model_len=80)
    return EngineCore(runner, EngineConfig(scheduler=scheduler, num_pages=num_pages))


def check(model, engine, use_cache=True):
    requests = workload()
    found, _ = serve(engine, requests)
    expected = [generated(model, prompt, count, use_cache) for prompt, count, _ in requests]
    assert found == dict(enumerate(expected))
    return engine.stats()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_rope_type_gives_the_tokens_of_generate(name, kind):
    model = rope_model(name, kind)
    built = build_runner(model, load_recipe("default"), verify=True)
    assert (built.rung, built.cause) == (1, "")
    lengths = built.runner.contract.lengths
    assert (lengths is not None) == ((name, kind) in LONG)
    drops = lengths is not None and lengths.recompute_past is not None
    assert drops == (name in DROPS_ITS_CACHE)
    stats = check(model, tight_engine(built.runner), use_cache=not drops)
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    assert stats.pages_used == 0


def one_at_a_time(model):
    """Deployed as if it could not be captured."""
    built = _lower_rung(model, Built(None, 1), "the test says so", reference_logits(model))
    assert built.rung == 2
    return built.runner


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "dynamic"),
        ("llama", "longrope"),
        ("gemma3_text", "longrope"),
        ("phi3", "longrope"),
    ],
)
def test_one_sequence_at_a_time_gives_the_same_tokens(name, kind):
    model = rope_model(name, kind)
    engine = tight_engine(one_at_a_time(rope_model(name, kind)))
    check(model, engine, use_cache=name not in DROPS_ITS_CACHE)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_recomputing_gives_the_tokens_of_generate_without_a_cache(kind):
    model = rope_model("llama", kind)
    fresh = partial(lengths_forgotten, length_rotaries(model))
    check(model, tight_engine(RecomputeRunner(model, 128, fresh)), use_cache=False)


def runner_of_rung(rung, model):
    if rung == 3:
        return RecomputeRunner(model, 128, partial(lengths_forgotten, length_rotaries(model)))
    if rung == 2:
        return one_at_a_time(model)
    return build_runner(model, load_recipe("default")).runner


@pytest.mark.parametrize("rung", [1, 2, 3])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scores_of_a_prompt_in_chunks_are_those_of_the_whole_prompt(kind, rung):
    prompts = [workload()[at][0] for at in (3, 8, 10)]
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            logits = rope_model("llama", kind)(input_ids=torch.tensor([prompt])).logits[0]
        expected.append(logits.log_softmax(-1)[range(len(prompt) - 1), prompt[1:]])
    engine = tight_engine(runner_of_rung(rung, rope_model("llama", kind)))
    _, scores = serve(engine, [(p, 2, 0) for p in prompts], prompt_logprobs=0)
    for index, prompt in enumerate(prompts):
        found = [
            next(entry.logprob for entry in row if entry.token_id == token)
            for row, token in zip(scores[index][1:], prompt[1:], strict=True)
        ]
        torch.testing.assert_close(torch.tensor(found), expected[index], rtol=1e-4, atol=1e-4)
