"""Random numbers that depend on nothing but (seed, index): no state to keep, batch or restore.

The i-th output token of a request always meets the same number, whatever else is in the batch
and however often the request was preempted. The stream of a seed is SplitMix64 (Steele, Lea and
Flood, 2014) started at a hash of the seed, entered at any index by one multiplication.
"""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
WORD = 2**64 - 1
TWO_TO_MINUS_53 = 2.0**-53


def uniforms(seeds: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """One number of [0, 1) per pair: seeds [N] uint64, indices [N] int64, gives [N] float64."""
    steps = (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)
    words = _mix(_mix(seeds + np.uint64(GOLDEN)) + steps)
    return (words >> np.uint64(11)).astype(np.float64) * TWO_TO_MINUS_53


def child_seed(seed: int, child: int) -> int:
    """The seed of sequence `child` of a request for several; that of child 0 is `seed` itself."""
    if child == 0:
        return seed & WORD
    start = np.array([(seed + GOLDEN * 2 * child) & WORD], dtype=np.uint64)
    return int(_mix(_mix(start) ^ np.uint64(child))[0])


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's bijection of 64-bit words in which every input bit moves every output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
