"""Match counts: written into a summary's text, and read back."""

import pytest

from autodeploy.match_counts import match_counts_text, read_match_counts


@pytest.mark.parametrize(
    "counts", [{}, {"cache": 8}, {"canonicalize": 3, "fuse twice": 0, "lower": 33}, {"a, b": 1}]
)
def test_what_is_written_is_read(counts):
    assert read_match_counts({"transforms": match_counts_text(counts)}) == counts


def test_a_model_that_no_recipe_ran_on_has_none():
    assert read_match_counts({"rung": "3 (recompute)"}) == {}
