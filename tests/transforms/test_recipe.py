"""Recipes: what is accepted, what is refused, and that order is a matter of facts."""

from dataclasses import dataclass
from pathlib import Path

import pytest

import autodeploy.transforms.library  # noqa: F401 - registers the transforms
from autodeploy.errors import RecipeError
from autodeploy.transforms.program import Fact
from autodeploy.transforms.recipe import available_recipes, load_recipe
from autodeploy.transforms.transform import TRANSFORMS, Transform, register_transform


def ids(recipe):
    return [step.id for step in recipe.steps]


@pytest.mark.parametrize("name", sorted(available_recipes()))
def test_every_shipped_recipe_loads_and_prints_as_itself(name):
    recipe = load_recipe(name)
    assert recipe.description
    again = load_recipe(recipe.to_dict())
    assert again.steps == recipe.steps
    assert again.digest == recipe.digest


def test_override_drop_and_insert_change_the_base():
    recipe = load_recipe(
        {
            "extends": "default",
            "override": {"lower": {"prefer": ["reference"]}},
            "drop": ["gather_logits"],
            "insert": [{"before": "cache", "step": {"transform": "canonicalize", "id": "again"}}],
        }
    )
    assert "gather_logits" not in ids(recipe)
    assert ids(recipe).index("again") == ids(recipe).index("cache") - 1
    lower = next(s for s in recipe.steps if s.id == "lower")
    assert lower.transform.prefer == ("reference",)


def test_overrides_by_keyword_are_applied_last():
    recipe = load_recipe(
        {"extends": "default", "override": {"compile": {"backend": "inductor"}}},
        {"compile": {"backend": "off"}},
    )
    assert recipe.steps[-1].transform.backend == "off"


def test_a_different_option_gives_a_different_digest():
    changed = load_recipe("default", {"lower": {"prefer": ["reference"]}})
    assert changed.digest != load_recipe("default").digest


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("defualt", "did you mean 'default'"),
        ("missing.yaml", "does not exist"),
        ({"extends": "default", "overide": {}}, "did you mean 'override'"),
        ({"steps": ["canonicalise"]}, "did you mean 'canonicalize'"),
        ({"steps": [{"transform": "canonicalize", "opts": {}}]}, "did you mean 'options'"),
        ({"extends": "default", "override": {"lower": {"prefers": []}}}, "did you mean 'prefer'"),
        ({"extends": "default", "override": {"lower": {"prefer": "x"}}}, "must be list"),
        ({"extends": "default", "override": {"loader": {}}}, "no step 'loader'"),
        ({"extends": "default", "drop": ["caches"]}, "did you mean 'cache'"),
        ({"extends": "default", "insert": [{"behind": "cache", "step": "x"}]}, "key 'behind'"),
        ({"extends": "default", "override": {"compile": {"backend": "tvm"}}}, "off, inductor"),
        ({"description": "nothing"}, "neither 'steps' nor 'extends'"),
        ({"steps": ["canonicalize", "canonicalize"]}, "two steps 'canonicalize'"),
        ({"extends": "default", "imports": ["no_such_module_anywhere"]}, "import .* failed"),
        ({"steps": [{"transform": "canonicalize", "expect": -1}]}, "'expect' must be a count"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_says_what_to_change(recipe, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe)


def test_a_fusion_after_the_cache_is_refused_before_any_weight_is_read():
    with pytest.raises(
        RecipeError, match=r"needs FUNCTIONAL, which step 'cache' \(step 2\) breaks"
    ):
        load_recipe({"steps": ["canonicalize", "cache", "fuse_parallel_linears"]})


def test_a_step_without_what_it_needs_names_who_gives_it():
    with pytest.raises(RecipeError, match=r"needs CANONICAL; .*: canonicalize"):
        load_recipe({"steps": ["cache"]})


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path):
    path = tmp_path / "loop.yaml"
    path.write_text("extends: loop.yaml\n")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(path)


def test_a_file_that_is_not_yaml_is_one_clear_error(tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_text("steps: [canonicalize\n")
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        load_recipe(path)


def test_a_file_outside_the_repository_registers_its_transform(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from autodeploy.transforms.transform import Transform, register_transform\n"
        "@register_transform('from_outside')\n"
        "@dataclass(frozen=True)\n"
        "class FromOutside(Transform):\n"
        "    depth: int = 1\n"
        "    def sites(self, program):\n"
        "        return ()\n"
    )
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: default\nimports: [mine.py]\n"
        "insert: [{after: canonicalize, step: {transform: from_outside, options: {depth: 3}}}]\n"
    )
    try:
        recipe = load_recipe(path)
        assert recipe.steps[1].transform.depth == 3
        assert load_recipe(path).steps == recipe.steps
    finally:
        TRANSFORMS.pop("from_outside", None)


def test_registering_a_taken_name_is_refused():
    with pytest.raises(RecipeError, match="already registered"):

        @register_transform("cache")
        @dataclass(frozen=True)
        class Other(Transform):
            pass


def test_every_registered_transform_states_known_facts():
    for kind in TRANSFORMS.values():
        for facts in (kind.needs, kind.gives, kind.breaks):
            assert all(isinstance(fact, Fact) for fact in facts)
