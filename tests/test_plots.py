"""scripts/plots.py draws a run's curves, and tabulates and draws which classes are confused.

python -m pytest -q tests/test_plots.py
"""
import csv
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import plots
from scripts.guards import run_program
from scripts.output import save_predictions

CLASSES = ["Closing", "Opening, then closing", "Opening"]


def write_log(folder, **validation):
    """A log as train.py writes it, with a last row that it has not finished."""
    rows = [dict(kind="train", step=step, loss=2 / step, lr=1e-3 * step) for step in range(1, 9)]
    for step in (4, 8):
        row = dict(kind="eval", step=step, loss=1.5, top1=10.0 * step, top5=12.0 * step)
        rows.append({**row, **validation})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "log.jsonl").write_text(lines + '{"kind": "tra')


def write_npz(path, labels, predicted, classes=CLASSES):
    probabilities = torch.full((len(labels), len(classes)), 0.1)
    probabilities[torch.arange(len(labels)), torch.tensor(predicted)] = 0.8
    ids = [f"clip{i}" for i in range(len(labels))]
    save_predictions(str(path), np.array(ids), np.array(labels), probabilities, classes)
    return str(path)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def size_of(picture):
    with Image.open(picture) as image:
        return image.size


@pytest.fixture
def without_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.colors"):
        monkeypatch.setitem(sys.modules, name, None)        # importing it raises ImportError


# ----- Curves ---------------------------------------------------------------

def test_curves_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_log(tmp_path)
    plots.main(["curves", str(tmp_path)])
    width, height = size_of(tmp_path / "curves.png")
    assert width > 2 * height > 200
    assert capsys.readouterr().out == f"{tmp_path / 'curves.png'}\n"


@pytest.mark.parametrize("validation", (dict(loss=1.0), dict(top1=1.0), dict(top5=1.0)))
def test_the_validations_loss_and_accuracy_are_in_the_picture(tmp_path, validation):
    pytest.importorskip("matplotlib")
    write_log(tmp_path)
    assert plots.draw_curves(tmp_path)
    before = (tmp_path / "curves.png").read_bytes()
    write_log(tmp_path, **validation)
    assert plots.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() != before


def test_curves_before_the_first_validation(tmp_path):
    pytest.importorskip("matplotlib")
    row = dict(kind="train", step=20, loss=2.0, lr=1e-3)
    (tmp_path / "log.jsonl").write_text(json.dumps(row) + "\n")
    assert plots.draw_curves(tmp_path)
    assert size_of(tmp_path / "curves.png")[0] > 100


def test_curves_without_matplotlib(tmp_path, without_matplotlib, capsys):
    write_log(tmp_path)
    assert not plots.draw_curves(tmp_path)
    assert capsys.readouterr().out == ""        # train.py calls it again and again
    plots.main(["curves", str(tmp_path)])
    assert "pip install matplotlib" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


# ----- Confusion ------------------------------------------------------------

def test_per_class_accuracy_and_mistakes(tmp_path):
    labels = [0, 0, 0, 1, 1, 2, 2, 2, 2]
    predicted = [0, 1, 1, 1, 1, 2, 2, 0, 1]
    npz = write_npz(tmp_path / "top.npz", labels, predicted)
    plots.main(["confusion", npz, "--out", str(tmp_path / "a" / "report")])

    rows = read_csv(tmp_path / "a" / "report" / "per_class.csv")
    assert {row["class"]: int(row["clips"]) for row in rows} == dict(zip(CLASSES, (3, 2, 4)))
    for row in rows:
        answers = [p for label, p in zip(labels, predicted) if CLASSES[label] == row["class"]]
        right = sum(CLASSES[p] == row["class"] for p in answers)
        assert float(row["top1"]) == pytest.approx(100 * right / len(answers), abs=0.01)
    accuracy = [float(row["top1"]) for row in rows]
    assert accuracy == sorted(accuracy)         # worst first

    confused = read_csv(tmp_path / "a" / "report" / "confused.csv")
    wrong = [(CLASSES[t], CLASSES[p]) for t, p in zip(labels, predicted) if t != p]
    found = {(row["true class"], row["taken for"]): int(row["clips"]) for row in confused}
    assert found == {pair: wrong.count(pair) for pair in wrong}
    counts = [int(row["clips"]) for row in confused]
    assert counts == sorted(counts, reverse=True)
    assert confused[0] == {"true class": "Closing", "taken for": "Opening, then closing",
                           "clips": "2", "of the true class": "3"}


@pytest.mark.parametrize("classes", (CLASSES, [f"class {i}" for i in range(plots.MANY + 10)]))
def test_the_confusion_matrix_is_drawn(classes, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    npz = write_npz(tmp_path / "top.npz", [0, 1, 2], [0, 1, 1], classes)
    plots.main(["confusion", npz, "--out", str(tmp_path)])
    assert size_of(tmp_path / "confusion.png")[0] > 300
    names = ["per_class.csv", "confused.csv", "confusion.png"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in names]


def test_a_class_without_clips_has_no_accuracy(tmp_path):
    npz = write_npz(tmp_path / "top.npz", [0, 0], [0, 2])
    plots.write_report(npz, tmp_path)
    rows = {row["class"]: row for row in read_csv(tmp_path / "per_class.csv")}
    assert rows["Opening"] == {"class": "Opening", "clips": "0", "top1": ""}


def test_confusion_without_matplotlib(tmp_path, without_matplotlib, capsys):
    npz = write_npz(tmp_path / "top.npz", [0, 1, 2], [0, 1, 1])
    plots.main(["confusion", npz, "--out", str(tmp_path / "report")])
    assert "pip install matplotlib" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert written == {"per_class.csv", "confused.csv"}


# ----- Files that do not fit ------------------------------------------------

def foreign_file(kind, path):
    if kind == "text":
        path.write_text("clip1,Closing,Opening,0.9\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "one array":
        with open(path, "wb") as f:
            np.save(f, np.zeros(3))
    elif kind == "other arrays":
        np.savez(path, x=np.zeros(3))
    elif kind == "other lengths":
        np.savez(path, labels=np.zeros(3, int), probabilities=np.ones((2, 2)), classes=["a", "b"])
    elif kind == "unknown class":
        np.savez(path, labels=np.array([7]), probabilities=np.ones((1, 2)), classes=["a", "b"])
    elif kind == "cut off":
        write_npz(path, [0, 1], [0, 1])
        path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("kind", ("text", "empty", "one array", "other arrays", "other lengths",
                                  "unknown class", "cut off"))
def test_a_foreign_file_is_one_clear_error(kind, tmp_path):
    path = tmp_path / "top.npz"
    foreign_file(kind, path)
    with pytest.raises(ValueError) as error:
        plots.main(["confusion", str(path), "--out", str(tmp_path / "report")])
    expected = f"{path} is not a file that evaluate.py --save FILE.npz writes"
    assert str(error.value) == expected
    assert not (tmp_path / "report").exists()


def test_a_split_without_labels_is_one_clear_error(tmp_path):
    npz = write_npz(tmp_path / "top.npz", [-1, -1], [0, 1])
    with pytest.raises(ValueError, match="holds clips without a label, expected"):
        plots.write_report(npz, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("command", ("curves", "confusion"))
def test_a_missing_file_is_one_line(command, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "argv", ["plots.py", command, str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="^plots.py: .*nothing"):
        run_program(plots.main)
