"""Our speed against diffusers': what is counted and timed, the best turns, and shares of what a machine can do."""

import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments import measuring, published, speed, speed_r3d2
from experiments.common import GIB, H200_BF16
from mirage_min.systems.mirage import Mirage
from tests.torchvision_stub import stub

ROOT = Path(__file__).parents[1]


def flags(*words, of=speed):
    return of.flags().parse_args([str(word) for word in words])


# ---- counting and timing ---------------------------------------------------------------------------------------------

def test_operations_of_a_product_are_two_for_each_multiplication_and_the_fastest_turn_counts(monkeypatch):
    assert speed.operations(lambda: torch.rand(3, 5) @ torch.rand(5, 7)) == 2 * 3 * 5 * 7
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    assert speed.fastest(lambda: None, 3) == 1.0


@pytest.fixture
def signals():
    """infer.py handles signals: afterwards they are as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_stages_of_infer_add_up_to_its_time_without_loading(signals, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = Mirage.__dict__["from_pretrained"]
    spent = speed.seconds_of_infer(9, 32, 32)
    assert list(spent) == [*measuring.STAGES, "reading, writing, the rest"]
    assert all(seconds > 0 for seconds in spent.values()), spent
    assert Mirage.__dict__["from_pretrained"] is before


def test_what_infer_takes_besides_its_stages_is_the_rest_and_loading_is_no_part_of_it(monkeypatch):
    seconds = {"3D encoder": 2.0, "transformer": 3.0, "2D encoder": 1.0, "3D decoder": 4.0, "loading": 5.0}
    monkeypatch.setattr(measuring, "stopwatch", lambda stages: nullcontext(seconds))
    monkeypatch.setattr(measuring, "run_script", lambda *argv: None)
    monkeypatch.setattr(measuring, "noise_clip", lambda path, *size: path)
    clock = iter([100.0, 122.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    rest = {"reading, writing, the rest": 22 - 2 - 3 - 1 - 4 - 5.0}
    assert speed.seconds_of_infer(9, 32, 32) == {stage: seconds[stage] for stage in measuring.STAGES} | rest


# ---- the parts of speed.json -----------------------------------------------------------------------------------------

class Ours(nn.Module):
    """A VAE whose encoding is one GiB and 210 operations, whose decoding two and 420; it keeps what it is given."""

    def __init__(self, times=1):
        super().__init__()
        self.times, self.given = times, []

    def made(self, v, n):
        self.given.append(v)
        out = [torch.empty(GIB // 4, device="meta") for _ in range(n * self.times)]
        return out, [torch.ones(3, 5) @ torch.ones(5, 7) for _ in range(n)]

    def encode(self, x):
        return self.made(x, 1)

    def decode(self, z):
        return self.made(z, 2)


class Theirs(Ours):
    """The same as diffusers has it."""

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=self.made(x, 1)))

    def decode(self, z):
        return SimpleNamespace(sample=self.made(z, 2))


@pytest.fixture
def pair(monkeypatch):
    """Ours, and theirs that takes three times the memory, in place of the published VAEs."""
    pair = Ours(), Theirs(times=3)
    monkeypatch.setattr(published, "vaes", lambda device: {"toy": pair})
    return pair


def test_both_vaes_are_given_the_same_clip_and_latents_of_its_size(pair):
    for call in speed.calls(*pair, (17, 48, 80)).values():
        call()
    for x, z in (each.given for each in pair):
        assert x.shape == (1, 3, 17, 48, 80) and z.shape == (1, 16, 5, 6, 10) and x is pair[0].given[0]
        assert -1 <= x.min() < -0.99 and 0.99 < x.max() <= 1


def test_bytes_are_those_alive_at_once_in_gib(pair):
    found = speed.bytes_part(flags("bytes", "--size", 1, 8, 8))
    wanted = {"encode ours": 1, "decode ours": 2, "encode diffusers": 3, "decode diffusers": 6}
    assert found == {f"toy {key}": pytest.approx(gib, abs=1e-5) for key, gib in wanted.items()}


def test_the_best_turn_of_each_vae_counts_and_its_share_is_of_the_fastest_convolution(pair, monkeypatch):
    # ours and theirs encode, ours and theirs decode; twice
    turns = iter([(3.0, 70), (9.0, 20), (5.0, 50), (8.0, 10), (2.0, 90), (10.0, 30), (6.0, 40), (7.0, 80)])
    monkeypatch.setattr(measuring, "timed", lambda call: next(turns))
    monkeypatch.setattr(speed, "conv_peak", lambda: 1000.0)
    found = speed.vae_part(flags("vae", "--repeat", 2, "--size", 1, 8, 8))
    assert found.pop("conv3d_peak") == 1000
    assert found == {
        "toy encode 1x8x8": {"seconds": [2, 9], "bytes": [70, 20], "of_peak": 210 / 2 / 1000},
        "toy decode 1x8x8": {"seconds": [5, 7], "bytes": [40, 10], "of_peak": 420 / 5 / 1000}}


def test_the_vaes_are_measured_at_three_sizes_unless_one_is_asked_for(pair, monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "calls", lambda ours, theirs, size: seen.append(size) or {
        (side, way): None for side in ("ours", "diffusers") for way in ("encode", "decode")})
    monkeypatch.setattr(measuring, "timed", lambda call: (1.0, 1))
    monkeypatch.setattr(speed, "operations", lambda call: 1)
    monkeypatch.setattr(speed, "conv_peak", lambda: 1.0)
    found = speed.vae_part(flags("vae", "--repeat", 1))
    assert len(seen) == len(set(seen)) == 3 and len(found) == 1 + 3 * 2


def test_the_peak_is_that_of_the_fastest_convolution(monkeypatch):
    """The second of three takes as long as its operations at 5 TFLOP/s, the others half as fast."""
    at = iter([2.5e12, 5e12, 2.5e12])
    monkeypatch.setattr(speed, "fastest", lambda call, turns: speed.operations(call) / next(at))
    with torch.device("meta"):
        assert speed.conv_peak() == pytest.approx(5e12, rel=1e-6)


def test_training_steps_are_taken_in_turns_after_a_first_that_does_not_count(monkeypatch):
    stub()
    pytest.importorskip("diffusers")
    turns, steps = iter([9.0, 9.0, 2.0, 5.0, 3.0, 4.0]), []  # ours and theirs in turn
    monkeypatch.setattr(speed, "fastest", lambda call, n: (steps.append(call), next(turns))[1])
    monkeypatch.setattr(speed, "conv_peak", lambda: 1e9)
    found = speed.step_part(flags("step", "--repeat", 2, "--size", 1, 16, 16))
    assert found["shape"] == [2, 3, 1, 16, 16] and found["seconds"] == [2, 4] and found["ratio"] == 0.5
    assert next(turns, None) is None and found["seconds_at_peak"] == speed.operations(steps[0]) / 1e9


def test_infers_stages_are_shares_of_its_time_at_two_sizes(monkeypatch):
    monkeypatch.setattr(speed, "seconds_of_infer", lambda T, H, W: {"a": T * H / 10, "b": 3 * T * H / 10})
    found = speed.infer_part(flags("infer", "--frames", 66))
    for size, height in (("480x272", 272), ("960x540", 540)):
        assert found[size] == {"frames": 66, "fps": pytest.approx(2.5 / height),
                               "share": pytest.approx({"a": 0.25, "b": 0.75})}


@pytest.mark.parametrize("most, frames", [(9, [9, 33]), (97, [9, 33, 97]), (96, [9, 33])])
def test_seconds_are_by_the_number_of_frames_and_a_frame_by_the_number_of_pixels(tmp_path, monkeypatch, most, frames):
    monkeypatch.setattr(speed, "seconds_of_infer", lambda T, H, W: {"a": T * H / 64, "b": T * W / 48})
    found = speed.length_part(flags("length", "--frames", most, "--out", tmp_path))
    assert found["frames"] == frames and found["seconds"] == [T + 2 * T for T in frames]
    assert found["seconds_a_frame"] == [pytest.approx({"a": H / 64, "b": W / 48}) for H, W in found["sizes"]]
    assert (tmp_path / "speed_length.png").read_bytes()[1:4] == b"PNG"


# ---- R3D2 ------------------------------------------------------------------------------------------------------------

def test_r3d2s_operations_at_the_published_size_are_counted_part_by_part():
    """Skips and attention's products by hand: 2 · C_in · C_out a pixel, 4 · tokens · keys · width a layer."""
    system = published.r3d2("R3D2", "meta")
    parts = {name: n / 1e12 for name, n in speed_r3d2.count_parts(system, 1080, 1920).items()}
    assert parts["UNet"] == pytest.approx(13.07, abs=0.01) and parts["encoder"] == pytest.approx(0.97, abs=0.01)
    assert parts["skips"] == pytest.approx(2 * 64 * 64 * 1080 * 1920 * (1 + 1 / 4 + 1 / 16) / 1e12, rel=1e-6)
    products, sizes = 0, [(135, 240, 320, 5), (68, 120, 640, 5), (34, 60, 1280, 5), (17, 30, 1280, 1)]
    for h, w, width, layers in sizes:  # to itself, and to the 77 tokens of the text
        products += layers * 4 * (h * w) * (h * w + 77) * width
    assert parts["of it attention's products"] == pytest.approx(products / 1e12, rel=1e-3)
    assert parts["all"] == pytest.approx(parts["encoder"] + parts["UNet"] + parts["skips"] + parts["decoder"], rel=1e-6)


def test_an_h200_could_do_as_many_frames_as_its_operations_allow(monkeypatch):
    monkeypatch.setattr(published, "r3d2", lambda name, device: name)
    monkeypatch.setattr(speed_r3d2, "count_parts", lambda name, H, W: {"UNet": 1e12, "all": H * W * 1e6})
    found = speed_r3d2.operations_part(flags("operations", of=speed_r3d2))
    assert found["R3D2"]["fps_limit"] == pytest.approx(H200_BF16 / (1080 * 1920 * 1e6))
    assert [row["reported"] for row in found.values()] == [18.129, 5.964], "the paper's Table 4"


def test_r3d2s_bytes_are_those_between_operations_of_ours_and_theirs(monkeypatch):
    class System(nn.Module):
        def enhance(self, x):
            return "ours", x

        def forward(self, x):
            return "theirs", x

    def expected(models, step, shape, device):
        (system,) = models
        side, x = step(models, "x", "no target")
        assert (shape, device, x) == ((1, 3, 64, 96), "cpu", "x")
        return {"passing": GIB * (3 if side == "ours" else 6), "backward": 7}
    monkeypatch.setattr(published, "r3d2", lambda name, device: System())
    monkeypatch.setattr(published, "DiffusersR3D2", System)
    monkeypatch.setattr(speed_r3d2.R3D2, "enhance", System.enhance)
    monkeypatch.setattr(System, "__init__", lambda self, ours=None: nn.Module.__init__(self))
    monkeypatch.setattr(speed_r3d2, "expected", expected)
    found = speed_r3d2.bytes_part(flags("bytes", "--size", 64, 96, of=speed_r3d2))
    assert found == {name: {"size": [64, 96], "GiB": [3, 6]} for name in ("R3D2", "R3D2-BIG")}


def test_r3d2_takes_turns_with_diffusers_on_one_image_and_their_difference_is_relative(monkeypatch):
    """Theirs gives four times of ours: the difference is three quarters of theirs, whose mean is nearly 0."""
    seen = []

    class System:
        def enhance(self, x):
            seen.append(x)
            return x
    monkeypatch.setattr(published, "r3d2", lambda name, device, dtype: System())
    monkeypatch.setattr(published, "DiffusersR3D2", lambda ours: lambda x: 4 * x)
    turns = iter([(3.0, 7), (5.0, 8), (2.0, 9), (6.0, 6)] * 2)
    monkeypatch.setattr(speed_r3d2, "timed", lambda call, device: next(turns))
    found = speed_r3d2.seconds_part(flags("seconds", "--repeat", 2, "--size", 64, 96, of=speed_r3d2))
    for row in found.values():
        assert row["seconds"] == [2, 5] and row["bytes"] == [7, 6] and row["rms"] == pytest.approx(0.75, abs=0.01)
    assert seen[0].shape == (1, 3, 64, 96) and -1 <= seen[0].min() < -0.99 and 0.99 < seen[0].max() <= 1


def test_on_a_gpu_memory_is_what_a_call_takes_above_what_there_was(monkeypatch):
    told = []
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 100),
                        ("max_memory_allocated", 170)):
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: (told.append(name), value)[1])
    clock = iter([10.0, 13.0])
    monkeypatch.setattr(speed_r3d2.time, "perf_counter", lambda: next(clock))
    assert speed_r3d2.timed(lambda: told.append("call"), "cuda") == (3.0, 70)
    call = told.index("call")
    assert told[:2] == ["synchronize", "reset_peak_memory_stats"] and told[call + 1] == "synchronize"
