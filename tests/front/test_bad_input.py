"""Bad input is refused by its own type with a sentence that says what to change.

Nothing is lost by it: no page stays used, and what else runs finishes untouched.
"""

import asyncio
import shutil
from functools import partial

import pytest
import torch
from held_pages import pages_used
from tiny_models import tiny_model
from toy_tokenizers import byte_level
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from autodeploy import AsyncLLM, SamplingParams, deploy
from autodeploy.build import build_engine
from autodeploy.checkpoint import load_model
from autodeploy.config import DeployConfig
from autodeploy.errors import (
    CheckpointError,
    ConfigError,
    EmptyPromptError,
    EngineError,
    InvalidRequestError,
    PromptTooLongError,
    RecipeError,
    SamplingParamsError,
    UnknownTokenError,
    UnsupportedModelError,
)
from autodeploy.runtime.executor import InProcessExecutor

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
NAN = float("nan")

PROMPTS = [
    ([[]], EmptyPromptError, "prompt 0 has no tokens; give at least one"),
    ("", EmptyPromptError, "no tokens"),
    ([[3] * 300], PromptTooLongError, "300 tokens, and this model's maximum context length is 256"),
    ([[3] * 256], PromptTooLongError, "use at most 255 or raise max_model_len"),
    ([[3, 4], [3, 300]], UnknownTokenError, "prompt 1: token id 300 .* use 0 to 299"),
    ([[3, -1]], UnknownTokenError, "token id -1"),
    ([{"promt": "x"}], InvalidRequestError, "'prompt' or 'prompt_token_ids', not promt"),
    ([{"prompt": [3]}], InvalidRequestError, "'prompt' must be text, not list"),
    ([3.5], InvalidRequestError, "flat list of integers"),
    (7, InvalidRequestError, "not int"),
]


@pytest.mark.parametrize(("prompt", "error", "message"), PROMPTS, ids=lambda v: str(v)[:20])
def test_prompts(llm, prompt, error, message):
    with pytest.raises(error, match=message):
        llm.generate(prompt, GREEDY)
    assert pages_used(llm) == 0


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": NAN}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5},
        {"top_k": -2}, {"min_p": -1.0}, {"n": 0}, {"max_tokens": 0}, {"logprobs": -1},
        {"min_tokens": 9, "max_tokens": 3}, {"repetition_penalty": 0.0}, {"stop": [""]},
        {"n": 2, "temperature": 0.0}, {"allowed_token_ids": []}, {"presence_penalty": NAN},
        {"logit_bias": {3: NAN}}, {"stop": ["x"], "detokenize": False}, {"seed": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_sampling_values(llm, values):
    with pytest.raises(SamplingParamsError, match=next(iter(values))):
        SamplingParams(**values)
    params = SamplingParams()
    for name, value in values.items():
        setattr(params, name, value)
    with pytest.raises(SamplingParamsError):
        llm.generate([5], params)


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1.0)


def test_options_and_recipes_before_anything_is_loaded(model):
    with pytest.raises(ConfigError, match="no option 'max_model_length'.*'max_model_len'"):
        deploy(model, max_model_length=3)
    with pytest.raises(ConfigError, match="max_num_seqs must be a positive integer, not 0"):
        deploy("no/such/checkpoint", max_num_seqs=0)
    with pytest.raises(ConfigError, match="cudagraph_mode must be one of full, full_decode_only"):
        deploy("no/such/checkpoint", cudagraph_mode="PIECEWISE")
    with pytest.raises(ConfigError, match="executor must be one of inprocess, process"):
        deploy("no/such/checkpoint", executor="thread")
    with pytest.raises(RecipeError, match="did you mean 'steps'"):
        deploy("no/such/checkpoint", recipe={"step": []})
    with pytest.raises(RecipeError, match="needs FUNCTIONAL"):
        steps = ["canonicalize", "cache", "fuse_parallel_linears"]
        deploy("no/such/checkpoint", recipe={"steps": steps})


@pytest.mark.parametrize("nothing", [None, 7, BertModel])
def test_what_is_neither_a_model_nor_a_name_of_one(nothing):
    with pytest.raises(ConfigError, match="a live model, a checkpoint directory or a hub id"):
        deploy(nothing)


BERT = BertConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
)
T5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(BertForMaskedLM, BERT), "no causal language-model head.*AutoModelForCausalLM"),
        (partial(BertModel, BERT), "no causal language-model head.*AutoModelForCausalLM"),
        (partial(BertLMHeadModel, BERT), "is_decoder=False.*set is_decoder=True only if"),
        (partial(T5ForConditionalGeneration, T5), "encoder-decoder.*takes decoder-only models"),
        (partial(torch.nn.Linear, 2, 2), "load it with AutoModelForCausalLM"),
    ],
    ids=lambda v: v.func.__name__ if isinstance(v, partial) else "",
)
def test_models_that_do_not_generate(build, message):
    with pytest.raises(UnsupportedModelError, match=message):
        deploy(build())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "has no weights .*was the download complete"),
        ("config.json", "has no config.json"),
        (".", "does not exist"),
    ],
)
def test_checkpoints_that_lack_something(checkpoint, tmp_path, missing, message):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    shutil.rmtree(broken) if missing == "." else (broken / missing).unlink()
    with pytest.raises(CheckpointError, match=message):
        deploy(broken)


def test_checkpoints_that_are_damaged(checkpoint, tmp_path):
    for name, content in (("model.safetensors", b"\x10\0\0\0\0\0\0\0{"), ("config.json", b"{")):
        broken = tmp_path / name
        shutil.copytree(checkpoint, broken)
        (broken / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="not a readable|no readable config"):
            load_model(broken) if name == "config.json" else deploy(broken)
    with pytest.raises(CheckpointError, match="is a file; give the checkpoint's directory"):
        deploy(checkpoint / "config.json")


def test_text_without_a_tokenizer_and_chat_without_a_template(model):
    with deploy(model) as plain, deploy(model, tokenizer=byte_level()) as untemplated:
        with pytest.raises(InvalidRequestError, match="pass tokenizer="):
            plain.generate("text")
        with pytest.raises(InvalidRequestError, match="chat needs a tokenizer"):
            plain.chat([{"role": "user", "content": "x"}])
        with pytest.raises(InvalidRequestError, match="no chat template"):
            untemplated.chat([{"role": "user", "content": "x"}])


def test_one_bad_prompt_submits_none_and_a_list_of_params_must_match(llm):
    before = llm._executor._engine.stats().finished
    with pytest.raises(EmptyPromptError, match="prompt 2"):
        llm.generate([[3], [4], []], GREEDY)
    with pytest.raises(ConfigError, match="3 prompts, but 2 SamplingParams"):
        llm.generate([[3], [4], [5]], [GREEDY, GREEDY])
    with pytest.raises(ConfigError, match="must be a SamplingParams"):
        llm.generate([[3]], {"temperature": 0})
    assert llm._executor._engine.stats().finished == before


UNTELLABLE = [
    ({"priority": 2**70}, "priority must be an integer of 64 bits"),
    ({"cache_salt": 5}, "cache_salt must be a string or None"),
    ({"cache_salt": "\ud800"}, "cache_salt has .* not valid Unicode"),
    ({"sampling_params": GREEDY.clone(stop=["\ud800"])}, "stop has .* not valid Unicode"),
    ({"sampling_params": GREEDY.clone(bad_words=["\ud800"])}, "bad_words has .* not valid"),
]


@pytest.mark.parametrize(("options", "message"), UNTELLABLE, ids=range(len(UNTELLABLE)))
def test_what_no_message_can_hold_does_not_end_the_worker(process_llm, options, message):
    with pytest.raises(InvalidRequestError, match=message):
        process_llm.generate([[5]], **{"sampling_params": GREEDY, **options})
    assert len(process_llm.generate([[5]], GREEDY)[0].outputs[0].token_ids) == 6


async def test_what_else_runs_finishes_untouched(llm, model, tokenizer):
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    expected = [o.outputs[0].text for o in llm.generate(["the", "fox"], params)]
    executor = InProcessExecutor(partial(build_engine, DeployConfig(model)))

    async def text(engine, prompt):
        return "".join([part.outputs[0].text async for part in engine.generate(prompt, params)])

    async with AsyncLLM.from_parts(executor, tokenizer) as engine:
        running = [asyncio.create_task(text(engine, p)) for p in ("the", "fox")]
        await asyncio.sleep(0)
        for prompt, error, _ in PROMPTS:
            # AsyncLLM takes one prompt, so two of them are refused as such.
            two = prompt == [[3, 4], [3, 300]]
            with pytest.raises(InvalidRequestError if two else error):
                await anext(engine.generate(prompt, GREEDY))
        for options in ({"priority": "high"}, {"request_id": 5}, {"request_id": "\ud800"}):
            with pytest.raises(InvalidRequestError, match=next(iter(options))):
                await anext(engine.generate([5], GREEDY, **options))
        assert await asyncio.gather(*running) == expected


class Short:
    """A tokenizer that knows fewer tokens than the model."""

    def decode(self, ids, **options):
        if max(ids, default=0) >= 250:
            raise IndexError("piece id is out of range")
        return "".join(chr(97 + i % 26) for i in ids)


def test_a_token_without_text_fails_only_the_request_that_meets_it(model):
    knows, meets = (
        SamplingParams(max_tokens=5, allowed_token_ids=ids, ignore_eos=True)
        for ids in ([40, 41], [270, 271])
    )
    with deploy(model, tokenizer=Short()) as other:
        fine, failed, unread = other.generate(
            [[5], [6], [7]], [knows, meets, meets.clone(detokenize=False)]
        )
        assert len(fine.outputs[0].text) == 5
        assert "cannot decode tokens up to [27" in str(failed.error)
        assert failed.outputs[0].finish_reason == "error"
        assert len(unread.outputs[0].token_ids) == 5
        with pytest.raises(EngineError, match="cannot decode tokens up to"):
            other.generate([5, 280], SamplingParams(max_tokens=1, allowed_token_ids=[40]))
        assert pages_used(other) == 0
