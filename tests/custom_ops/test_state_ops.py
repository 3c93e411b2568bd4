"""State ops: equal to the models' own functions, to themselves in pieces, and however they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from axis_rules import check_axes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers.models.kimi_linear import modeling_kimi_linear as kimi_linear
from transformers.models.mamba import modeling_mamba as mamba
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from autodeploy.custom_ops import gpu
from autodeploy.custom_ops.op import Choice, Op, OpError
from autodeploy.custom_ops.state import (
    causal_conv1d,
    gated_delta_rule,
    kimi_delta_attention,
    selective_scan,
    ssd_scan,
)

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An op, arguments for T tokens, and what transformers computes for one sequence."""

    op: Op
    per_token: tuple[str, ...]
    make: Callable[[int, torch.Generator], Arguments]
    transformers: Callable[[Arguments], Tensor]


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _conv_arguments(tokens: int, generator: torch.Generator, width: int = 4) -> Arguments:
    return {
        "x": _normal(tokens, 6, generator=generator),
        "weight": _normal(6, width, generator=generator),
        "bias": _normal(6, generator=generator),
        "activation": "silu",
    }


def _conv(a: Arguments) -> Tensor:
    return mamba.causal_conv1d_fn(a["x"].t()[None], a["weight"], a["bias"], a["activation"])[0].t()


def _plain_conv_arguments(tokens: int, generator: torch.Generator) -> Arguments:
    return _conv_arguments(tokens, generator, width=3) | {"bias": None, "activation": None}


def _selective_arguments(tokens: int, generator: torch.Generator) -> Arguments:
    return {
        "x": _normal(tokens, 6, generator=generator),
        "dt": _normal(tokens, 6, generator=generator) * 2,
        "A": -_normal(6, 4, generator=generator).exp(),
        "B": _normal(tokens, 4, generator=generator),
        "C": _normal(tokens, 4, generator=generator),
        "D": _normal(6, generator=generator),
        "z": _normal(tokens, 6, generator=generator),
        "dt_bias": _normal(6, generator=generator),
        "dt_softplus": True,
    }


def _selective(a: Arguments) -> Tensor:
    return mamba.mamba_selective_scan(
        *(a["x"].t()[None], a["dt"].t()[None], a["A"], a["B"].t()[None], a["C"].t()[None]),
        D=a["D"],
        z=None if a["z"] is None else a["z"].t()[None],
        delta_bias=a["dt_bias"],
        delta_softplus=a["dt_softplus"],
    )[0].t()


def _bare_selective_arguments(tokens: int, generator: torch.Generator) -> Arguments:
    made = _selective_arguments(tokens, generator)
    bare = {"D": None, "z": None, "dt_bias": None, "dt_softplus": False}
    return made | {"dt": made["dt"].abs()} | bare


def _ssd_arguments(tokens: int, generator: torch.Generator) -> Arguments:
    return {
        "x": _normal(tokens, 4, 5, generator=generator),
        "dt": _normal(tokens, 4, generator=generator) * 2,
        "A": -_normal(4, generator=generator).exp(),
        "B": _normal(tokens, 2, 3, generator=generator),
        "C": _normal(tokens, 2, 3, generator=generator),
        "D": _normal(4, generator=generator),
        "dt_bias": _normal(4, generator=generator),
        "dt_softplus": True,
        "dt_min": 0.01,
        "dt_max": 2.5,
    }


def _ssd(a: Arguments) -> Tensor:
    return mamba2.mamba2_chunk_scan(
        *(a["x"][None], a["dt"][None], a["A"], a["B"][None], a["C"][None]),
        chunk_size=16,
        D=a["D"],
        dt_bias=a["dt_bias"],
        dt_softplus=a["dt_softplus"],
        dt_limit=(a["dt_min"], a["dt_max"]),
    )[0]


def _bare_ssd_arguments(tokens: int, generator: torch.Generator) -> Arguments:
    bare = {"D": None, "dt_bias": None, "dt_softplus": False, "dt_min": 0.0}
    return _ssd_arguments(tokens, generator) | bare | {"dt_max": float("inf")}


def _delta_arguments(tokens: int, generator: torch.Generator) -> Arguments:
    return {
        "q": _normal(tokens, 2, 4, generator=generator),
        "k": _normal(tokens, 2, 4, generator=generator),
        "v": _normal(tokens, 4, 6, generator=generator),
        "g": -_normal(tokens, 4, generator=generator).exp(),
        "beta": _normal(tokens, 4, generator=generator).sigmoid(),
        "qk_l2norm": True,
    }


def _delta(a: Arguments) -> Tensor:
    q, k = (a[name].repeat_interleave(a["v"].shape[1] // 2, 1)[None] for name in "qk")
    rest = (a["v"][None], a["g"][None], a["beta"][None])
    return qwen3_next.torch_chunk_gated_delta_rule(
        q, k, *rest, use_qk_l2norm_in_kernel=a["qk_l2norm"]
    )[0][0]


def _unscaled_delta_arguments(tokens: int, generator: torch.Generator) -> Arguments:
    made = _delta_arguments(tokens, generator)
    return made | {"k": made["k"] / 4, "qk_l2norm": False}


def _kimi_arguments(tokens: int, generator: torch.Generator) -> Arguments:
    decay = -_normal(tokens, 4, 4, generator=generator).exp()
    return _delta_arguments(tokens, generator) | {"g": decay}


def _kimi(a: Arguments) -> Tensor:
    q, k = (a[name].repeat_interleave(2, 1)[None] for name in "qk")
    rest = (a["v"][None], a["g"][None], a["beta"][None])
    return kimi_linear.chunk_kimi_delta_attention(
        q, k, *rest, use_qk_l2norm_in_kernel=a["qk_l2norm"]
    )[0][0]


_SELECTIVE_TOKENS = ("x", "dt", "B", "C", "z")
_SSD_TOKENS = ("x", "dt", "B", "C")
_DELTA_TOKENS = ("q", "k", "v", "g", "beta")
CASES = {
    "conv": Case(causal_conv1d, ("x",), _conv_arguments, _conv),
    "plain conv": Case(causal_conv1d, ("x",), _plain_conv_arguments, _conv),
    "selective": Case(selective_scan, _SELECTIVE_TOKENS, _selective_arguments, _selective),
    "bare selective": Case(
        selective_scan, _SELECTIVE_TOKENS, _bare_selective_arguments, _selective
    ),
    "ssd": Case(ssd_scan, _SSD_TOKENS, _ssd_arguments, _ssd),
    "bare ssd": Case(ssd_scan, _SSD_TOKENS, _bare_ssd_arguments, _ssd),
    "delta": Case(gated_delta_rule, _DELTA_TOKENS, _delta_arguments, _delta),
    "unscaled delta": Case(gated_delta_rule, _DELTA_TOKENS, _unscaled_delta_arguments, _delta),
    "kimi": Case(kimi_delta_attention, _DELTA_TOKENS, _kimi_arguments, _kimi),
}
LENGTHS = ([1], [1, 1, 1], [5, 1, 150, 3, 1, 17], [64, 65, 1, 2])


@pytest.fixture(params=list(CASES.values()), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def _starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _span(case: Case, arguments: Arguments, start: int, stop: int) -> Arguments:
    return {
        name: value[start:stop] if name in case.per_token and value is not None else value
        for name, value in arguments.items()
    }


def _run(op: Op, implementation: str, arguments: Arguments) -> Tensor:
    bound = op.bind((), arguments)
    if implementation == "registered":
        return op(**arguments)
    functions = {i.name: i.function for i in op.implementations} | {"reference": op.reference}
    return functions[implementation](*bound.values())


def _ways(op: Op) -> list[str]:
    names = [i.name for i in op.implementations]
    # Tensors here are of the CPU: only the interpreter takes them.
    return ["registered", "reference", *(n for n in names if n != "triton" or gpu.interpreted())]


def _close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    scale = expected.float().abs().max().clamp(min=1e-3)
    assert ((found.float() - expected.float()).abs().max() / scale) < tolerance


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_packed_sequences_equal_the_models_own_function_one_by_one(
    case: Case, lengths: list[int], seed: int
) -> None:
    arguments = case.make(sum(lengths), torch.Generator().manual_seed(seed))
    cu_q = _starts(lengths)
    edges = cu_q.tolist()
    expected = torch.cat(
        [case.transformers(_span(case, arguments, *edge)) for edge in pairwise(edges)]
    )
    for way in _ways(case.op):
        _close(_run(case.op, way, arguments | {"cu_q": cu_q}), expected)


def _caches(case: Case, arguments: Arguments, cu_q: Tensor, slots: int) -> dict[str, Tensor]:
    assert case.op.cached is not None
    specs = case.op.cached.caches(arguments | {"cu_q": cu_q})
    assert all(spec.per == "sequence" for spec in specs)
    return {s.name: torch.full((slots, *s.shape), torch.nan, dtype=s.dtype) for s in specs}


def _cached_arguments(case: Case, arguments: Arguments, others: Arguments) -> Arguments:
    assert case.op.cached is not None
    wanted = case.op.cached.op.arguments
    return {name: value for name, value in (arguments | others).items() if name in wanted}


# Once interpreted, which is slow.
@pytest.mark.parametrize(
    ("seed", "way"),
    [*product([0, 1, 2], ["reference", "blocked"]), (1, "triton")],
)
def test_chunks_of_interleaved_sequences_equal_the_functional_form(
    case: Case, seed: int, way: str
) -> None:
    """Chunk sizes, the sequences of a step, their order and their slots are all random."""
    if way == "triton" and not gpu.interpreted():
        pytest.skip("tensors here are of the CPU: only the interpreter takes them")
    generator = torch.Generator().manual_seed(seed)
    lengths = [9, 1, 90, 2, 23]
    cu_q = _starts(lengths)
    arguments = case.make(sum(lengths), generator)
    expected = _run(case.op, "reference", arguments | {"cu_q": cu_q})
    caches = _caches(case, arguments, cu_q, slots=8)
    slots = torch.randperm(8, generator=generator)[: len(lengths)]
    found = torch.full_like(expected, torch.nan)
    done = [0] * len(lengths)

    while done != lengths:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        picked: list[int] = []
        sizes: list[int] = []
        for index in order[: int(torch.randint(1, 6, (1,), generator=generator))]:
            most = min(lengths[index] - done[index], (1, 1, 7, 40)[len(picked) % 4])
            picked.append(index)
            # A size of 0 is a padded or finished sequence: it must leave its row alone.
            sizes.append(int(torch.randint(min(most, 1), most + 1, (1,), generator=generator)))
        rows = torch.cat(
            [
                torch.arange(size) + int(cu_q[index]) + done[index]
                for index, size in zip(picked, sizes, strict=True)
            ]
        )
        if len(rows) == 0:
            continue
        step = {
            name: value[rows] if name in case.per_token and value is not None else value
            for name, value in arguments.items()
        }
        for index, size in zip(picked, sizes, strict=True):
            done[index] += size
        metadata = {
            "cu_q": _starts(sizes),
            "kv_len": torch.tensor([done[index] for index in picked]).int(),
            "state_slot": slots[picked],
        }
        assert case.op.cached is not None
        found[rows] = _run(case.op.cached.op, way, _cached_arguments(case, step, caches | metadata))
    _close(found, expected)
    unused = [slot for slot in range(8) if slot not in slots.tolist()]
    assert all(cache[unused].isnan().all() for cache in caches.values())


def test_a_new_sequence_starts_from_zeros_whatever_its_row_holds(case: Case) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 6]
    cu_q = _starts(lengths)
    arguments = case.make(7, generator)
    expected = _run(case.op, "reference", arguments | {"cu_q": cu_q})
    metadata = {
        "cu_q": cu_q,
        "kv_len": torch.tensor(lengths).int(),
        "state_slot": torch.tensor([1, 0]),
    }
    assert case.op.cached is not None
    for way in _ways(case.op.cached.op):
        for garbage in (torch.nan, 7.0, torch.inf):
            caches = _caches(case, arguments, cu_q, slots=2)
            for cache in caches.values():
                cache.fill_(garbage)
            called = _cached_arguments(case, arguments, caches | metadata)
            _close(_run(case.op.cached.op, way, called), expected)


def test_a_sequence_without_new_tokens_touches_no_row(case: Case) -> None:
    """Padding of a step: its slot may be one that another sequence of the step lives in."""
    arguments = case.make(6, torch.Generator().manual_seed(8))
    expected = _run(case.op, "reference", arguments | {"cu_q": _starts([6])})
    assert case.op.cached is not None
    for way in _ways(case.op.cached.op):
        caches = _caches(case, arguments, _starts([6]), slots=2)
        pieces = []
        for start, stop in ((0, 2), (2, 6)):
            metadata = {
                "cu_q": _starts([0, stop - start, 0, 0]),
                "kv_len": torch.tensor([3, stop, 0, 0]).int(),
                "state_slot": torch.tensor([1, 0, 0, 1]),
            }
            step = _span(case, arguments, start, stop)
            called = _cached_arguments(case, step, caches | metadata)
            pieces.append(_run(case.op.cached.op, way, called))
        _close(torch.cat(pieces), expected)
        assert all(cache[1].isnan().all() for cache in caches.values())


def test_bfloat16_tokens_keep_a_float32_state(case: Case) -> None:
    generator = torch.Generator().manual_seed(4)
    arguments = case.make(40, generator)
    low = {
        name: value.bfloat16() if name in case.per_token and value is not None else value
        for name, value in arguments.items()
    }
    if case.op is causal_conv1d:
        low |= {"weight": low["weight"].bfloat16()}
        low |= {"bias": None if low["bias"] is None else low["bias"].bfloat16()}
    cu_q = _starts([40])
    expected = case.transformers(low)
    for way in _ways(case.op):
        _close(_run(case.op, way, low | {"cu_q": cu_q}), expected, tolerance=3e-2)
    assert case.op.cached is not None
    (spec,) = case.op.cached.caches(low | {"cu_q": cu_q})
    assert spec.dtype == (torch.bfloat16 if case.op is causal_conv1d else torch.float32)


def test_shapes_follow_from_a_symbolic_number_of_tokens(case: Case) -> None:
    arguments = case.make(12, torch.Generator().manual_seed(5)) | {"cu_q": _starts([5, 7])}
    expected = case.op(**arguments)
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    fake = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    with mode:
        tokens = shapes.create_unbacked_symint()
        torch._check(tokens >= 1)
        for name in case.per_token:
            if fake[name] is not None:
                fake[name] = torch.empty((tokens, *fake[name].shape[1:]), dtype=fake[name].dtype)
        out = case.op(**fake)
    assert str(out.shape[0]) == str(tokens)
    assert out.shape[1:] == expected.shape[1:]
    assert out.dtype == expected.dtype
    assert out.stride()[1:] == expected.stride()[1:]


def test_the_cached_form_takes_the_functional_arguments_its_caches_and_metadata(case: Case) -> None:
    assert case.op.cached is not None
    arguments = case.make(3, torch.Generator())
    names = {spec.name for spec in case.op.cached.caches(arguments)}
    others = {"kv_len", "state_slot"}
    assert set(case.op.cached.op.arguments) == set(case.op.arguments) | names | others
    assert case.op.cached.op.mutates
    assert not case.op.mutates


def test_the_cpu_takes_the_blocked_implementation_and_other_devices_the_reference(
    case: Case,
) -> None:
    assert case.op.cached is not None
    for op in (case.op, case.op.cached.op):
        assert op.choose(Choice(torch.device("cpu"), {})).name == "blocked"
        assert op.choose(Choice(torch.device("meta"), {})).name == "reference"


def test_strong_decay_neither_overflows_nor_gives_nan() -> None:
    generator = torch.Generator().manual_seed(6)
    for case in CASES.values():
        arguments = case.make(150, generator)
        if "g" in arguments:
            arguments["g"] = arguments["g"] * 100
        elif "A" in arguments:
            arguments["A"] = arguments["A"] * 100
        arguments["cu_q"] = _starts([150])
        expected = _run(case.op, "reference", arguments)
        assert expected.isfinite().all()
        _close(_run(case.op, "blocked", arguments), expected)


def test_an_unknown_activation_is_refused() -> None:
    arguments = _conv_arguments(3, torch.Generator()) | {"activation": "mish"}
    with pytest.raises(OpError, match="no activation 'mish'"):
        causal_conv1d(**arguments, cu_q=_starts([3]))


GROUPED = {"g": 2, "r": 2, "p": 6, "v": 6}


def _continued(op: Op, generator: torch.Generator) -> tuple[Op, Arguments]:
    """The cached form of an op, in the middle of two sequences, and its arguments."""
    case = next(case for case in CASES.values() if case.op is op)
    arguments = case.make(9, generator) | {"cu_q": _starts([4, 5])}
    if op is ssd_scan:
        arguments["x"] = _normal(9, 4, 6, generator=generator)
    assert op.cached is not None
    caches = {
        spec.name: torch.randn((3, *spec.shape), generator=generator, dtype=spec.dtype)
        for spec in op.cached.caches(arguments)
    }
    metadata = {"kv_len": torch.tensor([10, 20]).int(), "state_slot": torch.tensor([2, 0])}
    return op.cached.op, _cached_arguments(case, arguments, caches | metadata)


@pytest.mark.parametrize("cached", [False, True], ids=["functional", "cached"])
@pytest.mark.parametrize(
    "op",
    [causal_conv1d, selective_scan, ssd_scan, gated_delta_rule, kimi_delta_attention],
    ids=lambda op: op.name,
)
def test_splitting_along_any_axis_of_the_rule_gives_the_same(op: Op, cached: bool) -> None:
    """Every axis without ^ is split in two, the halves are run apart and put together again."""
    sizes = {causal_conv1d: {"c": 6}, selective_scan: {"d": 6}}.get(op, GROUPED)
    caching, arguments = _continued(op, torch.Generator().manual_seed(7))
    if cached:
        op = caching
    arguments = {name: value for name, value in arguments.items() if name in op.arguments}
    check_axes(op, arguments, sizes, _close)
