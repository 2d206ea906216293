"""The cost of a regularizer that does nothing: how long injection takes, and what it adds to an eval forward.

``pytest -m slow -s tests/test_injection_cost.py`` prints the figures. Single timings on a shared machine jump
by more than what is measured, so everything is paired, alternates within one process, and is a median.
"""

import random
import statistics
import time
from contextlib import nullcontext

import pytest
import torch
from torchvision.models.detection import retinanet_resnet50_fpn

from dropblock_det.inject.backbones import walk
from dropblock_det.inject.inject import regularize_
from dropblock_det.inject.placement import find_sites
from dropblock_det.layers import DropBlock2d

ROUNDS = 20


def seconds(run, repeat=1):
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - start) / repeat


def median_with_interval(values):
    """The median and the 95 % interval of its bootstrap distribution."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return statistics.median(values), medians[50], medians[-51]


def say(name, figures, scale, unit):
    middle, low, high = (scale * figure for figure in figures)
    print(f"\n{name}: {middle:.3g} {unit} (95 % interval {low:.3g} to {high:.3g})")


@pytest.fixture(scope="module")
def backbone():
    """ResNet-50 with its pyramid, as RetinaNet has it."""
    return retinanet_resnet50_fpn(weights=None, weights_backbone=None).backbone.eval()


@pytest.mark.slow
def test_injection_takes_under_50_ms(backbone):
    took = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        handle = regularize_(backbone, DropBlock2d, at="paper")
        took.append(time.perf_counter() - start)
        assert len(handle.sites) == 36
        handle.remove()
    figures = median_with_interval(took)
    say("injection at 36 sites", figures, 1e3, "ms")
    assert figures[2] < 0.05


@pytest.mark.slow
def test_eval_overhead_is_under_half_a_percent(backbone):
    """Two ways: what the sites' calls cost more, on their own, and the whole forward with and without.

    The calls are timed on maps of one pixel, where little else takes time, and their sum over the sites is
    divided by the stock forward at 512 x 512. The whole forward's noise may exceed the limit: it can only
    show that nothing was overlooked.
    """
    image = torch.rand(1, 3, 512, 512)
    sites = find_sites(backbone, "paper")
    pixels = {site: torch.rand(1, 1, 1, 1) for site in sites}
    for site, module in walk(backbone):
        if site in pixels and module is not None:
            pixels[site] = torch.rand(1, module.num_features, 1, 1)

    def time_both():
        layers = [(module, pixels[site]) for site, module in walk(backbone) if site in pixels and module]
        forward = seconds(lambda: backbone(image))
        return forward, seconds(lambda: [layer(pixel) for layer, pixel in layers], repeat=50)

    rounds = []
    with torch.no_grad():
        time_both()
        for turn in range(ROUNDS):
            took = {}
            for regularized in (turn % 2 == 0, turn % 2 == 1):
                with regularize_(backbone, DropBlock2d) if regularized else nullcontext():
                    took[regularized] = time_both()
            rounds.append((*took[False], *took[True]))
    forward = statistics.median(stock for stock, *_ in rounds)
    calls = median_with_interval([(ours - stock) / forward for _, stock, _, ours in rounds])
    whole = median_with_interval([ours / stock - 1 for stock, _, ours, _ in rounds])
    say(f"{len(sites)} sites' calls", calls, forward * 1e6, "µs")
    say(f"of a stock forward ({1e3 * forward:.0f} ms)", calls, 100, "%")
    say("the whole forward", whole, 100, "%")
    assert 0 < calls[2] < 0.005
    assert whole[1] < 0.005
