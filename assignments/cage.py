"""Shut this process in, for good: what it may do, what it may read, how much it may use. Linux; the standard library.

    python assignments/cage.py          # what holds on this machine

    seccomp     a filter of system calls: no process is started, signalled or looked into, no socket is opened, nothing
                is written, created, renamed, removed or changed in its rights. What is open already stays so.
    landlock    a list of folders: no other file is opened. With it no capability of root is left but to read.

Both are inherited, cannot be undone, and ask for no rights; they hold in most containers too. Enter before any thread
is started: a thread that runs already stays outside. Every platform has the limits of `limit`.
"""

import ctypes
import os
import platform
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

MEMORY = 16 * 2**30  # bytes of address space
PROTECTIONS = ("seccomp", "landlock")

# name, its number on x86-64, on 64-bit ARM (-: not there). Refused with EPERM.
REFUSED = """
fork 57 -            vfork 58 -            execve 59 221        execveat 322 281      unshare 272 97      setns 308 268
tkill 200 130        rt_sigqueueinfo 129 138                    rt_tgsigqueueinfo 297 240
ptrace 101 117       process_vm_readv 310 270                   process_vm_writev 311 271                 kcmp 312 272
setpriority 141 140  ioprio_set 251 30     sched_setparam 142 118                     sched_setscheduler 144 119
sched_setattr 314 274                      sched_setaffinity 203 122                  move_pages 279 239
socket 41 198        socketpair 53 199     shmget 29 194        msgget 68 186         semget 64 190      mq_open 240 180
creat 85 -           mkdir 83 -            mkdirat 258 34       mknod 133 -           mknodat 259 33      link 86 -
linkat 265 37        symlink 88 -          symlinkat 266 36     unlink 87 -           unlinkat 263 35     rmdir 84 -
rename 82 -          renameat 264 38       renameat2 316 276    truncate 76 45        chmod 90 -          fchmod 91 52
fchmodat 268 53      chown 92 -            fchown 93 55         lchown 94 -           fchownat 260 54     utime 132 -
utimes 235 -         futimesat 261 -       utimensat 280 88     setxattr 188 5        lsetxattr 189 6    fsetxattr 190 7
removexattr 197 14   lremovexattr 198 15   fremovexattr 199 16  open_by_handle_at 304 265
mount 165 40         umount2 166 39        pivot_root 155 41    chroot 161 51         bpf 321 280
perf_event_open 298 241                    userfaultfd 323 282  add_key 248 217       request_key 249 218 keyctl 250 219
"""
# name, its numbers, the argument looked at, what is asked of it
LOOKED_AT = """
clone 56 220 0 thread     open 2 - 1 reading    openat 257 56 2 reading    kill 62 129 0 self    tgkill 234 131 0 self
prlimit64 302 261 0 none
"""
NEWER = 424                         # from here on (Linux 5.1) both count alike: clone3, openat2, io_uring, pidfd_*, ...
THREAD, WRITES = 0x10000, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}     # column above, the kernel's name for it
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS = 1, 38
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06   # of classic BPF

NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2                          # of prctl
READ_FILE, READ_FOLDER = 4, 8                                           # of landlock
CREATE_RULESET, ADD_RULE, RESTRICT = 444, 445, 446
READ_ANYTHING = 1 << 2                                                  # CAP_DAC_READ_SEARCH, under landlock's list


def enter(readable: list[Path], wanted: tuple[str, ...] = PROTECTIONS) -> None:
    """From here on this process reads these files and folders alone and does none of the above; else OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    if "landlock" in wanted:
        read_only_from(libc, readable)
        header, reading = struct.pack("=II", 0x20080522, 0), struct.pack("=6I", *[READ_ANYTHING] * 2, 0, 0, 0, 0)
        if libc.capset(header, reading) < 0:  # it is not root, or is without this one already
            check(libc.capset(header, bytes(24)))
    if "seccomp" in wanted:
        lines = program(platform.machine(), os.getpid())
        code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
        check(libc.prctl(SECCOMP, FILTER, struct.pack("@HP", len(lines), ctypes.addressof(code)), 0, 0))


def program(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """The filter: (instruction, lines to skip if true, if false, number). It sees number, machine, -, -, arguments."""
    column, name = MACHINES[machine]
    lines = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, name), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0),
             (AT_LEAST, 0, 1, NEWER), (RETURN, 0, 0, ERROR | ENOSYS)]  # the C library does without, as on old kernels
    words = REFUSED.split()
    for number in words[1 + column :: 3]:
        if number != "-":
            lines += [(EQUAL, 0, 1, int(number)), (RETURN, 0, 0, ERROR | EPERM)]
    words = LOOKED_AT.split()
    for numbers, argument, asked in zip(zip(words[1::5], words[2::5]), words[3::5], words[4::5]):
        right, wrong = (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERROR | EPERM)
        test = {"thread": [(ANY_BIT, 0, 1, THREAD), right, wrong], "reading": [(ANY_BIT, 0, 1, WRITES), wrong, right],
                "self": [(EQUAL, 0, 1, pid), right, wrong], "none": [(EQUAL, 0, 1, 0), right, wrong]}[asked]
        if numbers[column] != "-":
            lines += [(EQUAL, 0, 4, int(numbers[column])), (LOAD, 0, 0, 16 + 8 * int(argument)), *test]
    return [*lines, (RETURN, 0, 0, ALLOW)]


def read_only_from(libc: ctypes.CDLL, readable: list[Path]) -> None:
    """Landlock: of all files only these are opened, and for reading; no signals and no sockets to the outside."""
    version = check(libc.syscall(CREATE_RULESET, None, 0, 1))
    files = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1  # every right that this kernel knows
    size = 8 * (1 + (version >= 4) + (version >= 6))
    ruleset = check(libc.syscall(CREATE_RULESET, struct.pack("=3Q", files, 3, 3)[:size], size, 0))
    listed = [Path(path) for path in sys.path if Path(path).is_dir()]  # packages are looked for by listing
    for path in [*readable, *listed]:
        rights = READ_FOLDER * path.is_dir() | READ_FILE * (path in readable)
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        check(libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, folder), 0))
        os.close(folder)
    check(libc.syscall(RESTRICT, ruleset, 0))
    os.close(ruleset)


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def limit(seconds: float) -> None:
    """So many seconds of processor time from now on, MEMORY, no byte in any file, no core dump."""
    for kind, most in ((resource.RLIMIT_CPU, round(time.process_time() + seconds) + 1), (resource.RLIMIT_AS, MEMORY),
                       (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        _, ceiling = resource.getrlimit(kind)
        most = most if ceiling == resource.RLIM_INFINITY else min(most, ceiling)
        resource.setrlimit(kind, (most, most))


def python_folders(hidden: list[Path]) -> list[Path]:
    """What Python and its packages have to read on this machine, without what is hidden."""
    hidden = [path.resolve() for path in hidden if path.exists()]
    system = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", "/proc/cpuinfo",
              "/proc/meminfo", "/proc/self", "/sys/devices/system/cpu"]
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    folders = {Path(p).resolve() for p in [*system, sys.prefix, sys.base_prefix, *packages] if Path(p).exists()}
    return [part for folder in sorted(folders) for part in around(folder, hidden)]


def around(folder: Path, hidden: list[Path]) -> list[Path]:
    """A folder, or its parts that hold nothing hidden where it does. One inside a hidden folder is wanted as it is."""
    inside = [h for h in hidden if h.is_relative_to(folder)]
    if not inside:
        return [folder]
    if folder in inside:
        return []
    return [part for child in folder.iterdir() if not child.is_symlink() for part in around(child, inside)]


def available() -> tuple[str, ...]:
    """Which of PROTECTIONS hold on this machine: each is tried in a process for itself."""
    def holds(name: str) -> bool:
        return subprocess.run([sys.executable, "-I", "-B", __file__, name], capture_output=True).returncode == 0
    return tuple(name for name in PROTECTIONS if sys.platform == "linux" and holds(name))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        enter([], (sys.argv[1],))
    else:
        print(f"{platform.system()}, {platform.machine()}: {', '.join(available()) or 'no protection'}")
