"""How often the toxicity detector is right: on the packaged sentences by kind, and what it flags in ordinary rows.

    python benchmarks/toxicity.py [FOLDER]

FOLDER holds `snips`, `clinc150` and `banking77`, by default `../shared/data`: the share of their requests that is
flagged is shown with the worst ones, to be read. The sentences are half toxic and half such that look it, so that their
share of false flags is far above that of plain rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from corpora import corpora
from leakage import FOLDER
from tunesmith.data.privacy.detection_recall import recall_at_least
from tunesmith.data.quality import toxicity


def show_reference() -> None:
    """Recall and precision on the packaged sentences, and by kind."""
    told = toxicity.measured()
    low = recall_at_least(told["found"], told["toxic"], 0.05)
    print(f"{toxicity.PACKAGE} {toxicity.VERSION}, flagged from {toxicity.AT_LEAST} on")
    print(f"recall {told['recall']:.3f} (at least {low:.3f}, 95%), precision {told['precision']:.3f}, ", end="")
    print(f"false flags {told['false_rate']:.3f}; {told['sentences']} sentences, {told['toxic']} toxic")
    for kind, counts in told["kinds"].items():
        print(f"  {kind:<28}{counts['flagged']:>4} of {counts['sentences']} flagged")
    rows = toxicity.reference()
    rated = toxicity.scores([row["text"] for row in rows])
    print("\nfrom   recall  precision")
    for bound in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        hits = [row["toxic"] for row, score in zip(rows, rated, strict=True) if score >= bound]
        print(f"{bound:<7}{sum(hits) / told['toxic']:.3f}   {sum(hits) / len(hits):.3f}")


def show_rows(name: str, texts: list[str]) -> None:
    """The share of the texts that is flagged, the time, and the worst of them."""
    began = time.perf_counter()
    found = toxicity.worst(texts)
    seconds = time.perf_counter() - began
    flagged = [one for one in found if one[0] >= toxicity.AT_LEAST]
    print(f"\n{name}: {len(flagged)} of {len(texts)} requests ({len(flagged) / len(texts):.2%}), ", end="")
    print(f"{len(texts) / seconds:.0f} a second")
    for score, sentence in sorted(flagged, reverse=True)[:10]:
        print(f"  {score:.2f}  {sentence[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    show_reference()
    for corpus in corpora(parser.parse_args().folder):
        show_rows(corpus.name, [request for request, _ in [*corpus.train, *corpus.held]])


if __name__ == "__main__":
    main()
