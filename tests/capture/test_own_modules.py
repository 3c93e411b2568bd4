"""Parts of a model that no op expresses run as they are, inside the packed graph, and are exact."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

from autodeploy import SamplingParams, deploy
from autodeploy.custom_ops.module import sequence_module
from autodeploy.custom_ops.op import OpError
from autodeploy.errors import CaptureError
from autodeploy.ladder import build_runner
from autodeploy.transforms.capture.attempts import capture_proved
from autodeploy.transforms.capture.module_probe import keepers
from autodeploy.transforms.recipe import load_recipe
from autodeploy.transforms.verify import SequenceCheck, reference_logits
from autodeploy.zoo.measure import Record, measure_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "day0"))
import leaky_memory
import strided_attention
import threshold_router


@pytest.mark.parametrize(
    ("example", "own_code", "caches"),
    [
        (strided_attention, {"StridedAttention": 2}, ["4 x token: 1024 B"]),
        (leaky_memory, {"LeakyMemory": 2}, ["2 x sequence: 8192 B"]),
        (threshold_router, {"ThresholdExperts": 2}, ["4 x token: 512 B"]),
    ],
)
def test_a_model_of_one_file_deploys_exactly_with_nothing_registered(example, own_code, caches):
    record = Record("example")
    measure_model(example.build(), record)
    assert (record.outcome, record.own_code) == ("rung 1", own_code)
    assert record.caches == caches
    assert record.served["tokens"] > 50
    assert record.logit_error < 1e-5


def test_deploy_leaves_such_a_model_as_it_was():
    model = strided_attention.build()
    before = {name: dict(vars(part)) for name, part in model.named_modules()}
    ids = torch.arange(8, 20)[None]
    expected = model(input_ids=ids).logits
    with deploy(model) as llm:
        answer = llm.generate(list(range(8, 20)), SamplingParams(temperature=0, max_tokens=4))
    assert len(answer[0].outputs[0].token_ids) == 4
    for name, part in model.named_modules():
        assert vars(part).keys() == before[name].keys()
        assert "forward" not in vars(part)
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_recurrent_states_in_one_tensor_are_kept_a_layer_at_a_time():
    model = tiny_model("rwkv", context_length=128, num_hidden_layers=3, hidden_size=32,
                       attention_hidden_size=32, intermediate_size=64)  # fmt: skip
    built = build_runner(model, load_recipe("default"))
    assert built.rung == 1
    shapes = {m.spec.shape for group in built.runner.contract.groups for m in group.members}
    # [1, hidden], not [1, hidden, layers]
    assert shapes == {(1, 32)}


class WrongDecode(strided_attention.StridedAttention):
    """Right for whole sequences; forgets where it is when it goes on from a cache."""

    def forward(self, hidden_states, past_key_values=None):
        if past_key_values is not None and past_key_values.get_seq_length(self.layer_idx):
            past_key_values.layers[self.layer_idx].keys *= 0
        return super().forward(hidden_states, past_key_values)


def test_a_part_that_is_wrong_with_its_own_cache_does_not_run_as_it_is():
    model = strided_attention.build()
    for layer in model.layers:
        layer.attention.__class__ = WrongDecode
    built = build_runner(model, load_recipe("default"))
    assert built.rung == 3
    assert "when a sequence comes in several steps" in built.cause


class Peeking(torch.nn.Module):
    """Mixes tokens and keeps nothing: it has no way to be cached."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states):
        shifted = torch.stack(
            [hidden_states[:, max(0, t - 1)] for t in range(len(hidden_states[0]))]
        )
        return self.inner(hidden_states) + shifted.transpose(0, 1)


def test_a_part_that_mixes_tokens_and_keeps_nothing_is_recomputed():
    model = tiny_model("llama")
    model.model.layers[1].mlp = Peeking(model.model.layers[1].mlp)
    built = build_runner(model, load_recipe("default"))
    assert built.rung == 3


def test_the_parts_that_keep_something_are_found_by_running_the_model():
    found = keepers(strided_attention.build())
    assert found["layers.0"] == ["layers.0.attention"]
    assert found["layers.0.attention"] == []
    assert "layers.0.mlp" not in found


def test_a_call_is_gone_with_the_program_it_was_captured_for():
    model = strided_attention.build()
    check = SequenceCheck(reference_logits(model))
    program = capture_proved(model, check.prove)
    node = next(n for n in program.graph.nodes if n.target is sequence_module.overload)
    key = node.args[2]
    check.prove(program)
    program.module_calls.clear()
    with pytest.raises(OpError, match="is gone with the model"):
        check.error(program)
    assert key.startswith("layers.0.attention#")


def test_every_attempt_is_proved_and_the_first_cause_is_told():
    model = strided_attention.build()

    def refuse(program):
        raise CaptureError("never good enough")

    with pytest.raises(CaptureError, match="is none the attention op|bias|mask|attention"):
        capture_proved(model, refuse)
