"""A language model small enough to compute by hand, run through real caches.

The next token depends on every token of the sequence, read back through block tables and state
slots: a page, slot, length or position that is wrong anywhere changes what comes out.
"""

from itertools import pairwise

import torch

from autodeploy.custom_ops.contract import METADATA, CacheGroup, CacheInput, CacheSpec, Contract
from autodeploy.runtime.caches import allocate_caches

VOCAB = 23
MODULUS = 10_007
POISON = 22
"""A sequence with this token has NaN logits from there on."""


def contract_of(*groups, max_positions=64):
    """A contract of groups named 'tokens', 'window_<w>' and 'sequences'."""
    built, metadata = [], ["input_ids", "position_ids", "logit_index", "cu_q", "kv_len"]
    for name in groups:
        window = int(name.removeprefix("window_")) if name.startswith("window") else 0
        per = "sequence" if name == "sequences" else "token"
        spec = CacheSpec("history", (), torch.int64, per, window)
        built.append(CacheGroup(name, per, window, (CacheInput(f"cache_{name}", spec),)))
        metadata += ["state_slot"] if name == "sequences" else []
        metadata += [f"block_table_{name}", f"slot_{name}"] if per == "token" else []
    return Contract(
        metadata=tuple(metadata),
        groups=tuple(built),
        vocab_size=VOCAB,
        max_positions=max_positions,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def absorb(state, tokens):
    """A number that depends on all tokens and their order."""
    for token in tokens:
        state = (state * 31 + token + 1) % MODULUS
    return state


def logits_of(history, groups):
    """Logits [VOCAB] after a list of tokens, computed directly."""
    values = [absorb(0, history[-window(name) :] if window(name) else history) for name in groups]
    return _logits(values, POISON in history)


def window(group):
    return int(group.removeprefix("window_")) if group.startswith("window") else 0


def greedy(prompt, count, groups, bad=frozenset()):
    """`count` tokens after a prompt; those in `bad` are never chosen."""
    history = list(prompt)
    for _ in range(count):
        logits = logits_of(history, groups)
        logits[list(bad)] = -torch.inf
        history.append(int(logits.argmax()))
    return history[len(prompt) :]


class ToyRunner:
    """Runs the toy language model over paged and per-sequence caches."""

    needs_requests = False

    def __init__(self, *groups, max_positions=64):
        self.contract = contract_of(*groups, max_positions=max_positions)
        self.released = []
        self.steps = []

    def allocate(self, num_pages, page_size, num_slots):
        self.page_size = page_size
        self.caches = allocate_caches(self.contract, num_pages, page_size, num_slots)
        for cache in self.caches.values():
            cache.fill_(-1)

    def release(self, request_id):
        self.released.append(request_id)

    def forward(self, inputs):
        assert set(inputs) == set(self.contract.metadata)
        for name, value in inputs.items():
            dtype = {"int32": torch.int32, "int64": torch.int64}
            kind = next(METADATA[key] for key in METADATA if name.startswith(key))
            assert value.dtype == dtype[kind.split("] ")[1].split(":")[0]]
            assert value.is_contiguous()
        self.steps.append({name: value.clone() for name, value in inputs.items()})
        # Tokens and sequences may be padding: of no sequence, and without tokens.
        rows = [torch.zeros(VOCAB)] * inputs["input_ids"].shape[1]
        bounds = inputs["cu_q"].tolist()
        for at, (begin, end) in enumerate(pairwise(bounds)):
            if begin == end:
                continue
            for row, logits in zip(range(begin, end), self._sequence(inputs, at), strict=True):
                rows[row] = logits
        return torch.stack([rows[row] for row in inputs["logit_index"].tolist()])

    def _sequence(self, inputs, at):
        """Logits of each new token of one sequence."""
        begin, end = inputs["cu_q"][at : at + 2].tolist()
        tokens = inputs["input_ids"][0, begin:end]
        positions = inputs["position_ids"][0, begin:end].tolist()
        known = int(inputs["kv_len"][at])
        assert positions == list(range(known - len(positions), known))
        readers = [self._reader(inputs, at, group, tokens, positions) for group in self.groups]
        for position in positions:
            values, poisoned = zip(*[read(position) for read in readers], strict=True)
            yield _logits(values, any(poisoned))

    @property
    def groups(self):
        return [group.name for group in self.contract.groups]

    def _reader(self, inputs, at, group, tokens, positions):
        cache = self.caches[f"cache_{group}"]
        if group == "sequences":
            return self._state_reader(cache, int(inputs["state_slot"][at]), tokens, positions)
        begin, end = inputs["cu_q"][at : at + 2].tolist()
        cache.view(-1)[inputs[f"slot_{group}"][begin:end]] = tokens
        table = inputs[f"block_table_{group}"][at].tolist()

        def read(position):
            first = max(0, position - window(group) + 1) if window(group) else 0
            places = [divmod(p, self.page_size) for p in range(first, position + 1)]
            history = [int(cache[table[column], offset]) for column, offset in places]
            return absorb(0, history), POISON in history

        return read

    def _state_reader(self, cache, slot, tokens, positions):
        state = 0 if positions[0] == 0 else int(cache[slot])
        found = {}
        for token, position in zip(tokens.tolist(), positions, strict=True):
            found[position] = state = absorb(state, [token])
        cache[slot] = state
        return lambda position: (found[position], False)


class OneByOneRunner:
    """The toy language model for callers that hand over whole sequences."""

    needs_requests = True

    def __init__(self):
        self.contract = contract_of()
        self.released = []

    def allocate(self, num_pages, page_size, num_slots):
        assert num_pages == {}

    def release(self, request_id):
        self.released.append(request_id)

    def forward_requests(self, plan):
        rows = []
        for chunk in plan.sequences():
            tokens = chunk.token_ids.tolist()
            assert len(tokens) == chunk.start + chunk.count
            for row in chunk.logit_rows.tolist():
                rows.append(logits_of(tokens[: chunk.start + row + 1], ["tokens"]))
        return torch.stack(rows)


def _logits(values, poisoned):
    # 37 * 7 and 101 share no factor: no two tokens tie.
    seed = sum((index + 3) * value for index, value in enumerate(values))
    logits = ((torch.arange(VOCAB) * 7 + seed) * 37 % 101).float() / 10
    logits[POISON] = -torch.inf
    return logits * torch.nan if poisoned else logits
