"""Models in bfloat16, served under every condition, are as near to float32 as the plain ones."""

import dataclasses

import pytest
import torch

from autodeploy.cli.main import main
from autodeploy.zoo import served_rounding
from autodeploy.zoo.rounding import MeasureRounding, Rounding, measure_rounding, table
from autodeploy.zoo.run import run_each
from autodeploy.zoo.served_rounding import ServedRounding
from autodeploy.zoo.serving import answers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SERVED = ServedRounding(
    tokens=90, beyond=0, typical=True, chooses=False, noise=0.1, gap=0.0, logprob_error=0.1,
    preemptions=4, prefix_hits=24, replays=50, without_graph=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def results():
    found = run_each(["llama", "mixtral"], MeasureRounding(DEVICE), jobs=2)
    return {result.name: result for result in found}


@pytest.mark.parametrize(("name", "chooses"), [("llama", False), ("mixtral", True)])
def test_what_is_served_in_bfloat16_is_within_the_models_own_noise(results, name, chooses):
    result = results[name]
    assert (result.rung, result.cause) == (1, "")
    assert result.agrees
    assert result.served.chooses == chooses
    assert result.served.tokens > 80
    assert result.served.preemptions > 0
    assert result.served.prefix_hits > 0
    assert (result.served.replays > 0) == (DEVICE == "cuda")


def test_tokens_and_log_probabilities_off_by_more_than_noise_are_counted(monkeypatch):
    def wrong(*arguments, **options):
        requests, stats = answers(*arguments, **options)
        requests[3].tokens[1] = (requests[3].tokens[1] + 1) % 256
        requests[5].logprobs[0] -= 1.0
        return requests, stats

    monkeypatch.setattr(served_rounding, "answers", wrong)
    result = MeasureRounding("cpu")("llama")
    # The token, and what was answered after it.
    assert result.served.beyond >= 2
    assert not result.agrees


def test_a_failure_belongs_to_its_row():
    def models():
        raise RuntimeError("no such thing")

    result = measure_rounding("x", models)
    assert result.cause == "RuntimeError: no such thing"
    assert not result.agrees
    assert "NOT AS NEAR  RuntimeError: no such thing" in table([result])


@pytest.mark.parametrize(
    ("changes", "agrees"),
    [
        ({}, True),
        ({"beyond": 1}, False),
        ({"beyond": 30, "chooses": True}, True),
        ({"beyond": 31, "chooses": True}, False),
        ({"typical": False, "chooses": True}, False),
    ],
)
def test_a_choice_among_experts_may_be_tipped_but_not_often(changes, agrees):
    served = dataclasses.replace(SERVED, **changes)
    assert Rounding("a", 1, plain=0.01, ours=0.01, between=0.01, served=served).agrees == agrees


def test_a_checkpoint_from_the_command_line(capsys, demo_model):
    arguments = ["zoo", "--model", str(demo_model), "--rounding", "--device", DEVICE]
    assert main(arguments) == 0
    assert "1 of 1 agree" in capsys.readouterr().out
