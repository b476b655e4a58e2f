"""`users` and `keys`: who may do what, and with which key they sign."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.terminal import HERE, As, Directory, Json, emit, say

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.store.identities import User
    from tunesmith.store.store import Store

Name = Annotated[str, typer.Argument(metavar="USER", help="The user's name.")]
Roles = Annotated[list[str], typer.Option("--role", help="engineer, steward, approver, operator or admin; repeatable.")]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    users = typer.Typer(help="Who may do what.", no_args_is_help=True)
    users.command("list")(list_all)
    users.command()(add)
    users.command()(roles)
    users.command()(deactivate)
    users.command()(token)
    app.add_typer(users, name="users")
    keys = typer.Typer(help="The keys that versions and approvals are signed with.", no_args_is_help=True)
    keys.command("list")(list_keys)
    keys.command()(create)
    keys.command()(enrol)
    app.add_typer(keys, name="keys")


def list_all(directory: Directory = HERE, as_json: Json = False) -> None:
    """Every user with their roles; deactivated ones too."""
    from tunesmith.project import open_store
    from tunesmith.store import identities

    store = open_store(directory)
    identities.ensure_owner(store)
    rows = [_facts(user) for user in identities.list_users(store)]
    emit(
        {"users": rows}, as_json, lambda console: _table(console, rows, ("user", "roles", "tenant", "region", "active"))
    )


def add(
    name: Name,
    role: Roles,
    tenant: Annotated[str, typer.Option("--tenant", help="They may act for this tenant alone.")] = "",
    region: Annotated[str, typer.Option("--region", help="They may act for this region alone.")] = "",
    public_key: Annotated[
        Path | None, typer.Option("--public-key", metavar="FILE", help="Their own public key, PEM, EC P-256.")
    ] = None,
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
) -> None:
    """Add a user. Without --public-key a pair is made here when they first sign."""
    from tunesmith.project import open_store
    from tunesmith.registry.signing import keys
    from tunesmith.store import identities

    store = open_store(directory)
    who = identities.acting(store, actor)
    pem = public_key.read_bytes() if public_key is not None else None
    user = identities.add_user(store, name, role, actor=who, tenant=tenant, region=region)
    if pem is not None:
        user = keys.enrol_public_key(store, name, pem, actor=who)
    _tell(user, as_json, f"{name} is {', '.join(user.roles)}")


def roles(name: Name, role: Roles, directory: Directory = HERE, as_json: Json = False, actor: As = None) -> None:
    """Replace a user's roles by those given."""
    from tunesmith.project import open_store
    from tunesmith.store import identities

    store = open_store(directory)
    signed = _signed_by(store, name)
    user = identities.set_roles(store, name, role, actor=identities.acting(store, actor))
    _warn(user, signed)
    _tell(user, as_json, f"{name} is {', '.join(user.roles)}")


def deactivate(name: Name, directory: Directory = HERE, as_json: Json = False, actor: As = None) -> None:
    """Take a user out of service: their token, approvals and signatures count no more."""
    from tunesmith.project import open_store
    from tunesmith.store import identities

    store = open_store(directory)
    signed = _signed_by(store, name)
    user = identities.deactivate(store, name, actor=identities.acting(store, actor))
    _warn(user, signed)
    _tell(user, as_json, f"{name} is deactivated")


def token(name: Name, directory: Directory = HERE, as_json: Json = False, actor: As = None) -> None:
    """A new token for the HTTP interface, in place of any older one. It is shown once and never again."""
    from tunesmith.project import open_store
    from tunesmith.store import identities

    store = open_store(directory)
    issued = identities.issue_token(store, name, actor=identities.acting(store, actor))
    say(f"{name}'s token, shown this once; an older one counts no more:")
    emit({"user": name, "token": issued}, as_json, lambda console: console.print(issued, markup=False, soft_wrap=True))


def list_keys(directory: Directory = HERE, as_json: Json = False) -> None:
    """Every enrolled key; private ones that are here are marked."""
    from tunesmith.project import open_store
    from tunesmith.registry.signing import keys
    from tunesmith.store import identities

    store = open_store(directory)
    rows = [
        {
            "user": key.user,
            "fingerprint": key.fingerprint,
            "roles": list(key.roles),
            "active": key.active,
            "private": keys.private_key_path(store, key.user).is_file(),
        }
        for key in identities.trusted_keys(store)
    ]
    columns = ("user", "fingerprint", "active", "private")
    emit({"keys": rows}, as_json, lambda console: _table(console, rows, columns))


def create(
    name: Annotated[str | None, typer.Argument(metavar="[USER]", help="Whose; your own without.")] = None,
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
) -> None:
    """Make a key pair. The private half stays in $TUNESMITH_KEYS, else in the store's keys folder."""
    from tunesmith.project import open_store
    from tunesmith.registry.signing import keys
    from tunesmith.store.identities import acting

    store = open_store(directory)
    who = acting(store, actor)
    user = keys.create_key(store, name or who, actor=who)
    say(f"the private half lies in {keys.private_key_path(store, user.name)}; keep it from others, and keep a copy")
    _tell(user, as_json, f"{user.name} signs with {user.fingerprint}")


def enrol(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A public key, PEM, EC P-256.")],
    directory: Directory = HERE,
    as_json: Json = False,
    actor: As = None,
) -> None:
    """Bind a public key that was made elsewhere to a user, so that only they can sign as them."""
    from tunesmith.project import open_store
    from tunesmith.registry.signing import keys
    from tunesmith.store.identities import acting

    store = open_store(directory)
    user = keys.enrol_public_key(store, name, file.read_bytes(), actor=acting(store, actor))
    _tell(user, as_json, f"{name} signs with {user.fingerprint}")


def _facts(user: User) -> dict[str, Any]:
    return {
        "user": user.name,
        "roles": list(user.roles),
        "tenant": user.tenant,
        "region": user.region,
        "active": user.active,
        "fingerprint": user.fingerprint,
    }


def _tell(user: User, as_json: bool, line: str) -> None:
    emit(_facts(user), as_json, lambda console: console.print(line, markup=False, soft_wrap=True))


def _table(console: Console, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for row in rows:
        cells = [row[column] for column in columns]
        table.add_row(*(Text(", ".join(cell) if isinstance(cell, list) else str(cell)) for cell in cells))
    console.print(table)


def _signed_by(store: Store, name: str) -> list[str]:
    from tunesmith.core.errors import TunesmithError
    from tunesmith.registry.versions import list_versions

    # A damaged registry must not stand in the way of taking someone out of service.
    with contextlib.suppress(TunesmithError):
        return [version.label for version in list_versions(store) if version.signer == name]
    return []


def _warn(user: User, signed: Sequence[str]) -> None:
    """Say at once what stops verifying, rather than at the next restart of a server."""
    if signed and not user.may("version.register"):
        say(f"signed by {user.name} and no longer believed: {', '.join(signed)}")
        say("`tunesmith register` as another engineer signs the same verdict anew, under the next number")
