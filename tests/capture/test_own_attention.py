"""Attention of a model's own becomes attention nodes with what it computes, or is refused."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from autodeploy.custom_ops.attention import attention, packed_mask
from autodeploy.errors import CaptureError, NotCausalError
from autodeploy.ladder import build_runner
from autodeploy.transforms.capture.export import CaptureOptions, capture
from autodeploy.transforms.recipe import load_recipe
from autodeploy.transforms.transform import is_call
from autodeploy.transforms.verify import SequenceCheck, reference_logits
from autodeploy.transforms.verify.twin import randomise

_TOKENS = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
_OLD = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
_NEW = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 256,
}  # fmt: skip
_DECODER = {
    "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128,
    "is_encoder_decoder": False, "is_decoder": True,
}  # fmt: skip
_LEARNED = {**_DECODER, "max_position_embeddings": 256}
_BERT = {**_NEW, "is_decoder": True}

MODELS = {
    "linear bias": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "linear bias, heads no power of 2": ("bloom", {"hidden_size": 96, "n_layer": 2, "n_head": 6}),
    "linear bias, table": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "one kv head": ("falcon", {**_NEW, "multi_query": True}),
    "repeated kv heads": (
        "falcon",
        {**_NEW, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "linear bias in the mask": ("falcon", {**_NEW, "alibi": True, "multi_query": False}),
    "linear bias, one kv head": ("falcon", {**_NEW, "alibi": True, "multi_query": True}),
    "local layers": (
        "gpt_neo",
        {
            "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256,
            "attention_types": [[["global", "local"], 1]], "window_size": 5,
        },
    ),
    "rotary": ("gptj", {**_OLD, "rotary_dim": 8}),
    "rotary, fused": ("codegen", {**_OLD, "rotary_dim": 8}),
    "fused product": ("gpt_neox_japanese", _NEW),
    "mask of -1e4": ("openai-gpt", _OLD),
    "mask bounded by a table": (
        "xglm",
        {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4},
    ),
    "counted positions": ("mvp", _LEARNED),
    "counted positions in heads of three axes": ("trocr", _LEARNED),
    "a mask that may open to images": (
        "git",
        {
            **_NEW,
            "vision_config": {
                "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 32, "image_size": 16, "patch_size": 8,
            },
        },
    ),
    "positions from a mask of ones": (
        "opt",
        {**_NEW, "ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    "positions from arange": ("bart", _LEARNED),
    "a table cut to length": ("whisper", {**_DECODER, "max_target_positions": 256}),
    "sinusoids": ("marian", {**_LEARNED, "decoder_start_token_id": 3}),
    "positions after the padding token's": ("roberta", _BERT),
    "absolute positions": ("bert", _BERT),
}  # fmt: skip


def model_of(name):
    kind, values = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**_TOKENS, **values})
        model = AutoModelForCausalLM.from_config(config).eval()
        randomise(model)
    return model


def sites(program):
    """Bound arguments of every attention node."""
    return [
        attention.bind(node.args, node.kwargs)
        for node in program.graph.nodes
        if is_call(node, attention.overload)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_it_is_served_packed_and_exact(name):
    recipe = load_recipe({"extends": "default", "drop": ["compile"]})
    built = build_runner(model_of(name), recipe, verify=True)
    assert built.rung == 1, built.cause
    assert built.program.contract.token_groups


def test_slopes_are_those_of_the_model():
    program = capture(model_of("linear bias"))
    assert [s["alibi_slopes"] is not None for s in sites(program)] == [True, True]
    slopes = program.read_weight("alibi_slopes_0")
    assert torch.allclose(slopes, torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]))
    assert [round(s["scale"], 6) for s in sites(program)] == [0.25, 0.25]


def test_windows_are_those_of_the_layers():
    found = sites(capture(model_of("local layers")))
    assert [s["window"] for s in found] == [0, 5]
    assert [round(s["scale"], 6) for s in found] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "heads"), [("one kv head", 1), ("repeated kv heads", 2), ("rotary", 4)]
)
def test_keys_are_kept_once_for_all_heads_that_share_them(name, heads):
    for site in sites(capture(model_of(name))):
        assert site["q"].meta["val"].shape[1] == 4
        assert site["k"].meta["val"].shape[1] == heads
        assert site["v"].meta["val"].shape[1] == heads


def test_a_batch_may_hold_more_tokens_than_the_longest_sequence():
    model = model_of("mask of -1e4")
    program = capture(model)
    reference = reference_logits(model)
    (ids, _), (expected, _) = reference.token_ids, reference.logits
    copies = 30  # of 11 tokens: more than the 256 positions of the model
    count = copies * len(ids)
    found = program.run(
        {
            "input_ids": ids.repeat(copies)[None],
            "position_ids": torch.arange(len(ids)).repeat(copies)[None],
            "cu_q": torch.arange(0, count + 1, len(ids), dtype=torch.int32),
            "logit_index": torch.arange(count),
        }
    )
    assert torch.allclose(found, expected.repeat(copies, 1), atol=1e-4)
    assert "256" not in str(program.inputs()["input_ids"].meta["val"].shape)


class Own(nn.Module):
    """In place of a layer's attention: plain operations, with something done to the scores."""

    def __init__(self, attention_module, change):
        super().__init__()
        self.inner = attention_module
        self.change = change

    def forward(self, hidden_states, attention_mask=None, **_):
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, 16)).transpose(1, 2)
            for layer in (self.inner.q_proj, self.inner.k_proj, self.inner.v_proj)
        )
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = self.change(q @ k.mT, hidden_states) + attention_mask
        out = scores.softmax(-1) @ v
        return self.inner.o_proj(out.transpose(1, 2).flatten(2)), None


def with_own(change, layer=1):
    model = tiny_model("llama")
    block = model.model.layers[layer]
    block.self_attn = Own(block.self_attn, change)
    # An eager model's layers are given a mask whether they look at it or not.
    model.config._attn_implementation_internal = "eager"
    return model


def rows(scores):
    row = torch.arange(scores.shape[-1])
    return row[:, None], row[None, :]


def buckets(scores, _):
    query, key = rows(scores)
    return scores - (query - key).clamp(0, 3).sqrt()


def every_second(scores, _):
    query, key = rows(scores)
    return scores.masked_fill((query - key) % 2 == 1, -1e4)


EXPRESSED = {
    "scaled": lambda scores, _: scores * 0.2,
    "capped": lambda scores, _: 3.0 * torch.tanh(scores * 0.3 / 3.0),
    "biased by key": lambda scores, _: scores * 0.2 + 0.25 * rows(scores)[1],
    "biased a row": lambda scores, _: scores * 0.2 + 7.0 * rows(scores)[0],
}

REFUSED = {
    "content": (lambda scores, x: scores + x.mean(-1)[:, None, None, :], "content of tokens"),
    "buckets": (buckets, "no function the attention op expresses"),
    "squared": (lambda scores, _: scores * scores.abs(), "no scale and no soft-cap"),
    "every second": (every_second, "neither causal, sliding nor chunked"),
    "the batch": (
        lambda scores, _: scores * (1.0 + 1.0 / scores.shape[-1]),
        "scale changes with the number",
    ),
}


@pytest.mark.parametrize("name", EXPRESSED)
def test_what_the_op_expresses_is_exact(name):
    model = with_own(EXPRESSED[name])
    program = capture(model)
    assert len(sites(program)) == 2
    SequenceCheck(reference_logits(model)).prove(program)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_op_does_not_express_is_refused_with_the_layer(name):
    change, cause = REFUSED[name]
    with pytest.raises(CaptureError, match=rf"layers\.1\.self_attn.*({cause})"):
        capture(with_own(change))


def test_weights_changed_after_the_softmax_are_refused():
    model = with_own(lambda scores, _: scores)
    own = model.model.layers[1].self_attn

    def forward(hidden_states, attention_mask=None, **_):
        x = hidden_states
        return (x @ x.mT + attention_mask[0]).softmax(-1).square() @ x, None

    own.forward = forward
    with pytest.raises(CaptureError, match="changed between the softmax and the values"):
        capture(model)


def test_a_softmax_over_queries_is_refused():
    model = with_own(lambda scores, _: scores)

    def forward(hidden_states, attention_mask=None, **_):
        x = hidden_states
        return (x @ x.mT + attention_mask[0]).softmax(1) @ x, None

    model.model.layers[1].self_attn.forward = forward
    with pytest.raises(CaptureError, match="over queries, not over keys"):
        capture(model)


def far(scores, _):
    query, key = rows(scores)
    return scores.masked_fill(query - key >= 200, -1e4)


def test_a_window_of_its_own_is_read_as_far_as_the_model_goes():
    found = sites(capture(with_own(far)))
    assert [s["window"] for s in found] == [0, 200]
    long = with_own(far)
    long.config.max_position_embeddings = 1 << 16
    with pytest.raises(CaptureError, match=r"can be checked for \d+ of 65536 positions"):
        capture(long)


def test_a_mask_used_outside_of_attention_is_refused():
    model = with_own(lambda scores, _: scores)
    own = model.model.layers[1].self_attn

    def forward(hidden_states, attention_mask=None, **_):
        return (attention_mask[0] == 0).float() @ hidden_states, None

    own.forward = forward
    with pytest.raises(CaptureError, match=r"layers\.1\.self_attn.*mask as a tensor outside"):
        capture(model)


def test_what_depends_on_the_number_of_tokens_is_not_autoregressive():
    model = tiny_model("llama")
    plain = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: plain(x) * (1.0 + 1.0 / x.shape[1])
    with pytest.raises(NotCausalError):
        reference_logits(model)


def test_what_sums_over_the_batch_is_found_by_running_the_last_tokens_alone():
    model = tiny_model("llama")
    plain = model.model.forward

    def forward(input_ids, **arguments):
        out = plain(input_ids, **arguments)
        beyond = arguments["position_ids"] >= (input_ids >= 0).sum()
        out.last_hidden_state = out.last_hidden_state.masked_fill(beyond[..., None], 0.0)
        return out

    reference = reference_logits(model)
    model.model.forward = forward
    with pytest.raises(CaptureError, match="without the earlier ones"):
        SequenceCheck(reference).prove(capture(model))


def test_positions_the_model_counts_itself_are_used_when_it_is_given_none():
    model = model_of("positions after the padding token's")
    check = SequenceCheck(reference_logits(model))
    assert check.error(capture(model)) > 1e-3
    assert check.error(capture(model, CaptureOptions(positions=False))) < 1e-4


@pytest.mark.parametrize("form", [{}, {"window": 3}, {"chunk": 2}, {"causal": False}], ids=str)
def test_packed_mask_is_one_mask_per_sequence(form):
    lengths = (4, 0, 5, 1)
    cu_q = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    blocks = []
    for length in lengths:
        query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
        seen = (key <= query) | (not form.get("causal", True))
        seen &= query - key < form.get("window", 99)
        blocks.append(seen & (query // form.get("chunk", 99) == key // form.get("chunk", 99)))
    expected = torch.block_diag(*blocks).bool()
    assert torch.equal(packed_mask(cu_q, 10, torch.bool, **form)[0, 0], expected)
    added = packed_mask(cu_q, 10, torch.bfloat16, **form)
    assert added.shape == (1, 1, 10, 10)
    assert torch.equal(added[0, 0] == 0, expected)
    assert bool((added[0, 0][~expected] == torch.finfo(torch.bfloat16).min).all())
