"""Tokens with names, scopes and ends. The only token that each user had becomes their first one, for everything."""

from datetime import datetime

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

_USERS = sa.table("users", sa.column("name", sa.String()), sa.column("token_digest", sa.String()))
_AUDIT = sa.table("audit", *(sa.column(name) for name in ("seq", "at", "action", "subject")))
_TIMES = ("created", "expires", "revoked", "used")
_TOKENS = sa.table(
    "tokens",
    *(sa.column(name, sa.String()) for name in ("digest", "user", "name")),
    sa.column("scopes", sa.JSON()),
    *(sa.column(name, sa.Float()) for name in _TIMES),
)


def upgrade() -> None:
    op.create_table(
        "tokens",
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("user", sa.String(length=128), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        *(sa.Column(name, sa.Float(), nullable=name != "created") for name in _TIMES),
        sa.PrimaryKeyConstraint("digest"),
        sa.UniqueConstraint("user", "name"),
    )
    connection = op.get_bind()
    issued = {}  # user -> when their token was issued: the audit log's last word on it
    for subject, at in connection.execute(
        sa.select(_AUDIT.c.subject, _AUDIT.c.at).where(_AUDIT.c.action == "user.token").order_by(_AUDIT.c.seq)
    ):
        issued[subject] = datetime.fromisoformat(at).timestamp()
    held = sa.select(_USERS.c.name, _USERS.c.token_digest).where(_USERS.c.token_digest.is_not(None))
    for user, digest in connection.execute(held).all():
        row = {"digest": digest, "user": user, "name": "first", "scopes": ["all"], "created": issued.get(user, 0.0)}
        connection.execute(_TOKENS.insert().values(row))
    with op.batch_alter_table("users") as users:
        users.drop_column("token_digest")


def downgrade() -> None:
    with op.batch_alter_table("users") as users:
        users.add_column(sa.Column("token_digest", sa.String(length=71), nullable=True))
        users.create_unique_constraint("users_token_digest_key", ["token_digest"])
    # A token that ends or has scopes would be for everything and for ever: its user needs another one.
    connection = op.get_bind()
    for row in connection.execute(sa.select(_TOKENS).where(_TOKENS.c.name == "first")).mappings().all():
        if row["scopes"] == ["all"] and row["expires"] is None and row["revoked"] is None:
            owner = sa.update(_USERS).where(_USERS.c.name == row["user"])
            connection.execute(owner.values(token_digest=row["digest"]))
    op.drop_table("tokens")
