"""scripts/plots.py draws a run's curves, and counts and draws which classes are confused.

python -m pytest -q tests/test_plots.py
"""
import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

from scripts import plots

CLASSES = ["Closing", "Opening, then closing", "Opening"]

def write_npz(path, labels, predicted, classes=CLASSES):
    """The file of evaluate.py --save."""
    probabilities = np.full((len(labels), len(classes)), 0.1, np.float32)
    probabilities[np.arange(len(labels)), predicted] = 0.8
    ids = [f"clip{i}" for i in range(len(labels))]
    np.savez(path, ids=ids, labels=labels, probabilities=probabilities, classes=classes)
    return str(path)

def read_csv(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))

def test_curves_of_a_run_that_is_going_on(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [dict(kind="train", step=step, loss=2 / step, lr=1e-3 * step) for step in (1, 2, 3)]
    rows.append(dict(kind="eval", step=3, loss=1.5, top1=40.0, top5=90.0))
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "log.jsonl").write_text(lines + '{"kind": "tra')
    training, validation = plots.read_log(tmp_path)
    assert training + validation == rows
    plots.main(["curves", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'curves.png'}\n"
    with Image.open(tmp_path / "curves.png") as picture:
        with_validation = np.asarray(picture.convert("L"))
    (tmp_path / "log.jsonl").write_text(json.dumps(rows[0]) + "\n")     # before the first one
    plots.main(["curves", str(tmp_path)])
    with Image.open(tmp_path / "curves.png") as picture:
        assert (np.asarray(picture.convert("L")) != with_validation).any()

def test_accuracy_by_class_and_mistakes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    labels = [0, 0, 0, 1, 1, 1, 1]                      # no clip is of class 2
    predicted = [0, 1, 1, 1, 1, 1, 2]
    npz = write_npz(tmp_path / "top.npz", labels, predicted)
    report = tmp_path / "a" / "report"
    plots.main(["confusion", npz, "--out", str(report)])
    names = ["per_class.csv", "confused.csv", "confusion.png"]
    assert capsys.readouterr().out.splitlines() == [str(report / name) for name in names]

    rows = {row["class"]: row for row in read_csv(report / "per_class.csv")}
    found = [(rows[name]["clips"], rows[name]["top1"]) for name in CLASSES]
    assert found == [("3", "33.33"), ("4", "75.00"), ("0", "")]
    rows = [tuple(row.values()) for row in read_csv(report / "confused.csv")]
    assert rows == [("Closing", "Opening, then closing", "2", "3"),
                    ("Opening, then closing", "Opening", "1", "4")]

def test_a_matrix_of_many_classes(tmp_path):
    pytest.importorskip("matplotlib")
    classes = [f"class {i}" for i in range(plots.MANY + 10)]
    plots.write_report(write_npz(tmp_path / "top.npz", [0, 1, 2], [0, 1, 1], classes), tmp_path)
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300

def test_without_matplotlib_only_the_tables(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)     # its import raises ImportError
    npz = write_npz(tmp_path / "top.npz", [0, 1, 2], [0, 1, 1])
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plots.main(["confusion", npz, "--out", str(tmp_path / "report")])
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == {"per_class.csv", "confused.csv"}

@pytest.mark.parametrize("kind", ("text", "other arrays", "cut off"))
def test_another_file_is_named(kind, tmp_path):
    path = tmp_path / "top.npz"
    if kind == "text":
        path.write_text("clip1,Closing,Opening,0.9\n")
    elif kind == "other arrays":
        np.savez(path, x=np.zeros(3))
    else:
        write_npz(path, [0, 1], [0, 1])
        path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="top.npz is not a file that evaluate.py --save"):
        plots.main(["confusion", str(path), "--out", str(tmp_path / "report")])

def test_a_split_without_labels_is_refused(tmp_path):
    npz = write_npz(tmp_path / "top.npz", [-1, -1], [0, 1])
    with pytest.raises(ValueError, match="top.npz holds clips without a label"):
        plots.write_report(npz, tmp_path / "report")
