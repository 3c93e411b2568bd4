"""`autodeploy serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .options import add_deploy_options, deploy_options, read_changes, yaml_value

KEY_VARIABLE = "AUTODEPLOY_API_KEY"
_EXAMPLES = """\
examples:
  autodeploy serve examples/demo_model --port 8000
  autodeploy serve MODEL --api-key KEY --host 0.0.0.0 --max-model-len 8192
  autodeploy serve --config serve.yaml --set port=8001 --set compile.backend=inductor
  autodeploy serve --print-schema > schema.json

Values come from: defaults, then --config, then flags, then --set.
"""


def add_parser(commands: Any) -> None:
    """Adds `serve` to the command line."""
    parser = commands.add_parser(
        "serve", help="serve a checkpoint to OpenAI clients", epilog=_EXAMPLES,
        description="Deploy a checkpoint and serve it over HTTP, as OpenAI's API does.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", nargs="?", help="checkpoint directory or hub id")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings, named as flags")
    parser.add_argument(
        "--print-schema", action="store_true", help="print the JSON schema of --config and exit"
    )
    add_deploy_options(parser)
    # Not given is not the default: a file may name one.
    parser.set_defaults(recipe=None)
    _add_server_options(parser)
    parser.set_defaults(run=run)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    """Fields of ServerConfig and RayConfig as flags."""
    from ..server.config import ServerConfig
    from ..server.ray_config import RayConfig

    _add_fields(parser.add_argument_group("server"), ServerConfig)
    _add_fields(parser.add_argument_group("Ray Serve"), RayConfig)


def _add_fields(group: argparse._ArgumentGroup, owner: type) -> None:
    from ..server.field_texts import field_texts

    texts = field_texts(owner)
    for field in dataclasses.fields(owner):
        kind = str(field.type).removesuffix(" | None")
        text = texts[field.name].replace("%", "%%")
        if field.default is not dataclasses.MISSING and field.default not in (None, "", False):
            text += f" (default: {field.default})"
        options: dict[str, Any] = {"help": text, "default": None}
        if kind == "bool":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = {"int": int, "float": float}.get(kind, str)
            options["metavar"] = {"int": "N", "float": "NUMBER"}.get(kind, "TEXT")
        if kind == "list[str]":
            options["nargs"] = "+"
            options["action"] = "extend"
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM or Ctrl-C; 1 if the engine died and the policy is to exit."""
    settings_module = _import_server()
    if args.print_schema:
        print(json.dumps(settings_module.schema(), indent=2))
        return 0
    settings = read_settings(args)
    from ..server.logs import set_up_logging

    set_up_logging(settings.server.log_format, logging.DEBUG if args.verbose else logging.INFO)
    if settings.ray.ray:
        from ..server.ray_serving import serve_on_ray

        return serve_on_ray(settings)
    from ..server.app import build_app
    from ..server.serving import bound_socket, serve
    from ..server.start import start_engines

    with bound_socket(settings.server) as listener:
        app = build_app(settings.server, start_engines(settings), settings.model)
        return serve(app, settings.server, listener)


def read_settings(args: argparse.Namespace) -> Any:
    """The Settings of a parsed command line.

    Raises:
        ConfigError: a value is wrong, or there is no model.
    """
    from ..server.settings import SERVER_CONFIGS, read_file, settle

    environment: dict[str, Any] = {}
    if os.environ.get(KEY_VARIABLE):
        environment["api_key"] = [k.strip() for k in os.environ[KEY_VARIABLE].split(",")]
    file = {} if args.config is None else read_file(args.config)
    names = [field.name for owner in SERVER_CONFIGS for field in dataclasses.fields(owner)]
    flags = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if args.model is not None:
        flags["model"] = args.model
    plain = [change for change in args.changes if "." not in change.partition("=")[0]]
    steps = read_changes([change for change in args.changes if change not in plain])
    args.changes = []
    deploy = {name: value for name, value in deploy_options(args).items() if value is not None}
    return settle(environment, file, {**deploy, **flags}, {**_named(plain), "overrides": steps})


def _named(changes: list[str]) -> dict[str, Any]:
    found = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not (name and equals):
            raise ConfigError(f"--set takes NAME=VALUE or STEP.OPTION=VALUE, not '{change}'")
        found[name.replace("-", "_")] = yaml_value(change, value)
    return found


def _import_server() -> Any:
    try:
        from ..server import settings
    except ImportError as error:
        raise ConfigError(
            f"serving needs packages that are not installed ({error}); "
            "pip install 'autodeploy-llm[serve]'"
        ) from error
    return settings
