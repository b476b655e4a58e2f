"""Programs that tests need beside Python: looked for, and installed where that is possible.

    python -m tests.programs chromium c++ openssl    # as `make test` calls it: installs what is missing, or says so

A test that needs one calls `program("chromium")`. Without it the test is skipped, and the end of the run says so; where
the environment variable CI is `true` it fails.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Program:
    """names: of the executable, the preferred one first. debian: its packages. tests: which tests need it."""

    names: tuple[str, ...]
    debian: tuple[str, ...]
    tests: str


PROGRAMS = {
    "chromium": Program(("chromium", "chromium-browser", "google-chrome"), ("chromium",), "the console's tests"),
    "c++": Program(("g++", "clang++"), ("g++",), "the tests of the compiled kernels"),
    "node": Program(("npm",), ("nodejs", "npm"), "the part of `make test-long` with OpenAI's Node client"),
    "openssl": Program(("openssl",), ("openssl",), "the tests of timestamp authorities"),
}


def find(name: str) -> str | None:
    """The path of a program, if it is installed."""
    found = next(filter(None, map(shutil.which, PROGRAMS[name].names)), None)
    return _browser_of_playwright() if found is None and name == "chromium" else found


def program(name: str) -> str:
    """The path of a program. Skips the test without it, or fails it where CI is `true`."""
    if found := find(name):
        return found
    packages = " ".join(PROGRAMS[name].debian)
    reason = f"{name} is missing: `apt-get install {packages}` as root, or `make test`, which tries to install it"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def _browser_of_playwright() -> str | None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if os.path.exists(path) else None


def _install(missing: list[str]) -> None:
    if os.geteuid() == 0 and shutil.which("apt-get"):
        packages = [package for name in missing for package in PROGRAMS[name].debian]
        print(f"Installing {', '.join(missing)} with apt-get ...", flush=True)
        subprocess.run(["apt-get", "-qq", "update"], check=False)
        for package in packages:  # one that cannot be had keeps no other from being installed
            subprocess.run(["apt-get", "-qq", "install", "-y", "--no-install-recommends", package], check=False)
    if "chromium" in missing and find("chromium") is None:
        print("Installing Chromium with Playwright ...", flush=True)
        subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=False)


def main() -> None:
    """Install those of the named programs that are missing."""
    missing = [name for name in sys.argv[1:] if find(name) is None]
    if missing:
        _install(missing)
    for name in missing:
        if find(name) is None:
            print(f"{name} is missing and could not be installed: {PROGRAMS[name].tests} will be skipped.")


if __name__ == "__main__":
    main()
