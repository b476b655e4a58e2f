"""An S3 server of moto in a process of its own, for tests."""

import contextlib
import os
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.made_once import MadeOnce

# The system chooses the port: one that was free a moment ago may be another process's now. It ends with its owner.
_SERVE = """
import logging, os, sys, time
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
while True:
    os.kill(int(sys.argv[1]), 0)
    time.sleep(1)
"""
_OWNER = "TUNESMITH_TEST_OWNER"
_RUNNING: list[subprocess.Popen[str]] = []


def _start(owner: int | str) -> tuple[subprocess.Popen[str], str]:
    """A server that ends with the process owner, and its URL."""
    command = [sys.executable, "-c", _SERVE, str(owner)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    port = process.stdout.readline().strip()
    assert port, "the S3 server did not start"
    return process, f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a server that runs inside the block."""
    process, url = _start(os.getpid())
    with process:
        try:
            yield url
        finally:
            process.terminate()


def pytest_configure(config: pytest.Config) -> None:
    """The server that all test processes share ends with the process that starts the others."""
    if not hasattr(config, "workerinput"):
        os.environ[_OWNER] = str(os.getpid())


@pytest.fixture(scope="session")
def s3(made_once: MadeOnce) -> str:
    """The URL of a server that all test processes share. Whoever uses it makes buckets of its own."""
    pytest.importorskip("moto", reason="moto is not installed")

    def make(folder: Path) -> None:
        process, url = _start(os.environ[_OWNER])
        _RUNNING.append(process)
        (folder / "url").write_text(url)

    return (made_once("s3", make) / "url").read_text()


def s3_environment(url: str) -> dict[str, str]:
    """Environment variables by which clients use the server at a URL."""
    return {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def create_bucket(url: str, name: str) -> None:
    """Make an empty bucket on the server at a URL."""
    with urllib.request.urlopen(urllib.request.Request(f"{url}/{name}", method="PUT")):  # noqa: S310
        pass


def new_bucket(url: str) -> str:
    """The name of a new bucket on the server at a URL."""
    name = f"b{uuid.uuid4().hex}"
    create_bucket(url, name)
    return name
