"""Draw the course of a training run, and which classes a model confuses.

    python scripts/plots.py curves out/ssv1             # train.py does this after each validation

    python evaluate.py --ckpt out/ssv1/best.pt --save top.npz
    python scripts/plots.py confusion top.npz --out report

Pictures need matplotlib. Without it, the confusion report has its two tables only.
"""
import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts.guards import run_program

BLUE, ORANGE = "#0072B2", "#D55E00"             # colours that colour-blind readers tell apart
MANY = 30                                       # with more classes, columns have numbers for names

# ----- The curves of a run --------------------------------------------------

def draw_curves(out_dir):
    """Draw loss, learning rate and validation accuracy: log.jsonl -> curves.png, both in out_dir.

    The training loss is the one that is minimised, with label smoothing. The validation loss is
    plain cross-entropy. Without matplotlib this does nothing. Returns whether it has drawn.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lines = Path(out_dir, "log.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]      # the last may be open
    training = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "eval"]

    figure = Figure(figsize=(10, 3), layout="constrained", dpi=100)
    loss, rate, accuracy = figure.subplots(1, 3)
    draw_curve(loss, training, "loss", BLUE, "training")
    draw_curve(loss, validation, "loss", ORANGE, "validation")
    draw_curve(rate, training, "lr", BLUE)
    draw_curve(accuracy, validation, "top1", BLUE, "top-1")
    draw_curve(accuracy, validation, "top5", ORANGE, "top-5")
    titles = {loss: "loss", rate: "learning rate", accuracy: "validation accuracy, %"}
    for axis, title in titles.items():
        axis.set_title(title, fontsize=11.5, loc="left")
        axis.set_xlabel("step", fontsize=9)
        axis.set_xlim(left=0)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    if validation:
        loss.legend(fontsize=9, frameon=False, loc="upper right")
        accuracy.legend(fontsize=9, frameon=False, loc="lower right")
    figure.savefig(Path(out_dir, "curves.png"))
    return True


def draw_curve(axis, rows, key, colour, label=None):
    """One value of the log against the step. Validations are few, so they have markers."""
    marker = "o" if rows and rows[0]["kind"] == "eval" else None
    steps, values = [row["step"] for row in rows], [row[key] for row in rows]
    axis.plot(steps, values, color=colour, label=label, lw=1.5, marker=marker, ms=4)


# ----- The confusion report -------------------------------------------------

def read_predictions(path):
    """True labels (clips,), predicted classes (clips,) and class names of evaluate.py's .npz.

    ValueError if the file is not of evaluate.py, or if the split has no labels.
    """
    try:
        with np.load(path) as file:
            labels, probabilities, classes = file["labels"], file["probabilities"], file["classes"]
        assert probabilities.shape == (len(labels), len(classes))
        assert labels.max() < len(classes)
    except OSError:                             # such as a path that does not exist
        raise
    except Exception as e:                      # NumPy and zipfile have many kinds
        raise ValueError(f"{path} is not a file that evaluate.py --save FILE.npz writes") from e
    if labels.min() < 0:
        raise ValueError(f"{path} holds clips without a label, expected those of a split with "
                         "labels: evaluate.py --split validation")
    return labels, probabilities.argmax(1), classes.tolist()


def count_confusion(labels, predicted, classes):
    """How often each true class (row) was taken for each class (column): (classes, classes)"""
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    return confusion


def write_per_class(path, confusion, classes):
    """A CSV with the accuracy of each class, the worst first."""
    clips, right = confusion.sum(1), confusion.diagonal()
    accuracy = 100 * right / np.maximum(clips, 1)
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(["class", "clips", "top1"])
        for i in np.argsort(accuracy, kind="stable"):
            out.writerow([classes[i], clips[i], f"{accuracy[i]:.2f}" if clips[i] else ""])


def write_confused(path, confusion, classes, most=50):
    """A CSV with the most frequent mistakes, the most frequent first."""
    clips = confusion.sum(1)
    mistakes = confusion - np.diag(confusion.diagonal())
    order = np.argsort(-mistakes, axis=None, kind="stable")[:most]
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(["true class", "taken for", "clips", "of the true class"])
        for i, j in zip(*np.unravel_index(order, mistakes.shape)):
            if mistakes[i, j]:
                out.writerow([classes[i], classes[j], mistakes[i, j], clips[i]])


def draw_confusion(path, confusion, classes):
    """The matrix as a picture: each row shares out the clips of a true class. Needs matplotlib."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    n, many = len(classes), len(classes) > MANY
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = max(3, n * (0.118 if many else 0.42))                    # inches
    width, height = (side + 7, side + 1.5) if many else (side + 4.5, side + 3.6)
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130 if many else 100)
    axis = figure.subplots()
    roots = PowerNorm(0.5, vmin=0, vmax=1)                          # single mistakes stay visible
    picture = axis.imshow(share, cmap="Blues", norm=roots)
    if many:
        label_with_numbers(axis, classes)
    else:
        label_with_names(axis, classes, share)
    axis.set_xlabel("predicted class" + (", by its number" if many else ""), fontsize=10)
    axis.set_ylabel("true class", fontsize=10)
    unit = "" if many else ", % of the true class's clips"
    axis.set_title("Which class is taken for which" + unit, fontsize=11.5, loc="left")
    bar = figure.colorbar(picture, shrink=min(1, 3.5 / side), aspect=15, pad=0.01,
                          ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.set_label("share of the true class's clips", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(path, bbox_inches="tight")


def label_with_names(axis, classes, share):
    """Few classes: names on both sides, and a number in each cell."""
    n = len(classes)
    axis.set_yticks(range(n), classes, fontsize=9)
    axis.set_xticks(range(n), classes, fontsize=9, rotation=90)
    axis.tick_params(length=2)
    for i, j in zip(*share.nonzero()):
        colour = "white" if share[i, j] > 0.4 else "#222222"
        axis.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=8,
                  color=colour)


def label_with_numbers(axis, classes):
    """Many classes: names and numbers of rows, numbers of columns, and a line after every five."""
    n, fives = len(classes), np.arange(4.5, len(classes), 5)
    names = [f"{name}  {i}" for i, name in enumerate(classes)]
    axis.set_yticks(range(n), names, fontsize=6.5)
    axis.set_xticks(range(n), range(n), fontsize=6.5, rotation=90)
    axis.tick_params(length=2, labeltop=True)
    axis.set_yticks(fives, minor=True)
    axis.set_xticks(fives, minor=True)
    axis.tick_params(which="minor", length=0)
    axis.grid(which="minor", color="#DDDDDD", lw=0.6)
    axis.secondary_yaxis("right").set_yticks(range(n), range(n), fontsize=6.5)


def write_report(path, folder):
    """per_class.csv, confused.csv and confusion.png of a .npz file. Returns the names written."""
    labels, predicted, classes = read_predictions(path)
    confusion = count_confusion(labels, predicted, classes)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_per_class(folder / "per_class.csv", confusion, classes)
    write_confused(folder / "confused.csv", confusion, classes)
    try:
        draw_confusion(folder / "confusion.png", confusion, classes)
    except ImportError:
        return ["per_class.csv", "confused.csv"]
    return ["per_class.csv", "confused.csv", "confusion.png"]


# ----- The command ----------------------------------------------------------

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    curves = commands.add_parser("curves", help="OUT_DIR/log.jsonl -> OUT_DIR/curves.png")
    curves.add_argument("out_dir", help="folder of a run of train.py")
    confusion = commands.add_parser("confusion", help="accuracy by class, and what is confused")
    confusion.add_argument("npz", help="file that evaluate.py --save FILE.npz has written")
    confusion.add_argument("--out", default="report", metavar="DIR",
                           help="folder for the report (default: %(default)s)")
    args = p.parse_args(argv)
    if args.command == "curves":
        folder, written = args.out_dir, ["curves.png"] if draw_curves(args.out_dir) else []
    else:
        folder, written = args.out, write_report(args.npz, args.out)
    for name in written:
        print(Path(folder, name))
    if not written or not written[-1].endswith(".png"):
        print("There is no picture, since matplotlib is not installed: pip install matplotlib")


if __name__ == "__main__":
    run_program(main)
