import math

import pytest

from dropblock_det.schedule import P_SCHEDULES, lr_factor, p_at, scheduled_p


def test_linear_p_runs_from_zero_to_its_target():
    values = [scheduled_p(0.3, step, 101) for step in range(101)]
    assert values[0] == 0.0
    assert values[50] == pytest.approx(0.15)
    assert values[100] == pytest.approx(0.3)
    assert scheduled_p(0.3, 500, 101) == pytest.approx(0.3), "a longer run keeps the target"
    assert scheduled_p(0.3, 0, 1) == 0.0


@pytest.mark.parametrize("schedule", P_SCHEDULES)
def test_a_schedule_is_a_share_of_p_that_depends_on_progress_only(schedule):
    values = [p_at(step / 100, 0.3, schedule, cutoff=0.4, epochs=4) for step in range(101)]
    assert all(0 <= value <= 0.3 for value in values)
    assert values == [p_at(step / 100, 0.3, schedule, cutoff=0.4, epochs=4) for step in range(101)]
    rises = values == sorted(values)
    assert rises != (schedule == "early")
    assert values[-1] == pytest.approx(0.0 if schedule == "early" else 0.3)


def test_early_and_late_switch_at_the_cutoff():
    early = [scheduled_p(0.3, step, 11, "early", cutoff=0.4) for step in range(11)]
    late = [scheduled_p(0.3, step, 11, "late", cutoff=0.4) for step in range(11)]
    assert early == [0.3] * 4 + [0.0] * 7
    assert late == [0.0] * 4 + [0.3] * 7


def test_cosine_starts_and_ends_flat():
    values = [scheduled_p(1.0, step, 101, "cosine") for step in range(101)]
    assert values[50] == pytest.approx(0.5)
    assert values[1] < 0.001
    assert values[99] > 0.999


@pytest.mark.parametrize(("epochs", "steps"), [(5, 7), (3, 100), (1, 4), (7, 1), (2, 2)])
def test_epochwise_adds_the_same_after_each_epoch(epochs, steps):
    total = epochs * steps
    values = [scheduled_p(0.2, step, total, "epochwise", epochs=epochs) for step in range(total)]
    assert values == pytest.approx(
        [0.2 * epoch / max(1, epochs - 1) for epoch in range(epochs) for _ in range(steps)]
    )


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
