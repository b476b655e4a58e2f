"""How long it takes to ask four candidates the same held-out requests, here and by transformers' `generate`.

    python benchmarks/evaluation_speed.py [FOLDER] [--rows 700] [--train 1024] [--batch 32]

Zero-shot, few-shot, rag and tuned are asked the published test rows of SNIPS (FOLDER, by default
`../shared/data/snips`) by `tunesmith evaluate`; its time is that of the whole command (loading, answers, scores) after
the training. The peer is given the very prompts and weights: transformers' `generate` in bf16, greedy, in batches with
left padding, the prompts sorted by length so that least is padded, the adapter merged by PEFT; its time is that of
`generate` alone, without loading. How often the two answer alike is printed, and how often right. Nothing else should
be running: with all 700 rows the peer takes most of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from corpora import document
from leakage import FOLDER, snips
from snips_candidates import AT_LENGTH, FEW_SHOT, RETRIEVED, SHORTLY, TOKENS, write_project

GOAL = 1 / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER / "snips")
    parser.add_argument("--rows", type=int, default=700, help="requests, the first of a fixed shuffle")
    parser.add_argument("--train", type=int, default=1024, help="rows to learn once, and to retrieve from")
    parser.add_argument("--batch", type=int, default=32, help="prompts that `generate` is given at once")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.peer is not None:
        print(json.dumps(generated(json.loads(told.peer.read_text(encoding="utf-8")))))
        return
    with tempfile.TemporaryDirectory() as name:
        compare(Path(name), told)


def compare(folder: Path, told: argparse.Namespace) -> None:
    """Make the project, have both answer, print."""
    files = {}
    for part, path, many in (("train", "train.jsonl", told.train), ("validate", "held.jsonl", told.rows)):
        rows = list(zip(*snips(told.folder, part), strict=True))
        random.Random(0).shuffle(rows)
        files[path] = rows[:many]
    sources = [
        {"path": path, "licence": "CC0-1.0", "split": split} for path, split in zip(files, (None, "test"), strict=True)
    ]
    candidates = {
        "zero-shot": AT_LENGTH,
        "few-shot": FEW_SHOT,
        "rag": {**AT_LENGTH, "retrieve": RETRIEVED},
        "tuned": {**SHORTLY, "train": {"method": "lora"}},
    }
    write_project(folder, files, {"sources": sources, "split": {"test": 0, "validation": 0.02}}, candidates)
    document("train", "tuned", "-C", str(folder))
    began = time.perf_counter()
    found = document("evaluate", "-C", str(folder))
    ours = time.perf_counter() - began
    asked = prompts(folder, told.batch)
    (folder / "peer.json").write_text(json.dumps(asked), encoding="utf-8")
    peer = subprocess.run(
        [sys.executable, __file__, "--peer", str(folder / "peer.json")], capture_output=True, text=True, check=False
    )
    if peer.returncode:
        raise SystemExit(peer.stderr)
    given = json.loads(peer.stdout.splitlines()[-1])
    print(f"{found['n']} requests; seconds, of `generate` in batches of {told.batch}")
    print(f"{'candidate':<12}{'here':>9}{'generate':>10}{'ratio':>8}{'alike':>8}{'right here':>12}{'right there':>13}")
    for candidate, part in asked["candidates"].items():
        here = found["prices"][candidate]["seconds_per_1000"] * found["n"] / 1000
        there, texts = given[candidate]["seconds"], given[candidate]["texts"]
        alike = sum(one["text"] == text for one, text in zip(part, texts, strict=True)) / len(texts)
        right = sum(frame(one["wanted"]) == frame(text) for one, text in zip(part, texts, strict=True)) / len(texts)
        ratio = f"1/{there / here:.1f}"
        print(
            f"{candidate:<12}{here:>9.1f}{there:>10.1f}{ratio:>8}{alike:>8.1%}"
            f"{found['candidates'][candidate]['exact_match']['mean']:>12.1%}{right:>13.1%}"
        )
    there = sum(each["seconds"] for each in given.values())
    met = "met" if ours / there <= GOAL else "missed"
    print(f"all four: {ours:.1f} s by the whole command against {there:.1f} s, 1/{there / ours:.1f}; goal 1/8 {met}")


def prompts(folder: Path, batch: int) -> dict[str, Any]:
    """What each candidate was asked, message by message, and answered; the base's folder and the adapter's."""
    from tunesmith.api import Project
    from tunesmith.candidates.candidate import load_candidate
    from tunesmith.core.system.files import write_atomic
    from tunesmith.pipeline.answers import answers
    from tunesmith.pipeline.candidates import answerer
    from tunesmith.pipeline.context import PipelineContext

    chain = PipelineContext(Project.load(folder / "tunesmith.yaml"))
    test = chain.dataset.examples("test")
    asked: dict[str, list[dict[str, Any]]] = {}
    for name in chain.project.settings.candidates:
        record = chain.store.record(answers(chain, name))
        lines = map(json.loads, chain.store.read_blob(record.blobs["answers.jsonl"]).splitlines())
        text = {line["id"]: line["text"] for line in lines}
        found = load_candidate(chain.store, record.parents["candidate"])
        composer = answerer(chain, found).composer
        composed = [composer.conversation(row.request, composer.asked_as) for row in test]
        asked[name] = [
            {
                "messages": [turn.model_dump(exclude_none=True) for turn in turns],
                "text": text[row.id],
                "wanted": row.answer,
            }
            for row, turns in zip(test, composed, strict=True)
        ]
        if found.training is not None:
            for file, blob in chain.store.record(found.training).blobs.items():
                write_atomic(folder / "adapter" / file, chain.store.read_blob(blob))
    return {"base": str(chain.base.folder), "adapter": str(folder / "adapter"), "batch": batch, "candidates": asked}


def generated(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Texts by `generate`, in the order asked, and the seconds it took: by candidate."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(told["base"], padding_side="left")
    found: dict[str, dict[str, Any]] = {}
    for name, rows in told["candidates"].items():
        model = AutoModelForCausalLM.from_pretrained(told["base"], dtype=torch.bfloat16)
        if name == "tuned":
            model = PeftModel.from_pretrained(model, told["adapter"]).merge_and_unload()
        texts = [
            tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False) for row in rows
        ]
        order = sorted(range(len(rows)), key=lambda place: len(texts[place]))
        answers, seconds = [""] * len(rows), 0.0
        for first in range(0, len(order), told["batch"]):
            places = order[first : first + told["batch"]]
            batch = tokenizer(
                [texts[place] for place in places], padding=True, add_special_tokens=False, return_tensors="pt"
            )
            began = time.perf_counter()
            made = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            seconds += time.perf_counter() - began
            new = made[:, batch["input_ids"].shape[1] :]
            for place, text in zip(places, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[place] = text
        found[name] = {"seconds": seconds, "texts": answers}
    return found


def frame(text: str) -> object:
    """An answer as exact_match sees it; None for one that is no JSON."""
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return None


if __name__ == "__main__":
    main()
