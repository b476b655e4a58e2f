"""Scorers that the project file declares with settings of their own, and what each of them sees of an answer.

A declared scorer's kind follows from its key: pattern, tolerance, label, function or judge.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator

from tunesmith.candidates.settings import EndpointSettings
from tunesmith.core.digests import digest_file
from tunesmith.core.errors import Inconclusive, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.settings import Settings
from tunesmith.evaluation.metrics.answer_schema import check_pattern, search
from tunesmith.evaluation.metrics.scorers import SCORERS, NotJson, Schema, nearest, read_json

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$", description="what the metric is called")]


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer with all that a scorer may look at. retrieved: the texts that were looked up for it."""

    text: str
    reference: str
    request: tuple[Message, ...] = ()
    retrieved: tuple[str, ...] = ()


Scoring = Callable[[Answered], float]


class PatternScorer(Settings):
    """1 where a regular expression is found in the answer."""

    name: Name
    pattern: Annotated[str, Field(min_length=1, description="regular expression, found anywhere unless anchored")]

    @field_validator("pattern")
    @classmethod
    def _sound(cls, pattern: str) -> str:
        try:
            check_pattern(pattern, "pattern")
        except UsageError as error:
            raise ValueError(error.what) from error
        return pattern


class NumberScorer(Settings):
    """1 where the last number in the answer is near the last number in the reference."""

    name: Name
    tolerance: Annotated[float, Field(ge=0, description="largest difference that counts as right")]
    relative: Annotated[bool, Field(description="tolerance is a share of the reference's number")] = False


class LabelScorer(Settings):
    """Classification: 1 where the label is right. Macro-F1 and calibration stand in the evaluation beside it."""

    name: Name
    label: Annotated[
        str, Field(description="key of the label in a JSON answer, as intent or slots.room; empty for the whole text")
    ]
    calibrate: Annotated[
        bool,
        Field(description="ask how likely the base finds each label (as many passes as labels; whole texts only)"),
    ] = False


class FunctionScorer(Settings):
    """A Python function of the user's: score(answer, reference, request) -> 0 to 1. It runs here and is trusted."""

    name: Name
    function: Annotated[str, Field(pattern=r"^[^:]+\.py:[A-Za-z_]\w*$", description="path.py:name, from the project")]


class JudgeScorer(Settings):
    """A model says whether the answer or the reference is better, asked twice with the two in either order.

    1 where the answer wins both times, 0 where the reference does, 0.5 for a tie or where the order decided.
    """

    name: Name
    judge: Annotated[EndpointSettings, Field(description="the model that judges, and where it is reached")]
    question: Annotated[str, Field(min_length=1, description="what better means")] = (
        "Which answer serves the request better: correct, complete, and no more than was asked?"
    )


_KINDS = {
    "pattern": PatternScorer,
    "tolerance": NumberScorer,
    "label": LabelScorer,
    "function": FunctionScorer,
    "judge": JudgeScorer,
}


def _kind(value: Any) -> str:
    for key, kind in _KINDS.items():
        if isinstance(value, kind) or (isinstance(value, Mapping) and key in value):
            return key
    return "name" if isinstance(value, str) else "pattern"


Declared = Annotated[
    Annotated[str, Tag("name")]
    | Annotated[PatternScorer, Tag("pattern")]
    | Annotated[NumberScorer, Tag("tolerance")]
    | Annotated[LabelScorer, Tag("label")]
    | Annotated[FunctionScorer, Tag("function")]
    | Annotated[JudgeScorer, Tag("judge")],
    Discriminator(_kind),
]


def retrieval_hit(answered: Answered) -> float:
    """1 where a retrieved text holds the reference answer, case and white space aside (Karpukhin et al. 2020).

    0 where nothing was looked up.
    """
    wanted = _flat(answered.reference)
    return float(any(wanted in _flat(text) for text in answered.retrieved))


def groundedness(answered: Answered) -> float:
    """Share of the answer's distinct words that stand in what was retrieved or asked (as K-Precision, Adlakha 2023)."""
    words = set(re.findall(r"\w+", answered.text.casefold()))
    texts = " ".join([*answered.retrieved, *(turn.content for turn in answered.request)])
    known = set(re.findall(r"\w+", texts.casefold()))
    return len(words & known) / len(words) if words else 0.0


CONTEXT_SCORERS: Mapping[str, Scoring] = {"retrieval_hit": retrieval_hit, "groundedness": groundedness}
KNOWN = (*SCORERS, *CONTEXT_SCORERS)


def metric_of(scorer: str | Settings) -> str:
    """What a scorer's metric is called."""
    return scorer if isinstance(scorer, str) else str(getattr(scorer, "name"))  # noqa: B009 - every declared one has it


def make_scoring(scorer: str | Settings, schema: Schema, root: Path) -> Scoring:
    """The function that a scorer of the project file is. A judge has none: it is asked in a stage of its own."""
    if isinstance(scorer, str):
        if scorer in CONTEXT_SCORERS:
            return CONTEXT_SCORERS[scorer]
        by_text = SCORERS[scorer]
        return lambda answered: by_text(answered.text, answered.reference, schema)
    if isinstance(scorer, PatternScorer):
        pattern, where = scorer.pattern, f"task.scorers, {scorer.name}"
        return lambda answered: float(search(pattern, answered.text, where))
    if isinstance(scorer, NumberScorer):
        return lambda answered: _near(answered, scorer)
    if isinstance(scorer, LabelScorer):
        return lambda answered: float(label_of(answered.text, scorer) == label_of(answered.reference, scorer, True))
    if isinstance(scorer, FunctionScorer):
        return _own_function(scorer, root)
    raise UsageError(f"{metric_of(scorer)} is a judge: no function computes it")


def label_of(text: str, scorer: LabelScorer, reference: bool = False) -> str:
    """The label in a text; "" where an answer has none. Raises UsageError for a reference without one."""
    if not scorer.label:
        return " ".join(text.split()).casefold()
    try:
        value = read_json(text)
        for key in scorer.label.split("."):
            value = value[key]
    except (NotJson, KeyError, TypeError) as error:
        if reference:
            raise UsageError(f"the reference has no {scorer.label!r}", fix="correct `label` in task.scorers") from error
        return ""
    return value if isinstance(value, str) else repr(value)


def function_file(scorer: FunctionScorer, root: Path) -> Path:
    """The file that holds a user's function. Raises UsageError where it is not in the project."""
    path = (root / scorer.function.rpartition(":")[0]).resolve()
    where = f"task.scorers, {scorer.name}"
    if not path.is_relative_to(root.resolve()):
        raise UsageError("the function's file lies outside the project", where=where, fix="copy it into the project")
    if not path.is_file():
        raise UsageError(f"there is no file {path}", where=where, fix="correct `function`")
    return path


def function_digests(scorers: Sequence[str | Settings], root: Path) -> dict[str, str]:
    """metric -> digest of the source file of each user's function among scorers."""
    own = [scorer for scorer in scorers if isinstance(scorer, FunctionScorer)]
    return {scorer.name: digest_file(function_file(scorer, root)) for scorer in own}


def checked(value: Any, metric: str, where: str) -> float:
    """A score that may be kept. Raises Inconclusive for anything but a finite number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Inconclusive(f"the scorer {metric!r} gave {value!r}, not a number from 0 to 1", where=where)
    if not 0.0 <= value <= 1.0:
        raise Inconclusive(f"the scorer {metric!r} gave {value!r}, not 0 to 1", where=where)
    return float(value)


def _own_function(scorer: FunctionScorer, root: Path) -> Scoring:
    path, where = function_file(scorer, root), f"task.scorers, {scorer.name}"
    name = scorer.function.rpartition(":")[2]
    spec = importlib.util.spec_from_file_location(f"tunesmith_scorer_{scorer.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise UsageError(f"{path.name} cannot be run: {type(error).__name__}: {error}", where=where) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{path.name} has no function {name}", where=where)

    def scored(answered: Answered) -> float:
        try:
            value = function(
                answered.text, answered.reference, answered.request[-1].content if answered.request else ""
            )
        except TunesmithError:
            raise
        except Exception as error:  # as above
            raise UsageError(f"{scorer.function} raised {type(error).__name__}: {error}", where=where) from error
        return value  # type: ignore[no-any-return]

    return scored


_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")


def _near(answered: Answered, scorer: NumberScorer) -> float:
    wanted = _last_number(answered.reference)
    if wanted is None:
        raise UsageError("the reference holds no number", fix=f"drop {scorer.name} from task.scorers")
    given = _last_number(answered.text)
    if given is None:
        return 0.0
    bound = scorer.tolerance * abs(wanted) if scorer.relative else scorer.tolerance
    # One unit in the last place of slack: 0.3 is within 0.1 of 0.2.
    return float(abs(given - wanted) <= bound + 4 * math.ulp(max(abs(given), abs(wanted))))


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    number = float(found[-1].replace(",", "")) if found else None
    return number if number is not None and math.isfinite(number) else None


def _flat(text: str) -> str:
    return " ".join(text.casefold().split())


def known_scorer(name: str) -> str:
    """A built-in scorer's name. Raises ValueError, with the nearest name, for any other."""
    if name not in KNOWN:
        raise ValueError(f"no scorer is called {name!r}{nearest(name, KNOWN)}; there are {', '.join(KNOWN)}")
    return name
