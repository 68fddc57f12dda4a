"""An output appears complete or not at all, and replaces only what it may.

While it is made it lies in the folder NAME.RANDOM.part next to its place. A run that was killed leaves that folder; the
next run to the same place removes it, because nobody holds the lock in it any more.

    python -m mirage_min.data.place           # what appears under the name in the meantime stays
"""

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

try:
    import fcntl
except ImportError:  # Windows: what a killed run leaves stays there
    fcntl = None


def is_mp4(path: Path) -> bool:
    """Whether an output of this name is an mp4 file: it ends in .mp4 and is not a folder."""
    return path.suffix.lower() == ".mp4" and not path.is_dir()


def is_clip(path: Path) -> bool:
    """Whether an input or output of this name is a clip of tensors: it ends in .safetensors and is not a folder."""
    return path.suffix.lower() == ".safetensors" and not path.is_dir()


def check_output(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse, before anything is computed, what could not be written or would destroy something: ValueError."""
    real = Path(os.path.realpath(target))
    if os.path.islink(real):
        raise ValueError(f"{target}: is a link in a circle")
    if not real.parent.is_dir():
        raise ValueError(f"{target}: there is no folder {real.parent}")
    if not os.access(real.parent, os.W_OK):
        raise ValueError(f"{target}: nothing can be written to {real.parent}")
    if source.exists() and target.exists() and target.samefile(source):
        raise ValueError(f"{target}: is the input, which is not overwritten")
    if real in Path(os.path.realpath(source)).parents:
        raise ValueError(f"{target}: holds the input, which would be lost with it")
    is_file = is_mp4(target) or is_clip(target)
    if not is_file and (target.is_file() or (is_media(target) and not target.is_dir())):
        raise ValueError(f"{target}: the output is NAME.mp4, or a folder for PNGs")
    if target.is_dir() and os.path.ismount(target):
        raise ValueError(f"{target}: is a mount point, which cannot be replaced whole: name a folder inside it")
    if target.exists() and not (overwrite or is_empty(target)):
        raise ValueError(f"{target}: exists (--overwrite replaces it)")
    if target.is_dir() and (other := first_other(target)):
        raise ValueError(f"{target}: not replaced, for it holds more than numbered PNGs: {other}")


def is_media(path: Path) -> bool:
    """Whether libav knows the ending of this name as that of a file that it can write."""
    formats = (av.ContainerFormat(name) for name in av.formats_available)
    return any(path.suffix[1:].lower() in f.extensions for f in formats if f.is_output)


def is_empty(path: Path) -> bool:
    """Whether a path is an empty folder."""
    return path.is_dir() and not os.listdir(path)


def first_other(folder: Path) -> str | None:
    """The first name in a folder that is not a PNG of ours (000000.png and so on), by the alphabet; None if all are."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries
                 if not re.fullmatch(r"\d{6}\.png", entry.name) or entry.is_dir(follow_symlinks=False)]
    return min(names, default=None)


@contextmanager
def taking_place(target: Path, overwrite: bool) -> Iterator[Path]:
    """Lend a path for a file or folder, which becomes `target` (absolute, not a link) at the end.

    If anything is raised before, nothing is left of it. Without `overwrite` the place must be free or an empty folder;
    and a folder is replaced only if it holds nothing but our PNGs. ValueError otherwise.
    """
    name = target.name[:60] + "."  # a longer one would leave no room for the ending
    remove_stale(target, name)
    part = Path(tempfile.mkdtemp(".part", name, target.parent))
    try:
        with open(part / "lock", "w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield part / "new"
            flush(part / "new")
            put(part / "new", target, part / "old", overwrite)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # once the output has its place, a leftover is not a failure


def put(new: Path, target: Path, old: Path, overwrite: bool) -> None:
    """Rename `new` to `target`; a folder that it replaces is moved to `old`.

    ValueError if `target` exists and may not be replaced: without `overwrite`, or a folder with more than our PNGs.
    """
    exists = ValueError(f"{target}: has appeared in the meantime, and is not replaced (--overwrite replaces it)")
    if not overwrite and os.path.lexists(target) and not is_empty(target):
        raise exists
    if new.is_file() and not overwrite:
        try:
            os.link(new, target)  # unlike a rename, it replaces nothing
        except FileExistsError:
            raise exists from None
        except OSError:  # a file system without links
            os.replace(new, target)
    elif new.is_dir() and target.is_dir():
        os.replace(target, old)
        try:
            if other := first_other(old):
                raise ValueError(f"{target}: not replaced, for it holds more than numbered PNGs: {other}")
            os.replace(new, target)
        except BaseException:
            os.replace(old, target)
            raise
    else:
        os.replace(new, target)


def flush(path: Path) -> None:
    """Let a file or folder reach the disk: a name that survives a power cut must not lead to nothing."""
    if path.is_dir() and hasattr(os, "sync"):
        os.sync()
    elif path.is_file():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def remove_stale(target: Path, name: str) -> None:
    """Remove what a killed run has left next to a target; a folder that had just given way to it comes back."""
    for part in target.parent.glob(glob.escape(name) + "*.part") if fcntl else ():
        if not (part / "lock").is_file():
            continue
        with open(part / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # its run is still alive
            if (part / "old").exists() and not target.exists():
                os.replace(part / "old", target)
            shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "out.mp4")
        try:
            with taking_place(target, overwrite=False) as new:
                new.write_text("the work of hours")
                print("while it is made:", [path.name for path in Path(folder).iterdir()])
                target.write_text("somebody else's")
        except ValueError as error:
            print(error.args[0].removeprefix(folder))
        print("afterwards:", {path.name: path.read_text() for path in Path(folder).iterdir()})
