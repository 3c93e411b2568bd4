"""Grammars: constraints on text, compiled for one tokenizer by llguidance, each text once.

A compiled grammar is a matcher: it takes tokens and says which may come next. What is kept is a
matcher that has taken none; every request gets a copy of its own, which costs microseconds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from autodeploy.errors import SamplingParamsError

from .structured_params import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from tokenizers import Tokenizer

KEPT = 128
"""Compiled grammars per tokenizer; the one used longest ago makes room."""
STACK_BYTES = 2**28
"""Of a thread that compiles (reserved, not used): the compiler calls itself once for every rule
that names another, and 5,000 such calls overflow an ordinary stack, which ends the process."""
METASPACE = "\u2581"
"""What stands for a space in the vocabularies that SentencePiece makes."""
SAMPLE = '{ "a key": [12, -3.5e+7, "naïve café"] }\n'
"""Text whose tokens show how a tokenizer writes spaces and bytes."""

_stack_size = threading.Lock()


class Grammars:
    """Compiles constraints for one tokenizer and one set of end-of-sequence tokens.

    Args:
        tokenizer_json: a `tokenizers.Tokenizer` in its own serialised form.
        vocab_size: columns of the logits; at least the tokenizer's size.
        eos_token_ids: those that may end an output.

    Raises:
        SamplingParamsError: no constraint can be followed with this tokenizer.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        from llguidance import LLParserLimits, LLTokenizer
        from tokenizers import Tokenizer

        ends = [token for token in eos_token_ids if 0 <= token < vocab_size]
        if not ends:
            raise SamplingParamsError(
                "structured_outputs ends with an end-of-sequence token, and the model names none; "
                "set eos_token_id in its generation_config"
            )
        try:
            self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=ends)
        except ValueError as error:
            raise SamplingParamsError(
                f"structured_outputs cannot be followed with this tokenizer: {error}"
            ) from error
        _refuse_other_bytes(self._tokenizer, Tokenizer.from_str(tokenizer_json))
        self._limits = LLParserLimits(verbose_errors=False)
        self._kept: OrderedDict[tuple[str, str, bool], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, params: StructuredOutputsParams) -> LLMatcher | None:
        """A matcher of its own for a request, if the grammar is compiled already."""
        key = _key(params)
        with self._lock:
            matcher = self._kept.get(key)
            if matcher is None:
                return None
            self._kept.move_to_end(key)
            return matcher.deep_copy()

    def compile(self, params: StructuredOutputsParams) -> LLMatcher:
        """A matcher of its own for a request; up to seconds, if the grammar is new.

        Raises:
            SamplingParamsError: it cannot be compiled; with the compiler's reason.
        """
        found = self.find(params)
        if found is not None:
            return found
        found = self._compile_deep(params)
        with self._lock:
            self._kept[_key(params)] = found
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found.deep_copy()

    def _compile_deep(self, params: StructuredOutputsParams) -> LLMatcher:
        """In a thread with room for deep grammars."""
        outcome: list[LLMatcher | BaseException] = []

        def work() -> None:
            try:
                outcome.append(self._compile(params))
            except BaseException as error:  # noqa: BLE001 - raised by whoever waits
                outcome.append(error)

        with _stack_size:
            before = threading.stack_size(STACK_BYTES)
            try:
                thread = threading.Thread(target=work, name="autodeploy-grammar", daemon=True)
                thread.start()
            finally:
                threading.stack_size(before)
        thread.join()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def _compile(self, params: StructuredOutputsParams) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, _grammar(params), log_level=0, limits=self._limits)
        reason = matcher.get_error()
        if not reason:
            # The first mask meets limits that the compiler does not look at, and a grammar that
            # nothing matches.
            first = matcher.deep_copy()
            bits = first.compute_bitmask()
            reason = first.get_error()
            if not reason and not any(bits):
                reason = "no text matches it"
        if reason:
            raise SamplingParamsError(
                f"structured_outputs.{params.kind} cannot be compiled: {short_reason(reason)}"
            )
        return matcher


_shared: OrderedDict[tuple[str, int, tuple[int, ...]], Grammars] = OrderedDict()
_shared_lock = threading.Lock()


def grammars_of(tokenizer: object, vocab_size: int, eos_token_ids: Sequence[int]) -> Grammars:
    """The process's one `Grammars` for a transformers tokenizer; its tables take up to a second.

    Raises:
        SamplingParamsError: there is no tokenizer, or none of the `tokenizers` library.
    """
    from tokenizers import Tokenizer

    if tokenizer is None:
        raise SamplingParamsError(
            "structured_outputs needs a tokenizer: pass tokenizer=... to deploy"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise SamplingParamsError(
            f"structured_outputs needs a tokenizer of the tokenizers library (a fast one), not "
            f"{type(tokenizer).__name__}"
        )
    text = _serialised(backend)
    key = (hashlib.sha256(text.encode()).hexdigest(), vocab_size, tuple(eos_token_ids))
    with _shared_lock:
        if key not in _shared:
            _shared[key] = Grammars(text, vocab_size, eos_token_ids)
            while len(_shared) > 4:
                _shared.popitem(last=False)
        return _shared[key]


def short_reason(reason: str) -> str:
    """The part of the compiler's message that speaks of what the user wrote."""
    text = " ".join(reason.split("<non-verbose/>")[0].split())
    return text if len(text) <= 400 else text[:400] + " ..."


def _key(params: StructuredOutputsParams) -> tuple[str, str, bool]:
    return params.kind, params.text, params.disable_any_whitespace


def _serialised(backend: Tokenizer) -> str:
    """Without the padding and truncation that somebody may have set for prompts."""
    from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence

    own = copy.copy(backend)
    own.no_padding()
    own.no_truncation()
    state = own.decoder.__getstate__() if own.decoder is not None else b""
    if b'"Metaspace"' in state:
        # The same bytes, said in a way that llguidance reads: it takes tokens' "▁" literally here.
        own.decoder = Sequence([Replace(METASPACE, " "), ByteFallback(), Fuse()])
    return own.to_str()


def _refuse_other_bytes(tables: LLTokenizer, backend: Tokenizer) -> None:
    """Raises SamplingParamsError if the tables' tokens are not the text that they decode to."""
    ids = backend.encode(SAMPLE, add_special_tokens=False).ids
    found = tables.decode_bytes(ids).decode(errors="replace")
    if found.strip() != backend.decode(ids, skip_special_tokens=False).strip():
        raise SamplingParamsError(
            "structured_outputs cannot be followed with this tokenizer: what its tokens decode to "
            f"is not known (its decoder is {type(backend.decoder).__name__})"
        )


def _grammar(params: StructuredOutputsParams) -> str:
    """In llguidance's own form.

    Raises:
        SamplingParamsError: the text is in no notation that is known.
    """
    from llguidance import LLMatcher, regex_to_lark

    if params.kind in ("json", "json_object"):
        schema = params.text if params.kind == "json" else '{"type": "object"}'
        spaces = {"whitespace_flexible": not params.disable_any_whitespace}
        try:
            return LLMatcher.grammar_from_json_schema(schema, overrides=spaces)  # type: ignore[arg-type]
        except ValueError as error:  # its reader of JSON goes down 128 levels
            raise SamplingParamsError(
                f"structured_outputs.{params.kind} cannot be compiled: {short_reason(str(error))}"
            ) from error
    if params.kind == "regex":
        # Digits are those that every dialect calls so; which others there are depends on the
        # version of Unicode.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(params.text, 'd')}/")
    if params.choice is not None:
        # One lexeme: as alternatives of a rule, more than 2,000 are refused.
        texts = " | ".join(json.dumps(c, ensure_ascii=False) for c in params.choice)
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}\n")
    return LLMatcher.grammar_from_lark(_lark(params.text))


def _lark(text: str) -> str:
    """Lark as it is, GBNF translated."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(text)
    except Exception as error:
        raise SamplingParamsError(
            f"structured_outputs.grammar is neither Lark nor GBNF: {short_reason(str(error))}"
        ) from error
