"""Writes the one file of a multipart/form-data body (RFC 7578) to a disk, as the body comes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tunesmith.server import limits
from tunesmith.server.errors import ApiError, bad_request


class FormReader:
    """Takes a form's bytes in pieces of any size.

    content_type: the request's. target: where the bytes of the field `file` go. limit: the file's largest size. fields:
    the other fields' texts. filename: the name that the client gave. size: bytes of the file so far. Raises ApiError
    400 for a form that is not valid or has more than `limits.FORM_FIELDS` fields, and 413 for a file above the limit.
    """

    def __init__(self, content_type: str, target: BinaryIO, limit: int) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 0 < len(boundary) <= limits.FORM_BOUNDARY:
            raise bad_request("The body must be multipart/form-data with a boundary.", code="invalid_form")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.size = 0
        self._hasher = hashlib.sha256()
        self._target, self._limit, self._ended = target, limit, False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._add_head("header", data[start:end]),
                "on_header_value": lambda data, start, end: self._add_head("stated", data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._open_part,
                "on_part_data": lambda data, start, end: self._take(data[start:end]),
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )
        self._begin_part()

    @property
    def digest(self) -> str:
        """Of the file's bytes so far."""
        return f"sha256:{self._hasher.hexdigest()}"

    def feed(self, data: bytes | bytearray) -> None:
        """Take the next bytes."""
        try:
            self._parser.write(bytes(data))
        except FormParserError:
            raise bad_request("The form is not valid multipart/form-data.", code="invalid_form") from None

    def end(self) -> None:
        """Take the end of the body."""
        if not self._ended:
            raise bad_request("The form ends before its last boundary.", code="invalid_form")

    def _begin_part(self) -> None:
        self._head = {"header": b"", "stated": b""}
        self._read, self._disposition, self._name, self._value = 0, b"", "", b""
        self._take: Callable[[bytes], None] = self._append

    def _add_head(self, part: str, data: bytes) -> None:
        self._head[part] += data
        self._read += len(data)
        if self._read > limits.FORM_HEADERS:
            raise bad_request("The headers of a part of the form are too long.", code="invalid_form")

    def _end_header(self) -> None:
        if self._head["header"].lower() == b"content-disposition":
            self._disposition = self._head["stated"]
        self._head = {"header": b"", "stated": b""}

    def _open_part(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if not self._name or self._name in self.fields or len(self.fields) >= limits.FORM_FIELDS:
            raise bad_request("A part of the form has no name, or a name twice, or there are too many.", "file")
        if self._name == "file":
            if self.filename is not None:
                raise bad_request("The form has two files.", "file")
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
            self._take = self._write

    def _write(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self._limit:
            raise too_large(self._limit)
        self._hasher.update(data)
        self._target.write(data)

    def _append(self, data: bytes) -> None:
        self._value += data
        if len(self._value) > limits.FORM_VALUE:
            raise bad_request("The field is too long.", self._name[: limits.SHOWN])

    def _end_part(self) -> None:
        if self._name != "file":
            try:
                self.fields[self._name] = self._value.decode()
            except UnicodeDecodeError:
                raise bad_request("The field is not text.", self._name[: limits.SHOWN]) from None

    def _end(self) -> None:
        self._ended = True


def too_large(limit: int) -> ApiError:
    """A file above the server's limit."""
    message = f"The file is too large: this server takes at most {limit} bytes ({limit / (1 << 20):.0f} MB)."
    return ApiError(413, message, "file_too_large", "file", closes=True)
