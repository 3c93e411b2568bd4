"""Masks are proved by evaluating them; what is not proved is not assumed."""

import pytest
import torch
from transformers import masking_utils

from autodeploy.transforms.capture.masks import Mask, classify

CAUSAL = masking_utils.causal_mask_function
NO_PADDING = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (CAUSAL, Mask()),
        (masking_utils.bidirectional_mask_function, Mask(causal=False)),
        (masking_utils.sliding_window_causal_mask_function(5), Mask(window=5)),
        (masking_utils.sliding_window_causal_mask_function(1), Mask(window=1)),
        (masking_utils.sliding_window_causal_mask_function(4096), Mask(window=4096)),
        (masking_utils.chunked_causal_mask_function(8, NO_PADDING), Mask(chunk=8)),
        (masking_utils.chunked_causal_mask_function(8192, NO_PADDING), Mask(chunk=8192)),
        (masking_utils.and_masks(CAUSAL, lambda b, h, q, k: k > q - 3), Mask(window=3)),
    ],
)
def test_each_kind_is_recognised(function, expected):
    assert classify(function) == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: (k <= q) & (k % 2 == 0),
        lambda b, h, q, k: (k <= q) | (k < 4),  # a prefix that sees itself both ways
        lambda b, h, q, k: (k <= q) & ((q - k < 5) | (k < 2)),  # window with sink tokens
        lambda b, h, q, k: (k <= q) & ((q - k) % 3 == 0),  # strided
        lambda b, h, q, k: k < q,
        lambda b, h, q, k: (k <= q) & ((q < 1000) | (q - k < 64)),
        masking_utils.sliding_window_bidirectional_mask_function(5),
        masking_utils.packed_sequence_mask_function(torch.zeros(1, 8, dtype=torch.int64)),
        masking_utils.padding_mask_function(torch.ones(1, 8, dtype=torch.bool)),
    ],
)
def test_a_near_miss_is_not_taken_for_a_known_kind(function):
    assert classify(function) is None


def test_a_mask_is_proved_while_a_graph_is_traced():
    found = []

    class Model(torch.nn.Module):
        def forward(self, x):
            found.append(classify(masking_utils.sliding_window_causal_mask_function(7)))
            return x + 1

    torch.export.export(Model(), (torch.zeros(3),), strict=False)
    assert found == [Mask(window=7)]
