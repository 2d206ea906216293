"""What happens when the user's input is wrong: one line, exit status 2, no traceback."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """The user's input is wrong. The message is one line: the file or argument, and what to do."""


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
