"""cached_latent_attention in Triton against its reference: single tokens, and any number."""

import itertools

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.attention import cached_latent_attention, triton_latent
from autodeploy.custom_ops.op import Choice

pytestmark = pytest.mark.skipif(not gpu.has_triton(), reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = cached_latent_attention.implementation("triton").function
CLOSE = {
    # On a GPU a product of float32 is three of tf32.
    torch.float32: {"rtol": 1e-4, "atol": 1e-5 if DEVICE == "cpu" else 5e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
FEATURES = {
    "plain": {},
    "window": {"window": 5},
    "wide window": {"window": 90},
    "chunk": {"chunk": 32},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": True},
    "everything": {"window": 70, "chunk": 64, "softcap": 5.0, "sinks": True, "alibi_slopes": True},
}
# Heads, latents, width of a row and of its values.
SHAPES = {
    "two parts": (16, 1, 80, 64),
    "padded parts": (7, 1, 24, 12),
    "values past the first part": (4, 2, 24, 20),
    "all of it": (9, 1, 16, 16),
    "narrower than a block": (2, 2, 8, 5),
    "heads of several programs": (80, 1, 40, 32),
    "two latents of several programs": (68, 2, 24, 16),
}
COUNTS = {"decode": [1, 1, 1], "mixed": [40, 1, 7]}


def step(lengths, counts, shape, page_size=16, dtype=torch.float32, feature="plain"):
    """Arguments of one step: only slots known before hold numbers, table ends are garbage."""
    generator = torch.Generator().manual_seed(3)
    heads, latents, width, value_width = shape
    total, pages = sum(counts), [-(-n // page_size) for n in lengths]
    # Slices of one projection, as they come from a model.
    packed = torch.randn(total, (heads + latents) * width, generator=generator)
    q, kv = packed.to(dtype).to(DEVICE).unflatten(1, (-1, width)).split((heads, latents), 1)
    order = torch.randperm(sum(pages) + 2, generator=generator).int()
    table = torch.full((len(lengths), max(pages) + 2), 1 << 30, dtype=torch.int32)
    for row, own in zip(table, order[: sum(pages)].split(pages), strict=True):
        row[: len(own)] = own
    cache = torch.full((len(order) * page_size, latents, width), float("nan"))
    new = []
    for row, length, count in zip(table, lengths, counts, strict=True):
        places = [int(row[p // page_size]) * page_size + p % page_size for p in range(length)]
        known, own = places[: length - count], places[length - count :]
        cache[known] = torch.randn(len(known), latents, width, generator=generator)
        new += own
    options = dict(FEATURES[feature])
    for name in set(options) & {"sinks", "alibi_slopes"}:
        options[name] = torch.randn(heads, generator=generator).to(DEVICE)
    return {
        "q": q,
        "kv": kv,
        "latent_cache": cache.to(dtype).to(DEVICE).unflatten(0, (-1, page_size)),
        "cu_q": torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE),
        "kv_len": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        "block_table": table.to(DEVICE),
        "slot": torch.tensor(new, dtype=torch.int64, device=DEVICE),
        "scale": width**-0.5,
        "value_width": value_width,
        **options,
    }


def check(arguments):
    """The kernels give what the reference gives, in the result and in the cache."""
    wide = {
        name: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    wide["latent_cache"] = wide["latent_cache"].clone()
    expected = cached_latent_attention.reference(**wide)
    found = TRITON(**arguments)
    assert found.dtype is arguments["q"].dtype
    torch.testing.assert_close(found.float(), expected, **CLOSE[found.dtype])
    cache = arguments["latent_cache"].float()
    torch.testing.assert_close(cache, wide["latent_cache"], rtol=0, atol=0, equal_nan=True)
    return found


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("counts", COUNTS)
def test_every_form_of_attention_is_the_references(feature, counts):
    check(step([150, 1, 77], COUNTS[counts], (6, 1, 24, 16), feature=feature))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature", ["plain", "everything"])
@pytest.mark.parametrize("counts", COUNTS)
def test_sixteen_bit_caches(dtype, feature, counts):
    check(step([150, 1, 77], COUNTS[counts], (16, 1, 80, 64), dtype=dtype, feature=feature))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", COUNTS)
def test_rows_as_wide_as_they_come(dtype, counts):
    check(step([45, 1, 60], COUNTS[counts], (16, 1, 576, 512), dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_any_width_and_any_number_of_heads(shape, counts):
    check(step([45, 1, 20], COUNTS[counts], SHAPES[shape]))


@pytest.mark.parametrize("page_size", [1, 12, 64])
@pytest.mark.parametrize("counts", COUNTS)
def test_any_page_size(page_size, counts):
    check(step([150, 1, 77], COUNTS[counts], (4, 1, 24, 16), page_size))


@pytest.mark.parametrize("programs", [1, 6, 12, 50, 400])
@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("counts", [[1, 1, 1], [5, 1, 1], [2, 0, 1]])
def test_the_number_of_ranges_changes_nothing(monkeypatch, programs, least, counts):
    tiles = triton_latent.LatentTiles(16, 16, 4, 2, least, programs)
    monkeypatch.setattr(triton_latent, "decode_tiles", lambda *_: tiles)
    arguments = step([700, 3, 97], counts, (4, 1, 24, 16), feature="sinks")
    first = check(arguments)
    assert torch.equal(first, TRITON(**arguments)), "the first launch left something behind"


@pytest.mark.parametrize("counts", [[3, 0, 0], [0, 2, 1], [0, 0, 3]])
def test_as_many_tokens_as_sequences_need_not_be_one_each(counts):
    check(step([450, 40, 77], counts, (4, 1, 24, 16)))


@pytest.mark.parametrize("extra", [2, 30])
@pytest.mark.parametrize("counts", [[1, 1, 0, 0], [9, 1, 0, 0], [1, 5], [0, 2]])
def test_rows_that_no_sequence_owns_are_zeros_or_harm_nothing(counts, extra):
    arguments = step([150, 77, 1, 1][: len(counts)], counts, (20, 1, 24, 16))
    expected = cached_latent_attention.reference(**arguments)
    for name in ("q", "kv", "slot"):
        # Each writes what the first token writes, and where.
        arguments[name] = torch.cat((arguments[name], *[arguments[name][:1]] * extra))
    torch.use_deterministic_algorithms(True)  # memory asked for has no numbers in it
    try:
        found = TRITON(**arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found[: sum(counts)], expected, **CLOSE[torch.float32])
    if len(found) != len(counts):
        assert not found[sum(counts) :].any()


@pytest.mark.parametrize("option", [{"window": 6}, {"chunk": 8}])
@pytest.mark.parametrize("new", [1, 2, 20])
def test_pages_out_of_sight_are_never_read(option, new):
    arguments = step([60], [new], (4, 1, 24, 16), page_size=4) | option
    seen = 60 - new
    first = seen - 5 if "window" in option else seen // 8 * 8
    arguments["block_table"][0, : first // 4] = arguments["block_table"][0, first // 4]
    expected = cached_latent_attention.reference(**arguments)
    arguments["block_table"][0, : first // 4] = 1 << 30
    torch.testing.assert_close(TRITON(**arguments), expected, **CLOSE[torch.float32])


def test_caches_and_slots_that_are_slices_of_wider_ones():
    arguments = step([150, 40, 77], [9, 1, 20], (4, 1, 24, 16))
    for name in ("latent_cache", "block_table"):
        x = arguments[name]
        arguments[name] = torch.cat((x, torch.full_like(x, 1 << 20)), -1)[..., : x.shape[-1]]
        assert not arguments[name].is_contiguous()
    arguments["slot"] = arguments["slot"].repeat_interleave(2)[::2]
    arguments["q"] = arguments["q"].transpose(1, 2).contiguous().transpose(1, 2)
    check(arguments)


def test_a_step_of_no_tokens():
    arguments = step([1], [1], (4, 1, 24, 16))
    for name in ("q", "kv", "slot", "kv_len", "block_table"):
        arguments[name] = arguments[name][:0]
    assert TRITON(**arguments | {"cu_q": arguments["cu_q"][:1]}).shape == (0, 4, 16)


@pytest.mark.parametrize(("group", "rows", "parts"), [(128, 64, 2), (16, 64, 1), (20, 16, 2)])
def test_heads_are_dealt_out_to_equal_parts(group, rows, parts):
    assert triton_latent.split_heads(group, rows) == parts


def test_kernels_are_chosen_for_what_they_hold_for():
    arguments = step([5], [2], (4, 1, 24, 16))
    bound = cached_latent_attention.bind((), arguments)

    def chosen(**changed):
        return cached_latent_attention.choose(Choice(torch.device("cuda"), bound | changed)).name

    assert chosen() == "triton"
    assert chosen(q=arguments["q"].half()) != "triton"
    assert chosen(kv_len=arguments["kv_len"].long()) != "triton"
    assert chosen(q=torch.empty(2, 4, 1100), value_width=1024) != "triton"
    assert chosen(scale=-1.0) != "triton"
    assert cached_latent_attention.implementation("triton").capturable


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("counts", COUNTS)
def test_a_graph_replays_for_other_lengths(heads, counts):
    shape = (heads, 1, 576, 512)
    arguments = step([1500, 40, 700], COUNTS[counts], shape, dtype=torch.bfloat16)
    TRITON(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = TRITON(**arguments)
    for lengths in ([1500, 40, 700], [60, 40, 699]):
        arguments["kv_len"].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        expected = cached_latent_attention.reference(**arguments)
        torch.testing.assert_close(found, expected, **CLOSE[torch.bfloat16])
