"""The estimate of the time that is left."""

from timm_mamba_pkd.runner.check import StageEstimate
from timm_mamba_pkd.runner.time_left import time_left


def test_later_stages_are_slower_as_measured_before():
    first = StageEstimate("s1", 2, 100, 0.1, 0, None)
    second = StageEstimate("s2", 2, 100, 0.3, 0, None)
    # 50 steps of 2 s; then 200 steps, each three times as long
    assert time_left([first, second], 1, 50, 2.0) == "100 seconds left in the stage, 22 minutes in the run"
    assert time_left([first, second], 2, 50, 6.0) == "5 minutes left"
