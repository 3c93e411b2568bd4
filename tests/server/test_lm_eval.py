"""lm-eval's local-completions against a server process finds what LLM finds.

    pip install -c constraints.txt -e '.[dev,eval]'
    python -m pytest -m slow tests/server/test_lm_eval.py

The extra is 600 MB, which is why this is no part of the usual run.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running_server import DEMO
from served_process import KEY

from autodeploy import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
TASKS = "tests/server/lm_eval_tasks"
NAMES = ["autodeploy_choices", "autodeploy_continuations", "autodeploy_whole_texts"]


@pytest.fixture(scope="module")
def samples(served_demo, tmp_path_factory):
    """Run with batches of several prompts: per task, its samples in the questions' order."""
    pytest.importorskip("lm_eval", reason="pip install -c constraints.txt -e '.[eval]'")
    folder = tmp_path_factory.mktemp("lm_eval")
    model_args = (
        f"model=demo,base_url={served_demo.url}/v1/completions,tokenizer={DEMO},"
        "tokenizer_backend=huggingface,max_length=512"
    )
    environment = {
        **os.environ, "OPENAI_API_KEY": KEY, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", model_args,
        "--tasks", ",".join(NAMES), "--include_path", TASKS, "--output_path", str(folder / "out"),
        "--log_samples", "--batch_size", "4",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: read(folder / "out", name) for name in NAMES}


def read(folder, name):
    (file,) = folder.rglob(f"samples_{name}_*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(found, key=lambda sample: sample["doc_id"])


@pytest.fixture(scope="module")
def llm():
    made = LLM(DEMO, device="cpu", max_num_seqs=8)
    yield made
    made.shutdown()


def token_ids(llm, text):
    return llm.tokenizer(text, add_special_tokens=False)["input_ids"]


def log_likelihood(llm, context, ids):
    """Of the tokens after the first `context`, and whether each is the likeliest."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0)
    (output,) = llm.generate([ids], params)
    entries = output.prompt_logprobs[context:]
    own = [entry[token] for entry, token in zip(entries, ids[context:], strict=True)]
    return sum(each.logprob for each in own), all(each.rank == 1 for each in own)


@pytest.mark.slow
def test_log_likelihoods_are_those_of_llm(samples, llm):
    assert len(samples["autodeploy_choices"]) == 6
    for sample in samples["autodeploy_choices"]:
        doc = sample["doc"]
        for choice, ((found, greedy),) in zip(doc["choices"], sample["resps"], strict=True):
            # lm-eval counts spaces at the end of the prompt to the choice.
            context = len(token_ids(llm, doc["prompt"].rstrip()))
            expected, is_greedy = log_likelihood(
                llm, context, token_ids(llm, doc["prompt"] + choice)
            )
            assert float(found) == pytest.approx(expected, abs=1e-3)
            assert greedy == str(is_greedy)


@pytest.mark.slow
def test_continuations_are_those_of_llm(samples, llm):
    for sample in samples["autodeploy_continuations"]:
        ids = token_ids(llm, sample["doc"]["prompt"])
        params = SamplingParams(max_tokens=12, temperature=0, stop=["\n", "<|eos|>"])
        (output,) = llm.generate([ids], params)
        ((found,),) = sample["resps"]
        assert found == output.outputs[0].text


@pytest.mark.slow
def test_whole_texts_cost_what_llm_says(samples, llm):
    for sample in samples["autodeploy_whole_texts"]:
        text = sample["doc"]["prompt"] + sample["doc"]["choices"][sample["doc"]["right"]]
        ids = [llm.tokenizer.bos_token_id, *token_ids(llm, text)]
        expected, _ = log_likelihood(llm, 1, ids)
        ((found,),) = sample["resps"]
        assert float(found) == pytest.approx(expected, abs=1e-3)
        assert math.isfinite(expected)
