"""A model's card has the fields that the hub reads, and gives way to what a person wrote."""

from pathlib import Path

import pytest

from mirage_min.networks.card import UNWRITTEN, fields_of_card, write_card

ROOT = Path(__file__).resolve().parents[1]


def fields(folder: Path) -> dict:
    """As huggingface_hub reads them, which checks the front matter."""
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface-hub: pip install huggingface-hub")
    return hub.ModelCard.load(folder / "README.md").data.to_dict()


def test_the_hub_reads_the_card_of_a_training(tmp_path):
    write_card(tmp_path, "Mirage", "THUDM/CogVideoX1.5-5B@main", {"steps": "12", "recipe": {"lr": 1e-4}})
    assert fields(tmp_path) == {"license": "other", "library_name": "mirage_min", "pipeline_tag": "video-to-video",
                                "base_model": "THUDM/CogVideoX1.5-5B",
                                "tags": ["video-harmonization", "one-step-diffusion"]}
    text = (tmp_path / "README.md").read_text()
    assert "| steps | 12 |" in text and '| recipe | {"lr": 0.0001} |' in text
    assert f"python infer.py in.mp4 out.mp4 --model {tmp_path.name}" in text


def test_a_folder_whose_name_is_no_text_has_a_card_too(tmp_path):
    (tmp_path / "run\udcff").mkdir()
    write_card(tmp_path / "run\udcff", "Mirage")
    assert "--model run?\n" in (tmp_path / "run\udcff" / "README.md").read_text(encoding="utf-8")


def test_a_base_on_the_disk_is_no_model_of_the_hub(tmp_path):
    (tmp_path / "runs" / "base").mkdir(parents=True)
    write_card(tmp_path, "R3D2", "runs/base")
    assert "base_model" not in fields(tmp_path) and fields(tmp_path)["pipeline_tag"] == "image-to-image"


def test_what_does_not_harmonise_is_not_tagged_as_if_it_did(tmp_path):
    wanted = {"World": ["world-model"], "Restorer": ["video-restoration", "one-step-diffusion"]}
    for system, tags in wanted.items():
        (tmp_path / system).mkdir()
        write_card(tmp_path / system, system)
        assert fields(tmp_path / system)["tags"] == tags


def test_what_a_person_wrote_stays_and_an_unwritten_card_is_brought_up_to_date(tmp_path):
    write_card(tmp_path, "Mirage", about={"steps": "1"})
    write_card(tmp_path, "Mirage", about={"steps": "2"})
    text = (tmp_path / "README.md").read_text()
    assert "| steps | 2 |" in text and "| steps | 1 |" not in text
    (tmp_path / "README.md").write_text(text.replace(UNWRITTEN, "It works."))
    write_card(tmp_path, "Mirage", about={"steps": "3"})
    text = (tmp_path / "README.md").read_text()
    assert "It works." in text and "| steps | 2 |" in text


@pytest.mark.parametrize("text, wanted", [
    ("---\nlicense: mit\nbfloat16: .2 of 255\ntags:\n- a\n---\n# A\nnot: one\n", {"license", "bfloat16", "tags"}),
    ("# A\n---\nbfloat16: x\n---\n", set()), ("", set()), (None, set())])
def test_only_the_front_matter_has_fields(tmp_path, text, wanted):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert fields_of_card(tmp_path) == wanted


def test_a_system_without_a_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match="wanted one of the systems .*, got 'Vae'"):
        write_card(tmp_path, "Vae")


def test_the_shipped_card_has_the_fields_too():
    found = fields(ROOT / "weights")
    assert found["license"] == "apache-2.0" and found["pipeline_tag"] == "video-to-video", found
