"""The Regularize callback in a LightningModule that someone else wrote."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18

from dropblock_det.callbacks import Regularize
from dropblock_det.errors import InputError
from dropblock_det.schedule import scheduled_p


class Pictures(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 64, 64, generator=generator), index % 4


class Classifier(LightningModule):
    """Knows nothing of this package."""

    def __init__(self, lazy=False):
        super().__init__()
        self.net = None if lazy else resnet18(num_classes=4)

    def configure_model(self):
        if self.net is None:
            self.net = resnet18(num_classes=4)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Watch(Callback):
    """Notes, at each step, the drop probability and which channels of the last stage were dropped."""

    def __init__(self):
        self.p, self.masks, self.shares = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        regularizer = pl_module.net.layer4[1].bn2.regularizer
        self.p.append(regularizer.p)
        self.hook = regularizer.register_forward_hook(lambda m, i, output: self.masks.append(output == 0))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.hook.remove()
        self.shares.append(trainer.callback_metrics.get("drop_share"))


def fit(tmp_path, *callbacks, module=None, epochs=2, ckpt_path=None, data=None, **arguments):
    seed_everything(3, verbose=False)
    module = module or Classifier()
    trainer = Trainer(
        **{"max_epochs": epochs, "logger": False, "log_every_n_steps": 1, **arguments},
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data or Pictures(), batch_size=2), ckpt_path=ckpt_path)
    return module, trainer


def test_it_injects_schedules_and_leaves_the_stock_model(tmp_path):
    watch = Watch()
    module, trainer = fit(tmp_path, Regularize("dropblock", p=0.4, block_size=1), watch)
    assert watch.p == pytest.approx([scheduled_p(0.4, step, 8) for step in range(8)])
    assert not any(name.endswith("regularizer") for name, _ in module.named_modules()), "gone after fit"
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {f"net.{key}" for key in resnet18(num_classes=4).state_dict()}


def test_the_dropped_share_is_measured(tmp_path):
    watch = Watch()
    fit(tmp_path, Regularize("dropblock", p=0.3, block_size=1, schedule="constant"), watch)
    # block_size 1 drops p exactly. The 5 norm layers of layer3 alone put out 2 x 256 x 4 x 4 elements,
    # at least 40,000 that are not zero before. Five standard errors are 5 * sqrt(0.21 / 4e4) = 0.0115.
    assert [float(share) for share in watch.shares] == pytest.approx([0.3] * 8, abs=0.0115)


def test_an_epoch_s_share_is_the_mean_over_the_steps_that_are_logged(tmp_path):
    watch = Watch()
    regularize = Regularize("dropblock", p=0.4, block_size=1)
    _, trainer = fit(tmp_path, regularize, watch, log_every_n_steps=2)
    counted = (watch.p[5] + watch.p[7]) / 2  # the second of two, and the last
    assert float(trainer.callback_metrics["p_epoch"]) == pytest.approx(counted)
    # As above, of two steps; 5 * sqrt(0.24 / 2e4) = 0.017.
    assert float(trainer.callback_metrics["drop_share_epoch"]) == pytest.approx(counted, abs=0.017)


def test_a_resumed_run_has_the_same_p_and_masks(tmp_path):
    straight, resumed = Watch(), Watch()
    regularize = {"regularizer": "dropblock", "p": 0.4, "block_size": 2}
    module, _ = fit(tmp_path, Regularize(**regularize), straight)

    class StopAfterOneEpoch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    _, trainer = fit(tmp_path, Regularize(**regularize), StopAfterOneEpoch())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    module_resumed, _ = fit(tmp_path, Regularize(**regularize), resumed, ckpt_path=tmp_path / "one.ckpt")
    assert resumed.p == straight.p[4:]
    assert all(torch.equal(a, b) for a, b in zip(resumed.masks, straight.masks[4:], strict=True))
    for key, value in module.state_dict().items():
        assert torch.equal(value, module_resumed.state_dict()[key]), key


def test_a_model_built_in_configure_model_is_regularized(tmp_path):
    watch = Watch()
    fit(tmp_path, Regularize("dropout", p=0.2), watch, module=Classifier(lazy=True), epochs=1)
    assert len(watch.masks) == 4


def test_a_fit_after_a_failed_one(tmp_path):
    regularize = Regularize("spatial_dropout", p=0.2)

    class Fail(Callback):
        def on_train_start(self, trainer, pl_module):
            raise RuntimeError("planned")

    module = Classifier()
    with pytest.raises(RuntimeError, match="planned"):
        fit(tmp_path, regularize, Fail(), module=module)
    assert not any(name.endswith("regularizer") for name, _ in module.named_modules())
    fit(tmp_path, Regularize("dropout", p=0.2), module=module, epochs=1)  # another one, as in a notebook
    fit(tmp_path, regularize, module=module, epochs=1)


def test_a_model_built_in_setup_is_told_where_to_be_built(tmp_path):
    class Late(Classifier):
        configure_model = LightningModule.configure_model

        def setup(self, stage):
            self.net = resnet18(num_classes=4)

    message = "no stages are known.*a model is to be built in __init__ or configure_model"
    with pytest.raises(InputError, match=message):
        fit(tmp_path, Regularize("dropblock"), module=Late(lazy=True))


def test_accumulation_that_changes_does_not_change_the_schedule(tmp_path):
    watch = Watch()
    accumulate = GradientAccumulationScheduler({0: 1, 1: 4})
    fit(tmp_path, Regularize("dropblock", p=0.4, block_size=1), watch, accumulate)
    assert watch.p == pytest.approx([scheduled_p(0.4, batch, 8) for batch in range(8)])


def test_shares_are_measured_also_in_a_model_that_torch_compile_wraps(tmp_path):
    class Compiled(Classifier):
        def __init__(self):
            super().__init__()
            self.fast = torch.compile(self.net, backend="eager")

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.fast(batch[0]), batch[1])

    _, trainer = fit(
        tmp_path,
        Regularize("dropblock", p=0.3, block_size=1, schedule="constant", at="net.layer3.*.bn1"),
        module=Compiled(),
        log_every_n_steps=3,
    )
    assert float(trainer.callback_metrics["drop_share_epoch"]) == pytest.approx(0.3, abs=0.03)


def test_none_changes_nothing_but_the_random_stream(tmp_path):
    module, _ = fit(tmp_path, Regularize("none"), epochs=1)
    other, _ = fit(tmp_path, epochs=1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_no_site_is_said_before_training(tmp_path):
    with pytest.raises(InputError, match="layer9"):
        fit(tmp_path, Regularize("dropblock", at="net.layer9"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.5}, "p must be"),
        ({"block_size": 0}, "block_size must be"),
        ({"schedule": "cosinus"}, "schedule: got 'cosinus', give one of linear, constant, cosine, early"),
        ({"schedule": "early", "cutoff": 2}, "cutoff: got 2"),
        ({"regularizer": "droppath"}, "droppath"),
        ({"regularizer": ["dropblock"]}, "regularizer must be one of .* not \\['dropblock'\\]"),
        ({"regularizer": torch.nn.Identity}, "Identity has no drop probability"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        Regularize(**{"regularizer": "dropblock", **arguments})


class Tiny(LightningModule):
    """A chain of two stages, and a layer that no forward calls."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.BatchNorm2d(8), torch.nn.ReLU()),
            *(torch.nn.Conv2d(8, 16, 3, stride=2), torch.nn.BatchNorm2d(16), torch.nn.ReLU()),
            *(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 4)),
        )
        self.spare = torch.nn.Conv2d(3, 3, 1)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Values(Callback):
    """Notes what is logged, and the p at a site."""

    def __init__(self, site="net.1"):
        self.site, self.p, self.logged = site, [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.p.append(pl_module.get_submodule(self.site).regularizer.p)

    def on_train_epoch_end(self, trainer, pl_module):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Stream(torch.utils.data.IterableDataset):
    """Has no length."""

    def __iter__(self):
        return iter([Pictures()[index] for index in range(8)])


NORMS = ["net.1", "net.4"]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "early", "late", "epochwise"])
def test_a_training_of_unknown_length_is_said_to_be_one(tmp_path, schedule):
    unknown = [{"max_epochs": -1}, {"max_epochs": 2, "data": Stream()}]
    for arguments in unknown:
        with pytest.raises(InputError, match=f"schedule: {schedule} needs to know how long the training is"):
            fit(tmp_path, Regularize("dropout", at=NORMS, schedule=schedule), module=Tiny(), **arguments)


def test_constant_needs_no_length(tmp_path):
    values = Values()
    regularize = Regularize("dropout", 0.3, at=NORMS, schedule="constant")
    fit(tmp_path, regularize, values, module=Tiny(), data=Stream(), epochs=1)
    assert values.p == [0.3] * 4


def test_time_is_the_progress_where_only_that_has_an_end(tmp_path):
    values = Values()
    regularize = Regularize("dropout", 0.4, at=NORMS)
    fit(tmp_path, regularize, values, module=Tiny(), max_epochs=-1, max_time={"seconds": 3})
    assert values.p == sorted(values.p)
    assert values.p[0] < 0.1
    assert 0.3 < values.p[-1] <= 0.4


def test_steps_are_the_progress_where_they_have_an_end(tmp_path):
    values = Values()
    regularize = Regularize("dropout", 0.4, at=NORMS)
    fit(tmp_path, regularize, values, module=Tiny(), data=Stream(), max_epochs=None, max_steps=9)
    assert values.p == pytest.approx([0.4 * step / 8 for step in range(9)])


def test_epochwise_changes_between_epochs(tmp_path):
    values = Values()
    regularize = Regularize("dropout", 0.4, at=NORMS, schedule="epochwise")
    fit(tmp_path, regularize, values, module=Tiny(), epochs=3, accumulate_grad_batches=2)
    assert values.p == pytest.approx([0.0] * 4 + [0.2] * 4 + [0.4] * 4)


def test_two_callbacks_log_each_under_its_own_name(tmp_path):
    values = Values()
    first = Regularize("dropout", 0.4, at="net.1", schedule="constant")
    second = Regularize("spatial_dropout", 0.2, at="net.4", schedule="constant")
    third = Regularize("dropout", 0.1, at="net.7", schedule="constant")
    fit(tmp_path, first, second, third, values, Regularize("none"), module=Tiny(), epochs=1)
    (logged,) = values.logged
    targets = {"p/dropout_1": 0.4, "p/spatial_dropout": 0.2, "p/dropout_2": 0.1}
    targets |= {f"{name}_epoch": p for name, p in targets.items()}
    assert {name: logged[name] for name in logged if name.startswith("p")} == pytest.approx(targets)
    assert {"drop_share/dropout_1", "drop_share/dropout_2", "drop_share/spatial_dropout"} < set(logged)


def test_factors_and_schedules_go_together(tmp_path):
    first, second = Values("net.1"), Values("net.4")
    fit(tmp_path, Regularize("dropout", 0.4, at={"net.1": 0.25, "net.4": 1.0}), first, second, module=Tiny())
    assert second.p == pytest.approx([0.4 * step / 7 for step in range(8)])
    assert first.p == pytest.approx([0.1 * step / 7 for step in range(8)])


def test_the_share_of_each_site_is_logged(tmp_path):
    values = Values()
    regularize = Regularize(
        "dropblock", 0.3, block_size=3, at={"net.1": 0.5, "net.4": 1.0}, schedule="constant"
    )
    fit(tmp_path, regularize, values, module=Tiny())
    # 31x31 and 15x15 maps; 32 batches' and channels' of them at least, over 10,000 elements of independent
    # blocks of 9: five standard errors are 5 * sqrt(0.25 * 0.75 * 9 / 57,600) = 0.027 and 0.009.
    for logged in values.logged:
        assert logged["drop_share/net.1"] == pytest.approx(0.142, abs=0.012)
        assert logged["drop_share/net.4"] == pytest.approx(0.272, abs=0.027)


def test_logging_every_0_steps_logs_epochs_only(tmp_path):
    values = Values()
    regularize = Regularize("dropout", 0.3, at=NORMS, schedule="constant")
    fit(tmp_path, regularize, values, module=Tiny(), log_every_n_steps=0)
    assert values.logged[-1]["drop_share/net.1"] == pytest.approx(0.3, abs=0.05)


def test_sites_that_do_not_drop_what_they_should_are_named(tmp_path):
    module = Tiny()
    torch.nn.init.zeros_(module.net[4].weight)
    module.net[4].weight.requires_grad_(False), module.net[4].bias.requires_grad_(False)
    regularize = Regularize("dropblock", 0.3, block_size=31, at=[*NORMS, "spare"], schedule="constant")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(tmp_path, regularize, module=module)
    said = [str(warning.message) for warning in said]
    assert len([line for line in said if "nothing but zeros arrives at net.4" in line]) == 1
    assert any(
        "the block covers the map, so that whole channels are dropped at net.1 (31x31)" in s for s in said
    )
    assert any("1 of 3 regularized sites did not run in the first training step" in s for s in said)


class Keeper(torch.nn.Dropout):
    """Says that it drops a half, and drops nothing."""

    def forward(self, x):
        return x + 0


def test_a_regularizer_of_ones_own(tmp_path):
    values = Values()
    with pytest.warns(UserWarning, match=r"another share .* at net\.1 \(0\.000 and not 0\.500\), net\.4"):
        fit(tmp_path, Regularize(Keeper, at=NORMS, schedule="constant"), values, module=Tiny(), epochs=1)
    assert values.p == [0.5] * 4
    values = Values()
    fit(tmp_path, Regularize(lambda: torch.nn.AlphaDropout(0.2), at=NORMS), values, module=Tiny(), epochs=1)
    assert values.p == pytest.approx([0.2 * step / 3 for step in range(4)])


def test_stochastic_depth_drops_the_branches_of_whole_samples(tmp_path):
    masks = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            regularizer = pl_module.net.layer2[1].bn2.regularizer
            regularizer.register_forward_hook(lambda m, i, y: masks.append((y == 0).flatten(1)))

    regularize = Regularize("stochastic_depth", 0.5, at="residual", schedule="constant")
    fit(tmp_path, regularize, Watch(), epochs=1)
    rows = torch.cat(masks)
    assert all(row.all() or not row.any() for row in rows)
    assert {bool(row.all()) for row in rows} == {True, False}
