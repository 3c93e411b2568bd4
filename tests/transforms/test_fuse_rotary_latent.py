"""fuse_rotary_latent rewrites every form of rotation, spares near misses, holds at other sizes."""

import pytest
import torch
from test_fuse_rotary import chosen_ops, deployed
from test_library import count, op_names, program_of
from tiny_models import LATENT, tiny_model

from autodeploy.custom_ops.attention import rotary_latent_attention
from autodeploy.custom_ops.linear import heads_linear
from autodeploy.custom_ops.op import op_of
from autodeploy.transforms.pipeline import run_step
from autodeploy.transforms.recipe import Step, load_recipe
from autodeploy.transforms.transform import TRANSFORMS

aten = torch.ops.aten
ON_CPU = {"devices": ("cpu",)}
RECIPE = load_recipe("default", {"fuse_rotary_table": ON_CPU, "fuse_rotary_latent": ON_CPU})


def fused(program):
    return [
        rotary_latent_attention.bind(n.args, n.kwargs)
        for n in program.graph.nodes
        if op_of(n.target) is rotary_latent_attention
    ]


def cached(name, **changes):
    return program_of(
        tiny_model(name, **LATENT[name], **changes), "canonicalize", "absorb_latent", "cache"
    )


def fuse(program, **options):
    step = Step("f", TRANSFORMS["fuse_rotary_latent"](**(options or ON_CPU)))
    return run_step(program, step).matches


@pytest.mark.parametrize(
    ("name", "interleaved"),
    [("deepseek_v2", True), ("deepseek_v3", True), ("minicpm3", False), ("youtu", True)],
)
def test_a_layer_is_one_op_between_its_projections(name, interleaved):
    model = tiny_model(name, **LATENT[name])
    program, matches = deployed(model, RECIPE)
    layers = model.config.num_hidden_layers
    assert matches["fuse_rotary_latent"] == layers
    assert matches["fuse_rotary_table"] == 1
    ops = chosen_ops(program)
    assert ops.count("rotary_latent_attention") == layers
    assert not {"rope", "cached_latent_attention", "heads_linear"} & set(ops)
    assert count(program, aten.cat.default) == count(program, aten.view_as_complex.default) == 0
    nodes = [n for n in program.graph.nodes if n.meta.get("op") == "rotary_latent_attention"]
    for node in nodes:
        given = rotary_latent_attention.bind(node.args, node.kwargs)
        assert given["interleaved"] is interleaved
        assert given["eps"] is not None
        assert given["norm"] is not None
        for rows in ("q", "q_rest", "latent", "rest"):
            assert given[rows].target in (aten.squeeze.dim, aten.permute.default)


def test_latents_without_positions_are_taken_as_they_are():
    model = tiny_model("kimi_linear", **LATENT["kimi_linear"])
    program, matches = deployed(model, RECIPE)
    assert matches["fuse_rotary_latent"] == 1
    (node,) = [n for n in program.graph.nodes if n.meta.get("op") == "rotary_latent_attention"]
    given = rotary_latent_attention.bind(node.args, node.kwargs)
    assert given["cos"] is None
    assert given["norm"] is not None


def test_other_devices_are_spared_unless_asked_for():
    program = cached("deepseek_v2")
    assert fuse(program, devices=("cuda",)) == 0
    assert fuse(program) == 2


def test_keys_in_another_order_than_queries_are_turned_outside():
    program = cached("deepseek_v3", num_hidden_layers=1)
    node = next(n for n in program.graph.nodes if "cached_latent_attention" in op_names_of(n))
    row = node.args[1]
    latent, rest = row.args[0]
    flipped = program.call(aten.flip.default, rest, [2], before=row, like=rest)
    row.args = ([latent, flipped], -1)
    assert fuse(program) == 1
    (given,) = fused(program)
    assert given["cos"] is None
    assert given["norm"] is not None
    assert "rope" in op_names(program)


def test_a_result_that_something_else_reads_is_spared():
    program = cached("deepseek_v2", num_hidden_layers=1)
    node = next(n for n in program.graph.nodes if "cached_latent_attention" in op_names_of(n))
    output = program.graph.output_node()
    end = next(iter(node.users))
    shown = program.call(aten.sum.default, node, before=output, like=end)
    total = program.call(aten.add.Tensor, output.args[0], shown, before=output, like=end)
    output.replace_input_with(output.args[0], total)
    assert fuse(program) == 0
    assert op_of(end.target) is heads_linear


def op_names_of(node):
    op = op_of(node.target) if node.op == "call_function" else None
    return "" if op is None else op.name
