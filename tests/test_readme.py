"""The README's map from the paper to the code points at the right lines, and its commands name real files and flags.

    python -m pytest tests/test_readme.py
"""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = re.findall(r"`([A-Za-z_.]+)` \| \[([a-z]+\.py):(\d+)\]\(([a-z]+\.py)#L(\d+)\)", README)


def definition_line(file, name):
    """Line of `class name`, `def name` or, for Class.method, of the method behind its class."""
    lines, start = (ROOT / file).read_text(encoding="utf-8").splitlines(), 0
    for part in name.split("."):
        start = next(i for i in range(start, len(lines)) if re.match(rf"\s*(class|def) {part}\b", lines[i])) + 1
    return start


def test_map_has_every_module_of_the_paper():
    assert {"PTM", "CTM", "STDM", "SMEM", "STDFormer", "DPE", "CPE", "PTMConv"} <= {name for name, *_ in MAP}


@pytest.mark.parametrize("name, file, line, link_file, link_line", MAP, ids=[m[0] for m in MAP])
def test_map_points_at_the_definition(name, file, line, link_file, link_line):
    assert (file, line) == (link_file, link_line)
    assert int(line) == definition_line(file, name), f"README: {name} is at {file}:{definition_line(file, name)}"


def flags_of(program, words):
    """The flags that a program takes, by its source; some hand what they do not know to train.py or evaluate.py."""
    source = (ROOT / program).read_text(encoding="utf-8")
    known = set(re.findall(r'"--(\w+)"', source)) | {"help"}
    if program in ("model.py", "train.py"):
        known |= {"model"} | set(re.findall(r"^    (\w+): \w+ = option", (ROOT / "model.py").read_text(encoding="utf-8"), re.MULTILINE))
    if words.startswith(" show") or program in ("scripts/ablate.py", "scripts/variants.py"):
        known |= flags_of("train.py", "")
    return known


def test_commands_use_flags_that_exist():
    """Every --flag on a command line of ours in the README belongs to the program that it is given to."""
    commands = re.findall(r"((?:scripts/)?\w+\.py)( [^`|#\n]*)", README)
    used = {(program, words, flag) for program, words in commands for flag in re.findall(r"(?<!-)--(?:no-)?([a-z]\w*)", words) if (ROOT / program).is_file()}
    assert len(used) > 50 and {program for program, _, _ in used} >= {"train.py", "evaluate.py", "data.py", "model.py", "scripts/ablate.py", "scripts/bench.py"}
    wrong = sorted({(program, flag) for program, words, flag in used if flag not in flags_of(program, words)})
    assert not wrong, f"README gives programs flags that they do not have: {wrong}"


def test_line_counts_are_true():
    for file, count in re.findall(r"`([a-z]+\.py)` (\d+) lines", README):
        lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(count)) <= 10, f"README says {file} has {count} lines, it has {lines}"
