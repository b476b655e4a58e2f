"""Checks of training on this machine's device with random bases: each returns what it found, or raises what is wrong.

The same checks run on a CPU, with the tiny base alone.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.core.errors import TunesmithError
from tunesmith.core.messages import Message
from tunesmith.core.progress import Silent
from tunesmith.engines.batch import lay_out
from tunesmith.engines.device import computing_device
from tunesmith.engines.factory import load_model, open_engine
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.native.adapters.lora import LoraModel
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.protocol import Completion, Engine, Generation, Question, TokenScore
from tunesmith.engines.settings import VllmSettings, WeightSettings
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.models.base import Base
from tunesmith.models.export.merging import write_merged
from tunesmith.models.random_llama import random_base, write_weights
from tunesmith.models.weight_files import ADAPTER_FILE, read_adapter_file
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.gpu_check.found import Found, LeftOut, random_rows
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.settings import TrainSettings
from tunesmith.training.spec import TrainingSpec, write_rows
from tunesmith.training.steps import gradients, make_optimizer, update
from tunesmith.training.train import run_training
from tunesmith.training.trainer import Trainer

_KILLED_AT = 5  # steps
# Largest relative differences that are accepted between engines: of a label's log-probability (in nats), and of the
# gradient's norm and of the loss after a step.
_TOLERANCE = {"fp32": (1e-3, 1e-3), "bf16": (0.25, 0.05)}
_RESUMED = 1e-3  # difference of a loss: kernels of a GPU may add in another order from run to run
_SERVED = 0.1  # nats that vLLM's log-probability of a token may differ by, as the export's check accepts it


def parity(work: Path, precision: Literal["fp32", "bf16"]) -> Found:
    """The same adapter on the native engine in fp32, on the CPU, and on hf in a precision: each label's
    log-probability, the gradient, and the loss after one step."""
    base, settings = _tiny(work), TrainSettings(rank=8, learning_rate=1e-3)
    native = LoraModel(base, load_network(base.folder, torch.float32), settings, 0)
    wanted = settings.model_copy(update={"precision": precision})
    hf = LoadedHFModel(base).trainable(wanted, seed=1, state_bytes=16)
    for tensor in (tensor for model in (native, hf) for tensor in model.parameter_groups()[1].tensors):
        torch.nn.init.constant_(tensor, 0.01)  # a start that changes something, or its file would be refused
    native.parameters_changed()
    start = work / "start"
    start.mkdir(exist_ok=True)
    native.save(start)
    tensors = read_adapter_file(start, base=base.digest, fingerprint=base.fingerprint).tensors
    with torch.no_grad():
        for name, parameter in hf.parameters.items():
            parameter.copy_(torch.from_numpy(tensors[f"base_model.model.{name.replace(f'.{hf.adapter}', '')}"]))
    (ours, norm, after), (theirs, other_norm, other_after) = (_step(model, settings) for model in (native, hf))
    nats = float((ours - theirs).abs().max())
    moved = max(abs(other_norm / norm - 1), abs(other_after / after - 1))
    detail = f"labels differ by at most {nats:.1e} nats, gradient and loss after a step by {moved:.1e}"
    if not (nats <= _TOLERANCE[precision][0] and moved <= _TOLERANCE[precision][1]):
        most = " and ".join(f"{each:g}" for each in _TOLERANCE[precision])
        raise TunesmithError(f"{detail}; accepted are {most}")
    return Found(detail, {"label_nats": nats, "step": moved})


def _step(model: TrainableModel, settings: TrainSettings) -> tuple[torch.Tensor, float, float]:
    """Each label's loss, the gradient's norm, and the loss after one step."""
    batch, objective = lay_out(random_rows([40, 25, 60, 33], 320), share=model.shares_prefix), CrossEntropy()
    optimizer, each = make_optimizer(model, settings), model.label_losses(batch).cpu()
    loss = gradients(model, objective, [batch])
    if abs(loss - float(each.mean())) > 1e-3 * abs(loss):
        raise TunesmithError(f"the loss of a step is {loss:.5f}, and the mean of its labels' {float(each.mean()):.5f}")
    norm = update(model, optimizer, settings.learning_rate, clip=1e9)
    return each, norm, float(model.label_losses(batch).mean())


def resume(work: Path) -> Found:
    """A training that is killed by SIGKILL and resumed, against one that is left alone."""
    killed, whole = (_spec(work, name) for name in ("killed", "whole"))
    child = multiprocessing.get_context("spawn").Process(target=train_until_killed, args=(killed.model_dump_json(),))
    child.start()
    child.join()
    if child.exitcode != -signal.SIGKILL:
        raise TunesmithError(f"the training that was to be killed ended with exit code {child.exitcode}")
    said = _Said()
    again, once = (run_training(spec, said, model=load_model(spec.base, "hf")).state.curve for spec in (killed, whole))
    if not any("resuming from step" in line for line in said.lines):
        raise TunesmithError("the killed training began again and did not resume")
    most = max(abs(one["loss"] - other["loss"]) for one, other in zip(again, once, strict=True))
    files = [(spec.work / "result" / ADAPTER_FILE).read_bytes() for spec in (killed, whole)]
    detail = "the same bytes" if files[0] == files[1] else f"losses differ by at most {most:.1e}"
    if most > _RESUMED:
        raise TunesmithError(f"{detail}; accepted is {_RESUMED:g}")
    return Found(f"killed after {_KILLED_AT} steps of {len(once)}: {detail}", {"loss": most})


def train_until_killed(spec: str) -> None:
    """Begin a training in this process, and kill the process after a few steps."""
    told = TrainingSpec.model_validate_json(spec)
    run_training(told, _Killing(), model=load_model(told.base, "hf"))


def qlora(work: Path) -> Found:
    """A training on a base in 4 bits, whose adapter answers afterwards."""
    if find_spec("bitsandbytes") is None:
        raise LeftOut("bitsandbytes is not installed: pip install 'tunesmith[qlora]'")
    model, losses = _trained(_tiny(work), work / "4bit", quantize="4bit")
    if not losses[-1] < 0.95 * losses[0]:
        raise TunesmithError(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}: nothing was learned")
    base, folder = _tiny(work), _saved(model, work / "4bit-adapter")
    engine = load_model(base, "hf").engine()
    engine.load_adapter("adapter", folder)
    engine.generate(_REQUESTS, "adapter")
    return Found(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps", {"loss": losses[-1]})


def export(work: Path) -> Found:
    """A folder with the adapter merged, read back as a base: each label's log-probability against the adapter's."""
    base = _tiny(work)
    model, _ = _trained(base, work / "exported", precision="fp32")
    merged = work / "merged"
    merged.mkdir()
    write_merged(base, _saved(model, work / "adapter"), merged, "fp32")
    again = LoadedHFModel(replace(base, folder=merged)).trainable(
        WeightSettings(precision="fp32"), seed=0, state_bytes=16
    )
    batch = lay_out(random_rows([40, 25], 320), share=False)
    most = float((model.label_losses(batch) - again.label_losses(batch)).abs().max())
    detail = f"the merged folder's labels differ by at most {most:.1e} nats"
    if not most <= _TOLERANCE["fp32"][0]:
        raise TunesmithError(f"{detail}; accepted is {_TOLERANCE['fp32'][0]:g}")
    return Found(detail, {"label_nats": most})


def vllm(work: Path, command: str) -> Found:
    """A vLLM that is started here answers with an adapter, and scores choices as the hf engine does."""
    if shutil.which(os.path.expanduser(shlex.split(command)[0])) is None:
        raise LeftOut(f"the command {shlex.split(command)[0]} is not there: name vLLM's by --vllm")
    base = _tiny(work)
    model, _ = _trained(base, work / "served")
    folder = _saved(model, work / "served-adapter")
    room = ("--gpu-memory-utilization", "0.5") if computing_device().type == "cuda" else ()  # this process has some too
    settings = VllmSettings(
        kind="vllm", start=1, command=command, flags=room, adapters=str(work / "adapters"), start_seconds=240.0
    )
    engines: list[Engine] = [open_engine(base, settings), load_model(base, "hf").engine()]
    for engine in engines:
        engine.load_adapter("adapter", folder)
    answers = [[each.text for each in engine.generate(_REQUESTS, "adapter")] for engine in engines]
    scores = [torch.tensor(engine.choose(_QUESTIONS, "adapter")) for engine in engines]
    nats = float(((scores[0] - scores[1]) / _CHOICE_TOKENS).abs().max())
    same = sum(one == other for one, other in zip(*answers, strict=True))
    detail = f"{same} of {len(_REQUESTS)} answers are those of hf; scores differ by at most {nats:.1e} nats a token"
    if not nats <= _SERVED:
        raise TunesmithError(f"{detail}; accepted is {_SERVED:g}")
    return Found(detail, {"token_nats": nats, "same_answers": same / len(_REQUESTS)})


def answers(work: Path, shape: str) -> Found:
    """Answers with the static cache, for which a GPU compiles a step, and with the dynamic one: how many are the same,
    log-probabilities up to the first token that differs, and tokens a second."""
    device = computing_device()
    if device.type == "cpu" and shape != "tiny":
        raise LeftOut("no GPU is here, and on a CPU nothing is compiled")
    base = random_base(work / shape, shape)
    write_weights(base, device)
    engine = LoadedHFModel(base).engine()
    asked = [replace(each, max_tokens=64, top_logprobs=0) for each in _REQUESTS * 2]
    found: dict[bool, list[Completion]] = {}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for static in (False, True):
        engine.use_static_cache(static)
        for _ in range(2):  # the first time compiles
            began = time.monotonic()
            found[static] = engine.generate(asked)
            seconds[static].append(time.monotonic() - began)
    pairs = list(zip(found[False], found[True], strict=True))
    same = sum(one.text == other.text for one, other in pairs)
    nats = max(_differs(one.scores, other.scores) for one, other in pairs)
    speeds = [sum(each.completion_tokens for each in found[kind]) / seconds[kind][1] for kind in (True, False)]
    detail = f"{speeds[0]:,.0f} tokens/s with the static cache, {speeds[1]:,.0f} with the dynamic one; the first "
    detail += (
        f"answers took {seconds[True][0]:.0f} s; {same} of {len(asked)} are the same, scores within {nats:.1e} nats"
    )
    accepted = _TOLERANCE["bf16" if device.type == "cuda" else "fp32"][0]
    if not nats <= accepted:
        raise TunesmithError(f"{detail}; accepted are {accepted:g}")
    names = ("static_tokens_per_second", "dynamic_tokens_per_second", "token_nats", "same_answers")
    return Found(detail, dict(zip(names, (*speeds, nats, same / len(asked)), strict=True)))


def _differs(one: Sequence[TokenScore], other: Sequence[TokenScore]) -> float:
    """The largest difference of log-probabilities in nats, up to the first token that is not the same."""
    most = 0.0
    for mine, theirs in zip(one, other, strict=False):
        if mine.data != theirs.data:
            break
        most = max(most, abs(mine.logprob - theirs.logprob))
    return most


def _trained(base: Base, work: Path, **weights: Any) -> tuple[TrainableModel, list[float]]:
    """A tiny model that has learned a few rows, and the losses of its steps."""
    settings = TrainSettings(rank=8, learning_rate=1e-2, keep="last", **weights)
    model = LoadedHFModel(base).trainable(settings, seed=0, state_bytes=12)
    plan = [[lay_out(random_rows([40, 25, 60, 33], 320), share=model.shares_prefix)]] * 8
    state = Trainer(model, plan, settings, Checkpoints(work, {})).run()
    return model, [point["loss"] for point in state.curve]


def _saved(model: TrainableModel, folder: Path) -> Path:
    folder.mkdir(parents=True)
    model.save(folder)
    return folder


def _spec(work: Path, name: str) -> TrainingSpec:
    rows, folder = random_rows([40, 25, 60, 33] * 8, 320), work / name
    ids = [str(number) for number in range(len(rows))]
    return TrainingSpec(
        name=name,
        engine="hf",
        base=_tiny(work),
        dataset="random",
        rows=write_rows(folder / "rows.jsonl", ids, rows),
        validation=write_rows(folder / "validation.jsonl", ids[:4], rows[:4]),
        settings=TrainSettings(rank=8, batch=8, epochs=3, learning_rate=1e-3, checkpoint_seconds=1e-6),
        work=folder,
    )


def _tiny(work: Path) -> Base:
    base = random_base(work / "tiny", "tiny")
    write_weights(base, torch.device("cpu"))
    return base


class _Said(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class _Killing(Silent):
    """Kills this process at the start of the training's step after _KILLED_AT."""

    def __init__(self) -> None:
        self._left = _KILLED_AT

    def task(self, title: str, total: float) -> _Killing:
        return self

    def __enter__(self) -> _Killing:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def note(self, text: str) -> None:
        return None

    def advance(self, _amount: float = 1.0) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1


_REQUESTS = [Generation((Message(role="user", content=f"number {number}"),), max_tokens=8) for number in range(8)]
_CHOICES = ("yes", "not")  # of as many bytes, each of which is a token, and the end token
_CHOICE_TOKENS = 4
_QUESTIONS = [Question((Message(role="user", content=f"is it {number}?"),), _CHOICES) for number in range(4)]
