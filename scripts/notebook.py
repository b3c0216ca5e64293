"""For authors of the lesson: make docs/walkthrough.ipynb from docs/walkthrough.md.

    python scripts/notebook.py                          # after each change of the text
    python scripts/notebook.py --run                    # after a change of code; needs matplotlib

The text is the source, so change the text, never the notebook. Each block of Python becomes a cell.
A block "text" and a picture below it are what the cell prints and draws. The notebook leaves them
out, as its readers run the cells themselves; --run renews them. Python inside <details> is an
answer: it stays text in the notebook.
"""
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
                  r"(?P<drawn>\n!\[[^\]]*\]\((?P<picture>[\w.]+)\)\n)?", re.MULTILINE | re.DOTALL)

def make_notebook(text):
    """The lesson as a notebook without outputs: the text of an .ipynb file."""
    cells = []

    def add(kind, source, **more):
        if source.strip():
            lines = source.strip("\n").splitlines(keepends=True)
            cells.append(dict(cell_type=kind, metadata={}, source=lines, **more))

    end = 0
    for match in CELL.finditer(text):
        before = text[:match.start()]
        if before.count("<details>") == before.count("</details>"):
            add("markdown", text[end:match.start()])
            add("code", match["code"], execution_count=None, outputs=[])
            end = match.end()
    add("markdown", text[end:])
    kernel = dict(display_name="Python 3", language="python", name="python3")
    notebook = dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=4)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"

def run(text):
    """Run all cells and write their pictures to docs/. Returns the text with what they print."""
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    os.chdir(DOCS)
    names = {"__name__": "lesson"}              # the global variables of all cells

    def run_cell(match):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(match["code"], names)
        block = f"```python\n{match['code']}```\n"
        if printed.getvalue():
            block += f"\n```text\n{printed.getvalue()}```\n"
        if match["picture"]:
            # Without its version, matplotlib writes the same file again if nothing has changed.
            plt.savefig(DOCS / match["picture"], metadata={"Software": None})
            block += match["drawn"]
        plt.close("all")
        return block

    return CELL.sub(run_cell, text)

def main():
    path = DOCS / "walkthrough.md"
    text = path.read_text(encoding="utf-8")
    if "--run" in sys.argv:
        text = run(text)
        path.write_text(text, encoding="utf-8")
    path.with_suffix(".ipynb").write_text(make_notebook(text), encoding="utf-8")

if __name__ == "__main__":
    main()
