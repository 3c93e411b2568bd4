"""fuse_rotary_attention and fuse_rotary_table rewrite, spare near misses, hold at other sizes."""

import pytest
import torch
from test_library import Small, count, logits, op_names, program_of
from tiny_models import tiny_model
from torch import nn

from autodeploy.custom_ops import gpu
from autodeploy.transforms.capture.export import capture
from autodeploy.transforms.pipeline import run_recipe, run_step
from autodeploy.transforms.recipe import Step, load_recipe
from autodeploy.transforms.transform import TRANSFORMS
from autodeploy.transforms.verify import SequenceCheck, reference_logits

aten = torch.ops.aten
ON_CPU = {"devices": ("cpu",)}
RECIPE = load_recipe(
    "default", {"fuse_rotary_table": ON_CPU, "fuse_rotary_attention": ON_CPU}
)  # fmt: skip


def deployed(model, recipe=RECIPE):
    """The program, checked after every step in prefill and decode, and matches of each step."""
    program = capture(model)
    report = run_recipe(program, recipe, check=SequenceCheck(reference_logits(model)))
    return program, {step.id: step.matches for step in report.steps}


def chosen_ops(program):
    return [n.meta["op"] for n in program.graph.nodes if "op" in n.meta]


@pytest.mark.parametrize(
    ("name", "changes", "tables"),
    [
        ("llama", {"num_key_value_heads": 1}, 1),
        ("qwen3", {}, 1),
        ("phi3", {}, 1),
        ("gemma3_text", {}, 2),
        ("glm", {}, 1),
        ("gpt_neox", {}, 1),
        # Half a table, and a table that stays in float32.
        ("gpt_oss", {}, 1),
        ("olmo3", {}, 1),
    ],
)
def test_every_layer_reads_its_heads_as_the_projection_gives_them(name, changes, tables):
    model = tiny_model(name, **changes)
    program, matches = deployed(model)
    layers = model.config.num_hidden_layers
    assert matches["fuse_rotary_attention"] == layers
    assert matches["fuse_rotary_table"] == tables
    ops = chosen_ops(program)
    assert ops.count("rotary_paged_attention") == layers
    assert not {"rope", "paged_attention"} & set(ops)
    assert count(program, aten.cos.default) == 0
    # Norms of heads are gone, norms of rows are not.
    norms = [n for n in program.graph.nodes if n.meta.get("op") == "rms_norm"]
    assert all(n.meta["val"].dim() == 3 for n in norms)
    for node in program.graph.nodes:
        if node.meta.get("op") == "rotary_paged_attention":
            for heads in node.args[:3]:
                assert heads.target in (aten.squeeze.dim, aten.permute.default)


def test_norms_over_all_heads_stay_outside():
    model = tiny_model("olmo2")
    program, matches = deployed(model)
    assert matches["fuse_rotary_attention"] == model.config.num_hidden_layers
    fused = [n for n in program.graph.nodes if n.meta.get("op") == "rotary_paged_attention"]
    assert all(n.args[20] is None and n.args[21] is None for n in fused)
    # Two of queries and keys, two of rows, a layer; one at the end.
    assert chosen_ops(program).count("rms_norm") == 4 * model.config.num_hidden_layers + 1


def test_positions_that_models_add_or_slope_are_spared():
    for name in ("gpt2", "bloom"):
        _, matches = deployed(tiny_model(name))
        assert matches["fuse_rotary_attention"] == matches["fuse_rotary_table"] == 0


def test_a_rotation_that_something_else_reads_is_spared():
    def program_with(reader):
        program = program_of(tiny_model("llama"), "canonicalize", "cache")
        turn = next(n for n in program.graph.nodes if reader(n))
        output = program.graph.output_node()
        shown = program.call(aten.sum.default, turn, before=output, like=turn)
        total = program.call(aten.add.Tensor, output.args[0], shown, before=output, like=turn)
        output.replace_input_with(output.args[0], total)
        return program

    def turned(index):
        return lambda n: n.args[1:] == (index,) and op_names_of(n.args[0]) == "rope"

    def op_names_of(node):
        return str(node.target).split(".")[1] if node.op == "call_function" else ""

    for index in range(2):
        program = program_with(turned(index))
        step = Step("f", TRANSFORMS["fuse_rotary_attention"](**ON_CPU))
        # The other of two layers is rewritten.
        assert run_step(program, step).matches == 1


def test_other_devices_are_spared_unless_asked_for():
    program = program_of(tiny_model("llama"), "canonicalize", "cache")
    for name in ("fuse_rotary_attention", "fuse_rotary_table"):
        assert run_step(program, Step(name, TRANSFORMS[name]())).matches == 0


class Table(nn.Module):
    """What a model adds to its hidden states: cosines and sines of positions."""

    def __init__(self, variant):
        super().__init__()
        self.variant = variant
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(16) / 16))

    def forward(self, x, position_ids):
        frequencies = self.inv_freq[None, :, None].float()
        angles = (frequencies @ position_ids[:, None, :].float()).transpose(1, 2)
        if self.variant == "pairs":
            both = angles.repeat_interleave(2, dim=-1)
        elif self.variant == "once":
            both = angles
        elif self.variant == "negated":
            both = torch.cat((angles, -angles), dim=-1)
        else:
            both = torch.cat((angles, angles), dim=-1)
        cos, sin = both.cos(), both.sin()
        if self.variant == "tangent":
            return x + (cos + sin + both.tan()).repeat(1, 1, 2)
        other = 1.0 if self.variant == "unlike" else 1.5
        cos, sin = (cos * 1.5).to(torch.float16).float(), (sin * other).to(torch.float16).float()
        turned = torch.cat((cos, sin), dim=-1)
        return x + torch.cat((turned, turned), -1)[..., :64]


def tables(variant):
    """The program of a model with such a table, and how many tables it finds."""
    table = Table(variant)

    class Positioned(Small):
        def forward(self, input_ids, position_ids=None, use_cache=None):
            hidden = self.table(self.base.model.embed_tokens(input_ids), position_ids)
            return type("Output", (), {"logits": self.base.lm_head(hidden)})()

    model = Positioned(None)
    model.table = table
    program = program_of(model, "canonicalize")
    before = [logits(program, 5, 3), logits(program, 1)]
    matches = run_step(program, Step("t", TRANSFORMS["fuse_rotary_table"](**ON_CPU))).matches
    torch.testing.assert_close([logits(program, 5, 3), logits(program, 1)], before)
    return program, matches


@pytest.mark.parametrize("variant", ["halves", "pairs", "once"])
def test_scaled_and_cast_tables_of_every_layout_become_one_op(variant):
    program, matches = tables(variant)
    assert matches == 1
    (node,) = [n for n in program.graph.nodes if "rotary_table" in str(n.target)]
    assert node.args[2:] == (1.5, variant, torch.float16)
    assert count(program, aten.matmul.default) == 0


@pytest.mark.parametrize("variant", ["negated", "tangent", "unlike"])
def test_what_is_nearly_a_table_stays(variant):
    program, matches = tables(variant)
    assert matches == 0
    assert "rotary_table" not in op_names(program)


def test_kernels_serve_a_whole_model_in_prefill_and_decode():
    with gpu.interpreted_kernels():
        program, _ = deployed(tiny_model("qwen3", num_hidden_layers=1))
    chosen = {n.meta["op"]: n.meta["implementation"] for n in program.graph.nodes if "op" in n.meta}
    assert chosen["rotary_paged_attention"] == chosen["rotary_table"] == "triton"
    assert not program.contract.eager
