"""Drift on clinc150: the share of out-of-scope requests goes from 0 to 5% to 20%; and windows without any.

Features are those that the server records: the request's length, and its similarity to the closest training row. The
monitor sees the newest 500 requests, every 50 requests. evidently gets the same features and windows, by its defaults.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine_parts.environments import Peer, install
from engine_parts.report import Line
from service_parts.kept import Found
from service_parts.processes import HERE, ROOT, found_by
from tunesmith.candidates.retrieval import example_index
from tunesmith.core.messages import Message
from tunesmith.data.dataset import Example, example_id
from tunesmith.monitoring.drift import Baseline, ServedRequest, compare
from tunesmith.monitoring.features import request_features
from tunesmith.monitoring.settings import MonitoringSettings

EVIDENTLY = Peer("evidently", "evidently==0.7.23", also=("pandas<3",))
CORPUS = ROOT.parent / "shared" / "data" / "clinc150" / "data_data_full.json"
WINDOW, EVERY, WHOLE, WINDOWS, STREAMS, THEIRS = 500, 50, 40, 10_000, 20, 60
SETTINGS = MonitoringSettings()


class Requests(NamedTuple):
    """Features of the test split, and of requests that come after the release: in scope, and out of scope."""

    measured: list[dict[str, float]]
    inside: list[dict[str, float]]
    outside: list[dict[str, float]]


def measure() -> Found:
    """After how many requests a share of 20% is noticed, and how many windows without drift are called drifted."""
    requests, draw = read(), random.Random(5)
    noticed = [_noticed(requests, draw) for _ in range(STREAMS)]
    false = _false_alarms(requests, draw)
    theirs = _evidently(requests, draw)
    alpha = 1 - SETTINGS.confidence
    after = [one["after_20_percent"] for one in noticed]
    in_time = sum(one is not None and one <= WINDOW for one in after)
    before = sum(one["before"] for one in noticed)
    worst = max((one for one in after if one is not None), default=0)
    first = f"{theirs['none']['any_column']} of {theirs['none']['windows']}"
    caught = f"{theirs['20%']['any_column']} of {theirs['20%']['windows']} windows"
    peer = f"evidently {EVIDENTLY.requirement.split('==')[1]}, any column"
    lines = [
        Line(
            f"clinc150: streams whose 20% out of scope are noticed within {WINDOW} requests",
            f"{in_time} of {STREAMS}, the last after {worst}",
            peer,
            caught,
            shown="-",
            wanted=f">= {1 - alpha:.0%}",
            reached=in_time >= (1 - alpha) * STREAMS,
        ),
        Line(
            f"false alarms in {WINDOWS:,} windows of {WINDOW} requests without drift",
            f"{false['alarms']} ({false['alarms'] / WINDOWS:.2%})",
            peer,
            first,
            shown="-",
            wanted=f"<= {alpha:.0%}",
            reached=false["alarms"] <= alpha * WINDOWS,
        ),
        Line(f"drift called at 5% out of scope, {STREAMS} streams", f"{before}", "", "", shown="-", wanted="-"),
    ]
    figures = {"noticed": noticed, "false_alarms": false, "evidently": theirs}
    print(f"  {figures}"[:2000], flush=True)
    return Found(lines, figures)


def read() -> Requests:
    """The features of clinc150's rows: `test` is the test split, `val` and `oos_test` come after the release."""
    corpus = json.loads(CORPUS.read_text())
    index = example_index([_example(text, intent) for text, intent in corpus["train"]])

    def features(rows: list[list[str]]) -> list[dict[str, float]]:
        asked = [(Message(role="user", content=text),) for text, _ in rows]
        return [request_features(one, lambda messages: index.similarity(messages[-1].content)) for one in asked]

    return Requests(features(corpus["test"]), features(corpus["val"]), features(corpus["oos_test"]))


def _example(text: str, intent: str) -> Example:
    turns = (Message(role="user", content=text), Message(role="assistant", content=intent))
    facts: dict[str, Any] = {"source": "clinc150", "licence": "CC-BY-3.0", "group": text}
    return Example(id=example_id(turns, "clinc150"), messages=turns, **facts)


def _stream(requests: Requests, draw: random.Random, count: int, share: float) -> list[dict[str, float]]:
    return [draw.choice(requests.outside if draw.random() < share else requests.inside) for _ in range(count)]


def _baseline(requests: Requests) -> Baseline:
    names = requests.measured[0]
    return Baseline({name: [row[name] for row in requests.measured] for name in names})


def _drifted(requests: Requests, window: list[dict[str, float]]) -> list[str]:
    """The findings that call a window drifted."""
    rows = [ServedRequest("", features) for features in window]
    return [one.name for one in compare(rows, _baseline(requests), SETTINGS) if one.outcome == "drift"]


def _noticed(requests: Requests, draw: random.Random) -> dict[str, Any]:
    """One stream: 500 requests in scope, 500 with 5% out of scope, then 20%."""
    stream = [*_stream(requests, draw, WINDOW, 0.0), *_stream(requests, draw, WINDOW, 0.05)]
    before = bool(_drifted(requests, stream[-WINDOW:]))
    for came in range(EVERY, 2 * WINDOW + 1, EVERY):
        stream += _stream(requests, draw, EVERY, 0.2)
        if found := _drifted(requests, stream[-WINDOW:]):
            return {"before": before, "after_20_percent": came, "by": found}
    return {"before": before, "after_20_percent": None, "by": []}


def _false_alarms(requests: Requests, draw: random.Random) -> dict[str, int]:
    """Windows without drift that are called drifted.

    A window is compared in whole where it can be an alarm, and the first ones are. The lower end of a feature's
    interval, which takes 999 resamples, is below the distance itself; that of the rise of unlike requests is at least
    two points below it for 500 requests.
    """
    alarms = in_whole = 0
    names, generator = sorted(requests.measured[0]), np.random.default_rng(draw.randrange(1 << 30))
    measured = np.array([[row[name] for name in names] for row in requests.measured])
    inside = np.array([[row[name] for name in names] for row in requests.inside])
    nearest = names.index("nearest")
    unlike = float(np.quantile(measured[:, nearest], 0.1))
    share = float((measured[:, nearest] < unlike).mean())
    for number in range(WINDOWS):
        window = inside[generator.integers(len(inside), size=WINDOW)]
        far = max(_distance(window[:, place], measured[:, place]) for place in range(len(names)))
        rise = float((window[:, nearest] < unlike).mean()) - share
        if number < WHOLE or far > SETTINGS.shift_at_most or rise > SETTINGS.unlike_rise_at_most + 0.02:
            in_whole += 1
            alarms += bool(_drifted(requests, [dict(zip(names, map(float, row), strict=True)) for row in window]))
    return {"windows": WINDOWS, "computed_in_whole": in_whole, "alarms": alarms}


def _distance(ours: Any, theirs: Any) -> float:
    """The largest difference between two cumulative shares."""
    at = np.concatenate([ours, theirs])
    below = [np.searchsorted(np.sort(values), at, side="right") / len(values) for values in (ours, theirs)]
    return float(np.abs(below[0] - below[1]).max())


def _evidently(requests: Requests, draw: random.Random) -> Any:
    """evidently's verdicts on windows without drift, and on windows of 20% out of scope."""
    shares = {"none": 0.0, "5%": 0.05, "20%": 0.2}
    windows = {name: [_stream(requests, draw, WINDOW, share) for _ in range(THEIRS)] for name, share in shares.items()}
    python = install(EVIDENTLY)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "told.json"
        path.write_text(json.dumps({"reference": requests.measured, "windows": windows}))
        return found_by([str(python), str(HERE / "run_evidently.py"), str(path)], {"DO_NOT_TRACK": "1"})
