"""Make docs/walkthrough.ipynb from docs/walkthrough.md: run its Python, and keep what comes out.

    python scripts/notebook.py                          # needs matplotlib
    python scripts/notebook.py --ckpt out/toy48/best.pt # first make docs/toy48.pt from this run

The lesson is one text, docs/walkthrough.md. Each block of Python in it is a cell of the notebook.
A block "text" below it holds what the cell prints, and a line with a picture what it draws. This
script renews both, and the pictures in docs/. So change the text, never the notebook.
Python inside <details> is an answer. It is run as well, but in the notebook it stays text.
"""
import argparse
import base64
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT))

# A block of Python, then what it prints (if anything), then the picture that it draws (if any).
CELL = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<printed>.*?)^```\n)?"
                  r"(?:\n!\[[^\]]*\]\((?P<picture>[\w.]+)\)\n)?", re.MULTILINE | re.DOTALL)

# ----- Running the text -----------------------------------------------------

def find_cells(text):
    """The matches of CELL in the lesson, in order, each with whether it stands in <details>."""
    cells = []
    for match in CELL.finditer(text):
        before = text[:match.start()]
        cells.append((match, before.count("<details>") > before.count("</details>")))
    return cells


def run_cell(code, names):
    """Run a cell with the global variables `names`. Returns what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "<cell of the lesson>", "exec"), names)
    return printed.getvalue()


def run_text(text):
    """Run all cells in docs/, write their pictures there, and return the text with new outputs."""
    import matplotlib                                   # optional: only the pictures need it
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    os.chdir(DOCS)
    names, parts, end = {"__name__": "lesson"}, [], 0
    for match, _ in find_cells(text):
        printed = run_cell(match["code"], names)
        parts += [text[end:match.start()], f"```python\n{match['code']}```\n"]
        if printed:
            parts.append(f"\n```text\n{printed}```\n")
        if match["picture"]:
            # Without its version, matplotlib writes the same file again if nothing has changed.
            plt.savefig(DOCS / match["picture"], metadata={"Software": None})
            picture = match[0][match[0].rindex("\n!["):]
            parts.append(picture)
        plt.close("all")
        end = match.end()
    return "".join([*parts, text[end:]])

# ----- The notebook ---------------------------------------------------------

def lines(text):
    """A text as a notebook has it: a list of lines, without empty ones around them."""
    return text.strip("\n").splitlines(keepends=True)


def markdown_cell(text):
    return dict(cell_type="markdown", metadata={}, source=lines(text))


def code_cell(match):
    """A code cell with its outputs, from a match of CELL."""
    outputs = []
    if match["printed"]:
        printed = match["printed"].splitlines(keepends=True)
        outputs.append(dict(output_type="stream", name="stdout", text=printed))
    if match["picture"]:
        png = base64.b64encode((DOCS / match["picture"]).read_bytes()).decode()
        outputs.append(dict(output_type="display_data", metadata={}, data={"image/png": png}))
    return dict(cell_type="code", execution_count=None, metadata={}, outputs=outputs,
                source=lines(match["code"]))


def make_notebook(text):
    """The notebook of a lesson whose outputs are up to date: the text of an .ipynb file."""
    cells, end = [], 0
    for match, folded in find_cells(text):
        if folded:
            continue
        cells += [markdown_cell(text[end:match.start()]), code_cell(match)]
        end = match.end()
    cells = [cell for cell in [*cells, markdown_cell(text[end:])] if cell["source"]]
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"
    for i, cell in enumerate([cell for cell in cells if cell["cell_type"] == "code"], start=1):
        cell["execution_count"] = i
    kernel = dict(display_name="Python 3", language="python", name="python3")
    notebook = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"

# ----- The lesson's model ---------------------------------------------------

def shrink(checkpoint):
    """What evaluate.py needs of a checkpoint of train.py, with weights of half precision.

    BatchNorm's statistics stay float32. A variance may be too large for float16.
    """
    small = {key: checkpoint[key] for key in ("model_config", "classes", "mean", "std")}
    names = ("dataset", "data_root", "clip_root", "control")
    small["args"] = {name: checkpoint["args"][name] for name in names}
    small["model"] = {}
    for name, tensor in checkpoint["model"].items():
        weight = tensor.is_floating_point() and "running" not in name
        small["model"][name] = tensor.half() if weight else tensor
    return small


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", help="checkpoint of train.py --image_size 48, for docs/toy48.pt")
    args = p.parse_args(argv)
    if args.ckpt:
        import torch
        from model import load_checkpoint
        torch.save(shrink(load_checkpoint(args.ckpt)), DOCS / "toy48.pt")
    path = DOCS / "walkthrough.md"
    text = run_text(path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
    path.with_suffix(".ipynb").write_text(make_notebook(text), encoding="utf-8")


if __name__ == "__main__":
    main()
