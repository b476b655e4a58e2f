"""The store's id."""

from alembic import op
from sqlalchemy import insert

from tunesmith.store.tables import StoreRow

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    StoreRow.metadata.tables[StoreRow.__tablename__].create(op.get_bind())
    op.get_bind().execute(insert(StoreRow), {})
