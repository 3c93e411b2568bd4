"""Capture gives one exact packed graph, or refuses with the cause."""

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import pad
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autodeploy.custom_ops.op import op_of
from autodeploy.errors import CaptureError, UnsupportedModelError
from autodeploy.transforms.capture.export import CaptureOptions, capture
from autodeploy.transforms.capture.guards import token_limit
from autodeploy.transforms.pipeline import run_recipe
from autodeploy.transforms.recipe import load_recipe
from autodeploy.transforms.verify import SequenceCheck, reference_logits


def ops(program):
    return [op.name for n in program.graph.nodes if (op := op_of(n.target)) is not None]


def test_every_layer_is_one_op_of_each_idea():
    found = ops(capture(tiny_model("mixtral")))
    assert found.count("attention") == 2
    assert found.count("experts") == 2
    assert found.count("rope") == 2
    assert found.count("rms_norm") == 5


def test_hooks_can_be_left_out_and_the_graph_stays_exact():
    model = tiny_model("qwen3")
    plain = capture(model, CaptureOptions(norms=False, rotary=False))
    assert set(ops(plain)) == {"attention"}
    SequenceCheck(reference_logits(model)).prove(plain)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        {
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
        },
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64, "rope_theta": 10000.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_static_rope_types_are_exact(rope):
    model = tiny_model("llama", rope_parameters=rope)
    SequenceCheck(reference_logits(model)).prove(capture(model))


def test_a_token_mixer_outside_every_hook_is_found_by_the_proof():
    model = tiny_model("llama")
    plain = model.model.layers[1].mlp.forward
    # Looks at the token before: exports without a murmur, and crosses sequence boundaries.
    model.model.layers[1].mlp.forward = lambda x: plain(x) + pad(x, (0, 0, 1, -1))
    program = capture(model)
    with pytest.raises(CaptureError, match="something mixes tokens"):
        SequenceCheck(reference_logits(model)).prove(program)


def test_an_attention_argument_nobody_knows_is_refused_by_name():
    model = tiny_model("llama")
    layer = model.model.layers[1].self_attn
    plain = layer.forward
    layer.forward = lambda *a, **k: plain(*a, **k, extra_bias=torch.ones(4))
    with pytest.raises(CaptureError, match=r"layer 1.*extra_bias"):
        capture(model)


def test_a_mask_that_is_no_known_kind_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.create_causal_mask
    every_second = lambda b, h, q, k: (q - k) % 2 == 0  # noqa: E731
    monkeypatch.setattr(
        modeling_llama,
        "create_causal_mask",
        lambda *a, **k: plain(*a, **k, and_mask_function=every_second),
    )
    with pytest.raises(CaptureError, match="neither causal, sliding nor chunked"):
        capture(tiny_model("llama"))


def test_a_graph_that_holds_only_for_some_lengths_is_refused():
    model = tiny_model("llama")
    plain = model.model.layers[0].mlp.forward

    def forward(x):
        return plain(x) if x.shape[1] > 4 else x

    model.model.layers[0].mlp.forward = forward
    with pytest.raises(CaptureError, match=r"only for some lengths|Not all values"):
        capture(model)


@pytest.mark.parametrize(
    ("guard", "limit"),
    [
        ("input_ids.size()[1] == position_ids.size()[1]", None),
        ("L['input_ids'].size()[1] == L['position_ids'].size()[1]", None),
        ("4*(L['input_ids'].size()[1] // 4) <= L['input_ids'].size()[1]", None),
        ("L['input_ids'].size()[1]*min(64, 64*L['input_ids'].size()[1]) == "
         "64*L['input_ids'].size()[1]", None),
        ("L['input_ids'].size()[1] <= 16384", 16384),
        ("2048*(L['input_ids'].size()[1] // 128) < 2", 127),
        ("input_ids.size()[1] <= 64", 64),
        ("input_ids.size()[1] % 8 == 0", 0),
        ("input_ids.size()[1] == 74", 0),
        ("L['input_ids'].size()[1] != 256", 0),
        ("input_ids.size()[1] + 1 == position_ids.size()[1]", 0),
        ("L['input_ids'].size()[1] == L['logit_index'].size()[0]", 0),
        ("unknown(L['input_ids'].size()[1]) == 1", 0),
    ],
)  # fmt: skip
def test_guards_hold_up_to_a_number_of_tokens(guard, limit):
    assert token_limit(guard) == limit


def test_a_model_too_large_for_this_machine_is_captured_without_its_weights():
    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=4,
        num_attention_heads=64, num_key_value_heads=8,
    )  # fmt: skip
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    program = capture(model)
    recipe = load_recipe({"extends": "default", "drop": ["load", "compile"]})
    run_recipe(program, recipe)
    assert sum(torch.Size(w.shape).numel() for w in program.weights.values()) > 5e9
    assert program.contract.groups[0].bytes == 4 * 2 * 8 * 128 * 2


def test_a_graph_captured_without_weights_computes_what_the_model_computes():
    config = tiny_config("qwen3")
    with FakeTensorMode(allow_non_fake_inputs=True):
        program = capture(AutoModelForCausalLM.from_config(config))
    model = tiny_model("qwen3")
    real = dict(model.state_dict(), **dict(model.named_buffers()))
    program.source.originals = {name: real[name] for name in program.source.originals}
    SequenceCheck(reference_logits(model)).prove(program)


class TestWhatIsNoCausalLanguageModel:
    def small(self, kind, config_kind=BertConfig, **changes):
        config = config_kind(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, **changes,
        )  # fmt: skip
        return kind(config).eval()

    def test_an_encoder_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="cannot generate"):
            capture(self.small(BertForMaskedLM))

    def test_an_encoder_with_a_causal_head_is_refused_unless_it_is_a_decoder(self):
        with pytest.raises(UnsupportedModelError, match="is_decoder"):
            capture(self.small(BertLMHeadModel))

    def test_an_encoder_decoder_is_refused(self):
        config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
            capture(T5ForConditionalGeneration(config))

    def test_a_model_without_a_head_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
            capture(AutoModel.from_config(tiny_config("llama")))

    def test_any_other_module_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="no transformers language model"):
            capture(nn.Linear(2, 2))


def test_our_name_is_gone_from_the_registries():
    capture(tiny_model("llama"))
    assert "autodeploy" not in ALL_ATTENTION_FUNCTIONS
