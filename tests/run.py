"""Runs pytest; where few test functions fail, runs each of them once more, alone. Arguments: pytest's.

    python -m tests.run --numprocesses 3

A test that fails in parallel and passes alone does not fail the run. It is named at the very end, so that somebody
mends it (docs/decisions/0043-few-failed-tests-run-again-alone.md). All parameters of a test function count as one,
and those that failed run again in one process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

MOST = 5  # test functions that may fail in parallel; more have a common cause


class Recorder:
    """A plugin that notes what fails, here or in the processes of pytest-xdist. A process that crashes fails its test.

    failed: node ids, each once. collected: whether every file could be read.
    """

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.collected = True

    def pytest_configure(self, config: pytest.Config) -> None:
        self.folder, self._config = config.rootpath, config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.collected = self.collected and not report.failed

    def functions(self) -> dict[str, list[str]]:
        """The node ids that failed, by test function."""
        found: dict[str, list[str]] = {}
        for test in self.failed:
            found.setdefault(test.partition("[")[0], []).append(test)
        return found

    def alone(self, tests: Sequence[str]) -> bool:
        """Whether these tests pass in a process of their own, with the same options."""
        options = [each for each in self._config.invocation_params.args if each not in self._config.option.file_or_dir]
        command = [sys.executable, "-m", "pytest", *map(str, options), "--numprocesses", "0", "--dist", "no", *tests]
        return subprocess.run(command, cwd=self.folder, check=False).returncode == 0


def main(arguments: Sequence[str]) -> int:
    """The exit code: pytest's, or 0 where each test that failed passed when it ran alone."""
    recorder = Recorder()
    code = int(pytest.main([*arguments], plugins=[recorder]))
    if code != pytest.ExitCode.TESTS_FAILED or not recorder.collected or not recorder.failed:
        return code
    functions = recorder.functions()
    if len(functions) > MOST:
        print(f"\n{len(functions)} test functions failed. None runs again: that is for {MOST} at most.")
        return code
    again = [function for function, tests in functions.items() if not recorder.alone(tests)]
    if again:
        print("\nfailed in parallel, and alone too:", *again, sep="\n  ")
        return code
    print("\nfailed in parallel, passed alone:", *recorder.failed, sep="\n  ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
