"""`users` and `keys`: who may do what, and with which key they sign."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith import services
from tunesmith.cli.terminal import Acting, Drawn, Here, add_commands, add_group, say, table
from tunesmith.core.reading.text_files import read_text_file
from tunesmith.store.people.roles import TOKEN_SCOPES

if TYPE_CHECKING:
    from tunesmith.services.users import TokenList, UserList, UserView

_SCOPES = (
    f"What it may be used for: {', '.join(TOKEN_SCOPES)} (the default); repeatable. It never permits more than its "
    "user's roles."
)
User = Annotated[str, typer.Argument(help="The user's name.")]
Roles = Annotated[list[str], typer.Option("--role", help="engineer, steward, approver, operator or admin; repeatable.")]
Groups = Annotated[list[str] | None, typer.Option("--group", help="They may see documents of this group; repeatable.")]
NewLabel = Annotated[str | None, typer.Option("--label", help="The new key's name; by default key-1, key-2 and so on.")]
Label = Annotated[str, typer.Argument(help="The key's name, as `tunesmith keys list` shows it.")]
Fingerprint = Annotated[str, typer.Argument(help="As its user told it to you; its first 20 digits are enough.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = add_group(app, "users", "Who may do what.")
    add_commands(group, add, roles, groups, deactivate, token, tokens, revoke_token, list=list_users)
    group = add_group(app, "keys", "The keys that versions and approvals are signed with.")
    add_commands(group, create, enrol, confirm, reject, retire, revoke, list=list_keys)
    add_commands(app, login_link)


def login_link(here: Acting, user: str | None = None, *, url: str = "http://127.0.0.1:8000") -> None:
    """Print a link that opens the web console once, within ten minutes.

    user USER: Who logs in; by default you.
    url: Where people reach the server that `tunesmith serve` started.
    """
    here.show(services.users.make_link, lambda link: link.url)


def list_users(here: Here) -> None:
    """List every user with their roles, deactivated ones included."""
    here.emit(services.users.list_users(here.machine), _draw_users)


def add(
    here: Acting,
    name: Annotated[str, typer.Argument(metavar="USER", help="The user's name.")],
    *,
    roles: Roles,
    tenant: str = "",
    region: str = "",
    groups: Groups = None,
    public_key: Path | None = None,
) -> None:
    """Add a user. Without --public-key, a key pair is made here when they first sign.

    tenant: They may act for this tenant only.
    region: They may act for this region only.
    public_key FILE: Their own public key, PEM, EC P-256.
    """
    if public_key is None:
        here.show(services.users.add, _draw_roles)
    else:
        pem = read_text_file(public_key, "the public key")
        here.show(services.users.add_with_key, _draw_roles, public_key=pem)


def roles(here: Acting, user: User, *, roles: Roles) -> None:
    """Replace a user's roles with the given ones."""
    _warn(here, here.show(services.users.set_roles, _draw_roles))


def groups(here: Acting, user: User, *, groups: Groups = None) -> None:
    """Replace the groups whose documents a user may see. Without --group the user is in none."""
    here.show(
        services.users.set_groups,
        lambda changed: f"{user} is in {', '.join(changed.groups) or 'no group'}",
        groups=groups or (),
    )


def deactivate(here: Acting, user: User) -> None:
    """Deactivate a user: their tokens, approvals and signatures no longer count."""
    _warn(here, here.show(services.users.deactivate, f"{user} is deactivated"))


def token(
    here: Acting,
    user: User,
    *,
    name: str = "first",
    scopes: Annotated[list[str] | None, typer.Option("--scope", help=_SCOPES)] = None,
    expires: str | None = None,
) -> None:
    """Make a token for the HTTP interface. It is shown only once.

    name: The token's name. A new token `first` replaces the one before.
    expires DAYS: As 30d, or never; 90d by default.
    """
    issued = here.do(services.users.issue_token)
    end = "it does not expire" if issued.expires is None else f"it expires on {issued.expires[:10]}"
    say(f"the token {issued.name} of {user}, shown only once; {end}:")
    here.emit(issued, issued.token)


def tokens(here: Here, user: str | None = None) -> None:
    """List tokens: what they are for, when they expire, when they were used last. Their secrets are kept nowhere.

    user: Whose; by default all.
    """
    here.emit(services.users.list_tokens(here.machine, user=user), _draw_tokens)


def revoke_token(here: Acting, user: User, name: str) -> None:
    """End a token at once.

    name TOKEN: Its name, as `tunesmith users tokens` shows it.
    """
    here.show(services.users.revoke_token, f"the token {name} of {user} is revoked")


def list_keys(here: Here) -> None:
    """List every key, retired, revoked and proposed ones included, and whether its private half is on this machine."""
    here.emit(services.users.list_keys(here.machine), _draw_keys)


def create(here: Acting, user: str | None = None, *, label: NewLabel = None) -> None:
    """Make a key pair. The private half stays in $TUNESMITH_KEYS, or else in the store's keys folder.

    A second key replaces the first one: retire the old one afterwards. You need an old private key, or an admin.

    user: Whose key; by default your own.
    """
    made = here.show(services.users.create_key, _draw_enrolled)
    say(f"the private key is {made.path}; keep it secret and keep a copy")


def enrol(here: Acting, user: User, file: Path, *, label: NewLabel = None) -> None:
    """Bind a public key that was made elsewhere to a user, so that only its owner can sign as that user.

    file: A public key, PEM, EC P-256.
    """
    here.show(services.users.enrol_key, _draw_enrolled, public_key=read_text_file(file, "the public key"))


def confirm(here: Acting, user: User, fingerprint: Fingerprint) -> None:
    """Let a key count that a user proposed in the web console. Only an admin may, and not for a key of their own.

    The fingerprint must come from the user by another way than this server: in person, by telephone or by a chat.
    """
    here.show(services.users.confirm_key, _draw_enrolled)


def reject(here: Acting, user: User, fingerprint: Fingerprint) -> None:
    """End the proposal of a key that a user made in the web console."""
    here.show(services.users.reject_key, lambda key: f"the proposed key {key.fingerprint} of {key.user} is rejected")


def retire(here: Acting, user: User, label: Label) -> None:
    """End the use of a key. What it signed before keeps counting; what it signs from now on does not."""
    here.show(services.users.retire_key, _draw_ended)


def revoke(here: Acting, user: User, label: Label, *, since: str) -> None:
    """Revoke a stolen key. What the audit log recorded of it since then does not count. Only an admin may.

    since TIME|ENTRY: Since when it may be stolen: ISO 8601 with a time zone, or the number of an entry of the audit
        log.
    """
    here.show(services.users.revoke_key, _draw_ended)
    _warn_of_champions(here)


def _draw_roles(user: UserView) -> str:
    return f"{user.user} is {', '.join(user.roles)}"


def _draw_enrolled(made: services.users.EnrolledKey) -> str:
    return f"{made.user} signs with {made.label}: {made.fingerprint}"


def _draw_ended(ended: services.users.EndedKey) -> Drawn:
    yield f"the key {ended.label} of {ended.user} is {ended.status} from audit entry {ended.until} on"
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
    for champion in services.rollouts.refused_champions(here.store):
        say(str(champion.warning))


def _warn(here: Acting, user: UserView) -> None:
    _warn_of_champions(here)
    if user.invalidated:
        say(f"signed by {user.user} and no longer valid: {', '.join(user.invalidated)}")
        say("`tunesmith register` as another engineer signs the same verdict under the next number")


def _draw_users(listed: UserList) -> Drawn:
    rows = (
        (user.user, ", ".join(user.roles), user.tenant, user.region, ", ".join(user.groups), user.active)
        for user in listed.users
    )
    yield table(rows, "user", "roles", "tenant", "region", "groups", "active")


def _draw_tokens(listed: TokenList) -> Drawn:
    rows = (
        (one.user, one.name, ", ".join(one.scopes), one.status, *map(_minute, (one.created, one.expires, one.used)))
        for one in listed.tokens
    )
    yield table(rows, "user", "token", "scopes", "status", "created", "expires", "last used")


def _minute(at: str | None) -> str:
    return "never" if at is None else at[:16].replace("T", " ")


def _draw_keys(listed: services.users.KeyList) -> Drawn:
    rows: list[tuple[object, ...]] = [
        (key.user, key.label, key.fingerprint, key.status, key.until or "", key.private) for key in listed.keys
    ]
    rows += [(key.user, "", key.fingerprint, "proposed", "", False) for key in listed.proposed]
    yield table(rows, "user", "label", "fingerprint", "status", "until entry", "private")
