"""Latent attention: equal to attention whose values are slices of its keys, whole and in pages."""

import itertools

import pytest
import torch
from axis_rules import check_axes

from autodeploy.custom_ops.attention import (
    attention,
    cached_latent_attention,
    latent_attention,
    paged_attention,
)
from autodeploy.custom_ops.op import Choice

FEATURES = {
    "plain": {},
    "window": {"window": 5},
    "chunk": {"chunk": 4},
    "everything": {"window": 6, "softcap": 5.0, "sinks": True, "alibi_slopes": True},
}
SHAPES = {"one latent": (6, 1, 24, 16), "all of it": (9, 1, 16, 16), "two latents": (4, 2, 20, 12)}
LENGTHS = (37, 9, 1)  # 47 tokens
SCHEDULES = {
    "prefill": [(37, 9, 1)],
    "chunks": [(30, 4, 0), (7, 5, 1)],
    "decode": [(35, 8, 0), (1, 0, 1), (1, 1, 0)],
}
PAGE_SIZE = 4


def tensors(shape, feature, dtype=torch.float32, tokens=47):
    heads, latents, width, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(tokens, h, width, generator=generator) for h in (heads, latents))
    form = dict(FEATURES[feature])
    for name in set(form) & {"sinks", "alibi_slopes"}:
        form[name] = torch.randn(heads, generator=generator)
    return q.to(dtype), kv.to(dtype), form


def starts(counts):
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention_over_slices_of_the_keys(shape, feature):
    q, kv, form = tensors(shape, feature)
    width = SHAPES[shape][3]
    expected = attention(q, kv, kv[..., :width].clone(), starts(LENGTHS), 0.3, **form)
    torch.testing.assert_close(
        latent_attention(q, kv, starts(LENGTHS), 0.3, width, **form), expected, rtol=0, atol=0
    )


def in_pages(function, q, kv, width, schedule, form):
    """Feeds every sequence in the pieces of `schedule` through one cache of shuffled pages."""
    pages = [-(-length // PAGE_SIZE) for length in LENGTHS]
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(1)) + 1
    table = torch.zeros(len(LENGTHS), max(pages), dtype=torch.int32)
    for row, part in zip(table, order.split(pages), strict=True):
        row[: len(part)] = part
    cache = torch.full((1 + sum(pages), PAGE_SIZE, *kv.shape[1:]), float("nan"), dtype=kv.dtype)
    out = torch.full((*q.shape[:2], width), float("nan"), dtype=q.dtype)
    first, done = starts(LENGTHS).tolist(), [0] * len(LENGTHS)
    for counts in schedule:
        at = [torch.arange(d, d + n) for d, n in zip(done, counts, strict=True)]
        rows = torch.cat([places + first[s] for s, places in enumerate(at)])
        slot = torch.cat(
            [table[s].long()[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for s, p in enumerate(at)]
        )
        done = [d + n for d, n in zip(done, counts, strict=True)]
        out[rows] = function(
            q[rows], kv[rows], cache, starts(counts), torch.tensor(done, dtype=torch.int32), table,
            slot, 0.3, width, form.get("window", 0), form.get("chunk", 0), form.get("softcap", 0.0),
            form.get("sinks"), form.get("alibi_slopes"),
        )  # fmt: skip
    assert tuple(done) == LENGTHS
    return out


def choice(dtype=torch.float32):
    tensor, index = torch.empty(1, 4, 16, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    metadata = (index, index, index[None], index.long())
    arguments = cached_latent_attention.bind((tensor, tensor, tensor[None], *metadata, 0.5, 8), {})
    return Choice(torch.device("cpu"), arguments)


def implementations():
    ways = cached_latent_attention.implementations
    return ["reference", *(way.name for way in ways if way.when(choice()))]


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_cache_of_pages_gives_what_whole_sequences_give(name, schedule, feature, shape, dtype):
    function = cached_latent_attention.implementation(name).function
    q, kv, form = tensors(shape, feature, dtype)
    width = SHAPES[shape][3]
    expected = latent_attention(q, kv, starts(LENGTHS), 0.3, width, **form)
    found = in_pages(function, q, kv, width, SCHEDULES[schedule], form)
    # torch's own attention rounds its weights to bfloat16
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, expected, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_runs_the_way_paged_attention_would(dtype):
    tensor, index = torch.empty(1, 4, 16, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    metadata = (index, index, index[None], index.long())
    arguments = paged_attention.bind(
        (tensor, tensor, tensor, tensor[None], tensor[None], *metadata, 0.5), {}
    )
    for device in ("cpu", "meta"):
        expected = paged_attention.choose(Choice(torch.device(device), arguments)).name
        made = Choice(torch.device(device), choice(dtype).args)
        assert cached_latent_attention.choose(made).name == expected


def test_a_site_gets_one_cache_as_wide_as_its_keys():
    q, kv, _ = tensors("one latent", "plain", torch.bfloat16)
    arguments = latent_attention.bind((q, kv, starts(LENGTHS), 0.5, 16), {"window": 7})
    assert latent_attention.cached.op is cached_latent_attention
    (spec,) = latent_attention.cached.caches(arguments)
    assert (spec.name, spec.shape, spec.per, spec.window) == ("latent_cache", (1, 24), "token", 7)
    assert spec.dtype is torch.bfloat16
    assert spec.bytes == 2 * 24


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cached", [False, True], ids=["functional", "cached"])
def test_splitting_along_any_axis_of_the_rule_gives_the_same(cached):
    generator = torch.Generator().manual_seed(7)
    arguments = {
        "q": torch.randn(9, 4, 6, generator=generator),
        "kv": torch.randn(9, 2, 6, generator=generator),
        "cu_q": torch.tensor([0, 4, 9], dtype=torch.int32),
        "scale": 0.4,
        "value_width": 4,
        "sinks": torch.randn(4, generator=generator),
        "alibi_slopes": torch.randn(4, generator=generator),
    }
    if cached:
        arguments |= {
            "latent_cache": torch.randn(5, 4, 2, 6, generator=generator),
            "kv_len": torch.tensor([6, 7], dtype=torch.int32),
            "block_table": torch.tensor([[3, 1], [2, 4]], dtype=torch.int32),
            "slot": torch.tensor([14, 15, 4, 5, 10, 11, 16, 17, 18]),
        }
    op = cached_latent_attention if cached else latent_attention
    check_axes(op, arguments, {"h": 2, "g": 2}, close)


def test_shape_rules_hold_for_any_number_of_tokens():
    class Model(torch.nn.Module):
        def forward(self, q, kv, cu_q):
            return latent_attention(q, kv, cu_q, 0.5, 16)

    tokens = torch.export.Dim("tokens", min=1, max=4096)
    q, kv, _ = tensors("one latent", "plain", tokens=7)
    shapes = ({0: tokens}, {0: tokens}, None)
    given = (q, kv, starts([7]))
    exported = torch.export.export(Model(), given, dynamic_shapes=shapes).module()
    for total in (1, 30):
        q, kv, _ = tensors("one latent", "plain", tokens=total)
        cu_q = starts([total])
        close(exported(q, kv, cu_q), latent_attention(q, kv, cu_q, 0.5, 16))
