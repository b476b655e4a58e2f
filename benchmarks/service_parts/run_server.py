"""Serves a store with an engine that answers at once, in this process.

python run_server.py '{"root": "...", "url": "sqlite:///...", "port": 8000, "base": "sha256:..."}'
"""

from __future__ import annotations

import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

from tests.server.fake_engine import FakeEngine

from tunesmith.rollout.served_scorers import served_scorers
from tunesmith.server.app import create_app
from tunesmith.server.limits import ServerSettings
from tunesmith.server.listening import DrainingServer
from tunesmith.server.serving import Serving
from tunesmith.store.store import Store


class InstantEngine(FakeEngine):
    """The tests' engine, but it forgets requests."""

    def stream(self, request: Any, adapter: str | None = None) -> Any:
        """One answer."""
        yield from super().stream(request, adapter)
        self.seen.clear()


def _says_weights(request: Any, adapter: str | None) -> str:
    """The request's own text and the weights that answer it."""
    return json.dumps({"intent": request.messages[-1].content, "weights": adapter})


def main(told: dict[str, Any]) -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.WARNING)
    store = Store(Path(told["root"]), url=told["url"])
    engine = InstantEngine(told["base"])
    if told.get("says_weights"):
        engine.answer = _says_weights
    settings = ServerSettings.model_validate({"per_user": 1024, "waiting": 4096, **told.get("settings", {})})
    scorers = served_scorers(("json_valid",), {"type": "object", "required": ["intent"]}, Path())
    app = create_app(Serving(store, engine, engine, settings, scorers=scorers))
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", told["port"]))
    DrainingServer(app).run(sockets=[listening])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
