"""Nothing lost, nothing silent: damaged files and annotations are read right or refused in one line, a worker that dies names its clip.

    python -m pytest -q tests/test_fuzz.py

A fast sample of scripts/fuzz.py, which is the long form; uses ffmpeg as the reference where it is installed.
"""
import json
import multiprocessing.connection
import re
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

import data
import evaluate
from conftest import ROOT
from model import build_model

sys.path.insert(0, str(ROOT / "scripts"))
import fuzz

CLASSES = ["Closing something", "Moving something, then dropping it", "Öffnen von etwas"]

# ----- clips -----


def test_damaged_clips_are_read_right_or_refused(tmp_path):
    pytest.importorskip("decord")
    rows, wrong = fuzz.run(tmp_path / "fuzz", files=27, jobs=1, commands=False)
    assert not wrong and not any(bad for *_, bad in rows), wrong
    assert sum(tried for _, tried, _, _ in rows) >= 27
    said = " ".join(outcome for _, _, outcome, _ in rows)
    assert all(sum(int(n) for n in re.findall(rf"(\d+) {word}", said)) > 5 for word in ("read", "refused"))     # both do happen


def test_the_fuzzer_notices_a_frame_in_another_ones_place(tmp_path, monkeypatch):
    if not fuzz.FFMPEG:
        pytest.skip("compares with ffmpeg")
    pytest.importorskip("decord")
    path = str(ROOT / "tests" / "clip.webm")
    frames = data.read_clip(path, fuzz.spread).permute(0, 2, 3, 1).numpy().copy()
    assert fuzz.compare_with_ffmpeg(path, frames, 24) == ""
    frames[17] = frames[16]                             # what decord does where a frame does not decode
    assert "frame 17" in fuzz.compare_with_ffmpeg(path, frames, 24)
    assert "ffmpeg has 24" in fuzz.compare_with_ffmpeg(path, frames[:23], 23)


def test_the_fuzzer_notices_a_second_reading_that_differs(monkeypatch):
    readings = iter([[(True, ("read", "", 1)), (True, ("read", "", 3))], [(True, ("read", "", 2)), (True, ("read", "", 3))]])
    monkeypatch.setattr(fuzz, "FFMPEG", None)
    monkeypatch.setattr(data, "isolated", lambda *_: next(readings))
    rows, wrong, _ = fuzz.read_all("ssv2", {"7": "7.webm", "8": "8.webm"}, {"7": "video", "8": "video"}, 1, 1)
    assert wrong == ["7.webm: read in two ways"] and rows[0][3] == 1


# ----- annotations -----


def plain_v1(raw):
    """What V1's `id;class text` lines say, read slowly and by the letter; None where they say nothing clear."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if text[:1] == "\ufeff":
        text = text[1:]
    pairs = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        line = line.strip()
        if line:
            clip, separator, label = line.partition(";")
            if not separator or label not in CLASSES or not plain_name(clip):
                return None
            pairs.append((clip, label))
    return pairs


def plain_v2(raw):
    def no_twins(pairs):
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    try:
        entries = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=no_twins)
        pairs = [(e["id"], e["template"].replace("[", "").replace("]", "")) for e in entries]
        return pairs if isinstance(entries, list) and all(plain_name(i) and c in CLASSES for i, c in pairs) else None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        return None


def plain_name(clip):
    return isinstance(clip, str) and clip.strip() == clip and clip not in ("", ".", "..") and not re.search(r"[/\\;#\x00-\x1f\x7f]", clip)


def mutated(raw, rng):
    """An annotation file as editors, scripts and disks get it wrong."""
    lines = raw.split(b"\n")
    i, j = (int(k) for k in rng.integers(0, len(lines), 2))
    at = int(rng.integers(0, len(raw)))
    kind = int(rng.integers(0, 14))
    if kind < 6:                                        # one byte is another, is gone, or is new
        byte = [b"", b"\0", b"\xff", b";", b",", b'"', b" ", b"/", b"\\", b"\t", b"\r", b"..", b"{", b"]", b"#"][int(rng.integers(0, 15))]
        return raw[:at] + byte + raw[at + int(rng.integers(0, 2)):]
    if kind == 6:
        return raw[:at]
    if kind == 7:
        lines.insert(j, lines[i])                       # often a clip twice
    elif kind == 8:
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == 9:
        return b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n")            # saved by Windows' Notepad: harmless
    elif kind == 10:
        return raw.decode().encode(("utf-16", "latin-1")[int(rng.integers(0, 2))])
    elif kind == 11:
        return raw.replace(b";" if b";" in raw else b":", (b"\t", b",", b" ")[int(rng.integers(0, 3))])
    elif kind == 12:
        lines[i] += b"  "
    else:
        lines[i] = lines[i].replace(b"1", (b"../../1", b"/etc/1", b"1\\2", b"")[int(rng.integers(0, 4))])
    return b"\n".join(lines)


def write_labels(root):
    (root / "something-something-v1-labels.csv").write_text("".join(c + "\n" for c in CLASSES), encoding="utf-8")
    (root / "something-something-v2-labels.json").write_text(json.dumps({c: str(i) for i, c in enumerate(CLASSES)}), encoding="utf-8")


@pytest.mark.parametrize("dataset, plain", [("ssv1", plain_v1), ("ssv2", plain_v2)])
def test_mutated_annotations_are_read_right_or_refused_in_one_line(tmp_path, dataset, plain):
    write_labels(tmp_path)
    clips = [(str(n), CLASSES[n % 3]) for n in (101, 7, 12, 1, 33, 210)]
    if dataset == "ssv1":
        path, good = tmp_path / "something-something-v1-train.csv", "".join(f"{i};{c}\n" for i, c in clips)
    else:
        entries = [dict(id=i, template=c.replace("something", "[something]")) for i, c in clips]
        path, good = tmp_path / "something-something-v2-train.json", json.dumps(entries, indent=0, ensure_ascii=False)
    read = refused = 0
    for number in range(600):
        raw = mutated(good.encode(), np.random.default_rng([5, number]))
        path.write_bytes(raw)
        expected = plain(raw)
        try:
            ids, labels, classes = data.read_annotations(dataset, tmp_path, "train")
        except ValueError as e:
            assert str(path) in str(e) and "\n" not in str(e), (raw, e)
            assert not expected or len({i for i, _ in expected}) < len(expected), (raw, e)          # nothing good is refused
            refused += 1
        else:
            assert [(i.decode(), classes[k]) for i, k in zip(ids, labels)] == expected, raw
            read += 1
    assert read > 80 and refused > 80                   # both do happen


@pytest.mark.parametrize("name, raw, words", [
    ("v1-train.csv", b"1;Closing something\n\n2;Closing something\n1;Closing something\n", ["line 4", "clip 1 again", "line 1"]),
    ("v1-train.csv", b"1;Closing something\n\n2;closing something\n", ["line 3", "clip 2", "closing something"]),
    ("v1-train.csv", b"1;Closing something\n../../2;Closing something\n", ["line 2", "../../2", "plain name"]),
    ("v1-train.csv", b"1;Closing something\n/etc/passwd;Closing something\n", ["line 2", "/etc/passwd", "plain name"]),
    ("v1-train.csv", b"1;Closing something\nC:\\2;Closing something\n", ["line 2", "plain name"]),
    ("v1-train.csv", b"1;Closing something\n2;Closing \xf6\n", ["line 2", "not UTF-8", "0xf6"]),
    ("v1-train.csv", b"1;Closing something\n2;Closing\0something\n", ["line 2", "NUL"]),
    ("v1-train.csv", b"1;Closing something\n2\n", ["line 2", "id;class text"]),
    ("v1-train.csv", b"", ["one or more clips", "none"]),
    ("v1-train.csv", b"9" * 5000 + b";Closing something\n", ["line 1", "5000 characters"]),
    ("v1-labels.csv", b"Closing something\n\n", ["two or more"]),
    ("v2-train.json", b'[{"id": "1", "template": "Closing something"}, {"id": "1\\n2", "template": "Closing something"}]', ["entry 2", "plain name"]),
    ("v2-train.json", b'[{"id": "1", "template": "Closing something"}, ["2"]]', ["entry 2", "expected"]),
    ("v2-train.json", b'[{"id": "1", "id": "2", "template": "Closing something"}]', ["a key twice"]),
    ("v2-train.json", b"[" * 100000, ["not a JSON file"]),
    ("v2-train.json", b"", ["not a JSON file"]),
    ("v2-labels.json", b'{"Closing something": "0", "Closing something": "1"}', ["a key twice"]),
])
def test_a_wrong_annotation_file_names_its_line_or_entry(tmp_path, name, raw, words):
    write_labels(tmp_path)
    dataset, path = f"ss{name[:2]}", tmp_path / f"something-something-{name}"
    path.write_bytes(raw)
    with pytest.raises(ValueError) as e:
        data.read_annotations(dataset, tmp_path, "train")
    assert all(w in str(e.value) for w in [str(path), *words]) and "\n" not in str(e.value), e.value


def test_answers_of_the_test_split_are_complete_and_unique(tmp_path):
    write_labels(tmp_path)
    (tmp_path / "something-something-v2-test.json").write_text('[{"id": "1"}, {"id": "2"}]')
    answers = tmp_path / "test-answers.csv"
    for text, words in ((f"1;{CLASSES[0]}\n", ["none for 1", "clip 2"]), (f"1;{CLASSES[0]}\n2;{CLASSES[0]}\n1;{CLASSES[1]}\n", ["line 3", "again"]),
                        (f"1;{CLASSES[0]}\n2;Ghost\n", ["line 2", "Ghost"])):
        answers.write_text(text)
        with pytest.raises(ValueError) as e:
            data.read_annotations("ssv2", tmp_path, "test")
        assert all(w in str(e.value) for w in [str(answers), *words]), e.value


# ----- data workers that die or hang -----

FAKE = """
import os, runpy, signal, sys, time
import data
read = data.read_clip
def fake(path, choose):
    if os.path.basename(path) == "{victim}":
        {fault}
    return read(path, choose)
data.read_clip = fake                                   # data workers are forks, so they have it too
sys.argv = {words}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_faulty(script, fault, victim, *flags):
    words = [str(ROOT / script), *map(str, flags)]
    done = subprocess.run([sys.executable, "-c", FAKE.format(fault=fault, victim=victim, words=words)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """20 clips of two small frames in V1's layout, in both splits."""
    root = tmp_path_factory.mktemp("faulty") / "clips"
    for i in range(20):
        folder = root / "20bn-something-something-v1" / str(i)
        folder.mkdir(parents=True)
        for name, raw in fuzz.pictures().items():
            if name in ("baseline.jpg", "progressive.jpg"):
                (folder / name).write_bytes(raw)
    write_labels(root)
    for split in ("train", "validation"):
        (root / f"something-something-v1-{split}.csv").write_text("".join(f"{i};{CLASSES[i % 2]}\n" for i in range(20)))
    return root


def test_a_data_worker_that_dies_names_its_clip(folders, tmp_path):
    code, complaint = run_faulty("train.py", "os.kill(os.getpid(), signal.SIGSEGV)", "13", "--dataset", "ssv1", "--data_root", folders, "--recipe", "toy",
                                 "--image_size", 16, "--num_frames", 4, "--dim", 32, "--heads", 2, "--batch_size", 4, "--epochs", 1,
                                 "--out_dir", tmp_path / "out", "--device", "cpu", "--workers", 2, "--timeout", 30)
    # PyTorch raises wherever the trainer happens to be. In a __del__ Python drops the error and says so; it comes again after the time-out.
    complaint = re.sub(r"Exception ignored in: .*?RuntimeError: DataLoader worker[^\n]*\n", "", complaint, flags=re.DOTALL)
    last = complaint.splitlines()[-1].lstrip("\0")      # PyTorch ends its own line so
    assert code == 1 and last.startswith("train.py: ") and "Traceback" not in complaint, complaint
    assert all(w in last for w in ["DataLoader worker", "clip 13 ", str(folders / "20bn-something-something-v1" / "13"), "data.py check"]), complaint


def test_a_data_worker_that_hangs_names_its_clip(folders, tmp_path):
    model = build_model("tiny", dim=32, depth=2, heads=2, num_frames=4, image_size=16, patch_size=8, num_classes=3)
    torch.save(dict(model=model.state_dict(), model_config=asdict(model.config), classes=sorted(CLASSES), mean=list(data.CLIP_MEAN), std=list(data.CLIP_STD),
                    args=dict(dataset="ssv1", data_root=str(folders), control="none")), tmp_path / "model.pt")
    code, complaint = run_faulty("evaluate.py", "time.sleep(600)", "17", "--ckpt", tmp_path / "model.pt", "--device", "cpu", "--workers", 1, "--timeout", 5)
    last = complaint.splitlines()[-1]
    assert code == 1 and last.startswith("evaluate.py: ") and "clip 17 " in last and "timed out after 5" in last, complaint


def test_a_worker_hands_over_in_silence(monkeypatch, capfd):
    """A trainer that ends while it takes over a batch tears the worker's connection; that is no second error to report."""
    connect = multiprocessing.connection.SocketClient

    def torn(address):
        connect(address).close()
        return connect(address)

    monkeypatch.setattr(multiprocessing.connection, "SocketClient", torn)
    loader = torch.utils.data.DataLoader(torch.arange(4), num_workers=1, worker_init_fn=evaluate.setup_worker)
    assert torch.cat(list(loader)).tolist() == [0, 1, 2, 3]
    assert capfd.readouterr().err == ""


def test_worker_error_leaves_other_errors_alone():
    for error in (RuntimeError("CUDA error"), ValueError("DataLoader worker (pid 1) is killed by signal: Killed. ")):
        assert data.worker_error(error) is error
    data.reading_now().zero_()
    message = str(data.worker_error(RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed. ")))
    assert "Killed, while reading no clip" in message
    with data.note_reading(data.reading_now(), "clip ö " + "x" * 600 + "end"):
        assert "xxend" in str(data.worker_error(RuntimeError("DataLoader timed out after 5 seconds")))
    assert not data.reading_now().any()
