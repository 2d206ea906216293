"""Labelled images in memory: order, augmentation, subsets, and what is wrong with them in one line."""

import gzip
import math
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dropblock_det.datasets.classification import ClassificationDataModule, TrainBatches, shifted
from dropblock_det.errors import InputError


@pytest.fixture
def folder(tmp_path):
    """Two classes of random 6x5 images: 7 and 4 for training, 3 and 2 for testing."""
    rng = np.random.default_rng(0)
    for part, counts in {"train": (7, 4), "test": (3, 2)}.items():
        for name, count in zip(("cat", "dog"), counts, strict=True):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path


def batches(loader):
    return list(loader)


def test_every_image_comes_once_an_epoch_with_its_label(folder):
    data = ClassificationDataModule(str(folder), batch_size=4)
    data.setup("fit")
    images, labels, ids = zip(*data.train_dataloader(), strict=True)
    images, labels, ids = (
        torch.cat(images),
        torch.cat(labels),
        torch.tensor([i for batch in ids for i in batch]),
    )
    assert images.shape == (11, 3, 5, 6)
    assert images.dtype == torch.uint8
    assert sorted(ids.tolist()) == list(range(11))
    assert ids.tolist() != list(range(11))
    assert torch.equal(labels, (ids >= 7).long())
    stored = np.asarray(Image.open(folder / "train" / "dog" / "2.png"))
    assert torch.equal(images[ids == 9][0], torch.from_numpy(stored).permute(2, 0, 1))
    validated = [image for batch in data.val_dataloader() for image in batch[2]]
    assert validated == [0, 1, 2, 3, 4]
    assert data.categories == [{"label": 0, "id": 0, "name": "cat"}, {"label": 1, "id": 1, "name": "dog"}]


def test_order_and_augmentation_depend_on_seed_and_epoch_not_on_the_number_of_processes():
    def draws(seed, epoch, rank=0, world_size=1, batch_size=10):
        sampler = TrainBatches(60, batch_size, seed, True, 2, rank, world_size)
        sampler.set_epoch(epoch)
        return {
            index: (flip, tuple(shift))
            for draw in sampler
            for index, flip, shift in zip(*(column.tolist() for column in draw), strict=True)
        }

    one = draws(3, 1)
    assert len(one) == 60
    assert draws(3, 1, batch_size=7) == one
    assert draws(3, 1, 0, 2) | draws(3, 1, 1, 2) == one
    assert not draws(3, 1, 0, 2).keys() & draws(3, 1, 1, 2).keys()
    assert draws(3, 2) != one
    assert draws(4, 1) != one


def test_flips_and_shifts_are_as_frequent_as_they_should_be():
    size, reach = 60_000, 2
    (draw,) = TrainBatches(size, size, 0, True, reach)
    # Five standard errors: 1.0 % for the flips' share of a half, 2.0 % for each of five shifts'.
    assert abs(draw.flips.float().mean() - 0.5) < 5 * math.sqrt(0.25 / size)
    for axis in range(2):
        share = torch.bincount(draw.shifts[:, axis] + reach, minlength=5) / size
        assert (share - 0.2).abs().max() < 5 * math.sqrt(0.16 / size)


def test_a_shift_moves_the_image_and_brings_in_zeros():
    image = torch.arange(1, 13, dtype=torch.uint8).reshape(1, 1, 3, 4).expand(4, 2, 3, 4)
    moved = shifted(image, torch.tensor([[0, 0], [1, 0], [0, -2], [-1, 1]]))
    plain = image[0, 0]
    assert torch.equal(moved[0, 1], plain)
    assert torch.equal(moved[1, 0, 1:], plain[:-1])
    assert not moved[1, :, 0].any()
    assert torch.equal(moved[2, 1, :, :2], plain[:, 2:])
    assert not moved[2, :, :, 2:].any()
    assert torch.equal(moved[3, 0, :2, 1:], plain[1:, :3])


def test_flips_reach_the_images(folder):
    data = ClassificationDataModule(str(folder), batch_size=11, flip=True)
    (images, _, ids), (plain, _, plain_ids) = (
        next(iter(d.train_dataloader())) for d in (data, ClassificationDataModule(str(folder), batch_size=11))
    )
    assert ids == plain_ids
    flipped = [
        torch.equal(a, b.flip(2)) and not torch.equal(a, b) for a, b in zip(images, plain, strict=True)
    ]
    kept = [torch.equal(a, b) for a, b in zip(images, plain, strict=True)]
    assert 0 < sum(flipped) == 11 - sum(kept)


def test_a_subset_has_a_seed_of_its_own(folder):
    def ids(**arguments):
        return ClassificationDataModule(str(folder), train_subset=5, **arguments).train_dataset.ids.tolist()

    assert ids(seed=0) == ids(seed=1)
    assert len({tuple(ids(subset_seed=seed)) for seed in range(5)}) > 1
    hashes = [ClassificationDataModule(str(folder), train_subset=n).data_hash() for n in (5, 6, 5)]
    assert hashes[0] == hashes[2] != hashes[1]


def test_the_training_subset_varies_alone(folder):
    data = [
        ClassificationDataModule(str(folder), train_subset=5, val_subset=3, train_subset_seed=n)
        for n in range(5)
    ]
    assert len({tuple(each.train_dataset.ids.tolist()) for each in data}) > 1
    assert len({tuple(each.val_dataset.ids.tolist()) for each in data}) == 1


def test_checkpoint_arguments_give_the_same_test_images(folder):
    data = ClassificationDataModule(str(folder), val_subset=3, subset_seed=1, size=4, flip=True)
    again = ClassificationDataModule(**data.validation_arguments())
    assert torch.equal(again.val_dataset.images, data.val_dataset.images)
    assert again.val_dataset.images.shape == (3, 3, 4, 4)


def _odd_size(root: Path) -> None:
    Image.new("RGB", (7, 5)).save(root / "train" / "dog" / "9.png")


def _broken(root: Path) -> None:
    (root / "train" / "dog" / "1.png").write_bytes(b"no image")


def _other_classes(root: Path) -> None:
    os.rename(root / "test" / "dog", root / "test" / "wolf")


def _empty_class(root: Path) -> None:
    (root / "train" / "bird").mkdir()


def _one_class(folder):
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "cat")


def _not_utf8(folder):
    (folder / "train" / "cat").rename(folder / "train" / "c\udcff")


def _a_link_in_a_circle(folder):
    (folder / "train" / "cat" / "more").symlink_to(folder / "train")


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (_one_class, {}, "train: has one class, 'dog'; a classifier takes two or more"),
        (_not_utf8, {}, r"'c\\udcff' has a name that is not UTF-8; rename the folder"),
        (_a_link_in_a_circle, {}, "links lead to the same images more than once"),
        (None, {"size": 2**16}, "takes more than 8 GiB decoded; give a smaller data.size"),
        (_odd_size, {}, "9.png: 7x5 pixels, the first image has 6x5; give a data.size"),
        (_broken, {}, r"1.png: can't be read as an image \("),
        (_other_classes, {}, "train and test have other classes"),
        (_empty_class, {}, "no folder data set: Found no valid file for the classes bird"),
        (None, {"root": "/no/such"}, "/no/such: no folder data set: .*check data.root"),
        (None, {"source": "cifar10"}, "no cifar10 data set: .*data.download=true"),
        (None, {"source": "mnist"}, "no mnist data set: .*data.download=true"),
        (None, {"source": "imagenet"}, "data.source: got 'imagenet'"),
        (None, {"train_subset": 12}, "data.train_subset: got 12, the data set has 11 images"),
        (None, {"val_subset": 0}, "data.val_subset: got 0"),
        (None, {"batch_size": 0}, "data.batch_size: got 0"),
        (None, {"shift": -1}, "data.shift: got -1"),
    ],
)
def test_what_is_wrong_is_one_line(folder, spoil, arguments, message):
    if spoil:
        spoil(folder)
    with pytest.raises(InputError, match=message) as caught:  # noqa: PT012
        data = ClassificationDataModule(**({"root": str(folder)} | arguments))
        data.setup("fit")
        data.data_hash()
    assert "\n" not in str(caught.value)


def write_mnist(root, sizes=(5, 3), **others):
    """Random images with the labels 0, 1, ...; ``others`` are other bytes for ``images`` or ``labels``."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, size in zip(("train", "t10k"), sizes, strict=True):
        pixels, labels = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8), np.arange(size, dtype=np.uint8)
        content = {
            "images": struct.pack(">4i", 2051, size, 28, 28) + pixels.tobytes(),
            "labels": struct.pack(">2i", 2049, size) + labels.tobytes(),
        } | others
        (raw / f"{part}-images-idx3-ubyte").write_bytes(content["images"])
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(content["labels"])
    return pixels


def test_mnist_s_own_files_are_read(tmp_path):
    pixels = write_mnist(tmp_path)
    data = ClassificationDataModule(str(tmp_path), "mnist")
    data.setup("fit")
    assert data.val_dataset.images.shape == (3, 1, 28, 28)
    assert np.array_equal(data.val_dataset.images[2, 0], pixels[2])
    assert data.val_dataset.labels.tolist() == [0, 1, 2]
    assert len(data.categories) == 10
    assert ClassificationDataModule(str(tmp_path), "mnist", size=32).image_shape == (1, 32, 32)


@pytest.mark.parametrize(
    "others",
    [
        {"images": b""},
        {"images": b"\xff" * 900},
        {"images": struct.pack(">4i", 2051, 5, 28, 28) + bytes(300)},
        {"images": struct.pack(">4i", 2051, 2**31 - 1, 2**30, 28)},
        {"images": struct.pack(">4i", 2051, 5, 14, 56) + bytes(5 * 784)},
        {"images": struct.pack(">4I", 0xD03, 5, 28, 28) + bytes(5 * 4 * 784)},
        {"images": struct.pack(">2i", 2049, 5) + bytes(5)},
        {"images": struct.pack(">4i", 2051, 0, 28, 28), "labels": struct.pack(">2i", 2049, 0)},
        {"labels": struct.pack(">2i", 2049, 2) + bytes(2)},
        {"labels": struct.pack(">2i", 2049, 5) + b"\xc8" * 5},
    ],
)
def test_damaged_mnist_is_one_line(tmp_path, others):
    write_mnist(tmp_path, **others)
    with pytest.raises(InputError, match=r"no mnist data set: .*; check data\.root") as caught:
        ClassificationDataModule(str(tmp_path), "mnist").setup("fit")
    assert "\n" not in str(caught.value)


def test_a_shift_far_beyond_the_image_leaves_nothing():
    images = torch.ones(2, 3, 4, 5, dtype=torch.uint8)
    assert shifted(images, torch.tensor([[2**30, 0], [0, -(2**30)]])).sum() == 0


@pytest.fixture(scope="module")
def real_mnist(tmp_path_factory):
    """All of MNIST, unpacked, where DROPBLOCK_DET_MNIST names the folder of its four packed files."""
    folder = os.environ.get("DROPBLOCK_DET_MNIST")
    if not folder:
        pytest.skip("set DROPBLOCK_DET_MNIST to a folder with the four .gz files of MNIST")
    root = tmp_path_factory.mktemp("mnist")
    (root / "MNIST" / "raw").mkdir(parents=True)
    for packed in Path(folder).glob("*.gz"):
        (root / "MNIST" / "raw" / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
    return root


def test_all_of_mnist(real_mnist):
    data = ClassificationDataModule(str(real_mnist), "mnist")
    data.setup("fit")
    assert len(data.train_dataset) == 60_000
    assert torch.bincount(data.val_dataset.labels).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
