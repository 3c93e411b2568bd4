"""routed in Triton equals its reference: in the interpreter here, on a GPU where one is."""

import pytest
import torch

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.moe import routed
from autodeploy.custom_ops.op import Choice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not gpu.has_triton() or (DEVICE == "cpu" and not gpu.interpreted()), reason="no triton"
)
# The interpreter cuts numbers off where a GPU rounds them to bfloat16.
BOUND = {torch.float16: 4e-3, torch.bfloat16: 1e-2 if DEVICE == "cuda" else 3e-2}


def layer(tokens, experts=24, hidden=80, k=3, dtype=torch.bfloat16, bias=False, **form):
    """Arguments of the op. Each token leans to experts of its own, far from each other."""
    generator = torch.Generator().manual_seed(tokens)
    weight = torch.randn((experts, hidden), generator=generator) / hidden**0.5
    liked = torch.stack(
        [torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)]
        or [torch.zeros(k, dtype=torch.long)]
    )
    lean = torch.linspace(3, 1, k)[None, :, None]
    x = (weight[liked] * lean).sum(1)[:tokens] * 4
    if form.get("norm"):
        form |= {"norm_weight": torch.rand(hidden, generator=generator) / 2 + 0.75, "eps": 1e-6}
    if form.pop("unweighted", False):
        form["norm_weight"] = None
    if bias:
        form["bias"] = torch.randn(experts, generator=generator) / 16
    form = {n: v.to(DEVICE, dtype) if torch.is_tensor(v) else v for n, v in form.items()}
    given = (x.to(DEVICE, dtype), weight.to(DEVICE, dtype), k, True, torch.float32)
    return routed.bind(given, form)


def chosen(arguments):
    choice = Choice(torch.device(DEVICE), arguments)
    if DEVICE == "cuda":
        return routed.choose(choice)
    with gpu.interpreted_kernels():
        return routed.choose(choice)


def assert_equal_to_reference(arguments):
    implementation = chosen(arguments)
    assert implementation.name == "triton"
    assert implementation.capturable
    index, weights, normed = implementation.function(*arguments.values())
    expected, shares, rows = routed.reference(*arguments.values())
    assert index.dtype is torch.int64
    assert index.shape == expected.shape
    bound = BOUND[arguments["x"].dtype]
    # Logits that are nearly equal may change places: what they weigh is what counts.
    torch.testing.assert_close(weights, shares, rtol=4 * bound, atol=bound)
    assert (index == expected).float().mean() > 0.9 or not index.numel()
    assert normed.dtype is rows.dtype
    assert normed.shape == rows.shape
    torch.testing.assert_close(normed.float(), rows.float(), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 35])
@pytest.mark.parametrize("norm", [False, True])
def test_few_tokens_equal_the_reference(tokens, norm, dtype):
    assert_equal_to_reference(layer(tokens, dtype=dtype, norm=norm))


@pytest.mark.parametrize(
    "form",
    [
        {"bias": True},
        {"bias": True, "wide": True, "norm": True},
        {"norm": True, "norm_offset": 1.0},
        {"norm": True, "norm_offset": 1.0, "cast_before_weight": False},
        {"norm": True, "unweighted": True},
        {"norm": True, "shared": 2},
        {"norm": True, "shared": 1, "gate": 19},
        {"norm": True, "shared": 3, "gate": 23, "wide": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [1, 9])
def test_every_form_equals_the_reference(tokens, form):
    assert_equal_to_reference(layer(tokens, **form))


@pytest.mark.parametrize(("experts", "hidden"), [(4, 40), (128, 512), (60, 1032), (200, 64)])
@pytest.mark.parametrize("tokens", [1, 17])
def test_every_size_equals_the_reference(tokens, experts, hidden):
    assert_equal_to_reference(layer(tokens, experts, hidden, norm=True))


@pytest.mark.parametrize("tokens", [1, 5])
def test_of_equal_experts_the_lower_index_is_chosen(tokens):
    arguments = layer(tokens, experts=12, k=4)
    arguments["weight"][3:] = arguments["weight"][3]
    arguments["weight"][:3] = 0
    arguments["x"] = arguments["weight"][3].repeat(tokens, 1)
    index, weights, _ = chosen(arguments).function(*arguments.values())
    assert index.tolist() == [[3, 4, 5, 6]] * tokens
    torch.testing.assert_close(weights, torch.full_like(weights, 0.25))


def test_a_choice_is_the_same_every_time():
    arguments = layer(1, norm=True)
    first = chosen(arguments).function(*arguments.values())
    for _ in range(2):
        again = chosen(arguments).function(*arguments.values())
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("wide", [False, True])
def test_many_tokens_and_none_equal_the_reference(wide):
    assert_equal_to_reference(layer(515, norm=True, wide=wide))
    assert_equal_to_reference(layer(0, norm=True, wide=wide))


def test_what_kernels_cannot_hold_is_left_to_the_reference():
    assert chosen(layer(2, hidden=44)).name == "reference"
    assert chosen(layer(2, experts=600)).name == "reference"
    assert chosen(layer(2, dtype=torch.float32)).name == "reference"
