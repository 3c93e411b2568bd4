"""TokenRelay: sampled tokens go from one step to the next without passing through the host.

While a step runs, the next is prepared: which sequences it computes is known, the newest token of
each is not. Its place in `input_ids` holds -1 - slot, and the device puts in the token that the
last step sampled for that slot.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.step import relay_tokens, resolve_tokens

from .staging import Staging


class TokenRelay:
    """The newest token of every slot, on the device.

    Args:
        num_slots: requests that run at once.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        """[num_slots + 1] int64; the last is for sequences that only pad a step."""
        self._staging = Staging({"slots": ((num_slots,), np.int64)}, device)
        self._slots = b""
        self._relay = relay_tokens.choose(Choice(device, {})).function
        self._resolve = resolve_tokens.choose(Choice(device, {})).function

    def warm_up(self) -> None:
        """Runs every kernel: it is compiled now, not while a request waits."""
        self.write(np.zeros(1, dtype=np.int64), self.tokens[:1])
        self.fill(self.tokens[:1][None])

    def write(self, slots: np.ndarray, tokens: Tensor) -> None:
        """The step sampled `tokens` [S] int64 for `slots` [S].

        A token -1 fails its request; until the host sees that, it counts as 0.
        """
        content = slots.tobytes()
        if content != self._slots:
            # The same requests decode for many steps: their slots are sent once.
            self._slots = content
            self._staging.next()["slots"][: len(slots)] = slots
            self._staging.send()
        where = self._staging.tensors["slots"][: len(slots)]
        self._relay(tokens, where, self.tokens)

    def fill(self, input_ids: Tensor) -> Tensor:
        """[1, T] int64 with the tokens that were missing; capturable in a CUDA graph."""
        return self._resolve(input_ids, self.tokens)
