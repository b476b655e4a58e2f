"""Measures whether tests notice changes of the source: one-line changes, each with the tests that reach its line.

    python benchmarks/mutations.py draw --count 150 --output changes.json
    python benchmarks/mutations.py trace changes.json --output reached.json         # one run of all tests
    python benchmarks/mutations.py run changes.json reached.json --output caught.json
    python benchmarks/mutations.py attacks                                          # an hour or more

`draw` picks changes by a fixed seed. `--also TREE` keeps those only that another checkout has too, so that the tests
of two revisions can be compared by the same changes. `trace` runs all tests in a copy of the tree in which each drawn
line reports the test that reaches it, in child processes as well. `run` makes each change in a copy and runs the tests
that reach it, the quickest first, a minute of them at most.

`attacks` shows that each row of `make attack` can fail. `attack_changes.json` names for each row a change that removes
or weakens its defence, and a test of the row that must fail under it. `and`: a second line, where two defences stand
behind each other. `hangs`: the test does not end without its defence, which is the proof.
"""

from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import queue
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60.0  # of tests for each change
_COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.In: (" in ", " not in "), ast.NotIn: (" not in ", " in "),
    ast.Is: (" is ", " is not "), ast.IsNot: (" is not ", " is "),
}  # fmt: skip
_ARITHMETIC = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}

HIT = """
import json, os
_seen = set()
def hit(change):
    key = (change, os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0], os.environ.get("TRACED_FIXTURE", ""))
    if key not in _seen:
        _seen.add(key)
        with open(os.path.join({folder!r}, str(os.getpid())), "a") as file:
            file.write(json.dumps(key) + "\\n")
"""
PLUGIN = """
import os, pytest
@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    if fixturedef.scope == "function":
        return (yield)
    before = os.environ.get("TRACED_FIXTURE")
    os.environ["TRACED_FIXTURE"] = fixturedef.scope + ":" + fixturedef.argname
    try:
        return (yield)
    finally:
        os.environ.pop("TRACED_FIXTURE")
        if before:
            os.environ["TRACED_FIXTURE"] = before
def pytest_collection_finish(session):
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        import json
        with open(os.path.join({folder!r}, "fixtures.json"), "w") as file:
            json.dump({{item.nodeid: sorted(getattr(item, "fixturenames", [])) for item in session.items}}, file)
def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.path.join({folder!r}, "durations"), "a") as file:
            file.write(repr((report.nodeid, report.when, report.outcome, report.duration)) + "\\n")
"""


ROWS = """
import json
def pytest_collection_finish(session):
    marks = [item.get_closest_marker("attack") for item in session.items]
    with open("rows.json", "w") as file:
        json.dump(sorted({" :: ".join(mark.args[:2]) for mark in marks}), file)
"""


def candidates(text: str) -> Iterator[tuple[str, int, str, str]]:
    """(function, line number, line, changed line) of every change of one line that this source admits."""
    lines = text.splitlines()
    tree = ast.parse(text)

    def changed(node: ast.AST, old: str, new: str, start: int, end: int) -> str | None:
        line = lines[node.lineno - 1]
        at = line.find(old, start, end)
        return line[:at] + new + line[at + len(old) :] if at >= 0 else None

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, int, str, str | None]]:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}" if name else child.name
            if name and getattr(child, "lineno", None) == getattr(child, "end_lineno", 0):
                line, at = lines[child.lineno - 1], child.col_offset
                if isinstance(child, ast.Compare) and len(child.ops) == 1:
                    old, new = _COMPARISONS[type(child.ops[0])]
                    yield inner, child.lineno, line, changed(child, old, new, child.left.end_col_offset,
                                                             child.comparators[0].col_offset)  # fmt: skip
                elif isinstance(child, ast.BoolOp):
                    old, new = ("and", "or") if isinstance(child.op, ast.And) else ("or", "and")
                    yield inner, child.lineno, line, changed(child, f" {old} ", f" {new} ",
                                                             child.values[0].end_col_offset,
                                                             child.values[1].col_offset)  # fmt: skip
                elif isinstance(child, ast.BinOp) and type(child.op) in _ARITHMETIC:
                    old, new = _ARITHMETIC[type(child.op)]
                    yield inner, child.lineno, line, changed(child, old, new, child.left.end_col_offset,
                                                             child.right.col_offset)  # fmt: skip
                elif isinstance(child, ast.UnaryOp) and isinstance(child.op, ast.Not):
                    yield inner, child.lineno, line, changed(child, "not ", "", at, child.end_col_offset)
                elif isinstance(child, ast.Constant) and type(child.value) in (int, float, bool):
                    new = str(not child.value) if isinstance(child.value, bool) else repr(child.value + 1)
                    yield inner, child.lineno, line, line[:at] + new + line[child.end_col_offset :]
                elif isinstance(child, ast.Return) and child.value and not isinstance(child.value, ast.Constant):
                    yield inner, child.lineno, line, line[:at] + "return None" + line[child.end_col_offset :]
                elif (
                    isinstance(child, ast.Raise)
                    or (isinstance(child, ast.Expr) and isinstance(child.value, ast.Call))
                    or isinstance(child, ast.Continue | ast.Break)
                ):
                    yield inner, child.lineno, line, line[:at] + "pass" + line[child.end_col_offset :]
            yield from visit(child, inner)

    for function, number, line, new in visit(tree, ""):
        if new is None or new == line or function.rpartition(".")[2][:1].isupper():
            continue
        try:
            ast.parse("\n".join([*lines[: number - 1], new, *lines[number:]]))
        except SyntaxError:
            continue
        yield function, number, line, new


def draw(count: int, seed: int, also: Path | None, skip: list[str]) -> list[dict]:
    """`count` changes in random order: at most one for each line, and every line of the source is as likely."""
    found: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
    for path in sorted((ROOT / "src" / "tunesmith").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if "migrations/versions" in name or any(part in name for part in skip):
            continue
        text = path.read_text()
        seen = collections.Counter(line.strip() for line in text.splitlines())
        for function, _, line, new in candidates(text):
            if seen[line.strip()] == 1 and new not in found[name, function, line]:
                found[name, function, line].append(new)
    chance = random.Random(seed)
    order = sorted(found)
    chance.shuffle(order)
    drawn = []
    for name, function, line in order:
        new = chance.choice(found[name, function, line])
        if also is not None:
            there = also / name
            if not there.exists() or [each.strip() for each in there.read_text().splitlines()].count(line.strip()) != 1:
                continue
        drawn.append({"path": name, "function": function, "line": line.strip(), "changed": new.strip()})
        if len(drawn) == count:
            break
    return drawn


def _place(change: dict, text: str) -> int:
    """The number of the line, from 1. Raises ValueError where it is not there exactly once."""
    numbers = [n for n, line in enumerate(text.splitlines(), 1) if line.strip() == change["line"]]
    if len(numbers) != 1:
        raise ValueError(f"{change['path']}: {change['line']!r} is there {len(numbers)} times")
    return numbers[0]


def _copy(tree: Path) -> Path:
    """A copy of a tree with an environment whose `tunesmith` is the copy's own."""
    folder = Path(tempfile.mkdtemp(prefix="mutations-")) / "tree"
    shutil.copytree(tree, folder, ignore=shutil.ignore_patterns(".venv*", ".git", "_build", "__pycache__", ".*_cache"))
    own = (tree / ".venv").resolve()
    site = next((own / "lib").glob("python3.*")) / "site-packages"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / ".venv")], check=True)
    there = next((folder / ".venv" / "lib").glob("python3.*")) / "site-packages"
    (there / "copy.pth").write_text(f"{folder / 'src'}\nimport site; site.addsitedir({str(site)!r})\n")
    for script in (own / "bin").iterdir():
        target = folder / ".venv" / "bin" / script.name
        if not script.is_file() or target.exists():
            continue
        if script.read_bytes()[:2] == b"#!":
            target.write_text(script.read_text().replace(str(own), str(folder / ".venv")))
            target.chmod(0o755)
        else:
            target.symlink_to(script)
    return folder


def _mark(tree: Path, changes: list[dict], hits: Path) -> None:
    """Let each statement that holds a drawn line report that it was reached."""
    (tree / "src" / "tunesmith" / "_reached.py").write_text(HIT.format(folder=str(hits)))
    by_path: dict[str, list[tuple[int, dict]]] = collections.defaultdict(list)
    for number, change in enumerate(changes):
        by_path[change["path"]].append((number, change))
    for name, here in by_path.items():
        path = tree / name
        text = path.read_text()
        parsed = ast.parse(text)
        for number, change in here:
            line = _place(change, text)
            best: tuple[list, ast.stmt] | None = None
            for node in ast.walk(parsed):
                for _, body in ast.iter_fields(node):
                    if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                        for statement in body:
                            if hasattr(statement, "added"):
                                continue
                            if statement.lineno <= line <= (statement.end_lineno or 0) and (
                                best is None or statement.lineno >= best[1].lineno
                            ):
                                best = (body, statement)
            if best is None:  # as a decorator
                continue
            body, statement = best
            call = ast.parse(f"__import__('tunesmith._reached', fromlist=['hit']).hit({number})").body[0]
            call.added = True  # type: ignore[attr-defined]
            body.insert(body.index(statement), call)
        path.write_text(ast.unparse(ast.fix_missing_locations(parsed)))


def trace(changes: list[dict], tree: Path, arguments: list[str]) -> dict:
    """The tests that reach each change, the seconds of each test, and the tests that failed."""
    folder = _copy(tree)
    hits = folder.parent / "hits"
    hits.mkdir()
    _mark(folder, changes, hits)
    (folder / "traced_tests.py").write_text(PLUGIN.format(folder=str(hits)))
    command = [str(folder / ".venv/bin/python"), "-m", "pytest", "-p", "traced_tests", "-q", *arguments]
    subprocess.run(command, cwd=folder, check=False, env={**os.environ, "PYTHONPATH": str(folder)})
    seconds: collections.Counter[str] = collections.Counter()
    failed = set()
    for line in (hits / "durations").read_text().splitlines():
        name, _, outcome, duration = ast.literal_eval(line)
        seconds[name] += duration
        if outcome == "failed":
            failed.add(name)
    fixtures = json.loads((hits / "fixtures.json").read_text())
    reached: dict[int, set[str]] = collections.defaultdict(set)
    for file in hits.iterdir():
        if file.name.isdigit():
            for line in file.read_text().splitlines():
                change, test, fixture = json.loads(line)
                if test:
                    reached[change].add(test)
                if fixture:
                    scope, _, name = fixture.partition(":")
                    place = test.partition("::")[0]
                    reached[change] |= {
                        other for other, names in fixtures.items()
                        if name in names and (scope == "session" or other.partition("::")[0] == place)
                    }  # fmt: skip
    return {
        "reached": {str(n): sorted(reached[n]) for n in range(len(changes))},
        "seconds": seconds,
        "failed": sorted(failed),
    }


def _quickest(tests: list[str], traced: dict) -> list[str]:
    """At least one test, and as many of the quickest as fit into SECONDS. A fixture of many tests counts once."""
    usable = sorted((traced["seconds"].get(test, 0.0), test) for test in tests if test not in set(traced["failed"]))
    total = list(itertools.accumulate(spent for spent, _ in usable))
    return [test for (_, test), sum_ in zip(usable, total, strict=True) if sum_ <= SECONDS] or [
        t for _, t in usable[:1]
    ]


def _apart(path: str, test: str) -> int:
    """How many folders and files of a source file's path the test's path lacks: the nearest tests run first."""
    return len(set(re.findall(r"[a-z]+", path)) - set(re.findall(r"[a-z]+", test.partition("::")[0])))


def run_one(change: dict, tests: list[str], tree: Path, seconds: float = SECONDS * 4) -> str:
    """ "caught", "missed", "hangs" (counts as caught), "unreached" or "not run"."""
    if not tests:
        return "unreached"
    before: dict[Path, str] = {}
    for one in (change, *([change["and"]] if "and" in change else [])):
        path = tree / one["path"]
        text = path.read_text()
        lines = text.splitlines(keepends=True)
        number = _place(one, text) - 1
        lines[number] = lines[number].replace(one["line"], one["changed"])
        before.setdefault(path, text)
        path.write_text("".join(lines))
    (tree / "chosen.txt").write_text("\n".join(tests))
    command = [str(tree / ".venv/bin/python"), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0"]
    log = tree.parent / "output.txt"
    with log.open("w") as out:
        process = subprocess.Popen([*command, "@chosen.txt"], cwd=tree, stdout=out, stderr=out, start_new_session=True,
                                   env={**os.environ, "CI": "true"})  # fmt: skip
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "hangs"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what its tests started
        process.wait()
        for path, text in before.items():
            path.write_text(text)
    if code not in (0, 1, 2):  # pytest itself failed, which says nothing of the change
        print(log.read_text()[-4000:], file=sys.stderr)
        return "not run"
    return "missed" if code == 0 else "caught"


def run(changes: list[dict], traced: dict, tree: Path, output: Path, workers: int) -> None:
    """Try each change, write what came of it after each, and print the share that was caught."""
    free: queue.Queue[Path] = queue.Queue()
    for _ in range(workers):
        free.put(_copy(tree))
    results: list[dict] = json.loads(output.read_text()) if output.exists() else []
    done = {(each["path"], each["line"], each["changed"]) for each in results}

    def one(number: int) -> dict:
        folder, began = free.get(), time.monotonic()
        try:
            tests = sorted(
                _quickest(traced["reached"][str(number)], traced), key=partial(_apart, changes[number]["path"])
            )
            outcome = run_one(changes[number], tests, folder)
        finally:
            free.put(folder)
        return {
            **changes[number],
            "outcome": outcome,
            "tests": len(tests),
            "seconds": round(time.monotonic() - began, 1),
        }

    todo = [n for n, each in enumerate(changes) if (each["path"], each["line"], each["changed"]) not in done]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for result in pool.map(one, todo):
            results.append(result)
            output.write_text(json.dumps(results, indent=1))
            print(result["outcome"], result["seconds"], result["path"], result["changed"], flush=True)
    counts = collections.Counter(each["outcome"] for each in results)
    caught = counts["caught"] + counts["hangs"]
    print(f"{caught} of {len(results)} changes are caught ({caught / len(results):.1%}): {dict(counts)}")


def attacks(changes: dict[str, dict], tree: Path) -> int:
    """Make the change of each row of `make attack` and run its test; returns how many rows are not shown to fail."""
    folder = _copy(tree)
    (folder / "attack_rows.py").write_text(ROWS)
    command = [str(folder / ".venv/bin/python"), "-m", "pytest", "-p", "attack_rows", "-m", "attack", "-n", "0"]
    subprocess.run([*command, "-q", "--collect-only"], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "PYTHONPATH": str(folder)})  # fmt: skip
    waiting = folder / "tests" / "waiting.py"  # what does not happen without a defence is waited for
    waiting.write_text(waiting.read_text().replace("SECONDS = 600.0", f"SECONDS = {2 * SECONDS}"))
    rows, wrong = json.loads((folder / "rows.json").read_text()), 0
    for row in sorted({*rows, *changes}):
        hangs = changes.get(row, {}).get("hangs", False)
        if row not in changes or row not in rows:
            outcome = "has no change" if row in rows else "is no row any more"
        else:
            try:
                outcome = run_one(changes[row], [changes[row]["test"]], folder, SECONDS * (4 if hangs else 20))
            except ValueError as error:  # the line is another one now
                outcome = str(error)
        wrong += outcome != ("hangs" if hangs else "caught")
        print(f"{outcome}: {row}", flush=True)
    print(f"{wrong} of {len(rows)} rows are not shown to fail")
    return wrong


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("draw")
    one.add_argument("--count", type=int, default=150)
    one.add_argument("--seed", type=int, default=30)
    one.add_argument("--also", type=Path, metavar="TREE")
    one.add_argument("--skip", nargs="*", default=[], metavar="PART", help="parts of paths that are left out")
    for name in ("trace", "run"):
        two = commands.add_parser(name)
        two.add_argument("changes", type=Path)
        two.add_argument("--tree", type=Path, default=ROOT)
        if name == "trace":
            two.add_argument("--pytest", default="", metavar="OPTIONS", help="of pytest, in one string")
        else:
            two.add_argument("traced", type=Path)
            two.add_argument("--workers", type=int, default=2)
    for each in commands.choices.values():
        each.add_argument("--output", type=Path, required=True)
    commands.add_parser("attacks")
    given = parser.parse_args()
    if given.command == "attacks":
        sys.exit(attacks(json.loads((ROOT / "benchmarks" / "attack_changes.json").read_text()), ROOT) > 0)
    if given.command == "draw":
        given.output.write_text(json.dumps(draw(given.count, given.seed, given.also, given.skip), indent=1))
        return
    changes = json.loads(given.changes.read_text())
    if given.command == "trace":
        given.output.write_text(json.dumps(trace(changes, given.tree, shlex.split(given.pytest)), indent=1))
    else:
        run(changes, json.loads(given.traced.read_text()), given.tree, given.output, given.workers)


if __name__ == "__main__":
    main()
