"""Which role permits which action, and the scopes that a token may have."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, get_args

from tunesmith.core.errors import UsageError

Role = Literal["engineer", "steward", "approver", "operator", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
# What a token lets its holder call, within what the user's roles permit. all: everything.
TokenScope = Literal["chat", "feedback", "jobs", "decisions", "read", "rows", "operate", "tokens", "all"]
TOKEN_SCOPES: tuple[TokenScope, ...] = get_args(TokenScope)


def chosen(given: Iterable[str], known: Sequence[str], what: str, owner: str) -> list[str]:
    """The given roles or scopes, sorted. Raises UsageError for an unknown one, and for none."""
    names = sorted(set(given))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        said = f"{unknown[0][:80]!r} is not a {what}" if unknown else f"{owner} needs at least one {what}"
        raise UsageError(said, fix=f"{what}s are {', '.join(known)}")
    return names


# Action -> the roles that permit it. An action that is not listed is permitted to nobody. An admin may not approve: an
# admin who also approves took the role approver, and the audit log shows it.
ACTIONS: Mapping[str, tuple[Role, ...]] = MappingProxyType(
    {
        "data.build": ("engineer", "steward"),
        "data.sign": ("steward",),
        "row.review": ("engineer", "steward"),
        "row.read": ("engineer", "steward"),
        "training.run": ("engineer",),
        "evaluation.run": ("engineer",),
        "evidence.read": ("engineer", "steward", "approver"),
        "version.register": ("engineer",),
        "version.override": ("admin",),
        "version.approve": ("approver",),
        "paper.write": ("engineer", "steward"),
        "answer.review": ("approver", "steward"),
        "version.export": ("operator", "engineer", "admin"),
        "rollout.start": ("operator", "engineer", "admin"),
        "rollout.change": ("operator", "engineer", "admin"),
        "rollout.override": ("admin",),
        "recall.start": ("steward", "admin"),
        "erase.plan": ("steward",),
        "erase.confirm": ("steward", "admin"),
        "version.hold": ("steward", "admin"),
        "hold.end": ("admin",),
        "store.prune": ("operator", "admin"),
        "job.add": ("engineer",),
        "job.change": ("operator", "engineer", "admin"),
        "webhook.retry": ("operator", "engineer", "admin"),
        "file.read": ("engineer", "steward", "admin"),
        "file.change": ("engineer", "steward", "admin"),
        "audit.anchor": ROLES,
        "model.use": ROLES,
        "user.change": ("admin",),
        "store.copy": ("admin",),
    }
)


def permits(roles: Collection[str], action: str) -> bool:
    """Whether one of these roles permits an action."""
    return any(role in roles for role in ACTIONS.get(action, ()))
