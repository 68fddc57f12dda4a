"""Loading and saving: strict, safetensors only, once in memory, and one clear line for whatever is wrong.

The model here is the small AutoencoderKL; each network's own test file checks that its published counterpart loads.
"""

import errno
import gc
import http.server
import json
import os
import shutil
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mirage_min.networks import weights
from mirage_min.networks.vae_2d import AutoencoderKL, AutoencoderKLConfig
from tests.torchvision_stub import stub

FILE = "diffusion_pytorch_model.safetensors"
CONFIG = AutoencoderKLConfig(block_out_channels=(8, 16), norm_num_groups=4)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return AutoencoderKL(CONFIG)


@pytest.fixture
def folder(model, tmp_path):
    """A saved model, to be loaded or to be spoilt."""
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def shard(folder: Path, n: int = 3) -> list[Path]:
    """Split the one file of a folder into n shards and an index, as the hub has large models."""
    state = load_file(folder / FILE)
    (folder / FILE).unlink()
    keys, where = sorted(state), {}
    for i in range(n):
        name = f"diffusion_pytorch_model-{i + 1:05}-of-{n:05}.safetensors"
        save_file({key: state[key] for key in keys[i::n]}, folder / name)
        where |= dict.fromkeys(keys[i::n], name)
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sorted(folder.glob("*-of-*"))


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def assert_same_weights(given: nn.Module, wanted: nn.Module) -> None:
    a, b = given.state_dict(), wanted.state_dict()
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, the first {different[:5]}"


def refusal(*args, cls=AutoencoderKL, **kwargs) -> str:
    """The message of the ValueError that loading ends in; of one line."""
    with pytest.raises(ValueError) as caught:
        cls.from_pretrained(*args, **kwargs)
    assert "\n" not in str(caught.value), f"wanted one line, got {caught.value}"
    return str(caught.value)


# ---- what comes back ------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_in_eval_mode_with_trainable_parameters(model, folder):
    again = AutoencoderKL.from_pretrained(folder)
    assert_same_weights(again, model)
    assert again.config == model.config
    assert not any(module.training for module in again.modules())
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())


def test_shards_load_as_the_one_file_does(model, folder):
    shard(folder)
    assert_same_weights(AutoencoderKL.from_pretrained(str(folder)), model)


def test_a_subfolder_and_a_lone_file_of_another_name_load(model, folder):
    (folder / FILE).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert_same_weights(AutoencoderKL.from_pretrained(folder.parent, subfolder="vae"), model)


def test_the_usual_name_wins_over_copies_beside_it(model, folder):
    save_file({"other": torch.zeros(1)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert_same_weights(AutoencoderKL.from_pretrained(folder), model)
    (folder / FILE).rename(folder / "another.safetensors")
    message = refusal(folder)
    assert "another.safetensors, diffusion_pytorch_model.fp16.safetensors" in message and "neither an index" in message


def test_what_is_stored_as_float16_computes_in_float32_unless_float16_is_asked_for(model, folder):
    stored = {key: tensor.half() for key, tensor in model.state_dict().items()}
    save_file(stored, folder / FILE)
    loaded = AutoencoderKL.from_pretrained(folder).state_dict()
    assert all(loaded[key].dtype == torch.float32 and torch.equal(loaded[key], stored[key].float()) for key in stored)
    assert AutoencoderKL.from_pretrained(folder, dtype=torch.float16).quant_conv.bias.dtype == torch.float16


def test_dtype_casts_every_float_and_otherwise_the_file_decides(model, folder):
    low = AutoencoderKL.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    model.double().save_pretrained(folder)
    assert {p.dtype for p in AutoencoderKL.from_pretrained(folder).parameters()} == {torch.float64}


def test_device_places_every_tensor(folder):
    again = AutoencoderKL.from_pretrained(folder, device="meta")  # any device other than the CPU; every machine has it
    assert {p.device.type for p in again.parameters()} == {"meta"}


def test_the_weights_are_in_memory_once_and_the_file_stays_as_it_was(folder, monkeypatch):
    """The parameters are the memory that safetensors mapped: no copy was made on the way."""
    handed_out = []

    class Spy:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            handed_out.append(self.file.get_tensor(name))
            return handed_out[-1]

    real = weights.safe_open
    monkeypatch.setattr(weights, "safe_open", Spy)
    before = (folder / FILE).read_bytes()
    again = AutoencoderKL.from_pretrained(folder)
    assert {p.data_ptr() for p in again.parameters()} == {t.data_ptr() for t in handed_out}
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(FILE)] \
        if os.path.exists("/proc/self/maps") else ["(no /proc here)"]
    assert mapped, "the file is not memory-mapped"
    with torch.no_grad():
        for p in again.parameters():
            p.add_(1)
    assert (folder / FILE).read_bytes() == before, "training the loaded model changed the file"


def test_the_parameters_outlive_the_file(model, folder):
    again = AutoencoderKL.from_pretrained(folder)
    shutil.rmtree(folder)
    gc.collect()
    assert_same_weights(again, model)


@dataclass
class TableConfig:
    n: int = 4


class Table(nn.Module):
    """A model with a table that is not in the file; `device` says where it is made."""

    CLASS_NAME, Config, FIXED, IGNORED = "Table", TableConfig, {}, set()
    from_pretrained, save_pretrained = classmethod(weights.from_pretrained), weights.save_pretrained
    device = "cpu"

    def __init__(self, config: TableConfig):
        super().__init__()
        self.config, self.layer = config, nn.Linear(config.n, config.n)
        self.register_buffer("steps", torch.arange(config.n, device=self.device), persistent=False)
        self.register_buffer("mean", torch.full((config.n,), 0.5))
        self.register_buffer("count", torch.tensor(301))


def test_a_table_that_no_file_holds_is_right_or_named_never_garbage(tmp_path, monkeypatch):
    model = Table(TableConfig())
    model.mean += 1
    model.save_pretrained(tmp_path)
    again = Table.from_pretrained(tmp_path)
    assert again.steps.tolist() == [0, 1, 2, 3] and again.mean.tolist() == [1.5] * 4
    assert Table.from_pretrained(tmp_path, dtype=torch.bfloat16).count.item() == 301, "rounded: bfloat16 has no 301"
    assert Table.from_pretrained(tmp_path, device="meta").steps.is_meta, "the table is not where the parameters are"
    monkeypatch.setattr(Table, "device", None)
    assert "steps" in refusal(tmp_path, cls=Table)


# ---- config.json ----------------------------------------------------------------------------------------------------


def test_config_fields_are_known_fixed_ignored_or_refused(folder):
    fields = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", "_name_or_path": "x", "sample_size": 7,
              "act_fn": "silu", "block_out_channels": [8, 16], "norm_num_groups": 4}
    read = weights.read_config(AutoencoderKL, fields, "here")
    assert read == CONFIG and isinstance(read.block_out_channels, tuple)
    edit_config(folder, act_fn="mish")
    message = refusal(folder)
    assert all(part in message for part in ("config.json", "act_fn", "'silu'", "'mish'")), message
    edit_config(folder, act_fn="silu", timbre=[1])
    assert "timbre" in refusal(folder) and "config.json" in refusal(folder)


def test_another_class_is_refused_with_both_names(folder):
    edit_config(folder, _class_name="AutoencoderTiny")
    message = refusal(folder)
    assert "'AutoencoderKL'" in message and "'AutoencoderTiny'" in message


def test_fixed_lists_compare_by_element_and_fixed_tuples_as_a_whole():
    class Fixed(Table):
        FIXED = {"types": "A", "sizes": (1, 2), "none": None}

    def read(**fields):
        return weights.read_config(Fixed, {"_class_name": "Table"} | fields, "here")
    read(types=["A", "A", "A"], sizes=[1, 2], none=None)
    for wrong in ({"types": ["A", "B"]}, {"types": "B"}, {"sizes": [1]}, {"sizes": [1, 1]}, {"none": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            read(**wrong)


def test_another_layout_is_read_through_the_class_own_translations(tmp_path):
    class Elsewhere(Table):
        PUBLISHED = "org/table"

        @staticmethod
        def translate_key(name):
            return name.replace("linear.", "layer.")

        @staticmethod
        def translate_config(config):
            return {"_class_name": "Table", "n": config["width"]} if config["_class_name"] == "Old" else config

    state = Table(TableConfig(3)).state_dict()
    save_file({key.replace("layer.", "linear."): tensor for key, tensor in state.items()}, tmp_path / FILE)
    (tmp_path / "config.json").write_text('{"_class_name": "Old", "width": 3}')
    assert torch.equal(Elsewhere.from_pretrained(tmp_path).layer.weight, state["layer.weight"])
    save_file(state | {"linear.bias": torch.zeros(3)}, tmp_path / FILE)
    assert "second tensor for layer.bias" in refusal(tmp_path, cls=Elsewhere)
    (tmp_path / FILE).rename(tmp_path / "table.pth")
    assert refusal(tmp_path, cls=Elsewhere).endswith("as safetensors: org/table")


WRONG_VALUES = [
    ({"layers_per_block": "2"}, "layers_per_block: wanted an integer from 1 to 1000, got '2'"),
    ({"layers_per_block": 10**9}, "layers_per_block: wanted an integer from 1 to 1000, got 1000000000"),
    ({"layers_per_block": 10**30}, "layers_per_block: wanted an integer from 1 to 1000"),
    ({"norm_num_groups": 0}, "norm_num_groups: wanted an integer from 1 to 1048576, got 0"),
    ({"norm_num_groups": 3}, "describes no AutoencoderKL"), ({"norm_num_groups": True}, "wanted an integer"),
    ({"latent_channels": -4}, "latent_channels: wanted an integer"), ({"latent_channels": None}, "wanted an integer"),
    ({"block_out_channels": {}}, "block_out_channels: wanted a list"), ({"block_out_channels": []}, "wanted a list"),
    ({"block_out_channels": [8, [16]]}, r"block_out_channels[1]: wanted an integer"),
    ({"scaling_factor": "x"}, "scaling_factor: wanted one finite number"), ({"use_quant_conv": 1}, "true or false"),
]


@pytest.mark.parametrize("changes, words", WRONG_VALUES, ids=lambda value: str(value)[:40])
def test_a_field_of_the_wrong_type_sign_or_size_is_named(folder, changes, words):
    edit_config(folder, **changes)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'config.json'}: ") and words in message, message


def test_json_may_begin_with_a_byte_order_mark(model, folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert_same_weights(AutoencoderKL.from_pretrained(folder), model)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, '{"a": 1' + "0" * 5000 + "}", "\xff"])
def test_json_that_cannot_be_read_is_one_line(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    message = refusal(folder)
    assert message.startswith(f"{folder / 'config.json'}: truncated or corrupt"), message


# ---- strictness and spoilt files ------------------------------------------------------------------------------------


def test_a_mismatch_names_file_config_counts_and_the_first_five_of_each_kind(model, folder):
    state = dict(model.state_dict())
    for key in sorted(state)[:7]:
        del state[key]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(2)}
    state["quant_conv.bias"] = torch.zeros(9)
    save_file(state, folder / FILE)
    with pytest.raises(ValueError) as caught:
        AutoencoderKL.from_pretrained(folder)
    message, gone = str(caught.value), sorted(model.state_dict())[:7]
    total = len(model.state_dict())
    for part in (f"{folder / FILE} ({total - 5} tensors)", f"{folder / 'config.json'} describes ({total} tensors)",
                 "7 missing: ", "2 unexpected: extra.0, extra.1; ",
                 "1 wrongly shaped: quant_conv.bias (wanted [8], got [9])"):
        assert part in message, f"{part!r} is not in {message}"
    listed = message.split("7 missing: ")[1].split(";")[0]
    assert listed.endswith(", ...") and sum(key in listed.split(", ") for key in gone) == 5


@pytest.mark.parametrize("low, wanted", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                                         (torch.float64, torch.float64)])
def test_floats_of_several_types_become_the_one_that_holds_them_all(model, folder, low, wanted):
    save_file(model.state_dict() | {"quant_conv.bias": torch.ones(8).to(low)}, folder / FILE)
    assert {p.dtype for p in AutoencoderKL.from_pretrained(folder).parameters()} == {wanted}


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn])
def test_weights_of_another_kind_are_refused_by_name_and_8_bits_are_cast_where_that_is_asked_for(model, folder, kind):
    state = model.state_dict() | {"quant_conv.bias": torch.ones(8).to(kind)}
    save_file(state, folder / FILE)
    said = f"{folder / FILE}: quant_conv.bias: wanted floating-point numbers of 16 bits or more, got {kind}"
    assert refusal(folder) == said
    if kind == torch.float8_e4m3fn:
        loaded = AutoencoderKL.from_pretrained(folder, dtype=torch.bfloat16).quant_conv.bias
        assert loaded.dtype == torch.bfloat16 and (loaded == 1).all()
    else:
        with pytest.raises(ValueError, match="quant_conv.bias: wanted"):
            AutoencoderKL.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "ckpt"])
def test_pickles_are_refused_with_the_reason_and_the_way_to_convert(folder, suffix):
    (folder / FILE).rename(folder / f"diffusion_pytorch_model.{suffix}")
    for message in (refusal(folder), refusal(folder / f"diffusion_pytorch_model.{suffix}")):
        for part in (f"diffusion_pytorch_model.{suffix}: not loaded", "can run any code", "python convert.py FILE"):
            assert part in message, f"{part!r} is not in {message}"


@pytest.mark.parametrize("spoil", [lambda b: b[:-100], lambda b: b[:50], lambda b: b"", lambda b: b"\xff" * 8 + b[8:]],
                         ids=["truncated", "cut in its header", "empty", "corrupt"])
def test_a_spoilt_file_or_shard_is_named(folder, spoil):
    file = shard(folder)[1]
    file.write_bytes(spoil(file.read_bytes()))
    message = refusal(folder)
    assert message.startswith(f"{file}: truncated or corrupt"), message
    with pytest.raises(ValueError, match="truncated or corrupt"):
        weights.load_tensors(file)


def test_a_git_lfs_pointer_is_recognised(folder):
    (folder / FILE).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 335\n")
    assert "git lfs pull" in refusal(folder)


def test_a_missing_shard_is_named_with_the_index(folder):
    gone = shard(folder)[2]
    gone.unlink()
    message = refusal(folder)
    assert gone.name in message and f"{FILE}.index.json: 1 of 3 shards" in message, message


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/hosts", "sub/stolen.safetensors", "..", ""])
def test_shards_lie_in_the_folder_of_their_index(model, folder, name):
    """A downloaded folder does not decide what else is read."""
    (folder / "sub").mkdir()
    for place in (folder.parent, folder / "sub"):
        shutil.copy(folder / FILE, place / "stolen.safetensors")
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(model.state_dict(), name)}))
    message = refusal(folder)
    wanted = "1 of 1 shards are not there" if name in ("", "..") else f"wanted files of this folder, got {name!r}"
    assert wanted in message


@pytest.mark.parametrize("names, words", [
    ([], "weight_map: wanted an object, got []"), ({"x": ["a"]}, "weight_map.x: wanted text, got ['a']"),
    ({"x": None}, "weight_map.x: wanted text"), ("a", "weight_map: wanted an object")])
def test_an_index_of_other_values_than_names_is_refused(folder, names, words):
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": names}))
    assert f"{FILE}.index.json: {words}" in refusal(folder)


def test_the_index_of_the_usual_name_wins_over_that_of_a_variant(model, folder):
    """As a download of all brings them: half-precision shards sort before the full ones."""
    low = {key: tensor.half() for key, tensor in model.state_dict().items()}
    shard(folder)
    save_file(low, folder / "diffusion_pytorch_model.fp16-00001-of-00001.safetensors")
    (folder / "diffusion_pytorch_model.fp16.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(low, "diffusion_pytorch_model.fp16-00001-of-00001.safetensors")}))
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    assert_same_weights(AutoencoderKL.from_pretrained(folder), model)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes in the file system")
def test_a_pipe_is_refused_and_not_waited_for(folder):
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)
    assert "is no file" in refusal(folder)
    with pytest.raises(ValueError, match="is no file"):
        weights.load_tensors(folder / FILE)


def test_an_empty_index_a_broken_config_and_missing_files_are_named(folder):
    (folder / f"{FILE}.index.json").write_text("{}")
    assert "index.json: names no shards" in refusal(folder)
    (folder / f"{FILE}.index.json").unlink()
    for text, reason in (("{", "truncated or corrupt"), ("[]", "wanted a JSON object, got a list")):
        (folder / "config.json").write_text(text)
        assert f"config.json: {reason}" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)
    assert "no config.json" in refusal(folder.parent, subfolder="transformer")
    assert "name its folder" in refusal(folder / FILE)
    assert "no such folder" in refusal(folder / "deeper" / "still")
    edit = {"_class_name": "AutoencoderKL"}
    (folder / "config.json").write_text(json.dumps(edit))
    (folder / FILE).unlink()
    assert "no *.safetensors" in refusal(folder)
    with pytest.raises(ValueError, match="no such file"):
        weights.load_tensors(folder / FILE)


# ---- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub with an empty cache of its own, offline."""
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface-hub: pip install huggingface-hub")
    pytest.importorskip("huggingface_hub.constants")  # loaded by nothing else when this file runs alone
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


def test_a_hub_id_loads_from_the_cache_without_a_network(model, folder, hub, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--org--name"
    shutil.copytree(folder, repository / "snapshots" / commit / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert_same_weights(AutoencoderKL.from_pretrained("org/name", subfolder="vae"), model)
    (repository / "snapshots" / commit / "scheduler").mkdir()
    (repository / "snapshots" / commit / "scheduler" / "scheduler_config.json").write_text("{}")
    found = weights.locate(AutoencoderKL, "org/name", "scheduler", "scheduler_config.json")
    assert weights.read_json(found / "scheduler_config.json") == {}


def test_a_revision_and_a_cache_may_be_named_by_argument_or_in_the_id(model, folder, hub, tmp_path):
    commits = {"main": "0" * 40, "v2": "2" * 40}
    repository = tmp_path / "elsewhere" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs" / name).write_text(commit)
    tensors, about = weights.load_tensors(folder / FILE)
    weights.save_tensors(repository / "snapshots" / commits["v2"] / FILE,
                         {key: t + 1 for key, t in tensors.items()}, about)
    cache = tmp_path / "elsewhere"
    assert_same_weights(AutoencoderKL.from_pretrained("org/name", cache_dir=cache), model)
    for path, revision in (("org/name", "v2"), ("org/name@v2", None), ("org/name@" + "2" * 40, None)):
        loaded = AutoencoderKL.from_pretrained(path, revision=revision, cache_dir=cache, token="hf_none")
        found = loaded.state_dict()
        assert all(torch.equal(found[key], t + 1) for key, t in tensors.items())
    with pytest.raises(ValueError, match="org/name@v2: names a revision, and another is given: main"):
        AutoencoderKL.from_pretrained("org/name@v2", revision="main", cache_dir=cache)
    with pytest.raises(ValueError, match="org/name@v3: .*not whole in the hub's cache"):
        AutoencoderKL.from_pretrained("org/name@v3", cache_dir=cache)


def test_an_id_that_is_not_cached_says_so_offline(hub):
    message = refusal("org/name")
    assert message.startswith("org/name: ") and "offline" in message and "cache" in message, message


@pytest.mark.parametrize(("status", "headers", "words"), [
    (404, {"X-Error-Code": "RepoNotFound"}, "neither a folder here nor a model on the hub"),
    (403, {"X-Error-Code": "GatedRepo"}, "gated"), (500, {}, "could not be asked")])
def test_what_the_hub_refuses_is_one_line(hub, monkeypatch, status, headers, words):
    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # polls each 10 ms
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        message = refusal("org/name")
    finally:
        server.shutdown()
        server.server_close()
    assert message.startswith("org/name: ") and words in message, message


def test_only_the_weights_of_the_asked_folder_are_fetched(hub, monkeypatch):
    files = ["README.md", "config.json", "Wan2.1_VAE.pth", FILE, "diffusion_pytorch_model-00001-of-00002.safetensors",
             f"{FILE}.index.json", "sd_turbo.safetensors", "vae/config.json", f"vae/{FILE}", "vae/preview.png",
             "vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin", "vae_1/config.json",
             "vae/diffusion_pytorch_model-00001-of-00002.fp16.safetensors", f"transformer/{FILE}",
             "transformer/config.json", "scheduler/scheduler_config.json"]
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, allow_patterns, **others: asked.update(
        allow_patterns=allow_patterns) or "/nowhere")

    def fetched(*args):
        weights.download("org/name", *args)
        return list(hub.utils.filter_repo_objects(files, **asked))
    assert fetched("vae") == ["vae/config.json", f"vae/{FILE}"]
    assert fetched("scheduler", "scheduler_config.json") == ["scheduler/scheduler_config.json"]
    assert fetched(None) == ["config.json", FILE, "diffusion_pytorch_model-00001-of-00002.safetensors",
                             f"{FILE}.index.json"]


# ---- saving ---------------------------------------------------------------------------------------------------------


def test_equal_contents_make_equal_files_in_any_order(tmp_path):
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.zeros(3, dtype=torch.uint8)}
    about = {f"key {n}": f"é {n}" for n in range(12)}
    for name, order in (("one", 1), ("two", -1)):
        weights.save_tensors(tmp_path / name, dict(list(tensors.items())[::order]), dict(list(about.items())[::order]))
    data = (tmp_path / "one").read_bytes()
    assert data == (tmp_path / "two").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0 and list(json.loads(data[8 : 8 + length])["__metadata__"]) == sorted(about)
    found, said = weights.load_tensors(tmp_path / "one")
    assert said == about and all(torch.equal(found[key], t) for key, t in tensors.items())


def test_diffusers_loads_what_we_save(model, folder):
    stub()
    diffusers = pytest.importorskip("diffusers")
    theirs, info = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert_same_weights(theirs, model)
    with torch.no_grad():
        x = torch.rand(1, 3, 16, 16)
        difference = (theirs.encode(x).latent_dist.mean * theirs.config.scaling_factor - model.encode(x)).abs().max()
    assert difference < 1e-5, f"diffusers' encode differs by {difference:.1e}"


def test_saving_over_the_mapped_file_keeps_the_model_and_replaces_the_file(model, folder):
    again = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        for p in again.parameters():
            p.add_(1)
    again.save_pretrained(folder)
    assert_same_weights(AutoencoderKL.from_pretrained(folder), again)
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", FILE]


def test_what_is_added_to_a_model_stays_out_of_its_checkpoint(model, tmp_path):
    model.fusion = nn.Linear(2, 2)
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    del model.fusion
    assert_same_weights(AutoencoderKL.from_pretrained(tmp_path), model)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(folder, monkeypatch):
    before = (folder / FILE).read_bytes()

    def full(number):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        AutoencoderKL(CONFIG).save_pretrained(folder)
    assert (folder / FILE).read_bytes() == before
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", FILE]


@pytest.mark.parametrize("name", ["x" * 243 + ".safetensors", "\u00e9" * 121 + ".safetensors"])
def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path, name):
    weights.save_tensors(tmp_path / name, {"a": torch.zeros(1)})
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_bytes_are_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda number: events.append(("fsync", os.fstat(number).st_ino)))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(("name", os.stat(a).st_ino)) or replace(a, b))
    weights.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    number = (tmp_path / "x.safetensors").stat().st_ino
    assert events == [("fsync", number), ("name", number)]


def test_a_full_disk_names_the_file_that_it_leaves_as_it_was(tmp_path, monkeypatch):
    weights.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    before = (tmp_path / "x.safetensors").read_bytes()

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*x.safetensors'"):
        weights.save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)})
    assert (tmp_path / "x.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_saving_beside_other_weights_is_refused(model, folder):
    shard(folder)
    with pytest.raises(ValueError, match="holds other weights"):
        model.save_pretrained(folder)


def test_tensors_and_their_metadata_come_back(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16),
               "empty": torch.zeros(0, 3)}
    weights.save_tensors(tmp_path / "x.safetensors", tensors, {"rank": "16"})
    again, metadata = weights.load_tensors(tmp_path / "x.safetensors")
    assert metadata == {"rank": "16"} and again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) and again[key].dtype == tensors[key].dtype for key in tensors)
    weights.save_tensors(tmp_path / "y.safetensors", tensors)
    assert weights.load_tensors(tmp_path / "y.safetensors")[1] == {}


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_what_is_saved_is_as_open_to_others_as_the_umask_says(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        weights.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    found = stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode)
    assert found == mode, f"wanted {mode:o}, got {found:o}"
