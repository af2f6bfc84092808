"""Settings as words: command-line flags, the environment's names, and the sentence when one of them is wrong."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from core import VERSION
from core.units import Form

DOCTOR = "doctor"  # the one word beside flags; `server.py` acts on it
SCRIPTS = frozenset({"KEY"})  # variables with our prefix that scripts beside the server read
# What Kubernetes and Docker tell a process about services and linked containers whose names begin with ours, as
# "NAME=value" behind the prefix. A name alone proves nothing: IMAGEPOOL_PORT may be either.
_LINK = re.compile(
    r"""(?P<alias>([A-Z0-9_]+_)?)(
        SERVICE_HOST=\S+ | SERVICE_PORT(_[A-Z0-9_]+)?=[0-9]+ | PORT(_[0-9]+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://\S+ |
        PORT_[0-9]+_(TCP|UDP|SCTP)_(PROTO=(tcp|udp|sctp) | PORT=[0-9]+ | ADDR=\S+) | NAME=/\S+/\S+
    )""",
    re.VERBOSE,
)


class BadSetting(ValueError):
    """A setting has a name or a value that cannot be read; the message is for the person who started the server."""


@dataclass(frozen=True, slots=True)
class Row:
    """One setting, told: its name, its group, the placeholder and the default as people write them, its sentence."""

    name: str
    group: str
    metavar: str
    default: str
    about: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def rows(model: type[BaseModel]) -> Iterator[Row]:
    """Every setting in the order of the class."""
    for name, field in model.model_fields.items():
        form = _form(field)
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        default = "" if field.default in (None, (), {}) else form.show(field.default)
        yield Row(name, str(extra.get("group", "")), form.metavar, default, field.description or "")


def table(model: type[BaseModel], prefix: str) -> str:
    """Every setting as Markdown tables, one per group."""
    lines: list[str] = []
    group = ""
    for row in rows(model):
        if row.group != group:
            group = row.group
            lines += ["", f"### {group}", "", "| flag | variable | default | |", "|---|---|---|---|"]
        default = f"`{row.default}`" if row.default else "–"
        lines.append(f"| `{row.flag}` | `{prefix}{row.name.upper()}` | {default} | {row.about} |")
    return "\n".join(lines[1:]) + "\n"


def read(model: type[BaseModel], argv: Sequence[str], prefix: str) -> dict[str, Any]:
    """The flags that were given, unchecked. Raises `BadSetting` for one that does not exist."""
    parser = _parser(model, prefix)
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        word = unknown[0].partition("=")[0]
        if word == DOCTOR:
            parser.error(f"'{DOCTOR}' must be the first word: python server.py {DOCTOR} [flags]")
        parser.error(f"there is no flag '{word[:64]}'{_near(word, (DOCTOR, *(row.flag for row in rows(model))))}")
    return vars(known)


def check_environment(model: type[BaseModel], environ: Mapping[str, str], prefix: str) -> None:
    """Raise `BadSetting` for a variable with our prefix that is no setting."""
    known = {prefix + name.upper() for name in model.model_fields}
    passed = known | {prefix + name for name in SCRIPTS} | links(environ, prefix)
    for name in environ:
        if name.upper().startswith(prefix) and name.upper() not in passed:
            raise BadSetting(f"the environment has {name[:64]}, which is no setting{_near(name.upper(), known)}")


def links(environ: Mapping[str, str | None], prefix: str) -> set[str]:
    """The names, in capitals, of variables that only look like settings: each pod is told about the services of its
    namespace, "imagepool" and "imagepool-metrics" among them, and each linked container about the other."""
    ours = {name.upper(): text or "" for name, text in environ.items() if name.upper().startswith(prefix)}
    found = {name: _LINK.fullmatch(f"{name.removeprefix(prefix)}={text}") for name, text in ours.items()}
    copies = tuple(f"{prefix}{match['alias']}ENV_" for match in found.values() if match)  # Docker's, of its variables
    return {name for name, match in found.items() if match or name.startswith(copies)}


def explain(
    model: type[BaseModel], fault: ValidationError, given: Mapping[str, Any], environ: Mapping[str, str], prefix: str
) -> str:
    """What is wrong and where it was written, in one line."""
    return "; ".join(_sentence(model, error, given, environ, prefix) for error in fault.errors())


def _sentence(
    model: type[BaseModel], error: Any, given: Mapping[str, Any], environ: Mapping[str, str], prefix: str
) -> str:
    name, *inner = (str(part) for part in error["loc"])
    variable = next((known for known in environ if known.upper() == prefix + name.upper()), None)
    flag = f"--{name.replace('_', '-')}" if name in given else None
    where = flag or variable or f"'{'.'.join((name, *inner))}' in the settings file"
    if error["type"] == "extra_forbidden":
        siblings = model.model_fields if not inner else ("per_minute", "per_hour", "per_day", "max_file")
        return f"{where} is no setting{_near(inner[-1] if inner else name, siblings)}"
    why = error["msg"].removeprefix("Value error, ")
    why = re.sub(r"^(Input|String|Value) should", "should", why)
    return f"{where} is {str(error['input'])[:64]!r}: it {why}"


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else " (--help lists them all)"


def _form(field: FieldInfo) -> Form:
    for item in field.metadata:
        if isinstance(item, Form):
            return item
    kind = str(field.annotation)
    if field.annotation is bool:
        return Form("", lambda on: "on" if on else "off")
    if "Literal" in kind:
        return Form("|".join(kind.partition("[")[2].rstrip("]").replace("'", "").split(", ")), str)
    return Form("PATH" if "Path" in kind else "N" if field.annotation in (int, float) else "TEXT", str)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadSetting(message)


def _parser(model: type[BaseModel], prefix: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python server.py",
        usage="python server.py [doctor] [flags]",
        description="ImagePool: serves image models from every device of this host. With the word 'doctor' it looks "
        "whether this machine can, and says what to do.",
        epilog=f"Each flag is also a variable ({prefix}PORT for --port) and a key of the TOML file (port = 8000). "
        "Sizes are written 64MiB, durations 50ms, 30s, 7d, lists a,b.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
    )
    parser.add_argument("--version", action="version", version=f"imagepool {VERSION}")
    groups: dict[str, Any] = {}
    for row in rows(model):
        group = groups.setdefault(row.group, None) or parser.add_argument_group(row.group)
        groups[row.group] = group
        about = f"{row.about} [{row.default}]".replace("%", "%%") if row.default else row.about
        if row.metavar:
            group.add_argument(row.flag, metavar=row.metavar, help=about)
        else:
            group.add_argument(row.flag, action=argparse.BooleanOptionalAction, help=about)
    return parser
