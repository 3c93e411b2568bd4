"""Capturing leaves the user's model and every registry as they were, also after an error."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import masking_utils
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autodeploy.errors import CaptureError
from autodeploy.transforms.capture.attention import configs_of
from autodeploy.transforms.capture.export import capture
from autodeploy.transforms.capture.interception import interception, modeling_modules

REGISTRIES = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, ALL_EXPERTS_FUNCTIONS)


def functions_of(module) -> dict[str, int]:
    return {name: id(value) for name, value in vars(module).items() if callable(value)}


def state_of(model: nn.Module) -> dict:
    """Everything capture could leave a trace on."""
    return {
        "config": [dict(vars(c)) for c in configs_of(model)],
        "modules": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "training": {name: m.training for name, m in model.named_modules()},
        "weights": {
            name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()
        },
        "functions": {m.__name__: functions_of(m) for m in modeling_modules(model)},
        "masking": functions_of(masking_utils),
        "registries": [dict(registry._global_mapping) for registry in REGISTRIES],
        "grad": torch.is_grad_enabled(),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_next"])
def test_capture_restores_everything(name):
    model = tiny_model(name).train()
    before = state_of(model)
    capture(model)
    assert state_of(model) == before


def test_capture_restores_everything_after_an_error():
    model = tiny_model("llama")
    broken = model.model.layers[1].mlp

    def fail(x):
        raise ValueError("a layer that cannot run")

    broken.forward = fail
    before = state_of(model)
    with pytest.raises(CaptureError, match="a layer that cannot run"):
        capture(model)
    assert state_of(model) == before
    del broken.forward
    capture(model)


def test_changes_are_undone_in_reverse_order():
    target = nn.Linear(2, 2)
    table = {"kept": 1}
    with interception() as scope:
        scope.set_attribute(target, "note", 1)
        scope.set_attribute(target, "note", 2)
        scope.set_attribute(target, "training", False)
        scope.set_item(table, "kept", 3)
        scope.set_item(table, "added", 4)
        assert (target.note, target.training, table) == (2, False, {"kept": 3, "added": 4})
    assert not hasattr(target, "note")
    assert target.training
    assert table == {"kept": 1}


def test_state_a_model_keeps_on_itself_while_it_runs_is_not_left_behind():
    model = tiny_model("llama")
    layer = model.model.layers[0]

    def remember(module, args, output):
        module.last_seen = output

    handle = layer.register_forward_hook(remember)
    capture(model)
    assert not hasattr(layer, "last_seen")
    handle.remove()
