"""The figure carries names that exist, and what docs/walkthrough.md shows is what comes out: its code runs, its shapes and lines are true.

    python -m pytest tests/test_docs.py
"""
import code
import contextlib
import dataclasses
import importlib.util
import io
import re
import shlex
import sys
import textwrap
import xml.etree.ElementTree as ET

import torch

from conftest import ROOT
from test_readme import definition_line
import data
import model
import train

SVG = "{http://www.w3.org/2000/svg}"


# ----------------------------------------------------------------------------------------------------
# docs/architecture.svg
# ----------------------------------------------------------------------------------------------------


def architecture():
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "scripts" / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def groups():
    root = ET.parse(ROOT / "docs" / "architecture.svg").getroot()
    return {g.get("id"): g for g in root.iter(SVG + "g")}


def names(group):
    """What is set as code in the boxes of a group."""
    return {e.text for e in group.iter() if e.tag in (SVG + "text", SVG + "tspan") and "code" in (e.get("class") or "").split()}


def test_figure_is_the_one_that_the_script_draws():
    drawn = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert drawn == architecture().draw(), "docs/architecture.svg is old: python scripts/architecture.py"


def test_figure_names_exist_in_the_model():
    with torch.device("meta"):
        whole = model.build_model("b16")
    assert set(groups()) == {"STDFormer", "PTM", "CTM", "STDM", "SMEM"}
    for owner, group in groups().items():
        found = names(group)
        part = next(m for m in whole.modules() if type(m).__name__ == owner)
        assert owner in found and len(found) >= 4
        unknown = {name for name in found if not isinstance(getattr(model, name, None), type) and not hasattr(part, name)}
        assert not unknown, f"in the box of {owner}: {unknown} is neither a class of model.py nor a part of {owner}"


def test_figure_shows_every_module_where_b16_has_it():
    c = model.ModelConfig(**model.MODELS["b16"])
    cells = [e.text for e in groups()["STDFormer"].iter(SVG + "text") if e.get("font-size") == "11"]
    want = {"Block": c.depth - len(c.ptm_layers), "PTM": len(c.ptm_layers), "CTM": c.depth, "STDM": len(c.stdm_layers), "SMEM": len(c.smem_layers)}
    assert {name: cells.count(name) for name in want} == want


def test_figure_stands_alone_in_light_and_dark():
    """An image in a README may load nothing; it has its own background, and both sets of colours."""
    text = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert not re.search(r"(?:href|src|url\(|@import|foreignObject|<script)", text)
    assert "@media (prefers-color-scheme: dark)" in text
    root = ET.fromstring(text)
    first = root.find(SVG + "rect")
    assert first.get("class") == "paper" and float(first.get("width")) >= float(root.get("width")) - 1


# ----------------------------------------------------------------------------------------------------
# docs/walkthrough.md
# ----------------------------------------------------------------------------------------------------

WALK = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")


def blocks(language):
    """The fenced blocks of one language, in order, without their indentation (answers stand in lists)."""
    return [textwrap.dedent(body) for _, body in re.findall(rf"^( *)```{language}\n(.*?)^ *```$", WALK, re.MULTILINE | re.DOTALL)]


class Session(code.InteractiveConsole):
    """A reader who types the code into `python`: line by line, so a missing blank line behind a loop is an error, as it is there."""

    def showtraceback(self):
        raise

    def showsyntaxerror(self, *args, **kwargs):
        raise

    def run(self, block):
        """Run a block. Returns (shapes compared, outputs compared); fails where a comment tells something else."""
        shapes = outputs = 0
        statement = []
        for line in block.splitlines() + [""]:
            printed = io.StringIO()
            statement.append(line)
            with contextlib.redirect_stdout(printed):
                unfinished = self.push(line)
            if unfinished:
                continue
            for comment in (part.split("  # ", 1)[1] for part in statement if "  # " in part):
                if comment.startswith("prints "):
                    assert " ".join(printed.getvalue().split()) == " ".join(comment.removeprefix("prints ").split()), "\n".join(statement)
                    outputs += 1
                else:
                    for name, shape in re.findall(r"\b(\w+) \((\d+(?:, \d+)*)\)", comment):
                        found = ", ".join(map(str, self.locals[name].shape))
                        assert found == shape, f"{name} has the shape ({found}), the walk-through says ({shape}):\n" + "\n".join(statement)
                        shapes += 1
            statement = []
        assert not statement, "unfinished: " + "\n".join(statement)
        return shapes, outputs


def test_walkthrough_runs_as_printed(tmp_path, monkeypatch):
    """All Python of the walk-through in one session, on a small toy and a model of two steps; shapes and outputs in its comments are compared."""
    data.make_toy(tmp_path / "datasets" / "toy", train=4, validation=10)
    monkeypatch.chdir(tmp_path)
    train.main("--image_size 48 --epochs 1 --warmup_epochs 0 --batch_size 2 --workers 0 --device cpu --out_dir out/toy48".split())
    session, random_state = Session(), torch.get_rng_state()
    try:
        counts = [session.run(block) for block in blocks("python")]
    finally:
        torch.set_grad_enabled(True)                    # the walk-through switches it off for good
        torch.set_rng_state(random_state)
    shapes, outputs = map(sum, zip(*counts))
    assert shapes >= 30 and outputs >= 15, "comments that the test no longer recognises?"


def test_walkthrough_links_point_at_the_definition():
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./(\w+\.py)#L(\d+)\)", WALK)
    assert {"STDFormer.stem", "Block", "CTM", "STDM", "SMEM", "PTM"} <= {name for name, *_ in links}
    assert len(links) == WALK.count(".py#L"), "a link to a line that is not of the form [`Name`](../file.py#L1)"
    wrong = [f"[`{name}`](../{file}#L{line}): it is #L{definition_line(file, name)}" for name, file, line in links if int(line) != definition_line(file, name)]
    assert not wrong, "docs/walkthrough.md, mend these lines:\n" + "\n".join(wrong)


def test_walkthrough_files_and_headings_exist():
    headings = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", WALK, re.MULTILINE)}
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", WALK, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#]*)(#[^)]*)?\)", prose)
    missing = {path for path, _ in targets if path and not (ROOT / "docs" / path).exists()}
    missing |= {anchor for path, anchor in targets if not path and anchor[1:] not in headings}
    assert not missing, f"docs/walkthrough.md links to what is not there: {sorted(missing)}"


def test_walkthrough_quotes_the_model():
    source = {line.strip() for line in (ROOT / "model.py").read_text(encoding="utf-8").splitlines()}
    quoted = [line.strip() for block in blocks("py") for line in block.splitlines()]
    assert quoted and not [line for line in quoted if line not in source]


def test_walkthrough_table_of_b16(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model.py", "--model", "b16"])
    model.main()
    printed = capsys.readouterr().out
    table, = (block for block in blocks("text") if block.startswith("b16"))
    assert table.strip() in printed, "the table of step 10 is old: python model.py --model b16"
    for kind, column in ("tiny at 48 pixels", 2), ("b16", 3):
        c = model.ModelConfig(**{**model.MODELS[kind.split()[0]], **({"image_size": 48} if "48" in kind else {})})
        T, side, S = c.num_frames // c.stem_stride, c.image_size // c.patch_size, c.image_size
        want = [(1, 3, c.num_frames, S, S), (1, T, 1 + side ** 2, c.dim), (1, T, side, side, c.dim), (1, T - 1, side ** 2, side ** 2)]
        want = [str(shape) for shape in want] + ["; ".join(", ".join(map(str, p)) for p in ((c.depth,), c.ptm_layers, c.smem_layers))]
        rows = WALK.split("| | tiny at 48 pixels | b16 |\n")[1].splitlines()[1:6]
        assert [row.split(" | ")[column - 1].strip(" |") for row in rows] == want


def test_walkthrough_commands_are_accepted():
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines() if not line.startswith("#")]
    commands += [shlex.split(c) for c in re.findall(r"`(python [^`]+)`", WALK)]
    assert len(commands) > 12
    for python, script, *flags in commands:
        assert python == "python"
        if script == "train.py":
            model.config_from_flags(train.get_args(flags))
        elif (ROOT / script).is_file():
            help_text = "".join((ROOT / script).read_text(encoding="utf-8"))
            fields = {f.name for f in dataclasses.fields(model.ModelConfig)} if script == "model.py" else set()
            assert all(f'"{flag}"' in help_text or flag[2:] in fields for flag in flags if flag.startswith("--")), (script, flags)
        else:
            raise AssertionError(f"{script} is not there")
    for flag in re.findall(r"`--(\w+)", WALK):          # flags that the text names
        assert flag in vars(train.get_args([])), flag
