"""Each transform rewrites what it should, spares a near miss, and holds at other sizes."""

import operator

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from autodeploy.custom_ops.op import OPS, op_of
from autodeploy.errors import TransformError, VerificationError
from autodeploy.transforms.capture.export import capture
from autodeploy.transforms.library.cache import group_name
from autodeploy.transforms.library.canonicalize import merge_duplicates
from autodeploy.transforms.pipeline import run_recipe, run_step
from autodeploy.transforms.program import Fact
from autodeploy.transforms.recipe import Step, load_recipe
from autodeploy.transforms.transform import TRANSFORMS, Transform
from autodeploy.transforms.verify import SequenceCheck, reference_logits

aten = torch.ops.aten


def program_of(model, *steps):
    program = capture(model)
    for name in steps:
        run_step(program, Step(name, TRANSFORMS[name]()))
    return program


def logits(program, *lengths, seed=0):
    """Logits of a functional program for packed sequences of these lengths."""
    total = sum(lengths)
    ids = torch.randint(3, 256, (1, total), generator=torch.Generator().manual_seed(seed))
    inputs = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_q": torch.tensor([0, *lengths]).cumsum(0).int(),
        "logit_index": torch.arange(total),
    }
    with torch.no_grad():
        return program.run(inputs)


def count(program, target):
    return sum(n.target == target for n in program.graph.nodes)


def op_names(program):
    return [op.name for n in program.graph.nodes if (op := op_of(n.target)) is not None]


class Small(nn.Module):
    """Something with a head, whose forward a test chooses; it looks like a language model."""

    def __init__(self, body, logits_to_keep=False):
        super().__init__()
        base = tiny_model("llama", num_hidden_layers=1)
        self.config, self.base, self.body = base.config, base, body

    def can_generate(self):
        return True

    def get_output_embeddings(self):
        return self.base.lm_head

    def forward(self, input_ids, position_ids=None, use_cache=None):
        hidden = self.base.model.embed_tokens(input_ids)
        hidden = self.body(self, hidden)
        return type("Output", (), {"logits": self.base.lm_head(hidden)})()


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


class TestCanonicalize:
    def test_it_leaves_no_identity_and_no_duplicate(self, llama):
        program = program_of(llama)
        before = logits(program, 5, 3)
        run_step(program, Step("c", TRANSFORMS["canonicalize"]()))
        assert count(program, aten._assert_tensor_metadata.default) == 0
        assert count(program, aten.alias.default) == 0
        assert merge_duplicates(program.graph) == 0
        assert Fact.CANONICAL in program.facts
        torch.testing.assert_close(logits(program, 5, 3), before, rtol=0, atol=0)

    def test_cancelling_transposes_and_repeated_work_go(self):
        def body(self, x):
            turned = x.transpose(1, 2).transpose(2, 1)
            return (turned * 2.0 * 1.0) + (x * 2.0)

        program = program_of(Small(body))
        before = logits(program, 4)
        run_step(program, Step("c", TRANSFORMS["canonicalize"]()))
        assert count(program, aten.transpose.int) == 0
        assert count(program, aten.mul.Tensor) == 1
        torch.testing.assert_close(logits(program, 4), before)

    def test_other_transposes_real_casts_and_other_factors_stay(self):
        def body(self, x):
            turned = x.reshape(1, -1, 4, 16).transpose(1, 2).transpose(2, 3)
            turned = turned.transpose(2, 3).transpose(1, 2).reshape(x.shape)
            return (turned.double() * 0.5).float() + x * 2

        program = program_of(Small(body), "canonicalize")
        assert count(program, aten._to_copy.default) == 2
        assert count(program, aten.mul.Tensor) == 2


class TestFuseParallelLinears:
    def test_qkv_and_gate_up_become_one_product_each(self, llama):
        program = program_of(llama, "canonicalize")
        linears = count(program, aten.linear.default)
        expected = [logits(program, 5, 3), logits(program, 1)]
        step = run_step(program, Step("f", TRANSFORMS["fuse_parallel_linears"]()))
        assert step.matches == 2 * llama.config.num_hidden_layers
        assert count(program, aten.linear.default) == linears - 3 * llama.config.num_hidden_layers
        joined = program.weights["model_layers_0_self_attn_q_proj_and_k_proj_and_v_proj_weight"]
        assert joined.pieces == tuple(f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv")
        assert joined.shape == (64 + 32 + 32, 64)
        torch.testing.assert_close(logits(program, 5, 3), expected[0])
        torch.testing.assert_close(logits(program, 1), expected[1])

    def test_a_tied_weight_is_left_alone(self):
        def body(self, x):
            layer = self.base.model.layers[0].mlp
            # The same weight twice over one input, and once over another.
            return (
                layer.down_proj(layer.gate_proj(x) * layer.up_proj(x))
                + nn.functional.linear(x * 2, layer.gate_proj.weight)[..., :64]
            )

        program = program_of(Small(body), "canonicalize")
        assert run_step(program, Step("f", TRANSFORMS["fuse_parallel_linears"]())).matches == 0

    def test_a_width_limit_is_kept(self, llama):
        program = program_of(llama, "canonicalize")
        limited = TRANSFORMS["fuse_parallel_linears"](max_width=128)
        assert run_step(program, Step("f", limited)).matches == llama.config.num_hidden_layers


class TestGatherLogits:
    def test_rows_are_chosen_before_the_head(self):
        program = program_of(Small(lambda self, x: x + 1), "canonicalize")
        before = logits(program, 6, 2)
        step = run_step(program, Step("g", TRANSFORMS["gather_logits"]()))
        assert step.matches == 1
        head = next(n for n in program.graph.nodes if n.target == aten.linear.default)
        assert head.args[0].target == aten.index_select.default
        torch.testing.assert_close(logits(program, 6, 2), before)

    def test_a_model_that_keeps_logits_itself_has_no_site(self, llama):
        program = program_of(llama, "canonicalize")
        assert run_step(program, Step("g", TRANSFORMS["gather_logits"]())).matches == 0

    def test_a_head_whose_rows_depend_on_each_other_is_left_alone(self):
        model = Small(lambda self, x: x)
        plain = model.base.lm_head.forward
        model.base.lm_head.forward = lambda x: plain(x) - plain(x).mean(1, keepdim=True)
        program = program_of(model, "canonicalize")
        assert run_step(program, Step("g", TRANSFORMS["gather_logits"]())).matches == 0


class TestCache:
    def test_every_site_gets_caches_of_its_own_and_groups_by_reach(self):
        program = program_of(tiny_model("gemma3_text"), "canonicalize", "cache")
        groups = {group.name: group for group in program.contract.groups}
        assert set(groups) == {"tokens", "window_5"}
        assert len(groups["window_5"].members) == 4  # two layers, keys and values
        assert groups["window_5"].bytes == 2 * 2 * 2 * 16 * 4
        assert "attention" not in op_names(program)
        assert op_names(program).count("paged_attention") == 3
        assert set(program.contract.metadata) == {
            "input_ids", "position_ids", "cu_q", "logit_index", "kv_len",
            "block_table_tokens", "slot_tokens", "block_table_window_5", "slot_window_5",
        }  # fmt: skip

    def test_state_layers_share_one_slot(self):
        program = program_of(tiny_model("falcon_h1"), "canonicalize", "cache")
        groups = {group.name: group for group in program.contract.groups}
        assert groups["sequences"].per == "sequence"
        assert "state_slot" in program.contract.metadata
        assert {group_name(m.spec) for m in groups["sequences"].members} == {"sequences"}


class TestLower:
    def test_it_takes_the_best_that_applies_or_what_is_preferred(self, llama):
        program = program_of(llama, "canonicalize", "cache")
        run_step(program, Step("l", TRANSFORMS["lower"](prefer=("reference",))))
        chosen = [n for n in program.graph.nodes if "implementation" in n.meta]
        assert chosen
        assert {n.meta["implementation"] for n in chosen} == {"reference"}
        assert {n.target for n in chosen} == {OPS[n.meta["op"]].reference for n in chosen}


class TestLoad:
    def test_ops_that_wait_for_the_device_keep_a_program_out_of_graphs(self):
        waiting = program_of(tiny_model("jetmoe"), "canonicalize", "cache", "lower")
        assert "aten.item.default" in waiting.contract.eager
        plain = program_of(tiny_model("llama"), "canonicalize", "cache", "lower")
        assert not any(name.startswith("aten") for name in plain.contract.eager)

    def test_weights_that_are_used_as_they_are_stay_shared_with_a_live_model(self, llama):
        program = program_of(llama, "canonicalize", "fuse_parallel_linears", "load")
        down = program.graph_module.model_layers_0_mlp_down_proj_weight
        assert down.data_ptr() == llama.model.layers[0].mlp.down_proj.weight.data_ptr()
        assert llama.model.layers[0].self_attn.q_proj.weight.shape == (64, 64)

    def test_a_model_given_up_gives_back_what_was_joined(self):
        wide = tiny_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
        gate = wide.model.layers[0].mlp.gate_proj.weight
        before = gate.detach().clone()
        program = capture(wide, owned=True)
        for name in ("canonicalize", "fuse_parallel_linears", "load"):
            run_step(program, Step(name, TRANSFORMS[name]()))
        joined = program.graph_module.model_layers_0_mlp_gate_proj_and_up_proj_weight
        torch.testing.assert_close(joined[:512], before)
        assert not torch.equal(gate, before), "the memory is still held"


class TestPipeline:
    def test_dumps_show_every_step_as_readable_text(self, llama, tmp_path):
        run_recipe(capture(llama), load_recipe("default"), dump_graphs=tmp_path)
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names[0] == "00_captured.txt"
        assert names[-1].endswith("_compile.txt")
        before = (tmp_path / "06_fuse_parallel_linears.txt").read_text()
        after = (tmp_path / "08_cache.txt").read_text()
        assert "autodeploy.attention(" in before
        assert "autodeploy.paged_attention(" in after
        assert "# model.layers.1.self_attn" in after

    def test_a_step_that_finds_less_than_it_expects_fails(self, llama):
        recipe = load_recipe(
            {"steps": ["canonicalize", {"transform": "gather_logits", "expect": 1}]}
        )
        with pytest.raises(TransformError, match="'gather_logits' expects 1 sites and found 0"):
            run_recipe(capture(llama), recipe)

    def test_a_transform_that_changes_the_numbers_is_named(self, llama):
        class Halve(Transform):
            name = "halve"

            def sites(self, program):
                return ()

            def finish(self, program):
                for node in list(program.graph.nodes):
                    if node.target == aten.silu.default:
                        node.target = aten.relu.default

        check = SequenceCheck(reference_logits(llama))
        program = capture(llama)
        run_step(program, step := Step("halve", Halve()))
        with pytest.raises(VerificationError, match="after step 'halve'"):
            check(program, step)

    def test_a_failure_inside_a_transform_says_where(self, llama):
        class Broken(Transform):
            name = "broken"

            def sites(self, program):
                from autodeploy.transforms.transform import Site

                yield Site((next(n for n in program.graph.nodes if n.target == aten.silu.default),))

            def rewrite(self, program, site):
                operator.getitem({}, "missing")

        with pytest.raises(TransformError, match=r"'broken' failed at .*layers.0.mlp.act_fn"):
            run_step(capture(llama), Step("broken", Broken()))

    def test_inductor_gives_the_same_logits_and_keeps_its_artifact(self, tmp_path, monkeypatch):
        monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path))
        model = tiny_model("llama", num_hidden_layers=1)
        check = SequenceCheck(reference_logits(model))
        for _ in range(2):
            program = capture(model)
            run_recipe(program, load_recipe("inductor"), check=check)
            assert program.function is not None
            assert len(list((tmp_path / "compiled").iterdir())) == 1
