"""One HTML file of a run: what it shows is what was compared, and it works in a browser."""

import base64
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from mirage_min.data import report
from mirage_min.data.report import Comparison
from tests.media import encode, pictures

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def compare(T: int, most: int = 48, H: int = 32, W: int = 48) -> Comparison:
    """A grey video that rises by .02 a frame, and one that is .1 brighter in red and flickers by ±.05."""
    comparison = Comparison("in <put>", "result", most)
    for t in range(T):
        x = torch.full((3, H, W), -0.5 + 0.02 * t)
        y = x + 0.05 * (-1) ** t
        y[0] += 0.1
        comparison.add(x, y)
    return comparison


def pixels(url: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))))


def test_the_curves_and_the_summary_are_those_of_the_videos():
    c = compare(5)
    grey = [(0.5 + 0.02 * t) * 127.5 for t in range(5)]
    wobble = [0.05 * (-1) ** t * 127.5 for t in range(5)]
    red = [a + b + 0.1 * 127.5 for a, b in zip(grey, wobble)]
    assert np.allclose(c.tones[0], np.transpose([grey] * 3), atol=1e-3)
    assert np.allclose([frame[0] for frame in c.tones[1]], red, atol=1e-3)
    assert np.allclose(c.flicker[0][1:], [2.55] * 4, atol=1e-3)
    assert np.allclose(c.flicker[1][1:], [10.2, 15.3, 10.2, 15.3], atol=1e-3)  # .02 ∓ .1, of 2
    # |y − x|: red .1 ± .05, the others .05, in turn: (.15 + .1) / 3 and (.05 + .1) / 3, three frames and two
    moved = 127.5 * (3 * 0.25 + 2 * 0.15) / 15
    assert abs(c.moved / 5 - moved) < 1e-3
    assert f"changes by {moved:.1f} of 255" in c.summary() and "+14.0, +1.3, +1.3" in c.summary()
    assert "flicker is 5.00 of in <put>'s" in c.summary()


def test_the_pictures_are_the_frames_and_the_change_amplified_about_grey():
    x, y, change = (pixels(url) for url in compare(1).shown[0])
    assert abs(x.mean() - 63.75) < 1 and abs(y.mean(axis=(0, 1)) - [82.9, 70.1, 70.1]).max() < 1.5
    wanted = 127.5 + 4 * np.array([0.15, 0.05, 0.05]) * 127.5  # GAIN times the difference
    assert abs(change.mean(axis=(0, 1)) - wanted).max() < 2, (change.mean(axis=(0, 1)), wanted)


@pytest.mark.parametrize("T, most, shown, every", [(1, 4, 1, 1), (4, 4, 4, 1), (5, 4, 3, 2), (100, 4, 4, 32)])
def test_of_a_long_video_evenly_many_frames_are_shown_and_all_are_counted(T, most, shown, every):
    c = compare(T, most)
    assert (len(c.shown), c.every, c.count, len(c.flicker[0])) == (shown, every, T, T)
    levels = [pixels(url[0]).mean() for url in c.shown]
    assert np.allclose(levels, [min((0.5 + 0.02 * k * every) * 127.5, 255) for k in range(shown)], atol=1)


def test_frames_that_do_not_fit_are_refused():
    c = compare(1)
    with pytest.raises(ValueError, match=r"one size, got \[3, 32, 48\] and \[3, 16, 48\]"):
        c.add(torch.zeros(3, 32, 48), torch.zeros(3, 16, 48))
    with pytest.raises(ValueError, match="not finite"):
        c.add(torch.zeros(3, 32, 48), torch.full((3, 32, 48), torch.nan))
    with pytest.raises(ValueError, match="needs a frame"):
        Comparison("a", "b").summary()


def test_the_page_asks_for_nothing_from_outside_and_holds_each_picture_once(tmp_path):
    one, two = compare(3), compare(3)
    report.write(tmp_path / "a.html", "a < b", {"first": one, "second": two}, "| table |")
    text = (tmp_path / "a.html").read_text()
    assert "<h1>a &lt; b</h1>" in text and "in &lt;put&gt;" in text and "in <put>" not in text
    assert "<pre>| table |</pre>" in text
    assert not re.search(r"https?:|@import|<link|<script [^>]*src", text)
    # Three frames of three pictures each, and two of the changes are equal.
    assert text.count("data:image/jpeg") == len({url for urls in one.shown for url in urls}) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_a_name_that_is_no_text_is_shown_with_a_question_mark(tmp_path):
    report.write(tmp_path / "a.html", "a\udcff.mp4", {"a\udcff": compare(1)})
    assert "<h1>a?.mp4</h1>" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_two_files_are_compared_and_of_two_lengths_the_shorter_is_named(tmp_path):
    encode(tmp_path / "a.mp4", pictures(3)), encode(tmp_path / "b.mp4", pictures(2))
    c = report.compare(tmp_path / "a.mp4", tmp_path / "a.mp4")
    assert c.count == 3 and "a pixel changes by 0.0 of 255" in c.summary()
    with pytest.raises(ValueError, match=r"b\.mp4: ends after 2 frames, .*a\.mp4 does not"):
        report.compare(tmp_path / "a.mp4", tmp_path / "b.mp4")


@pytest.mark.skipif(not BROWSER, reason="needs chromium (apt-get install chromium)")
def test_in_a_browser_the_sliders_move_what_is_shown(tmp_path):
    report.write(tmp_path / "a.html", "a", {"one": compare(8), "two": compare(2)})
    told = """<script>
    const [one, two] = document.querySelectorAll("section"), find = name => one.querySelector(name);
    const first = find(".left").src;
    find(".time").value = 7; find(".time").oninput();
    find(".split").value = 25; find(".split").oninput();
    const last = images[one.dataset.left.split(" ")[7]], now = find(".left").src;
    document.body.dataset.found = [now !== first, now === last, find(".right").style.clipPath,
        find("output").textContent, find(".now").getAttribute("x1"), two.querySelector("output").textContent].join("|");
    </script>"""
    text = (tmp_path / "a.html").read_text()
    (tmp_path / "a.html").write_text(text.replace("</html>", told + "</html>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--dump-dom", f"file://{tmp_path}/a.html"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found, f"its script did not come to its end: {dom[-500:]}"
    end = report.WIDTH - 10
    assert found[1].replace("px", "") == f"true|true|inset(0 0 0 25%)|7|{end}|0", found[1]
