"""Compares a training step of the hf engine with a plain loop of transformers and PEFT, and with TRL's SFTTrainer.

    python benchmarks/hf_loop.py [--rounds 5] [--steps 2]

The packaged base in fp32, LoRA of rank 16 on every linear layer, 16 rows of SNIPS a step behind a short prompt. All
contenders get the same rows, in one process, and take turns: a round is so many steps of each. They compute them twice:
in steps of rows of similar length, as this project's trainer makes them, and in steps by chance, as transformers' and
TRL's trainers do. The table shows the median of the rounds' ratios and their spread; where the two orders are compared,
the ratio of all rounds. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine_parts.lines import NO_TRL
from engine_parts.processes import installed
from engine_parts.report import Line, table
from engine_parts.rows import base, rendered, snips_rows

BATCH, RANK, RATE = 16, 16, 1e-3
# Given the rows of some steps: the seconds that each step took.
Contender = Callable[[Sequence[Sequence[Any]]], list[float]]


def ours(found: Any, *, packed: bool) -> Contender:
    """The project's trainer. packed: False computes every row whole and padded, as for families that cannot pack."""
    from tunesmith.engines.hf.engine import LoadedHFModel
    from tunesmith.training.batches.batch_plan import lay_out_steps
    from tunesmith.training.checkpoints import Checkpoints
    from tunesmith.training.objectives import CrossEntropy
    from tunesmith.training.settings import TrainSettings
    from tunesmith.training.trainer import Trainer

    settings = TrainSettings(rank=RANK, learning_rate=RATE, batch=BATCH, schedule="constant", checkpoint_seconds=1e6)
    model = LoadedHFModel(found).trainable(settings, seed=0, state_bytes=16)
    if not packed:
        model._model.packs = False

    def run(steps: Sequence[Sequence[Any]]) -> list[float]:
        plan = [lay_out_steps([step], settings.tokens, share=model.shares_prefix) for step in steps]
        with tempfile.TemporaryDirectory() as work:
            state = Trainer(model, plan, settings, Checkpoints(Path(work), {}), objective=CrossEntropy()).run()
        return [point["seconds"] for point in state.curve]

    return run


def plain(found: Any) -> Contender:
    """What a user of transformers and PEFT writes: rows padded on the right, the model's own loss, clipping, AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32), lora).train()
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def run(steps: Sequence[Sequence[Any]]) -> list[float]:
        seconds = []
        for step in steps:
            began = time.perf_counter()
            longest = max(len(row.ids) for row in step)
            ids, mask = torch.zeros(2, len(step), longest, dtype=torch.long)
            labels = torch.full_like(ids, -100)
            for place, row in enumerate(step):
                read, trains = torch.tensor(row.ids), torch.tensor(row.trained)
                ids[place, : len(read)], mask[place, : len(read)] = read, 1
                labels[place, : len(read)] = torch.where(trains, read, -100)
            model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
        return seconds

    return run


def trl(found: Any) -> Contender:
    """TRL's SFTTrainer with PEFT on the same token ids and labels, padded as it does by itself."""
    import torch
    from transformers import AutoModelForCausalLM

    from engine_parts.trl_steps import trl_steps

    model: Any = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32)
    how = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "dataloader_pin_memory": False}

    def run(steps: Sequence[Sequence[Any]]) -> list[float]:
        nonlocal model
        seconds, _, model = trl_steps(model, found.folder, steps, rank=RANK, rate=RATE, at_once=BATCH, **how)
        return seconds

    return run


def in_turn(contenders: dict[str, Contender], steps: Sequence[Sequence[Any]], each: int) -> dict[str, list[float]]:
    """The seconds of every round, by contender. Each computes a step beforehand, which does not count."""
    for run in contenders.values():
        run(steps[:1])
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for first in range(0, len(steps), each):
        for name, run in contenders.items():
            found[name].append(sum(run(steps[first : first + each])))
    return found


def line(what: str, seconds: dict[str, list[float]], one: str, other: str, goal: float, *, speed: bool = False) -> Line:
    """A ratio of step times, or with speed of tokens/s, which is the inverse on the same tokens."""
    if other not in seconds:
        return Line(what, lacks=NO_TRL)
    pairs = list(zip(seconds[one], seconds[other], strict=True))
    ratios = [theirs / mine if speed else mine / theirs for mine, theirs in pairs]
    middle = statistics.median(ratios)
    return Line(
        what,
        f"{statistics.median(seconds[one]):.2f} s",
        other,
        f"{statistics.median(seconds[other]):.2f} s",
        middle,
        goal,
        most=not speed,
        shown=f"{middle:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})",
        wanted=f"{'>=' if speed else '<='} {goal:g}x",
    )


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of a contender in a round")
    told = parser.parse_args()
    from tunesmith.engines.process import prepare_process
    from tunesmith.training.batches.batch_plan import plan

    threads, found = prepare_process(), base()
    count = told.rounds * told.steps
    rows = rendered(found.folder, snips_rows(BATCH * count))
    planned = [[rows[place] for place in step] for step in plan(rows, BATCH, 0, 0)]
    drawn = [rows[first : first + BATCH] for first in range(0, BATCH * count, BATCH)]
    contenders = {"packed": ours(found, packed=True), "padded": ours(found, packed=False), "plain loop": plain(found)}
    if installed("trl"):
        contenders["TRL"] = trl(found)
    print(f"{threads} threads; {count} steps of {BATCH} rows, {told.steps} a round, {told.rounds} rounds", flush=True)
    by_length = in_turn(contenders, planned, told.steps)
    by_chance = in_turn(contenders, drawn, told.steps)
    # Rounds have other rows in the two orders, and the same rows in all.
    usual = {"packed": [sum(by_length["packed"])]}
    usual |= {name: [sum(seconds)] for name, seconds in by_chance.items() if name != "packed"}
    tokens = sum(len(row.ids) for row in rows)
    for order, measured in (("by length", by_length), ("by chance", by_chance)):
        for name, seconds in measured.items():
            print(f"{name:<12}{order:<12}{tokens / sum(seconds):8.0f} real tokens/s", flush=True)
    print(
        table(
            [
                line("step time", by_length, "packed", "plain loop", 1.02),
                line("step time, padded as the peer", by_length, "padded", "plain loop", 1.02),
                line("step time", by_length, "packed", "TRL", 1.0),
                line("tokens/s, peer's rows by chance", usual, "packed", "plain loop", 1.5, speed=True),
                line("tokens/s, peer's rows by chance", usual, "packed", "TRL", 1.5, speed=True),
                line("tokens/s, rows by length", by_length, "packed", "padded", 1.5, speed=True),
                line("tokens/s, rows by chance", by_chance, "packed", "padded", 1.5, speed=True),
            ]
        )
    )


if __name__ == "__main__":
    sys.exit(main())
