"""What somebody meets who has never seen this server: slips at the start, the bare address, numbers at the edge."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import server as program
from api.app import DIALECTS, create_app
from api.auth import Keys
from api.serve import take_port, warn_if_open
from core import VERSION
from core.errors import StorageFailed
from core.settings import Settings
from engine.build import read_catalogue
from store.lock import FolderLock
from tests.pure.api_kit import problem, submit, world
from tests.pure.dialect_kit import Server
from tests.pure.key_kit import keys_file


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with world(tmp_path) as server:
        yield server


async def test_the_bare_address_leads_to_the_description(server: Server) -> None:
    answer = await server.client.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "docs"), "relative: a proxy may add a prefix"


@pytest.mark.parametrize("docs", [True, False])
async def test_the_bare_address_and_what_is_said_about_unknown_ones_lead_somewhere(tmp_path: Path, docs: bool) -> None:
    async with world(tmp_path, docs=docs) as server:
        bare = await server.client.get("/", follow_redirects=True)
        lost = await server.client.get("/nowhere")
        assert bare.status_code == 200 and lost.status_code == 404
        named = re.findall(r"(?<![\w<])/[a-z][\w./]+", lost.text if docs else bare.text + lost.json()["detail"])
        for path in named:
            assert (await server.client.get(path)).status_code == 200, path
        assert "/openapi.json" in named


async def test_the_description_is_a_page_that_needs_no_other_host(tmp_path: Path) -> None:
    async with world(tmp_path, keys_file=keys_file(tmp_path)) as server:
        page = await server.client.get("/docs")
        assert page.headers["content-type"].startswith("text/html") and "//" not in page.text
        rules = dict(rule.strip().split(" ", 1) for rule in page.headers["content-security-policy"].split(";"))
        assert rules["default-src"] == rules["frame-ancestors"] == "'none'" and rules["script-src"] == "'self'"
        assert "<script>" not in page.text
        kinds = {}
        for path in re.findall(r'(?:src|href)="(docs/[^"]+)"', page.text):
            asset = await server.client.get(f"/{path}")
            assert asset.status_code == 200 and asset.content, path
            kinds[path] = asset.headers["content-type"].partition(";")[0]
        assert sorted(kinds.values()) == ["text/css", "text/javascript", "text/javascript"]
        for path in ("/docs/..%2fcore.py", "/docs/redoc.standalone.js", "/docs/"):
            assert (await server.client.get(path)).status_code == 404


@pytest.mark.parametrize(
    ("path", "methods"),
    [("/jobs", "GET, POST"), ("/jobs/7", "GET, DELETE"), ("/models", "GET"), ("/edit", "POST"), ("/health", "GET")],
)
async def test_a_wrong_method_is_told_every_right_one(server: Server, path: str, methods: str) -> None:
    answer = await server.client.patch(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, methods)
    assert methods in answer.text


async def test_a_problem_begins_with_what_it_is(server: Server) -> None:
    told = problem(await server.client.get("/models/odd"))
    assert list(told)[:4] == ["type", "title", "status", "detail"]
    png = {"content-type": "image/png"}
    told = problem(await server.client.post("/jobs?model=echo&stepz=1", content=b"x", headers=png))
    assert list(told)[:4] == ["type", "title", "status", "detail"]


@pytest.mark.parametrize("seed", [-(2**63), 2**64 - 1])
async def test_a_seed_at_the_edge_of_64_bits_comes_back_as_it_was(tmp_path: Path, seed: int) -> None:
    async with world(tmp_path, models=("edit",)) as server:
        job = await submit(server, model="edit", prompt="snow", seed=str(seed))
        listed = (await server.client.get("/jobs")).json()["jobs"]
        assert [found["params"]["seed"] for found in (job, *listed)] == [seed, seed]


@pytest.mark.parametrize("model", ["edit", "fill"])  # one whose file bounds the seed, one whose file does not
@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64, 10**60])
async def test_a_number_beyond_64_bits_is_refused_and_the_list_of_jobs_lives(
    tmp_path: Path, model: str, seed: int
) -> None:
    async with world(tmp_path, models=("edit", "fill")) as server:
        query = {"model": model, "seed": str(seed)} | ({"prompt": "snow"} if model == "edit" else {})
        answer = await server.client.post("/jobs", params=query, content=b"", headers={"content-type": "image/png"})
        assert (answer.status_code, problem(answer)["errors"][0]["parameter"]) == (422, "seed")
        assert (await server.client.get("/jobs")).json() == {"jobs": [], "next": None}


async def test_a_range_of_whole_numbers_is_told_in_whole_numbers(tmp_path: Path) -> None:
    async with world(tmp_path, models=("edit",)) as server:
        seed = (await server.client.get("/models/edit")).json()["params"]["seed"]
        assert (seed["minimum"], seed["maximum"]) == (-(2**63), 2**64 - 1)


async def test_only_the_dialects_that_exist_are_offered(server: Server) -> None:
    with pytest.raises(ValueError, match=r"there is no dialect 'odd'; there are: ") as refused:
        create_app(server.engine, server.engine.settings.model_copy(update={"dialects": ("odd",)}))
    offered = str(refused.value).partition("there are: ")[2].split(", ")
    for name in ("jobs", *DIALECTS):
        settings = server.engine.settings.model_copy(update={"dialects": (name,)})
        if name in offered:
            create_app(server.engine, settings)
        else:
            with pytest.raises(ValueError, match="there is no dialect"):
                create_app(server.engine, settings)
    about = Settings.model_fields["dialects"].description or ""
    assert ", ".join(offered) in about


def test_a_models_folder_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--models-folder .* is no folder"):
        read_catalogue(Settings(models_folder=tmp_path / "nowhere"))


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of 127\.0\.0\.1 .*address already in use; .* --port"):
            take_port(Settings(host="127.0.0.1", port=port))


def test_an_address_that_is_not_this_hosts_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"of 192\.0\.2\.1 cannot be taken: .*--host"):
        take_port(Settings(host="192.0.2.1", port=0))


def test_without_keys_it_listens_for_this_host_alone_and_with_keys_for_all(tmp_path: Path) -> None:
    keys = keys_file(tmp_path)
    wanted = (((), "127.0.0.1"), ((keys,), "0.0.0.0"))
    for given, host in wanted:
        settings = Settings(port=0, keys_file=given[0] if given else None)
        with take_port(settings) as door, take_port(settings, "iopaint_port") as own:
            assert door.getsockname()[0] == own.getsockname()[0] == host
    with take_port(Settings(port=0, host="0.0.0.0")) as door, take_port(Settings(port=0, host="127.0.0.1")) as other:
        assert (door.getsockname()[0], other.getsockname()[0]) == ("0.0.0.0", "127.0.0.1")


@pytest.mark.parametrize(("host", "open_to_all"), [
    ("", False), ("::1", False), ("localhost", False), ("::", True), ("0.0.0.0", True),
])  # fmt: skip
def test_open_to_everybody_is_one_line_that_says_what_to_do(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, host: str, open_to_all: bool
) -> None:
    settings = Settings(host=host, port=0)
    with take_port(settings) as door, caplog.at_level(logging.WARNING):
        warn_if_open(settings, door)
        warn_if_open(settings.model_copy(update={"keys_file": keys_file(tmp_path)}), door)
    assert len(caplog.messages) == open_to_all
    assert not open_to_all or ("--keys-file" in caplog.text and "--host 127.0.0.1" in caplog.text)


def test_an_outputs_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match=r"outputs folder cannot be used .* --outputs") as refused:
        FolderLock(tmp_path / "file")
    assert str(tmp_path) not in refused.value.message


def test_a_keys_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the keys file .*nokeys\.toml cannot be read: No such file"):
        Keys(tmp_path / "nokeys.toml")


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        program.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out.strip()) == (0, f"imagepool {VERSION}")


@pytest.mark.parametrize(
    ("words", "hint"), [(["doctro"], "did you mean 'doctor'?"), (["--port", "1", "doctor"], "must be the first word")]
)
def test_a_slip_with_the_doctor_is_understood(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(words)
    assert hint in capsys.readouterr().err
