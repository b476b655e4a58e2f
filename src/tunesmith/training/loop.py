"""The training loop: steps, schedule, validation, checkpoints. Everything it does is a function of its inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import Progress
from tunesmith.models.attention import shared_prefix_attention
from tunesmith.models.batch import Batch
from tunesmith.models.network import Network, forward, rms_norm
from tunesmith.training.checkpoints import load_checkpoint, save_checkpoint
from tunesmith.training.lora import Lora
from tunesmith.training.loss import cross_entropy
from tunesmith.training.settings import TrainSettings


@dataclass
class Course:
    """How a run went so far; all of it is in each checkpoint. seconds leaves out time between a stop and its resume."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)


def batch_loss(network: Network, lora: Lora, batch: Batch, divisor: float) -> Tensor:
    """Summed loss of a batch's labels over divisor, a scalar with gradients to the adapter's copies."""
    hidden = forward(network, batch.ids, lora.linear(), shared_prefix_attention(batch, network))
    wanted = rms_norm(hidden[batch.predicts], network.final_norm, network.shape.epsilon)
    share = torch.full((batch.labels.numel(),), 1.0 / divisor)
    return cross_entropy(wanted, network.head, batch.labels, share)


def trial_step(network: Network, lora: Lora) -> Callable[[Batch], None]:
    """A step's whole arithmetic without its effect, for the estimate."""

    def run(batch: Batch) -> None:
        batch_loss(network, lora, batch, float(batch.labels.numel())).backward()
        lora.take_gradients()
        for master in lora.masters:
            master.grad = None

    return run


def rate_at(step: int, steps: int, settings: TrainSettings) -> float:
    """The learning rate of step (from 0): a linear warm-up, then the schedule down towards zero."""
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    if settings.schedule == "cosine":
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * (1 - done if settings.schedule == "linear" else 1.0)


def fit(
    network: Network,
    lora: Lora,
    batches: Sequence[Batch],
    validation: Sequence[Batch],
    settings: TrainSettings,
    folder: Path,
    identity: Mapping[str, Any],
    progress: Progress,
) -> Course:
    """Train the adapter on batches in order; carries on from the newest whole checkpoint under folder.

    Raises TunesmithError where the loss is not a number any more; the checkpoint before that stays.
    """
    optimizer = torch.optim.AdamW(
        lora.masters, lr=settings.learning_rate, betas=(0.9, 0.999), weight_decay=settings.weight_decay, fused=True
    )
    course = _resume(lora, optimizer, folder, identity, progress)
    steps = len(batches)
    due = {math.ceil(steps * turn / settings.validations) for turn in range(1, settings.validations + 1)}
    saved = time.perf_counter()
    with progress.task("training", sum(batch.tokens for batch in batches)) as task:
        task.advance(sum(batch.tokens for batch in batches[: course.step]))
        for step in range(course.step, steps):
            began = time.perf_counter()
            loss = _step(network, lora, optimizer, batches[step], rate_at(step, steps, settings), settings.clip)
            if not math.isfinite(loss):
                raise TunesmithError(
                    f"the loss became {loss} at step {step + 1} of {steps}",
                    where="train.learning_rate",
                    fix="lower it; the last whole checkpoint is kept",
                )
            course.step = step + 1
            if course.step in due and validation:
                course.validation.append({"step": course.step, "loss": validation_loss(network, lora, validation)})
            spent = time.perf_counter() - began
            course.seconds += spent
            rate = rate_at(step, steps, settings)
            tokens = batches[step].tokens
            course.curve.append(
                {"step": course.step, "loss": loss, "learning_rate": rate, "tokens": tokens, "seconds": spent}
            )
            task.note(f"loss {loss:.3f}, {tokens / spent:.0f} tokens/s")
            task.advance(tokens)
            if time.perf_counter() - saved > settings.checkpoint_seconds or course.step == steps:
                _save(lora, optimizer, folder, identity, course)
                saved = time.perf_counter()
    return course


@torch.no_grad()
def validation_loss(network: Network, lora: Lora, batches: Sequence[Batch]) -> float:
    """Mean loss over all labels of batches."""
    labels = sum(batch.labels.numel() for batch in batches)
    return float(sum(batch_loss(network, lora, batch, float(labels)) for batch in batches))


def _step(
    network: Network, lora: Lora, optimizer: torch.optim.Optimizer, batch: Batch, rate: float, clip: float
) -> float:
    loss = batch_loss(network, lora, batch, float(batch.labels.numel()))
    loss.backward()
    lora.take_gradients()
    torch.nn.utils.clip_grad_norm_(lora.masters, clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    value = float(loss.detach())
    if math.isfinite(value):
        optimizer.step()
        lora.refresh_copies()
    optimizer.zero_grad(set_to_none=True)
    return value


def _save(
    lora: Lora, optimizer: torch.optim.Optimizer, folder: Path, identity: Mapping[str, Any], course: Course
) -> None:
    tensors = {}
    for place, master in enumerate(lora.masters):
        kept = optimizer.state[master]
        tensors[f"{place}.master"] = master.detach()
        tensors[f"{place}.first"], tensors[f"{place}.second"] = kept["exp_avg"], kept["exp_avg_sq"]
    state = {
        "identity": dict(identity),
        "seconds": course.seconds,
        "curve": course.curve,
        "validation": course.validation,
    }
    save_checkpoint(folder, course.step, tensors, state)


@torch.no_grad()
def _resume(
    lora: Lora, optimizer: torch.optim.Optimizer, folder: Path, identity: Mapping[str, Any], progress: Progress
) -> Course:
    found = load_checkpoint(folder, identity)
    if found is None:
        return Course()
    tensors, state, damaged = found
    for name in damaged:
        progress.say(f"checkpoint {name} is damaged; carrying on from the one before it")
    for place, master in enumerate(lora.masters):
        master.copy_(tensors[f"{place}.master"])
        optimizer.state[master] = {
            "step": torch.tensor(float(state["step"])),
            "exp_avg": tensors[f"{place}.first"],
            "exp_avg_sq": tensors[f"{place}.second"],
        }
    lora.refresh_copies()
    progress.say(f"carrying on from step {state['step']}")
    return Course(state["step"], state["seconds"], state["curve"], state["validation"])
