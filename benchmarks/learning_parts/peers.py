"""Peers: LoRA by TRL and by LLaMA-Factory, each as its documentation shows it.

Where the documentation leaves a choice open, the peer gets what is faster or learns more here: every linear layer, no
packing of short rows into few steps, no gradient checkpointing, freed pages kept. Their time is that of the training
loop alone, without loading, tokenising and validation. Their adapters answer in our engine, held to the same constraint
as ours.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from engine_parts.curve import bind
from engine_parts.environments import HERE, LLAMAFACTORY, python
from engine_parts.processes import KEEP_PAGES, installed, measured, run
from engine_parts.rows import base
from learning_parts.kept import Figures
from learning_parts.ours import VALIDATED, Bench, scored, trained
from tasks import Split, Task

# https://huggingface.co/docs/trl/peft_integration, with the defaults of SFTConfig.
TRL: Mapping[str, Any] = {
    "rank": 32, "alpha": 16, "dropout": 0.05, "rate": 2e-4, "epochs": 3, "batch": 8, "sampling": "random",
}  # fmt: skip
# examples/train_lora/qwen3_lora_sft.yaml of LLaMA-Factory
LLAMA_FACTORY: Mapping[str, Any] = {
    "rank": 8, "rate": 1e-4, "epochs": 3, "batch": 1, "accumulate": 8, "schedule": "cosine", "warmup": 0.1,
    "shuffle": True, "checkpointing": False,
}  # fmt: skip
TRL_VERSION = "1.16.0"
RECIPES = {"TRL": TRL, "LLaMA-Factory": LLAMA_FACTORY}
EXAMPLES_A_SECOND = 1.0  # for the time that a measurement is said to take


def peer(bench: Bench, who: str, name: str, task: Task, split: Split, **changes: Any) -> Figures | None:
    """Train as a peer does and answer the test requests and the rows to choose by. changes: to its recipe.

    Figures: score, scores, held, seconds and cpu_seconds of the training loop.
    """
    recipe = {**RECIPES[who], **changes}
    version = f"trl=={TRL_VERSION}" if who == "TRL" else LLAMAFACTORY.requirement
    stated = {"task": task.digest, "rows": len(split.train), "recipe": recipe, "version": version}
    minutes = recipe["epochs"] * len(split.train) / EXAMPLES_A_SECOND / 60 + 1

    def measure() -> Figures:
        adapter = bench.work / "peer"
        shutil.rmtree(adapter, ignore_errors=True)
        rows = [
            [*({"role": each.role, "content": each.content} for each in task.messages(asked)),
             {"role": "assistant", "content": said}]
            for asked, said in split.train
        ]  # fmt: skip
        found = _train(who, {**recipe, "rows": rows, "end": str(adapter)})
        timed = {key: round(found[key], 1) for key in ("seconds", "cpu_seconds")}
        return {**timed, **scored(bench, task, split.held[:VALIDATED], bind(bench.loaded.base, adapter))}

    return bench.kept.figures(name, stated, minutes, measure, _absent(who))


def stand_in(bench: Bench, name: str, task: Task, split: Split, rate: float) -> Figures | None:
    """TRL's recipe with another rate, trained by our engine: the same rank, alpha, epochs, batch and schedule.

    What differs: no dropout, which our engine has not; our order of the rows; no line feed learned after an answer.
    """
    recipe = {
        "method": "lora", "rank": TRL["rank"], "alpha": TRL["alpha"], "epochs": TRL["epochs"], "batch": TRL["batch"],
        "learning_rate": rate, "b_rate": 1.0, "schedule": "linear", "warmup": 0.0, "validations": 1,
        "validate_by": "loss", "keep": "last",
    }  # fmt: skip
    return trained(bench, name, task, split, recipe)


def _absent(who: str) -> str | None:
    """Why a peer cannot be measured."""
    if who == "TRL":
        return None if installed("trl") == TRL_VERSION else f"TRL {TRL_VERSION} is not installed"
    return None if python(LLAMAFACTORY) else "LLaMA-Factory is not installed (benchmarks/engine.py --install-peers)"


def _train(who: str, told: dict[str, Any]) -> Figures:
    if who == "TRL":
        return measured("trl", told, KEEP_PAGES)
    own, script = python(LLAMAFACTORY), HERE / "run_llamafactory.py"
    return run([str(own), "-I", str(script)], {**told, "model": str(base().folder)}, KEEP_PAGES)
