"""evidently's drift by its defaults, in its own environment.

    python run_evidently.py told.json    # {"reference": [{feature: value}, ...], "windows": {name: [rows, ...]}}

Prints {name: how many windows it calls drifted}: by its preset for a dataset, and by any of its columns.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
from evidently import DataDefinition, Dataset, Report
from evidently.presets import DataDriftPreset


def main(told: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Drifted windows by name: whole datasets, any column."""
    warnings.simplefilter("ignore")
    columns = list(told["reference"][0])
    definition = DataDefinition(numerical_columns=columns)
    reference = Dataset.from_pandas(pd.DataFrame(told["reference"]), data_definition=definition)
    found = {}
    for name, windows in told["windows"].items():
        counts = {"windows": len(windows), "dataset": 0, "any_column": 0}
        for window in windows:
            current = Dataset.from_pandas(pd.DataFrame(window), data_definition=definition)
            document = Report([DataDriftPreset()]).run(current, reference).dict()
            drifted = next(one["value"] for one in document["metrics"] if "DriftedColumnsCount" in one["metric_name"])
            counts["dataset"] += drifted["share"] >= 0.5
            counts["any_column"] += drifted["count"] >= 1
        found[name] = counts
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
