"""Every example in examples/ runs."""

from pathlib import Path

from autodeploy import SamplingParams, deploy

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo_model"


def test_a_transform_from_a_file_outside_is_found_counted_and_verified():
    recipe = ROOT / "examples" / "third_party" / "recipe.yaml"
    params = SamplingParams(temperature=0, max_tokens=12)
    with deploy(DEMO, recipe=recipe, verify=True) as changed, deploy(DEMO) as plain:
        assert "spell_out_rope 8" in changed.summary["transforms"]
        prompt = "def read(path):"
        assert (
            changed.generate(prompt, params)[0].outputs[0].token_ids
            == plain.generate(prompt, params)[0].outputs[0].token_ids
        )
