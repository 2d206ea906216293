"""The scripts of tools/, run as a user does or loaded as modules."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

TOOLS = Path(__file__).parents[2] / "tools"


def run_tool(name: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]


def one_error_line(result: subprocess.CompletedProcess[str]) -> str:
    """What a tool says of a user's mistake: nothing but this line on stderr, and exit status 2."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def tool_module(name: str) -> ModuleType:
    """The script as a module, its main not run."""
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), TOOLS / name)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
