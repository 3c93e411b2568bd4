"""Sequence functions: models run the same through our ops, and are left as they were."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from autodeploy.custom_ops.op import op_of
from autodeploy.errors import CaptureError
from autodeploy.transforms.capture.boundaries import boundaries
from autodeploy.transforms.capture.interception import modeling_modules
from autodeploy.transforms.capture.sequence_functions import (
    ADAPTERS,
    REFUSED,
    sequence_functions,
)

VOCABULARY = 64
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ATTENTION = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
}
MAMBA = {"state_size": 4, "intermediate_size": 64, "time_step_rank": 4}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
STATE_ONLY: dict[str, dict[str, Any]] = {
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16},
}
HYBRID: dict[str, dict[str, Any]] = {
    "falcon_h1": {**ATTENTION, **MAMBA2, "head_dim": 8, "mamba_d_ssm": 64},
    "jamba": {
        **ATTENTION,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "qwen3_next": {
        **ATTENTION,
        **DELTA,
        **EXPERTS,
        **LINEAR_THEN_FULL,
        "head_dim": 8,
        "num_experts": 4,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_5_text": {**ATTENTION, **DELTA, **LINEAR_THEN_FULL, "head_dim": 8},
    "olmo_hybrid": {**ATTENTION, **DELTA, **LINEAR_THEN_FULL},
    "kimi_linear": {
        **ATTENTION,
        **EXPERTS,
        **LINEAR_THEN_FULL,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "mlp_layer_types": ["dense", "sparse"],
        "num_key_value_heads": 4,
        "num_local_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "q_lora_rank": None,
    },
    "lfm2": {**ATTENTION, "layer_types": ["conv", "full_attention"]},
    "bamba": {**ATTENTION, **MAMBA2, "attn_layer_indices": [1]},
    "nemotron_h": {
        **ATTENTION,
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "layers_block_type": ["mamba", "attention"],
    },
    "zamba": {
        **ATTENTION,
        "num_hidden_layers": 5,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "attention_head_dim": 16,
    },
    "zamba2": {
        **ATTENTION,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 2,
        "chunk_size": 16,
        "adapter_rank": 4,
    },
}
LENGTHS = (1, 21, 5, 1, 70)


class OpsSeen(TorchDispatchMode):
    """Names of our ops that run inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        op = op_of(function)
        if op is not None:
            self.names.add(op.name)
        return function(*args, **(kwargs or {}))


def build(name: str) -> nn.Module:
    """A tiny model with weights large enough that every part shows in the logits."""
    options = {**BASE, **(STATE_ONLY | HYBRID)[name]}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                gain = parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain)
    return model


def _tokens(length: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (1, length), generator=generator)


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0]


def _starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", STATE_ONLY)
def test_packed_sequences_equal_eager_one_by_one(name: str) -> None:
    model = build(name)
    ids = [_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = torch.cat([_logits(model, one) for one in ids])
    packed = torch.cat(ids, 1)
    with sequence_functions(model):
        with boundaries(_starts(LENGTHS)):
            found = _logits(model, packed)
        with boundaries(_starts((sum(LENGTHS),))):
            unbounded = _logits(model, packed)
    assert _difference(found, expected) < 1e-4
    assert _difference(unbounded, expected) > 1e-3  # the boundaries are what makes them equal


@pytest.mark.parametrize("name", [*STATE_ONLY, *HYBRID])
@pytest.mark.parametrize("length", [1, 77])
def test_one_sequence_equals_eager(name: str, length: int) -> None:
    model = build(name)
    ids = _tokens(length)
    expected = _logits(model, ids)
    seen = OpsSeen()
    with sequence_functions(model), boundaries(_starts((length,))), seen:
        found = _logits(model, ids)
    assert _difference(found, expected) < 1e-4
    present = {name for module in modeling_modules(model) for name in vars(module)}
    assert "causal_conv1d" in seen.names
    assert len(seen.names) >= (2 if present & (set(ADAPTERS) - {"causal_conv1d_fn"}) else 1)


def _snapshot() -> dict[tuple[str, str], Any]:
    """Every known function, in every module of transformers that is loaded."""
    return {
        (module, name): vars(sys.modules[module])[name]
        for module in list(sys.modules)
        if module.startswith("transformers.models")
        for name in (*ADAPTERS, *REFUSED)
        if name in vars(sys.modules[module])
    }


@pytest.fixture
def model() -> Iterator[nn.Module]:
    built = build("mamba2")
    before, attributes = _snapshot(), copy.copy(vars(built))
    yield built
    assert _snapshot() == before
    assert vars(built) == attributes


def test_modules_are_as_before_after_the_block(model: nn.Module) -> None:
    before = _snapshot()
    with sequence_functions(model):
        changed = {module for (module, _), f in _snapshot().items() if f != before[module, _]}
    assert changed == {type(model).__module__}
    assert _snapshot() == before


def test_modules_are_as_before_after_an_error(model: nn.Module) -> None:
    before = _snapshot()
    with pytest.raises(ZeroDivisionError), sequence_functions(model), sequence_functions(model):
        _ = 1 / 0
    assert _snapshot() == before


def test_a_cache_is_refused(model: nn.Module) -> None:
    with (
        sequence_functions(model),
        boundaries(_starts((4,))),
        pytest.raises(CaptureError, match=r"modeling_mamba2\.mamba2_chunk_scan .*final_states"),
    ):
        model(input_ids=_tokens(4), use_cache=True)


def test_the_fused_training_form_is_refused(model: nn.Module) -> None:
    model.train()
    with (
        sequence_functions(model),
        boundaries(_starts((4,))),
        pytest.raises(CaptureError, match=r"split_conv1d_scan_combined .*model\.eval\(\)"),
    ):
        _logits(model, _tokens(4))
    model.eval()


def test_a_batch_is_refused(model: nn.Module) -> None:
    with (
        sequence_functions(model),
        boundaries(_starts((4,))),
        pytest.raises(CaptureError, match=r"causal_conv1d_fn .*batch of 2"),
    ):
        _logits(model, _tokens(8).view(2, 4))


CONV = (torch.randn(1, 3, 5), torch.randn(3, 4))
SCAN = (torch.randn(1, 5, 2, 3), torch.rand(1, 5, 2), -torch.rand(2)) + 2 * (
    torch.randn(1, 5, 1, 4),
)
REFUSALS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "seq_idx": ("causal_conv1d_fn", CONV, {"seq_idx": torch.zeros(1, 5).int()}),
    "initial_states": (
        "mamba2_chunk_scan",
        (*SCAN, 16),
        {"initial_states": torch.zeros(1, 2, 3, 4)},
    ),
    "z": ("mamba2_chunk_scan", (*SCAN, 16), {"z": torch.zeros(1, 5, 2, 3)}),
    "novelty": ("causal_conv1d_fn", CONV, {"novelty": torch.zeros(1)}),
    "pair": ("causal_conv1d_fn", CONV, {"pair": (torch.zeros(1), None)}),
    "return_final_states": ("mamba2_chunk_scan", (*SCAN, 16), {"return_final_states": True}),
}


def test_a_state_asked_of_a_function_that_declares_none_is_refused(model: nn.Module) -> None:
    """transformers discards the flag; the kernels it stands for return a second value."""
    module = sys.modules[type(model).__module__]
    with (
        sequence_functions(model),
        boundaries(_starts((5,))),
        pytest.raises(CaptureError, match="'return_final_states'"),
    ):
        vars(module)["causal_conv1d_fn"](*CONV, return_final_states=True)


@pytest.mark.parametrize("argument", REFUSALS)
def test_an_argument_the_op_does_not_express_is_refused_by_name(
    model: nn.Module, argument: str
) -> None:
    name, args, kwargs = REFUSALS[argument]
    (module,) = [m for m in modeling_modules(model) if name in vars(m)]
    with (
        sequence_functions(model),
        boundaries(_starts((5,))),
        pytest.raises(CaptureError, match=rf"modeling_mamba2\.{name} .*'{argument}'"),
    ):
        vars(module)[name](*args, **kwargs)


def test_a_new_declared_argument_is_refused_unless_it_has_its_default(model: nn.Module) -> None:
    module = sys.modules[type(model).__module__]
    original = vars(module)["causal_conv1d_fn"]

    def newer(hidden_states: Tensor, weight: Tensor, dilation: int = 1, **kwargs: Any) -> Tensor:
        raise AssertionError("the original must not run")

    module.causal_conv1d_fn = newer  # type: ignore[attr-defined]
    try:
        with sequence_functions(model), boundaries(_starts((5,))):
            intercepted = vars(module)["causal_conv1d_fn"]
            assert intercepted(*CONV, use_cache=False).shape == CONV[0].shape
            with pytest.raises(CaptureError, match="'dilation'"):
                intercepted(*CONV, 2)
    finally:
        module.causal_conv1d_fn = original  # type: ignore[attr-defined]


def test_an_activation_the_op_does_not_know_is_refused(model: nn.Module) -> None:
    module = sys.modules[type(model).__module__]
    with (
        sequence_functions(model),
        boundaries(_starts((5,))),
        pytest.raises(CaptureError, match="activation 'mish'"),
    ):
        vars(module)["causal_conv1d_fn"](*CONV, activation="mish")


@pytest.mark.parametrize("name", [*STATE_ONLY, *HYBRID])
def test_every_adapter_knows_the_arguments_transformers_declares(name: str) -> None:
    """A new argument in a newer transformers must be looked at, not met in production."""
    for module in modeling_modules(build(name)):
        for function in ADAPTERS:
            if function in vars(module):
                adapter = ADAPTERS[function]
                parameters = inspect.signature(vars(module)[function]).parameters.values()
                declared = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
                assert declared <= {*adapter.expressed, *adapter.absent, *adapter.ignored}


class Packed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, cu_q: Tensor) -> Tensor:
        with boundaries(cu_q):
            return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("name", STATE_ONLY)
def test_an_exported_graph_holds_the_ops_and_is_right_at_other_sizes(name: str) -> None:
    model = build(name)
    tokens, sequences = torch.export.Dim("tokens", min=1, max=4096), torch.export.Dim("b", max=64)
    with sequence_functions(model), torch.no_grad():
        exported = torch.export.export(
            Packed(model),
            (_tokens(12), _starts((5, 7))),
            dynamic_shapes=({1: tokens}, {0: sequences}),
        )
    names = [op.name for n in exported.graph.nodes if (op := op_of(n.target)) is not None]
    assert sorted(names) == sorted(2 * sorted(set(names)))
    ids = [_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = torch.cat([_logits(model, one) for one in ids])
    with torch.no_grad():
        found = exported.module()(torch.cat(ids, 1), _starts(LENGTHS))[0]
    assert _difference(found, expected) < 1e-4
