"""config.json in and out: which fields of a published configuration a model understands, and which it refuses.

    config = read_config(AutoencoderKL, json.loads(text), "folder/config.json")
    text = json.dumps(config_fields(model))

Every model class names its published counterpart and says which fields it understands:

    CLASS_NAME        `_class_name` in config.json
    Config            a dataclass: the fields that the code reads, with the published defaults
    FIXED             {field: value} supported with this value alone (of a list: in every element)
    IGNORED           fields that cannot change the result
    translate_config  optional, static: config.json as another layout has it -> config.json as published by diffusers

    python -m mirage_min.networks.config             # what is read, and what is refused
"""

import dataclasses
from pathlib import Path

from torch import nn

from . import checked


def read_config(cls, config: dict, where: str | Path):
    """config.json as a dict -> cls.Config; `where` names the file in errors.

    ValueError of one line for another class, a value of a wrong type, a fixed field with another value, and a field
    that is neither known, fixed nor ignored.
    """
    if hasattr(cls, "translate_config"):
        try:
            config = cls.translate_config(config)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        except (ArithmeticError, LookupError, TypeError) as error:
            raise ValueError(f"{where}: {cls.__name__} does not understand this layout: {error!r}") from error
    if (name := config.get("_class_name")) != cls.CLASS_NAME:
        raise ValueError(f"{where}: wanted _class_name {cls.CLASS_NAME!r}, got {name!r}{hint(cls)}")
    known = {field.name for field in dataclasses.fields(cls.Config)}
    values = {}
    for name, value in config.items():
        if name in known:
            values[name] = value
        elif name in cls.FIXED:
            wanted = cls.FIXED[name]
            if not matches(value, wanted):
                raise ValueError(f"{where}: {cls.__name__} understands {name} only as {wanted!r}, got {value!r}")
        elif name not in cls.IGNORED and not name.startswith("_"):
            raise ValueError(f"{where}: {cls.__name__} does not know the field {name} (here {value!r})")
    return checked.record(cls.Config, values, where, integers=checked.COUNT)


def matches(value, wanted) -> bool:
    """Whether a field has its one supported value: `wanted`, or if that is not a list, a list of nothing else."""
    if isinstance(wanted, (list, tuple)):
        return isinstance(value, list) and value == list(wanted)
    return all(v == wanted for v in value) if isinstance(value, list) else value == wanted


def config_fields(model: nn.Module) -> dict:
    """The content of a model's config.json: its class, its Config and the fields that are fixed."""
    config = {"_class_name": model.CLASS_NAME} | dataclasses.asdict(model.config)
    for name, value in model.FIXED.items():
        # A list of block types has an entry per stage, and diffusers builds as many stages as it has entries.
        config[name] = [value] * len(model.config.block_out_channels) if name.endswith("_block_types") else value
    return config


def hint(cls) -> str:
    """Where these weights are as safetensors, if that is known."""
    return f"; as safetensors: {cls.PUBLISHED}" if hasattr(cls, "PUBLISHED") else ""


if __name__ == "__main__":
    from .vae_2d import AutoencoderKL, AutoencoderKLConfig

    model = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(16, 32), norm_num_groups=8))
    for change in ({}, {"_diffusers_version": "0.35"}, {"act_fn": "relu"}, {"colour": "red"}, {"norm_num_groups": "8"}):
        try:
            print(f"{change}: {read_config(AutoencoderKL, config_fields(model) | change, 'config.json')}")
        except ValueError as error:
            print(f"{change}: refused, {error}")
