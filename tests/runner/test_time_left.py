"""The estimate of the time that is left."""

from timm_mamba_pkd.runner.check import StageEstimate
from timm_mamba_pkd.runner.time_left import duration, time_left


def test_later_stages_are_slower_as_measured_before():
    first = StageEstimate("s1", 2, 100, 0.1, 0, None)
    second = StageEstimate("s2", 2, 100, 0.3, 0, None)
    # 50 steps of 2 s; then 200 steps, each three times as long
    assert time_left([first, second], 1, 50, 2.0) == "100 seconds left in the stage, 22 minutes in the run"
    assert time_left([first, second], 2, 50, 6.0) == "5 minutes left"


def test_times_for_people():
    assert [duration(s) for s in (0.2, 90, 150, 8000, 5e5)] == [
        "a second", "90 seconds", "2 minutes", "2 hours", "6 days",
    ]  # fmt: skip
