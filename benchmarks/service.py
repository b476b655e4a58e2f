"""Measures the service: registry, gateway, jobs, uploads, rollouts and drift, next to peers, as a table of goals.

    python benchmarks/service.py [--only PART ...]    # every part but the soak; each one's result is kept
    python benchmarks/service.py --table               # the table from the results that are kept
    python benchmarks/service.py --only soak --minutes 60

Servers, load generators and workers are processes of their own. Peers are installed into environments of their own in
the cache, by their first use. Results are in results/service.json. benchmarks/service.md describes the parts.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from service_parts import kept

RESULTS = "service"
# Part -> its module, whose `measure` gives what was found. In the order of the table.
PARTS = {
    "registry": "large_registry",
    "gateway": "gateway",
    "promote": "promoting",
    "drift": "drifting",
    "jobs": "queued_jobs",
    "upload": "uploading",
    "soak": "soak",
}


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=60, help="of the soak")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    os.environ["TUNESMITH_USER"] = "ann"  # the owner of the stores that are made here
    print(kept.machine(), flush=True)
    for part in [] if given.table else given.only or [part for part in PARTS if part != "soak"]:
        module = importlib.import_module(f"service_parts.{PARTS[part]}")
        kept.measured(RESULTS, part, partial(module.measure, *([given.minutes] if part == "soak" else [])))
    kept.print_table(RESULTS, PARTS)


if __name__ == "__main__":
    main()
