"""evaluate.py: every clip counted once on any number of processes, views averaged, files written, clear refusals.

    python -m pytest -q tests/test_evaluate.py
"""
import csv
import re
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import data
import evaluate
from conftest import ROOT, run_two_ranks
from model import build_model

CLASSES = ["Closing something", "Moving something, then dropping it", "Opening something"]
LAST_LINE = re.compile(r"top1 (\d+\.\d\d) top5 (\d+\.\d\d) clips (\d+) views (\d+x\d+x\d+)")


def write_clips(root, classes=CLASSES, validation=7):
    """Noise in Something-Something V1's layout: labels 0 1 2 0 1 2 0; two clips more in the test split, which has no labels."""
    rng = np.random.default_rng(0)
    root.mkdir()
    name = "something-something-v1-"
    (root / f"{name}labels.csv").write_text("".join(c + "\n" for c in classes))
    (root / f"{name}validation.csv").write_text("".join(f"{i + 1};{classes[i % len(classes)]}\n" for i in range(validation)))
    (root / f"{name}test.csv").write_text("".join(f"{validation + i + 1}\n" for i in range(2)))
    for i in range(validation + 2):
        folder = root / "20bn-something-something-v1" / str(i + 1)
        folder.mkdir(parents=True)
        colour = rng.integers(0, 200, 3)                # clips differ, so that predictions do
        for t in range(5 + i % 3):
            Image.fromarray((colour + rng.integers(0, 56, (16, 24, 3))).astype(np.uint8)).save(folder / f"{t + 1:05d}.png")
    return root


def write_checkpoint(path, root, classes=CLASSES, **changes):
    """What train.py saves, of a model with random weights and a head that spreads its answers."""
    torch.manual_seed(3)
    model = build_model("tiny", dim=32, depth=2, heads=2, num_frames=4, image_size=16, patch_size=8, num_classes=len(classes))
    with torch.no_grad():
        model.head.weight.mul_(100)
    torch.save(dict(dict(model=model.state_dict(), model_config=asdict(model.config), classes=sorted(classes), mean=list(data.CLIP_MEAN),
                         std=list(data.CLIP_STD), args=dict(dataset="ssv1", data_root=str(root), control="none")), **changes), path)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("evaluate") / "clips")


@pytest.fixture(scope="module")
def ckpt(clips):
    return write_checkpoint(clips.parent / "best.pt", clips)


def run(ckpt, *flags):
    evaluate.main(["--ckpt", str(ckpt), "--device", "cpu", "--workers", "0", *map(str, flags)])


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


# ----- views and counts -----


class KnownLogits(nn.Module):
    """The logits of a view are looked up by its pixels' value: table[value]."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.tensor(table)

    def forward(self, video):
        return self.table[video[:, 0, 0, 0, 0].round().long()]


def test_softmax_is_averaged_over_the_views():
    table = [[0.0, 4.0, 0.0], [3.0, 0.0, 0.0], [3.0, 0.0, 1.0]]
    views = torch.tensor([[0, 1, 2], [2, 2, 2]], dtype=torch.uint8).view(2, 3, 1, 1, 1, 1).expand(2, 3, 3, 4, 8, 8)
    scale = dict(mean=(0, 0, 0), std=(1 / 255,) * 3)    # normalisation that leaves 0, 1, 2
    got = evaluate.predict(KnownLogits(table), views, torch.device("cpu"), **scale)
    probability = torch.tensor(table).softmax(-1)
    assert torch.allclose(got, torch.stack([probability.mean(0), probability[2]]), atol=1e-6)
    assert not torch.allclose(got[0], torch.tensor(table).mean(0).softmax(-1), atol=1e-2)      # which logits would give
    one = evaluate.predict(KnownLogits(table), views[:, 0], torch.device("cpu"), **scale)      # (B, 3, F, S, S): a single view
    assert torch.allclose(one, probability[[0, 2]], atol=1e-6)


class Answers(torch.utils.data.Dataset):
    """A data set whose clip i makes KnownLogits give row i of its table."""

    def __init__(self, labels, classes, skipped=0):
        self.labels, self.classes, self.skipped = labels, ["?"] * classes, skipped

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.full((3, 4, 8, 8), index, dtype=torch.uint8), self.labels[index], index


def test_top1_and_top5_by_hand():
    logits = [[9, 8, 7, 6, 5, 4, 3.0]] * 4               # top-5 are classes 0 to 4
    scale = dict(mean=(0, 0, 0), std=(1 / 255,) * 3)
    result = evaluate.evaluate(KnownLogits(logits), Answers([0, 4, 5, 0], 7), torch.device("cpu"), batch_size=3, **scale)
    assert (result["top1"], result["top5"], result["clips"]) == (50, 75, 4)
    assert [row[:3] for row in result["rows"]] == [(i, label, [0, 1, 2, 3, 4]) for i, label in enumerate([0, 4, 5, 0])]
    # skipped clips are wrong ones, and three classes have no five
    result = evaluate.evaluate(KnownLogits([[1.0, 2, 3]] * 3), Answers([2, 2, 0], 3, skipped=1), torch.device("cpu"), **scale)
    assert (result["top1"], result["top5"], result["clips"]) == (50, 75, 4) and result["rows"][0][2] == [2, 1, 0]


def test_the_last_line_and_what_is_saved(ckpt, tmp_path, capsys):
    run(ckpt, "--save", tmp_path / "new" / "top5.csv", "--report", tmp_path / "report")
    *_, last = printed = capsys.readouterr().out.splitlines()
    top1, top5, n, views = LAST_LINE.fullmatch(last).groups()
    assert (top5, n, views) == ("100.00", "7", "4x3x1")
    assert "4 frames x 3 crops x 1 clips" in printed[-2] and "STD-Former (paper" not in "".join(printed)    # 3 classes are not the paper's 174

    rows = read_csv(tmp_path / "new" / "top5.csv")
    assert [r["id"] for r in rows] == list("1234567") and [r["label"] for r in rows] == [CLASSES[i % 3] for i in range(7)]
    assert list(rows[0]) == ["id", "label", "top1", "probability1", "top2", "probability2", "top3", "probability3"]
    assert top1 == f"{100 * sum(r['label'] == r['top1'] for r in rows) / 7:.2f}"
    assert len({r["top1"] for r in rows}) > 1           # else this test would see little
    for r in rows:
        p = [float(r[f"probability{k}"]) for k in (1, 2, 3)]
        assert p == sorted(p, reverse=True) and sum(p) == pytest.approx(1, abs=1e-4)
        assert {r["top1"], r["top2"], r["top3"]} == set(CLASSES)

    report = {r["class"]: r for r in read_csv(tmp_path / "report" / "per_class.csv")}
    assert {c: int(r["clips"]) for c, r in report.items()} == dict(zip(CLASSES, (3, 2, 2)))
    for c, r in report.items():
        mine = [row for row in rows if row["label"] == c]
        assert float(r["top1"]) == pytest.approx(100 * sum(row["top1"] == c for row in mine) / len(mine), abs=0.01)
    accuracy = [float(r["top1"]) for r in report.values()]
    assert accuracy == sorted(accuracy)                 # worst first
    confused = read_csv(tmp_path / "report" / "confused.csv")
    wrong = [(r["label"], r["top1"]) for r in rows if r["label"] != r["top1"]]
    assert {(r["true class"], r["taken for"]): int(r["clips"]) for r in confused} == {pair: wrong.count(pair) for pair in wrong}
    assert [int(r["clips"]) for r in confused] == sorted((int(r["clips"]) for r in confused), reverse=True)


def test_the_confusion_matrix_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    evaluate.write_report(tmp_path, [(0, 0, [0, 1], [0.9, 0.1]), (1, 1, [0, 1], [0.6, 0.4])], ["Opening, then closing", "Closing"])
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.width > 300
    assert read_csv(tmp_path / "confused.csv") == [{"true class": "Closing", "taken for": "Opening, then closing", "clips": "1", "of the true class": "1"}]


def test_views_and_control_follow_flags_and_checkpoint(ckpt, clips, tmp_path, capsys):
    run(ckpt, "--crops", 1, "--clips", 2)
    assert LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])[4] == "4x1x2"
    control = write_checkpoint(tmp_path / "single.pt", clips, args=dict(dataset="ssv1", data_root=str(clips), control="single"))
    run(control)
    assert "control: single" in capsys.readouterr().out
    run(control, "--control", "none", "--save", tmp_path / "a.csv")
    run(ckpt, "--save", tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()


def test_normalisation_comes_from_the_checkpoint(ckpt, clips, tmp_path):
    run(ckpt, "--save", tmp_path / "clip.csv")
    run(write_checkpoint(tmp_path / "other.pt", clips, mean=[0.5] * 3, std=[0.1] * 3), "--save", tmp_path / "other.csv")
    assert (tmp_path / "clip.csv").read_text() != (tmp_path / "other.csv").read_text()


def test_seven_clips_on_two_ranks_are_seven(ckpt, tmp_path, capsys):
    run(ckpt, "--save", tmp_path / "one.csv")
    last = capsys.readouterr().out.splitlines()[-1]
    printed = run_two_ranks("evaluate.py", "--ckpt", ckpt, "--device", "cpu", "--workers", "0", "--save", tmp_path / "two.csv")
    assert printed[0].splitlines()[-1] == last and "clips 7 " in last and "top1" not in printed[1]
    one, two = read_csv(tmp_path / "one.csv"), read_csv(tmp_path / "two.csv")
    for a, b in zip(one, two, strict=True):             # other batches, so sums in another order
        assert {k: v for k, v in a.items() if "prob" not in k} == {k: v for k, v in b.items() if "prob" not in k}
        assert all(float(a[k]) == pytest.approx(float(b[k]), abs=2e-5) for k in a if "prob" in k)


def test_more_ranks_than_clips_still_count_each_once(clips, ckpt):
    # A rank without clips must not fail; the sum over ranks is what evaluate() reduces.
    dataset = data.VideoDataset("ssv1", clips, "validation", num_frames=4, size=16)
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    with pytest.MonkeyPatch.context() as patch:
        reduced = []
        patch.setattr(evaluate, "dist", SimpleNamespace(all_reduce=lambda t: reduced.append(t.clone()) or t.copy_(torch.tensor([2, 7, 7])),
                                                        gather_object=lambda rows, all_rows: None))
        result = evaluate.evaluate(model, dataset, torch.device("cpu"), rank=8, world=9)
    assert reduced[0].tolist() == [0, 0, 0] and result["clips"] == 7 and result["rows"] == []


def test_clips_on_the_skip_list_count_as_wrong(ckpt, tmp_path, capsys):
    run(ckpt, "--save", tmp_path / "all.csv")
    capsys.readouterr()
    rows = read_csv(tmp_path / "all.csv")
    right = [r["id"] for r in rows if r["label"] == r["top1"]]
    assert right
    (tmp_path / "skip.txt").write_text(f"{right[0]}  # broken\n99\n")
    run(ckpt, "--skip_list", tmp_path / "skip.txt", "--save", tmp_path / "six.csv")
    printed = capsys.readouterr().out
    top1, _, n, _ = LAST_LINE.fullmatch(printed.splitlines()[-1]).groups()
    assert n == "7" and top1 == f"{100 * (len(right) - 1) / 7:.2f}" and "1 clips of the skip list count as wrong" in printed
    assert [r["id"] for r in read_csv(tmp_path / "six.csv")] == [r["id"] for r in rows if r["id"] != right[0]]


def test_a_split_without_labels_gives_predictions_only(ckpt, tmp_path, capsys):
    run(ckpt, "--split", "test", "--save", tmp_path / "test.csv")
    printed = capsys.readouterr().out
    assert "2 predictions, no accuracy" in printed and not re.search(r"^top1", printed, re.M)
    rows = read_csv(tmp_path / "test.csv")
    assert [(r["id"], r["label"]) for r in rows] == [("8", ""), ("9", "")] and all(r["top1"] in CLASSES for r in rows)


def test_the_papers_row_stands_above_ours_for_its_classes(tmp_path, capsys):
    classes = [f"Doing number {i:03d}" for i in range(174)]
    root = write_clips(tmp_path / "clips", classes, validation=2)
    run(write_checkpoint(tmp_path / "best.pt", root, classes))
    *_, paper, ours = capsys.readouterr().out.splitlines()
    assert "paper" in paper and "top1 57.30 top5 84.40 clips 11522 views 16x3x1" in paper and LAST_LINE.fullmatch(ours)


# ----- one clip -----


def test_video_prints_what_the_dataset_path_predicts(ckpt, clips, tmp_path, capsys):
    run(ckpt, "--save", tmp_path / "all.csv")
    capsys.readouterr()
    paths = [str(clips / "20bn-something-something-v1" / i) for i in "25"]
    run(ckpt, "--video", *paths)
    printed = capsys.readouterr().out.splitlines()
    rows = read_csv(tmp_path / "all.csv")
    for k, number in enumerate((1, 4)):
        path, *lines = printed[4 * k:4 * k + 4]
        assert path == paths[k] and len(lines) == 3
        for line, place in zip(lines, "123"):
            percent, text = re.fullmatch(r" +(\d+\.\d\d) %  (.+)", line).groups()
            assert text == rows[number][f"top{place}"]
            assert float(percent) == pytest.approx(100 * float(rows[number][f"probability{place}"]), abs=0.011)


def test_video_reads_files_too(ckpt, capsys):
    pytest.importorskip("decord")
    run(ckpt, "--video", Path(__file__).parent / "clip.webm", "--crops", 1)
    assert len(capsys.readouterr().out.splitlines()) == 4


# ----- refusals -----


def test_other_classes_are_refused(ckpt, tmp_path):
    other = write_clips(tmp_path / "other", ["Opening something", "Closing something", "Waving something"])
    with pytest.raises(ValueError, match="Waving something.*Moving something, then dropping it"):
        run(ckpt, "--data_root", other)


@pytest.mark.parametrize("kind", ["missing", "state dict", "empty", "text", "pickle", "folder"])
def test_a_foreign_checkpoint_is_one_clear_error(tmp_path, monkeypatch, kind):
    path = tmp_path / "best.pt"
    if kind == "state dict":
        torch.save(dict(weight=torch.zeros(2)), path)
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")        # what a clone without Git LFS leaves
    elif kind == "pickle":
        torch.save(SimpleNamespace(model=1), path)      # arbitrary objects are never unpickled
    elif kind == "folder":
        path.mkdir()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--ckpt", str(path), "--device", "cpu"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    text = str(e.value)
    assert text.startswith("evaluate.py: ") and str(path) in text and "checkpoint" in text and "\n" not in text, text


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), "CUDA out of memory. Tried to allocate 2.00 GiB. Try --checkpointing"),
    (ImportError("No module named 'open_clip'"), "No module named 'open_clip'"),
    (data.ClipError("clip 7: broken"), "clip 7: broken"),
], ids=lambda v: type(v).__name__)
def test_what_a_person_can_mend_is_one_line(error, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as e:
        evaluate.run_program("evaluate.py", main)
    assert str(e.value).startswith(f"evaluate.py: {words}") and "\n" not in str(e.value)


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        evaluate.run_program("evaluate.py", lambda: (_ for _ in ()).throw(RuntimeError("shapes")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
def test_a_gpu_gives_the_same_answers(ckpt, tmp_path, precision):
    run(ckpt, "--save", tmp_path / "cpu.csv")
    run(ckpt, "--save", tmp_path / "gpu.csv", "--device", "cuda", "--precision", precision)
    for a, b in zip(read_csv(tmp_path / "cpu.csv"), read_csv(tmp_path / "gpu.csv"), strict=True):
        assert float(a["probability1"]) == pytest.approx(float(b["probability1"]), abs=1e-3 if precision == "fp32" else 0.1)


def test_a_broken_clip_is_one_clear_error(ckpt, tmp_path, monkeypatch):
    root = write_clips(tmp_path / "clips")
    for frame in (root / "20bn-something-something-v1" / "3").iterdir():
        frame.unlink()
    for workers in ("0", "1"):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--ckpt", str(ckpt), "--data_root", str(root), "--device", "cpu", "--workers", workers])
        try:
            runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
            text = "it went through"
        except SystemExit as e:
            text = str(e)
            e.__context__.with_traceback(None)          # it keeps the loader alive, whose worker then takes 5 s to end
        assert "clip 3:" in text and str(root) in text and "\n" not in text and "Traceback" not in text, text
