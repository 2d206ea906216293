"""What Lightning, callbacks, logging and loader cost beside a plain loop: run it alone, -m slow -s."""

import statistics
import time

import numpy as np
import pytest
import torch
from support.tiny_run import ROOT
from torch.nn.functional import cross_entropy

from dropblock_det.runs.record import read_record
from dropblock_det.tasks.classification.models import build_classifier
from dropblock_det.training import cli
from dropblock_det.training.precision import resolve_precision

CONFIG = ROOT / "configs" / "classification" / "mnist_small_cnn.yaml"
SIZE, BATCH, EPOCHS, ROUNDS = 20_000, 256, 3, 3


@pytest.fixture
def mnist(tmp_path):
    """Random pixels in MNIST's own files."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, size in (("train", SIZE), ("t10k", 100)):
        for name, magic, shape in (("images-idx3", 2051, (size, 28, 28)), ("labels-idx1", 2049, (size,))):
            values = rng.integers(0, 10, shape, dtype=np.uint8)
            header = np.array([magic, *shape], dtype=">i4").tobytes()
            (raw / f"{part}-{name}-ubyte").write_bytes(header + values.tobytes())
    return tmp_path


def plain_loop():
    """Images per second of the shortest loop that one would write."""
    torch.manual_seed(0)
    model = build_classifier("small_cnn", 10, (1, 28, 28)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    images = torch.randint(0, 256, (SIZE, 1, 28, 28), dtype=torch.uint8)
    in_bfloat16 = resolve_precision("cpu", "auto") == "bf16-mixed"
    labels = torch.randint(0, 10, (SIZE,))
    rates = []
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for some in torch.randperm(SIZE).split(BATCH):
            x = (images[some].float() / 255).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
                loss = cross_entropy(model(x), labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rates.append(SIZE / (time.perf_counter() - start))
    return statistics.median(rates)


def ours(mnist, output):
    arguments = [
        *(f"--config={CONFIG}", f"--output={output}", f"--data.root={mnist}", f"--data.batch_size={BATCH}"),
        *(f"--trainer.max_epochs={EPOCHS}", "--trainer.accelerator=cpu", "--trainer.precision=auto"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
    ]
    cli.train(arguments)
    record = read_record(output)
    return statistics.median(epoch["images_per_s"] for epoch in record.epochs)


@pytest.mark.slow
def test_training_is_nearly_as_fast_as_a_plain_loop(mnist, tmp_path):
    ratios = []
    for number in range(ROUNDS):
        plain, own = plain_loop(), ours(mnist, tmp_path / f"run{number}")
        ratios.append(own / plain)
        print(f"plain loop {plain:.0f} images/s, ours {own:.0f}: {own / plain:.3f}")
    assert statistics.median(ratios) >= 0.95
