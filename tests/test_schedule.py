import math

import pytest

from dropblock_det.schedule import lr_factor, scheduled_p


def test_linear_p_runs_from_zero_to_its_target():
    values = [scheduled_p(0.3, step, 101) for step in range(101)]
    assert values[0] == 0.0
    assert values[50] == pytest.approx(0.15)
    assert values[100] == pytest.approx(0.3)
    assert scheduled_p(0.3, 500, 101) == pytest.approx(0.3), "a longer run keeps the target"
    assert scheduled_p(0.3, 0, 1) == 0.0


def test_constant_p():
    assert {scheduled_p(0.3, step, 10, "constant") for step in range(10)} == {0.3}


def test_warmup_then_cosine():
    factors = [lr_factor(step, 100, "cosine", warmup_steps=10) for step in range(101)]
    assert factors[0] == pytest.approx(1e-3)
    assert factors[5] == pytest.approx((1e-3 + 0.999 * 0.5) * 0.5 * (1 + math.cos(0.05 * math.pi)))
    assert factors[50] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)


def test_step_schedule_divides_by_ten_at_each_milestone():
    factors = [lr_factor(step, 100, "step", milestones=[0.8, 0.95]) for step in (0, 79, 80, 94, 95, 100)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
