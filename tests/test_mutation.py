"""The script that plants mistakes: one at a time, everywhere, and a campaign that was killed continues."""

import ast
import json
from argparse import Namespace

import pytest

from tests import mutation


def test_the_table_of_tests_names_what_there_is():
    gone = [file for file in mutation.TESTS if not (mutation.ROOT / file).exists()]
    unknown = [name for names in mutation.TESTS.values() for name in names.split()
               if not (mutation.ROOT / f"tests/test_{name}.py").exists()]
    assert (gone, unknown) == ([], [])


def test_every_file_that_can_be_wrong_has_tests():
    assert [file for file in mutation.files() if mutation.candidates(file) and not mutation.tests_of(file)] == []


def test_the_tests_of_a_file_come_before_those_of_its_folder():
    for file, tests in (("experiments/vae_tones.py", ("vae_tones",)), ("experiments/streaming.py", ("experiments",)),
                        ("experiments/world_report.py", ("world_study",)), ("mirage_min/data/shots.py", ("streams",)),
                        ("mirage_min/method/chopgrad.py", ("chopgrad",)), ("infer.py", ("infer",))):
        assert mutation.tests_of(file) == tuple(f"tests/test_{name}.py" for name in tests), file


def test_mistakes_are_planted_in_the_package_the_scripts_and_the_experiments():
    planted = {file for file in mutation.files() if mutation.candidates(file)}
    assert {"mirage_min/method/chopgrad.py", "train_vae.py", "infer.py", "experiments/alignment.py"} <= planted


def test_the_tree_that_they_are_planted_in_is_whole_but_for_what_runs_left(tmp_path):
    tree = mutation.copy_tree(tmp_path)
    assert [file for file in mutation.files() if not (tree / file).is_file()] == []
    assert not {".git", "runs", "data"} & {path.name for path in tree.iterdir()}


@pytest.mark.parametrize("file", ["mirage_min/method/one_step.py", "train_harmonize.py"])
def test_a_mistake_is_one_changed_expression_of_a_file_that_still_parses(file):
    data = (mutation.ROOT / file).read_bytes()
    for m in mutation.candidates(file):
        a, b = m["span"]
        wrong = data[:a] + m["new"].encode() + data[b:]
        assert data[a:b].decode() == m["old"] and ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(data)), m


def test_a_campaign_that_was_killed_continues_and_lists_survivors_by_file_and_line(tmp_path, monkeypatch, capsys):
    mutants = mutation.candidates("mirage_min/method/one_step.py")[:4]
    tried = []

    def try_one(tree, mutant, clean):
        if len(tried) == 2:
            raise KeyboardInterrupt
        tried.append(mutant)
        return mutant | {"outcome": "caught" if len(tried) == 1 else "SURVIVES", "why": "", "seconds": 0.0}

    monkeypatch.setattr(mutation, "try_one", try_one)
    monkeypatch.setattr(mutation, "load", lambda: None)
    monkeypatch.setattr(mutation, "copy_tree", lambda folder: folder)
    monkeypatch.setattr(mutation, "sample", lambda count, seed: mutants[:count])
    args = Namespace(out=tmp_path / "runs" / "log.jsonl", count=4, seed=0)
    with pytest.raises(KeyboardInterrupt):
        mutation.main(args)
    first, tried[:] = list(tried), []
    with args.out.open("a") as log:
        log.write('{"file": "mirage_min/met')  # killed while it wrote
    capsys.readouterr()
    mutation.main(args)
    assert first + tried == mutants
    said = capsys.readouterr().out.splitlines()
    assert "caught: 2 of 4" in said and "SURVIVES: 2 of 4" in said
    survivors = said[said.index("SURVIVES: 2 of 4") + 1 :]
    assert [line.split()[1] for line in survivors] == [f"{m['file']}:{m['line']}" for m in (mutants[1], mutants[3])]
    assert [json.loads(line)["line"] for line in args.out.read_text().splitlines()] == [m["line"] for m in mutants]
