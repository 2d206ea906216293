"""Whatever stands in annotations and manifests: a subset that trains, or one line."""

import copy
import io
import json
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.changes import anything, places, replace_somewhere
from support.coco_like import annotations, jpeg

from dropblock_det.coco_subset.choose import Options
from dropblock_det.coco_subset.manifest import read_manifest
from dropblock_det.coco_subset.prepare import MANIFEST, annotations_file, prepare, verify
from dropblock_det.coco_subset.tool import show
from dropblock_det.commands import PlainConsole
from dropblock_det.datasets.annotations import load_annotations
from dropblock_det.errors import InputError

UNTOUCHED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FULL = annotations("val", 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    for name in ("annotations", "val2017"):
        (folder / name).mkdir()
    for entry in FULL["images"]:
        (folder / "val2017" / entry["file_name"]).write_bytes(jpeg(entry))
    return folder


@UNTOUCHED
@given(place=places, value=anything)
def test_any_change_of_the_annotations_is_a_line_or_a_subset(place, value, source, tmp_path, monkeypatch):
    # A picture takes half a second.
    monkeypatch.setattr("dropblock_det.coco_subset.tool.write_figure", lambda path, figure: None)
    changed = copy.deepcopy(FULL)
    replace_somewhere(changed, place, value)
    (source / annotations_file("val")).write_text(json.dumps(changed))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    fault = None
    try:
        manifest = prepare(tmp_path / "out", Options(0, 3), source=source)
    except InputError as error:
        fault = str(error)
    if fault is not None:
        assert "\n" not in fault
        return
    assert verify(tmp_path / "out", manifest) == []
    assert read_manifest(tmp_path / "out" / MANIFEST) == manifest
    show(PlainConsole(file=io.StringIO()), tmp_path / "out", manifest)
    assert len(load_annotations(tmp_path / "out" / annotations_file("val")).images) == 3


@UNTOUCHED
@given(place=st.lists(st.integers(0, 20), min_size=1, max_size=6), value=anything)
def test_any_change_of_a_manifest_is_a_line_or_seen(place, value, source, tmp_path):
    (source / annotations_file("val")).write_text(json.dumps(FULL))
    manifest = prepare(tmp_path / "coco", Options(0, 3), source=source)
    changed = json.loads((tmp_path / "coco" / MANIFEST).read_text())
    replace_somewhere(changed, place, value)
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed))
    fault = None
    try:
        read = read_manifest(path)
    except InputError as error:
        fault = str(error)
    if fault is not None:
        assert "\n" not in fault
        assert str(path) in fault
        return
    problems = verify(tmp_path / "coco", read)
    assert bool(problems) == (files(read) != files(manifest))


def files(manifest):
    part = manifest.splits["val"]
    return part.json_sha256, {(image.file_name, image.sha256) for image in part.images}
