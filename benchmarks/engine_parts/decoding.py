"""Answering requests: embedded here, by transformers' generate, by vLLM."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_parts.processes import Figures
from engine_parts.rows import base, rendered
from engine_parts.training import RANK, prepared, write

TOKENS = 64  # of an answer at most


def prompts(rows: Sequence[Any]) -> list[list[int]]:
    """The requests' tokens, up to where the answer begins."""
    return [list(row.ids[: row.trained.index(True)]) for row in rendered(base().folder, rows)]


def ours(told: Figures) -> Figures:
    """told: rows, batch. So many requests at once: the next one as soon as one is answered, as vLLM takes them."""
    engine, requests = _ready(told["rows"])
    began = time.perf_counter()
    with ThreadPoolExecutor(told["batch"]) as pool:
        answers = [answer for found in pool.map(lambda each: engine.generate([each]), requests) for answer in found]
    seconds = time.perf_counter() - began
    made = sum(answer.completion_tokens for answer in answers)
    return {"tokens_per_second": made / seconds, "tokens": made}


def mixed(told: Figures) -> Figures:
    """told: rows, together, adapters. Requests of unlike lengths, so many at once; with adapters by as many threads and
    one more."""
    engine, _ = _ready(told["rows"])
    names: list[str | None] = [None, *map(str, range(told["adapters"]))]
    for name in names[1:]:
        lora, _, _ = prepared(told["rows"][:1], 1, rank=RANK)
        with tempfile.TemporaryDirectory() as scratch:
            write(lora, str(Path(scratch) / "adapter"))
            engine.load_adapter(str(name), Path(scratch) / "adapter")
    _, alike = _ready(told["rows"], engine)
    requests = [replace(each, max_tokens=4 + 20 * (place % 4)) for place, each in enumerate(alike)]
    together = told["together"]

    def made(name: str | None, asked: Sequence[Any]) -> int:
        parts = [asked[start : start + together] for start in range(0, len(asked), together)]
        return sum(answer.completion_tokens for part in parts for answer in engine.generate(part, name))

    began = time.perf_counter()
    with ThreadPoolExecutor(len(names)) as pool:
        every = [pool.submit(made, name, requests[place :: len(names)]) for place, name in enumerate(names)]
        tokens = sum(each.result() for each in every)
    return {"tokens_per_second": tokens / (time.perf_counter() - began)}


def _ready(rows: Sequence[Any], engine: Any = None) -> tuple[Any, list[Any]]:
    """An engine that has answered before and no longer has the prompt's keys: computing those is in the time."""
    from tunesmith.core.messages import Message
    from tunesmith.engines.native.engine import NativeEngine
    from tunesmith.engines.protocol import Generation

    engine = engine or NativeEngine(base())
    requests = [Generation(tuple(Message(**turn) for turn in row[:-1]), max_tokens=TOKENS) for row in rows]
    engine.generate(requests[:2])
    engine._prefixes.clear()
    return engine, requests


def generate(told: Figures) -> Figures:
    """told: rows, batch. transformers' own, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base().folder
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    end, ready = tokenizer.eos_token_id, prompts(told["rows"])

    def answer(asked: Sequence[list[int]], tokens: int) -> int:
        given = tokenizer.pad({"input_ids": list(asked)}, return_tensors="pt")
        found = model.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=end)
        return int((found[:, given["input_ids"].shape[1] :] != end).sum())

    answer(ready[:2], 2)
    began = time.perf_counter()
    made = sum(answer(ready[at : at + told["batch"]], TOKENS) for at in range(0, len(ready), told["batch"]))
    return {"tokens_per_second": made / (time.perf_counter() - began), "tokens": made}
