"""The oldest revision that is read. `database.migrate` makes the tables of a new store without a migration.

A later revision changes an existing store, and takes the change back: `down_revision = "0012"`, `upgrade`, `downgrade`.
"""

revision = "0012"
down_revision = None


def upgrade() -> None:
    raise NotImplementedError("a new store's tables are made by database.migrate")
