"""An S3 server of moto in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

# The system chooses the port: one that was free a moment ago may be another process's now.
_SERVE = """
import logging, threading
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
threading.Event().wait()
"""


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a server that runs inside the block."""
    with subprocess.Popen([sys.executable, "-c", _SERVE], stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            port = running.stdout.readline().strip()
            assert port, "the S3 server did not start"
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
