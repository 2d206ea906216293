"""When the user's input is wrong or the machine refuses: one line, exit status 2, no traceback."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


class InputError(ValueError):
    """The user's input is wrong. The message is one line: the file or argument, and what to do."""


def printable(text: object) -> str:
    """Returns a text on one line that a terminal shows as it is: what would control it is written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def refusal(error: OSError) -> str:
    """Returns a line that says what the disk or the network refused, and what helps."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        hint = "make room and start again; what is there is kept"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "choose a place that you may write to"
    elif error.errno == errno.ELOOP:
        hint = "its links lead in a circle"
    else:
        hint = "check the name" if error.filename else ""
    file = error.filename2 or error.filename or ("the network" if hasattr(error, "reason") else None)
    parts = [os.fsdecode(file) + ":" if isinstance(file, str | bytes | os.PathLike) else ""]
    parts += [error.strerror or str(getattr(error, "reason", error)), f"({hint})" if hint else ""]
    return " ".join(filter(None, parts))


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raises what the disk refuses while ``folder`` is written to as an :class:`InputError` with its name."""
    try:
        yield
    except BrokenPipeError:  # not the disk: the reader of our output has left
        raise
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise InputError(refusal(error)) from error


def run_tool(main: Callable[[], object]) -> None:
    """Runs a command-line tool's ``main``, its imports included, and ends the process as the shell expects.

    Exit status 2 and one ``error:`` line on stderr for an :class:`InputError`, for what the disk or the
    network refuse and for packages that are not installed; 130 after Ctrl-C, 141 when the reader of a pipe
    has left. Anything else is a fault of ours and keeps its traceback.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - who started the process closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack some characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # a full disk behind it shows here at the latest
    except InputError as error:
        _end(2, f"error: {error}")
    except KeyboardInterrupt:
        _end(130, "interrupted")
    except BrokenPipeError:
        _end(141, "")
    except OSError as error:
        _end(2, f"error: {refusal(error)}")
    except ModuleNotFoundError as error:
        if (error.name or "dropblock_det").startswith("dropblock_det"):
            raise
        _end(2, f'error: {error.name} is not installed; pip install "dropblock_det[train]" has all of it')


def _end(status: int, line: str) -> None:
    if line:
        with contextlib.suppress(OSError):  # a full disk behind it: the status says it all the same
            print(printable(line), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # Python tries again at its end, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
