"""Engines are killed under load: all hear of it soon, no answer is wrong, service is back."""

import pytest
from chaos import chaos


def check(outcome, kills):
    assert len(outcome.kills) >= kills
    assert outcome.wrong == []
    assert outcome.answered > 0
    assert sum(kill.failed for kill in outcome.kills) > 0
    # The bar that was set, not a wish about this machine.
    assert outcome.longest_error < 5
    if outcome.replicas == 1:
        assert all(kill.last_end < 5 for kill in outcome.kills)
    # One that was killed again while it started has no end but the other's.
    assert all(kill.back for kill in outcome.kills if kill.way != "start")
    assert outcome.probes_failed == []
    assert (outcome.left, outcome.status) == ([], 0)
    assert "Traceback" not in outcome.log
    assert outcome.after["children"] == outcome.before["children"]
    assert outcome.after["files"] == outcome.before["files"]
    assert outcome.after["threads"] <= outcome.before["threads"]
    # The first death imports a little, and logs.
    assert outcome.front_mib[-1] - outcome.front_mib[1] < 20


def test_three_kills_under_load_lose_nobody_and_leave_nothing():
    check(chaos(3, clients=20, most_wait=0.5), 3)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
def test_twenty_kills_under_load_lose_nobody_and_leave_nothing(replicas):
    outcome = chaos(20, replicas=replicas)
    check(outcome, 20)
    if replicas > 1:
        # As long as one lives, the server does.
        assert outcome.probes_down == {"/health": [], "/ready": []}
        assert all(kill.answered_meanwhile for kill in outcome.kills if kill.whole > 2)
