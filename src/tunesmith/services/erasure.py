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
from tunesmith.registry.signing.attestations import envelope_of
from tunesmith.services.actions import Acting, Because, Number, Request, Short, action
from tunesmith.services.monitoring import cause_of
from tunesmith.services.versions import Prepared, Signature, sign_here


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
    given = partial(erasure.plan, reason=asked.reason, weights=asked.weights, kept_until=asked.kept_until)
    return given(store, cause, actor=acting.actor, sign=sign_here(acting) if acting.at_machine else None)


@action("erase.confirm", says="confirmed an erasure", permission="erase.confirm", whole=True)
def confirm(acting: Acting, asked: ConfirmErasure) -> Plan:
    """Erase what a plan of another person names, with the signature of who confirms it."""
    return erasure.confirm(acting.store, asked.erasure, actor=acting.actor, sign=sign_here(acting))


@_confirms("erase.prepare", at="/erasures/{erasure}/prepare")
def prepare(acting: Acting, asked: ConfirmErasure) -> Prepared:
    """State what whoever acts signs: their own plan, or what another person's plan erases, which is recalled first."""
    acting.unchanged()
    return Prepared.by(acting, erasure.prepare(acting.store, asked.erasure, actor=acting.actor))


@_confirms("erase.submit", at="/erasures/{erasure}/confirm")
def submit(acting: Acting, asked: SignedErasure) -> Plan:
    """Sign a plan of one's own, or erase what one of another person names. The caller signed exactly this."""
    acting.unchanged()
    sign = partial(envelope_of, fingerprint=asked.key, signature=asked.signature)
    return erasure.confirm(acting.store, asked.erasure, actor=acting.actor, sign=sign, at=asked.at)
