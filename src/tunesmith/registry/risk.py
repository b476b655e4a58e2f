"""Risk classes: how many approvers a version takes, and of which roles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, model_validator

from tunesmith.core.values import Settings, View
from tunesmith.records.version import MOST_APPROVERS, Requirement, RiskClass
from tunesmith.store.people.roles import Role

_APPROVERS: Mapping[RiskClass, int] = {"low": 1, "limited": 2, "high": 2}
_ROLES: Mapping[RiskClass, tuple[Role, ...]] = {"low": (), "limited": (), "high": ("steward",)}


class RiskSettings(Settings):
    """The project's risk class. Every version states it, with what it takes, from its registration on."""

    risk_class: Annotated[
        RiskClass,
        Field(
            alias="class",
            description="low takes one approver; limited takes two; high takes two, and one of them is a steward too",
        ),
    ]
    approvers: int | None = Field(
        default=None,
        ge=1,
        le=MOST_APPROVERS,
        description="different people who must approve; no fewer than the class takes",
    )
    roles: tuple[Role, ...] | None = Field(
        default=None,
        description="roles that some of these approvers have besides: [steward, operator] takes one approver who "
        "is a steward and another one who is an operator",
    )

    @model_validator(mode="after")
    def _enough(self) -> RiskSettings:
        least = _APPROVERS[self.risk_class]
        if self.approvers is not None and self.approvers < least:
            raise ValueError(f"approvers: the class {self.risk_class} takes {least} or more")
        if self.roles is not None and len(self.roles) > (count := self.approvers or least):
            raise ValueError(f"approvers: {len(self.roles)} roles need as many approvers, not {count}")
        return self

    @property
    def requirement(self) -> Requirement:
        """What a version of this class takes."""
        return Requirement(
            risk_class=self.risk_class,
            approvers=self.approvers or _APPROVERS[self.risk_class],
            roles=tuple(sorted(_ROLES[self.risk_class] if self.roles is None else self.roles)),
        )


class Approvals(View):
    """Who decided on a version, and what it still takes.

    risk: its class and requirement, None where the project stated no class: one approver. approvers: whose approvals
    count now. refused_by, reason: the newest refusal that is not overturned. missing: what is needed before the
    version may serve, such as "1 more approver with the role steward"; empty if nothing is.
    """

    risk: Requirement | None
    approvers: tuple[str, ...]
    refused_by: str | None
    reason: str
    missing: tuple[str, ...]

    @classmethod
    def by(
        cls, risk: Requirement | None, people: Mapping[str, Sequence[str]], refused_by: str | None, reason: str
    ) -> Approvals:
        """What decisions come to.

        people: name -> roles of everybody whose approval counts; refused_by, reason: the refusal before these.
        """
        needed = missing(risk, people)
        return cls(
            risk=risk,
            approvers=tuple(people),
            refused_by=refused_by if needed else None,
            reason=reason if needed else "",
            missing=needed,
        )


def missing(requirement: Requirement | None, people: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """What an approval still takes, one phrase each; empty if the people meet the requirement.

    requirement: None takes one approver. people: name -> roles of everybody whose approval counts. One person fills one
    place, so the places are given out in the way that fills most of them.
    """
    roles = () if requirement is None else requirement.roles
    filled: dict[int, str] = {}  # place in roles -> person
    for name in people:
        _seat(name, people, roles, filled, set())
    lacking = Counter(role for place, role in enumerate(roles) if place not in filled)
    others = (1 if requirement is None else requirement.approvers) - len(people) - lacking.total()
    phrases = [_phrase(count, f" with the role {role}") for role, count in sorted(lacking.items())]
    return tuple([*phrases, _phrase(others, "")] if others > 0 else phrases)


def _seat(
    name: str, people: Mapping[str, Sequence[str]], roles: Sequence[str], filled: dict[int, str], tried: set[int]
) -> bool:
    """Give a person a place whose role they have, moving others to other places where that helps."""
    for place, role in enumerate(roles):
        if role in people[name] and place not in tried:
            tried.add(place)
            if place not in filled or _seat(filled[place], people, roles, filled, tried):
                filled[place] = name
                return True
    return False


def _phrase(count: int, kind: str) -> str:
    return f"{count} more approver{'s' if count > 1 else ''}{kind}"
