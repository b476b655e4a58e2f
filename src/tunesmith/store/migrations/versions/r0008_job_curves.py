"""The curves of a job's trainings."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "job_curves",
        sa.Column("job", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("training", sa.String(length=256), nullable=False),
        sa.Column("curve", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("job", "training"),
    )


def downgrade() -> None:
    op.drop_table("job_curves")
