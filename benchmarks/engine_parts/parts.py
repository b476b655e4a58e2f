"""The parts of the benchmark: each prints what it measures and returns its lines of the table of goals."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from engine_parts import trl
from engine_parts.curve import Compared, compared
from engine_parts.decoding import TOKENS, prompts
from engine_parts.environments import HERE, LLAMAFACTORY, VLLM, python
from engine_parts.lines import NO_TRL, absent, memory_line, named, speed_line, trainings
from engine_parts.processes import KEEP_PAGES, Contender, Figures, in_turn, installed, measured, median, run
from engine_parts.report import Line
from engine_parts.rows import CORPUS, base, restaurants, snips_rows
from engine_parts.training import RANK, RATE

SHARED_BATCH, BATCH = 8, 16
BATCHES = (32, 64)
SEEDS, CURVE_RATE, HELD = 3, 1e-3, 64
_NO_CORPUS = f"no SNIPS in {CORPUS}"


class Told(NamedTuple):
    """rounds; examples: half the rows of a shared-prompt training, a quarter of others'."""

    rounds: int
    examples: int


def shared(told: Told) -> list[Line]:
    """An adapter behind a shared prompt: examples/s, memory, share of the products' limit."""
    rows = restaurants(2 * told.examples)
    contenders = [_ours(rows, SHARED_BATCH)]
    if installed("trl"):
        contenders += [
            trl.contender(rows, SHARED_BATCH, "trl, as documented"),
            trl.contender(rows, SHARED_BATCH, "trl, pages kept", kept=True),
        ]
    found = trainings(f"LoRA, {len(rows)} rows behind a shared prompt, {SHARED_BATCH} a step", contenders, told.rounds)
    limit = median([measured("limit", {"rows": rows, "batch": SHARED_BATCH}) for _ in range(told.rounds)])
    share = found["tunesmith"]["flops"] / limit["flops"]
    print(
        f"  tunesmith's products, low-rank ones apart: {found['tunesmith']['flops'] / 1e12:.2f} TFLOP/s over the whole "
        f"step; the same products alone, weights laid out before: {limit['flops'] / 1e12:.2f}",
        flush=True,
    )
    lines = [
        speed_line(f"LoRA, shared prompt, examples/s{kept}", found, f"trl, {name}", trl.described(), goal)
        for kept, name, goal in (("", "as documented", 10.0), ("; peer's pages kept", "pages kept", None))
    ]
    lines.append(memory_line("LoRA, shared prompt, peak GB", found, "trl, as documented", trl.described(), 0.4))
    return [
        *lines,
        Line(
            "share of the bf16 GEMM limit",
            f"{found['tunesmith']['flops'] / 1e12:.2f} TFLOP/s",
            "the same products alone",
            f"{limit['flops'] / 1e12:.2f} TFLOP/s",
            shown=f"{share:.0%}",
            wanted=">= 50%",
            reached=share >= 0.5,
        ),
    ]


def short(told: Told) -> list[Line]:
    """An adapter on SNIPS behind a short prompt: the fastest of TRL's settings and LLaMA-Factory."""
    speed, memory = "LoRA, SNIPS, short prompt, examples/s", "LoRA, SNIPS, peak GB"
    if not CORPUS.is_dir():
        return [Line(speed, lacks=_NO_CORPUS), Line(memory, lacks=_NO_CORPUS)]
    rows = snips_rows(4 * told.examples)
    contenders, names = [_ours(rows, BATCH)], []
    print("\nTRL's ways to lay rows out, tried once each (pages kept)", flush=True)
    if installed("trl"):
        best = trl.fastest(rows, BATCH)
        names.append((f"trl, {best.pop('name')}", trl.described()))
        contenders.append(trl.contender(rows, BATCH, names[0][0], kept=True, **best))
    if own := python(LLAMAFACTORY):
        for name, checkpointing in (
            ("llamafactory, as documented", True),
            ("llamafactory, no checkpointing, pages kept", False),
        ):
            names.append((name, named(LLAMAFACTORY)))
            contenders.append(Contender(name, partial(_llamafactory, own, rows, checkpointing)))
    found = trainings(f"LoRA, {len(rows)} rows of SNIPS, {BATCH} a step", contenders, told.rounds)
    there = [(name, label) for name, label in names if name in found]
    lines = []
    missing = [] if installed("trl") else [NO_TRL]
    missing += [] if own else [absent(LLAMAFACTORY)]
    if there:
        fastest, label = max(there, key=lambda each: found[each[0]]["examples_per_second"])
        note = f"; without {', '.join(missing)}" if missing else ""
        lines.append(speed_line(f"{speed} (fastest peer{note})", found, fastest, f"{label}, {_setting(fastest)}", 5.0))
    else:
        lines.append(Line(speed, lacks="; ".join(missing) or "every peer failed"))
    documented = "llamafactory, as documented"
    if documented in found:
        lines.append(memory_line(memory, found, documented, f"{named(LLAMAFACTORY)}, as documented", 0.8))
    else:
        lines.append(Line(memory, lacks="LLaMA-Factory failed" if own else absent(LLAMAFACTORY)))
    return lines


def full(told: Told) -> list[Line]:
    """Every weight trained, beside TRL's own way of doing that: fp32 weights, bf16 by autocast."""
    rows = restaurants(told.examples)
    contenders = [
        Contender("tunesmith", lambda: measured("train", {"rows": rows, "batch": SHARED_BATCH, "full": True}))
    ]
    if installed("trl"):
        contenders += [
            trl.contender(rows, SHARED_BATCH, "trl, as documented", full=True),
            trl.contender(rows, SHARED_BATCH, "trl, pages kept", kept=True, full=True),
        ]
    found = trainings(f"full fine-tuning, {len(rows)} rows, {SHARED_BATCH} a step", contenders, told.rounds)
    key = "tokens_per_second"
    return [
        speed_line(f"full fine-tuning, tokens/s{kept}", found, f"trl, {name}", trl.described(), goal, key)
        for kept, name, goal in (("", "as documented", 2.0), ("; peer's pages kept", "pages kept", None))
    ]


def curve(told: Told) -> list[Line]:
    """Losses and held-out scores of three seeds beside TRL's."""
    what = f"held-out loss, {SEEDS} seeds"
    if not CORPUS.is_dir() or not installed("trl"):
        return [Line(what, lacks=NO_TRL if CORPUS.is_dir() else _NO_CORPUS)]
    count = 8 * told.examples
    rows, held = snips_rows(count), snips_rows(min(HELD, count), "validate")
    print(
        f"\nloss and held-out score, {count} rows of SNIPS once, {BATCH} a step, rate {CURVE_RATE:g} falling linearly; "
        f"{len(held)} held-out rows; each seed its own order and adapter, the same for both",
        flush=True,
    )
    runs: dict[str, list[Figures]] = {"tunesmith": [], "trl": []}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(SEEDS):
            start, place = str(Path(scratch) / f"start-{seed}"), Path(scratch)
            mixed = random.Random(seed).sample(rows, count)
            common = {"rows": mixed, "batch": BATCH, "rate": CURVE_RATE, "seed": seed}
            ends = {name: str(place / f"{name}-{seed}") for name in runs}
            made = {"tunesmith": measured("train", {**common, "start": start, "end": ends["tunesmith"]})}
            made["trl"] = measured("trl", {**common, "start": start, "end": ends["trl"], "labels": True})
            for name, figures in made.items():
                reached = measured("held-out", {"adapter": ends[name], "rows": held})
                runs[name].append({**reached, "curve": figures["losses"]})
            _tell_seed(seed, runs)
    return [
        _compared_line(f"training loss over all steps, {SEEDS} seeds", runs, _all_steps, lower_is_better=True),
        _compared_line(what, runs, lambda figures: float(figures["loss"]), lower_is_better=True),
        _compared_line("held-out whole frames", runs, lambda figures: float(figures["frames"]), lower_is_better=False),
    ]


def _tell_seed(seed: int, runs: dict[str, list[Figures]]) -> None:
    ours, peer = runs["tunesmith"][seed], runs["trl"][seed]
    apart = [abs(one - other) for one, other in zip(ours["curve"], peer["curve"], strict=True)]
    print(
        f"  seed {seed}: first loss {ours['curve'][0]:.4f} and {peer['curve'][0]:.4f}, last {ours['curve'][-1]:.4f} "
        f"and {peer['curve'][-1]:.4f}; steps {statistics.mean(apart):.4f} apart on average, {max(apart):.4f} at most\n"
        f"    held out: loss {ours['loss']:.4f} and {peer['loss']:.4f}, frames {ours['frames']:.1%} and "
        f"{peer['frames']:.1%}, intents {ours['intents']:.1%} and {peer['intents']:.1%}",
        flush=True,
    )


def _all_steps(figures: Figures) -> float:
    return statistics.mean(figures["curve"])  # of the same rows, whatever their order


def _compared_line(
    what: str, runs: dict[str, list[Figures]], figure: Callable[[Figures], float], *, lower_is_better: bool
) -> Line:
    ours, peer = ([figure(each) for each in runs[name]] for name in ("tunesmith", "trl"))
    found: Compared = compared(ours, peer, lower_is_better=lower_is_better)
    print(f"  {what}: {found}", flush=True)
    return Line(
        what,
        f"{found.ours:.4f}",
        trl.described(),
        f"{found.peer:.4f}",
        shown=f"{found.difference:+.4f}",
        wanted=f"within {found.noise:.4f}",
        reached=found.said != "WORSE",
    )


def decoding(told: Told) -> list[Line]:
    """Requests of SNIPS behind a prompt of some 220 tokens, greedy."""
    if not CORPUS.is_dir():
        return [Line("decoding SNIPS, tokens/s", lacks=_NO_CORPUS)]
    every = snips_rows(2 * told.examples + 8, "validate", long=True)
    rows, warm = every[:-8], every[-8:]
    own, lines = python(VLLM), []
    shared_prompt = len(_common(prompts(rows)))
    print(f"\ndecoding {len(rows)} requests behind a prompt of {shared_prompt} tokens, greedy, {TOKENS} tokens at most")
    for batch in BATCHES:
        contenders = [
            Contender("tunesmith", partial(measured, "decode", {"rows": rows, "batch": batch})),
            Contender("transformers", partial(measured, "generate", {"rows": rows, "batch": batch})),
        ]
        if own:
            contenders.append(Contender("vllm", partial(_vllm, own, rows, warm, batch)))
        found = in_turn(contenders, told.rounds)
        told_of = {name: f"{figures['tokens_per_second']:.0f} tokens/s" for name, figures in found.items()}
        print(f"  {batch} at once: {told_of}", flush=True)
        what, key = f"decoding SNIPS, {batch} at once, tokens/s", "tokens_per_second"
        generate = f"transformers {installed('transformers')} generate"
        lines.append(speed_line(what, found, "transformers", generate, 8.0, key))
        if own and "vllm" in found:
            lines.append(speed_line(what, found, "vllm", named(VLLM), 3.0, key))
        else:
            lines.append(Line(f"{what}, beside vLLM", lacks="vLLM failed" if own else absent(VLLM)))
    return lines


def running(told: Told) -> list[Line]:
    """Requests of unlike lengths in one running batch, and of several adapters."""
    rows = (restaurants(64) * 3)[: 3 * told.examples]
    kinds = {
        "in batches of 64 that end before the next begins": (64, 0),
        "in one running batch": (len(rows), 0),
        "in one running batch, a third each of the base and two adapters": (len(rows), 2),
    }
    found = in_turn(
        [
            Contender(name, partial(measured, "mixed", {"rows": rows, "together": together, "adapters": adapters}))
            for name, (together, adapters) in kinds.items()
        ],
        told.rounds,
    )
    print(f"\n{len(rows)} requests of 4 to {TOKENS} tokens")
    for name, figures in found.items():
        print(f"  {name:<65}{figures['tokens_per_second']:.0f} tokens/s", flush=True)
    return []


def rounding(told: Told) -> list[Line]:
    """What bf16 costs, after one step."""
    given = {"rows": restaurants(2 * SHARED_BATCH), "batch": SHARED_BATCH}
    print("\nloss on the second eight rows after one step on the first, from the same adapter")
    for kind, more, name in (
        ("step", {}, "tunesmith, bf16"),
        ("peft step", {"bits": 32}, "PEFT, fp32"),
        ("peft step", {"bits": 16}, "PEFT, bf16 by autocast"),
    ):
        found = measured(kind, {**given, **more})
        print(f"  {name:<24}{found['before']:.4f} before, {found['after']:.4f} after", flush=True)
    return []


def start_up(told: Told) -> list[Line]:
    """How long the command line takes to answer."""
    commands = ([sys.executable, "-m", "tunesmith", "--help"], [sys.executable, "-c", "pass"])
    seconds = [statistics.median(_seconds(command) for _ in range(told.rounds)) for command in commands]
    print(f"\ntunesmith --help {seconds[0]:.2f} s, python -c pass {seconds[1]:.2f} s")
    return []


PARTS: dict[str, Callable[[Told], list[Line]]] = {
    "shared": shared,
    "short": short,
    "full": full,
    "curve": curve,
    "decoding": decoding,
    "running": running,
    "rounding": rounding,
    "start-up": start_up,
}


def _ours(rows: list[Any], batch: int, name: str = "tunesmith", **told: Any) -> Contender:
    return Contender(name, lambda: measured("train", {"rows": rows, "batch": batch, **told}))


def _llamafactory(own: Path, rows: list[Any], checkpointing: bool) -> Figures:
    told = {"rows": rows, "batch": BATCH, "rank": RANK, "rate": RATE, "checkpointing": checkpointing}
    environment = {} if checkpointing else KEEP_PAGES
    return run([str(own), "-I", str(HERE / "run_llamafactory.py")], {**told, "model": str(base().folder)}, environment)


def _vllm(own: Path, rows: list[Any], warm: list[Any], batch: int) -> Figures:
    told = {"prompts": prompts(rows), "warm": prompts(warm), "batch": batch, "tokens": TOKENS}
    return run([str(own), "-I", str(HERE / "run_vllm.py")], {**told, "model": str(base().folder)})


def _common(every: Sequence[Sequence[int]]) -> Sequence[int]:
    """What all begin with."""
    first, last = min(every), max(every)
    same = next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[:same]


def _setting(name: str) -> str:
    return name.split(", ", 1)[1]


def _seconds(command: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began
