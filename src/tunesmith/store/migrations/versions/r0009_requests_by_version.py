"""An index from which the requests of a version in a span of time are counted, in place of the one by version only."""

from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_index("requests_by_version", "requests", ["version", "at", "tenant", "region", "ok"])
    op.drop_index(op.f("ix_requests_version"), "requests")


def downgrade() -> None:
    op.create_index(op.f("ix_requests_version"), "requests", ["version"])
    op.drop_index("requests_by_version", "requests")
