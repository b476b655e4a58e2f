"""The training loop: steps, validation, checkpoints. Its result is a function of its inputs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields

import torch
from torch import Tensor

from tunesmith.core import memory
from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import SILENT, Progress, Task
from tunesmith.engines.training_protocol import Objective, TrainableModel
from tunesmith.training.batch_plan import Step, step_tokens
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.settings import TrainSettings
from tunesmith.training.state import TrainerState
from tunesmith.training.steps import gradients, learning_rate, make_optimizer, parameters, update


def _ignore(_: TrainerState) -> None:
    pass


class Trainer:
    """Trains a model over a plan of steps. It holds what changes meanwhile: the model's parameters, the optimiser, the
    state and the best weights so far."""

    def __init__(
        self,
        model: TrainableModel,
        plan: Sequence[Step],
        settings: TrainSettings,
        checkpoints: Checkpoints,
        *,
        objective: Objective | None = None,
        validate: Callable[[], float] | None = None,
        on_checkpoint: Callable[[TrainerState], None] = _ignore,
        progress: Progress = SILENT,
    ) -> None:
        """Continues from the newest complete checkpoint, if there is one.

        objective: cross-entropy where it is None. validate: returns a finite number for the model as it is now, of
        which lower is better; it is called settings.validations times. on_checkpoint: called with the state after each
        checkpoint, and once at the start of a resumed training. Raises Refused where the checkpoints belong to another
        training.
        """
        self.model, self.plan, self.settings, self.progress = model, plan, settings, progress
        self._objective = CrossEntropy() if objective is None else objective
        self._validate, self._checkpoints, self._on_checkpoint = validate, checkpoints, on_checkpoint
        steps, times = len(plan), settings.validations
        self._validated_at = {math.ceil(steps * turn / times) for turn in range(1, times + 1)} if validate else set()
        self._parameters = parameters(model)
        self._optimizer = make_optimizer(model, settings)
        self._best: list[Tensor] | None = None
        self._peak_flops: float | None = None
        self.state = self._resume()
        if self.state.step:
            on_checkpoint(self.state)  # the training may have been killed between a checkpoint and this call
        self._saved = time.perf_counter()

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.state.step == len(self.plan) or self.state.ended is not None

    def run(self) -> TrainerState:
        """Train to the end. The model then has the weights that the setting `keep` names.

        Raises TunesmithError where a loss or a gradient is not finite; the checkpoint before that stays.
        """
        with self.progress.task("training", sum(map(step_tokens, self.plan))) as task:
            task.advance(sum(map(step_tokens, self.plan[: self.state.step])))
            while not self.finished:
                self._step(task)
        self._restore_best()
        return self.state

    def compute(self, step: Step) -> float:
        """Leave a step's gradients on the parameters; returns its loss."""
        return gradients(self.model, self._objective, step)

    def _step(self, task: Task) -> None:
        """Compute the next step and update the model, validate and save where it is time for that.

        Raises TunesmithError, and changes nothing, where the loss or the gradient is not finite.
        """
        state, began = self.state, time.perf_counter()
        step = self.plan[state.step]
        loss = self.compute(step)
        rate, tokens = learning_rate(state.step, len(self.plan), self.settings), step_tokens(step)
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss became {loss}", state.step + 1)
        norm = update(self.model, self._optimizer, rate, self.settings.clip)
        if not math.isfinite(norm):
            raise self._not_finite(f"the gradient's norm became {norm}", state.step + 1)
        state.step += 1
        if state.step in self._validated_at:
            self._validate_now()
        seconds = time.perf_counter() - began
        state.seconds += seconds
        state.curve.append(
            {"step": state.step, "loss": loss, "learning_rate": rate, "tokens": tokens, "seconds": seconds}
        )
        if state.step in self._validated_at:
            self._warn_of_overfitting()
        task.note(self._note(state.curve[-1], step))
        task.advance(tokens)
        if self.finished or time.perf_counter() - self._saved > self.settings.checkpoint_seconds:
            self._save()
            self._saved = time.perf_counter()

    def _not_finite(self, what: str, step: int) -> TunesmithError:
        message = f"{what} at step {step} of {len(self.plan)}"
        if self.state.step == 0:
            return TunesmithError(f"{message}, before anything was learned", where="base", fix="check its weights")
        return TunesmithError(message, where="train.learning_rate", fix="lower it; the last checkpoint is kept")

    def _note(self, point: Mapping[str, float], step: Step) -> str:
        """The loss, memory, speed, and the speed as a share of the machine's speed on one matrix product."""
        if self._peak_flops is None:
            self._peak_flops = self.model.peak_flops(max(self.plan[0], key=lambda batch: batch.tokens))
        tokens, seconds = int(point["tokens"]), point["seconds"]
        share = sum(map(self.model.flops, step)) / seconds / self._peak_flops
        gigabytes = memory.peak_memory() / 1e9
        return f"loss {point['loss']:.3f}, {gigabytes:.1f} GB, {tokens / seconds:.0f} tokens/s, {share:.0%} of peak"

    def _validate_now(self) -> None:
        """Validate; keep a copy of the best weights if they are wanted; stop early where patience is exhausted."""
        state, patience = self.state, self.settings.patience
        assert self._validate is not None
        loss = self._validate()
        if not math.isfinite(loss):
            raise self._not_finite(f"the validation loss became {loss}", state.step)
        state.validation.append({"step": state.step, "loss": loss})
        best = state.best
        if best == len(state.validation) - 1 and self.settings.keep == "best":
            self._best = [parameter.detach().clone() for parameter in self._parameters]
        elif best is not None and patience is not None and len(state.validation) - 1 - best >= patience:
            state.ended = f"no lower validation loss in {patience} validations"
            self.progress.say(f"stopping at step {state.step}: {state.ended}")

    def _warn_of_overfitting(self) -> None:
        """Say that overfitting begins, at the first validation after the lowest that shows it."""
        state = self.state
        found = state.overfitting
        if not found or found[-1]["step"] != state.step or state.best != len(state.validation) - 2:
            return
        now = found[-1]
        kept = "the weights of that step are kept" if self.settings.keep == "best" else "`keep: best` would keep those"
        self.progress.say(
            f"overfitting at step {state.step}: the validation loss rose from {now['lowest_loss']:.3f} (step "
            f"{now['lowest_step']:.0f}) to {now['loss']:.3f} while the training loss fell from "
            f"{now['lowest_training_loss']:.3f} to {now['training_loss']:.3f}; {kept}"
        )

    @torch.no_grad()
    def _restore_best(self) -> None:
        if self.settings.keep == "best" and self._best is not None:
            for parameter, best in zip(self._parameters, self._best, strict=True):
                parameter.copy_(best)
            self.model.parameters_changed()

    def _save(self) -> None:
        tensors = {}
        for number, parameter in enumerate(self._parameters):
            moments = self._optimizer.state[parameter]
            tensors[f"{number}.parameter"] = parameter.detach()
            tensors[f"{number}.exp_avg"], tensors[f"{number}.exp_avg_sq"] = moments["exp_avg"], moments["exp_avg_sq"]
            if self._best is not None:
                tensors[f"{number}.best"] = self._best[number]
        self._checkpoints.save(self.state.step, tensors, asdict(self.state))
        self._on_checkpoint(self.state)

    @torch.no_grad()
    def _resume(self) -> TrainerState:
        found, damaged = self._checkpoints.load()
        for name in damaged:
            instead = "starting over" if found is None else "resuming from the one before it"
            self.progress.say(f"checkpoint {name} is damaged; {instead}")
        if found is None:
            return TrainerState()
        tensors, state = found
        for number, parameter in enumerate(self._parameters):
            parameter.copy_(tensors[f"{number}.parameter"])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(state["step"])),
                "exp_avg": tensors[f"{number}.exp_avg"],
                "exp_avg_sq": tensors[f"{number}.exp_avg_sq"],
            }
        if "0.best" in tensors:
            self._best = [tensors[f"{number}.best"] for number in range(len(self._parameters))]
        self.model.parameters_changed()
        self.progress.say(f"resuming from step {state['step']}")
        return TrainerState(**{each.name: state[each.name] for each in fields(TrainerState)})
