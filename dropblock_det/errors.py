"""What happens when the user's input is wrong: one line, exit status 2, no traceback."""

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


class InputError(ValueError):
    """The user's input is wrong. The message is one line: the file or argument, and what to do."""


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """What the disk refuses while something is written to ``folder`` is the user's to solve: one line."""
    try:
        yield
    except BrokenPipeError:  # no disk: whoever reads our output has left
        raise
    except OSError as error:
        hint = "choose a folder that you may write to"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "make room and start again; what is there is kept"
        raise InputError(
            f"{error.filename2 or error.filename or folder}: {error.strerror}; {hint}"
        ) from error


def run_tool(main: Callable[[], None]) -> None:
    """Runs a command-line tool's ``main`` and ends the process as the shell expects.

    Exit status 2 and one ``error:`` line on stderr for an :class:`InputError`, 130 after Ctrl-C.
    Anything else is a fault of ours and keeps its traceback.
    """
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
