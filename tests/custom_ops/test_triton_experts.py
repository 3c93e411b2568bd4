"""Experts in Triton equal their reference: in the interpreter here, on a GPU where one is.

The interpreter cuts numbers off where a GPU rounds them to bfloat16, so its bound is wider.
"""

import dataclasses

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.moe import ACTIVATIONS, experts, triton_experts
from autodeploy.custom_ops.moe.sorted_pairs import most_blocks, sort_pairs
from autodeploy.custom_ops.moe.triton_experts import TILES, BlockTile, Tiles
from autodeploy.custom_ops.op import Choice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not gpu.has_triton() or (DEVICE == "cpu" and not gpu.interpreted()), reason="no triton"
)
BOUND = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2 if DEVICE == "cuda" else 4e-2,
}
FORMS = [
    {},
    {"gated": False, "activation": "relu2"},
    {"activation": "gelu_pytorch_tanh"},
    {"interleaved": True, "limit": 0.7, "alpha": 1.7},
    {"limit": 0.5},
]


def layer(tokens, total=6, choices=3, hidden=40, inner=24, dtype=torch.float32, bias=True, **form):
    """Arguments of the op; hidden and inner are no multiples of a tile."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype) / 3

    tall = 2 * inner if form.get("gated", True) else inner
    up, down = normal(total, tall, hidden), normal(total, hidden, inner)
    if form.get("transposed"):
        up, down = up.mT.contiguous(), down.mT.contiguous()
    rows = [torch.randperm(total, generator=generator)[:choices] for _ in range(tokens)]
    index = torch.stack(rows).to(DEVICE)
    weights = torch.rand((tokens, choices), generator=generator).to(DEVICE, dtype)
    biases = (normal(total, tall), normal(total, hidden)) if bias else (None, None)
    return experts.bind((normal(tokens, hidden), index, weights, up, down, *biases), form)


def chosen(arguments):
    """The implementation that would run."""
    choice = Choice(torch.device(DEVICE), arguments)
    if DEVICE == "cuda":
        return experts.choose(choice)
    with gpu.interpreted_kernels():
        return experts.choose(choice)


def assert_equal_to_reference(arguments, found=None):
    if found is None:
        implementation = chosen(arguments)
        assert implementation.name == "triton"
        assert implementation.capturable
        found = implementation.function(*arguments.values())
    expected = experts.reference(*arguments.values())
    assert found.dtype is expected.dtype
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < BOUND[expected.dtype]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
def test_every_gate_and_layout_equals_the_reference(tokens, transposed, form):
    assert_equal_to_reference(layer(tokens, transposed=transposed, **form))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_every_dtype_equals_the_reference(tokens, dtype):
    arguments = layer(tokens, dtype=dtype, bias=False)
    assert_equal_to_reference(arguments)
    assert_equal_to_reference(arguments | {"top_k_weights": arguments["top_k_weights"].float()})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_equals_the_reference(activation):
    assert_equal_to_reference(layer(1, activation=activation))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_kind_of_tile_equals_the_reference(rows, group, swap, interleaved, monkeypatch):
    tile = BlockTile(16, 16, 4, 3, group, swap)
    tiles = (Tiles(float("inf"), rows, tile, dataclasses.replace(tile, columns=32)),)
    monkeypatch.setattr(triton_experts, "TILES", tiles)
    assert_equal_to_reference(layer(33, interleaved=interleaved))


def test_whole_tiles_need_no_mask():
    assert_equal_to_reference(layer(33, hidden=256, inner=128, bias=False))
    assert_equal_to_reference(layer(1, hidden=256, inner=128, bias=False))


def test_the_tiles_that_ship_cover_any_number_of_pairs():
    bounds = [tiles.pairs_per_expert for tiles in TILES]
    assert bounds == sorted(bounds)
    assert bounds[-1] == float("inf")
    for tokens in (6, 30, 140):
        assert_equal_to_reference(layer(tokens, total=4, choices=2))


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("total", [6, 64])
def test_an_expert_of_another_rank_adds_nothing(tokens, total):
    arguments = layer(tokens, total=total)
    away = torch.arange(tokens * 3, device=DEVICE).view(tokens, 3) % 3 == 1
    arguments["top_k_index"] = arguments["top_k_index"].masked_fill(away, total)
    assert_equal_to_reference(arguments)
    nothing = arguments | {"top_k_index": torch.full_like(arguments["top_k_index"], total + 7)}
    assert not chosen(nothing).function(*nothing.values()).any()


def with_shared(tokens, shared, **form):
    """Experts of which every token visits the first `shared`; the others are chosen."""
    arguments = layer(tokens, **form)
    index = arguments["top_k_index"]
    total = arguments["gate_up"].shape[0] - shared
    arguments["top_k_index"] = (index % total) + shared
    arguments["top_k_index"][:, :shared] = torch.arange(shared, device=DEVICE)
    return arguments | {"shared": shared}


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 9, 70])
def test_experts_that_every_token_visits_are_experts_like_others(tokens, shared):
    assert_equal_to_reference(with_shared(tokens, shared, total=24 + shared))


def test_shared_experts_do_not_count_where_few_pairs_run_by_themselves(monkeypatch):
    def refuse(*_):
        raise AssertionError("sorted")

    monkeypatch.setattr(triton_experts, "by_block", refuse)
    # 4 tokens choose 2 of 32 each: a quarter of them at most.
    assert_equal_to_reference(with_shared(4, 1, total=33))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shared", [1, 2])
def test_many_tokens_go_through_shared_experts_in_dense_products(
    shared, residual, dtype, monkeypatch
):
    monkeypatch.setattr(triton_experts, "TILES", TILES[-1:])
    arguments = with_shared(70, shared, bias=False, dtype=dtype)
    arguments["top_k_weights"] = arguments["top_k_weights"].float()
    if residual:
        arguments["residual"] = arguments["x"].clone()
    assert_equal_to_reference(arguments)


@pytest.mark.parametrize("form", [{"gated": False}, {"transposed": True}, {"bias": True}], ids=str)
def test_shared_experts_of_other_forms_stay_with_the_others(form, monkeypatch):
    monkeypatch.setattr(triton_experts, "TILES", TILES[-1:])
    monkeypatch.delattr(triton_experts, "shared_products")
    assert_equal_to_reference(with_shared(20, 1, **{"bias": False, **form}))


def test_rows_and_choices_may_be_strided():
    for tokens in (1, 9):
        arguments = layer(tokens)
        wide = arguments["x"].repeat(1, 2)
        arguments["x"] = wide[:, :40]
        for name in ("top_k_index", "top_k_weights"):
            arguments[name] = arguments[name].T.contiguous().T
        assert_equal_to_reference(arguments)


def test_no_tokens_give_no_rows():
    arguments = layer(1)
    for name in ("x", "top_k_index", "top_k_weights"):
        arguments[name] = arguments[name][:0]
    assert chosen(arguments).function(*arguments.values()).shape == (0, 40)


def test_weights_of_another_dtype_are_left_to_other_implementations():
    arguments = layer(3)
    arguments["down"] = arguments["down"].half()
    assert chosen(arguments).name != "triton"


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(("tokens", "total"), [(1, 5), (40, 8), (100, 300), (500, 24), (1500, 8)])
def test_every_pair_of_an_expert_here_is_in_one_block_of_that_expert(tokens, total, rows):
    generator = torch.Generator().manual_seed(rows)
    index = torch.randint(0, total + 2, (tokens, 3), generator=generator).to(DEVICE)
    pairs, flat = index.numel(), index.flatten().cpu()
    order = sort_pairs(index, total, rows)
    blocks = int(order.block_count)
    assert blocks == sum(-(-int((flat == e).sum()) // rows) for e in range(total))
    assert blocks <= order.max_blocks == most_blocks(pairs, total, rows)
    slots = order.slots.view(-1, rows)[:blocks].cpu().long()
    taken = slots[slots < pairs]
    assert sorted(taken.tolist()) == (flat < total).nonzero().flatten().tolist()
    for expert, block in zip(order.block_expert[:blocks].tolist(), slots, strict=True):
        assert set(flat[block[block < pairs]].tolist()) == {expert}
