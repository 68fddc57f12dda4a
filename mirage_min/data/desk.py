"""The desk of a command, where it meets its user: signals, streams, errors, exit status, flags. No method is here.

    if __name__ == "__main__":
        from mirage_min.data import desk
        desk.open_up()                               # first of all: the imports take seconds

    def cli(argv=None) -> int:
        return desk.serve("infer.py", lambda: main(parse(argv)))

    status    0 done; 2 the input, the model or a flag is wrong, and one line on stderr says how; 128 + its number
              after a signal. Anything else is a bug, and its traceback is shown.
    done      what is said after the output has its name cannot undo it: a full disk, a closed pipe, a console that
              lacks a letter
    streams   a stream that is closed is replaced by the null device: else the next file that is opened would take its
              number, and get the warnings of every library

Nothing but the standard library is imported at the top, so that the desk is open before anything large is loaded.

    python -m mirage_min.data.desk               # what becomes of each kind of error
"""

import ctypes
import dataclasses
import gc
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import get_type_hints

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
BOOLEANS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
NOTHING = "; nothing was written"


# ---- the process -----------------------------------------------------------------------------------------------------

def open_up() -> None:
    """Prepare streams, signals and sums for the whole run; a command calls this before its other imports."""
    os.environ.setdefault("MKL_CBWR", "AUTO")  # or sums of several threads differ from run to run in the last bit
    for name in ("stdin", "stdout", "stderr"):  # in this order, for a file takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
        elif isinstance(getattr(sys, name), io.TextIOWrapper):
            getattr(sys, name).reconfigure(errors="replace")  # a console may lack a letter of a name, or an arrow
    catch_signals()


def catch_signals() -> None:
    """Signals that end a run become a KeyboardInterrupt with their number, so that what is open is cleaned up."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, interrupt)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = repeat


def interrupt(number: int, frame) -> None:
    """The handler of SIGNALS: KeyboardInterrupt(number) inside `serve`, elsewhere one line and status 128 + number."""
    global stopping
    ignore_signals()  # a second one must not cut off the cleaning up
    stopping = number
    if serving:
        raise KeyboardInterrupt(number)
    say_error(f"{Path(sys.argv[0]).name}: stopped by {signal.Signals(number).name}{NOTHING}")
    os._exit(128 + number)  # in the middle of an import, where an exception may be swallowed or printed


def heed() -> None:
    """Raise again an interrupt that some library has swallowed; a long loop calls this between its steps."""
    if serving and stopping is not None:
        raise KeyboardInterrupt(stopping)


def repeat(ignored) -> None:
    """sys.unraisablehook: an interrupt in a destructor is only printed by Python, and lost, so it is sent again.

    The same is true of the callbacks of weak references and of the garbage collector.
    """
    stop = ignored.exc_value
    if not (serving and isinstance(stop, KeyboardInterrupt) and stop.args):
        return sys.__unraisablehook__(ignored)
    signal.signal(stop.args[0], interrupt)
    later = threading.Timer(0.01, signal.raise_signal, stop.args)  # a thread: raised here, it would be lost once more
    later.daemon = True
    later.start()


def ignore_signals() -> None:
    """Let the run finish: the signals that `catch_signals` caught are ignored from now on."""
    for number in SIGNALS:
        if signal.getsignal(number) is interrupt:
            signal.signal(number, signal.SIG_IGN)


def steady_heap() -> None:
    """Keep memory from growing with the video, for less time; to be called before the first large tensor is made.

    glibc hands back every block of 256 KiB or more: kept, they would fragment its heap, which grows for the first 100
    frames. Pages of 2 MiB then make asking for them again cheap (Linux; PyTorch looks for this variable).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 2**18)  # M_MMAP_THRESHOLD


# ---- how a run ends --------------------------------------------------------------------------------------------------

serving = False               # whether a KeyboardInterrupt will be caught
stopping: int | None = None   # the number of the signal that ends the run


def serve(name: str, run: Callable[[], int | None], stopped: Callable[[], str | None] = lambda: NOTHING,
          memory: str = "") -> int:
    """run() -> the exit status of the command `name`; an error is one line on stderr.

    run      its result is the status, None being 0
    stopped  called after a signal -> the end of its line, which says what was written; None: another process says it
    memory   settings that take less memory, for the line of a run that has not enough
    RuntimeErrors that are not about memory are bugs, and raised again.
    """
    global serving, stopping
    serving, stopping = True, None
    try:
        return run() or 0
    except KeyboardInterrupt as stop:
        number = signal.Signals(*stop.args or (signal.SIGINT,))
        if (rest := stopped()) is not None:
            say_error(f"{name}: stopped by {number.name}{rest}")
        return 128 + number
    except (ValueError, OSError, ImportError, *known("av", "FFmpegError")) as error:
        say_error(f"{name}: {error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        reason = first_line(str(error).strip())
        say_error(f"{name}: the memory does not suffice{f' ({memory})' * bool(memory)}: {reason}")
        return 2
    finally:
        serving = False


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that the memory does not suffice, be it Python's or PyTorch's."""
    return (isinstance(error, (MemoryError, *known("torch", "OutOfMemoryError")))
            or isinstance(error, RuntimeError) and "allocate memory" in first_line(str(error).strip()))


def known(module: str, name: str) -> tuple[type, ...]:
    """A class of errors; none where nobody has loaded its module, so that nobody can have raised it."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def say(text: str, end: str = "\n") -> bool:
    """Print to stdout and flush -> whether that succeeded; if not, stdout is silent from then on."""
    try:
        print(text, end=end, flush=True)
        return True
    except (OSError, ValueError):  # a full disk, a closed pipe; a closed file or a letter that the console lacks
        silence(sys.stdout)
        return False


def say_error(text: str) -> None:
    """Print a text as one line on stderr; nothing happens where stderr is closed."""
    try:
        print(" ".join(text.split()), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        silence(sys.stderr)


def silence(stream) -> None:
    """Point a stream at the null device: at exit Python would flush it once more, fail, and end with status 120."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):  # a stream without a number, as tests and notebooks have
        pass


def share(work: Callable, calls: Iterable[tuple], workers: int, unit: str) -> None:
    """work(*call) for each of `calls`, in `workers` processes, with a bar that counts in `unit`.

    The first error ends it, and so does a signal: what has begun is finished, nothing else begins. OSError if one of
    the processes was killed.
    """
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    pool = ProcessPoolExecutor(workers, initializer=leave_signals)
    gc.freeze()  # a worker, forked without the threads here, must not free what waits for them, as libswscale does
    try:
        for job in bar([pool.submit(work, *call) for call in calls], unit=unit):
            job.result()
    except BrokenProcessPool as error:
        raise OSError(f"one of {workers} processes was killed, perhaps for want of memory") from error
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


def leave_signals() -> None:
    """In a worker: leave a terminal's signals, which every process of a command gets, to the first process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def bar(items: Iterable | None = None, **settings):
    """tqdm(items, **settings): a bar where stderr is a terminal, none elsewhere. It vanishes at its end."""
    from tqdm import tqdm

    return tqdm(items, leave=False, disable=no_bar(), **settings)


def no_bar() -> bool | None:
    """For tqdm's `disable`: None lets it see for itself whether stderr is a terminal, which one that is closed is not.
    """
    return True if sys.stderr is None or sys.stderr.closed else None


def peak_memory() -> str:
    """A text: the most memory that this process, and its tensors on a GPU, have taken at any time, in GiB."""
    import torch

    peak = "unknown"
    if sys.platform == "linux":  # where getrusage counts in the process that started this one
        try:
            found = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
        except OSError:  # a sandbox without /proc, and others have it without this line
            found = None
        peak = f"{int(found[1]) / 2**20:.2f} GiB" if found else peak
    elif sys.platform == "darwin":
        import resource  # Windows has none

        peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30:.2f} GiB"
    gpu = f" + {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU" if torch.cuda.is_initialized() else ""
    return f"peak memory {peak}{gpu}"


# ---- what is asked for -----------------------------------------------------------------------------------------------

def first_line(doc: str | None) -> str:
    """The first line of a docstring, for a command's --help; "" for None, as under python -OO."""
    return (doc or "").partition("\n")[0]


def choose_device(name: str) -> str:
    """The device of this name; "auto" is the first of cuda, mps and cpu that torch can use. ValueError if it cannot."""
    import torch

    if name == "auto":
        usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return next(device for device in usable if usable[device])
    try:
        if torch.empty(1, device=name).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: there is none that this torch can use ({error})") from error
    return name


def bfloat16_is_faster(device: str) -> bool:
    """Whether the device computes faster in bfloat16 than in float32: CUDA, and CPUs with AMX. On CPUs that have
    AVX-512's bfloat16 alone the small networks took 1.2 to 1.8 times as long in it (PyTorch 2.13)."""
    if device != "cpu":
        import torch

        return torch.device(device).type == "cuda"
    return bool(_capabilities().get("amx_bf16"))


def bfloat16_spoils_conv3d(device: str) -> bool:
    """Whether training 3D convolutions in bfloat16 corrupts memory on this device.

    On CPUs with AMX it does, in PyTorch 2.13: where frames are few and large, as in 1x16x1x96x144, the gradient of the
    weights is written beyond its buffer. The environment variable ONEDNN_MAX_CPU_ISA can keep AMX from being used.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    uses_amx = "AMX" in limit or limit in ("ALL", "DEFAULT")
    return device == "cpu" and uses_amx and bool(_capabilities().get("amx_bf16"))


def _capabilities() -> dict:
    """What the CPU has, by name; older versions of PyTorch do not tell."""
    import torch

    return getattr(torch.cpu, "get_capabilities", dict)()


def override(recipe, settings: list[str]):
    """A copy of the dataclass `recipe` with "key=value" settings applied.

    ValueError for a key that it does not have, or a value that is not of the field's kind and range.
    """
    from ..networks import checked

    kinds, changes = get_type_hints(type(recipe), include_extras=True), {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in kinds:
            raise ValueError(f"--set {setting}: unknown key {key!r}, there are {', '.join(kinds)}")
        kind = type(getattr(recipe, key))
        try:
            given = BOOLEANS[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            raise ValueError(f"--set {setting}: {key} must be {kind.__name__}, got {text!r}") from None
        changes[key] = checked.value(kinds[key], given, f"--set {setting}", key)
    return dataclasses.replace(recipe, **changes)


if __name__ == "__main__":
    def fails(error: BaseException) -> Callable:
        def run():
            raise error
        return run

    for each in (ValueError("clip.mp4: holds no video"), MemoryError("9 GiB"), KeyboardInterrupt(signal.SIGTERM)):
        print(type(each).__name__, "-> status", serve("infer.py", fails(each), memory="--set tiles=2 takes less"))
    print(peak_memory())
