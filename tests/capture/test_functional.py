"""A graph made functional node by node is the one that a second trace gives."""

from collections import Counter

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from torch.export import Dim, export

from autodeploy.transforms.capture import export as capturing
from autodeploy.transforms.capture.functional import functional


def exported(function, *shapes):
    class Function(nn.Module):
        def forward(self, *arguments):
            return function(*arguments)

    arguments = tuple(torch.randn(shape) for shape in shapes)
    tokens = Dim("tokens", min=2, max=1024)
    return export(Function(), arguments, dynamic_shapes=(tuple({0: tokens} for _ in shapes),))


def calls(program):
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


def in_place_on_own(x):
    y = torch.sigmoid(x)
    y += 1
    top = y.topk(2).values
    top /= top.sum(-1, keepdim=True)
    return top, y * 2


def reshaped(x):
    return x.transpose(0, 1).reshape(-1), x.reshape(-1, 2, 3).to(torch.float64).contiguous()


def into_a_view(x):
    y = x + 1
    y[:, 0] = 5
    return y * 2


def read_before(x):
    y = x + 1
    view = y.view(-1)
    y.mul_(3)
    return view + 1


def twice(x):
    y = x + 1
    z = y.mul_(2)
    z.add_(1)
    return y + z


def of_the_input(x):
    y = x.view(-1)
    y.add_(1)
    return y * 2


@pytest.mark.parametrize(
    "function", [in_place_on_own, reshaped, into_a_view, read_before, twice, of_the_input]
)
@pytest.mark.parametrize("tokens", [4, 9])
def test_writes_and_views_give_the_same_numbers(function, tokens):
    program = functional(exported(function, (7, 6)))
    mutable = [n for n in program.graph.nodes if getattr(n.target, "_schema", None)]
    assert not any(n.target._schema.is_mutable for n in mutable if n.target._opname != "copy_")
    x = torch.randn(tokens, 6)
    found, expected = program.module()(x.clone()), function(x.clone())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3_text", "qwen3", "phi3"])
def test_a_model_has_the_ops_that_a_second_trace_gives(name, monkeypatch):
    traced = []

    def both(program):
        traced.append(calls(program.run_decompositions({})))
        result = functional(program)
        traced.append(calls(result))
        # Without a second trace, it is the same object.
        assert result is program
        return result

    monkeypatch.setattr(capturing, "functional", both)
    capturing.capture(tiny_model(name))
    assert traced[0] == traced[1]
