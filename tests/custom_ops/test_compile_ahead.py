"""Kernels compiled ahead: a step that asks launches nothing, and then finds all it launches."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autodeploy.custom_ops.compile_ahead import KernelsAhead, Pointer
from autodeploy.custom_ops.gpu import interpreted, interpreted_kernels
from autodeploy.custom_ops.op import Choice
from autodeploy.custom_ops.step import relay_tokens, resolve_tokens

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not interpreted(), reason="notes launches of the interpreter")


class Asked(list):
    """Stands for a compiler: what it was given, call by call."""

    def __call__(self, requests):
        self.append(list(requests))

    @property
    def names(self):
        return [[request.kernel.__name__ for request in call] for call in self]


@pytest.fixture
def asked():
    return Asked()


@pytest.fixture
def ahead(asked):
    return KernelsAhead(CPU, asked)


def way(op):
    with interpreted_kernels():
        return op.choose(Choice(CPU, {})).function


def test_a_step_that_asks_launches_nothing_and_then_runs_as_ever(ahead, asked):
    ids, tokens = torch.tensor([[-1, 4]]), torch.tensor([7, 8])
    seen = []
    ahead.ask(lambda: seen.append(way(resolve_tokens)(ids, tokens)))
    # What no kernel has written is zeros.
    assert seen[0].tolist() == [[0, 0]]
    ahead.compile()
    assert asked.names == [["resolve_tokens_kernel"]]
    assert way(resolve_tokens)(ids, tokens).tolist() == [[7, 4]]


def test_launches_alike_for_the_compiler_are_one(ahead, asked):
    tokens = torch.zeros(4, dtype=torch.int64)
    for count in (5, 300, 33, 48, 64, 1):
        # Sizes no multiple of 16, three times; multiples, twice; and one.
        ids = torch.zeros((1, count), dtype=torch.int64)
        ahead.ask(lambda ids=ids: way(resolve_tokens)(ids, tokens))
    ahead.compile()
    assert [request.args[3] for request in asked[0]] == [3, 16, 1]
    assert asked[0][0].args[0] == Pointer(torch.int64, 0)


def test_types_and_addresses_that_are_no_multiple_are_told_apart(ahead, asked):
    tokens, slots = torch.zeros(9, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    relay = way(relay_tokens)
    ahead.ask(lambda: relay(tokens[:3], slots, tokens))
    ahead.ask(lambda: relay(tokens[1:4], slots, tokens))
    ahead.ask(lambda: relay(tokens[2:5], slots, tokens))
    ahead.ask(lambda: relay(tokens[:3].int(), slots, tokens))
    ahead.compile()
    assert len(asked[0]) == 3


def test_nothing_is_compiled_twice(ahead, asked):
    ids, tokens = torch.zeros((1, 2), dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for _ in range(2):
        ahead.ask(lambda: way(resolve_tokens)(ids, tokens))
        ahead.compile()
    ahead.ask(lambda: way(relay_tokens)(tokens, tokens, tokens))
    ahead.compile()
    assert asked.names == [["resolve_tokens_kernel"], ["relay_tokens_kernel"]]


def test_a_step_that_fails_says_so_once_and_leaves_launches_as_they_were(ahead, asked, caplog):
    ids, tokens = torch.tensor([[-1, 4]]), torch.tensor([7, 8])

    def step():
        way(resolve_tokens)(ids, tokens)
        raise ValueError("no such page")

    with caplog.at_level(logging.WARNING, "autodeploy"):
        ahead.ask(step)
        ahead.ask(step)
    (said,) = caplog.messages
    assert "first launch" in said
    assert "ValueError: no such page" in said
    assert way(resolve_tokens)(ids, tokens).tolist() == [[7, 4]]
    ahead.compile()
    assert asked.names == [["resolve_tokens_kernel"]]


@pytest.mark.parametrize("through_dispatcher", [False, True])
def test_new_tensors_are_zeros_in_a_step_that_asks(ahead, through_dispatcher):
    with interpreted_kernels():
        chosen = resolve_tokens.choose(Choice(CPU, {}))
    run = resolve_tokens.dispatched(chosen) if through_dispatcher else chosen.function
    ids, tokens = torch.full((1, 999), 5), torch.zeros(3, dtype=torch.int64)
    found = []

    def step():
        found.append(run(ids, tokens))
        found.extend((torch.empty(999), torch.empty_like(ids), ids.new_empty((3, 4))))
        found.append(torch.empty_strided((3, 4), (8, 2), dtype=torch.int32))
        found.append(torch.ops.aten.empty.memory_format([999]))

    ahead.ask(step)
    assert len(found) == 6
    assert all((tensor == 0).all() for tensor in found)


def test_where_no_kernel_is_compiled_no_step_is_run_for_it():
    ahead = KernelsAhead(CPU)
    ahead.ask(lambda: pytest.fail("it ran"))
    ahead.compile()


_ON_A_DEVICE_THAT_IS_NOT_THERE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launched = []

class Driver:
    class utils:
        load_binary = staticmethod(lambda *_: (0, 0, 32, 0, 1024))
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 232448})

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _: 0)
    launcher_cls = staticmethod(lambda src, _: lambda *a: launched.append(src.fn.__name__))

driver.set_active(Driver())

from triton import knobs
from autodeploy.custom_ops.compile_ahead import KernelsAhead, compile_side_by_side
from autodeploy.custom_ops.kernel_count import KernelCount
from autodeploy.custom_ops.linear.skinny_config import Tiling
from autodeploy.custom_ops.linear.wide_linear import wide_linear
from autodeploy.custom_ops.step import triton_step

count = KernelCount()
knobs.compilation.listener = count.listen
ahead = KernelsAhead(torch.device("cpu"), compile_side_by_side)

def run(size, at=0):
    tokens = torch.zeros(size + at, dtype=torch.int64)[at:]
    triton_step.resolve_tokens_triton(torch.zeros((1, size), dtype=torch.int64), tokens)
    triton_step.relay_tokens_triton(tokens, tokens, tokens)
    # Of tensors by their descriptors.
    x, weight = torch.zeros((128, 64)), torch.zeros((128, 64))
    x, weight = x.bfloat16(), weight.bfloat16()
    wide_linear(x, weight, None, "silu", True, None, Tiling("wide", 64, 64, block_m=128))

sizes = [(1, 0), (3, 0), (32, 0), (32, 1)]
for size in sizes:
    ahead.ask(lambda size=size: run(*size))
ahead.compile()
print(count.ahead, count.later, len(launched))
for size in sizes:
    run(*size)
print(count.ahead, count.later, len(launched))
"""


def test_launches_find_compiled_what_was_asked_for(tmp_path):
    pytest.importorskip("triton", minversion="3.5")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_DEVICE_THAT_IS_NOT_THERE],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = (line.split() for line in done.stdout.splitlines()[-2:])
    # Two for tokens that begin at a multiple of 16 bytes, two for others, and the product.
    assert before == ["5", "0", "0"]
    assert after == ["5", "0", "12"]
