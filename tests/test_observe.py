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
    """Three channels in place of a depth, and of large images nothing at all."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.shape[3] < 9, "no memory for so many"
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
    with pytest.raises(ValueError, match=r"wrong.pt: wanted depth \[1, 4, 6\] or \[1, 1, 4, 6\], got \[1, 3, 4, 6\]"):
        network(torch.zeros(3, 2, 4, 6), CAMERAS)
    with pytest.raises(ValueError, match=r"wrong.pt: fails on a frame \[1, 3, 4, 9\]: .*no memory for so many"):
        network(torch.zeros(3, 2, 4, 9), CAMERAS)
    (tmp_path / "depth.onnx").write_bytes(b"no network")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="depth.onnx: needs onnxruntime"):
        DepthNetwork(tmp_path / "depth.onnx")


@pytest.fixture
def onnx_depth(tmp_path):
    """Writes an ONNX network: depth 2 + the mean of the colours, of images [n, 3, H, W] of the sizes given."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")

    def write(n="n", H="H", W="W", name="depth.onnx"):
        value, make = onnx.helper.make_tensor_value_info, onnx.helper
        nodes = [make.make_node("ReduceMean", ["images"], ["mean"], axes=[1], keepdims=0),
                 make.make_node("Add", ["mean", "two"], ["depth"])]
        graph = make.make_graph(nodes, "depth", [value("images", onnx.TensorProto.FLOAT, [n, 3, H, W])],
                                [value("depth", onnx.TensorProto.FLOAT, [n, H, W])],
                                [make.make_tensor("two", onnx.TensorProto.FLOAT, [], [2.0])])
        onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), tmp_path / name)
        return tmp_path / name
    return write


@pytest.mark.parametrize("sizes", [{}, {"n": 1, "H": 4, "W": 6}])
def test_an_onnx_network_is_run_frame_by_frame_and_its_scale_is_found(onnx_depth, sizes):
    frames = torch.rand(3, 2, 4, 6) * 2 - 1
    network = DepthNetwork(onnx_depth(**sizes))
    depth = network(frames, CAMERAS).depth
    assert depth.shape == (2, 4, 6) and torch.allclose(depth, 2 + frames.mean(0), atol=1e-6)
    assert network(frames.bfloat16(), CAMERAS).depth.dtype == torch.bfloat16
    found, off = network.matched(frames[:, 0], 3 * depth[0], CAMERAS[0])
    assert found.scale == pytest.approx(3, rel=1e-5) and off == pytest.approx(0, abs=1e-6)


def test_an_onnx_file_that_is_none_and_one_for_another_size_are_refused_in_one_line(onnx_depth, tmp_path, capfd):
    network = DepthNetwork(onnx_depth(1, 8, 8, name="large.onnx"))
    whole = onnx_depth().read_bytes()
    for name, content in (("text.onnx", b"no network"), ("empty.onnx", b""), ("half.onnx", whole[: len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not an ONNX network: ") as error:
            DepthNetwork(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"large.onnx: fails on a frame \[1, 3, 4, 6\]: .*Got: 4 Expected: 8") as error:
        network(torch.zeros(3, 2, 4, 6), CAMERAS)
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


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
