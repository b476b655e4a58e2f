"""Alembic's entry point: runs the migrations on the connection `database.migrate` hands over."""

from alembic import context

from tunesmith.store.tables import Table

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Table.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
