"""The command line of a tool: made from a function's signature and docstring, so that it is written once."""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from rich.console import Console
from rich.text import Text

from dropblock_det.arguments import checked_arguments
from dropblock_det.errors import InputError, printable

MAIN = Path(__file__).with_name("__main__.py")  # the program where it was started by python -m


def command(
    what: Callable[..., Any] | Mapping[str, Callable[..., Any]], words: Sequence[str], name: str
) -> Any:
    """Calls a function with a command line's arguments.

    A parameter without a default is given by its place, the others by ``--name``; a list or tuple takes
    several words, and a ``bool`` is a flag. Types, ranges and help come from annotations and docstring.

    Args:
        what: The function; or several of a module by name, of which the first word chooses one.
        words: The command line after the command's name.
        name: The command's, for ``--help``.

    Returns:
        What the function returns.

    Raises:
        InputError: The words don't fit the signature.
    """
    prog = started_as(name)
    if callable(what):
        function, given = what, parsed(_parser(what, prog), words).as_dict()
    else:
        about = _help(inspect.getmodule(next(iter(what.values()))))
        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, prog=prog, description=about)
        chosen = parser.add_subcommands(required=True)
        for first, choice in what.items():
            subparser = _parser(choice, f"{prog} {first}")
            chosen.add_subcommand(first, subparser, help=subparser.description)
        found = parsed(parser, words)
        function, given = what[found.subcommand], found[found.subcommand].as_dict()
    return function(**checked_arguments(function, given))


def started_as(name: str) -> str:
    """Returns how to run a command, in the way in which this process was started.

    That is a script of a checkout's tools/, ``python -m dropblock_det`` or the installed ``dropblock-det``.
    """
    program = Path(sys.argv[0])
    script = program.parent / f"{name.replace('-', '_')}.py"
    if program.parent.name == "tools" and script.exists():
        return f"python {script}"
    return f"{'python -m dropblock_det' if program == MAIN else 'dropblock-det'} {name}"


def parsed(parser: ArgumentParser, args: Sequence[str]) -> Namespace:
    """Parses words.

    Raises:
        InputError: They don't fit, in one line.
    """
    try:
        return parser.parse_args(list(args))
    except (argparse.ArgumentError, UnicodeError) as error:
        said = " ".join(str(error).split())
        # jsonargparse names each type that the setting may have; what matters is which name is wrong.
        said = re.sub(r"Does not validate against .*(Option '[^']+' is not accepted).*", r"\1", said)
        raise InputError(f"{said[:500]}; --help lists what there is") from error


class PlainHelp(DefaultHelpFormatter):
    """jsonargparse's help, without what a reader can't use."""

    def _expand_help(self, action: argparse.Action) -> str:
        """Leaves out long lists of classes (torch has 500 modules), and msgspec's spelling of a number."""
        text = re.sub(r", known subclasses: [^)]{3000,}(?=\))", "", super()._expand_help(action))
        return re.sub(r"Annotated\[(\w+), msgspec\.Meta\([^)]*\)\]", r"\1", text)


def _help(documented: Any) -> str:
    return (inspect.getdoc(documented) or "").partition("\n\n")[0]


def _parser(function: Callable[..., Any], prog: str) -> ArgumentParser:
    about = _help(function)
    parser = ArgumentParser(
        exit_on_error=False, allow_abbrev=False, prog=prog, description=about, formatter_class=PlainHelp
    )
    kinds = get_type_hints(function)
    helps = {p.arg_name: p.description for p in docstring_parser.parse(function.__doc__ or "").params}
    for name, parameter in inspect.signature(function).parameters.items():
        options: dict[str, Any] = {"help": helps.get(name)}
        required = parameter.default is parameter.empty
        if not required:
            default = parameter.default
            options["default"] = str(default) if isinstance(default, Path) else default
        kind = kinds[name]
        if get_origin(kind) in (Union, UnionType) and len(get_args(kind)) == 2 and NoneType in get_args(kind):
            kind = next(choice for choice in get_args(kind) if choice is not NoneType)
        if kind is bool:
            options["action"] = "store_true"
        elif get_origin(kind) in (list, tuple):
            options |= {"type": str if Path in get_args(kind) else get_args(kind)[0], "nargs": "+"}
            if get_origin(kind) is tuple and ... not in get_args(kind):
                options["nargs"] = len(get_args(kind))
        else:
            options["type"] = str if kind is Path else kind  # Path("") is the working directory
        parser.add_argument(name if required else f"--{name.replace('_', '-')}", **options)
    return parser


class PlainConsole(Console):
    """A terminal for text from anywhere: strings are shown as they are, and none is read as markup.

    Styles are given as rich's objects and arguments.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def on_broken_pipe(self) -> None:
        """Leaves it to ``run_tool``; rich's own ends the process with status 1."""
        raise BrokenPipeError

    def render_str(self, text: str, **options: Any) -> Text:
        """Makes a string rich's text; control characters in it become visible."""
        shown = "\n".join(map(printable, text.split("\n")))
        return super().render_str(shown, **{**options, "markup": False, "emoji": False, "highlight": False})
