"""Erasing the texts of rows: a steward plans it, and a second person confirms it with their key."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from tunesmith.monitoring import erasure
from tunesmith.monitoring.erasure import ErasurePlans as ErasurePlans
from tunesmith.monitoring.erasure import Plan
from tunesmith.monitoring.erasure import list_erasures as list_erasures
from tunesmith.monitoring.traces import Weights
from tunesmith.registry.erasures import statement_of
from tunesmith.registry.signing import keys
from tunesmith.registry.signing.attestations import envelope_of, seal
from tunesmith.services.actions import Acting, Because, Number, Request, Short, action
from tunesmith.services.monitoring import cause_of
from tunesmith.services.versions import Prepared, Signature


class PlanErasure(Request):
    """What to erase: kind and value, such as subject and C-1042, or `recall` and what `recalls` lists.

    reason: kept in the audit log. weights: what happens to the weights that learned the rows. kept_until: the day until
    which backups, logs and replicas of the database are kept.
    """

    kind: Literal["row", "source", "licence", "subject", "tenant", "recall"]
    value: str = Field(min_length=1, max_length=300)
    reason: Because
    weights: Weights = "keep"
    kept_until: Short = ""


class ConfirmErasure(Request):
    """The erasure to confirm, by the number of its plan."""

    erasure: Number


class SignedErasure(Signature):
    """A signature over what was prepared. at: the time that the statement says. key, signature: as for a decision on a
    version."""

    erasure: Number
    at: str = Field(pattern=r"^[0-9T:.Z-]{20,30}$")


_confirms = partial(
    action, permission="erase.confirm", tokens=("operate",), whole=True, form=True, reads_files=True
)  # fmt: skip


@action(
    "erase.plan", says="planned an erasure", permission="erase.plan", tokens=("operate",), at="/erasures", whole=True,
    form=True, reads_files=True,
)  # fmt: skip
def plan(acting: Acting, asked: PlanErasure) -> Plan:
    """List everything that holds the texts of rows, and write it down for a second person. Deletes nothing."""
    store, kind, value = acting.store, asked.kind, asked.value
    cause = cause_of(store, *(value.partition(" ")[::2] if kind == "recall" else (kind, value)))
    return erasure.plan(
        store, cause, reason=asked.reason, actor=acting.actor, weights=asked.weights, kept_until=asked.kept_until
    )


@action("erase.confirm", says="confirmed an erasure", permission="erase.confirm", whole=True)
def confirm(acting: Acting, asked: ConfirmErasure) -> Plan:
    """Erase what a plan of another person names, with the signature of who confirms it."""
    key = keys.load_signing_key(acting.store, keys.ensure_key(acting.store, acting.actor))
    return erasure.confirm(acting.store, asked.erasure, actor=acting.actor, sign=lambda stated: seal(stated, key))


@_confirms("erase.prepare", at="/erasures/{erasure}/prepare")
def prepare(acting: Acting, asked: ConfirmErasure) -> Prepared:
    """Recall what a plan of another person names, and state what its second person signs. Deletes nothing."""
    acting.unchanged()
    return Prepared.by(acting, statement_of(erasure.prepare(acting.store, asked.erasure, actor=acting.actor)))


@_confirms("erase.submit", at="/erasures/{erasure}/confirm")
def submit(acting: Acting, asked: SignedErasure) -> Plan:
    """Erase what a plan of another person names. The caller signed the statement of exactly this."""
    acting.unchanged()
    sign = partial(envelope_of, fingerprint=asked.key, signature=asked.signature)
    return erasure.confirm(acting.store, asked.erasure, actor=acting.actor, sign=sign, at=asked.at)
