"""An S3 server of moto in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a server that runs inside the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert running.poll() is None, "the S3 server did not start"
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            running.terminate()


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
