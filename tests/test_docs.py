"""The pages of docs/ and the figures: names, links and commands exist, and the lesson is true.

python -m pytest -q tests/test_docs.py
"""
import contextlib
import io
import os
import re
import shlex
import xml.etree.ElementTree as ET

import pytest
import torch

import evaluate
import model
import train
from conftest import ROOT
from scripts import notebook

DOCS = ROOT / "docs"
SVG = "{http://www.w3.org/2000/svg}"
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
LESSON = PAGES["walkthrough.md"]

# ----- docs/architecture.svg and docs/modules.svg ---------------------------

def svg_groups():
    groups = {}
    for name in "architecture", "modules":
        root = ET.parse(DOCS / f"{name}.svg").getroot()
        groups.update({group.get("id"): group for group in root.iter(SVG + "g")})
    return groups

def words(group, style):
    """The texts of a group that are set in one of the figures' styles: code, cell or shape."""
    return [e.text for e in group.iter(SVG + "text") if style in e.get("class", "").split()]

def test_names_in_the_figures_are_those_of_the_model():
    with torch.device("meta"):
        whole = model.STDFormer(model.ModelConfig(**model.MODELS["b16"]))
    groups = svg_groups()
    assert set(groups) == {"STDFormer", "PTM", "CTM", "STDM", "SMEM"}
    for owner, group in groups.items():
        part = next(m for m in whole.modules() if type(m).__name__ == owner)
        names = set(words(group, "code"))
        assert len(names) >= 3
        for name in names:
            assert hasattr(model, name) or hasattr(part, name), f"{owner}: {name}"

def test_the_figure_has_each_module_at_the_layers_of_b16():
    config = model.ModelConfig(**model.MODELS["b16"])
    cells = words(svg_groups()["STDFormer"], "cell")
    expected = {"Block": config.depth - len(config.ptm_layers), "PTM": len(config.ptm_layers),
                "CTM": config.depth, "STDM": len(config.stdm_layers),
                "SMEM": len(config.smem_t_layers)}
    assert {name: cells.count(name) for name in set(cells)} == expected

@pytest.mark.parametrize("name", ("architecture", "modules"))
def test_a_figure_loads_nothing_and_has_colours_for_dark_pages(name):
    text = (DOCS / f"{name}.svg").read_text(encoding="utf-8")
    assert not re.search(r"(?:href|src|url\(|@import|foreignObject|<script)", text)
    assert "@media (prefers-color-scheme: dark)" in text

# ----- Links, names and commands of the pages -------------------------------

def headings(page):
    """The anchors that GitHub gives to the headings of a page."""
    path = ROOT / page if page == "README.md" else DOCS / page
    titles = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for path, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", prose):
        if not path.startswith(("http://", "https://")):
            target = DOCS / path if path else DOCS / page
            assert target.exists(), f"{page} links to {path}, which does not exist"
            if anchor:
                assert anchor in headings(target.name), f"{page}: no heading {path}#{anchor}"

@pytest.mark.parametrize("page", PAGES)
def test_linked_names_exist(page):
    """[`STDFormer.stem`](../model.py) names a method of a class of that file."""
    for name, path in re.findall(r"\[`([\w.]+)`\]\([./]*([\w/]+\.py)\)", PAGES[page]):
        if not name.endswith(".py"):
            source = (ROOT / path).read_text(encoding="utf-8")
            for part in name.split("."):
                found = re.search(rf"^ *(?:class|def) {part}\b|^{part} = ", source, re.MULTILINE)
                assert found, f"{page}: {path} has no {name}"
                source = source[found.end():]

def commands(text):
    """(program, its arguments) of every command of ours in blocks of bash and in `python ...`."""
    found = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    found += re.findall(r"`((?:python|torchrun) [^`\n]+)`", text)
    for line in "\n".join(found).replace("\\\n", " ").splitlines():
        args = shlex.split(line, comments=True)
        programs = [i for i, word in enumerate(args) if word.endswith(".py")]
        for start, end in zip(programs, [*programs[1:], None]):
            yield args[start], args[start + 1:end]

@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page):
    for program, args in commands(PAGES[page]):
        source = (ROOT / program).read_text(encoding="utf-8")
        if program.startswith("scripts/"):              # some pass flags on to these
            for name in "train.py", "evaluate.py", "scripts/visualize.py":
                source += (ROOT / name).read_text(encoding="utf-8")
        for flag in re.findall(r"(?<!\S)--(?:no-)?(\w+)", " ".join(args)):
            known = f'"--{flag}"' in source or flag in model.ModelConfig.__dataclass_fields__
            assert known, f"{page}: {program} has no --{flag}"
        if program == "train.py" and "..." not in args:
            train.get_args(args)
        if program == "evaluate.py" and "..." not in args:
            evaluate.get_args(args)

# ----- docs/walkthrough.md, its notebook and its model ----------------------

def test_the_lessons_model_is_small():
    assert (DOCS / "toy48.pt").stat().st_size < 2e6
    assert "optimizer" not in model.load_checkpoint(DOCS / "toy48.pt")

def test_the_notebook_is_made_of_the_text_and_has_no_outputs():
    made = (DOCS / "walkthrough.ipynb").read_text(encoding="utf-8")
    assert made == notebook.make_notebook(LESSON), "it is old: run python scripts/notebook.py"
    assert '"output_type"' not in made

def check_shapes(code, names):
    """Compare comments such as "# x (1, 8, 37, 64)" with the variables. Returns their number."""
    comments = " ".join(re.findall(r"#(.*)", code))
    shapes = re.findall(r"\b(\w+) \((\d+(?:, \d+)*)\)", comments)
    for name, shape in shapes:
        assert ", ".join(map(str, names[name].shape)) == shape, f"{name}:\n{code}"
    return len(shapes)

@pytest.fixture(scope="module")
def lesson():
    """The names after all cells, [(what the text says, what was printed)], and the shapes compared.
    """
    plt = pytest.importorskip("matplotlib.pyplot", reason="the lesson draws")
    plt.switch_backend("agg")
    folder = os.getcwd()
    os.chdir(DOCS)                                      # the first cell finds the root
    names, printed, shapes = {"__name__": "lesson"}, [], 0
    try:
        for match in notebook.CELL.finditer(LESSON):
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(match["code"], names)
            printed.append((match["printed"] or "", output.getvalue()))
            assert bool(plt.get_fignums()) == bool(match["picture"]), match["code"]
            plt.close("all")
            shapes += check_shapes(match["code"], names)
        yield names, printed, shapes
    finally:
        torch.set_grad_enabled(True)                    # the lesson switches it off for good
        plt.rcdefaults()
        os.chdir(folder)

def test_the_lesson_prints_what_it_says(lesson):
    """The words are the same, and no number is far off."""
    _, printed, shapes = lesson
    assert shapes >= 20
    number = r"\d+(?:\.\d+)?"
    for said, now in printed:
        assert re.sub(number, "#", said).split() == re.sub(number, "#", now).split()
        for a, b in zip(re.findall(number, said), re.findall(number, now)):
            assert float(a) == pytest.approx(float(b), abs=8), f"{said}\nis now\n{now}"

def test_what_the_lesson_concludes(lesson):
    """Its answers depend on these. The numbers above may differ a little on another machine."""
    names = lesson[0]
    own, opposite = zip(*names["scores"].values())
    assert own[0] > 80 and opposite[1] > 80             # as they are, backwards
    assert own[3] < 25                                  # one frame
    assert names["block_is_blind"] and names["ctm_is_blind"] and not names["ptm_is_blind"]
    left = names["left"]
    for small in "SMEM", "PTM's convolution", "DPE":
        assert left[small] > left["nothing"] - 7
    for large in "CTM's attention", "STDM":
        assert left[large] < left["nothing"] - 10
