"""What the tests of the zoo share."""

from pathlib import Path

import pytest


@pytest.fixture
def demo_model():
    return Path(__file__).resolve().parents[2] / "examples" / "demo_model"
