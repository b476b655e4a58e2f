"""Runs pytest; where few tests fail, runs each of them once more, alone. Arguments: pytest's.

    python -m tests.run --numprocesses 3

A test that fails in parallel and passes alone does not fail the run. It is named at the very end, so that somebody
mends it (docs/decisions/0043-few-failed-tests-run-again-alone.md).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

MOST = 5  # tests that may fail in parallel; more have a common cause


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

    def alone(self, test: str) -> int:
        """The exit code of a run of one test in a process of its own, with the same options."""
        options = [each for each in self._config.invocation_params.args if each not in self._config.option.file_or_dir]
        command = [sys.executable, "-m", "pytest", *map(str, options), "--numprocesses", "0", "--dist", "no", test]
        return subprocess.run(command, cwd=self.folder, check=False).returncode


def main(arguments: Sequence[str]) -> int:
    """The exit code: pytest's, or 0 where each test that failed passed when it ran alone."""
    recorder = Recorder()
    code = int(pytest.main([*arguments], plugins=[recorder]))
    if code != pytest.ExitCode.TESTS_FAILED or not recorder.collected or not recorder.failed:
        return code
    if len(recorder.failed) > MOST:
        print(f"\n{len(recorder.failed)} tests failed. None runs again: that is for {MOST} at most.")
        return code
    again = [test for test in recorder.failed if recorder.alone(test) != 0]
    if again:
        print("\nfailed in parallel, and alone too:", *again, sep="\n  ")
        return code
    print("\nfailed in parallel, passed alone:", *recorder.failed, sep="\n  ", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
