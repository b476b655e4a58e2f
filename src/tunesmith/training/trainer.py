"""The training loop: steps, validation, checkpoints. Its result is a function of its inputs."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields

import torch
from torch import Tensor

from tunesmith.core.errors import TunesmithError
from tunesmith.core.progress import SILENT, Progress, Stopped, Task
from tunesmith.engines.process import DeviceMemory
from tunesmith.engines.ranks import ALONE, Ranks
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.training.batches.batch_plan import Step, step_tokens
from tunesmith.training.beside import Rival
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.objectives import Objective
from tunesmith.training.schedule import Schedule, TrainerState
from tunesmith.training.settings import TrainSettings
from tunesmith.training.steps import gradients, make_optimizer, parameters, update

# A step that takes so many times as long as the slowest of the last few was paused (ctrl-Z, a stopped container). Its
# time counts up to there. Of a machine that has become slow, the first step alone is cut.
_PAUSED, _LAST = 10, 5
_SHORT = 10.0  # seconds of a step that is never cut


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
        objective: Objective,
        schedule: Schedule | None = None,
        validate: Callable[[], Mapping[str, float]] | None = None,
        on_checkpoint: Callable[[TrainerState], None] = lambda _: None,
        on_step: Callable[[TrainerState], None] = lambda _: None,
        progress: Progress = SILENT,
        clock: Callable[[], float] = time.perf_counter,
        ranks: Ranks = ALONE,
        rival: Rival | None = None,
    ) -> None:
        """Continues from the newest complete checkpoint, if there is one.

        schedule: the planned one of settings where it is None. validate: returns finite numbers for the model as it is
        now: a `loss`, of which lower is better, and where answers are scored a `score`, of which higher is better;
        called when the schedule says so. on_checkpoint, on_step: called with the state after each checkpoint or step,
        and once at the start of a resumed training. clock: seconds since some moment, the same on all ranks. ranks:
        compute each step together; each has its own part of the plan's steps. rival: what lines say beside each score.
        Raises Refused where the checkpoints belong to another training.
        """
        self.model, self.plan, self.settings, self.progress = model, plan, settings, progress
        self._schedule = schedule or Schedule(len(plan), settings)
        self._objective, self._validate, self._checkpoints = objective, validate, checkpoints
        self._on_checkpoint, self._on_step = on_checkpoint, on_step
        self._clock, self._ranks, self._rival = clock, ranks, rival
        self._parameters = parameters(model)
        self._optimizer = make_optimizer(model, settings)
        self._best: list[Tensor] | None = None
        self._peak_flops: float | None = None
        self._token_seconds = deque[float](maxlen=_LAST)  # of the last steps that did not validate
        self._validating = deque[float](maxlen=_LAST)  # seconds of the last steps that did
        self.state = self._resume()
        self._saved_step = self.state.step
        if self.state.step:
            on_checkpoint(self.state)  # the training may have been killed between a checkpoint and this call
            on_step(self.state)
        self._saved = clock()

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.state.step == len(self.plan) or self.state.ended is not None

    def run(self) -> TrainerState:
        """Train to the end. The model then has the weights that the setting `keep` names.

        Raises TunesmithError where a loss or a gradient is not finite, and where a GPU's memory is full; the checkpoint
        before that stays. Raises Stopped, after a checkpoint, where the progress reports say that the work was told to
        stop.
        """
        budget = self.settings.budget
        total = sum(map(step_tokens, self.plan)) if budget is None else round(budget)
        with self.progress.task("training", total) as task:
            done = 0
            while True:
                if budget is None:
                    now = sum(step["tokens"] for step in self.state.curve)
                else:  # what ends first, the budget or all epochs
                    now = max(self.state.seconds, total * self.state.step / len(self.plan))
                before, done = done, min(total, int(now))
                try:
                    task.advance(done - before)
                except Stopped:
                    if self.state.step != self._saved_step:
                        self._save()
                    raise
                if self.finished:
                    break
                try:
                    self._step(task)
                except torch.OutOfMemoryError as error:  # free memory of a GPU may lie in pieces
                    raise TunesmithError(
                        f"the GPU's memory is full at step {self.state.step + 1} of {len(self.plan)}: "
                        f"{str(error)[:200]}",
                        where="train.tokens",
                        fix="set tokens lower, or recompute: true; the last checkpoint is kept, but resumes the same "
                        "settings only. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True lets pieces be joined",
                    ) from error
        if self.settings.keep == "best" and self._best is not None:
            with torch.no_grad():
                for parameter, best in zip(self._parameters, self._best, strict=True):
                    parameter.copy_(best)
            self.model.parameters_changed()
        return self.state

    def _step(self, task: Task) -> None:
        """Compute the next step and update the model, validate and save where it is time for that.

        Raises TunesmithError, and changes nothing, where the loss or the gradient is not finite.
        """
        state, began = self.state, self._clock()
        step = self.plan[state.step]
        loss = gradients(self.model, self._objective, step, self._ranks)
        rate, tokens = self._schedule.rate(state.step), step_tokens(step)
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss became {loss}", state.step + 1)
        norm = update(self.model, self._optimizer, rate, self.settings.clip)
        if not math.isfinite(norm):
            raise self._not_finite(f"the gradient's norm became {norm}", state.step + 1)
        state.step += 1
        validates = self._validate is not None and self._schedule.validates(state.step)
        if validates:
            self._validate_now()
        seconds = self._counted(self._clock() - began, tokens, validates)
        state.seconds += seconds
        state.curve.append(
            {"step": state.step, "loss": loss, "learning_rate": rate, "tokens": tokens, "seconds": seconds}
        )
        if validates:
            self._say_validation()
            self._warn_of_overfitting()
        if (decided := self._schedule.decide(state)) is not None:
            self.progress.say(decided)
        if not validates:  # whose seconds are not the step's alone
            task.note(self._note(state.curve[-1], step))
        self._on_step(state)
        now = self._clock()
        if self.finished or now - self._saved > self.settings.checkpoint_seconds:
            self._save()
            self._saved = self._clock()
            state.seconds += self._saved - now  # which the next checkpoint holds: a kill before that loses it once

    def _counted(self, seconds: float, tokens: int, validates: bool) -> float:
        """The seconds of a step that count, after saying which do not."""
        full = len(self._token_seconds) == _LAST
        usual = max(self._token_seconds) * tokens if full else math.inf
        if validates:
            usual += max(self._validating, default=math.inf)
            self._validating.append(seconds)
        else:
            self._token_seconds.append(seconds / tokens)
        most = max(_SHORT, _PAUSED * usual)
        if seconds <= most:
            return seconds
        self.state.paused += seconds - most
        self.progress.say(
            f"step {self.state.step} took {seconds:.0f} s, more than {_PAUSED} times as long as the ones before it: "
            f"{seconds - most:.0f} s count as a pause, and not as training"
        )
        return most

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
        gigabytes = DeviceMemory(self.model.device).peak() / 1e9
        return f"loss {point['loss']:.3f}, {gigabytes:.1f} GB, {tokens / seconds:.0f} tokens/s, {share:.0%} of peak"

    def _validate_now(self) -> None:
        """Validate, and keep a copy of the best weights if they are wanted."""
        state = self.state
        assert self._validate is not None
        measured = self._validate()
        if not math.isfinite(measured["loss"]):
            raise self._not_finite(f"the validation loss became {measured['loss']}", state.step)
        state.validation.append({"step": state.step, **measured})
        if state.best == len(state.validation) - 1 and self.settings.keep == "best":
            self._best = [parameter.detach().clone() for parameter in self._parameters]

    def _say_validation(self) -> None:
        """Say what the last validation measured. Its comparison with the rival does not count as training."""
        step, measured = self.state.step, self.state.validation[-1]
        chosen_by = "validation score" if "score" in measured else "probability of the expected answers"
        value = measured.get("score", measured["probability"])
        beside, sentence = ("", "") if self._rival is None else self._rival.said(step)
        self.progress.say(f"step {step}: {chosen_by} {value:.1%}, loss {measured['loss']:.4f}{beside}")
        if sentence:
            self.progress.say(sentence)

    def _warn_of_overfitting(self) -> None:
        """Say that overfitting begins, at the first validation after the lowest that shows it."""
        state = self.state
        rises = state.overfitting
        if not rises or rises[-1].step != state.step or state.best is None:
            return
        now = rises[-1]
        if now.lowest_step != state.validation[-2]["step"]:  # said before
            return
        best = f"of step {state.validation[state.best]['step']:.0f}"
        kept = (
            f"the weights {best} are kept" if self.settings.keep == "best" else f"`keep: best` would keep those {best}"
        )
        self.progress.say(
            f"overfitting at step {state.step}: the validation loss rose from {now.lowest_loss:.3f} (step "
            f"{now.lowest_step}) to {now.loss:.3f} while the training loss fell from "
            f"{now.lowest_training_loss:.3f} to {now.training_loss:.3f}; {kept}"
        )

    def _save(self) -> None:
        tensors = {}
        for number, parameter in enumerate(self._parameters):
            moments = self._optimizer.state[parameter]
            tensors[f"{number}.parameter"] = parameter.detach()
            tensors[f"{number}.exp_avg"], tensors[f"{number}.exp_avg_sq"] = moments["exp_avg"], moments["exp_avg_sq"]
            if self._best is not None:
                tensors[f"{number}.best"] = self._best[number]
        self._checkpoints.save(self.state.step, tensors, asdict(self.state))
        self._saved_step = self.state.step
        self._on_checkpoint(self.state)

    @torch.no_grad()
    def _resume(self) -> TrainerState:
        newest, damaged = self._checkpoints.load()
        for name in damaged:
            instead = "starting over" if newest is None else "resuming from the one before it"
            self.progress.say(f"checkpoint {name} is damaged; {instead}")
        if newest is None:
            return TrainerState()
        tensors, state = newest
        for number, parameter in enumerate(self._parameters):
            kept = {
                name: tensors.like(f"{number}.{name}", parameter)
                for name in ("parameter", "exp_avg", "exp_avg_sq", "best")
                if f"{number}.{name}" in tensors
            }
            parameter.copy_(kept["parameter"])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(state["step"]), device=parameter.device),
                "exp_avg": kept["exp_avg"],
                "exp_avg_sq": kept["exp_avg_sq"],
            }
            if "best" in kept:
                self._best = [*(self._best or []), kept["best"]]
        self.model.parameters_changed()
        self.progress.say(f"resuming from step {state['step']}")
        return TrainerState(**{each.name: state[each.name] for each in fields(TrainerState) if each.name in state})
