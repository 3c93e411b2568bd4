"""absorb_latent: every form of a latent is found, whatever is not one is spared."""

import pytest
import torch
from tiny_models import LATENT, tiny_model
from torch import nn

from autodeploy.custom_ops.attention import attention, latent_attention
from autodeploy.custom_ops.op import op_of
from autodeploy.transforms.capture.boundaries import current_cu_q
from autodeploy.transforms.capture.export import capture
from autodeploy.transforms.columns import Columns
from autodeploy.transforms.library.absorb_latent import find_latent
from autodeploy.transforms.pipeline import run_step
from autodeploy.transforms.recipe import Step
from autodeploy.transforms.transform import TRANSFORMS, is_call

aten = torch.ops.aten
HEADS, OWN, COMMON, VALUE, RANK = 4, 16, 8, 12, 20


def program_of(model, *steps):
    program = capture(model)
    for name in ("canonicalize", *steps):
        run_step(program, Step(name, TRANSFORMS[name]()))
    return program


def absorb(program):
    return run_step(program, Step("a", TRANSFORMS["absorb_latent"]())).matches


def logits(program, *lengths):
    """Logits of a functional program for packed sequences of these lengths."""
    total = sum(lengths)
    inputs = {
        "input_ids": torch.randint(3, 256, (1, total), generator=torch.Generator().manual_seed(0)),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_q": torch.tensor([0, *lengths]).cumsum(0).int(),
        "logit_index": torch.arange(total),
    }
    with torch.no_grad():
        return program.run(inputs)


class Small(nn.Module):
    """A language model of one attention layer whose keys and values a test writes."""

    def __init__(self, keys_and_values, heads=HEADS, own=OWN):
        super().__init__()
        base = tiny_model("llama", num_hidden_layers=1)
        self.config, self.embed, self.lm_head = base.config, base.model.embed_tokens, base.lm_head
        self.keys_and_values = keys_and_values
        self.width = own + COMMON
        self.heads = heads

        def linear(inputs, outputs, bias=False):
            return nn.Linear(inputs, outputs, bias=bias)

        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.query = linear(64, heads * self.width)
            self.down, self.other = linear(64, RANK), linear(64, RANK)
            self.turned = linear(64, COMMON)
            self.up = linear(RANK, heads * (OWN + VALUE))
            self.up_key, self.up_value = linear(RANK, heads * OWN), linear(RANK, heads * VALUE)
            self.up_biased = linear(RANK, heads * VALUE, bias=True)
            self.whole_key, self.whole_value = linear(64, heads * OWN), linear(64, heads * VALUE)
            self.out = linear(heads * VALUE, 64)
        self.form = {}

    def can_generate(self):
        return True

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, position_ids=None, use_cache=None):
        hidden = self.embed(input_ids)
        x = hidden[0]
        angles = (position_ids[0].float() * 0.3)[:, None]
        q = self.query(x).unflatten(-1, (self.heads, self.width))
        k, v = self.keys_and_values(self, x, self.turned(x) * angles.cos())
        y = attention(q, k, v, current_cu_q(), 0.2, **self.form)
        hidden = hidden + self.out(y.reshape(1, -1, self.heads * VALUE))
        return type("Output", (), {"logits": self.lm_head(hidden)})()


def by_head(x, heads=HEADS):
    return x.unflatten(-1, (heads, -1))


def for_all(common):
    return common[:, None].expand(-1, HEADS, -1)


def one_weight(self, x, common):
    k, v = by_head(self.up(self.down(x).tanh())).split([OWN, VALUE], -1)
    return torch.cat((k, for_all(common)), -1), v


def two_weights(self, x, common):
    c = self.down(x).tanh()
    return torch.cat((by_head(self.up_key(c)), for_all(common)), -1), by_head(self.up_value(c))


def values_first_in_blocks(self, x, common):
    c = self.down(x).tanh()
    v, k = self.up(c).split([HEADS * VALUE, HEADS * OWN], -1)
    return torch.cat((by_head(k), for_all(common)), -1), by_head(v)


def common_part_first(self, x, common):
    k, v = by_head(self.up(self.down(x).tanh())).split([OWN, VALUE], -1)
    return torch.cat((for_all(common), k), -1), v


def copied_into_place(self, x, common):
    k, v = by_head(self.up(self.down(x).tanh())).transpose(0, 1).split([OWN, VALUE], -1)
    key = k.new_empty((HEADS, x.shape[0], OWN + COMMON))
    key[..., :OWN] = k
    key[..., OWN:] = common[None]
    return key.transpose(0, 1), v.transpose(0, 1)


def unnormed_latent(self, x, common):
    c = torch.cat((self.down(x), common), -1)[:, :RANK]
    k, v = by_head(self.up(c)).split([OWN, VALUE], -1)
    return torch.cat((k, for_all(common)), -1), v


FOUND = [
    one_weight, two_weights, values_first_in_blocks, common_part_first, copied_into_place,
    unnormed_latent,
]  # fmt: skip


@pytest.mark.parametrize("form", FOUND, ids=lambda f: f.__name__)
def test_every_way_to_write_a_latent_is_rewritten(form):
    program = program_of(Small(form))
    expected = [logits(program, 5, 3), logits(program, 1), logits(program, 2, 17, 1)]
    assert absorb(program) == 1
    (node,) = [n for n in program.graph.nodes if is_call(n, latent_attention.overload)]
    assert tuple(node.args[1].meta["val"].shape[1:]) == (1, RANK + COMMON)
    assert not any(is_call(n, attention.overload) for n in program.graph.nodes)
    found = [logits(program, 5, 3), logits(program, 1), logits(program, 2, 17, 1)]
    for new, old in zip(found, expected, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)


def test_keys_without_a_common_part_are_rewritten():
    def bare(self, x, common):
        k, v = by_head(self.up(self.down(x).tanh())).split([OWN, VALUE], -1)
        return k, v

    program = program_of(Small(bare, own=OWN - COMMON))
    expected = logits(program, 5, 3)
    assert absorb(program) == 1
    torch.testing.assert_close(logits(program, 5, 3), expected, rtol=1e-4, atol=1e-5)


def test_scale_window_softcap_and_sinks_stay():
    model = Small(one_weight)
    model.form = {"window": 4, "softcap": 2.0, "sinks": torch.randn(HEADS)}
    program = program_of(model)
    expected = logits(program, 9, 3)
    assert absorb(program) == 1
    torch.testing.assert_close(logits(program, 9, 3), expected, rtol=1e-4, atol=1e-5)


def two_latents(self, x, common):
    k = by_head(self.up_key(self.down(x).tanh()))
    return torch.cat((k, for_all(common)), -1), by_head(self.up_value(self.other(x).tanh()))


def a_bias(self, x, common):
    c = self.down(x).tanh()
    return torch.cat((by_head(self.up_key(c)), for_all(common)), -1), by_head(self.up_biased(c))


def a_norm_per_head(self, x, common):
    k, v = one_weight(self, x, common)
    return torch.cat((k[..., :OWN] / k[..., :OWN].norm(dim=-1, keepdim=True), k[..., OWN:]), -1), v


def a_common_part_of_each_head(self, x, common):
    k, v = one_weight(self, x, common)
    factors = torch.arange(1.0, HEADS + 1)[:, None]
    return torch.cat((k[..., :OWN], k[..., OWN:] * factors), -1), v


def columns_out_of_order(self, x, common):
    k, v = one_weight(self, x, common)
    return torch.cat((k[..., :OWN].flip(-1), k[..., OWN:]), -1), v


def tokens_turned_round(self, x, common):
    k, v = one_weight(self, x, common)
    return k.flip(0), v


def the_whole_input(self, x, common):
    k, v = by_head(self.whole_key(x)), by_head(self.whole_value(x))
    return torch.cat((k, for_all(common)), -1), v


SPARED = [
    two_latents, a_bias, a_norm_per_head, a_common_part_of_each_head, columns_out_of_order,
    tokens_turned_round, the_whole_input,
]  # fmt: skip


@pytest.mark.parametrize("form", SPARED, ids=lambda f: f.__name__)
def test_what_is_not_one_latent_is_spared(form):
    program = program_of(Small(form))
    nodes = len(program.graph.nodes)
    assert absorb(program) == 0
    assert len(program.graph.nodes) == nodes


def test_a_latent_that_would_not_pay_is_seen_and_spared():
    program = program_of(Small(the_whole_input))
    (node,) = [n for n in program.graph.nodes if is_call(n, attention.overload)]
    found = find_latent(program, node)
    assert (found.rank, found.pays) == (64, False)


def test_a_plain_model_is_spared():
    assert absorb(program_of(tiny_model("llama"))) == 0


def test_a_number_of_another_token_is_no_column():
    program = program_of(Small(one_weight))
    (node,) = [n for n in program.graph.nodes if is_call(n, attention.overload)]
    key = attention.bind(node.args, node.kwargs)["k"]
    assert Columns(program).of(key).shape == (HEADS, OWN + COMMON)
    turned = program.call(aten.flip.default, key, [0], before=node, like=node)
    assert Columns(program).of(turned) is None


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_models_with_latent_attention_cache_the_latent(name, q_lora_rank):
    if q_lora_rank is None and name in ("minicpm3", "axk1"):
        pytest.skip("its queries always have a latent")
    model = tiny_model(name, q_lora_rank=q_lora_rank)
    low_rank = any(getattr(part, "q_a_proj", None) is not None for part in model.modules())
    assert low_rank == (q_lora_rank is not None)
    layers = sum(hasattr(part, "kv_b_proj") for part in model.modules())
    program = program_of(model, "gather_logits")
    expected = [logits(program, 5, 3), logits(program, 19)]
    assert absorb(program) == layers > 0
    found = [logits(program, 5, 3), logits(program, 19)]
    for new, old in zip(found, expected, strict=True):
        assert (new - old).abs().max() / old.abs().max() < 1e-5
    run_step(program, Step("cache", TRANSFORMS["cache"]()))
    (group,) = program.contract.token_groups
    assert group.bytes == (16 + 8) * 4 * layers
    names = [op.name for n in program.graph.nodes if (op := op_of(n.target)) is not None]
    assert names.count("cached_latent_attention") == layers
