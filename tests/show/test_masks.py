import struct
import zlib

import pytest
import torch
from PIL import Image

from dropblock_det.__main__ import run
from dropblock_det.show import masks


def test_the_edge_channels_are_named_after_what_they_see():
    rows, columns = torch.meshgrid(torch.arange(160), torch.arange(160), indexing="ij")
    halves = {"│": columns < 80, "─": rows < 80, "╲": rows < columns, "╱": rows + columns < 160}
    for name, half in halves.items():
        image = half.float().expand(3, -1, -1)
        fine = masks.edges(image.mean(0)[None, None])[0]
        strongest = masks.CHANNELS[fine.mean((1, 2)).argmax()]
        assert strongest == f"edges {name}"


def test_the_feature_map_follows_the_image_s_shape():
    features = masks.feature_map(torch.rand(3, 300, 600))
    assert features.shape == (1, 8, 20, 40)
    assert (features.min(), features.max()) == (0, 1)
    assert torch.isfinite(masks.feature_map(torch.zeros(3, 5, 900))).all()


def test_the_picture_is_written(tmp_path):
    Image.new("L", (80, 60), 128).save(tmp_path / "gray.png")
    out = tmp_path / "masks.png"
    words = ["--image", str(tmp_path / "gray.png"), "--block-sizes", "2", "--output", str(out)]
    run(["show-masks", *words])
    with Image.open(out) as image:
        assert min(image.size) > 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "missing.png"], "missing.png: no such image"),
        (["--p", "1.5"], "p: got 1.5"),
        (["--block-sizes", "0"], "block_sizes: got [0]"),
        (["--output", "x.nonsense"], "--output x.nonsense: give a name that ends in .png"),
        (["--output", "x"], "--output x: give a name"),
        (["--seed", str(2**63)], "seed: got 9223372036854775808"),
        (["--seed", "-1"], "seed: got -1"),
    ],
)
def test_bad_arguments_are_input_errors(tmp_path, monkeypatch, line_of, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in line_of(lambda: run(["show-masks", *arguments]))
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_one_line(line_of):
    assert "/proc/" in line_of(lambda: run(["show-masks", "--output", "/proc/x.png"]))


def png(width, height, *chunks):
    """A PNG's beginning with other chunks in it."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            header,
            *(chunk(*c) for c in chunks),
            chunk(b"IDAT", rows),
            chunk(b"IEND", b""),
        ]
    )


HOSTILE = {
    "bomb": lambda: png(30_000, 30_000),
    "text": lambda: png(8, 8, (b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000)))),
    "dds": lambda: b"DDS |" + bytes(3) + bytes(120) + b"DX10" + bytes(100),
    "empty": lambda: b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused_in_a_line(tmp_path, line_of, name):
    (tmp_path / name).write_bytes(HOSTILE[name]())
    words = ["--image", str(tmp_path / name), "--output", str(tmp_path / "masks.png")]
    assert f"{name}: " in line_of(lambda: run(["show-masks", *words]))
    assert not (tmp_path / "masks.png").exists()
