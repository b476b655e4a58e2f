"""How much personal data the scan finds, and how fast, beside presidio with its spaCy model as it comes.

    python benchmarks/privacy.py DATA [--write]

DATA: a folder with presidio-research's `data_synth_dataset_v2.json` (MIT; 1,500 texts with 2,863 marked spans). The
patterns were written while looking at the texts of templates with an even number; figures are of those with an odd one.
By character: recall is the share of marked characters that were found as anything, precision the share of found
characters that are marked. Times are of the processor (one thread), since other work shares the machine.

--write puts our figures into the package, where each dataset's record quotes them.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from tunesmith.data.privacy.entities import ALL, Finder
from tunesmith.data.privacy.names import NAME_ENTITIES, RECOMMENDED
from tunesmith.data.settings import Privacy

# What the set calls it -> what we do, where that differs.
GOLD = {"GPE": "LOCATION", "DOMAIN_NAME": "URL"}
REFERENCE = Path(__file__).parents[1] / "src/tunesmith/data/privacy/reference.json"


def marked(row: dict, spans: list[tuple[int, int, str]]) -> tuple[list, list]:
    """For each character what it is marked as, and what it was found as."""
    gold: list = [None] * len(row["full_text"])
    found = list(gold)
    for span in row["spans"]:
        name = GOLD.get(span["entity_type"], span["entity_type"])
        gold[span["start_position"] : span["end_position"]] = [name] * (span["end_position"] - span["start_position"])
    for start, end, name in spans:
        found[start:end] = [name] * (end - start)
    return gold, found


def figures(rows: list[dict], spans: list[list[tuple[int, int, str]]]) -> dict:
    """Recall and precision by character, of all and of each entity."""
    of, hit, said, right = Counter(), Counter(), Counter(), Counter()
    for row, some in zip(rows, spans, strict=True):
        for gold, found in zip(*marked(row, some), strict=True):
            if gold:
                of[gold] += 1
                hit[gold] += found is not None
            if found:
                said[found] += 1
                right[found] += gold is not None
    entities = {
        name: {
            "characters": of[name],
            "recall": round(hit[name] / of[name], 3),
            "precision": round(right[name] / said[name], 3) if said[name] else None,
        }
        for name in sorted(of)
    }
    whole = {"recall": round(hit.total() / of.total(), 3), "precision": round(right.total() / said.total(), 3)}
    return {**whole, "entities": entities}


def presidio():
    """presidio's analyser over the same spaCy model, with all that it runs by default."""
    import spacy
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import SpacyNlpEngine

    from tunesmith.data.privacy.names import _model_folder

    class Loaded(SpacyNlpEngine):
        def __init__(self) -> None:
            super().__init__(models=[{"lang_code": "en", "model_name": RECOMMENDED}])
            self.nlp = {"en": spacy.load(_model_folder(RECOMMENDED))}

    engine = AnalyzerEngine(nlp_engine=Loaded(), supported_languages=["en"])
    return lambda text: [(one.start, one.end, one.entity_type) for one in engine.analyze(text, "en")]


def main() -> None:
    """Print the figures, one line a setup."""
    import logging

    logging.disable(logging.ERROR)  # presidio's e-mail recogniser asks the network and complains that there is none
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder that holds data_synth_dataset_v2.json")
    parser.add_argument("--write", action="store_true", help="put our figures into the package")
    told = parser.parse_args()
    path = told.folder / "data_synth_dataset_v2.json"
    rows = [row for row in json.loads(path.read_text()) if row["template_id"] % 2]
    texts = [row["full_text"] for row in rows]
    peer = presidio()
    peer(texts[0])
    began = time.process_time()
    theirs = [peer(text) for text in texts]
    theirs_ms = (time.process_time() - began) / len(rows) * 1e3
    shown = {"presidio + spaCy, row by row": (figures(rows, theirs), theirs_ms)}
    setups = {}
    for model in (None, RECOMMENDED):
        entities = tuple(name for name in ALL if model or name not in NAME_ENTITIES or name in ("PERSON", "DATE_TIME"))
        finder = Finder(Privacy(model=model, entities=entities))
        finder.find(texts[:2])
        began = time.process_time()
        ours = [[(one.start, one.end, one.entity) for one in found] for found in finder.find(texts)]
        ms = (time.process_time() - began) / len(rows) * 1e3
        setups[model or "patterns"] = figures(rows, ours)
        shown[f"ours, {'with' if model else 'without'} the model"] = (setups[model or "patterns"], ms)
    print(f"{len(rows)} texts of presidio-research-synth, templates with an odd number; by character")
    for name, (one, ms) in shown.items():
        print(f"{name:32} recall {one['recall']:.3f}  precision {one['precision']:.3f}  {ms:.2f} ms a row")
    print(f"rows a second, ours with the model over presidio's: {theirs_ms / ms:.1f}")
    for name, one in setups[RECOMMENDED]["entities"].items():
        print(f"  {name:20} {one['recall']:.3f} of {one['characters']} characters")
    if told.write:
        libraries = ("presidio-analyzer", "spacy", "phonenumbers", "detect-secrets")
        document = {
            "text": f"presidio-research synth_dataset_v2 (MIT), {len(rows)} texts of templates with an odd number",
            "command": "python benchmarks/privacy.py DATA",
            "libraries": {name: version(name) for name in libraries},
            "setups": setups,
        }
        REFERENCE.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
