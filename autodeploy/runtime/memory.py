"""What a device has left for caches: measured once, before they are made.

    caches = total * utilization - used already - one step's activations - graphs - a reserve

Used already is all that the device does not call free: weights, the context and its kernels, and
other processes. The activations are measured on the largest step there will be.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from autodeploy.custom_ops.compile_ahead import KernelsAhead
from autodeploy.custom_ops.contract import Contract
from autodeploy.errors import OutOfMemoryError

from .mixed_graphs import MixedSize
from .pages import pages_needed
from .runner import ModelRunner
from .scheduler import PROMPT_LOGPROB_ROWS, SchedulerConfig

logger = logging.getLogger(__name__)

GRAPHS_BYTES = 1 << 30
"""Kept for CUDA graphs of decoding steps: a pool of activations, and some MB of nodes for each."""
NODES_BYTES = 8 << 20
"""Kept for each further graph: its nodes, and what its steps' numbers are staged in."""
FRAGMENTATION_BYTES = 1 << 29
"""Kept for blocks that the allocator rounds up or cannot join; steps of ever new sizes leave
some. Where even that is too little it gives back what it keeps and asks again: slower, no more."""
SAMPLER_BYTES_PER_LOGIT = 28
"""Of float32 logits (4), their probabilities (4), both sorted (8) with indices (8), a sum (4)."""


def memory_for_caches(
    runner: ModelRunner,
    config: SchedulerConfig,
    utilization: float,
    mixed: Sequence[MixedSize] = (),
    ahead: KernelsAhead | None = None,
) -> int | None:
    """Bytes all caches may take on the runner's device; None if that is the host.

    utilization: fraction of the device's memory that may be used in all.
    mixed: steps with prompt tokens that CUDA graphs will be captured of.
    ahead: compiles the kernels of the measured step.

    Raises:
        OutOfMemoryError: nothing is left.
    """
    device = runner.contract.device
    if device.type != "cuda":
        return None
    activations = measure_activation_bytes(runner, config, ahead)
    torch.cuda.empty_cache()
    # Afterwards: kernels and workspaces that the step has loaded are counted as used.
    free, total = torch.cuda.mem_get_info(device)
    graphs = GRAPHS_BYTES + mixed_graphs_bytes(runner.contract, config, activations, mixed)
    left = cache_bytes(total, free, utilization, activations, graphs)
    logger.info(
        "%s: %.1f GiB, of which %.1f used; steps take %.1f, caches get %.1f",
        device, *(count / 2**30 for count in (total, total - free, activations, left)),
    )  # fmt: skip
    return left


def mixed_graphs_bytes(
    contract: Contract, config: SchedulerConfig, activations: int, sizes: Sequence[MixedSize]
) -> int:
    """Bytes that graphs of mixed steps take, where the largest step needs `activations`.

    The largest graph needs its share of those by its tokens, and its logits, once more if they
    must be made contiguous. The others fit into the same pool.
    """
    if not sizes:
        return 0
    largest = max(sizes)
    pool = -(-activations * largest.tokens // config.max_num_batched_tokens)
    logits = 2 * max(size.rows for size in sizes) * contract.vocab_size * contract.dtype.itemsize
    return pool + logits + NODES_BYTES * len(sizes)


def cache_bytes(
    total: int, free: int, utilization: float, activations: int, graphs_bytes: int = GRAPHS_BYTES
) -> int:
    """What the equation leaves for caches; all in bytes.

    Raises:
        OutOfMemoryError: nothing.
    """
    used = total - free
    reserved = activations + graphs_bytes + FRAGMENTATION_BYTES
    left = min(int(total * utilization) - used, free) - reserved
    if left <= 0:
        raise OutOfMemoryError(
            f"nothing is left for caches: of {total} bytes on the device {used} are used, a step "
            f"needs {reserved}, and gpu_memory_utilization={utilization} allows "
            f"{int(total * utilization)}; raise it, lower max_num_batched_tokens or max_num_seqs, "
            "or free the device"
        )
    return left


def measure_activation_bytes(
    runner: ModelRunner, config: SchedulerConfig, ahead: KernelsAhead | None = None
) -> int:
    """Most bytes of the device that a step needs beside weights and caches.

    Runs the model on as many tokens as a step can have, over caches of two pages: what the
    tokens are does not matter, and pages are written over and over. On the CPU, where nobody
    counts, only what follows from shapes: the sampler's part.

    Raises:
        OutOfMemoryError: the step does not fit, even without caches.
    """
    contract = runner.contract
    rows = config.max_num_seqs + PROMPT_LOGPROB_ROWS
    sampler = rows * contract.vocab_size * SAMPLER_BYTES_PER_LOGIT
    if runner.needs_requests:
        # These keep caches of their own, which grow with the requests.
        return sampler
    runner.allocate({group.name: 2 for group in contract.token_groups}, config.page_size, 1)
    inputs = largest_step(contract, config)
    if contract.device.type != "cuda":
        runner.forward(inputs)
        return sampler
    if ahead is not None:
        ask_for_prompts(runner, config, ahead)
        ahead.compile()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(contract.device)
    torch.cuda.reset_peak_memory_stats(contract.device)
    try:
        runner.forward(inputs)
        torch.cuda.synchronize(contract.device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"a step of {inputs['input_ids'].shape[1]} tokens does not fit beside the weights: "
            f"{str(error).splitlines()[0]}; lower max_num_batched_tokens"
        ) from error
    # Reserved, not allocated: blocks are larger than what lies in them.
    forward = torch.cuda.max_memory_reserved(contract.device) - before
    # A step samples after its forward, in the memory that this has left, beside its logits.
    return max(forward, sampler)


def ask_for_prompts(runner: ModelRunner, config: SchedulerConfig, ahead: KernelsAhead) -> None:
    """Kernels of the largest steps: of all sequences, and of a single one, as of a long prompt."""
    if runner.needs_requests or runner.contract.eager:
        # The host would decide by what no kernel has written.
        return
    for most in (config.max_num_seqs, 1):
        ahead.ask(partial(_run_largest, runner, dataclasses.replace(config, max_num_seqs=most)))


def _run_largest(runner: ModelRunner, config: SchedulerConfig) -> Tensor:
    return runner.forward(largest_step(runner.contract, config))


def largest_step(contract: Contract, config: SchedulerConfig) -> dict[str, Tensor]:
    """Inputs of a step with all tokens and all sequences there can be, by name (see METADATA).

    One sequence has all tokens but one for each of the others, or as many as a sequence can
    have; all are new, and all lie on page 1 and in slot 0.
    """
    tokens = min(
        config.max_num_batched_tokens, contract.max_tokens or config.max_num_batched_tokens
    )
    longest = min(config.max_model_len or tokens, contract.max_positions or tokens)
    counts = _lengths(tokens, min(config.max_num_seqs, tokens), longest)
    starts = counts.cumsum(0) - counts
    total = int(counts.sum())
    positions = torch.arange(total) - starts.repeat_interleave(counts)
    slots = config.page_size + positions % config.page_size
    width = pages_needed(int(counts.max()), config.page_size)
    # Rows of prompts' logits come beside those of the sequences.
    rows = min(total, len(counts) + PROMPT_LOGPROB_ROWS)
    values = {
        "input_ids": (torch.arange(total) * 7919 % contract.vocab_size)[None],
        "position_ids": positions[None],
        "known_len": counts.repeat_interleave(counts)[None],
        "logit_index": torch.arange(total - rows, total),
        "cu_q": torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        "kv_len": counts.int(),
        "state_slot": torch.zeros_like(counts),
    }
    for group in contract.token_groups:
        values[f"block_table_{group.name}"] = torch.ones(len(counts), width, dtype=torch.int32)
        values[f"slot_{group.name}"] = slots
    return {name: values[name].to(contract.device) for name in contract.metadata}


def _lengths(tokens: int, sequences: int, longest: int) -> Tensor:
    """[B] tokens of each sequence, `tokens` in all unless `sequences` of `longest` are fewer."""
    counts: list[int] = []
    while tokens and len(counts) < sequences:
        others = sequences - len(counts) - 1
        counts.append(max(1, min(longest, tokens - others)))
        tokens -= counts[-1]
    return torch.tensor(counts)
