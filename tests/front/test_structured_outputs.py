"""Constraints through `LLM` and `AsyncLLM`: outputs of random models parse, match and validate."""

import asyncio
import json
import re

import jsonschema
import pytest
from tiny_models import tiny_model
from toy_tokenizers import metaspace

from autodeploy import AsyncLLM, BeamSearchParams, SamplingParams, deploy
from autodeploy.errors import InvalidRequestError, SamplingParamsError
from autodeploy.runtime.structured_params import StructuredOutputsParams as Structured

LIMITED = {"type": "string", "maxLength": 6}
SCHEMAS = {
    "scalars": {
        "type": "object", "additionalProperties": False, "required": ["name", "age", "on"],
        "properties": {"name": LIMITED, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                       "on": {"type": "boolean"}, "none": {"type": "null"}},
    },
    "enum and const": {
        "type": "object", "additionalProperties": False, "required": ["kind", "version"],
        "properties": {"kind": {"enum": ["cat", "dög", 3, None]}, "version": {"const": 2}},
    },
    "any of": {
        "type": "array", "minItems": 1, "maxItems": 3,
        "items": {"anyOf": [{"type": "integer", "minimum": -9, "maximum": 9}, LIMITED]},
    },
    "nested with references": {
        "$defs": {"point": {
            "type": "object", "additionalProperties": False, "required": ["x", "y"],
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99},
                           "y": {"type": "integer", "minimum": 0, "maximum": 99}},
        }},
        "type": "array", "minItems": 1, "maxItems": 2, "items": {"$ref": "#/$defs/point"},
    },
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "format": {"type": "string", "format": "date"},
    "tuple": {
        "type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["x"]}],
        "items": False, "minItems": 2, "maxItems": 2,
    },
}  # fmt: skip
REGEXES = [r"[a-c]{3,5}-\d{2}", r"(yes|no|maybe)!?", r"\+?[0-9]{3} ?[0-9]{4}", "日本{1,3}|é"]
CHOICES = [["red", "green", "dark green"], ["日本", 'a "quoted" one', "x\ny"], ["only"]]


@pytest.fixture(scope="module", params=["byte level", "metaspace"])
def any_llm(request, llm):
    if request.param == "byte level":
        yield llm
        return
    words = metaspace()
    with deploy(tiny_model("qwen3", vocab_size=len(words) + 37), tokenizer=words) as deployed:
        yield deployed


def outputs_of(llm, structured, count=6, **options):
    params = SamplingParams(
        **{"max_tokens": 200, "temperature": 1.0, "structured_outputs": structured, **options}
    )
    made = llm.generate(
        [f"text {n}" for n in range(count)], [params.clone(seed=n) for n in range(count)]
    )
    return [completion for output in made for completion in output.outputs]


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_of_random_models_validates(name, any_llm):
    schema = SCHEMAS[name]
    for completion in outputs_of(any_llm, Structured(json=schema, disable_any_whitespace=True)):
        assert completion.finish_reason == "stop"
        jsonschema.validate(json.loads(completion.text), schema)


@pytest.mark.parametrize("regex", REGEXES)
def test_regexes_match_the_whole_output(regex, any_llm):
    for completion in outputs_of(any_llm, Structured(regex=regex)):
        assert completion.finish_reason == "stop"
        assert re.fullmatch(regex, completion.text)


@pytest.mark.parametrize("choice", CHOICES)
def test_choices_are_one_of_the_list(choice, any_llm):
    for completion in outputs_of(any_llm, Structured(choice=choice)):
        assert completion.finish_reason == "stop"
        assert completion.text in choice


def test_a_grammar_with_recursion_is_followed(any_llm):
    grammar = 'start: "(" start ")" | DIGITS\nDIGITS: /[0-9]{1,3}/\n'
    for completion in outputs_of(any_llm, Structured(grammar=grammar), max_tokens=150):
        if completion.finish_reason == "stop":
            inner = completion.text.strip("()")
            depth = completion.text.count("(")
            assert completion.text == "(" * depth + inner + ")" * depth
            assert re.fullmatch(r"[0-9]{1,3}", inner)


def test_an_object_is_one_if_it_ends(llm):
    made = outputs_of(llm, Structured(json_object=True), count=8, max_tokens=100)
    for completion in made:
        assert completion.text.lstrip()[:1] == "{"
        if completion.finish_reason == "stop":
            assert isinstance(json.loads(completion.text), dict)


def test_several_outputs_of_one_prompt_each_follow_it(llm):
    made = outputs_of(llm, Structured(choice=["a", "bb", "ccc", "dd"]), count=2, n=6)
    assert len(made) == 12
    assert {c.text for c in made} <= {"a", "bb", "ccc", "dd"}
    assert len({c.text for c in made}) > 1


def test_a_constraint_does_not_touch_its_neighbours(llm):
    free = SamplingParams(max_tokens=20, temperature=0.8, seed=3)
    alone = llm.generate(["text", "more"], free)
    bound = free.clone(structured_outputs=Structured(regex="[0-9]{8}"))
    together = llm.generate(["text", "x", "more", "y"], [free, bound, free, bound])
    assert [o.outputs[0].token_ids for o in alone] == [
        together[at].outputs[0].token_ids for at in (0, 2)
    ]
    assert all(re.fullmatch("[0-9]{8}", together[at].outputs[0].text) for at in (1, 3))


def test_the_same_seed_gives_the_same_output_in_any_batch(llm):
    params = SamplingParams(seed=5, max_tokens=60, structured_outputs=Structured(regex="[a-z]{20}"))
    alone = llm.generate("text", params)[0].outputs[0].token_ids
    assert all(
        o.outputs[0].token_ids == alone
        for o in llm.generate(["text"] * 3, [params, params, params])
    )


def test_a_stop_string_ends_it_earlier(llm):
    made = outputs_of(llm, Structured(regex="[ab]{30}z"), stop=["ab", "ba", "aa", "bb"])
    for completion in made:
        assert completion.finish_reason == "stop"
        assert completion.stop_reason in ("ab", "ba", "aa", "bb")


def test_logprobs_come_along(llm):
    for completion in outputs_of(llm, Structured(regex="[0-9]{5}"), logprobs=1):
        assert len(completion.logprobs) == len(completion.token_ids)
        assert all(t in e for t, e in zip(completion.token_ids, completion.logprobs, strict=True))


@pytest.mark.parametrize(
    ("structured", "reason"),
    [
        (Structured(regex="("), "unclosed group"),
        (Structured(json={"type": "nope"}), "nope"),
        (Structured(grammar="start: other"), "other"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_anything_is_submitted(llm, structured, reason):
    params = [SamplingParams(), SamplingParams(structured_outputs=structured)]
    before = llm.stats.step
    with pytest.raises(SamplingParamsError, match=f"prompt 1: .*{reason}"):
        llm.generate(["a", "b"], params)
    assert llm.stats.step == before
    assert llm.generate("a", SamplingParams(max_tokens=2))[0].outputs[0].finish_reason


def test_without_a_tokenizer_it_is_refused(model):
    with deploy(model) as engine, pytest.raises(SamplingParamsError, match="tokenizer"):
        engine.generate([1, 2], SamplingParams(structured_outputs=Structured(regex="a")))


def test_beam_search_refuses_with_the_reason(llm):
    with pytest.raises(SamplingParamsError, match="beam search cannot follow"):
        BeamSearchParams(beam_width=2, max_tokens=4, structured_outputs=Structured(regex="a"))


def test_a_worker_process_follows_constraints_too(process_llm):
    schema = SCHEMAS["scalars"]
    for completion in outputs_of(process_llm, Structured(json=schema, disable_any_whitespace=True)):
        jsonschema.validate(json.loads(completion.text), schema)
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        process_llm.generate("a", SamplingParams(structured_outputs=Structured(regex="(")))
    mixed = [SamplingParams(max_tokens=4), SamplingParams(structured_outputs=Structured(regex="a"))]
    assert process_llm.generate(["a", "b"], mixed)[1].outputs[0].text == "a"


async def test_streams_follow_constraints_and_hear_of_bad_ones(model, tokenizer):
    async with AsyncLLM(model, tokenizer=tokenizer) as engine:

        async def one(seed):
            params = SamplingParams(
                seed=seed, max_tokens=40, structured_outputs=Structured(regex="[0-9]{4}x")
            )
            deltas = [d async for d in engine.generate("text", params)]
            return "".join(d.outputs[0].text for d in deltas)

        texts = await asyncio.gather(*(one(seed) for seed in range(6)))
        assert all(re.fullmatch("[0-9]{4}x", text) for text in texts)
        bad = SamplingParams(structured_outputs=Structured(json={"type": "nope"}))
        with pytest.raises(SamplingParamsError, match="nope"):
            async for _ in engine.generate("text", bad):
                pass
        assert engine.open_requests == 0
        assert re.fullmatch("[0-9]{4}x", await one(9))
