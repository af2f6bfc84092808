"""Forms with files, read while they come, in pieces: none keeps the event loop for long, whatever it holds.

A form is UTF-8, and the headers, number and size of its parts are bounded. A file beyond 1 MiB goes to the disk, and is
handed on as a mapped file, so that no image is copied in one go.
"""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from api.spool import spooled
from core.data import Data
from core.disk import disk_fault
from core.errors import BadRequest, TooLarge
from core.turns import Turn, pieces

MULTIPART, URLENCODED = "multipart/form-data", "application/x-www-form-urlencoded"
MAX_TYPE = 1024        # bytes of a Content-Type header
FED = 8 << 10          # bytes that the parser gets at a time: it goes through them byte by byte at the worst
BATCH = 256 << 10      # bytes of a file that are written at a time
MAX_FIELDS = 64
MAX_FIELD = 256 << 10  # bytes
MAX_FILES = 4          # of a form for one image
MAX_URLENCODED = 64 << 10
UTF_8 = ("utf-8", "utf8", "us-ascii")


class Form(MultiPartParser):
    """Starlette's parser, which is fed in pieces and does not take a body that was cut off for a whole one."""

    complete = False

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is None:
            try:
                part.data.decode("utf-8")
            except UnicodeDecodeError:
                raise MultiPartException(f"The field '{part.field_name[:64]}' is not UTF-8.") from None
        super().on_part_end()

    def on_end(self) -> None:
        self.complete = True

    async def parse(self) -> FormData:
        """Raises `MultiPartException`, `BadRequest` and what reading the body raises."""
        self._charset = "utf-8"
        turn = Turn()
        try:
            parser = MultipartParser(_boundary(self.headers), self._callbacks())
            async for chunk in self.stream:
                for piece in pieces(chunk, FED):
                    parser.write(piece)
                    await turn.over()
                    if sum(len(data) for _, data in self._file_parts_to_write) >= BATCH:
                        await self._write()
                await self._write()
        except BaseException as fault:
            for file in self._files_to_close_on_error:
                file.close()
            if isinstance(fault, FormParserError):
                raise MultiPartException("A boundary or the headers of a part are wrong.") from None
            raise
        return FormData(self.items)

    async def _write(self) -> None:
        waiting, self._file_parts_to_write = self._file_parts_to_write, []
        by_part: dict[int, tuple[UploadFile, list[bytes]]] = {}
        for part, data in waiting:
            assert part.file is not None
            by_part.setdefault(id(part), (part.file, []))[1].append(data)
        for file, written in by_part.values():
            await file.write(b"".join(written))
        for part in self._file_parts_to_finish:
            assert part.file is not None
            await part.file.seek(0)
        self._file_parts_to_finish.clear()

    def _callbacks(self) -> Any:
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value", "header_end",
                 "headers_finished", "end")  # fmt: skip
        return {f"on_{name}": getattr(self, f"on_{name}") for name in names}


def _boundary(headers: Mapping[str, str]) -> bytes:
    kind = headers["content-type"]
    if len(kind) > MAX_TYPE:
        raise BadRequest(f"the Content-Type header has more than {MAX_TYPE} bytes")
    options = parse_options_header(kind)[1]
    charset = options.get(b"charset", b"utf-8").strip().lower().decode("latin-1")
    if charset not in UTF_8:
        raise BadRequest("the multipart body cannot be read: forms are taken in UTF-8 alone; leave the charset out")
    if not options.get(b"boundary"):
        raise MultiPartException("Missing boundary in multipart.")
    return options[b"boundary"]


async def read(
    headers: Headers, body: AsyncIterator[bytes], *, max_files: int = MAX_FILES, max_fields: int = MAX_FIELDS,
    max_field: int = MAX_FIELD,
) -> FormData:  # fmt: skip
    """The files and fields of a multipart body; close it after use. Raises `BadRequest` and what reading the body
    raises."""
    limits = {"max_files": max_files, "max_fields": max_fields, "max_part_size": max_field}
    parser = Form(headers, body, **limits)  # type: ignore[arg-type]
    try:
        form = await parser.parse()
    except MultiPartException as fault:
        raise BadRequest(f"the multipart body cannot be read: {fault.message}") from None
    except OSError as fault:  # of the disk, where large files of a form lie
        raise disk_fault(fault) from fault
    if not parser.complete:
        await form.close()
        raise BadRequest("the multipart body ends before its last boundary; it was cut off or names another one")
    return form


async def content(upload: UploadFile) -> Data:
    """The bytes of a form's file, which stay when the form is closed. Raises `StorageFull` and `StorageFailed`."""
    if (upload.size or 0) <= MultiPartParser.spool_max_size:
        await upload.seek(0)
        return await upload.read()
    return await asyncio.to_thread(spooled, upload.file)


class FormRequest(Request):
    """A request whose form is read as above, for routes whose fields the framework reads."""

    def form(self, **_: Any) -> Any:
        """What `read` gives; of a form without files its fields; of any other body nothing."""
        return self._read_form()

    async def _read_form(self) -> FormData:
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == MULTIPART:
            self._form = await read(self.headers, self.stream())
        elif kind == URLENCODED:
            self._form = FormData(await _pairs(self.stream()))
        else:
            self._form = FormData()
        return self._form


async def _pairs(body: AsyncIterator[bytes]) -> Mapping[str, str]:
    data = bytearray()
    async for chunk in body:
        data += chunk
        if len(data) > MAX_URLENCODED:
            raise TooLarge(f"the form has more than {MAX_URLENCODED} bytes; files are sent as multipart/form-data")
    try:
        return dict(urllib.parse.parse_qsl(data.decode("utf-8"), True, max_num_fields=MAX_FIELDS, errors="strict"))
    except ValueError:
        raise BadRequest(f"the form cannot be read: it is not UTF-8 or has more than {MAX_FIELDS} fields") from None
