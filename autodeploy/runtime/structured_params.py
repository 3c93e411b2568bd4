"""StructuredOutputsParams: what the text of an output must match. Names are vLLM's.

Construction checks what can be told without a tokenizer: that there is one constraint, of the
right type and of a size that is safe to compile. Whether it compiles is for `grammars.py` to say.
"""

from __future__ import annotations

import json as json_text
import reprlib
from collections.abc import Mapping
from typing import Any

import msgspec

from autodeploy.errors import SamplingParamsError

KINDS = ("json", "regex", "choice", "grammar", "json_object")
MAX_CHARACTERS = {"json": 2**16, "regex": 2**14, "choice": 2**18, "grammar": 2**16}
"""Of a constraint's text. An object of 2,100 properties, 64 Ki characters, takes 0.6 s to compile
and up to 35 ms for a mask, which every request of the step waits for; one of 8,000 takes 14 s and
0.6 s."""


class StructuredOutputsParams(
    msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One constraint on the output's text, and how its JSON may be written.

    Raises:
        SamplingParamsError: none or several constraints, or one of a wrong type or too long.
    """

    json: str | dict[str, Any] | None = None
    """A JSON schema; text once constructed."""
    regex: str | None = None
    """The whole output matches it: syntax of Rust's regex crate, without look-around; digits are 0
    to 9."""
    choice: list[str] | None = None
    """The output is one of these."""
    grammar: str | None = None
    """Lark with a rule `start`, or GBNF with a rule `root`."""
    json_object: bool | None = None
    """Any JSON object."""
    disable_any_whitespace: bool = False
    """JSON without white space between its parts, which small models make endlessly much of."""

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise SamplingParamsError(
                f"structured_outputs needs exactly one of {', '.join(KINDS)}, not {found}"
            )
        if type(self.disable_any_whitespace) is not bool:
            raise _wrong_type("disable_any_whitespace", self.disable_any_whitespace, "a bool")
        if self.json is not None:
            msgspec.structs.force_setattr(self, "json", _schema_text(self.json))
        _CHECKS[given[0]](getattr(self, given[0]))
        _check_size(given[0], self.text)

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, False))

    @property
    def text(self) -> str:
        """The constraint as text, by which equal ones are known."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json_text.dumps(value, ensure_ascii=False)


def _schema_text(schema: object) -> str:
    if isinstance(schema, str):
        return schema
    if not isinstance(schema, Mapping):
        raise _wrong_type("json", schema, "a JSON schema, as text or a dict")
    try:
        # The order of properties is that of the output, so they are not sorted.
        return json_text.dumps(dict(schema), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SamplingParamsError(
            f"structured_outputs.json cannot be written as JSON: {error}"
        ) from error


def _check_schema(text: str) -> None:
    try:
        schema = json_text.loads(text)
    except (ValueError, RecursionError) as error:
        raise SamplingParamsError(
            f"structured_outputs.json is no JSON: {error}; give a JSON schema"
        ) from error
    if not isinstance(schema, dict):
        raise SamplingParamsError(
            f"structured_outputs.json must be a JSON object, not {text!r:.40}"
        )


def _check_choices(choices: object) -> None:
    if not isinstance(choices, list) or not choices:
        raise _wrong_type("choice", choices, "a list of at least one string")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise _wrong_type("an entry of choice", choice, "a string that is not empty")


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str) or not text:
        raise _wrong_type(name, text, "a string that is not empty")


def _check_flag(value: object) -> None:
    if value is not True:
        raise _wrong_type("json_object", value, "True or None")


_CHECKS = {
    "json": _check_schema,
    "regex": lambda text: _check_text("regex", text),
    "choice": _check_choices,
    "grammar": lambda text: _check_text("grammar", text),
    "json_object": _check_flag,
}


def _check_size(kind: str, text: str) -> None:
    most = MAX_CHARACTERS.get(kind)
    if most is not None and len(text) > most:
        raise SamplingParamsError(
            f"structured_outputs.{kind} has {len(text)} characters, and at most {most} are "
            "compiled; simplify it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SamplingParamsError(
            f"structured_outputs.{kind} is not valid Unicode: {error.reason}"
        ) from error


def _wrong_type(name: str, value: object, wanted: str) -> SamplingParamsError:
    return SamplingParamsError(
        f"structured_outputs: {name} is {reprlib.repr(value)}, a {type(value).__name__}; it must "
        f"be {wanted}"
    )
