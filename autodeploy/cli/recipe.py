"""`autodeploy recipe`: show, list and check recipes without loading a model."""

from __future__ import annotations

import argparse
from typing import Any

from .options import add_recipe_options, read_changes

_EXAMPLES = """\
examples:
  autodeploy recipe list
  autodeploy recipe show default
  autodeploy recipe show default --set compile.backend=inductor
  autodeploy recipe check my_recipe.yaml
"""


def add_parser(commands: Any) -> None:
    """Adds `recipe` to the command line."""
    parser = commands.add_parser(
        "recipe", help="show, list or check recipes", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    kinds = parser.add_subparsers(dest="recipe_command", required=True, metavar="WHAT")
    listing = kinds.add_parser("list", help="the recipes that ship with autodeploy")
    listing.set_defaults(run=run_list)
    for name, run, text in (
        ("show", run_show, "the resolved recipe as YAML"),
        ("check", run_check, "whether a recipe is valid, and its steps"),
    ):
        sub = kinds.add_parser(
            name, help=text, epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("recipe", help="a shipped name or the path of a YAML file")
        add_recipe_options(sub)
        sub.set_defaults(run=run)


def run_list(args: argparse.Namespace) -> int:
    """Names and descriptions."""
    from ..transforms.recipe import available_recipes

    recipes = available_recipes()
    width = max(map(len, recipes))
    for name, description in recipes.items():
        print(f"{name:{width}}  {description.split('. ')[0].rstrip('.')}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """The recipe with everything it extends, overrides and inserts worked in."""
    from ..transforms.recipe import load_recipe

    print(load_recipe(args.recipe, read_changes(args.changes)).to_yaml(), end="")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Loading validates: keys, options, and the order of facts."""
    from ..transforms.recipe import load_recipe

    recipe = load_recipe(args.recipe, read_changes(args.changes))
    print(f"{recipe.name} is valid: {' -> '.join(step.id for step in recipe.steps)}")
    return 0
