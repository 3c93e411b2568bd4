"""`autodeploy bench`: decode, prefill, throughput, serving and start-up, beside their floors."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.options import add_deploy_options
from ..errors import ConfigError

if TYPE_CHECKING:
    from ..llm import LLM
    from .report import Roof, Row
    from .target import Target
    from .workload import Workload

_EXAMPLES = """\
examples:
  autodeploy bench throughput                            # 101 M random Llama, 32 ragged requests
  autodeploy bench throughput --against generate --against generate_batch --threads 2
  autodeploy bench throughput --model examples/demo_model --requests 64 --structured
  autodeploy bench latency --dummy llama-3.2-1b --batch 1 8 64 256
  autodeploy bench all --dummy llama-3.1-8b --kinds latency prefill throughput --workload a256
  autodeploy bench startup examples/demo_model           # cold, then warm artifact cache
  autodeploy bench serve --base-url http://127.0.0.1:8000 --rate 4 --workload a256
  autodeploy bench http --model examples/demo_model --requests 256 --concurrency 64
"""

KINDS = ("latency", "prefill", "throughput", "serve")
"""What one deployment can be measured for, in this order; serving is last, it ends the engine."""
_HELP = {
    "latency": "ms per decode step, by batch size",
    "prefill": "prompt tokens/s",
    "throughput": "output tokens/s of a ragged workload",
    "serve": "latencies of requests that arrive at a rate",
}


def add_parser(subparsers: Any) -> None:
    """Adds `bench` to the command line."""
    parser = subparsers.add_parser(
        "bench", help="measure speed and start-up", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    kinds = parser.add_subparsers(dest="bench", required=True, metavar="KIND")
    for kind in KINDS:
        _add_kind(kinds, kind, _HELP[kind], (kind,))
    _add_kind(kinds, "all", "several kinds of one deployment", KINDS)
    _add_http(kinds)
    startup = kinds.add_parser("startup", help="seconds from deploy() to the first token")
    startup.add_argument("checkpoint", nargs="?", help="checkpoint directory or hub id")
    _add_shared(startup)
    startup.set_defaults(run=run_startup)


def _add_kind(parsers: Any, name: str, text: str, kinds: tuple[str, ...]) -> None:
    parser = parsers.add_parser(
        name, help=text, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if len(kinds) > 1:
        parser.add_argument(
            "--kinds", nargs="+", choices=kinds, default=list(kinds[:-1]), help="which"
        )
    else:
        parser.set_defaults(kinds=list(kinds))
    _add_shared(parser)
    parser.add_argument(
        "--repeat", type=_positive, metavar="N",
        help="runs, of which the median counts; default: 3, throughput 1",
    )  # fmt: skip
    if "latency" in kinds:
        _add_latency(parser)
    if "prefill" in kinds:
        parser.add_argument("--prefill", type=_product, default=(64, 1024), metavar="NxLENGTH",
                            help="prompts and their tokens (default: 64x1024)")  # fmt: skip
    if "throughput" in kinds or "serve" in kinds:
        _add_workload(parser)
    if "throughput" in kinds:
        parser.add_argument(
            "--against", action="append", default=[], choices=("generate", "generate_batch", "hf"),
            help="also run transformers on the same work (repeatable); hf is generate_batch",
        )  # fmt: skip
        parser.add_argument(
            "--structured", action="store_true",
            help="also run the same work under a JSON schema; needs a checkpoint with a tokenizer",
        )  # fmt: skip
    if "serve" in kinds:
        parser.add_argument(
            "--rate", "--request-rate", type=_rate, default=float("inf"), metavar="R",
            help="requests a second; default: all at once",
        )  # fmt: skip
    parser.set_defaults(run=run_kinds)
    if kinds == ("serve",):
        _add_remote(parser)
        parser.set_defaults(run=run_serve)


def _add_http(kinds: Any) -> None:
    parser = kinds.add_parser(
        "http", help="what HTTP costs: a server beside LLM.generate on the same work",
        epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_shared(parser)
    _add_workload(parser)
    parser.add_argument("--concurrency", type=_positive, metavar="N",
                        help="requests open at once (default: all)")  # fmt: skip
    parser.add_argument("--repeat", type=_positive, default=3, metavar="N",
                        help="rounds, of which the median counts (default: 3)")  # fmt: skip
    parser.set_defaults(run=run_http)


def _add_remote(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a server that runs already; its key: AUTODEPLOY_API_KEY")
    group.add_argument("--base-url", metavar="URL", help="such as http://127.0.0.1:8000; "
                       "--model is then the name to ask for")  # fmt: skip
    group.add_argument("--concurrency", "--max-concurrency", type=_positive, metavar="N",
                       help="requests open at once (default: as many as arrive)")  # fmt: skip
    group.add_argument("--vocab", type=_positive, metavar="N",
                       help="token ids to draw from (default: what the server says)")  # fmt: skip
    group.add_argument("--no-stream", action="store_true", help="ask for whole answers")
    group.add_argument("--extra-body", type=json.loads, default={}, metavar="JSON",
                       help="more fields for every request")  # fmt: skip


def _add_shared(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", help="checkpoint directory or hub id")
    model.add_argument(
        "--dummy", metavar="CONFIG",
        help="random weights for a config.json, its directory, or a named shape such as "
        "llama-3.2-1b; default: a Llama of 101 M parameters",
    )  # fmt: skip
    add_deploy_options(parser)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0, help="of the workload and random weights")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def _add_latency(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=_positive, nargs="+", default=[1, 8, 64, 256],
                        help="sequences in a step (default: 1 8 64 256)")  # fmt: skip
    parser.add_argument("--kv", type=_positive, default=576,
                        help="mean tokens known of a sequence (default: 576)")  # fmt: skip
    parser.add_argument("--steps", type=_positive, default=128, help="timed (default: 128)")
    parser.add_argument("--profile", type=Path, metavar="FILE",
                        help="also write chrome traces of 20 steps")  # fmt: skip


def _add_workload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", choices=("ragged", "a256"), default="ragged",
                        help="a256: 256 requests of 100:1024 prompt and output tokens")  # fmt: skip
    parser.add_argument(
        "--requests", "--num-prompts", type=_positive, default=32, metavar="N", help="how many"
    )
    for name, other in (("prompt", "input"), ("output", "output")):
        parser.add_argument(
            f"--{name}", f"--random-{other}-len", type=_range, default=(32, 256),
            metavar="LOW:HIGH", help=f"{name} tokens, uniform in the range",
        )  # fmt: skip


def run_kinds(args: argparse.Namespace) -> int:
    """Deploys once, measures every kind asked for, prints a table; writes JSON if asked."""
    import msgspec
    import torch

    from .memory import memory_report
    from .report import Roof, roof_to_dict, table
    from .target import Target, deployed

    if args.threads:
        torch.set_num_threads(args.threads)
    target = Target.of(args)
    _refuse(args)
    report: dict[str, Any] = {"model": target.name}
    rows: list[Row] = []
    roof = Roof(None, None)
    try:
        with deployed(target) as (llm, ready):
            roof = Roof.over(llm)
            report.update(ready=ready, summary=llm.summary, **roof_to_dict(roof))
            work = _workload(args, llm.vocab_size)
            print(_heading(target, llm, ready, roof), file=sys.stderr)
            for kind in [kind for kind in KINDS[:-1] if kind in args.kinds]:
                rows.extend(_measure(kind, args, llm, roof, work))
            # Among them how often a CUDA graph was missed.
            report["stats"] = msgspec.to_builtins(llm.stats)
            report["memory_bytes"] = memory_report(llm)
            if "serve" in args.kinds:
                rows.extend(_measure("serve", args, llm, roof, work))
        if "throughput" in args.kinds and args.against:
            rows.extend(_others(args.against, target, work))
    finally:
        # Also after an error or an interrupt: what was measured until then holds.
        if rows:
            print(table(rows, roof.cause))
            _write(args.json, {**report, "results": [row.to_dict() for row in rows]})
    return 0


def run_serve(args: argparse.Namespace) -> int:
    """Measures a server that runs already, or deploys and measures in process."""
    if args.base_url is None:
        for name in ("concurrency", "vocab", "no_stream", "extra_body"):
            if getattr(args, name):
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is for a server; name it with --base-url")
        return run_kinds(args)
    from .remote import Load, address_of, look_up, measure
    from .report import table

    _refuse(args)
    address = address_of(args.base_url)
    model, vocab = look_up(address, args.model, args.vocab)
    load = Load(args.rate, args.concurrency, not args.no_stream, args.extra_body, args.seed)
    rows = measure(address, model, _workload(args, vocab), load)
    print(table(rows))
    report = {"base_url": args.base_url, "model": model, "results": [r.to_dict() for r in rows]}
    _write(args.json, report)
    return 0


def run_http(args: argparse.Namespace) -> int:
    """LLM.generate and a server in turn; prints throughputs, CPU seconds and what HTTP costs."""
    from .http_cost import measure, table
    from .target import Target

    _refuse(args)
    report = measure(
        Target.of(args), lambda vocab: _workload(args, vocab), args.concurrency, args.repeat
    )
    print(table(report))
    _write(args.json, report)
    return 0


def _measure(
    kind: str, args: argparse.Namespace, llm: LLM, roof: Roof, work: Workload
) -> Iterator[Row]:
    # Here, not above: --help must not import torch.
    from . import latency, prefill, serve, throughput
    from .profile import StepProfile

    if kind == "latency":
        profile = None if args.profile is None else StepProfile(args.profile)
        yield from latency.measure(
            llm,
            roof,
            args.batch,
            args.kv,
            args.steps,
            _budget(args, llm),
            args.repeat or 3,
            profile,
        )
    elif kind == "prefill":
        requests, length = args.prefill
        yield prefill.measure(llm, roof, requests, length, args.repeat or 3)
    elif kind == "throughput":
        yield throughput.measure(llm, roof, work, _most(args), args.repeat or 1)
        if args.structured:
            yield throughput.measure_structured(llm, work, args.repeat or 3)
    else:
        yield from serve.measure(llm, work, args.rate, args.seed)


def _others(names: list[str], target: Target, work: Workload) -> Iterator[Row]:
    """transformers on the same work, when our engine has given its memory back."""
    import gc

    import torch

    from .throughput import measure_against

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model = target.live_model()
    for name in names:
        yield measure_against(name, model, work)


def _workload(args: argparse.Namespace, vocab: int) -> Workload:
    from .workload import Workload, a256, ragged

    if not {"throughput", "serve"} & set(getattr(args, "kinds", ("serve",))):
        return Workload((), ())
    if args.workload == "a256":
        work = a256(vocab)
    else:
        work = ragged(args.requests, args.prompt, args.output, vocab, args.seed)
    print(
        f"{len(work.prompts)} requests, {work.prompt_tokens} prompt and {work.output_tokens} "
        "output tokens",
        file=sys.stderr,
    )
    return work


def _heading(target: Target, llm: LLM, ready: dict[str, float], roof: Roof) -> str:
    import torch

    where = llm.summary["device"]
    if where.startswith("cuda"):
        where = torch.cuda.get_device_name(where)
    else:
        where += f", {torch.get_num_threads()} threads"
    text = (
        f"{target.name}, {llm.summary['dtype']}, {where}; deployed in {ready['deploy']:.1f} s, "
        f"ready {ready['process']:.1f} s after the process began"
    )
    if roof.peaks is not None:
        text += (
            f"; roof: {roof.peaks.bytes_per_second / 1e9:,.0f} GB/s, "
            f"{roof.peaks.flops / 1e12:,.1f} TFLOP/s ({roof.peaks.source})"
        )
    return text


def run_startup(args: argparse.Namespace) -> int:
    """Prints seconds and memory of a cold and a warm start, each in a process of its own."""
    from .startup import measure, table
    from .target import Target

    if args.checkpoint is not None:
        if args.model or args.dummy:
            raise ConfigError("name one model: CHECKPOINT, --model or --dummy")
        args.model = args.checkpoint
    report = measure(Target.of(args))
    print(table(report))
    _write(args.json, report)
    return 0


def _most(args: argparse.Namespace) -> int:
    from ..config import DeployConfig

    return int(args.max_num_seqs or DeployConfig.max_num_seqs)


def _budget(args: argparse.Namespace, llm: LLM) -> int:
    from ..build import TOKENS_PER_STEP, TOKENS_PER_STEP_ELSEWHERE

    kind = llm.summary.get("device", "cpu").split(":")[0]
    return int(args.max_num_batched_tokens or TOKENS_PER_STEP.get(kind, TOKENS_PER_STEP_ELSEWHERE))


def _refuse(args: argparse.Namespace) -> None:
    """What could only fail after minutes of measuring.

    Raises:
        ConfigError: it would.
    """
    for name in ("json", "profile"):
        file = getattr(args, name, None)
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"--{name} {file}: there is no directory '{file.parent}'; make it")
    if "latency" not in getattr(args, "kinds", ()):
        return
    if max(args.batch) > _most(args):
        raise ConfigError(
            f"--batch {max(args.batch)} is more than --max-num-seqs {_most(args)}; raise that"
        )
    if args.profile is not None and args.executor == "process":
        raise ConfigError("--profile needs the engine in this process; leave out --executor")


def _positive(text: str) -> int:
    return _number(text, int, "a positive integer")


def _rate(text: str) -> float:
    return _number(text, float, "a positive number, or inf")


def _number(text: str, kind: Any, wanted: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected {wanted}, not '{text}'")
    return value


def _product(text: str) -> tuple[int, int]:
    count, _, length = text.lower().partition("x")
    return _positive(count), _positive(length)


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
