"""What arguments may be: types with ranges, checked alike on command lines, in configs and checkpoints."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from dropblock_det.errors import InputError

Count = Annotated[int, Meta(ge=1, lt=2**31)]
Natural = Annotated[int, Meta(ge=0, lt=2**31)]
Side = Annotated[int, Meta(ge=1, le=2**16)]  # of an image or of what is seen on it, in pixels
Seed = Annotated[int, Meta(ge=0, lt=2**32)]  # what numpy's and Lightning's generators take
Workers = Annotated[int, Meta(ge=0, le=1024)]  # processes that load images
Share = Annotated[float, Meta(ge=0, le=1)]
Rate = Annotated[float, Meta(ge=0, le=1e6)]


def checked_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], origin: str = ""
) -> dict[str, Any]:
    """Checks arguments against a function's annotations: their types and ranges, and that none is unknown.

    Args:
        function: A function or a class. Its annotations are types that msgspec decodes, or ``Path``.
        arguments: By name, as plain data. Those that the function needs may be missing.
        origin: What to put before a name in a message, such as ``"model."`` or a file's name.

    Returns:
        The arguments, decoded.

    Raises:
        InputError: One of them has another type, is out of range, or is none of the function's.
    """
    hints = _hints(function)
    checked = {}
    for name, value in arguments.items():
        if name not in hints:
            raise InputError(f"{origin}{name}: there is no such argument")
        if any(
            "\0" in word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)
        ):
            raise InputError(f"{origin}{name}: got {value!r}; no name holds a NUL byte")
        try:
            checked[name] = msgspec.convert(value, hints[name], dec_hook=_path)
        except (ValueError, OverflowError) as error:
            given = repr(value)
            raise InputError(
                f"{origin}{name}: got {given[:100]}{'...' if len(given) > 100 else ''}; {error}"
            ) from None
    return checked


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of all arguments; where ``__init__`` passes ``**more`` on, the base class's too."""
    if not inspect.isclass(function):
        return get_type_hints(function, include_extras=True)
    hints: dict[str, Any] = {}
    for kind in function.__mro__:
        init: Any = kind.__init__  # type: ignore[misc]
        own = inspect.signature(init).parameters.values()
        passed_on = {parameter.name for parameter in own if parameter.kind is parameter.VAR_KEYWORD}
        hints = get_type_hints(init, include_extras=True) | hints
        hints = {name: hint for name, hint in hints.items() if name not in passed_on}
        if not passed_on:
            break
    return hints


def _path(kind: type, value: Any) -> Path:
    if kind is not Path:
        raise NotImplementedError(kind)
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError("give a file's or folder's name")
    return Path(value)
