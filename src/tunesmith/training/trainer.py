"""The training loop: steps, schedule, validation, checkpoints. Everything it does is a function of its inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import Progress, Task
from tunesmith.engines.batch import Batch
from tunesmith.engines.hf.lora import HFLora
from tunesmith.engines.hf.model import HFModel
from tunesmith.engines.native import runtime
from tunesmith.engines.native.network.attention import shared_prefix_attention
from tunesmith.engines.native.network.network import Network, final, forward
from tunesmith.training.checkpoints import load_checkpoint, save_checkpoint
from tunesmith.training.settings import TrainSettings
from tunesmith.training.speed import matrix_limit, step_flops
from tunesmith.training.trainable import Trained

# A step: the parts it is computed in, one after another, to one sum.
Step = Sequence[Batch]


@dataclass
class TrainerState:
    """How a run went so far; all of it is in each checkpoint. seconds leaves out time between a stop and its resume.

    ended: why the run stopped before the end of its plan.
    """

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    ended: str | None = None

    @property
    def best(self) -> int | None:
        """Which validation had the lowest loss, the first of equals; None where there was none."""
        losses = [each["loss"] for each in self.validation]
        return losses.index(min(losses)) if losses else None

    @property
    def overfitting(self) -> list[dict[str, float]]:
        """Validations whose loss stood above the lowest before them, though the training loss had fallen since.

        A training loss is the mean over the steps since the validation before.
        """
        found: list[dict[str, float]] = []
        ends = [int(each["step"]) for each in self.validation]
        means = [_mean_loss(self.curve[first:last]) for first, last in zip([0, *ends], ends, strict=False)]
        for place, each in enumerate(self.validation):
            lowest = min(range(place + 1), key=lambda before: self.validation[before]["loss"])
            if each["loss"] > self.validation[lowest]["loss"] and means[place] < means[lowest]:
                found.append(
                    {
                        "step": each["step"],
                        "loss": each["loss"],
                        "training_loss": means[place],
                        "lowest_step": self.validation[lowest]["step"],
                        "lowest_loss": self.validation[lowest]["loss"],
                        "lowest_training_loss": means[lowest],
                    }
                )
        return found


def _mean_loss(curve: Sequence[Mapping[str, float]]) -> float:
    return sum(point["loss"] for point in curve) / max(1, len(curve))


def batch_loss(network: Network | HFModel, trained: Trained, batch: Batch, divisor: float) -> Tensor:
    """Summed loss of a batch's labels over divisor, a scalar with gradients to the copies of what is trained."""
    if isinstance(network, HFModel):
        return network.loss(batch, divisor)
    assert not isinstance(trained, HFLora)
    hidden = forward(network, batch.ids, trained.linear(), shared_prefix_attention(batch, network))
    wanted = final(network, hidden[batch.predicts])
    return trained.loss(wanted, batch.labels, label_shares(batch, divisor))


def label_shares(batch: Batch, divisor: float) -> Tensor:
    """What each label of a batch counts of its step's loss [N]."""
    return torch.full((batch.labels.numel(),), 1.0 / divisor)


def trial_step(network: Network | HFModel, trained: Trained) -> Callable[[Step], None]:
    """A step's whole arithmetic without its effect, for the estimate."""

    def run(step: Step) -> None:
        gradients(network, trained, step)
        for master in trained.masters:
            master.grad = None

    return run


def label_total(step: Step) -> float:
    """Labels of all of a step's parts."""
    return float(sum(part.labels.numel() for part in step))


def gradients(network: Network | HFModel, trained: Trained, step: Step, labels: float | None = None) -> float:
    """Leave a step's gradients on the masters; returns its loss, the mean over all its labels. labels: how many those
    are, where step is a share of it."""
    labels = label_total(step) if labels is None else labels
    losses = []
    for part in step:
        loss = batch_loss(network, trained, part, labels)
        loss.backward()
        trained.take_gradients()
        losses.append(loss.detach())
    total = 0.0
    for loss in losses:  # read last, when all parts are under way on a device
        total += float(loss)
    return total


def rate_at(step: int, steps: int, settings: TrainSettings) -> float:
    """The learning rate of step (from 0): a linear warm-up, then the schedule down towards zero."""
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    if settings.schedule == "cosine":
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * (1 - done if settings.schedule == "linear" else 1.0)


def make_optimizer(trained: Trained, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the masters, before its first step."""
    return torch.optim.AdamW(
        trained.groups(),
        lr=settings.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def update(trained: Trained, optimizer: torch.optim.AdamW, rate: float, clip: float) -> float:
    """Move the masters by the gradients on them, which are then gone, and round the masters into their copies.

    Returns the gradients' norm before it was clipped. Where that is no finite number nothing is moved: such masters
    would never be right again.
    """
    norm = float(torch.nn.utils.clip_grad_norm_(trained.masters, clip))
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        return norm
    for group in optimizer.param_groups:
        group["lr"] = rate * group["multiple"]
    optimizer.step()
    trained.refresh_copies()
    optimizer.zero_grad(set_to_none=True)
    return norm


def fit(
    network: Network | HFModel,
    trained: Trained,
    plan: Sequence[Step],
    validation: Sequence[Batch],
    settings: TrainSettings,
    folder: Path,
    identity: Mapping[str, Any],
    progress: Progress,
    follow: Callable[[TrainerState], None] = lambda _: None,
) -> TrainerState:
    """Train on the plan's steps; carries on from the newest whole checkpoint under folder. The weights end as `keep`
    says. follow: told of the course after each checkpoint.

    Raises TunesmithError where a loss or a gradient is not a number any more; the checkpoint before that stays.
    """
    return complete(Trainer(network, trained, plan, validation, settings, folder, identity, progress, follow))


def step_tokens(step: Step) -> int:
    """Tokens that a step computes."""
    return sum(part.tokens for part in step)


class Trainer:
    """A training under way: what it will do, and what changes meanwhile: the weights, the optimiser, the course, the
    best weights so far. processes: how many compute each step."""

    processes = 1

    def __init__(
        self,
        network: Network | HFModel,
        trained: Trained,
        plan: Sequence[Step],
        validation: Sequence[Batch],
        settings: TrainSettings,
        folder: Path,
        identity: Mapping[str, Any],
        progress: Progress,
        follow: Callable[[TrainerState], None] = lambda _: None,
    ) -> None:
        self.network, self.trained, self.settings, self.progress = network, trained, settings, progress
        self.plan, self.validation = plan, validation
        self.folder, self.identity = folder, dict(identity)
        steps, times = len(plan), settings.validations
        self._validated_at = {math.ceil(steps * turn / times) for turn in range(1, times + 1)} if validation else set()
        self.optimizer = make_optimizer(trained, settings)
        self._parameters = trained.parameters  # counted once
        self.best: list[Tensor] | None = None
        self._follow = follow
        self.course = self._resume()
        if self.course.step:
            follow(self.course)  # it may have been killed between a checkpoint and this
        self._saved = time.perf_counter()

    @property
    def over(self) -> bool:
        """Whether no step is left to do."""
        return self.course.step == len(self.plan) or self.course.ended is not None

    @property
    def due(self) -> Step:
        """The step that comes next."""
        return self.plan[self.course.step]

    @property
    def tokens_done(self) -> int:
        """Tokens computed so far."""
        return sum(map(step_tokens, self.plan[: self.course.step]))

    def compute(self) -> float:
        """Leave the due step's gradients on the masters; returns its loss."""
        return gradients(self.network, self.trained, self.due)

    def measure(self) -> float:
        """The validation loss."""
        return validation_loss(self.network, self.trained, self.validation)

    def advance(self, loss: float, seconds: float, task: Task) -> None:
        """End the step that is due, whose gradients lie on the masters. seconds: what they took.

        Raises TunesmithError, and changes nothing, where its loss or its gradient is not finite; and where a validation
        loss is not.
        """
        course, steps, began = self.course, len(self.plan), time.perf_counter()
        rate, tokens = rate_at(course.step, steps, self.settings), step_tokens(self.due)
        if not math.isfinite(loss):
            raise self._no_number(f"the loss became {loss}", course.step + 1)
        norm = update(self.trained, self.optimizer, rate, self.settings.clip)
        if not math.isfinite(norm):
            raise self._no_number(f"the gradient's norm became {norm}", course.step + 1)
        course.step += 1
        if course.step in self._validated_at:
            self.validate()
        spent = seconds + time.perf_counter() - began
        course.seconds += spent
        course.curve.append(
            {"step": course.step, "loss": loss, "learning_rate": rate, "tokens": tokens, "seconds": spent}
        )
        if course.step in self._validated_at:
            self.warn()
        task.note(self._note(course.curve[-1]))
        task.advance(tokens)
        if self.over or time.perf_counter() - self._saved > self.settings.checkpoint_seconds:
            self.save()
            self._saved = time.perf_counter()

    def _no_number(self, what: str, step: int) -> TunesmithError:
        said = f"{what} at step {step} of {len(self.plan)}"
        if self.course.step == 0:
            return TunesmithError(f"{said}, before anything was learned", where="base", fix="check its weights")
        return TunesmithError(said, where="train.learning_rate", fix="lower it; the last whole checkpoint is kept")

    def _note(self, point: Mapping[str, float]) -> str:
        """Loss, speed, how much of what the processor can multiply that is, and the most memory so far."""
        tokens, seconds = int(point["tokens"]), point["seconds"]
        labels = sum(part.labels.numel() for part in self.plan[int(point["step"]) - 1])
        flops = step_flops(self.network, self._parameters, self.settings, tokens, labels)
        limit = self.processes * matrix_limit(self.network, max(part.tokens for part in self.plan[0]))
        share = flops / seconds / limit
        memory = runtime.peak_memory() / 1e9
        return f"loss {point['loss']:.3f}, {memory:.1f} GB, {tokens / seconds:.0f} tokens/s, {share:.0%} of peak"

    def validate(self) -> None:
        """Take the validation loss; hold the weights where it is the lowest and they are to be kept; end the run where
        patience is."""
        course, patience = self.course, self.settings.patience
        loss = self.measure()
        if not math.isfinite(loss):
            raise self._no_number(f"the validation loss became {loss}", course.step)
        course.validation.append({"step": course.step, "loss": loss})
        best = course.best
        if best == len(course.validation) - 1 and self.settings.keep == "best":
            self.best = [master.detach().clone() for master in self.trained.masters]
        elif best is not None and patience is not None and len(course.validation) - 1 - best >= patience:
            course.ended = f"no lower validation loss in {patience} validations"
            self.progress.say(f"stopping at step {course.step}: {course.ended}")

    def warn(self) -> None:
        """Say that the run begins to overfit, at the first validation after the lowest that shows it."""
        course = self.course
        found = course.overfitting
        if not found or found[-1]["step"] != course.step or course.best != len(course.validation) - 2:
            return
        now = found[-1]
        kept = "the weights of then are kept" if self.settings.keep == "best" else "`keep: best` would keep those"
        self.progress.say(
            f"overfitting at step {course.step}: the validation loss rose from {now['lowest_loss']:.3f} (step "
            f"{now['lowest_step']:.0f}) to {now['loss']:.3f} while the training loss fell from "
            f"{now['lowest_training_loss']:.3f} to {now['training_loss']:.3f}; {kept}"
        )

    @torch.no_grad()
    def settle(self) -> None:
        """Leave the masters at the weights that are to be kept."""
        if self.settings.keep == "best" and self.best is not None:
            for master, best in zip(self.trained.masters, self.best, strict=True):
                master.copy_(best)
            self.trained.refresh_copies()

    def save(self) -> None:
        """Write a checkpoint."""
        tensors = {}
        for place, master in enumerate(self.trained.masters):
            kept = self.optimizer.state[master]
            tensors[f"{place}.master"] = master.detach()
            tensors[f"{place}.first"], tensors[f"{place}.second"] = kept["exp_avg"], kept["exp_avg_sq"]
            if self.best is not None:
                tensors[f"{place}.best"] = self.best[place]
        save_checkpoint(self.folder, self.course.step, tensors, {"identity": self.identity, **asdict(self.course)})
        self._follow(self.course)

    @torch.no_grad()
    def _resume(self) -> TrainerState:
        found, damaged = load_checkpoint(self.folder, self.identity)
        for name in damaged:
            instead = "starting over" if found is None else "carrying on from the one before it"
            self.progress.say(f"checkpoint {name} is damaged; {instead}")
        if found is None:
            return TrainerState()
        tensors, state = found
        for place, master in enumerate(self.trained.masters):
            master.copy_(tensors[f"{place}.master"])
            self.optimizer.state[master] = {
                "step": torch.tensor(float(state["step"])),
                "exp_avg": tensors[f"{place}.first"],
                "exp_avg_sq": tensors[f"{place}.second"],
            }
        if "0.best" in tensors:
            self.best = [tensors[f"{place}.best"] for place in range(len(self.trained.masters))]
        self.trained.refresh_copies()
        self.progress.say(f"carrying on from step {state['step']}")
        return TrainerState(**{each.name: state[each.name] for each in fields(TrainerState)})


def complete(run: Trainer) -> TrainerState:
    """Train to the run's end; leaves the weights as `keep` says."""
    with run.progress.task("training", sum(map(step_tokens, run.plan))) as task:
        task.advance(run.tokens_done)
        while not run.over:
            began = time.perf_counter()
            loss = run.compute()
            run.advance(loss, time.perf_counter() - began, task)
    run.settle()
    return run.course


@torch.no_grad()
def validation_loss(
    network: Network | HFModel, trained: Trained, batches: Sequence[Batch], labels: float | None = None
) -> float:
    """Mean loss over all labels of batches. labels: how many those are, where batches are a share of them."""
    labels = label_total(batches) if labels is None else labels
    return float(sum(batch_loss(network, trained, batch, labels) for batch in batches))
