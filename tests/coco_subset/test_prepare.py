"""Making a subset: from the server or a COCO on disk, checked, mended, refused; full and read-only disks."""

import errno
import json
import os
import resource
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from support.coco_like import jpeg, make_site, unpack_site
from support.local_coco import OPTIONS, network, tree
from support.the_tools import one_error_line, run_tool

from dropblock_det.coco_subset import prepare as prepare_module
from dropblock_det.coco_subset.choose import Options
from dropblock_det.coco_subset.download import Archive, Network
from dropblock_det.coco_subset.manifest import read_manifest
from dropblock_det.coco_subset.prepare import MANIFEST, prepare, verify
from dropblock_det.errors import InputError

tool = partial(run_tool, "prepare_coco.py")


def test_second_start_fetches_nothing(tmp_path, server, right):
    prepare(tmp_path / "coco", OPTIONS, network=network(server))
    server.asked.clear()
    prepare(tmp_path / "coco", OPTIONS, network=network(server))
    assert not server.asked
    assert tree(tmp_path) == right


def test_verify_names_what_differs_and_a_start_mends_it(tmp_path, server, right, image):
    coco = tmp_path / "coco"
    manifest = prepare(coco, OPTIONS, network=network(server))
    assert verify(coco, manifest) == []
    others = sorted(p for p in (coco / "train2017").iterdir() if p.name != Path(image).name)
    content = bytearray(others[0].read_bytes())
    content[-20] ^= 1  # still decodes: only the hash can tell
    others[0].write_bytes(content)
    (coco / image[1:]).unlink()
    (coco / "annotations" / "instances_val2017.json").write_text("{}")
    assert sorted(verify(coco, manifest)) == sorted(
        [
            f"train2017/{others[0].name}: altered",
            f"{image[1:]}: missing",
            "annotations/instances_val2017.json: altered",
        ]
    )
    server.asked.clear()
    prepare(coco, OPTIONS, network=network(server))
    assert tree(tmp_path) == right
    assert set(server.asked) == {image, f"/train2017/{others[0].name}"}
    (coco / "val2017" / "extra.jpg").touch()
    assert verify(coco, manifest) == ["val2017/extra.jpg: not in the manifest"]
    with pytest.raises(InputError, match=r"val2017/extra\.jpg: is not of this subset"):
        prepare(coco, OPTIONS, network=network(server))


def test_manifest_rebuilds_the_same_elsewhere(tmp_path, server, right, site, image):
    prepare(tmp_path / "a" / "coco", OPTIONS, network=network(server))
    manifest = read_manifest(tmp_path / "a" / "coco" / MANIFEST)
    prepare(tmp_path / "b" / "coco", manifest, network=network(server))
    assert tree(tmp_path / "b") == right
    server.files[image] = jpeg({"id": 1, "height": 50, "width": 50})
    with pytest.raises(InputError, match=rf"{Path(image).name} \(its SHA-256 is not the manifest's\)"):
        prepare(tmp_path / "c" / "coco", manifest, network=network(server))
    other = unpack_site(make_site(categories=6), tmp_path / "other")
    with pytest.raises(InputError, match="another subset than the manifest"):
        prepare(tmp_path / "d" / "coco", manifest, source=other)


@pytest.mark.parametrize("images", [".", "images"])
def test_source_on_disk_needs_no_network(tmp_path, site, right, images):
    source = unpack_site(site, tmp_path / "full")
    if images != ".":
        (source / "images").mkdir()
        for split in ("train2017", "val2017"):
            (source / split).rename(source / images / split)
    nowhere = Network("http://127.0.0.1:1", Archive("x", 1, ""), attempts=1)
    prepare(tmp_path / "coco", OPTIONS, source=source, network=nowhere)
    made = {f"coco/{name}": sha for name, sha in tree(tmp_path / "coco").items()}
    assert made.items() <= right.items()
    assert len(made) == len(right) - 1  # but for the archive
    assert all(path.stat().st_nlink == 2 for path in (tmp_path / "coco").rglob("*.jpg"))


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS])
def test_source_on_another_file_system_is_copied(code, tmp_path, site, right, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    prepare(tmp_path / "coco", OPTIONS, source=unpack_site(site, tmp_path / "full"))
    assert {f"coco/{name}": sha for name, sha in tree(tmp_path / "coco").items()}.items() <= right.items()
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "coco").rglob("*.jpg"))


def test_source_that_lacks_something(tmp_path, site, image):
    source = unpack_site(site, tmp_path / "full")
    (source / image[1:]).unlink()
    with pytest.raises(InputError, match=rf"{Path(image).name} \(not in .*full\)"):
        prepare(tmp_path / "coco", OPTIONS, source=source)
    (source / image[1:]).write_bytes(b"x")
    with pytest.raises(InputError, match=r"1 bytes are no JPEG"):
        prepare(tmp_path / "coco", OPTIONS, source=source)
    with pytest.raises(InputError, match=r"instances_train2017\.json: not there; --source takes"):
        prepare(tmp_path / "other", OPTIONS, source=tmp_path)


@pytest.mark.parametrize("url", [None, ""])
def test_a_source_of_ones_own_has_no_addresses(tmp_path, site, url):
    source = unpack_site(site, tmp_path / "full")
    for path in (source / "annotations").glob("instances_*.json"):
        content = json.loads(path.read_text())
        for entry in content["images"]:
            entry["coco_url"] = url
            if url is None:
                del entry["coco_url"]
        path.write_text(json.dumps(content))
    manifest = prepare(tmp_path / "coco", OPTIONS, source=source)
    assert verify(tmp_path / "coco", manifest) == []
    prepare(tmp_path / "again", manifest, source=source)
    assert tree(tmp_path / "again") == tree(tmp_path / "coco")
    next((tmp_path / "coco" / "train2017").iterdir()).unlink()
    with pytest.raises(InputError, match=r"\(it has no coco_url; give --source\)"):
        prepare(tmp_path / "coco", OPTIONS, network=Network("http://127.0.0.1:1"))
    prepare(tmp_path / "coco", OPTIONS, source=source)
    assert verify(tmp_path / "coco", manifest) == []


def test_what_desktops_leave_everywhere_is_no_stranger(tmp_path, server, right):
    manifest = prepare(tmp_path / "coco", OPTIONS, network=network(server))
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._x.jpg"):
        (tmp_path / "coco" / "train2017" / name).touch()
    assert verify(tmp_path / "coco", manifest) == []
    prepare(tmp_path / "coco", OPTIONS, network=network(server))


def test_folder_of_something_else_is_left_alone(tmp_path, server, site):
    source = unpack_site(site, tmp_path / "full")
    before = tree(source)
    with pytest.raises(InputError, match=r"instances_train2017\.json: is not of this subset"):
        prepare(source, OPTIONS, network=network(server))
    assert tree(source) == before
    prepare(tmp_path / "coco", OPTIONS, network=network(server))
    with pytest.raises(InputError, match="holds another subset"):
        prepare(tmp_path / "coco", Options(12, 5, seed=1), network=network(server))


def test_two_processes_in_one_folder(tmp_path, server, site):
    (tmp_path / "coco").mkdir()
    with (
        prepare_module._sole_use(tmp_path / "coco"),
        pytest.raises(InputError, match=r"process \d+ on .* is working on it"),
    ):
        prepare(tmp_path / "coco", OPTIONS, network=network(server))


def test_categories_and_val_alone(tmp_path, site):
    source = unpack_site(site, tmp_path / "full")
    prepare(tmp_path / "coco", Options(0, 4, categories=("thing 1",)), source=source)
    content = json.loads((tmp_path / "coco/annotations/instances_val2017.json").read_text())
    assert [category["name"] for category in content["categories"]] == ["thing 1"]
    assert {box["image_id"] for box in content["annotations"]} == {image["id"] for image in content["images"]}
    assert not (tmp_path / "coco/train2017").exists()


# -------------------------------------------------------------------------------- the disk


def test_disk_full(tmp_path, site):
    # A file system of 64 kB that is really full: no root may write past its end.
    source, small = unpack_site(site, tmp_path / "full"), tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        line = one_error_line(tool("--source", source, "--out", small / "coco", "--train", 30, "--val", 5))
        assert "No space left on device (make room and start again" in line
        left = tree(small / "coco")
        assert MANIFEST not in left
        assert not any(".partial" in name for name in left)
        for name in left:
            if name.endswith("jpg"):
                assert (small / "coco" / name).read_bytes() == (source / name).read_bytes()
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        assert tool("--source", source, "--out", small / "coco", "--train", 30, "--val", 5).returncode == 0
        assert verify(small / "coco", read_manifest(small / "coco" / MANIFEST)) == []
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        assert "Read-only file system" in one_error_line(tool("--source", source, "--out", small / "new"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("where", ["image", "json", "manifest", "archive"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_disk_that_refuses(tmp_path, server, right, monkeypatch, where, code):
    # Also where nothing can be mounted and where root may write anywhere: the very error, from the very call.
    victims = {
        "image": "train2017",
        "json": "instances_train2017.json",
        "manifest": MANIFEST,
        "archive": ".zip",
    }
    replace = os.replace

    def refuse(source: str, target: Path) -> None:
        if victims[where] in str(target):
            raise OSError(code, os.strerror(code), str(source), None, str(target))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(InputError, match=f"{victims[where]}.*: {os.strerror(code)}") as caught:
            prepare(tmp_path / "coco", OPTIONS, network=network(server))
    assert "\n" not in str(caught.value)
    present = {name: sha for name, sha in tree(tmp_path).items() if not name.endswith(".zip.partial")}
    assert present.items() <= right.items()
    assert "coco/manifest.json" not in present
    prepare(tmp_path / "coco", OPTIONS, network=network(server))
    assert tree(tmp_path) == right


def test_file_size_limit(tmp_path, site):
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    source = unpack_site(site, tmp_path / "full")
    line = one_error_line(
        tool("--source", source, "--out", tmp_path / "coco", "--train", 9, preexec_fn=limit)
    )
    assert "File too large" in line
    assert tree(tmp_path / "coco") == {}


def test_place_that_is_no_folder(tmp_path, site):
    (tmp_path / "file").touch()
    assert "file/coco: Not a directory" in one_error_line(tool("--out", tmp_path / "file" / "coco"))
    assert "/proc/coco: No such file" in one_error_line(tool("--out", "/proc/coco"))
    assert "out: got ''; give a file's or folder's name" in one_error_line(tool("--out", ""))


# -------------------------------------------------------------------------------- the tool


def test_tool_from_start_to_end(tmp_path, site):
    source = unpack_site(site, tmp_path / "full")
    out = tmp_path / "coco"
    result = tool(
        "--source",
        source,
        "--out",
        out,
        "--train",
        12,
        "--val",
        5,
        "--min-per-category",
        20,
    )
    assert result.returncode == 0, result.stderr
    for wanted in (
        "train: 12 images",
        "val: 5 images",
        "images without boxes",
        "x Licence 1",
        "thing 4",
        "classes.png",
    ):
        assert wanted in result.stdout
    assert "fewer than 20 train images with: thing 0 (" in result.stdout
    assert (out / "classes.png").stat().st_size > 1000
    assert "complete and unaltered" in tool("--verify", "--out", out).stdout
    victim = next((out / "train2017").iterdir())
    victim.unlink()
    broken = tool("--verify", "--out", out)
    assert f"train2017/{victim.name}: missing" in broken.stdout
    assert "1 files differ" in one_error_line(broken)
    rebuilt = tool("--from-manifest", out / MANIFEST, "--source", source, "--out", tmp_path / "again")
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert (
        "complete" in tool("--verify", "--from-manifest", out / MANIFEST, "--out", tmp_path / "again").stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "-1"], "train: got -1; Expected `int` >= 0"),
        (["--categories", "a,,b"], "empty name"),
        (["--mirror", "ftp://x"], "mirror: 'ftp://x' is no plain http"),
        (["--verify"], "manifest.json: cannot be read: there is no such file"),
        (["--from-manifest", "nothing.json"], "nothing.json: cannot be read: there is no such file"),
        (["--from-manifest", "/"], "/: cannot be read: Is a directory"),
        (["--source", "nowhere"], "not there; --source takes the folder"),
        (["--train", "0", "--val", "0"], "one of the two must have images"),
        (["--train", "9" * 30], "Expected `int` <="),
        (["--seed", "4294967296"], "seed: got 4294967296; Expected `int` <= 4294967295"),
        (["--trian", "5"], "--help lists"),
    ],
)
def test_tool_refuses_in_one_line(tmp_path, arguments, message):
    assert message in one_error_line(tool(*arguments, "--out", tmp_path / "coco"))
    assert list(tmp_path.iterdir()) == []


def test_folder_that_was_there_stays(tmp_path):
    (tmp_path / "coco").mkdir()
    one_error_line(tool("--source", "nowhere", "--out", tmp_path / "coco"))
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]
