"""A folder of results is whole at any moment, and files of others are never lost."""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_jax.io import folders
from lowrank_jax.io.folders import MANIFEST, check_folder, check_path, whole_folder

OWN = ("report.json", "report.md", "variables.npz")


def write(out, text="one", names=OWN):
    with whole_folder(out) as scratch:
        for name in names:
            (scratch / name).write_text(text)


def texts(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != MANIFEST}


def test_a_second_run_replaces_the_files_of_the_first(tmp_path):
    write(tmp_path / "out", "one", [*OWN, "curve.png"])
    write(tmp_path / "out", "two")
    assert texts(tmp_path / "out") == dict.fromkeys(OWN, "two")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("changed", [False, True])
def test_folders_within_are_replaced_unless_they_were_changed(changed, tmp_path):
    for text in ("one", "two"):
        with whole_folder(tmp_path / "out") as scratch:
            (scratch / "deep" / "er").mkdir(parents=True)
            (scratch / "deep" / "er" / "notes.txt").write_text(text)
        if changed and text == "one":
            (tmp_path / "out" / "deep" / "er" / "notes.txt").write_text("mine")
    assert (tmp_path / "out" / "deep" / "er" / "notes.txt").read_text() == "two"
    kept = tmp_path / "out" / "deep.kept1" / "er" / "notes.txt"
    assert kept.exists() == changed and (not changed or kept.read_text() == "mine")


@settings(max_examples=50)
@given(
    st.dictionaries(st.sampled_from([*OWN, "thesis.tex", "curve.png"]), st.text("xy", max_size=3)),
    st.sets(st.sampled_from([*OWN, "curve.png"])),
)
def test_whatever_was_put_or_changed_in_the_folder_is_kept(tmp_path_factory, changes, names):
    out = tmp_path_factory.mktemp("home") / "out"
    write(out)
    for name, text in changes.items():
        (out / name).write_text(text)
    (out / "src").mkdir()
    (out / "src" / "main.py").write_text("code")
    write(out, "two", names)
    assert {name: (out / name).read_text() for name in names} == dict.fromkeys(names, "two")
    for name, text in changes.items():
        kept = f"{name}.kept1" if name in names else name
        assert (out / kept).read_text() == text
    assert (out / "src" / "main.py").read_text() == "code"
    assert os.listdir(out.parent) == ["out"]


def test_an_old_file_whose_name_is_needed_twice_gets_the_next_free_one(tmp_path):
    out = tmp_path / "out"
    for number in range(3):
        write(out, f"run {number}")
        (out / "report.md").write_text(f"changed {number}")
    write(out, "last")
    found = [(out / f"report.md{end}").read_text() for end in ("", ".kept1", ".kept2", ".kept3")]
    assert found == ["last", "changed 0", "changed 1", "changed 2"]


@pytest.mark.parametrize("name", ["report.json", MANIFEST, "thesis.tex"])
def test_a_folder_that_is_not_ours_is_refused_untouched(tmp_path, name):
    (tmp_path / "out" / "src").mkdir(parents=True)
    (tmp_path / "out" / name).write_text("{}")
    for use in (check_folder, write):
        with pytest.raises(FileExistsError, match="no folder of results"):
            use(tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == "{}"


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_the_current_folder_and_those_above_are_refused(tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match="give a folder within it"):
        check_folder(out)


def test_the_place_is_made_and_tried_out_before_the_work(tmp_path):
    check_folder(tmp_path / "runs" / "2026" / "one")
    assert os.listdir(tmp_path / "runs" / "2026") == []
    (tmp_path / "file").write_text("")
    for wrong in ("file", "file/out"):
        with pytest.raises(OSError):
            check_folder(tmp_path / wrong)


def test_a_link_stays_and_its_folder_is_replaced(tmp_path):
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert texts(tmp_path / "real") == dict.fromkeys(OWN, "two")


def test_a_body_that_fails_changes_nothing(tmp_path):
    write(tmp_path / "out")
    before = texts(tmp_path / "out")

    def fail_half_way():
        with whole_folder(tmp_path / "out") as scratch:
            (scratch / "report.md").write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_half_way()
    assert texts(tmp_path / "out") == before and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("step", range(1, 12))
def test_a_run_that_dies_at_any_step_of_the_swap_is_put_in_order_by_the_next(
    tmp_path, monkeypatch, step
):
    out = tmp_path / "out"
    write(out)
    (out / "notes.txt").write_text("mine")
    calls = []

    def dying(real):
        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) >= step:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        for name in ("rename", "unlink", "rmdir"):
            patched.setattr(Path, name, dying(getattr(Path, name)))
        patched.setattr(folders.shutil, "rmtree", lambda *args, **kwargs: None)  # dead: no clean-up
        write(out, "two")
    check_folder(out)
    assert (out / "notes.txt").read_text() == "mine"
    assert texts(out) in [
        dict.fromkeys(OWN, text) | {"notes.txt": "mine"} for text in ("one", "two")
    ]
    assert os.listdir(tmp_path) == ["out"]


def test_the_scratch_of_a_run_that_is_alive_stays(tmp_path):
    with whole_folder(tmp_path / "out") as scratch:
        (scratch / "one").write_text("1")
        check_folder(tmp_path / "out")
        write(tmp_path / "out", "two")
        assert (scratch / "one").exists()
    assert texts(tmp_path / "out") == {"one": "1"}


def test_threads_that_write_one_folder_leave_one_of_their_results(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write(tmp_path / "out", str(number)), range(64)))
    found = texts(tmp_path / "out")
    assert set(found) == set(OWN) and len(set(found.values())) == 1
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("below", ["", "run", "run/deep"])
@pytest.mark.parametrize("check", [check_folder, check_path])
def test_a_path_that_is_a_file_or_lies_below_one_is_refused(tmp_path, below, check):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=r"is a file; give|is no folder of results"):
        check(file / below)
    assert file.read_text() == "mine" and os.listdir(tmp_path) == ["notes.txt"]
