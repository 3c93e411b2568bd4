import torch

from autodeploy.custom_ops.step import resolve_tokens


def test_tokens_that_only_the_device_knows_are_put_in():
    ids = torch.tensor([[5, -1, 0, -4, 9, *range(300)]])
    tokens = torch.tensor([70, 71, 72, 73])
    expected = ids.clone()
    expected[0, 1], expected[0, 3] = 70, 73
    assert torch.equal(resolve_tokens(ids, tokens), expected)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = resolve_tokens.implementation("triton").function
    assert torch.equal(kernel(ids.to(device), tokens.to(device)).cpu(), expected)
