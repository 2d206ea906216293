import json
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from dropblock_det.datasets.augment import Augmentation, draw
from dropblock_det.datasets.coco import CocoDataModule
from dropblock_det.datasets.coco_dataset import CocoDataset
from dropblock_det.datasets.sampling import TrainSampler, ValBatches
from dropblock_det.errors import InputError

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
WINDOW = Augmentation(flip=0.5, scale_jitter=(0.5, 2.0))
ALL = Augmentation(flip=0.5, scale_jitter=(0.5, 2.0), color_jitter=0.4)


def test_items(content, write):
    dataset = CocoDataset(*write(content))
    assert dataset.ids == [3, 7, 9]
    assert dataset.categories == [
        {"label": 1, "id": 2, "name": "bicycle"},
        {"label": 2, "id": 18, "name": "dog"},
    ]
    assert dataset.dropped_boxes == 1

    image, target = dataset[1]
    stored = np.array(Image.open(dataset.path(7)))
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, torch.from_numpy(stored).permute(2, 0, 1) / 255, rtol=0, atol=1e-7)
    # The crowd is out; the second box ends 10 pixels outside the image and is cut.
    assert target["boxes"].tolist() == [[1, 2, 11, 10], [20, 5, 40, 15]]
    assert target["labels"].tolist() == [2, 1]
    assert target["image_id"] == 7

    _, empty = dataset[2]
    assert empty["boxes"].shape == (0, 4)
    assert empty["labels"].shape == (0,)


def test_a_box_too_thin_for_float32_is_dropped_and_counted(content, write):
    for box in ([4, 3, 0.05, 5], [25, 3, 5, 5], [-9, 0, 9, 5]):
        content["annotations"][4]["bbox"] = box
        assert CocoDataset(*write(content)).dropped_boxes == 1
    content["annotations"][4]["bbox"] = [4, 3, 0.2, 5]
    assert CocoDataset(*write(content)).dropped_boxes == 0


def test_subset_is_a_function_of_the_seed(content, write):
    content["images"] = [{"id": n, "file_name": f"{n}.png", "width": 8, "height": 8} for n in range(3, 33)]
    content["annotations"] = []
    files = write(content)
    first = CocoDataset(*files, subset=10, seed=1).ids
    assert len(set(first)) == 10
    assert first == CocoDataset(*files, subset=10, seed=1).ids
    assert first != CocoDataset(*files, subset=10, seed=2).ids
    for wrong in (0, 31, -1):
        with pytest.raises(InputError, match="30 images"):
            CocoDataset(*files, subset=wrong)


def marked() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A picture in which a white rectangle lies exactly in the box."""
    image = torch.full((3, 60, 80), 60, dtype=torch.uint8)
    image[:, 20:32, 30:50] = 250
    return image, torch.tensor([[30.0, 20.0, 50.0, 32.0]]), torch.tensor([4])


@pytest.mark.parametrize("seed", range(40))
def test_boxes_follow_their_objects(seed):
    image, boxes, labels = draw(WINDOW.pipeline(), *marked(), seed)
    white = image.float().mean(0) > 150
    rows, columns = white.any(1).nonzero().flatten(), white.any(0).nonzero().flatten()
    if not len(rows):
        assert len(boxes) == len(labels) == 0
        return
    seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert boxes.tolist() == [[float(edge) for edge in seen]]
    assert labels.tolist() == [4]


def test_scale_jitter_covers_its_range_evenly():
    pipeline = Augmentation(flip=0, scale_jitter=(0.5, 2.0)).pipeline()
    scales = torch.tensor([60 / draw(pipeline, *marked(), seed)[0].shape[1] for seed in range(2000)])
    logs = scales.log2()
    assert logs.min() >= -1.02
    assert logs.max() <= 1.02
    # Uniform on [-1, 1]: standard error of the mean 0.0129, of the standard deviation (0.577) 0.0058.
    assert abs(logs.mean()) < 4 * 0.0129
    assert abs(logs.std() - 3**-0.5) < 4 * 0.0058


def test_draws_depend_on_their_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(ALL.pipeline(), *marked(), 5)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(draw(ALL.pipeline(), *marked(), 5)[0], first)
    assert not torch.equal(draw(ALL.pipeline(), *marked(), 6)[0], first)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"flip": 1.5}, "flip"),
        ({"scale_jitter": (0, 1)}, "scale_jitter"),
        ({"scale_jitter": (2, 1)}, "scale_jitter"),
        ({"color_jitter": -1}, "color_jitter"),
    ],
)
def test_wrong_augmentation(wrong, name):
    with pytest.raises(InputError, match=f"augmentation.{name}"):
        Augmentation(**wrong)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_train_sampler_shares_out_every_image(world_size):
    shares = [TrainSampler(20, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    for sampler in shares:
        sampler.set_epoch(4)
    drawn = [list(sampler) for sampler in shares]
    assert len({len(share) for share in drawn}) == 1
    assert all(len(share) == len(sampler) for share, sampler in zip(drawn, shares, strict=True))
    flat = [pair for share in drawn for pair in share]
    assert {index for index, _ in flat} == set(range(20))
    assert len(flat) - 20 < world_size
    # Neither order nor augmentation depend on the number of processes.
    alone = TrainSampler(20, seed=3)
    alone.set_epoch(4)
    assert set(flat) == set(alone)
    assert [flat[r * len(drawn[0]) + i] for i in range(len(drawn[0])) for r in range(world_size)][
        :20
    ] == list(alone)


def test_train_sampler_is_a_function_of_seed_and_epoch():
    def epoch(seed, number):
        sampler = TrainSampler(50, seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(0, 1) == epoch(0, 1)
    assert len({tuple(index for index, _ in epoch(s, e)) for s in range(3) for e in range(3)}) == 9
    assert len({seed for s in range(3) for e in range(3) for _, seed in epoch(s, e)}) == 9 * 50
    assert TrainSampler(1, 0, rank=4, world_size=5).__len__() == len(list(TrainSampler(1, 0, 4, 5))) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_val_batches_hold_every_image_once_and_do_not_depend_on_the_ranks(world_size):
    shares = [ValBatches(30, 4, rank, world_size) for rank in range(world_size)]
    assert len({len(list(share)) for share in shares} | {len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share if batch]
    assert sorted(batches) == list(ValBatches(30, 4))
    assert sorted(index for batch in batches for index in batch) == list(range(30))


def make_data(content, write, **arguments) -> CocoDataModule:
    annotations, images = write(content)
    both = {"train_images": images.name, "val_images": images.name}
    both |= {"train_annotations": annotations.name, "val_annotations": annotations.name}
    data = CocoDataModule(str(annotations.parent), **both, **{"batch_size": 2, "num_workers": 0} | arguments)
    data.prepare_data()
    data.setup("fit")
    return data


def epoch_of(data: CocoDataModule, epoch: int) -> dict[int, torch.Tensor]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return {
        t["image_id"]: image for images, targets in loader for image, t in zip(images, targets, strict=True)
    }


def test_augmentation_does_not_depend_on_the_workers(content, write):
    runs = [
        epoch_of(make_data(content, write, num_workers=workers, augmentation=ALL, cache_mb=cache), 3)
        for workers, cache in ((0, 0), (2, 0), (2, 1))
    ]
    assert [*runs[0]] == [*runs[1]] == [*runs[2]]
    for image_id, image in runs[0].items():
        assert torch.equal(image, runs[1][image_id])
        assert torch.equal(image, runs[2][image_id])


def test_epochs_differ(content, write):
    data = make_data(content, write, augmentation=ALL)
    first, second = epoch_of(data, 0), epoch_of(data, 1)
    assert any(
        first[key].shape != second[key].shape or not torch.equal(first[key], second[key]) for key in first
    )


def test_cache_gives_the_same_images_within_its_bound(content, write):
    content["images"][0] |= {"width": 600, "height": 500}  # 0.86 MB: does not fit beside the first image
    content["images"].append({"id": 11, "file_name": "last.png", "width": 600, "height": 500})
    data = make_data(content, write, cache_mb=1)
    cache = data.train_dataset.cache
    assert cache is not None
    assert cache.places == 3
    assert cache.block.nbytes <= 1 << 20
    plain = make_data(content, write)
    for _ in range(2):
        for index in range(4):
            assert torch.equal(data.train_dataset[index][0], plain.train_dataset[index][0])
    assert cache.filled.tolist() == [True, True, True]


def test_workers_fill_one_shared_cache(content, write):
    data = make_data(content, write, num_workers=2, cache_mb=1)
    loader = data.train_dataloader()
    list(loader)
    assert data.train_dataset.cache.filled.all()
    data.train_dataset.folder = None  # from now on only the cache can answer here
    assert data.train_dataset[0][0].shape == (3, 10, 20)


def test_pickle_leaves_the_annotations_behind(content, write):
    dataset = pickle.loads(pickle.dumps(CocoDataset(*write(content))))
    assert not hasattr(dataset, "annotations")
    assert dataset[0][0].shape == (3, 10, 20)


def test_spawned_workers(content, write):
    data = make_data(content, write, num_workers=1, cache_mb=1)
    loader = data.train_dataloader()
    loader.multiprocessing_context = multiprocessing.get_context("spawn")
    assert sum(len(images) for images, _ in loader) == 3


def test_an_error_in_a_worker_is_one_line(content, write):
    data = make_data(content, write, num_workers=1)
    data.train_dataset.path(7).write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        list(data.train_dataloader())
    assert str(caught.value).startswith(str(data.train_dataset.path(7)))
    assert "\n" not in str(caught.value)


def test_train_and_val_must_agree_on_categories(content, write):
    annotations, images = write(content)
    content["categories"][0]["name"] = "cat"
    other = annotations.with_name("other.json")
    other.write_text(json.dumps(content))
    data = CocoDataModule(str(annotations.parent), images.name, annotations.name, images.name, other.name)
    with pytest.raises(InputError, match="categories"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 10**30),
        ("batch_size", 1.5),
        ("num_workers", -1),
        ("num_workers", 10**9),
        ("cache_mb", 2**60),
        ("seed", -1),
        ("seed", 2**32),
        ("subset_seed", 5_000_000_000),
        ("train_subset", 0),
        ("val_subset", -3),
    ],
)
def test_settings_are_checked_before_anything_is_read(name, value):
    with pytest.raises(InputError, match=rf"^data\.{name}: got {value}; Expected `int"):
        CocoDataModule("no such folder", **{name: value})


def test_a_checkpoint_finds_validation_data_outside_a_linked_root(content, write):
    path, images = write(content)
    elsewhere = path.parent / "disk" / "data"
    elsewhere.mkdir(parents=True)
    (path.parent / "link").symlink_to(elsewhere)
    places = {
        "train_images": images,
        "train_annotations": path,
        "val_images": images,
        "val_annotations": path,
    }
    data = CocoDataModule(str(path.parent / "link"), **{name: str(place) for name, place in places.items()})
    again = CocoDataModule(**data.validation_arguments())
    assert again.val_annotations.resolve() == path.resolve()
    assert len(again.val_dataset) == len(data.val_dataset)


def test_data_hash_follows_annotations_and_subset(content, write):
    whole = make_data(content, write).data_hash()
    assert whole == make_data(content, write).data_hash()
    assert whole != make_data(content, write, val_subset=2).data_hash()
    assert whole == make_data(content, write, seed=5).data_hash()
    ids = {make_data(content, write, val_subset=2, seed=seed).val_dataset.ids[0] for seed in range(8)}
    assert len(ids) == 1, "runs with other seeds see the same images"
    content["annotations"][0]["bbox"][0] += 1
    assert whole != make_data(content, write).data_hash()


def test_lightning_trains_over_it(content, write):
    """The loaders serve Lightning's own loop, which sets the sampler's epoch."""

    class Recorder(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.orders, self.validated = [], []

        def training_step(self, batch, batch_idx):
            self.orders.append((self.current_epoch, [target["image_id"] for target in batch[1]]))
            return self.weight.sum()

        def validation_step(self, batch, batch_idx):
            self.validated += [target["image_id"] for target in batch[1]]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data, module = make_data(content, write), Recorder()
    Trainer(max_epochs=3, use_distributed_sampler=False, num_sanity_val_steps=0, **QUIET).fit(
        module, datamodule=data
    )
    for epoch in range(3):
        sampler = TrainSampler(3, data.seed)
        sampler.set_epoch(epoch)
        expected = [data.train_dataset.ids[index] for index, _ in sampler]
        assert [image for e, batch in module.orders for image in batch if e == epoch] == expected
    assert module.validated == [3, 7, 9] * 3


class Norm(LightningModule):
    """Has a buffer, which DDP sends from the first process to the others before each step, validation too."""

    def __init__(self, folder):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)
        self.folder = folder

    def training_step(self, batch, batch_idx):
        return self.norm(torch.ones(len(batch[0]) + 1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        for target in batch[1]:
            with (self.folder / str(self.global_rank)).open("a") as file:
                print(target["image_id"], file=file)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(world_size, data, seen):
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy="ddp_fork",
        max_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **QUIET,
    )
    trainer.fit(Norm(seen), datamodule=data)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_validate_every_image_once_and_end_together(world_size, content, write, tmp_path):
    """Three processes share two batches of validation: one has nothing to do, and still takes part."""
    (tmp_path / "seen").mkdir()
    # Forked by a process of their own: autograd's threads, which other tests start here, do not survive it.
    arguments = world_size, make_data(content, write), tmp_path / "seen"
    process = multiprocessing.get_context("spawn").Process(target=fit, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
    seen = [int(line) for file in (tmp_path / "seen").iterdir() for line in file.read_text().split()]
    assert sorted(seen) == [3, 7, 9]


def test_real_coco(real_coco):
    data = CocoDataModule(str(real_coco), num_workers=0, batch_size=4, val_subset=60, seed=1)
    data.setup("fit")
    assert len(data.categories) == 80
    assert data.categories[-1] == {"label": 80, "id": 90, "name": "toothbrush"}
    images, targets = next(iter(data.train_dataloader()))
    for image, target in zip(images, targets, strict=True):
        assert image.shape[0] == 3
        assert 0 <= image.min() < image.max() <= 1
        assert (target["boxes"] >= 0).all()
        assert (target["boxes"][:, 2:] <= torch.tensor(image.shape[:0:-1])).all()
    assert len(data.val_dataset) == 60
