"""The configs and settings that come with the package, found by name.

``dropblock_det/configs`` is a link to the repository's ``configs``; a wheel holds the files themselves.
"""

from collections.abc import Iterable
from pathlib import Path

from dropblock_det.errors import InputError

CONFIGS = Path(__file__).parent / "configs"
FIRST = CONFIGS / "quickstart.yaml"  # what is trained where no config is given


def config_file(name: str | Path) -> Path:
    """Returns a config's file: that of the name, or else the shipped one, such as ``quickstart``.

    Raises:
        InputError: There is neither; says which are shipped.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or (path.exists() and not path.is_dir()):
        return path
    files = {str(path.relative_to(CONFIGS))[: -len(".yaml")]: path for path in CONFIGS.rglob("*.yaml")}
    if str(name) in files:
        return files[str(name)]
    of_settings = "settings" in Path(name).parts
    alike = sorted(known for known in files if ("settings" in Path(known).parts) == of_settings)
    raise InputError(f"{name}: no such file, and no shipped config; {_there_are(alike)}")


def settings_folder(name: str | Path | None) -> Path:
    """Returns a folder of settings: that of the name, or else those shipped for a task (None: detection).

    Raises:
        InputError: There is neither; says which are shipped.
    """
    folders = {"detection": CONFIGS / "settings"}
    folders |= {path.parent.name: path for path in CONFIGS.glob("*/settings")}
    if name is None:
        return folders["detection"]
    if Path(name).is_dir():
        return Path(name)
    if str(Path(name)) in folders:
        return folders[str(Path(name))]
    raise InputError(f"{name}: no such folder, and no shipped settings; {_there_are(folders)}")


def _there_are(names: Iterable[str]) -> str:
    return f"there are {', '.join(names)}"
