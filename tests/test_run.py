"""tests/run.py on small folders of tests: which failures get a second chance, and what is printed at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each fails at its first run only: by an assertion, in a fixture, or since its process ends.
FIRST_TIME = """
import os, pytest
from pathlib import Path

def first(name):
    seen = Path(__file__).parent / f"seen-{name}"
    return not seen.exists() and not seen.write_text("")

@pytest.mark.parametrize("which", WHICH)
def test_at_first(which):
    assert not first(which)

@pytest.fixture
def broken():
    assert not first("broken")

def test_fixture(broken): pass

def test_process():
    if first("process"): os._exit(9)

def test_always(): assert CONDITION
def test_never(): pass

for number in range(MORE):
    exec(f"def test_more_{number}(): assert not first('more-{number}')")
"""


def run(folder: Path, which: list[str], condition: str, *options: str, more: int = 0) -> tuple[int, str]:
    """(exit code, what was printed) of the tests with these parameters, and of so many more."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    text = FIRST_TIME.replace("WHICH", repr(which)).replace("CONDITION", condition).replace("MORE", str(more))
    (folder / "test_few.py").write_text(text)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "tests.run", "-p", "xdist", "-p", "no:cacheprovider", *options, "test_few.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_few_that_pass_alone_are_named_at_the_end(tmp_path: Path) -> None:
    which = ["a [b]::c", *"defghi"]
    code, said = run(tmp_path, which, "True", "--numprocesses", "2", more=2)
    assert code == 0, said
    assert "= 7 passed" in said  # parameters of one function run together
    named = said.partition("failed in parallel, passed alone:\n")[2].split("\n")
    places = [
        *(f"test_at_first[{each}]" for each in which),
        "test_fixture",
        "test_more_0",
        "test_more_1",
        "test_process",
    ]
    assert sorted(named) == ["", *(f"  test_few.py::{place}" for place in places)]


@pytest.mark.slow
def test_one_that_fails_alone_too_fails_the_run(tmp_path: Path) -> None:
    code, said = run(tmp_path, ["a"], "False", "--numprocesses", "2")
    assert code == 1
    assert said.endswith("failed in parallel, and alone too:\n  test_few.py::test_always\n")


@pytest.mark.slow
def test_many_that_fail_do_not_run_again(tmp_path: Path) -> None:
    code, said = run(tmp_path, ["a"], "True", "--numprocesses", "2", "-k", "not process", more=4)
    assert code == 1
    assert said.endswith("6 test functions failed. None runs again: that is for 5 at most.\n")


def test_what_cannot_be_collected_fails_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import nothing_like_this\n")
    code, said = run(tmp_path, [], "True", "-k", "always", "test_broken.py", "--continue-on-collection-errors")
    assert code == 1
    assert "alone" not in said
