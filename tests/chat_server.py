"""A real HTTP server on a free port that speaks OpenAI's chat completions, as tests tell it to."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.http_server import answering

# (status, headers, body); a body that is a dict is sent as JSON, bytes as they are.
Reply = tuple[int, dict[str, str], Any]


@dataclass
class ChatServer:
    """url: up to /v1. asked: bodies that came. headers: theirs. reply: what to answer a body with."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    reply: Callable[[dict[str, Any]], Reply] = lambda _body: (200, {}, completion("hello"))


def completion(text: str | None, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """A chat completion's document."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    return {"id": "x", "object": "chat.completion", "model": "m-2026", "choices": [choice], "usage": usage, **more}


@contextlib.contextmanager
def chat_server() -> Iterator[ChatServer]:
    """Run one until the block ends."""
    state, guard = ChatServer(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with guard:
                state.asked.append(body)
                state.headers.append({key.lower(): value for key, value in self.headers.items()})
            status, headers, data = state.reply(body)
            raw = data if isinstance(data, bytes) else json.dumps(data).encode()
            if status == 0:  # hang up without a word
                self.connection.close()
                return
            self.send_response(status)
            for key, value in {"content-type": "application/json", "content-length": str(len(raw)), **headers}.items():
                self.send_header(key, value)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that gave up waiting
                self.end_headers()
                self.wfile.write(raw)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with answering(server) as url:
        state.url = f"{url}/v1"
        yield state
