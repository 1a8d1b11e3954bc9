"""The README keeps its word: every path, command, option and Python name in it exists."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer

import mplug2
from mplug2 import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
SHELL = [block for language, block in BLOCKS if language in ("bash", "console", "sh", "shell")]
PYTHON = [block for language, block in BLOCKS if language == "python"]
# Programs of the system, whose arguments are not ours.
SYSTEM = {"cd", "git", "pip", "apt-get", "dpkg-deb"}


def commands() -> list[str]:
    lines = [line for block in SHELL for line in block.replace("\\\n", " ").splitlines()]
    inline = [span for span in re.findall(r"`([^`\n]+)`", PROSE) if re.match(r"(make|mplug2|python3?|pytest) ", span)]
    return [line.strip().removeprefix("$ ") for line in [*lines, *inline] if line.strip() and not line.startswith("#")]


def paths() -> list[str]:
    links = re.findall(r"\]\(([^)#\s]+)\)", PROSE)
    tops = {entry.name for entry in ROOT.iterdir()}
    quoted = [span for span in re.findall(r"`([^`\s]+)`", PROSE) if "<" not in span and span.split("/")[0] in tops]
    return [link for link in links if "://" not in link] + quoted


def test_readme_has_something_to_check():
    assert commands()
    assert PYTHON


@pytest.mark.parametrize("path", paths())
def test_path_exists(path):
    assert list(ROOT.glob(path)), f"README.md names {path}, which is not in the repository"


@pytest.mark.parametrize("command", commands())
def test_command_exists(command):
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program == "mplug2":
        check_mplug2(arguments)
    elif program in ("python", "python3") and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None
    elif program in ("python", "python3", "pytest"):
        assert all((ROOT / word).exists() for word in arguments if not word.startswith("-"))
    else:
        assert program in SYSTEM or (ROOT / program).exists(), f"README.md runs {program}"


def check_mplug2(arguments: list[str]) -> None:
    group = typer.main.get_command(cli.app)
    if arguments[0].startswith("-"):
        command = group
    else:
        assert arguments[0] in group.commands, f"mplug2 has no command {arguments[0]}"
        command = group.commands[arguments[0]]
    known = {"--help", *(name for parameter in command.params for name in parameter.opts + parameter.secondary_opts)}
    used = {word.split("=")[0] for word in arguments if re.match(r"--?[a-z]", word)}
    assert used <= known, f"mplug2 {arguments[0]} has no option {sorted(used - known)}"


@pytest.mark.parametrize("block", PYTHON)
def test_python_names_exist(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and (dotted := ast.unparse(node)).startswith("mplug2."):
            value = mplug2
            for name in dotted.split(".")[1:]:
                assert hasattr(value, name), f"README.md uses {dotted}, and {value} has no {name}"
                value = getattr(value, name)
