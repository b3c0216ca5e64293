"""scripts/check_data.py: no broken clip reaches a long run, and none stops the check.

Protects: a crash, a hang, a broken clip and a clip that does not exist are listed with a reason,
and the clips after them are read; data.py reads the skip list back; what is odd is reported; the
exit status; the contact sheet shows the samples of training.

python -m pytest -q tests/test_check_data.py
"""
import argparse
import contextlib
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import data
from conftest import PROCESSES, ROOT, save_frames, write_v1
from scripts import check_data
from test_data import SIDES, WEBM, grey_frames

def frames_of(clip, n):
    """n frames that no other clip has."""
    return [np.full((8, 8, 3), 10 * clip + i) for i in range(n)]

def check(root, *flags):
    """Run check in this process. Returns the exit status, and writes skip.txt."""
    try:
        check_data.main(["--dataset", "folder", "--data_root", str(root), "--jobs", "1", "--out",
                         str(root / "skip.txt"), *flags])
    except SystemExit as e:
        return e.code
    return 0

def lines_of(kind, printed):
    return [line[12:] for line in printed.splitlines() if line.startswith(f"{kind} ")]

# ----- check ----------------------------------------------------------------

def examine_or_crash(path):
    if path.name == "crashes":
        os._exit(11)
    return examine(path)

examine = check_data.examine

@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """A data set of frame folders with every fault: its root, exit status of check, its output."""
    root = tmp_path_factory.mktemp("frames")
    run, walk = root / "train" / "run", root / "train" / "walk"
    save_frames(run / "broken", frames_of(1, 5))
    (run / "broken" / "00004.png").write_bytes((run / "broken" / "00004.png").read_bytes()[:40])
    save_frames(run / "crashes", frames_of(2, 5))
    save_frames(run / "hangs", frames_of(3, 5))
    (run / "hangs" / "00002.png").unlink()
    os.mkfifo(run / "hangs" / "00002.png")      # a pipe that nobody writes to: opening it waits
    save_frames(run / "two series", frames_of(4, 2))
    (run / "two series" / "flow_1.jpg").touch()
    save_frames(walk / "good", frames_of(5, 5))
    save_frames(walk / "gap", frames_of(6, 6))
    (walk / "gap" / "00003.png").unlink()
    (walk / "gap" / "00004.png").unlink()
    save_frames(walk / "single", frames_of(7, 1))
    save_frames(walk / "video.mp4", frames_of(8, 4))
    (walk / "notes.doc").write_text("recorded in May")
    (walk / ".DS_Store").write_text("of the system")
    save_frames(root / "validation" / "run" / "copy", frames_of(5, 5))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(check_data, "examine", examine_or_crash)
        # Three processes start, one after the other. A fork need not import torch again.
        patch.setattr(check_data.multiprocessing, "get_context", lambda method: PROCESSES)
        status = check(root, "--timeout", "3")
    return root, status, out.getvalue()

def test_bad_clips_are_listed_with_a_reason_and_the_others_are_read(frames):
    _, status, printed = frames
    bad = dict(line.split(": ", 1) for line in lines_of("unreadable", printed))
    names = ("broken", "crashes", "hangs", "two series")
    assert bad.keys() == {f"train/run/{name}" for name in names}
    assert "crash" in bad["train/run/crashes"] and "3 s" in bad["train/run/hangs"]
    assert "flow_#.jpg" in bad["train/run/two series"]
    assert "9 clips, 4 of them unreadable" in printed and status == 1

def test_data_py_reads_the_skip_list(frames):
    root, _, _ = frames
    dataset = data.VideoDataset("folder", root, "train", num_frames=4, size=16,
                                skip_list=root / "skip.txt")
    assert dataset.skipped == 4
    names = ("gap", "good", "single", "video.mp4")
    assert dataset.ids.tolist() == [f"train/walk/{name}" for name in names]
    for index in range(4):
        dataset[index]

def test_what_is_odd_is_reported(frames):
    root, _, printed = frames
    gap, single, video = lines_of("odd", printed)
    assert "walk/gap" in gap and "2 of the numbers from 00001.png to 00006.png" in gap
    assert "walk/single" in single and "one frame" in single
    assert "walk/video.mp4" in video and "folder" in video
    assert lines_of("unused", printed) == [str(root / "train" / "walk" / "notes.doc")]
    [same] = lines_of("same clip", printed)
    assert "train/walk/good" in same and "validation/run/copy" in same

def test_the_command_on_videos(tmp_path):
    pytest.importorskip("decord")
    whole = WEBM.read_bytes()
    # An interrupted download may leave a file empty, or fill the rest with zeros.
    videos = {"1": whole, "2": b"", "3": b"<html>Not found</html>",
              "4": whole[:700] + bytes(len(whole) - 700), "5": whole}
    for name, content in videos.items():
        (tmp_path / f"{name}.webm").write_bytes(content)
    (tmp_path / "train.csv").write_text("".join(f"{i}.webm run\n" for i in range(5)))
    (tmp_path / "validation.csv").write_text("1.webm run\n5.webm run\n")
    done = subprocess.run([sys.executable, ROOT / "scripts" / "check_data.py", "check", "--jobs",
                           "1", "--dataset", "folder", "--data_root", "."],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    bad = dict(line.split(": ", 1) for line in lines_of("unreadable", done.stdout))
    assert bad.keys() == {"0.webm", "2.webm", "3.webm", "4.webm"}
    assert "does not exist" in bad["0.webm"] and "empty" in bad["2.webm"]
    assert set(data.read_skip_list("skip_list.txt")) == bad.keys()
    same = lines_of("same clip", done.stdout)
    assert len(same) == 2 and "1.webm of validation" in same[0] and "5.webm" in same[1]

@pytest.fixture
def no_processes(monkeypatch):
    """Clips are examined in this process, which saves seconds. They must be readable."""
    def call(function, paths, jobs, timeout):
        return [(True, function(path)) for path in paths]
    monkeypatch.setattr(check_data, "isolated", call)

def test_good_data_end_with_status_0_and_an_empty_skip_list(tmp_path, no_processes, capsys):
    save_frames(tmp_path / "train" / "run" / "1", grey_frames(3))
    assert check(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "1 clips, 0 of them unreadable" in printed and "no validation split" in printed
    assert data.read_skip_list(tmp_path / "skip.txt") == []

def test_a_name_that_a_skip_list_cannot_hold_is_reported(tmp_path, no_processes, capsys):
    not_utf8 = os.fsdecode(b"caf\xe9")
    save_frames(tmp_path / "3", grey_frames(3))
    (tmp_path / "train.csv").write_text("#1 run\n2 run\n3 run\n")
    assert check(tmp_path) == 1
    assert [line.split(":")[0] for line in lines_of("rename", capsys.readouterr().out)] == ["'#1'"]
    assert data.read_skip_list(tmp_path / "skip.txt") == ["2"]
    args = argparse.Namespace(dataset="folder", data_root=".")
    check_data.write_skip_list("skip.txt", {not_utf8: "broken", "2": "broken"}, args)
    assert data.read_skip_list("skip.txt")[1:] == ["2"]
    assert len(lines_of("rename", capsys.readouterr().out)) == 1

def test_what_stops_the_check_is_said_at_its_start(tmp_path, monkeypatch):
    (tmp_path / "train.csv").write_text("a.mp4 run\nb.mp4 run\n")
    with pytest.raises(FileNotFoundError, match="none of the clips.*a.mp4 does not exist"):
        check(tmp_path)
    (tmp_path / "b.mp4").touch()
    monkeypatch.setitem(sys.modules, "decord", None)    # as if it were not installed
    with pytest.raises(ValueError, match="pip install decord"):
        check(tmp_path)
    (tmp_path / "b.mp4").unlink()
    save_frames(tmp_path / "b.mp4", grey_frames(3))
    with pytest.raises(OSError, match="nowhere"):
        check(tmp_path, "--out", "nowhere/skip.txt")

# ----- show -----------------------------------------------------------------

TINY = ["--dataset", "ssv1", "--num_frames", "4", "--image_size", "16"]

def test_show_draws_the_first_samples_of_training(tmp_path):
    rows = [(str(i), SIDES[0]) for i in range(6)]
    folder = write_v1(tmp_path, SIDES, train=rows, validation=rows[:1])
    for i in range(6):
        save_frames(folder / str(i), [np.full((20, 24, 3), 40 * i + t) for t in range(30)])
    check_data.main(["show", "--data_root", str(tmp_path), "--out", "sheet.png", "--samples", "5",
                     *TINY, "--recipe", "paper", "--repeat_aug", "2", "--randaugment", "0"])
    sheet = np.asarray(Image.open("sheet.png").convert("L")).astype(int)

    dataset = data.TrainingDataset("ssv1", tmp_path, "train", num_frames=4, size=16)
    batch = next(data.step_batches(6, 6, 0, 1, seed=0))         # training's own order
    samples = [(0, batch[row // 2][1], row % 2) for row in range(5)]
    height, width = sheet.shape[0] // 5, sheet.shape[1] // 4
    for row, sample in enumerate(samples):
        expected = dataset[sample][0][0, :, 0, 0].tolist()
        found = [sheet[row * height + height // 2, column * width + width // 2]
                 for column in range(4)]
        assert found == expected
        assert sheet[row * height:row * height + 20].min() < 100    # its label

def test_show_names_a_broken_clip(tmp_path):
    folder = write_v1(tmp_path, SIDES, train=[("1", SIDES[0])], validation=[("1", SIDES[0])])
    save_frames(folder / "1", grey_frames(1))
    (folder / "1" / "00001.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="v1/1 cannot be read"):
        check_data.main(["show", "--data_root", str(tmp_path), *TINY])
