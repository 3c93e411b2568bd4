"""The counter-based random numbers are SplitMix64's, uniform, and independent across seeds."""

from __future__ import annotations

import numpy as np
import torch

from autodeploy.runtime.random_stream import child_seed, uniforms

WORD = 2**64 - 1


def scramble(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & WORD
    return word ^ (word >> 31)


def split_mix(seed: int, count: int) -> list[float]:
    """The generator in plain integers, one number after the other."""
    state = scramble((seed + 0x9E3779B97F4A7C15) & WORD)
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & WORD
        numbers.append((scramble(state) >> 11) / 2**53)
    return numbers


def stream(seed: int, count: int) -> np.ndarray:
    return uniforms(np.full(count, seed, dtype=np.uint64), np.arange(count))


def chi_square_probability(observed: np.ndarray, expected: np.ndarray) -> float:
    statistic = ((observed - expected) ** 2 / expected).sum()
    half = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, torch.tensor(statistic / 2)))


def test_a_stream_is_split_mix_entered_anywhere():
    for seed in (0, 1, 2**63, WORD):
        assert stream(seed, 50).tolist() == split_mix(seed, 50)
    last = uniforms(np.array([7], dtype=np.uint64), np.array([49]))
    assert last.tolist() == split_mix(7, 50)[-1:]


def test_numbers_are_uniform_along_a_stream_and_across_seeds():
    along = stream(3, 100_000)
    across = uniforms(np.arange(100_000, dtype=np.uint64), np.zeros(100_000, dtype=np.int64))
    for numbers in (along, across):
        assert numbers.min() >= 0.0
        assert numbers.max() < 1.0
        counts = np.bincount((numbers * 200).astype(int), minlength=200)
        assert chi_square_probability(counts, np.full(200, 500.0)) > 1e-4


def test_neighbouring_seeds_and_indices_are_uncorrelated():
    seeds, indices = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300))
    table = uniforms(seeds.ravel(), indices.ravel()).reshape(300, 300) - 0.5
    for other in (table[1:], table[:, 1:], table[1:, 1:], table.T[1:]):
        this = table[: other.shape[0], : other.shape[1]]
        assert abs((this * other).mean() * 12) < 0.02


def test_children_of_a_seed_differ_and_the_first_is_the_seed():
    seeds = {child_seed(parent, child) for parent in range(200) for child in range(200)}
    assert len(seeds) == 200 * 200
    assert child_seed(11, 0) == 11
    assert child_seed(-1, 0) == WORD
    assert all(0 <= seed <= WORD for seed in seeds)
