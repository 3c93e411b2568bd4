"""A decoding step in one launch: heads are turned, written and attended to as by the reference."""

import itertools

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.attention import rotary_paged_attention, triton_decode
from autodeploy.custom_ops.rope.triton_rope import HeadNorm

pytestmark = pytest.mark.skipif(not gpu.has_triton(), reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = rotary_paged_attention.implementation("triton").function
PAGE = 4
# Of the norm, from the reference in float32. Bits of bfloat16 are cut off in the interpreter.
NEAR = {
    torch.float32: 1e-4 if DEVICE == "cuda" else 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2 if DEVICE == "cuda" else 3e-2,
}
TURNS = {
    "nothing": {},
    "turned": {"cos": 1.0, "sin": 1.0},
    "pairs": {"cos": 1.0, "sin": 1.0, "interleaved": True},
    "a part": {"cos": 0.5, "sin": 0.5, "q_eps": 1e-5, "k_eps": 1e-3},
    "a part in pairs": {"cos": 0.5, "sin": 0.5, "interleaved": True},
    "normed": {"q_norm": True, "k_norm": True, "q_eps": 1e-5, "k_eps": 1e-3},
    "normed and turned": {
        "q_norm": True, "k_norm": True, "q_eps": 1e-5, "k_eps": 1e-3, "cos": 1.0, "sin": 1.0,
        "norm_offset": 1.0,
    },
    "normed in float32 and turned": {
        "q_norm": True, "k_norm": True, "q_eps": 1e-5, "k_eps": 1e-3, "cos": 1.0, "sin": 1.0,
        "norm_offset": 1.0, "cast_before_weight": False,
    },
}  # fmt: skip
FORMS = {
    "plain": {}, "window": {"window": 7}, "chunk": {"chunk": 8}, "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True}, "alibi": {"alibi_slopes": True},
}  # fmt: skip
# As many tokens as sequences: one each, several of one sequence, and some that nobody owns.
COUNTS = [[1, 1, 1], [0, 3, 0], [2, 0, 1], [1, 1, 0], [0, 0, 2]]


def step(counts=(1, 1, 1), turn="turned", form="plain", dtype=torch.float32, width=16, group=3,
         lengths=(70, 3, 21)):  # fmt: skip
    """Arguments of a step of two kv heads: slots not known before hold no numbers."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    heads, tokens = 2 * group, len(counts)
    packed = numbers(tokens, (heads + 4) * width).unflatten(1, (heads + 4, width))
    q, k, v = packed.split([heads, 2, 2], 1)
    need = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(need) + 2, generator=generator)
    table = torch.full((tokens, max(need) + 1), 1 << 28, dtype=torch.int32)
    for row, pages in zip(table, order[: sum(need)].split(need), strict=True):
        row[: len(pages)] = pages

    def slots(row, positions):
        return [int(table[row, p // PAGE]) * PAGE + p % PAGE for p in positions]

    caches = [torch.full((len(order) * PAGE, 2, width), float("nan")) for _ in "kv"]
    new = []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        known = slots(row, range(length - count))
        for cache in caches:
            cache[known] = torch.randn((len(known), 2, width), generator=generator)
        new += slots(row, range(length - count, length))
    # Tokens that nobody owns go to a page that nobody has.
    new += [int(order[-1]) * PAGE + i for i in range(tokens - len(new))]
    options = {**TURNS[turn], **FORMS[form]}
    for name in ("q_norm", "k_norm"):
        if name in options:
            options[name] = numbers(width)
    for name in ("cos", "sin"):
        if name in options:
            options[name] = numbers(1, tokens, int(width * options[name]))
    for name in ("sinks", "alibi_slopes"):
        if name in options:
            options[name] = numbers(heads).float()
    return {
        "q": q, "k": k, "v": v,
        "k_cache": caches[0].to(DEVICE, dtype).unflatten(0, (-1, PAGE)),
        "v_cache": caches[1].to(DEVICE, dtype).unflatten(0, (-1, PAGE)),
        "cu_q": torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=DEVICE),
        "kv_len": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        "block_table": table.to(DEVICE), "slot": torch.tensor(new, device=DEVICE), "scale": 0.25,
        **options,
    }  # fmt: skip


def wide(arguments):
    """Its copy in float32."""
    return {
        name: x.float().clone() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def check(arguments, function=TRITON):
    """Result and caches are the reference's, as far as a sequence owns them; returns both."""
    dtype, owned = arguments["q"].dtype, int(arguments["cu_q"][-1])
    exact = wide(arguments)
    expected = rotary_paged_attention.reference(**exact)[:owned]
    found = function(*rotary_paged_attention.bind((), arguments).values())[:owned]
    assert found.dtype is dtype
    for ours, theirs in ((found, expected), *((arguments[n], exact[n]) for n in CACHES)):
        assert torch.equal(ours.isnan(), theirs.isnan())
        ours, theirs = ours.float().nan_to_num(), theirs.nan_to_num()
        assert (ours - theirs).norm() <= NEAR[dtype] * theirs.norm()
    return found


CACHES = ("k_cache", "v_cache")


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("counts", COUNTS)
def test_heads_are_turned_and_attended_to(turn, counts):
    check(step(counts, turn))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("turn", TURNS)
def test_heads_of_sixteen_bits(turn, dtype):
    check(step(turn=turn, dtype=dtype, width=32, group=4))


@pytest.mark.parametrize("turn", ["turned", "a part in pairs"])
def test_a_table_in_float32_turns_heads_of_sixteen_bits(turn):
    arguments = step(turn=turn, dtype=torch.bfloat16)
    arguments |= {name: arguments[name].float() for name in ("cos", "sin")}
    check(arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("counts", COUNTS[:3])
def test_every_form_of_attention(form, counts):
    check(step(counts, form=form))


@pytest.mark.parametrize(("width", "group"), [(8, 1), (24, 5), (80, 2), (128, 17), (256, 4)])
def test_any_width_and_any_group(width, group):
    check(step(turn="normed and turned", width=width, group=group))


def with_tiles(tiles):
    """The launch with given tiles."""

    def function(*args):
        given = dict(zip(rotary_paged_attention.arguments, args, strict=True))
        norm = HeadNorm(
            given["q_norm"], given["k_norm"], given["q_eps"], given["k_eps"], given["norm_offset"]
        )
        turn = triton_decode.Turn(norm, given["cos"], given["sin"], given["interleaved"])
        options = [given[n] for n in ("window", "chunk", "softcap", "sinks", "alibi_slopes")]
        form = triton_decode.Form.of(given["scale"], *options, given["q"])
        return triton_decode.decode_heads(*args[:9], form, turn, tiles)

    return function


@pytest.mark.parametrize("programs", [1, 40])
@pytest.mark.parametrize("least", [1, 2])
@pytest.mark.parametrize("form", ["plain", "window", "sinks"])
def test_the_number_of_ranges_changes_nothing(programs, least, form):
    for lengths in ((200, 1, 97), (1, 17, 33)):
        arguments = step(turn="normed and turned", form=form, lengths=lengths)
        check(arguments, with_tiles(triton_decode.Tiles(16, least, programs, 4)))


def test_ranges_leave_nothing_behind_and_meet_in_one_order():
    arguments = step(lengths=(300, 16, 33))
    function = with_tiles(triton_decode.Tiles(16, 1, 60, 4))
    first = check(arguments, function)
    assert torch.equal(first, check(arguments, function))


@pytest.mark.parametrize("merge", [1, 16, 128])
def test_ranges_meet_all_at_once_or_in_turn(merge):
    arguments = step(lengths=(120, 1, 40), group=5)
    check(arguments, with_tiles(triton_decode.Tiles(16, 1, 48, 4, merge=merge)))


def test_steps_that_are_not_held_take_two_launches():
    q, k = torch.empty(3, 8, 64), torch.empty(3, 2, 64)
    assert triton_decode.holds(q, k, 3)
    assert not triton_decode.holds(q, k, 2), "more tokens than sequences"
    assert not triton_decode.holds(torch.empty(3, 128, 256), torch.empty(3, 1, 256), 3)
    check(step(width=256, group=64, dtype=torch.bfloat16))
    for width, most in ((64, 132), (128, 132), (256, 33)):
        q, k = torch.empty(most + 1, 8, width), torch.empty(most + 1, 2, width)
        few = [triton_decode.holds(q[:n], k[:n], n) for n in (most, most + 1)]
        assert DEVICE == "cuda" or few == [True, False], "132 multiprocessors"


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_graph_replays_for_other_lengths():
    arguments = step(
        turn="normed and turned", dtype=torch.bfloat16, width=128, lengths=(1500, 40, 700)
    )
    args = rotary_paged_attention.bind((), arguments).values()
    function = with_tiles(triton_decode.Tiles(32, 1, 264, 4))
    function(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function(*args)
    for lengths in ((1500, 40, 700), (60, 40, 699), (1, 2, 3)):
        new = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        pages = arguments["block_table"].gather(1, ((new - 1) // PAGE)[:, None].long())[:, 0]
        arguments["slot"].copy_(pages.long() * PAGE + (new - 1) % PAGE)
        arguments["kv_len"].copy_(new)
        graph.replay()
        expected = rotary_paged_attention.reference(**wide(arguments))
        assert (found.float() - expected).norm() <= NEAR[torch.bfloat16] * expected.norm()
