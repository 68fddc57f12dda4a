"""observe.py: depth of frames from a network's file, brought to the unit of the poses, and from the toy renderer."""

import sys

import pytest
import torch
from torch import nn

from mirage_min.data.toy_world import WorldConfig, render, sample_scene
from mirage_min.method.camera import Camera
from mirage_min.systems.observe import DepthNetwork, ToyDepth

CAMERAS = [Camera.from_pose(torch.eye(3), torch.eye(4), 6, 4)] * 2


class Bright(nn.Module):
    """The brighter, the farther: depth 2 + red, and nothing known where green is 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.where(images[:, 1] == 1, torch.zeros_like(images[:, 0]), 2 + images[:, 0])


class Wrong(nn.Module):
    """Three channels in place of a depth, and of many images nothing at all."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[0] < 3, "no memory for so many"
        return images


def saved(network: nn.Module, path):
    with torch.no_grad():
        torch.jit.script(network).save(path)
    return path


def test_a_torchscript_network_sees_each_frame_in_its_own_range_and_is_scaled(tmp_path):
    frames = torch.rand(3, 2, 4, 6) * 2 - 1
    file = saved(Bright(), tmp_path / "depth.pt")
    depth = DepthNetwork(file, scale=3.0)(frames, CAMERAS).depth
    assert depth.shape == (2, 4, 6) and torch.equal(depth, 3 * (2 + frames[0]))


def test_the_factor_of_a_network_is_found_on_a_known_frame_where_both_know_the_depth(tmp_path):
    frame = torch.rand(3, 4, 6) * 2 - 1
    depth = 0.5 * (2 + frame[0])
    frame[1, 0], depth[1], depth[2, 0] = 1, torch.inf, 0
    depth[3, :3] *= 1.1                                                # a few that do not fit
    network, off = DepthNetwork(saved(Bright(), tmp_path / "d.pt"), scale=2.0).matched(frame, depth, CAMERAS[0])
    assert network.scale == pytest.approx(0.5) and off == pytest.approx(0, abs=1e-6)
    got = network(frame[:, None], CAMERAS[:1]).depth[0]
    assert torch.allclose(got[3, 3:], depth[3, 3:]) and got[0].abs().max() == 0
    with pytest.raises(ValueError, match="d.pt: knows no depth where that of the first frame is given"):
        network.matched(frame, torch.zeros(4, 6), CAMERAS[0])


def test_what_is_no_network_or_gives_no_depth_is_refused_by_its_file(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="gone.pt: no such file"):
        DepthNetwork(tmp_path / "gone.pt")
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(ValueError, match="text.pt: neither a TorchScript network nor NAME.onnx"):
        DepthNetwork(tmp_path / "text.pt")
    network = DepthNetwork(saved(Wrong(), tmp_path / "wrong.pt"))
    with pytest.raises(ValueError, match=r"wrong.pt: wanted depth \[2, 4, 6\] or \[2, 1, 4, 6\], got \[2, 3, 4, 6\]"):
        network(torch.zeros(3, 2, 4, 6), CAMERAS)
    with pytest.raises(ValueError, match=r"wrong.pt: fails on images \[3, 3, 4, 6\]: .*no memory for so many"):
        network(torch.zeros(3, 3, 4, 6), CAMERAS)
    (tmp_path / "depth.onnx").write_bytes(b"no network")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="depth.onnx: needs onnxruntime"):
        DepthNetwork(tmp_path / "depth.onnx")


def test_an_onnx_network_is_read_by_onnxruntime(tmp_path):
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=f"needs {name}")
    torch.onnx.export(Bright(), torch.zeros(2, 3, 4, 6), tmp_path / "depth.onnx")
    frames = torch.rand(3, 2, 4, 6) * 2 - 1
    assert torch.allclose(DepthNetwork(tmp_path / "depth.onnx")(frames, CAMERAS).depth, 2 + frames[0])


def test_the_toy_renderer_gives_the_depth_of_a_still_scene_from_any_camera():
    config = WorldConfig(frames=3, height=32, width=48, static=True, path="out_and_back")
    scene = sample_scene(3, config)
    clip = render(scene, config)
    cameras = [Camera.from_pose(clip.K, pose, 48, 32) for pose in clip.c2w]
    depth = ToyDepth(scene)(clip.x_gt[:, [1]], [cameras[1]]).depth
    wanted = clip.depth[0, [1]]
    assert torch.equal(depth.isinf(), wanted.isinf()) and depth.isinf().any()
    near = wanted.isfinite()
    assert (depth[near] - wanted[near]).abs().max() < 1e-3
