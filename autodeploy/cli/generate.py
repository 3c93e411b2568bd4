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
        description="Deploy a checkpoint and generate. Prompts come from --prompt, --prompt-file, "
        "or standard input as a whole. Results go to standard output, the rest to standard error.",
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
    """Generates for every prompt and prints texts, or JSON lines; 1 if a prompt failed."""
    _check_flags(args)
    prompts = _prompts(args)
    _check_stream(args, len(prompts))
    inputs: list[Any] = (
        [[{"role": "user", "content": p}] for p in prompts] if args.chat else list(prompts)
    )
    visible = sys.stdout.isatty() and not args.json and len(prompts) == 1 and (args.n or 1) == 1
    if args.stream or (args.stream is None and visible):
        asyncio.run(_stream(args, inputs[0]))
        return 0
    from ..deployment import deploy

    with _status(f"deploying {args.model}"):
        llm = deploy(args.model, **deploy_options(args))
    with llm:
        params = _params(args, llm)
        outputs = llm.chat(inputs, params) if args.chat else llm.generate(inputs, params)
        for output in outputs:
            _print(output, args.json, many=len(prompts) > 1)
    return int(any(output.error is not None for output in outputs))


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of SamplingParams that have a flag on the command line."""
    names = [name.replace("-", "_") for name, _, _ in _SAMPLING] + ["stop"]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _check_flags(args: argparse.Namespace) -> None:
    """Refuses what no checkpoint's defaults could make valid, before anything is loaded."""
    from ..runtime.sampling_params import SamplingParams

    SamplingParams(**{"max_tokens": None, **_given(args)})


def _check_stream(args: argparse.Namespace, count: int) -> None:
    if not args.stream:
        return
    if args.json:
        raise ConfigError("--stream prints text and --json whole outputs; leave one of them out")
    if count > 1 or (args.n or 1) > 1:
        raise ConfigError(
            f"--stream prints one text as it comes, and this makes {count * (args.n or 1)}; "
            "leave it out"
        )


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts: list[str] = list(args.prompt)
    if args.prompt_file is not None:
        prompts += _prompts_of_file(args.prompt_file)
    if prompts:
        return prompts
    if sys.stdin.isatty():
        raise ConfigError("no prompt: give --prompt, --prompt-file, or text on standard input")
    text = _decoded(sys.stdin.buffer.read(), "standard input").rstrip("\n")
    if not text:
        raise ConfigError("standard input is empty: give --prompt, --prompt-file, or text on it")
    return [text]


def _prompts_of_file(path: Path) -> list[str]:
    try:
        text = _decoded(path.read_bytes(), f"--prompt-file {path}")
    except OSError as error:
        raise ConfigError(f"--prompt-file: {error}") from error
    # Not splitlines(): a form feed or a Unicode separator does not end a prompt.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ConfigError(f"--prompt-file {path} has no prompts; write one per line")
    return prompts


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} is not UTF-8 at byte {error.start}; convert it first, with iconv for one"
        ) from error


def _params(args: argparse.Namespace, llm: Any) -> Any:
    """The checkpoint's defaults with the given flags on top; None if none was given."""
    given = _given(args)
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
    import msgspec

    for completion in output.outputs:
        if as_json:
            record = {
                "prompt": output.prompt,
                "prompt_token_ids": output.prompt_token_ids,
                "num_cached_tokens": output.num_cached_tokens,
                "metrics": output.metrics and msgspec.structs.asdict(output.metrics),
                "error": None if output.error is None else str(output.error),
                **dataclasses.asdict(completion),
            }
            print(json.dumps(record))
            continue
        if many or len(output.outputs) > 1:
            print(f"--- {output.prompt!r}" + (f" [{completion.index}]" if completion.index else ""))
        # Of a failed prompt, what came before; the error itself was logged.
        print(completion.text)


@contextmanager
def _status(text: str) -> Iterator[None]:
    """A spinner on standard error while something takes long, if somebody can see it."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield
