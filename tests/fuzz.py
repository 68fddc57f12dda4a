"""Broken inputs at every door, in process and by the thousand: what is refused, what is taken, what should not happen.

    python -m tests.fuzz --seed 1 --minutes 2                # every door in turn, until the time is up
    python -m tests.fuzz --seed 1 --door video --case 17     # one input again, with its traceback

No part of the test suite. The doors are in fuzz_doors.py: each has a valid input and a way to change it. An input is
one of these:

    refused    a ValueError, an OSError or an error of libav's: what a command says in one line, with status 2
    accepted   nothing was raised
    lost       accepted, and fewer frames came out than the file was made of: silent
    traceback  anything else was raised: a command would end in a traceback
    hang       not done in LIMIT seconds
    memory     more than MEMORY bytes were taken above what there was before

Case n of a door is a function of (seed, door, n) alone. What is new is printed when it comes, by the place where it was
raised; the table at the end is Markdown, as docs/reliability.md has it. Exit status 1: there was something in the last
four columns.
"""

import argparse
import faulthandler
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import av
import torch

from tests.fuzz_changes import Lost
from tests.fuzz_doors import DOORS

LIMIT, MEMORY = 20, 2**30  # seconds, bytes
COLUMNS = ("refused", "accepted", "lost", "traceback", "hang", "memory")
REFUSALS = (ValueError, OSError, av.FFmpegError)


def overdue(number, frame):
    raise TimeoutError


def peak() -> int:
    """The most bytes that this process took since the last call of `forget_peak`."""
    found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def attempt(door, draws: Random) -> tuple[str, str]:
    """One input -> (its column, where it was raised or what was said)."""
    forget_peak()
    before = peak()
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    faulthandler.dump_traceback_later(3 * LIMIT, exit=True)  # for what does not come back to Python
    try:
        door(draws)
        found = "accepted", ""
    except TimeoutError:
        found = "hang", place(sys.exc_info()[1])
    except Lost as error:
        found = "lost", str(error)
    except REFUSALS as error:
        found = "refused", " ".join(str(error).split())
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found = "traceback", place(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    if peak() - before > MEMORY:
        found = "memory", f"{(peak() - before) / 2**30:.1f} GiB; {found[0]}: {found[1]}"
    return found


def place(error: BaseException) -> str:
    """Where an error was raised, as far as it is ours: that is its kind."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/fuzz" not in f.filename and "site-packages"
            not in f.filename and "mirage_min" in f.filename or Path(f.filename).parent == Path.cwd()]
    at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else "outside"
    return f"{type(error).__name__} at {at}: {str(error).splitlines()[0][:100] if str(error) else ''}"


def table(counts: dict[str, Counter]) -> str:
    """Markdown."""
    rows = [["door", "inputs", *COLUMNS], ["---", *["---:"] * (1 + len(COLUMNS))]]
    for name, counter in [*counts.items(), ("**all**", sum(counts.values(), Counter()))]:
        rows.append([name, str(sum(counter.values())), *(str(counter[column]) for column in COLUMNS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--door", choices=list(DOORS), action="append", help="only this one; may be repeated")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default 0)")
    parser.add_argument("--case", type=int, help="one case again: what is raised is shown")
    parser.add_argument("--keep", type=Path, help="copy what a door was given, where it is new, to here")
    parser.add_argument("--counts", type=Path, help="add the counts to those in this JSON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    av.logging.set_level(av.logging.PANIC)
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, overdue)
    names = args.door or list(DOORS)
    with tempfile.TemporaryDirectory() as folder:
        doors = {}
        for name in names:
            (Path(folder) / name).mkdir()
            doors[name] = DOORS[name](Path(folder) / name)
        if args.case is not None:
            print(doors[names[0]](Random(f"{args.seed} {names[0]} {args.case}")))
            return 0
        counts, seen, spent = {name: Counter() for name in names}, set(), Counter()
        end, n = time.time() + 60 * args.minutes, args.first
        number = dict.fromkeys(names, args.first)
        while time.time() < end:
            name = min(names, key=lambda each: spent[each])  # the doors share the time
            n, start = number[name], time.time()
            column, said = attempt(doors[name], Random(f"{args.seed} {name} {n}"))
            number[name] += 1
            spent[name] += time.time() - start
            counts[name][column] += 1
            kind = (name, column, re.sub(r"\d+", "#", said))
            if column in COLUMNS[:2] or kind in seen:
                continue
            seen.add(kind)
            print(f"{column}: --door {name} --case {n}: {said}", flush=True)
            if args.keep:
                shutil.copytree(Path(folder) / name, args.keep / f"{name}_{n}", dirs_exist_ok=True, symlinks=True)
    tries = {name: number[name] - args.first for name in names}
    if args.counts:
        old = json.loads(args.counts.read_text()) if args.counts.exists() else {}
        counts = {name: Counter(old.get(name, {})) + counts.get(name, Counter()) for name in {**old, **counts}}
        args.counts.write_text(json.dumps(counts, indent=1))
    print("next cases, ms an input:", ", ".join(f"{name} {number[name]}, {1000 * spent[name] / max(1, tried):.0f}"
                                              for name, tried in tries.items()))
    print(table(counts))
    os.sync()
    return int(any(counter[column] for counter in counts.values() for column in COLUMNS[2:]))


if __name__ == "__main__":
    sys.exit(main())
