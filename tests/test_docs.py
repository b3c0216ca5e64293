"""The pages of docs/ and the figures: links, names and commands exist, and the lesson is true.

    python -m pytest tests/test_docs.py
"""
import json
import os
import re
import shlex
import xml.etree.ElementTree as ET

import pytest
import torch

from conftest import ROOT
import evaluate
import model
import train
from scripts import architecture, notebook, toy_data

DOCS = ROOT / "docs"
SVG = "{http://www.w3.org/2000/svg}"
PAGES = {page.name: page.read_text(encoding="utf-8")
         for page in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]}
LESSON = PAGES["walkthrough.md"]

# ----- docs/architecture.svg and docs/modules.svg ---------------------------


def svg_groups(name):
    root = ET.parse(DOCS / f"{name}.svg").getroot()
    return {group.get("id"): group for group in root.iter(SVG + "g")}


def code_words(group):
    """What a group sets in the letters of code: names of model.py."""
    return [e.text for e in group.iter(SVG + "text") if "code" in e.get("class").split()]


@pytest.mark.parametrize("name", architecture.TITLES)
def test_figure_is_the_one_that_the_script_draws(name):
    drawn = (DOCS / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == architecture.draw(name), f"docs/{name}.svg: run scripts/architecture.py"


def test_figure_names_exist_in_the_model():
    with torch.device("meta"):
        whole = model.build_model("b16")
    groups = {**svg_groups("architecture"), **svg_groups("modules")}
    assert set(groups) == {"STDFormer", "PTM", "CTM", "STDM", "SMEM"}
    for owner, group in groups.items():
        found = set(code_words(group))
        part = next(m for m in whole.modules() if type(m).__name__ == owner)
        assert owner in found and len(found) >= 4
        for name in found:
            known = isinstance(getattr(model, name, None), type) or hasattr(part, name)
            assert known, f"{owner}: {name} is neither a class of model.py nor a part of {owner}"


def test_figure_shows_every_module_at_the_layers_of_b16():
    c = model.ModelConfig(**model.MODELS["b16"])
    texts = svg_groups("architecture")["STDFormer"].iter(SVG + "text")
    cells = [e.text for e in texts if "cell" in e.get("class").split()]
    expected = {"Block": c.depth - len(c.ptm_layers), "PTM": len(c.ptm_layers), "CTM": c.depth,
                "STDM": len(c.stdm_layers), "SMEM": len(c.smem_t_layers)}
    assert {name: cells.count(name) for name in set(cells)} == expected


def test_figure_shows_the_shapes_of_the_model():
    texts = svg_groups("architecture")["STDFormer"].iter(SVG + "text")
    shapes = " ".join(e.text for e in texts if "shape" in e.get("class").split())
    for shape in "(B, 3, F, S, S)", "x (B, T, 1+N, D)", "y (B, T, H, W, D)":
        assert shape in shapes and shape.split(" ", 1)[-1] in model.__doc__


@pytest.mark.parametrize("name", architecture.TITLES)
def test_figure_stands_alone_in_light_and_dark(name):
    """An image in a README may load nothing. It brings its background and both sets of colours."""
    text = (DOCS / f"{name}.svg").read_text(encoding="utf-8")
    assert not re.search(r"(?:href|src|url\(|@import|foreignObject|<script)", text)
    assert "@media (prefers-color-scheme: dark)" in text
    root = ET.fromstring(text)
    first = root.find(SVG + "rect")
    assert first.get("class") == "paper"
    assert float(first.get("width")) >= float(root.get("width")) - 1

# ----- Links, names and commands of all pages -------------------------------


def headings(page):
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)", PAGES[page], re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    folder = ROOT if page == "README.md" else DOCS
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for path, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", prose):
        if path.startswith(("http://", "https://")):
            continue
        assert (folder / path).exists(), f"{page} links to {path}, which does not exist"
        target = (folder / path).name if path else page
        if anchor:
            assert target in PAGES, f"{page}: {path}#{anchor} would change with every edit"
            assert anchor in headings(target), f"{page}: {target} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_linked_names_exist(page):
    """[`STDFormer.stem`](../model.py) names a method of a class of that file."""
    for name, path in re.findall(r"\[`([\w.]+)`\]\([./]*([\w/]+\.py)\)", PAGES[page]):
        if name.endswith(".py"):
            continue
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
        words = shlex.split(line, comments=True)
        starts = [i for i, word in enumerate(words) if word.endswith(".py")]
        for start, end in zip(starts, [*starts[1:], None]):
            yield words[start], words[start + 1:end]


def known_flags(program):
    source = (ROOT / program).read_text(encoding="utf-8")
    flags = set(re.findall(r'"--(\w+)"', source)) | {"help"}
    if program == "train.py":
        flags |= {*model.ModelConfig.__dataclass_fields__}
    if program in ("scripts/variants.py", "scripts/ablate.py", "scripts/describe.py"):
        flags |= known_flags("train.py") | known_flags("evaluate.py")
    return flags


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_commands_have_these_flags(page):
    for program, words in commands(PAGES[page]):
        assert (ROOT / program).is_file(), f"{page}: {program} does not exist"
        for flag in re.findall(r"(?<!\S)--(?:no-)?(\w+)", " ".join(words)):
            assert flag in known_flags(program), f"{page}: {program} has no --{flag}"


def test_commands_of_the_lesson_are_accepted():
    parsed = 0
    for program, words in commands(LESSON):
        if program == "train.py":
            model.model_config(train.get_args(words))
            parsed += 1
        if program == "evaluate.py":
            evaluate.get_args(words)
            parsed += 1
    assert parsed >= 8

# ----- docs/toy48.pt, the lesson's model ------------------------------------


def test_lesson_model_is_small():
    path = DOCS / "toy48.pt"
    assert path.stat().st_size < 2e6
    checkpoint = model.load_checkpoint(path)
    assert "optimizer" not in checkpoint and not os.path.isabs(checkpoint["args"]["data_root"])
    for name, tensor in checkpoint["model"].items():
        assert tensor.dtype != torch.float32 or "running" in name
        assert tensor.isfinite().all(), name


def test_evaluate_accepts_the_lesson_model(tmp_path, capsys):
    _, name = toy_data.write_toy_clip((tmp_path, "clip", 0, "validation", 0))
    ckpt, clip = str(DOCS / "toy48.pt"), str(tmp_path / "clip")
    evaluate.main(["--ckpt", ckpt, "--video", clip, "--device", "cpu"])
    assert capsys.readouterr().out.splitlines()[1].endswith(name)


def test_notebook_script_shrinks_a_checkpoint(tmp_path):
    checkpoint = model.load_checkpoint(DOCS / "toy48.pt")
    checkpoint["model"]["head.bias"] = checkpoint["model"]["head.bias"].float()
    checkpoint["optimizer"] = {}
    large = torch.tensor([1e5])                         # more than float16 can hold
    checkpoint["model"]["bn.running_var"] = large
    small = notebook.shrink(checkpoint)
    assert "optimizer" not in small and small["model"]["head.bias"].dtype == torch.float16
    assert torch.equal(small["model"]["bn.running_var"], large)

# ----- docs/walkthrough.md and docs/walkthrough.ipynb -----------------------


def test_notebook_is_made_of_the_text():
    path = DOCS / "walkthrough.ipynb"
    made = path.read_text(encoding="utf-8")
    assert made == notebook.make_notebook(LESSON), "it is old: run python scripts/notebook.py"
    assert path.stat().st_size < 1.5e6
    cells = json.loads(made)["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    in_text = [match["code"].strip("\n") for match, folded in notebook.find_cells(LESSON)
               if not folded]
    assert code == in_text and len(code) > 15
    pictures = [output for cell in cells for output in cell.get("outputs", ())
                if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4


def test_minutes_and_questions_add_up():
    rows = re.findall(r"^\| \[\d\].* \| (\d+) \| ([\d, ]+) \|$", LESSON, re.MULTILINE)
    assert len(rows) == 8 and sum(int(minutes) for minutes, _ in rows) == 80
    assert "| 80 |" in LESSON
    asked = [number for _, questions in rows for number in questions.split(", ")]
    assert asked == re.findall(r"^\*\*Question (\d+)\.\*\*", LESSON, re.MULTILINE)
    assert LESSON.count("<details>") == LESSON.count("</details>") >= 24


def is_drawing(match):
    return "plt." in match["code"] or "draw_" in match["code"]


def check_shapes(code, names):
    """Compare comments such as "# x (1, 8, 37, 64)" with the variables. Returns their number."""
    comments = " ".join(re.findall(r"#(.*)", code))
    shapes = re.findall(r"\b(\w+) \((\d+(?:, \d+)*)\)", comments)
    for name, shape in shapes:
        assert ", ".join(map(str, names[name].shape)) == shape, f"{name}:\n{code}"
    return len(shapes)


@pytest.fixture(scope="module")
def lesson():
    """The names after all cells that do not draw, what each prints, and the shapes compared."""
    folder, threads = os.getcwd(), torch.get_num_threads()
    random_state = torch.get_rng_state()
    os.chdir(DOCS)                                      # the first cell finds the root
    names, printed, shapes = {"__name__": "lesson"}, [], 0
    try:
        for match, _ in notebook.find_cells(LESSON):
            if not is_drawing(match):
                printed.append((match["printed"] or "", notebook.run_cell(match["code"], names)))
                shapes += check_shapes(match["code"], names)
        yield names, printed, shapes
    finally:
        torch.set_grad_enabled(True)                    # the lesson switches it off for good
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)
        os.chdir(folder)


def test_lesson_prints_what_it_says(lesson):
    """The words are the same, and no number is far off."""
    _, printed, shapes = lesson
    assert shapes >= 20, "comments that the test does not recognise any more?"
    number = r"\d+(?:\.\d+)?"
    for said, now in printed:
        words = [" ".join(re.sub(number, "#", text).split()) for text in (said, now)]
        assert words[0] == words[1]
        for a, b in zip(re.findall(number, said), re.findall(number, now)):
            assert float(a) == pytest.approx(float(b), abs=8), f"{said}\nis now\n{now}"


def test_lesson_experiment(lesson):
    names = lesson[0]
    assert names["answers"]["as it is"].startswith("Moving something from left to right")
    assert names["answers"]["backwards"].startswith("Moving something from right to left")
    own, partner = zip(*(names["scores"][test] for test in names["tests"]))
    assert own[0] > 80 and partner[1] > 80
    assert 15 < own[2] < 50 and 15 < partner[2] < 50 and own[2] + partner[2] > 45
    assert own[3] < 25


def test_lesson_says_who_knows_of_the_order(lesson):
    names = lesson[0]
    assert names["knows"] == {4: [2], 5: [2, 3], 15: [7]}
    assert names["block_is_blind"] and names["ctm_is_blind"] and not names["ptm_is_blind"]
    lines = [line for _, now in lesson[1] for line in now.splitlines() if "computes it" in line]
    assert len(lines) == 3 and all(line.endswith("True") for line in lines)


def test_lesson_shows_what_training_made(lesson):
    names = lesson[0]
    x, dpe, *terms = names["lengths"]["trained"]
    assert dpe > max(terms) and 0.35 < dpe / x < 0.7
    for _, _, y1, y2, y3 in names["lengths"].values():
        assert y2 > max(y1, y3)
    assert names["ratios"]["trained"] > names["ratios"]["untrained"] > 1.5
    assert names["share"]["trained"].mean() > 4 * names["share"]["untrained"].mean()
    for when, expected in ("before", (0, 8)), ("after", (15, 36)):
        different, itself = names[when]["trained"]
        assert expected[0] < different < expected[1]
        assert itself < names[when]["untrained"][1]
    assert names["after"]["untrained"][1] > 55


def test_lesson_parts(lesson):
    left = lesson[0]["left"]
    for small in "SMEM", "PTM's convolution", "DPE":
        assert left[small] > left["nothing"] - 7
    for large in "CTM's attention", "STDM":
        assert 50 < left[large] < left["nothing"] - 10
    assert 20 < left["all of these"] < 55 and left["motion in the stem"] < 20


def test_lesson_draws_its_pictures(lesson, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    monkeypatch.setattr(plt, "show", lambda: None)
    with matplotlib.rc_context(), torch.no_grad():
        for match, _ in notebook.find_cells(LESSON):
            if is_drawing(match):
                notebook.run_cell(match["code"], lesson[0])
                check_shapes(match["code"], lesson[0])
                assert bool(plt.get_fignums()) == bool(match["picture"])
                plt.close("all")
    for match, _ in notebook.find_cells(LESSON):
        assert not match["picture"] or is_drawing(match)
