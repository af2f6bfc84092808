"""The OpenAPI document, made of what each dialect says of its routes.

A dialect says what its routes take, what they answer when all goes well, and what is special about their errors. What
any of them may answer besides comes from one table (`api.troubles`): the dialect's own dress tells the status and the
headers of each error, so the document cannot tell others than the server.

The components of a dialect are called after it, as in `openai.Model`; those of the native API have plain names. One
that would overwrite another stops the making with a ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.openapi.utils import get_openapi

from api import openapi
from api.errors import Outfit, Wardrobe, headers_of, status_of
from api.limits import is_health, is_public
from api.troubles import MARK, SERVES_FILE, SIGNED, on_the_line, possible

WAIT = ("Retry-After", "Retry-After-Ms")
SCHEMA = "#/components/schemas/"
METHODS = ("get", "post", "put", "delete")
SECURITY = {
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "bearer": {"type": "http", "scheme": "bearer", "description": "The same key."},
    "signature": {
        "type": "apiKey", "in": "query", "name": "signature",
        "description": "An address that another answer gave; with `expires` and `holder`, it serves for a while.",
    },
}  # fmt: skip
KEYS: list[dict[str, list[str]]] = [{"key": []}, {"bearer": []}]
FRAMEWORKS = ("HTTPValidationError", "ValidationError")  # errors never look so here


@dataclass(frozen=True, slots=True)
class Part:
    """The routes of one dialect. `name`: what its components are called after; "": nothing. `about`: its words about
    itself, of which the first paragraph describes its tag."""

    name: str
    router: APIRouter
    about: str | None


class Components(dict[str, Any]):
    """Components of one kind by name."""

    def add(self, name: str, value: Any) -> None:
        """Raises ValueError when the name is taken by something else."""
        if self.setdefault(name, value) != value:
            raise ValueError(f"the description has two components called '{name}'")


class Answers:
    """What one operation answers, by status. `error`: the content of what it calls an error and says no more of."""

    def __init__(self, told: Mapping[str, dict[str, Any]], error: Mapping[str, Any]) -> None:
        self._told = {status: dict(answer) for status, answer in told.items()}
        self._own = {status for status, answer in self._told.items() if "content" in answer}
        for status in self._told:
            if int(status) >= 400:
                self.at(int(status), error)

    def at(self, status: int, content: Mapping[str, Any], *headers: str) -> None:
        """This status comes with this content, unless the route has told its own, and perhaps with these headers."""
        answer = self._told.setdefault(str(status), {"description": openapi.DESCRIPTIONS[status]})
        if str(status) not in self._own:
            answer["content"] = {**answer.get("content", {}), **content}
        answer["headers"] = {**answer.get("headers", {}), **openapi.headers(*headers)}

    def in_parts(self) -> None:
        """The file that is answered may come in parts, too."""
        whole = self._told["200"]
        parts = {"multipart/byteranges": {"schema": {"type": "string", "format": "binary"}}}
        self.at(206, {**whole["content"], **parts}, "Content-Range")
        for status in (200, 206):
            self.at(status, {}, "Accept-Ranges", "Content-Disposition", "ETag")

    def all(self) -> dict[str, dict[str, Any]]:
        """All of them, by rising status, each with the headers that every answer has."""
        for status in self._told:
            wait = WAIT if status in ("429", "503", "507") else ()
            self.at(int(status), {}, "X-Request-ID", "X-Response-Time", *wait)
        return dict(sorted(self._told.items()))


class Description:
    """Makes the document. `keys`: whether this server asks for one."""

    def __init__(self, wardrobe: Wardrobe, keys: bool) -> None:
        self._wardrobe, self._keys = wardrobe, keys
        self._schemas = Components()
        self._paths: dict[str, dict[str, Any]] = {}
        self._tags: dict[str, str] = {}

    def make(self, title: str, version: str, about: str, parts: Sequence[Part]) -> dict[str, Any]:
        """The whole document. Raises ValueError when two parts claim a component, a path or an operation's name."""
        for name, schema in openapi.SCHEMAS.items():
            self._schemas.add(name, schema)
        for part in parts:
            self._add(part)
        self._check_names()
        return {
            "openapi": "3.1.0",
            "info": {"title": title, "version": version, "description": about},
            "paths": self._paths,
            "components": {"schemas": self._schemas, "headers": openapi.HEADERS, "securitySchemes": SECURITY},
            "security": KEYS if self._keys else [{}, *KEYS],
            "tags": [{"name": name, "description": text} for name, text in self._tags.items()],
        }

    def _add(self, part: Part) -> None:
        found = get_openapi(title="", version="", routes=part.router.routes)
        prefix = f"{part.name}." if part.name else ""
        for item in found["paths"].values():
            for operation in item.values():
                operation["responses"] = {
                    status: answer for status, answer in operation["responses"].items() if not _is_frameworks(answer)
                }
        _rename(found, prefix)
        found["paths"] |= openapi.run() if part.name == "run" else {}
        for name, schema in found.get("components", {}).get("schemas", {}).items():
            if name not in FRAMEWORKS:
                self._schemas.add(prefix + name, schema)
        for path, item in found["paths"].items():
            outfit = self._wardrobe.at(path)
            error = self._error(outfit, prefix)
            for method in item.keys() & set(METHODS):
                self._complete(path, method, item[method], outfit, error)
                self._tags.setdefault(item[method]["tags"][0], _first_paragraph(part.about))
            if taken := self._paths.setdefault(path, {}).keys() & item.keys():
                raise ValueError(f"the description has {path} twice, for {', '.join(taken)}")
            self._paths[path] |= item

    def _error(self, outfit: Outfit, prefix: str) -> dict[str, Any]:
        """The content of an error in this dress."""
        if outfit.shape is None:
            return openapi.problem()
        schema = outfit.shape.model_json_schema(ref_template=f"{SCHEMA}{prefix}{{model}}", mode="serialization")
        for name, inner in schema.pop("$defs", {}).items():
            self._schemas.add(prefix + name, inner)
        self._schemas.add(prefix + outfit.shape.__name__, schema)
        return {"application/json": {"schema": {"$ref": f"{SCHEMA}{prefix}{outfit.shape.__name__}"}}}

    def _complete(
        self, path: str, method: str, operation: dict[str, Any], outfit: Outfit, error: Mapping[str, Any]
    ) -> None:
        """Add what every route may answer, to what this one says of itself."""
        told = Answers(operation["responses"], error)
        marks, public = operation.pop(MARK, ()), is_public(path)
        browsers = not self._keys and not is_health(path)
        for fault in possible(method, operation, marks, public, browsers):
            status = outfit.dress(fault, "")[0]
            told.at(status, error, *headers_of(fault, status))
        for fault in on_the_line():
            told.at(status_of(fault), openapi.problem())
        if SERVES_FILE in marks:
            told.in_parts()
            operation.setdefault("parameters", []).append(openapi.RANGE)
        operation["responses"] = told.all()
        if "304" in operation["responses"]:
            operation["parameters"].append(openapi.IF_NONE_MATCH)
        if public:
            operation["security"] = []
        elif SIGNED in marks and self._keys:
            operation["security"] = [*KEYS, {"signature": []}]

    def _check_names(self) -> None:
        names = [item[method]["operationId"] for item in self._paths.values() for method in item]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"the description has several operations called {', '.join(sorted(twice))}")


def _is_frameworks(answer: Mapping[str, Any]) -> bool:
    """Whether the framework has added it, to say how it would put errors itself."""
    return f"{SCHEMA}{FRAMEWORKS[0]}" in str(answer)


def _rename(value: Any, prefix: str) -> None:
    """Let references lead to components of that prefix."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _rename(inner, prefix)
    if isinstance(value, dict) and isinstance(target := value.get("$ref"), str) and prefix:
        value["$ref"] = target.replace(SCHEMA, SCHEMA + prefix)


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())
