"""A training step: fused, never waiting for the device, and left out where its gradients are not finite."""

import csv
import itertools
import math
import multiprocessing
import sys

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from support.toy_task import ToyData, ToyModule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from dropblock_det.callbacks import Regularize
from dropblock_det.errors import InputError
from dropblock_det.runs.recorder import RunRecord

FAULTS = {
    "a NaN": lambda loss: loss * math.nan,
    "an infinity without a gradient": lambda loss: loss + math.inf,
    "a NaN without a gradient": lambda loss: loss.detach() * math.nan + 0 * loss,
    "gradients alone": lambda loss: loss + 0 * (loss - loss.detach()).sqrt(),
}


class Net(ToyModule):
    """Has a fault at some batches; notes its weights before each."""

    def __init__(self, faults=None, fault="a NaN", **optimization):
        categories = [{"label": 1, "id": 1, "name": "blue"}]
        super().__init__(categories, [0.0] * 9, None, warmup_steps=0, lr_schedule="constant", **optimization)
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        self.net.to(memory_format=torch.channels_last)
        self.faults, self.fault = faults or {}, FAULTS[fault]
        self.before = []

    def losses(self, batch):
        self.before.append(self.net[0].weight.detach().clone())
        loss = self.net(torch.stack(batch[0])).square().mean() + self.weight.square().sum()
        number = self.trainer.fit_loop.total_batch_idx
        if self.training and self.trainer.global_rank in self.faults.get(number, ()):
            loss = self.fault(loss)
        return {"squared": loss, "other": self.weight.abs().sum()}


class Images(ToyData):
    def __init__(self, images=12):
        super().__init__()
        self.images = images

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        items = [(torch.rand(1, 8, 8, generator=generator), {"image_id": n}) for n in range(self.images)]
        return DataLoader(items, 2, collate_fn=lambda items: tuple(zip(*items, strict=True)))

    val_dataloader = train_dataloader


def trainer_of(folder, *callbacks, **settings):
    settings = {
        "logger": False,
        "max_epochs": 1,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
    } | settings
    return Trainer(
        accelerator="cpu",
        callbacks=[RunRecord(folder), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **settings,
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("fault", FAULTS)
def test_such_a_step_changes_no_weight_and_is_counted(fault, optimizer, tmp_path):
    """The first of all among them, at which torch's fused SGD leaves its momentum unset."""
    module = Net({0: [0], 3: [0]}, fault, optimizer=optimizer, on_nonfinite="skip")
    trainer = trainer_of(tmp_path, logger=CSVLogger(tmp_path), gradient_clip_val=5.0)
    trainer.fit(module, Images())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(module.before[:6])]
    assert changed == [False, True, True, False, True]
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert all(
        value.isfinite().all() and value.abs().max() < 10**3
        for state in trainer.optimizers[0].state.values()
        for value in state.values()
    )
    rows = list(csv.DictReader((tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open()))
    counts = [row["skipped_steps"] for row in rows if row["loss"]]
    assert counts == ["", "1.0", "1.0", "1.0", "2.0", "2.0"]  # one step late
    mean = trainer.callback_metrics["loss_epoch"]
    assert mean.isfinite()
    if fault != "gradients alone":
        losses = [float(row["loss"]) for row in rows if row["loss"]]
        assert mean == pytest.approx(sum(losses[n] for n in (1, 2, 4, 5)) / 4, rel=1e-5)


@pytest.mark.parametrize(("fault", "number"), [*zip(FAULTS, (2, 3, 4, 5), strict=True), ("a NaN", 5)])
def test_it_stops_the_run_before_anything_is_saved(fault, number, tmp_path, line_of):
    """Also at the last step of an epoch, which no other one follows."""
    module = Net({number: [0]}, fault)
    line = line_of(lambda: trainer_of(tmp_path, max_epochs=2).fit(module, Images()))
    assert f"step {number}: " in line
    assert f"on the images {2 * number}, {2 * number + 1}" in line
    value = "inf" if "infinity" in fault else "nan"
    named = (
        "gradients are not finite" if fault == "gradients alone" else f"not finite (squared {value}, other"
    )
    assert named in line
    assert not (tmp_path / "record.json").exists()
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_a_checkpoint_in_between_does_not_hide_it(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    with pytest.raises(InputError, match="step 2: "):
        trainer_of(tmp_path, Save()).fit(Net({2: [0]}), Images())
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"1.ckpt", "2.ckpt"}


def test_one_bad_batch_leaves_out_the_step_that_accumulates_it(tmp_path, line_of):
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 5.0}
    module = Net({2: [0]}, on_nonfinite="skip")
    trainer_of(tmp_path, **settings).fit(module, Images())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(module.before[:7])]
    assert changed == [False, True, False, False, False, True]
    assert module._skipped_steps == 1
    line = line_of(lambda: trainer_of(tmp_path, **settings).fit(Net({2: [0]}), Images()))
    assert "step 1: the loss is not finite" in line
    assert "on the images 4, 5;" in line


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_fused_step_is_torchs_own(precision, tmp_path):
    """With clipping, which Lightning refuses for what it takes for an optimizer that unscales by itself."""

    class Unfused(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=False)

    weights = []
    for kind in (Net, Unfused):
        torch.manual_seed(0)
        module = kind()
        half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
        chosen = {"plugins": half} if precision == "16-mixed" else {"precision": precision}
        trainer = trainer_of(tmp_path / kind.__name__, gradient_clip_val=0.5, **chosen)
        trainer.fit(module, Images())
        assert trainer.optimizers[0].param_groups[0]["fused"] == (kind is Net)
        weights.append(module.net[0].weight.detach())
        assert not torch.equal(module.before[0], weights[-1])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_unfused_optimizers_checkpoint_goes_on_fused(optimizer, tmp_path):
    torch.manual_seed(0)
    first = trainer_of(tmp_path)
    first.fit(Net(optimizer=optimizer), Images())
    first.save_checkpoint(tmp_path / "fused.ckpt")
    content = torch.load(tmp_path / "fused.ckpt", weights_only=True)
    for group in content["optimizer_states"][0]["param_groups"]:
        group["fused"] = None
    for state in content["optimizer_states"][0]["state"].values():  # and its weights were in another format
        state |= {name: value.contiguous() for name, value in state.items()}
    torch.save(content, tmp_path / "unfused.ckpt")
    weights = []
    for name in ("fused.ckpt", "unfused.ckpt"):
        module = Net({8: [0]}, optimizer=optimizer, on_nonfinite="skip")
        again = trainer_of(tmp_path, max_epochs=2)
        again.fit(module, Images(), ckpt_path=tmp_path / name, weights_only=True)
        assert again.optimizers[0].param_groups[0]["fused"]
        assert module._skipped_steps == 1
        weights.append(module.net[2].weight.detach())
    assert torch.equal(*weights)
    assert weights[0].isfinite().all()


def test_another_optimizer_waits_for_the_device_and_leaves_out_the_same(tmp_path):
    class Other(Net):
        def configure_optimizers(self):
            return torch.optim.RMSprop(self.parameters(), 0.01, momentum=0.9)

    module = Other({2: [0]}, on_nonfinite="skip")
    trainer_of(tmp_path).fit(module, Images())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(module.before[:6])]
    assert changed == [True, True, False, True, True]


class Reads(TorchDispatchMode):
    """Counts reads of a tensor's value, each of which waits for the device; on a CPU for nothing."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.5, "precision": "bf16-mixed"}])
def test_no_step_waits_for_the_device(settings, tmp_path, monkeypatch):
    """Neither for a value that is read, nor to send one there: what is logged is a tensor already."""
    reads, per_step, logged = Reads(), [], set()

    class Count(Callback):
        def on_train_batch_start(self, *_):
            per_step.append(reads.count)

    log = LightningModule.log

    def watched(self, name, value, *args, **kwargs):
        if trainer.training and self._current_fx_name != "on_train_epoch_end":
            logged.add(name)
            assert isinstance(value, torch.Tensor), name
        return log(self, name, value, *args, **kwargs)

    monkeypatch.setattr(LightningModule, "log", watched)
    regularizer = Regularize("spatial_dropout", p=0.1, at="net.1")  # DropBlock on a CPU counts on the host
    trainer = trainer_of(tmp_path, regularizer, Count(), log_every_n_steps=100, **settings)
    with reads:
        trainer.fit(Net(), Images())
    assert logged >= {"loss", "loss_epoch", "loss_squared", "lr", "p", "data_wait_s"}
    assert per_step == [per_step[0]] * 6
    assert reads.count > per_step[0]  # it sees those of the epoch's end


class Note(Callback):
    """Notes which collectives each step calls, and what became of the steps."""

    def __init__(self, folder):
        self.folder, self.called, self.calls = folder, [], []

    def setup(self, trainer, pl_module, stage):
        for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "reduce", "barrier"):
            setattr(torch.distributed, name, self.counted(getattr(torch.distributed, name)))

    def counted(self, stock):
        def counted(*args, **kwargs):
            self.called.append(sys._getframe(1).f_code.co_name)
            return stock(*args, **kwargs)

        return counted

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls += self.called if batch_idx else []
        self.called.clear()

    def on_fit_end(self, trainer, pl_module):
        content = {"before": pl_module.before[:6], "skipped": pl_module._skipped_steps, "calls": self.calls}
        torch.save(content, self.folder / f"{trainer.global_rank}.pt")


def fit_two(folder):
    module = Net({2: [1]}, on_nonfinite="skip")
    trainer_of(folder, Note(folder), strategy="ddp_fork", devices=2).fit(module, Images())


def test_a_fault_in_one_process_leaves_out_the_step_in_all(tmp_path):
    """They agree by the gradients that they exchange anyway: no step has a collective of its own."""
    # Forked by a process of their own: autograd's threads, which other tests start here, do not survive it.
    process = multiprocessing.get_context("spawn").Process(target=fit_two, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    first, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(first["before"])]
    assert changed == [True, True, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(first["before"], other["before"], strict=True))
    assert first["skipped"] == other["skipped"] == 1
    assert first["calls"], "Lightning's own is not seen: the counting is broken"
    assert set(first["calls"]) <= {"_broadcast_sigterm_tensor"}
