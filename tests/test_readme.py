"""The README names files, classes and flags that exist, keeps its size, and its example runs.

python -m pytest tests/test_readme.py
"""

import re
from pathlib import Path

import pytest

import data
import evaluate
import model
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = {"model.py": model, "data.py": data, "train.py": train, "evaluate.py": evaluate}


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_readme_is_two_screens():
    assert len(README.splitlines()) <= 230
    assert len(README.split()) <= 2200


def names_of_the_map():
    """(name, module) of "From the paper to the code". A file stands until the next is named."""
    pairs, file = [], None
    table = section("From the paper to the code")
    for name, found in re.findall(r"`([\w.]+)`(?: in (\w+\.py))?", table):
        file = found or file
        pairs.append((name, file))
    return pairs


def test_the_map_names_every_module_of_the_paper():
    names = {name for name, _ in names_of_the_map()}
    assert names >= {"STDFormer", "Block", "PTM", "DPE", "PTMConv", "CTM", "CPE", "STDM", "SMEM"}


@pytest.mark.parametrize("name, file", names_of_the_map())
def test_the_map_names_what_is_there(name, file):
    found = MODULES[file]
    for part in name.split("."):
        found = getattr(found, part)


def test_line_counts_are_true():
    counts = re.findall(r"\[(\w+\.py)\]\(\w+\.py\) \((\d+)", README)
    assert {file for file, _ in counts} == set(MODULES)
    for file, count in counts:
        lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(count)) <= 10, f"README says {file} has {count} lines, not {lines}"


def test_the_four_files_are_read_in_one_sitting():
    limits = {"model.py": 660, "data.py": 300, "train.py": 400, "evaluate.py": 190}
    for file, most in limits.items():
        lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert lines <= most, f"{file} has {lines} lines: guards and drawing are for scripts/"


def test_no_line_of_python_is_wider_than_100_columns():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("tests/**/*.py")]:
        widest = max(map(len, path.read_text(encoding="utf-8").splitlines()), default=0)
        assert widest <= 100, f"{path} has a line of {widest} columns"


def flags_of(program, subcommand=""):
    """The flags that a program takes, by its source. Some pass flags on to train.py."""
    source = (ROOT / program).read_text(encoding="utf-8")
    known = set(re.findall(r'"--(\w+)"', source))
    if program == "train.py":
        known |= {f.name for f in model.fields(model.ModelConfig)}
    pass_on = ("scripts/ablate.py", "scripts/variants.py", "scripts/describe.py")
    passes_on = program in pass_on or subcommand == "show"
    return known | (flags_of("train.py") if passes_on else set())


def test_commands_use_flags_that_exist():
    commands = re.findall(r"((?:scripts/|tests/stress/)?\w+\.py)( [^`|#\n&]*)", README)
    used = set()
    for program, words in commands:
        assert (ROOT / program).is_file(), f"README runs {program}, which does not exist"
        for flag in re.findall(r"(?<!-)--(?:no-)?([a-z]\w*)", words):
            used.add((program, (words.split() or [""])[0], flag))
    assert len(used) > 20
    wrong = [(p, flag) for p, subcommand, flag in used if flag not in flags_of(p, subcommand)]
    assert not wrong, f"README gives programs flags that they do not have: {wrong}"


def test_the_example_of_single_modules_runs():
    code = section("Use one module elsewhere").split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    claimed = re.findall(r"^(\w+) = .*# \(([\d, ]+)\)", code, re.MULTILINE)
    assert claimed[-1][0] == "patches" and len(claimed) == 5
    final = dict(claimed)                               # the last shape of each name
    for name, shape in final.items():
        assert tuple(names[name].shape) == tuple(int(n) for n in shape.split(","))
