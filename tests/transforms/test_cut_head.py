"""cut_head: the program returns what the head would have read."""

import pytest
import torch
from test_library import Small, logits, program_of
from tiny_models import tiny_model

from autodeploy.errors import TransformError
from autodeploy.transforms.pipeline import run_step
from autodeploy.transforms.recipe import Step
from autodeploy.transforms.transform import TRANSFORMS

aten = torch.ops.aten
CUT = Step("cut_head", TRANSFORMS["cut_head"](), expect=1)


def states(model, ids):
    with torch.no_grad():
        return model.base_model(ids).last_hidden_state[0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2"])
@pytest.mark.parametrize("length", [3, 11])
def test_hidden_states_are_the_models_own(name, length):
    model = tiny_model(name)
    program = program_of(model, "canonicalize", "gather_logits")
    assert run_step(program, CUT).matches == 1
    found = logits(program, length)
    ids = torch.randint(3, 256, (1, length), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, states(model, ids), rtol=1e-4, atol=1e-4)
    assert program.contract.hidden == program.contract.width == 64
    assert program.contract.vocab_size == 256


def test_the_heads_weight_is_not_read_any_more():
    program = program_of(tiny_model("llama", tie_word_embeddings=False), "canonicalize")
    before = len(program.weights)
    run_step(program, CUT)
    assert len(program.weights) == before - 1


def test_rows_are_chosen_before_they_are_returned():
    program = program_of(Small(lambda self, x: x + 1), "canonicalize", "gather_logits")
    run_step(program, CUT)
    assert logits(program, 6, 2).shape == (8, 64)
    assert not any(n.target == aten.linear.default for n in program.graph.nodes)


def test_a_head_whose_rows_depend_on_each_other_is_refused():
    model = Small(lambda self, x: x)
    plain = model.base.lm_head.forward
    model.base.lm_head.forward = lambda x: plain(x) - plain(x).mean(1, keepdim=True)
    program = program_of(model, "canonicalize", "gather_logits")
    with pytest.raises(TransformError, match="expects 1 sites and found 0"):
        run_step(program, CUT)
