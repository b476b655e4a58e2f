"""A server that does nothing: `instant` answers a chat completion at once, `discard` reads an upload and drops it.

python run_bare.py instant 8000    # an asyncio protocol: the load generator's own limit
python run_bare.py discard 8000    # an ASGI application under uvicorn, as a bare server would be written
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

ANSWER = json.dumps({"choices": [{"message": {"role": "assistant", "content": '{"intent": "on"}'}}]}).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER)


class Instant(asyncio.Protocol):
    """Answers each request that has arrived whole. Requests are small, and one at a time."""

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        self.transport, self.data = transport, b""

    def data_received(self, data: bytes) -> None:
        """Answer."""
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        if found and len(body) >= int(head.lower().split(b"content-length:")[1].split(b"\r")[0]):
            self.data = b""
            self.transport.write(HEAD + ANSWER)


async def instant(port: int) -> None:
    """Serve for ever."""
    server = await asyncio.get_running_loop().create_server(Instant, "127.0.0.1", port)
    await server.serve_forever()


async def discard(scope: Any, receive: Any, send: Any) -> None:
    """Read the body and drop it."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"{}"})


if __name__ == "__main__":
    kind, port = sys.argv[1], int(sys.argv[2])
    if kind == "instant":
        asyncio.run(instant(port))
    else:
        import uvicorn

        uvicorn.run(discard, port=port, log_level="warning", access_log=False, lifespan="off")
