"""`users` and `keys`: who may do what, and with which key they sign."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.terminal import Acting, Here, add_commands, draw_table, printed, say
from tunesmith.core.reading.text_files import read_text_file
from tunesmith.store.people.roles import TOKEN_SCOPES

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.services.keys import EndedKey, EnrolledKey, KeyList
    from tunesmith.services.users import TokenList, UserList, UserView

Name = Annotated[str, typer.Argument(metavar="USER", help="The user's name.")]
Roles = Annotated[list[str], typer.Option("--role", help="engineer, steward, approver, operator or admin; repeatable.")]
Groups = Annotated[list[str] | None, typer.Option("--group", help="They may see documents of this group; repeatable.")]
Label = Annotated[str | None, typer.Option("--label", help="The new key's name; by default key-1, key-2 and so on.")]
Given = Annotated[str, typer.Argument(metavar="LABEL", help="The key's name, as `tunesmith keys list` shows it.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    users = typer.Typer(help="Who may do what.", no_args_is_help=True)
    add_commands(users, add, roles, groups, deactivate, token, tokens, revoke_token, list=list_users)
    app.add_typer(users, name="users")
    keys = typer.Typer(help="The keys that versions and approvals are signed with.", no_args_is_help=True)
    add_commands(keys, create, enrol, confirm, reject, retire, revoke, list=list_keys)
    app.add_typer(keys, name="keys")
    add_commands(app, login_link)


def login_link(
    here: Acting,
    name: Annotated[str | None, typer.Argument(metavar="USER", help="Who logs in; by default you.")] = None,
    url: Annotated[
        str, typer.Option("--url", help="Where people reach the server that `tunesmith serve` started.")
    ] = "http://127.0.0.1:8000",
) -> None:
    """Print a link that opens the web console once, within ten minutes."""
    from tunesmith.services import users

    link = here.do(users.make_link, user=name, url=url)
    here.emit(link, printed(link.url))


def list_users(here: Here) -> None:
    """List every user with their roles, deactivated ones included."""
    from tunesmith.services import users

    here.emit(users.list_users(here.store), _draw_users)


def add(
    here: Acting,
    name: Name,
    role: Roles,
    tenant: Annotated[str, typer.Option("--tenant", help="They may act for this tenant only.")] = "",
    region: Annotated[str, typer.Option("--region", help="They may act for this region only.")] = "",
    group: Groups = None,
    public_key: Annotated[
        Path | None, typer.Option("--public-key", metavar="FILE", help="Their own public key, PEM, EC P-256.")
    ] = None,
) -> None:
    """Add a user. Without --public-key, a key pair is made here when they first sign."""
    from tunesmith.services import users

    if public_key is None:
        user = here.do(users.add, name=name, roles=role, tenant=tenant, region=region, groups=group)
    else:
        pem = read_text_file(public_key, "the public key")
        user = here.do(
            users.add_with_key, name=name, roles=role, tenant=tenant, region=region, groups=group, public_key=pem
        )
    here.emit(user, printed(f"{name} is {', '.join(user.roles)}"))


def roles(here: Acting, name: Name, role: Roles) -> None:
    """Replace a user's roles with the given ones."""
    from tunesmith.services import users

    user = here.do(users.set_roles, user=name, roles=role)
    _warn(here, user)
    here.emit(user, printed(f"{name} is {', '.join(user.roles)}"))


def groups(here: Acting, name: Name, group: Groups = None) -> None:
    """Replace the groups whose documents a user may see. Without --group the user is in none."""
    from tunesmith.services import users

    user = here.do(users.set_groups, user=name, groups=group or ())
    here.emit(user, printed(f"{name} is in {', '.join(user.groups) or 'no group'}"))


def deactivate(here: Acting, name: Name) -> None:
    """Deactivate a user: their tokens, approvals and signatures no longer count."""
    from tunesmith.services import users

    user = here.do(users.deactivate, user=name)
    _warn(here, user)
    here.emit(user, printed(f"{name} is deactivated"))


def token(
    here: Acting,
    user: Name,
    name: Annotated[
        str, typer.Option("--name", help="The token's name. A new token `first` replaces the one before.")
    ] = "first",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope",
            help=f"What it may be used for: {', '.join(TOKEN_SCOPES)} (the default); repeatable. "
            "It never permits more than its user's roles.",
        ),
    ] = None,
    expires: Annotated[
        str | None, typer.Option("--expires", metavar="DAYS", help="As 30d, or never; 90d by default.")
    ] = None,
) -> None:
    """Make a token for the HTTP interface. It is shown only once."""
    from tunesmith.services import users

    issued = here.do(users.issue_token, user=user, name=name, scopes=scope, expires=expires)
    end = "it does not expire" if issued.expires is None else f"it expires on {issued.expires[:10]}"
    say(f"the token {issued.name} of {user}, shown only once; {end}:")
    here.emit(issued, printed(issued.token))


def tokens(
    here: Here, user: Annotated[str | None, typer.Argument(metavar="[USER]", help="Whose; by default all.")] = None
) -> None:
    """List tokens: what they are for, when they expire, when they were used last. Their secrets are kept nowhere."""
    from tunesmith.services import users

    here.emit(users.list_tokens(here.store, user), _draw_tokens)


def revoke_token(
    here: Acting,
    user: Name,
    name: Annotated[str, typer.Argument(metavar="TOKEN", help="Its name, as `tunesmith users tokens` shows it.")],
) -> None:
    """End a token at once."""
    from tunesmith.services import users

    ended = here.do(users.revoke_token, user=user, name=name)
    here.emit(ended, printed(f"the token {name} of {user} is revoked"))


def list_keys(here: Here) -> None:
    """List every key, retired, revoked and proposed ones included, and whether its private half is on this machine."""
    from tunesmith.services import keys

    here.emit(keys.list_keys(here.store), _draw_keys)


def create(
    here: Acting,
    name: Annotated[str | None, typer.Argument(metavar="[USER]", help="Whose key; by default your own.")] = None,
    label: Label = None,
) -> None:
    """Make a key pair. The private half stays in $TUNESMITH_KEYS, or else in the store's keys folder.

    A second key replaces the first one: retire the old one afterwards. You need an old private key, or an admin.
    """
    from tunesmith.services import keys

    made = here.do(keys.create, user=name, label=label)
    say(f"the private key is {made.path}; keep it secret and keep a copy")
    here.emit(made, _print_enrolled)


def enrol(
    here: Acting,
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A public key, PEM, EC P-256.")],
    label: Label = None,
) -> None:
    """Bind a public key that was made elsewhere to a user, so that only its owner can sign as that user."""
    from tunesmith.services import keys

    pem = read_text_file(file, "the public key")
    here.emit(here.do(keys.enrol, user=name, public_key=pem, label=label), _print_enrolled)


Fingerprint = Annotated[
    str, typer.Argument(metavar="FINGERPRINT", help="As its user told it to you; its first 20 digits are enough.")
]


def confirm(here: Acting, name: Name, fingerprint: Fingerprint) -> None:
    """Let a key count that a user proposed in the web console. Only an admin may, and not for a key of their own.

    The fingerprint must come from the user by another way than this server: in person, by telephone or by a chat.
    """
    from tunesmith.services import keys

    here.emit(here.do(keys.confirm, user=name, fingerprint=fingerprint), _print_enrolled)


def reject(here: Acting, name: Name, fingerprint: Fingerprint) -> None:
    """End the proposal of a key that a user made in the web console."""
    from tunesmith.services import keys

    ended = here.do(keys.reject, user=name, fingerprint=fingerprint)
    here.emit(ended, printed(f"the proposed key {ended.fingerprint} of {ended.user} is rejected"))


def retire(here: Acting, name: Name, label: Given) -> None:
    """End the use of a key. What it signed before keeps counting; what it signs from now on does not."""
    from tunesmith.services import keys

    here.emit(here.do(keys.retire, user=name, label=label), _print_ended)


def revoke(
    here: Acting,
    name: Name,
    label: Given,
    since: Annotated[
        str,
        typer.Option(
            "--since",
            metavar="TIME|ENTRY",
            help="Since when it may be stolen: ISO 8601 with a time zone, or the number of an entry of the audit log.",
        ),
    ],
) -> None:
    """Revoke a stolen key. What the audit log recorded of it since then does not count. Only an admin may."""
    from tunesmith.services import keys

    ended = here.do(keys.revoke, user=name, label=label, since=since)
    _warn_of_champions(here)
    here.emit(ended, _print_ended)


def _print_enrolled(console: Console, made: EnrolledKey) -> None:
    printed(f"{made.user} signs with {made.label}: {made.fingerprint}")(console, made)


def _print_ended(console: Console, ended: EndedKey) -> None:
    printed(f"the key {ended.label} of {ended.user} is {ended.status} from audit entry {ended.until} on")(
        console, ended
    )
    for what, labels in (
        ("revoked too, as it was enrolled with a stolen key", ended.also_revoked),
        (f"given by {ended.user} since then; look whether a thief did", ended.to_look_at),
        ("no longer signed", ended.invalidated),
        ("an approval no longer counts", ended.unapproved),
        ("a refusal no longer counts", ended.unrefused),
    ):
        if labels:
            say(f"{what}: {', '.join(labels)}")
    if ended.invalidated or ended.unapproved or ended.unrefused:
        say("`tunesmith register`, `approve` and `refuse` with an active key sign them again")


def _warn_of_champions(here: Acting) -> None:
    """Say which champions may not serve after a change."""
    from tunesmith.services.rollouts import refused_champions

    for champion in refused_champions(here.store):
        say(str(champion.warning))


def _warn(here: Acting, user: UserView) -> None:
    _warn_of_champions(here)
    if user.invalidated:
        say(f"signed by {user.user} and no longer valid: {', '.join(user.invalidated)}")
        say("`tunesmith register` as another engineer signs the same verdict under the next number")


def _draw_users(console: Console, found: UserList) -> None:
    rows = (
        (user.user, ", ".join(user.roles), user.tenant, user.region, ", ".join(user.groups), user.active)
        for user in found.users
    )
    draw_table(console, rows, "user", "roles", "tenant", "region", "groups", "active")


def _draw_tokens(console: Console, found: TokenList) -> None:
    rows = (
        (
            *(token.user, token.name, ", ".join(token.scopes), token.status),
            *map(_minute, (token.created, token.expires, token.used)),
        )
        for token in found.tokens
    )
    draw_table(console, rows, "user", "token", "scopes", "status", "created", "expires", "last used")


def _minute(at: str | None) -> str:
    return "never" if at is None else at[:16].replace("T", " ")


def _draw_keys(console: Console, found: KeyList) -> None:
    rows: list[tuple[object, ...]] = [
        (key.user, key.label, key.fingerprint, key.status, key.until or "", key.private) for key in found.keys
    ]
    rows += [(key.user, "", key.fingerprint, "proposed", "", False) for key in found.proposed]
    draw_table(console, rows, "user", "label", "fingerprint", "status", "until entry", "private")
