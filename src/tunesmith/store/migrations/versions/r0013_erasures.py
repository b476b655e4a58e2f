"""The tables of erasures."""

from alembic import op

from tunesmith.store.tables import ErasedRow, ErasureRow

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    for row in (ErasureRow, ErasedRow):
        row.metadata.tables[row.__tablename__].create(op.get_bind())
