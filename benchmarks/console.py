"""Measures the console with many versions, requests and viewers, as a table of goals. Takes about five minutes.

    python benchmarks/console.py [--only PART ...]
    python benchmarks/console.py --table               # the table from the results that are kept

It makes a store of 1,000 versions, 100,000 recorded requests and an evaluation of five candidates on 10,000 rows, and
serves it by a process of its own. Results are in results/console.json. benchmarks/console.md describes the parts.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.postgresql_server import moved_to_postgresql, postgresql_server

from console_parts import assets, matrix, pages, viewers
from console_parts.asking import Console, console
from console_parts.many import Made, Size, make
from service_parts import kept
from tunesmith.store.store import Store

RESULTS = "console"
# Part -> what measures it, each with a server of its own. In the order of the table.
PARTS: dict[str, Callable[[Console], kept.Found]] = {
    "pages": pages.measure,
    "postgresql": pages.measure,
    "matrix": matrix.measure,
    "viewers": viewers.measure,
    "assets": assets.measure,
}


@contextlib.contextmanager
def served(part: str, made: Made, folder: Path) -> Iterator[Console]:
    """The server of a part: on PostgreSQL for the one of that name, else on SQLite."""
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        if part == "postgresql":
            url = stack.enter_context(postgresql_server(folder / "sql"))
            moved_to_postgresql(Store(Path(made.root), url=made.url), url).engine.dispose()
            made = dataclasses.replace(made, url=url)
        yield stack.enter_context(console(made, folder))


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    os.environ["TUNESMITH_USER"] = "ann"  # the owner of the store that is made here
    print(kept.machine(), flush=True)
    if not given.table:
        with tempfile.TemporaryDirectory() as folder:
            made = make(Path(folder), Size())
            for part in given.only or PARTS:
                with served(part, made, Path(folder) / part) as where:
                    kept.measured(RESULTS, part, partial(PARTS[part], where))
    kept.print_table(RESULTS, PARTS)


if __name__ == "__main__":
    main()
