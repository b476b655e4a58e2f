"""Reads a multipart/form-data body (RFC 7578) piece by piece, and writes its one file to a disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from email.parser import HeaderParser
from typing import BinaryIO

from tunesmith.server.errors import ApiError, bad_request
from tunesmith.server.intake import limits

_BOUNDARY = re.compile(r"""multipart/form-data\s*;(?:.*;)?\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))""", re.I)


def boundary_of(content_type: str) -> bytes:
    """The boundary that a Content-Type states. Raises ApiError 400 for anything but multipart/form-data."""
    found = _BOUNDARY.match(content_type)
    if found is None:
        raise bad_request("The body must be multipart/form-data with a boundary.", code="invalid_form")
    return (found[1] or found[2]).encode("latin-1", "replace")


class FormReader:
    """Takes a form's bytes in pieces of any size.

    target: where the bytes of the field `file` go. limit: the file's largest size. fields: the other fields' texts.
    filename: the name that the client gave. size: bytes of the file so far. `feed` and `end` raise ApiError 400 for a
    form that is not valid or has more than `limits.FORM_FIELDS` fields, and 413 for a file above the limit.
    """

    def __init__(self, boundary: bytes, target: BinaryIO, limit: int) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.size = 0
        self._target, self._limit = target, limit
        self._delimiter = b"\r\n--" + boundary
        self._rest = b"\r\n"  # so that the first delimiter begins like the others
        self._step = self._preamble
        self._name = ""
        self._value = b""

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._rest += data
        while self._step():
            pass

    def end(self) -> None:
        """Take the end of the body."""
        if self._step != self._epilogue:
            raise bad_request("The form ends before its last boundary.", code="invalid_form")

    def _preamble(self) -> bool:
        return self._to_delimiter(lambda _: None)

    def _after_delimiter(self) -> bool:
        if len(self._rest) < 2:
            return False
        if self._rest.startswith(b"--"):
            self._step = self._epilogue
        elif self._rest.startswith(b"\r\n"):
            self._step = self._headers
        else:
            raise bad_request("A boundary of the form is not followed by a line end.", code="invalid_form")
        return True

    def _headers(self) -> bool:
        place = self._rest.find(b"\r\n\r\n")
        if place < 0 and len(self._rest) <= limits.FORM_HEADERS:
            return False
        if not 0 <= place <= limits.FORM_HEADERS:
            raise bad_request("The headers of a part of the form are too long.", code="invalid_form")
        head, self._rest = self._rest[2:place], self._rest[place + 4 :]
        stated = HeaderParser().parsestr(head.decode("utf-8", "replace"))
        name = stated.get_param("name", header="content-disposition")
        self._name, self._value = name if isinstance(name, str) else "", b""
        if not self._name or self._name in self.fields or len(self.fields) >= limits.FORM_FIELDS:
            raise bad_request("A part of the form has no name, or a name twice, or there are too many.", "file")
        if self._name == "file":
            if self.filename is not None:
                raise bad_request("The form has two files.", "file")
            self.filename = stated.get_filename() or ""
            self._step = self._file
        else:
            self._step = self._field
        return True

    def _file(self) -> bool:
        return self._to_delimiter(self._write)

    def _write(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self._limit:
            raise too_large(self._limit)
        self._target.write(data)

    def _field(self) -> bool:
        if not self._to_delimiter(self._append):
            return False
        try:
            self.fields[self._name] = self._value.decode()
        except UnicodeDecodeError:
            raise bad_request("The field is not text.", self._name[: limits.SHOWN]) from None
        return True

    def _append(self, data: bytes) -> None:
        self._value += data
        if len(self._value) > limits.FORM_VALUE:
            raise bad_request("The field is too long.", self._name[: limits.SHOWN])

    def _epilogue(self) -> bool:
        self._rest = b""  # RFC 2046: what follows the last boundary is ignored
        return False

    def _to_delimiter(self, take: Callable[[bytes], object]) -> bool:
        """Hand what comes before the next delimiter to `take`; True once the delimiter was reached."""
        place = self._rest.find(self._delimiter)
        if place < 0:
            sure = max(0, len(self._rest) - len(self._delimiter) + 1)
            take(self._rest[:sure])
            self._rest = self._rest[sure:]
            return False
        take(self._rest[:place])
        self._rest = self._rest[place + len(self._delimiter) :]
        self._step = self._after_delimiter
        return True


def too_large(limit: int) -> ApiError:
    """A file above the server's limit."""
    return ApiError(
        413,
        f"The file is too large: this server takes at most {limit} bytes ({limit / (1 << 20):.0f} MB).",
        code="file_too_large",
        param="file",
        headers={"Connection": "close"},
    )
