import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.local_coco import one_image, right, server, site  # noqa: F401 (fixtures)
from support.tiny_run import arguments, start

from dropblock_det.errors import run_tool

if "PYTEST_XDIST_WORKER" in os.environ:  # processes that share the cores, as those that they start do
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# Jobs in the background of a shell ignore Ctrl-C, and so would all processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_coco() -> Path:
    """A real COCO folder, where DROPBLOCK_DET_COCO names one: annotations/, train2017/, val2017/."""
    folder = os.environ.get("DROPBLOCK_DET_COCO")
    if not folder:
        pytest.skip("set DROPBLOCK_DET_COCO to a COCO folder to run on real images")
    return Path(folder)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny trainings write their scenes."""
    return tmp_path_factory.mktemp("data") / "scenes"


@pytest.fixture(scope="session")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny training, made once, in its own process as a user's."""
    folder, here = tmp_path_factory.mktemp("runs") / "one", tmp_path_factory.mktemp("here")
    process = start(arguments(scenes, folder), stdout=subprocess.PIPE, text=True, cwd=here)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert not list(here.iterdir()), "it writes into its own folder alone"
    (folder / "stdout.txt").write_text(output)
    return folder


@pytest.fixture
def content() -> dict[str, Any]:
    """A small instances file: ids that are not contiguous, a crowd, an image without boxes."""
    return {
        "images": [
            {"id": 7, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "a.png", "width": 20, "height": 10},
            {"id": 9, "file_name": "empty.png", "width": 8, "height": 8},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 2, "name": "bicycle"}],
        "annotations": [
            {"id": 5, "image_id": 7, "category_id": 18, "bbox": [1, 2, 10, 8], "area": 61.5, "iscrowd": 0},
            {"id": 6, "image_id": 7, "category_id": 2, "bbox": [20, 5, 30, 10], "area": 250, "iscrowd": 0},
            {"id": 8, "image_id": 7, "category_id": 2, "bbox": [0, 0, 40, 30], "area": 900, "iscrowd": 1},
            {"id": 0, "image_id": 3, "category_id": 2, "bbox": [4, 3, 6, 5], "area": 30, "iscrowd": 0},
            {"id": 4, "image_id": 3, "category_id": 2, "bbox": [4, 3, 0, 5], "area": 0, "iscrowd": 0},
        ],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes a content's JSON and random images of its sizes; returns the JSON and the image folder."""

    def write(content: dict[str, Any]) -> tuple[Path, Path]:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for image in content["images"]:
            pixels = rng.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / image["file_name"])
        (tmp_path / "instances.json").write_text(json.dumps(content))
        return tmp_path / "instances.json", folder

    return write


@pytest.fixture
def line_of(capsys: pytest.CaptureFixture[str]) -> Callable[[Callable[[], Any]], str]:
    """What a tool prints when an action fails as a user's mistake: one line, and exit status 2."""

    def line_of(action: Callable[[], Any]) -> str:
        with pytest.raises(SystemExit) as caught:
            run_tool(action)
        assert caught.value.code == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert printed.count("\n") == 1
        assert len(printed) < 700
        return printed

    return line_of
