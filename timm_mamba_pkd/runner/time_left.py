"""How long a run will take from here."""

from collections.abc import Sequence

from timm_mamba_pkd.runner.check import StageEstimate


def time_left(estimates: Sequence[StageEstimate], stage: int, steps: int, seconds_per_step: float) -> str:
    """Of the training steps: '3 minutes left in the stage, 2 hours in the run'.

    Args:
        estimates: of all stages, as measured before the run; they say how much slower later students are.
        stage: the present one, from 1.
        steps: left in it.
        seconds_per_step: in it, as measured.
    """
    in_stage = steps * seconds_per_step
    own, later = estimates[stage - 1], estimates[stage:]
    if not later:
        return f"{duration(in_stage)} left"
    in_run = in_stage + sum(other.seconds for other in later) * seconds_per_step / own.seconds_per_step
    return f"{duration(in_stage)} left in the stage, {duration(in_run)} in the run"


def duration(seconds: float) -> str:
    """A time for people."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "a second"
