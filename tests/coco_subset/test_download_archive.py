"""The annotation archive: 253 MB that must arrive whole, and a ZIP file that nobody should trust."""

import json
import zipfile
from io import BytesIO

import pytest
from support.faulty_server import FaultyServer, drop_after, endless, ignore_range, status, wrong_range
from support.local_coco import ARCHIVE, OPTIONS, network, tree

from dropblock_det.coco_subset import prepare as prepare_module
from dropblock_det.coco_subset.prepare import prepare
from dropblock_det.errors import InputError


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
