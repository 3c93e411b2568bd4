import pytest
import torch

from autodeploy.custom_ops.sampling import argmax_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kernel = argmax_rows.implementation("triton").function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (3, 2048), (5, 5000), (300, 70)])
def test_it_finds_the_first_of_the_largest(rows, vocab, dtype):
    logits = torch.randint(-9, 9, (rows, vocab), generator=torch.Generator().manual_seed(1))
    logits = logits.to(dtype).to(DEVICE)
    best = logits.float().amax(-1, keepdim=True)
    first = (logits.float() == best).int().argmax(-1)
    assert torch.equal(kernel(logits), first)
    assert torch.equal(argmax_rows(logits.cpu()), first.cpu())


def test_rows_that_are_no_numbers_have_no_best():
    logits = torch.randn(5, 6000, device=DEVICE)
    logits[0, 4321] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    logits[3, :5999] = -torch.inf
    found = kernel(logits)
    assert found[:4].tolist() == [-1, -1, -1, 5999]
    assert found[4] == logits[4].argmax()
    assert torch.equal(argmax_rows(logits), found)


def test_logits_may_be_rows_of_something_wider():
    wide = torch.randn(4, 3000, device=DEVICE)
    assert torch.equal(kernel(wide[:, :2500]), wide[:, :2500].argmax(-1))
