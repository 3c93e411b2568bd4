"""Constrained requests in the engine: in any way of running steps, batch, or page pressure.

The toy model's tokens are characters here. What it gives under a constraint, computed by hand from
the model and a matcher, is what every engine gives.
"""

import json
import threading

import numpy as np
import pytest
import torch
from test_overlap import assert_nothing_is_held, engine_of, serve
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from toy_runner import VOCAB, ToyRunner, logits_of

from autodeploy.errors import EngineError, SamplingParamsError
from autodeploy.runtime.engine import EngineConfig, EngineCore
from autodeploy.runtime.grammars import Grammars
from autodeploy.runtime.messages import EngineRequest, RequestFailed, one_by_one
from autodeploy.runtime.sampling_params import SamplingParams
from autodeploy.runtime.scheduler import SchedulerConfig
from autodeploy.runtime.structured_params import StructuredOutputsParams as Structured

CHARACTERS = '{}[]":,abcde012345678'
EOS = len(CHARACTERS)
GROUPS = ("tokens",)
WAYS = {
    "one after the other": (False, False),
    "overlapped": (True, False),
    "overlapped, staged": (True, True),
}
CONSTRAINTS = {
    "integers": Structured(json={"type": "array", "items": {"type": "integer", "minimum": 0,
                                 "maximum": 999}, "minItems": 2, "maxItems": 3},
                           disable_any_whitespace=True),
    "object": Structured(json={"type": "object", "properties": {"a": {"enum": [1, "b", 22]},
                               "b": {"type": "array", "items": {"const": 0}, "maxItems": 2}},
                               "required": ["a", "b"], "additionalProperties": False},
                         disable_any_whitespace=True),
    "regex": Structured(regex="[a-e]{2,4}[0-8]{3}"),
    "choice": Structured(choice=["abc", "abd", "12", "deed"]),
    "grammar": Structured(grammar='start: "[" start "]" | "a".."c" "0"\n'.replace(
        '"a".."c"', "/[a-c]/")),
}  # fmt: skip


@pytest.fixture(scope="module")
def grammars():
    vocab = {c: i for i, c in enumerate(CHARACTERS)} | {"<eos>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return Grammars(tokenizer.to_str(), VOCAB, [EOS])


def toy_engine(way, grammars, num_pages=120):
    return engine_of(GROUPS, num_pages, *WAYS[way], grammars=lambda: grammars)


def request(name, prompt, structured=None, **options):
    params = SamplingParams(
        **{"temperature": 0.0, "max_tokens": 24, "structured_outputs": structured, **options}
    )
    return EngineRequest(
        request_id=name, prompt_token_ids=prompt, params=params, eos_token_ids=[EOS], seed=7
    )


def by_hand(prompt, params, grammars):
    """The greedy tokens of one request."""
    history = list(prompt)
    structured = params.structured_outputs
    matcher = None if structured is None else grammars.compile(structured)
    while len(history) - len(prompt) < params.max_tokens:
        logits = logits_of(history, GROUPS)
        if matcher is not None:
            bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.unpackbits(bits, bitorder="little")[:VOCAB].astype(bool)
            logits[torch.from_numpy(~allowed)] = -torch.inf
        history.append(int(logits.argmax()))
        if history[-1] == EOS:
            break
        if matcher is not None:
            assert matcher.consume_token(history[-1])
    return history[len(prompt) :]


def run(engine, requests):
    """By name: the outputs' tokens and the last message."""
    tokens = {r.request_id: [] for r in requests}
    last = {}
    for one in requests:
        engine.add(one)
    for _ in range(3000):
        if not engine.has_work:
            break
        for output in one_by_one(engine.step()):
            last[output.request_id] = output
            if not isinstance(output, RequestFailed):
                tokens[output.request_id] += output.token_ids
    assert not engine.has_work
    return tokens, last


def text_of(tokens):
    return "".join(CHARACTERS[t] for t in tokens if t != EOS)


def mixed(count=14):
    """Requests with every constraint and with none, prompts of several lengths."""
    kinds = [None, *CONSTRAINTS.values()]
    return [
        request(str(n), [(3 * n + i) % 20 for i in range(1 + n % 7)], kinds[n % len(kinds)])
        for n in range(count)
    ]


@pytest.fixture(autouse=True)
def _padded_steps(monkeypatch):
    from test_device_step import ReplayedStep

    from autodeploy.runtime import device_step

    replayed = staticmethod(lambda step, size, pool: ReplayedStep(step, size))
    monkeypatch.setattr(device_step.DecodeGraph, "capture", replayed)


@pytest.mark.parametrize("num_pages", [120, 12], ids=["room", "page pressure"])
@pytest.mark.parametrize("way", WAYS)
def test_a_mixed_batch_gives_what_each_request_gives_by_hand(way, num_pages, grammars):
    engine = toy_engine(way, grammars, num_pages)
    requests = mixed()
    tokens, last = run(engine, requests)
    for one in requests:
        expected = by_hand(one.prompt_token_ids, one.params, grammars)
        assert tokens[one.request_id] == expected, one
        reason = "stop" if expected[-1] == EOS else "length"
        assert last[one.request_id].finish_reason == reason
    assert (engine.stats().preemptions > 0) == (num_pages == 12)
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_every_output_matches_at_any_temperature(kind, way, grammars):
    engine = toy_engine(way, grammars)
    structured = CONSTRAINTS[kind]
    requests = [
        request(str(n), [n % 20, 3], structured, temperature=1.0 + n, max_tokens=60)
        for n in range(12)
    ]
    tokens, last = run(engine, requests)
    assert len({text_of(t) for t in tokens.values()}) > 1
    for name, made in tokens.items():
        matcher = grammars.compile(structured)
        assert matcher.consume_tokens(made)
        assert last[name].finish_reason == "stop"
        assert made[-1] == EOS
        if structured.json is not None:
            json.loads(text_of(made))
        if structured.choice is not None:
            assert text_of(made) in structured.choice


@pytest.mark.parametrize("way", WAYS)
def test_logprobs_are_those_of_the_models_own_distribution(way, grammars):
    engine = toy_engine(way, grammars)
    prompt = [4, 9]
    engine.add(request("a", prompt, CONSTRAINTS["choice"], logprobs=2))
    outputs = []
    while engine.has_work:
        outputs += one_by_one(engine.step())
    history = list(prompt)
    for output in outputs:
        for token, entries in zip(output.token_ids, output.logprobs, strict=True):
            expected = logits_of(history, GROUPS).log_softmax(-1)
            assert entries[0].token_id == token
            assert entries[0].logprob == pytest.approx(float(expected[token]), abs=1e-4)
            assert entries[1].token_id == int(expected.argmax())
            history.append(token)


@pytest.mark.parametrize("way", WAYS)
def test_aborts_at_any_step_leave_nothing_and_disturb_nobody(way, grammars):
    for abort in range(0, 12, 2):
        engine = toy_engine(way, grammars, 20)
        shared = {"max_tokens": 16, "temperature": 0.0}
        workload = [
            ([n, 2, 3], {**shared, "structured_outputs": s}, n, 0, n + abort if n % 2 else None)
            for n, s in enumerate([*CONSTRAINTS.values(), None, *CONSTRAINTS.values()])
        ]
        found = serve(engine, workload)
        for name, (tokens, _, _, _) in found.items():
            prompt, params, *_ = workload[int(name)]
            expected = by_hand(prompt, SamplingParams(**params), grammars)
            stops = [i for i, t in enumerate(expected) if t == EOS]
            # `serve` names no end-of-sequence tokens: after the end nothing but the end follows.
            expected = expected if not stops else expected[: stops[0] + 1]
            assert tokens[: len(expected)] == expected[: len(tokens)]
        assert_nothing_is_held(engine)


@pytest.mark.parametrize("way", WAYS)
def test_other_rules_apply_beside_a_constraint(way, grammars):
    engine = toy_engine(way, grammars)
    b = CHARACTERS.index("b")
    tokens, _ = run(
        engine,
        [
            request("bias", [1], Structured(regex="[a-e]"), logit_bias={b: 90.0}),
            request("ban", [1], Structured(regex="[ab]"), bad_words_token_ids=[[b]]),
            request("min", [1], Structured(regex="[a-e]+"), min_tokens=6, max_tokens=9),
        ],
    )
    assert text_of(tokens["bias"]) == "b"
    assert text_of(tokens["ban"]) == "a"
    assert len(tokens["min"]) >= 6


@pytest.mark.parametrize("way", WAYS)
def test_rules_that_leave_no_token_fail_the_request_alone(way, grammars):
    engine = toy_engine(way, grammars)
    ok = request("ok", [2], CONSTRAINTS["regex"])
    none = request("none", [1], Structured(regex="ab"), min_tokens=5)
    tokens, last = run(engine, [none, ok])
    assert isinstance(last["none"], RequestFailed)
    assert "structured_outputs" in last["none"].message
    assert text_of(tokens["none"]) == "ab"
    assert tokens["ok"] == by_hand([2], ok.params, grammars)
    assert_nothing_is_held(engine)


@pytest.mark.parametrize("way", WAYS)
def test_a_grammar_that_fails_on_the_way_fails_its_request_with_the_reason(way, grammars):
    engine = toy_engine(way, grammars)
    ok = request("ok", [2], CONSTRAINTS["regex"])
    # More alternatives than the parser follows, once the first character is there.
    many = " | ".join(f'"a" "{i:04}"' for i in range(3000))
    tokens, last = run(engine, [request("many", [1], Structured(grammar=f"start: {many}")), ok])
    assert isinstance(last["many"], RequestFailed)
    assert "items" in last["many"].message
    assert tokens["ok"] == by_hand([2], ok.params, grammars)


@pytest.mark.parametrize("way", WAYS)
def test_what_does_not_compile_fails_its_request_alone(way, grammars):
    engine = toy_engine(way, grammars)
    ok = request("ok", [2], CONSTRAINTS["choice"])
    _, last = run(engine, [request("bad", [1], Structured(regex="(")), ok])
    assert isinstance(last["bad"], RequestFailed)
    assert last["bad"].error == SamplingParamsError.__name__
    assert "unclosed group" in last["bad"].message
    assert last["ok"].finish_reason == "stop"


class SlowGrammars:
    """Compiles when it is told to."""

    def __init__(self, grammars):
        self.grammars, self.go = grammars, threading.Event()

    def find(self, params):
        return self.grammars.find(params) if self.go.is_set() else None

    def compile(self, params):
        assert self.go.wait(30)
        return self.grammars.compile(params)


def test_nobody_waits_for_a_grammar_of_somebody_else(grammars):
    slow = SlowGrammars(grammars)
    engine = toy_engine("overlapped", slow)
    engine.add(request("slow", [1], CONSTRAINTS["regex"]))
    engine.add(request("gone", [1], CONSTRAINTS["regex"]))
    engine.add(request("free", [2]))
    with pytest.raises(ValueError, match="already running"):
        engine.add(request("slow", [1]))
    outputs = []
    while not any(o.request_id == "free" and o.finish_reason for o in outputs):
        outputs += one_by_one(engine.step())
    engine.abort(["gone"])
    assert engine.stats().aborted == 1
    assert engine.has_work
    outputs += one_by_one(engine.step())
    assert engine.stats().waiting == 1
    assert {o.request_id for o in outputs} == {"free", "gone"}
    slow.go.set()
    while engine.has_work:
        outputs += one_by_one(engine.step())
    made = [t for o in outputs if o.request_id == "slow" for t in o.token_ids]
    assert made == by_hand([1], request("x", [1], CONSTRAINTS["regex"]).params, grammars)
    assert_nothing_is_held(engine)


def test_an_engine_without_a_tokenizer_refuses():
    config = EngineConfig(SchedulerConfig(page_size=4, max_num_seqs=2), num_pages=20)
    engine = EngineCore(ToyRunner(*GROUPS), config)
    with pytest.raises(SamplingParamsError, match="tokenizer"):
        engine.add(request("a", [1], CONSTRAINTS["regex"]))
    assert not engine.has_work


def test_a_source_that_fails_fails_the_request(grammars):
    def broken():
        raise OSError("no such file")

    engine = engine_of(GROUPS, 60, False, False, grammars=broken)
    _, last = run(engine, [request("a", [1], CONSTRAINTS["regex"])])
    assert last["a"].error == EngineError.__name__
    assert "no such file" in last["a"].message


@pytest.mark.parametrize("way", WAYS)
def test_more_requests_at_once_than_masks_had_room_for(way, grammars):
    overlap, on_device = WAYS[way]
    engine = engine_of(GROUPS, 400, overlap, on_device, lambda: grammars, slots=40)
    requests = mixed(70)
    tokens, _ = run(engine, requests)
    for one in requests:
        assert tokens[one.request_id] == by_hand(one.prompt_token_ids, one.params, grammars)
