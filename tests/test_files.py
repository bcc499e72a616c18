"""Outputs: what is written as a whole, and what is never replaced."""

import json
from pathlib import Path

import pytest

from ctp_kernels import CTPError
from ctp_kernels.files import check_output, staged_folder, write_json


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def write(target: Path | str) -> None:
    with staged_folder(target, "ours.json") as staging:
        (staging / "ours.json").write_text("new")


def test_a_folder_of_our_own_is_replaced_as_a_whole(tmp_path):
    out = fill(tmp_path / "out", "ours.json", "stale")
    write(out)
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("ours.json", "new")]
    write(fill(tmp_path / "empty"))
    write(tmp_path / "deep" / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "empty", "out"]


def test_other_files_are_never_lost(tmp_path, monkeypatch):
    home = fill(tmp_path / "home", "thesis.txt")
    model = fill(home / "model", "ours.json")
    file = home / "thesis.txt"
    monkeypatch.chdir(fill(tmp_path / "here"))
    for target, reason in (
        (home, "holds other files"), (file, "is a file"), (".", "current folder"), (tmp_path, "current folder"),
    ):  # fmt: skip
        with pytest.raises(CTPError, match=reason):
            write(target)
    with pytest.raises(CTPError, match="what is being read"):
        check_output(model, "ours.json", model)
    with pytest.raises(CTPError, match="what is being read"):
        check_output(home, None, model)
    check_output(home / "model2", "ours.json", model)
    assert file.read_text() == "thesis.txt" and (model / "ours.json").exists()


def test_a_link_is_followed_and_kept(tmp_path):
    disk = fill(tmp_path / "disk", "ours.json")
    link = tmp_path / "link"
    link.symlink_to(disk)
    write(link)
    assert link.is_symlink() and (disk / "ours.json").read_text() == "new"


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    out = fill(tmp_path / "out", "ours.json")
    rename = Path.rename

    def fails(self, target):
        if ".tmp-" in self.name:
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="disk gone"):
        write(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "ours.json").read_text() == "ours.json"


def test_json_is_json(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1.5, float("nan")], "b": (float("inf"), {"c": -float("inf")})})
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read == {"a": [1.5, None], "b": [None, {"c": None}]}
