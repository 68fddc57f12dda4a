"""examples/ work as commands, next to a torchvision that cannot be imported too."""

from importlib.util import find_spec

import pytest

from tests import scripts


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs what diffusers does: pip install transformers")
def test_chopgrad_on_diffusers_vaes_runs_as_a_command():
    done = scripts.run("-m", "examples.chopgrad_diffusers")
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert [line.split(":")[0] for line in said] == ["AutoencoderKLCogVideoX", "AutoencoderKLWan"], done.stdout
