"""Fetching from a server that misbehaves by plan: the right bytes or one clear line, never a half file."""

import errno
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from email.utils import formatdate
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from coco_like import annotations, jpeg, make_site, unpack_site
from faulty_server import (
    FaultyServer,
    drop_after,
    drop_at_once,
    endless,
    html,
    ignore_range,
    redirect,
    short,
    stall,
    stall_at_once,
    status,
    trickle,
    wrong_range,
)
from PIL import Image

from dropblock_det.datasets import prepare as prepare_module
from dropblock_det.datasets.download import Archive, Network
from dropblock_det.datasets.manifest import read_manifest
from dropblock_det.datasets.prepare import MANIFEST, prepare, verify
from dropblock_det.datasets.subset import Options
from dropblock_det.errors import InputError

OPTIONS = Options(12, 5)
ARCHIVE = "/annotations/annotations_trainval2017.zip"
TOOL = Path(__file__).parents[1] / "tools" / "prepare_coco.py"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def site():
    return make_site()


@pytest.fixture
def server(site):
    with FaultyServer() as server:
        server.files = dict(site)
        yield server


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


@pytest.fixture(scope="module")
def right(site, tmp_path_factory):
    """The tree of an undisturbed run, and the path on the server of one train image in it."""
    folder = tmp_path_factory.mktemp("right")
    with FaultyServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        server.files = site
        prepare(folder / "coco", OPTIONS, network=network(server))
    return tree(folder)


@pytest.fixture
def image(right) -> str:
    return "/" + sorted(name for name in right if "train2017/" in name and name.endswith("jpg"))[
        3
    ].removeprefix("coco/")


# -------------------------------------------------------------------------------- faults


TRANSIENT = {
    "drops in mid-file": [drop_after(0.5)],
    "drops without a word": [drop_at_once],
    "drops twice": [drop_after(0.1), drop_after(0.9)],
    "too few bytes": [short],
    "nothing": [drop_after(0)],
    "web page": [html],
    "stalls": [stall],
    "never answers": [stall_at_once],
    "500": [status(500)],
    "503 with a date": [status(503, Retry_After=formatdate(time.time() - 60, usegmt=True))],
    "429": [status(429)],
    "429 with nonsense": [status(429, Retry_After="soon")],
    "500, then a web page": [status(500), html],
    "no bytes, a length that agrees": [lambda handler, body: handler.answer(200, b"")],
}


@pytest.mark.parametrize("fault", TRANSIENT)
@pytest.mark.parametrize("what", ["image", "archive"])
def test_transient_fault_ends_in_the_right_bytes(tmp_path, server, right, image, fault, what):
    path = image if what == "image" else ARCHIVE
    server.plan[path] = list(TRANSIENT[fault])
    prepare(tmp_path / "coco", OPTIONS, network=network(server, timeout=timeout_for(fault)))
    assert tree(tmp_path) == right
    assert server.asked[path] == 1 + len(TRANSIENT[fault])
    assert not server.plan[path]


def timeout_for(fault: str) -> float:
    """Short where silence is the fault; else a machine busy with other things must not look like one."""
    return 1.0 if fault in ("stalls", "never answers", "trickles") else 10.0


LASTING = {
    "404": ([status(404)] * 9, "HTTP 404", 1),
    "403": ([status(403)] * 9, "HTTP 403", 1),
    "500": ([status(500)] * 9, "HTTP 500", 3),
    "web page": ([html] * 9, "the server sent a web page", 3),
    "short": ([short] * 9, "does not decode|truncated", 3),
    "drops": ([drop_after(0.5)] * 9, r"broke off after \d+ of \d+ bytes", 3),
    "hangs up": ([drop_at_once] * 9, "RemoteDisconnected", 3),
    "stalls": ([stall] * 9, "the server went silent", 3),
    "never answers": ([stall_at_once] * 9, "the server went silent", 3),
    "trickles": ([trickle] * 9, r"the server sent \d+ bytes in", 3),
    "endless": ([endless] * 9, "more than 100000 bytes", 1),
    "redirected in a circle": ([redirect("")] * 99, "more than 5 redirects", 6),
    "redirected to a file": ([redirect("file:///etc/passwd")] * 9, "no plain http", 1),
    "redirected to ftp": ([redirect("ftp://127.0.0.1/x.jpg")] * 9, "no plain http", 1),
    "asks to wait long": ([status(429, Retry_After="3600")] * 9, "HTTP 429 .*asks to wait 3600 s", 1),
    "no HTTP": ([lambda handler, body: handler.wfile.write(b"SSH-2.0\r\n")] * 9, "BadStatusLine", 3),
}


@pytest.mark.parametrize("fault", LASTING)
def test_lasting_fault_ends_in_one_line_and_the_rest_is_there(tmp_path, server, right, image, fault):
    plan, reason, asked = LASTING[fault]
    if fault == "redirected in a circle":
        plan = [redirect(image)] * 99
    server.plan[image] = list(plan)
    net = network(server, largest_image=100_000, timeout=timeout_for(fault))
    with pytest.raises(InputError, match=reason) as caught:
        prepare(tmp_path / "coco", OPTIONS, network=net)
    message = str(caught.value)
    assert "\n" not in message
    assert Path(image).name in message
    assert "1 of 17 images missing" in message
    # A drop on a connection that was kept from before is asked again at once: the server may close those.
    assert asked <= server.asked[image] <= (2 if fault == "hangs up" else 1) * asked
    present = tree(tmp_path)
    assert right.keys() - present.keys() == {f"coco{image}", "coco/manifest.json"}
    assert present.items() <= right.items()

    server.plan.clear()
    server.asked.clear()
    prepare(tmp_path / "coco", OPTIONS, network=net)
    assert tree(tmp_path) == right
    assert dict(server.asked) == {image: 1}


def test_wrong_picture_is_not_taken(tmp_path, server, image):
    server.files[image] = jpeg({"id": 1, "height": 30, "width": 31})
    with pytest.raises(InputError, match=rf"{Path(image).name} \(it has 31x30 pixels, the annotations say"):
        prepare(tmp_path / "coco", OPTIONS, network=network(server))
    assert not (tmp_path / "coco" / image[1:]).exists()


def test_other_formats_are_not_decoded(tmp_path, server, image):
    server.files[image] = b"GIF89a" + bytes(500)
    with pytest.raises(InputError, match="no JPEG or PNG"):
        prepare(tmp_path / "coco", OPTIONS, network=network(server))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(tmp_path, server, right, image, code):
    server.files["/elsewhere"] = server.files[image]
    server.plan[image] = [redirect("/step", code)]
    server.plan["/step"] = [redirect(f"{server.url}/elsewhere", code)]
    prepare(tmp_path / "coco", OPTIONS, network=network(server))
    assert tree(tmp_path) == right


def test_retry_after_holds_back_every_connection(tmp_path, server, right, image):
    began = time.monotonic()
    server.plan[image] = [status(429, Retry_After="1")]
    prepare(tmp_path / "coco", OPTIONS, network=network(server))
    assert time.monotonic() - began >= 1
    assert tree(tmp_path) == right


def test_server_that_is_down_is_not_asked_for_every_image(tmp_path, server):
    for path in server.files:
        if path.endswith("jpg"):
            server.plan[path] = [status(404)] * 9
    with pytest.raises(InputError, match=r"40 of 40 images missing, stopped there"):
        prepare(tmp_path / "coco", Options(40, 0), network=network(server, connections=2))
    assert sum(n for path, n in server.asked.items() if path.endswith("jpg")) < 15


def test_nobody_there(tmp_path, server):
    net = network(server)
    server.server_close()
    server.shutdown()
    with pytest.raises(InputError, match=r"annotations_trainval2017\.zip: ConnectionRefusedError"):
        prepare(tmp_path / "coco", OPTIONS, network=net)
    assert tree(tmp_path).keys() <= {"annotations_trainval2017.zip.partial"}


# -------------------------------------------------------------------------------- the archive


def test_archive_goes_on_where_it_stopped(tmp_path, server, right):
    server.plan[ARCHIVE] = [
        drop_after(0.3),
        drop_after(0.3),
        drop_after(0.3),
        drop_after(0.3),
        drop_after(0.3),
    ]
    prepare(tmp_path / "coco", OPTIONS, network=network(server))  # 3 attempts: each drop got further
    assert tree(tmp_path) == right
    ranges = [headers.get("Range") for headers in server.headers_seen[ARCHIVE]]
    assert ranges[0] is None
    assert len(set(ranges)) == 6


@pytest.mark.parametrize("answer", [ignore_range, wrong_range, status(416), status(500)])
def test_archive_when_range_does_not_work(tmp_path, server, right, answer):
    server.plan[ARCHIVE] = [drop_after(0.5), answer]
    prepare(tmp_path / "coco", OPTIONS, network=network(server))
    assert tree(tmp_path) == right
    assert server.asked[ARCHIVE] == (2 if answer is ignore_range else 3)  # the whole is taken at once


@pytest.mark.parametrize("left", [b"", b"garbage", b"g" * 10_000_000, None])
def test_archive_half_there_from_before(tmp_path, server, right, left):
    content = server.files[ARCHIVE]
    partial = tmp_path / "annotations_trainval2017.zip.partial"
    partial.write_bytes(content[:-5] if left is None else left)
    prepare(tmp_path / "coco", OPTIONS, network=network(server))
    assert tree(tmp_path) == right
    if left is None:
        assert server.headers_seen[ARCHIVE][0]["Range"] == f"bytes={len(content) - 5}-"


def test_altered_archive_is_fetched_again(tmp_path, server, right):
    content = server.files[ARCHIVE]
    (tmp_path / "annotations_trainval2017.zip").write_bytes(bytes(len(content)))
    prepare(tmp_path / "coco", OPTIONS, network=network(server))
    assert tree(tmp_path) == right


def test_archive_of_wrong_content_is_refused(tmp_path, server):
    net = network(server)
    server.files[ARCHIVE] = bytes(reversed(server.files[ARCHIVE]))
    with pytest.raises(InputError, match=r"annotations_trainval2017\.zip: its checksum is wrong \(http"):
        prepare(tmp_path / "coco", OPTIONS, network=net)
    server.files[ARCHIVE] += b"more"
    with pytest.raises(InputError, match=rf"offers \d+ bytes where {net.annotations.size} are due"):
        prepare(tmp_path / "coco", OPTIONS, network=net)
    server.plan[ARCHIVE] = [endless] * 9
    with pytest.raises(InputError, match=rf"it has more than {net.annotations.size} bytes"):
        prepare(tmp_path / "coco", OPTIONS, network=net)
    assert tree(tmp_path).keys() == {"annotations_trainval2017.zip.partial"}


def rezip(server: FaultyServer, change: object) -> None:
    """Packs the annotation archive again, its members changed by ``change(info, content)``."""
    packed = BytesIO()
    with zipfile.ZipFile(BytesIO(server.files[ARCHIVE])) as old, zipfile.ZipFile(packed, "w") as new:
        for info in old.infolist():
            new.writestr(*change(info, old.read(info)))  # type: ignore[operator]
    server.files[ARCHIVE] = packed.getvalue()


def as_link(info: zipfile.ZipInfo, content: bytes) -> tuple[zipfile.ZipInfo, bytes]:
    if "instances_train" in info.filename:
        info.external_attr = 0o120777 << 16
        content = b"/etc/passwd"
    return info, content


def test_links_in_the_archive_are_not_followed(tmp_path, server):
    rezip(server, as_link)
    with pytest.raises(InputError, match="is a link"):
        prepare(tmp_path / "coco", OPTIONS, network=network(server))


def test_unpacked_size_is_capped(tmp_path, server, monkeypatch):
    monkeypatch.setattr(prepare_module, "_LARGEST_JSON", 1000)
    with pytest.raises(InputError, match="bytes unpacked, more than 1000"):
        prepare(tmp_path / "coco", OPTIONS, network=network(server))


def test_archive_without_the_annotations(tmp_path, server):
    rezip(server, lambda info, content: (info.filename.replace("instances", "other"), content))
    with pytest.raises(InputError, match=r"no archive with annotations/instances_train2017\.json"):
        prepare(tmp_path / "coco", OPTIONS, network=network(server))


def test_nothing_is_unpacked(tmp_path, server):
    rezip(server, lambda info, content: (info, content))
    packed = BytesIO(server.files[ARCHIVE])
    with zipfile.ZipFile(packed, "a") as new:
        new.writestr("../outside.txt", "x")
        new.writestr("/tmp/outside.txt", "x")
    server.files[ARCHIVE] = packed.getvalue()
    prepare(tmp_path / "in" / "coco", OPTIONS, network=network(server))
    assert sorted(p.name for p in tmp_path.rglob("*.txt")) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("file_name", "../../evil.jpg"), ("coco_url", "file:///etc/passwd"), ("file_name", "/tmp/evil.jpg")],
)
def test_untrusted_records_stop_before_any_image(tmp_path, server, field, value):
    def poison(info: zipfile.ZipInfo, content: bytes) -> tuple[zipfile.ZipInfo, bytes]:
        poisoned = json.loads(content)
        for entry in poisoned.get("images", []):
            entry[field] = value
        return info, json.dumps(poisoned).encode()

    rezip(server, poison)
    with pytest.raises(InputError, match=rf"image \d+: {field}"):
        prepare(tmp_path / "in" / "coco", OPTIONS, network=network(server))
    assert set(server.asked) == {ARCHIVE}
    assert set(tree(tmp_path)) == {"in/annotations_trainval2017.zip"}


# -------------------------------------------------------------------------------- folders


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


def test_source_on_another_file_system_is_copied(tmp_path, site, right, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

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
    with prepare_module._sole_use(tmp_path / "coco"), pytest.raises(InputError, match="another process"):
        prepare(tmp_path / "coco", OPTIONS, network=network(server))


def test_categories_and_val_alone(tmp_path, site):
    source = unpack_site(site, tmp_path / "full")
    prepare(tmp_path / "coco", Options(0, 4, categories=("thing 1",)), source=source)
    content = json.loads((tmp_path / "coco/annotations/instances_val2017.json").read_text())
    assert [category["name"] for category in content["categories"]] == ["thing 1"]
    assert {box["image_id"] for box in content["annotations"]} == {image["id"] for image in content["images"]}
    assert not (tmp_path / "coco/train2017").exists()


# -------------------------------------------------------------------------------- the disk


def run_tool(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]


def one_error_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


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
        line = one_error_line(
            run_tool("--source", source, "--out", small / "coco", "--train", 30, "--val", 5)
        )
        assert "No space left on device; make room and start again" in line
        left = tree(small / "coco")
        assert MANIFEST not in left
        assert not any(".partial" in name for name in left)
        for name in left:
            if name.endswith("jpg"):
                assert (small / "coco" / name).read_bytes() == (source / name).read_bytes()
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        assert (
            run_tool("--source", source, "--out", small / "coco", "--train", 30, "--val", 5).returncode == 0
        )
        assert verify(small / "coco", read_manifest(small / "coco" / MANIFEST)) == []
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        assert "Read-only file system" in one_error_line(run_tool("--source", source, "--out", small / "new"))
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
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if victims[where] in str(target):
            raise OSError(code, os.strerror(code), str(self), None, str(target))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(InputError, match=f"{os.strerror(code)}; ") as caught:
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
        run_tool("--source", source, "--out", tmp_path / "coco", "--train", 9, preexec_fn=limit)
    )
    assert "File too large" in line
    assert tree(tmp_path / "coco") == {}


def test_place_that_is_no_folder(tmp_path, site):
    (tmp_path / "file").touch()
    assert "choose a folder" in one_error_line(run_tool("--out", tmp_path / "file" / "coco"))
    assert "choose a folder" in one_error_line(run_tool("--out", "/proc/coco"))


# -------------------------------------------------------------------------------- the tool


def test_tool_from_start_to_end(tmp_path, site):
    source = unpack_site(site, tmp_path / "full")
    out = tmp_path / "coco"
    result = run_tool("--source", source, "--out", out, "--train", 12, "--val", 5, "--min-per-category", 20)
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
    assert "complete and unaltered" in run_tool("--verify", "--out", out).stdout
    victim = next((out / "train2017").iterdir())
    victim.unlink()
    broken = run_tool("--verify", "--out", out)
    assert f"train2017/{victim.name}: missing" in broken.stdout
    assert "1 files differ" in one_error_line(broken)
    rebuilt = run_tool("--from-manifest", out / MANIFEST, "--source", source, "--out", tmp_path / "again")
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert (
        "complete"
        in run_tool("--verify", "--from-manifest", out / MANIFEST, "--out", tmp_path / "again").stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "-1"], "can't be negative"),
        (["--categories", "a,,b"], "empty name"),
        (["--mirror", "ftp://x"], "mirror: 'ftp://x' is no plain http"),
        (["--verify"], "no such manifest"),
        (["--from-manifest", "nothing.json"], "no such manifest"),
        (["--source", "nowhere"], "not there; --source takes the folder"),
    ],
)
def test_tool_refuses_in_one_line(tmp_path, arguments, message):
    assert message in one_error_line(run_tool(*arguments, "--out", tmp_path / "coco"))


# -------------------------------------------------------------------------------- rate and memory


SERVE = """
import sys
sys.path.insert(0, sys.argv[1])
import test_download
test_download.serve_many(int(sys.argv[2]))
"""


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


FETCH = """
import resource, sys, time
from pathlib import Path
from dropblock_det.datasets.download import ANNOTATIONS, Archive, Network
from dropblock_det.datasets.prepare import prepare
from dropblock_det.datasets.subset import Options
url, size, sha256, count, out = sys.argv[1:]
times = []
report = lambda what, done, total: times.append(time.monotonic()) if what == "images" else None
network = Network(url, Archive(ANNOTATIONS.path, int(size), sha256))
assert network.connections == 16
prepare(Path(out), Options(int(count), 0), network=network, report=report)
rate = len(times) / (times[-1] - times[0])
print(rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_rate_and_memory(tmp_path):
    peaks = []
    for count in (1000, 4000):
        command = [sys.executable, "-c", SERVE, str(Path(__file__).parent), str(count)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as serving:
            assert serving.stdout
            address = serving.stdout.readline().split()
            fetch = [sys.executable, "-c", FETCH, *address, str(count), str(tmp_path / str(count) / "coco")]
            result = subprocess.run(fetch, capture_output=True, text=True, check=True)
            serving.communicate()
        rate, peak = map(float, result.stdout.split())
        print(f"{count} images: {rate:.0f} images/s, peak {peak:.0f} MB")
        assert rate > 200
        peaks.append(peak)
    # 300 MB for all 118,287 images, from the slope.
    assert peaks[1] + (peaks[1] - peaks[0]) / 3000 * (118_287 - 4000) < 300


# -------------------------------------------------------------------------------- SIGKILL


KILLABLE = """
import runpy, sys
from dropblock_det.datasets import download
url, size, sha256, *sys.argv[1:] = sys.argv[1:]
class Local(download.Network):
    def __init__(self, mirror=None):
        archive = download.Archive(download.ANNOTATIONS.path, int(size), sha256)
        super().__init__(url, archive, 4)
download.Network = Local
runpy.run_path({tool!r}, run_name="__main__")
"""


def start(server: FaultyServer, out: Path) -> "subprocess.Popen[bytes]":
    archive = archive_of(server)
    arguments = [server.url, str(archive.size), archive.sha256, "--out", str(out)]
    arguments += ["--train", "30", "--val", "10"]
    command = [sys.executable, "-c", KILLABLE.format(tool=str(TOOL)), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def killed_and_restarted(tmp_path: Path, server: FaultyServer, kills: int) -> None:
    server.delay = 0.02  # 40 images over 4 connections: 0.2 s of fetching, between start and plot
    undisturbed = start(server, tmp_path / "a" / "coco")
    began = time.monotonic()
    assert undisturbed.wait(60) == 0, undisturbed.stderr.read()  # type: ignore[union-attr]
    lasts = time.monotonic() - began
    rng = random.Random(0)
    seen = set()
    for _ in range(kills):
        process = start(server, tmp_path / "b" / "coco")
        time.sleep(rng.uniform(0.2, 1) * lasts)
        process.send_signal(signal.SIGKILL)
        process.wait()
        half = tree(tmp_path / "b")
        seen.add(len(half))
        final = {name: sha for name, sha in half.items() if ".partial" not in name}
        assert final.items() <= tree(tmp_path / "a").items(), "a half file under a final name"
        if rng.random() < 0.3:  # from the beginning again, or all kills but the first would find it complete
            subprocess.run(["rm", "-r", str(tmp_path / "b")], check=False)
    last = start(server, tmp_path / "b" / "coco")
    assert last.wait(60) == 0, last.stderr.read()  # type: ignore[union-attr]
    assert tree(tmp_path / "b") == tree(tmp_path / "a")
    assert "coco/classes.png" in tree(tmp_path / "b")
    assert len(seen) > 1, "every kill came at the same point"


def test_three_kills(tmp_path, server):
    killed_and_restarted(tmp_path, server, 3)


@pytest.mark.slow
def test_twenty_kills(tmp_path, server):
    killed_and_restarted(tmp_path, server, 20)
