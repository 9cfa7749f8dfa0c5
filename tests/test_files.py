"""Folders of runs: which can be, and how files get into them. Buckets: see test_bucket.py."""

import concurrent.futures
import importlib.util
import os

import pytest
from etils import epath

from blocktx.checkpoint.params import load_params
from blocktx.files import AppendLog, check_picture, copy_folder, run_folder, write_atomic


def test_local_folder(tmp_path, monkeypatch):
    assert run_folder(tmp_path / "new" / "run") == epath.Path(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    monkeypatch.chdir(tmp_path)
    assert os.fspath(run_folder("runs/a")) == str(tmp_path / "runs" / "a")


def test_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in ("file", "file/run"):
        with pytest.raises(NotADirectoryError, match=f"cannot make {tmp_path}/{place}: .*/file is"):
            run_folder(tmp_path / place)
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root
    with pytest.raises(PermissionError, match=f"cannot write to {tmp_path}/run"):
        run_folder(tmp_path / "run")


def test_bucket_that_cannot_be(monkeypatch):
    with pytest.raises(ValueError, match="s3://bucket/run is neither a local folder nor gs://"):
        run_folder("s3://bucket/run")
    with pytest.raises(ValueError, match="gs:// names no bucket"):
        run_folder("gs://")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"gs://bucket/run needs gcsfs: pip install -e '\.\[gcs"):
        run_folder("gs://bucket/run")
    with pytest.raises(ValueError, match=r"path: gs://bucket/run needs gcsfs: pip install"):
        load_params("gs://bucket/run")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("new/x.png", "there is no folder '.*/new'; make it first"),
        ("x.txt", r"must end with \.png, \.svg or \.pdf"),
        ("x", r"must end with \.png, \.svg or \.pdf"),
        ("folder.png", "is a folder; give the name of a file"),
    ],
)
def test_pictures_that_cannot_be(tmp_path, name, problem):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=problem):
        check_picture(os.fspath(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_pictures_that_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("x.png", "./x.svg", f"{tmp_path}/x.pdf", "gs://bucket/new/x.png"):
        check_picture(path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root
    with pytest.raises(ValueError, match=r"no permission to write to '\.'"):
        check_picture("x.png")


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "config.json"
    write_atomic(path, "old")

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError("no space left")

    monkeypatch.setattr(type(epath.Path(path)), "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path, contents = tmp_path / "config.json", [f"{i}" * 10_000 for i in range(4)]

    def write(content):
        for _ in range(50):
            write_atomic(path, content)
            assert path.read_text() in contents

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, contents))
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_lines_are_there_at_once(tmp_path):
    lines = AppendLog(tmp_path / "lines", ["a", "b"])
    lines.write("c")
    assert (tmp_path / "lines").read_text() == "a\nb\nc\n"
    lines.close()


def test_copy_of_a_folder(tmp_path):
    (tmp_path / "from" / "below").mkdir(parents=True)
    (tmp_path / "from" / "below" / "a").write_bytes(b"\0\xff")
    (tmp_path / "from" / "b").write_text("b")
    copy_folder(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to" / "below" / "a").read_bytes() == b"\0\xff"
    assert (tmp_path / "to" / "b").read_text() == "b"
