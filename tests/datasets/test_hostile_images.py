"""Broken, hostile and unusual image files: each gives one line that names the file, or is read rightly."""

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

from dropblock_det.datasets.coco_dataset import CocoDataset
from dropblock_det.datasets.images import read_image
from dropblock_det.errors import InputError


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
    "JPEG cut in its pixels": (encoded(PICTURE, "JPEG")[:-20], "as an image (Image is incomplete"),
    "JPEG header alone": (encoded(PICTURE, "JPEG")[:20], "can't be read as an image"),
    "PNG with a broken checksum": (encoded(PICTURE, "PNG").replace(b"IHDR", b"IHDS"), "can't be read"),
    "EPS, which would start Ghostscript": (encoded(PICTURE, "EPS"), "cannot identify"),
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
def test_broken_images(name, one, line_of):
    raw, reason = BROKEN[name]
    one[2].write_bytes(raw)
    line = line_of(lambda: read(one))
    assert str(one[2]) in line
    assert reason in line


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_bomb_whose_annotations_agree(side, content, write, line_of):
    annotations, images = write(content)
    content["images"][0] |= {"width": side, "height": side}
    annotations.write_text(json.dumps(content))
    (images / "b.png").write_bytes(png_header(side, side))
    assert str(images / "b.png") in line_of(lambda: CocoDataset(annotations, images)[1])


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_name_that_is_not_unicode(kind, tmp_path):
    file = tmp_path / "\udcff.jpg"  # as Python writes it; no name for COCO's JSON, but predict takes it
    file.write_bytes(encoded(PICTURE, kind))
    assert read_image(file).shape == (3, 30, 40)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 10_000), (10_000, 1)])
def test_extreme_shapes(width, height, content, write):
    content["images"][0] |= {"width": width, "height": height}
    content["annotations"] = [content["annotations"][0] | {"bbox": [0, 0, width, height]}]
    image, target = CocoDataset(*write(content))[1]
    assert image.shape == (3, height, width)
    assert target["boxes"].tolist() == [[0, 0, width, height]]


def test_links(one, tmp_path, line_of):
    """A link to an image is an image, wherever it is, as folders of links are common; other links are not."""
    file = one[2]
    elsewhere = tmp_path / "elsewhere.png"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert read(one).shape == (3, 30, 40)
    for target in (tmp_path / "none", file, tmp_path, "/dev/zero"):
        file.unlink()
        file.symlink_to(target)
        assert str(file) in line_of(lambda: read(one))


def test_a_pipe_is_not_waited_for(one, line_of):
    one[2].unlink()
    os.mkfifo(one[2])
    assert str(one[2]) in line_of(lambda: read(one))
    with pytest.raises(InputError, match="regular file"):
        read_image(one[2], 40, 30)


def test_missing_images(one, line_of):
    dataset = CocoDataset(one[0], one[1])
    one[2].rename(one[2].with_name("B.PNG"))
    line = line_of(lambda: CocoDataset(one[0], one[1]))
    assert str(one[2]) in line
    assert "'B.PNG': upper and lower case differ" in line
    assert str(one[2]) in line_of(lambda: dataset[0])  # removed since
    one[2].with_name("B.PNG").unlink()
    one[2].symlink_to(one[2].name)  # a loop
    assert "a link that leads to none" in line_of(lambda: CocoDataset(one[0], one[1]))
    one[2].unlink()
    assert "no such image" in line_of(lambda: CocoDataset(one[0], one[1]))


def test_case_clashes_and_other_names(content, write):
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "A.png", "a.png"
    dataset = CocoDataset(*write(content))
    assert [dataset[n][0].shape[2] for n in range(2)] == [20, 40]
    content["images"][0]["file_name"] = "b\udcff.png"  # a name that is not Unicode, as Python writes it
    with pytest.raises(InputError, match=r"not valid JSON .*udcff"):
        CocoDataset(*write(content))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
