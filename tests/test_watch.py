"""Watching a run: a line a step that a killed run's successor resumes, and a picture of what it makes."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from mirage_min.training import watch


@dataclass
class Recipe:
    steps: int = 4


def steps(folder) -> list[dict]:
    """The log as anyone would read it: JSON, a line each, the last one ended too."""
    text = (folder / "log.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_every_step_is_a_line_and_a_run_that_resumes_forgets_those_after_its_checkpoint(tmp_path):
    log = watch.Log(tmp_path, Recipe(), 0)
    assert steps(tmp_path) == [] and json.loads((tmp_path / "settings.json").read_text()) == {"steps": 4}
    for step in range(4):
        assert log(step, {"mse": torch.tensor(0.25 * step), "gram": 0.5}) == {
            "mse": f"{0.25 * step:.4f}", "gram": "0.5000"}
        assert [line["step"] for line in steps(tmp_path)] == list(range(step + 1))
    assert steps(tmp_path)[3]["mse"] == 0.75 and steps(tmp_path)[3]["gram"] == 0.5
    whole = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(whole + '{"step": 4, "mse')  # killed while it wrote
    (tmp_path / "step_9.png.tmp").write_text("half a picture")
    again = watch.Log(tmp_path, Recipe(), 2)                         # the checkpoint was that of two steps
    assert steps(tmp_path) == [json.loads(line) for line in whole.splitlines()[:2]]
    assert not list(tmp_path.glob("*.tmp"))
    again(2, {"mse": 1.0})
    assert [line["step"] for line in steps(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("line", ['{"a": 1}', "[]", '{"step": "x"}', '{"step": null}', '{"step": 1e400}', "x",
                                  "[" * 100_000, '{"step": 1, "mse": "x"}', '{"step": 1, "mse": [1]}'])
def test_a_log_with_a_line_that_is_none_is_named_with_the_lines_number(tmp_path, line):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "mse": 1.0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"^[^\n]*log.jsonl, line 2: wanted [^\n]*$"):
        watch.Log(tmp_path, Recipe(), 2)


def test_a_picture_is_the_middle_frame_of_naive_now_and_truth_side_by_side(tmp_path):
    torch.manual_seed(0)
    ni, gt = 2 * torch.rand(2, 1, 3, 5, 8, 12) - 1
    log = watch.Log(tmp_path, Recipe(), 0)
    log(6, {"mse": 0.1})
    log.report(6, lambda x, y: (x + y) / 2, (ni, gt))
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "step_7.png"))).permute(2, 0, 1)
    shown = sheet[:, watch.CAPTION:]
    wanted = (torch.cat([ni, (ni + gt) / 2, gt], dim=4)[0, :, 2] + 1) * 127.5
    difference = (shown - wanted).abs().max()
    assert shown.shape == (3, 8, 36) and difference <= 0.501, f"largest difference {difference} of 255"


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_curves_are_the_positive_values_of_each_term_and_none_before_the_first_line(tmp_path, monkeypatch):
    """A weight that grows from 0 and a score that is taken now and then, as they would dive on a logarithmic axis."""
    figures, pair = [], torch.zeros(2, 1, 3, 1, 8, 12)
    monkeypatch.setattr(watch, "Figure", lambda **settings: figures.append(Figure(**settings)) or figures[-1])
    log = watch.Log(tmp_path, Recipe(), 0)
    log.report(0, lambda x, y: x, pair)
    for step, terms in enumerate(({"mse": 0.5, "gram": 0.0}, {"mse": 0.25, "gram": 0.125}, {"mse": 1.0, "psnr": 20})):
        log(step, terms)
    log.report(2, lambda x, y: x, pair)
    before, after = ({line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
                     for figure in figures)
    assert before == {} and after == {"mse": [[0, 0.5], [1, 0.25], [2, 1]], "gram": [[1, 0.125]], "psnr": [[2, 20]]}
    assert (tmp_path / "losses.png").read_bytes()[1:4] == b"PNG"
