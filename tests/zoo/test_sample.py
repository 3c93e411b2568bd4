"""Thirty architectures, one of each kind, deploy on the top rung and are exact.

All of them, in about ten minutes: `autodeploy zoo`.
"""

import pytest

from autodeploy.zoo.architectures import SAMPLE
from autodeploy.zoo.run import run_zoo


@pytest.fixture(scope="module")
def records():
    return {record.name: record for record in run_zoo(SAMPLE, jobs=2)}


@pytest.mark.parametrize("name", SAMPLE)
def test_it_is_packed_cached_and_exact(name, records):
    record = records[name]
    assert (record.outcome, record.cause) == ("rung 1", "")
    paged = any("token" in cache for cache in record.caches)
    assert (record.served["preemptions"] > 0) == paged
    assert record.served["wrong_tokens"] == 0
