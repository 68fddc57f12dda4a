"""Which system a folder or hub id holds: what is in it says so, never its name.

    stage_a.safetensors                              Mirage
    model_index.json of the class Harmonizer         Harmonizer
    model_index.json with a UNet and a VAE           R3D2: R3D2-BIG and Difix too
    model_index.json of the class Restorer, or of    Restorer; of a pipeline only with a task, as DOVE's
    CogVideoX's or Wan's pipeline

    System = system_in("weights")
    system = System.from_pretrained("weights", tiles=2)        # and other fields of System.Options, by keyword
    for frame in system.stream(frames): ...                    # [3, H, W] in [-1, 1], as many as went in

A new system is a new line in SYSTEMS, for a class that has Options, from_pretrained and stream.

    python -m mirage_min.systems.load [FOLDER ...]             # what each holds, and its options
"""

from dataclasses import fields
from pathlib import Path

from torch import nn

from ..networks import weights
from . import harmonizer, r3d2, restore_folder, world_folder
from .mirage import Mirage
from .mirage_folder import STAGE_A
from .restore import Restorer

INDEX = "model_index.json"
SYSTEMS = {  # a class: a function that tells whether a model_index.json is of its folder
    harmonizer.Harmonizer: harmonizer.describes,
    r3d2.R3D2: r3d2.describes,
    Restorer: restore_folder.describes,
}


def system_in(path: str | Path) -> type[nn.Module]:
    """The class whose from_pretrained reads this folder, or this hub id.

    ValueError that says what was found if it is none of these, and how to convert pickles.
    """
    if (Path(path) / STAGE_A).is_file():
        return Mirage
    if Path(path).is_dir() and not (Path(path) / INDEX).is_file():
        pickles = sorted(file for file in Path(path).iterdir() if file.suffix in weights.PICKLES)
        if pickles:
            raise ValueError(f"{pickles[0]}: {weights.unpickling(nn.Module)}")
        raise ValueError(f"{path}: holds no system: neither {STAGE_A} (a Mirage) nor {INDEX}")
    file = weights.locate(nn.Module, path, None, INDEX) / INDEX
    index = weights.read_json(file)
    for system, describes in SYSTEMS.items():
        if describes(index):
            return system
    if world_folder.describes(index):
        raise ValueError(f"{file}: a world model makes a video from one frame: generate.py")
    names = ", ".join(system.__name__ for system in SYSTEMS)
    raise ValueError(f"{file}: describes none of {names}, but {index.get('_class_name', 'no _class_name')!r}")


if __name__ == "__main__":
    import sys

    for path in sys.argv[1:] or [Path(__file__).parents[2] / "weights"]:
        try:
            System = system_in(path)
            options = ", ".join(f"{field.name}={field.default!r}" for field in fields(System.Options))
            print(f"{path}: {System.__name__}, which takes {options}")
        except (OSError, ValueError) as error:
            print(error)
