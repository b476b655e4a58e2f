"""How building a dataset grows with its rows: rows a second, minutes, peak memory; with names by the model, too.

    python benchmarks/data_scale.py [--rows 10000 100000 1000000] [--near 0.8] [--scan] [--names 2000] [--workers N]

Short made-up requests with JSON answers, some repeated, some near one another; each size is built in a process of its
own, so that its peak memory is its own. The limit beside it is this machine's: reading and parsing the same file. What
one size costs more than the size before is shown as an exponent: time grows with the rows to that power, 1 is linear.
--scan looks for personal data and secrets by form. --names takes that many rows more, of sentences with names in them,
and looks for these as well; beside it presidio is called with the same model on the same texts, row by row.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from tunesmith.data.privacy.synthetic_pii import MAKERS

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "or")]


def write_rows(path: Path, count: int) -> None:
    """A file of count rows: 1 in 50 a repeat, 1 in 50 near another."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(20_000)]
    said = answer = ""
    with path.open("w") as stream:
        for n in range(count):
            if n % 50 == 4:
                said += " please"
            elif n % 50 != 2:
                said = " ".join(draw.choices(words, k=draw.randint(4, 9)))
            if n % 50 != 2:
                answer = json.dumps({"intent": words[n % 40], "value": said.split()[-1]})
            messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": messages}) + "\n")


def measure(path: Path, near: float | None, scan: bool, workers: int | None) -> dict[str, float | str]:
    """Build one dataset version; returns what it took."""
    from tunesmith.data.building.build import build_dataset
    from tunesmith.data.building.examine import RowRules
    from tunesmith.data.building.shards import LocalRunner
    from tunesmith.data.settings import DataSettings
    from tunesmith.store.store import Store

    began = time.perf_counter()
    with path.open("rb") as stream:
        rows = sum(bool(json.loads(line)) for line in stream)
    parsed = time.perf_counter() - began
    chosen = DataSettings.model_validate(
        {
            "sources": [{"path": path.name, "licence": "CC0-1.0"}],
            "duplicates": {"near": near},
            **({} if scan else {"privacy": {"entities": []}}),
        }
    )
    store = Store(path.parent / "store")
    began = time.perf_counter()
    digest = build_dataset(store, RowRules(chosen), path.parent, runner=LocalRunner(workers))
    seconds = time.perf_counter() - began
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "digest": digest[7:19],
        "rows": rows,
        "seconds": round(seconds, 1),
        "rows/s": round(rows / seconds),
        "x parsing": round(seconds / parsed, 1),
        "peak MB": own // 1024,
        "peak MB of a worker": children // 1024,
        "source MB": path.stat().st_size >> 20,
        **store.record(digest).body["rows"]["removed"],
    }


def show(figures: list[dict]) -> None:
    """A line a size, and the growth from each to the next."""
    print("\nrows       minutes   rows/s   x parsing   peak MB   of a worker   growth of time   of memory")
    before = None
    for one in figures:
        print(
            f"{one['rows']:<11}{one['seconds'] / 60:<10.2f}{one['rows/s']:<9}{one['x parsing']:<12}{one['peak MB']:<10}"
            f"{one['peak MB of a worker']:<14}",
            end="",
        )
        if before is not None:
            more = math.log(one["rows"] / before["rows"])
            powers = (math.log(one[what] / before[what]) / more for what in ("seconds", "peak MB"))
            print("   ".join(f"rows^{power:<9.2f}" for power in powers), end="")
        print()
        before = one


def sentences(count: int) -> list[str]:
    """Short requests as people type them, most with a name, a place or a number in them."""
    draw = random.Random(0)
    forms = (
        "please call {} back on {} about the order",
        "book a table for {} and two guests on Friday",
        "my name is {} and I have moved to {}",
        "turn the lights in the {} down a little",
        "send the invoice for {} to {}, thank you",
        "why was my card declined yesterday evening?",
    )
    makers = [MAKERS[kind] for kind in ("PERSON", "LOCATION", "EMAIL_ADDRESS", "PHONE_NUMBER")]
    made = []
    for number in range(count):
        form = draw.choice(forms)
        values = [makers[0](draw), draw.choice(makers)(draw)]
        made.append(form.format(*values[: form.count("{}")]) + f" ({number})")
    return made


def show_names(count: int) -> None:
    """Rows a second of one core with the spaCy model: the scan as a build runs it, and presidio row by row."""
    from privacy import presidio
    from tunesmith.data.privacy.entities import Finder
    from tunesmith.data.privacy.names import RECOMMENDED
    from tunesmith.data.settings import Privacy

    logging.disable(logging.ERROR)  # presidio's e-mail recogniser asks the network and complains that there is none
    texts = sentences(count)
    finder = Finder(Privacy(model=RECOMMENDED))
    theirs = presidio()
    finder.find(texts[:2])
    theirs(texts[0])
    began = time.process_time()
    found = sum(map(len, finder.find(texts)))
    ours = time.process_time() - began
    began = time.process_time()
    known = sum(len(theirs(text)) for text in texts)
    peer = time.process_time() - began
    print(f"\n{count} rows with names by {RECOMMENDED}, rows/s of one core:")
    print(f"  ours {count / ours:.0f} ({found} found), presidio row by row {count / peer:.0f} ({known} found)")
    print(f"  {peer / ours:.1f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--near", type=float, default=None, help="similarity at which requests are near; none without")
    parser.add_argument("--scan", action="store_true", help="look for personal data and secrets")
    parser.add_argument("--names", type=int, default=2000, help="rows to look for names in; 0 for none")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.one, chosen.near, chosen.scan, chosen.workers)))
        return
    figures = []
    for rows in chosen.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write_rows(path, rows)
            more = [f"--near={chosen.near}"] * (chosen.near is not None) + ["--scan"] * chosen.scan
            more += [f"--workers={chosen.workers}"] * (chosen.workers is not None)
            command = [sys.executable, __file__, "--one", str(path), *more]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(line, end="", flush=True)
            figures.append(json.loads(line))
    show(figures)
    if chosen.names:
        show_names(chosen.names)


if __name__ == "__main__":
    main()
