"""Compiling a checkpoint in a process of its own: `python -m autodeploy.compile_checkpoint`.

Making a program takes transformers' model classes, torch.export and all they import, over 100 MB
that a process cannot give back. The process that serves only needs the result. This one reads a
request as JSON from standard input, keeps the program on disk, and answers with JSON.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from typing import Any

from . import errors
from .config import DeployConfig
from .transforms.recipe import Recipe, load_recipe

_log = logging.getLogger("autodeploy")
_LOOK_SECONDS = 0.5
_FIELDS = ("dtype", "device", "trust_remote_code")


def compile_in_child(config: DeployConfig, recipe: Recipe) -> str | None:
    """Has the program of `config.model` made and kept; returns why it was not, or None.

    Raises:
        AutodeployError: whatever the other process raised, by type and message.
    """
    request = {
        "model": str(config.model),
        "recipe": recipe.to_dict(),
        **{name: getattr(config, name) for name in _FIELDS},
    }
    level = _log.getEffectiveLevel()
    child = subprocess.run(
        [sys.executable, "-m", "autodeploy.compile_checkpoint", str(level), str(os.getpid())],
        input=json.dumps(request), stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    lines = child.stdout.splitlines()
    if child.returncode or not lines:
        # Whatever it was, compiling here will meet it again and show it.
        _log.warning("the process that compiles ended with code %d", child.returncode)
        return None
    answer = json.loads(lines[-1])
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    why: str | None = answer["why"]
    return why


def main() -> None:
    """The process: one request, one answer; it ends with the one that asked."""
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    logging.basicConfig(level=int(sys.argv[1]), format="%(levelname)s %(message)s")
    request: dict[str, Any] = json.loads(sys.stdin.read())
    recipe = load_recipe(request.pop("recipe"))
    config = DeployConfig(**request)
    try:
        answer: dict[str, Any] = {"why": _compile(config, recipe)}
    except errors.AutodeployError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer))


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, which cannot say so when it is killed."""
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def _compile(config: DeployConfig, recipe: Recipe) -> str | None:
    from .checkpoint import load_model
    from .ladder import build_runner, summary
    from .warm_start import KeptProgram

    kept = KeptProgram.of(config, recipe)
    if kept is None:
        return "its program cannot be kept"
    model = load_model(config.model, config.dtype, config.device, config.trust_remote_code)
    built = build_runner(model, recipe, owned=True)
    if built.program is None:
        return f"it runs on rung {built.rung}: {built.cause}"
    return kept.keep(built.program, summary(built))


if __name__ == "__main__":
    main()
