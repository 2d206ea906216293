import struct
import sys
import zlib

import pytest
import torch
from PIL import Image
from support.the_tools import tool_module


@pytest.fixture(scope="module")
def tool():
    return tool_module("show_masks.py")


def test_the_edge_channels_are_named_after_what_they_see(tool):
    rows, columns = torch.meshgrid(torch.arange(160), torch.arange(160), indexing="ij")
    halves = {"│": columns < 80, "─": rows < 80, "╲": rows < columns, "╱": rows + columns < 160}
    for name, half in halves.items():
        image = half.float().expand(3, -1, -1)
        fine = tool.edges(image.mean(0)[None, None])[0]
        strongest = tool.CHANNELS[fine.mean((1, 2)).argmax()]
        assert strongest == f"edges {name}"


def test_the_feature_map_follows_the_image_s_shape(tool):
    features = tool.feature_map(torch.rand(3, 300, 600))
    assert features.shape == (1, 8, 20, 40)
    assert (features.min(), features.max()) == (0, 1)
    assert torch.isfinite(tool.feature_map(torch.zeros(3, 5, 900))).all()


def test_the_picture_is_written(tool, tmp_path, monkeypatch):
    Image.new("L", (80, 60), 128).save(tmp_path / "gray.png")
    out = tmp_path / "masks.png"
    monkeypatch.setattr(
        sys, "argv", ["x", str(tmp_path / "gray.png"), "--block_sizes", "2", "--output", str(out)]
    )
    tool.main()
    with Image.open(out) as image:
        assert min(image.size) > 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.png"], "missing.png: no such image"),
        (["--p", "1.5"], "p must be a number in [0, 1], not 1.5"),
        (["--block_sizes", "0"], "block_size must be"),
        (["--output", "/proc/x.png"], "/proc/"),
        (["--output", "x.nonsense"], "--output x.nonsense: give a name that ends in .png"),
        (["--output", "x"], "--output x: give a name"),
        (["--seed", str(2**63)], "--seed 9223372036854775808: give a whole number"),
        (["--seed", "-1"], "--seed -1: give"),
    ],
)
def test_bad_arguments_are_input_errors(tool, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    with pytest.raises(tool.InputError) as caught:
        tool.main()
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


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
def test_hostile_images_are_refused_in_a_line(tool, tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(HOSTILE[name]())
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / name), "--output", str(tmp_path / "masks.png")])
    with pytest.raises(tool.InputError, match=f"{name}: ") as caught:
        tool.main()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "masks.png").exists()
