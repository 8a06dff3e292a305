"""TAID's target and its schedule: closed forms, monotony, and a resumed schedule is the same schedule."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from distill.divergences import forward_kl
from distill.errors import RunError, UserError
from distill.taid import TaidSchedule, interpolated_target

LOSSES = st.lists(st.floats(0, 1e6), max_size=30)


def run(schedule: TaidSchedule, losses: list[float], *, steps: int | None = None) -> list[float]:
    """Return the share of each step; `steps` is how many the training has."""
    shares = []
    for done, loss in enumerate(losses):
        shares.append(schedule.share(done / (steps or len(losses))))
        schedule.observe(loss)
    return shares


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_target_is_the_weighted_geometric_mean_without_gradient_to_the_student(share):
    logits = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student, teacher = logits[0].requires_grad_(), logits[1]
    target = interpolated_target(student, teacher, share=share)
    assert not target.requires_grad
    assert target.data_ptr() != student.data_ptr()
    mean = student.softmax(-1) ** (1 - share) * teacher.softmax(-1) ** share
    torch.testing.assert_close(target.softmax(-1), mean / mean.sum(-1, keepdim=True))

    forward_kl(student.log_softmax(-1), target.log_softmax(-1)).sum().backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - target.softmax(-1)).detach())


def test_outcomes_excluded_by_a_side_with_a_part_are_excluded():
    student, teacher = torch.tensor([-math.inf, 0.0, 0.0]), torch.tensor([0.0, -math.inf, 0.0])
    excluded = [(interpolated_target(student, teacher, share=share) == -math.inf).tolist() for share in (0.0, 0.5, 1.0)]
    assert excluded == [[True, False, False], [True, True, False], [False, True, False]]


@given(losses=LOSSES, start=st.floats(0, 1), end=st.floats(0, 1), step=st.floats(0, 1), momentum=st.floats(0, 0.999))
@example(losses=[0.0, 5e-324, 1.0, 0.0, 0.0], start=0.0, end=0.5, step=1.0, momentum=0.0)
def test_the_share_never_falls_and_stays_between_the_line_and_the_end(losses, start, end, step, momentum):
    start, end = sorted((start, end))
    shares = run(TaidSchedule(start=start, end=end, step=step, momentum=momentum), losses)
    assert shares == sorted(shares)
    for done, share in enumerate(shares):
        assert start + (end - start) * (done / len(losses)) <= share + 1e-12 <= end + 2e-12


@given(losses=LOSSES)
def test_without_a_step_the_share_is_the_straight_line(losses):
    shares = run(TaidSchedule(start=0.25, end=0.75, step=0), losses)
    assert shares == [0.25 + 0.5 * (done / len(losses)) for done in range(len(losses))]


@given(losses=st.lists(st.floats(0.1, 10), min_size=2, max_size=20))
def test_the_schedule_is_the_papers_recursion(losses):
    # A training so long that the line stays behind, and a step so long that the mean of the changes shows.
    schedule = TaidSchedule(start=0.4, end=1.0, step=0.05, momentum=0.7)
    share, mean, expected = 0.4, 0.0, [0.4]
    for before, loss in itertools.pairwise(losses):
        expected.append(share)
        mean = 0.7 * mean + 0.3 * (1 - loss / before)
        share += 0.05 * (1 - share) / (1 + math.exp(-mean))
    assert run(schedule, losses, steps=10**9) == pytest.approx(expected, abs=1e-8)


def test_a_falling_loss_leads_ahead_of_a_rising_one_whatever_its_unit():
    falling = [2 * 0.9**k for k in range(20)]
    ahead, behind, in_another_unit = (
        run(TaidSchedule(step=0.02, momentum=0.5), losses, steps=10**9)
        for losses in (falling, falling[::-1], [1024 * loss for loss in falling])
    )
    assert ahead[-1] > behind[-1] > 0.4
    assert in_another_unit == ahead


def test_asking_twice_changes_nothing():
    schedule = TaidSchedule()
    assert schedule.share(0.5) == schedule.share(0.5) == schedule.share(0.1) == pytest.approx(0.7)


def test_a_loss_of_zero_is_no_change_and_any_jump_is_finite():
    schedule = TaidSchedule(step=1e-3)
    assert all(math.isfinite(share) for share in run(schedule, [0.0, 1.0, 1e-300, 1e300, 0.0, 0.0]))


@given(losses=st.lists(st.floats(0, 1e6), min_size=1, max_size=20), data=st.data())
def test_a_resumed_schedule_goes_on_as_if_it_had_not_stopped(losses, data):
    stop = data.draw(st.integers(0, len(losses)))
    whole, before, after = (TaidSchedule(step=0.03, momentum=0.8) for _ in range(3))
    uninterrupted = run(whole, losses)
    run(before, losses[:stop], steps=len(losses))
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    resumed = []
    for done in range(stop, len(losses)):
        resumed.append(after.share(done / len(losses)))
        after.observe(losses[done])
    assert resumed == uninterrupted[stop:]
    assert after.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -0.1}, "0 <= start <= end <= 1 is needed, not start=-0.1 and end=1.0"),
        ({"start": 0.9, "end": 0.8}, "0 <= start <= end <= 1 is needed"),
        ({"end": 1.1}, "0 <= start <= end <= 1 is needed"),
        ({"step": 1.5}, "step must be between 0 and 1, not 1.5"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, not 1.0"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        TaidSchedule(**settings)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(loss):
    with pytest.raises(RunError, match=f"the loss is {loss}"):
        TaidSchedule().observe(loss)
