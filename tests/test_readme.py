"""The README's map from the paper to the code points at the right lines, and its commands name real files and flags.

    python -m pytest tests/test_readme.py
"""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(f"scripts/{p.name}" for p in (ROOT / "scripts").glob("*.py"))
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


def test_commands_use_flags_that_exist():
    """Every --flag on a command line of ours in the README stands in the source of one of the programs."""
    sources = " ".join((ROOT / f).read_text(encoding="utf-8") for f in ("model.py", "data.py", "train.py", "evaluate.py", *SCRIPTS))
    fields = re.findall(r"^    (\w+): \w+ = option", sources, re.MULTILINE)
    known = set(re.findall(r'"--(\w+)"', sources)) | set(fields) | {"help", "no"}
    lines = [line for line in README.splitlines() if re.search(r"\w+\.py ", line)]
    used = {flag for line in lines for flag in re.findall(r"(?<!-)--([a-z_]+)", line.split(".py ", 1)[1])}
    assert len(used) > 10
    assert used <= known, f"README uses flags that do not exist: {sorted(used - known)}"


def test_line_counts_are_true():
    for file, count in re.findall(r"`([a-z]+\.py)` (\d+) lines", README):
        lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(count)) <= 10, f"README says {file} has {count} lines, it has {lines}"
