"""Tokens for the HTTP interface: several a user, each with a name, scopes and an end.

A token is 256 random bits, of which the store keeps the digest. Issuing and revoking one is one transaction with its
audit entry. Times are seconds since 1970.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from tunesmith.core.clock import day
from tunesmith.core.digests import digest_bytes
from tunesmith.core.errors import NextStep, NotThere, Refused, UsageError
from tunesmith.core.text.names import check_name
from tunesmith.core.values import View
from tunesmith.store.people.identities import User, changing, get_user, token_state, user_row
from tunesmith.store.people.roles import TOKEN_SCOPES, TokenScope, chosen
from tunesmith.store.store import Store, session_of
from tunesmith.store.tables import TokenRow, UserRow

# Secret scanners, and the privacy scan of rows, recognise a leaked token by its prefix and length.
_PREFIX, _BYTES = "tsk_", 32
TOKEN_FORM = rf"{_PREFIX}[A-Za-z0-9_-]{{{-(-_BYTES * 4 // 3)}}}"
FIRST = "first"  # the name of a token without another
_MOST = 100  # tokens of one user that work

TokenStatus = Literal["active", "expired", "revoked"]


class Token(View):
    """One token. expires: None never. revoked, used: when; None if it was not. used is about a minute late."""

    user: str
    name: str
    scopes: tuple[str, ...]
    created: float
    expires: float | None = None
    revoked: float | None = None
    used: float | None = None

    def status(self, at: float) -> TokenStatus:
        """Whether it works at a time, as far as that is up to the token."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and at >= self.expires else "active"

    @property
    def ended(self) -> str:
        """When a token ended that has ended, in words."""
        at, how = (self.expires, "expired") if self.revoked is None else (self.revoked, "was revoked")
        return f"the token {self.name} of {self.user} {how} on {day(at or 0.0)}"

    def permits(self, *needed: TokenScope) -> bool:
        """Whether it has one of these scopes. What its user's roles permit is another question."""
        return "all" in self.scopes or not set(needed).isdisjoint(self.scopes)

    def lacks(self, *needed: TokenScope) -> str:
        """What to say where it has none of these scopes."""
        return f"the token {self.name} of {self.user} has no scope {' or '.join(needed)}, only {', '.join(self.scopes)}"

    def covers(self, scopes: Iterable[str]) -> bool:
        """Whether it permits everything that a token with these scopes permits."""
        return "all" in self.scopes or set(scopes) <= set(self.scopes)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and with which token. digest: the token's."""

    user: User
    token: Token
    digest: str


def issue_token(
    store: Store,
    user: str,
    *,
    actor: str,
    name: str = FIRST,
    scopes: Iterable[str] = ("all",),
    expires: float | None = None,
    now: float | None = None,
) -> str:
    """Make a token and return its secret, which is known nowhere else.

    A name is free again once its token has ended; a user's `first` token replaces the one before at once. Raises
    UsageError for a bad or used name, an unknown scope or an end in the past; Refused if actor may not, if the user is
    deactivated or has too many tokens.
    """
    check_name(name, "token name")
    given, at = chosen(scopes, TOKEN_SCOPES, "scope", "a token"), time_or_now(now)
    if expires is not None and expires <= at:
        raise UsageError("the token would have expired already", fix="give a later end")
    secret = _PREFIX + secrets.token_urlsafe(_BYTES)
    with changing(store, actor, "user.token", user, own=True) as (session, detail):
        owner = user_row(session, user)
        if not owner.active:
            raise Refused(f"{user} is deactivated", fix="add a new user")
        live = [row for row in owner.tokens if _token(row).status(at) == "active"]
        if name != FIRST and name in (row.name for row in live):
            raise UsageError(
                f"{user} already has a token {name}",
                fix=NextStep("choose another name, or revoke that one", "users revoke-token", user=user, name=name),
            )
        if len(live) >= _MOST:
            raise Refused(
                f"{user} has {_MOST} tokens that work", fix=NextStep("revoke some", "users revoke-token", user=user)
            )
        for row in owner.tokens:
            if row.name == name:
                session.delete(row)
        session.flush()
        row = TokenRow(
            digest=secret_digest(secret), user=user, name=name, scopes=given, created=at, expires=expires, revoked=None
        )
        session.add(row)
        detail["tokens"] = [token_state(row)]
    return secret


def revoke_token(store: Store, user: str, name: str, *, actor: str, now: float | None = None) -> Token:
    """End a token at once. Raises UsageError where there is none or it was revoked before; Refused if actor may not."""
    with changing(store, actor, "user.token.revoke", user, own=True) as (session, detail):
        row = _row(session, user, name)
        if row.revoked is not None:
            what = f"the token {name} of {user} was revoked on {day(row.revoked)}"
            raise NotThere(what, fix="nothing is left to do", code="token_not_found")
        row.revoked = time_or_now(now)
        detail["tokens"] = [token_state(row)]
        return _token(row)


def authenticate(where: Store | Session, secret: str, *, now: float | None = None) -> Caller | None:
    """Who has this token. None for any other text, or if the user is deactivated.

    Raises Refused, with the reason, for a token that expired or was revoked. The look-up uses the token's SHA-256, so
    its duration does not show how close a guess was.
    """
    digest = secret_digest(secret)
    with session_of(where) as session:
        row = session.get(TokenRow, digest)
        owner = session.get(UserRow, row.user) if row is not None else None
        if row is None or owner is None or not owner.active or not hmac.compare_digest(row.digest, digest):
            return None
        token, user = _token(row), get_user(session, owner.name)
    if token.status(time_or_now(now)) != "active":
        raise Refused(token.ended, fix=NextStep("have another one made", "users token", user=token.user))
    return Caller(user, token, digest)


def list_tokens(where: Store | Session, user: str | None = None) -> list[Token]:
    """The tokens of a user or of all users, ended ones included, oldest first for each user."""
    query = select(TokenRow).order_by(TokenRow.user, TokenRow.created, TokenRow.name)
    with session_of(where) as session:
        if user is not None:
            query = query.where(TokenRow.user == get_user(session, user).name)
        return [_token(row) for row in session.scalars(query)]


def note_use(store: Store, used: Mapping[str, float]) -> None:
    """Keep when tokens, by their digests, were used last. This is no change of state, so it leaves no audit entry."""
    with store.writing() as session:
        for digest, at in used.items():
            session.execute(update(TokenRow).where(TokenRow.digest == digest).values(used=at))


def _row(session: Session, user: str, name: str) -> TokenRow:
    query = select(TokenRow).where(TokenRow.user == get_user(session, user).name, TokenRow.name == name)
    row = session.scalars(query).first()
    if row is None:
        fix = NextStep("list the tokens", "users tokens", user=user)
        raise NotThere(f"{user} has no token of that name", fix=fix, code="token_not_found")
    return row


def _token(row: TokenRow) -> Token:
    return Token.model_validate(row, from_attributes=True)


def secret_digest(secret: str) -> str:
    """What the store keeps of a secret."""
    return digest_bytes(secret.encode(errors="replace"))


def time_or_now(now: float | None) -> float:
    """Seconds since 1970: now, where a caller says when that is."""
    return time.time() if now is None else now
