"""Loops over experts in a model's own code: one node where evaluation proves it, else untouched."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from torch import nn
from transformers import CONFIG_MAPPING, LlamaForCausalLM

from autodeploy.custom_ops.op import op_of
from autodeploy.errors import CaptureError
from autodeploy.transforms.capture.export import capture
from autodeploy.transforms.program import Program
from autodeploy.transforms.verify import SequenceCheck, reference_logits
from autodeploy.zoo.measure import randomise, tiny_model

HIDDEN, INNER, EXPERTS = 64, 24, 5


class Expert(nn.Module):
    """A gated MLP of nn.Linear."""

    def __init__(self, inner: int = INNER, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, inner, bias=bias)
        self.w2 = nn.Linear(inner, HIDDEN, bias=bias)
        self.w3 = nn.Linear(HIDDEN, inner, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class ListOfExperts(nn.Module):
    """Softmax over all experts, the two largest renormalised, a loop over the experts hit."""

    def __init__(self, experts: list[nn.Module], numbered: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)
        self.top_k = 2
        self.numbered = numbered

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        weights, index = self.gate(flat).softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(index == number)
            result = expert(flat[token]) * weights[token, choice, None]
            last = self.numbered and number == len(self.experts) - 1
            out.index_add_(0, token, result * 1.01 if last else result)
        return out.view(hidden_states.shape)


class SeparateStacks(nn.Module):
    """Gate, up and down in stacks of their own, transposed; every expert sees every token."""

    def __init__(self, numbered: bool = False) -> None:
        super().__init__()
        self.numbered = numbered
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, INNER))
        self.gate = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, INNER))
        self.down = nn.Parameter(torch.zeros(EXPERTS, INNER, HIDDEN))
        self.k = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top, index = self.router(x).sigmoid().topk(self.k, dim=-1)
        dense = torch.zeros_like(x[..., :EXPERTS]).scatter(-1, index, top)
        if self.numbered:
            dense = dense * (1 + torch.arange(EXPERTS) / 100)
        inner = nn.functional.gelu(torch.einsum("bth,ehi->beti", x, self.gate))
        inner = inner * torch.einsum("bth,ehi->beti", x, self.up)
        return torch.einsum("beti,eih,bte->bth", inner, self.down, dense)


def model_with(make: Any) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config("llama"))
    for layer in model.model.layers:
        layer.mlp = make()
    randomise(model)
    return model.float().eval()


def experts_nodes(program: Program) -> list[Any]:
    nodes = program.graph.nodes
    return [n for n in nodes if (op := op_of(n.target)) is not None and op.name == "experts"]


def assert_recognised(model: nn.Module, layers: int) -> Program:
    program = capture(model)
    assert len(experts_nodes(program)) == layers
    assert SequenceCheck(reference_logits(model)).error(program) < 1e-4
    return program


@pytest.mark.parametrize("name", ["dbrx", "longcat_flash", "aria_text", "jetmoe"])
def test_a_loop_in_a_models_own_code_becomes_one_node(name: str) -> None:
    model = tiny_model(CONFIG_MAPPING[name]())
    assert_recognised(model, 2)


@pytest.mark.parametrize("bias", [False, True])
def test_a_list_of_modules_becomes_one_node(bias: bool) -> None:
    model = model_with(lambda: ListOfExperts([Expert(bias=bias) for _ in range(EXPERTS)]))
    assert_recognised(model, 2)


def test_members_without_weights_give_back_what_they_are_given() -> None:
    def make() -> nn.Module:
        return ListOfExperts([*(Expert() for _ in range(EXPERTS)), nn.Identity(), nn.Identity()])

    assert_recognised(model_with(make), 2)


def test_stacks_of_their_own_are_joined_when_they_are_loaded() -> None:
    program = assert_recognised(model_with(SeparateStacks), 2)
    for node in experts_nodes(program):
        stacked = node.args[3]
        assert stacked.op == "get_attr"
        weight = program.weights[stacked.target]
        assert [piece.rsplit(".", 1)[1] for piece in weight.pieces] == ["gate", "up"]
        assert weight.shape == (EXPERTS, HIDDEN, 2 * INNER)
        assert program.read_weight(stacked.target).shape == weight.shape


def test_joined_members_are_checkpoint_tensors_and_cost_no_copy_at_a_step() -> None:
    model = model_with(lambda: ListOfExperts([Expert() for _ in range(EXPERTS)]))
    program = capture(model)
    reads_weights = [
        n
        for n in program.graph.nodes
        if n.op == "call_function" and all(source.op == "get_attr" for source in n.all_input_nodes)
    ]
    assert {str(n.target) for n in reads_weights} <= {"aten.view.default", "aten.unsqueeze.default"}
    names = set(model.state_dict())
    joined = [w for w in program.weights.values() if len(w.pieces) > 1]
    assert len(joined) == 4
    assert all(piece in names for weight in joined for piece in weight.pieces)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ListOfExperts([Expert(INNER + 8 * (i == 2)) for i in range(EXPERTS)]),
        lambda: ListOfExperts([Expert() for _ in range(EXPERTS)], numbered=True),
        lambda: SeparateStacks(numbered=True),
    ],
    ids=["one is wider", "the last is scaled", "scaled by their numbers"],
)
def test_experts_that_are_not_alike_are_left_alone(make: Any) -> None:
    # torch 2.11 cannot trace every such loop as it stands.
    with contextlib.suppress(CaptureError):
        assert_recognised(model_with(make), 0)


def test_the_model_is_as_before() -> None:
    model = model_with(lambda: ListOfExperts([Expert() for _ in range(EXPERTS)]))
    before = {name: vars(part).copy() for name, part in model.named_modules()}
    capture(model)
    after = {name: vars(part) for name, part in model.named_modules()}
    assert {n: set(v) for n, v in before.items()} == {n: set(v) for n, v in after.items()}
    assert not any("forward" in values for values in after.values())
