"""The commands that the project shows, in the fenced blocks of its documents and the headers of its modules, and what
their scripts make of them: `understand` runs a script until its flags and settings are read.

    for shown in commands():
        understand(shown.command)             # nothing; or Refused, with what the script says
"""

import argparse
import ast
import contextlib
import io
import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import generate
import infer
import train_online
from mirage_min.data import desk
from mirage_min.systems.load import SYSTEMS, Mirage
from mirage_min.training import run

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("python", "torchrun", "pip", "pytest")  # a line of a block that begins with another is no command of ours
NO_PARSER = {"mirage_min/systems/load.py", "mirage_min/systems/restore_folder.py", "mirage_min/networks/backbones.py",
             "assignments/cage.py"}  # they take names or nothing


class Understood(BaseException):
    """All flags and settings of a command are read; its work would begin here."""


class Refused(Exception):
    """A command's script refuses its flags or settings."""


@dataclass(frozen=True)
class Shown:
    """A command, and the file that shows it; a sentence may name a module without the flags that it needs."""

    where: str
    command: str
    in_sentence: bool


# ---- what is shown ---------------------------------------------------------------------------------------------------

def documents() -> list[str]:
    """The project's documents, from its root."""
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.md")
                  if not {"runs", "data"} & set(path.relative_to(ROOT).parts[:1]))


def blocks(text: str) -> list[str]:
    """What a document's fenced blocks hold, of those in no language or a shell's."""
    found, inside, language = [], [], None
    for line in text.splitlines():
        if line.startswith("```"):
            if language in ("", "bash", "sh"):
                found.append("\n".join(inside))
            inside, language = [], line[3:].strip() if language is None else None
        elif language is not None:
            inside.append(line)
    return found


def commands_of(block: str) -> list[str]:
    """The commands of a block: lines continued, comments and blanks left out, `&&`, `;` and loops taken apart."""
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in re.sub(r"\\\\?\n", " ", block).splitlines()]
    parts = [re.sub(r"^do ", "", part.strip()) for line in lines for part in re.split(r" && |; ", line)]
    return [" ".join(part.split()) for part in parts if part.split() and part.split()[0] in PROGRAMS]


def commands() -> Iterator[Shown]:
    """Every command in a block or a sentence of a document, or in the header of a module; NAME stands for many."""
    for name in documents():
        text = (ROOT / name).read_text(encoding="utf-8")
        sentences = [" ".join(code.split()) for code in re.findall(r"`((?:python|torchrun) [^`]+)`", text)]
        for block in blocks(text) + sentences:
            for command in commands_of(block):
                if "NAME" not in command:
                    yield Shown(name, command, block in sentences)
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(("tests/", "runs/", "data/", "build/")):
            header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            indented = "\n".join(line for line in header.splitlines() if line.startswith("    "))
            for command in commands_of(indented):
                yield Shown(name, command, False)


# ---- what is made of it ----------------------------------------------------------------------------------------------

def understand(command: str, in_sentence: bool = False) -> None:
    """Run a command until its flags and settings are read; Refused with the reason if its script does not take them.

    Values need not exist: DIR, FILE and the like stand for themselves, `...` at the end for more flags, and what is in
    square brackets is given.
    """
    program, *argv = shlex.split(re.sub(r"[\[\]]", "", command))
    argv = argv[:-1] if argv[-1:] == ["..."] else argv
    if program == "torchrun":
        argv = list(itertools.dropwhile(lambda word: word.startswith("--"), argv))
    if program in ("pip", "pytest"):
        files = [word for word in argv if "/" in word or word.endswith(".txt")]
        missing = [word for word in files if not (ROOT / word).exists()]
    else:
        as_module = argv[0] == "-m"
        name, argv = argv[as_module], argv[as_module + 1 :]
        script = name.replace(".", "/") + ".py" if as_module else name
        missing = [script] * (not (ROOT / script).exists())
        missing += [word for word in argv if word.startswith(("assets/", "weights/")) and not (ROOT / word).exists()]
        # what takes no arguments is run whole, by test_demonstrations and test_examples
        bare = not argv and (in_sentence or name.startswith(("mirage_min.", "examples.")))
        if not missing and not bare and script not in NO_PARSER:
            run_until_understood(name, script, as_module, argv)
    if missing:
        raise Refused(f"there is no {missing[0]}")


def run_until_understood(name: str, script: str, as_module: bool, argv: list[str]) -> None:
    """Start a script, as the command line does, and stop it where its work would begin; Refused as of understand."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, given=None) -> argparse.Namespace:
        args = parse(parser, argv if given is None else given)
        check_settings(script, args)
        if not hasattr(args, "set") or script.startswith("experiments/"):
            raise Understood
        return args

    def launch(main, args: argparse.Namespace, recipes: dict, conv3d: bool = False) -> None:
        run.check(desk.override(recipes[args.recipe], args.set))
        raise Understood

    def serve(name: str, work, *others, **more) -> int:
        raise Understood

    errors = io.StringIO()
    changes = [(argparse.ArgumentParser, "parse_args", parse_and_stop), (run, "launch", launch), (desk, "serve", serve),
               (desk, "open_up", lambda: None), (sys, "argv", [script, *argv])]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(errors))
        for place, attribute, value in changes:
            stack.enter_context(mock.patch.object(place, attribute, value))
        try:
            if as_module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except Understood:
            return
        except (SystemExit, ValueError) as error:
            raise Refused(errors.getvalue().strip().split("\n")[-1] or error) from error
    raise Refused("it ran to its end: it reads no flags")


def check_settings(script: str, args: argparse.Namespace) -> None:
    """ValueError for a --set that nothing takes which infer.py, generate.py or an experiment runs."""
    if script.startswith("experiments/harmonizer_"):
        desk.override(train_online.RECIPES["small"], args.set)
    elif script == "infer.py" or (script.startswith("experiments/") and hasattr(args, "set")):
        for System in (Mirage, *SYSTEMS):
            try:
                if script == "infer.py":
                    infer.choose(System, args)
                else:
                    desk.override(System.Options(), args.set)
                return
            except ValueError as error:
                refusal = error
        raise refusal
    if script == "generate.py":
        generate.choose(args)
