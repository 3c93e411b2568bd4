"""A few requests before the first one: what a device compiles or loads at first use is there then.

Graphs and the forward that memory is measured by launch most of what will run, but not the steps
in between: tokens that are relayed to the step after, rows that are sampled. A server whose first
requests found them missing kept its first 30 waiting, for up to two seconds.
"""

from __future__ import annotations

import logging

from .engine import EngineCore
from .messages import EngineRequest, RequestFailed
from .sampling_params import SamplingParams

_log = logging.getLogger(__name__)
_SALT = "rehearsal"
_TOKENS = 3


def rehearse(engine: EngineCore) -> None:
    """Serves a short, a long and a sampled prompt; afterwards the engine's counts are as before."""
    room = engine.max_model_len - _TOKENS - 1
    if room < 1:
        return
    lengths = (min(8, room), min(engine.ready().step_tokens + 8, room), min(8, room))
    greedy = SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True)
    sampled = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=_TOKENS, ignore_eos=True)
    for n, (length, params) in enumerate(zip(lengths, (greedy, greedy, sampled), strict=True)):
        request = EngineRequest(
            request_id=f"{_SALT}-{n}",
            prompt_token_ids=[0] * length,
            params=params,
            cache_salt=_SALT,
        )
        engine.add(request)
        # One after the other, as decoding alone is another step than decoding beside a prompt.
        while engine.has_work:
            for output in engine.step():
                if isinstance(output, RequestFailed):
                    _log.warning("a rehearsal before the first request: %s", output.message)
    engine.forget_counts()
