"""How a training has gone so far: what is shown, recorded and kept in each checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


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

    def exhausted(self, patience: int | None) -> str | None:
        """Why validation says to stop: the last `patience` validations brought no higher score, and no better weights.
        None where it does not.

        Better weights alone would stop a training whose score rises slowly, within its error, while the probability of
        its labels falls.
        """
        if patience is None or self.best is None:
            return None
        values = [_value(each) for each in self.validation]
        if len(values) - 1 - max(self.best, values.index(max(values))) < patience:
            return None
        what = "better score" if "score" in self.validation[-1] else "higher probability of the expected answers"
        return f"no {what} in {patience} validations"

    @property
    def overfitting(self) -> list[dict[str, float]]:
        """The validations with a higher loss than the lowest before them, although the training loss has fallen since.

        The training loss of a validation is the mean over the steps since the validation before it.
        """
        found: list[dict[str, float]] = []
        ends = [int(each["step"]) for each in self.validation]
        means = [_mean_loss(self.curve[first:last]) for first, last in zip([0, *ends], ends, strict=False)]
        for index, each in enumerate(self.validation):
            lowest = min(range(index + 1), key=lambda before: self.validation[before]["loss"])
            if each["loss"] > self.validation[lowest]["loss"] and means[index] < means[lowest]:
                found.append(
                    {
                        "step": each["step"],
                        "loss": each["loss"],
                        "training_loss": means[index],
                        "lowest_step": self.validation[lowest]["step"],
                        "lowest_loss": self.validation[lowest]["loss"],
                        "lowest_training_loss": means[lowest],
                    }
                )
        return found


def _value(validation: Mapping[str, float]) -> float:
    """What weights are chosen by: the score, or without scores the probability of the labels."""
    return validation.get("score", validation["probability"])


def _mean_loss(curve: Sequence[Mapping[str, float]]) -> float:
    return sum(point["loss"] for point in curve) / max(1, len(curve))
