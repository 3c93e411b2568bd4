"""`autodeploy generate`: text from a checkpoint."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .options import add_deploy_options, deploy_options

_EXAMPLES = """\
examples:
  autodeploy generate examples/demo_model --prompt "def fib(n):" --max-tokens 64
  echo "import os" | autodeploy generate examples/demo_model --temperature 0
  autodeploy generate examples/demo_model --chat --prompt "Return the sum of two numbers."
  autodeploy generate examples/demo_model --prompt-file prompts.txt --json > outputs.jsonl
"""

_SAMPLING: tuple[tuple[str, type, str], ...] = (
    ("max-tokens", int, "most tokens to generate"),
    ("min-tokens", int, "no end before this many tokens"),
    ("temperature", float, "0 is greedy"),
    ("top-p", float, "keep the likeliest tokens of this total probability"),
    ("top-k", int, "keep the k likeliest tokens"),
    ("min-p", float, "keep tokens at least this fraction as likely as the likeliest"),
    ("repetition-penalty", float, "above 1 discourages tokens seen before"),
    ("seed", int, "the same seed gives the same tokens"),
    ("n", int, "sequences per prompt"),
)


def add_parser(commands: Any) -> None:
    """Adds `generate` to the command line."""
    parser = commands.add_parser(
        "generate", help="generate text", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("model", help="checkpoint directory or hub id")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt (repeatable)")
    parser.add_argument("--prompt-file", type=Path, help="one prompt per line")
    parser.add_argument("--chat", action="store_true", help="prompts are messages of a user")
    parser.add_argument(
        "--stream", action=argparse.BooleanOptionalAction, default=None,
        help="print text as it comes (default: for one prompt on a terminal)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object per output")
    group = parser.add_argument_group(
        "sampling", "without any of these, the checkpoint's own defaults apply"
    )
    for name, kind, text in _SAMPLING:
        group.add_argument(f"--{name}", type=kind, help=text)
    group.add_argument("--stop", action="append", help="a string that ends the text (repeatable)")
    add_deploy_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generates for every prompt and prints texts, or JSON lines."""
    prompts = _prompts(args)
    if args.chat:
        conversations = [[{"role": "user", "content": p}] for p in prompts]
    stream = args.stream if args.stream is not None else sys.stdout.isatty() and not args.json
    if stream and len(prompts) == 1 and not args.json and (args.n or 1) == 1:
        asyncio.run(_stream(args, conversations[0] if args.chat else prompts[0]))
        return 0
    from ..deployment import deploy

    with _status(f"deploying {args.model}"):
        llm = deploy(args.model, **deploy_options(args))
    with llm:
        params = _params(args, llm)
        outputs = llm.chat(conversations, params) if args.chat else llm.generate(prompts, params)
        for output in outputs:
            _print(output, args.json, many=len(prompts) > 1)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts: list[str] = list(args.prompt)
    if args.prompt_file is not None:
        try:
            prompts += [line for line in args.prompt_file.read_text().splitlines() if line]
        except OSError as error:
            raise ConfigError(f"--prompt-file: {error}") from error
    if not prompts:
        if sys.stdin.isatty():
            raise ConfigError("no prompt: give --prompt, --prompt-file, or text on standard input")
        prompts = [sys.stdin.read().rstrip("\n")]
    return prompts


def _params(args: argparse.Namespace, llm: Any) -> Any:
    """The checkpoint's defaults with the given flags on top; None if none was given."""
    names = [name.replace("-", "_") for name, _, _ in _SAMPLING] + ["stop"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if not given:
        return None
    return llm.defaults.params().clone(**given)


async def _stream(args: argparse.Namespace, prompt: Any) -> None:
    from ..async_llm import AsyncLLM

    with _status(f"deploying {args.model}"):
        engine = AsyncLLM(args.model, **deploy_options(args))
    async with engine:
        params = _params(args, engine)
        stream = engine.chat(prompt, params) if args.chat else engine.generate(prompt, params)
        async for delta in stream:
            sys.stdout.write(delta.outputs[0].text)
            sys.stdout.flush()
    sys.stdout.write("\n")


def _print(output: Any, as_json: bool, many: bool) -> None:
    for completion in output.outputs:
        if as_json:
            record = {
                "prompt": output.prompt,
                "prompt_token_ids": output.prompt_token_ids,
                "num_cached_tokens": output.num_cached_tokens,
                "error": None if output.error is None else str(output.error),
                **dataclasses.asdict(completion),
            }
            print(json.dumps(record))
            continue
        if many or len(output.outputs) > 1:
            print(f"--- {output.prompt!r}" + (f" [{completion.index}]" if completion.index else ""))
        print(completion.text if output.error is None else f"[failed: {output.error}]")


@contextmanager
def _status(text: str) -> Iterator[None]:
    """A spinner on standard error while something takes long, if somebody can see it."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield
