from autodeploy.held_tokens import HeldTokens
from autodeploy.runtime.messages import TokenBatch


class Request:
    """Notes what it is given."""

    def __init__(self, defers_text=True):
        self.defers_text, self.given = defers_text, []

    def add_tokens(self, index, token_ids):
        self.given += [(index, *token_ids)]


def test_tokens_are_given_in_order_when_somebody_looks():
    first, second = Request(), Request()
    held = HeldTokens({"a": (first, 0), "b:1": (second, 1)})
    for step in range(3):
        batch = TokenBatch(["a", "unknown", "b:1"], [step, 9, 10 + step])
        assert held.add(batch) == []
    assert first.given == []
    held.hand_out()
    held.hand_out()
    assert first.given == [(0, 0, 1, 2)]
    assert second.given == [(1, 10, 11, 12)]


def test_batches_for_other_requests_come_after_those_before():
    first, second = Request(), Request()
    held = HeldTokens({"a": (first, 0), "b": (second, 0)})
    held.add(TokenBatch(["a", "b"], [1, 2]))
    held.add(TokenBatch(["b"], [3]))
    held.hand_out()
    assert first.given == [(0, 1)]
    assert second.given == [(0, 2), (0, 3)]


def test_requests_whose_text_matters_are_told_at_once():
    quiet, watched = Request(), Request(defers_text=False)
    held = HeldTokens({"a": (quiet, 0), "b": (watched, 0)})
    told = held.add(TokenBatch(["a", "b"], [1, 2]))
    assert [(output.request_id, output.token_ids) for output in told] == [("b", [2])]
    held.hand_out()
    assert (quiet.given, watched.given) == ([(0, 1)], [])
