"""The `autodeploy` command: parses, sets up logging, and turns errors into one line.

Nothing heavy is imported before a command runs, so `--help` answers at once. Results go to
standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..bench import main as bench
from ..errors import AutodeployError
from . import env, generate, recipe

_EXAMPLES = """\
examples:
  autodeploy generate examples/demo_model --prompt "def fib(n):" --max-tokens 64
  autodeploy recipe show default
  autodeploy bench throughput --against generate
  autodeploy env
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="autodeploy",
        description="Deploy any Hugging Face causal language model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"autodeploy {__version__}")
    root.add_argument("--debug", action="store_true", help="show the whole trace of an error")
    root.add_argument("-v", "--verbose", action="store_true", help="log what is being done")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (generate, recipe, env, bench):
        module.add_parser(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 for an error of ours, 2 for wrong usage, 130 for Ctrl-C."""
    args = parser().parse_args(argv)
    _set_up_logging(args.verbose or args.debug)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except AutodeployError as error:
        if args.debug:
            raise
        print(f"autodeploy: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("autodeploy: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough.
        sys.stderr.close()
        return 1


def _set_up_logging(verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("autodeploy")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
