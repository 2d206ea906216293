"""Broken and hostile data sets: each gives one line that names the file, or is read rightly."""

import copy
import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dropblock_det.datasets.annotations import MAX_BOXES_PER_IMAGE, coco_index, load_annotations
from dropblock_det.datasets.coco import CocoDataset
from dropblock_det.datasets.images import read_image
from dropblock_det.errors import InputError, run_tool
from dropblock_det.evaluation import coco_figures, load_results


def line_of(action, capsys) -> str:
    """What a tool prints when the action fails as a user's mistake: one line, and exit status 2."""
    with pytest.raises(SystemExit) as caught:
        run_tool(action)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert len(printed) < 700
    return printed


# --- The bytes of the annotations ---

RAW = {
    "empty": (b"", "not valid JSON"),
    "truncated": (b'{"images": [{"id": 1, "file_na', "not valid JSON"),
    "not JSON": (b"\xff\xd8\xff\xe0JFIF", "not valid JSON"),
    "Latin-1": ('{"images": "é"}'.encode("latin-1"), "not valid JSON"),
    "deep nesting": (b"[" * 200_000, "nested too deeply"),
    "deep nesting in an image": (b'{"images": [{"id": ' + b'{"a":' * 200_000, "nested too deeply"),
    "an integer of 10,000 digits": (b'{"images": [' + b"9" * 10_000 + b"]}", "not valid JSON"),
    "null": (b"null", "not an object"),
    "a results file": (b"[]", "not an object"),
}


@pytest.mark.parametrize("name", RAW)
def test_annotation_bytes(name, content, write, capsys):
    annotations, images = write(content)
    raw, reason = RAW[name]
    annotations.write_bytes(raw)
    line = line_of(lambda: CocoDataset(annotations, images), capsys)
    assert str(annotations) in line
    assert reason in line


def test_missing_files_and_folders(content, write, capsys, tmp_path):
    annotations, images = write(content)
    for files, named, reason in (
        ((tmp_path / "none.json", images), tmp_path / "none.json", "no such file"),
        ((annotations, tmp_path / "none"), tmp_path / "none", "no such image folder"),
        ((annotations, annotations), annotations, "no such image folder"),
        ((images, images), images, "can't be read"),
    ):
        line = line_of(lambda files=files: CocoDataset(*files), capsys)
        assert str(named) in line
        assert reason in line


def test_a_byte_order_mark_is_read(content, write):
    annotations, images = write(content)
    annotations.write_bytes(b"\xef\xbb\xbf" + annotations.read_bytes())
    assert len(CocoDataset(annotations, images)) == 3


# --- The records of the annotations: a path into the content, the value put there, and what the line says ---

DELETE = object()
BOX = ("annotations", 0, "bbox")
RECORDS = {
    "no images": (("images",), DELETE, 'no list "images"'),
    "images is an object": (("images",), {}, 'no list "images"'),
    "images is empty": (("images",), [], '"images" is empty'),
    "no annotations": (("annotations",), DELETE, 'no list "annotations"'),
    "no categories": (("categories",), DELETE, 'no list "categories"'),
    "categories is empty": (("categories",), [], '"categories" is empty'),
    "an image is a string": (("images", 1), "a.png", "images[1] is 'a.png'"),
    "an annotation is null": (("annotations", 1), None, "annotations[1] is None"),
    "an image id is a string": (("images", 0, "id"), "7", "whole number"),
    "an image id is true": (("images", 0, "id"), True, "whole number"),
    "an image id is 1.0": (("images", 0, "id"), 1.0, "whole number"),
    "an image id is negative": (("images", 0, "id"), -7, "whole number"),
    "an image id is 10^400": (("images", 0, "id"), 10**400, "whole number"),
    "an image has no id": (("images", 0, "id"), DELETE, "whole number"),
    "two images have one id": (("images", 0, "id"), 3, "ids must differ"),
    "two categories have one id": (("categories", 0, "id"), 2, "ids must differ"),
    "two annotations have one id": (("annotations", 1, "id"), 5, "ids must differ"),
    "width 0": (("images", 0, "width"), 0, '"width" 0'),
    "height -5": (("images", 0, "height"), -5, '"height" -5'),
    "width 10^30": (("images", 0, "width"), 10**30, '"width"'),
    "width is a string": (("images", 0, "width"), "40", '"width"'),
    "no height": (("images", 0, "height"), DELETE, '"height"'),
    "no file_name": (("images", 0, "file_name"), DELETE, '"file_name"'),
    "file_name is a number": (("images", 0, "file_name"), 7, '"file_name"'),
    "no bbox": (("annotations", 0, "bbox"), DELETE, "[x, y, width, height]"),
    "a box is a string": (BOX, "1 2 3 4", "[x, y, width, height]"),
    "a box of three": (BOX, [1, 2, 3], "[x, y, width, height]"),
    "a box of 100,000": (BOX, [1] * 100_000, "[x, y, width, height]"),
    "a box with NaN": (BOX, [1, 2, float("nan"), 4], "finite"),
    "a box with infinity": (BOX, [1, 2, float("inf"), 4], "finite"),
    "a box with 10^400": (BOX, [1, 2, 10**400, 4], "finite"),
    "a box with a string": (BOX, [1, 2, "3", 4], "finite"),
    "a box with true": (BOX, [1, 2, True, 4], "finite"),
    "a box of negative width": (BOX, [10, 2, -3, 4], "negative"),
    "a box of negative height": (BOX, [10, 2, 3, -4], "negative"),
    "an annotation of an unknown image": (("annotations", 0, "image_id"), 77, 'not in "images"'),
    "an annotation whose image is a list": (("annotations", 0, "image_id"), [7], 'not in "images"'),
    "an annotation of an unknown category": (("annotations", 0, "category_id"), 1, 'not in "categories"'),
    "an annotation without category": (("annotations", 0, "category_id"), DELETE, 'not in "categories"'),
    "iscrowd 2": (("annotations", 0, "iscrowd"), 2, '"iscrowd" 2'),
    "iscrowd is a list": (("annotations", 0, "iscrowd"), [], '"iscrowd" []'),
    "area NaN": (("annotations", 0, "area"), float("nan"), '"area" nan'),
    "area is negative": (("annotations", 0, "area"), -1, '"area" -1'),
    "area is a string": (("annotations", 0, "area"), "61", '"area" '),
    "a category without name": (("categories", 0, "name"), DELETE, '"name" None'),
    "a category name with an escape sequence": (("categories", 0, "name"), "\x1b[2Jdog", '"name"'),
    "a category name of two lines": (("categories", 0, "name"), "dog\nerror: none", '"name"'),
}
NAMES = {
    "up": "../b.png",
    "up and down": "images/../../b.png",
    "absolute": "/etc/passwd",
    "a drive": "C:\\b.png",
    "back slashes": "..\\b.png",
    "a share": "\\\\host\\b.png",
    "the folder itself": ".",
    "empty": "",
    "NUL": "b.png\0.txt",
    "two lines": "b.png\nerror: none",
    "5,000 letters": "x" * 5000,
    "a lone surrogate": "\ud800.png",
}


def put(content, path, value):
    *parents, last = path
    for step in parents:
        content = content[step]
    if value is DELETE:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize("name", RECORDS)
def test_annotation_records(name, content, write, capsys):
    annotations, images = write(content)
    path, value, reason = RECORDS[name]
    put(content, path, value)
    annotations.write_text(json.dumps(content))
    line = line_of(lambda: CocoDataset(annotations, images), capsys)
    assert str(annotations) in line
    assert reason in line


@pytest.mark.parametrize("name", NAMES)
def test_file_names_that_leave_the_folder(name, content, write, capsys):
    annotations, images = write(content)
    content["images"][0]["file_name"] = NAMES[name]
    annotations.write_text(json.dumps(content))
    line = line_of(lambda: CocoDataset(annotations, images), capsys)
    assert str(annotations) in line
    assert "images[0]" in line
    assert "file_name" in line


def test_a_million_boxes_on_one_image(content, write, capsys):
    annotations, images = write(content | {"annotations": []})
    empty = annotations.read_text()

    def write_boxes(number):
        box = '{"id": %d, "image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4]}'
        boxes = ", ".join(box % n for n in range(number))
        annotations.write_text(empty.replace('"annotations": []', f'"annotations": [{boxes}]'))

    write_boxes(1_000_000)
    assert "image 7 has 1000000 boxes" in line_of(lambda: CocoDataset(annotations, images), capsys)
    write_boxes(MAX_BOXES_PER_IMAGE)
    assert len(CocoDataset(annotations, images)[1][1]["boxes"]) == MAX_BOXES_PER_IMAGE


def test_what_is_odd_but_right_is_read(content, write):
    for annotation in content["annotations"]:  # as many tools write them
        del annotation["iscrowd"], annotation["area"]
    content["annotations"][0]["bbox"] = [-50, -50, 1e8, 1e8]  # cut to the image
    content["annotations"][1]["bbox"] = [39.95, 0, 0.2, 30]  # 0.05 pixels remain: dropped
    content["images"][2]["file_name"] = "naïve 图.png"
    annotations, images = write(content)
    dataset = CocoDataset(annotations, images)
    assert dataset[1][1]["boxes"].tolist() == [[0, 0, 40, 30], [0, 0, 40, 30]]
    assert dataset.dropped_boxes == 2
    assert dataset.coco.loadAnns([3])[0]["area"] == 1200
    assert dataset[2][0].shape == (3, 8, 8)


# --- Image files on the disk ---


@pytest.fixture
def one(content, write):
    """A data set of one image of 40x30 pixels: its annotations, its folder and its file."""
    content["images"], content["annotations"] = content["images"][:1], content["annotations"][:1]
    annotations, images = write(content)
    return annotations, images, images / "b.png"


def read(one):
    return CocoDataset(one[0], one[1])[0][0]


def pixels(height=30, width=40):
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 8 % 256, columns * 6 % 256, (rows + columns) * 3 % 256], axis=2).astype(np.uint8)


def encoded(image, kind, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height) -> bytes:
    """A PNG that says it has this size; its pixels compress to almost nothing."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


PICTURE = Image.fromarray(pixels())
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # "turn by 90 degrees"
BROKEN = {
    "zero bytes": (b"", "can't be read as an image"),
    "text": (b"this is no image", "can't be read as an image"),
    "truncated JPEG": (encoded(PICTURE, "JPEG")[:-200], "truncated"),
    "truncated PNG": (encoded(PICTURE, "PNG")[:-300], "truncated"),
    "JPEG header alone": (encoded(PICTURE, "JPEG")[:20], "can't be read as an image"),
    "PNG with a broken checksum": (encoded(PICTURE, "PNG").replace(b"IHDR", b"IHDS"), "can't be read"),
    "EPS, which would start Ghostscript": (encoded(PICTURE, "EPS"), "can't be read as an image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="30"/>', "can't be read"),
    "32-bit float TIFF": (encoded(PICTURE.convert("F"), "TIFF"), "8 or 16 bit"),
    "32-bit integer TIFF": (encoded(PICTURE.convert("I"), "TIFF"), "8 or 16 bit"),
    "another size": (encoded(PICTURE.resize((41, 30)), "PNG"), "41x30 pixels, the annotations say 40x30"),
    "a size that its EXIF rotation would make right": (
        encoded(PICTURE.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=ROTATED),
        "EXIF",
    ),
    "a decompression bomb": (png_header(60_000, 60_000), "decompression bomb"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_images(name, one, capsys):
    raw, reason = BROKEN[name]
    one[2].write_bytes(raw)
    line = line_of(lambda: read(one), capsys)
    assert str(one[2]) in line
    assert reason in line


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_bomb_whose_annotations_agree(side, content, write, capsys):
    annotations, images = write(content)
    content["images"][0] |= {"width": side, "height": side}
    annotations.write_text(json.dumps(content))
    (images / "b.png").write_bytes(png_header(side, side))
    assert str(images / "b.png") in line_of(lambda: CocoDataset(annotations, images)[1], capsys)


GRAY = pixels()[:, :, 0]
FRAMES = [Image.fromarray(255 - pixels())] * 2
READ = {
    "PNG in a .png": (encoded(PICTURE, "PNG"), pixels()),
    "BMP in a .png": (encoded(PICTURE, "BMP"), pixels()),
    "WebP in a .png": (encoded(PICTURE, "WEBP", lossless=True), pixels()),
    "TIFF in a .png": (encoded(PICTURE, "TIFF"), pixels()),
    "gray": (encoded(Image.fromarray(GRAY), "PNG"), np.stack([GRAY] * 3, 2)),
    "1 bit": (encoded(Image.fromarray(GRAY > 99), "PNG"), np.stack([(GRAY > 99) * 255] * 3, 2)),
    "16-bit gray": (encoded(Image.fromarray(GRAY.astype(np.uint16) * 257), "PNG"), np.stack([GRAY] * 3, 2)),
    "16-bit gray TIFF": (
        encoded(Image.fromarray(GRAY.astype(np.uint16) * 257), "TIFF"),
        np.stack([GRAY] * 3, 2),
    ),
    "gray with transparency": (encoded(Image.fromarray(GRAY).convert("LA"), "PNG"), np.stack([GRAY] * 3, 2)),
    "RGB with transparency": (encoded(Image.fromarray(np.dstack([pixels(), GRAY])), "PNG"), pixels()),
    "palette": (
        encoded(PICTURE.quantize(64), "PNG"),
        np.array(PICTURE.quantize(64).convert("RGB")),
    ),
    "palette with transparency": (
        encoded(PICTURE.quantize(64), "PNG", transparency=b"\x80" * 64),
        np.array(PICTURE.quantize(64).convert("RGB")),
    ),
    "EXIF-rotated": (encoded(PICTURE, "PNG", exif=ROTATED), pixels()),
    "animated PNG": (encoded(PICTURE, "PNG", save_all=True, append_images=FRAMES), pixels()),
    "animated WebP": (encoded(PICTURE, "WEBP", save_all=True, append_images=FRAMES, lossless=True), pixels()),
    "TIFF of several pages": (encoded(PICTURE, "TIFF", save_all=True, append_images=FRAMES), pixels()),
    "animated GIF": (
        encoded(Image.fromarray(GRAY), "GIF", save_all=True, append_images=[Image.fromarray(255 - GRAY)]),
        np.stack([GRAY] * 3, 2),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_images_of_every_kind_are_read_rightly(name, one):
    raw, expected = READ[name]
    one[2].write_bytes(raw)
    assert torch.equal((read(one) * 255).round(), torch.from_numpy(expected).permute(2, 0, 1).float())


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_modes(mode, one):
    one[2].write_bytes(encoded(PICTURE.convert(mode), "JPEG", quality=100, subsampling=0))
    expected = pixels() if mode != "L" else np.stack([np.asarray(PICTURE.convert("L"))] * 3, 2)
    difference = (read(one) * 255 - torch.from_numpy(expected).permute(2, 0, 1)).abs()
    assert difference.mean() < 4  # JPEG's loss


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 10_000), (10_000, 1)])
def test_extreme_shapes(width, height, content, write):
    content["images"][0] |= {"width": width, "height": height}
    content["annotations"] = [content["annotations"][0] | {"bbox": [0, 0, width, height]}]
    image, target = CocoDataset(*write(content))[1]
    assert image.shape == (3, height, width)
    assert target["boxes"].tolist() == [[0, 0, width, height]]


def test_links(one, tmp_path, capsys):
    """A link to an image is an image, wherever it is, as folders of links are common; other links are not."""
    file = one[2]
    elsewhere = tmp_path / "elsewhere.png"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert read(one).shape == (3, 30, 40)
    for target in (tmp_path / "none", file, tmp_path, "/dev/zero"):
        file.unlink()
        file.symlink_to(target)
        assert str(file) in line_of(lambda: read(one), capsys)


def test_a_pipe_is_not_waited_for(one, capsys):
    one[2].unlink()
    os.mkfifo(one[2])
    assert str(one[2]) in line_of(lambda: read(one), capsys)
    with pytest.raises(InputError, match="regular file"):
        read_image(one[2], 40, 30)


def test_missing_images(one, capsys):
    dataset = CocoDataset(one[0], one[1])
    one[2].rename(one[2].with_name("B.PNG"))
    line = line_of(lambda: CocoDataset(one[0], one[1]), capsys)
    assert str(one[2]) in line
    assert "'B.PNG': upper and lower case differ" in line
    assert str(one[2]) in line_of(lambda: dataset[0], capsys)  # removed since
    one[2].with_name("B.PNG").unlink()
    assert "no such image" in line_of(lambda: CocoDataset(one[0], one[1]), capsys)


def test_case_clashes_and_other_names(content, write):
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "A.png", "a.png"
    dataset = CocoDataset(*write(content))
    assert [dataset[n][0].shape[2] for n in range(2)] == [20, 40]
    content["images"][0]["file_name"] = "b\udcff.png"  # a name that is not UTF-8, as Python writes it
    assert CocoDataset(*write(content))[1][0].shape == (3, 30, 40)


# --- Results ---

GOOD = {"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}
RESULTS = {
    "truncated": (b'[{"image_id": 7', "not valid JSON"),
    "an instances file": (b'{"images": []}', "not a list"),
    "deep nesting": (b"[" * 200_000, "nested too deeply"),
    "a record is a list": ([[7, 2, 0.5]], "record 0 is"),
    "unknown image": ([GOOD | {"image_id": 70}], '"image_id" 70'),
    "image id is a string": ([GOOD | {"image_id": "7"}], "\"image_id\" '7'"),
    "unknown category": ([GOOD, GOOD | {"category_id": 1}], 'record 1 has "category_id" 1'),
    "category id is a list": ([GOOD | {"category_id": [2]}], '"category_id" [2]'),
    "no score": ([{k: v for k, v in GOOD.items() if k != "score"}], '"score" None'),
    "score NaN": ([GOOD | {"score": float("nan")}], '"score" nan'),
    "score is a string": ([GOOD | {"score": "0.5"}], '"score"'),
    "score 10^400": ([GOOD | {"score": 10**400}], '"score"'),
    "no box": ([{k: v for k, v in GOOD.items() if k != "bbox"}], '"bbox" None'),
    "a box with infinity": ([GOOD | {"bbox": [1, 2, float("inf"), 3]}], "finite"),
    "a box of negative width": ([GOOD | {"bbox": [9, 2, -3, 3]}], "negative"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results(name, content, write, tmp_path, capsys):
    coco = load_annotations(write(content)[0])
    given, reason = RESULTS[name]
    path = tmp_path / "results.json"
    path.write_bytes(given if isinstance(given, bytes) else json.dumps(given).encode())
    line = line_of(lambda: load_results(path, coco), capsys)
    assert str(path) in line
    assert reason in line


def test_results_that_are_odd_but_right(content, write, tmp_path):
    coco = load_annotations(write(content)[0])
    path = tmp_path / "results.json"
    odd = [
        GOOD | {"bbox": [-1e6, 5, 1e8, 0], "score": -3, "segmentation": "?", "id": "x"},
        GOOD | {"score": 1},
    ]
    path.write_text(json.dumps(odd))
    assert coco_figures(coco, load_results(path, coco), [7])["mAP"] == 0
    path.write_text("[]")
    assert load_results(path, coco) == []


# --- Whatever comes ---

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
places = st.lists(st.integers(0, 20), min_size=1, max_size=4)
UNTOUCHED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def replace_somewhere(content, place, value):
    """Replaces what one comes to by taking, at each level, the place-th key or element."""
    for step, last in zip(place, [False] * (len(place) - 1) + [True], strict=True):
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = keys[step % len(keys)]
        if last or not isinstance(content[key], dict | list) or not content[key]:
            content[key] = value
            return
        content = content[key]


@UNTOUCHED
@given(place=places, value=anything)
def test_any_change_of_the_annotations_is_named_or_read(place, value, content, write):
    annotations, images = write(content)
    changed = copy.deepcopy(content)
    replace_somewhere(changed, place, value)
    annotations.write_text(json.dumps(changed))
    fault = None
    try:
        dataset = CocoDataset(annotations, images)
        items = [dataset[index] for index in range(len(dataset))]
    except InputError as error:
        fault = str(error)
    if fault is not None:
        assert "\n" not in fault
        assert str(annotations) in fault or str(images) in fault
        return
    for image, target in items:
        boxes, labels = target["boxes"], target["labels"]
        assert boxes.isfinite().all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 0.09).all()
        assert (boxes[:, 2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()
        assert ((labels >= 1) & (labels <= 2)).all()
    figures = coco_figures(dataset.coco, [], dataset.ids)
    assert all(value == 0 or np.isnan(value) for value in figures.values())


@UNTOUCHED
@given(value=anything)
def test_any_json_is_named_as_results(value, content, tmp_path):
    coco = coco_index(content)
    path = tmp_path / "results.json"
    path.write_text(json.dumps([GOOD, value]))
    with pytest.raises(InputError, match="record 1"):
        load_results(path, coco)


@UNTOUCHED
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
    changes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=6),
    length=st.integers(0, 5000),
)
def test_any_change_of_an_image_is_named_or_read(kind, changes, length, tmp_path):
    raw = bytearray(encoded(PICTURE, kind))
    for at, value in changes:
        raw[at % len(raw)] = value
    path = tmp_path / "image"
    path.write_bytes(raw[:length] if length % 3 == 0 else raw)
    fault = None
    try:
        image = read_image(path, 40, 30)
    except InputError as error:
        fault = str(error)
    if fault is None:
        assert image.shape == (3, 30, 40)
        assert image.dtype == torch.uint8
    else:
        assert fault.startswith(f"{path}: ")
        assert "\n" not in fault
