"""python evaluate.py: the metrics' own numbers, over frames and crops, in tables; and every mistake is one line."""

import csv
import json
import math
import os
import shutil
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import evaluate
import infer
from mirage_min.data import results
from mirage_min.data.video import read_clip, write_clip
from mirage_min.method import metrics, optical_flow
from mirage_min.method.perceptual import Dists, Features, Lpips
from mirage_min.networks.imagenet import alexnet, vgg16
from mirage_min.systems.mirage import Mirage

T, H, W = 18, 40, 48
NAMES = ("one", "two")
BOXES = {  # largest box 20 x 16: with a quarter on every side a window of 30 x 24, at least 32
    "one": [[4 + t, 10, 24 + t, 26] for t in range(T)],
    "two": [None if t in (3, 4, 17) else [30, 2, 50, 12] for t in range(T)],  # beyond the right border: 18 x 10 inside
}


def window(name: str, t: int) -> tuple[slice, slice] | None:
    """The crop's definition, by hand for these boxes: 30 x 24 at least 32, or 27 x 15 at least 32; pushed inside."""
    if BOXES[name][t] is None:
        return None
    x, y = (14 + t, 18) if name == "one" else (39, 7)
    left, top = min(max(x - 16, 0), W - 32), min(max(y - 16, 0), H - 32)
    return slice(top, top + 32), slice(left, left + 32)


class Statistics(nn.Module):
    """A feature network: mean and deviation of each colour."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean(dim=(2, 3, 4)), x.std(dim=(2, 3, 4))], dim=1)


def uint8(x: Tensor) -> Tensor:
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """gt/, ni/, good/ and bad/ clips, boxes.json, networks. The good method is nearer to the truth than the bad one."""
    folder = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    for sub in ("gt", "good", "bad"):
        (folder / sub).mkdir()
    for name in NAMES:
        canvas = nn.functional.interpolate(torch.rand(1, 3, 12, 12), (80, 80), mode="bicubic")[0] * 2 - 1
        gt = torch.stack([canvas[:, t : t + H, t : t + W] for t in range(T)], dim=1)
        flow = torch.randn(2, T - 1, H, W) - 1.0
        visible = (torch.rand(1, T - 1, H, W) > 0.3).float()
        boxes = torch.tensor([box or [0, 0, 0, 0] for box in BOXES[name]], dtype=torch.float32)
        save_file({"x_gt": uint8(gt), "x_ni": uint8(gt + 0.3), "flow": flow, "visible": visible, "boxes": boxes},
                  folder / "gt" / f"{name}.safetensors")
        for method, noise in (("good", 0.05), ("bad", 0.2)):
            save_file({"x_dr": uint8(gt + noise * torch.randn(gt.shape))}, folder / method / f"{name}.safetensors")
    (folder / "boxes.json").write_text(json.dumps(BOXES))
    save_file(alexnet().state_dict(), folder / "alexnet_features.safetensors")
    torch.jit.script(Statistics()).save(folder / "network.pt")
    return folder


def clip(work: Path, method: str, name: str) -> Tensor:
    """[1, 3, T, H, W] in [-1, 1]"""
    key = {"gt": "x_gt", "ni": "x_ni"}.get(method, "x_dr")
    path = work / ("gt" if method == "ni" else method) / f"{name}.safetensors"
    return results.tensor(path, key, 3, None, None, None)[None].float() / 127.5 - 1


def run(capsys, *argv) -> tuple[int, str, str]:
    status = evaluate.cli([str(argument) for argument in argv])
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def scores(work) -> dict:
    """scores.json with everything switched on."""
    argv = ["--pred", work / "good", "--pred", f"worse={work / 'bad'}", "--ni", work / "gt", "--gt", work / "gt",
            "--flow", work / "gt", "--boxes", work / "boxes.json", "--perceptual", work,
            "--vfid", work / "network.pt", "--out", work / "out"]
    assert evaluate.cli([str(argument) for argument in argv]) == 0
    return json.loads((work / "out" / "scores.json").read_text())


def close(got: float, wanted: float, what: str) -> None:
    assert abs(got - wanted) <= 1e-5 * abs(wanted), f"{what}: {wanted}, got {got}"


def test_the_full_frame_has_the_numbers_of_the_metrics_themselves(work, scores):
    distances = {"PSNR": metrics.psnr, "SSIM": metrics.ssim,
                 "LPIPS": lambda x, y: metrics.lpips(x, y, Lpips(Features("alex", work)))}
    for method, label in (("ni", evaluate.NAIVE), ("good", "good"), ("bad", "worse")):
        found = {metric: [] for metric in (*distances, "E*warp")}
        for name in NAMES:
            x, y = clip(work, method, name), clip(work, "gt", name)
            flow, visible = (results.tensor(work / "gt" / f"{name}.safetensors", key, c, T - 1, H, W)[None]
                             for key, c in (("flow", 2), ("visible", 1)))
            for metric, distance in distances.items():
                found[metric].append(distance(x, y).item())
            found["E*warp"].append(optical_flow.warp_error(x, flow, visible).item())
        for metric, values in found.items():
            for name, value in zip(NAMES, values, strict=True):
                close(scores["videos"][evaluate.FULL][label][name][metric], value, f"{metric} of {label}, {name}")
            close(scores["mean"][evaluate.FULL][label][metric], sum(values) / 2, f"{metric} of {label}")


def test_the_crops_follow_the_actor_and_leave_out_the_frames_without_it(work, scores):
    for name in NAMES:
        shown = [t for t in range(T) if window(name, t)]
        x, y = (torch.cat([clip(work, method, name)[:, :, t : t + 1][(..., *window(name, t))] for t in shown], dim=2)
                for method in ("good", "gt"))
        got = scores["videos"][evaluate.CROPS]["good"][name]
        close(got["PSNR"], metrics.psnr(x, y).item(), f"PSNR, {name}")
        close(got["SSIM"], metrics.ssim(x, y).item(), f"SSIM, {name}")
        flow, visible = (results.tensor(work / "gt" / f"{name}.safetensors", key, c, T - 1, H, W)[None]
                         for key, c in (("flow", 2), ("visible", 1)))
        inside = torch.zeros_like(visible)
        for t in shown:
            if t < T - 1:
                inside[:, :, t][(..., *window(name, t))] = 1
        wanted = optical_flow.warp_error(clip(work, "good", name), flow, visible * inside).item()
        close(got["E*warp"], wanted, f"E*warp, {name}")
    assert "33 of them with crops" in scores["remarks"]["scored"], scores["remarks"]


def test_vfid_is_that_of_clips_of_sixteen_frames_and_of_the_rest_played_to_and_fro(work, scores):
    def features(method: str) -> Tensor:
        pieces = [piece for name in NAMES for piece in clip(work, method, name).split(16, dim=2)]
        assert [p.shape[2] for p in pieces] == [16, 2, 16, 2]
        return torch.cat([metrics.clip_features(Statistics(), piece) for piece in pieces])

    with pytest.warns(UserWarning):
        close(scores["mean"][evaluate.FULL]["good"]["vFID"], metrics.vfid(features("good"), features("gt")), "vFID")
    assert "6 features from 4 clips: the covariance has rank 3" in scores["remarks"][f"vFID, {evaluate.FULL}"]
    assert scores["mean"][evaluate.CROPS]["good"]["vFID"] > 0


def test_the_truth_shows_its_own_warp_error_and_nothing_else(scores):
    row = scores["mean"][evaluate.FULL][evaluate.TRUTH]
    assert {metric for metric, value in row.items() if value is not None} == {"E*warp"}


def test_json_csv_and_markdown_say_the_same(work, scores):
    with open(work / "out" / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 3, "two regions, four methods, two videos and their mean"
    for row in rows:
        table = scores["mean" if row["video"] == "mean" else "videos"][row["region"]][row["method"]]
        table = table if row["video"] == "mean" else table[row["video"]]
        for metric in evaluate.COLUMNS:
            assert row[metric] == ("" if table.get(metric) is None else str(table[metric])), (row, metric)
    text = (work / "out" / "scores.md").read_text()
    assert f"{scores['mean'][evaluate.FULL]['worse']['PSNR']:.2f}" in text and "E*warp: ×10³" in text


def test_the_page_shows_each_method_next_to_the_truth(work, scores):
    page = (work / "out" / "scores.html").read_text()
    for name in NAMES:
        for method in ("naive insertion", "good", "worse"):
            assert f"<h2>{name}: {method}</h2>" in page
    assert page.count("<section") == 3 * len(NAMES) and "ground truth: " not in page
    assert (work / "out" / "scores.md").read_text().splitlines()[0] in page


def test_the_best_of_several_methods_is_bold_and_the_truth_never():
    def row(**values) -> dict:
        return dict.fromkeys(evaluate.COLUMNS, math.nan) | values

    rows = {"a": row(PSNR=30.0, SSIM=0.5, LPIPS=0.2), "b": row(PSNR=math.inf, SSIM=0.5, LPIPS=0.1),
            "c": row(PSNR=9.0, vFID=3.0), evaluate.TRUTH: row(LPIPS=0.0)}
    warp = {m: row(**{"E*warp": e}) for m, e in (("low", 0.3), ("near", 0.9), (evaluate.TRUTH, 0.8))}
    assert "**0.900**" in (text := evaluate.markdown({"r": warp})) and text.count("**") == 2, text
    warp[evaluate.TRUTH] = row()
    assert "**0.300**" in (text := evaluate.markdown({"r": warp})) and text.count("**") == 2, text
    text = evaluate.markdown({"r": rows})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    assert cells[0] == ["r", "PSNR ↑", "SSIM ↑", "LPIPS ↓", "DISTS ↓", "E*warp ↓", "vFID ↓", "frames/s ↑"]
    assert cells[2:] == [["a", "30.00", "**0.500**", "0.200", "–", "–", "–", "–"],
                         ["b", "**inf**", "**0.500**", "**0.100**", "–", "–", "–", "–"],
                         ["c", "9.00", "–", "–", "–", "–", "3.000", "–"],
                         [evaluate.TRUTH, "–", "–", "0.000", "–", "–", "–", "–"]]


def test_a_video_of_one_frame_has_no_warp_error_and_too_few_clips_no_vfid(work, tmp_path, capsys):
    for folder, key in (("gt", "x_gt"), ("pred", "x_dr")):
        (tmp_path / folder).mkdir()
        save_file({key: torch.zeros(3, 1, 32, 32, dtype=torch.uint8)}, tmp_path / folder / "still.safetensors")
    status, out, _ = run(capsys, "--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--flow", tmp_path / "gt",
                         "--vfid", work / "network.pt", "--out", tmp_path / "out")
    row = json.loads((tmp_path / "out" / "scores.json").read_text())["mean"][evaluate.FULL]["pred"]
    assert status == 0 and row["PSNR"] == "inf" and row["E*warp"] is None and row["vFID"] is None
    assert "* vFID, full frame: absent: one clip has no covariance" in out


def test_files_and_folders_and_clips_are_compared_with_each_other_and_an_equal_video_has_no_end(work, tmp_path, capsys):
    """PNGs are lossless: against the same numbers in a clip, the PSNR is infinite, and JSON has no word for that."""
    (tmp_path / "png").mkdir()
    for name in NAMES:
        write_clip(tmp_path / "png" / name, clip(work, "gt", name)[0])
    (tmp_path / "png" / "notes.txt").write_text("no video")
    status, out, err = run(capsys, "--pred", tmp_path / "png", "--gt", work / "gt", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "scores.json").read_text(), parse_constant=lambda constant: 1 / 0)
    row = found["mean"][evaluate.FULL]["png"]
    assert status == 0 and row["PSNR"] == "inf" and abs(row["SSIM"] - 1) < 1e-6 and row["LPIPS"] is None
    assert f"* PSNR, full frame, png: inf in {len(NAMES) * T} frames, which equal the truth" in out
    assert "**" not in out, "one method has no rival to be better than"
    assert list(found["mean"]) == [evaluate.FULL], "without boxes there are no crops"


@pytest.mark.skipif(not find_spec("DISTS_pytorch"), reason="needs pip install --no-deps DISTS_pytorch")
def test_a_clip_is_one_however_its_ending_is_spelt(tmp_path):
    dark, bright = (torch.full((3, 2, 32, 32), level, dtype=torch.uint8) for level in (0, 255))
    for name in ("a.safetensors", "b.SAFETENSORS"):
        save_file({"x_ni": dark, "x_dr": bright}, tmp_path / name)
        assert [int(x.min()) for x in results.frames(tmp_path / name, "x_dr")] == [1, 1], "the result, not the input"


def test_dists_is_scored_where_vgg_reaches_its_last_tap(tmp_path, capsys):
    torch.manual_seed(0)
    save_file(vgg16().state_dict(), tmp_path / "vgg16_features.safetensors")
    x, y = torch.rand(2, 3, 2, 33, 40) * 2 - 1
    for folder, tensors in (("pred", {"x_dr": uint8(x)}), ("gt", {"x_gt": uint8(y)})):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "clip.safetensors")
    status, *_ = run(capsys, "--pred", tmp_path / "pred", "--gt", tmp_path / "gt", "--perceptual", tmp_path, "--lpips",
                     "vgg", "--out", tmp_path / "out")
    got = json.loads((tmp_path / "out" / "scores.json").read_text())["mean"][evaluate.FULL]["pred"]
    x, y = (uint8(v)[None].float() / 127.5 - 1 for v in (x, y))
    vgg = Features("vgg", tmp_path)
    close(got["DISTS"], metrics.dists(x, y, Dists(vgg)).item(), "DISTS")
    close(got["LPIPS"], metrics.lpips(x, y, Lpips(vgg)).item(), "LPIPS of vgg")


def test_metrics_without_weights_are_absent_and_say_why(work, tmp_path, capsys, monkeypatch):
    shutil.copy(work / "alexnet_features.safetensors", tmp_path)
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    status, out, _ = run(capsys, "--pred", work / "good", "--gt", work / "gt", "--perceptual", tmp_path)
    assert status == 0 and "* LPIPS: alex\n" in out
    assert "* DISTS: absent: no vgg weights" in out and "* vFID: absent: no feature network" in out
    assert "* E*warp: absent: no exact flow" in out and "opencv" in out
    status, out, _ = run(capsys, "--pred", work / "good", "--gt", work / "gt")
    assert "* LPIPS: absent: no weights given (--perceptual DIR or auto)" in out


def test_dis_is_the_flow_where_no_other_is_given_and_is_named(work, tmp_path, capsys):
    pytest.importorskip("cv2", reason="needs pip install opencv-python-headless")
    status, out, _ = run(capsys, "--pred", work / "good", "--gt", work / "gt", "--out", tmp_path)
    found = json.loads((tmp_path / "scores.json").read_text())["videos"][evaluate.FULL]
    assert status == 0 and "along the truth's flow: OpenCV DIS" in out
    for name in NAMES:
        y = clip(work, "gt", name)
        forward, backward = optical_flow.flow_dis(y), optical_flow.flow_dis(y.flip(2)).flip(2)
        visible = optical_flow.visible_by_consistency(forward, backward)
        for method, label in (("good", "good"), ("gt", evaluate.TRUTH)):
            wanted = optical_flow.warp_error(clip(work, method, name), forward, visible).item()
            close(found[label][name]["E*warp"], wanted, f"{label}, {name}")


def test_what_the_backward_flow_does_not_confirm_does_not_count(monkeypatch):
    """DIS in both directions, by hand: from a step of two pixels to the right the lower half does not come back."""
    forward, wanted = torch.zeros(1, 2, 1, 12, 16), torch.zeros(1, 1, 1, 12, 16, dtype=torch.bool)
    forward[:, 0] = 2
    backward = -forward
    backward[:, 0, :, 6:] = 3
    wanted[..., :6, :14] = True
    y = torch.rand(1, 3, 2, 12, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(optical_flow, "flow_dis", lambda x: forward if torch.equal(x, y) else backward)
    w, seen = evaluate.dis(y, 0)
    assert torch.equal(w, forward) and torch.equal(seen, wanted)


def test_frames_per_second_are_those_that_infer_printed(work, tmp_path, capsys, monkeypatch):
    model = SimpleNamespace(stream=iter, Options=Mirage.Options, from_pretrained=lambda path, **options: model)
    monkeypatch.setattr(infer, "system_in", lambda path: model)
    (tmp_path / "pred").mkdir()
    for name in NAMES:
        write_clip(tmp_path / f"{name}.mp4", clip(work, "gt", name)[0])
        assert infer.cli([str(tmp_path / f"{name}.mp4"), str(tmp_path / "pred" / f"{name}.mp4")]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "pred" / "infer.log").write_text(printed)
    status, out, _ = run(capsys, "--pred", tmp_path / "pred", "--gt", work / "gt", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["videos"][evaluate.FULL]["pred"]
    for line, name in zip(printed.splitlines(), NAMES, strict=True):
        assert f" {found[name]['frames/s']:.2f} frames/s" in line, (line, found)


def test_no_more_than_two_frames_of_a_video_are_in_memory(work, monkeypatch):
    real, alive, most = evaluate.frames, weakref.WeakSet(), 0

    def watched(path, method):
        nonlocal most
        for frame in real(path, method):
            alive.add(frame)
            most = max(most, len(alive))
            yield frame

    monkeypatch.setattr(evaluate, "frames", watched)
    assert evaluate.cli(["--pred", str(work / "good"), "--gt", str(work / "gt"), "--flow", str(work / "gt")]) == 0
    assert 4 <= most <= 7, f"two frames of two videos, and those on their way to be the next: {most}"


def test_what_is_missing_or_does_not_fit_is_named_in_one_line(work, tmp_path, capsys):
    def broken(change, *argv, pred: str = "good") -> str:
        """Copy the work, change the copy, evaluate it; returns the one line of the error."""
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        copy = shutil.copytree(work, tmp_path / "copy", ignore=shutil.ignore_patterns("out", "vgg*", "alex*"))
        change(copy)
        argv = [str(a).replace("@", str(copy)) for a in (*argv, "--out", tmp_path / "scores")]
        status, out, err = run(capsys, "--pred", copy / pred, "--gt", copy / "gt", *argv)
        assert status == 2 and err.count("\n") == 1 and err.startswith("evaluate.py: "), (status, out, err)
        assert not (tmp_path / "scores").exists() and "|" not in out, "no table of what does not fit"
        return err

    def put(name: str, **tensors):
        return lambda copy: save_file({key: value.contiguous() for key, value in tensors.items()}, copy / name)

    def boxes(**changes):
        return lambda copy: (copy / "boxes.json").write_text(json.dumps(BOXES | changes))

    def nothing(copy):
        pass

    x, of_boxes, of_flow = torch.zeros(3, T, H, W, dtype=torch.uint8), ("--boxes", "@/boxes.json"), ("--flow", "@/gt")
    cases = [
        (broken(lambda copy: (copy / "good" / "one.safetensors").unlink()), "1 are in one alone, one (ground truth)"),
        (broken(put("good/three.safetensors", x_dr=x)), "three (good)"),
        (broken(lambda copy: write_clip(copy / "good" / "one", x[:, :1].float())),
         "one and one.safetensors have the same name"),
        (broken(lambda copy: shutil.rmtree(copy / "good")), "copy/good"),
        (broken(lambda copy: [p.unlink() for p in (copy / "good").iterdir()]), "holds no videos"),
        (broken(put("good/two.safetensors", x_dr=x[:, :, :-1])), "two.safetensors: 18 frames of 39x48"),
        (broken(put("good/two.safetensors", x_dr=x[:, :0])), "two.safetensors: 0 frames"),
        (broken(put("good/two.safetensors", x_dr=x[:, 1:])), "two.safetensors: 17 frames of 40x48 (height x width), "
                                                             "wanted 18 of 40x48"),
        (broken(put("good/two.safetensors", x_gt=x)), "wanted x_dr [3, None, None, None], got none"),
        (broken(put("good/two.safetensors", x_dr=x.float())), "two.safetensors: wanted a video in uint8"),
        (broken(lambda copy: (copy / "good" / "two.safetensors").write_bytes(b"no")), "two.safetensors"),
        (broken(lambda copy: (copy / "good" / "two.safetensors").rename(copy / "good" / "two.mp4")), "two.mp4"),
        (broken(lambda copy: [put(f"{f}/{n}.safetensors", x_dr=x[..., :31], x_gt=x[..., :31])(copy)
                              for f in ("gt", "good") for n in NAMES]), "one.safetensors: 18 frames of 40x31"),
        (broken(boxes(one=BOXES["one"][1:]), *of_boxes), "one: wanted [x0, y0, x1, y1] or null for each of 18 frames"),
        (broken(boxes(one=[[1, 2, 3]] * T), *of_boxes), "boxes.json: one[0]: wanted 4 finite numbers"),
        (broken(boxes(one=[[1, 2, 3, "x"]] * T), *of_boxes), "boxes.json: one[0]: wanted 4 finite numbers"),
        (broken(boxes(one=[None, [1, 2, 3, math.nan]] * 9), *of_boxes), "boxes.json: one[1]: wanted 4 finite numbers"),
        (broken(boxes(one=[[9, 2, 3, 4]] * T), *of_boxes), "boxes.json: one: wanted x0 <= x1 and y0 <= y1, got [9.0"),
        (broken(boxes(one=7), *of_boxes), "one: wanted [x0, y0, x1, y1] or null for each of 18 frames, got 7"),
        (broken(lambda copy: (copy / "boxes.json").write_text("{}"), *of_boxes), "boxes.json: one: wanted"),
        (broken(lambda copy: (copy / "boxes.json").write_text("[]"), *of_boxes), "boxes.json: wanted a JSON object"),
        (broken(put("gt/one.safetensors", x_gt=x, boxes=torch.full((T, 4), math.inf)), "--boxes", "@/gt"),
         "one.safetensors: boxes: wanted finite real numbers"),
        (broken(put("gt/one.safetensors", x_gt=x, boxes=torch.zeros(T, 4).to(torch.float8_e4m3fn)), "--boxes", "@/gt"),
         "one.safetensors: boxes: wanted finite real numbers, got torch.float8_e4m3fn"),
        (broken(put("gt/one.safetensors", x_gt=x, boxes=torch.ones(T, 4).to(torch.uint32)), "--boxes", "@/gt"),
         "one.safetensors: boxes: wanted finite real numbers, got torch.uint32"),
        (broken(put("gt/one.safetensors", x_gt=x, flow=torch.full((2, T - 1, H, W), math.nan)), *of_flow),
         "one.safetensors: flow: wanted finite real numbers"),
        (broken(put("gt/one.safetensors", x_gt=x, flow=torch.zeros(2, T - 1, H, W, dtype=torch.complex64)), *of_flow),
         "one.safetensors: flow: wanted finite real numbers"),
        (broken(lambda copy: (copy / "boxes.json").write_text("{"), *of_boxes), "boxes.json"),
        (broken(nothing, "--boxes", "@/nowhere.json"), "nowhere.json"),
        (broken(nothing, "--boxes", "@/good"), "one.safetensors: wanted boxes [18, 4], got none"),
        (broken(put("gt/one.safetensors", x_gt=x), *of_flow), "one.safetensors: wanted flow [2, 17, 40, 48], got none"),
        (broken(nothing, "--flow", "@/nowhere"), "nowhere/one.safetensors"),
        (broken(nothing, "--vfid", "@/boxes.json"), "boxes.json: not a TorchScript network"),
        (broken(nothing, "--vfid", "@/nowhere.pt"), "nowhere.pt: is no file"),
        (broken(lambda copy: os.mkfifo(copy / "pipe.pt"), "--vfid", "@/pipe.pt"), "pipe.pt: is no file"),
        (broken(nothing, "--perceptual", "@/nowhere"), "nowhere"),
        (broken(nothing, "--pred", "@/good"), "the name 'good' is taken"),
        (broken(nothing, "--pred", "ground truth=@/good"), "the name 'ground truth' is taken"),
    ]
    for got, wanted in cases:
        assert wanted in got, f"wanted {wanted!r} in {got!r}"


def test_hidden_entries_are_no_videos_and_others_that_are_none_are_named(work, tmp_path, capsys):
    x = clip(work, "gt", "one")[0, :, :2]
    for folder in ("pred", "gt"):
        (tmp_path / folder).mkdir()
        write_clip(tmp_path / folder / "a.mp4", x)
        shutil.copy(tmp_path / folder / "a.mp4", tmp_path / folder / "b.ts.mp4")
        with av.open(str(tmp_path / folder / "a.mp4")) as source, av.open(str(tmp_path / folder / "c.ts"), "w") as out:
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    (tmp_path / "gt" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "gt" / "@eaDir").mkdir()
    (tmp_path / "gt" / "empty").mkdir()
    (tmp_path / "gt" / "._a.mp4").write_bytes(b"\0\5\x16\7Mac OS X")
    (tmp_path / "pred" / "notes.txt").write_text("a clip of my own")
    status, out, err = run(capsys, "--pred", tmp_path / "pred", "--gt", tmp_path / "gt")
    assert status == 0 and "scored: 3 videos, 6 frames" in out, (out, err)
    assert f"passed over in {tmp_path / 'pred'}: notes.txt\n" in out
    assert f"passed over in {tmp_path / 'gt'}: empty\n" in out


@pytest.mark.parametrize("out", [True, False])
def test_scores_that_cannot_be_printed_are_written_all_the_same_or_missed(work, tmp_path, capsys, monkeypatch, out):
    monkeypatch.setattr(evaluate.desk, "say", lambda text, end="": False)
    argv = ["--pred", work / "good", "--gt", work / "gt", "--flow", work / "gt"]
    status, _, err = run(capsys, *argv, *(["--out", tmp_path / "scores"] if out else []))
    assert status == (0 if out else 2) and (tmp_path / "scores" / "scores.json").exists() == out
    assert out or "stdout takes no more (--out DIR" in err


def test_a_log_of_another_kind_does_not_stop_the_scores(tmp_path):
    (tmp_path / "a.log").write_bytes(b"caf\xe9.mp4: 3 frames, 1.2.3 frames/s\nb.mp4: 3 frames, 4.50 frames/s\n")
    (tmp_path / "._b.log").write_bytes(b"\0")
    (tmp_path / "folder.log").mkdir()
    assert evaluate.logged_speed(tmp_path) == {"b": 4.5}


class Wrong(nn.Module):
    """A feature network with the wrong result, by its number."""

    def __init__(self, kind: int):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == 0:
            raise ValueError("no such video")
        if self.kind == 1:
            return x.mean(dim=(1, 2, 3, 4)) * float("nan")
        return x.mean(dim=(2, 3, 4)) @ torch.zeros(5, 5)


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize("network, said", [
    (Wrong(0), "cannot compute features of a video"), (Wrong(1), "wanted features of finite numbers"),
    (Wrong(2), "cannot compute features"), (Two(), "cannot compute features")])
def test_a_feature_network_of_another_kind_is_one_line(tmp_path, network, said):
    torch.jit.script(network).save(tmp_path / "net.pt")
    features = evaluate.load_features(tmp_path / "net.pt", "cpu")
    with pytest.raises(ValueError, match=f"net.pt: {said}"):
        features(torch.zeros(1, 3, 10, 4, 4))


def test_features_whose_number_depends_on_the_clip_have_no_vfid():
    clips = {(evaluate.FULL, method): [torch.ones(1, 16), torch.ones(1, 10)] for method in ("ours", evaluate.TRUTH)}
    means = {evaluate.FULL: {"ours": {}}}
    said = evaluate.add_vfid(means, clips)
    assert said == {"vFID, full frame": "absent: the network's features are not of one size"}
    assert means == {evaluate.FULL: {"ours": {}}}


def test_one_feature_has_a_distance_too():
    """d² = (μ1 − μ2)² + (σ1 − σ2)² of two numbers' Gaussians."""
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [5.0], [11.0]])
    wanted = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert metrics.vfid(a, b) == pytest.approx(float(wanted))


def test_a_truncated_file_is_named_before_anything_is_scored(work, tmp_path, capsys):
    (tmp_path / "pred").mkdir()
    for name in NAMES:
        write_clip(tmp_path / "pred" / f"{name}.mp4", clip(work, "gt", name)[0])
    path = tmp_path / "pred" / "two.mp4"
    read_clip(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") + 4
    data[at + len(data) // 3 : at + len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    path.write_bytes(data)
    status, out, err = run(capsys, "--pred", tmp_path / "pred", "--gt", work / "gt")
    assert status == 2 and err.count("\n") == 1 and "two.mp4" in err and "PSNR" not in out, err
