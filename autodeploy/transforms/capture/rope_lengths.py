"""Rotary tables whose frequencies depend on the input's length become functions of `known_len`.

transformers looks at the largest position of a call and rewrites the module's frequencies in
place (`dynamic_rope_update`: dynamic NTK scaling and LongRoPE), which packed sequences cannot
share and a graph cannot follow. Here the same frequencies are worked out per token. That they
are the same is proved: a newly made module runs at lengths on both sides of its threshold, and a
module that gives anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import modeling_rope_utils
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...errors import CaptureError
from .boundaries import current_known_len
from .interception import Interception

_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "halves": lambda angles: torch.cat((angles, angles), dim=-1),
    "pairs": lambda angles: angles.repeat_interleave(2, dim=-1),
    "once": lambda angles: angles,
}
"""How a table's R columns are made of R / 2 (or R) angles."""


@dataclass(frozen=True)
class LengthRotary:
    """One set of frequencies, of one module, that depends on the length."""

    module: Any
    layer_type: str | None
    """For modules that hold one set per type of layer."""
    rope_type: str

    @property
    def grows(self) -> bool:
        """Whether every length past the threshold has frequencies of its own."""
        return "dynamic" in self.rope_type

    @property
    def prefix(self) -> str:
        """Of the names of the module's buffers."""
        return "" if self.layer_type is None else f"{self.layer_type}_"

    @property
    def keywords(self) -> dict[str, str]:
        return {} if self.layer_type is None else {"layer_type": self.layer_type}

    @property
    def threshold(self) -> int:
        """The longest length with the frequencies that the module was made with."""
        if self.grows:
            return int(self.module.original_max_seq_len)
        parameters = self.module.config.rope_parameters
        if self.layer_type is not None:
            parameters = parameters[self.layer_type]
        return int(parameters["original_max_position_embeddings"])

    def frequencies(self, lengths: torch.Tensor | int, device: torch.device) -> torch.Tensor:
        """[R / 2] float32 for one length; [.., R / 2] for lengths [.., 1] if it grows."""
        found, _ = ROPE_INIT_FUNCTIONS[self.rope_type](
            self.module.config, device, seq_len=lengths, **self.keywords
        )
        return found


class UnknownLengthsError(CaptureError):
    """Keys depend on the length in an unknown way, whatever parts run as they are."""


def length_rotaries(model: nn.Module) -> list[LengthRotary]:
    """Every set of frequencies in `model` that transformers changes with the length."""
    found = []
    for module in model.modules():
        if not _is_updated(type(module).forward):
            continue
        kinds: Any = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        found += [
            LengthRotary(module, layer_type, kind)
            for layer_type, kind in by_layer.items()
            if kind is not None and ("dynamic" in kind or kind == "longrope")
        ]
    return found


def _is_updated(forward: Any) -> bool:
    """Whether a function is wrapped, at any depth, by transformers' update of frequencies."""
    while forward is not None:
        if getattr(forward, "__globals__", None) is vars(modeling_rope_utils):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


@contextmanager
def lengths_forgotten(rotaries: list[LengthRotary]) -> Iterator[None]:
    """Modules as they were made, not as earlier calls left them; those are put back on exit.

    A call inside changes them again: open one for each sequence, or for each call.
    """
    modules = {id(r.module): r.module for r in rotaries}.values()
    kept = [(m, dict(vars(m)), dict(m._buffers)) for m in modules]
    for rotary in rotaries:
        _forget_length(rotary)
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _forget_length(rotary: LengthRotary) -> None:
    module, prefix = rotary.module, rotary.prefix
    original = getattr(module, f"{prefix}original_inv_freq")
    module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
    for name in (f"{prefix}long_inv_freq", f"{prefix}max_seq_len_cached"):
        vars(module).pop(name, None)
    module.max_seq_len_cached = module.original_max_seq_len


@dataclass(frozen=True)
class LengthTables:
    """Cosines and sines of a rotary module as a function of positions and lengths."""

    rotary: LengthRotary
    short: torch.Tensor
    """[R / 2] float32, up to the threshold."""
    long: torch.Tensor | None
    """[R / 2] float32, past it; None if every length has its own."""
    layout: str
    short_scale: float
    long_scale: float

    def __call__(
        self,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        lengths: torch.Tensor,
        short: torch.Tensor | None = None,
        long: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids and lengths [1, T] -> cosines and sines [1, T, R] in the dtype of `x`.

        short, long: the frequencies, where they are elsewhere than here.
        """
        short = self.short if short is None else short
        long = self.long if long is None else long
        if long is None:
            long = self.rotary.frequencies(lengths[..., None], x.device)
        past = lengths[..., None] > self.rotary.threshold
        frequencies = torch.where(past, long.float(), short.float())
        angles = _LAYOUTS[self.layout](position_ids[..., None].float() * frequencies)
        scale: Any = self.short_scale
        if self.long_scale != self.short_scale:
            scale = torch.where(past, self.long_scale, self.short_scale)
        return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def intercept_lengths(scope: Interception, rotaries: list[LengthRotary]) -> None:
    """Makes these modules compute their tables from `known_len` while `scope` is open.

    Raises:
        CaptureError: a module's tables are none that can be worked out per token.
    """
    for module in {id(r.module): r.module for r in rotaries}.values():
        tables = {r.layer_type: prove_tables(r) for r in rotaries if r.module is module}
        for found in tables.values():
            # As buffers they are weights of the graph, not constants spelled out in it.
            prefix, like = found.rotary.prefix, getattr(module, f"{found.rotary.prefix}inv_freq")
            for name, value in (("short", found.short), ("long", found.long)):
                if value is not None:
                    module.register_buffer(
                        f"{prefix}{name}_frequencies", _beside(like, value), persistent=False
                    )
        scope.set_attribute(module, "forward", _replacement(module, tables, module.forward))


def _beside(like: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` on the device of `like`, and fake if that is."""
    if isinstance(like, FakeTensor):
        value = like.fake_mode.from_tensor(value)
    return value.to(like.device)


def _replacement(
    module: Any, tables: dict[str | None, LengthTables], original: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        found = tables.get(layer_type)
        if found is None:
            return original(x, position_ids, layer_type)
        lengths = current_known_len()
        if position_ids.shape != lengths.shape:
            raise UnknownLengthsError(
                f"{type(module).__name__} is called with positions {list(position_ids.shape)} "
                f"where the packed tokens have {list(lengths.shape)}: which length each is for "
                "cannot be told"
            )
        prefix = found.rotary.prefix
        return found(
            x,
            position_ids,
            lengths,
            getattr(module, f"{prefix}short_frequencies"),
            getattr(module, f"{prefix}long_frequencies", None),
        )

    return forward


def prove_tables(rotary: LengthRotary) -> LengthTables:
    """Tables equal to those of a newly made module at lengths around and far past its threshold.

    Raises:
        CaptureError: there are none.
    """
    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        limit = rotary.threshold
        lengths = sorted({2, limit, limit + 1, 2 * limit + 3, 7 * limit + 1} - {1})
        expected = {n: _new_tables(rotary, n) for n in lengths}
        short = getattr(_new_module(rotary), f"{rotary.prefix}inv_freq")
        long: list[Any] = [None] if rotary.grows else [rotary.frequencies(limit + 1, short.device)]
        # Some modules change their scale with the length and keep their frequencies.
        for frequencies in [*long, short]:
            for layout in _LAYOUTS:
                found = LengthTables(
                    rotary, short, frequencies, layout, _scale(expected, limit),
                    _scale(expected, limit + 1),
                )  # fmt: skip
                if all(_same(found, n, expected[n]) for n in lengths):
                    return found
    raise UnknownLengthsError(
        f"{type(rotary.module).__name__} rotates by the length of its input ('{rotary.rope_type}') "
        "in a way that could not be worked out per token"
    )


def _new_module(rotary: LengthRotary) -> Any:
    """A module that has not run yet, with the frequencies that this one was made with."""
    name = f"{rotary.prefix}original_inv_freq"
    try:
        module = type(rotary.module)(rotary.module.config)
        original = getattr(rotary.module, name)
    except (TypeError, AttributeError) as error:
        raise UnknownLengthsError(
            f"{type(rotary.module).__name__} rotates by the length of its input and a new one, to "
            f"compare with, cannot be made from its config: {error}"
        ) from error
    if not isinstance(original, FakeTensor) and original.device.type != "meta":
        for buffer in (name, f"{rotary.prefix}inv_freq"):
            module.register_buffer(buffer, original.detach().cpu().clone(), persistent=False)
    return module


def _positions(length: int) -> torch.Tensor:
    return torch.tensor(sorted({0, 1, 2, length // 3, length // 2, length - 1}))[None]


def _new_tables(rotary: LengthRotary, length: int) -> tuple[torch.Tensor, ...]:
    """What the module's own forward gives for the first call, at some positions of `length`."""
    positions = _positions(length)
    given = {**rotary.keywords}
    found = _new_module(rotary)(torch.zeros(1, positions.shape[1], 1), positions, **given)
    if not (isinstance(found, tuple) and len(found) == 2 and found[0].is_floating_point()):
        raise UnknownLengthsError(
            f"{type(rotary.module).__name__} rotates by the length of its input and does not "
            "return cosines and sines"
        )
    return found


def _scale(expected: dict[int, tuple[torch.Tensor, ...]], length: int) -> float:
    """What the cosine is at position 0."""
    return float(expected[length][0][0, 0, 0])


def _same(found: LengthTables, length: int, expected: tuple[torch.Tensor, ...]) -> bool:
    positions = _positions(length)
    tables = found(torch.zeros(1), positions, torch.full_like(positions, length))
    # An angle is a product of the position and a float32 frequency.
    tolerance = 1e-5 + 2e-7 * length
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=tolerance)
        for a, b in zip(tables, expected, strict=True)
    )
