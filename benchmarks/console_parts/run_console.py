"""Serves a store and its console with an engine that answers at once, in this process.

python run_console.py '{"root": "...", "url": "sqlite:///...", "base": "sha256:...", "port": 8000, "project": "..."}'
"""

from __future__ import annotations

import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

from tests.server.fake_engine import FakeEngine

from tunesmith.project import Project
from tunesmith.server.app import create_app
from tunesmith.server.listening import DrainingServer
from tunesmith.server.serving import Serving
from tunesmith.store.store import Store


def main(told: dict[str, Any]) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.WARNING)
    project = Project.load(Path(told["project"]))
    project.store = Store(Path(told["root"]), url=told["url"])
    engine = FakeEngine(told["base"])
    app = create_app(Serving(project.store, engine, engine, project=project))
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", told["port"]))
    DrainingServer(app).run(sockets=[listening])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
