"""The settings `task:` and `prices:` of the project file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from tunesmith.candidates.settings import HIGHEST_PRICE
from tunesmith.core.reading.answer_grammar import load_answer_grammar, pattern_grammar
from tunesmith.core.values import Settings
from tunesmith.evaluation.metrics.declared import (
    KNOWN,
    Declared,
    GrammarScorer,
    JudgeScorer,
    LabelScorer,
    metric_of,
)
from tunesmith.evaluation.metrics.scorers import nearest

_PREFERRED_PRIMARY = "exact_match"
VALID = "valid"  # the metric of task.pattern and task.grammar


class TaskSettings(Settings):
    """How answers are checked and scored."""

    schema_path: Annotated[
        Path | None,
        Field(alias="schema", description="file with the JSON Schema of an answer"),
    ] = None
    pattern: str | None = Field(
        default=None,
        min_length=1,
        description="regular expression (Rust's syntax) of a whole answer, where answers are not JSON. The "
        "metric `valid` measures it, the build removes rows whose answer does not match, and `constrain: true` "
        "decodes only what matches",
    )
    grammar: Path | None = Field(
        default=None,
        description="file with a Lark grammar (llguidance's dialect) of a whole answer, used as a pattern is",
    )
    scorers: tuple[Declared, ...] = Field(
        default=(_PREFERRED_PRIMARY,),
        min_length=1,
        description=f"metrics: {', '.join(KNOWN)}; or a name with pattern, tolerance, label, function or judge",
    )
    primary: str | None = Field(
        default=None, description="the primary metric; by default exact_match if measured, else the first scorer"
    )

    @model_validator(mode="before")
    @classmethod
    def _with_valid(cls, given: Any) -> Any:
        """The settings with the scorer `valid`, where answers have a pattern or a grammar."""
        if not isinstance(given, dict) or (given.get("pattern") is None and given.get("grammar") is None):
            return given
        scorers = given.get("scorers", [_PREFERRED_PRIMARY])
        if not isinstance(scorers, list | tuple) or any(_is_valid(scorer) for scorer in scorers):
            return given
        return given | {"scorers": [*scorers, VALID]}

    @field_validator("scorers")
    @classmethod
    def _scorers_known(cls, scorers: tuple[Declared, ...]) -> tuple[Declared, ...]:
        names = [metric_of(scorer) for scorer in scorers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the scorer {twice[0]!r} is listed twice")
        for scorer in scorers:
            if not isinstance(scorer, str):
                if scorer.name in KNOWN:
                    raise ValueError(f"{scorer.name!r} is the name of a built-in scorer: choose another name")
            elif scorer not in (*KNOWN, VALID):
                raise ValueError(
                    f"no scorer is called {scorer!r}{nearest(scorer, KNOWN)}; there are {', '.join(KNOWN)}"
                )
        return scorers

    @model_validator(mode="after")
    def _one_form(self) -> TaskSettings:
        given = [key for key in ("schema_path", "pattern", "grammar") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError("give one of schema, pattern and grammar: an answer has one form")
        if VALID in self.scorers and not self.has_grammar:
            raise ValueError("the scorer valid needs pattern or grammar; for a schema list json_valid")
        own = [each for each in self.scorers if _is_valid(each) and not isinstance(each, str | GrammarScorer)]
        if own and self.has_grammar:
            raise ValueError("valid is the scorer of pattern and grammar: give your own another name")
        return self

    @model_validator(mode="after")
    def _primary_measured(self) -> TaskSettings:
        if self.primary is not None and self.primary not in self.metrics:
            hint = nearest(self.primary, self.metrics)
            raise ValueError(
                f"primary: {self.primary!r} is not among scorers{hint}; they are {', '.join(self.metrics)}"
            )
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics that the project measures: built-in and declared scorers."""
        return tuple(metric_of(scorer) for scorer in self.scorers)

    @property
    def has_grammar(self) -> bool:
        """Whether answers have a pattern or a grammar."""
        return self.pattern is not None or self.grammar is not None

    @property
    def lark(self) -> str | None:
        """The Lark grammar of answers, once `loaded`."""
        grammars = (each.lark for each in self.scorers if isinstance(each, GrammarScorer) and _is_valid(each))
        return next(grammars, None) if self.has_grammar else None

    def loaded(self, root: Path) -> TaskSettings:
        """The settings with pattern or grammar read into the scorer `valid`. root: the project's folder.

        Raises UsageError where the file cannot be read, or where they cannot be used.
        """
        if self.pattern is not None:
            lark = pattern_grammar(self.pattern, "task.pattern")
        elif self.grammar is not None:
            lark = load_answer_grammar(root / self.grammar)
        else:
            return self
        valid = GrammarScorer(name=VALID, lark=lark)
        return self.model_copy(update={"scorers": tuple(valid if _is_valid(each) else each for each in self.scorers)})

    @property
    def judges(self) -> tuple[JudgeScorer, ...]:
        """The scorers that ask a judge model."""
        return tuple(scorer for scorer in self.scorers if isinstance(scorer, JudgeScorer))

    @property
    def labels(self) -> tuple[LabelScorer, ...]:
        """The scorers that compare labels."""
        return tuple(scorer for scorer in self.scorers if isinstance(scorer, LabelScorer))

    @property
    def leading(self) -> str:
        """The primary metric."""
        if self.primary is not None:
            return self.primary
        return _PREFERRED_PRIMARY if _PREFERRED_PRIMARY in self.metrics else self.metrics[0]


def _is_valid(scorer: Any) -> bool:
    name = scorer.get("name") if isinstance(scorer, dict) else getattr(scorer, "name", scorer)
    return bool(name == VALID)


class PriceSettings(Settings):
    """`prices:` of the project file. The price of an endpoint's tokens is a setting of that endpoint."""

    machine_hour: float = Field(
        ge=0, le=HIGHEST_PRICE, description="price of one hour of the machine that answers and trains"
    )
    currency: str = Field(default="USD", min_length=1, max_length=8, description="currency shown in reports")
