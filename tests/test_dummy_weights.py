"""A config alone can be deployed with random weights; what was tied or shared stays so."""

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from transformers import Mamba2Config

from autodeploy import LLM, SamplingParams
from autodeploy.checkpoint import load_model
from autodeploy.config import DeployConfig
from autodeploy.dummy_weights import dummy_model
from autodeploy.errors import CheckpointError, ConfigError
from autodeploy.transforms.device_copies import copy_each, move_to_device
from autodeploy.transforms.program import Weight, WeightSource
from autodeploy.transforms.recipe import load_recipe
from autodeploy.transforms.verify import reference_logits
from autodeploy.warm_start import KeptProgram

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]  # fmt: skip


def config_alone(tmp_path, name="llama", **changes):
    tiny_config(name, **changes).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_have_the_class_own_distribution(tmp_path, device, tied):
    folder = config_alone(tmp_path, tie_word_embeddings=tied, initializer_range=0.05)
    model = load_model(folder, "bfloat16", device, load_format="dummy")
    assert not model.training
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, device)}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all()
        elif "embed" in name and not tied:
            assert 0.9 < weight.float().std() < 1.1
        else:
            assert 0.04 < weight.float().std() < 0.06


@pytest.mark.parametrize("device", DEVICES)
def test_deep_models_of_wide_projections_do_not_amplify_rounding(device):
    config = Mamba2Config(
        hidden_size=64, num_hidden_layers=32, state_size=16, num_heads=8, head_dim=16, n_groups=1,
        vocab_size=256, chunk_size=8, initializer_range=0.8,
    )  # fmt: skip
    model = dummy_model(config, torch.bfloat16, torch.device(device))
    assert reference_logits(model).noise < 0.06
    mixer = model.backbone.layers[3].mixer
    assert torch.equal(mixer.A_log.cpu(), torch.arange(1, 9).log().bfloat16())
    assert mixer.in_proj.weight.float().std() < mixer.in_proj.in_features**-0.5


def test_stacked_experts_are_scaled_as_one(tmp_path):
    folder = config_alone(tmp_path, "mixtral", initializer_range=3.0)
    model = load_model(folder, "float32", "cpu", load_format="dummy")
    for weight in (w for w in model.parameters() if w.dim() == 3):
        assert float(weight.detach().square().mean().sqrt()) == pytest.approx(
            max(weight.shape[1:]) ** -0.5
        )


def test_the_same_weights_come_every_time_and_nobody_elses_numbers_change(tmp_path):
    folder = config_alone(tmp_path, "mixtral")
    torch.manual_seed(7)
    first = load_model(folder, "float32", "cpu", load_format="dummy").state_dict()
    drawn = torch.rand(3)
    second = load_model(folder, "float32", "cpu", load_format="dummy").state_dict()
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    for name, weight in first.items():
        assert torch.equal(weight, second[name])


def test_a_config_alone_generates(tmp_path):
    with LLM(config_alone(tmp_path), load_format="dummy", device="cpu") as llm:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        output = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]
        assert len(output.outputs[0].token_ids) == 4
        phases = {n.removesuffix(" seconds") for n in llm.summary if n.endswith(" seconds")}
    assert phases >= {"import", "load", "capture", "transforms", "compile", "memory", "total"}


def test_without_it_a_config_alone_is_refused_with_the_option(tmp_path):
    with pytest.raises(CheckpointError, match="load_format='dummy'"):
        load_model(config_alone(tmp_path))


def test_a_program_of_dummy_weights_is_not_kept(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    recipe = load_recipe("default")
    assert KeptProgram.of(DeployConfig(str(tmp_path), load_format="dummy"), recipe) is None
    assert KeptProgram.of(DeployConfig(str(tmp_path)), recipe) is not None


@pytest.mark.parametrize(
    "options",
    [{"load_format": "dumy"}, {"gpu_memory_utilization": 1.5}, {"gpu_memory_utilization": 0}],
)
def test_a_wrong_option_is_refused(options):
    with pytest.raises(ConfigError):
        DeployConfig("somewhere", **options)


def test_a_live_model_has_its_own_weights():
    with pytest.raises(ConfigError, match="live model"):
        DeployConfig(tiny_model("llama"), load_format="dummy")


@pytest.mark.parametrize("device", DEVICES)
def test_a_moved_model_keeps_its_ties(device):
    model = tiny_model("llama", tie_word_embeddings=True)
    # Tied by memory, not by being one object.
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach())
    moved = move_to_device(model, torch.device(device))
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {device}
    assert moved.lm_head.weight.data_ptr() == moved.model.embed_tokens.weight.data_ptr()


def test_an_error_in_a_copy_is_raised_here():
    def fail(item):
        raise ValueError(item)

    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match="3"):
            copy_each(fail, [3], torch.device(device))


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_joined_weight_gives_back_what_it_was_made_of(device):
    tensors = {name: torch.randn(64, 64, device=device) for name in "abc"}
    tensors["view of c"] = tensors["c"][:32]
    source = WeightSource(tensors, owned=True)
    expected = torch.cat([tensors["a"], tensors["b"]])
    value = source.read(Weight(("a", "b"), (128, 64), torch.float32))
    source.release(["a", "b", "c"])
    assert torch.equal(value, expected)
    assert [tensors[name].untyped_storage().nbytes() for name in "ab"] == [0, 0]
    assert tensors["c"].untyped_storage().nbytes() == 64 * 64 * 4
    assert torch.equal(source.sample("a"), expected[:64].reshape(-1)[::65])
