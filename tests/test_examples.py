"""examples/ work as commands, next to a torchvision that cannot be imported too."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_chopgrad_on_diffusers_vaes_runs_as_a_command():
    pytest.importorskip("transformers", reason="needs transformers, as diffusers does: pip install transformers")
    command = [sys.executable, "-m", "examples.chopgrad_diffusers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert [line.split(":")[0] for line in said] == ["AutoencoderKLCogVideoX", "AutoencoderKLWan"], done.stdout
