"""The loss of each step and what is reached on held-out rows, here and by TRL with PEFT: the same rows in the same
order, the same adapter to begin with, the same schedule, three seeds.

The seed draws the order and the adapter; the rows are the same, so that seeds differ by no more than runs do. "Equal
within noise": the mean difference over the seeds is no larger than the peer's own standard deviation between them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine_parts.decoding import TOKENS
from engine_parts.processes import Figures
from engine_parts.rows import base, rendered


class Compared(NamedTuple):
    """A figure of each seed, here and by the peer. said: equal, better or worse than the peer beyond its noise."""

    ours: float
    peer: float
    difference: float
    noise: float
    said: str

    def __str__(self) -> str:
        return f"{self.difference:+.4g} on average, the peer's seeds {self.noise:.2g} apart: {self.said}"


def compared(ours: Sequence[float], peer: Sequence[float], *, lower_is_better: bool) -> Compared:
    """Paired figures of two seeds or more, by the rule above."""
    differences = [one - other for one, other in zip(ours, peer, strict=True)]
    difference, noise = statistics.mean(differences), statistics.stdev(peer)
    said = "equal within noise"
    if abs(difference) > noise:
        said = "better" if (difference < 0) == lower_is_better else "WORSE"
    return Compared(statistics.mean(ours), statistics.mean(peer), difference, noise, said)


def held_out(told: Figures) -> Figures:
    """told: adapter (folder in PEFT's layout, whoever wrote it), rows. The mean loss of their labels by transformers
    and PEFT in fp32; shares of whole answers and of intents that the embedded engine answers as wanted."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found, folder = base(), Path(told["adapter"])
    plain = AutoModelForCausalLM.from_pretrained(found.folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, str(folder)).eval()
    total, labels = 0.0, 0
    with torch.no_grad():
        for row in rendered(found.folder, told["rows"]):
            ids = torch.tensor(row.ids)
            wanted = torch.where(torch.tensor(row.trained), ids, -100)[1:]
            scores = model(ids[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(scores, wanted, ignore_index=-100, reduction="sum"))
            labels += int((wanted != -100).sum())
    answers = [_object(text) for text in _answers(found, folder, told["rows"])]
    wanted_ones = [_object(row[-1]["content"]) for row in told["rows"]]
    pairs = list(zip(answers, wanted_ones, strict=True))
    return {
        "loss": total / labels,
        "frames": statistics.mean(one is not None and one == other for one, other in pairs),
        "intents": statistics.mean(one is not None and one.get("intent") == other["intent"] for one, other in pairs),
    }


def bind(found: Any, folder: Path) -> Path:
    """A folder with the same adapter, bound to the base: the engine answers with adapters of its own base alone."""
    from safetensors.numpy import load_file

    from tunesmith.models.weight_files import AdapterConfig, save_adapter_file

    bound = folder / "bound"
    bound.mkdir(exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    save_adapter_file(
        bound,
        AdapterConfig(rank=config["r"], alpha=config["lora_alpha"], targets=frozenset(config["target_modules"])),
        tensors,
        base=found.digest,
        fingerprint=found.fingerprint,
    )
    return bound


def _answers(found: Any, folder: Path, rows: Sequence[Any]) -> list[str]:
    from tunesmith.core.messages import Message
    from tunesmith.engines.native.engine import NativeEngine
    from tunesmith.engines.protocol import Generation

    engine = NativeEngine(found)
    engine.load_adapter("trained", bind(found, folder))
    requests = [Generation(tuple(Message(**turn) for turn in row[:-1]), max_tokens=2 * TOKENS) for row in rows]
    return [answer.text for answer in engine.generate(requests, "trained")]


def _object(text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
