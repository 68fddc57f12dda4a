"""Published weights in and out: safetensors in the diffusers layout, from a folder or from the hub.

    model = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse")
    model = CogVideoXDiT.from_pretrained("folder/of/CogVideoX1.5-5B", subfolder="transformer", dtype=torch.bfloat16)
    model.save_pretrained("folder")

A folder holds config.json (config.py) and one *.safetensors, or shards with *.safetensors.index.json. Two optional
attributes of a model class say more about its files:

    translate_key     static: a tensor's name in the file -> its name in the model (older or other layouts); None:
                      known, and without effect
    PUBLISHED         where these weights are as safetensors; errors about other files name it

The model is built on the meta device and the tensors of the memory-mapped file are assigned to it, so the weights are
in memory once. A tensor that is not in the file has no values then, so a model computes its tables when they are first
used, or makes them with an explicit `device="cpu"`. Nothing is ever unpickled.

    python -m mirage_min.networks.weights            # a model saved, loaded, and loaded wrongly
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from . import checked
from .config import config_fields, hint, read_config
from .hub import CONFIG, INDEX, WEIGHTS, download, is_id

Named = Mapping[str, Tensor | Sequence[int]]  # tensors, or no more than their shapes, by name
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def from_pretrained(cls, path: str | Path, subfolder: str | None = None, dtype: torch.dtype | None = None,
                    device: torch.device | str | None = None, revision: str | None = None,
                    cache_dir: str | Path | None = None, token: str | bool | None = None) -> nn.Module:
    """Build a `cls` from a local folder or a hub id ("org/name"), strictly: every tensor is used and none is missing.

    `revision` (a branch, tag or commit), `cache_dir` and `token` are passed to the hub, as in diffusers.
    "org/name@revision" is understood wherever an id is taken.

    `dtype` defaults to the file's own, except that float16 becomes float32: it stores weights well, but sums overflow
    in it. `device` defaults to the CPU; with both defaults the parameters are the memory-mapped file itself
    (training changes them, not the file). The model is in eval mode and its parameters require gradients.
    ValueError for any fault of the files, naming the file and the fault.
    """
    folder = locate(cls, path, subfolder, revision=revision, cache_dir=cache_dir, token=token)
    files = weight_files(cls, folder)
    model = without_weights(cls, read_json(folder / CONFIG), folder / CONFIG)

    source = find_tensors(cls, files)
    given = {key: file.get_slice(name).get_shape() for key, (file, name) in source.items()}
    wanted = model.state_dict()
    where = " + ".join(map(str, files))
    check_match(wanted, given, where, f"the model that {folder / CONFIG} describes")

    state = {key: file.get_tensor(name) for key, (file, name) in source.items()}
    for key, tensor in state.items():
        if wanted[key].is_floating_point():
            check_kind(source[key][1], tensor, where, cast=dtype is not None)
    floats = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if dtype is None and floats:  # of several types, the one that holds them all: a network computes in one
        dtype = functools.reduce(torch.promote_types, floats)
        dtype = torch.float32 if dtype == torch.float16 else dtype
    for key, tensor in state.items():
        state[key] = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
    model.load_state_dict(state, assign=True)
    if unmade := [key for key, tensor in model.named_buffers() if tensor.is_meta and key not in source]:
        raise ValueError(f"{cls.__name__}: no file holds the buffers {unmade[:5]}: compute them when first used")
    return model.to(device=device).eval()


def without_weights(cls, config: dict, where: Path) -> nn.Module:
    """The model that config.json describes, on the meta device; ValueError if it describes none."""
    config = read_config(cls, config, where)
    try:
        with torch.device("meta"):
            return cls(config)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]  # what torch says more are lines of C++
        raise ValueError(f"{where}: describes no {cls.__name__}: {reason}") from error


def save_pretrained(self: nn.Module, folder: str | Path) -> None:
    """Write config.json and the weights in diffusers' layout, each file atomically.

    The tensors are exactly those that from_pretrained wants; adapters and fusion blocks are saved elsewhere. ValueError
    if the folder holds other weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if others := sorted(f.name for f in folder.glob("*.safetensors*") if f.name != WEIGHTS):
        raise ValueError(f"{folder}: holds other weights ({', '.join(others[:5])}); save into an empty folder")
    with torch.device("meta"):
        keys = type(self)(self.config).state_dict().keys()
    state = self.state_dict()
    save_tensors(folder / WEIGHTS, {key: state[key] for key in keys}, {"format": "pt"})
    with whole_file(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config_fields(self), indent=2) + "\n")


# ---- which files ----------------------------------------------------------------------------------------------------


def locate(cls, path: str | Path, subfolder: str | None, config: str = CONFIG, **hub) -> Path:
    """The folder with the file `config` and the weights; fetched from the hub if `path` is an id, not a folder.

    hub: revision, cache_dir and token. ValueError if there is none, it lacks `config`, or the path is a file.
    """
    local = Path(path).expanduser()
    if local.suffix in PICKLES or local.is_file():
        raise ValueError(f"{path}: {unpickling(cls) if local.suffix in PICKLES else 'is a file: name its folder'}")
    if local.is_dir():
        folder = local
    elif is_id(str(path)):
        folder = download(str(path), subfolder, config, **hub)
    else:
        raise ValueError(f"{path}: no such folder, and not a hub id of the form org/name")
    folder = folder / (subfolder or "")
    if not (folder / config).is_file():
        raise ValueError(f"{path}: no {config} in {folder}")
    return folder


def weight_files(cls, folder: Path) -> list[Path]:
    """The safetensors files of a folder: the shards that its index names, the file of the usual name, or the only one.

    Of several indices, the one of the usual name is read: the others list the shards of variants, such as fp16.
    ValueError if shards are missing, the choice is ambiguous, or the folder has no safetensors.
    """
    if indices := sorted(folder.glob(INDEX), key=lambda path: (path.name != f"{WEIGHTS}.index.json", path)):
        names = checked.record(Index, read_json(indices[0]), indices[0]).weight_map.values()
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{indices[0]}: weight_map: wanted files of this folder, got {outside[0]!r}")
        files = [folder / name for name in sorted(set(names))]
        if gone := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{indices[0]}: {len(gone)} of {len(files)} shards are not there: {', '.join(gone[:5])}")
        if not files:
            raise ValueError(f"{indices[0]}: names no shards (no weight_map)")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if folder / WEIGHTS in files:
        return [folder / WEIGHTS]
    if len(files) > 1:
        raise ValueError(f"{folder}: several safetensors and neither an index nor {WEIGHTS}: "
                         f"{', '.join(file.name for file in files[:5])}")
    if not files:
        pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
        raise ValueError(f"{pickles[0]}: {unpickling(cls)}" if pickles else f"{folder}: no *.safetensors{hint(cls)}")
    return files


@dataclasses.dataclass
class Index:
    """*.safetensors.index.json: which shard has which tensor."""

    weight_map: dict[str, str] = dataclasses.field(default_factory=dict)


def unpickling(cls) -> str:
    """The end of an error: why a pickle of the class `cls` is refused, and how to convert it."""
    return ("not loaded, because unpickling a file can run any code in it; convert it once with "
            f"python convert.py FILE FOLDER{hint(cls)}")


# ---- reading and writing single files -------------------------------------------------------------------------------


def find_tensors(cls, files: list[Path]) -> dict[str, tuple[safe_open, str]]:
    """{name in the model: (the open file that has it, its name there)}; only the files' headers are read.

    ValueError if a file cannot be read, or two tensors have one name in the model.
    """
    source = {}
    for path in files:
        with one_line(path):
            file = safe_open(path, framework="pt")
        for name in file.keys():
            key = cls.translate_key(name) if hasattr(cls, "translate_key") else name
            if key is None:
                continue
            if key in source:
                raise ValueError(f"{path}: {name} is a second tensor for {key}")
            source[key] = file, name
    return source


def check_match(wanted: Named, given: Named, source: str, target: str) -> None:
    """ValueError of one line unless `given` has exactly the names and shapes of `wanted`.

    source, target  what has the one and what wants the other, in words for the error
    """
    if found := mismatches(wanted, given):
        raise ValueError(f"{source} ({len(given)} tensors) does not fit {target} ({len(wanted)} tensors): "
                         f"{'; '.join(found)}")


def mismatches(wanted: Named, given: Named) -> list[str]:
    """What differs in names and shapes: how many are missing, unexpected or misshapen, and the first five of each."""
    wanted, given = shapes(wanted), shapes(given)
    found = {"missing": [key for key in wanted if key not in given],
             "unexpected": [key for key in given if key not in wanted],
             "wrongly shaped": [f"{key} (wanted {wanted[key]}, got {given[key]})" for key in wanted
                                if key in given and wanted[key] != given[key]]}
    return [f"{len(keys)} {kind}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
            for kind, keys in found.items() if keys]


def check_kind(name: str, tensor: Tensor, file: str | Path, cast: bool = False) -> None:
    """ValueError unless a tensor holds numbers that networks compute with; 8-bit ones only if they are `cast` first."""
    if not tensor.is_floating_point() or tensor.element_size() < 2 and not cast:
        raise ValueError(f"{file}: {name}: wanted floating-point numbers of 16 bits or more, got {tensor.dtype}")


def check_finite(name: str, tensor: Tensor, file: str | Path) -> None:
    """ValueError unless a tensor of a file holds finite floating-point numbers of 16 bits or more."""
    check_kind(name, tensor, file)
    if not tensor.isfinite().all():
        raise ValueError(f"{file}: {name} is not finite (NaN or inf)")


def fill(network: nn.Module, state: dict[str, Tensor], file: str | Path, target: str) -> None:
    """Give a network the tensors of a file, which become its own; `target` says what the network is, for the error.

    ValueError unless their names and shapes are just the network's, and all their numbers finite.
    """
    check_match(network.state_dict(), state, str(file), target)
    for name, tensor in state.items():
        check_finite(name, tensor, file)
    network.load_state_dict(state, assign=True)


def shapes(named: Named) -> dict[str, list[int]]:
    """{name: shape} of named tensors; named shapes pass through, as lists."""
    return {key: list(value.shape if isinstance(value, Tensor) else value) for key, value in named.items()}


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write named tensors and a {str: str} note to one safetensors file, atomically.

    Equal contents make equal files: the note is sorted, while safetensors itself writes it in a random order.
    """
    plain, storages = {}, set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[key] = tensor.clone() if storage in storages else tensor  # safetensors takes no two that share memory
        storages.add(storage)
    data = memoryview(save(plain, metadata))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + length]))
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    with whole_file(Path(path)) as temporary:  # save_file would hide the file from all other users, whatever the umask
        with open(temporary, "wb") as file:
            file.writelines((len(text).to_bytes(8, "little"), text, data[8 + length :]))


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file -> (its tensors, memory-mapped on the CPU, and its metadata); ValueError if it is none."""
    with one_line(Path(path)), safe_open(path, framework="pt") as tensors:
        return {key: tensors.get_tensor(key) for key in tensors.keys()}, tensors.metadata() or {}


def read_json(path: Path) -> dict:
    """The JSON object in a file, UTF-8; ValueError of one line if there is no file, or it holds none."""
    with one_line(path):
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows' editors begin it with a byte order mark
    if not isinstance(content, dict):
        raise ValueError(f"{path}: wanted a JSON object, got a {type(content).__name__}")
    return content


@contextmanager
def whole_file(path: Path):
    """Lend a temporary path next to `path`; it replaces `path` at the end, unless something was raised.

    The bytes are on the disk before the name is, so a power cut leaves the old file or the new one. An OSError that
    names no file (a full disk) gets the name of this one.
    """
    temporary = path.with_name(f"{path.name[:60]}.{os.getpid()}.tmp")  # a name of 255 bytes has no room for an ending
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def one_line(path: Path):
    """Turn errors of reading the file `path` into a ValueError of one line that names it.

    Missing, unreadable, truncated or corrupt files, Git LFS pointers, and paths that are not files, such as pipes.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no file")  # a pipe would be waited for, without end
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        reason = "only a Git LFS pointer (git lfs pull)" if is_lfs_pointer(path) else f"truncated or corrupt: {error}"
        raise ValueError(f"{path}: {reason}") from error


def is_lfs_pointer(path: Path) -> bool:
    """Whether a path is a Git LFS pointer, the small text file that a clone without LFS has in place of the weights."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


if __name__ == "__main__":
    import tempfile

    from .vae_2d import AutoencoderKL, AutoencoderKLConfig

    with tempfile.TemporaryDirectory() as folder:
        model = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(16, 32), norm_num_groups=8))
        model.save_pretrained(folder)
        print({file.name: file.stat().st_size for file in Path(folder).iterdir()})
        again = AutoencoderKL.from_pretrained(folder, dtype=torch.bfloat16)
        print(sum(p.numel() for p in again.parameters()), "parameters,", next(again.parameters()).dtype)
        for change in ({"block_out_channels": [16, 48]}, {"act_fn": "relu"}, {"colour": "red"}):
            Path(folder, CONFIG).write_text(json.dumps(config_fields(model) | change))
            try:
                AutoencoderKL.from_pretrained(folder)
            except ValueError as error:
                print(f"\n{change} -> {error}")
