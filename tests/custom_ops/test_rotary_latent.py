"""rotary_latent_attention in Triton against its reference: single tokens, and any number."""

import itertools

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.attention import rotary_latent_attention, triton_rotary_latent
from autodeploy.custom_ops.linear import heads_linear
from autodeploy.custom_ops.op import Choice

pytestmark = pytest.mark.skipif(not gpu.has_triton(), reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = rotary_latent_attention.implementation("triton").function
CLOSE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5 if DEVICE == "cpu" else 1e-4},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2},
}
COUNTS = {
    "decode": ([70, 1, 37], [1, 1, 1]),
    "mixed": ([25, 1, 20], [12, 1, 3]),
    # As many tokens as sequences, and one that no sequence owns.
    "several of one sequence": ([40, 50, 3, 5], [0, 3, 0, 0]),
}
FORMS = {
    "complex": {"interleaved": True, "wide table": True},
    "halves": {},
    "neither norm nor table": {"eps": None, "table": False},
    "window": {"window": 5},
    "chunk": {"chunk": 32},
    "everything": {
        "window": 30, "softcap": 5.0, "sinks": True, "alibi_slopes": True, "norm_offset": 1.0,
        "cast_before_weight": False,
    },
}  # fmt: skip
# Heads, width of a query, rank, rest, width of a value.
SHAPES = {
    "small": (6, 12, 16, 8, 10),
    "heads of several programs": (18, 16, 32, 16, 16),
    "padded": (3, 24, 20, 6, 24),
}


def step(counts, shape, dtype=torch.float32, page_size=16, **form):
    """Arguments of one step: only slots known before hold numbers, table ends are garbage."""
    lengths, counts = counts
    heads, width, rank, rest, value = shape
    generator = torch.Generator().manual_seed(3)

    def numbers(*extents):
        return torch.randn(*extents, generator=generator).to(dtype).to(DEVICE)

    total = max(sum(counts), len(counts))
    pages = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(pages) + 2, generator=generator).int()
    table = torch.zeros((len(lengths), max(pages) + 2), dtype=torch.int32)
    for row, own in zip(table, order[: sum(pages)].split(pages), strict=True):
        row[: len(own)] = own
    cache = torch.full((len(order) * page_size, 1, rank + rest), float("nan"))
    new = []
    for row, length, count in zip(table, lengths, counts, strict=True):
        places = [int(row[p // page_size]) * page_size + p % page_size for p in range(length)]
        known, own = places[: length - count], places[length - count :]
        cache[known] = torch.randn(len(known), 1, rank + rest, generator=generator)
        new += own
    # A token that no sequence owns has a page that no sequence has.
    new += [int(order[-1]) * page_size] * (total - len(new))
    packed = numbers(total, heads * (width + rest) + rank + rest)
    q, kv = packed.split((heads * (width + rest), rank + rest), 1)
    q, q_rest = q.unflatten(1, (heads, -1)).split((width, rest), 2)
    kv = kv[:, None]
    up = (0.3 * numbers(heads * (width + value), rank)).unflatten(0, (heads, -1))
    arguments = {
        "q": q, "q_rest": q_rest, "latent": kv[..., :rank], "rest": kv[..., rank:],
        "latent_cache": cache.to(dtype).to(DEVICE).unflatten(0, (-1, page_size)),
        "cu_q": torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE),
        "kv_len": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        "block_table": table.to(DEVICE),
        "slot": torch.tensor(new, dtype=torch.int64, device=DEVICE),
        "key_weight": up[:, :width].transpose(1, 2), "value_weight": up[:, width:],
        "scale": (width + rest) ** -0.5, "eps": 1e-6, "norm": 1 + 0.1 * numbers(rank),
    }  # fmt: skip
    if form.pop("table", True):
        angles = torch.randn(1, total, rest // 2, generator=generator)
        both = torch.cat((angles, angles), -1)
        kind = torch.float32 if form.pop("wide table", False) else dtype
        arguments |= {"cos": both.cos().to(kind).to(DEVICE), "sin": both.sin().to(kind).to(DEVICE)}
    for name in set(form) & {"sinks", "alibi_slopes"}:
        form[name] = torch.randn(heads, generator=generator).to(DEVICE)
    return arguments | form


def check(arguments):
    """The kernels give what the reference gives, in the result and in the cache."""
    owned = int(arguments["cu_q"][-1])
    same = dict(arguments, latent_cache=arguments["latent_cache"].clone())
    expected = rotary_latent_attention.reference(**same)
    found = TRITON(**arguments)
    dtype = arguments["q"].dtype
    assert found.dtype is dtype
    torch.testing.assert_close(found[:owned], expected[:owned], **CLOSE[dtype])
    slots = arguments["slot"][:owned]
    caches = [a["latent_cache"].flatten(0, 1).clone() for a in (arguments, same)]
    torch.testing.assert_close(caches[0][slots], caches[1][slots], **CLOSE[dtype])
    for cache in caches:
        cache[arguments["slot"]] = 0
    torch.testing.assert_close(*caches, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("counts", COUNTS)
def test_every_form_of_rotation_and_attention_is_the_references(form, counts):
    check(step(COUNTS[counts], SHAPES["small"], **FORMS[form]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", COUNTS)
def test_sixteen_bits_with_a_table_in_float32(dtype, counts):
    check(step(COUNTS[counts], SHAPES["small"], dtype, **FORMS["complex"]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("counts", COUNTS)
def test_any_width_and_any_number_of_heads(shape, counts):
    check(step(COUNTS[counts], SHAPES[shape]))


@pytest.mark.parametrize("few", [0, 8])
@pytest.mark.parametrize("programs", [1, 1000])
def test_ranges_are_added_up_alike_by_either_launch(few, programs, monkeypatch):
    monkeypatch.setattr(triton_rotary_latent, "FEW", few)
    tiles = triton_rotary_latent.LatentTiles(16, 16, 4, 2, 2, programs)
    monkeypatch.setattr(triton_rotary_latent, "decode_tiles", lambda *_: tiles)
    check(step(COUNTS["decode"], SHAPES["small"], sinks=True, alibi_slopes=True))


@pytest.mark.parametrize("tokens", [1, 19, 260])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_by_head_are_the_references(tokens, dtype):
    x, weight = torch.randn(tokens, 2, 40).to(dtype), torch.randn(2, 24, 36).to(dtype)
    weight = weight.to(DEVICE)
    for row, w in ((x[..., :36], weight), (x[..., 2:26], weight.transpose(1, 2))):
        row = row.to(DEVICE)
        expected = torch.einsum("thk,hnk->thn", row.float(), w.float())
        close = {"rtol": 2e-2, "atol": 5e-2} if dtype is torch.bfloat16 else CLOSE[dtype]
        for way in (heads_linear, heads_linear.implementation("triton").function):
            torch.testing.assert_close(way(row, w).float(), expected, **close)


@pytest.mark.parametrize("wrong", ["norm", "q", "rest"])
def test_several_dtypes_are_left_to_the_reference(wrong):
    arguments = step(COUNTS["decode"], SHAPES["small"])
    given = rotary_latent_attention.bind((), arguments)
    with gpu.interpreted_kernels() if DEVICE == "cpu" else torch.no_grad():
        place = torch.device(DEVICE)
        assert rotary_latent_attention.choose(Choice(place, given)).name == "triton"
        given[wrong] = given[wrong].double()
        assert rotary_latent_attention.choose(Choice(place, given)).name == "reference"
