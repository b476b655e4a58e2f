"""Copies of a whole store: into a file and back, and from this machine's folder to PostgreSQL and a bucket."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tunesmith.core.errors import UsageError
from tunesmith.core.progress import SILENT, Progress
from tunesmith.core.view import View
from tunesmith.store import audit, database
from tunesmith.store.blobs.local import LocalBlobs
from tunesmith.store.copying import (
    Archive,
    Contents,
    export_rows,
    import_rows,
    keys_of,
    put_objects,
    require_no_rows,
    write_archive,
)
from tunesmith.store.people.identities import acting, first_user, require
from tunesmith.store.store import DATABASE, Store
from tunesmith.store.uploads import without_bytes

_ACTION = "store.copy"


class StoreCopy(View):
    """What was copied. bytes: of the objects (blobs, records, version files, trusted keys, cases, uploaded files).

    missing: ids of uploaded files whose bytes were gone. They stay listed, and whoever reads one gets told to upload it
    again. Empty for a backup, whose restore names them.
    """

    place: str
    objects: int
    bytes: int
    rows: int
    missing: tuple[str, ...] = ()


def backup(store: Store, file: Path, *, actor: str | None = None, progress: Progress = SILENT) -> StoreCopy:
    """Write database and objects into one new file. Private keys and work folders are not in it.

    Others may use the store meanwhile: the file holds one moment of the database, and every object that it names.
    Raises Refused for somebody who may not, and for an object whose bytes are not those that its key names.
    """
    user = acting(store, actor)
    require(store, user, _ACTION)
    copied = write_archive(store, file.absolute(), progress)
    with store.change(user, "store.backup", file.name, {"rows": copied.rows, "objects": copied.objects}):
        pass
    return StoreCopy(place=str(file), objects=copied.objects, bytes=copied.bytes, rows=copied.rows)


def restore(store: Store, file: Path, *, actor: str | None = None, progress: Progress = SILENT) -> StoreCopy:
    """Fill an empty store from a file of backup. If the call is killed, the same one continues.

    Every byte of the file is compared with its digest before anything is written. actor: a user of the backup, by
    default its owner. Raises Refused for a damaged file, and for a store that holds something.
    """
    with store.scratch() as folder, Archive(file.absolute(), folder) as archive:
        return _fill(store, archive.contents, actor, "store.restore", file.name, progress)


def migrate(root: Path, *, actor: str | None = None, progress: Progress = SILENT) -> StoreCopy:
    """Copy the store in a folder to the database and the bucket of the environment. The folder stays as it is.

    root: a folder with SQLite and files. What the environment does not name is not copied: with a bucket alone, the
    database stays. If the call is killed, the same one continues. Raises UsageError where there is nothing to copy or
    no place to copy to, Refused for a place that holds something else.
    """
    source = Store(root, url=f"sqlite:///{root.absolute() / DATABASE}", blobs=LocalBlobs(root))
    target = Store(root)
    same_database, same_blobs = source.url == target.url, isinstance(target.blobs, LocalBlobs)
    if same_database and same_blobs:
        fix = "set TUNESMITH_DATABASE_URL=postgresql+psycopg://... or TUNESMITH_BLOBS_URL=s3://BUCKET/PREFIX, or both"
        raise UsageError("there is no place to copy to", where=str(root), fix=fix)
    if not (root / DATABASE).is_file():
        raise UsageError("there is no store in this folder", where=str(root), fix="name the project's folder with -C")
    with contextlib.ExitStack() as held, source.scratch() as folder:
        rows = None
        if not same_database:
            held.enter_context(database.writing(source.engine))  # nobody changes the source until it is copied
            rows = folder / "database.jsonl"
            export_rows(source, rows)
        keys = [] if same_blobs else keys_of(source.blobs)
        contents = Contents(keys, source.blobs.pieces, rows)
        return _fill(target, contents, actor, "store.migrate", "store", progress, objects=not same_blobs)


def _fill(
    store: Store,
    contents: Contents,
    actor: str | None,
    action: str,
    subject: str,
    progress: Progress,
    *,
    objects: bool = True,
) -> StoreCopy:
    """Objects first, then the rows and the audit entry in one transaction."""
    if contents.rows is not None:
        with store.engine.connect() as connection:
            require_no_rows(connection)
    count, total = put_objects(store, contents, progress) if objects else (0, 0)
    kept = set(store.blobs.keys("files/"))
    with database.writing(store.engine) as session:
        rows = 0 if contents.rows is None else import_rows(session, contents.rows)
        user = actor or os.environ.get("TUNESMITH_USER") or first_user(session) or ""
        require(session, user, _ACTION)
        missing = without_bytes(session, kept)
        detail = {"rows": rows, "objects": count, **({"missing": missing} if missing else {})}
        audit.append(session, actor=user, action=action, subject=subject, detail=detail)
    place = store.engine.url.render_as_string(hide_password=True)
    return StoreCopy(place=place, objects=count, bytes=total, rows=rows, missing=tuple(missing))
