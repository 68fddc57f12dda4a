"""Values from outside (JSON, metadata) checked against a dataclass: type, sign and size. Errors name file and field.

    @dataclass
    class Track:
        id: int
        size: Annotated[Tensor, (3,)]                       # a list of three finite numbers, as a float64 tensor
        visible: Annotated[float, Within(0, 1)] = 1.0

    record(Track, {"id": 1.5, "size": [1, 2, 3]}, "tracks.json")
    # ValueError: tracks.json: id: wanted an integer, got 1.5

A field may be an int, float, bool, str, Literal, Any, Tensor, another dataclass, list[X], tuple[X, ...], dict[str, X],
or a union of them. Numbers are finite, a tuple holds at least one element, and nothing is converted except an int to
the float that it equals. Left out: dates, sets, tuples of different types.

    python -m mirage_min.networks.checked         # what is refused, and how
"""

import dataclasses
import json
import math
import reprlib
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor


class Within(NamedTuple):
    """The range of a number, both ends included."""

    low: float = -math.inf
    high: float = math.inf


INT64 = Within(-(2**63), 2**63 - 1)  # what a tensor of integers can hold
COUNT = Within(1, 2**20)             # of channels, heads, tokens, pixels
Depth = Annotated[int, Within(1, 1000)]  # of layers or blocks: a larger number would be built for hours


def record(cls: type, given: Any, file, field: str = "", integers: Within = INT64):
    """A JSON object -> an instance of the dataclass `cls`; fields that the dataclass does not name are ignored.

    file, field  where the object is, for the errors
    integers     the range of integers whose annotation names none
    ValueError of one line for a value of another type or out of range, for a missing field without a default, and for
    what `cls` refuses.
    """
    if not isinstance(given, dict):
        raise refusal(cls, given, file, field)
    kinds, values = get_type_hints(cls, include_extras=True), {}
    for known in dataclasses.fields(cls):
        if known.name in given:
            values[known.name] = value(kinds[known.name], given[known.name], file, within(field, known.name), integers)
        elif known.default is dataclasses.MISSING and known.default_factory is dataclasses.MISSING:
            raise ValueError(f"{file}: {within(field, known.name)}: wanted {describe(kinds[known.name])}, got nothing")
    try:
        return cls(**values)
    except ValueError as error:  # what the dataclass itself says of values that do not go together
        raise ValueError(f"{file}: {f'{field}: ' if field else ''}{error}") from error


def within(field: str, name: str) -> str:
    """The full name of a field inside the field `field`: "field.name", or "name" at the top of the file."""
    return f"{field}.{name}" if field else name


def metadata(cls: type, texts: dict[str, str], file):
    """Metadata, whose values are all text -> an instance of the dataclass `cls`; ValueError as in `record`."""
    kinds = get_type_hints(cls, include_extras=True)
    return record(cls, {name: text if kinds.get(name) is str else parse(text) for name, text in texts.items()}, file)


def parse(text: str) -> Any:
    """The value of a JSON text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def value(kind, given: Any, file, field: str, integers: Within = INT64) -> Any:
    """`given`, checked against the type annotation `kind`; a list becomes a tuple or a tensor where that says so.

    file and field name it in the error; integers as in `record`. ValueError of one line if it does not fit.
    """
    if kind is int and integers != INT64:
        kind = Annotated[int, integers]
    wanted = kind
    limit = INT64 if kind is int else Within()
    if get_origin(kind) is Annotated:
        kind, limit = get_args(kind)
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return given
    if kind is Tensor:
        return numbers(given, limit, file, field)
    if dataclasses.is_dataclass(kind):
        return record(kind, given, file, field, integers)
    if origin in (Union, UnionType):
        return alternative(kind, given, file, field, integers)
    if origin in (list, tuple) and isinstance(given, (list, tuple)) and (given or origin is list):
        return origin(value(args[0], each, file, f"{field}[{i}]", integers) for i, each in enumerate(given))
    if origin is dict and isinstance(given, dict):
        return {name: value(args[1], each, file, within(field, name), integers) for name, each in given.items()}
    if origin is Literal and any(given == each and type(given) is type(each) for each in args):
        return given
    if kind in (bool, str, type(None)) and type(given) is kind:
        return given
    if kind is int and type(given) is int and limit.low <= given <= limit.high:
        return given
    if kind is float and type(given) in (int, float) and abs(given) < 2**1023 and limit.low <= given <= limit.high:
        return float(given)
    raise refusal(wanted, given, file, field)


def alternative(kind, given: Any, file, field: str, integers: Within) -> Any:
    """`given` as the first type of the union `kind` that it fits; ValueError if it fits none."""
    kinds = [each for each in get_args(kind) if each is not type(None) or given is None]
    if len(kinds) == 1:
        return value(kinds[0], given, file, field, integers)
    for each in kinds:
        try:
            return value(each, given, file, field, integers)
        except ValueError:
            continue
    raise refusal(kind, given, file, field)


def numbers(given: Any, shape: tuple[int, ...], file, field: str) -> Tensor:
    """A JSON list, or list of lists -> a float64 tensor of this shape; ValueError of one line otherwise.

    Its elements must be finite in float32 too, in which networks and renderers compute.
    """
    try:
        tensor = torch.tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        tensor = None
    if tensor is None or tensor.shape != shape or not tensor.float().isfinite().all():
        raise refusal(Annotated[Tensor, shape], given, file, field)
    return tensor


def refusal(kind, given: Any, file, field: str) -> ValueError:
    """The ValueError to raise for a value that does not fit the type annotation `kind`."""
    return ValueError(f"{file}: {f'{field}: ' if field else ''}wanted {describe(kind)}, got {reprlib.repr(given)}")


def describe(kind) -> str:
    """A type annotation in words, for an error: int is "an integer", int | None "an integer or null"."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated and args[0] is Tensor:
        return f"{'x'.join(map(str, args[1]))} finite numbers"
    if origin is Annotated:
        low, high = args[1]
        if high == math.inf:
            return f"{describe(args[0])} of at least {low}"
        return f"{describe(args[0])} " + (f"from {low} to {high}" if low > -math.inf else f"of at most {high}")
    if origin in (Union, UnionType):
        return " or ".join(map(describe, args))
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (list, tuple):
        return f"a list, each of it {describe(args[0])}"
    names = {int: "an integer", float: "one finite number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(kind, "an object")


if __name__ == "__main__":
    @dataclass
    class Track:
        id: Annotated[int, Within(0, 255)]
        size: Annotated[Tensor, (3,)]
        category: Literal["car", "van"] = "car"
        frames: list[int] = dataclasses.field(default_factory=list)

    good = {"id": 7, "size": [4.5, 1.8, 1.5], "frames": [0, 1], "colour": "red"}
    print(record(Track, good, "tracks.json", "objects[0]"))
    for change in ({"id": 1.5}, {"id": 300}, {"size": [1, 2]}, {"category": "bus"}, {"frames": [0, None]}):
        try:
            record(Track, good | change, "tracks.json", "objects[0]")
        except ValueError as error:
            print(f"{change} -> {error}")
