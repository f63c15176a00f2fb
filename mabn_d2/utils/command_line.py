"""What the tools say when they cannot start: one line on stderr."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn


def one_line(error: BaseException) -> str:
    """
    What an error says, without line breaks, in some 600 characters at most.

    Messages of types that are not meant for a user, such as a `TypeError` from the depth of a library,
    begin with the type.
    """
    text = str(error)
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])  # str() shows its repr
    text = " ".join(text.split())
    text = text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"
    if isinstance(error, (ValueError, OSError)):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def exit_with(message: str, tool: str | None = None) -> NoReturn:
    """Ends the program with status 2 and `<tool>: error: <message>` on stderr."""
    tool = tool or os.path.basename(sys.argv[0])
    print(f"{tool}: error: {message}", file=sys.stderr)
    sys.exit(2)


def without_usage(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, whose errors are one line from now on; the usage is what `--help` is for."""
    parser.error = lambda message: exit_with(message, parser.prog)  # type: ignore[method-assign]
    return parser


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """
    Ends the program with one line if the block raises.

    `MABN_D2_TRACEBACK=1` in the environment shows where it was raised.
    """
    try:
        yield
    except Exception as error:
        if os.getenv("MABN_D2_TRACEBACK"):
            raise
        exit_with(one_line(error))
