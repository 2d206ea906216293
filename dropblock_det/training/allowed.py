"""Which modules the classes of a config may come from: to import a module is to run it.

Only the command line adds to them, for its own process: a config that somebody sends can't, and neither can
the ``config.yaml`` of a run that is resumed.
"""

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Sequence

from jsonargparse import set_parsing_settings

from dropblock_det.errors import InputError

PACKAGES = ("dropblock_det", "lightning", "torch", "torchvision")
OPTION = "--allow"


def allow(words: Sequence[str], stack: contextlib.ExitStack) -> list[str]:
    """Lets the parser import from :data:`PACKAGES` and what ``--allow`` names, and from nowhere else.

    Modules of one's own are found in the working directory too.

    Args:
        words: A command line.
        stack: Takes the permission back when it ends.

    Returns:
        The words without ``--allow``.

    Raises:
        InputError: There is no such module.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(OPTION, action="append", default=[])
    try:
        given, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise InputError(f"{error}; give a module, such as my_project.callbacks") from None
    own = [name for name in given.allow if name.partition(".")[0] not in PACKAGES]
    if own and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: nothing installed is hidden by a file that lies there
    for name in own:
        if not _exists(name):
            raise InputError(f"{OPTION} {name}: no such module here or among what is installed")
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*PACKAGES, *own])
    except ValueError as error:
        raise InputError(f"{OPTION}: {error}") from None
    stack.callback(set_parsing_settings, import_path_denylist=own)
    return rest


def _exists(name: str) -> bool:
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if name.startswith(error.name or ""):
            return False
        raise  # theirs imports what is not installed
