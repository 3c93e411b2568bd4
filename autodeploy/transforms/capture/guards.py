"""Guards of an exported graph: for which sizes it holds, found by evaluating them.

`torch.export` notes conditions on input sizes beside the graph, not in it. A graph that is run
where one fails gives wrong numbers without a word.
"""

from __future__ import annotations

import re
from bisect import bisect_right

from torch.export import ExportedProgram

from ...errors import CaptureError

_SIZE = re.compile(r"(?:L((?:\['\w+'\]|\[\d+\])+)|\b([A-Za-z_]\w*))\.(?:size\(\)|shape)\[(\d+)\]")
LEAST_LIMIT = 2048
"""Tokens in one step that a graph must hold for, if the model has as many positions."""
_TRIED_TOKENS = sorted(
    {*range(1, 300), *(1 << n for n in range(8, 20)), *((1 << n) - 1 for n in range(8, 20)),
     *((1 << n) + 1 for n in range(8, 20)), 1000, 3000, 10_000, 100_000, 999_999}
)  # fmt: skip


def most_tokens(exported: ExportedProgram, least: int) -> int | None:
    """The largest number of tokens the graph holds for; None if there is no limit.

    Raises:
        CaptureError: it does not hold for some number up to `least`.
    """
    guards = getattr(exported, "_guards_code", None)
    if guards is None:
        raise CaptureError(
            "this torch keeps no `_guards_code`, so the exported graph's shape guards cannot be "
            "read; use torch 2.11 to 2.13"
        )
    limits = {guard: token_limit(guard) for guard in guards}
    bad = [guard for guard, limit in limits.items() if limit is not None and limit < least]
    if bad:
        raise CaptureError(
            f"the exported graph holds only for some lengths: {bad[0]}"
            + (f" (and {len(bad) - 1} more guards)" if len(bad) > 1 else "")
        )
    return min((limit for limit in limits.values() if limit is not None), default=None)


def token_limit(guard: str) -> int | None:
    """Up to how many tokens a guard on input sizes holds; None: for any number.

    It is evaluated for many sizes, and must not hold again above the limit. Input ids and
    positions have the same number of tokens; other sizes vary on their own.
    """
    expression = _SIZE.sub(_variable, guard)
    names = {_variable(match) for match in _SIZE.finditer(guard)}
    if not names or re.search(r"[A-Za-z_]\w*\s*\(", re.sub(r"\b(min|max)\(", "(", expression)):
        return 0
    free = [name for name in names if name not in ("tokens", "one")]
    code = compile(expression, "guard", "eval")

    def holds(tokens: int) -> bool:
        return all(
            eval(
                code,
                {"__builtins__": {"min": min, "max": max}},
                {"one": 1, "tokens": tokens, **dict.fromkeys(free, other)},
            )
            for other in (1, 2, 37, 1 << 18)
        )

    results = [holds(tokens) for tokens in _TRIED_TOKENS]
    if all(results):
        return None
    first_failure = results.index(False)
    if any(results[first_failure:]) or not first_failure:
        return 0
    return (
        bisect_right(
            range(_TRIED_TOKENS[first_failure] + 1), 0.5, key=lambda n: n > 0 and not holds(n)
        )
        - 1
    )


def _variable(size: re.Match[str]) -> str:
    name = re.sub(r"\W+", "_", size.group(1) or size.group(2)).strip("_")
    if name in ("input_ids", "position_ids", "known_len"):
        return "tokens" if size.group(3) == "1" else "one"
    return f"size_of_{name}_{size.group(3)}"
