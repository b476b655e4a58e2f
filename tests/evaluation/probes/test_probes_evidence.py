"""A probe's evidence that is missing, NaN, stale, unpaired or empty decides nothing, and says why. No model here."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.evaluation.conftest import TASK
from tests.fabricate import SCHEMA, Fabricated, put_training
from tunesmith.candidates.candidate import Candidate
from tunesmith.core.digests import canonical
from tunesmith.core.errors import Inconclusive
from tunesmith.core.messages import Message
from tunesmith.engines.protocol import Question
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.gates.settings import GATES, PROBES
from tunesmith.evaluation.gates.verdict import judge, replay
from tunesmith.evaluation.probes import numbers
from tunesmith.evaluation.probes.items import ITEMS, MEASUREMENTS, Item, by_arm, encode_items
from tunesmith.evaluation.probes.judging import Case, judge_probe
from tunesmith.evaluation.probes.measuring import Risk
from tunesmith.evaluation.probes.suites import SUITES, ask
from tunesmith.evaluation.scores import column
from tunesmith.evaluation.stats.statistics import Interval, confidence_at_use
from tunesmith.evaluation.summary import verdict_summary
from tunesmith.store.records import Record

TEXT = {"probe": "general_text", "at_most": 0.1}
SUITE = "general_text/100"
ASKED = (Message(role="user", content="Write a short text."),)


def items(n: int = 60) -> list[Item]:
    return [Item(id=f"i{k}", group=f"g{k}", arm="text", messages=ASKED, choices=(f"text {k}",)) for k in range(n)]


def lines(asked: Sequence[Item], rise: float = 0.0) -> list[dict[str, Any]]:
    draw = random.Random(4)
    return [{"id": each.id, "scores": [-(draw.uniform(20, 30) + 10 * rise)], "tokens": 10} for each in asked]


def kept(
    made: Fabricated,
    asked: Sequence[Item],
    given: Sequence[Any],
    training: str | None,
    suite: str = SUITE,
    **parents: str,
) -> str:
    blob = b"".join((line if isinstance(line, bytes) else canonical(line)) + b"\n" for line in given)
    blobs = {"answers.jsonl": made.store.put_bytes(blob), ITEMS: made.store.put_bytes(encode_items(asked))}
    own = {"base": made.base} | ({"training": training} if training else {}) | parents
    return made.store.put_record(Record(kind="answers", parents=own, blobs=blobs, body={"suite": suite}))


def risk(made: Fabricated, rise: float = 0.0) -> Risk:
    asked = items()
    return Risk(kept(made, asked, lines(asked, rise), made.training), kept(made, asked, lines(asked), None))


def judged(made: Fabricated, found: Risk | None, suite: str = SUITE, **gate: Any) -> dict[str, Any]:
    risks = {suite: {"tuned": found}} if found else {}
    arguments: dict[str, Any] = {"answers": made.answers, "probes": {}, "task": TASK, "answer_schema": SCHEMA}
    evaluation = evaluate(made.store, dataset=made.dataset, risks=risks, **arguments)
    gates = GATES.validate_python({"g": {**TEXT, **gate}})
    document = verdict_summary(
        made.store, judge(made.store, evaluation=evaluation, candidate="tuned", gates=gates)
    ).document()
    assert document["verdict"] == document["gates"][0]["outcome"]
    assert replay(made.store, document["digest"])
    return {**document["gates"][0], "evaluation": evaluation}


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
        (lambda given: [], "have no answer"),
        (lambda given: given[1:], "1 of 60 items have no answer"),
        (lambda given: [*given, given[0]], "answered twice"),
        (lambda given: [*given, {**given[0], "id": "else"}], "not asked"),
        (lambda given: [b'{"id":"i0","scores":[NaN],"tokens":9}', *given[1:]], "NaN is not JSON"),
        (lambda given: [b"{", *given[1:]], "not an answer with an id"),
        (changed(3, scores=[True]), "not a log-probability"),
        (changed(3, scores=[0.5]), "not a log-probability"),
        (changed(3, scores=[]), "for each of 1 choices"),
        (changed(3, scores=None), "for each of 1 choices"),
        (changed(3, tokens=0), "not a count"),
    ],
)
def test_answers_that_are_missing_or_no_numbers(
    made: Fabricated, change: Callable[[list[Any]], list[Any]], message: str
) -> None:
    asked = items()
    bad = change(lines(asked))
    for found in (
        Risk(kept(made, asked, bad, made.training), kept(made, asked, lines(asked), None)),
        Risk(kept(made, asked, lines(asked), made.training), kept(made, asked, bad, None)),
    ):
        gate = judged(made, found)
        assert (gate["outcome"], gate["value"]) == ("inconclusive", None)
        assert message in gate["reason"]


def test_stale_unpaired_foreign_and_absent_evidence(made: Fabricated) -> None:
    asked = items()
    good, before = risk(made).after, risk(made).before
    other = put_training(made.store, made.base, made.dataset, rows=5)
    cases: list[tuple[Risk | None, str]] = [
        (None, "does not hold this probe"),
        (Risk(good, None), "the base model was not measured"),
        (Risk(kept(made, asked, lines(asked), other), before), "other weights"),
        (Risk(good, good), "other weights"),
        (Risk(good, kept(made, items(61), lines(items(61)), None)), "items before tuning differ"),
        (Risk(kept(made, asked, lines(asked), made.training, suite="formats"), before), "answers to 'formats'"),
        (Risk(kept(made, [], [], made.training), kept(made, [], [], None)), "no item of this probe"),
        (
            Risk(kept(made, items(5), lines(items(5)), made.training), kept(made, items(5), lines(items(5)), None)),
            "at least 20 are needed",
        ),
    ]
    for found, message in cases:
        gate = judged(made, found)
        assert (gate["outcome"], gate["value"]) == ("inconclusive", None), message
        assert message in gate["reason"], gate["reason"]


def test_rows_of_another_dataset_version(made: Fabricated) -> None:
    arms = [("trained on", "t"), ("held out", "h")]
    asked = [
        Item(id=f"{arm}:{k}", group=f"{short}{k}", arm=arm, messages=ASKED, choices=("x",))
        for arm, short in arms
        for k in range(40)
    ]
    suite = "membership/100"
    stale = Risk(*(kept(made, asked, lines(asked), training, suite) for training in (made.training, None)))
    gate = judged(made, stale, suite, probe="membership", at_most=0.9)
    assert "another dataset version" in gate["reason"]
    fresh = Risk(
        *(kept(made, asked, lines(asked), each, suite, dataset=made.dataset) for each in (made.training, None))
    )
    assert judged(made, fresh, suite, probe="membership", at_most=0.9)["outcome"] == "pass"
    grouped = [item.model_copy(update={"group": "h"}) if item.arm == "held out" else item for item in asked]
    one = Risk(
        *(kept(made, grouped, lines(grouped), each, suite, dataset=made.dataset) for each in (made.training, None))
    )
    assert "held out" in judged(made, one, suite, probe="membership_tpr", at_most=0.9)["reason"]
    few = judged(made, fresh, suite, probe="membership_tpr", at_most=0.9)
    assert "needs at least 100" in few["reason"]


def swapped(
    made: Fabricated, tokens: int, before: tuple[float, float], after: tuple[float, float], at_most: float
) -> dict[str, Any]:
    """The gate on swapped genders over 60 rows, whose two versions have these log-probabilities per token, about."""
    asked = [
        Item(id=f"{arm}:r{k}/{side}", group=f"g{k}", arm=arm, messages=ASKED, choices=("x",))
        for arm in ("gender", "gender per token")
        for k in range(60)
        for side in "ab"
    ]

    def given(sides: tuple[float, float]) -> list[dict[str, Any]]:
        noise = [random.Random(f"{each.group} {each.id[-1]}").uniform(0.95, 1.05) for each in asked]
        likely = [tokens * sides[each.id.endswith("b")] * more for each, more in zip(asked, noise, strict=True)]
        return [{"id": each.id, "scores": [value], "tokens": tokens} for each, value in zip(asked, likely, strict=True)]

    sides = ((given(after), made.training), (given(before), None))
    found = Risk(*(kept(made, asked, lines, each, "swap/100", dataset=made.dataset) for lines, each in sides))
    return judged(made, found, "swap/100", probe="swap", at_most=at_most)


def test_long_answers_of_which_one_version_became_likelier_fail(made: Fabricated) -> None:
    """The whole answer's probability is about 0 in both versions, before and after."""
    gate = swapped(made, 40, (-1.0, -1.0), (-0.3, -1.5), 0.05)
    assert (gate["outcome"], gate["kind"]) == ("fail", "gender per token")
    assert gate["value"] == pytest.approx(np.exp(-0.3) - np.exp(-1.5), abs=0.03)
    assert "swapping gender changes the right answer's probability per token by 51" in gate["reason"]
    assert gate["gaps"]["gender"]["after"]["size"] < 1e-4


def test_long_answers_that_became_likelier_in_both_versions_pass(made: Fabricated) -> None:
    assert swapped(made, 40, (-1.0, -1.0), (-0.3, -0.3), 0.15)["outcome"] == "pass"
    assert swapped(made, 40, (-0.3, -1.5), (-0.3, -1.5), 0.15)["outcome"] == "pass", "the base had the gap already"


def test_a_decision_in_a_text_that_is_otherwise_certain_fails(made: Fabricated) -> None:
    """Per token twenty tokens hide it: the whole answer's probability shows it."""
    gate = swapped(made, 20, (-0.7 / 20, -0.7 / 20), (-0.3 / 20, -1.5 / 20), 0.2)
    assert (gate["outcome"], gate["kind"]) == ("fail", "gender")
    assert gate["gaps"]["gender per token"]["after"]["size"] < 0.1
    short = swapped(made, 2, (-0.35, -0.35), (-0.05, -1.15), 0.2)
    assert (short["outcome"], short["kind"]) == ("fail", "gender")
    assert short["value"] == pytest.approx(np.exp(-0.1) - np.exp(-2.3), abs=0.03)


def test_membership_goes_by_the_loss_per_token(made: Fabricated) -> None:
    """Answers of 10 to 200 tokens: by the sum over the tokens an answer's length would decide."""
    draw, asked, given = np.random.default_rng(0), [], []
    for arm, loss in (("trained on", 0.5), ("held out", 0.7)):
        for k in range(60):
            tokens = int(draw.integers(10, 200))
            asked.append(Item(id=f"{arm}:{k}", group=f"{arm} {k}", arm=arm, messages=ASKED, choices=("x",)))
            given.append({"id": f"{arm}:{k}", "scores": [-tokens * draw.normal(loss, 0.1)], "tokens": tokens})
    both = (kept(made, asked, given, t, "membership/100", dataset=made.dataset) for t in (made.training, None))
    gate = judged(made, Risk(*both), "membership/100", probe="membership", at_most=0.65)
    assert gate["outcome"] == "fail"
    assert gate["value"] > 0.85
    assert "by their loss per token" in gate["reason"]


def test_answers_that_were_left_out_are_counted(made: Fabricated) -> None:
    def found(asked: list[Item], **body: int) -> dict[str, Any]:
        risks = []
        for training in (made.training, None):
            record = made.store.record(kept(made, asked, lines(asked), training, "swap/100", dataset=made.dataset))
            risks.append(made.store.put_record(record.model_copy(update={"body": {**record.body, **body}})))
        return judged(made, Risk(*risks), "swap/100", probe="swap", at_most=0.2)

    pairs = [each.model_copy(update={"id": f"{each.group}/{side}"}) for each in items() for side in "ab"]
    left = "; 1,200 answers that are calls of functions were left out"
    assert left in found(pairs, left_out=1200)["reason"]
    assert "left out" not in found(pairs)["reason"]
    nothing = found([], left_out=1200)
    assert (nothing["outcome"], nothing["value"]) == ("inconclusive", None)
    assert f"no held-out row contains a known name or a gendered word{left}" in nothing["reason"]


def test_two_items_of_one_question_are_one_question() -> None:
    """The two arms of a swapped row cost no more than one did."""
    asked: list[Question] = []

    def choose(questions: Sequence[Question], *_: Any) -> list[list[float]]:
        asked.extend(questions)
        return [[-float(len(question.choices[0]))] for question in questions]

    engine: Any = SimpleNamespace(choose=choose, generate=lambda *_: [])
    renderer: Any = SimpleNamespace(count_row=len, count_prompt=len)
    pair = [
        Item(id=f"{arm}/{k}", group="g", arm=arm, messages=ASKED, choices=(f"answer {k}" * (k + 1),))
        for arm in ("gender", "gender per token")
        for k in range(3)
    ]
    found = ask(engine, engine, renderer, None, pair, Candidate(name="tuned", base="sha256:0", max_tokens=8))
    assert len(asked) == 3
    assert (
        [line["scores"] for line in found[:3]] == [line["scores"] for line in found[3:]] == [[-8.0], [-16.0], [-24.0]]
    )


def test_canaries_without_controls_or_too_few_are_no_number(made: Fabricated) -> None:
    def asked(each: int, controls: int) -> list[Item]:
        counts = [("control", controls), ("1", each), ("16", each)]
        return [
            Item(id=f"{arm}-{k}", group=f"{arm}-{k}", arm=arm, messages=ASKED, choices=("x",))
            for arm, many in counts
            for k in range(many)
        ]

    def found(each: int, controls: int, **gate: Any) -> dict[str, Any]:
        chosen = asked(each, controls)
        both = (kept(made, chosen, lines(chosen), t, "canaries", dataset=made.dataset) for t in (made.training, None))
        return judged(made, Risk(*both), "canaries", probe="canaries", at_most=4.0, **gate)

    assert "at least 100" in found(20, 99)["reason"]
    wide = found(3, 120)
    assert wide["value"] is None
    assert "too wide to judge" in wide["reason"]
    assert "planted 2 times" in found(20, 120, repeats=2)["reason"]
    usual = found(24, 150)
    assert usual["outcome"] == "pass", usual["reason"]
    assert usual["low"] < 1.44 < usual["high"], "chance"
    assert found(20, 120, repeats=16)["outcome"] in ("pass", "inconclusive")
    nothing = kept(made, [], [], made.training, "canaries", dataset=made.dataset)
    assert "no item" in judged(made, Risk(nothing, nothing), "canaries", probe="canaries", at_most=4.0)["reason"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.replace(b'"after":', b'"after":0,"x":', 1), "exactly the keys"),
        (lambda raw: raw.replace(raw.split(b'"after":')[1].split(b",")[0], b"NaN", 1), "NaN is not JSON"),
        (lambda raw: raw + raw.splitlines()[0] + b"\n", "measured twice"),
        (lambda raw: b"\n".join(raw.splitlines()[1:]), "contradicts the measurements"),
        (lambda raw: b"", "contradicts the measurements"),
        (lambda raw: b"[]\n" + raw, "exactly the keys"),
    ],
)
def test_measurements_changed_after_the_evaluation(
    made: Fabricated, change: Callable[[bytes], bytes], message: str
) -> None:
    honest = judged(made, risk(made))["evaluation"]
    record = made.store.record(honest)
    blob = made.store.put_bytes(change(made.store.read_blob(record.blobs[MEASUREMENTS])))
    forged = made.store.put_record(record.model_copy(update={"blobs": {**record.blobs, MEASUREMENTS: blob}}))
    gates = GATES.validate_python({"g": TEXT, "valid": {"metric": "json_valid", "at_least": 0.1}})
    document = verdict_summary(
        made.store, judge(made.store, evaluation=forged, candidate="tuned", gates=gates)
    ).document()
    assert document["verdict"] == "inconclusive"
    assert all(message in gate["reason"] for gate in document["gates"]), document["gates"]


def test_auc_is_mann_and_whitney_s_u_and_its_interval_covers() -> None:
    draw = np.random.default_rng(0)
    members, others = draw.integers(0, 9, 60).astype(float), draw.integers(0, 9, 80).astype(float)
    u = stats.mannwhitneyu(members, others).statistic
    assert numbers.auc(members, others) == pytest.approx(u / (60 * 80), abs=1e-9)
    names = [f"g{k}" for k in range(60)]
    covered = 0
    for _ in range(60):
        left, right = draw.normal(0.5, 1, 60), draw.normal(0, 1, 60)
        found = numbers.auc_interval(left, names, right, names, confidence=0.95, seed=0)
        covered += found.low <= stats.norm.cdf(0.5 / np.sqrt(2)) <= found.high
    assert covered >= 54
    all_won = numbers.auc_interval(left + 99, names, right, names, confidence=0.95, seed=0)
    assert all_won.high == 1.0
    assert all_won.low < 0.97, "sixty rows of each do not show a certainty"


def test_the_share_found_at_1_percent_counts_the_doubt_about_the_threshold() -> None:
    """A hundred held-out rows place their 99th percentile badly; half of such intervals missed the truth without."""
    draw, gap, names = np.random.default_rng(1), 2.0, [f"g{k}" for k in range(100)]
    truth = stats.norm.sf(stats.norm.isf(0.01) - gap)
    covered, passed = 0, 0
    for _ in range(40):
        members, others = draw.normal(gap, 1, 100), draw.normal(0, 1, 100)
        found = numbers.found_interval(members, names, others, names, confidence=0.95, seed=0)
        assert found.mean == (members > np.sort(others)[-2]).mean()
        covered += found.low <= truth <= found.high
        passed += found.high < truth
    assert covered >= 37
    assert passed <= 2
    whole, many = np.repeat(names, 4).tolist(), draw.normal(0, 1, 400)
    grouped = numbers.found_interval(many + gap, whole, many, whole, confidence=0.95, seed=0)
    rows = [f"r{k}" for k in range(400)]
    apart = numbers.found_interval(many + gap, rows, many, rows, confidence=0.95, seed=0)
    assert grouped.low == 0.0 < apart.low, "a hundred groups of rows place the threshold no better than a hundred rows"


def test_exposure_is_carlini_s_and_its_interval_covers_chance() -> None:
    controls = np.arange(127, dtype=float)
    assert numbers.exposures(np.array([200.0, -1.0, 126.5]), controls) == pytest.approx([7.0, 0.0, 7.0])
    draw, covered = np.random.default_rng(2), 0
    expected = np.mean([7 - np.log2(rank) for rank in range(1, 129)])
    for _ in range(60):
        planted, never = draw.normal(size=20), draw.normal(size=127)
        found = numbers.exposure_interval(planted, never, confidence=0.95, seed=0)
        covered += found.low <= expected <= found.high
    assert covered >= 55


def test_memorisation_is_measured_for_as_many_uses_as_scores_are() -> None:
    """At the twentieth use of the test rows an interval leaves little outside, and takes many draws."""
    confidence = confidence_at_use(0.95, 20)
    draw = np.random.default_rng(3)
    found = numbers.exposure_interval(draw.normal(size=20), draw.normal(size=127), confidence=confidence, seed=0)
    assert found.low < found.mean < found.high
    names = [f"g{k}" for k in range(60)]
    left, right = draw.normal(0.5, 1, 60), draw.normal(0, 1, 60)
    wide = numbers.auc_interval(left, names, right, names, confidence=confidence, seed=0)
    usual = numbers.auc_interval(left, names, right, names, confidence=0.95, seed=0)
    assert wide.low < usual.low < usual.high < wide.high


def test_weights_in_pieces_are_those_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right, names = np.arange(30.0), np.arange(30.0) - 3, [f"g{k}" for k in range(30)]
    whole = numbers.auc_interval(left, names, right, names, confidence=0.95, seed=0)
    monkeypatch.setattr(numbers, "CHUNK", 7_000)
    pieces = numbers.auc_interval(left, names, right, names, confidence=0.95, seed=0)
    assert (pieces.low, pieces.high) == pytest.approx((whole.low, whole.high), abs=0.02)


def test_newcombe_s_interval_against_statsmodels() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion", reason="statsmodels is not installed")
    sides = []
    for hits, n in ((56, 70), (48, 80)):
        low, high = proportion.proportion_confint(hits, n, method="wilson")
        sides.append(Interval(hits / n, low, high))
    found = numbers.apart(*sides)
    low, high = proportion.confint_proportions_2indep(56, 70, 48, 80, method="newcomb")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_every_probe_has_its_suite_its_judge_and_its_account() -> None:
    from tunesmith.evaluation.probes.judging import JUDGES

    assert set(JUDGES) == set(PROBES)
    assert set(SUITES) == set(PROBES) - {"membership_tpr"}


def test_nothing_measured_is_no_interval() -> None:
    with pytest.raises(Inconclusive, match="nothing was measured"):
        numbers.worst({}, None, 0.95, 0)


def test_formats_keep_their_numbers() -> None:
    """The measurements of an earlier evaluation, 64 forms by their whole log-probability: the numbers it was given."""
    draw = random.Random(7)
    rows = [
        {"id": f"form-{k // 8}-{k % 8}", "group": f"form-{k // 8}-{k % 8}", "arm": "forms", "before": b, "after": b * a}
        for k in range(64)
        for b, a in [(draw.random(), 0.5 + draw.random() / 2)]
    ]
    test = column("tuned", "exact_match", {f"t{k}": (f"t{k}", 1.0) for k in range(40)})
    gate = GATES.validate_python({"g": {"probe": "formats", "at_most": 0.15}})["g"]
    shown = judge_probe(Case(gate, by_arm(rows), test, 0.95, 0, {}))  # type: ignore[arg-type]
    found = [round(each, 9) for each in (shown.interval.mean, shown.interval.low, shown.interval.high)]
    assert found == [0.188806217, 0.138601846, 0.246420411]
    assert shown.extra == {"able": 29, "kept": 0.586206897}
    assert shown.sentence.startswith(
        "the preference for the requested format fell by +18.9 (+13.9 to +24.6) points on the"
    )
