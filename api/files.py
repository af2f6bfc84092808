"""A file as an answer, or the parts of it that are asked for."""

from __future__ import annotations

from starlette.responses import FileResponse, MalformedRangeHeader, RangeNotSatisfiable

from api import errors


class ImageFile(FileResponse):
    """A range that cannot be read is passed over, as RFC 9110 has it; one beyond the file is an error like others."""

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:
            return []
        except RangeNotSatisfiable:
            raise errors.RangeNotSatisfiable(f"the file has {file_size} bytes", size=file_size) from None
