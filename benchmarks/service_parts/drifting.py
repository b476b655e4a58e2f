"""Drift on clinc150: the share of out-of-scope requests goes from 0 to 5% to 20%; and windows without any.

Features are those that the server records: the request's length, and its similarity to the closest training row. The
monitor sees the newest 500 requests, every 50 requests. evidently gets the same features and windows, by its defaults.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine_parts.environments import Peer, install
from engine_parts.report import Line
from leakage import FOLDER
from service_parts.kept import Found
from service_parts.processes import HERE, found_by
from tunesmith.candidates.retrieval import example_index
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example, example_id
from tunesmith.monitoring.drift import Baseline, ServedRequest, compare, request_features
from tunesmith.monitoring.settings import MonitoringSettings

EVIDENTLY = Peer("evidently", "evidently==0.7.23", also=("pandas<3",))
CORPUS = FOLDER / "clinc150" / "data_data_full.json"
WINDOW, EVERY, WHOLE, WINDOWS, STREAMS, THEIRS, AT_ONCE = 500, 50, 40, 10_000, 200, 60, 1_000
SETTINGS = MonitoringSettings()

Array = NDArray[np.float64]


class Requests(NamedTuple):
    """Features, a row for each request and a column for each name: of the test split, and of requests that come after
    the release, in scope and out of scope."""

    names: list[str]
    measured: Array
    inside: Array
    outside: Array


def measure(windows: int = WINDOWS, streams: int = STREAMS, theirs: int = THEIRS) -> Found:
    """After how many requests a share of 20% is noticed, and how many windows without drift are called drifted."""
    requests, draw = read(), np.random.default_rng(5)
    noticed = [_noticed(requests, draw) for _ in range(streams)]
    false = _false_alarms(requests, draw, windows)
    figures = {"noticed": noticed, "false_alarms": false, "evidently": _evidently(requests, draw, theirs)}
    print(f"  {figures['false_alarms']} {figures['evidently']}", flush=True)
    return Found(_lines(**figures), figures)


def _lines(noticed: list[dict[str, Any]], false_alarms: dict[str, int], evidently: dict[str, Any]) -> list[Line]:
    alpha, peer = 1 - SETTINGS.confidence, f"evidently {EVIDENTLY.requirement.split('==')[1]}, any column"
    after = [one["after_20_percent"] for one in noticed]
    in_time = sum(one is not None and one <= WINDOW for one in after)
    worst = max((one for one in after if one is not None), default=0)
    windows, alarms = false_alarms["windows"], false_alarms["alarms"]
    theirs = {share: f"{found['any_column']} of {found['windows']} windows" for share, found in evidently.items()}
    return [
        Line(
            f"clinc150: streams whose 20% out of scope are noticed within {WINDOW} requests",
            f"{in_time} of {len(noticed)}, the last after {worst}",
            peer,
            theirs["20%"],
            shown="-",
            wanted=f">= {1 - alpha:.0%}",
            reached=in_time >= (1 - alpha) * len(noticed),
        ),
        Line(
            f"false alarms in {windows:,} windows of {WINDOW} requests without drift",
            f"{alarms} ({alarms / windows:.2%})",
            peer,
            theirs["none"],
            shown="-",
            wanted=f"<= {alpha:.0%}",
            reached=alarms <= alpha * windows,
        ),
        Line(
            f"drift called at 5% out of scope, {len(noticed)} streams",
            str(sum(one["before"] for one in noticed)),
            peer,
            theirs["5%"],
            shown="-",
            wanted="-",
        ),
    ]


def read() -> Requests:
    """The features of clinc150's rows: `test` is the test split, `val` and `oos_test` come after the release."""
    corpus = json.loads(CORPUS.read_text())
    index = example_index([_example(text, intent) for text, intent in corpus["train"]])

    def features(split: str) -> list[dict[str, float]]:
        asked = [(Message(role="user", content=text),) for text, _ in corpus[split]]
        return [request_features(one, lambda messages: index.similarity(messages[-1].content)) for one in asked]

    return requests_of(features("test"), features("val"), features("oos_test"))


def requests_of(*splits: list[dict[str, float]]) -> Requests:
    """Of the rows of the test split, of those in scope and of those out of scope."""
    names = sorted(splits[0][0])
    return Requests(names, *(np.array([[row[name] for name in names] for row in rows]) for rows in splits))


def _example(text: str, intent: str) -> Example:
    turns = (Message(role="user", content=text), Message(role="assistant", content=intent))
    facts: dict[str, Any] = {"source": "clinc150", "licence": "CC-BY-3.0", "group": text}
    return Example(id=example_id(turns, "clinc150"), messages=turns, **facts)


def _drawn(requests: Requests, draw: np.random.Generator, share: Array) -> Array:
    """Requests, each of which is out of scope with a probability."""
    inside = requests.inside[draw.integers(len(requests.inside), size=len(share))]
    outside = requests.outside[draw.integers(len(requests.outside), size=len(share))]
    return np.where((draw.random(len(share)) < share)[:, None], outside, inside)


def _drifted(requests: Requests, window: Array) -> list[str]:
    """The findings that call a window drifted."""
    names, measured = requests.names, requests.measured
    baseline = Baseline({name: measured[:, place].tolist() for place, name in enumerate(names)})
    rows = [ServedRequest("", dict(zip(names, row, strict=True))) for row in window.tolist()]
    return [one.name for one in compare(rows, baseline, SETTINGS) if one.outcome == "drift"]


def _may_drift(requests: Requests, windows: Array) -> NDArray[np.bool_]:
    """Which windows can be called drifted; the others need no resamples. windows: (number, requests, features).

    The lower end of a feature's interval is below the distance itself; that of the rise of unlike requests is at least
    two points below it for 500 requests.
    """
    nearest = requests.names.index("nearest")
    before, now = requests.measured[:, nearest], windows[:, :, nearest]
    unlike = float(np.quantile(before, 0.1))
    rises = (now < unlike).mean(1) - (before < unlike).mean()
    found = rises > SETTINGS.unlike_rise_at_most + 0.02
    for place in range(len(requests.names)):
        found |= _distances(windows[:, :, place], requests.measured[:, place]) > SETTINGS.shift_at_most
    return np.asarray(found)


def _distances(windows: Array, measured: Array) -> Array:
    """The largest difference between the cumulative shares of each window and of the measured rows."""
    grid = np.unique(np.concatenate([windows.ravel(), measured]))
    places = np.searchsorted(grid, windows) + len(grid) * np.arange(len(windows))[:, None]
    counts = np.bincount(places.ravel(), minlength=len(grid) * len(windows)).reshape(len(windows), -1)
    below = np.searchsorted(np.sort(measured), grid, side="right") / len(measured)
    return np.asarray(np.abs(counts.cumsum(1) / windows.shape[1] - below).max(1))


def _noticed(requests: Requests, draw: np.random.Generator) -> dict[str, Any]:
    """One stream: 500 requests in scope, 500 with 5% out of scope, then 20%."""
    stream = _drawn(requests, draw, np.repeat([0.0, 0.05, 0.2], [WINDOW, WINDOW, 2 * WINDOW]))
    came = range(0, 2 * WINDOW + 1, EVERY)  # requests since the share is 20%
    windows = np.stack([stream[WINDOW + more : 2 * WINDOW + more] for more in came])
    may = _may_drift(requests, windows)
    before = bool(may[0] and _drifted(requests, windows[0]))
    for more, window, possible in list(zip(came, windows, may, strict=True))[1:]:
        if possible and (found := _drifted(requests, window)):
            return {"before": before, "after_20_percent": more, "by": found}
    return {"before": before, "after_20_percent": None, "by": []}


def _false_alarms(requests: Requests, draw: np.random.Generator, count: int) -> dict[str, int]:
    """Windows without drift that are called drifted. The first ones are compared in whole in any case."""
    alarms = in_whole = 0
    for first in range(0, count, AT_ONCE):
        windows = requests.inside[draw.integers(len(requests.inside), size=(min(AT_ONCE, count - first), WINDOW))]
        may = _may_drift(requests, windows)
        may[: max(0, WHOLE - first)] = True
        in_whole += int(may.sum())
        alarms += sum(bool(_drifted(requests, window)) for window in windows[may])
    return {"windows": count, "computed_in_whole": in_whole, "alarms": alarms}


def _evidently(requests: Requests, draw: np.random.Generator, count: int) -> Any:
    """evidently's verdicts on windows without drift, and on windows of 5% and 20% out of scope."""

    def rows(features: Array) -> list[dict[str, float]]:
        return [dict(zip(requests.names, row, strict=True)) for row in features.tolist()]

    shares = {"none": 0.0, "5%": 0.05, "20%": 0.2}
    windows = {
        name: [rows(_drawn(requests, draw, np.full(WINDOW, share))) for _ in range(count)]
        for name, share in shares.items()
    }
    python = install(EVIDENTLY)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "told.json"
        path.write_text(json.dumps({"reference": rows(requests.measured), "windows": windows}))
        told = [str(python), str(HERE / "run_evidently.py"), str(path)]
        return found_by(told, {"DO_NOT_TRACK": "1"}, seconds=3600)
