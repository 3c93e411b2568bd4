"""Generation: the prompts of one HTTP request on their way through the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from ..async_llm import OutputKind
from ..outputs import RequestOutput
from ..pooling import Pooling
from ..prompts import Prompt
from ..runtime.sampling_params import SamplingParams
from .engine_host import EngineHost
from .metrics import ServerMetrics
from .protocol.base import PromptTokensDetails, Usage
from .structured import blaming
from .watch import watched


@dataclass
class Generation:
    """Prompts with what they share. name: unique; the engine's requests are called after it.

    Each prompt goes to a replica of its own.
    """

    host: EngineHost
    metrics: ServerMetrics
    name: str
    prompts: list[Prompt]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    pooling: Pooling | None = None
    """To embed, not to generate."""
    form_field: str = "structured_outputs"
    """The field of the request that constrains the output; it is blamed if that cannot be done."""

    async def whole(self) -> list[RequestOutput]:
        """The finished outputs, in the order of the prompts.

        Raises:
            AutodeployError: one of the prompts is refused or fails; the others are aborted.
        """
        outputs: dict[int, RequestOutput] = {}
        async with aclosing(self._all("final")) as parts:
            async for index, output in parts:
                outputs[index] = output
        return [outputs[index] for index in range(len(self.prompts))]

    def deltas(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """What is new, with the index of its prompt, as it comes; ends as `whole` does."""
        return self._all("delta")

    async def _all(self, kind: OutputKind) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        if len(self.prompts) == 1:
            async with aclosing(self._one(0, kind)) as outputs:
                with blaming(self.form_field):
                    async for only in outputs:
                        yield 0, only
            return
        queue: asyncio.Queue[tuple[int, RequestOutput | None]] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._into(queue, index, kind))
            for index in range(len(self.prompts))
        ]
        try:
            left = len(tasks)
            while left:
                index, output = await queue.get()
                if output is None:
                    left -= 1
                    with blaming(self.form_field):
                        tasks[index].result()
                else:
                    yield index, output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _into(
        self, queue: asyncio.Queue[tuple[int, RequestOutput | None]], index: int, kind: OutputKind
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        # Not a `finally`: whoever reads None asks for the result, which is there only then.
        task.add_done_callback(lambda _: queue.put_nowait((index, None)))
        async with aclosing(self._one(index, kind)) as outputs:
            async for output in outputs:
                queue.put_nowait((index, output))

    def _one(self, index: int, kind: OutputKind) -> AsyncGenerator[RequestOutput, None]:
        prompt = self.prompts[index]
        replica = self.host.route(prompt.token_ids, self.cache_salt)
        outputs = replica.llm.generate(
            [prompt],
            self.params,
            f"{self.name}-{index}",
            output_kind=kind,
            priority=self.priority,
            cache_salt=self.cache_salt,
            pooling=self.pooling,
        )
        return watched(outputs, self.metrics, self.params, kind, replica.number)


class UsageCount:
    """Adds up the tokens of one request."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self.prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self.completion_tokens = 0
        self._cached: dict[int, int] = {}

    def add(self, index: int, output: RequestOutput) -> None:
        """Takes in a delta, or a whole output, of prompt `index`."""
        self.completion_tokens += sum(len(c.token_ids) for c in output.outputs)
        self._cached[index] = output.num_cached_tokens

    def usage(self) -> Usage:
        """What it has come to."""
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
        )
