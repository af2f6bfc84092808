"""The upload of a LoRA: a form whose file is written where it will live while it comes, and nowhere else."""

from __future__ import annotations

from typing import Protocol

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from api.forms import MAX_TYPE, Form
from core.errors import BadRequest, InvalidParameter, UnsupportedEncoding
from core.loras import SUFFIX, checked_name

MAX_FIELDS = 8
TEXT = (b"utf-8", b"utf8", b"us-ascii")
MAX_FIELD = 4096  # bytes of a field that is no file


class Sink(Protocol):
    """Where a file's bytes go."""

    def write(self, data: bytes, /) -> int: ...


class _File(UploadFile):
    async def seek(self, offset: int) -> None:
        """Nobody reads it here."""


class _Form(Form):
    """A form whose file's bytes go into `incoming`."""

    def __init__(self, request: Request, incoming: Sink) -> None:
        super().__init__(
            request.headers, request.stream(), max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD
        )
        self._incoming = incoming

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        part = self._current_part
        if part.file is not None:
            self._files_to_close_on_error.pop().close()
            part.file = _File(self._incoming, size=0, filename=part.file.filename)  # type: ignore[arg-type]


async def receive(request: Request, incoming: Sink) -> str:
    """Read the whole form, its file into `incoming`. The name that the LoRA is to have. Raises what a form or a name
    is refused with, and what `incoming.write` raises."""
    check_text(request.headers)
    try:
        form = await _Form(request, incoming).parse()
    except MultiPartException as fault:
        raise BadRequest(f"the multipart body cannot be read: {fault.message}") from None
    file, name = form.get("file"), form.get("name")
    if not isinstance(file, UploadFile) or isinstance(name, UploadFile):
        raise InvalidParameter("'file' is missing; send the .safetensors file in it", parameter="file")
    return _name(name, file)


def check_text(headers: Headers) -> None:
    """Raises `BadRequest`, and `UnsupportedEncoding` unless it is a form in UTF-8: there are charsets that take minutes
    to decode."""
    text = headers.get("content-type", "")
    if len(text) > MAX_TYPE:
        raise BadRequest(f"the Content-Type header has more than {MAX_TYPE} bytes")
    kind, options = parse_options_header(text)
    if kind.lower() != b"multipart/form-data":
        raise UnsupportedEncoding("send multipart/form-data with the .safetensors file as 'file'")
    if options.get(b"charset", b"utf-8").lower() not in TEXT:
        raise UnsupportedEncoding("send the form in UTF-8")


def _name(given: str | None, file: UploadFile) -> str:
    """The name it is to have: the one given, or that of the file, of which only the last part counts."""
    own = (file.filename or "").replace("\\", "/").rpartition("/")[2]
    if not own.lower().endswith(SUFFIX):
        raise InvalidParameter(f"a LoRA is a {SUFFIX} file; others can hold code and are not taken", parameter="file")
    return checked_name(given or own[: -len(SUFFIX)])
