"""How good a model gets in the time given, compared with peers, as a table of goals.

    python benchmarks/learning.py [--minutes 30] [--only PART ...]    # goes on where the last run stopped
    python benchmarks/learning.py --minutes 0                          # what is known, here and on other machines

Each measurement is a line of results/learning.jsonl, named by all that it depends on and by the machine, so that short
runs add up; all of it takes about 18 hours on two cores, the last part alone eight. learning.md describes it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from engine_parts.processes import Failed
from engine_parts.report import Line, table
from learning_parts.kept import Kept, machine, read_lines
from learning_parts.ours import Bench
from learning_parts.parts import PARTS
from tasks import FOLDER, ROOT, tasks
from tunesmith.engines.process import prepare_process

RESULTS = Path(__file__).parent / "results" / "learning.jsonl"
WORK = Path(tempfile.gettempdir()) / "tunesmith-learning"


def main() -> None:
    """Measure what is not known yet, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="begin no measurement after so many minutes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--corpora", type=Path, default=FOLDER, help="folder of the public corpora")
    parser.add_argument("--demo", type=Path, default=ROOT / "examples" / "home_intents", help="a finished demo")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for what a killed measurement goes on from")
    given = parser.parse_args()
    here, known = machine(prepare_process()), tasks(given.corpora)
    kept = Kept(RESULTS, given.minutes, here)
    print(here, flush=True)
    print(f"\n{table(_lines(Bench(kept, known, given.corpora, given.work, given.demo), given.only))}")
    if kept.left:
        print("\nnot measured here yet:\n  " + "\n  ".join(kept.left))
    if given.minutes == 0:
        for other in sorted({line["machine"] for line in read_lines(RESULTS)} - {here}):
            bench = Bench(Kept(RESULTS, 0, other), known, given.corpora, given.work, given.demo)
            found = [line for line in _lines(bench, given.only) if line.lacks is None]
            print(f"\n{other}\n\n{table(found) if found else 'no figures with the present defaults'}")


def _lines(bench: Bench, only: Sequence[str]) -> list[Line]:
    """The table's lines: what is known of the bench's machine, and what there is time to measure."""
    kept, lines = bench.kept, list[Line]()
    for name in only:
        began, kept.command = time.perf_counter(), f"python benchmarks/learning.py --only {name}"
        try:
            lines += PARTS[name](bench)
        except Failed as failure:
            lines.append(Line(name, lacks=f"it failed: {str(failure).strip().splitlines()[-1][:200]}"))
            print(f"{name} failed: {failure}", file=sys.stderr, flush=True)
        if (seconds := time.perf_counter() - began) > 1:
            print(f"  [{name}: {seconds:.0f} s]", flush=True)
    return lines


if __name__ == "__main__":
    main()
