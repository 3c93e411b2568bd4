"""EngineHost: the engines that requests go to, one per replica of the model."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from ..async_llm import AsyncLLM
from ..errors import AutodeployError, EngineDeadError
from .replica import Replica
from .routing import Candidate, block_hashes, choose


class EngineHost:
    """Holds the replicas, at least one, and sends each prompt to one of them.

    gave_up: called when an engine died and is not coming back.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = list(replicas)
        self.gave_up: Callable[[], None] = lambda: None
        self._turns = itertools.count(1)
        for number, replica in enumerate(self.replicas):
            replica.number = number
            replica.gave_up = lambda: self.gave_up()

    @property
    def serving(self) -> list[Replica]:
        """Those whose engine lives."""
        return [replica for replica in self.replicas if replica.llm.death is None]

    @property
    def llms(self) -> list[AsyncLLM]:
        """The newest engine of every replica, dead or alive."""
        return [replica.llm for replica in self.replicas]

    @property
    def llm(self) -> AsyncLLM:
        """An engine to ask what is the same for all."""
        return next(iter(self.serving), self.replicas[0]).llm

    @property
    def restarts(self) -> int:
        """Of all replicas."""
        return sum(replica.restarts for replica in self.replicas)

    @property
    def death(self) -> AutodeployError | None:
        """Why there is no engine to serve with; None if there is one."""
        return self.llm.death

    def living(self) -> AsyncLLM:
        """An engine that lives; for prompts, `route` says which.

        Raises:
            EngineDeadError: all are gone.
        """
        llm = self.llm
        if llm.death is not None:
            again = "; it is being started again" if self.replicas[0].comes_back else ""
            raise EngineDeadError(f"the engine is gone: {llm.death}{again}")
        return llm

    def route(self, token_ids: Sequence[int], cache_salt: str | None) -> Replica:
        """The replica that a prompt goes to, by `routing.choose`; it is taken to have it cached.

        Raises:
            EngineDeadError: all are gone.
        """
        self.living()
        if len(self.replicas) == 1:
            return self.replicas[0]
        serving = self.serving
        ready = serving[0].llm.ready
        hashes = _hashes(token_ids, ready.block_size, cache_salt) if ready.prefix_blocks else []
        replica = serving[choose([_candidate(r, hashes) for r in serving])]
        replica.turn = next(self._turns)
        replica.prefixes.add(hashes)
        return replica

    def start(self) -> None:
        """Begins to watch; on the event loop that serves."""
        for replica in self.replicas:
            replica.start()

    async def stop(self) -> None:
        """Stops watching, ends every stream and stops the engines."""
        await asyncio.gather(*(replica.stop() for replica in self.replicas))


def _candidate(replica: Replica, hashes: Sequence[bytes]) -> Candidate:
    ready = replica.llm.ready
    return Candidate(
        load=replica.llm.open_tokens,
        known=replica.prefixes.known(hashes) * ready.block_size,
        step=ready.step_tokens,
        turn=replica.turn,
    )


def _hashes(token_ids: Sequence[int], block_size: int, cache_salt: str | None) -> list[bytes]:
    try:
        return block_hashes(token_ids, block_size, cache_salt)
    except UnicodeEncodeError:
        return []  # whichever engine gets it refuses this salt, and says why
