"""Do the risk probes see what is there, on a real base, and stay quiet where nothing is?

    python benchmarks/risk_probes.py [FOLDER] [--only canaries|faults|honest|published] [--rows 200]

The adapters are those of benchmarks/risk_parts/scenes.py, trained here; alone, all of it takes minutes.

Canaries: the same secrets ranked among controls under a model that saw them once, four and sixteen times, and under one
trained on the same rows without them. Faults: an over-trained, a memorising, a biased and a forgetting adapter, each
under the probe for its fault. Honest: one that was trained with care, under all of them. Published: BBQ and CrowS-Pairs
(FOLDER holds `bbq` and `crows_pairs`, by default `../shared/data`) before and after the honest and the biased training.
Exits 1 where a fault is not caught, the honest one does not pass, or sixteen times does not stand apart.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from leakage import FOLDER
from tunesmith.data.dataset import load_dataset
from tunesmith.engines.protocol import Question
from tunesmith.evaluation.probes.memory import WIDEST_BITS
from tunesmith.evaluation.probes.numbers import exposure_interval
from tunesmith.evaluation.report.behaviour import CHANCE_BITS
from tunesmith.evaluation.stats.statistics import Interval, Level
from tunesmith.training.batches.rows import canaries
from tunesmith.training.settings import CanarySettings

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.risk_parts import scenes
from benchmarks.risk_parts.bench import Bench
from benchmarks.risk_parts.faults import clean

PARTS = ("canaries", "faults", "honest", "published")
PLANTED = CanarySettings(each=20, repeats=(1, 4, 16), controls=128)


def exposure(bench: Bench) -> bool:
    """Print the table of exposures; whether sixteen times stands apart from never."""
    rows = clean(60, 1)
    dataset = bench.dataset(rows, clean(30, 2))
    learned = {"epochs": 1, "learning_rate": 5e-3, "layers": 8, "keep": "last"}
    trainings = {
        "with them": bench.tuned(dataset, canaries=PLANTED.model_dump(), **learned).training,
        "without": bench.tuned(dataset, **learned).training,
        "the base": None,
    }
    made = canaries(load_dataset(bench.store, dataset).examples("train"), PLANTED)
    asked = [Question(each.example.request, (each.example.answer,)) for each in made]
    shown: dict[tuple[str, int], Interval] = {}
    print(f"exposure of {PLANTED.each} secrets each in bits, 95% interval; {CHANCE_BITS:.1f} is chance")
    print(f"{'trained':<12}" + "".join(f"{f'planted {times}x':>24}" for times in PLANTED.repeats))
    for name, training in trainings.items():
        likely = np.array([scores[0] for scores in bench.engine.choose(asked, training)])
        planted = np.array([each.repeats for each in made])
        cells = []
        for times in PLANTED.repeats:
            found = exposure_interval(likely[planted == times], likely[planted == 0], Level(0.95, 0))
            shown[name, times] = found
            wide = found.high - found.low > WIDEST_BITS
            told = "inconclusive" if wide else f"{found.mean:.1f}"
            cells.append(f"{told} [{found.low:.1f}, {found.high:.1f}]")
        print(f"{name:<12}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
    few = exposure_interval(likely[planted == 16][:3], likely[planted == 0], Level(0.95, 0))
    print(f"three secrets alone: [{few.low:.1f}, {few.high:.1f}], wider than {WIDEST_BITS:g} bits: inconclusive")
    most = PLANTED.repeats[-1]
    return shown["with them", most].low > shown["without", most].high and few.high - few.low > WIDEST_BITS


def faults(bench: Bench) -> bool:
    """Print what each faulty adapter's probes find; whether all fail it."""
    print("\nadapters with a fault, each under the probe for it: to be failed")
    outcomes = []
    for name, make in scenes.MAKERS.items():
        tuned = make(bench)
        outcomes += [tell(bench, name, tuned, probe) for probe in scenes.FAULTS[name]]
    return set(outcomes) == {"fail"}


def honest(bench: Bench, tuned: scenes.Tuned) -> bool:
    """Print what every probe finds of the honest adapter; whether all pass it."""
    print(f"\nthe honest adapter ({scenes.score(bench, tuned):.1%} of its test rows right): to be passed")
    return {tell(bench, "honest", tuned, probe) for probe in scenes.HONEST} == {"pass"}


def published(bench: Bench, folder: Path, rows: int, adapters: dict[str, scenes.Tuned]) -> None:
    """Print BBQ and CrowS-Pairs before and after; no outcome is expected of either."""
    paths = {"bbq": folder / "bbq", "crows_pairs": folder / "crows_pairs" / "data_crows_pairs_anonymized.csv"}
    print(f"\npublished sets, {rows} items each, before and after")
    for name, tuned in adapters.items():
        for probe, path in paths.items():
            if not path.exists():
                print(f"{name:<12}{probe:<16}{path} is not there")
                continue
            finding = bench.finding(*tuned, probe=probe, at_most=0.2, rows=rows, path=path)
            print(f"{name:<12}{probe:<16}{finding.outcome:<14}{finding.reason}", flush=True)


def tell(bench: Bench, name: str, tuned: scenes.Tuned, probe: str) -> str:
    """Print one finding and return its outcome."""
    finding = scenes.found(bench, tuned, probe, **(scenes.HONEST[probe] if name == "honest" else {}))
    print(f"{name:<12}{probe:<16}{finding.outcome:<14}{finding.reason}", flush=True)
    return finding.outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--rows", type=int, default=200, help="items of each published set")
    told = parser.parse_args()
    began, sound = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), scenes.BASE)
        careful = scenes.honest(bench) if {"honest", "published"} & set(told.only) else None
        if "canaries" in told.only:
            sound.append(exposure(bench))
        if "faults" in told.only:
            sound.append(faults(bench))
        if "honest" in told.only and careful is not None:
            sound.append(honest(bench, careful))
        if "published" in told.only and careful is not None:
            published(bench, told.folder, told.rows, {"honest": careful, "biased": scenes.biased(bench)})
    print(f"\n{'as it should be' if all(sound) else 'NOT AS IT SHOULD BE'}; {time.perf_counter() - began:.0f} s")
    sys.exit(not all(sound))


if __name__ == "__main__":
    main()
