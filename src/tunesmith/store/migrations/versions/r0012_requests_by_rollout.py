"""An index from which a rollout's requests are read in the order of time, in place of two that do not order them."""

from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.create_index("requests_by_rollout", "requests", ["rollout", "at"])
    op.drop_index(op.f("ix_requests_rollout"), "requests")
    op.drop_index("requests_by_rollout_arm", "requests")


def downgrade() -> None:
    op.create_index("requests_by_rollout_arm", "requests", ["rollout", "arm"])
    op.create_index(op.f("ix_requests_rollout"), "requests", ["rollout"])
    op.drop_index("requests_by_rollout", "requests")
