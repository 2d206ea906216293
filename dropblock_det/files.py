"""Files, one way each: reading what may come from anyone, writing whole files."""

import codecs
import contextlib
import hashlib
import io
import json
import os
import re
import socket
import stat
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import yaml

from dropblock_det.errors import InputError

MAX_BYTES = 4 * 2**30  # COCO's own training annotations have 0.5 GB
DPI = 120  # of pictures
MAX_YAML_BYTES = 2**20
MAX_YAML_VALUES = 100_000  # a few lines of YAML whose aliases hold aliases stand for billions


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Reads a regular file of at most ``limit`` bytes.

    Raises:
        InputError: There is no such file, it can't be read, is larger, or is a folder, a pipe or a device.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write to it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            content = file.read(min(limit, status.st_size) + 1) if stat.S_ISREG(status.st_mode) else None
    except FileNotFoundError:
        raise InputError(f"{path}: cannot be read: there is no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL byte in the name
        raise InputError(f"{str(path)!r}: not a file's name ({error})") from None
    if content is None:
        raise InputError(f"{path}: not a regular file; give one")
    if len(content) > limit:
        raise InputError(f"{path}: has {status.st_size} bytes, more than the {limit} that are read")
    return content


def read_json(path: Path, kind: Any = Any, limit: int = MAX_BYTES) -> Any:
    """Reads strict JSON from a file whose writer isn't trusted.

    Args:
        path: The file.
        kind: What it must hold: any type that msgspec decodes into, such as a dataclass. Its fields are
            checked; names that it doesn't have are ignored.
        limit: The most bytes that it may have.

    Raises:
        InputError: It can't be read, is not JSON, or holds something else.
    """
    content = read_bytes(path, limit).removeprefix(codecs.BOM_UTF8)
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise _unexpected(path, error) from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; replace the file") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise InputError(
            f"{path}: not valid JSON ({error}{_near(content, error)}); is the file complete?"
        ) from None


def _near(content: bytes, error: Exception) -> str:
    """What stands before the byte that a message names, so that a reader finds the record with the fault."""
    found = re.search(r"\(byte (\d+)\)", str(error))
    if not found:
        return ""
    at = int(found[1])
    return f" after {content[max(0, at - 60) : at].decode(errors='replace')!r}"


def checked(content: Any, kind: Any, path: Path) -> Any:
    """Checks what was decoded from a file, and gives it its type, as :func:`read_json` does in one go.

    Raises:
        InputError: It holds something else.
    """
    try:
        return msgspec.convert(content, kind)
    except ValueError as error:  # msgspec's, or the UnicodeError of a lone surrogate
        raise _unexpected(path, error) from None


def _unexpected(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not what it should be: {error}; replace the file")


class _OnceEach(yaml.SafeLoader):
    """Refuses a name that is given twice; YAML's own loader takes the last in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = Counter(name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode))
        for name in names - Counter({*names}):
            raise yaml.YAMLError(f"{name!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads settings, names with values, from a YAML file whose writer isn't trusted.

    Raises:
        InputError: It can't be read, is not YAML, or holds something else or too much.
    """
    content = read_bytes(path, MAX_YAML_BYTES)
    try:
        settings = yaml.load(content, _OnceEach)
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; replace the file") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # TypeError: a list as a name
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: not a config: its top level must be names with values")
    left, values = MAX_YAML_VALUES, [settings]
    while values:
        value = values.pop()
        left -= 1
        if left < 0:
            raise InputError(f"{path}: holds more than {MAX_YAML_VALUES} values, or an alias of itself")
        if isinstance(value, dict | list):
            values.extend(value.values() if isinstance(value, dict) else value)
    return settings


def check_replaceable(path: Path, *read: Path) -> None:
    """Refuses a name for an output that would destroy something else: better before hours than after.

    Args:
        path: The output's name.
        *read: What the same command reads.

    Raises:
        InputError: It is the name of a folder, a device or a link, or of a file that is read.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"{path}: not a regular file, so it is not replaced; give another name")
    if path.exists() and any(other.exists() and path.samefile(other) for other in read):
        raise InputError(f"{path}: is read by the same command, so it is not replaced; give another name")


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Replaces a file whole: what is written goes beside it, to the disk, and then takes its name.

    A reader, or a restart after a power cut, sees the old file or the new one, and a failure leaves nothing.

    Args:
        path: A new name or that of a regular file; its folder is made.

    Raises:
        InputError: The name is that of a folder, a device or a link.
        OSError: The disk refuses.
    """
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:50]}.{process_name(os.getpid())}."
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".part")
    except OSError as error:  # names the temporary file
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with open(handle, "wb") as file:
            _remove_abandoned(path, os.fstat(handle).st_mtime)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would hide it from the rest of a group
            os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        refused = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save's own
        if isinstance(refused, OSError) and refused.errno and refused.filename in (None, temporary):
            raise OSError(refused.errno, refused.strerror, str(path)) from error
        raise


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _remove_abandoned(path: Path, now: float) -> None:
    """Removes what killed processes left half written."""
    for leftover in path.parent.glob(f".{_escaped(path.name[:50])}.*.part"):
        with contextlib.suppress(OSError):  # another process was faster
            if is_gone(leftover.name.split(".")[-3], now - leftover.stat().st_mtime):
                leftover.unlink()


def _machine() -> str:
    """What the processes share whose numbers mean the same: a kernel, and the container on it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux alone has these
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:8]


MACHINE = _machine()
SILENT_S = 120.0  # after which a process of another machine counts as gone


def process_name(pid: int) -> str:
    """Returns a name for a process of this machine that no other has, on any machine, at any time."""
    return f"{MACHINE}-{pid}-{_birth(pid) or 0}"


def is_gone(process: str, silent_s: float) -> bool:
    """Returns whether a process has ended.

    Args:
        process: What :func:`process_name` gave on any machine.
        silent_s: For how many seconds nothing was heard of it. Of another machine's nothing else is known.
    """
    named = re.fullmatch(r"([0-9a-f]{8})-([0-9]{1,9})-([0-9]+)", process)
    if named is None or named[1] != MACHINE:
        return silent_s > SILENT_S
    birth = _birth(int(named[2]))
    return birth is None or (birth > 0 and birth != int(named[3]))


def _birth(pid: int) -> int | None:
    """When a process began, in the kernel's count; 0 where that can't be had, None where there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # a system without /proc, or one that hides others' processes
        return 0
    return None if fields[0] in "ZX" else int(fields[19])  # Z: has ended, and its parent did not look


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file whole, see :func:`whole_file`."""
    with whole_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """:func:`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """:func:`write_text` of strict JSON: NaN and infinity are refused, for no other reader takes them."""
    plain = msgspec.to_builtins(data)
    write_text(path, json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_figure(path: Path, figure: Any) -> None:
    """:func:`write_bytes` of a matplotlib figure, as PNG."""
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        if "$" in text.get_text():  # a name from somewhere, and no formula; ticks get theirs when drawn
            text.set_parse_math(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    write_bytes(path, buffer.getvalue())
