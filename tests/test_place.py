"""An output takes its place whole or never, and what is not ours to replace stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mirage_min.data import place
from mirage_min.data.place import check_output, taking_place
from mirage_min.data.video import Format, read_clip, write_clip, writing

ROOT = Path(__file__).parents[1]
ONES, ZEROS = torch.ones(3, 16, 16), torch.zeros(3, 2, 16, 16)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("appeared", ["file", "folder", "dangling link"])
@pytest.mark.parametrize("name", ["out.mp4", "out", "out.safetensors"])
def test_without_overwrite_what_appears_in_the_meantime_is_not_replaced(tmp_path, name, appeared):
    target = tmp_path / name
    with pytest.raises(ValueError, match=f"{name}: has appeared in the meantime"):
        with writing(target, Format(16, 16), overwrite=False) as out:
            out.write(ONES, 0, 1)
            if appeared == "file":
                target.write_text("precious")
            elif appeared == "folder":
                target.mkdir()
                (target / "precious.txt").write_text("precious")
            else:
                target.symlink_to(tmp_path / "nowhere")
    assert names(tmp_path) == [name] and target.is_symlink() == (appeared == "dangling link")
    if appeared != "dangling link":
        assert (target / "precious.txt" if appeared == "folder" else target).read_text() == "precious"


def test_with_overwrite_a_file_that_appears_is_replaced(tmp_path):
    with writing(tmp_path / "out.mp4", Format(16, 16)) as out:
        out.write(ONES, 0, 1)
        (tmp_path / "out.mp4").write_text("somebody else's")
    assert read_clip(tmp_path / "out.mp4").shape == (3, 1, 16, 16) and names(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("existed", [False, True])
def test_even_with_overwrite_a_folder_in_which_other_files_appear_stays(tmp_path, existed):
    if existed:
        write_clip(tmp_path / "out", ZEROS)
    with pytest.raises(ValueError, match="holds more than numbered PNGs: precious.txt"):
        with writing(tmp_path / "out", Format(16, 16)) as out:
            out.write(ONES, 0, 1)
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "precious.txt").write_text("precious")
    assert (tmp_path / "out" / "precious.txt").read_text() == "precious" and names(tmp_path) == ["out"]
    assert len(names(tmp_path / "out")) == (3 if existed else 1)


@pytest.mark.parametrize("kind", ["folder", "link to a folder"])
def test_a_folder_named_like_a_png_is_no_png_of_ours(tmp_path, kind):
    write_clip(tmp_path / "out", ZEROS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("ten years")
    if kind == "folder":
        (tmp_path / "mine").rename(tmp_path / "out" / "000007.png")
        with pytest.raises(ValueError, match="holds more than numbered PNGs: 000007.png"):
            write_clip(tmp_path / "out", ZEROS)
        assert (tmp_path / "out" / "000007.png" / "thesis.tex").exists() and len(names(tmp_path / "out")) == 3
    else:
        (tmp_path / "out" / "000007.png").symlink_to(tmp_path / "mine")
        write_clip(tmp_path / "out", ZEROS)
        assert names(tmp_path / "out") == ["000000.png", "000001.png"]
        assert (tmp_path / "mine" / "thesis.tex").exists()


def test_an_empty_folder_gives_way_without_leave(tmp_path):
    (tmp_path / "out").mkdir()
    with writing(tmp_path / "out", Format(16, 16), overwrite=False) as out:
        out.write(ONES, 0, 1)
    assert names(tmp_path / "out") == ["000000.png"]


def test_a_file_system_without_links_gets_its_output_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(PermissionError("no links here")))
    with taking_place(tmp_path / "out.mp4", overwrite=False) as new:
        new.write_text("done")
    assert (tmp_path / "out.mp4").read_text() == "done" and names(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("name", ["\u9577" * 83 + ".mp4", "f" * 250, "n" * 245 + ".mp4"])
def test_every_name_that_the_file_system_takes_can_be_written(tmp_path, name):
    write_clip(tmp_path / name, ZEROS)
    assert names(tmp_path) == [name] and read_clip(tmp_path / name).shape == ZEROS.shape


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_an_output_is_as_open_to_others_as_the_umask_says(tmp_path, name, umask):
    before = os.umask(umask)
    try:
        write_clip(tmp_path / name, ZEROS)
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "file").touch()
    finally:
        os.umask(before)
    plain = tmp_path / "plain" if name == "out" else tmp_path / "plain" / "file"
    assert (tmp_path / name).stat().st_mode == plain.stat().st_mode


@pytest.mark.skipif(place.fcntl is None, reason="needs file locks (Unix)")
@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_what_a_killed_run_left_goes_and_what_a_running_one_makes_stays(tmp_path, name):
    script = ("import sys, time, torch\n"
              "from mirage_min.data.video import Format, writing\n"
              "with writing(sys.argv[1], Format(16, 16)) as out:\n"
              "    out.write(torch.zeros(3, 16, 16), 0, 1)\n"
              "    print('writing', flush=True)\n"
              "    time.sleep(3600)\n")
    (tmp_path / f"{name}.notes.part").write_text("not made by us")
    with subprocess.Popen([sys.executable, "-c", script, tmp_path / name], cwd=ROOT, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout.readline() == b"writing\n"
            write_clip(tmp_path / name, ZEROS)
            running = [part for part in names(tmp_path) if part not in (name, f"{name}.notes.part")]
            assert len(running) == 1 and running[0].startswith(f"{name}.") and running[0].endswith(".part")
        finally:
            other.send_signal(signal.SIGKILL)
    assert running[0] in names(tmp_path), "it was killed: nobody could remove it"
    write_clip(tmp_path / name, ZEROS)
    assert names(tmp_path) == sorted([name, f"{name}.notes.part"])


@pytest.mark.skipif(place.fcntl is None, reason="needs file locks (Unix)")
def test_a_folder_that_had_just_given_way_to_a_killed_run_comes_back(tmp_path):
    write_clip(tmp_path / "out", ZEROS)
    (tmp_path / "out.x1.part").mkdir()
    (tmp_path / "out.x1.part" / "lock").touch()
    (tmp_path / "out").rename(tmp_path / "out.x1.part" / "old")
    with pytest.raises(ValueError, match="has appeared"), taking_place(tmp_path / "out", overwrite=False) as new:
        new.mkdir()
    assert names(tmp_path) == ["out"] and len(names(tmp_path / "out")) == 2


def test_an_output_that_cannot_be_cleaned_up_after_is_written_all_the_same(tmp_path, monkeypatch):
    def rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError("busy")
    monkeypatch.setattr(place.shutil, "rmtree", rmtree)
    with taking_place(tmp_path / "out.mp4", overwrite=False) as new:
        new.write_text("done")
    assert (tmp_path / "out.mp4").read_text() == "done"


def test_where_nothing_can_be_written_is_refused_before_anything_is_computed(tmp_path, monkeypatch):
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere" / "out.mp4")
    with pytest.raises(ValueError, match="dangling.mp4: there is no folder .*nowhere"):
        check_output(tmp_path, tmp_path / "dangling.mp4", overwrite=True)
    (tmp_path / "circle.mp4").symlink_to(tmp_path / "circle.mp4")
    with pytest.raises(ValueError, match="circle.mp4: is a link in a circle"):
        check_output(tmp_path, tmp_path / "circle.mp4", overwrite=True)
    with pytest.raises(OSError, match="too long"):
        check_output(tmp_path, tmp_path / ("n" * 256), overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a file system that is mounted to be read alone
    with pytest.raises(ValueError, match=f"nothing can be written to {tmp_path}"):
        check_output(tmp_path / "in.mp4", tmp_path / "out.mp4", overwrite=False)
