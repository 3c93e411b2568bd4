"""One model: what becomes of it when it is deployed, as a record."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from autodeploy.custom_ops.contract import CacheGroup
from autodeploy.custom_ops.op import OPS
from autodeploy.errors import AutodeployError, NotCausalError
from autodeploy.ladder import Built, build_runner
from autodeploy.transforms.recipe import load_recipe
from autodeploy.transforms.verify import SequenceCheck, reference_logits

from .serving import Served, serve
from .tiny_config import randomise, tiny_config

EXACT_LOGITS = 1e-4
EXACT_LOGPROBS = 1e-3


@dataclass
class Record:
    """What was measured on one architecture. Plain data: it is written as JSON."""

    name: str
    rung: int = 0
    """1 to 3; 0: refused, or it failed."""
    exact: bool = False
    cause: str = ""
    """Why it is below rung 1, or was refused, or failed."""
    failed: bool = False
    """It neither deployed nor was refused for a reason of its own: something is wrong."""
    made: bool = True
    """False: transformers makes no model of its default config, or none from text alone."""
    attention: list[str] = field(default_factory=list)
    caches: list[str] = field(default_factory=list)
    recognised: dict[str, int] = field(default_factory=dict)
    unrecognised: dict[str, int] = field(default_factory=dict)
    """Operations that are neither ours nor simple, by name."""
    own_code: dict[str, int] = field(default_factory=dict)
    """Parts that run as the model's own code inside the graph, by class."""
    logit_error: float | None = None
    """Largest difference from the plain model over the logits' range; rung 1."""
    served: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def outcome(self) -> str:
        """One word or two for the table."""
        if not self.made:
            return "no model"
        if self.failed:
            return "failed"
        if self.rung == 0:
            return "refused"
        return f"rung {self.rung}" + ("" if self.exact else ", NOT EXACT")


class MeasureExactness:
    """Measures tiny models of architectures by their names; never raises."""

    def __call__(self, name: str) -> Record:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        quiet()
        return measure_architecture(name, CONFIG_MAPPING[name])

    def failure(self, name: str, cause: str, seconds: float) -> Record:
        """What is known of one whose process came to nothing."""
        return Record(name, failed=True, cause=cause, seconds=seconds)


def measure_architecture(name: str, config: Callable[[], PretrainedConfig]) -> Record:
    """Makes a tiny random model of a config class and measures it; never raises."""
    record = Record(name)
    started = time.perf_counter()
    try:
        model = tiny_model(config())
    except Exception as error:  # noqa: BLE001 - any config class may refuse in any way
        record.made, record.cause = False, f"no tiny model can be made: {one_line(error)}"
        return record
    measure_model(model, record)
    record.seconds = round(time.perf_counter() - started, 1)
    return record


def tiny_model(config: PretrainedConfig, seed: int = 0) -> nn.Module:
    """A tiny float32 model in eval mode, of unit gain."""
    torch.manual_seed(seed)
    tiny = tiny_config(config)
    model: nn.Module = AutoModelForCausalLM.from_config(tiny, trust_remote_code=True)
    model = model.float().eval()
    randomise(model)
    return model


def measure_model(model: nn.Module, record: Record) -> None:
    """Deploys a model, serves with it, and fills the record."""
    started = time.perf_counter()
    _measure(model, record)
    record.seconds = round(time.perf_counter() - started, 1)


def _measure(model: nn.Module, record: Record) -> None:
    try:
        built = build_runner(model, load_recipe("default"))
    except AutodeployError as error:
        record.cause = one_line(error)
        return
    except Exception as error:  # noqa: BLE001 - a bug of ours or the model's is a finding
        record.failed, record.cause = True, f"deploy failed: {one_line(error)}"
        return
    record.rung, record.cause = built.rung, built.cause
    _describe(built, record)
    try:
        served = _serve(model, built, record)
    except Exception as error:  # noqa: BLE001 - the same
        record.failed, record.cause = True, f"serving failed: {one_line(error)}"
        return
    record.served = dataclasses.asdict(served)
    record.exact = (
        served.wrong_tokens == 0
        and served.logprob_error <= EXACT_LOGPROBS
        and (record.logit_error or 0.0) <= EXACT_LOGITS
    )


def _serve(model: nn.Module, built: Built, record: Record) -> Served:
    try:
        reference = reference_logits(model)
    except NotCausalError:
        return serve(model, built.runner, causal=False)
    if built.program is not None:
        record.logit_error = SequenceCheck(reference).error(built.program)
    return serve(model, built.runner, reference.implementation)


def one_line(error: BaseException) -> str:
    """The error's type and message, short."""
    text = " ".join(str(error).split())
    prefix = "" if isinstance(error, AutodeployError) else f"{type(error).__name__}: "
    return f"{prefix}{text}"[:600]


def _describe(built: Built, record: Record) -> None:
    program = built.program
    if program is None:
        return
    attention: Counter[str] = Counter()
    recognised: Counter[str] = Counter()
    unrecognised: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = node.meta.get("op")
        if name is None:
            unrecognised.update(filter(None, [_plain_name(node)]))
            continue
        recognised[name] += 1
        if "attention" in name and OPS[name].mutates and "kimi" not in name:
            attention[attention_kind(name, node.args)] += 1
    record.recognised, record.unrecognised = dict(recognised), dict(unrecognised)
    record.own_code = dict(Counter(call.kind for call in program.module_calls))
    record.attention = [f"{count} {kind}" for kind, count in attention.items()]
    record.caches = [_cache_text(group) for group in program.contract.groups]


def attention_kind(name: str, args: Sequence[Any]) -> str:
    """What an attention node computes, in words."""
    bound = dict(zip(OPS[name].arguments, args, strict=False))
    words = ["latent"] if "latent" in name else []
    words += [f"{w} {bound[w]}" for w in ("window", "chunk") if bound.get(w)]
    if not any(bound.get(w) for w in ("window", "chunk")):
        words.append("full")
    extras = (("softcap", "soft-cap"), ("sinks", "sinks"), ("alibi_slopes", "ALiBi"))
    return " ".join(words + [word for argument, word in extras if bound.get(argument)])


# What every graph is made of: products with weights, arithmetic by element, and views.
_SIMPLE = re.compile(
    r"linear|embedding|mul|add|sub|div|neg|silu|gelu|relu|sigmoid|tanh|exp|pow|rsqrt|sqrt|mean|sum"
    r"|view|reshape|transpose|permute|unsqueeze|squeeze|slice|select|cat|split\w*|expand|_to_copy|to"
    r"|getitem|clone|index_select|index|where|eq|ne|ge|gt|le|lt|clamp\w*|full\w*|zeros\w*|ones\w*"
    r"|arange|new_\w+|sym_size\w*|layer_norm|cos|sin|chunk|stack|softplus|abs|reciprocal|rsub"
    r"|flatten|repeat|pad|constant_pad_nd|softmax|log|square|item|scalar_tensor|copy|floor_divide"
    r"|remainder|bitwise_\w+|logical_\w+|maximum|minimum|empty\w*|alias|unbind|t|mm|addmm|floordiv"
    r"|native_layer_norm|erf|slice_scatter|select_scatter|fill|lift_fresh_copy|detach|hardtanh|any"
)


def _plain_name(node: Any) -> str | None:
    target = node.target
    name = getattr(target, "__name__", str(target)).split(".")[0]
    return None if _SIMPLE.fullmatch(name) else name


def _cache_text(group: CacheGroup) -> str:
    unit = "token" if group.per == "token" else "sequence"
    window = f", window {group.window}" if group.window else ""
    return f"{len(group.members)} x {unit}: {group.bytes} B{window}"


def quiet() -> None:
    """Only what the record says is of interest."""
    warnings.simplefilter("ignore")
    logging.getLogger("autodeploy").setLevel(logging.CRITICAL)
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
