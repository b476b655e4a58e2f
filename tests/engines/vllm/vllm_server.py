"""A server that answers as vLLM 0.32.0 was heard to (vllm_recorded.json), from a tiny model of transformers.

Also a program that takes the arguments of `vllm serve` as far as it needs them.
"""

import argparse
import contextlib
import copy
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

RECORDED = json.loads((Path(__file__).parent / "vllm_recorded.json").read_text())


class FakeVllm:
    """One base, its adapters, and what shall go wrong next."""

    def __init__(self, base: Path, room: int = 1024) -> None:
        self.base, self.room = base, room
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.models: dict[str, Any] = {str(base): self._load(base)}
        self.paths: dict[str, str] = {}
        self.loading = True  # whether adapters may be loaded while it runs
        self.ignore_adapters, self.scores = False, True  # scores: reports the log-probabilities that it is asked for
        self.ends: str | None = "length"  # finish_reason of an answer that has all its tokens
        self.key: str | None = None
        self.faults: list[str] = []  # taken in turn by requests: busy, drop, stall, fail, break
        self.heard: list[tuple[str, Any]] = []
        self.busiest = self._under_way = 0
        self.lock, self._computing = threading.Lock(), threading.Lock()

    def restart(self, base: Path | None = None) -> None:
        """As a new process would: without adapters, perhaps with another model."""
        self.base = base or self.base
        self.models, self.paths = {str(self.base): self._load(self.base)}, {}

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        with self.lock:
            self._under_way += 1
            self.busiest = max(self.busiest, self._under_way)
        try:
            return self._answer(path, body)
        finally:
            with self.lock:
                self._under_way -= 1

    def _answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, self._listed()
        if path == "/tokenize":
            tokens = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            return 200, {**RECORDED["tokenize"]["body"], "tokens": tokens, "count": len(tokens)}
        if path == "/v1/load_lora_adapter" and self.loading:
            return self._adapter(body)
        if path == "/v1/unload_lora_adapter" and self.loading:
            del self.models[body["lora_name"]], self.paths[body["lora_name"]]
            return 200, "Success"
        if path != "/v1/completions":
            return _told("no such path")
        if body["model"] not in self.models:
            return _told("no such model")
        if body["max_tokens"] < 1:
            return _told("bad")
        if "logprob_token_ids" in body:
            return 200, self._score(body)
        return 200, self._complete(body)

    def _load(self, base: Path) -> Any:
        from tunesmith.models.base import loading  # an engine of the same process may load a model, too

        with loading():
            return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def _listed(self) -> dict[str, Any]:
        base, adapter = copy.deepcopy(RECORDED["models with adapter"]["body"]["data"])
        base |= {"id": str(self.base), "root": str(self.base), "max_model_len": self.room}
        adapters = [{**adapter, "id": name, "root": path, "parent": base["id"]} for name, path in self.paths.items()]
        return {"object": "list", "data": [base, *adapters]}

    def _adapter(self, body: Any) -> tuple[int, Any]:
        name, path = body["lora_name"], Path(body["lora_path"])
        if name in self.paths:
            return _told("load again")
        if not path.is_dir():
            return _told("load missing")
        if json.loads((path / "adapter_config.json").read_text())["r"] > 32:
            return _told("load rank")
        from peft import PeftModel  # takes a second, and most servers get no adapter

        model = self._load(self.base)
        self.models[name] = model if self.ignore_adapters else PeftModel.from_pretrained(model, str(path)).eval()
        self.paths[name] = str(path)
        return RECORDED["load"]["status"], RECORDED["load"]["body"]

    @torch.no_grad()
    def _next(self, model: str, ids: list[int]) -> torch.Tensor:
        with self._computing:
            scores: torch.Tensor = self.models[model](torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        return scores

    def _score(self, body: Any) -> dict[str, Any]:
        scores = self._next(body["model"], body["prompt"])
        (token,), best = body["logprob_token_ids"], int(scores.argmax())
        found: dict[str, Any] = copy.deepcopy(RECORDED["score"]["body"])
        top = {f"token_id:{best}": float(scores[best]), f"token_id:{token}": float(scores[token])}
        found["choices"][0]["logprobs"]["top_logprobs"] = [top if self.scores else {}]
        return found

    def _complete(self, body: Any) -> dict[str, Any]:
        ids: list[int] = []
        finish, reason = self.ends, None
        while len(ids) < body["max_tokens"]:
            ids.append(int(self._next(body["model"], [*body["prompt"], *ids]).argmax()))
            text = self.tokenizer.decode(ids, skip_special_tokens=body.get("skip_special_tokens", True))
            stops = [text.index(stop) for stop in body["stop"] if stop in text]
            if ids[-1] in body["stop_token_ids"] or stops:
                text, finish = text[: min(stops, default=len(text))], "stop"
                reason = body["stop"][0] if stops else ids[-1]
                break
        found: dict[str, Any] = copy.deepcopy(RECORDED["complete"]["body"])
        found["choices"][0] |= {"text": text, "finish_reason": finish, "token_ids": ids, "prompt_token_ids": None}
        found["choices"][0]["stop_reason"] = reason
        return found

    def events(self, body: Any) -> Iterator[str]:
        """The recorded events with this answer in them, a token a piece, the end in one of its own."""
        first, _, _, last, done = RECORDED["stream"]["body"].strip().split("\n\n")
        whole = self._complete(body)["choices"][0]
        told = ""
        for place in range(len(whole["token_ids"])):
            text = self.tokenizer.decode(whole["token_ids"][: place + 1], skip_special_tokens=True)
            text = whole["text"] if place + 1 == len(whole["token_ids"]) else text[: len(whole["text"])]
            ready = text.rstrip("�")
            event = json.loads(first.removeprefix("data: "))
            event["choices"][0] |= {"text": ready[len(told) :], "token_ids": [whole["token_ids"][place]]}
            told = ready
            yield f"data: {json.dumps(event)}\n\n"
        event = json.loads(last.removeprefix("data: "))
        event["choices"][0] |= {"text": whole["text"][len(told) :], "finish_reason": whole["finish_reason"]}
        event["choices"][0] |= {"token_ids": [], "stop_reason": whole["stop_reason"]}
        yield f"data: {json.dumps(event)}\n\n"
        yield f"{done}\n\n"


def _told(name: str) -> tuple[int, Any]:
    return RECORDED[name]["status"], RECORDED[name]["body"]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeVllm
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise a body waits 40 ms for the acknowledgement of its headers

    def log_message(self, *_: object) -> None:
        return None

    def do_GET(self) -> None:
        self._handle(None)

    def do_POST(self) -> None:
        self._handle(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _handle(self, body: Any) -> None:
        fake = self.fake
        if self.path == "/health":
            return self._send(200, "")
        with fake.lock:
            fault = fake.faults.pop(0) if fake.faults else None
            fake.heard.append((self.path, body))
        if fake.key is not None and self.headers.get("Authorization") != f"Bearer {fake.key}":
            return self._send(401, {"error": "Unauthorized"})
        if fault == "busy":
            return self._send(503, {"error": {"message": "overloaded"}})
        if fault == "page":
            return self._send(200, "<html>")
        if fault == "fail":
            return self._send(500, {"error": {"message": "EngineCore encountered an issue.", "code": 500}})
        if fault in ("drop", "stall"):
            if fault == "stall":
                self.rfile.read(1)  # until the client leaves
            self.close_connection = True
            return self.connection.close()
        if body and body.get("stream"):
            return self._stream(body, fault)
        return self._send(*fake.answer(self.path, body))

    def _send(self, status: int, answer: Any) -> None:
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, body: Any, fault: str | None) -> None:
        if body["model"] not in self.fake.models:
            return self._send(*_told("no such model"))
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for number, event in enumerate(self.fake.events(body)):
            if fault == "break" and number == 2:
                self.wfile.write(b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n')
                return None
            self.wfile.write(event.encode())
            self.wfile.flush()
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the usual 5, a client that opens more connections at once waits for seconds


@contextlib.contextmanager
def serving(fake: FakeVllm, port: int = 0) -> Iterator[str]:
    """Its URL, while it answers."""
    server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"fake": fake}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    """Serve until the process ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("--port", type=int)
    asked, _ = parser.parse_known_args()
    fake = FakeVllm(asked.base)
    fake.key = os.environ.get("VLLM_API_KEY")
    # As vLLM sets it. With port 0, Linux could give one that another such socket has, and requests would go to either.
    _Server.allow_reuse_port = asked.port != 0
    with serving(fake, asked.port) as url:
        print(url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
