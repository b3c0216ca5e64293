"""evaluate.py: every clip counted once on any number of processes, views averaged, files written,
clear refusals.

    python -m pytest -q tests/test_evaluate.py
"""

import csv
import os
import re
import runpy
import shutil
import subprocess
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
from conftest import ROOT, SMALL_MODEL, run_two_ranks
from model import build_model
from scripts import guards, output

CLASSES = ["Closing something", "Moving something, then dropping it", "Opening something"]
LAST_LINE = re.compile(r"top1 (\d+\.\d\d) top5 (\d+\.\d\d) clips (\d+) views (\d+x\d+x\d+)")


def write_clips(root, classes=CLASSES, validation=7):
    """Noise in Something-Something V1's layout: labels 0 1 2 0 1 2 0; two clips more in the test
    split, which has no labels.
    """
    rng = np.random.default_rng(0)
    root.mkdir()
    name = "something-something-v1-"
    (root / f"{name}labels.csv").write_text("".join(c + "\n" for c in classes))
    (root / f"{name}validation.csv").write_text(
        "".join(f"{i + 1};{classes[i % len(classes)]}\n" for i in range(validation))
    )
    (root / f"{name}test.csv").write_text("".join(f"{validation + i + 1}\n" for i in range(2)))
    for i in range(validation + 2):
        folder = root / "20bn-something-something-v1" / str(i + 1)
        folder.mkdir(parents=True)
        colour = rng.integers(0, 200, 3)  # clips differ, so that predictions do
        for t in range(5 + i % 3):
            Image.fromarray((colour + rng.integers(0, 56, (16, 24, 3))).astype(np.uint8)).save(
                folder / f"{t + 1:05d}.png"
            )
    return root


def write_checkpoint(path, root, classes=CLASSES, **changes):
    """What train.py saves, of a model with random weights and a head that spreads its answers."""
    torch.manual_seed(3)
    model = build_model("tiny", **SMALL_MODEL, num_classes=len(classes))
    with torch.no_grad():
        model.head.weight.mul_(100)
    torch.save(
        dict(
            dict(
                model=model.state_dict(),
                model_config=asdict(model.config),
                classes=sorted(classes),
                mean=list(data.CLIP_MEAN),
                std=list(data.CLIP_STD),
                args=dict(dataset="ssv1", data_root=str(root), clip_root=None, control="none"),
            ),
            **changes,
        ),
        path,
    )
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
    views = (
        torch.tensor([[0, 1, 2], [2, 2, 2]], dtype=torch.uint8)
        .view(2, 3, 1, 1, 1, 1)
        .expand(2, 3, 3, 4, 8, 8)
    )
    scale = dict(mean=(0, 0, 0), std=(1 / 255,) * 3)  # normalisation that leaves 0, 1, 2
    got = evaluate.predict(KnownLogits(table), views, torch.device("cpu"), **scale)
    probability = torch.tensor(table).softmax(-1)
    assert torch.allclose(got, torch.stack([probability.mean(0), probability[2]]), atol=1e-6)
    # which logits would give
    assert not torch.allclose(got[0], torch.tensor(table).mean(0).softmax(-1), atol=1e-2)
    # (B, 3, F, S, S): a single view
    one = evaluate.predict(KnownLogits(table), views[:, 0], torch.device("cpu"), **scale)
    assert torch.allclose(one, probability[[0, 2]], atol=1e-6)


class Answers(torch.utils.data.Dataset):
    """A data set whose clip i makes KnownLogits give row i of its table."""

    def __init__(self, labels, classes, skipped=0):
        self.labels, self.classes, self.skipped = np.array(labels), ["?"] * classes, skipped

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.full((3, 4, 8, 8), index, dtype=torch.uint8), int(self.labels[index]), index


def test_top1_and_top5_by_hand():
    logits = [[9, 8, 7, 6, 5, 4, 3.0]] * 4  # top-5 are classes 0 to 4
    scale = dict(mean=(0, 0, 0), std=(1 / 255,) * 3)
    result = evaluate.evaluate(
        KnownLogits(logits), Answers([0, 4, 5, 0], 7), torch.device("cpu"), batch_size=3, **scale
    )
    assert (result["top1"], result["top5"], result["clips"]) == (50, 75, 4)
    expected = torch.tensor(logits).softmax(-1)
    assert torch.allclose(result["probabilities"], expected)
    assert result["loss"] == pytest.approx(
        -expected.log()[range(4), [0, 4, 5, 0]].mean().item(), rel=1e-5
    )
    # skipped clips are wrong ones, and three classes have no five
    result = evaluate.evaluate(
        KnownLogits([[1.0, 2, 3]] * 3),
        Answers([2, 2, 0], 3, skipped=1),
        torch.device("cpu"),
        **scale,
    )
    assert (result["top1"], result["top5"], result["clips"]) == (50, 75, 4)
    assert (
        output.top_classes(result["probabilities"][0], "abc")[0][0] == "c"
        and len(output.top_classes(result["probabilities"][0], "abc")) == 3
    )


def test_the_last_line_and_what_is_saved(ckpt, tmp_path, capsys):
    run(ckpt, "--save", tmp_path / "top5.csv")
    last = capsys.readouterr().out.splitlines()[-1]
    top1, top5, n, views = LAST_LINE.fullmatch(last).groups()
    assert (top5, n, views) == ("100.00", "7", "4x3x1")

    rows = read_csv(tmp_path / "top5.csv")
    assert [r["id"] for r in rows] == list("1234567") and [r["label"] for r in rows] == [
        CLASSES[i % 3] for i in range(7)
    ]
    assert top1 == f"{100 * sum(r['label'] == r['top1'] for r in rows) / 7:.2f}"
    assert len({r["top1"] for r in rows}) > 1  # else this test would see little
    for r in rows:
        p = [float(r[f"p{k}"]) for k in (1, 2, 3)]
        assert p == sorted(p, reverse=True) and sum(p) == pytest.approx(1, abs=1e-4)
        assert {r["top1"], r["top2"], r["top3"]} == set(CLASSES)


def test_npz_keeps_all_probabilities(ckpt, tmp_path):
    run(ckpt, "--save", tmp_path / "all.csv")
    run(ckpt, "--save", tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as saved:
        assert saved["ids"].tolist() == list("1234567") and saved["labels"].tolist() == [
            0,
            1,
            2,
            0,
            1,
            2,
            0,
        ]
        assert saved["classes"].tolist() == CLASSES and saved["probabilities"].shape == (7, 3)
        assert np.allclose(saved["probabilities"].sum(1), 1, atol=1e-5)
        best = [CLASSES[i] for i in saved["probabilities"].argmax(1)]
    assert best == [r["top1"] for r in read_csv(tmp_path / "all.csv")]


def test_other_frames_and_another_size_than_in_training(ckpt, capsys):
    run(ckpt, "--num_frames", 8, "--image_size", 24)
    assert LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])[4] == "8x3x1"


def test_views_and_control_follow_flags_and_checkpoint(ckpt, clips, tmp_path, capsys):
    run(ckpt, "--crops", 1, "--clips", 2)
    assert LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])[4] == "4x1x2"
    args = dict(dataset="ssv1", data_root=str(clips), clip_root=None, control="single")
    control = write_checkpoint(tmp_path / "single.pt", clips, args=args)
    for name, flags in ("single", ()), ("none", ("--control", "none")):
        run(control, *flags, "--save", tmp_path / f"{name}.csv")
    run(ckpt, "--save", tmp_path / "plain.csv")
    single, none, plain = (
        (tmp_path / f"{name}.csv").read_text() for name in ("single", "none", "plain")
    )
    assert none == plain != single


def test_normalisation_comes_from_the_checkpoint(ckpt, clips, tmp_path):
    run(ckpt, "--save", tmp_path / "clip.csv")
    run(
        write_checkpoint(tmp_path / "other.pt", clips, mean=[0.5] * 3, std=[0.1] * 3),
        "--save",
        tmp_path / "other.csv",
    )
    assert (tmp_path / "clip.csv").read_text() != (tmp_path / "other.csv").read_text()


def test_seven_clips_on_two_ranks_are_seven(ckpt, tmp_path, capsys):
    run(ckpt, "--save", tmp_path / "one.csv")
    last = capsys.readouterr().out.splitlines()[-1]
    printed = run_two_ranks(
        "evaluate.py",
        "--ckpt",
        ckpt,
        "--device",
        "cpu",
        "--workers",
        "0",
        "--save",
        tmp_path / "two.csv",
    )
    assert printed[0].splitlines()[-1] == last and "clips 7 " in last and "top1" not in printed[1]
    one, two = read_csv(tmp_path / "one.csv"), read_csv(tmp_path / "two.csv")
    for a, b in zip(one, two, strict=True):  # other batches, so sums in another order
        assert {k: v for k, v in a.items() if not re.fullmatch("p.", k)} == {
            k: v for k, v in b.items() if not re.fullmatch("p.", k)
        }
        assert all(
            float(a[f"p{k}"]) == pytest.approx(float(b[f"p{k}"]), abs=2e-5) for k in (1, 2, 3)
        )


def test_more_ranks_than_clips_still_count_each_once(clips, monkeypatch):
    # Rank 8 of 9 has no clip. Rank 0 collects what each of them has.
    dataset = data.VideoDataset("ssv1", clips, "validation", num_frames=4, size=16)
    model, cpu = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 16 * 16, 3)), torch.device("cpu")
    collected = {}
    for rank in reversed(range(9)):

        def gather(all_parts, parts, rank=rank):
            collected[rank] = parts
            all_parts[:] = [collected.get(r, []) for r in range(9)]
            if rank > 0:
                raise StopIteration                     # the others are not there yet

        monkeypatch.setattr(evaluate, "dist", SimpleNamespace(all_gather_object=gather))
        if rank > 0:
            with pytest.raises(StopIteration):
                evaluate.evaluate(model, dataset, cpu, rank=rank, world=9)
    result = evaluate.evaluate(model, dataset, cpu, rank=0, world=9)
    assert collected[8] == [] and len(collected[6]) == 1
    alone = evaluate.evaluate(model, dataset, cpu)
    assert result["clips"] == 7 and torch.allclose(
        result["probabilities"], alone["probabilities"], atol=1e-5
    )


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
    assert (
        n == "7"
        and top1 == f"{100 * (len(right) - 1) / 7:.2f}"
        and "1 clips on the skip list count as wrong" in printed
    )
    assert [r["id"] for r in read_csv(tmp_path / "six.csv")] == [
        r["id"] for r in rows if r["id"] != right[0]
    ]


def test_a_split_without_labels_gives_predictions_only(ckpt, tmp_path, capsys):
    run(ckpt, "--split", "test", "--save", tmp_path / "test.csv")
    printed = capsys.readouterr().out
    assert "no labels, so no accuracy" in printed and not re.search(r"^top1", printed, re.M)
    rows = read_csv(tmp_path / "test.csv")
    assert [(r["id"], r["label"]) for r in rows] == [("8", ""), ("9", "")] and all(
        r["top1"] in CLASSES for r in rows
    )


# ----- one clip -----


def test_video_prints_what_the_dataset_path_predicts(ckpt, clips, tmp_path, capsys):
    run(ckpt, "--save", tmp_path / "all.csv")
    capsys.readouterr()
    paths = [str(clips / "20bn-something-something-v1" / i) for i in "25"]
    run(ckpt, "--video", *paths)
    printed = capsys.readouterr().out.splitlines()
    rows = read_csv(tmp_path / "all.csv")
    for k, number in enumerate((1, 4)):
        path, *lines = printed[4 * k : 4 * k + 4]
        assert path == paths[k] and len(lines) == 3
        for line, place in zip(lines, "123"):
            percent, text = re.fullmatch(r" +(\d+\.\d\d) %  (.+)", line).groups()
            assert text == rows[number][f"top{place}"]
            assert float(percent) == pytest.approx(
                100 * float(rows[number][f"p{place}"]), abs=0.011
            )


def test_video_reads_files_and_each_video_of_a_folder(ckpt, tmp_path, capsys):
    pytest.importorskip("decord")
    webm = Path(__file__).parent / "clip.webm"
    for name in ("a.webm", "b.mp4"):  # decord looks inside
        shutil.copy(webm, tmp_path / name)
    (tmp_path / "notes.txt").touch()
    run(ckpt, "--video", webm, tmp_path, "--crops", 1, "--save", tmp_path / "top5.csv")
    printed = capsys.readouterr().out.splitlines()
    assert (
        printed[::4] == [str(webm), str(tmp_path / "a.webm"), str(tmp_path / "b.mp4")]
        and len(printed) == 12
    )
    rows = read_csv(tmp_path / "top5.csv")
    assert [r["id"] for r in rows] == printed[::4] and {r["label"] for r in rows} == {""}
    assert len({r["top1"] + r["p1"] for r in rows}) == 1  # three times the same video


# ----- refusals -----


def test_other_classes_are_refused(ckpt, tmp_path):
    other = write_clips(
        tmp_path / "other", ["Opening something", "Closing something", "Waving something"]
    )
    with pytest.raises(
        ValueError, match="other classes than .*best.pt, such as .*Waving something"
    ):
        run(ckpt, "--data_root", other)


@pytest.mark.parametrize("kind", ["missing", "state dict", "empty", "text", "pickle", "folder"])
def test_a_foreign_checkpoint_is_one_clear_error(tmp_path, monkeypatch, kind):
    path = tmp_path / "best.pt"
    if kind == "state dict":
        torch.save(dict(weight=torch.zeros(2)), path)
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        # what a clone without Git LFS leaves
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "pickle":
        torch.save(SimpleNamespace(model=1), path)  # arbitrary objects are never unpickled
    elif kind == "folder":
        path.mkdir()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--ckpt", str(path), "--device", "cpu"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    text = str(e.value)
    assert (
        text.startswith("evaluate.py: ")
        and str(path) in text
        and "checkpoint" in text
        and len(text.splitlines()) < 12
    )


@pytest.fixture
def no_workers(monkeypatch):
    """run_program kills the data workers of its process, which may be another test's."""
    monkeypatch.setattr(guards.multiprocessing, "active_children", list)


@pytest.mark.parametrize("kind", (ValueError, OSError, FloatingPointError))
def test_what_a_person_can_mend_is_one_line(kind, no_workers):
    def main():
        raise kind("clip 7 is broken")

    with pytest.raises(SystemExit) as e:
        guards.run_program(main)
    assert str(e.value).endswith(": clip 7 is broken") and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text, remedy",
    [
        (
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device",
            "--shm-size",
        ),
        ("DataLoader worker (pid 7) is killed by signal: Segmentation fault.", "check_data.py"),
        ("DataLoader timed out after 600 seconds", "check_data.py"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", "--micro_batch"),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nTraceback: mat1 and mat2 shapes",
            "",
        ),
        (
            "Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to allocate "
            "shared memory(shm)",
            "--shm-size",
        ),
        ("mat1 and mat2 shapes cannot be multiplied", ""),
    ],
)
def test_a_runtime_error_keeps_its_traceback_and_gets_its_remedy(text, remedy, capsys, no_workers):
    def main():
        raise RuntimeError(text)

    with pytest.raises(RuntimeError) as e:
        guards.run_program(main)
    assert str(e.value) == text
    printed = capsys.readouterr().err
    assert remedy in printed if remedy else not printed.strip()


def test_after_an_error_pytorch_does_not_report_the_workers_that_are_killed(tmp_path):
    """The last words on the screen are the cause of the error."""
    (tmp_path / "broken.py").write_text(
        "import sys, time, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import evaluate\n"
        "from scripts import guards\n"
        "class Items(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, i):\n"
        "        if i == 0: raise RuntimeError('the cause')\n"
        "        time.sleep(60)\n"
        "def main():\n"
        "    list(evaluate.make_loader(Items(), 2, 50, torch.device('cpu'), batch_size=1))\n"
        "guards.run_program(main)\n"
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "broken.py"], stderr=subprocess.PIPE, text=True, timeout=300
    )
    assert done.returncode == 1 and "the cause" in done.stderr.strip().splitlines()[-1]


def test_a_file_that_cannot_be_saved_is_an_error_before_the_evaluation(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(ckpt, "--save", tmp_path / "nowhere" / "top5.csv")


def test_what_the_terminal_cannot_show_ends_no_command(clips, tmp_path):
    root = write_clips(
        tmp_path / "clips", ["Closing \u6771\u4eac", "Opening caf\u00e9 \U0001f600", "Other"]
    )
    ckpt = write_checkpoint(
        tmp_path / "best.pt",
        root,
        ["Closing \u6771\u4eac", "Opening caf\u00e9 \U0001f600", "Other"],
    )
    video = root / "20bn-something-something-v1" / "1"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "evaluate.py"),
            "--ckpt",
            str(ckpt),
            "--video",
            str(video),
            "--device",
            "cpu",
        ],
        env=dict(os.environ, PYTHONIOENCODING="cp1252"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0 and b"Closing ??" in done.stdout, done.stdout


@pytest.fixture
def joined(monkeypatch):
    """What setup_processes joins with, as rank 1 of 4 of a launcher that sets little."""
    asked = {}
    store = evaluate.dist.HashStore()
    monkeypatch.setattr(evaluate.dist, "rendezvous", lambda url: iter([(store, 1, 4)]))
    monkeypatch.setattr(
        evaluate.dist, "init_process_group", lambda backend, **kw: asked.update(kw, backend=backend)
    )
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC", "GROUP_", "LOCAL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "1")
    return asked


def test_only_variables_that_every_launcher_sets_are_needed(joined, monkeypatch):
    for gpus, backend in ((4, "nccl"), (1, "nccl"), (0, "gloo")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert evaluate.setup_processes() == (1, 4) and joined["backend"] == backend
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    # two processes share a GPU, which NCCL cannot do
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    evaluate.setup_processes()
    assert joined["backend"] == "gloo"


def test_a_restarted_process_does_not_read_what_dead_ones_left_in_the_store(joined, monkeypatch):
    def left(attempt, nodes):
        monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        evaluate.setup_processes()
        return joined["store"]

    left("0", nodes="1").set("address", "of the first attempt")
    assert left("0", nodes="1").check(["address"])
    assert not left("1", nodes="1").check(["address"])
    # each node counts its own attempts, so all must use the same keys
    left("0", nodes="2").set("name", "of a node")
    assert left("1", nodes="2").check(["name"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
def test_a_gpu_gives_the_same_answers(ckpt, tmp_path, precision):
    run(ckpt, "--save", tmp_path / "cpu.csv")
    run(ckpt, "--save", tmp_path / "gpu.csv", "--device", "cuda", "--precision", precision)
    for a, b in zip(read_csv(tmp_path / "cpu.csv"), read_csv(tmp_path / "gpu.csv"), strict=True):
        assert float(a["p1"]) == pytest.approx(
            float(b["p1"]), abs=1e-3 if precision == "fp32" else 0.1
        )


def test_a_broken_clip_is_one_clear_error(ckpt, tmp_path, monkeypatch):
    root = write_clips(tmp_path / "clips")
    for frame in (root / "20bn-something-something-v1" / "3").iterdir():
        frame.unlink()
    for workers in ("0", "1"):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "evaluate.py",
                "--ckpt",
                str(ckpt),
                "--data_root",
                str(root),
                "--device",
                "cpu",
                "--workers",
                workers,
            ],
        )
        try:
            runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
            text = "it went through"
        except SystemExit as e:
            text = str(e)
            # it keeps the loader alive, whose worker then takes 5 s to end
            e.__context__.with_traceback(None)
        assert str(root / "20bn-something-something-v1" / "3") in text.splitlines()[-1], text
        assert ("Traceback" in text) == (workers == "1")
