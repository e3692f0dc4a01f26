"""The stages and the learning rate of a run that has to end in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_WARM_UP = 20  # steps
_DECAY_FROM = 0.1  # of the run: constant learning rate before, linear to zero after
_CLOCKLESS_STEPS = 50  # at the start of every run, so that these repeat exactly however short it is
_BALANCED_STEPS = 400  # of a run from fresh weights


@dataclass(frozen=True)
class Stage:
    """Describe a part of a run.

    Attributes:
        until: progress at which it ends.
        size: side of the crops in pixels.
        images: per step and process; a GPU takes several times as many.
        prompts: objects per image.
        corrections: share of the steps that go on with corrective clicks.
    """

    until: float
    size: int
    images: int
    prompts: int
    corrections: float


# Crops are cheap and show that there are objects; only the whole canvas teaches large ones and their predicted IoU.
FROM_SCRATCH = (
    Stage(until=0.4, size=224, images=12, prompts=8, corrections=0.0),
    Stage(until=0.65, size=448, images=3, prompts=8, corrections=0.4),
    Stage(until=1.0, size=512, images=3, prompts=8, corrections=0.5),
)
CONTINUED = (
    Stage(until=0.55, size=224, images=12, prompts=8, corrections=0.12),
    Stage(until=1.0, size=512, images=4, prompts=12, corrections=0.3),
)


def stage_at(stages: tuple[Stage, ...], progress: float) -> Stage:
    return next((stage for stage in stages if progress < stage.until), stages[-1])


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Return the learning rate: warm-up by steps, a plateau, and a linear fall to zero at the end of the run.

    Only the fall depends on the clock, so two runs of one seed are the same until then, and for 50 steps at least.
    """
    fall = min((1 - progress) / (1 - _DECAY_FROM), 1.0)
    return peak * min((step + 1) / _WARM_UP, 1.0) * max(fall, 0.0)


def balance_at(step: int) -> float:
    """Return the share of the class-balanced start in a run from fresh weights, from 1 to 0."""
    return max(1 - step / _BALANCED_STEPS, 0.0)


class Schedule:
    """Tell how much of a run is done, measured in time or, for runs that must repeat exactly, in steps.

    Time is that spent training: an interrupted run goes on with what it had left.
    """

    def __init__(
        self,
        minutes: float | None = None,
        steps: int | None = None,
        spent_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if (minutes is None) == (steps is None):
            raise ValueError("a run lasts either a number of minutes or a number of steps")
        if (minutes if steps is None else steps) <= 0:  # type: ignore[operator]
            raise ValueError(f"a run must last longer than nothing, got minutes={minutes}, steps={steps}")
        self.limit = 60 * minutes if minutes is not None else None
        self.steps = steps
        self._clock = clock
        self._start = clock() - spent_seconds
        self._step_started: float | None = None
        self._longest_step = 0.0

    @property
    def seconds(self) -> float:
        """Return the seconds spent so far, in earlier parts of the run too."""
        return self._clock() - self._start

    def progress(self, step: int) -> float:
        """Return the progress in 0..1 before ``step``, counted from 0."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        if step < _CLOCKLESS_STEPS:
            return 0.0
        return min(self.seconds / self.limit, 1.0)  # type: ignore[operator]

    def goes_on(self, step: int) -> bool:
        """Return whether there is time for ``step``, which may take as long as the longest of the last ones."""
        now = self._clock()
        if self._step_started is not None:
            # Fades, so that one hiccup does not end a run early.
            self._longest_step = max(now - self._step_started, 0.9 * self._longest_step)
        self._step_started = now
        if self.steps is not None:
            return step < self.steps
        return self.seconds + self._longest_step <= self.limit  # type: ignore[operator]
