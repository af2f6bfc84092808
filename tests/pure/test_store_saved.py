"""Images that people save by a name of their own: nowhere but in their folder, and never more than allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

import store.saved
from core.errors import BadRequest, StorageFailed, StorageFull
from store.files import FileStore
from store.saved import SavedImages


def saved(root: Path, max_bytes: int = 1000) -> SavedImages:
    return SavedImages(FileStore(root, min_free=0), max_bytes)


def names(root: Path) -> list[str]:
    return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())


def test_tenants_do_not_see_or_replace_each_other_s(tmp_path: Path) -> None:
    images = saved(tmp_path)
    for tenant in ("anonymous", "acme", "../../etc", "a/b"):
        images.put("a.png", tenant.encode(), tenant)
    found = names(tmp_path)
    assert found == ["saved/a.png", "saved/of-..%2F..%2Fetc/a.png", "saved/of-a%2Fb/a.png", "saved/of-acme/a.png"]
    assert (tmp_path / "saved" / "a.png").read_bytes() == b"anonymous"


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b.png", "../a.png", "/a.png", "a\\b", "a\0b", "é" * 101])
def test_a_name_that_could_point_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadRequest):
        saved(tmp_path).put(name, b"x")
    assert not names(tmp_path)


def test_the_bound_counts_everybody_s_and_a_refused_image_leaves_nothing(tmp_path: Path) -> None:
    images = saved(tmp_path)
    images.put("a.png", bytes(600))
    with pytest.raises(StorageFull):
        images.put("b.png", bytes(500), "acme")
    images.put("b.png", bytes(400), "acme")
    assert names(tmp_path) == ["saved/a.png", "saved/of-acme/b.png"]


def test_so_many_images_and_no_more_however_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store.saved, "MOST", 20)
    images = saved(tmp_path)
    for number in range(20):
        images.put(f"{number}.png", b"x")
    images = saved(tmp_path)  # a restart
    with pytest.raises(StorageFull):
        images.put("more.png", b"x", "acme")
    (tmp_path / "saved" / "0.png").unlink()
    images.put("more.png", b"x", "acme")
    assert len(names(tmp_path)) == 20


def test_images_that_are_there_already_make_the_next_no_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, looks = saved(tmp_path), []
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *given: looks.append(given) or rglob(*given))
    for number in range(50):
        images.put(f"{number % 25}.png", bytes(20))
    assert len(looks) == 1
    images.put("last.png", bytes(500))
    with pytest.raises(StorageFull):
        images.put("none.png", b"x")


def test_a_disk_that_refuses_is_told_as_such(tmp_path: Path) -> None:
    images = saved(tmp_path)
    (tmp_path / "saved").write_text("a file is in the way")
    with pytest.raises(StorageFailed):
        images.put("a.png", b"x")


def test_a_sweep_after_a_crash_leaves_them_alone(tmp_path: Path) -> None:
    files = FileStore(tmp_path, min_free=0)
    SavedImages(files, 1000).put("00000000-0000-4000-8000-000000000000.png", b"x")
    files.sweep(set())
    assert len(names(tmp_path)) == 1
