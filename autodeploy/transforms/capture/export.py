"""From a live model to a Program: one packed graph, with the hooks of this folder in place.

The graph takes `input_ids[1, T]`, `position_ids[1, T]`, `cu_q[B + 1]` and `logit_index[N]`, all
dynamic from 1 up, and returns logits [N, vocab]. Nothing of the model is copied, so a model on
the meta device or under FakeTensorMode captures just as well. A graph that carries any guard
beyond equal input sizes is refused: such a graph is right at one length and wrong at another.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind

from autodeploy.custom_ops.contract import METADATA, Contract

from ...errors import CaptureError, UnsupportedModelError
from ..program import Fact, Program, Weight, WeightSource
from .attention import intercept_attention
from .boundaries import boundaries
from .cache_marker import MarkerCache
from .experts import intercept_experts
from .interception import Interception, interception
from .norms import intercept_norms
from .rotary import intercept_rotary
from .sequence_functions import intercept_sequence_functions

MAX_TOKENS = 1 << 20
# 37 sequences of 2 tokens, 41 of which want logits: no two sizes alike (see library/cache.py).
_SAMPLE_SEQUENCES = 37
_SAMPLE_ROWS = 41
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptureOptions:
    """Which hooks are in place during capture. Attention cannot be left out."""

    norms: bool = True
    rotary: bool = True
    experts: bool = True
    cache_marker: bool = False
    """Leave a `cache_mark` node where each attention layer would update the model's own cache."""


class Packed(nn.Module):
    """A model as a function of packed tokens and their boundaries."""

    def __init__(self, model: nn.Module, cache_marker: bool = False) -> None:
        super().__init__()
        self.model = model
        self.cache_marker = cache_marker
        self.accepted = frozenset(inspect.signature(model.forward).parameters)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_q: torch.Tensor,
        logit_index: torch.Tensor,
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if self.cache_marker:
            arguments |= {"use_cache": True, "past_key_values": MarkerCache()}
        if "position_ids" in self.accepted:
            arguments["position_ids"] = position_ids
        if "logits_to_keep" in self.accepted:
            arguments["logits_to_keep"] = logit_index
        with boundaries(cu_q):
            logits = self.model(**arguments).logits.squeeze(0)
        return logits if "logits_to_keep" in self.accepted else logits.index_select(0, logit_index)


def capture(
    model: nn.Module, options: CaptureOptions | None = None, *, owned: bool = False
) -> Program:
    """Captures `model` as one functional graph over packed tokens.

    The model, its config and every registry are as before when this returns or raises.
    owned: the caller gives the model up, so weights may be released once they are read.

    Raises:
        UnsupportedModelError: it is no autoregressive model over `input_ids`.
        CaptureError: it cannot be captured exactly; the message names the cause.
    """
    check_causal(model)
    options = options or CaptureOptions()
    with warnings.catch_warnings():
        # torch's own pytree warns about itself, and about state that is put back on exit.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
        with captured_state(model, options):
            exported = _export(Packed(model, options.cache_marker))
        _check_guards(exported)
        return _to_program(exported.run_decompositions({}), model, owned)


def check_causal(model: nn.Module) -> None:
    """Raises UnsupportedModelError unless `model` generates text from `input_ids` alone."""
    config = getattr(model, "config", None)
    name = type(model).__name__
    if config is None or not callable(getattr(model, "get_output_embeddings", None)):
        raise UnsupportedModelError(
            f"{name} is no transformers language model; load it with AutoModelForCausalLM"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: it needs an encoder input beside input_ids; "
            "deploy takes decoder-only models"
        )
    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        raise UnsupportedModelError(
            f"{name} cannot generate (it has no causal language-model head); "
            "load the checkpoint with AutoModelForCausalLM"
        )
    # BERT-likes carry a causal head whose config says whether it is one.
    if getattr(config, "is_decoder", None) is False and _attends_both_ways(model):
        raise UnsupportedModelError(
            f"{name} is an encoder: its config has is_decoder=False, so tokens see later ones; "
            "set is_decoder=True only if the weights were trained causally"
        )


def _attends_both_ways(model: nn.Module) -> bool:
    flags = [getattr(m, "is_decoder", None) for m in model.modules() if m is not model]
    return any(flag is False for flag in flags)


@contextlib.contextmanager
def captured_state(model: nn.Module, options: CaptureOptions) -> Iterator[Interception]:
    """All hooks in place and the model in eval mode; everything undone on exit."""
    training = [m for m in model.modules() if m.training]
    with interception() as scope, torch.no_grad():
        # Some models keep state on themselves while they run: under export, fake tensors.
        for module in model.modules():
            scope.keep_attributes(module)
        intercept_attention(scope, model)
        intercept_sequence_functions(scope, model)
        if options.experts:
            intercept_experts(scope, model)
        if options.norms:
            intercept_norms(scope, model)
        if options.rotary:
            intercept_rotary(scope, model)
        for module in training:
            scope.set_attribute(module, "training", False)
        yield scope


def _export(packed: Packed) -> ExportedProgram:
    parameters = list(packed.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    count = 2 * _SAMPLE_SEQUENCES
    sample = (
        torch.zeros(1, count, dtype=torch.int64, device=device),
        torch.arange(2, device=device).repeat(_SAMPLE_SEQUENCES)[None],
        torch.arange(0, count + 1, 2, dtype=torch.int32, device=device),
        torch.arange(_SAMPLE_ROWS, device=device),
    )
    tokens = Dim("tokens", min=1, max=MAX_TOKENS)
    shapes = (
        {1: tokens},
        {1: tokens},
        {0: Dim("sequences_plus_one", min=2, max=MAX_TOKENS)},
        {0: Dim("rows", min=1, max=MAX_TOKENS)},
    )
    try:
        return export(packed, sample, dynamic_shapes=shapes, strict=False)
    except CaptureError as error:
        raise CaptureError(f"{error}{_place(error)}") from error
    except Exception as error:
        raise CaptureError(f"export failed: {_first_lines(error)}{_place(error)}") from error


def _first_lines(error: BaseException) -> str:
    """The start of a message; torch puts the violated constraint a few lines down."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if "For more information" not in line][:2]
    return f"{type(error).__name__}: {' '.join(lines)[:400] or 'no message'}"


def _place(error: BaseException) -> str:
    """The innermost line of the model's own code in a traceback."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "modeling_" in file or not re.search(r"/(torch|transformers|autodeploy)/", file):
            place = f" (at {file.rsplit('/', 1)[-1]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place


# A guard that only says two inputs have the same number of tokens, or that the batch is 1.
_HARMLESS = re.compile(r"^L\['[\w.\[\]']+.*\.size\(\)\[\d+\] == .*$")


def _check_guards(exported: ExportedProgram) -> None:
    guards = getattr(exported, "_guards_code", None)
    if guards is None:
        raise CaptureError(
            "this torch keeps no `_guards_code`, so the exported graph's shape guards cannot be "
            "read; use torch 2.11 to 2.13"
        )
    bad = [guard for guard in guards if not _equates_sizes(guard)]
    if bad:
        raise CaptureError(
            f"the exported graph holds only for some lengths: {bad[0]}"
            + (f" (and {len(bad) - 1} more guards)" if len(bad) > 1 else "")
        )


def _equates_sizes(guard: str) -> bool:
    sides = guard.split(" == ")
    size = re.compile(r"^\w+(\[[^\]]+\]|\.\w+)*\.(size\(\)|shape)\[\d+\]$")
    return len(sides) == 2 and all(size.match(s.strip()) or s.strip() == "1" for s in sides)


def _to_program(exported: ExportedProgram, model: nn.Module, owned: bool) -> Program:
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, Weight] = {}
    graph = exported.graph_module.graph
    module = fx.GraphModule(nn.Module(), fx.Graph())
    fake_mode = None
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    copied: dict[fx.Node, fx.Node] = {}
    result = module.graph
    for node in graph.nodes:
        if node.op == "placeholder":
            fake_mode = fake_mode or node.meta["val"].fake_mode
            spec = kinds[node.name]
            if spec.kind is InputKind.USER_INPUT:
                copied[node] = result.node_copy(node)
                continue
            name = spec.target.removeprefix("model.")
            value = (
                exported.constants[spec.target]
                if spec.target in exported.constants
                else exported.state_dict[spec.target]
            )
            attribute = re.sub(r"\W", "_", name)
            tensors[name] = value.detach()
            weights[attribute] = Weight((name,), tuple(value.shape), value.dtype)
            module.register_buffer(attribute, node.meta["val"])
            copied[node] = result.get_attr(attribute)
            copied[node].meta.update(node.meta)
        elif node.op == "output":
            result.output(copied[node.args[0][0]])
        else:
            copied[node] = result.node_copy(node, lambda n: copied[n])
    _order_inputs(result)
    first = next((w for w in tensors.values() if w.is_floating_point()), None)
    if first is None or fake_mode is None:
        raise CaptureError("the model has no floating-point weights")
    contract = Contract(
        metadata=(),
        groups=(),
        vocab_size=int(_output_of(result).meta["val"].shape[-1]),
        max_positions=max_positions(model),
        device=first.device,
        dtype=first.dtype,
    )
    module.recompile()
    return Program(
        module,
        weights,
        WeightSource(tensors, owned, derived=frozenset(tensors) - set(model.state_dict())),
        contract,
        {Fact.FUNCTIONAL, Fact.LAZY_WEIGHTS},
        fake_mode,
    )


def _output_of(graph: fx.Graph) -> fx.Node:
    node = next(n for n in graph.nodes if n.op == "output").args[0]
    if not isinstance(node, fx.Node):
        raise CaptureError("the exported graph does not return one tensor")
    return node


def _order_inputs(graph: fx.Graph) -> None:
    """Inputs first, then weights, in their order: what a reader of a dump expects."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for node in reversed(inputs):
        if node.name not in METADATA:
            raise CaptureError(f"the exported graph has an unknown input '{node.name}'")
        graph._root.append(node)


def max_positions(model: nn.Module) -> int | None:
    """Longest sequence the model's config states, if it states one."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
