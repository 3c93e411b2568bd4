"""A checkpoint deployed before starts from its kept program, and never from a wrong one."""

import json
import shutil

import pytest
import torch
from rope_models import generated
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from autodeploy import LLM, SamplingParams, deploy
from autodeploy.errors import CheckpointError, TransformError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8, 9], [100, 3], [*range(60, 80)]]
# Past 8 tokens these rotate otherwise, and the second computes all tokens anew.
DYNAMIC = {
    "max_position_embeddings": 8,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0},
}
LONGROPE = {
    "original_max_position_embeddings": 8,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
        "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "programs"


def checkpoint(tmp_path, name="llama", **changes):
    folder = tmp_path / "model"
    tiny_model(name, **changes).save_pretrained(folder)
    return folder


def tokens(path, **options):
    with LLM(path, **options) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        return llm.summary["start"].split(",")[0], [o.outputs[0].token_ids for o in outputs]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("gemma3_text", {}),
        ("falcon_h1", {}),
        ("gpt2", {}),
        ("minicpm3", {}),
        ("llama", DYNAMIC),
        ("phi3", LONGROPE),
    ],
)
def test_a_warm_start_gives_the_tokens_of_a_cold_one(tmp_path, name, changes):
    folder = checkpoint(tmp_path, name, **changes)
    cold = tokens(folder)
    warm = tokens(folder)
    assert (cold[0], warm[0]) == ("cold", "warm")
    assert warm[1] == cold[1]
    if "rope_parameters" in changes:
        model = tiny_model(name, **changes)
        assert warm[1] == [generated(model, p, 12, use_cache=name != "phi3") for p in PROMPTS]


def test_compiled_regions_are_loaded_by_a_warm_start_and_run_op_by_op_without_them(
    tmp_path, cache, caplog
):
    folder = checkpoint(tmp_path, "llama")
    plain = tokens(folder)
    options = {"overrides": {"fuse_rest": {"devices": ["cpu"], "saves": 2}}}
    cold = tokens(folder, **options)
    compiled = list(cache.parent.glob("compiled/*.region"))
    assert compiled
    warm = tokens(folder, **options)
    assert warm == ("warm", cold[1]) == ("warm", plain[1])
    assert "op by op" not in caplog.text
    for file in compiled:
        file.unlink()
    assert tokens(folder, **options) == warm
    assert "runs op by op" in caplog.text


def test_new_weights_of_the_same_shape_are_read_and_not_remembered(tmp_path):
    folder = checkpoint(tmp_path)
    _, before = tokens(folder)
    path = folder / "model.safetensors"
    weights = {k: v + 0.3 * torch.randn_like(v) for k, v in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    start, after = tokens(folder)
    assert start == "warm"
    assert after != before
    (tmp_path / "other").mkdir()
    shutil.rmtree(tmp_path / "cache")
    assert tokens(folder) == ("cold", after)


def test_another_config_recipe_or_dtype_is_another_program(tmp_path, cache):
    folder = checkpoint(tmp_path)
    tokens(folder)
    assert tokens(folder, overrides={"fuse_parallel_linears": {"max_width": 8}})[0] == "cold"
    assert tokens(folder, dtype="bfloat16")[0] == "cold"
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))
    assert tokens(folder)[0] == "cold"
    # The converted dtype is not kept: its weights are no views of the file.
    assert len(list(cache.glob("*.program"))) == 3


def test_a_checkpoint_whose_names_need_converting_is_not_kept(tmp_path, cache):
    folder = checkpoint(tmp_path, "mixtral")
    first = tokens(folder)
    second = tokens(folder)
    assert first == second
    assert first[0] == "cold"


def test_a_transform_of_one_s_own_is_neither_kept_nor_looked_up(tmp_path, cache):
    from dataclasses import dataclass

    from autodeploy.transforms.transform import TRANSFORMS, Transform, register_transform

    @register_transform("own_nothing")
    @dataclass(frozen=True)
    class OwnNothing(Transform):
        def sites(self, program):
            return ()

    recipe = {"extends": "default", "insert": [{"after": "cache", "step": "own_nothing"}]}
    try:
        assert tokens(checkpoint(tmp_path), recipe=recipe)[0] == "cold"
    finally:
        del TRANSFORMS["own_nothing"]
    assert not cache.exists()


def test_an_error_of_the_process_that_compiles_is_raised_as_what_it_is(tmp_path):
    folder = checkpoint(tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        LLM(folder)


def test_verify_and_dumps_do_the_work_again(tmp_path):
    folder = checkpoint(tmp_path)
    tokens(folder)
    assert tokens(folder, verify=True)[0] == "cold"
    assert tokens(folder, dump_graphs=tmp_path / "dumps")[0] == "cold"


def test_a_damaged_artifact_is_an_error_that_names_the_file(tmp_path, cache):
    folder = checkpoint(tmp_path)
    tokens(folder)
    (artifact,) = cache.iterdir()
    artifact.write_bytes(artifact.read_bytes()[:100])
    with pytest.raises(TransformError, match=f"{artifact.name}.*delete it"):
        LLM(folder)


def test_a_live_model_is_always_captured(tmp_path):
    model = tiny_model("llama")
    for _ in range(2):
        with deploy(model) as llm:
            assert llm.summary["start"] == "cold"
