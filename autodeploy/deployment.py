"""deploy: the one function most people need."""

from __future__ import annotations

from typing import Any

from .llm import LLM


def deploy(model: Any, *, tokenizer: Any = None, recipe: Any = "default", **options: Any) -> LLM:
    """Makes a model ready to serve.

    model: a live, unmodified `AutoModelForCausalLM`, a checkpoint directory, or a hub id.
    tokenizer: None takes the checkpoint's own; without one, prompts are token ids.
    recipe: a name, a path or a dict; `options` are the fields of `DeployConfig`.

    Raises:
        ConfigError: an option is unknown or wrong, or (RecipeError) the recipe is; nothing has
            been loaded then.
        ModelError: the checkpoint cannot be read or the model cannot be served.
    """
    return LLM(model, tokenizer=tokenizer, recipe=recipe, **options)
