"""evaluate.py: every clip counts once, and the numbers are those of the paper's protocol.

Protects: probabilities averaged over views; top 1 and 5; each clip counted once on two processes;
what is saved; single videos, also when some are broken; the device and process group of each
process; errors of one line.

python -m pytest -q tests/test_evaluate.py
"""
import csv
import io
import os
import re
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

import data
import evaluate
from conftest import PROCESSES, ROOT, on_two_ranks, save_frames, write_v1
from model import build_model

CPU = torch.device("cpu")
CLASSES = ["Closing something", "Moving something, then dropping it", "Opening something"]
LAST_LINE = re.compile(r"top1 (\d+\.\d\d) top5 (\d+\.\d\d) clips (\d+) views (\d+x\d+x\d+)")
PIXELS = dict(mean=(0, 0, 0), std=(1 / 255,) * 3)       # a normalization that keeps the values

def write_clips(root, classes=CLASSES):
    """Seven clips with the labels 0 1 2 0 1 2 0, and two in the test split, without labels."""
    rng = np.random.default_rng(0)
    rows = [(str(i + 1), classes[i % len(classes)]) for i in range(7)]
    folder = write_v1(root, classes, validation=rows, test=["8", "9"])
    for i in range(9):
        colour = rng.integers(0, 200, 3)                # clips differ, so that predictions do
        save_frames(folder / str(i + 1), colour + rng.integers(0, 56, (5 + i % 3, 16, 24, 3)))
    return root

def write_checkpoint(path, root, classes=CLASSES, **changes):
    """What train.py saves, of a model with random weights and a head that spreads its answers."""
    torch.manual_seed(3)
    model = build_model("tiny", dim=32, depth=2, heads=2, num_frames=4, image_size=16,
                        head_dropout=0.5, num_classes=len(classes))
    with torch.no_grad():
        model.head.weight.mul_(8)
    args = dict(dataset="ssv1", data_root=str(root), clip_root=None, control="none")
    checkpoint = dict(model=model.state_dict(), model_config=asdict(model.config), args=args,
                      classes=sorted(classes), mean=data.CLIP_MEAN, std=data.CLIP_STD)
    torch.save({**checkpoint, **changes}, path)
    return path

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("evaluate") / "clips")

@pytest.fixture(scope="module")
def ckpt(clips):
    return write_checkpoint(clips.parent / "best.pt", clips)

def run(ckpt, *flags):
    evaluate.main(["--ckpt", str(ckpt), "--device", "cpu", "--workers", "0", *map(str, flags)])

def run_command(ckpt, *flags):
    """The same as a command. Returns its error, or None."""
    try:
        evaluate.run_command(lambda: run(ckpt, *flags))
    except SystemExit as e:
        return e.code

def read_csv(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))

def probabilities(path):
    with np.load(path) as saved:
        return saved["probabilities"]

# ----- Numbers --------------------------------------------------------------

class KnownLogits(nn.Module):
    """The logits of a view are looked up by the value of its pixels."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.tensor(table)

    def forward(self, video):
        return self.table[video[:, 0, 0, 0, 0].round().long()]

class Answers(torch.utils.data.Dataset):
    """A data set whose clip i makes KnownLogits give row i of its table."""

    def __init__(self, labels, skipped=0):
        self.labels = np.array(labels)
        self.skipped = skipped

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return torch.full((3, 4, 8, 8), index, dtype=torch.uint8), int(self.labels[index]), index

def test_probabilities_are_averaged_over_the_views():
    table = [[0.0, 4.0, 0.0], [3.0, 0.0, 0.0], [3.0, 0.0, 1.0]]
    views = torch.tensor([[0, 1, 2], [2, 2, 2]], dtype=torch.uint8)
    views = views.view(2, 3, 1, 1, 1, 1).expand(2, 3, 3, 4, 8, 8)
    expected = torch.tensor(table).softmax(-1)
    found = evaluate.predict(KnownLogits(table), views, CPU, **PIXELS)
    assert torch.allclose(found, torch.stack([expected.mean(0), expected[2]]), atol=1e-6)
    one_view = evaluate.predict(KnownLogits(table), views[:, 0], CPU, **PIXELS)
    assert torch.allclose(one_view, expected[[0, 2]], atol=1e-6)

def test_top1_top5_and_loss_by_hand():
    logits = [[9, 8, 7, 6, 5, 4, 3.0]] * 4              # the top 5 are classes 0 to 4
    labels = [0, 4, 5, 0]
    result = evaluate.evaluate(KnownLogits(logits), Answers(labels), CPU, batch_size=3, **PIXELS)
    assert (result["top1"], result["top5"], result["clips"]) == (50, 75, 4)
    loss = nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    # Skipped clips are wrong ones, and three classes have no five.
    result = evaluate.evaluate(KnownLogits([[1.0, 2, 3]] * 3), Answers([2, 2, 0], skipped=1), CPU,
                               **PIXELS)
    assert (result["top1"], result["top5"], result["clips"]) == (50, 75, 4)

def test_what_is_printed_and_saved(ckpt, tmp_path, capsys):
    run(ckpt, "--save", "top5.csv")
    top1, *rest = LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1]).groups()
    assert rest == ["100.00", "7", "4x3x1"]
    run(ckpt, "--save", "all.npz")
    rows = read_csv("top5.csv")
    assert [row["id"] for row in rows] == list("1234567")
    assert [row["label"] for row in rows] == [CLASSES[i % 3] for i in range(7)]
    assert top1 == f"{100 * sum(row['label'] == row['top1'] for row in rows) / 7:.2f}"
    assert len({row["top1"] for row in rows}) > 1       # else this test would see little
    with np.load("all.npz") as saved:
        assert saved["ids"].tolist() == list("1234567") and saved["classes"].tolist() == CLASSES
        assert saved["labels"].tolist() == [0, 1, 2, 0, 1, 2, 0]
        for row, p in zip(rows, saved["probabilities"], strict=True):
            for place, k in enumerate(p.argsort()[::-1], 1):
                assert row[f"top{place}"] == CLASSES[k]
                assert float(row[f"p{place}"]) == pytest.approx(p[k], abs=1e-5)

def test_training_mode_is_left_and_batches_make_no_difference(ckpt, clips, tmp_path):
    run(ckpt, "--save", "command.npz", "--batch_size", "2")
    checkpoint = torch.load(ckpt, weights_only=True)
    model = evaluate.STDFormer(evaluate.ModelConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    model.train()                                       # with dropout and BatchNorm
    dataset = data.VideoDataset("ssv1", clips, "validation", 4, 16, crops=3)
    result = evaluate.evaluate(model, dataset, CPU)
    assert not model.training
    assert np.allclose(result["probabilities"], probabilities("command.npz"), atol=1e-5)

@pytest.mark.parametrize("flags, views", [
    (["--crops", 1], "4x1x1"), (["--clips", 2], "4x3x2"), (["--num_frames", 8], "8x3x1"),
    (["--image_size", 24], "4x3x1"), (["--control", "shuffle"], "4x3x1"),
])
def test_flags_change_the_views(ckpt, capsys, flags, views):
    run(ckpt, "--save", "plain.npz")
    run(ckpt, *flags, "--save", "other.npz")
    assert LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])[4] == views
    assert not np.allclose(probabilities("plain.npz"), probabilities("other.npz"), atol=1e-3)

def test_control_and_normalization_are_those_of_training(ckpt, clips, tmp_path):
    args = dict(dataset="ssv1", data_root=str(clips), clip_root=None, control="single")
    single = write_checkpoint(tmp_path / "single.pt", clips, args=args)
    other = write_checkpoint(tmp_path / "other.pt", clips, mean=[0.5] * 3, std=[0.1] * 3)
    run(ckpt, "--save", "plain.npz")
    run(single, "--control", "none", "--save", "none.npz")
    assert np.array_equal(probabilities("plain.npz"), probabilities("none.npz"))
    for changed in (single, other):
        run(changed, "--save", "changed.npz")
        assert not np.allclose(probabilities("plain.npz"), probabilities("changed.npz"), atol=1e-3)

def test_clips_on_the_skip_list_count_as_wrong(ckpt, tmp_path, capsys):
    run(ckpt, "--save", "all.csv")
    right = [row["id"] for row in read_csv("all.csv") if row["label"] == row["top1"]]
    (tmp_path / "skip.txt").write_text(f"{right[0]}\n99\n")
    capsys.readouterr()
    run(ckpt, "--skip_list", "skip.txt", "--save", "six.csv")
    top1, _, n, _ = LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1]).groups()
    assert (n, top1) == ("7", f"{100 * (len(right) - 1) / 7:.2f}")
    assert [row["id"] for row in read_csv("six.csv")] == [i for i in "1234567" if i != right[0]]

def test_a_split_without_labels_gives_predictions_only(ckpt, capsys):
    run(ckpt, "--split", "test", "--save", "test.csv")
    assert "top1 " not in capsys.readouterr().out
    rows = read_csv("test.csv")
    assert [(row["id"], row["label"], row["top1"] in CLASSES) for row in rows] == [
        ("8", "", True), ("9", "", True)]

# ----- Several processes ----------------------------------------------------

def print_to_file(ckpt, *flags):
    with open(f"rank{os.environ['RANK']}.txt", "w") as f:
        sys.stdout = f
        run(ckpt, *flags)

@pytest.mark.parametrize("n", (7, 1))                   # the second process has no clip
def test_each_clip_counts_once_on_two_ranks(ckpt, clips, tmp_path, capsys, n):
    rows = [(str(i + 1), CLASSES[i % 3]) for i in range(n)]
    write_v1(tmp_path, CLASSES, validation=rows)
    flags = ["--data_root", tmp_path, "--clip_root", clips]
    run(ckpt, *flags, "--save", "one.npz")
    assert on_two_ranks(print_to_file, ckpt, *flags, "--save", "two.npz") == (None, None)
    printed = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert printed == [capsys.readouterr().out.splitlines()[-1] + "\n", ""]
    assert f"clips {n} " in printed[0]
    with np.load("one.npz") as one, np.load("two.npz") as two:
        assert one["ids"].tolist() == two["ids"].tolist() and len(one["ids"]) == n
        assert np.allclose(one["probabilities"], two["probabilities"], atol=1e-5)

def evaluate_with_few_files():
    import resource

    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, opened + 40))
    evaluate.evaluate(KnownLogits([[1.0, 2.0]] * 200), Answers([0] * 200), CPU, batch_size=1,
                      workers=1, **PIXELS)

@pytest.mark.skipif(sys.platform != "linux", reason="counts files in /proc")
def test_many_batches_do_not_keep_files_open():
    process = PROCESSES.Process(target=evaluate_with_few_files)
    process.start()
    process.join(timeout=100)
    process.kill()
    assert process.exitcode == 0

@pytest.fixture
def joined(monkeypatch):
    """What setup does, in this order, as rank 1 of 4."""
    steps = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: steps.append(device))
    store = evaluate.dist.HashStore()
    monkeypatch.setattr(evaluate.dist, "rendezvous", lambda url: iter([(store, 1, 4)]))
    monkeypatch.setattr(evaluate.dist, "init_process_group",
                        lambda backend, **options: steps.append((backend, options)))
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC", "GROUP_", "LOCAL_", "RANK", "WORLD", "SLURM")):
            monkeypatch.delenv(name)
    return steps

@pytest.mark.parametrize("gpus, variables, backend, gpu", [
    (4, dict(RANK="5", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4"), "nccl", 1),       # torchrun
    (2, dict(RANK="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1"), "nccl", 0),       # one on each node
    (4, dict(RANK="5"), "nccl", 1),                     # another launcher
    (1, dict(RANK="1", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2"), "gloo", 0),       # two share a GPU
    (0, dict(RANK="1", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2"), "gloo", None),
    (4, {}, None, 0),                                   # a single process
])
def test_the_process_group_is_told_which_gpu_a_process_uses(joined, monkeypatch, gpus, variables,
                                                            backend, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    expected = CPU if gpu is None else torch.device("cuda", gpu)
    ranks = (0, 1) if backend is None else (1, 4)
    assert evaluate.setup() == (expected, *ranks)
    if gpu is not None:
        assert joined.pop(0) == expected                # before the group
    if backend is not None:
        found, options = joined.pop(0)
        assert found == backend and (options["rank"], options["world_size"]) == (1, 4)
        assert options["device_id"] == (expected if backend == "nccl" else None)
    assert joined == []

def test_srun_and_a_missing_gpu_are_one_sentence(joined, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="--device cuda"):
        evaluate.setup("cuda")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ValueError, match="srun has started 2 processes"):
        evaluate.setup("cpu")

def test_a_restarted_process_does_not_read_what_dead_ones_left_in_the_store(joined, monkeypatch):
    def store_of(attempt, nodes):
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        evaluate.setup("cpu")
        return joined.pop()[1]["store"]

    store_of("0", nodes="1").set("address", "of the first attempt")
    assert store_of("0", nodes="1").check(["address"])
    assert not store_of("1", nodes="1").check(["address"])
    store_of("0", nodes="2").set("name", "of a node")   # nodes count their attempts apart
    assert store_of("1", nodes="2").check(["name"])

# ----- Single videos --------------------------------------------------------

def test_video_predicts_what_the_data_set_does(ckpt, clips, capsys):
    run(ckpt, "--save", "all.csv")
    capsys.readouterr()
    folder = clips / "20bn-something-something-v1"      # of folders of frames
    run(ckpt, "--video", folder / "2", folder, "--save", "top5.csv")
    printed = capsys.readouterr().out.splitlines()
    expected = read_csv("all.csv")
    found = read_csv("top5.csv")
    assert [row["id"] for row in found] == [str(folder / i) for i in "2123456789"]
    for i, row in zip([1, 0, 1, 2, 3, 4, 5, 6], found):
        assert {**row, "id": "", "label": ""} == {**expected[i], "id": "", "label": ""}
    assert printed[0] == str(folder / "2") and len(printed) == 4 * 10
    assert re.fullmatch(r" +\d+\.\d\d %  " + re.escape(found[0]["top1"]), printed[1])

def test_a_broken_video_is_reported_and_the_others_go_on(ckpt, tmp_path, capsys):
    pytest.importorskip("decord")
    (tmp_path / "videos").mkdir()
    for name in ("a.webm", "c.mp4"):
        shutil.copy(Path(__file__).parent / "clip.webm", tmp_path / "videos" / name)
    (tmp_path / "videos" / "b.mp4").write_text("not a video")
    for name in ("._a.webm", "notes.txt", "cover1.jpg"):
        (tmp_path / "videos" / name).touch()
    error = run_command(ckpt, "--video", "videos", "--save", "top5.csv")
    assert "1 of 3 clips" in error and "\n" not in error
    assert str(tmp_path / "videos" / "b.mp4") in capsys.readouterr().err
    assert [Path(row["id"]).name for row in read_csv("top5.csv")] == ["a.webm", "c.mp4"]

@pytest.mark.parametrize("name, words", [
    ("nowhere.mp4", "not a file or folder"), ("https://a.org/b.mp4", "not a file or folder"),
    ("notes.txt", "not a video"), ("photo.jpg", "not a video"), ("empty", "no videos"),
])
def test_what_is_not_a_video_gets_a_true_sentence(ckpt, tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    for file in ("notes.txt", "photo.jpg"):
        (tmp_path / file).touch()
    error = run_command(ckpt, "--video", name)
    assert f"--video {name}" in error and words in error and "\n" not in error

# ----- Errors ---------------------------------------------------------------

def test_other_classes_are_refused(ckpt, tmp_path):
    other = write_clips(tmp_path / "other", ["Closing something", "Opening something", "Waving"])
    with pytest.raises(ValueError, match="validation.csv has other classes than .*best.pt"):
        run(ckpt, "--data_root", other)

def test_probabilities_that_are_not_finite_are_refused(ckpt, tmp_path):
    checkpoint = torch.load(ckpt, weights_only=True)
    checkpoint["model"]["head.bias"][0] = torch.inf     # what an overflow in fp16 gives
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(FloatingPointError, match="7 clips .* --precision fp32"):
        run(tmp_path / "best.pt")

@pytest.mark.parametrize("kind", ["missing", "state dict", "empty", "text", "pickle"])
def test_a_foreign_checkpoint_is_named(tmp_path, kind):
    path = tmp_path / "best.pt"
    if kind == "state dict":
        torch.save(dict(weight=torch.zeros(2)), path)
    elif kind == "empty":
        path.touch()
    elif kind == "text":                                # what a clone without Git LFS leaves
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif kind == "pickle":                              # it might run code
        torch.save(SimpleNamespace(model=1), path)
    error = run_command(path)
    assert str(path) in error and (kind == "missing" or "checkpoint of train.py" in error)

def test_a_file_that_cannot_be_saved_is_an_error_before_the_evaluation(ckpt, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: pytest.fail("too late"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(ckpt, "--save", "nowhere/top5.csv")

def test_the_error_of_a_data_worker_is_one_line_at_the_command_line(ckpt, tmp_path):
    root = write_clips(tmp_path / "clips")
    frames = root / "20bn-something-something-v1" / "3"
    for frame in frames.iterdir():
        frame.write_bytes(b"")
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--ckpt", ckpt, "--data_root",
                           root, "--device", "cpu", "--workers", "1"], text=True,
                          capture_output=True)
    assert done.returncode == 1
    last = done.stderr.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith(f"evaluate.py: {frames} cannot be read")
    assert "Traceback" not in done.stderr and "ValueError" not in done.stderr

def test_other_errors_keep_their_traceback():
    def main():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        evaluate.run_command(main)

def test_with_TRACEBACK_our_own_errors_keep_it_too(monkeypatch):
    def main():
        raise ValueError("not enough values to unpack (expected 3, got 2)")

    with pytest.raises(SystemExit, match="not enough values"):
        evaluate.run_command(main)
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="not enough values"):
        evaluate.run_command(main)

def test_lines_appear_at_once_and_no_name_is_too_exotic_for_a_terminal(monkeypatch):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="cp1252"))
    evaluate.run_command(lambda: print("Closing \u6771\u4eac"))
    assert screen.getvalue().startswith(b"Closing ??")

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
def test_a_gpu_gives_the_same_answers(ckpt, precision):
    run(ckpt, "--save", "cpu.npz")
    run(ckpt, "--save", "gpu.npz", "--device", "cuda", "--precision", precision)
    assert np.allclose(probabilities("cpu.npz"), probabilities("gpu.npz"),
                       atol=1e-3 if precision == "fp32" else 0.1)
