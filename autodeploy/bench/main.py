"""`autodeploy bench`: throughput beside Hugging Face, and start-up, in one run each."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_EXAMPLES = """\
examples:
  autodeploy bench throughput                            # 101 M random Llama, 32 ragged requests
  autodeploy bench throughput --against generate --against generate_batch --threads 2
  autodeploy bench throughput --model examples/demo_model --requests 64
  autodeploy bench startup examples/demo_model           # cold, then warm artifact cache
"""


def add_parser(subparsers: Any) -> None:
    """Adds `bench` to the command line."""
    parser = subparsers.add_parser(
        "bench", help="measure throughput and start-up", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    kinds = parser.add_subparsers(dest="bench", required=True, metavar="KIND")
    _add_throughput(kinds)
    _add_startup(kinds)


def _add_throughput(kinds: Any) -> None:
    parser = kinds.add_parser("throughput", help="output tokens/s of a ragged workload")
    parser.add_argument("--model", help="checkpoint; default: a random Llama of 101 M parameters")
    parser.add_argument("--requests", type=int, default=32, help="how many")
    parser.add_argument(
        "--prompt",
        type=_range,
        default=(32, 256),
        metavar="LOW:HIGH",
        help="prompt tokens, uniform in the range",
    )
    parser.add_argument(
        "--output",
        type=_range,
        default=(32, 256),
        metavar="LOW:HIGH",
        help="output tokens, uniform in the range",
    )
    parser.add_argument(
        "--against", action="append", default=[], choices=("generate", "generate_batch"),
        help="also run transformers on the same work (repeatable)",
    )  # fmt: skip
    parser.add_argument("--recipe", default="default", help="name or path")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0, help="of the workload and random weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.set_defaults(run=run_throughput)


def _add_startup(kinds: Any) -> None:
    parser = kinds.add_parser("startup", help="seconds from deploy() to the first token")
    parser.add_argument("model", help="checkpoint directory or hub id")
    parser.add_argument("--recipe", default="default", help="name or path")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.set_defaults(run=run_startup)


def run_throughput(args: argparse.Namespace) -> int:
    """Prints a table of output tokens per second; writes JSON if asked."""
    import torch

    from ..checkpoint import load_model
    from ..deployment import deploy
    from .memory import memory_report
    from .throughput import AGAINST, run_autodeploy
    from .workload import ragged, random_llama

    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_model(args.model) if args.model else random_llama(seed=args.seed)
    work = ragged(args.requests, args.prompt, args.output, model.config.vocab_size, args.seed)  # type: ignore[union-attr, arg-type]
    print(
        f"{len(work.prompts)} requests, {work.prompt_tokens} prompt and {work.output_tokens} "
        f"output tokens, {torch.get_num_threads()} threads",
        file=sys.stderr,
    )
    results = []
    with deploy(model, recipe=args.recipe) as llm:
        results.append(run_autodeploy(llm, work))
        memory = memory_report(llm)
    results += [AGAINST[name](model, work) for name in args.against]
    print(f"{'system':32} {'seconds':>8} {'tok/s':>8} {'ours is':>8}")
    for r in results:
        ratio = results[0].tokens_per_second / r.tokens_per_second
        print(f"{r.name:32} {r.seconds:8.1f} {r.tokens_per_second:8.1f} {ratio:7.2f}x")
    _write(args.json, {
        "results": [
            {"name": r.name, "seconds": r.seconds, "tokens_per_second": r.tokens_per_second}
            for r in results
        ],
        "memory_bytes": memory,
    })  # fmt: skip
    return 0


def run_startup(args: argparse.Namespace) -> int:
    """Prints seconds and memory of a cold and a warm start, each in a process of its own."""
    from .startup import measure

    report = measure(args.model, args.recipe)
    print(f"{'start':6} {'import':>7} {'deploy':>7} {'first token':>12} {'deploy to token':>16}")
    for name in ("cold", "warm"):
        row = report[name]
        total = row["deploy"] + row["first_token"]
        print(
            f"{name:6} {row['import']:7.2f} {row['deploy']:7.2f} {row['first_token']:12.2f} "
            f"{total:16.2f}"
        )
    row = report["warm"]
    print(
        f"memory: {row['resident_mib']:.0f} MiB resident, of it {row['weights_mib']:.0f} weights "
        f"and {row['caches_mib']:.0f} caches (touched); the rest is {row['rest_mib']:.0f}"
    )
    _write(args.json, report)
    return 0


def _range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    try:
        pair = int(low), int(high or low)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected LOW:HIGH, not '{text}'") from error
    if not 1 <= pair[0] <= pair[1]:
        raise argparse.ArgumentTypeError(f"expected 1 <= LOW <= HIGH, not '{text}'")
    return pair


def _write(path: Path | None, report: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")
