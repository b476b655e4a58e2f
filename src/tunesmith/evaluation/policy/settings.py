"""The setting `policy:` of the project file: checks by name, each with its requests and the rules for their answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from tunesmith.candidates.settings import JudgeSettings
from tunesmith.core.reading.patterns import check_pattern
from tunesmith.core.text.folding import fold
from tunesmith.core.values import Settings
from tunesmith.evaluation.metrics.declared import sound
from tunesmith.records.evaluation import CheckRules, RuleJudge

ALL = "all"
MOST_REQUESTS: Final = 2_000  # of one check
_RULES = ("equals", "contains", "any_of", "lacks", "pattern", "lacks_pattern", "rubric")


class Turn(Settings):
    """One turn of a request."""

    role: Literal["system", "user", "assistant"] = Field(description="who speaks")
    content: str = Field(description="what is said")


def _listed(given: Any) -> Any:
    return (given,) if isinstance(given, str) else given


Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed)]


Pattern = Annotated[str, Field(min_length=1), sound(check_pattern)]
Request = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")] | Annotated[tuple[Turn, ...], Tag("turns")],
    Discriminator(lambda given: "text" if isinstance(given, str) else "turns"),
]


class PolicyCheck(Settings):
    """Requests that every candidate is asked with its own prompt, and what must hold for every answer.

    Where several rules are given, an answer must keep all of them. An empty answer keeps no rule. A
    cut-off answer decides nothing about equals, lacks, lacks_pattern and judge, nor about a pattern that is
    found at its end only.
    """

    requests: Annotated[
        Annotated[Path, Tag("file")] | Annotated[tuple[Request, ...], Tag("list")],
        Discriminator(lambda given: "file" if isinstance(given, str | Path) else "list"),
        Field(
            description="the requests: a list of texts or of conversations (lists of role and content), or a JSONL "
            'file of {"prompt": ...} or {"messages": [...]}, each with a "group" if several belong together'
        ),
    ]
    variants: bool = Field(
        default=False, description="ask each request also with typing errors, in capitals and wrapped in politeness"
    )
    equals: str | None = Field(
        default=None, min_length=1, description="the whole answer: the same JSON value, or the same text"
    )
    contains: Texts = Field(default=(), description="texts that must all appear, ignoring case and spacing")
    any_of: Texts = Field(default=(), description="texts of which at least one must appear")
    lacks: Texts = Field(
        default=(),
        description="texts that must not appear, not even inside a word, in look-alike letters, with accents or "
        "hidden characters",
    )
    pattern: Pattern | None = Field(
        default=None, description="regular expression (RE2's syntax) that the answer must match"
    )
    lacks_pattern: Pattern | None = Field(
        default=None,
        description="regular expression that must match nowhere in the answer, neither as it stands nor folded",
    )
    judge: JudgeSettings | None = Field(default=None, description="a model behind a URL that judges by the rubric")
    rubric: str | None = Field(
        default=None, min_length=1, description="the rule in words, which the judge applies to request and answer"
    )

    @field_validator("requests")
    @classmethod
    def _requests_sound(cls, requests: Any) -> Any:
        if isinstance(requests, tuple) and not 1 <= len(requests) <= MOST_REQUESTS:
            raise ValueError(f"give 1 to {MOST_REQUESTS} requests, not {len(requests)}")
        return requests

    @field_validator("contains", "any_of", "lacks")
    @classmethod
    def _texts_visible(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            if not fold(text):
                raise ValueError(f"{text!r} has no visible character")
        return texts

    @model_validator(mode="before")
    @classmethod
    def _no_word_rules(cls, given: Any) -> Any:
        if isinstance(given, dict) and "refuse" in given:
            raise ValueError(
                "refuse is no longer a rule: use any_of, contains or pattern with the wording that the rows teach, "
                "lacks or lacks_pattern with what must not appear, or judge with rubric"
            )
        return given

    @model_validator(mode="after")
    def _rules_fit(self) -> PolicyCheck:
        if not any(getattr(self, rule) not in (None, ()) for rule in _RULES):
            raise ValueError(f"a check needs a rule: one or more of {', '.join(_RULES)}")
        if (self.judge is None) != (self.rubric is None):
            raise ValueError("a judge needs a rubric, and a rubric a judge")
        for wanted in (*self.contains, *([self.equals] if self.equals else ())):
            barred = next((text for text in self.lacks if fold(text) in fold(wanted)), None)
            if barred is not None:
                raise ValueError(f"{wanted!r} is required, and it holds {barred!r}, which lacks forbids")
        if self.any_of and all(any(fold(text) in fold(each) for text in self.lacks) for each in self.any_of):
            raise ValueError("lacks forbids every text of any_of")
        return self

    @property
    def rules(self) -> CheckRules:
        """The rules without the requests: what the outcome of an answer depends on."""
        stated = self.model_dump(include={*_RULES}, exclude_defaults=True)
        judge = RuleJudge(url=self.judge.url, model=self.judge.model) if self.judge else None
        return CheckRules(**stated, judge=judge)


def chosen_checks(named: str | Sequence[str], known: Iterable[str]) -> list[str]:
    """The checks that a gate's `policy` names: one, several, or all that are known."""
    if named == ALL:
        return sorted(known)
    return [named] if isinstance(named, str) else list(named)


CheckName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Policy = dict[CheckName, PolicyCheck]
