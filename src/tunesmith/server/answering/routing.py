"""Finds the version that answers a caller's request for a model, and loads versions into the engine."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from uuid import uuid4

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunesmith.candidates.answering import Answerer
from tunesmith.candidates.candidate import Candidate, load_candidate
from tunesmith.core.digests import digest_bytes, short
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.text.names import Scope, check_name
from tunesmith.engines.protocol import Engine
from tunesmith.registry.approvals import require_approved
from tunesmith.registry.opening import Verified, verified_copy
from tunesmith.registry.serving import Permission, override_in_force, standing, still_valid
from tunesmith.registry.versions import Version, get_alias, load_version, resolve
from tunesmith.rollout.state import Rollout, live_rollout
from tunesmith.rollout.traffic import goes_to_canary
from tunesmith.server.errors import (
    ApiError,
    forbidden,
    no_such_model,
    not_available,
    passes,
    unauthorised,
    unavailable,
)
from tunesmith.services.jobs import NotYet, version_behind
from tunesmith.store import database, locks
from tunesmith.store.people.identities import User
from tunesmith.store.people.tokens import Caller, authenticate
from tunesmith.store.store import Store
from tunesmith.store.tables import CHAMPION, AliasRow, VersionRow
from tunesmith.store.until_changed import UntilChanged

_LOG = logging.getLogger("tunesmith.server")
_REST = 5.0  # seconds after an error that may pass in which nobody tries again
_UNREGISTERED = 8  # candidates without weights that stay ready for the playground
# What a caller reads about a version that may not serve. Names of signers and approvers are for the operator only.
_FOR_CALLERS = {
    "signer": "has no trusted signature",
    "not_approved": "is not approved",
    "refused": "is not approved",
    "override": "is not approved",
}


@dataclass(frozen=True, slots=True)
class Route:
    """The version that answers a request. arm: stable, canary or pinned.

    stable: the version that answers if the canary cannot be loaded; None unless arm is canary.
    unloaded: it answers for that reason, and arm is stable now.
    """

    version: Version
    arm: str
    rollout: int | None = None
    step: int | None = None
    stable: Version | None = None
    unloaded: bool = False


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a model's name means to a tenant until the store changes. permission: whether the version may serve.

    arm: of requests that no rollout divides. rollout, canary: a live rollout that divides the name's traffic, and its
    canary if that may serve.
    """

    version: Version
    permission: Permission
    arm: str = "stable"
    rollout: Rollout | None = None
    canary: Version | None = None

    def holds(self) -> bool:
        """Whether no version that may serve has expired since."""
        versions = [self.version] if self.permission.granted else []
        versions += [self.canary] if self.canary is not None else []
        return all(still_valid(version).granted for version in versions)


class Router:
    """Maps model names to versions, and refuses those that may not serve now.

    Asks the database before each request whether anything changed. If so, or if a version expired, it decides anew
    (registry/serving.py). So a change by any process counts from the next request on. clock: seconds since 1970.
    """

    def __init__(
        self, store: Store, region: str, versions: ReadyVersions, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._region, self._versions, self._clock = store, region, versions, clock
        self._choices = UntilChanged[_Choice](store, _Choice.holds)
        self._callers = UntilChanged[Caller](store, self._active)
        # Of pinned versions. Their weights are read once, and again when they are loaded (ReadyVersions).
        self._verified: Verified = {}
        self._verifying: dict[str, threading.Lock] = {}
        self._retries = Retries()

    def caller(self, token: str) -> Caller:
        """Who has this token now. Raises ApiError 401 for no valid token, 403 if they may not use models."""

        def decide(session: Session) -> Caller:
            try:
                who = authenticate(session, token, now=self._clock())
            except Refused as error:
                raise unauthorised(f"{error.what}: {error.fix}") from None
            if who is None:
                raise unauthorised()
            if not who.user.may("model.use"):
                raise forbidden(f"{who.user.name} may not use models.")
            return who

        return self._callers.get(digest_bytes(token.encode()), decide)

    def known_caller(self, token: str) -> Caller | None:
        """Who has this token, if that is known already; None where `caller` has to look."""
        return self._callers.known(digest_bytes(token.encode()))

    def _active(self, caller: Caller) -> bool:
        return caller.token.status(self._clock()) == "active"

    def route(self, user: User, model: str, key: str) -> Route:
        """The version for a request. key: requests with equal keys get the same arm.

        Raises ApiError 404: model_not_found, or model_not_available for a version that the caller may know of but that
        may not serve.
        """
        return self._route(self._choice(user, model), model, key)

    def known_route(self, user: User, model: str, key: str) -> Route | None:
        """As `route`, if that is known already; None where it has to look."""
        choice = self._choices.known((user.tenant, model)) if user.region in ("", self._region) else None
        return None if choice is None else self._route(choice, model, key)

    def _route(self, choice: _Choice, model: str, key: str) -> Route:
        version, rollout = choice.version, choice.rollout
        if not choice.permission.granted:
            raise _not_serving(model, version, choice.permission)
        if rollout is None:
            return Route(version, choice.arm)
        if choice.canary is not None and goes_to_canary(rollout.id, rollout.weight, key):
            return Route(choice.canary, "canary", rollout.id, rollout.step, stable=version)
        return Route(version, "stable", rollout.id, rollout.step)

    def models(self, user: User) -> list[tuple[str, Version]]:
        """(model name, version) of every model that would answer the user now. A version that could not be loaded when
        it was last needed is left out, and a pinned one whose files cannot be read now. After one of these, the others
        that would be read are left out too: each of them waits for a bucket as long.
        """
        if user.region not in ("", self._region):
            return []
        scope = Scope(user.tenant, self._region)
        with database.reading(self._store.engine) as session:
            aliases = select(AliasRow.name).where(AliasRow.alias == CHAMPION, AliasRow.version != "")
            aliases = aliases.where(*database.covering(AliasRow, scope)).distinct()
            names = sorted(session.scalars(aliases))
            versions = select(VersionRow).where(*database.covering(VersionRow, scope))
            rows = session.scalars(versions.order_by(VersionRow.name, VersionRow.number))
            labels = [row.label for row in rows]
        answering, away = [], False
        for model in [*(f"{name}{suffix}" for name in names for suffix in ("", "@champion")), *labels]:
            try:
                if away and self._choices.kept((user.tenant, model)) is None:
                    continue
                choice = self._choice(user, model)
            except ApiError:
                continue
            except TunesmithError as error:
                if model not in labels:
                    raise
                _LOG.error("the list of models leaves out %s and what cannot be read either: %s", model, error)
                away = True
                continue
            if choice.permission.granted and choice.version.digest not in self._versions.failed:
                answering.append((model, choice.version))
        return answering

    def _choice(self, user: User, model: str) -> _Choice:
        if user.region not in ("", self._region):
            raise no_such_model(model)
        scope = Scope(user.tenant, self._region)

        def decide(session: Session) -> _Choice:
            name, _, rest = model.partition("@")
            try:
                if (label := version_behind(session, model, scope)) is not None:
                    return self._pinned(session, resolve(self._store, label, scope=scope, session=session), scope)
                check_name(name, "version name")
                if rest in ("", CHAMPION) and model.count("@") == bool(rest):
                    return self._champion(session, model, name, scope)
                return self._pinned(session, resolve(self._store, model, scope=scope, session=session), scope)
            except NotYet as error:
                raise not_available(model, error.what) from error
            except UsageError:
                raise no_such_model(model) from None
            except Refused as error:
                _LOG.error("%s cannot be read: %s", model[:120], error)
                raise not_available(model, "its version cannot be read") from error

        return self._choices.get((user.tenant, model), decide)

    def _champion(self, session: Session, model: str, name: str, scope: Scope) -> _Choice:
        for covering in scope.covering():
            alias = get_alias(session, name, covering)
            if alias is None:
                continue
            stable = load_version(self._store, alias.version, session)
            permission = standing(session, stable, scope)
            rollout = live_rollout(session, name, covering)
            if rollout is None or rollout.stable != stable.digest:
                return _Choice(stable, permission)
            # The controller will abort a canary that may not serve. Until then stable answers its requests.
            canary = None
            with contextlib.suppress(Refused):
                loaded = load_version(self._store, rollout.canary, session)
                canary = loaded if standing(session, loaded, scope).granted else None
            return _Choice(stable, permission, rollout=rollout, canary=canary)
        raise no_such_model(model)

    def _pinned(self, session: Session, version: Version, scope: Scope) -> _Choice:
        permission = standing(session, version, scope)
        if permission.granted and override_in_force(session, version, scope) is None:
            try:
                self._require_approved(session, version)
            except (Refused, UsageError) as error:
                permission = Permission("not_approved", error.what, error.fix)
        return _Choice(version, permission, arm="pinned")

    def _require_approved(self, session: Session, version: Version) -> None:
        """Read the files of a version's approvals, as a rollout does before it starts, and its weights only once.

        Raises ApiError 503 where another thread tried it a moment ago and met an error that may pass.
        """
        turn: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if version.digest not in self._verified:  # the threads that wait find it verified, or the error
            turn = self._verifying.setdefault(version.digest, threading.Lock())
        try:
            self._retries.check(version)
            with turn, self._retries.trying(version):
                require_approved(self._store, version, session, self._verified)
        except TriedLately as error:
            raise unavailable() from error
        finally:
            if isinstance(self._verified.get(version.digest), TunesmithError):
                self._verified.pop(version.digest, None)  # decided anew when somebody needs it


def _not_serving(model: str, version: Version, permission: Permission) -> ApiError:
    if permission.reason in ("unknown", "wrong_scope"):
        return no_such_model(model)
    why = _FOR_CALLERS.get(str(permission.reason), permission.message)
    return not_available(model, f"{version.label} {why}")


def load_may_pass(error: BaseException) -> bool:
    """Whether the error of a load says nothing about the version: the next load may succeed."""
    return isinstance(error, OSError) or (isinstance(error, TunesmithError) and passes(error))


class TriedLately(TunesmithError):
    """It was tried a moment ago and failed for a reason that may pass. The log has the error of that attempt."""


class Retries:
    """After an error that may pass, lets one thread at a time try again and refuses the others at once.

    Threads that wait for a bucket that is away would leave none for other versions. Thread-safe.
    """

    def __init__(self) -> None:
        self._until: dict[str, float] = {}  # digest of a version -> until when nobody tries

    def check(self, version: Version) -> None:
        """Raise TriedLately where it is too early to try again, or another thread does."""
        if time.monotonic() < self._until.get(version.digest, -math.inf):
            raise TriedLately(f"{version.label} could not be used a moment ago", fix="try again shortly")

    @contextlib.contextmanager
    def trying(self, version: Version) -> Iterator[None]:
        """Try, and note how it ended. Raises as check does."""
        self.check(version)
        if version.digest in self._until:
            self._until[version.digest] = math.inf
        try:
            yield
        except BaseException as error:
            self._until.pop(version.digest, None)
            if load_may_pass(error):
                self._until[version.digest] = time.monotonic() + _REST
            raise
        self._until.pop(version.digest, None)


class ReadyVersions:
    """The versions that are verified and loaded into the engine of their base. Thread-safe: loads one at a time.

    Whether they may serve is the Router's to decide, for every request. failed: digests of those that could not be
    verified and loaded when they were last needed.
    """

    def __init__(self, store: Store, *engines: Engine) -> None:
        self._store, self._engines = store, {engine.base: engine for engine in engines}
        self.failed: set[str] = set()
        self._ready: dict[str, Answerer] = {}
        self._retries = Retries()
        self._opening = threading.Lock()
        self._owner = uuid4().hex  # of the notes of what is loaded, which an erasure looks at
        self.without_weights = lru_cache(_UNREGISTERED)(self._without_weights)  # with their indexes of texts

    def answerer(self, version: Version) -> Answerer:
        """The version's answerer, after verifying and loading it.

        Raises TunesmithError if it does not verify, TriedLately as Retries does.
        """
        ready = self._ready.get(version.digest)
        if ready is not None and self._held(ready):
            return ready
        self._retries.check(version)
        with self._opening:
            if version.digest not in self._ready or not self._held(self._ready[version.digest]):
                try:
                    with self._retries.trying(version):
                        self._ready[version.digest] = self._open(version)
                except BaseException:
                    self.failed.add(version.digest)
                    raise
                self.failed.discard(version.digest)
            return self._ready[version.digest]

    def _without_weights(self, candidate: str) -> Answerer:
        """A candidate that has no weights of its own, registered or not, by its record's digest."""
        self._note(candidate, f"candidate {short(candidate)}")
        return self._answerer(load_candidate(self._store, candidate))

    def _note(self, candidate: str, label: str) -> None:
        """Say in the database that this process holds the texts and weights of a candidate, until it ends."""
        what = f"a server that loaded {label} and has to be restarted"
        locks.take(self._store.engine, f"{locks.LOADED}{candidate} {self._owner}", what, self._owner)

    def renew(self) -> None:
        """Say that what is loaded still is. Others believe it for locks.LEASE_SECONDS."""
        locks.renew(self._store.engine, self._owner)

    def end(self) -> None:
        """Say that this process ends."""
        locks.drop(self._store.engine, self._owner)

    def _answerer(self, candidate: Candidate) -> Answerer:
        return Answerer(self._store, self._engines.get(candidate.base) or next(iter(self._engines.values())), candidate)

    @property
    def bases(self) -> Collection[str]:
        """Digests of the bases that the engines run."""
        return self._engines.keys()

    def _open(self, version: Version) -> Answerer:
        self._note(version.candidate, version.label)
        with verified_copy(self._store, version) as loaded:
            answerer = self._answerer(loaded.candidate)
            if loaded.adapter is not None and answerer.candidate.training is not None:
                self._engines[answerer.candidate.base].load_adapter(answerer.candidate.training, loaded.adapter)
        return answerer

    def _held(self, answerer: Answerer) -> bool:
        """Whether the engine still has its weights. The engine unloads fully trained models to free memory."""
        asked = answerer.candidate
        return asked.training is None or self._engines[asked.base].holds(asked.training)
