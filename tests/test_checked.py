"""Values from outside: what fits a dataclass comes in, and what does not is one line with file and field."""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import torch
from torch import Tensor

from mirage_min.networks import checked
from mirage_min.networks.checked import Within


@dataclass
class Inner:
    name: str
    shares: dict[str, float] = field(default_factory=dict)


@dataclass
class Between:
    near: float
    far: float

    def __post_init__(self):
        if self.near >= self.far:
            raise ValueError("near must be less than far")


@dataclass
class Everything:
    count: int = 1
    share: float = 0.5
    near: Annotated[float, Within(0, 1)] = 0.5
    t: Annotated[int, Within(0, 999)] = 199
    least: Annotated[int, Within(3)] = 3
    flag: bool = False
    text: str = ""
    kind: Literal["a", 1] = "a"
    heads: int | tuple[int, ...] = 8
    maybe: float | None = None
    sizes: tuple[int, ...] = (1,)
    many: list[Inner] = field(default_factory=list)
    pose: Annotated[Tensor, (2, 2)] = None


DEEP = json.loads("[" * 500 + "]" * 500)
FITS = [("count", -7, -7), ("share", 3, 3.0), ("near", 1, 1.0), ("t", 0, 0), ("flag", True, True), ("kind", 1, 1),
        ("heads", 4, 4), ("heads", [1, 2], (1, 2)), ("maybe", None, None), ("maybe", 2, 2.0), ("sizes", [1, 2], (1, 2)),
        ("many", [], []), ("many", [{"name": "x", "shares": {"y": 1}}], [Inner("x", {"y": 1.0})])]
REFUSED = [
    ("count", 1.5, "count: wanted an integer, got 1.5"), ("count", True, "count: wanted an integer, got True"),
    ("count", "1", "count: wanted an integer, got '1'"), ("count", 10**30, "count: wanted an integer"),
    ("share", math.nan, "share: wanted one finite number, got nan"), ("share", False, "share: wanted one finite"),
    ("share", -math.inf, "share: wanted one finite number"), ("share", 10**400, "share: wanted one finite number"),
    ("near", 1.01, "near: wanted one finite number from 0 to 1, got 1.01"),
    ("t", 1000, "t: wanted an integer from 0 to 999, got 1000"), ("t", -1, "t: wanted an integer from 0 to 999"),
    ("least", 2, "least: wanted an integer of at least 3, got 2"), ("flag", 1, "flag: wanted true or false, got 1"),
    ("text", None, "text: wanted text, got None"), ("kind", "b", "kind: wanted one of 'a', 1, got 'b'"),
    ("kind", True, "kind: wanted one of"), ("heads", "8", "heads: wanted an integer or a list, each of it an integer"),
    ("maybe", "x", "maybe: wanted one finite number, got 'x'"), ("sizes", [], "sizes: wanted a list, each of it"),
    ("sizes", {}, "sizes: wanted a list"), ("sizes", [1, None], r"sizes\[1\]: wanted an integer, got None"),
    ("sizes", DEEP, r"sizes\[0\]: wanted an integer"), ("pose", DEEP, "pose: wanted 2x2 finite numbers"),
    ("many", [7], r"many\[0\]: wanted an object, got 7"), ("many", [{}], r"many\[0\].name: wanted text, got nothing"),
    ("many", [{"name": "x", "shares": {"y": "z"}}], r"many\[0\].shares.y: wanted one finite number, got 'z'"),
    ("pose", [[1, 2]], r"pose: wanted 2x2 finite numbers"), ("pose", [[1, 2], [3, math.nan]], "pose: wanted 2x2"),
    ("pose", [[1, 2], [3]], "pose: wanted 2x2"), ("pose", "xxxx", "pose: wanted 2x2"), ("pose", None, "pose: wanted"),
    ("text", 5 * [50 * "x"], "text: wanted text, got"),
]


@pytest.mark.parametrize("name, given, wanted", FITS)
def test_what_fits_comes_in_as_the_annotation_names_it(name, given, wanted):
    got = getattr(checked.record(Everything, {name: given}, "a.json"), name)
    assert got == wanted and type(got) is type(wanted)


@pytest.mark.parametrize("name, given, message", REFUSED)
def test_what_does_not_fit_is_refused_with_file_and_field_in_one_line(name, given, message):
    with pytest.raises(ValueError) as error:
        checked.record(Everything, {name: given}, "a.json")
    assert re.match(f"a.json: {message}", str(error.value)), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_record_takes_its_defaults_passes_over_what_it_does_not_name_and_wants_the_rest():
    got = checked.record(Inner, {"name": "x", "colour": DEEP}, "a.json")
    assert got == Inner("x")
    with pytest.raises(ValueError, match="a.json: name: wanted text, got nothing"):
        checked.record(Inner, {}, "a.json")
    with pytest.raises(ValueError, match=r"a.json: objects\[2\]: wanted an object, got \[\]"):
        checked.record(Inner, [], "a.json", "objects[2]")


def test_what_the_dataclass_itself_refuses_is_said_with_file_and_field():
    with pytest.raises(ValueError, match=r"^a.json: near must be less than far$"):
        checked.record(Between, {"near": 2, "far": 1}, "a.json")
    with pytest.raises(ValueError, match=r"^a.json: views\[1\]: near must be less than far$"):
        checked.value(list[Between], [{"near": 1, "far": 2}, {"near": 2, "far": 1}], "a.json", "views")


def test_numbers_become_tensors_of_the_shape_wanted():
    pose = checked.record(Everything, {"pose": [[1, 2], [3, 4.5]]}, "a.json").pose
    assert pose.dtype == torch.float64 and pose.tolist() == [[1, 2], [3, 4.5]]


def test_integers_without_a_range_take_the_callers():
    for wrong in ({"count": 0}, {"sizes": [2, 2**20 + 1]}):
        checked.record(Everything, wrong, "a.json")
        with pytest.raises(ValueError, match="wanted an integer from 1 to 1048576"):
            checked.record(Everything, wrong, "a.json", integers=checked.COUNT)
    assert checked.record(Everything, {"t": 0}, "a.json", integers=checked.COUNT).t == 0, "its own range comes first"


def test_metadata_is_read_as_what_its_fields_are():
    texts = {"t": "250", "share": "1e-3", "text": "7", "flag": "true", "sizes": "[1, 2]"}
    got = checked.metadata(Everything, texts, "a")
    assert (got.t, got.share, got.text, got.flag, got.sizes) == (250, 1e-3, "7", True, (1, 2))
    for text, shown in (("x", "'x'"), ("1.5", "1.5"), ("NaN", "nan"), ("null", "None"), ("[" * 100_000, "'[")):
        with pytest.raises(ValueError, match=f"a: t: wanted an integer from 0 to 999, got {re.escape(shown)}"):
            checked.metadata(Everything, {"t": text}, "a")
