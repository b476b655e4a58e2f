"""Sessions of the web console, and the one-time links that open them."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "login_links",
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("user", sa.String(length=128), nullable=False),
        sa.Column("made_by", sa.String(length=128), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_table(
        "sessions",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("before", sa.String(length=71), nullable=True),
        sa.Column("user", sa.String(length=128), nullable=False),
        sa.Column("opened", sa.Float(), nullable=False),
        sa.Column("changed", sa.Float(), nullable=False),
        sa.Column("used", sa.Float(), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("digest"),
        sa.UniqueConstraint("before"),
    )
    op.create_index(op.f("ix_sessions_user"), "sessions", ["user"])


def downgrade() -> None:
    op.drop_table("sessions")
    op.drop_table("login_links")
