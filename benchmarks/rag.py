"""Processor time of answering requests behind long prompts of which most differ: the demo's `rag` without retrieval.

    python benchmarks/rag.py [--rows 128] [--answers FILE]

Each prompt has the demo's long system prompt (379 tokens), four random examples and a request, some 550 tokens in all.
Answers follow the demo's schema. Requests are answered together first, then a few one after another, by one thread.
Processor time is stable on a machine that does other work, too. --answers: where to write the answers, to compare
two versions of the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

from engine_parts.rows import EXAMPLE, base, home
from tunesmith.core.messages import Message
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.protocol import Generation

SHOTS, SINGLE, TOKENS = 4, 8, 64


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=128, help="requests that are answered together")
    parser.add_argument("--answers", type=Path, help="write the answers to this file")
    told = parser.parse_args()
    asked = requests(told.rows + SINGLE)
    engine = NativeEngine(base())
    engine.generate(asked[:1])  # compiles the schema and the kernels
    began = time.process_time()
    answers = engine.generate(asked[: told.rows])
    spent = time.process_time() - began
    tokens = [sum(getattr(answer, kind) for answer in answers) for kind in ("prompt_tokens", "completion_tokens")]
    print(f"{tokens[0] / told.rows:.0f} tokens of a prompt, {tokens[1] / told.rows:.1f} of an answer")
    print(f"together: {spent / told.rows * 1000:.1f} s for 1,000 requests")
    for what, most in (("the first token", 1), ("an answer", TOKENS)):
        began = time.process_time()
        single = [engine.generate([replace(each, max_tokens=most)])[0] for each in asked[told.rows :]]
        spent = time.process_time() - began
        made = sum(answer.completion_tokens for answer in single)
        print(f"one after another: {spent / SINGLE * 1000:.0f} ms for {what} ({made / SINGLE:.1f} tokens)")
    answers += single
    if told.answers is not None:
        told.answers.write_text(json.dumps([answer.text for answer in answers], indent=1), encoding="utf-8")


def requests(count: int) -> list[Generation]:
    """Requests of the demo, each behind the long prompt and other requests with their answers."""
    rows = [row[1:] for row in home(1 << 20)]  # without the short prompt
    random.Random(0).shuffle(rows)
    system = {"role": "system", "content": (EXAMPLE / "prompts" / "long.txt").read_text(encoding="utf-8").strip()}
    schema = (EXAMPLE / "intent.schema.json").read_text(encoding="utf-8")
    draw, found = random.Random(1), []
    for row in rows[:count]:
        shots = [turn for shot in draw.sample(rows[count:], SHOTS) for turn in shot]
        turns = tuple(Message(**turn) for turn in (system, *shots, *row[:-1]))
        found.append(Generation(turns, max_tokens=TOKENS, schema=schema))
    return found


if __name__ == "__main__":
    os.environ["TUNESMITH_THREADS"] = "1"
    main()
