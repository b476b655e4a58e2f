"""How a training has gone so far; when the learning rate rises and falls, when it validates, and when it ends.

`Schedule` knows the number of steps from the start. `Annealed` keeps the rate constant until it decides that the rate
should fall, so that it is zero when the epochs are done or the budget is used, whichever comes first. The schedule is
warm-up, stable, decay (Hu et al. 2024, "MiniCPM", section 4; Hägele et al. 2024, "Scaling Laws and Compute-Optimal
Training Beyond Fixed Training Durations"), with a linear fall to zero. A decision that depends on a clock is written to
disk before it acts, so that a training that is killed and resumed takes the same steps, and a finished one can be
repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tunesmith.core.system.files import write_atomic
from tunesmith.core.text.wording import duration
from tunesmith.records.training import Decay, Decisions, Overfit, TrainingBody
from tunesmith.training.settings import MOST_WARMUP, WARMUP, TrainSettings


@dataclass
class TrainerState:
    """Progress of a training. Every checkpoint holds all of it.

    step: steps done. seconds: of steps, validations and checkpoints, without the time between a stop and its resume.
    curve: step, loss, learning_rate, tokens and seconds of each step. validation: of each validation the step, the loss
    and the mean probability of the labels, and where answers are scored the score and its standard error.
    ended: why the training stopped before the end of its plan. paused: seconds in which it stood still, which count
    nowhere else.
    """

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    ended: str | None = None
    paused: float = 0.0

    @property
    def best(self) -> int | None:
        """Index of the validation whose weights are kept. None without validation.

        Only the weights of the best one before it are held, so each validation is compared with that one, as it comes.
        Where its score is within one standard error of the highest so far (Breiman et al. 1984), it takes that one's
        place if its score or the probability of its labels is higher; without scores the probability alone decides. It
        is not the loss that does: on few rows that rises, since a model that has become too sure pays for each wrong
        token without limit, while more of its answers become right (Guo et al. 2017, "On Calibration of Modern Neural
        Networks", section 3).
        """
        best: int | None = None
        highest, error = -math.inf, 0.0
        for place, each in enumerate(self.validation):
            value = _value(each)
            if value > highest:
                highest, error = value, each.get("score_error", 0.0)
            held = None if best is None else self.validation[best]
            better = held is None or value > _value(held) or each["probability"] > held["probability"]
            if better and value >= highest - error:
                best = place
        return best

    @property
    def overfitting(self) -> list[Overfit]:
        """The validations with a higher loss than the lowest before them, although the training loss has fallen since.

        The training loss of a validation is the mean over the steps since the validation before it.
        """
        risen: list[Overfit] = []
        ends, losses = [int(each["step"]) for each in self.validation], [each["loss"] for each in self.validation]
        since = [self.curve[first:last] for first, last in zip([0, *ends], ends, strict=False)]
        means = [sum(point["loss"] for point in points) / max(1, len(points)) for points in since]
        for place, loss in enumerate(losses):
            lowest = losses.index(min(losses[: place + 1]))
            if loss > losses[lowest] and means[place] < means[lowest]:
                risen.append(
                    Overfit(
                        step=ends[place],
                        loss=loss,
                        training_loss=means[place],
                        lowest_step=ends[lowest],
                        lowest_loss=losses[lowest],
                        lowest_training_loss=means[lowest],
                    )
                )
        return risen


def _value(validation: Mapping[str, float]) -> float:
    """What weights are chosen by: the score, or without scores the probability of the labels."""
    return validation.get("score", validation["probability"])


# A fall that would overrun the budget by more than the first share is shortened to the second one. That is lower, since
# where steps vary it would be shortened again and again.
_OVERRUN, _SHORTENED = 0.05, 0.04
DECISIONS = "decisions.json"  # in a training's work folder
ALL_EPOCHS, BUDGET_USED = "all epochs are done", "the budget is used"  # why a rate fell
_RECENT = 10  # steps that say how long one takes now


class Schedule:
    """What the trainer asks before and after each step, which count from 0.

    This one knows the number of steps: warm-up, then cosine, linear or constant.

    decisions: what it decided while the training ran; None where everything is planned.
    """

    decisions: Decisions | None = None

    def __init__(self, steps: int, settings: TrainSettings) -> None:
        self._steps, self._settings = steps, settings
        times = settings.validations
        self._validated = {math.ceil(steps * turn / times) for turn in range(1, times + 1)}

    def rate(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then the schedule down towards zero."""
        steps, settings = self._steps, self._settings
        warm = math.ceil(settings.warmup * steps)
        if step < warm:
            return settings.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, steps - warm)
        if settings.schedule == "cosine":
            return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        return settings.learning_rate * (1 - done if settings.schedule == "linear" else 1.0)

    def validates(self, step: int) -> bool:
        """Whether to validate after so many steps."""
        return step in self._validated

    def decide(self, _state: TrainerState) -> str | None:
        """Decide after a step and its validation what follows; returns what to tell the user. Sets state.ended where
        the training ends before its last step: never here."""
        return None


class Annealed(Schedule):
    """A schedule that decides while the training runs when the learning rate begins to fall."""

    decisions: Decisions

    def __init__(
        self, steps: int, settings: TrainSettings, decisions: Decisions, kept: Path | None, *, budget: float | None
    ) -> None:
        """steps: the most there are. kept: file that the decisions are kept in; None where rank 0 keeps them. budget:
        seconds; None: no clock is read, and decisions that were made before are followed."""
        super().__init__(steps, settings)
        self._budget, self._kept, self.decisions = budget, kept, decisions

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self._settings.learning_rate * self._share(step, len(self.decisions.decays))

    def _share(self, step: int, decays: int) -> float:
        """The rate of a step as a share of the highest, by the first so many decays."""
        if not decays:
            return min(1.0, (step + 1) / max(1, self.decisions.warmup))
        last = self.decisions.decays[decays - 1]
        if step < last.start:
            return self._share(step, decays - 1)
        return self._share(last.start, decays - 1) * (last.stop - step) / (last.stop - last.start)

    def validates(self, step: int) -> bool:
        """Whether to validate after so many steps: the last, and every so many, unless the last is nearer than half of
        that."""
        every = self.decisions.validate_every
        # As it was planned then: a training that is repeated knows what was decided later.
        stop = next((each.stop for each in reversed(self.decisions.decays) if each.start < step), self._steps)
        return step == stop or (step % every == 0 and 2 * (stop - step) >= every)

    def decide(self, state: TrainerState) -> str | None:
        """Let the rate fall where it is time for that; end the training where it has fallen."""
        step, last = state.step, self.decisions.decays[-1] if self.decisions.decays else None
        if last is not None and step >= last.stop:
            state.ended = last.reason
            return None
        if last is not None and step < last.start:
            return None  # resumed, and decided before: the clock of this run counts for nothing until then
        if last is None:
            if (reason := self._due(state)) is None:
                return None
            return self._fall(step, step + self._affordable(state, self._falling_steps(step)), reason)
        planned = last.stop - step
        late = self._budget is not None and state.seconds + self.decisions.seconds > self._budget
        if not (late or self.validates(step)) or (left := self._affordable(state, planned)) == planned:
            return None
        return self._fall(step, step + left, "the budget was used before the learning rate had fallen as planned")

    def _falling_steps(self, step: int) -> int:
        share = self._settings.decay
        return max(1, round(step * share / (1 - share)))

    def _due(self, state: TrainerState) -> str | None:
        """Why the rate should begin to fall; None while it should not."""
        if state.step + self._falling_steps(state.step) >= self._steps:
            return ALL_EPOCHS
        # The fall is a share of the steps, so it takes that share of the time that measuring and validations leave.
        if self._budget is not None:
            validation, stop = self.decisions.validation_seconds or 0.0, state.step + self._falling_steps(state.step)
            validations = max(1, round(stop / self.decisions.validate_every)) * validation
            for_steps = self._budget - self.decisions.seconds - validations
            if state.seconds - len(state.validation) * validation >= (1 - self._settings.decay) * for_steps:
                return BUDGET_USED
        return None

    def _affordable(self, state: TrainerState, planned: int) -> int:
        """How many of the planned steps are left: fewer where they would overrun the budget.

        Within the budget all steps so far say how long one takes, so that the time of validations is spread over them;
        past it, the last few do.
        """
        if self._budget is None:
            return planned
        most, each = self._budget, state.seconds / state.step
        if (spent := state.seconds + self.decisions.seconds) > self._budget:
            most *= 1 + _SHORTENED
            each = median(each["seconds"] for each in state.curve[-_RECENT:])
        if spent + planned * each <= (1 + _OVERRUN) * self._budget:
            return planned
        return min(planned, max(1, math.floor((most - spent) / max(1e-9, each))))

    def _fall(self, start: int, stop: int, reason: str) -> str:
        """Write the decision down, then act by it."""
        decay = Decay(start=start, stop=min(stop, self._steps), reason=reason)
        self.decisions = self.decisions.model_copy(update={"decays": (*self.decisions.decays, decay)})
        if self._kept is not None:
            keep_decisions(self._kept, self.decisions)
        return f"the learning rate falls from step {decay.start} to zero at step {decay.stop}, where {reason}"


def more_time(training: TrainingBody) -> str | None:
    """Which budget would have held all epochs; None where this one did, or where there was none."""
    budget, epochs = training.settings.budget, training.settings.epochs
    decays = training.decisions.decays if training.decisions else ()
    if budget is None or not decays or (decays[0].reason == ALL_EPOCHS and decays[-1].stop == decays[0].stop):
        return None
    measured = training.decisions.seconds if training.decisions else 0.0
    needed = measured + training.seconds * epochs / training.epochs
    return (
        f"The budget held {training.epochs:.1f} of {epochs} epochs; all of them take about {duration(needed)}: "
        "raise train.budget."
    )


def warmup_steps(settings: TrainSettings, steps: float) -> int:
    """In how many of so many steps the rate rises."""
    share = math.ceil(settings.warmup * steps)
    cut = settings.budget is not None and settings.warmup == WARMUP
    return min(MOST_WARMUP, share) if cut else share


def keep_decisions(path: Path, decisions: Decisions) -> None:
    """Write decisions so that they survive a crash."""
    write_atomic(path, decisions.model_dump_json().encode())


def read_decisions(path: Path) -> Decisions | None:
    """The decisions that were kept; None where there are none. Raises ValueError for a damaged file."""
    return Decisions.model_validate_json(path.read_bytes()) if path.is_file() else None
