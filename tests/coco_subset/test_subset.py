"""Choosing: the same images everywhere, nothing lost, nothing trusted."""

import io
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.coco_like import PEAK_MB, annotations, write_full_size

from dropblock_det.coco_subset import json_stream
from dropblock_det.coco_subset.choose import Options, category_ids, choose, read_contents
from dropblock_det.coco_subset.extract import extract, read_images
from dropblock_det.coco_subset.json_stream import read_entries
from dropblock_det.coco_subset.manifest import Fetched, Manifest, Part, read_manifest
from dropblock_det.coco_subset.summary import SIZES, class_figure, summarize
from dropblock_det.coco_subset.tool import show
from dropblock_det.commands import PlainConsole
from dropblock_det.errors import InputError
from dropblock_det.files import write_figure


def entries_of(text: bytes) -> list[tuple[str, Any]]:
    return list(read_entries(io.BytesIO(text), "file.json"))


def flat(content: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (key, element)
        for key, value in content.items()
        for element in (value if isinstance(value, list) else [value])
    ]


TRICKY = {
    "info": {"description": 'a "quoted" ] } , \\ é 日本', "version": 1.5},
    "none": [],
    "number": 12345,
    "images": [{"id": 1, "x": [[1.25, -2e-3]]}, {"id": 2}, 17, "ü", None, [1, [2]]],
    "last": "]}",
}


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_reads_what_json_reads_whatever_the_pieces(monkeypatch, piece, indent, ascii_only):
    monkeypatch.setattr(json_stream, "_READ", piece)
    text = json.dumps(TRICKY, indent=indent, ensure_ascii=ascii_only).encode()
    assert entries_of(b" \n" + text + b"\n ") == flat(TRICKY)
    assert entries_of(b"{}") == []


def test_every_way_of_being_cut_off_is_an_error():
    text = json.dumps(TRICKY, ensure_ascii=False).encode()
    for length in range(len(text)):
        with pytest.raises(InputError, match=r"file\.json: no readable"):
            entries_of(text[:length])


@pytest.mark.parametrize(
    "text",
    [
        b"[]", b"null", b"{}x", b'{"a":1,}', b'{"a":[1,]}', b'{"a":[1 2]}', b'{"a" 1}', b'{"a":1 "b":2}',
        b"{1:2}", b'{"a":"\xff"}', b'{"a":' + b"[" * 100_000, b"<html>", b"\x00",
    ],
)  # fmt: skip
def test_damaged_json_is_one_line(text):
    with pytest.raises(InputError, match=r"^file\.json: no readable COCO annotation file: [^\n]*$"):
        entries_of(text)


def test_an_endless_record_does_not_fill_the_memory(monkeypatch):
    class Endless:
        def read(self, size: int) -> bytes:
            return b"[" * size if self.begun else setattr(self, "begun", True) or b'{"a":["'

        begun = False

    monkeypatch.setattr(json_stream, "_LONGEST", 1 << 22)
    with pytest.raises(InputError, match="unreasonably long"):
        list(read_entries(Endless(), "file.json"))


# -------------------------------------------------------------------------------- choice


def test_choice_is_fixed_for_good():
    # Golden: two people with the same command get the same images, on any platform, in any later version.
    images = {7 * i: frozenset({i % 3}) for i in range(1000)}
    assert choose(images, 8, 0, "train2017") == GOLDEN_0
    assert choose(images, 8, 1, "train2017") == GOLDEN_1
    assert choose(images, 8, 0, "val2017") == GOLDEN_VAL


GOLDEN_0 = [287, 329, 546, 2877, 3045, 5383, 6853, 6916]
GOLDEN_1 = [861, 1799, 2863, 4480, 5061, 6097, 6237, 6510]
GOLDEN_VAL = [714, 840, 980, 1197, 1309, 3157, 5705, 6692]


def test_choice_ignores_the_order_of_the_file():
    rng = random.Random(3)
    images = {i: frozenset(rng.sample(range(20), rng.randrange(4))) for i in range(500)}
    shuffled = dict(sorted(images.items(), key=lambda _: rng.random()))
    assert list(images) != list(shuffled)
    assert choose(images, 40, 5, "train2017", 3) == choose(shuffled, 40, 5, "train2017", 3)


def test_more_images_are_the_same_and_some_more():
    images = dict.fromkeys(range(300), frozenset())
    assert set(choose(images, 50, 0, "train2017")) < set(choose(images, 60, 0, "train2017"))


def test_every_image_is_as_likely_as_any_other():
    trials, population, count = 40_000, 20, 5
    images = dict.fromkeys(range(population), frozenset())
    hits = [0] * population
    for seed in range(trials):
        for image in choose(images, count, seed, "train2017"):
            hits[image] += 1
    p = count / population
    error = math.sqrt(p * (1 - p) / trials)
    # 4.5 standard errors: 20 images all pass with probability 0.9999; 5 % of p is 5.8 standard errors.
    assert all(abs(hit / trials - p) < 4.5 * error for hit in hits)


category_sets = st.lists(st.frozensets(st.integers(0, 6), max_size=4), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(category_sets, st.integers(0, 5), st.data())
def test_minima_are_met_whenever_there_is_room(sets, minimum, data):
    images = dict(enumerate(sets))
    having = {c: sum(c in held for held in sets) for c in range(7)}
    needed = sum(min(minimum, n) for n in having.values())
    count = data.draw(st.integers(1, len(sets)))
    chosen = choose(images, count, 0, "train2017", minimum)
    assert len(chosen) == len(set(chosen)) == count
    assert chosen == sorted(chosen)
    held = {c: sum(c in images[i] for i in chosen) for c in range(7)}
    if count >= needed:
        assert all(held[c] >= min(minimum, having[c]) for c in range(7))
    # Only what is needed is replaced: at most one image for each that was short at first.
    first = choose(images, count, 0, "train2017")
    short = sum(max(0, min(minimum, having[c]) - sum(c in images[i] for i in first)) for c in range(7))
    assert len(set(chosen) - set(first)) <= short


def test_rare_category_is_in_train_by_default():
    images = {i: frozenset({1}) for i in range(1000)} | {5000: frozenset({2})}
    assert 5000 not in choose(images, 10, 0, "train2017")
    assert 5000 in choose(images, 10, 0, "train2017", 1)


def test_too_many_asked():
    with pytest.raises(InputError, match="train2017: 4 images asked, but only 3"):
        choose(dict.fromkeys(range(3), frozenset()), 4, 0, "train2017")


@pytest.mark.parametrize(
    "options",
    [
        {"train": -1},
        {"train": 0, "val": 0},
        {"min_per_category": -1},
        {"categories": ("a", "")},
        {"train": 2**63},
        {"seed": -1},
        {"seed": 2**32},
        {"val": 1.5},
    ],
)
def test_bad_options(options):
    with pytest.raises(InputError):
        Options(**options)


# -------------------------------------------------------------------------------- cutting out


def write(content: Any) -> io.BytesIO:
    return io.BytesIO(json.dumps(content).encode())


def cut(content: Any, ids: Any, target: Path, categories: frozenset[int] | None = None) -> dict[str, Any]:
    keep = categories if categories is not None else frozenset(c["id"] for c in content["categories"])
    extract(write(content), "full.json", ids, keep, target)
    return json.loads(target.read_bytes())


def test_kept_records_are_untouched(tmp_path):
    full = annotations("train", 60)
    ids = [image["id"] for image in full["images"][5:25]]
    part = cut(full, ids, tmp_path / "part.json")
    assert part["images"] == [image for image in full["images"] if image["id"] in ids]
    assert part["annotations"] == [box for box in full["annotations"] if box["image_id"] in ids]
    assert any(box["iscrowd"] for box in part["annotations"])
    assert {key: part[key] for key in ("info", "licenses", "categories")} == {
        key: full[key] for key in ("info", "licenses", "categories")
    }
    with (tmp_path / "part.json").open("rb") as file:
        images = read_images(file, "part.json")
    assert [image.id for image in images] == ids
    assert images[0].coco_url.endswith(images[0].file_name)


def test_bytes_do_not_depend_on_order_or_layout_of_the_file(tmp_path):
    full = annotations("train", 60)
    ids = [image["id"] for image in full["images"][:30]]
    cut(full, ids, tmp_path / "a.json")
    rng = random.Random(0)
    other = {key: full[key] for key in sorted(full, reverse=True)}
    for key in ("images", "annotations", "licenses", "categories"):
        other[key] = [dict(sorted(e.items(), key=lambda _: rng.random())) for e in full[key]]
        rng.shuffle(other[key])
    text = json.dumps(other, indent=3, ensure_ascii=False).encode()
    keep = frozenset(c["id"] for c in full["categories"])
    extract(io.BytesIO(text), "b", reversed(ids), keep, tmp_path / "b.json")  # type: ignore[arg-type]
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_contents(io.BytesIO(text), "b") == read_contents(write(full), "a")


def test_chosen_categories_alone_are_kept(tmp_path):
    full = annotations("train", 60)
    keep = category_ids(read_contents(write(full), "f").categories, ["thing 1", "thing 4"], "f")
    part = cut(full, [image["id"] for image in full["images"]], tmp_path / "part.json", keep)
    assert [c["name"] for c in part["categories"]] == ["thing 1", "thing 4"]
    assert part["annotations"] == [box for box in full["annotations"] if box["category_id"] in keep]


def test_unknown_category_proposes_the_nearest():
    with pytest.raises(InputError, match=r"'parson' is not in f\.json; did you mean 'person'"):
        category_ids({1: "person", 2: "dog"}, ["parson"], "f.json")


def test_crowds_do_not_count_as_boxes():
    full = annotations("train", 10)
    for box in full["annotations"]:
        box["iscrowd"] = int(box["category_id"] == 1)
    contents = read_contents(write(full), "f")
    assert contents.categories[1] == "thing 0"
    assert not any(1 in held for held in contents.images.values())
    assert len(contents.images) == 10


@pytest.mark.parametrize(
    "name",
    [
        "../evil.jpg", "/etc/passwd", "a/b.jpg", "a\\b.jpg", "C:evil.jpg", "..", ".", "", ".hidden.jpg",
        "a\0.jpg", "a\n.jpg", "a.jpg ", "a.", "x" * 300 + ".jpg", "~root", "é.jpg", "\ud800.jpg",
    ],
)  # fmt: skip
def test_file_names_stay_inside(tmp_path, name):
    full = annotations("train", 5)
    full["images"][2]["file_name"] = name
    with pytest.raises(InputError, match=r"^full\.json: image 17: file_name [^\n]* is no plain file name$"):
        cut(full, [17], tmp_path / "part.json")
    assert cut(full, [3], tmp_path / "part.json")["images"]  # the others are not spoilt by it


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://h/a.jpg", "gopher://h/", "//h/a.jpg", "a.jpg", "http://",
        "http:///a.jpg",
        "http://u:p@h/a.jpg", "http://h:port/a.jpg", "http://h/a b.jpg", "http://h/a\r\nHost: x", "data:,x",
        "http://[::1/a.jpg", None, "",
    ],
)  # fmt: skip
def test_only_plain_http_addresses(tmp_path, url):
    full = annotations("train", 5)
    full["images"][2]["coco_url"] = url
    with pytest.raises(InputError, match=r"^full\.json: image 17[^\n]*coco_url"):
        cut(full, [17], tmp_path / "part.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][2].update(width=0), "image 17: 0x"),
        (lambda c: c["images"][2].update(width=30000, height=30000), "no reasonable size"),
        (lambda c: c["images"][2].update(width="9"), r"got `str` - at `\$\.width`: {"),
        (lambda c: c["images"][2].update(id=True), r"images: Expected `int`, got `bool` - at `\$\.id`"),
        (lambda c: c["images"][2].update(file_name="000000000024.JPG"), "two images are called"),
        (lambda c: c["images"].append(c["images"][2]), "image id 17 appears twice"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "annotation id 11 appears twice"),
        (lambda c: c["images"].pop(2), "no image with id 17"),
        (lambda c: c["annotations"].append({"id": 1}), "Object missing required field `image_id`"),
        (lambda c: c["annotations"][0].update(id=2**63), "annotations: Expected `int` <= 9007199254740992"),
        (lambda c: c["images"][2].update(id=-1), "images: Expected `int` >= 0"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 4]), "annotations: Expected `float` >= 0"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "it holds NaN, which is no"),
        (lambda c: c["annotations"][0].update(score=float("-inf")), "it holds -Infinity, which is no JSON"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"length 4.* at `\$\.bbox`"),
        (lambda c: c["images"][2].update(file_name=7), "images: Expected `str`, got `int`"),
        (lambda c: c["images"][2].update(coco_url=5), "images: Expected `str | null`, got `int`"),
        (lambda c: c["images"][0].update(id="\ud800"), "surrogates not allowed"),
        (lambda c: c["categories"][0].update(name="\ud800"), r"'\\ud800' is not a line of text"),
        (lambda c: c["categories"][0].update(name="a\x1b[2J"), "is not a line of text"),
    ],
)  # fmt: skip
def test_unsound_records(tmp_path, change, message):
    full = annotations("train", 5)
    change(full)
    with pytest.raises(InputError, match=message):
        cut(full, [image_id for image_id in (3, 10, 17, 24, 31)], tmp_path / "part.json")  # noqa: C416


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"].append(c["images"][2]), "image id 17 appears twice"),
        (lambda c: c["annotations"][0].update(category_id=99, iscrowd=0), "category 99"),
        (lambda c: c["images"].clear(), "no images"),
        (lambda c: c["annotations"].append([]), "annotations: Expected `object`, got `array`"),
        (lambda c: c["categories"].append(c["categories"][0]), "category 1, 'thing 0', appears twice"),
        (lambda c: c["categories"].append({"id": 99, "name": "thing 0"}), "category 99, 'thing 0', appears"),
    ],
)
def test_unsound_contents(change, message):
    full = annotations("train", 5)
    change(full)
    with pytest.raises(InputError, match=message):
        read_contents(write(full), "full.json")


# -------------------------------------------------------------------------------- manifest, summary


def test_manifest_comes_back_the_same(tmp_path):
    images = (Fetched(3, "a.jpg", 5, "00" * 32), Fetched(4, "b.jpg", 6, "1f" * 32))
    for options in (Options(2, 0, 7, None, 2), Options(2, 0, 2**32 - 1, ("cat", "traffic light"), 0)):
        manifest = Manifest(1, options, {"train": Part("ab" * 32, images)})
        (tmp_path / "m.json").write_bytes(manifest.dump())
        assert read_manifest(tmp_path / "m.json") == manifest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"a.jpg"', '"../a.jpg"'),
        ('"bytes": 5', '"bytes": "5"'),
        ('"version": 1', '"version": 2'),
        ('"train": {', '"../train": {'),
        ('"id": 3', '"id": 4'),
        ("00", "zz"),
        ('"seed": 0', '"seed": -1'),
        ('"train": 2', '"train": "2"'),
        ('"train": 2', '"train": 3'),
        ('"val": 0', '"val": 1'),
        ('"categories": null', '"categories": [7]'),
        ("ab" * 32, "ab"),
        ("a.jpg", "a.jpg\\n"),
        ("}", ""),
    ],
)
def test_manifest_is_not_trusted(tmp_path, old, new):
    images = (Fetched(3, "a.jpg", 5, "00" * 32), Fetched(4, "b.jpg", 6, "00" * 32))
    text = Manifest(1, Options(2, 0), {"train": Part("ab" * 32, images)}).dump().decode()
    assert old in text
    (tmp_path / "m.json").write_text(text.replace(old, new))
    with pytest.raises(InputError, match=r"m\.json: not (what it should be|valid JSON)"):
        read_manifest(tmp_path / "m.json")


@pytest.mark.parametrize(
    "text",
    [
        b"{}", b"[]", b"null", b'{"version": 1, "splits": {}}', b"\x80\x04K\x01.", b"[" * 100_000,
        b'{"version": 1, "options": {}, "splits": {}}',
        b'{"version": 1, "options": {"train": 0, "val": 0}, "splits": {}}',
        b'{"version": 1, "options": {"train": 2, "val": 0}, "splits": {}}',
        b'{"version": 1, "options": {"train": 0, "val": 2}, "splits": {"val": {"json_sha256": "x"}}}',
    ],
)  # fmt: skip
def test_a_manifest_without_its_parts_is_none(tmp_path, text):
    (tmp_path / "m.json").write_bytes(text)
    with pytest.raises(InputError, match=r"m\.json: n[^\n]*"):
        read_manifest(tmp_path / "m.json")


def test_missing_manifest(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        read_manifest(tmp_path / "m.json")


def test_summary_counts(tmp_path):
    full = annotations("train", 60)
    kinds = full["categories"]
    sizes = {"small": 1023.9, "medium": 1024, "large": 9216}
    full["annotations"] = [
        {
            "id": i,
            "image_id": 3,
            "category_id": kinds[0]["id"],
            "iscrowd": 0,
            "area": area,
            "bbox": [0, 0, 1, 1],
        }
        for i, area in enumerate([*sizes.values(), 9215.9])
    ]
    full["annotations"].append(full["annotations"][0] | {"id": 90, "iscrowd": 1, "image_id": 10})
    full["annotations"].append(
        full["annotations"][0] | {"id": 91, "category_id": kinds[1]["id"], "image_id": 17}
    )
    cut(full, [3, 10, 17, 24], tmp_path / "part.json")
    summary = summarize(tmp_path / "part.json")
    assert (summary.images, summary.empty, summary.crowds) == (4, 2, 1)
    assert dict(summary.boxes) == {
        ("thing 0", "small"): 1, ("thing 0", "medium"): 2, ("thing 0", "large"): 1, ("thing 1", "small"): 1,
    }  # fmt: skip
    assert summary.images_with == {"thing 0": 1, "thing 1": 1, "thing 2": 0, "thing 3": 0, "thing 4": 0}
    assert summary.licenses.total() == 4
    for name in ("a.png", "b.png"):
        write_figure(tmp_path / name, class_figure({"train": summary, "val": summary}))
    picture = (tmp_path / "a.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    assert picture == (tmp_path / "b.png").read_bytes()


HOSTILE = ["a[/b]c", r"$\frac{$", "[red]x", "日本", "x" * 400, "_^{", "<b>"]


def test_names_are_never_read_as_markup(tmp_path, capsys):
    full = annotations("train", 60, categories=len(HOSTILE))
    for kind, name in zip(full["categories"], HOSTILE, strict=True):
        kind["name"] = name
    odd = ["bare", None, {"id": [1], "name": "x"}, {"id": 2}, {"id": 3, "name": "[/b]\x1b[2J\ud800"}]
    full["licenses"] = odd
    full["images"][0]["license"], full["images"][1]["license"] = [1], {"id": 3}
    full["images"][2]["license"] = 3
    for split in ("train", "val"):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        cut(
            full,
            [image["id"] for image in full["images"]],
            tmp_path / f"annotations/instances_{split}2017.json",
        )
    images = tuple(Fetched(image["id"], image["file_name"], 5, "00" * 32) for image in full["images"])
    part = Part("ab" * 32, images)
    manifest = Manifest(1, Options(60, 60, min_per_category=100), {"train": part, "val": part})
    show(PlainConsole(), tmp_path, manifest)
    printed = capsys.readouterr().out
    assert all(name in printed for name in HOSTILE)
    assert r"[/b]\x1b[2J\ud800" in printed
    assert "\x1b" not in printed
    assert "x unknown" in printed
    assert (tmp_path / "classes.png").read_bytes()[:4] == b"\x89PNG"


def test_a_box_without_area_counts_by_its_sides(tmp_path):
    full = annotations("train", 5)
    full["annotations"] = [
        {"id": side, "image_id": 3, "category_id": 1, "bbox": [0, 0, side, side]} for side in (31, 32, 95, 96)
    ]
    cut(full, [3], tmp_path / "part.json")
    assert [summarize(tmp_path / "part.json").boxes["thing 0", size] for size in SIZES] == [1, 2, 1]


def test_preparing_needs_neither_torch_nor_numpy():
    # torch alone takes more memory than the whole fetch may.
    code = (
        "import sys, dropblock_det.coco_subset.prepare, dropblock_det.coco_subset.tool;"
        "heavy = {'torch', 'torchvision', 'lightning', 'numpy', 'matplotlib'} & sys.modules.keys();"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


FULL_SIZE = """
import os, sys, time
from pathlib import Path
from dropblock_det.coco_subset.choose import choose, extract, read_contents
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
path, target = map(Path, sys.argv[1:])
began = time.process_time()
with path.open("rb") as file:
    contents = read_contents(file, "full")
ids = choose(contents.images, 500, 0, "train2017", 1)
with path.open("rb") as file:
    extract(file, "full", ids, frozenset(contents.categories), target)
seconds, peak = time.process_time() - began, peak_mb()
print(f"{path.stat().st_size / 1e6:.0f} MB: {seconds:.1f} s on one core, peak {peak:.0f} MB")
assert seconds < 60 and peak < 300
"""


@pytest.mark.slow
def test_full_size_annotations(tmp_path):
    write_full_size(tmp_path / "full.json")
    command = [
        sys.executable,
        "-c",
        PEAK_MB + FULL_SIZE,
        str(tmp_path / "full.json"),
        str(tmp_path / "part.json"),
    ]
    subprocess.run(command, check=True)
    summary = summarize(tmp_path / "part.json")
    assert summary.images == 500
    assert min(summary.images_with.values()) >= 1
