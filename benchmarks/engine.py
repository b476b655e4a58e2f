"""Compares training (speed, memory, loss) and decoding (speed) with peers in one run, as a table of goals.

    python benchmarks/engine.py [--install-peers] [--rounds 3] [--examples 64] [--only PART ...]

Each measurement runs in a separate process. A figure is the median over rounds in which the contenders take turns.
Nothing else should be running. The table says which peers are not installed. benchmarks/engine.md describes the parts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from engine_parts import curve, decoding, rounding, training, trl
from engine_parts.environments import LLAMAFACTORY, VLLM, install, python
from engine_parts.parts import PARTS, Told
from engine_parts.processes import Failed, installed
from engine_parts.report import Line, table

MEASURES = {
    "train": training.train,
    "limit": training.limit,
    "trl": trl.train,
    "held-out": curve.held_out,
    "step": rounding.step,
    "peft step": rounding.peft_step,
    "decode": decoding.ours,
    "generate": decoding.generate,
    "mixed": decoding.mixed,
}


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--examples", type=int, default=64, help="training rows behind a shared prompt; others: 4 times"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--install-peers", action="store_true", help="make the peers' environments first (several GB)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.measure:
        kind, path = told.measure
        print(json.dumps(MEASURES[kind](json.loads(Path(path).read_text()))))
        return
    from tunesmith.engines.native import kernels as native
    from tunesmith.engines.native import runtime
    from tunesmith.engines.process import prepare_process

    threads = prepare_process()
    for peer in (LLAMAFACTORY, VLLM):
        if told.install_peers:
            try:
                install(peer)
            except Failed as failure:
                print(f"{peer.requirement} could not be installed: {failure}")
        print(f"{peer.requirement}: {'installed' if python(peer) else 'NOT installed'}")
    versions = {name: installed(name) for name in ("torch", "transformers", "peft", "trl")}
    print(f"{runtime.describe()} ({native.identity()}), {threads} threads, {versions}", flush=True)
    lines: list[Line] = []
    for name in told.only:
        began = time.perf_counter()
        try:
            lines += PARTS[name](Told(told.rounds, told.examples))
        except Failed as failure:
            lines.append(Line(name, lacks=f"it failed: {str(failure).strip().splitlines()[-1][:200]}"))
            print(f"{name} failed: {failure}", file=sys.stderr, flush=True)
        print(f"  [{name}: {time.perf_counter() - began:.0f} s]", flush=True)
    print(f"\n{table(lines)}")


if __name__ == "__main__":
    main()
