"""The change inside given boxes: a pixel-by-pixel spec, and what the boxes file may say."""

import json

import pytest
import torch

from mirage_min.data.keep import keep, read_boxes, weight


def slow_weight(boxes, H, W, edge):
    """Every pixel by itself: the largest, over the boxes, of its distances to both axes' borders in edges."""
    w = torch.zeros(1, H, W)
    for x0, y0, x1, y1 in boxes:
        for i in range(H):
            for j in range(W):
                values = []
                for p, start, stop, n in ((j + 0.5, x0, x1, W), (i + 0.5, y0, y1, H)):
                    soft = min(edge, (stop - start) / 4)
                    value = 1.0 if start < p < stop else 0.0
                    if value and start > 0 and soft:
                        value = min(value, (p - start) / soft)
                    if value and stop < n and soft:
                        value = min(value, (stop - p) / soft)
                    values.append(value)
                w[0, i, j] = max(w[0, i, j], values[0] * values[1])
    return w


@pytest.mark.parametrize("boxes", [
    [[3, 2, 17, 11]], [[2.5, 1.25, 9.75, 12]], [[-4, 5, 8, 30]], [[0, 0, 20, 13]], [[3, 3, 5, 4], [4, 2, 15, 9]], []],
    ids=str)
@pytest.mark.parametrize("edge", [0, 1, 3])
def test_the_weight_of_a_pixel_is_its_distance_to_the_border_in_edges(boxes, edge):
    w = weight(torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), 13, 20, edge)
    assert w.shape == (1, 13, 20) and w.dtype == torch.float32
    torch.testing.assert_close(w, slow_weight(boxes, 13, 20, edge), rtol=0, atol=1e-6)


def stream_of(frames, boxes, edge=2, delay=3):
    """keep() around a system that inverts frames and holds `delay` of them back."""
    def harmonise(coming):
        held = []
        for x in coming:
            held.append(-x)
            if len(held) > delay:
                yield held.pop(0)
        yield from held
    return list(keep(harmonise, frames, boxes, edge))


def test_outside_every_pixel_stays_bit_for_bit_and_well_inside_it_is_the_systems():
    frames = [torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in range(7)]
    boxes = [torch.tensor([[i, 2.0, i + 9, 10.0]]) for i in range(6)] + [torch.zeros(0, 4)]
    out = stream_of(frames, boxes)
    assert len(out) == 7
    for i, (x, y) in enumerate(zip(frames[:6], out)):
        outside = torch.ones(12, 16, dtype=torch.bool)
        outside[2:10, i : i + 9] = False
        assert torch.equal(y[:, outside], x[:, outside])
        assert torch.equal(y[:, 4:8, i + 2 : i + 7], -x[:, 4:8, i + 2 : i + 7])
    assert torch.equal(out[6], frames[6]), "no box, no change"


def test_more_or_fewer_frames_than_entries_are_refused():
    frames, boxes = [torch.zeros(3, 8, 8)] * 3, [torch.zeros(0, 4)] * 3
    with pytest.raises(ValueError, match="boxes for 2 frames, and the video has more"):
        stream_of(frames, boxes[:2])
    with pytest.raises(ValueError, match="boxes for 4 frames, and the video has 3"):
        stream_of(frames, boxes + boxes[:1])


def test_a_box_outside_the_frame_is_refused():
    with pytest.raises(ValueError, match=r"box \[20.0, 0.0, 30.0, 5.0\] lies outside the frame of 20x13"):
        weight(torch.tensor([[20.0, 0.0, 30.0, 5.0]]), 13, 20, 2)


def test_a_file_has_one_list_or_one_for_each_video(tmp_path):
    entries = [None, [1, 2, 3.5, 4], [[0, 0, 5, 5], [6, 6, 8, 9]], []]
    for content in (entries, {"clip": entries, "other": []}):
        (tmp_path / "boxes.json").write_text(json.dumps(content), encoding="utf-8-sig")  # Windows has this mark
        boxes = read_boxes(tmp_path / "boxes.json", "clip")
        assert [b.tolist() for b in boxes] == [[], [[1, 2, 3.5, 4]], [[0, 0, 5, 5], [6, 6, 8, 9]], []]
        assert all(b.shape[1] == 4 for b in boxes)


@pytest.mark.parametrize("content, message", [
    ('{"a": [], "b": []}', "has no boxes for 'clip', but for 'a', 'b'"), ("3", "wanted a list.*got int"),
    ("[null, [1, 2, 3]]", r"frame 1: wanted 4 finite numbers or a list.*or null, got \[1, 2, 3\]"),
    ('[[1, 2, "3", 4]]', "frame 0: wanted 4"), ("[[[1, 2, 3, 4], null]]", "frame 0: wanted 4"),
    ('["no"]', "frame 0: wanted 4"), ("[[1, 2, NaN, 4]]", "frame 0: wanted 4"),
    ("[[5, 2, 5, 4]]", "frame 0: wanted x0 < x1"), ("[[[0, 0, 1, 1], [1, 3, 2, 2]]]", "frame 0: wanted x0 < x1"),
    ("[", "boxes.json: truncated or corrupt")])
def test_a_wrong_file_is_one_line_that_names_the_entry(tmp_path, content, message):
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_boxes(tmp_path / "boxes.json", "clip")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        read_boxes(tmp_path / "none.json", "clip")
