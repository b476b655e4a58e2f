"""Finds the version that answers a caller's request for a model, and loads versions into the engine."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

from sqlalchemy import select

from tunesmith.candidates.answering import Answerer
from tunesmith.core.errors import Refused, TunesmithError, UsageError
from tunesmith.core.names import check_name
from tunesmith.core.scope import Scope
from tunesmith.core.version_ref import VersionRef
from tunesmith.engines.protocol import Engine
from tunesmith.registry.aliases import get_alias
from tunesmith.registry.approvals import require_approved
from tunesmith.registry.serving import Permission, may_load
from tunesmith.registry.versions import Version, load_version, resolve, verified_copy
from tunesmith.rollout.state import live_rollout
from tunesmith.rollout.traffic import goes_to_canary
from tunesmith.server.errors import ApiError, no_such_model, not_available
from tunesmith.store import database
from tunesmith.store.identities import User
from tunesmith.store.store import Store
from tunesmith.store.tables import AliasRow, VersionRow

# For how long a checked approval of a pinned version is not checked again: one check of its signature takes 20 ms.
_APPROVED_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Route:
    """The version that answers a request. arm: stable, canary or pinned.

    stable: the version that answers if the canary cannot be loaded; None unless arm is canary.
    """

    name: str
    version: Version
    arm: str
    rollout: int | None = None
    step: int | None = None
    stable: Version | None = None


class Router:
    """Maps model names to versions. Reads the database for each request, so a rollback takes effect at once."""

    def __init__(self, store: Store, region: str) -> None:
        self._store, self._region = store, region
        self._approved: dict[str, float] = {}

    def route(self, user: User, model: str, key: str) -> Route:
        """The version for a request. key: requests with equal keys get the same arm. Raises ApiError 404."""
        if user.region not in ("", self._region):
            raise no_such_model(model)
        name, _, rest = model.partition("@")
        try:
            check_name(name, "version name")
            if rest in ("", "champion") and model.count("@") == bool(rest):
                return self._champion(user, model, name, key)
            version = resolve(self._store, model, scope=Scope(user.tenant, self._region))
        except UsageError:
            raise no_such_model(model) from None
        except Refused as error:
            raise not_available(model, error.what) from error
        route = self._checked(user, model, Route(name=version.name, version=version, arm="pinned"))
        problem = self._unapproved(user, version)
        if problem is not None:
            raise not_available(model, problem)
        return route

    def models(self, user: User) -> list[tuple[str, Version]]:
        """(model name, version) of every model that the user may use now."""
        if user.region not in ("", self._region):
            return []
        tenants, regions = {"", user.tenant}, {"", self._region}
        with database.reading(self._store.engine) as session:
            aliases = select(AliasRow.name).where(AliasRow.alias == "champion", AliasRow.version != "")
            aliases = aliases.where(AliasRow.tenant.in_(tenants), AliasRow.region.in_(regions)).distinct()
            names = sorted(session.scalars(aliases))
            versions = select(VersionRow).where(VersionRow.tenant.in_(tenants), VersionRow.region.in_(regions))
            rows = session.scalars(versions.order_by(VersionRow.name, VersionRow.number))
            labels = [str(VersionRef(row.name, row.number)) for row in rows]
        found = []
        for model in [*(f"{name}{suffix}" for name in names for suffix in ("", "@champion")), *labels]:
            try:
                found.append((model, self.route(user, model, "").version))
            except ApiError:
                continue
        return found

    def _champion(self, user: User, model: str, name: str, key: str) -> Route:
        for scope in Scope(user.tenant, self._region).covering():
            with database.reading(self._store.engine) as session:
                alias = get_alias(session, name, "champion", scope)
                rollout = live_rollout(session, name, scope) if alias is not None else None
            if alias is None:
                continue
            stable = self._load(model, alias.version)
            if rollout is None or rollout.stable != stable.digest:
                return self._checked(user, model, Route(name=name, version=stable, arm="stable"))
            to_stable = Route(name=name, version=stable, arm="stable", rollout=rollout.id, step=rollout.step)
            if goes_to_canary(rollout.id, rollout.weight, key):
                canary = self._load(model, rollout.canary)
                # The controller will abort a canary that may not be loaded. Until then stable answers its requests.
                if self._permission(user, canary).granted:
                    return replace(to_stable, version=canary, arm="canary", stable=stable)
            return self._checked(user, model, to_stable)
        raise no_such_model(model)

    def _load(self, model: str, digest: str) -> Version:
        try:
            return load_version(self._store, digest)
        except Refused as error:
            raise not_available(model, error.what) from error

    def _checked(self, user: User, model: str, route: Route) -> Route:
        permission = self._permission(user, route.version)
        if not permission.granted:
            raise not_available(model, f"{route.version.label} {permission.message}")
        return route

    def _permission(self, user: User, version: Version) -> Permission:
        """Whether a version may be loaded for a user. The rollout checked the approval of champion and canary."""
        with database.reading(self._store.engine) as session:
            return may_load(session, version, Scope(user.tenant, self._region))

    def _unapproved(self, user: User, version: Version) -> str | None:
        """Why a version may not be used by its number: not approved, nor champion or canary. None if it may."""
        if time.monotonic() < self._approved.get(version.digest, 0.0):
            return None
        for scope in Scope(user.tenant, self._region).covering():
            with database.reading(self._store.engine) as session:
                alias = get_alias(session, version.name, "champion", scope)
                rollout = live_rollout(session, version.name, scope)
            if version.digest in (alias and alias.version, rollout and rollout.canary):
                return None
        try:
            require_approved(self._store, version)
        except TunesmithError as error:
            return error.what
        self._approved[version.digest] = time.monotonic() + _APPROVED_SECONDS
        return None


class ReadyVersions:
    """The versions that are verified and loaded into the engine. Thread-safe: loads one at a time."""

    def __init__(self, store: Store, engine: Engine) -> None:
        self._store, self._engine = store, engine
        self._ready: dict[str, Answerer] = {}
        self._opening = threading.Lock()

    def answerer(self, version: Version) -> Answerer:
        """The version's answerer, after verifying and loading it. Raises TunesmithError if it does not verify."""
        ready = self._ready.get(version.digest)
        if ready is not None and self._held(ready):
            return ready
        with self._opening:
            if version.digest not in self._ready or not self._held(self._ready[version.digest]):
                with verified_copy(self._store, version) as loaded:
                    answerer = Answerer(self._store, self._engine, loaded.candidate)
                    if loaded.adapter is not None and answerer.adapter is not None:
                        self._engine.load_adapter(answerer.adapter, loaded.adapter)
                self._ready[version.digest] = answerer
            return self._ready[version.digest]

    def _held(self, answerer: Answerer) -> bool:
        """Whether the engine still has its weights. The engine unloads fully trained models to free memory."""
        return answerer.adapter is None or self._engine.holds(answerer.adapter)
