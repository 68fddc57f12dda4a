"""What fuzz.py does to valid inputs: bytes, JSON values and tensors changed as disks, editors and programs do."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save
from torch import Tensor

from mirage_min.networks import weights

Door = Callable[[Random], object]

VALUES = [None, True, False, 0, 1, -1, 2, 7, 10**6, 2**31, 2**63, 10**30, -(10**30), 0.0, 0.5, -0.5, 1e-30, 1e30, 1e300,
          float("nan"), float("inf"), -float("inf"), "", "x", "2", "../x", "/etc/passwd", "é" * 300, [], [[]], [0],
          [None], ["a"], [1, 2, 3], [[1.0] * 4] * 4, {}, {"a": 1}, {"": None}]


class Lost(Exception):
    """Fewer frames came out than went in, and nothing was said."""


def change_bytes(data: bytes, draws: Random) -> bytes:
    """One to four changes as disks, networks and careless programs make them."""
    data = bytearray(data)
    for _ in range(draws.choice((1, 1, 2, 4))):
        if not data:
            break
        at, size = draws.randrange(len(data)), draws.choice((1, 4, 64, 600))
        kind = draws.randrange(8)
        if kind <= 1:
            data[at] ^= 1 << draws.randrange(8)
        elif kind == 2:
            data[at : at + size] = bytes(min(size, len(data) - at))
        elif kind == 3:
            data[at : at + size] = draws.randbytes(min(size, len(data) - at))
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            del data[at : at + size]
        elif kind == 6:
            data[at:at] = draws.randbytes(size)
        else:
            data[at : at + 4] = draws.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
    return bytes(data)


def change_value(value, draws: Random):
    """A JSON value with one node of it changed, taken out, renamed or buried deep."""
    nodes = []

    def walk(here):
        for key in here if isinstance(here, dict) else range(len(here)):
            nodes.append((here, key))
            if isinstance(here[key], (dict, list)):
                walk(here[key])

    value = json.loads(json.dumps(value))
    walk(value)
    if not nodes or draws.random() < 0.03:
        return draws.choice(VALUES)
    here, key = draws.choice(nodes)
    kind = draws.randrange(12)
    if kind == 0:
        del here[key]
    elif kind == 1 and isinstance(here, dict):
        here[f"{key}_"] = here.pop(key)
    elif kind == 2 and isinstance(here[key], list):
        here[key] = here[key][: draws.randrange(len(here[key]) + 1)] * draws.choice((1, 2))
    elif kind == 3:
        for _ in range(50):
            here[key] = [here[key]]
    else:
        here[key] = draws.choice(VALUES)
    return value


def change_json(value, draws: Random) -> bytes:
    """The same as a file, whose text is sometimes changed instead."""
    if draws.random() < 0.1:
        return change_bytes(json.dumps(value).encode(), draws)
    if draws.random() < 0.02:
        return b'{"frames": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return json.dumps(change_value(value, draws)).encode()


def change_tensors(tensors: dict[str, Tensor], about: dict[str, str], draws: Random
                   ) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One tensor or one note of a safetensors file changed."""
    tensors, about = dict(tensors), dict(about)
    if about and draws.random() < 0.5:
        name = draws.choice(sorted(about))
        try:
            old = json.loads(about[name])
        except ValueError:
            old = about[name]
        new = change_value({"": old}, draws)
        about[name] = json.dumps(new[""]) if isinstance(new, dict) and "" in new else str(new)[:300]
        if draws.random() < 0.1:
            del about[name]
        return tensors, about
    name = draws.choice(sorted(tensors))
    old, kind = tensors[name], draws.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[f"{name}x"] = tensors.pop(name)
    elif kind == 2:
        tensors[name] = old.to(draws.choice((torch.int64, torch.bool, torch.complex64, torch.float64, torch.float16)))
    elif kind == 3:
        tensors[name] = old.flatten()[: draws.randrange(old.numel() + 1)]
    elif kind == 4:
        tensors[name] = old[None] if old.ndim == 0 or draws.random() < 0.5 else old.flatten()[0]
    elif kind == 5 and old.ndim > 1:
        tensors[name] = old.transpose(0, 1).contiguous()
    else:
        new = old.float().clone().flatten()
        if new.numel():
            new[draws.randrange(new.numel())] = draws.choice((float("nan"), float("inf"), -1e30, 1e38, -1.0))
        tensors[name] = new.view(old.shape).to(old.dtype)
    return tensors, about


def change_file(file: Path, whole: bytes, draws: Random) -> None:
    """Change a JSON, a safetensors or any other file in one way that fits it."""
    if file.suffix == ".json" and draws.random() < 0.8:
        file.write_bytes(change_json(json.loads(whole), draws))
    elif file.suffix == ".safetensors" and draws.random() < 0.8:
        file.write_bytes(whole)
        tensors, about = weights.load_tensors(file)
        changed, about = change_tensors({k: v.clone() for k, v in tensors.items()}, about, draws)
        file.write_bytes(save({k: v.contiguous() for k, v in changed.items()}, about))
    else:
        file.write_bytes(change_bytes(whole, draws))


def any_file(folder: Path, read: Callable[[Path], object]) -> Door:
    """One file of a folder changed, the folder read; then the file is as it was."""
    files = {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
    read(folder)

    def door(draws: Random) -> object:
        file = draws.choice(list(files))
        try:
            change_file(file, files[file], draws)
            return read(folder)
        finally:
            file.unlink(missing_ok=True)
            file.write_bytes(files[file])
    return door
