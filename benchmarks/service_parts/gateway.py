"""Requests per second through the gateway with an instant engine, and the latency that it adds at half load.

Server and load generator are processes of their own; all have the same client, connections and seconds. "The engine
called directly" is a bare server with the same answer, so that the client's own time is no part of the difference.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fabricate import NAME, OPERATOR, Scene, build_scene

from engine_parts.environments import Peer, install
from engine_parts.report import Line
from service_parts.kept import Found
from service_parts.processes import found_by, free_port, listening, script
from tunesmith.rollout.commands import start
from tunesmith.rollout.controller import advance
from tunesmith.rollout.settings import RolloutSettings
from tunesmith.store.people.tokens import issue_token

LITELLM = Peer("litellm", "litellm[proxy]==1.108.7")
CONNECTIONS, SECONDS, ROUNDS = 32, 6.0, 2
TIMES, P50_MS, P99_MS = 5.0, 1.5, 6.0
KEY = "sk-benchmark"
ANSWERED = "intent"


def measure() -> Found:
    """The lines of throughput and of latency."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rounds: dict[str, list[float]] = {"bare": [], "ours": [], "litellm": []}
        with bare(work) as direct, ours(work) as served, litellm(work) as proxy:
            contenders = {"bare": direct, "ours": served, "litellm": proxy}
            for told in contenders.values():
                ask({**told, "seconds": 1.0})
            for _ in range(ROUNDS):
                for name, told in contenders.items():
                    found = ask(told)
                    print(f"  {name}: {_said(found)}", flush=True)
                    figures.setdefault(name, []).append(found)
                    rounds[name].append(found["per_second"])
        speed = {name: statistics.median(each) for name, each in rounds.items()}
        with bare(work) as direct, ours(work / "again") as served:
            rate = speed["ours"] / 2
            for name, told in {"bare": direct, "ours": served}.items():
                ask({**told, "seconds": 1.0})
                figures[f"{name}, half load"] = found = ask({**told, "rate": rate, "seconds": 2 * SECONDS})
                print(f"  {name} at {rate:.0f} a second: {_said(found)}", flush=True)
    return Found([_throughput(speed), *_latency(figures, rate)], {**figures, "per_second": speed})


def ask(told: dict[str, Any]) -> dict[str, Any]:
    """What the load generator found, in a process of its own."""
    asked = {"connections": CONNECTIONS, "seconds": SECONDS, "must_have": ANSWERED, **told}
    found: dict[str, Any] = found_by(script("load.py", json.dumps(asked)))
    return found


def _said(found: dict[str, Any]) -> str:
    return (
        f"{found['per_second']:.0f} requests/s, p50 {found['p50_ms']:.2f} ms, p99 {found['p99_ms']:.2f} ms, "
        f"{found['failed']} failed {found['first_failures'][:1] or ''}"
    )


@contextlib.contextmanager
def bare(work: Path) -> Iterator[dict[str, Any]]:
    """A server that only answers: what the load generator is told to ask it."""
    port = free_port()
    with listening(script("run_bare.py", "instant", str(port)), port, work / "bare.log"):
        yield asked_of(port, "none")


@contextlib.contextmanager
def ours(work: Path) -> Iterator[dict[str, Any]]:
    """Our server on SQLite, with a champion: what the load generator is told to ask it."""
    work.mkdir(exist_ok=True)
    scene = build_scene(work / "store")
    token = with_champion(scene)
    port = free_port()
    told = {"root": str(scene.store.root), "url": scene.store.url, "base": scene.base, "port": port}
    with listening(script("run_server.py", json.dumps(told)), port, work / "ours.log"):
        yield asked_of(port, token)


def with_champion(scene: Scene) -> str:
    """Make version 1 the champion; returns a token."""
    version = scene.version(1)
    steps = RolloutSettings.model_validate({"steps": [{"setWeight": 100}]}).steps
    begun = start(scene.store, name=NAME, version=version, steps=steps, actor=OPERATOR)
    while advance(scene.store, begun.id).status != "promoted":
        pass
    return issue_token(scene.store, OPERATOR, actor=OPERATOR)


@contextlib.contextmanager
def litellm(work: Path) -> Iterator[dict[str, Any]]:
    """LiteLLM's proxy with a mocked answer and a key: what the load generator is told to ask it."""
    python = install(LITELLM)
    config = work / "litellm.yaml"
    model = {"model": "openai/x", "api_key": "none", "mock_response": '{"intent": "on"}'}
    settings = {"model_list": [{"model_name": NAME, "litellm_params": model}], "general_settings": {"master_key": KEY}}
    config.write_text(json.dumps(settings))
    port = free_port()
    command = [str(python.parent / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    environment = {"LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with listening([*command, "--num_workers", "1"], port, work / "litellm.log", environment, 300):
        yield asked_of(port, KEY)


def asked_of(port: int, token: str, content: str = "switch on the lamp") -> dict[str, Any]:
    """What the load generator is told to ask a server."""
    body = {"model": NAME, "messages": [{"role": "user", "content": content}]}
    return {"url": f"http://127.0.0.1:{port}", "token": token, "body": body}


def _throughput(speed: dict[str, float]) -> Line:
    return Line(
        f"requests/s, 1 process, {CONNECTIONS} connections (the load generator's limit: {speed['bare']:.0f})",
        f"{speed['ours']:.0f}",
        f"LiteLLM proxy {LITELLM.requirement.split('==')[1]}",
        f"{speed['litellm']:.0f}",
        speed["ours"] / speed["litellm"],
        TIMES,
    )


def _latency(figures: dict[str, Any], rate: float) -> list[Line]:
    ours, direct, lines = figures["ours, half load"], figures["bare, half load"], []
    for name, most in (("p50", P50_MS), ("p99", P99_MS)):
        added = ours[f"{name}_ms"] - direct[f"{name}_ms"]
        lines.append(
            Line(
                f"latency added, {name}, at half load ({rate:.0f} requests/s)",
                f"{ours[f'{name}_ms']:.2f} ms",
                "the engine called directly",
                f"{direct[f'{name}_ms']:.2f} ms",
                added,
                most,
                most=True,
                shown=f"+{added:.2f} ms",
                wanted=f"<= {most:g} ms",
            )
        )
    return lines
