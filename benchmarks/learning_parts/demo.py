"""The demo, finished or run now: what it reaches, how long it takes, and what its `rag` candidate costs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from engine_parts.processes import Failed
from engine_parts.report import Line
from learning_parts.kept import Figures
from learning_parts.ours import RECIPE, Bench
from tunesmith.core.digests import digest_file, digest_of

MINUTES, RIGHT, RAG = 10, 0.80, 120


def demo(bench: Bench) -> list[Line]:
    """What the demo's own evaluation says. It is run where it was not; its time counts only where this ran it whole."""
    files = ("tunesmith.yaml", "make_rows.py", "demo.py", "intent.schema.json")
    stated = {name: digest_of(digest_file(bench.demo / name)) for name in files} | {"recipe": RECIPE}
    found = bench.kept.figures("demo", stated, 30, lambda: _measured(bench))
    what = "demo, exactly right on held-out templates"
    if found is None:
        return [Line(what, wanted=f">= {RIGHT:.0%}", lacks="see below")]
    tuned, rival = found["tuned"], found["rival"]
    minutes = found["seconds"] / 60 if found["seconds"] else None
    return [
        Line(what, _percent(tuned), rival["name"], _percent(rival), wanted=f">= {RIGHT:.0%}",
             reached=tuned["mean"] >= RIGHT),
        Line("demo: minutes", "-" if minutes is None else f"{minutes:.1f}", wanted=f"<= {MINUTES}",
             lacks="it was finished before" if minutes is None else None,
             reached=minutes is not None and minutes <= MINUTES),
        Line("demo: rag, seconds for 1,000 requests", f"{found['rag']:.0f}", wanted=f"<= {RAG}",
             reached=found["rag"] <= RAG),
    ]  # fmt: skip


def _measured(bench: Bench) -> Figures:
    fresh, began = not (bench.demo / ".tunesmith").exists(), time.monotonic()
    done = subprocess.run([sys.executable, str(bench.demo / "demo.py")], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"the demo ended with {done.returncode}: {(done.stderr or done.stdout)[-1500:]}")
    seconds = time.monotonic() - began

    def asked(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "tunesmith", *arguments, "--json", "-C", str(bench.demo)]
        return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout))

    shown = asked("evaluate")
    primary, candidates = shown["primary"], shown["candidates"]
    untuned = [name for name in candidates if not shown["tuned"][name]]
    rival = max(untuned, key=lambda name: candidates[name][primary]["mean"])

    def interval(name: str) -> dict[str, Any]:
        return {key: round(candidates[name][primary][key], 4) for key in ("mean", "low", "high")}

    return {
        "seconds": round(seconds) if fresh else None,
        "n": shown["n"],
        "tuned": interval("tuned"),
        "rival": {"name": rival, **interval(rival)},
        "rag": round(shown["prices"]["rag"]["seconds_per_1000"], 1),
    }


def _percent(found: Figures) -> str:
    return f"{found['mean']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"
