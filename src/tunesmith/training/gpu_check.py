"""Checks of training on this machine's device with random bases: each returns what it found, or raises what is wrong.

The same checks run on a CPU, with the tiny base alone.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from tunesmith.core.errors import TunesmithError
from tunesmith.core.messages import Message
from tunesmith.core.progress import Silent
from tunesmith.engines.batch import lay_out
from tunesmith.engines.device import DeviceMemory, computing_device, stated_peak
from tunesmith.engines.factory import load_model, open_engine
from tunesmith.engines.hf.loaded import LoadedHFModel
from tunesmith.engines.native.adapters.lora import LoraModel
from tunesmith.engines.native.network.weights import load_network
from tunesmith.engines.protocol import Completion, Engine, Generation, Question, TokenScore
from tunesmith.engines.settings import VllmSettings, WeightSettings
from tunesmith.engines.training_protocol import TrainableModel
from tunesmith.models.base import INDEX, Base
from tunesmith.models.export.merging import write_merged
from tunesmith.models.random_llama import SHAPES, random_base, write_weights
from tunesmith.models.rendering import Rendered
from tunesmith.models.weight_files import ADAPTER_FILE, read_adapter_file
from tunesmith.training.batches.batch_plan import lay_out_step
from tunesmith.training.checkpoints import Checkpoints
from tunesmith.training.objectives import CrossEntropy
from tunesmith.training.prediction import Memory, read_shapes, training_memory
from tunesmith.training.settings import TrainSettings
from tunesmith.training.spec import TrainingSpec, write_rows
from tunesmith.training.steps import gradients, make_optimizer, update
from tunesmith.training.train import run_training
from tunesmith.training.trainer import Trainer

GIB = 1 << 30
_KILLED_AT = 5  # steps
# Largest relative differences that are accepted between engines: of a label's log-probability (in nats), and of the
# gradient's norm and of the loss after a step.
_TOLERANCE = {"fp32": (1e-3, 1e-3), "bf16": (0.25, 0.05)}
_RESUMED = 1e-3  # difference of a loss: kernels of a GPU may add in another order from run to run
_SERVED = 0.1  # nats that vLLM's log-probability of a token may differ by, as the export's check accepts it
_LONGEST = 2048  # tokens of a row
_STEPS = 6  # of which the first does not count
_OVER = 1.25  # times the predicted memory


class LeftOut(Exception):
    """Why a check cannot run here."""


class Found(NamedTuple):
    """What a check that passed found: one line for a person, and its figures."""

    detail: str
    figures: Mapping[str, float] = {}


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
    batch, objective = lay_out(_rows([40, 25, 60, 33], 320), share=model.shares_prefix), CrossEntropy()
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
    batch = lay_out(_rows([40, 25], 320), share=False)
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


def speed(work: Path, shape: str, quantize: Literal["4bit"] | None, *, mixed: bool = False) -> Found:
    """Unpadded tokens a second, share of the card's peak and peak memory of some steps, and of TRL on the same rows.

    mixed: rows of 16 to 512 tokens, and the same rows padded too; otherwise all have 2,048 (of the tiny base 128).
    """
    device = computing_device()
    if device.type == "cpu" and shape != "tiny":
        raise LeftOut("no GPU is here, and on a CPU it would take hours")
    if quantize and find_spec("bitsandbytes") is None:
        raise LeftOut("bitsandbytes is not installed: pip install 'tunesmith[qlora]'")
    base = random_base(work / shape, shape)
    longest = 128 if shape == "tiny" else _LONGEST
    draw = random.Random(0)
    lengths = [draw.randint(16, 512) for _ in range(_STEPS * 32)] if mixed else [longest] * _STEPS * 4
    rows, each = _rows(lengths, SHAPES[shape]["vocab_size"]), len(lengths) // _STEPS
    steps = [rows[first : first + each] for first in range(0, len(rows), each)]
    precision: Literal["bf16", "fp32"] = "bf16" if device.type == "cuda" else "fp32"
    needs, recompute = _needs(base, device, quantize, precision, longest)
    write_weights(base, device)
    weights = {"quantize": quantize, "recompute": recompute, "precision": precision}
    ours = _our_speed(base, steps, longest, work, weights)
    padded = _our_speed(base, steps, longest, work, weights, padded=True) if mixed else None
    figures, trl = {**ours, "predicted_bytes": needs.total}, "TRL is not installed"
    if find_spec("trl") is not None:
        try:
            theirs = _trl_speed(base, steps, 8 if mixed else 1, quantize, recompute)
            trl = f"TRL {theirs['tokens_per_second']:,.0f} tokens/s, {theirs['peak_bytes'] / GIB:.1f} GiB"
            figures |= {f"trl_{name}": value for name, value in theirs.items()}
        except Exception as error:  # noqa: BLE001 - what it cannot do is no fault of ours
            trl = f"TRL failed: {' '.join(str(error).split())[:100]}"
    detail = f"{ours['tokens_per_second']:,.0f} tokens/s, {_share(ours, recompute)}"
    if device.type == "cuda":
        detail += f"{ours['peak_bytes'] / GIB:.1f} GiB (predicted {needs.total / GIB:.1f})"
        if ours["peak_bytes"] > _OVER * needs.total:
            raise TunesmithError(f"{detail}: more than {_OVER:g} times the prediction")
    if padded is not None:
        figures["padded_tokens_per_second"] = padded["tokens_per_second"]
        ratio = ours["tokens_per_second"] / padded["tokens_per_second"]
        detail = f"{detail.rstrip(', ')}; {ratio:.2f} times the speed of padded rows"
    return Found(f"{detail.rstrip(', ')}; {trl}", figures)


def _needs(base: Base, device: torch.device, quantize: str | None, precision: str, tokens: int) -> tuple[Memory, bool]:
    """The predicted memory of a way that fits, and whether that way computes layers again. Raises LeftOut."""
    shapes, free = read_shapes(base.folder), DeviceMemory(device).available()
    numbers = 2 * (shapes.linear + shapes.rest)
    if not (base.folder / INDEX).is_file() and numbers > shutil.disk_usage(base.folder).free - GIB:
        raise LeftOut(f"random weights take {numbers / GIB:.0f} GiB of disk under TUNESMITH_CACHE")
    for recompute in (False, True) if quantize is None else (True,):
        needs = training_memory(
            shapes, quantized=quantize is not None, precision=precision, rank=16, tokens=tokens, recompute=recompute
        )
        if needs.total < free:
            return needs, recompute
    raise LeftOut(f"it takes {needs.total / GIB:.1f} GiB, and {free / GIB:.1f} are free")


def _our_speed(
    base: Base,
    steps: Sequence[Sequence[Rendered]],
    tokens: int,
    work: Path,
    weights: Mapping[str, Any],
    *,
    padded: bool = False,
) -> dict[str, float]:
    settings = TrainSettings(
        rank=16, learning_rate=1e-4, schedule="constant", keep="last", tokens=tokens, checkpoint_seconds=1e6, **weights
    )
    gc.collect()
    model = LoadedHFModel(base).trainable(settings, seed=0, state_bytes=12)
    if padded:
        model.pad_rows()
    memory = DeviceMemory(model.device)
    plan = [lay_out_step(step, settings.tokens, share=model.shares_prefix) for step in steps]
    memory.reset_peak()
    state = Trainer(model, plan, settings, Checkpoints(work / f"{base.folder.name}-{len(os.listdir(work))}", {})).run()
    seconds = [point["seconds"] for point in state.curve]
    found = _figures(steps, seconds, memory)
    operations = statistics.median(
        sum(map(model.flops, step)) / each for step, each in zip(plan[1:], seconds[1:], strict=True)
    )
    return {**found, "flops_per_second": operations, "loss": state.curve[-1]["loss"]}


def _trl_speed(
    base: Base, steps: Sequence[Sequence[Rendered]], at_once: int, quantize: str | None, recompute: bool
) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    from tunesmith.engines.hf.four_bits import quantization
    from tunesmith.training.trl_steps import trl_steps

    gc.collect()
    device = computing_device()
    memory, gpu = DeviceMemory(device), device.type == "cuda"
    how = {} if quantize is None else {"quantization_config": quantization(torch.bfloat16)}
    model = AutoModelForCausalLM.from_pretrained(
        base.folder, dtype=torch.bfloat16 if gpu else torch.float32, device_map={"": str(device)}, **how
    )
    memory.reset_peak()
    told = {"bf16": gpu, "use_cpu": not gpu, "gradient_checkpointing": recompute, "dataloader_pin_memory": gpu}
    seconds = trl_steps(model, base.folder, steps, rank=16, rate=1e-4, at_once=at_once, **told).seconds
    return _figures(steps, seconds, memory)


def _figures(steps: Sequence[Sequence[Rendered]], seconds: Sequence[float], memory: DeviceMemory) -> dict[str, float]:
    """Without the first step, which sets things up."""
    tokens = [sum(len(row.ids) for row in step) for step in steps]
    each = statistics.median(count / one for count, one in zip(tokens[1:], seconds[1:], strict=True))
    return {"tokens_per_second": each, "peak_bytes": memory.peak()}


def _share(ours: Mapping[str, float], recompute: bool) -> str:
    """The share of the card's stated peak, in words that end in a comma. Attention is left out of the operations."""
    device = computing_device()
    if device.type == "cpu":
        return ""
    card = torch.cuda.get_device_name(device)
    if (peak := stated_peak(card)) is None:
        return f"no MFU (the peak of {card} is not known), "
    name = "of peak with what is computed again" if recompute else "MFU"
    return f"{ours['flops_per_second'] / peak:.0%} {name}, "


def _trained(base: Base, work: Path, **weights: Any) -> tuple[TrainableModel, list[float]]:
    """A tiny model that has learned a few rows, and the losses of its steps."""
    settings = TrainSettings(rank=8, learning_rate=1e-2, keep="last", **weights)
    model = LoadedHFModel(base).trainable(settings, seed=0, state_bytes=12)
    plan = [[lay_out(_rows([40, 25, 60, 33], 320), share=model.shares_prefix)]] * 8
    state = Trainer(model, plan, settings, Checkpoints(work, {})).run()
    return model, [point["loss"] for point in state.curve]


def _saved(model: TrainableModel, folder: Path) -> Path:
    folder.mkdir(parents=True)
    model.save(folder)
    return folder


def _spec(work: Path, name: str) -> TrainingSpec:
    rows, folder = _rows([40, 25, 60, 33] * 8, 320), work / name
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


def _rows(lengths: Sequence[int], vocabulary: int) -> list[Rendered]:
    """Random token ids, all but the first to be learned."""
    draw = random.Random(1)
    return [
        Rendered(tuple(draw.randrange(2, vocabulary) for _ in range(length)), (False, *(True,) * (length - 1)))
        for length in lengths
    ]


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
