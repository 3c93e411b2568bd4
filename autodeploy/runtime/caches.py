"""Caches: how much memory they get, how many pages that is, and the tensors themselves.

One equation: memory = slots * bytes per sequence + sum over groups of pages * page bytes. What
all requests could need at full length is an upper bound; below it every group gets what one
sequence needs and the same fraction of the rest, because all of them grow with the same tokens.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autodeploy.custom_ops.contract import CacheGroup, Contract
from autodeploy.errors import ConfigError, OutOfMemoryError

from .pages import pages_needed
from .scheduler import SchedulerConfig

logger = logging.getLogger(__name__)

HOST_FRACTION = 0.25
"""Of the free host memory, what the caches may take when nobody says how much."""
UNSTATED_MODEL_LEN = 32768
"""Longest sequence where neither the model nor the user states one."""
ALIGNMENT = 64
"""Bytes: one cache line, one AVX-512 register."""


@dataclass(frozen=True)
class CachePlan:
    """What to allocate."""

    num_pages: dict[str, int]
    """Per group of per-token caches, the null page included."""
    num_slots: int
    max_model_len: int
    """Tokens of one sequence that the model, the user and the pages allow."""
    bytes: int


def plan_caches(
    contract: Contract,
    config: SchedulerConfig,
    memory_bytes: int | None = None,
    num_pages: int | Mapping[str, int] | None = None,
) -> CachePlan:
    """Divides memory among the cache groups.

    memory_bytes: for all caches; None, for a model on the host: a quarter of its free memory,
    or less if max_num_seqs sequences of max_model_len need less.
    num_pages: of every group, or per group, instead.

    Raises:
        ConfigError: max_model_len is beyond what the model is made for.
        OutOfMemoryError: the memory does not hold one sequence of the max_model_len asked for.
    """
    longest = _longest_sequence(contract, config)
    groups = contract.token_groups
    num_slots, state_bytes = config.max_num_seqs, 0
    if num_pages is None:
        memory = _memory(contract, memory_bytes)
        num_slots = _slots(contract, config, memory)
        state_bytes = num_slots * _state_bytes(contract)
        pages = _share_memory(groups, config, num_slots, longest, memory - state_bytes)
    else:
        state_bytes = num_slots * _state_bytes(contract)
        pages = {
            g.name: num_pages if isinstance(num_pages, int) else num_pages[g.name] for g in groups
        }
    fitting = min(
        (_capacity(pages[g.name], config.page_size, g.window, longest) for g in groups),
        default=longest,
    )
    total = state_bytes + _bytes(groups, config, pages)
    if fitting < longest:
        needed = state_bytes + _bytes(groups, config, _alone(groups, config, longest))
        shortage = (
            f"the caches hold sequences of {fitting} tokens, fewer than max_model_len={longest}"
        )
        remedy = (
            f"set kv_cache_memory_bytes to {needed} or more, or max_model_len to {fitting} or less"
        )
        if fitting < 2 or (num_pages is None and config.max_model_len is not None):
            raise OutOfMemoryError(f"{shortage}; {remedy}")
        logger.warning("%s: sequences end there; %s", shortage, remedy)
    return CachePlan(pages, num_slots, min(longest, fitting), total)


def allocate_caches(
    contract: Contract, num_pages: Mapping[str, int], page_size: int, num_slots: int
) -> dict[str, Tensor]:
    """Zeroed cache tensors by graph input name.

    Per token [pages, page_size, *shape], per sequence [slots, *shape]. On the CPU their memory
    is taken from the machine page by page, when it is first written.
    """
    caches = {}
    for group in contract.groups:
        leading = (num_pages[group.name], page_size) if group.per == "token" else (num_slots,)
        for member in group.members:
            shape = (*leading, *member.spec.shape)
            caches[member.input] = _zeros(shape, member.spec.dtype, contract.device)
    return caches


def free_host_memory() -> int:
    """Bytes that new allocations can take without swapping, the container's limit included.

    Source: MemAvailable of /proc/meminfo and cgroup v2; elsewhere half the physical memory.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        details = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used -= int(details.get("inactive_file", 0))
    except (OSError, ValueError):
        # No cgroup v2 here, or its limit is the word "max".
        return free
    return min(free, max(0, limit - used))


def _longest_sequence(contract: Contract, config: SchedulerConfig) -> int:
    stated = contract.max_positions
    if config.max_model_len is None:
        return stated or UNSTATED_MODEL_LEN
    if stated is not None and config.max_model_len > stated:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is beyond the {stated} positions the model is "
            f"made for; use {stated} or less"
        )
    return config.max_model_len


def _memory(contract: Contract, asked: int | None) -> int:
    if asked is not None:
        return asked
    if contract.device.type != "cpu":
        raise ConfigError(
            f"what {contract.device} has left for caches cannot be measured; set "
            "kv_cache_memory_bytes"
        )
    return int(free_host_memory() * HOST_FRACTION)


def _slots(contract: Contract, config: SchedulerConfig, memory: int) -> int:
    """Requests at once: max_num_seqs, or fewer if their states alone would fill the memory."""
    per_sequence = _state_bytes(contract)
    share = memory // 2 if contract.token_groups else memory
    if config.max_num_seqs * per_sequence <= share:
        return config.max_num_seqs
    slots = share // per_sequence
    if slots < 1:
        raise OutOfMemoryError(
            f"one sequence's recurrent state takes {per_sequence} bytes and the caches may take "
            f"{memory}; set kv_cache_memory_bytes to {2 * per_sequence} or more"
        )
    logger.warning(
        "recurrent states of max_num_seqs=%d requests need %d bytes: %d run at once; "
        "raise kv_cache_memory_bytes for more",
        config.max_num_seqs,
        config.max_num_seqs * per_sequence,
        slots,
    )
    return slots


def _share_memory(
    groups: tuple[CacheGroup, ...],
    config: SchedulerConfig,
    num_slots: int,
    longest: int,
    memory: int,
) -> dict[str, int]:
    """Pages per group: enough for every request at full length, or what the memory holds."""
    alone = _alone(groups, config, longest)
    wanted = {name: 1 + num_slots * (pages - 1) for name, pages in alone.items()}
    most, least = _bytes(groups, config, wanted), _bytes(groups, config, alone)
    if most <= memory:
        return wanted
    if least <= memory:
        share = (memory - least) / (most - least)
        return {name: pages + int((wanted[name] - pages) * share) for name, pages in alone.items()}
    # Not even one sequence at full length: the longest that fits.
    length = bisect_right(
        range(longest), memory, key=lambda n: _bytes(groups, config, _alone(groups, config, n))
    )
    return _alone(groups, config, max(0, length - 1))


def _state_bytes(contract: Contract) -> int:
    """Bytes of one slot."""
    return sum(group.bytes for group in contract.sequence_groups)


def _alone(groups: tuple[CacheGroup, ...], config: SchedulerConfig, tokens: int) -> dict[str, int]:
    """Pages that one sequence of `tokens` tokens needs, the null page included."""
    return {g.name: 1 + _pages_alone(g, config, tokens) for g in groups}


def _bytes(
    groups: tuple[CacheGroup, ...], config: SchedulerConfig, pages: Mapping[str, int]
) -> int:
    return sum(pages[g.name] * config.page_size * g.bytes for g in groups)


def _pages_alone(group: CacheGroup, config: SchedulerConfig, tokens: int) -> int:
    """Pages that one sequence of `tokens` tokens holds at most."""
    pages = pages_needed(tokens, config.page_size)
    if not group.window:
        return pages
    step = min(config.max_prefill_chunk or tokens, config.max_num_batched_tokens)
    return min(pages, pages_needed(group.window + step, config.page_size) + 1)


def _capacity(num_pages: int, page_size: int, window: int, longest: int) -> int:
    """Tokens, at most `longest`, that a sequence can reach with all pages of a group."""
    usable = max(0, num_pages - 1)
    if window and usable > pages_needed(window - 1, page_size):
        return longest
    return min(longest, usable * page_size)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every byte; calloc, behind np.zeros, hands out untouched memory.
    size = dtype.itemsize * int(np.prod(shape))
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw[offset : offset + size]).view(dtype).view(shape)
