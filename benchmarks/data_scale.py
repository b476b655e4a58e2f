"""How building a dataset grows with its rows: rows a second, peak memory, bytes on disk.

    python benchmarks/data_scale.py [--rows 10000 100000] [--near 0.8] [--scan] [--workers N]

Short made-up requests with JSON answers, some repeated, some near one another; each size is built in a process of its
own, so that its peak memory is its own. The limit beside it is this machine's: reading and parsing the same file.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
    from tunesmith.data.build import build_dataset
    from tunesmith.data.settings import DataSettings
    from tunesmith.data.shards import Local
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
    digest = build_dataset(store, chosen, path.parent, engine=Local(workers))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--near", type=float, default=None, help="similarity at which requests are near; none without")
    parser.add_argument("--scan", action="store_true", help="look for personal data and secrets")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(chosen.one, chosen.near, chosen.scan, chosen.workers)))
        return
    for rows in chosen.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            write_rows(path, rows)
            more = [f"--near={chosen.near}"] * (chosen.near is not None) + ["--scan"] * chosen.scan
            more += [f"--workers={chosen.workers}"] * (chosen.workers is not None)
            subprocess.run([sys.executable, __file__, "--one", str(path), *more], check=True)


if __name__ == "__main__":
    main()
