"""The CPU path's parts: its operator, masks bit for bit, the count, the distribution of corners."""

import itertools

import numpy as np
import pytest
import torch

from dropblock_det.ops import cpu, reference


def test_operators_pass_opcheck():
    p, seed, draw_mask = torch.tensor(0.3), torch.tensor(5), torch.ops.dropblock_det.draw_mask
    for channels, channels_last in itertools.product((1, 3), (True, False)):
        torch.library.opcheck(draw_mask, (p, seed, (2, channels, 9, 7), (3, 2), "exact", channels_last))


@pytest.mark.parametrize("gamma", [0.0, 0.01, cpu.DENSE - 0.01, cpu.DENSE + 0.01, 0.7, 1.0])
@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 40, (2, 5), (30, 1)])
@pytest.mark.parametrize(
    "shape",
    [(6, 9, 14, 1), (2, 20, 9, 5), (7, 1, 1, 1), (3, 1, 33, 2), (3, 50, 50, 1)],  # 49 * (1 / 49) < 1
)
def test_cpu_mask_is_the_references_bit_for_bit(monkeypatch, shape, block_size, gamma):
    planes, height, width, inner = shape
    _, _, grid_h, grid_w = reference.block_and_grid(height, width, block_size)
    grid, generator = (planes, grid_h, grid_w, inner), torch.Generator().manual_seed(8)
    if gamma > cpu.DENSE:
        corners = torch.rand(grid, generator=generator) < gamma
    else:
        corners = torch.zeros(grid, dtype=torch.bool)
        corners.view(-1)[torch.from_numpy(cpu.successes(corners.numel(), gamma, generator))] = True
    expected = reference.mask_from_corners(corners.permute(0, 3, 1, 2), block_size, height, width)
    dropped = ~expected.permute(0, 2, 3, 1)
    assert torch.equal(cpu.draw_dropped(gamma, 8, shape, block_size, dense=True), dropped)
    mask = cpu.draw_dropped(gamma, 8, shape, block_size, dense=False)
    for piece, cached in ((1, 0), (300, cpu.CACHED), (cpu.PIECE, 0), (cpu.PIECE, cpu.CACHED)):
        monkeypatch.setattr(cpu, "PIECE", piece)
        monkeypatch.setattr(cpu, "CACHED", cached)
        assert cpu.count_dropped(mask, shape, block_size) == dropped.sum()
        for channels_last in {True, inner > 1}:  # a map of one channel is both
            x = torch.full(shape, torch.inf).permute(0, 3, 1, 2)
            y = cpu.apply_mask(x, mask, 2.0, block_size, channels_last)
            assert torch.equal(y == 0, ~expected)
        if inner == 1:
            x = torch.full((planes, 3, height, width), -torch.inf)
            y = cpu.apply_mask(x, ~expected, 2.0, block_size, False)
            assert torch.equal(y == 0, (~expected).expand_as(y))


@pytest.mark.parametrize("size", [1, 255 * 8 - 1, 255 * 8, 256 * 8, 70_000])
def test_count_of_a_mask_all_dropped(size):
    assert cpu.count_dropped(torch.arange(size), (1, 1, size, 1), 1) == size


@pytest.mark.parametrize("gamma", [1e-5, 0.01, 0.2, 0.9])
def test_corners_are_bernoulli(gamma):
    """Count and gaps: 40,000 successes expected, so a standard error of 0.5 %; four of them are allowed."""
    count = int(40_000 / gamma)
    corners = torch.from_numpy(cpu.successes(count, gamma, torch.Generator().manual_seed(9)))
    assert corners.min() >= 0
    assert corners.max() < count
    assert (corners.diff() >= 1).all()
    assert len(corners) == pytest.approx(40_000, rel=4 * 0.005)
    assert (corners < count / 2).double().mean() == pytest.approx(0.5, abs=4 * 0.0025)
    neighbours = (corners.diff() == 1).double().mean()
    assert neighbours == pytest.approx(gamma, abs=4 * (gamma * (1 - gamma) / 40_000) ** 0.5)


def test_first_and_last_position_are_drawn_as_often_as_the_others():
    """Of 20,000 draws each: a standard error of 1.4 %; four of them are allowed."""
    draws = np.concatenate([cpu.successes(3, 0.2, torch.Generator().manual_seed(i)) for i in range(20_000)])
    shares = np.bincount(draws, minlength=3) / 20_000
    assert shares == pytest.approx([0.2] * 3, abs=4 * (0.2 * 0.8 / 20_000) ** 0.5)
