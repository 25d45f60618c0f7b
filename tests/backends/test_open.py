from __future__ import annotations

from pathlib import Path

import pytest

from ckpt.backends.file.store import FileBackend
from ckpt.backends.objects.fsspec_store import FsspecBackend
from ckpt.backends.open import open_backend
from ckpt.errors import UsageError


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/a/b", "/a/b"),
        ("file:///a/b", "/a/b"),
        ("file:/a", "/a"),
        ("file://localhost/a", "/a"),
        ("file:///a%20b", "/a b"),
        ("FILE:///a", "/a"),
        ("/a:b/c", "/a:b/c"),
    ],
)
def test_path_and_file_url_open_a_folder(url: str, path: str) -> None:
    store = open_backend(url)
    assert isinstance(store, FileBackend)
    assert store.url == path


def test_relative_and_home_paths_are_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert open_backend("runs/a").url == str(tmp_path / "runs/a")
    assert open_backend("~/runs").url == "/home/someone/runs"
    assert not (tmp_path / "runs").exists()


def test_other_url_goes_through_fsspec() -> None:
    assert isinstance(open_backend("memory://x/y"), FsspecBackend)


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("", "pass a folder"),
        ("s3:/bucket/x", "s3://"),
        ("s3:bucket", "s3://"),
        ("file://host/x", "three slashes"),
        ("nosuch://x", "check the URL"),
        ("gs://bucket/x", r"pip install 'torch-ckpt\[gcs\]'"),
        ("az://bucket/x", r"pip install 'torch-ckpt\[azure\]'"),
    ],
)
def test_url_that_cannot_work_is_refused_with_a_remedy(url: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=remedy):
        open_backend(url)


def test_options_for_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave them out"):
        open_backend(str(tmp_path), {"key": "x"})
    assert isinstance(open_backend(str(tmp_path), {}), FileBackend)
