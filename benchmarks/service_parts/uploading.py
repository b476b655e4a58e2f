"""Upload of a file of the largest size, against a bare ASGI application under uvicorn that reads and drops it."""

from __future__ import annotations

import json
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.fabricate import OWNER, build_scene

from engine_parts.processes import Failed
from engine_parts.report import Line
from service_parts.gateway import with_champion
from service_parts.kept import Found
from service_parts.processes import free_port, listening, peak_memory, reset_peak, script
from tunesmith.store.people.tokens import issue_token

BYTES, ROUNDS, SHARE, MEMORY = 512 << 20, 3, 0.6, 200 << 20
_ROW = b'{"messages": [{"role": "user", "content": "switch on the lamp"}, {"role": "assistant", "content": "on"}]}\n'


def measure(size: int = BYTES) -> Found:
    """MB/s of both, and the memory that ours takes more."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        scene = build_scene(work / "store")
        with_champion(scene)
        token = issue_token(scene.store, OWNER, actor=OWNER)
        ports = [free_port(), free_port()]
        told = {"root": str(scene.store.root), "url": scene.store.url, "base": scene.base, "port": ports[0]}
        with (
            listening(script("run_server.py", json.dumps(told)), ports[0], work / "ours.log") as ours,
            listening(script("run_bare.py", "discard", str(ports[1])), ports[1], work / "bare.log"),
        ):
            send(ports[0], token, 1 << 20)
            send(ports[1], token, 1 << 20)
            reset_peak(ours.pid)
            before = peak_memory(ours.pid)
            seconds: dict[str, list[float]] = {"ours": [], "bare": []}
            for _ in range(ROUNDS):
                for name, port in zip(seconds, ports, strict=True):
                    seconds[name].append(send(port, token, size))
            more = peak_memory(ours.pid) - before
    speed = {name: size / statistics.median(each) / 1e6 for name, each in seconds.items()}
    lines = [
        Line(
            f"upload of {size >> 20} MB, MB/s",
            f"{speed['ours']:.0f}",
            "a bare ASGI application that drops it",
            f"{speed['bare']:.0f}",
            speed["ours"] / speed["bare"],
            SHARE,
        ),
        Line(
            "memory more meanwhile",
            f"{more / 1e6:.0f} MB",
            shown="-",
            wanted=f"< {MEMORY >> 20} MB",
            reached=more < MEMORY,
        ),
    ]
    return Found(lines, {"seconds": seconds, "more_memory_bytes": more, "bytes": size})


def send(port: int, token: str, size: int) -> float:
    """Upload a file of a size; returns the seconds until the answer. Raises Failed for anything but 200."""
    head = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    head += b'--b\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
    end = b"\r\n--b--\r\n"
    piece = _ROW * ((1 << 20) // len(_ROW))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        began = time.perf_counter()
        length = len(head) + size + len(end)
        asked = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {length}\r\n"
        connection.sendall(asked.encode() + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + head)
        left = size
        while left:
            part = piece[: min(left, len(piece))]
            connection.sendall(part)
            left -= len(part)
        connection.sendall(end)
        answer: Any = connection.recv(65536)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise Failed(f"the upload was answered {answer[:500]!r}")
        return time.perf_counter() - began
