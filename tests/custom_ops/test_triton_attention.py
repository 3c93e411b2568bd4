"""paged_attention in Triton against its reference: one token a sequence, and any number."""

import contextlib
import itertools
import random

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.attention import paged_attention, triton_decode, triton_paged
from autodeploy.custom_ops.op import Choice

pytestmark = pytest.mark.skipif(not gpu.has_triton(), reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = paged_attention.implementation("triton").function
CLOSE = {
    # tf32x3 keeps some 20 bits of a score: a power of one near 1000, as here with slopes and with
    # scores far apart, is 1e-3 off. The interpreter multiplies in float32.
    torch.float32: {
        "rtol": 1e-3 if DEVICE == "cuda" else 1e-4,
        "atol": 1e-4 if DEVICE == "cuda" else 1e-5,
    },
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
FEATURES = {
    "plain": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "wide window": {"window": 90},
    "chunk": {"chunk": 32},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": True},
    "everything": {"window": 70, "chunk": 64, "softcap": 5.0, "sinks": True, "alibi_slopes": True},
}
SHAPES = [
    (4, 4, 80, 80), (6, 2, 24, 96), (7, 1, 96, 40), (2, 1, 8, 8), (4, 2, 256, 128), (80, 1, 24, 16),
]  # fmt: skip
COUNTS = {"decode": [1, 1, 1], "mixed": [40, 1, 7]}


def step(lengths, counts, shape, page_size=16, dtype=torch.float32, feature="plain"):
    """Arguments of one step: only slots known before hold numbers, table ends are garbage."""
    generator = torch.Generator().manual_seed(3)
    heads, kv_heads, width, value_width = shape
    total, last = sum(counts), [-(-n // page_size) for n in lengths]
    splits = [heads * width, kv_heads * width, kv_heads * value_width]
    # Slices of one projection, as they come from a model.
    packed = torch.randn(total, sum(splits), generator=generator).to(dtype).to(DEVICE)
    q, k, v = packed.split(splits, -1)
    order = torch.randperm(sum(last) + 2, generator=generator).int()
    table = torch.full((len(lengths), max(last) + 2), 1 << 30, dtype=torch.int32)
    for row, pages in zip(table, order[: sum(last)].split(last), strict=True):
        row[: len(pages)] = pages
    caches = []
    for extent in (width, value_width):
        cache = torch.full((len(order) * page_size, kv_heads, extent), float("nan"))
        for row, length, count in zip(table, lengths, counts, strict=True):
            known = slots(row, range(length - count), page_size)
            cache[known] = torch.randn(len(known), kv_heads, extent, generator=generator)
        caches.append(cache.to(dtype).to(DEVICE).unflatten(0, (-1, page_size)))
    new = [
        slot
        for row, length, count in zip(table, lengths, counts, strict=True)
        for slot in slots(row, range(length - count, length), page_size)
    ]
    options = dict(FEATURES[feature])
    for name in ("sinks", "alibi_slopes"):
        if name in options:
            options[name] = torch.randn(heads, generator=generator).to(DEVICE)
    return {
        "q": q.unflatten(1, (heads, width)),
        "k": k.unflatten(1, (kv_heads, width)),
        "v": v.unflatten(1, (kv_heads, value_width)),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "cu_q": torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE),
        "kv_len": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        "block_table": table.to(DEVICE),
        "slot": torch.tensor(new, dtype=torch.int64, device=DEVICE),
        "scale": width**-0.5,
        **options,
    }


def slots(row, positions, page_size):
    return [int(row[p // page_size]) * page_size + p % page_size for p in positions]


def check(arguments, **close):
    """The kernels give what the reference gives, in the result and in the caches."""
    wide = {
        name: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    wide = {name: x.clone() if name.endswith("cache") else x for name, x in wide.items()}
    expected = paged_attention.reference(**wide)
    found = TRITON(**arguments)
    assert found.dtype is arguments["q"].dtype
    torch.testing.assert_close(found.float(), expected, **(close or CLOSE[found.dtype]))
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(
            arguments[name].float(), wide[name], rtol=0, atol=0, equal_nan=True
        )
    return found


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("counts", COUNTS)
def test_every_form_of_attention_is_the_references(feature, counts):
    check(step([150, 1, 77], COUNTS[counts], (6, 2, 16, 16), feature=feature))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature", ["plain", "everything"])
@pytest.mark.parametrize("counts", COUNTS)
def test_sixteen_bit_caches(dtype, feature, counts):
    check(step([150, 1, 77], COUNTS[counts], (8, 2, 32, 32), dtype=dtype, feature=feature))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_any_width_and_any_number_of_heads_a_group(shape, counts):
    check(step([45, 1, 20], COUNTS[counts], shape))


@pytest.mark.parametrize("page_size", [1, 4, 12, 64])
@pytest.mark.parametrize("counts", COUNTS)
def test_any_page_size(page_size, counts):
    check(step([150, 1, 77], COUNTS[counts], (4, 2, 16, 16), page_size))


@pytest.mark.parametrize("feature", ["plain", "everything", "sinks"])
def test_a_long_sequence_cut_into_ranges_is_whole_every_time(feature):
    arguments = step([1500, 3, 700], [1, 1, 1], (4, 2, 16, 16), feature=feature)
    first = check(arguments)
    assert torch.equal(first, TRITON(**arguments)), "the first launch left something behind"


@pytest.mark.parametrize("programs", [1, 6, 12, 50])
@pytest.mark.parametrize("least", [1, 3])
def test_the_number_of_ranges_changes_nothing(monkeypatch, programs, least):
    tiles = triton_paged.DecodeTiles(32, least, programs, 4, 2)
    monkeypatch.setattr(triton_paged, "decode_tiles", lambda *_: tiles)
    check(step([400, 3, 97], [1, 3, 1], (4, 2, 16, 16)))


@pytest.mark.parametrize("feature", ["plain", "everything"])
@pytest.mark.parametrize("counts", COUNTS)
def test_pages_known_a_block_ahead_change_nothing(monkeypatch, feature, counts):
    decode = triton_paged.DecodeTiles(32, 1, 8, 4, 3, known=True)
    monkeypatch.setattr(triton_paged, "decode_tiles", lambda *_: decode)
    monkeypatch.setattr(triton_decode, "holds", lambda *_: False)
    check(step([150, 1, 77], COUNTS[counts], (4, 2, 16, 16), feature=feature))


@pytest.mark.parametrize("counts", [[3, 0, 0], [0, 2, 1], [1, 1, 1], [0, 0, 3]])
def test_as_many_tokens_as_sequences_need_not_be_one_each(counts):
    check(step([150, 40, 77], counts, (4, 2, 16, 16)))


@pytest.mark.parametrize("extra", [1, 5, 40, 150])
@pytest.mark.parametrize("counts", [[9, 1, 0, 0], [1, 12], [3], [1, 2, 1], [0, 2, 0, 0]])
def test_rows_that_no_sequence_owns_are_zeros(counts, extra):
    arguments = step([max(1, 30 + count) for count in counts], counts, (6, 2, 24, 96))
    expected = paged_attention.reference(**arguments)
    for name in ("q", "k", "v", "slot"):
        # Each writes what the first token writes, and where.
        arguments[name] = torch.cat((arguments[name], *[arguments[name][:1]] * extra))
    with filled_with_nan():
        found = TRITON(**arguments)
    torch.testing.assert_close(found[: sum(counts)], expected, **CLOSE[torch.float32])
    assert not found[sum(counts) :].any()


@contextlib.contextmanager
def filled_with_nan():
    """Memory that is asked for uninitialised has no numbers in it."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_many_short_sequences_of_any_number_of_tokens():
    draw = random.Random(0)
    counts = [draw.choice([0, 0, 1, 1, 2, 3, 70, 130]) for _ in range(14)]
    lengths = [max(1, count + draw.choice([0, 0, 5, 33])) for count in counts]
    check(step(lengths, counts, (4, 2, 16, 16)))


@pytest.mark.parametrize("option", [{"window": 6}, {"chunk": 8}])
@pytest.mark.parametrize("new", [1, 2, 20])
def test_pages_out_of_sight_are_never_read(option, new):
    arguments = step([60], [new], (4, 2, 16, 16), page_size=4) | option
    seen = 60 - new
    first = seen - 5 if "window" in option else seen // 8 * 8
    arguments["block_table"][0, : first // 4] = arguments["block_table"][0, first // 4]
    expected = paged_attention.reference(**arguments)
    arguments["block_table"][0, : first // 4] = 1 << 30
    torch.testing.assert_close(TRITON(**arguments), expected, **CLOSE[torch.float32])


def test_caches_tables_and_slots_that_are_slices_of_wider_ones():
    arguments = step([150, 40, 77], [9, 1, 20], (4, 2, 16, 16))
    for name in ("k_cache", "v_cache", "block_table"):
        x = arguments[name]
        arguments[name] = torch.cat((x, torch.full_like(x, 1 << 20)), -1)[..., : x.shape[-1]]
        assert not arguments[name].is_contiguous()
    arguments["slot"] = arguments["slot"].repeat_interleave(2)[::2]
    check(arguments)


def test_scores_far_from_one_another():
    for counts in COUNTS.values():
        arguments = step([150, 1, 77], counts, (4, 2, 16, 16), feature="softcap")
        arguments["q"] = arguments["q"] * 300
        # Scores of a thousand: their last bit is 6e-5 in the exponent.
        check(arguments | {"softcap": 0.0}, rtol=1e-3, atol=1e-3)
        check(arguments)


def test_a_step_of_no_tokens():
    arguments = step([1], [1], (4, 2, 16, 16))
    for name in ("q", "k", "v", "slot", "kv_len", "block_table"):
        arguments[name] = arguments[name][:0]
    assert TRITON(**arguments | {"cu_q": arguments["cu_q"][:1]}).shape == (0, 4, 16)


def test_kernels_are_chosen_for_what_they_hold_for():
    arguments = step([5], [2], (4, 2, 16, 16))
    bound = paged_attention.bind((), arguments)

    def chosen(**changed):
        return paged_attention.choose(Choice(torch.device("cuda"), bound | changed)).name

    assert chosen() == "triton"
    assert chosen(q=arguments["q"].half()) != "triton"
    assert chosen(kv_len=arguments["kv_len"].long()) != "triton"
    assert chosen(q=torch.empty(2, 4, 300), k=torch.empty(2, 2, 300)) != "triton"
    assert chosen(scale=-1.0) != "triton"
    assert paged_attention.implementation("triton").capturable


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("counts", [[1, 1, 1], [40, 1, 7]])
def test_a_graph_replays_for_other_lengths(counts):
    arguments = step([1500, 40, 700], counts, (8, 2, 64, 64), dtype=torch.bfloat16)
    TRITON(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = TRITON(**arguments)
    for lengths in ([1500, 40, 700], [60, 40, 699]):
        arguments["kv_len"].copy_(torch.tensor(lengths, dtype=torch.int32))
        # The new tokens' slots are those of the last positions.
        new = [
            slot
            for row, length, count in zip(arguments["block_table"], lengths, counts, strict=True)
            for slot in slots(row, range(length - count, length), 16)
        ]
        arguments["slot"].copy_(torch.tensor(new))
        graph.replay()
        torch.testing.assert_close(
            found, paged_attention.reference(**arguments), **CLOSE[torch.bfloat16]
        )
