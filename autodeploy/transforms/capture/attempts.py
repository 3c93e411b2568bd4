"""Capturing a model as far up as it goes: first all of it, then all but the parts that resist.

A part that cannot be traced, or that is wrong when sequences lie side by side, is captured as it
is (`own_modules`), together with every other part of its class. Which part that is, is read off
the failure: the innermost one whose code was running, or, where only the proof failed, each kind
of part that keeps something of the past, in turn. The proof has the last word on every attempt.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from ...errors import CaptureError
from ..program import Program
from .attention import configs_of
from .export import CaptureOptions, capture
from .module_calls import mixes_tokens
from .module_form import ModuleForm, form_of
from .module_probe import Recorded, keepers, record
from .own_modules import OwnModule
from .rope_lengths import length_rotaries

_log = logging.getLogger("autodeploy")
_MOST_ATTEMPTS = 8

Prove = Callable[[Program], None]
"""Raises CaptureError unless the program gives packed sequences their logits."""


StandIn = Callable[[], tuple[nn.Module, Prove]]
"""Makes a model that is captured in the same ways, and the proof of its programs."""


def capture_proved(
    model: nn.Module, prove: Prove, *, owned: bool = False, stand_in: StandIn | None = None
) -> Program:
    """The first attempt that is proved; parts that run as they are are named in the log.

    stand_in: has the last word on what `prove` refuses, for models of which it can say nothing.

    Raises:
        CaptureError: none is; the message is that of the first attempt.
    """
    first: CaptureError | None = None
    proof = _Proof(prove, None if stand_in is None else functools.cache(stand_in))
    for options in _ways(model):
        found = _attempt(model, options, proof, owned)
        if isinstance(found, Program):
            if first is not None:
                _log.info("captured with %s, because otherwise %s", options, first)
            return found
        first = first or found
        if not isinstance(found, _UnprovedError):
            # What cannot be traced at all is the same in every way.
            break
    for options in [w for w in _ways(model) if not w.configured]:
        program = _with_own_parts(model, options, proof, owned, first)
        if program is not None:
            return program
    raise first or CaptureError("no attempt was made")


@dataclass(frozen=True)
class _Proof:
    """The proof of a program or, if that fails and there is a stand-in, of its program instead."""

    prove: Prove
    stand_in: StandIn | None

    def __call__(self, program: Program, options: CaptureOptions) -> None:
        try:
            self.prove(program)
        except CaptureError as error:
            if self.stand_in is None:
                raise
            _log.info("proved on a stand-in, because otherwise %s", error)
            model, prove = self.stand_in()
            parts = dict(model.named_modules())
            own: dict[str, OwnModule] = {}
            for path, part in options.own_modules.items():
                if path in parts:
                    own |= _own_modules(model, [path], part.mixes)
            prove(capture(model, dataclasses.replace(options, own_modules=own)))


class _UnprovedError(CaptureError):
    """A captured program gives other logits than the model."""


def _ways(model: nn.Module) -> Iterator[CaptureOptions]:
    """The same hooks in few ways, the usual one first.

    A model is given `position_ids` from 0 in every sequence, and is told that its attention is
    ours. Some count positions otherwise when left to themselves, and some compute something else
    under another name. The model called with `input_ids` alone says which is right.
    """
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    names = {getattr(config, "_attn_implementation", None) for config in configs_of(model)}
    for configured in (False, True) if names - {None, "eager"} else (False,):
        yield CaptureOptions(configured=configured)
        if takes_positions:
            yield CaptureOptions(configured=configured, positions=False)


def _attempt(
    model: nn.Module, options: CaptureOptions, proof: _Proof, owned: bool
) -> Program | CaptureError:
    try:
        program = capture(model, options, owned=owned)
    except CaptureError as error:
        return error
    try:
        proof(program, options)
    except CaptureError as error:
        return _UnprovedError(str(error)).with_traceback(error.__traceback__)
    return program


def _with_own_parts(
    model: nn.Module, options: CaptureOptions, proof: _Proof, owned: bool,
    failure: CaptureError | None,
) -> Program | None:  # fmt: skip
    """A proved program in which parts run as they are: more and more, until it holds."""
    own: dict[str, OwnModule] = {}
    error = failure
    for _ in range(_MOST_ATTEMPTS):
        more = _next_parts(model, error, own) if error is not None else {}
        if not more:
            return None
        own = {**own, **more}
        found = _attempt(model, dataclasses.replace(options, own_modules=own), proof, owned)
        if isinstance(found, Program):
            _announce(model, own, str(failure))
            return found
        error = found
    return None


def _next_parts(
    model: nn.Module, error: CaptureError, own: dict[str, OwnModule]
) -> dict[str, OwnModule]:
    """Parts to capture as they are next: those of one class, or none if all ideas are used up."""
    try:
        keeping = keepers(model)
        suspects = list(_suspects(model, error, keeping, own))
    except CaptureError as reason:
        _log.info("no part can run as it is: %s", reason)
        return {}
    for path in suspects:
        kind = type(model.get_submodule(path))
        same = [
            name for name, part in model.named_modules() if type(part) is kind and name not in own
        ]
        try:
            return _own_modules(model, same, path in keeping)
        except CaptureError as reason:
            _log.info("%s cannot run as it is: %s", kind.__name__, reason)
    return {}


def _suspects(
    model: nn.Module,
    error: CaptureError,
    keeping: dict[str, list[str]],
    own: dict[str, OwnModule],
) -> Iterator[str]:
    """Paths of parts that may be the cause, the likeliest first, none that contains another."""
    names = {id(part): name for name, part in model.named_modules() if name}
    stack = _layer_paths(model)
    running = [names[i] for i in _running_parts(error) if i in names]
    running = [path for path in running if path not in stack]
    yield from (path for path in running if path not in own)
    if running:
        return
    seen = {type(model.get_submodule(path)) for path in own}
    deepest_first = sorted(keeping, key=lambda path: (len(keeping[path]), -path.count(".")))
    for path in deepest_first:
        kind = type(model.get_submodule(path))
        if kind not in seen and path not in own and path not in stack:
            seen.add(kind)
            yield path
    for path in _mixing_parts(model):
        if type(model.get_submodule(path)) not in seen:
            yield path


def _mixing_parts(model: nn.Module) -> list[str]:
    """One part of each class inside the layers that mixes tokens, the deepest first."""
    layers = _layer_paths(model)
    candidates: dict[type, str] = {}
    for path, part in model.named_modules():
        inside = any(path.startswith(layer + ".") for layer in layers)
        if inside and path not in layers and not isinstance(part, nn.ModuleList):
            candidates.setdefault(type(part), path)
    recorded = record(model, list(candidates.values()))
    found = []
    for path in candidates.values():
        try:
            mixes = mixes_tokens(model.get_submodule(path), form_of(path, recorded[path], 0))
        except (CaptureError, IndexError):
            # Never called, or not a function of tokens: no part of ours.
            continue
        if mixes:
            found.append(path)
    return sorted(found, key=lambda path: -path.count("."))


def _running_parts(error: BaseException) -> list[int]:
    """Ids of the modules whose code was running when the error was raised, innermost first."""
    found: list[int] = []
    cause: BaseException | None = error
    while cause is not None:
        trace = cause.__traceback__
        here = []
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                here.append(id(owner))
            trace = trace.tb_next
        found += [i for i in reversed(here) if i not in found]
        cause = cause.__cause__
    return found


def _layer_paths(model: nn.Module) -> set[str]:
    """Whole layers of the stack, and what contains them: too much to run as it is."""
    from ..verify.twin import layer_list

    layers = {id(layer) for layer in layer_list(model)}
    inside = {name for name, part in model.named_modules() if id(part) in layers}
    return inside | {
        name for name, _ in model.named_modules() if any(p.startswith(name + ".") for p in inside)
    }


def _own_modules(model: nn.Module, paths: list[str], keeps: bool) -> dict[str, OwnModule]:
    recorded = record(model, paths)
    rotating = {id(rotary.module) for rotary in length_rotaries(model)}
    found = {}
    for path in paths:
        part = model.get_submodule(path)
        if any(id(inner) in rotating for inner in part.modules()):
            raise CaptureError(f"{path} rotates by the length of the input, which it is not told")
        calls = recorded[path]
        if not calls.alone[0]:
            continue
        mixes = keeps or mixes_tokens(part, _forms(path, calls, False)[0])
        forms = _forms(path, calls, mixes)
        if mixes and not any(form.kept or form.states or form.handed for form in forms):
            raise CaptureError(f"{path} mixes tokens and keeps nothing of them")
        found[path] = OwnModule(path, mixes, forms)
    return found


def _forms(path: str, calls: Recorded, keeps: bool) -> tuple[ModuleForm, ...]:
    return tuple(form_of(path, calls, i, keeps=keeps) for i in range(len(calls.alone[0])))


def _announce(model: nn.Module, own: dict[str, OwnModule], cause: str) -> None:
    kinds: dict[str, int] = {}
    for path in own:
        kind = type(model.get_submodule(path)).__name__
        kinds[kind] = kinds.get(kind, 0) + 1
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    _log.warning(
        "%s run as the model's own code, one sequence at a time inside the packed graph, which "
        "is slow, because: %s", listed, cause,
    )  # fmt: skip
