"""Several processes train exactly as one does: two on gloo, the scripts themselves, in float64, clips of three groups.

The gradients are read from AdamW's first moment in the checkpoint (0.1 of them after one step from zero).
"""

import contextlib
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mirage_min.data.pairs import Pairs
from mirage_min.networks import weights
from mirage_min.training import memory, watch
from mirage_min.training.latents import DrawnLatents
from tests import scripts, small
from tests.test_train import save_inputs, stage_a, stage_h
from tests.test_train_r3d2 import train as train_r3d2
from tests.test_train_restore import train as train_restore

TOLERANCE = 1e-9  # relative to the largest gradient of a tensor; float64's own is 1e-16


@contextlib.contextmanager
def float64():
    """Run the scripts in float64, from adapters that are not zero, so that every gradient is there at once."""
    def plan(models, *_, **settings) -> str:
        models.double()
        draws = torch.Generator().manual_seed(7)
        for p in models.parameters():
            if p.requires_grad:
                p.data = 0.05 * torch.randn(p.shape, generator=draws, dtype=torch.float64)
        return ""

    def batch(pairs, *given, batch=Pairs.batch):
        x_ni, x_gt, names = batch(pairs, *given)
        return x_ni.double(), x_gt.double(), names

    def latent_batch(latents, *given, batch=DrawnLatents.batch):
        return [z.double() for z in batch(latents, *given)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "plan", plan)
        patch.setattr(Pairs, "batch", batch)
        patch.setattr(DrawnLatents, "batch", latent_batch)
        patch.setattr(watch.Log, "report", lambda *args: None)
        yield


def train(case: str, work: Path, out: Path) -> None:
    """The cases; each a step on a global batch of two clips, of three groups."""
    common = dict(steps=1, batch=2)
    if case == "stage A":
        stage_a(work / "wan", out, **common)
    elif case == "stage H":
        stage_h(work / "wan", out, mirage=work / "trained", gram_from=0, **common)
    elif case == "stage H, sharded and recomputed":
        stage_h(work / "wan", out, mirage=work / "trained", gram_from=0, shard=dist.is_initialized(),
                checkpoint_dit=True, checkpoint_decoder=True, **common)
    elif case == "R3D2":
        train_r3d2(work / "wan", out, base="r3d2", height=48, width=64, frames=2, checkpoint_unet=True, **common)
    elif case == "restorer, all of it sharded":
        restorer(work, out, checkpoint_dit=True, checkpoint_decoder=True, **common)
    elif case == "two steps":
        stage_h(work / "wan", out, mirage=work / "trained", gram_from=0, steps=2, batch=2)
    elif case == "two steps of a restorer":
        restorer(work, out, steps=2, batch=2, latent_until=1)


def restorer(work: Path, out: Path, **settings) -> None:
    settings = dict(frames=9, height=32, width=32, tiles=1, latent_until=0, shard=dist.is_initialized()) | settings
    train_restore(work / "wan", out, "inpaint", prompt=work / "trained" / "prompt.safetensors", **settings)


CASES = ("stage A", "stage H", "stage H, sharded and recomputed", "R3D2", "restorer, all of it sharded")
CHANGED = {"one then two": "two steps", "one then two of a restorer": "two steps of a restorer"}  # begun by one process


def worker(rank: int, work: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{work}/rendezvous", rank=rank, world_size=2)  # no port, no clash
    with float64():
        for case in CASES:
            train(case, work, work / "two" / case)
            dist.barrier()
        for changed, case in CHANGED.items():
            train(case, work, work / changed)  # one process began it: see `runs`
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """work/one and work/two: every case by one process and by two; and runs that changed from one to two."""
    work = tmp_path_factory.mktemp("distributed")
    (work / "wan").mkdir()
    save_inputs(work / "wan", small.save_wan)
    # three stages: a fourth would see one latent, whose attention has no gradient
    three = dict(block_out_channels=(8, 16, 16), attention_head_dim=(1, 2, 2),
                 up_block_types=("CrossAttnUpBlock2D",) * 3, down_block_types=("CrossAttnDownBlock2D",) * 3)
    small.r3d2(**three).save_pretrained(work / "wan" / "r3d2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "plan", lambda *args, **settings: "")
        patch.setattr(watch.Log, "report", lambda *args: None)
        stage_a(work / "wan", work / "trained", steps=1)
    text = torch.randn(1, 512, 8, generator=torch.Generator().manual_seed(3))  # of equal tokens, keys have no gradient
    weights.save_tensors(work / "trained" / "prompt.safetensors", {"text": text})
    with float64():
        for case in (*CASES, *CHANGED.values()):
            train(case, work, work / "one" / case)
        stage_h(work / "wan", work / "one then two", mirage=work / "trained", gram_from=0, batch=2, steps=1)
        restorer(work, work / "one then two of a restorer", batch=2, steps=1, latent_until=1)
    mp.start_processes(worker, (work,), nprocs=2, start_method=scripts.warm.get_start_method())
    return work


def checkpoint(folder: Path) -> tuple[dict, list[dict]]:
    file = next(folder.glob("run*/checkpoint.safetensors"))
    return weights.load_tensors(file)[0], [json.loads(line) for line in (file.parent / "log.jsonl").open()]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_loss_and_the_gradients_of_one(runs, case):
    (one, log_one), (two, log_two) = (checkpoint(runs / n / case) for n in ("one", "two"))
    for term in log_one[0].keys() - {"step", "seconds"}:
        assert log_two[0][term] == pytest.approx(log_one[0][term], rel=TOLERANCE, abs=0), term
    gradients = [k for k in one if k.startswith("exp_avg/")]
    assert one.keys() == two.keys() and len(gradients) > 10 and one[gradients[0]].dtype == torch.float64
    for key in gradients:
        difference = (one[key] - two[key]).abs().max() / one[key].abs().max()
        assert difference <= TOLERANCE, f"{key}: {difference:.1e} of the largest gradient"


@pytest.mark.parametrize("folder", CHANGED)
def test_a_run_resumes_alike_in_another_number_of_processes(runs, folder):
    (one, _), (changed, _) = checkpoint(runs / "one" / CHANGED[folder]), checkpoint(runs / folder)
    assert one.keys() == changed.keys()
    for key in one:
        difference = (one[key] - changed[key]).abs().max() / one[key].abs().max().clamp(min=1e-30)
        assert difference <= TOLERANCE, f"{key}: {difference:.1e} of the largest"


def test_what_was_sharded_is_written_whole(runs):
    one, two = (weights.load_tensors(folder / "transformer" / weights.WEIGHTS)[0] for folder in (
        runs / "one" / "two steps of a restorer", runs / "one then two of a restorer"))
    assert one.keys() == two.keys() and len(one) > 20
    for key in one:
        difference = (one[key] - two[key]).abs().max() / one[key].abs().max()
        assert difference <= TOLERANCE, f"{key}: {difference:.1e} of the largest"
