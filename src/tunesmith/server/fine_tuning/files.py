"""/v1/files, compatible with OpenAI's clients: the files that fine-tuning jobs read and write."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect

from tunesmith.core.errors import Refused, TunesmithError
from tunesmith.core.reading.strict_json import JsonObject
from tunesmith.server import limits
from tunesmith.server.errors import ApiError, bad_request, busy_for_user, forbidden, not_stored
from tunesmith.server.fine_tuning.objects import FileDeleted, FileList, FileObject, ends, file_object, page_limit
from tunesmith.server.intake.form import FormReader, too_large
from tunesmith.server.limits import ServerSettings
from tunesmith.server.openapi import BEARER, answers, errors
from tunesmith.server.serving import Call, Calling, document, in_turn, needs
from tunesmith.store import uploads
from tunesmith.store.tables import FileRow
from tunesmith.store.uploads import PURPOSE, FileGone

_PIECE = 1 << 20  # bytes that are written at once
_SYNCED = 32 << 20  # bytes after which the disk is told to keep what came: little is left to wait for at the end
_MOST = 10_000  # files of one page, as OpenAI's
_OTHER_PARTS = 1 << 16  # bytes of a form besides its file

routes = APIRouter(prefix="/v1/files", dependencies=[needs("jobs")])


_FIELDS: JsonObject = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": [PURPOSE]}},
    "required": ["file", "purpose"],
}
_FORM: JsonObject = {"required": True, "content": {"multipart/form-data": {"schema": _FIELDS}}}


@routes.post("", **answers(FileObject, 400, 408, 413, 503, 507, extra={**BEARER, "requestBody": _FORM}))
async def upload(request: Request, call: Calling) -> Response:
    """Keep a file of examples. It is written to the disk as it comes."""
    _allow(call, "file.change")
    user, serving = call.user, call.serving
    if serving.uploads[user.name] >= limits.UPLOADS_OF_USER or serving.uploads.total() >= limits.UPLOADS:
        raise busy_for_user(limits.UPLOADS_OF_USER, "uploads")
    serving.uploads[user.name] += 1
    try:
        with _stored(), serving.store.scratch() as folder:
            path = folder / "upload"
            reader = await _received(request, serving.settings, path)
            name = _checked(reader)
            put = partial(
                uploads.put, serving.store, path, name=name, purpose=PURPOSE, actor=user.name, scope=user.scope,
                digest=reader.digest,
            )  # fmt: skip
            return document(file_object(await serving.files.run(user.name, put)))
    finally:
        serving.uploads[user.name] -= 1


async def _received(request: Request, settings: ServerSettings, path: Path) -> FormReader:
    """The form of a request, its file written to path. Raises ApiError for one too large, too slow or not valid."""
    most = settings.file_bytes
    stated = request.headers.get("content-length", "0")
    if stated.isdecimal() and int(stated) > most + _OTHER_PARTS:
        raise too_large(most)
    with path.open("wb") as target:
        reader = FormReader(request.headers.get("content-type", ""), target, most)
        writing, syncing, synced = _Beside(), _Beside(), 0
        try:
            async with asyncio.timeout(limits.UPLOAD_SECONDS):
                async for data in _pieces(request, settings.body_seconds, most + _OTHER_PARTS):
                    await writing.then(partial(reader.feed, data))
                    if reader.size - synced >= _SYNCED and syncing.done:
                        synced = reader.size
                        await syncing.then(partial(os.fsync, target.fileno()))
        except TimeoutError:
            raise ApiError(408, "The file arrived too slowly.", "body_too_slow", closes=True) from None
        except ClientDisconnect:
            raise bad_request("The client left before its body had arrived.", code="incomplete_body") from None
        finally:  # the file stays open until nothing uses it
            await syncing.end()
            await writing.end()
    reader.end()
    return reader


async def _pieces(request: Request, seconds: float, most: int) -> AsyncIterator[bytearray]:
    """The body in pieces that are worth a thread's time. Raises TimeoutError for a pause of so many seconds, ApiError
    413 for more bytes than `most`."""
    came, waiting, stream = 0, bytearray(), request.stream()
    while True:
        async with asyncio.timeout(seconds):
            piece = await anext(stream, None)
        if piece is not None:
            came += len(piece)
            waiting += piece
            if came > most:
                raise too_large(most - _OTHER_PARTS)
        if len(waiting) >= _PIECE or (piece is None and waiting):
            yield waiting
            waiting = bytearray()
        if piece is None:
            return


class _Beside:
    """One call at a time in a thread, while the next bytes arrive."""

    def __init__(self) -> None:
        self._task: asyncio.Future[Any] | None = None

    @property
    def done(self) -> bool:
        """Whether no call is under way."""
        return self._task is None or self._task.done()

    async def then(self, call: Callable[[], Any]) -> None:
        """Begin a call once the one before has ended. Raises what that one raised."""
        await self.end()
        self._task = asyncio.ensure_future(asyncio.to_thread(call))

    async def end(self) -> None:
        """Wait for the call under way. Raises what it raised, once."""
        if (task := self._task) is not None:
            try:
                await asyncio.shield(task)
            finally:
                if task.done():
                    self._task = None


def _checked(reader: FormReader) -> str:
    """The file's name. Raises ApiError 400, in OpenAI's words where it has them, for a form that it refuses too."""
    for field in reader.fields:
        if field.startswith("expires_after"):
            raise bad_request("expires_after is not supported: delete the file instead.", "expires_after")
        if field != "purpose":
            said = f"Unrecognized request argument supplied: {field[: limits.SHOWN]}"
            raise bad_request(said, code="unknown_parameter")
    purpose = reader.fields.get("purpose")
    if purpose is None:
        raise bad_request("'purpose' is a required property", "purpose", "missing_required_parameter")
    if purpose != PURPOSE:
        raise bad_request(f"{purpose[: limits.SHOWN]!r} is not one of ['{PURPOSE}'] - 'purpose'", "purpose")
    if reader.filename is None:
        raise bad_request("'file' is a required property", "file", "missing_required_parameter")
    name = Path(reader.filename.replace("\\", "/")).name
    if not name.lower().endswith(".jsonl") or not name.isprintable():
        raise bad_request("Invalid file format for Fine-Tuning API. Must be .jsonl", "file", "invalid_file_format")
    if reader.size == 0:
        raise bad_request("The file is empty.", "file", "empty_file")
    return name


@routes.get("", **answers(FileList, 400, 404))
@in_turn
def files(
    call: Calling,
    purpose: str | None = None,
    after: str | None = None,
    limit: str | None = None,
    order: str | None = None,
) -> FileList:
    """The files of the caller's tenant and region, newest first. order: asc for the oldest first."""
    _allow(call, "file.read")
    most = page_limit(limit, _MOST, _MOST)
    if order not in (None, "asc", "desc"):
        raise bad_request("order must be asc or desc.", "order")
    with _stored():
        listed = uploads.list_files(
            call.store, call.user.scope, purpose=purpose, after=after, most=most + 1, oldest_first=order == "asc"
        )
    data = tuple(file_object(each) for each in listed[:most])
    return FileList(object="list", data=data, has_more=len(listed) > most, **ends(data))


@routes.get("/{file}", **answers(FileObject, 404))
@in_turn
def file(call: Calling, file: str) -> FileObject:
    """One file. Another tenant's is answered like one that does not exist."""
    return file_object(_found(call, file))


@routes.get(
    "/{file}/content",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        **errors(401, 403, 404, 429),
    },
    openapi_extra=BEARER,
)
@in_turn
def content(call: Calling, file: str) -> Response:
    """A file's bytes."""
    stored = _found(call, file)
    pieces = uploads.pieces(call.store, stored)
    with _stored():
        first = next(pieces, b"")
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(stored.name)}"}
    return StreamingResponse(chain([first], pieces), media_type="application/octet-stream", headers=headers)


@routes.delete("/{file}", **answers(FileDeleted, 404, 503, 507))
async def delete(call: Calling, file: str) -> Response:
    """Delete a file and its bytes. A fine-tuning job that still needs it fails. Records that were made from it stay."""
    _allow(call, "file.change")
    user = call.user
    with _stored():
        gone = partial(uploads.delete, call.store, file, actor=user.name, scope=user.scope)
        await call.serving.files.run(user.name, gone)
    return document(FileDeleted(id=file, object="file", deleted=True))


def _allow(call: Call, action: str) -> None:
    """Raise ApiError 403 where the caller may not do an action."""
    if not call.user.may(action):
        raise forbidden(f"{call.actor} may not {'read' if action == 'file.read' else 'change'} files.")


def _found(call: Call, file: str) -> FileRow:
    _allow(call, "file.read")
    with _stored():
        stored = uploads.find(call.store, file, call.user.scope)
    if stored is None:
        raise no_such_file(file)
    return stored


def no_such_file(file: str) -> ApiError:
    """The same answer for a file that does not exist and one of another tenant."""
    return ApiError(404, f"No such File object: {file[: limits.SHOWN]}", "file_not_found", "id")


@contextlib.contextmanager
def _stored() -> Iterator[None]:
    """Turn what the store raises into answers."""
    try:
        yield
    except FileGone as error:
        raise no_such_file(error.where or "") from error
    except Refused as error:
        raise forbidden(f"{error.what}.") from error
    except (TunesmithError, OSError) as error:
        raise not_stored(error) from error
