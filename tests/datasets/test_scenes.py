import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from dropblock_det.datasets.scenes import (
    CLASSES,
    DIRECTIONS,
    RADIUS,
    ScenesDataModule,
    draw_scene,
    shape_mask,
    write_scenes,
)
from dropblock_det.errors import InputError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    data = ScenesDataModule(str(root), train_size=96, val_size=32, num_workers=0)
    data.prepare_data()
    data.setup("fit")
    return data


def digest(root):
    pixels = b"".join(np.asarray(Image.open(file)).tobytes() for file in sorted(root.glob("*/*.png")))
    texts = b"".join(file.read_bytes() for file in sorted(root.glob("annotations/*.json")))
    return hashlib.sha256(pixels + texts).hexdigest()


def test_the_same_on_every_machine(tmp_path):
    write_scenes(tmp_path / "a", 3, 2, seed=5)
    assert digest(tmp_path / "a") == "5a53f83761fa31076bb9b8af41fa48054d2a56c45d60c39b617b9ff351c46144"


def test_seed_and_part_decide(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_scenes(tmp_path / name, 3, 3, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    train, val = ((tmp_path / "a" / part / "000001.png").read_bytes() for part in ("train", "val"))
    assert train != val


def test_written_once(tmp_path):
    folder = tmp_path / "scenes"
    write_scenes(folder, 2, 1, seed=0)
    marker = folder / "train" / "000001.png"
    written = marker.stat().st_mtime_ns
    write_scenes(folder, 2, 1, seed=0)
    assert marker.stat().st_mtime_ns == written
    assert [child.name for child in tmp_path.iterdir()] == ["scenes"]  # nothing temporary is left


def test_scenes_of_another_size_leave_those_of_a_running_training_alone(tmp_path):
    first, same, larger = (ScenesDataModule(str(tmp_path), size, 1, num_workers=0) for size in (2, 2, 3))
    first.prepare_data()
    before = digest(first.root)
    for other in (same, larger):
        other.prepare_data()
        other.setup("fit")
    assert same.root == first.root != larger.root
    assert len(larger.train_dataset) == 3
    assert digest(first.root) == before
    with pytest.raises(InputError, match="holds something else than these scenes"):
        write_scenes(first.root, 3, 1, seed=0)
    assert digest(first.root) == before


def test_a_root_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: File exists"):
        ScenesDataModule(str(tmp_path / "file")).prepare_data()


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    drawn = []

    def interrupted(rng):
        drawn.append(rng)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw_scene(rng)

    monkeypatch.setattr("dropblock_det.datasets.scenes.draw_scene", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "scenes", 4, 1, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_foreign_folders_are_not_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"precious")
    with pytest.raises(InputError, match="photos"):
        write_scenes(tmp_path / "photos", 2, 1, seed=0)
    assert (tmp_path / "photos" / "one.jpg").read_bytes() == b"precious"


def test_categories_are_known_before_the_scenes_are_written(data, tmp_path):
    assert ScenesDataModule(str(tmp_path / "none")).categories == data.train_dataset.categories
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("side", [18, 33, 72])
def test_shapes_are_turned_copies_of_the_right_size(name, side):
    # Share of the circle's square: by geometry.
    share = {
        "disk": np.pi / 4,
        "ring": np.pi / 4 * 0.75,
        "square": 0.5,
        "triangle": 3 * 3**0.5 / 16,
        "cross": 0.435,
    }
    areas = [shape_mask(name, side, direction).mean() for direction in DIRECTIONS]
    assert np.mean(areas) == pytest.approx(share[name], rel=0.05)
    assert np.ptp(areas) < 0.1
    assert all(a * a + b * b == RADIUS**2 for a, b in DIRECTIONS)


def test_scenes_are_varied(data):
    dataset = data.train_dataset
    counts = torch.bincount(dataset.labels, minlength=len(CLASSES) + 1)[1:]
    assert counts.min() > 20
    sides = (dataset.boxes[:, 2:] - dataset.boxes[:, :2]).amax(1)
    assert (sides < 32).float().mean() > 0.2
    assert (sides >= 42).float().mean() > 0.2
    empty = sum(not len(dataset[index][1]["boxes"]) for index in range(len(dataset)))
    assert 0 < empty < len(dataset) / 4
    assert dataset.dropped_boxes == 0


def test_boxes_and_areas_are_of_what_is_visible():
    overlapping = 0
    for seed in range(40):
        pixels, objects = draw_scene(np.random.default_rng(seed))
        assert pixels.dtype == np.uint8
        covered = sum((mask.astype(int) for _, mask in objects), np.zeros(pixels.shape[:2], int))
        assert covered.max(initial=0) <= 1  # a pixel belongs to one object
        overlapping += any(
            (m.any(0)[:, None].T & m.any(1)[:, None] & ~m & (covered > 0)).any() for _, m in objects
        )
    assert overlapping > 10  # boxes that overlap are common


def test_loader_reads_what_was_drawn(data):
    image, target = data.val_dataset[0]
    pixels, objects = draw_scene(np.random.default_rng((0, 1, 1)))
    assert torch.equal((image * 255).round().byte(), torch.from_numpy(pixels).permute(2, 0, 1))
    assert target["labels"].tolist() == [label + 1 for label, _ in objects]
    for box, (_, mask) in zip(target["boxes"].int().tolist(), objects, strict=True):
        left, top, right, bottom = box
        assert mask[top:bottom, left:right].sum() == mask.sum()
        assert mask[top].any()
        assert mask[bottom - 1].any()
        assert mask[:, left].any()
        assert mask[:, right - 1].any()


def test_the_training_subset_varies_alone(tmp_path):
    """As compare.py's --vary-subset needs it: other training images, the same validation images."""
    made = [
        ScenesDataModule(str(tmp_path), 12, 3, train_subset=5, train_subset_seed=seed, num_workers=0)
        for seed in (0, 0, 1)
    ]
    made[0].prepare_data()
    first, same, other = (data.train_dataset.ids for data in made)
    assert len(first) == 5
    assert first == same != other
    assert made[0].val_dataset.ids == made[2].val_dataset.ids
    hashes = [data.data_hash() for data in made]
    assert hashes[0] == hashes[1] != hashes[2]
