"""Heads that kernels normalise, turn and write to pages equal those of the ops' references."""

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.attention import rotary_paged_attention
from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.rope import rope, rotary_table
from autodeploy.custom_ops.rope.triton_rope import Tiles, turn_heads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter cuts bfloat16 off where the device rounds it: 2e-2 of the norm, and no more
# is said there.
CUT_OFF = 2e-2


def numbers(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def implementation(op, *args, **kwargs):
    """What is chosen on a device with Triton; args are real tensors."""
    choice = Choice(torch.device(DEVICE), op.bind(args, kwargs))
    if DEVICE == "cuda":
        return op.choose(choice)
    with gpu.interpreted_kernels():
        return op.choose(choice)


def assert_near(found, expected, exact, factor=1.3):
    """What is found is at most `factor` times as far from the exact result as the reference is.

    Exact is the reference in float32. A product that the compiler fuses with a sum is not rounded
    by itself, so that 16-bit results are not equal, and on the whole nearer to it.
    """
    assert found.dtype is expected.dtype
    assert found.shape == expected.shape
    distance, allowed = ((x.float() - exact).norm() for x in (found, expected))
    if found.dtype is torch.float32:
        allowed = 1e-5 * exact.norm()
    if found.dtype is torch.bfloat16 and DEVICE == "cpu":
        allowed = CUT_OFF * exact.norm()
    assert distance <= factor * allowed


def widened(given):
    """Floating tensors of a dict, or of a sequence, in float32; all else as it is."""
    if isinstance(given, dict):
        return dict(zip(given, widened(given.values()), strict=True))
    return [
        x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize(("width", "rotated"), [(16, 16), (24, 12), (20, 20)])
def test_heads_are_turned_where_they_lie_in_a_projection(
    dtype, interleaved, unsqueeze_dim, width, rotated
):
    heads = numbers(1, 3, 9 * width, dtype=dtype, seed=0).unflatten(-1, (9, width))
    q, k = heads[:, :, :6], heads[:, :, 6:8]
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    # The two halves of this table differ, and its rows lie apart.
    cos, sin = numbers(1, 3, 2 * rotated, dtype=dtype, seed=1).split(rotated, -1)
    args = (q, k, cos, sin, interleaved, unsqueeze_dim)
    chosen = implementation(rope, *args)
    assert chosen.name == "triton"
    assert chosen.capturable
    results = chosen.function(*args), rope.reference(*args), rope.reference(*widened(args))
    for found, expected, exact in zip(*results, strict=True):
        assert found.is_contiguous()
        assert_near(found, expected, exact)


def test_heads_of_another_dtype_than_their_table_are_left_to_the_reference():
    q = numbers(1, 2, 3, 8, dtype=torch.bfloat16, seed=0)
    table = numbers(1, 3, 8, dtype=torch.float32, seed=1)
    assert implementation(rope, q, q, table, table).name == "reference"
    # Unless they are to come back as they were.
    given = (q, q, table, table, False, 1, True)
    chosen = implementation(rope, *given)
    assert chosen.name == "triton"
    for found, expected in zip(chosen.function(*given), rope.reference(*given), strict=True):
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


class Step:
    """Two sequences, of 3 new tokens and of 1, in pages of 4 tokens; 4 heads share 2 kv heads."""

    def __init__(self, dtype, width=16, value_width=16, rotated=16, spread_pages=False):
        shape = (7, 4, 2)
        self.caches = []
        for index, extent in enumerate((width, value_width)):
            cache = numbers(*shape, extent, dtype=dtype, seed=10 + index)
            if spread_pages:
                # Heads before tokens in a page.
                cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
            self.caches.append(cache)
        rows = numbers(4, 6 * width + 2 * value_width, dtype=dtype, seed=2)
        q, k, v = rows.split((4 * width, 2 * width, 2 * value_width), -1)
        self.heads = [q.unflatten(-1, (4, -1)), k.unflatten(-1, (2, -1)), v.unflatten(-1, (2, -1))]
        ints = {"device": DEVICE, "dtype": torch.int32}
        self.metadata = {
            "cu_q": torch.tensor([0, 3, 4], **ints), "kv_len": torch.tensor([7, 2], **ints),
            "block_table": torch.tensor([[5, 2], [3, 0]], **ints),
            "slot": torch.tensor([8, 9, 10, 13], device=DEVICE),
        }  # fmt: skip
        self.table = [numbers(1, 4, rotated, dtype=dtype, seed=s) for s in (3, 4)]
        self.weights = [numbers(width, dtype=dtype, seed=s) for s in (5, 6)]

    def run(self, function, wide=False, **more):
        """The output and both caches; wide: of all numbers in float32."""
        # The reference takes no other layout of pages.
        spread = function is not rotary_paged_attention.reference
        form = torch.preserve_format if spread else torch.contiguous_format
        caches = [cache.clone(memory_format=form) for cache in self.caches]
        if wide:
            caches = widened(caches)
        given = dict(
            zip(("q", "k", "v", "k_cache", "v_cache"), [*self.heads, *caches], strict=True)
        )
        given |= {**self.metadata, "scale": 0.3, **more}
        if wide:
            given = widened(given)
        return [function(*rotary_paged_attention.bind((), given).values()), *caches]

    def check(self, **more):
        given = dict(
            zip(("q", "k", "v", "k_cache", "v_cache"), self.heads + self.caches, strict=True)
        )
        chosen = implementation(rotary_paged_attention, **given, **self.metadata, scale=0.3, **more)
        assert chosen.name == "triton"
        assert chosen.capturable
        reference = rotary_paged_attention.reference
        found = self.run(chosen.function, **more)
        expected, exact = self.run(reference, **more), self.run(reference, wide=True, **more)
        # The kernels also round probabilities: two errors of one size, 1.4 of one.
        for index, factor in enumerate((2.0, 1.3, 1.3)):
            assert_near(found[index], expected[index], exact[index], factor)

    def norm(self, **more):
        return {"q_eps": 1e-5, "k_eps": 1e-3, **more}

    def turn(self, **more):
        return {"cos": self.table[0], "sin": self.table[1], **more}

    def weighted(self, **more):
        return self.norm(q_norm=self.weights[0], k_norm=self.weights[1], **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("offset", "cast_first"), [(0.0, True), (1.0, True), (1.0, False)])
def test_normed_and_turned_heads_reach_their_pages(dtype, interleaved, offset, cast_first):
    step = Step(dtype)
    step.check(
        **step.turn(interleaved=interleaved),
        **step.weighted(norm_offset=offset, cast_before_weight=cast_first),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_table_in_float32_turns_heads_of_16_bits(dtype, interleaved):
    step = Step(dtype)
    step.table = [t.float() for t in step.table]
    step.check(**step.turn(interleaved=interleaved), **step.weighted())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["turned", "normed", "without weights", "partly turned"])
def test_every_part_but_the_attention_may_be_missing(dtype, part):
    step = Step(dtype, width=24, rotated=12 if part == "partly turned" else 24)
    options = {
        "turned": step.turn(), "normed": step.weighted(), "without weights": step.norm(),
        "partly turned": step.turn() | step.weighted(),
    }  # fmt: skip
    step.check(**options[part])


def test_values_may_be_narrower_and_pages_laid_out_by_head():
    step = Step(torch.float32, width=16, value_width=8, spread_pages=True)
    step.check(**step.turn(), window=3)


@pytest.mark.parametrize("numbers_held", [16, 64, 4096])
def test_how_heads_are_shared_out_does_not_matter(numbers_held):
    heads = numbers(5, 10, 16, dtype=torch.float32, seed=0)
    q, k = heads[:, :7], heads[:, 7:]
    cos, sin = (numbers(1, 5, 16, dtype=torch.float32, seed=s) for s in (1, 2))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    turn_heads(q, k, cos, sin, False, q_out, k_out, cut=Tiles(numbers_held, 1))
    expected = rope.reference(q[None], k[None], cos, sin, False, 2)
    torch.testing.assert_close(q_out, expected[0][0])
    torch.testing.assert_close(k_out, expected[1][0])


def test_a_step_without_tokens_launches_nothing():
    empty = numbers(1, 2, 0, 16, dtype=torch.float32, seed=0)
    table = numbers(1, 0, 16, dtype=torch.float32, seed=0)
    found, _ = implementation(rope, empty, empty, table, table).function(empty, empty, table, table)
    assert found.shape == empty.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["halves", "pairs", "once"])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_the_table_of_cosines_and_sines(dtype, layout, tokens):
    positions = torch.arange(tokens, device=DEVICE)[None] * 3
    positions[0, -1] = 131071
    frequencies = (10000.0 ** (-torch.arange(6) / 6)).to(DEVICE)
    args = (positions, frequencies, 1.25, layout, dtype)
    chosen = implementation(rotary_table, *args)
    assert chosen.name == "triton"
    exact = rotary_table.reference(*args[:4], torch.float32)
    results = chosen.function(*args), rotary_table.reference(*args), exact
    for found, expected, wide in zip(*results, strict=True):
        assert found.shape == (1, tokens, 6 if layout == "once" else 12)
        assert_near(found, expected, wide)


def test_halves_of_the_work_on_split_heads_are_the_work():
    step = Step(torch.float32)
    options = {**step.turn(), **step.weighted()}
    whole = step.run(rotary_paged_attention.reference, **options)[0]
    for kv_head in range(2):
        part = Step(torch.float32)
        chosen = slice(2 * kv_head, 2 * kv_head + 2)
        kept = slice(kv_head, kv_head + 1)
        part.heads = [part.heads[0][:, chosen], part.heads[1][:, kept], part.heads[2][:, kept]]
        part.caches = [cache[:, :, kept].contiguous() for cache in part.caches]
        found = part.run(rotary_paged_attention.reference, **options)[0]
        torch.testing.assert_close(found, whole[:, chosen])


def test_a_table_of_some_tokens_is_a_part_of_the_table():
    positions = torch.arange(6, device=DEVICE)[None]
    frequencies = torch.rand(4, device=DEVICE)
    whole = rotary_table(positions, frequencies, 1.0, "halves", torch.float32)
    halves = [
        rotary_table(p, frequencies, 1.0, "halves", torch.float32) for p in positions.chunk(2, 1)
    ]
    for index in range(2):
        torch.testing.assert_close(torch.cat([half[index] for half in halves], 1), whole[index])
