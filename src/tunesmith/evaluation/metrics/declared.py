"""Scorers that have settings in the project file, and scorers that need retrieved texts.

To add a declared scorer, write a subclass of `DeclaredScorer` and list it in `DECLARED`. To add a scorer without
settings, write a function and list it in `SCORERS` (scorers.py), or in `CONTEXT_SCORERS` where it needs the request or
retrieved texts.
"""

from __future__ import annotations

import json
import math
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, NamedTuple, Self, Union

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from tunesmith.candidates.settings import JudgeSettings
from tunesmith.core.digests import digest_file, digest_of
from tunesmith.core.errors import Inconclusive, TunesmithError, UsageError
from tunesmith.core.messages import Message
from tunesmith.core.reading.answer_grammar import check_answer_grammar, matches
from tunesmith.core.reading.patterns import check_pattern, search
from tunesmith.core.reading.strict_json import NotJson, parse_json
from tunesmith.core.reading.text_files import inside
from tunesmith.core.text.names import bare_label
from tunesmith.core.values import Settings
from tunesmith.evaluation.lines import is_share
from tunesmith.evaluation.metrics.scorers import NEED_JSON, SCORERS, Schema

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$", description="what the metric is called")]


class Answered(NamedTuple):
    """What a scorer sees of one answer. retrieved: the texts that were retrieved for the request."""

    text: str
    reference: str
    request: tuple[Message, ...] = ()
    retrieved: tuple[str, ...] = ()


Scoring = Callable[[Answered], float]


class DeclaredScorer(Settings, ABC):
    """A scorer with settings. key: the setting that tells it from other scorers in the project file."""

    key: ClassVar[str]
    name: Name

    @abstractmethod
    def scoring(self, root: Path) -> Scoring:
        """The function that scores an answer from 0 to 1. root: the project's folder.

        Raises UsageError where there is no such function.
        """

    def suits(self, reference: str) -> bool:
        """Whether answers can be scored against a reference. The build removes rows for which this is False."""
        return True


def sound(check: Callable[[str, str], Any]) -> AfterValidator:
    """A part of a setting's type that refuses what a check raises UsageError for."""

    def checked_setting(text: str) -> str:
        try:
            check(text, "")
        except UsageError as error:
            raise ValueError(error.what) from error
        return text

    return AfterValidator(checked_setting)


class PatternScorer(DeclaredScorer):
    """1 where the answer contains a match of a regular expression, else 0."""

    key = "pattern"
    pattern: Annotated[
        str,
        Field(min_length=1, description="regular expression (RE2's syntax); matches anywhere unless anchored"),
        sound(check_pattern),
    ]

    def scoring(self, root: Path) -> Scoring:
        return lambda answered: float(search(self.pattern, answered.text))


class GrammarScorer(DeclaredScorer):
    """1 where the whole answer matches a Lark grammar, else 0. task.pattern and task.grammar become one, `valid`."""

    key = "lark"
    lark: Annotated[
        str,
        Field(min_length=1, description="Lark grammar of the whole answer, in llguidance's dialect"),
        sound(check_answer_grammar),
    ]

    def scoring(self, root: Path) -> Scoring:
        return lambda answered: float(matches(self.lark, answered.text))

    def suits(self, reference: str) -> bool:
        return matches(self.lark, reference)


class NumberScorer(DeclaredScorer):
    """1 where the last number in the answer is close enough to the last number in the reference, else 0."""

    key = "tolerance"
    tolerance: float = Field(ge=0, description="largest difference that counts as right")
    relative: bool = Field(default=False, description="tolerance is a share of the reference's number")

    def scoring(self, root: Path) -> Scoring:
        return self._near

    def suits(self, reference: str) -> bool:
        return _last_number(reference) is not None

    def _near(self, answered: Answered) -> float:
        wanted = _last_number(answered.reference)
        if wanted is None:
            raise UsageError("the reference holds no number", fix=f"drop {self.name} from task.scorers")
        given = _last_number(answered.text)
        if given is None:
            return 0.0
        bound = self.tolerance * abs(wanted) if self.relative else self.tolerance
        # A few units in the last place of slack, so that 0.3 counts as within 0.1 of 0.2.
        return float(abs(given - wanted) <= bound + 4 * math.ulp(max(abs(given), abs(wanted))))


class LabelScorer(DeclaredScorer):
    """1 where the label is right, else 0. The evaluation also reports macro-F1 and calibration."""

    key = "label"
    label: str = Field(
        description="key of the label in a JSON answer, such as intent or slots.room; empty for the whole text"
    )
    calibrate: bool = Field(
        default=False,
        description="measure how probable the base model finds each label (one pass per label; label must be empty)",
    )

    def scoring(self, root: Path) -> Scoring:
        return lambda answered: float(label_of(answered.text, self) == label_of(answered.reference, self, True))

    def suits(self, reference: str) -> bool:
        try:
            label_of(reference, self, reference=True)
        except UsageError:
            return False
        return True

    @model_validator(mode="after")
    def _labels_alone(self) -> Self:
        if self.calibrate and self.label:
            raise ValueError(f"{self.name}: calibrate needs answers that are labels and nothing else (label: '')")
        return self


class FunctionScorer(DeclaredScorer):
    """A Python function of the project: score(answer, reference, request) -> 0 to 1. It runs in this process."""

    key = "function"
    function: str = Field(pattern=r"^[^:]+\.py:[A-Za-z_]\w*$", description="path.py:name, relative to the project file")

    @property
    def _where(self) -> str:
        return f"task.scorers, {self.name}"

    def file(self, root: Path) -> Path:
        """The function's file. Raises UsageError where it is not in the project."""
        path = inside(root, self.function.rpartition(":")[0], "the function's file", self._where)
        if not path.is_file():
            raise UsageError(f"there is no file {path}", where=self._where, fix="correct `function`")
        return path

    def scoring(self, root: Path) -> Scoring:
        path, where = self.file(root), self._where
        name = self.function.rpartition(":")[2]
        module = types.ModuleType(f"tunesmith_scorer_{self.name}")
        module.__file__ = str(path)
        try:  # compiled anew: an import would take a file edited twice in a second, to the same length, from its cache
            exec(compile(path.read_bytes(), path, "exec"), module.__dict__)  # noqa: S102
        except Exception as error:  # the user's code may raise anything
            raise UsageError(f"{path.name} cannot be run: {type(error).__name__}: {error}", where=where) from error
        function = getattr(module, name, None)
        if not callable(function):
            raise UsageError(f"{path.name} has no function {name}", where=where)

        def scored(answered: Answered) -> float:
            request = answered.request[-1].content if answered.request else ""
            try:
                value = function(answered.text, answered.reference, request)
            except TunesmithError:
                raise
            except Exception as error:  # as above
                raise UsageError(f"{self.function} raised {type(error).__name__}: {error}", where=where) from error
            return value  # type: ignore[no-any-return]

        return scored


class JudgeScorer(DeclaredScorer):
    """A model says whether the answer or the reference is better. It compares them twice, once in each order.

    1 where the answer wins both times, 0 where the reference does, 0.5 for a tie or where the order decided.
    """

    key = "judge"
    judge: JudgeSettings = Field(description="the judge: a model behind a URL")
    question: str = Field(
        default="Which answer serves the request better: correct, complete, and no more than was asked?",
        min_length=1,
        description="what better means",
    )

    def scoring(self, root: Path) -> Scoring:
        raise UsageError(
            f"{self.name} is a judge: a model scores it, not a function",
            where="task.primary",
            fix="name a scorer that is no judge",
        )


DECLARED: tuple[type[DeclaredScorer], ...] = (
    PatternScorer,
    GrammarScorer,
    NumberScorer,
    LabelScorer,
    FunctionScorer,
    JudgeScorer,
)


def _key_of(value: Any) -> str:
    """The tag of a scorer in the project file: its key, or "name" for a built-in scorer."""
    if isinstance(value, str):
        return "name"
    if isinstance(value, DeclaredScorer):
        return value.key
    keys = value if isinstance(value, Mapping) else {}
    return next((kind.key for kind in DECLARED if kind.key in keys), DECLARED[0].key)


if TYPE_CHECKING:
    Declared = str | DeclaredScorer
else:
    _KINDS = (Annotated[str, Tag("name")], *(Annotated[kind, Tag(kind.key)] for kind in DECLARED))
    Declared = Annotated[Union[_KINDS], Discriminator(_key_of)]  # noqa: UP007 - from a tuple


def retrieval_hit(answered: Answered) -> float:
    """1 where a retrieved text contains the reference, ignoring case and white space (Karpukhin et al. 2020).

    0 where nothing was retrieved.
    """
    wanted = _flat(answered.reference)
    return float(any(wanted in _flat(text) for text in answered.retrieved))


def groundedness(answered: Answered) -> float:
    """Share of the answer's distinct words that occur in the request or the retrieved texts.

    As K-Precision (Adlakha 2023).
    """
    words = set(re.findall(r"\w+", answered.text.casefold()))
    texts = " ".join([*answered.retrieved, *(turn.content for turn in answered.request)])
    known = set(re.findall(r"\w+", texts.casefold()))
    return len(words & known) / len(words) if words else 0.0


CONTEXT_SCORERS: Mapping[str, Scoring] = {"retrieval_hit": retrieval_hit, "groundedness": groundedness}
KNOWN = (*SCORERS, *CONTEXT_SCORERS)


def metric_of(scorer: Declared) -> str:
    """The name of a scorer's metric."""
    return scorer if isinstance(scorer, str) else scorer.name


def make_scoring(scorer: Declared, schema: Schema, root: Path) -> Scoring:
    """The function that scores an answer. root: the project's folder. Raises UsageError for a judge."""
    if not isinstance(scorer, str):
        return scorer.scoring(root)
    if scorer in CONTEXT_SCORERS:
        return CONTEXT_SCORERS[scorer]
    by_text = SCORERS[scorer]
    return lambda answered: by_text(answered.text, answered.reference, schema)


NO_LABEL: Final = "(no label)"  # not "", which a reference's label may be


def label_of(text: str, scorer: LabelScorer, reference: bool = False) -> str:
    """The label in a text; NO_LABEL for an answer without one. Raises UsageError for a reference without one."""
    if not scorer.label:
        return bare_label(text)
    try:
        value = parse_json(text)
        for key in scorer.label.split("."):
            value = value[key]
    except (NotJson, KeyError, TypeError) as error:
        if reference:
            raise UsageError(f"the reference has no {scorer.label!r}", fix="correct `label` in task.scorers") from error
        return NO_LABEL
    # Text as it stands, other values as JSON: 1.0 is 1, and keys are sorted.
    return value if isinstance(value, str) else json.dumps(_whole(value), sort_keys=True, ensure_ascii=False)


def _whole(value: Any) -> Any:
    """The JSON value with whole numbers as such."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def function_digests(scorers: Sequence[Declared], root: Path) -> dict[str, str]:
    """metric -> digest of the source file, for each function scorer."""
    own = [scorer for scorer in scorers if isinstance(scorer, FunctionScorer)]
    return {scorer.name: digest_file(scorer.file(root)) for scorer in own}


def scorer_digests(scorers: Sequence[Declared], schema: Schema, root: Path) -> dict[str, str]:
    """metric -> digest of what decides an answer's score: settings, a function's file, a judge's model, the schema.

    Scores of different digests cannot be compared.
    """
    files, digests = function_digests(scorers, root), {}
    for scorer in scorers:
        if isinstance(scorer, str):
            stated: dict[str, Any] = {"scorer": scorer, "schema": schema if scorer == "json_valid" else None}
        else:
            stated = scorer.model_dump(mode="json", exclude={"name", "calibrate", "judge"})
            stated["file"] = files.get(scorer.name)
        if isinstance(scorer, JudgeScorer):
            stated["judge"] = [scorer.judge.url, scorer.judge.model]
        digests[metric_of(scorer)] = digest_of(stated)
    return digests


def checked(value: Any, metric: str, where: str) -> float:
    """The score as a float. Raises Inconclusive for anything but a number from 0 to 1."""
    if not is_share(value):
        raise Inconclusive(f"the scorer {metric!r} gave {value!r}, which is not a number from 0 to 1", where=where)
    return float(value)


# A minus sign in print is one too; a dash after a digit or a letter, as in 10-20, is none.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-+\u2212])?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+\u2212]?\d+)?|\.\d+)")


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    number = float(numbers[-1].replace(",", "").replace("\u2212", "-")) if numbers else None
    return number if number is not None and math.isfinite(number) else None


def _flat(text: str) -> str:
    return " ".join(text.casefold().split())


_PICKY = GrammarScorer | LabelScorer | NumberScorer
_BY_NAME: tuple[Declared, ...] = tuple(sorted(NEED_JSON))


@dataclass(frozen=True, slots=True)
class References:
    """The check of a row's answer by the scorers that not every answer suits. scorers: only those."""

    scorers: tuple[Declared, ...] = ()

    @classmethod
    def of(cls, scorers: Sequence[Declared]) -> Self:
        """The check by those of a task's scorers that need JSON, a label, a number or a grammar's text."""
        return cls(tuple(one for one in scorers if isinstance(one, _PICKY) or one in _BY_NAME))

    def __call__(self, answer: str) -> str | None:
        """Why an answer cannot be a reference, in a few words; None where every scorer can score against it."""
        unsuited = (metric_of(one) for one in self.scorers if not _suits(one, answer))
        return next((f"answer that {metric} cannot score" for metric in unsuited), None)

    def as_json(self) -> list[Any]:
        """What the check depends on."""
        return [one if isinstance(one, str) else one.model_dump(mode="json") for one in self.scorers]


def _suits(scorer: Declared, answer: str) -> bool:
    if not isinstance(scorer, str):
        return scorer.suits(answer)
    try:
        parse_json(answer)
    except NotJson:
        return False
    return True
