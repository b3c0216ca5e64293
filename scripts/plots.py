"""Draw the course of a run, and which classes a model confuses.

    python scripts/plots.py curves out/ssv1                     # -> out/ssv1/curves.png

    python evaluate.py --ckpt out/ssv1/best.pt --save top.npz
    python scripts/plots.py confusion top.npz --out report

curves     loss, learning rate and validation accuracy, from the log of train.py. You can call it
           while the run goes on.
confusion  per_class.csv, the accuracy of each class; confused.csv, the most frequent mistakes; and
           confusion.png, the whole matrix. Without matplotlib it only writes the two tables.
"""
import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import run_command

BLUE, ORANGE = "#0072B2", "#D55E00"             # colours that colour-blind readers tell apart
MANY = 30                                       # with more classes, cells are too small for numbers

def new_figure(width, height):
    try:
        from matplotlib.figure import Figure    # optional: only pictures need it
    except ImportError as e:
        raise ValueError("the picture needs matplotlib: pip install matplotlib") from e
    return Figure(figsize=(width, height), layout="constrained", dpi=100)

# ----- The curves of a run --------------------------------------------------

def read_log(out_dir):
    """The rows of a run's log: those of training steps, and those of validations."""
    rows = []
    with open(Path(out_dir, "log.jsonl")) as log:
        for line in log:
            if line.endswith("\n"):             # train.py may be writing the last line
                rows.append(json.loads(line))
    training = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "eval"]
    return training, validation

def draw_curves(out_dir):
    """Draw curves.png in the folder of a run. Returns its path.

    The training loss is the one that is minimised, with label smoothing and mixing. The validation
    loss is plain cross-entropy.
    """
    training, validation = read_log(out_dir)
    figure = new_figure(8.3, 2.8)
    loss, rate, accuracy = figure.subplots(1, 3)
    draw_curve(loss, training, "loss", BLUE, "training")
    draw_curve(loss, validation, "loss", ORANGE, "validation")
    draw_curve(rate, training, "lr", BLUE, "learning rate")
    draw_curve(accuracy, validation, "top1", BLUE, "top-1")
    draw_curve(accuracy, validation, "top5", ORANGE, "top-5")
    accuracy.set_ylim(0, 102)
    titles = {loss: "loss", rate: "learning rate", accuracy: "validation accuracy, %"}
    for axis, title in titles.items():
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    if validation:
        loss.legend(frameon=False)
        accuracy.legend(frameon=False, loc="lower right")
    path = Path(out_dir, "curves.png")
    figure.savefig(path)
    return path

def draw_curve(axis, rows, key, color, label):
    """One value of the log against the step. Validations are few, so they have markers."""
    marker = "o" if len(rows) > 0 and rows[0]["kind"] == "eval" else None
    steps = [row["step"] for row in rows]
    values = [row[key] for row in rows]
    axis.plot(steps, values, color=color, label=label, marker=marker, markersize=4)

# ----- The confusion report -------------------------------------------------

def read_confusion(path):
    """How often each true class (row) was taken for each class (column), and the class names.

    path: a .npz file of evaluate.py. ValueError if it is another file, or has no labels.
    """
    try:
        with np.load(path) as file:
            labels, predicted = file["labels"], file["probabilities"].argmax(1)
            classes = file["classes"].tolist()
    except OSError:                             # such as a path that does not exist
        raise
    except Exception as e:                      # NumPy and zipfile raise many kinds
        raise ValueError(f"{path} is not a file that evaluate.py --save FILE.npz writes") from e
    if labels.min() < 0:
        raise ValueError(f"{path} holds clips without a label, expected those of a split with "
                         "labels: evaluate.py --split validation")
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    return confusion, classes

def write_per_class(path, confusion, classes):
    """A table with the accuracy of each class, the worst first."""
    clips = confusion.sum(1)
    accuracy = 100 * confusion.diagonal() / np.maximum(clips, 1)
    with open(path, "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["class", "clips", "top1"])
        for i in np.argsort(accuracy, kind="stable"):
            table.writerow([classes[i], clips[i], f"{accuracy[i]:.2f}" if clips[i] > 0 else ""])

def write_confused(path, confusion, classes, most=50):
    """A table with the most frequent mistakes, the most frequent first."""
    mistakes = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-mistakes, axis=None, kind="stable")[:most]
    with open(path, "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["true class", "taken for", "clips", "of the true class"])
        for i, j in zip(*np.unravel_index(order, mistakes.shape)):
            if mistakes[i, j] > 0:
                table.writerow([classes[i], classes[j], mistakes[i, j], confusion[i].sum()])

def draw_confusion(path, confusion, classes):
    """The matrix as a picture. Each row shares out the clips of a true class."""
    n = len(classes)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = n * 0.12 if n > MANY else max(3, n * 0.42)               # inches
    figure = new_figure(side + 8, side + 6)
    axis = figure.subplots()
    # The square root, so that single mistakes stay visible.
    image = axis.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    if n > MANY:                                # columns have numbers, and rows names and numbers
        names = [f"{name}  {i}" for i, name in enumerate(classes)]
        axis.set_yticks(range(n), names, fontsize=6.5)
        axis.set_xticks(range(n), range(n), fontsize=6.5, rotation=90)
        axis.tick_params(labeltop=True)
        bar = figure.colorbar(image, shrink=3.5 / side, label="share of the true class's clips")
        bar.set_ticks(np.sqrt([0, 0.05, 0.2, 0.5, 1]), labels=["0", "0.05", "0.2", "0.5", "1"])
    else:                                       # cells have numbers
        axis.set_yticks(range(n), classes)
        axis.set_xticks(range(n), classes, rotation=90)
        for i, j in zip(*share.nonzero()):
            axis.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=8,
                      color="white" if share[i, j] > 0.4 else "black")
        axis.set_title("% of the true class's clips", loc="left", fontsize=10)
    figure.savefig(path, bbox_inches="tight")

def write_report(path, folder):
    """Write the tables and the picture of a .npz file into a folder, and print their paths."""
    confusion, classes = read_confusion(path)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (("per_class.csv", write_per_class), ("confused.csv", write_confused),
                        ("confusion.png", draw_confusion)):
        write(folder / name, confusion, classes)
        print(folder / name)

# ----- The command ----------------------------------------------------------

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    curves = commands.add_parser("curves", help="draw the curves of a run")
    curves.add_argument("out_dir", help="--out_dir of train.py")
    confusion = commands.add_parser("confusion", help="accuracy by class, and what is confused")
    confusion.add_argument("npz", help="file that evaluate.py --save FILE.npz has written")
    confusion.add_argument("--out", default="report", metavar="DIR", help="folder for the report")
    args = p.parse_args(argv)
    if args.command == "curves":
        print(draw_curves(args.out_dir))
    else:
        write_report(args.npz, args.out)

if __name__ == "__main__":
    run_command(main)
