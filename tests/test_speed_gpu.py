"""speed_gpu.py: what it measures, on small systems and a CPU; what fails is a row, and the document gets its part."""

import argparse
import json
import re
import time

import pytest
import torch
from torch import nn

from experiments import speed_gpu, training_cost
from experiments.speed_gpu import BEGIN, END, Case
from mirage_min.method.schedules import WAN
from mirage_min.networks.dit_cosmos import CosmosDiT, CosmosDiTConfig
from mirage_min.systems.harmonizer import Harmonizer
from mirage_min.systems.restore import Restorer
from mirage_min.systems.restore_folder import Settings
from tests import small

SIZE = (5, 16, 24)


def restorer(device):
    world = small.world()
    return Restorer(world.vae, world.dit, torch.ones(1, 2, 8), WAN, Settings("upscale", scale=2))


def harmonizer(device):
    dit = CosmosDiT(CosmosDiTConfig(num_attention_heads=1, attention_head_dim=24, in_channels=4, out_channels=4,
                                    num_layers=1, text_embed_dim=16, adaln_lora_dim=8))
    return Harmonizer(small.world().vae, dit).requires_grad_(False).eval()


SYSTEMS = {"a Mirage": lambda device: small.mirage(), "an R3D2": lambda device: small.r3d2(),
           "a Restorer": restorer, "a Harmonizer": harmonizer}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_streams_a_clip_and_its_operations_are_counted(name):
    row = speed_gpu.measure(Case(name, SYSTEMS[name], [SIZE], speed_gpu.stream), SIZE, "cpu")
    assert row["operations"] > 1e6 and 0 < row["seconds"] < 60 and row["GiB"] == 0


def test_a_world_model_makes_as_many_frames_from_the_first():
    frames = torch.zeros(9, 3, 32, 48)
    chunks = speed_gpu.generate(small.world(two_two=True), frames)
    assert sum(x.shape[2] for x in chunks) == 8 and chunks[0].shape[3:] == (32, 48), "the first frame is given"


def test_a_world_models_camera_goes_straight_to_a_wall_at_10_metres():
    """A tenth of a metre a frame, 90 degrees in view: a point as far to the side as ahead is on the border."""
    asked = {}

    class World(nn.Linear):
        def generate(self, frame, geometry, cameras, observe, draws):
            asked.update(frame=frame, geometry=geometry, cameras=cameras, later=observe(None, cameras[3:5]))
            return iter([(None, "video")])
    frames = torch.rand(7, 3, 32, 48)
    assert speed_gpu.generate(World(1, 1), frames) == ["video"] and torch.equal(asked["frame"], frames[0])
    assert len(asked["cameras"]) == 7
    for t, camera in enumerate(asked["cameras"]):
        assert (camera.height, camera.width) == (32, 48)
        assert camera.camera_to_world[:3, 3].tolist() == pytest.approx([0, 0, t / 10])
        for point, pixel in (((0.0, 0, 5), (24, 16)), ((5.0, 0, 5), (48, 16)), ((0.0, 5, 5), (24, 40))):
            u, v, d = (camera.K.float() @ torch.tensor(point)).tolist()
            assert (u / d, v / d) == pytest.approx(pixel)
    assert torch.equal(asked["geometry"].depth, torch.full((1, 32, 48), 10.0))
    assert asked["later"].depth.shape == (2, 32, 48)
    assert asked["later"].depth[:, 0, 0].tolist() == pytest.approx([9.7, 9.6])


def test_on_a_gpu_the_best_turn_counts_and_memory_is_above_what_there_was(monkeypatch):
    told = []
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 2**30),
                        ("max_memory_allocated", 4 * 2**30)):
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: (told.append(name), value)[1])
    clock = iter([10.0, 15.0, 20.0, 23.0, 30.0, 34.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    row = speed_gpu.timed(lambda: told.append("call"), "cuda", repeat=3)
    assert row == {"operations": 0, "seconds": 3.0, "GiB": 3.0}
    assert told[:3] == ["memory_allocated", "call", "reset_peak_memory_stats"]
    assert told[3:-1] == ["synchronize", "call", "synchronize"] * 3


def test_operations_and_seconds_are_those_of_one_call():
    layer = nn.Linear(30, 50, bias=False)
    x = torch.zeros(20, 30)

    def call():
        time.sleep(0.05)
        layer(x)
    row = speed_gpu.timed(call, "cpu")
    assert row["operations"] == 2 * 20 * 30 * 50 and 0.05 <= row["seconds"] < 1


def test_the_peak_is_that_of_a_product(monkeypatch):
    every_half_second = iter(float(i) / 2 for i in range(100))
    monkeypatch.setattr(time, "perf_counter", every_half_second.__next__)
    assert speed_gpu.peak("cpu", n=16, repeat=3) == 2 * 16**3 / 0.5


@pytest.mark.parametrize("error, said", [(torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory"),
                                         (RuntimeError("no kernel\nhere"), "no kernel"),
                                         (ValueError("this needs diffusers"), "this needs diffusers")])
def test_what_fails_is_a_row_that_says_so(error, said):
    def job():
        raise error
    row = speed_gpu.measured(job)
    assert row == {"failed": said} and speed_gpu.figures_of(row, 9, 1e12) == [said, "", "", ""]


def test_a_row_says_frames_a_second_memory_operations_and_their_share():
    row = {"operations": 8e12, "seconds": 4.0, "GiB": 1.25}
    # 8 frames in 4 s; 1 TFLOP a frame; 2 TFLOP/s of 10
    assert speed_gpu.figures_of(row, 8, 1e13) == ["2", "1.2", "1", "20 %"]


@pytest.fixture
def day(tmp_path, monkeypatch):
    """A whole day on a CPU: three systems, one of which fails, and a step of a small stage H."""
    def mirage_theirs(ours, device):
        return lambda frames: ours(frames.movedim(0, 1)[None])

    def broken(system, frames):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(training_cost.nn.Module, "to", lambda self, *args: self)           # float32: a CPU's bfloat16
    monkeypatch.setattr(training_cost.torch, "bfloat16", torch.float32)                    # takes its time
    monkeypatch.setattr(speed_gpu, "peak", lambda device: 1e12)
    stages = {"transformer": (small.Mirage, "denoise"), "2D encoder": (small.Mirage, "mids")}
    cases = [Case("Mirage, small", SYSTEMS["a Mirage"], [SIZE, (1, 16, 16)], speed_gpu.stream, stages, mirage_theirs),
             Case("R3D2", SYSTEMS["an R3D2"], [SIZE], broken)]
    recipes = [training_cost.Recipe("stage H, small", SYSTEMS["a Mirage"], "H", (1, 16, 16), 1)]

    def run(*parts):
        args = argparse.Namespace(out=tmp_path, only=parts or speed_gpu.PARTS)
        return speed_gpu.run_parts(args, cases, recipes, "cpu")
    run.folder = tmp_path
    return run


def test_a_day_fills_the_document_and_a_part_leaves_the_others(day):
    found = day()
    assert json.loads((day.folder / "speed.json").read_text())["gpu"]["systems"].keys() == found["systems"].keys()
    text = (day.folder / "speed.md").read_text()
    mine = text.partition(BEGIN)[2].partition(END)[0]
    assert "Not measured yet" not in text and "one cpu" in mine and "reach 1 TFLOP/s" in mine
    rows = [re.split(r" \| ", line.strip("| ")) for line in mine.splitlines() if line.startswith("| ")]
    mirage, one, r3d2 = rows[2:5]
    assert mirage[:2] == ["Mirage, small", "5×16×24"] and one[1] == "1×16×16" and r3d2[2] == "out of memory"
    row = found["systems"]["Mirage, small 5x16x24"]
    assert float(mirage[2]) == pytest.approx(5 / row["seconds"], rel=0.01)
    assert float(mirage[4]) == pytest.approx(row["operations"] / 5 / 1e12, rel=0.01)
    assert float(mirage[6]) == pytest.approx(5 / row["diffusers"]["seconds"], rel=0.01)
    assert row["stages"].keys() == {"transformer", "2D encoder"} and "Of the time of Mirage, small 5x16x24:" in mine
    step = found["training"]["stage H, small, 1×16×16"]
    assert step["operations"] == training_cost.operations(training_cost.Recipe(
        "the same", SYSTEMS["a Mirage"], "H", (1, 16, 16), 1), "cpu") and "| stage H, small, 1×16×16 |" in mine
    again = day("training")
    assert again["systems"] == found["systems"] and again["peak"] == 1e12


@pytest.mark.parametrize("document", ["nothing", BEGIN, f"{END} {BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_document_without_its_marks_is_refused(document):
    with pytest.raises(ValueError, match="speed.md: wanted <!-- speed_gpu: begin -->"):
        speed_gpu.fill(document, "text")


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["speed_gpu"])
    with pytest.raises(SystemExit) as stop:
        speed_gpu.common.start(speed_gpu.main, speed_gpu.flags())
    assert stop.value.code == 2 and "it needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("case", speed_gpu.CASES, ids=lambda case: case.name)
def test_the_official_systems_have_their_sizes(case):
    """On the meta device, in billions of parameters, encoders and decoders included, as the papers and hubs have it."""
    wanted = {"Mirage, Wan 2.1 1.3B": 1.55, "R3D2": 0.87, "DiffusionHarmonizer, 0.6B": 0.72,
              "DOVE, CogVideoX1.5-5B, 4 times": 5.79, "world model, Wan 2.2 TI2V-5B, 20 steps": 7.2}
    assert all(len(size) == 3 and size[1] % 4 == size[2] % 16 == 0 for size in case.sizes)
    if case.name not in wanted:
        return  # of the same parts
    system = case.make("meta")
    billions = sum(p.numel() for p in system.parameters()) / 1e9
    assert billions == pytest.approx(wanted[case.name], rel=0.03)
    assert {p.dtype for p in system.parameters()} == {torch.bfloat16}
