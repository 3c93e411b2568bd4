"""Settings of `autodeploy serve`: defaults < file < flags < --set, as one flat set of names.

A name is a field of ServerConfig, RayConfig or DeployConfig; `overrides` holds options of recipe
steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model

from ..config import DeployConfig
from ..errors import ConfigError
from ..transforms.recipe import suggest
from .config import ServerConfig
from .field_texts import field_texts
from .ray_config import RayConfig

SERVER_CONFIGS = (ServerConfig, RayConfig)
"""Whose fields are flags of `autodeploy serve`, beside those of DeployConfig."""

DEFAULTS = {"executor": "process", "max_num_batched_tokens": 2048}
"""Of options of a deployment, where a server's differ. Steps of 8192 tokens, as of a batch without
anybody waiting, keep those who decode waiting: with an 8B shape on an H200 at 80 % of its
throughput one token in a hundred took 45 ms and longer, in a run that also began cold; with steps
of 2048 27 (begun cold) and 31."""

# What a file can say of fields whose Python values may be live objects.
_WRITTEN: dict[str, Any] = {
    "model": str,
    "tokenizer": str | None,
    "recipe": str | dict[str, Any],
    "overrides": dict[str, dict[str, Any]],
    "cuda_graph_sizes": list[int] | None,
    "dump_graphs": str | None,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to deploy, with which options, and how to serve it."""

    model: str
    deploy: dict[str, Any]
    server: ServerConfig
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)


def read_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file; names may be written with dashes, like flags.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(
            f"--config {path} must hold names with values, not a {type(found).__name__}"
        )
    return {str(name).replace("-", "_"): value for name, value in found.items()}


def settle(*layers: Mapping[str, Any]) -> Settings:
    """The settings of several layers; later ones win, and `overrides` are joined step by step.

    Raises:
        ConfigError: a name is unknown, a value is of the wrong type or out of range, or there is
            no model.
    """
    merged: dict[str, Any] = {}
    overrides: dict[str, dict[str, Any]] = {}
    for layer in layers:
        _check(layer)
        for step, options in layer.get("overrides", {}).items():
            overrides.setdefault(step, {}).update(options)
        merged.update(layer)
    merged["overrides"] = overrides
    model = merged.pop("model", None)
    if model is None:
        raise ConfigError("no model: name one on the command line, or as `model` in --config")
    server, ray = (
        {f.name: merged.pop(f.name) for f in dataclasses.fields(owner) if f.name in merged}
        for owner in SERVER_CONFIGS
    )
    for name, value in DEFAULTS.items():
        merged.setdefault(name, value)
    DeployConfig.from_options(model, merged)
    return Settings(model, merged, ServerConfig(**server), RayConfig(**ray))


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration file."""
    fields: dict[str, Any] = {}
    for owner in (DeployConfig, *SERVER_CONFIGS):
        texts, hints = field_texts(owner), _hints(owner)
        for field in dataclasses.fields(owner):
            default = DEFAULTS.get(field.name, _default(field))
            fields[field.name] = (
                hints[field.name], Field(default, description=texts.get(field.name))
            )  # fmt: skip
    made = create_model("autodeploy serve", __config__=ConfigDict(extra="forbid"), **fields)
    return made.model_json_schema()


def _hints(owner: type) -> dict[str, Any]:
    hints = get_type_hints(owner)
    return {name: _WRITTEN.get(name, hint) for name, hint in hints.items()}


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _check(layer: Mapping[str, Any]) -> None:
    known = {
        n: hint for owner in (DeployConfig, *SERVER_CONFIGS) for n, hint in _hints(owner).items()
    }
    for name, value in layer.items():
        if name not in known:
            raise ConfigError(f"there is no setting '{name}'{suggest(name, known)}")
        try:
            TypeAdapter(known[name]).validate_python(value, strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            raise ConfigError(f"{name}: {problem['msg']}, not {value!r:.60}") from error
