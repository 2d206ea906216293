"""The definition against theory: exact expected shares, small and oblong maps, half precision."""

import itertools
import math

import pytest
import torch

from dropblock_det.ops import reference

SHAPES = [(1, 1), (1, 9), (4, 4), (6, 6), (7, 7), (7, 11), (13, 17), (25, 42), (100, 136)]


@pytest.mark.parametrize(("height", "width"), SHAPES)
@pytest.mark.parametrize("block_size", [1, 2, 3, 6, 7, 9, 200, (3, 7), (50, 1)])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_exact_calibration_solves_for_p(height, width, block_size, p):
    gamma = reference.corner_probability(p, block_size, height, width, "exact")
    assert reference.expected_drop_share(gamma, block_size, height, width) == pytest.approx(p, rel=1e-9)


def test_paper_calibration_is_the_papers_formula():
    assert reference.corner_probability(0.1, 7, 25, 42) == pytest.approx(0.1 / 49 * (25 * 42) / (19 * 36))
    assert reference.corner_probability(0.9, 2, 1, 5, "paper") == pytest.approx(0.9 / 2 * 5 / 4)
    assert reference.corner_probability(1.0, 1, 8, 8) == 1.0
    assert reference.corner_probability(1.0, 3, 3, 4) <= 1.0


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5, 9, (2, 3), (7, 1)])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 6), (5, 4), (6, 6)])
def test_expected_share_by_enumeration(height, width, block_size):
    """The formula against the inclusion of every corner, position by position."""
    kh, kw, grid_h, grid_w = reference.block_and_grid(height, width, block_size)
    gamma, kept = 0.17, 0.0
    for i in range(height):
        for j in range(width):
            covering = sum(a <= i < a + kh and b <= j < b + kw for a in range(grid_h) for b in range(grid_w))
            kept += (1 - gamma) ** covering
    expected = 1 - kept / (height * width)
    assert reference.expected_drop_share(gamma, block_size, height, width) == pytest.approx(
        expected, rel=1e-12
    )


def test_mask_drops_the_block_below_right_of_each_corner():
    corners = torch.zeros(1, 1, 4, 3, dtype=torch.bool)
    corners[0, 0, 1, 2] = True
    kept = torch.ones(1, 1, 6, 5, dtype=torch.bool)
    kept[0, 0, 1:4, 2:5] = False
    assert torch.equal(reference.mask_from_corners(corners, 3, 6, 5), kept)


def test_mask_of_a_rectangular_block():
    corners = torch.zeros(1, 1, 5, 2, dtype=torch.bool)
    corners[0, 0, 1, 1] = True
    kept = torch.ones(1, 1, 6, 5, dtype=torch.bool)
    kept[0, 0, 1:3, 1:5] = False
    assert torch.equal(reference.mask_from_corners(corners, (2, 4), 6, 5), kept)


def test_scale_is_the_whole_masks_kept_share():
    x = torch.ones(2, 3, 4, 5)
    mask = torch.ones(2, 3, 4, 5, dtype=torch.bool)
    mask[0] = False
    y = reference.apply_mask(x, mask)
    assert (y[0] == 0).all()
    assert (y[1] == 2).all()


def test_nothing_kept_is_zero_and_has_zero_gradient():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    y = reference.apply_mask(x, torch.zeros(2, 3, 4, 5, dtype=torch.bool))
    y.sum().backward()
    assert (y == 0).all()
    assert (x.grad == 0).all()


def test_gamma_keeps_tiny_probabilities():
    gamma = reference.corner_probability(1e-9, 3, 50, 50, "exact")
    assert math.isclose(reference.expected_drop_share(gamma, 3, 50, 50), 1e-9, rel_tol=1e-6)


def test_exact_calibration_of_nothing_is_nothing():
    for size, block in itertools.product(range(1, 40), (1, 2, 3, 5, 7, 11)):
        assert reference.corner_probability(0.0, block, size, size + 1, "exact") == 0.0


def test_expected_share_stays_between_0_and_1():
    """Whatever the rounding of the shares of positions: its square root is taken."""
    for size, block in itertools.product(range(1, 40), (1, 2, 3, 5, 7, 11)):
        assert reference.expected_drop_share(0.0, block, size, size + 1) == 0.0
        assert 1.0 - 1e-12 < reference.expected_drop_share(1.0, block, size, size + 1) <= 1.0
        assert 0.0 < reference.expected_drop_share(1e-12, block, size, size + 1) < 1e-10
