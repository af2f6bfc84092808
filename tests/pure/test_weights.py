"""Weights: where they are looked for, when a model is offered, and what a download leaves behind."""

from __future__ import annotations

import functools
import hashlib
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.model import Catalogue, read_spec
from core.settings import Settings
from core.weights import Weights, cache_folder, why_unusable
from engine.build import read_catalogue
from models import download

USUAL = Weights("https://example.org/a/big-lama.pt?x=1", "AB" * 16, "LAMA_MODEL_URL", "LAMA_MODEL_MD5")


def archive(file: Path) -> Path:
    """What looks like a TorchScript file from outside."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("code", "x" * 1000)
    return file


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without any weights."""
    for name in ("LAMA_MODEL_URL", "LAMA_MODEL_MD5", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "torch" / "hub" / "checkpoints"


def settings(tmp_path: Path, *flags: str) -> Settings:
    return Settings.load(["--outputs", str(tmp_path / "outputs"), *flags])


# --- where ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("environ", "folder"), [
    ({"TORCH_HOME": "/t", "XDG_CACHE_HOME": "/c"}, "/t/hub/checkpoints"),
    ({"XDG_CACHE_HOME": "/c"}, "/c/torch/hub/checkpoints"),
    ({}, "~/.cache/torch/hub/checkpoints"),
])  # fmt: skip
def test_the_cache_folder_is_that_of_torch(environ: dict[str, str], folder: str) -> None:
    assert cache_folder(environ) == Path(folder).expanduser()


def test_a_file_in_the_cache_has_the_last_name_of_its_address(tmp_path: Path) -> None:
    assert USUAL.file({"TORCH_HOME": "/t"}) == Path("/t/hub/checkpoints/big-lama.pt")
    other = {"TORCH_HOME": "/t", "LAMA_MODEL_URL": "http://mirror/mine.pt"}
    assert USUAL.file(other) == Path("/t/hub/checkpoints/mine.pt")


def test_the_variable_may_hold_the_file_itself_and_a_path_of_the_model_file_wins(tmp_path: Path) -> None:
    file = archive(tmp_path / "own.pt")
    assert USUAL.file({"LAMA_MODEL_URL": str(file)}) == file
    assert Weights(USUAL.url, path="/x/y.pt").file({"LAMA_MODEL_URL": str(file)}) == Path("/x/y.pt")


def test_the_published_checksum_counts_for_the_published_file_alone() -> None:
    assert USUAL.checksum({}) == "ab" * 16
    assert USUAL.checksum({"LAMA_MODEL_URL": "http://mirror/mine.pt"}) == ""
    assert USUAL.checksum({"LAMA_MODEL_URL": "http://mirror/mine.pt", "LAMA_MODEL_MD5": "CD"}) == "cd"


@pytest.mark.parametrize(("table", "about"), [
    ("weights = 3", "table"), ("[weights]\nurl = 3", "table"), ('[weights]\nurI = "x"', "uri"), ("[weights]", "url"),
])  # fmt: skip
def test_a_wrong_table_of_weights_stops_the_start_with_a_sentence(table: str, about: str) -> None:
    with pytest.raises(ValueError, match=f"(?i)model 'mine'.*{about}"):
        read_spec(f'adapter = "models.lama:Lama"\ntask = "inpaint"\n{table}', "mine")


# --- offered or not -------------------------------------------------------------------------------------------------


def test_lama_is_offered_when_its_file_is_there_and_the_adapter_is_told_where(home: Path, tmp_path: Path) -> None:
    assert "lama" not in read_catalogue(settings(tmp_path)) and "cv2" in read_catalogue(settings(tmp_path))
    file = archive(home / "big-lama.pt")
    assert read_catalogue(settings(tmp_path))["lama"].options["weights"] == str(file)
    archive(home / "anime-manga-big-lama.pt")
    assert "anime-lama" in read_catalogue(settings(tmp_path))


def test_a_download_that_was_cut_off_is_not_offered(home: Path, tmp_path: Path) -> None:
    file = archive(home / "big-lama.pt")
    file.write_bytes(file.read_bytes()[:-30])
    assert "damaged" in str(why_unusable(file)) and str(home) not in str(why_unusable(file))
    assert "lama" not in read_catalogue(settings(tmp_path))


def test_a_model_that_was_asked_for_by_name_and_lacks_its_weights_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'lama' cannot be offered: its weights big-lama\.pt are not there; fetch"):
        read_catalogue(settings(tmp_path, "--models", "lama,cv2"))


def test_a_model_file_of_ones_own_may_name_its_weights_as_an_option(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'adapter = "models.lama:Lama"\ntask = "inpaint"\n[options]\nweights = "/nowhere/x.pt"\n[weights]\nurl = "http://x"'
    )
    offered = read_catalogue(settings(tmp_path, "--models-folder", str(tmp_path)))
    assert offered["mine"].options["weights"] == "/nowhere/x.pt"


# --- downloads ------------------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which it can be fetched."""
    (tmp_path / "site").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield tmp_path / "site", f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_download_arrives_whole_where_the_server_looks(
    site: tuple[Path, str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = archive(site[0] / "mine.pt").read_bytes()
    monkeypatch.setenv("LAMA_MODEL_URL", f"{site[1]}/mine.pt")
    monkeypatch.setenv("LAMA_MODEL_MD5", hashlib.md5(source).hexdigest())
    assert download.main(["lama"]) == 0
    assert (home / "mine.pt").read_bytes() == source and [file.name for file in home.iterdir()] == ["mine.pt"]
    assert "lama" in read_catalogue(settings(tmp_path))
    (site[0] / "mine.pt").unlink()
    assert download.main(["lama"]) == 0, "what is there is not fetched again"


@pytest.mark.parametrize(("content", "md5", "about"), [
    (None, "", "404"), (b"<html>moved</html>", "", "no TorchScript"), (b"other", "00" * 16, "md5"),
])  # fmt: skip
def test_what_is_not_what_was_wanted_leaves_nothing_behind(
    content: bytes | None, md5: str, about: str, site: tuple[Path, str], home: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (site[0] / "mine.pt").write_bytes(content)
    monkeypatch.setenv("LAMA_MODEL_URL", f"{site[1]}/mine.pt")
    monkeypatch.setenv("LAMA_MODEL_MD5", md5)
    assert download.main(["lama"]) == 1
    assert about in capsys.readouterr().err
    assert not list(home.iterdir())


def test_a_wrong_call_says_which_models_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert download.main([]) == download.main(["lema"]) == 2
    assert "lama" in capsys.readouterr().err


def test_every_model_of_the_repository_can_be_read() -> None:
    catalogue = Catalogue.read([download.REPOSITORY])
    assert {"lama", "anime-lama", "cv2"} <= {spec.name for spec in catalogue}
