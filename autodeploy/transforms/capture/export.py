"""From a live model to a Program: one packed graph, with the hooks of this folder in place.

The graph takes `input_ids[1, T]`, `position_ids[1, T]`, `cu_q[B + 1]` and `logit_index[N]`, all
dynamic from 1 up, and returns logits [N, vocab]; models whose keys depend on the prompt's length
take `known_len[1, T]` besides. Nothing of the model is copied, so a model on
the meta device or under FakeTensorMode captures just as well. A graph that carries any guard
beyond equal input sizes is refused: such a graph is right at one length and wrong at another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import UserError
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind

from autodeploy.custom_ops.contract import METADATA, Contract, LengthRule

from ...errors import CaptureError, UnsupportedModelError
from ..program import Fact, Program, Weight, WeightSource
from .attention import intercept_attention
from .boundaries import boundaries
from .cache_marker import MarkerCache
from .expert_loops import intercept_expert_loops
from .experts import intercept_experts
from .functional import functional
from .guards import LEAST_LIMIT, most_tokens
from .interception import Interception, interception
from .joined_weights import join_weights
from .length_rule import length_rule
from .norms import intercept_norms
from .own_attention import recognise_attention
from .own_modules import OwnModule, intercept_own_modules
from .position_counts import use_position_ids
from .positions import max_positions
from .rope_lengths import intercept_lengths, length_rotaries
from .rotary import intercept_rotary
from .sequence_functions import intercept_sequence_functions
from .widen import widen

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
    positions: bool = True
    """Give the model `position_ids`, if it takes any, rather than have it count its own."""
    configured: bool = False
    """Take the place of the attention the config names, rather than name one of our own: for code
    that asks its config which attention it is to compute."""
    cache_marker: bool = False
    """Leave a `cache_mark` node where each attention layer would update the model's own cache."""
    own_modules: Mapping[str, OwnModule] = field(default_factory=dict)
    """Parts that become one node each, which calls their own code."""


class Packed(nn.Module):
    """A model as a function of packed tokens and their boundaries."""

    def __init__(self, model: nn.Module, options: CaptureOptions) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.accepted = frozenset(inspect.signature(model.forward).parameters)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_q: torch.Tensor,
        logit_index: torch.Tensor,
        known_len: torch.Tensor | None = None,
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if self.options.cache_marker:
            arguments |= {"use_cache": True, "past_key_values": MarkerCache()}
        if self.options.positions and "position_ids" in self.accepted:
            arguments["position_ids"] = position_ids
        if "logits_to_keep" in self.accepted:
            arguments["logits_to_keep"] = logit_index
        with boundaries(cu_q, known_len):
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
    rule = length_rule(model, length_rotaries(model))
    with warnings.catch_warnings():
        # torch's own pytree warns about itself, and about state that is put back on exit.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
        longest = max_positions(model)
        with captured_state(model, options) as scope:
            calls = intercept_own_modules(scope, model, options.own_modules)
            exported, bounded = _export(Packed(model, options), rule is not None, longest)
        limit = most_tokens(exported, min(LEAST_LIMIT, longest or LEAST_LIMIT))
        program = _to_program(functional(exported), model, owned, rule)
        join_weights(program)
        recognise_attention(program)
        use_position_ids(program)
        if bounded:
            widen(program, MAX_TOKENS)
            limit = None
    program.module_calls = calls
    program.contract = dataclasses.replace(program.contract, max_tokens=limit)
    return program


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
        intercept_attention(scope, model, options.configured)
        intercept_sequence_functions(scope, model)
        intercept_lengths(scope, length_rotaries(model))
        if options.experts:
            intercept_experts(scope, model)
            intercept_expert_loops(scope, model)
        if options.norms:
            intercept_norms(scope, model)
        if options.rotary:
            intercept_rotary(scope, model)
        for module in training:
            scope.set_attribute(module, "training", False)
        yield scope


def _export(
    packed: Packed, takes_lengths: bool, longest: int | None
) -> tuple[ExportedProgram, bool]:
    """The exported graph, and whether it holds only for lengths within the model's `longest`."""
    parameters = list(packed.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    count = 2 * _SAMPLE_SEQUENCES
    sample: tuple[torch.Tensor, ...] = (
        torch.zeros(1, count, dtype=torch.int64, device=device),
        torch.arange(2, device=device).repeat(_SAMPLE_SEQUENCES)[None],
        torch.arange(0, count + 1, 2, dtype=torch.int32, device=device),
        torch.arange(_SAMPLE_ROWS, device=device),
    )
    if takes_lengths:
        sample = (*sample, torch.full_like(sample[1], 2))

    def attempt(shapes: tuple[dict[int, Any], ...]) -> ExportedProgram:
        return export(packed, sample, dynamic_shapes=shapes, strict=False)

    try:
        return _first_that_holds(attempt, takes_lengths, longest)
    except CaptureError as error:
        raise type(error)(f"{error}{_place(error)}") from error
    except Exception as error:
        raise CaptureError(f"export failed: {_first_lines(error)}{_place(error)}") from error


def _first_that_holds(
    attempt: Callable[[tuple[dict[int, Any], ...]], ExportedProgram],
    takes_lengths: bool,
    longest: int | None,
) -> tuple[ExportedProgram, bool]:
    """For every length; else for those within the model's table; else as far as guards say."""
    try:
        return attempt(_shapes(takes_lengths, 1, MAX_TOKENS)), False
    except UserError as error:
        if "specialized it to be a constant" in str(error):
            raise
        if _names_bound(str(error)) and longest and longest > 2 * _SAMPLE_SEQUENCES + 1:
            with contextlib.suppress(UserError):
                return attempt(_shapes(takes_lengths, 2, longest - 1)), True
        # A guard that holds for every length may still be more than torch can prove.
        return attempt(_shapes(takes_lengths, None, None)), False


def _names_bound(message: str) -> bool:
    """Whether a refusal of torch speaks of a length beyond the sample's: the end of some table."""
    numbers = {int(number) for number in re.findall(r"\d+", message.split("Suggested")[0])}
    return "specified range" in message and any(
        2 * _SAMPLE_SEQUENCES < number < MAX_TOKENS for number in numbers
    )


def _shapes(
    takes_lengths: bool, shortest: int | None, longest: int | None
) -> tuple[dict[int, Any], ...]:
    """Which sizes are dynamic; torch has to prove that the graph holds from shortest to longest."""
    if shortest is None:
        tokens = sequences = rows = Dim.DYNAMIC
    else:
        tokens = Dim("tokens", min=shortest, max=longest)
        sequences = Dim("sequences_plus_one", min=2, max=MAX_TOKENS)
        rows = Dim("rows", min=1, max=MAX_TOKENS)
    shapes: tuple[dict[int, Any], ...] = ({1: tokens}, {1: tokens}, {0: sequences}, {0: rows})
    return (*shapes, {1: tokens}) if takes_lengths else shapes


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


def _to_program(
    exported: ExportedProgram, model: nn.Module, owned: bool, lengths: LengthRule | None
) -> Program:
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
        lengths=lengths,
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
