"""A model hub on loopback for the real clients: what `huggingface_hub` and `modelscope` ask of theirs, over HTTP.

It serves folders as repositories, by the routes, headers and error codes of the real ones. It can be told to be down,
to keep a repository from strangers, and to break off in the middle of a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_one_who_may"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIECE = 1 << 16
INFO = re.compile(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([^/]+))?")
TREE = re.compile(r"/api/models/([\w.-]+/[\w.-]+)/tree/([^/]+)")
RESOLVE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")
SCOPE_FILES = re.compile(r"/api/v1/models/([\w.-]+/[\w.-]+)/repo/files")
SCOPE_FILE = re.compile(r"/api/v1/models/([\w.-]+/[\w.-]+)/repo")
SCOPE = re.compile(r"/api/v1/models/([\w.-]+/[\w.-]+)(?:/.*)?")


@dataclass(frozen=True, slots=True)
class Heard:
    """A request: `start` is where its Range began, 0 without one; `token`: whether it showed the right one."""

    method: str
    path: str
    start: int
    token: bool


@dataclass
class Hub:
    """`repos`: by "owner/name" their folders. `gated`: those for which a token is needed. `cuts`: by a file's name in
    its repository, after how many bytes its next downloads break off, one after the other; with `falls` the hub is down
    from then on. `down`: every answer is a 503."""

    repos: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    cuts: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    down: bool = False
    falls: bool = False
    heard: list[Heard] = field(default_factory=list)
    url: str = ""

    @cached_property
    def lock(self) -> threading.Lock:
        return threading.Lock()

    def downloads(self, name: str) -> list[Heard]:
        """The downloads of files whose names end so."""
        return [one for one in list(self.heard) if one.method == "GET" and one.path.endswith(name)]

    def files(self, repo: str) -> list[str]:
        root = self.repos[repo]
        return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())

    def break_at(self, name: str) -> int | None:
        """Where the next download of the file breaks off."""
        with self.lock:
            return self.cuts[name].pop(0) if self.cuts[name] else None


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing in the tests' output."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        with contextlib.suppress(ConnectionError):
            self._route()

    def _route(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.hub.heard.append(Heard(self.command, query.get("FilePath", [path])[0], self._start(), self._known()))
        if self.hub.down:
            return self._refuse(503, "", "the hub is down")
        if match := SCOPE.fullmatch(path):
            return self._scope(match[1], path, query)
        if match := TREE.fullmatch(path):
            return self._tree(*match.groups())
        if match := INFO.fullmatch(path):
            return self._info(match[1], match[2] or "main")
        if match := RESOLVE.fullmatch(path):
            return self._resolve(*match.groups())
        return self._refuse(404, "", "no such route")

    # --- the Hugging Face hub -----------------------------------------------------------------------------------------

    def _lost(self, repo: str, revision: str) -> bool:
        """Whether an error was answered. Strangers are told 401 for what is not there: it might be private."""
        if repo not in self.hub.repos:
            self._refuse(404 if self._known() else 401, "RepoNotFound", "Repository not found")
        elif revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return False
        return True

    def _info(self, repo: str, revision: str) -> None:
        if self._lost(repo, revision):
            return
        siblings = [{"rfilename": name} for name in self.hub.files(repo)]
        gated = "manual" if repo in self.hub.gated else False
        self._json({"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "private": False, "gated": gated,
                    "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})

    def _tree(self, repo: str, revision: str) -> None:
        if self._lost(repo, revision):
            return
        root = self.hub.repos[repo]
        told = []
        for name in self.hub.files(repo):
            entry: dict[str, Any] = {"type": "file", "path": name, "size": (root / name).stat().st_size,
                                     "oid": _digest(root / name, "sha1")}
            if _large(name):
                entry["lfs"] = {"oid": _digest(root / name), "size": entry["size"], "pointerSize": 134}
            told.append(entry)
        self._json(told)

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if self._lost(repo, revision):
            return
        file = self.hub.repos[repo] / name
        commit = {"X-Repo-Commit": COMMIT}
        if repo in self.hub.gated and not self._known():
            self._refuse(401, "GatedRepo", f"Access to model {repo} is restricted. You must have access to it", commit)
        elif not file.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found", commit)
        else:
            digest = _digest(file) if _large(name) else _digest(file, "sha1")
            linked = {"X-Linked-Size": str(file.stat().st_size), "X-Linked-ETag": f'"{digest}"'} if _large(name) else {}
            self._file(file, name, {**commit, **linked, "ETag": f'"{digest}"'})

    # --- ModelScope ---------------------------------------------------------------------------------------------------

    def _scope(self, repo: str, path: str, query: dict[str, list[str]]) -> None:
        if repo not in self.hub.repos:
            self._json({"Code": 10010205001, "Message": "记录不存在", "RequestId": "r", "Success": False}, 404)
        elif SCOPE_FILES.fullmatch(path):
            root = self.hub.repos[repo]
            files = [
                {"Path": name, "Name": Path(name).name, "Type": "blob", "Size": (root / name).stat().st_size,
                 "Sha256": _digest(root / name), "Revision": COMMIT}
                for name in self.hub.files(repo)
            ]
            self._json({"Code": 200, "Data": {"Files": files}, "Message": "success", "Success": True})
        elif SCOPE_FILE.fullmatch(path):
            file = self.hub.repos[repo] / query["FilePath"][0]
            self._file(file, query["FilePath"][0], {"ETag": f'"{_digest(file)}"'})
        else:
            data = {"Name": repo.partition("/")[2], "Path": repo.partition("/")[0], "Revision": "master"}
            self._json({"Code": 200, "Data": data, "Message": "success", "Success": True})

    # --- the wire -----------------------------------------------------------------------------------------------------

    def _start(self) -> int:
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(match[1]) if match else 0

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _file(self, file: Path, name: str, headers: dict[str, str]) -> None:
        data, start = file.read_bytes(), self._start()
        partial = "Range" in self.headers
        if partial:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        length = {"Content-Length": str(len(data) - start), "Accept-Ranges": "bytes"}
        self._head(206 if partial else 200, {**headers, **length, "Content-Type": "application/octet-stream"})
        if self.command == "HEAD":
            return
        cut = self.hub.break_at(name)
        self.wfile.write(data[start:] if cut is None else data[start : start + cut])
        if cut is not None:
            self.wfile.flush()
            self.hub.down = self.hub.falls
            self.close_connection = True

    def _json(self, told: Any, status: int = 200) -> None:
        body = json.dumps(told).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        told = {"X-Error-Message": message, "Content-Length": "0", **(headers or {})}
        self._head(status, told | ({"X-Error-Code": code} if code else {}))

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _digest(file: Path, kind: str = "sha256") -> str:
    return hashlib.new(kind, file.read_bytes()).hexdigest()


@contextlib.contextmanager
def hub(**repos: Path) -> Iterator[Hub]:
    """A hub that serves these folders as `owner/<name>`, on a port of its own, until the end."""
    made = Hub({f"owner/{name}": folder for name, folder in repos.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (_Answer,), {"hub": made}))
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
