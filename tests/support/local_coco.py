"""COCO's server on this machine: fixtures and helpers of the tests that fetch."""

import hashlib
import json
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.coco_like import annotations, make_site
from support.faulty_server import FaultyServer

from dropblock_det.coco_subset.choose import Options
from dropblock_det.coco_subset.download import Archive, Network
from dropblock_det.coco_subset.prepare import prepare

OPTIONS = Options(12, 5)
ARCHIVE = "/annotations/annotations_trainval2017.zip"


@pytest.fixture(scope="session")
def site():
    """What the server holds, by path."""
    return make_site()


@pytest.fixture
def server(site, monkeypatch):
    """It, running."""
    monkeypatch.setenv("no_proxy", "*")
    with FaultyServer() as server:
        server.files = dict(site)
        yield server


@pytest.fixture(scope="session")
def right(site, tmp_path_factory):
    """The tree of an undisturbed run."""
    folder = tmp_path_factory.mktemp("right")
    with FaultyServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        server.files = site
        prepare(folder / "coco", OPTIONS, network=network(server))
    return tree(folder)


@pytest.fixture(name="image")
def one_image(right) -> str:
    """The path on the server of one train image of that tree."""
    return "/" + sorted(name for name in right if "train2017/" in name and name.endswith("jpg"))[
        3
    ].removeprefix("coco/")


def archive_of(server: FaultyServer) -> Archive:
    content = server.files[ARCHIVE]
    return Archive(ARCHIVE[1:], len(content), hashlib.sha256(content).hexdigest())


def network(server: FaultyServer, **changes: object) -> Network:
    quick = {"timeout": 10.0, "backoff": 0.01, "attempts": 3, "patience": 3.0} | changes
    return Network(server.url, archive_of(server), **quick)  # type: ignore[arg-type]


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def serve_many(count: int) -> None:
    """Serves ``count`` images of 640x480 pixels and 170 kB until stdin ends; says where on stdout."""
    rng, pictures = np.random.default_rng(0), []
    for _ in range(20):
        coarse = Image.fromarray(rng.integers(0, 256, (120, 160, 3), np.uint8)).resize((640, 480))
        noisy = np.asarray(coarse).astype(int) + rng.integers(-12, 13, (480, 640, 3))
        out = BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "jpeg", quality=90)
        pictures.append(out.getvalue())
    content = annotations("train", count)
    for entry in content["images"]:
        entry.update(width=640, height=480)
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("annotations/instances_train2017.json", json.dumps(content))
    with FaultyServer() as server:
        server.files = {
            f"/train2017/{entry['file_name']}": pictures[i % 20] for i, entry in enumerate(content["images"])
        }
        server.files[ARCHIVE] = packed.getvalue()
        archive_facts = archive_of(server)
        print(server.url, archive_facts.size, archive_facts.sha256, flush=True)
        sys.stdin.read()
