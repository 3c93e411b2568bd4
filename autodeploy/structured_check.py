"""StructuredCheck: compiles a request's grammar before it is submitted, so that its sender hears
at once of one that cannot be.

The engine compiles it too. In this process that is the same grammar, compiled once; a worker
process has its own, because a grammar cannot be sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from .runtime.grammars import Grammars, grammars_of
from .runtime.sampling_params import SamplingParams


class StructuredCheck:
    """Of requests to one engine. Arguments as of `grammars_of`, which the first request calls."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._arguments = (tokenizer, vocab_size, eos_token_ids)
        self._grammars: Grammars | None = None

    def check(self, params: SamplingParams) -> None:
        """Nothing for a request without structured_outputs.

        Raises:
            SamplingParamsError: they cannot be followed; with the compiler's reason.
        """
        if params.structured_outputs is None:
            return
        if self._grammars is None:
            self._grammars = grammars_of(*self._arguments)
        self._grammars.compile(params.structured_outputs)

    async def check_aside(self, params: Any) -> None:
        """As `check`, without holding up the event loop; anything but SamplingParams passes."""
        if isinstance(params, SamplingParams) and params.structured_outputs is not None:
            await asyncio.get_running_loop().run_in_executor(None, self.check, params)
