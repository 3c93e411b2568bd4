"""Attention: the reference against dense masked math, the paged form and every implementation
against the reference: ragged prefill, chunks, decode and mixed batches over shuffled pages."""

import itertools

import pytest
import torch

from autodeploy.custom_ops.attention import attention, paged_attention
from autodeploy.custom_ops.op import Choice, OpError

FEATURES = {
    "plain": {},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "chunk": {"chunk": 4},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": True},
    "everything": {"window": 6, "softcap": 5.0, "sinks": True, "alibi_slopes": True},
}
SHAPES = {"one group": (4, 4, 16, 16), "three groups": (6, 2, 16, 16), "wide values": (4, 2, 24, 8)}


def options(feature, heads, generator):
    chosen = dict(FEATURES[feature])
    for name in ("sinks", "alibi_slopes"):
        if name in chosen:
            chosen[name] = torch.randn(heads, generator=generator)
    return chosen


def tensors(total, shape, generator, dtype=torch.float32):
    heads, kv_heads, width, value_width = shape
    return [
        torch.randn(total, h, d, generator=generator).to(dtype)
        for h, d in ((heads, width), (kv_heads, width), (kv_heads, value_width))
    ]


def dense(q, k, v, scale, window=0, chunk=0, softcap=0.0, sinks=None, alibi_slopes=None):
    """One sequence, head by head and query by query: as the definition reads."""
    out = torch.zeros(len(q), q.shape[1], v.shape[2])
    groups = q.shape[1] // k.shape[1]
    for i, head in itertools.product(range(len(q)), range(q.shape[1])):
        scores, values = [], []
        for j in range(i + 1):
            if (window and j <= i - window) or (chunk and j // chunk != i // chunk):
                continue
            score = scale * (q[i, head].float() @ k[j, head // groups].float())
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            if alibi_slopes is not None:
                score = score + alibi_slopes[head] * (j - i)
            scores.append(score)
            values.append(v[j, head // groups].float())
        total = torch.stack(scores).exp()
        extra = sinks[head].exp() if sinks is not None else 0.0
        out[i, head] = (total[:, None] * torch.stack(values)).sum(0) / (total.sum() + extra)
    return out


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_the_definition(feature, shape):
    generator = torch.Generator().manual_seed(0)
    q, k, v = tensors(13, SHAPES[shape], generator)
    chosen = options(feature, q.shape[1], generator)
    cu_q = torch.tensor([0, 9, 9, 13], dtype=torch.int32)  # one sequence is empty
    found = attention(q, k, v, cu_q, 0.3, **chosen)
    for a, b in ((0, 9), (9, 13)):
        torch.testing.assert_close(found[a:b], dense(q[a:b], k[a:b], v[a:b], 0.3, **chosen))


def test_bidirectional_attention_sees_later_tokens():
    q, k, v = tensors(6, (2, 2, 8, 8), torch.Generator().manual_seed(0))
    found = attention(q, k, v, torch.tensor([0, 6]), 0.5, causal=False)
    heads_first = [t.transpose(0, 1) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=0.5)
    torch.testing.assert_close(found, expected.transpose(0, 1))


class Pages:
    """Paged caches full of NaN, with each sequence's pages shuffled and its table padded."""

    def __init__(self, lengths, page_size, k, v, generator):
        self.page_size = page_size
        counts = [-(-n // page_size) for n in lengths]
        order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
        self.tables = [[order.pop() for _ in range(n)] for n in counts]
        pages = sum(counts) + 1
        self.k = torch.full((pages, page_size, *k.shape[1:]), float("nan"), dtype=k.dtype)
        self.v = torch.full((pages, page_size, *v.shape[1:]), float("nan"), dtype=v.dtype)

    def table(self):
        width = max(map(len, self.tables)) + 1
        return torch.tensor([t + [0] * (width - len(t)) for t in self.tables], dtype=torch.int32)

    def slots(self, sequence, start, end):
        return [
            self.tables[sequence][p // self.page_size] * self.page_size + p % self.page_size
            for p in range(start, end)
        ]


def run_in_chunks(function, q, k, v, lengths, schedule, page_size, chosen, generator):
    """Feeds every sequence in the pieces of `schedule`; returns outputs in order of tokens."""
    pages = Pages(lengths, page_size, k, v, generator)
    starts = [0, *itertools.accumulate(lengths)]
    out = torch.empty(len(q), q.shape[1], v.shape[2], dtype=q.dtype)
    done = [0] * len(lengths)
    for counts in schedule:
        rows = [
            list(range(starts[s] + done[s], starts[s] + done[s] + n)) for s, n in enumerate(counts)
        ]
        flat = [r for part in rows for r in part]
        slots = [x for s, n in enumerate(counts) for x in pages.slots(s, done[s], done[s] + n)]
        done = [d + n for d, n in zip(done, counts, strict=True)]
        out[flat] = function(
            q[flat], k[flat], v[flat], pages.k, pages.v,
            torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
            torch.tensor(done, dtype=torch.int32), pages.table(),
            torch.tensor(slots, dtype=torch.int64), 0.3,
            chosen.get("window", 0), chosen.get("chunk", 0), chosen.get("softcap", 0.0),
            chosen.get("sinks"), chosen.get("alibi_slopes"),
        )  # fmt: skip
    assert done == lengths
    return out


def choice(dtype=torch.float32):
    tensor, index = torch.empty(1, 4, 16, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    metadata = (index, index, index[None], index.long())
    caches = (tensor[None], tensor[None])
    arguments = paged_attention.bind((tensor, tensor, tensor, *caches, *metadata, 0.5), {})
    return Choice(torch.device("cpu"), arguments)


def implementations():
    return ["reference", *(i.name for i in paged_attention.implementations if i.when(choice()))]


SCHEDULES = {
    "prefill": [(17, 9, 1)],
    "chunks": [(7, 7, 1), (7, 2, 0), (3, 0, 0)],
    "decode": [(15, 8, 0), (1, 0, 1), (1, 1, 0)],
}


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_give_what_whole_sequences_give(name, feature, shape, page_size, dtype):
    function = paged_attention.implementation(name).function
    generator = torch.Generator().manual_seed(1)
    lengths = [17, 9, 1]
    q, k, v = tensors(sum(lengths), SHAPES[shape], generator, dtype)
    chosen = options(feature, q.shape[1], generator)
    cu_q = torch.tensor([0, 17, 26, 27], dtype=torch.int32)
    expected = attention(q, k, v, cu_q, 0.3, **chosen)
    # torch's own attention rounds its weights to bfloat16
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for schedule in SCHEDULES.values():
        found = run_in_chunks(function, q, k, v, lengths, schedule, page_size, chosen, generator)
        torch.testing.assert_close(found, expected, **close)


LARGE = {
    "many queries": (6, 2, 40, 24),
    "one kv head for all": (20, 1, 36, 20),
    "wide heads": (4, 4, 128, 64),
    "eight groups": (8, 1, 64, 64),
    "heads of no power of two": (8, 2, 80, 80),
    "one kv head for very many": (80, 1, 24, 16),
}


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("feature", ["plain", "chunk", "everything", "wide window"])
@pytest.mark.parametrize("shape", LARGE)
def test_long_sequences_in_several_blocks(name, feature, shape):
    function = paged_attention.implementation(name).function
    generator = torch.Generator().manual_seed(5)
    lengths = [203, 66]
    q, k, v = tensors(sum(lengths), LARGE[shape], generator)
    chosen = {"window": 90} if feature == "wide window" else options(feature, len(q[0]), generator)
    cu_q = torch.tensor([0, 203, 269], dtype=torch.int32)
    expected = attention(q, k, v, cu_q, 0.3, **chosen)
    for schedule in ([(203, 66)], [(150, 64), (52, 0), (1, 2)]):
        found = run_in_chunks(function, q, k, v, lengths, schedule, 16, chosen, generator)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("sequences", [1, 9])
def test_several_threads_give_what_one_gives(name, sequences):
    function = paged_attention.implementation(name).function
    lengths = [150] * sequences
    schedule = [(147,) * sequences, (1,) * sequences, (2,) * sequences]
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(9)
            q, k, v = tensors(sum(lengths), (10, 5, 32, 32), generator)
            found.append(run_in_chunks(function, q, k, v, lengths, schedule, 16, {}, generator))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("option", [{"window": 6}, {"chunk": 8}])
@pytest.mark.parametrize("new", [1, 2, 20])
def test_pages_out_of_sight_may_be_any(name, option, new):
    function = paged_attention.implementation(name).function
    generator = torch.Generator().manual_seed(6)
    heads, kv_heads, width, length, size = 4, 2, 16, 60, 4
    q, k, v = tensors(length, (heads, kv_heads, width, width), generator)
    expected = attention(q, k, v, torch.tensor([0, length], dtype=torch.int32), 0.3, **option)
    seen = length - new
    first = seen - 5 if "window" in option else seen // 8 * 8
    pages = Pages([length], size, k, v, generator)
    for flat, source in ((pages.k, k), (pages.v, v)):
        flat.view(-1, kv_heads, width)[pages.slots(0, first, seen)] = source[first:seen]
    table = pages.table()
    table[0, : first // size] = 0  # a page of NaN
    found = function(
        q[seen:], k[seen:], v[seen:], pages.k, pages.v, torch.tensor([0, new], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32), table,
        torch.tensor(pages.slots(0, seen, length)), 0.3, **option,
    )  # fmt: skip
    torch.testing.assert_close(found, expected[seen:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("size", [1e-3, 300.0])
def test_tiny_and_huge_scores(name, size):
    function = paged_attention.implementation(name).function
    generator = torch.Generator().manual_seed(7)
    q, k, v = tensors(90, (2, 2, 16, 16), generator)
    for softcap in (0.0, 2.0):
        chosen = {"softcap": softcap}
        expected = attention(
            q * size, k, v, torch.tensor([0, 90], dtype=torch.int32), 0.3, **chosen
        )
        for schedule in ([(90,)], [(88,), (1,), (1,)]):
            found = run_in_chunks(function, q * size, k, v, [90], schedule, 16, chosen, generator)
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", implementations())
def test_a_step_of_no_tokens(name):
    function = paged_attention.implementation(name).function
    nothing, cache = torch.empty(0, 2, 16), torch.zeros(3, 4, 2, 16)
    index = torch.zeros(1, dtype=torch.int32)
    found = function(
        nothing, nothing, nothing, cache, cache.clone(), index, index[:0],
        torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), 0.3,
    )  # fmt: skip
    assert found.shape == (0, 2, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_attention_is_torchs_own(dtype):
    q, k, v = tensors(40, (6, 2, 16, 16), torch.Generator().manual_seed(8), dtype)
    found = attention(q, k, v, torch.tensor([0, 40], dtype=torch.int32), 0.25)
    heads_first = [t.transpose(0, 1) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.transpose(0, 1))


def test_caches_are_those_of_the_site():
    q, k, v = tensors(3, (4, 2, 24, 8), torch.Generator(), torch.bfloat16)
    arguments = attention.bind((q, k, v, torch.tensor([0, 3]), 0.5), {"window": 7})
    keys, values = attention.cached.caches(arguments)
    assert attention.cached.op is paged_attention
    assert (keys.name, keys.shape, keys.per, keys.window) == ("k_cache", (2, 24), "token", 7)
    assert (values.name, values.shape, values.dtype) == ("v_cache", (2, 8), torch.bfloat16)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_sliced_out_of_a_projection(name, dtype):
    function = paged_attention.implementation(name).function
    generator = torch.Generator().manual_seed(2)
    lengths = [30, 3]
    packed = torch.randn(33, (6 + 2 + 2) * 16, generator=generator).to(dtype)
    q, k, v = (t.unflatten(-1, (-1, 16)) for t in packed.split([96, 32, 32], -1))
    assert not q.is_contiguous()
    cu_q = torch.tensor([0, 30, 33], dtype=torch.int32)
    expected = attention(q.float(), k.float(), v.float(), cu_q, 0.3)

    def unsliced(q, k, v, *others):
        # what the step brings keeps the stride of the projection it is a slice of
        rows = torch.cat((q.flatten(1), k.flatten(1), v.flatten(1)), -1)
        heads = (t.unflatten(-1, (-1, 16)) for t in rows.split([96, 32, 32], -1))
        return function(*heads, *others)

    found = run_in_chunks(unsliced, q, k, v, lengths, [(29, 2), (1, 1)], 4, {}, generator)
    assert found.dtype is dtype
    close = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, rtol=close, atol=close)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("page_size", [1, 4])
def test_caches_and_tables_that_are_slices_of_wider_ones(name, page_size):
    function = paged_attention.implementation(name).function
    generator = torch.Generator().manual_seed(3)
    lengths = [40, 9]
    q, k, v = tensors(49, (6, 2, 24, 16), generator)
    expected = attention(q, k, v, torch.tensor([0, 40, 49], dtype=torch.int32), 0.3)
    joined = torch.full((60, page_size, 2, 24 + 16), float("nan"))

    def sliced(q, k, v, k_cache, v_cache, cu_q, kv_len, table, slot, *others):
        wide = torch.cat((table, torch.full_like(table, 1 << 30)), 1)
        assert not wide[:, : table.shape[1]].is_contiguous()
        return function(
            q, k, v, joined[..., :24], joined[..., 24:], cu_q, kv_len,
            wide[:, : table.shape[1]], torch.stack((slot, slot), 1)[:, 0], *others,
        )  # fmt: skip

    schedule = [(38, 7), (1, 1), (1, 1)]
    found = run_in_chunks(sliced, q, k, v, lengths, schedule, page_size, {}, generator)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif("native_cpu" not in implementations(), reason="no C compiler")
def test_a_cache_without_even_slots_is_refused():
    function = paged_attention.implementation("native_cpu").function
    q, index = torch.randn(1, 2, 16), torch.zeros(1, dtype=torch.int32)
    cache = torch.zeros(3, 8, 2, 16)[:, :4]
    with pytest.raises(OpError, match="slots cannot be addressed by one number"):
        function(
            q, q, q, cache, cache, torch.tensor([0, 1], dtype=torch.int32), index + 1,
            index[None], index.long(), 0.3,
        )  # fmt: skip


def test_metadata_of_another_dtype_is_not_read_as_int32():
    wide = choice().args | {"cu_q": torch.zeros(1, dtype=torch.int64)}
    assert paged_attention.choose(Choice(torch.device("cpu"), wide)).name == "torch_cpu"


def test_shape_rules_hold_for_any_number_of_tokens():
    class Model(torch.nn.Module):
        def forward(self, q, k, v, cu_q):
            return attention(q, k, v, cu_q, 0.5)

    tokens = torch.export.Dim("tokens", min=1, max=4096)
    q, k, v = tensors(7, (4, 2, 16, 8), torch.Generator().manual_seed(0))
    cu_q = torch.tensor([0, 7], dtype=torch.int32)
    shapes = ({0: tokens}, {0: tokens}, {0: tokens}, None)
    exported = torch.export.export(Model(), (q, k, v, cu_q), dynamic_shapes=shapes).module()
    for total in (1, 30):
        args = tensors(total, (4, 2, 16, 8), torch.Generator().manual_seed(1))
        cu_q = torch.tensor([0, total], dtype=torch.int32)
        torch.testing.assert_close(exported(*args, cu_q), attention(*args, cu_q, 0.5))
