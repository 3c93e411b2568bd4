"""The `autodeploy` command: parses, sets up logging, and turns errors into one line.

Nothing heavy is imported before a command runs, so `--help` answers at once. Results go to
standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .. import __version__
from ..bench import main as bench
from ..errors import AutodeployError
from ..zoo import main as zoo
from . import env, generate, recipe, serve

_LOGGERS = (None, "autodeploy", "uvicorn", "uvicorn.error", "uvicorn.access")
"""That a command may set up."""
_EXAMPLES = """\
examples:
  autodeploy generate examples/demo_model --prompt "def fib(n):" --max-tokens 64
  autodeploy serve examples/demo_model --port 8000
  autodeploy recipe show default
  autodeploy zoo --model examples/demo_model
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
    for module in (generate, serve, recipe, zoo, env, bench):
        module.add_parser(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 1 after an error, 130 after Ctrl-C.

    Raises:
        SystemExit: 2 for wrong usage, 0 after --help and --version.
        AutodeployError: with --debug, instead of one line on standard error.
    """
    args = parser().parse_args(argv)
    with own_logging(args.verbose or args.debug):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        status = run(args)
        # A reader who left is noticed here, and not by the interpreter while it ends.
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read our output had enough. What is still buffered must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (AutodeployError, OSError) as error:
        if args.debug:
            raise
        print(f"autodeploy: error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("autodeploy: interrupted", file=sys.stderr)
        return 130


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def own_logging(verbose: bool) -> Iterator[None]:
    """Logs for people on standard error; commands may change it (`serve` does).

    Whoever called `main` from Python finds logging as it was, afterwards.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(one, one.handlers[:], one.level, one.propagate, one.disabled) for one in loggers]
    own = logging.getLogger("autodeploy")
    own.handlers[:] = [_handler()]
    own.propagate = False
    own.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        for one, handlers, level, propagate, disabled in before:
            one.handlers[:], one.propagate, one.disabled = handlers, propagate, disabled
            one.setLevel(level)


def _handler() -> logging.Handler:
    """Rich output for a terminal; in a file or pipe, lines stay whole."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        return RichHandler(console=Console(stderr=True), show_path=False)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    return handler
