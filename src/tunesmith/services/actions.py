"""What people do: each action is a function that takes who acts and one request, and returns one result.

`@action` lists a function with what front ends need to offer it. From the list come the routes of /api and the form
endpoints of the console; commands call the function with the same request (`cli/terminal.py`, `Acting.do`).
"""

from __future__ import annotations

import importlib
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from tunesmith import services
from tunesmith.core.access import Caller
from tunesmith.core.errors import Forbidden, UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.text.names import Scope
from tunesmith.core.values import first_problem
from tunesmith.project import Project
from tunesmith.store.people.identities import User, get_user
from tunesmith.store.people.roles import ROLES, TokenScope
from tunesmith.store.people.tokens import Token
from tunesmith.store.store import Store

Reason = Annotated[str, StringConstraints(strip_whitespace=True, max_length=2000)]
Because = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Short = Annotated[str, StringConstraints(strip_whitespace=True, max_length=200)]
Named = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]
Number = Annotated[int, Field(ge=1, le=2**31 - 1)]

# What other entries of the audit log say, which several actions or the server itself write.
_ENTRIES = {
    "alias.set": "changed which version an alias names",
    "answer.expire": "ended the wait for a decision on a held answer",
    "answer.refuse": "refused a held answer",
    "answer.release": "released a held answer",
    "answer.replace": "replaced a held answer",
    "cases.expire": "deleted kept requests that were too old",
    "cases.withdraw": "withdrew a kept request",
    "champion.refused": "stopped serving a champion",
    "champion.restored": "served a champion again",
    "erase.done": "erased what was planned",
    "erase.locked": "erased what the bucket does not lock",
    "file.add": "uploaded a file",
    "file.delete": "deleted a file",
    "job.end": "ended a job",
    "rollout.clock": "found that the clock was set back",
    "rollout.override": "overrode a check of the rollout",
    "rollout.pass": "found that the canary passed its analysis",
    "rollout.pause": "paused the rollout",
    "rollout.weight": "set the canary's share of requests",
    "session.end": "logged out",
    "session.open": "logged in",
    "store.backup": "backed up the store",
    "store.migrate": "migrated the store",
    "store.restore": "restored the store",
    "test.use": "used test rows",
    "user.key": "enrolled a key",
}


class Request(BaseModel):
    """What an action is asked to do. A field that it does not have is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Bare(Request):
    """Nothing more is asked."""


class ScopedRequest(Request):
    """A request about a tenant and a region: by default those of whoever asks."""

    tenant: Short | None = None
    region: Short | None = None


Asked = TypeVar("Asked", bound=Request)
Result = TypeVar("Result", bound=BaseModel)


@dataclass(frozen=True)
class Acting:
    """Who acts or looks, and where. session: of the console, "" elsewhere. token: of a caller of /api, None elsewhere.

    region: of the server, the user's own on the command line. progress: of what takes long. unchanged: raises Refused
    where the project file changed since this process read it, before an action that decides; a command reads it anew.
    """

    store: Store
    user: User
    load: Callable[[], Project]
    region: str = ""
    session: str = ""
    token: Token | None = None
    progress: Progress = SILENT
    unchanged: Callable[[], object] = lambda: None

    @property
    def actor(self) -> str:
        """The user's name."""
        return self.user.name

    @property
    def at_machine(self) -> bool:
        """Whether they act by a command, so that this machine may hold their key."""
        return self.token is None and not self.session

    def permits(self, scope: TokenScope) -> bool:
        """Whether a caller's token has a scope; True where nobody called by a token."""
        return self.token is None or self.token.permits(scope)

    @property
    def caller(self) -> Caller:
        """Whom passages are retrieved for."""
        return Caller(Scope(self.user.tenant, self.region), frozenset(self.user.groups))

    @cached_property
    def project(self) -> Project:
        """The project. Raises NotThere where there is none."""
        return self.load()

    def scope(self, asked: ScopedRequest) -> Scope:
        """The scope that a request states; what it leaves out is the user's. Raises Forbidden outside the user's."""
        user, tenant, region = self.user, asked.tenant, asked.region
        scope = Scope(user.tenant if tenant is None else tenant, user.region if region is None else region)
        if not user.scope.covers(scope):
            raise Forbidden(f"{self.actor} is for {user.scope}, which does not include {scope}")
        return scope


def acting_in(project: Project, actor: str | None = None) -> Acting:
    """Who acts in a project. actor: by default $TUNESMITH_USER, else the store's owner."""
    user = get_user(project.store, project.actor(actor))
    return Acting(project.store, user, lambda: project, user.region)


def on_this_machine(store: Store, load: Callable[[], Project]) -> Acting:
    """Whoever runs this machine: they see all that is in a store, and have no name to change anything by."""
    return Acting(store, User(name="", roles=ROLES), load)


@dataclass(frozen=True)
class Terms:
    """How an action is offered.

    name: also of its audit entry, if it writes one. says: what that entry says, such as "paused the rollout".
    permission: of roles. tokens: the scopes of which a token needs one; any token where none is listed. at: its path
    under /api, with fields of the request in braces; "" for what commands alone do. whole: only for users of all
    tenants and regions. form: the console offers it. api: so does /api, if it has a path. refused: the code of a
    refusal. reads_files: it takes longer than a transaction does.
    """

    name: str
    says: str = ""
    permission: str | None = None
    tokens: tuple[TokenScope, ...] = ()
    at: str = ""
    method: Literal["POST", "DELETE"] = "POST"
    whole: bool = False
    form: bool = False
    api: bool = True
    refused: str = "refused"
    reads_files: bool = False


@dataclass(frozen=True, kw_only=True)
class Action(Terms, Generic[Asked, Result]):
    """An action. Call it as its function: who acts, and the request."""

    does: Callable[[Acting, Asked], Result]

    @cached_property
    def asked(self) -> type[Asked]:
        """The model of its requests."""
        asked: type[Asked] = next(self._hints[name] for name in self._hints if name not in ("acting", "return"))
        return asked

    @cached_property
    def result(self) -> type[Result]:
        """The model of its results."""
        result: type[Result] = self._hints["return"]
        return result

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return typing.get_type_hints(self.does)

    def check(self, user: User) -> None:
        """Raise Forbidden where a user may not do this, whatever it is done to."""
        if self.whole:
            user.require_everything()
        if self.permission is not None:
            user.require(self.permission)

    def __call__(self, acting: Acting, asked: Asked) -> Result:
        """Do it. Raises Forbidden as `check` does, and what the function raises."""
        self.check(acting.user)
        return self.does(acting, asked)

    def request(self, fields: Mapping[str, Any]) -> Asked:
        """The request with these fields. Raises UsageError for one that is not valid."""
        try:
            return self.asked.model_validate(dict(fields))
        except ValidationError as error:
            name, said = first_problem(error)
            raise UsageError(f"invalid {name!r}: {said}" if name else said, where=name or self.name) from error


_LISTED: dict[str, Action[Any, Any]] = {}


class action(Terms):  # noqa: N801 - a decorator
    """Lists a function as an action with these terms."""

    def __call__(self, does: Callable[[Acting, Asked], Result]) -> Action[Asked, Result]:
        """The action that the function becomes."""
        _LISTED[self.name] = made = Action(**vars(self), does=does)
        return made


def all_actions() -> Iterator[Action[Any, Any]]:
    """Every action of the modules beside this one."""
    for module in pkgutil.iter_modules(services.__path__):
        importlib.import_module(f"tunesmith.services.{module.name}")
    yield from _LISTED.values()


@cache
def _entries() -> Mapping[str, str]:
    return _ENTRIES | {each.name: each.says for each in all_actions() if each.says}


def audit_words(entry: str) -> str:
    """What somebody did, such as "paused the rollout". An entry of a later release keeps its name."""
    return _entries().get(entry, entry)
