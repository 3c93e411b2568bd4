"""`autodeploy zoo`: what becomes of every architecture, or of one model, when it is deployed."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from .measure import Record

_EXAMPLES = """\
examples:
  autodeploy zoo --model examples/demo_model
  autodeploy zoo llama mamba2 deepseek_v3
  autodeploy zoo --sample
  autodeploy zoo --sample --rounding --device cuda --jobs 8
  autodeploy zoo --json new.json --compare docs/zoo.json
"""


def add_parser(commands: Any) -> None:
    """Adds `zoo` to the command line."""
    parser = commands.add_parser(
        "zoo", help="measure which architectures deploy, and how", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("names", nargs="*", help="architectures (model types); default: all")
    parser.add_argument("--model", help="one checkpoint or model id instead, with a full report")
    parser.add_argument(
        "--weights", action="store_true",
        help="with --model: the checkpoint itself, not a tiny random model of its config",
    )  # fmt: skip
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    parser.add_argument("--sample", action="store_true", help="30 architectures, one of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default 2)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each (300)")
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--markdown", type=Path, help="write the page to read here")
    parser.add_argument(
        "--rounding", action="store_true",
        help="deploy and serve in bfloat16 instead, and compare with the plain model's own "
        "rounding; with --model: the checkpoint itself",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="with --rounding: where (default cpu)")
    parser.add_argument("--compare", type=Path, help="an earlier --json: print what changed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Returns 0 if everything that deployed is exact and nothing failed, else 1."""
    if args.jobs < 1 or args.timeout <= 0:
        raise ConfigError("--jobs and --timeout must be positive")
    if args.model is not None:
        if args.names or args.sample:
            raise ConfigError("--model takes the place of names and --sample; give one of them")
        return _round_one(args) if args.rounding else _report_one(args)
    return _run_many(args)


def _run_many(args: argparse.Namespace) -> int:
    from . import report
    from .architectures import SAMPLE, all_architectures
    from .run import run_zoo

    old = _earlier(args.compare)
    known = all_architectures()
    names = list(SAMPLE) if args.sample else args.names or known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"transformers maps no causal language model to '{unknown[0]}'")
    if args.rounding:
        return _run_rounding(names, args)
    started = time.monotonic()
    records = run_zoo(names, jobs=args.jobs, timeout=args.timeout, progress=_show)
    seconds = time.monotonic() - started
    if args.json is not None:
        args.json.write_text(report.to_json(records, report.versions()))
    if args.markdown is not None:
        args.markdown.write_text(report.markdown(records, report.versions(), seconds))
    for heading, members in report.groups(records).items():
        print(f"{heading}: {len(members)}: {report.summary(members)}")
    print(f"{seconds:.0f} s")
    if old is not None:
        print("\n".join(report.compare(old, records)) or "nothing changed")
    return int(any(r.failed or (r.rung and not r.exact) for r in records))


def _run_rounding(names: list[str], args: argparse.Namespace) -> int:
    from .rounding import MeasureRounding, Rounding, row, table
    from .run import run_each

    def show(result: Rounding, done: int, total: int) -> None:
        print(f"[{done}/{total}] {row(result)}", file=sys.stderr, flush=True)

    measure = MeasureRounding(args.device)
    results = run_each(names, measure, jobs=args.jobs, timeout=args.timeout, progress=show)
    print(table(results))
    return int(not all(r.agrees for r in results))


def _round_one(args: argparse.Namespace) -> int:
    from ..checkpoint import load_model
    from .measure import quiet
    from .rounding import Models, measure_rounding, table

    quiet()

    def load(dtype: str) -> Any:
        return load_model(args.model, dtype, args.device, args.trust_remote_code)

    def models() -> Models:
        low, exact = load("bfloat16"), load("float32")
        # The same numbers, if the checkpoint has finer ones.
        exact.load_state_dict(low.state_dict())
        return low, exact

    result = measure_rounding(str(args.model), models)
    print(table([result]))
    return int(not result.agrees)


def _earlier(path: Path | None) -> dict[str, Record] | None:
    from .report import from_json

    if path is None:
        return None
    try:
        return from_json(path)[0]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--compare {path}: {error}") from error


def _show(record: Record, done: int, total: int) -> None:
    """A line for each, on standard error, as it is done."""
    cause = f"  {record.cause[:100]}" if record.cause else ""
    print(
        f"[{done}/{total}] {record.name:26} {record.outcome:18} {record.seconds:5.1f} s{cause}",
        file=sys.stderr,
        flush=True,
    )


def _report_one(args: argparse.Namespace) -> int:
    from transformers import AutoConfig

    from ..checkpoint import load_model
    from .measure import Record, measure_architecture, measure_model, quiet
    from .text_report import text

    quiet()
    try:
        config = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{args.model}' has no readable config: {error}") from error
    if args.weights:
        record = Record(str(args.model))
        # In bfloat16 a small mistake could not be told from rounding.
        model = load_model(args.model, "float32", "cpu", args.trust_remote_code)
        measure_model(model, record)
    else:
        record = measure_architecture(str(args.model), lambda: config)
    print(text(record, tiny=not args.weights))
    return int(record.rung == 0 or not record.exact)
