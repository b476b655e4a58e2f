"""A probe's evidence that is missing, NaN, stale, unpaired or empty decides nothing, and says why. No model here."""

import itertools
import random
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.evaluation.conftest import evaluated, outcome, risk_roles, verdict_of
from tests.evaluation.conftest import judged as judged_by
from tests.fabricate import Fabricated, add, put_training, training_body
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive, UsageError
from tunesmith.core.messages import Message
from tunesmith.evaluation.lines import ITEMS
from tunesmith.evaluation.probes import numbers
from tunesmith.evaluation.probes.catalog import PROBES, ProbeKind, suite_of
from tunesmith.evaluation.probes.measuring import Item, Measurement, best_epoch, by_arm, encode_items
from tunesmith.evaluation.probes.suites import SHARES, Case, Chart, Shown, Suite, share
from tunesmith.evaluation.report.data import report_data
from tunesmith.evaluation.report.html import render, report_markdown
from tunesmith.evaluation.scores import column
from tunesmith.evaluation.settings import TaskSettings
from tunesmith.evaluation.stats import statistics
from tunesmith.evaluation.stats.statistics import Interval, Level, confidence_at_use
from tunesmith.records.evaluation import BestEpoch, RiskResults
from tunesmith.store.records import Record

TEXT: dict[str, Any] = {"probe": "general_text", "at_most": 0.1}
SUITE = "general_text/100"
RIGHT = TaskSettings(scorers=("exact_match",))
ASKED = (Message(role="user", content="Write a short text."),)
Sides = Sequence[str | None]  # the answers to a probe after tuning and before it
NAMES = [f"g{k}" for k in range(100)]


def item(name: str, arm: str = "text", group: str | None = None, choices: tuple[str, ...] = ("x",)) -> Item:
    return Item(id=name, group=group or name, arm=arm, messages=ASKED, choices=choices)


def items(n: int = 60) -> list[Item]:
    return [item(f"i{k}", choices=(f"text {k}",)) for k in range(n)]


def lines(asked: Sequence[Item], rise: float = 0.0) -> list[dict[str, Any]]:
    draw = random.Random(4)
    return [{"id": each.id, "scores": [-(draw.uniform(20, 30) + 10 * rise)], "tokens": 10} for each in asked]


def kept(
    made: Fabricated,
    asked: Sequence[Item],
    given: Sequence[Any],
    training: str | None,
    suite: str = SUITE,
    left_out: int = 0,
    **parents: str,
) -> str:
    """An answers record of a probe."""
    blob = b"".join((line if isinstance(line, bytes) else canonical(line)) + b"\n" for line in given)
    blobs = {"answers.jsonl": made.store.put_bytes(blob), ITEMS: made.store.put_bytes(encode_items(asked))}
    own = {"base": made.base} | ({"training": training} if training else {}) | parents
    body = {"suite": suite, "n": len(given), "seconds": 0.0} | ({"left_out": left_out} if left_out else {})
    return made.store.put_record(Record(kind="answers", parents=own, blobs=blobs, body=body))


def both(made: Fabricated, asked: Sequence[Item], suite: str, given: Any = None, **more: Any) -> Sides:
    """The same answers after tuning and before it, to items of the user's own rows."""
    said, own = given or lines(asked), {"dataset": made.dataset, **more}
    return tuple(kept(made, asked, said, training, suite, **own) for training in (made.training, None))


def risk(made: Fabricated, rise: float = 0.0) -> Sides:
    asked = items()
    return (kept(made, asked, lines(asked, rise), made.training), kept(made, asked, lines(asked), None))


def judged(made: Fabricated, found: Sides, suite: str = SUITE, **gate: Any) -> dict[str, Any]:
    """The finding of a probe's gate."""
    return outcome(made, alone(made, risk_roles(suite, *found)), **{**TEXT, **gate})


def alone(made: Fabricated, roles: Any) -> str:
    """An evaluation of the tuned candidate by one metric."""
    return evaluated(made, answers={"tuned": made.answers["tuned"]}, task=RIGHT, roles=roles)


def test_sound_evidence_decides(made: Fabricated) -> None:
    assert judged(made, risk(made, 0.02))["outcome"] == "pass"
    found = judged(made, risk(made, 0.5))
    assert found["outcome"] == "fail"
    assert found["value"] == pytest.approx(0.5, abs=1e-6)
    assert found["perplexity"]["after"] > found["perplexity"]["before"]


def changed(place: int, **keys: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda given: [*given[:place], {**given[place], **keys}, *given[place + 1 :]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given[1:], "1 of 60 items have no answer"),
        (lambda given: [*given, given[0]], "is there twice"),
        (lambda given: [*given, {**given[0], "id": "else"}], "not asked"),
        (lambda given: [b'{"id":"i0","scores":[NaN],"tokens":9}', *given[1:]], "NaN is not JSON"),
        (changed(3, scores=[True]), "not a log-probability"),
        (changed(3, scores=[0.5]), "not a log-probability"),
        (changed(3, scores=None), "for each of 1 choices"),
        (changed(3, tokens=0), "not a count"),
    ],
)
def test_answers_that_are_missing_or_no_numbers(
    made: Fabricated, change: Callable[[list[Any]], list[Any]], message: str
) -> None:
    asked = items()
    bad, good = change(lines(asked)), lines(asked)
    for after, before in ((bad, good), (good, bad)):
        gate = judged(made, (kept(made, asked, after, made.training), kept(made, asked, before, None)))
        assert (gate["outcome"], gate["value"]) == ("inconclusive", None)
        assert message in gate["reason"]


def test_stale_unpaired_foreign_and_absent_evidence(made: Fabricated) -> None:
    asked, few, more = items(), items(5), items(61)
    good, before = risk(made)
    other = put_training(made.store, made.base, made.dataset, rows=5)
    cases: list[tuple[Sides, str]] = [
        ((None, None), "does not hold this probe"),
        ((good, None), "the base model was not measured"),
        ((kept(made, asked, lines(asked), other), before), "other weights"),
        ((good, good), "other weights"),
        ((good, kept(made, more, lines(more), None)), "items before tuning differ"),
        ((kept(made, asked, lines(asked), made.training, suite="formats"), before), "answers to 'formats'"),
        ((kept(made, [], [], made.training), kept(made, [], [], None)), "no item of this probe"),
        ((kept(made, few, lines(few), made.training), kept(made, few, lines(few), None)), "at least 20 are needed"),
    ]
    for found, message in cases:
        gate = judged(made, found)
        assert (gate["outcome"], gate["value"]) == ("inconclusive", None), message
        assert message in gate["reason"], gate["reason"]


def test_names_with_colons_and_names_that_are_not_evaluated(made: Fabricated) -> None:
    answers, after = {}, risk(made)[0]
    for name in ("b", "a:b"):
        add(made, Candidate(name=name, prompt="Answer.", base=made.base, max_tokens=9), lambda row: row.answer, 1, 1.0)
        answers[name] = made.answers[name]
    digest = evaluated(made, {f"risk:{SUITE}:a:b": after}, answers=answers, task=RIGHT)
    risks = made.store.record(digest).body["risks"]
    assert {suite: list(names) for suite, names in risks.items()} == {SUITE: ["a:b"]}
    for role in (f"risk:{SUITE}:c", "policy:c"):
        with pytest.raises(UsageError, match="is not evaluated"):
            evaluated(made, {role: after}, answers=answers, task=RIGHT)


def test_membership_of_another_dataset_version_of_few_groups_and_by_the_loss_per_token(made: Fabricated) -> None:
    suite = "membership/100"
    asked = [item(f"{arm}:{k}", arm) for arm in ("trained on", "held out") for k in range(40)]
    stale = tuple(kept(made, asked, lines(asked), training, suite) for training in (made.training, None))
    assert "another dataset version" in judged(made, stale, suite, probe="membership", at_most=0.9)["reason"]
    fresh = both(made, asked, suite)
    assert judged(made, fresh, suite, probe="membership", at_most=0.9)["outcome"] == "pass"
    assert "needs at least 100" in judged(made, fresh, suite, probe="membership_tpr", at_most=0.9)["reason"]
    grouped = [each.model_copy(update={"group": "h"}) if each.arm == "held out" else each for each in asked]
    one = judged(made, both(made, grouped, suite), suite, probe="membership_tpr", at_most=0.9)
    assert "held out" in one["reason"]

    # Answers of 10 to 200 tokens: by the sum over the tokens an answer's length would decide.
    draw, given = np.random.default_rng(0), []
    for each in asked:
        tokens, loss = int(draw.integers(10, 200)), 0.5 if each.arm == "trained on" else 0.7
        given.append({"id": each.id, "scores": [-tokens * draw.normal(loss, 0.1)], "tokens": tokens})
    gate = judged(made, both(made, asked, suite, given), suite, probe="membership", at_most=0.65)
    assert gate["outcome"] == "fail"
    assert gate["value"] > 0.85
    assert "by their loss per token" in gate["reason"]


def swapped(
    made: Fabricated, tokens: int, before: tuple[float, float], after: tuple[float, float], at_most: float
) -> dict[str, Any]:
    """The gate on swapped genders over 60 rows, whose two versions have these log-probabilities per token, about."""
    arms = ("gender", "gender per token")
    asked = [item(f"{arm}:r{k}/{side}", arm, f"g{k}") for arm in arms for k in range(60) for side in "ab"]

    def given(sides: tuple[float, float]) -> list[dict[str, Any]]:
        noise = [random.Random(f"{each.group} {each.id[-1]}").uniform(0.95, 1.05) for each in asked]
        likely = [tokens * sides[each.id.endswith("b")] * more for each, more in zip(asked, noise, strict=True)]
        return [{"id": each.id, "scores": [value], "tokens": tokens} for each, value in zip(asked, likely, strict=True)]

    sides = ((given(after), made.training), (given(before), None))
    found = tuple(kept(made, asked, lines, each, "swap/100", dataset=made.dataset) for lines, each in sides)
    return judged(made, found, "swap/100", probe="swap", at_most=at_most)


def test_swapped_rows_are_compared_by_the_whole_answer_and_by_the_token(made: Fabricated) -> None:
    """The probability of a long whole answer is about 0 in both versions; per token twenty tokens hide a decision."""
    gate = swapped(made, 40, (-1.0, -1.0), (-0.3, -1.5), 0.05)
    assert (gate["outcome"], gate["kind"]) == ("fail", "gender per token")
    assert gate["value"] == pytest.approx(np.exp(-0.3) - np.exp(-1.5), abs=0.03)
    assert "swapping gender changes the right answer's probability per token by 51" in gate["reason"]
    assert gate["gaps"]["gender"]["after"]["size"] < 1e-4
    assert swapped(made, 40, (-1.0, -1.0), (-0.3, -0.3), 0.15)["outcome"] == "pass", "likelier in both versions"
    assert swapped(made, 40, (-0.3, -1.5), (-0.3, -1.5), 0.15)["outcome"] == "pass", "the base had the gap already"
    gate = swapped(made, 20, (-0.035, -0.035), (-0.015, -0.075), 0.2)
    assert (gate["outcome"], gate["kind"]) == ("fail", "gender")
    assert gate["value"] == pytest.approx(np.exp(20 * -0.015) - np.exp(20 * -0.075), abs=0.03)


def test_answers_that_were_left_out_are_counted(made: Fabricated) -> None:
    pairs = [each.model_copy(update={"id": f"{each.group}/{side}"}) for each in items() for side in "ab"]
    left = "; 1,200 answers that are calls of functions were left out"
    swap: dict[str, Any] = {"suite": "swap/100", "probe": "swap", "at_most": 0.2}
    assert left in judged(made, both(made, pairs, "swap/100", left_out=1200), **swap)["reason"]
    assert "left out" not in judged(made, both(made, pairs, "swap/100"), **swap)["reason"]
    nothing = judged(made, both(made, [], "swap/100", left_out=1200), **swap)
    assert (nothing["outcome"], nothing["value"]) == ("inconclusive", None)
    assert f"no held-out row contains a known name or a gendered word{left}" in nothing["reason"]


def test_canaries_without_controls_or_too_few_are_no_number(made: Fabricated) -> None:
    def found(each: int, controls: int, **gate: Any) -> dict[str, Any]:
        counts = [("control", controls), ("1", each), ("16", each)]
        asked = [item(f"{arm}-{k}", arm) for arm, many in counts for k in range(many)]
        return judged(made, both(made, asked, "canaries"), "canaries", probe="canaries", at_most=4.0, **gate)

    assert "at least 100" in found(20, 99)["reason"]
    wide = found(3, 120)
    assert wide["value"] is None
    assert "too wide to judge" in wide["reason"]
    assert "planted 2 times" in found(20, 120, repeats=2)["reason"]
    usual = found(24, 150)
    assert usual["outcome"] == "pass", usual["reason"]
    assert usual["low"] < 1.44 < usual["high"], "chance"
    assert "no item" in found(0, 0)["reason"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.replace(b'"after":', b'"after":0,"x":', 1), "Extra inputs"),
        (lambda raw: raw.replace(raw.split(b'"after":')[1].split(b",")[0], b"NaN", 1), "NaN is not JSON"),
        (lambda raw: raw + raw.splitlines()[0] + b"\n", "is there twice"),
        (lambda raw: b"\n".join(raw.splitlines()[1:]), "contradicts the measurements"),
        (lambda raw: b"", "contradicts the measurements"),
    ],
)
def test_measurements_changed_after_the_evaluation(
    made: Fabricated, change: Callable[[bytes], bytes], message: str
) -> None:
    record = made.store.record(alone(made, risk_roles(SUITE, *risk(made))))
    blob = made.store.put_bytes(change(made.store.read_blob(record.blobs[Measurement.file])))
    forged = made.store.put_record(record.model_copy(update={"blobs": {**record.blobs, Measurement.file: blob}}))
    document = judged_by(made, forged, {"g": TEXT, "right": {"metric": "exact_match", "at_least": 0.1}})
    assert document["verdict"] == "inconclusive"
    assert all(message in gate["reason"] for gate in document["gates"]), document["gates"]


def test_auc_is_mann_and_whitney_s_u_and_its_interval_holds_it() -> None:
    draw, names = np.random.default_rng(0), NAMES[:60]
    members, others = draw.integers(0, 9, 60).astype(float), draw.integers(0, 9, 80).astype(float)
    u = stats.mannwhitneyu(members, others).statistic
    assert numbers.auc(members, others) == pytest.approx(u / (60 * 80), abs=1e-9)
    left, right = draw.normal(0.5, 1, 60), draw.normal(0, 1, 60)

    def found(confidence: float, more: float = 0.0) -> Interval:
        return numbers.auc_interval((left + more, names), (right, names), Level(confidence, 0))

    # At the tenth use of the test rows an interval leaves little outside, and takes many draws.
    wide, usual, won = found(confidence_at_use(0.95, 10)), found(0.95), found(0.95, 99)
    assert wide.low < usual.low < stats.norm.cdf(0.5 / np.sqrt(2)) < usual.high < wide.high
    assert (won.high, won.low < 0.97) == (1.0, True), "sixty rows of each do not show a certainty"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "CHUNK", 7_000)
        pieces = found(0.95)
    assert (pieces.low, pieces.high) == pytest.approx((usual.low, usual.high), abs=0.02)
    with pytest.raises(Inconclusive, match="beyond what"):
        found(1 - 1e-9)


def test_the_share_found_at_1_percent_counts_the_doubt_about_the_threshold() -> None:
    """A hundred held-out rows place their 99th percentile badly: groups of rows place it no better than rows."""
    draw, gap = np.random.default_rng(1), 2.0
    members, others = draw.normal(gap, 1, 100), draw.normal(0, 1, 100)
    found = numbers.found_interval((members, NAMES), (others, NAMES), Level(0.95, 0))
    assert found.mean == (members > np.sort(others)[-2]).mean()
    assert found.low <= stats.norm.sf(stats.norm.isf(0.01) - gap) <= found.high
    whole, many, rows = np.repeat(NAMES, 4).tolist(), draw.normal(0, 1, 400), [f"r{k}" for k in range(400)]
    grouped = numbers.found_interval((many + gap, whole), (many, whole), Level(0.95, 0))
    apart = numbers.found_interval((many + gap, rows), (many, rows), Level(0.95, 0))
    assert grouped.low == 0.0 < apart.low


def test_exposure_is_carlini_s() -> None:
    controls = np.arange(127, dtype=float)
    assert numbers.exposures(np.array([200.0, -1.0, 126.5]), controls) == pytest.approx([7.0, 0.0, 7.0])


def test_newcombe_s_interval_against_statsmodels() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion", reason="statsmodels is not installed")
    sides = [
        Interval(hits / n, *proportion.proportion_confint(hits, n, method="wilson")) for hits, n in ((56, 70), (48, 80))
    ]
    found = numbers.apart(*sides)
    expected = proportion.confint_proportions_2indep(56, 70, 48, 80, method="newcomb")
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("suite", "scores", "value"),
    [
        ("lm_eval", [-1.0, -1.0, -3.0], 1.0),
        ("lm_eval", [-1.1, -1.0, -3.0], 0.0),
        ("crows_pairs", [np.log(0.3), np.log(0.1)], 0.75),
        ("bbq", [np.log(0.2), np.log(0.1), np.log(0.1)], 0.25),
        ("formats", [2 * np.log(0.3), np.log(0.1)], 0.75),
        ("swap", [-0.5], np.exp(-0.5)),
    ],
)
def test_what_a_suite_makes_of_log_probabilities(suite: str, scores: list[float], value: float) -> None:
    asked = item("x", choices=("two words", *"abc")[: len(scores)])
    line = {"id": "x", "scores": list(map(float, scores)), "tokens": 1}
    assert suite_of(suite).value(asked, line, lambda _: 0.0) == pytest.approx(value)


def test_the_best_epoch_is_that_of_the_lowest_validation_loss() -> None:
    curve = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}, {"step": 30, "loss": 1.5}]
    training = {"validation": curve, "steps": 40, "epochs": 4.0, "kept": 30}
    best = best_epoch(training_body(**training))
    assert best == BestEpoch(epoch=2.0, of=4.0, loss=1.0, last=1.5, kept=3.0)
    assert best_epoch(training_body(**{**training, "validation": curve[1:]})) is not None
    for change in ({"validation": curve[1:2]}, {"steps": 0}, {"validation": [*curve, {"step": 40, "loss": np.nan}]}):
        assert best_epoch(training_body(**{**training, **change})) is None


def shown(probe: str, arms: dict[str, tuple[Any, float]], **told: Any) -> Shown:
    """What is judged of 40 rows an arm, with these means before and after tuning, and half of the test rows right."""
    rows = []
    for (arm, (before, after)), k in itertools.product(arms.items(), range(40)):
        place = {"suite": probe, "candidate": "tuned", "id": f"{arm}:t{k}", "group": f"t{k}", "arm": arm}
        rows.append(Measurement(**place, before=before, after=float(k < 40 * after)))
    test = column("tuned", "exact_match", {f"t{k}": (f"t{k}", float(k < 20)) for k in range(40)})
    return suite_of(probe).show(Case(by_arm(rows), test, Level(0.95, 0), RiskResults(**told)))


def test_what_each_judge_makes_of_its_measurements() -> None:
    learned = {"train": (None, 1.0), "validation": (None, 0.25)}
    stop = BestEpoch(epoch=2.0, of=8.0, loss=1.0, last=1.5, kept=2.0)
    late = stop.model_copy(update={"kept": 8.0})
    for found, value, said in (
        (shown("extraction", {"trained on": (None, 0.5), "held out": (None, 0.0)}), 0.5, "repeats 50.0% of the"),
        (shown("personal_data", {"rows": (None, 0.25)}), 0.25, "repeated personal data of 25.0%"),
        (shown("overfitting", learned), 0.5, "exact_match is 100% on training rows and 50.0% on test rows"),
        (shown("overfitting", learned, stop=late), 0.5, ": train for 2 epochs, or set keep: best"),
        (shown("overfitting", learned, stop=stop), 0.5, "2 of 8 epochs, and the weights of that epoch were kept"),
        (shown("refusal", {"unsafe": (1, 0.5), "polite": (1, 0.75)}), 0.5, "refusing unsafe requests fell by +50.0"),
        (shown("lm_eval", {"rooms": (1, 0.5)}), 0.5, "lm-eval went from 100% to 50.0%, a fall of"),
        (shown("robustness", {"typos": (None, 0.25), "capitals": (None, 0.5)}), 0.25, "typos lowers exact_match by"),
        (shown("crows_pairs", {"pairs": (0, 0.25)}), 0.25, "changed the share of the stereotyping sentence by +25.0"),
    ):
        assert found.interval.mean == pytest.approx(value)
        assert found.interval.low < value < found.interval.high
        assert said in found.sentence, found.sentence
    assert shown("overfitting", learned).extra["validation"] == 0.25
    with pytest.raises(Inconclusive, match="no measurements of the kind 'held out'"):
        shown("extraction", {"trained on": (None, 0.5)})
    with pytest.raises(Inconclusive, match="nothing was measured"):
        numbers.worst({}, None, Level(0.95, 0))


def test_a_new_probe_is_its_suite_and_a_line_of_the_catalog(made: Fabricated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, judge, record, report and advice know it by these two."""

    def judge(case: Case) -> Shown:
        arm = case.arm("text")
        return Shown(case.mean(arm.after - arm.base, arm.groups), "the mood rose")

    chart = Chart("Mood of {}".format, SHARES, "{:.1f}".format)
    mood = Suite(lambda _: [], share, judge, before=True, own=False, chart=chart)
    monkeypatch.setitem(sys.modules, "tunesmith.evaluation.probes.mood", SimpleNamespace(SUITES={"mood": mood}))
    monkeypatch.setitem(PROBES, "mood", ProbeKind("mood", "rise by tuning of the mood (0 is none)"))
    asked, weights = [item(f"i{k}", choices=("good", "bad")) for k in range(60)], (made.training, None)
    given = [[{"id": each.id, "scores": [good, -1.0]} for each in asked] for good in (-0.5, -1.0)]
    sides = [kept(made, asked, said, each, "mood/100") for said, each in zip(given, weights, strict=True)]
    digest = alone(made, risk_roles("mood/100", *sides))
    data = report_data(made.store, digest, verdict_of(made, digest, {"g": {"probe": "mood", "at_most": 0.5}}))
    assert (data.verdict.gates[0].outcome, data.verdict.gates[0].reason[:13]) == ("pass", "the mood rose")
    assert [row.asked for row in data.risks.bias] == ["Mood of text"]
    assert f"{len(PROBES) - 1} of {len(PROBES)} risk probes were not measured" in data.advice.summary
    assert all("Mood of text" in page for page in (render(data), report_markdown(data)))
