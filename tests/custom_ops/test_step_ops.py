import pytest
import torch

from autodeploy.custom_ops.sampling import argmax_rows, relay_best
from autodeploy.custom_ops.step import FIELDS, open_step, place_pages, relay_tokens, resolve_tokens

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
IMPLEMENTATIONS = ("reference", "triton")


def test_tokens_that_only_the_device_knows_are_put_in():
    ids = torch.tensor([[5, -1, 0, -4, 9, *range(300)]])
    tokens = torch.tensor([70, 71, 72, 73])
    expected = ids.clone()
    expected[0, 1], expected[0, 3] = 70, 73
    assert torch.equal(resolve_tokens(ids, tokens), expected)
    kernel = resolve_tokens.implementation("triton").function
    assert torch.equal(kernel(ids.to(DEVICE), tokens.to(DEVICE)).cpu(), expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_sampled_tokens_are_kept_by_slot(name):
    slots = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:300].to(DEVICE)
    tokens = torch.arange(1000, 1300, device=DEVICE)
    tokens[7] = -1
    newest = torch.full((401,), 9, device=DEVICE)
    expected = newest.clone()
    expected[slots] = tokens.clamp(min=0)
    relay_tokens.implementation(name).function(tokens, slots, newest)
    assert torch.equal(newest, expected)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("groups", "sequences"), [(0, 1), (1, 5), (3, 300)])
def test_letters_are_opened_in_turn(name, groups, sequences):
    function = open_step.implementation(name).function
    width, turns = 310, 3
    source = torch.Generator().manual_seed(sequences)
    letters = torch.randint(
        0, 50, (turns, len(FIELDS) + groups, width), dtype=torch.int32, generator=source
    )
    letters[:, 2, ::2] = -1 - letters[:, 0, ::2]
    newest = torch.randint(100, 200, (50,), generator=source)
    turn = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    mapped = letters.pin_memory() if CUDA else letters
    for at in (1, 2, 0, 1):
        slots, positions, ids, lengths, *pages = letters[at, :, :sequences].long()
        found = function(mapped, turn, newest.to(DEVICE), sequences)
        ids, positions_out, known, kv_len, slots_out, pages_out = (t.cpu() for t in found)
        expected = torch.where(
            letters[at, 2, :sequences] < 0, newest[slots], letters[at, 2, :sequences].long()
        )
        assert turn.item() == at
        assert torch.equal(ids, expected[None])
        assert torch.equal(positions_out, positions[None])
        assert torch.equal(known, torch.maximum(lengths, positions + 1)[None])
        assert torch.equal(kv_len, (positions + 1).int())
        assert torch.equal(slots_out, slots)
        assert pages_out.shape == (groups, sequences)
        assert pages_out.tolist() == [own.tolist() for own in pages]
        shapes = open_step.shape_rule(mapped, turn, newest, sequences)
        assert [(s.shape, s.dtype) for s in shapes] == [(f.shape, f.dtype) for f in found]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_pages_of_new_tokens_go_into_the_tables(name, page_size):
    source = torch.Generator().manual_seed(page_size)
    width, sequences = 2500, 6
    table = torch.randint(1, 999, (9, width), dtype=torch.int32, generator=source)
    # The last two only pad the step: the same slot, position and page.
    slots = torch.tensor([7, 0, 3, 2, 8, 8])
    columns = torch.tensor([0, 1, 1023, 1024, 0, 0])
    positions = columns * page_size + torch.tensor([0, page_size - 1, page_size // 2, 0, 0, 0])
    pages = torch.tensor([1001, 1002, 1003, 1004, 0, 0], dtype=torch.int32)
    expected = table.clone()
    expected[slots, columns] = pages
    own, rows = table.to(DEVICE), torch.zeros((sequences, width), dtype=torch.int32, device=DEVICE)
    places = place_pages.implementation(name).function(
        own, rows, pages.to(DEVICE), slots.to(DEVICE), positions[None].to(DEVICE), page_size
    )
    assert torch.equal(own.cpu(), expected)
    for at, column in enumerate(columns.tolist()):
        assert torch.equal(rows[at, : column + 1].cpu(), expected[slots[at], : column + 1])
    assert places.dtype == torch.int64
    assert places.tolist() == (pages * page_size + positions % page_size).tolist()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 70), (5, 5000), (40, 300)])
def test_the_best_tokens_reach_the_next_step_and_the_host(name, rows, vocab):
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows))
    logits[rows // 2, 3] = torch.nan
    best = argmax_rows.reference(logits)
    slots = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:rows]
    newest = torch.full((61,), 7, device=DEVICE)
    answers = torch.full((3, 64), 5)
    answers = answers.pin_memory() if CUDA else answers
    turn = torch.tensor([2], device=DEVICE)
    tokens = relay_best.implementation(name).function(
        logits.to(DEVICE), slots.to(DEVICE), turn, newest, answers
    )
    assert torch.equal(tokens.cpu(), best)
    assert best[rows // 2] == -1
    if CUDA:
        torch.cuda.synchronize()
    assert torch.equal(answers[2, :rows], best)
    assert (answers[:2] == 5).all()
    assert (answers[2, rows:] == 5).all()
    expected = torch.full((61,), 7)
    expected[slots] = best.clamp(min=0)
    assert torch.equal(newest.cpu(), expected)
