"""Connections, migrations and transactions, on SQLite or PostgreSQL."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import (
    ColumnElement,
    Connection,
    Dialect,
    Engine,
    Executable,
    Select,
    create_engine,
    event,
    func,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

from tunesmith.core.errors import TunesmithError
from tunesmith.core.system.files import disk_full, is_disk_full
from tunesmith.core.text.names import Scope
from tunesmith.core.values import Page
from tunesmith.store.tables import HEAD_REVISION, OLDEST_REVISION, AliasRow, ForScope, StoreRow, Table

_MIGRATIONS = Path(__file__).parent / "migrations"
# The number of the lock that all writers take; any constant will do.
_WRITERS_LOCK = 7_283_019
# PostgreSQL's settings of a write transaction, which all other writers wait for. The first ends one whose process
# hangs, the others one whose machine is gone.
_WRITER = {
    "idle_in_transaction_session_timeout": "30min",
    "tcp_keepalives_idle": "20",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}
# What each of them begins with: it sets these, waits for its turn, and tells the time. One text, so that it is neither
# built nor planned anew each time.
_LIMITS = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in _WRITER.items())
_BEGIN_WRITE = (
    f"select {_LIMITS}, pg_advisory_xact_lock({_WRITERS_LOCK}), extract(epoch from clock_timestamp())::float8"  # noqa: S608 - of constants
)
# Of one process, at most.
_CONNECTIONS = 15
# Bytes: less than SQLite's log and shared memory need.
_LITTLE = 1 << 20
# secure_delete: deleted texts are overwritten in the file.
_PRAGMAS = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=20000", "secure_delete=ON")
# Of a direct connection, whose commits do not wait for the disk. Pages of 4 KiB that may lie in SQLite's log before
# its commit copies them into the database, which waits for the disk too; a server copies them earlier (`checkpoint`).
_DIRECT_PRAGMAS = ("synchronous=NORMAL", "wal_autocheckpoint=8192")


def connect(url: str, new: Callable[[], None] | None = None) -> Engine:
    """Open the database at url and migrate it if needed. Raises TunesmithError if that fails.

    new: called before the tables of a new store and its id are made; raises where there must be none. By default
    tables are made without an id, for a copy.
    """
    # All are kept open: a server's threads would else open and close those beyond the fifth for each request.
    ping = not url.startswith("sqlite")
    # hide_parameters: an error's text must not repeat the texts that a row holds.
    engine = create_engine(url, pool_pre_ping=ping, pool_size=_CONNECTIONS, max_overflow=0, hide_parameters=True)
    if engine.dialect.name == "sqlite":
        _sqlite_transactions(engine)
        if new is not None and not Path(engine.url.database or "").exists():
            new()  # before there is a file
    with _usable(engine):
        migrate(engine, new)
    return engine


def migrate(engine: Engine, new: Callable[[], None] | None = None) -> None:
    """Bring the tables to HEAD_REVISION: make those of a new store, and change those of one that has them.

    Alembic is slow to import, so it is imported only if needed.
    """
    with engine.connect() as connection:
        current = _revision(connection)
    if current == HEAD_REVISION:
        return
    if current is not None and not OLDEST_REVISION <= current < HEAD_REVISION:
        raise TunesmithError(
            f"the database is at revision {current}, this tunesmith reads {OLDEST_REVISION} to {HEAD_REVISION}",
            where=engine.url.render_as_string(hide_password=True),
            fix="install the version of tunesmith that wrote it",
        )
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    with _write(engine) as connection:
        config.attributes["connection"] = connection
        if _revision(connection) is None:  # no other process was faster
            if new is not None:
                new()
            Table.metadata.create_all(connection)
            if new is not None:
                connection.execute(insert(StoreRow), {})
            command.stamp(config, "head")
        else:
            command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    """The revision of a database's tables; None for one without tables."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(text("select version_num from alembic_version"))
    return revision


@contextlib.contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """One write transaction; writers take turns. Commits at the end, rolls back on any exception.

    session.info["began"]: when it got its turn, by PostgreSQL's clock in seconds since 1970; None on SQLite. The disk
    has the commit when it returns. Raises what the engine's fence raises, if it has one.
    """
    with (
        _usable(engine),
        _write(engine) as connection,
        Session(bind=connection, expire_on_commit=False, info={"began": connection.info.get("began")}) as session,
    ):
        if (fence := connection.get_execution_options().get("fence")) is not None:
            fence(session)
        yield session
        session.flush()


def store_id(engine: Engine) -> str:
    """The id of the store that a database holds; "" where it is to be filled."""
    with reading(engine) as session:
        return session.scalar(select(StoreRow.id)) or ""


def append(engine: Engine, table: type[Table], rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows with equal keys in one transaction.

    SQLite leaves it to the operating system when the disk has them: a killed process still loses nothing, a power cut
    may lose the newest transactions, never their order. PostgreSQL waits for the disk. Raises as `writing` does.
    """
    if engine.dialect.name != "sqlite" or "fence" in engine.get_execution_options():
        with writing(engine) as session:
            session.connection().execute(insert(table), list(rows))
        return
    # Without SQLAlchemy's session and connection, which take several times as long as SQLite.
    statement, written_as = _insertion(table, tuple(rows[0]))
    values = [{key: as_stored(row[key]) for key, as_stored in written_as} for row in rows]
    with _direct(engine, statement) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(statement, values)
        connection.execute("COMMIT")


def checkpoint(engine: Engine) -> None:
    """Copy what lies in SQLite's log into the database, so that no `append` has to wait for that. Nobody waits for this
    meanwhile. Does nothing on PostgreSQL."""
    if engine.dialect.name == "sqlite":
        with _direct(engine, statement := "PRAGMA wal_checkpoint(PASSIVE)") as connection:
            connection.execute(statement).fetchone()


def empty_log(engine: Engine) -> None:
    """Empty SQLite's log, which may hold deleted texts, where nobody reads or writes at this moment. Does nothing on
    PostgreSQL."""
    if engine.dialect.name == "sqlite":
        with _direct(engine, statement := "PRAGMA wal_checkpoint(TRUNCATE)") as connection:
            (waits,) = connection.execute("PRAGMA busy_timeout").fetchone()
            connection.execute("PRAGMA busy_timeout=0")  # others are not kept waiting
            connection.execute(statement).fetchone()
            connection.execute(f"PRAGMA busy_timeout={waits}")


def scrub(engine: Engine, tables: Sequence[str]) -> None:
    """Write the database's files anew, without what was deleted: of SQLite the whole file and its log, of PostgreSQL
    these tables. Waits for other transactions. Raises TunesmithError where they keep SQLite's log in use."""
    with _usable(engine), engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        if engine.dialect.name == "postgresql":
            for table in tables:
                connection.exec_driver_sql(f"VACUUM FULL {table}")
    if engine.dialect.name == "sqlite":
        with _direct(engine, statement := "VACUUM") as direct:
            direct.execute(statement)
            busy, *_ = direct.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            fix = "stop what reads it for long, then run the same command again"
            raise TunesmithError(
                "the database's log is in use and may hold deleted texts", where=str(engine.url), fix=fix
            )


def fenced(engine: Engine, fence: Callable[[Session], None]) -> Engine:
    """The same database, whose every write transaction calls fence first; what it raises ends the transaction."""
    return engine.execution_options(fence=fence)


@contextlib.contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """A read-only session."""
    with _usable(engine), Session(engine) as session:
        yield session


def first_row(engine: Engine, query: Executable) -> Sequence[Any] | None:
    """The first row of a query without parameters, without what a session costs."""
    if engine.dialect.name == "sqlite":
        with _direct(engine, statement := _sql(query)) as connection:
            row: Sequence[Any] | None = connection.execute(statement).fetchone()
            return row
    with _usable(engine), engine.connect() as connected:
        return connected.execute(query).first()


@cache
def _sql(query: Executable) -> str:
    return str(query.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True}))  # type: ignore[attr-defined]


@cache
def _insertion(table: type[Table], keys: tuple[str, ...]) -> tuple[str, list[tuple[str, Callable[[Any], Any]]]]:
    """The statement that inserts a row with these keys on SQLite, and what each value is stored as."""
    dialect = sqlite.dialect(paramstyle="named")
    types = {key: table.__table__.columns[key].type.dialect_impl(dialect) for key in keys}
    stored = [(key, each.bind_processor(dialect) or (lambda value: value)) for key, each in types.items()]
    return str(insert(table).compile(dialect=dialect, column_keys=list(keys))), stored


# The direct connections that nobody uses now, by what an engine shares with its fenced ones.
_unused: WeakKeyDictionary[Dialect, deque[sqlite3.Connection]] = WeakKeyDictionary()


@contextlib.contextmanager
def _direct(engine: Engine, statement: str) -> Iterator[sqlite3.Connection]:
    """A connection to SQLite past SQLAlchemy's pool and transactions. Raises what they would raise."""
    unused = _unused.setdefault(engine.dialect, deque())
    try:
        connection = unused.pop()
    except IndexError:
        connection = _open_direct(engine)
    try:
        yield connection
    except BaseException as error:
        connection.close()  # which rolls back
        if isinstance(error, sqlite3.Error):
            with _usable(engine):
                raise DBAPIError.instance(statement, None, error, sqlite3.Error, hide_parameters=True) from error
        raise
    if _unused.get(engine.dialect) is unused:
        unused.append(connection)
    else:  # the engine was disposed of
        connection.close()


def _close_direct(engine: Engine) -> None:
    """Close an engine's direct connections. SQLite's log, which may hold deleted texts, ends with the last one."""
    for connection in _unused.pop(engine.dialect, ()):
        connection.close()


def _open_direct(engine: Engine) -> sqlite3.Connection:
    with _usable(engine):
        pooled = engine.raw_connection()
        connection = pooled.driver_connection
        pooled.detach()
        assert isinstance(connection, sqlite3.Connection)
        for pragma in _DIRECT_PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        return connection


@contextlib.contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """A connection all of whose reads see one moment of the database."""
    if engine.dialect.name == "postgresql":
        engine = engine.execution_options(isolation_level="REPEATABLE READ")
    with _usable(engine), engine.connect() as connection:
        yield connection


@contextlib.contextmanager
def _usable(engine: Engine) -> Iterator[None]:
    """Raise TunesmithError, with the database's address, if it is full, locked, unreachable or read-only."""
    try:
        yield
    except DBAPIError as error:
        if not isinstance(error, OperationalError) and not error.connection_invalidated:
            raise
        file = Path(engine.url.database or "")
        if engine.dialect.name == "sqlite" and (is_disk_full(error) or _found_no_room(error, file)):
            raise disk_full(file) from error
        raise TunesmithError(
            f"the database cannot be used: {error.orig}",
            where=engine.url.render_as_string(hide_password=True),
            fix="free space, wait for other processes, or check the permissions",
        ) from error


def _found_no_room(error: DBAPIError, file: Path) -> bool:
    """Whether SQLite's "disk I/O error" comes from a full disk: its shared memory beside the file found no room."""
    name = getattr(error.orig, "sqlite_errorname", "")
    return name.startswith("SQLITE_IOERR") and shutil.disk_usage(file.parent).free < _LITTLE


@contextlib.contextmanager
def _write(engine: Engine) -> Iterator[Connection]:
    """A transaction that waits for its turn."""
    with engine.execution_options(writes=True).begin() as connection:
        if connection.dialect.name == "postgresql":
            *_, connection.info["began"] = connection.exec_driver_sql(_BEGIN_WRITE).one()
        yield connection


def _sqlite_transactions(engine: Engine) -> None:
    """Real transactions on SQLite: WAL, full sync, and the write lock taken at the start of a write."""

    def on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy begins and commits, so the driver must not.
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")

    def on_begin(connection: Any) -> None:
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    event.listen(engine, "engine_disposed", _close_direct)


def paged(session: Session, query: Select[*tuple[Any, ...]], page: int, each: int) -> tuple[Page, Any]:
    """The page of what a query finds, as `Page.within` has it, and the query of its rows."""
    total = session.scalar(select(func.count()).select_from(query.order_by(None).subquery())) or 0
    at = Page.within(page, total, each)
    return at, query.offset((at.page - 1) * each).limit(each)


def within(table: type[ForScope], scope: Scope, *, or_all: bool = False) -> list[ColumnElement[bool]]:
    """The conditions of a query for what belongs to a scope: rows of its tenant and region, where it names them.

    or_all: also what is for all, which people of the scope may see.
    """
    pairs = ((table.tenant, scope.tenant), (table.region, scope.region))
    return [column.in_(("", value) if or_all else (value,)) for column, value in pairs if value]


def covering(table: type[ForScope | AliasRow], scope: Scope) -> list[ColumnElement[bool]]:
    """The conditions of a query for what callers of a scope may use: what is for all, or for their tenant, region."""
    return [table.tenant.in_(("", scope.tenant)), table.region.in_(("", scope.region))]
