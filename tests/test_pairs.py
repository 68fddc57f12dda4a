"""Reading pairs: both videos are cut and flipped alike, a sample is its generator's, and what is broken is left out."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from mirage_min.data.pairs import Pairs
from mirage_min.data.video import write_clip
from mirage_min.method.metrics import actor_crops
from mirage_min.networks import weights
from mirage_min.training import run


def save(path, T=12, H=20, W=28, seed=0, **extra):
    x = torch.randint(0, 256, (2, 3, T, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    weights.save_tensors(path, {"x_ni": x[0], "x_gt": x[1], **extra})


def save_pictures(folder, name, T, H, W):
    """A pair of two folders of grey pictures, lighter from frame to frame."""
    for side in ("ni", "gt"):
        (folder / side / name).mkdir(parents=True)
        for t in range(T):
            Image.fromarray(np.full((H, W, 3), 9 * t, np.uint8)).save(folder / side / name / f"{t}.png")


def draws(step, n=2):
    return [run.draws(3, step, k) for k in range(n)]


def test_both_videos_are_cut_and_flipped_alike(tmp_path):
    """Pixel values are their own place: x_ni and x_gt of one clip are equal, so they must stay so, cut anywhere."""
    place = torch.arange(12 * 20).view(1, 12, 20, 1).expand(3, -1, -1, 28).to(torch.uint8)
    column = torch.arange(28).expand(3, 12, 20, -1).to(torch.uint8)
    for i, x in enumerate((place, column)):
        weights.save_tensors(tmp_path / f"{i}.safetensors", {"x_ni": x, "x_gt": x.clone()})
    pairs, seen = Pairs(tmp_path, 5, (8, 9)), set()
    for step in range(40):
        (x, y, (name,)) = pairs.batch([run.draws(0, step)])
        assert x.shape == (1, 3, 5, 8, 9) and torch.equal(x, y) and -1 <= x.min() and x.max() <= 1
        value = ((x[0, 0] + 1) * 127.5).round().int()
        if name[0] == "1":
            steps = value[0, 0].diff().tolist()
            assert steps in ([1] * 8, [-1] * 8), "columns run on, or backwards where flipped"
            seen.add(steps[0])
        else:
            assert (value[0, 1] - value[0, 0]).eq(1).all() and ((value[1, 0] - value[0, 0]) % 256 == 20).all()
    assert seen == {1, -1}, "some are flipped and some are not"


def test_a_sample_is_a_function_of_its_generator_whatever_else_is_in_the_batch(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.safetensors", seed=i)
    pairs = Pairs(tmp_path, 9, (16, 24))
    whole, other = pairs.batch(draws(5, 4)), pairs.batch(draws(6, 4))
    for k in range(4):
        x, y, name = pairs.batch([run.draws(3, 5, k)])
        assert torch.equal(x[0], whole[0][k]) and torch.equal(y[0], whole[1][k]) and name == [whole[2][k]]
    assert not torch.equal(whole[0], other[0]) and not torch.equal(whole[0][0], whole[0][1])


def test_a_crop_of_the_real_video_has_its_proportions_a_random_scale_and_a_random_place(tmp_path):
    """A video that is a ramp along x, y and t in its three colours: slopes and values of a crop say what was cut."""
    T, H, W, h, w = 7, 90, 120, 24, 40
    t, y, x = torch.meshgrid(torch.arange(T) / T, torch.arange(H) / H, torch.arange(W) / W, indexing="ij")
    (tmp_path / "real").mkdir()
    for k, frame in enumerate((255 * torch.stack([x, y, t], dim=-1)).round().byte().numpy()):
        Image.fromarray(frame).save(tmp_path / "real" / f"{k}.png")
    save(tmp_path / "a.safetensors", H=h, W=w)
    pairs, scales, places, starts = Pairs(tmp_path, 3, (h, w), tmp_path / "real", real_frames=5), [], [], set()
    for step in range(60):
        crop, same, names = pairs.batch([run.draws(0, step)], real=1.0)
        assert crop.shape == (1, 3, 3, h, w) and torch.equal(crop, same) and names == ["the real video"]
        value = (crop[0] + 1) / 2
        columns, rows = value[0, 0].mean(0), value[1, 0].mean(1)
        wide, high = (columns[-6] - columns[5]).abs().item() / (w - 11) * W, (rows[-6] - rows[5]).item() / (h - 11) * H
        assert abs(wide - high) < 0.06, f"a pixel is cut from {wide:.3f} x {high:.3f}"
        scales.append(1 / wide)
        if wide < 0.7 * W / w:  # where there is a choice of places
            places.append((value[0].min() / (1 - wide * w / W), value[1].min() / (1 - high * h / H)))
        starts.add(round(value[2, 0].mean().item() * T))
    (tmp_path / "large").mkdir()
    save(tmp_path / "large" / "a.safetensors", H=80, W=117)
    large = Pairs(tmp_path / "large", 3, (80, 117), tmp_path / "real")  # nearly the whole frame: no scale of .8 is left
    for step in range(10):
        value = (large.batch([run.draws(0, step)], real=1.0)[0][0] + 1) / 2
        columns, rows = value[0, 0].mean(0), value[1, 0].mean(1)
        wide, high = (columns[-6] - columns[5]).abs().item() / 106 * W, (rows[-6] - rows[5]).item() / 69 * H
        assert abs(wide - high) < 0.03, f"a pixel is cut from {wide:.3f} x {high:.3f}"
    least, found = max(h / H, w / W), torch.tensor(scales)
    message = f"scales {sorted(scales)}, wanted from {least:.2f} to .8"
    assert least - 0.02 < found.min() < least + 0.05 and 0.72 < found.max() < 0.83, message
    middle, wanted = found.log().mean().exp().item(), (least * 0.8) ** 0.5
    assert abs(middle / wanted - 1) < 0.05, f"geometric mean of the scales {middle:.3f}, wanted {wanted:.3f}"
    for side in torch.tensor(places).T:
        assert side.min() < 0.15 and 0.85 < side.max() < 1.05, f"where pieces begin, of where they can: {side.tolist()}"
    assert starts == {0, 1, 2}, f"of the first 5 frames pieces of 3 begin at {starts}"


def test_of_what_moves_only_clips_that_say_so_know_the_motion_the_others_have_none(tmp_path):
    flow, visible = torch.full((2, 11, 20, 28), 3.0), torch.ones(1, 11, 20, 28)
    save(tmp_path / "a.safetensors", flow=flow, visible=visible)
    save(tmp_path / "b.safetensors")
    save_pictures(tmp_path, "c", 5, 20, 28)
    (tmp_path / "real").mkdir()
    weights.save_tensors(tmp_path / "real" / "road.safetensors", {"x": torch.zeros(3, 5, 32, 40).byte()})
    pairs, seen = Pairs(tmp_path, 5, (16, 24), tmp_path / "real"), set()
    for step in range(8):
        x_ni, x_gt, flow, visible, names = pairs.moving_batch(draws(step, 4), real=0.3)
        assert flow.shape == (4, 2, 4, 16, 24) and visible.shape == (4, 1, 4, 16, 24)
        for name, along, still_seen in zip(names, flow, visible):
            known = name == "a.safetensors"
            assert (along.abs() == 3).all() if known else along.isnan().all(), name
            assert torch.equal(still_seen, torch.full_like(still_seen, float(known))), name
        same = pairs.batch(draws(step, 4), real=0.3)
        assert torch.equal(x_ni, same[0]) and torch.equal(x_gt, same[1]) and names == same[2]
        seen |= set(names)
    assert seen == {"a.safetensors", "b.safetensors", "c", "road"}


def test_what_is_broken_mismatched_or_too_small_is_named_and_left_out(tmp_path):
    save(tmp_path / "good.safetensors", boxes=torch.zeros(12, 4), mask=torch.zeros(12, 20, 28))
    save(tmp_path / "short.safetensors", T=8)
    save(tmp_path / "small.safetensors", H=15)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    weights.save_tensors(tmp_path / "float.safetensors", {"x_ni": torch.zeros(3, 12, 20, 28), "x_gt": torch.zeros(1)})
    weights.save_tensors(tmp_path / "half.safetensors", {"x_ni": torch.zeros(3, 12, 20, 28, dtype=torch.uint8)})
    x = torch.zeros(3, 10, 32, 32)
    for name, ni, gt in (("fine", x, x), ("size", x, x[:, :, :30]), ("length", x, x[:, :9])):
        for side, clip in (("ni", ni), ("gt", gt)):
            (tmp_path / side).mkdir(exist_ok=True)
            write_clip(tmp_path / side / f"{name}.mp4", clip)
    write_clip(tmp_path / "ni" / "alone.mp4", x)
    for side in ("ni", "gt"):
        (tmp_path / side / "text.mp4").write_text("no video")
    pairs = Pairs(tmp_path, 9, (16, 24))
    assert pairs.names == ["good.safetensors", "fine.mp4"]
    reasons = dict(line.split(": ", 1) for line in pairs.left_out)
    for name, reason in {"alone.mp4": "only in ni", "short.safetensors": "wanted at least [9, 16, 24]",
                         "small.safetensors": "got [12, 15, 28]", "broken.safetensors": "eader",
                         "float.safetensors": "wanted uint8 [3, T, H, W], got F32", "half.safetensors": "x_gt",
                         "size.mp4": "ni is [10, 32, 32] (frames, height, width), gt [10, 30, 32]",
                         "length.mp4": "gt [9, 32, 32]", "text.mp4": "text.mp4"}.items():
        assert reason in reasons.pop(name), name
    assert not reasons
    assert pairs.batch(draws(0, 8))[0].shape == (8, 3, 9, 16, 24)


def test_a_pair_that_breaks_later_is_replaced_by_another_draw(tmp_path):
    for side in ("ni", "gt"):
        for name in ("a", "b"):
            (tmp_path / side / name).mkdir(parents=True)
            for t in range(4):
                Image.fromarray(np.full((16, 16, 3), 9 * t, np.uint8)).save(tmp_path / side / name / f"{t}.png")
    (tmp_path / "gt" / "b" / "3.png").write_bytes(b"broken")
    pairs = Pairs(tmp_path, 4)
    assert pairs.names == ["a", "b"], "only a whole read can tell"
    with pytest.warns(UserWarning, match="left out, another is drawn: .*b"):
        one = pairs.batch(draws(0, 6))
    with pytest.warns(UserWarning):
        two = pairs.batch(draws(0, 6))
    assert one[2] == ["a"] * 6 and torch.equal(one[0], two[0])


@pytest.mark.parametrize("boxes", [torch.tensor(3.0), torch.zeros(4), torch.zeros(12, 5), torch.zeros(11, 4),
                                   torch.zeros(12, 4, dtype=torch.complex64),
                                   torch.zeros(12, 4).to(torch.float8_e4m3fn)],
                         ids=lambda boxes: f"{boxes.dtype} {list(boxes.shape)}")
def test_boxes_of_another_rank_length_or_kind_are_named_and_the_pair_is_left_out(tmp_path, boxes):
    save(tmp_path / "a.safetensors")
    save(tmp_path / "b.safetensors", boxes=boxes)
    pairs = Pairs(tmp_path, 4)
    assert pairs.names == ["a.safetensors"] and pairs.left_out[0].startswith("b.safetensors: wanted boxes [12, 4], got")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_boxes_that_are_not_finite_are_a_valueerror_that_names_the_clip(tmp_path, value):
    save(tmp_path / "a.safetensors", boxes=torch.full((12, 4), value))
    with pytest.raises(ValueError, match="a.safetensors: wanted boxes of finite numbers"):
        Pairs(tmp_path, 4).crops(0)
    save(tmp_path / "a.safetensors", boxes=torch.tensor([[0, 0, 20, 10]]).repeat(12, 1))
    assert Pairs(tmp_path, 4).crops(0)[0] is not None, "integers are boxes too"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with pipes")
def test_a_pipe_is_left_out_and_not_waited_for_and_hidden_files_are_passed_over(tmp_path):
    save(tmp_path / "a.safetensors")
    os.mkfifo(tmp_path / "b.safetensors")
    (tmp_path / "._a.safetensors").write_bytes(b"of another system")
    for side in ("ni", "gt"):
        (tmp_path / side / ".ipynb_checkpoints").mkdir(parents=True)
        os.mkfifo(tmp_path / side / "c.mp4")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    pairs = Pairs(tmp_path, 4)
    assert pairs.names == ["a.safetensors"] and sorted(line.split(": ")[0] for line in pairs.left_out) == [
        "b.safetensors", "c.mp4", "loop.safetensors"]
    assert all("is neither a file nor a folder" in line for line in pairs.left_out)


def test_the_paths_are_all_that_is_read_and_the_real_videos(tmp_path):
    save(tmp_path / "a.safetensors")
    save_pictures(tmp_path, "b", 4, 16, 16)
    (tmp_path / "real").mkdir()
    weights.save_tensors(tmp_path / "real" / "street.safetensors", {"x": torch.zeros(3, 5, 32, 40).byte()})
    own = [tmp_path / "a.safetensors", tmp_path / "ni" / "b", tmp_path / "gt" / "b"]
    assert Pairs(tmp_path, 4).paths() == own
    assert Pairs(tmp_path, 4, real=tmp_path / "ni" / "b").paths() == [*own, tmp_path / "ni" / "b"]
    assert Pairs(tmp_path, 4, real=tmp_path / "real").paths() == [*own, tmp_path / "real" / "street.safetensors"]


def test_a_folder_of_real_clips_is_mixed_in_by_its_share_each_its_own_truth(tmp_path):
    save(tmp_path / "a.safetensors", H=24, W=32)
    (tmp_path / "real").mkdir()
    for name in ("street", "road"):
        x = torch.randint(0, 256, (3, 9, 60, 90), dtype=torch.uint8)
        weights.save_tensors(tmp_path / "real" / f"{name}.safetensors", {"x": x})
    pairs, seen = Pairs(tmp_path, 5, (16, 24), tmp_path / "real"), []
    for step in range(60):
        x, y, names = pairs.batch(draws(step), real=0.5)
        assert x.shape == y.shape == (2, 3, 5, 16, 24) and x.abs().max() <= 1
        seen += names
        for k, name in enumerate(names):
            assert torch.equal(x[k], y[k]) is (name != "a.safetensors")
            wanted = pairs.batch([run.draws(3, step, k)], real=0.5)
            assert torch.equal(wanted[0][0], x[k]) and wanted[2] == [name]
    assert 40 <= seen.count("a.safetensors") <= 80 and min(seen.count("street"), seen.count("road")) > 10
    assert set(pairs.batch(draws(0), real=0.0)[2]) == {"a.safetensors"}


def test_a_share_of_clips_is_in_other_tones_insertion_and_truth_alike(tmp_path):
    ni, gt = torch.randint(0, 256, (2, 3, 5, 16, 24), dtype=torch.uint8)
    gt[:, :, 8:] = ni[:, :, 8:]
    weights.save_tensors(tmp_path / "a.safetensors", {"x_ni": ni, "x_gt": gt})
    pairs, kept = Pairs(tmp_path, 5), 0
    for step in range(40):
        (x, y, _), (as_x, as_y, _) = (pairs.batch([run.draws(3, step)], varied=share) for share in (0.5, 0.0))
        kept += torch.equal(x, as_x)
        assert torch.equal(x, as_x) is torch.equal(y, as_y)
        same = (as_x == as_y).all(dim=1)                                # pixels in which both sides agree
        assert same.any() and torch.equal(x.movedim(1, -1)[same], y.movedim(1, -1)[same])
    assert 10 <= kept <= 32, f"{kept} of 40 clips are as they were, of the varied half 15 % too"


def test_nothing_to_train_on_is_fatal_and_says_why(tmp_path):
    with pytest.raises(ValueError, match="no usable pairs: wanted \\*.safetensors clips, or ni/ and gt/ videos"):
        Pairs(tmp_path, 9)
    save(tmp_path / "short.safetensors", T=8)
    with pytest.raises(ValueError, match="no usable pairs: short.safetensors: wanted at least"):
        Pairs(tmp_path, 9)


def test_the_crops_of_a_clip_are_those_that_evaluate_scores_of_its_first_frames(tmp_path):
    boxes = torch.tensor([[60.0, 2.0, 70.5, 9.0], [64.0, 4.0, 79.5, 12.5], [0, 0, 0, 0], [0, 0, 40, 40]])
    save(tmp_path / "a.safetensors", T=4, H=48, W=80, boxes=boxes)
    save(tmp_path / "b.safetensors", T=4, H=48, W=80)
    save(tmp_path / "c.safetensors", T=4, H=48, W=80, boxes=torch.zeros(4, 4))
    pairs = Pairs(tmp_path, 3)  # the fourth frame's box, the largest, does not count
    assert pairs.crops(0) == actor_crops(boxes[:3], 48, 80) and pairs.crops(0)[2] is None
    assert pairs.crops(0)[0] == (slice(0, 32), slice(48, 80))
    assert pairs.crops(1) is None and pairs.crops(2) is None
