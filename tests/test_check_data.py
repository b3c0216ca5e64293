"""scripts/check_data.py: the structure of video files, probing, the lists, the contact sheet.

python -m pytest -q tests/test_check_data.py
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import data
from conftest import ROOT
from scripts import check_data
from test_data import SIDES, WEBM, break_clip, grey_frames, save_frames, v1_set, write_v1, write_v2

WHOLE = WEBM.read_bytes()
# as an interrupted download may leave it: the rest is zeros
DAMAGED = WHOLE[:700] + bytes(len(WHOLE) - 700)


def run_check(root, dataset, *flags):
    """The check in this process: exit status, what it printed, ids on the skip list, its text."""
    out, printed = root / "skip.txt", io.StringIO()
    flags = ["--dataset", dataset, "--data_root", str(root), "--out", str(out), *flags]
    with pytest.raises(SystemExit) as e, contextlib.redirect_stdout(printed):
        check_data.main(["check", "--jobs", "1", *flags])
    return e.value.code, printed.getvalue(), data.read_skip_list(out), out.read_text()


def lines_of(kind, printed):
    return [line[12:] for line in printed.splitlines() if line.startswith(f"{kind} ")]


def no_probing(monkeypatch):
    """Clips count as readable, and no process starts: for tests of what is done before it."""
    monkeypatch.setattr(
        check_data, "isolated", lambda function, paths, jobs, timeout: ((True, "") for _ in paths)
    )


# ----- the structure of video files -----


def test_a_webm_that_lost_bytes_in_its_middle_is_refused(tmp_path):
    pytest.importorskip("decord")
    path = tmp_path / "1.webm"
    assert check_data.webm_damage(WEBM) is None and check_data.probe(str(WEBM)) == ""
    for at in range(300, len(WHOLE) - 60, 50):
        path.write_bytes(WHOLE[:at] + WHOLE[at + 40 :])
        with pytest.raises(ValueError):
            check_data.probe(str(path))
    path.write_bytes(WHOLE + b"what follows the segment")
    assert check_data.webm_damage(path) is None and check_data.probe(str(path)) == ""
    # frames there: one player shows them, another does not
    path.write_bytes(WHOLE + WHOLE[200:])
    assert check_data.webm_damage(path) > len(WHOLE)
    with pytest.raises(ValueError, match="damaged at byte"):
        check_data.probe(str(path))


def test_a_webm_that_was_cut_off_still_fits(tmp_path):
    path = tmp_path / "1.webm"
    for length in range(4, len(WHOLE), 7):
        path.write_bytes(WHOLE[:length])
        assert check_data.webm_damage(path) is None
    assert check_data.declared_bytes(WEBM) == len(WHOLE)
    assert check_data.declared_bytes(path) == len(WHOLE)


def test_the_parsers_take_any_bytes(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "1"
    box = mp4_box(b"ftyp", b"isom") + mp4_box(b"moov", mp4_box(b"mvhd", bytes(100)))
    for number in range(300):
        raw = np.frombuffer((WHOLE, box, rng.bytes(60))[number % 3], np.uint8).copy()
        places = rng.integers(0, len(raw), 4)
        raw[places] = rng.integers(0, 256, 4)
        path.write_bytes(raw[: rng.integers(1, len(raw) + 1)].tobytes())
        damage = check_data.webm_damage(path)
        assert damage is None or 0 <= damage <= len(raw)
        assert isinstance(check_data.declared_bytes(path), int)
        assert check_data.mp4_mirrored(path) in (True, False)
        assert isinstance(check_data.remedy(path), str)


def mp4_box(kind, content):
    return (8 + len(content)).to_bytes(4, "big") + kind + content


def mp4_with_matrix(a, b, c, d):
    """An mp4 without frames, to be shown with this matrix."""
    a, b, c, d = (round(65536 * v).to_bytes(4, "big", signed=True) for v in (a, b, c, d))
    # version 0: the matrix is at byte 40
    header = bytes(40) + a + b + bytes(4) + c + d + bytes(24)
    track = mp4_box(b"trak", mp4_box(b"tkhd", header))
    movie = mp4_box(b"moov", mp4_box(b"mvhd", bytes(100)) + track)
    return mp4_box(b"ftyp", b"isom") + movie + mp4_box(b"mdat", bytes(50))


@pytest.mark.parametrize(
    "matrix, mirrored",
    [
        ((1, 0, 0, 1), False),
        ((0, 1, -1, 0), False),
        ((-1, 0, 0, -1), False),
        ((0, -1, 1, 0), False),
        ((-1, 0, 0, 1), True),
        ((0, 1, 1, 0), True),
        ((1, 1, -1, 1), True),
    ],
)
def test_a_mirrored_mp4_is_noticed(tmp_path, matrix, mirrored):
    path, raw = tmp_path / "1.mp4", mp4_with_matrix(*matrix)
    path.write_bytes(raw)
    assert check_data.mp4_mirrored(path) == mirrored
    assert check_data.declared_bytes(path) == len(raw)
    if mirrored:
        with pytest.raises(ValueError, match="mirrored.* re-encode it with: ffmpeg"):
            check_data.probe(str(path))
    path.write_bytes(raw[:-20])
    assert check_data.declared_bytes(path) == len(raw)  # 20 more than it has


# ----- what to do about a video that does not read -----


def without_duration(raw):
    """A webm as a browser records it: its duration becomes an element that says nothing."""
    at = raw.index(b"\x44\x89\x88")
    return raw[:at] + b"\xec\x89" + bytes(9) + raw[at + 11 :]


def transport_stream(packet, before=b""):
    return (before + b"G" + bytes(187)) * packet


@pytest.mark.parametrize(
    "name, raw, verb",
    [
        ("recorded.webm", without_duration(WHOLE), "remux"),
        ("av1.webm", without_duration(WHOLE).replace(b"V_VP9", b"V_AV1"), "re-encode"),
        ("other.webm", WHOLE, "re-encode"),
        ("camera.ts", transport_stream(9), "remux"),
        ("camera.m2ts", transport_stream(9, before=bytes(4)), "remux"),
        ("moving.gif", b"GIF89a" + bytes(300), "remux"),
        ("theora.ogv", b"OggS" + bytes(300), "remux"),
        ("cut.mp4", mp4_with_matrix(1, 0, 0, 1), "re-encode"),
        ("old.avi", b"RIFF" + bytes(300), "re-encode"),
        ("old.mpg", b"\x00\x00\x01\xba" + bytes(300), "re-encode"),
        ("no video.mp4", b"GET / HTTP/1.0" + bytes(300), None),
        ("an error page.mp4", b"<html>", None),
        ("empty.mp4", b"", None),
    ],
)
def test_the_remedy_fits_the_container_whatever_the_name(tmp_path, name, raw, verb):
    path = tmp_path / "it's here" / name
    path.parent.mkdir()
    path.write_bytes(raw)
    line = check_data.remedy(path)
    if verb is None:
        assert line == ""
        return
    assert line.startswith(f"{verb} it with: ffmpeg -i ")
    words = shlex.split(line.split(": ", 1)[1])  # as a shell takes it
    assert words[2] == str(path) and words[-1] != str(path)
    assert (["-c", "copy"] == words[3:5]) == (verb == "remux")
    assert words[-1].endswith(data.VIDEOS)  # so that class folders take it
    assert verb == "remux" or words[words.index("-fps_mode") + 1] == "passthrough"


def test_an_unreadable_video_comes_with_its_remedy_and_a_frame_folder_with_none(tmp_path):
    pytest.importorskip("decord")
    path = tmp_path / "theora.webm"
    path.write_bytes(b"OggS" + bytes(300))
    with pytest.raises(ValueError) as e:
        check_data.probe(str(path))
    assert "it may be whole: remux it with: ffmpeg -i" in str(e.value)
    path.write_bytes(WHOLE[:300])  # before its first frame: no line makes it whole
    with pytest.raises(ValueError, match="the file is cut off") as e:
        check_data.probe(str(path))
    assert "ffmpeg -i" not in str(e.value)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="the file is empty"):
        check_data.probe(str(path))
    break_clip("broken jpeg", tmp_path / "frames")
    with pytest.raises(ValueError) as e:
        check_data.probe(str(tmp_path / "frames"))
    assert "ffmpeg -i" not in str(e.value) and "\n" not in str(e.value)


# ----- check -----


def test_check_on_frame_folders_with_one_that_hangs(tmp_path):
    kinds = {"11": "missing", "12": "empty folder", "13": "broken jpeg", "14": "two sizes"}
    write_v1(tmp_path, [(i, SIDES[0]) for i in ("10", *kinds)], [("20", SIDES[1])])
    clips = tmp_path / "20bn-something-something-v1"
    save_frames(clips / "10", grey_frames(3), kind="jpg")
    for clip, kind in kinds.items():
        break_clip(kind, clips / clip)
    (clips / "20").mkdir()
    os.mkfifo(clips / "20" / "00001.jpg")  # opening a pipe that nobody writes to waits for ever
    # shorter than the start of a process, on purpose
    code, printed, ids, _ = run_check(tmp_path, "ssv1", "--timeout", "2")
    assert code == 1 and ids == {"11", "12", "13", "14", "20"}, printed
    assert "train: 5 clips, 2 classes" in printed and "test: left out" in printed
    assert "6 frame folders: 1 readable" in printed and "5 unreadable" in printed
    assert "--skip_list" in printed
    lines = {line.split(":")[0]: line for line in lines_of("unreadable", printed)}
    assert "hang" in lines["20"] and "does not exist" in lines["11"]
    assert str(clips / "12") in lines["12"]


def test_check_reports_missing_numbers_and_clips_that_no_split_lists(tmp_path):
    v1_set(tmp_path / "set", {i: (grey_frames(4), SIDES[0]) for i in ("1", "2", "3")})
    folder = tmp_path / "set" / "20bn-something-something-v1"
    (folder / "2" / "00003.png").unlink()
    shutil.copytree(folder / "1", folder / "4")
    code, printed, ids, text = run_check(tmp_path / "set", "ssv1")
    assert code == 0 and ids == set()
    assert lines_of("unused", printed) == [str(folder / "4")]
    line = "2: has 3 frames, and 1 numbers between the first and the last are missing"
    assert lines_of("short", printed) == [f"{line}; it is used as it is"]
    assert "# short, kept: 2" in text


def test_check_on_good_data_succeeds_wherever_it_lies(tmp_path, capfd):
    root = tmp_path / "a folder of mine"  # words of our own messages in a path must not matter
    v1_set(root, {"1": (grey_frames(2), SIDES[0])})
    code, printed, ids, _ = run_check(root, "ssv1")
    assert code == 0 and ids == set() and "1 readable" in printed
    assert lines_of("unreadable", printed) == []
    time.sleep(0.5)  # its probing process has ended
    assert "Traceback" not in capfd.readouterr().err


def test_check_without_any_split_says_what_is_missing(tmp_path, capsys):
    write_v1(tmp_path, [("1", SIDES[0])], [("2", SIDES[1])])
    for split in ("train", "validation"):
        (tmp_path / f"something-something-v1-{split}.csv").unlink()
    flags = ["--dataset", "ssv1", "--data_root", str(tmp_path), "--out", str(tmp_path / "skip.txt")]
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        check_data.main(flags)  # without the word check
    assert "v1-train.csv" in capsys.readouterr().out
    assert not (tmp_path / "skip.txt").exists()


@pytest.fixture(scope="module")
def checked_videos(tmp_path_factory):
    """One run of check over whole and bad videos; the tests below look at its outcome."""
    pytest.importorskip("decord")
    root = tmp_path_factory.mktemp("videos")
    kinds = {"11": "missing", "12": "empty file", "13": "garbage"}
    write_v2(
        root,
        [(i, SIDES[0]) for i in ("10", *kinds)],
        [("20", SIDES[1])],
        test=["30", "31", "32"],
    )
    clips = root / "20bn-something-something-v2"
    for clip, kind in kinds.items():
        break_clip(kind, clips / f"{clip}.webm")
    (clips / "10.webm").write_bytes(WHOLE)
    (clips / "20.webm").write_bytes(WHOLE[:300])  # truncated before its first frame
    (clips / "30.webm").write_bytes(WHOLE[:800])  # truncated after half of its frames
    (clips / "31.webm").write_bytes(DAMAGED)
    (clips / "32.webm").write_bytes(WHOLE)
    return run_check(root, "ssv2")


def test_check_on_videos(checked_videos):
    code, printed, ids, text = checked_videos
    assert code == 1 and ids >= {"11", "12", "13", "20"} and not ids & {"10", "30", "32"}, printed
    assert "train: 4 clips" in printed and "test: 3 clips" in printed
    assert "8 videos (.webm)" in printed
    # each id with its reason
    assert text.startswith("#") and all(f"\n{i}  # " in text for i in ids)


def test_check_reports_a_video_shorter_than_its_container_declares(checked_videos):
    _, printed, ids, text = checked_videos
    assert "30" not in ids and "# short, kept: 30" in text
    assert [line.split(":")[0] for line in lines_of("short", printed)] == ["30"]


def test_check_lists_a_damaged_video(checked_videos):
    assert "31" in checked_videos[2], "training may fail on it, so it belongs on the skip list"


def test_check_finds_the_same_bytes_in_two_splits(checked_videos):
    same = lines_of("same clip", checked_videos[1])
    assert same == ["32 in test and 10 in train hold the same bytes"]


def test_a_decoder_that_crashes_is_named_and_the_others_are_read(tmp_path):
    paths = [str(tmp_path / name) for name in ("good", "crash", "refused", "good")]
    results = list(check_data.isolated(pretend_to_decode, paths, jobs=1, timeout=60))
    assert results == [
        (True, "good"),
        (False, "the decoder crashed on it"),
        (False, "no video"),
        (True, "good"),
    ]


def pretend_to_decode(path):
    name = os.path.basename(path)
    if name == "crash":
        os._exit(11)
    if name == "refused":
        raise ValueError("no video")
    return name


@pytest.mark.parametrize("flags", [["--jobs", "0"], ["--timeout", "0"]])
def test_flags_out_of_range_are_refused(tmp_path, flags):
    with pytest.raises(ValueError, match=flags[0]):
        check_data.main(["--data_root", str(tmp_path), *flags])


def test_a_skip_list_that_cannot_be_written_is_an_error_before_the_clips_are_read(tmp_path):
    v1_set(tmp_path / "set", {"1": (grey_frames(2), SIDES[0])})
    flags = ["--dataset", "ssv1", "--data_root", str(tmp_path / "set")]
    with pytest.raises(OSError, match="nowhere"):
        check_data.main([*flags, "--out", str(tmp_path / "nowhere" / "skip.txt")])


# ----- the lists -----


def test_the_same_clip_in_training_and_validation_is_reported(tmp_path, monkeypatch):
    no_probing(monkeypatch)
    for clip, content in enumerate((b"same", b"size", b"longer", b"same", b"as 0")):
        folder = tmp_path / "20bn-something-something-v1" / str(clip)
        folder.mkdir(parents=True)
        for i in (1, 2):
            (folder / f"{i}.jpg").write_bytes(content)
    train = [(i, SIDES[0]) for i in ("0", "1", "2")]
    write_v1(tmp_path, train, [(i, SIDES[0]) for i in ("2", "3", "4")])
    code, printed, ids, _ = run_check(tmp_path, "ssv1")
    assert lines_of("same clip", printed) == [
        "2 is both in train and in validation",
        "0 in train and 3 in validation hold the same bytes",
    ]
    assert code == 0 and ids == set()


def test_an_id_that_lies_outside_is_listed(tmp_path, monkeypatch):
    no_probing(monkeypatch)
    v1_set(tmp_path / "set", {"1": (grey_frames(2), SIDES[0])})
    save_frames(tmp_path / "outside", grey_frames(2))
    for name in ("train", "validation"):
        (tmp_path / "set" / f"something-something-v1-{name}.csv").write_text(
            f"1;{SIDES[0]}\n../../outside;{SIDES[1]}\n"
        )
    code, printed, skipped, listed = run_check(tmp_path / "set", "ssv1")
    assert code == 1 and skipped == {"../../outside"} and "lies outside" in listed


def test_only_clips_of_equal_size_are_compared(tmp_path, monkeypatch):
    no_probing(monkeypatch)
    for split, sizes in ("train", (10, 20, 20)), ("validation", (30, 40)):
        (tmp_path / split / "a").mkdir(parents=True)
        for i, size in enumerate(sizes):
            (tmp_path / split / "a" / f"{i}.mp4").write_bytes(bytes(size))
    splits = check_data.read_splits("folder", tmp_path, None)
    paths, _ = check_data.find_clips(splits)

    def no_reading(*_):
        raise AssertionError("read though no clip of the other split has its size")

    monkeypatch.setattr(check_data.Path, "read_bytes", no_reading)
    assert check_data.same_clips(splits, paths) == []


@pytest.mark.parametrize("separator, header", [(",", "path,label"), (" ", "video_id template")])
def test_the_header_of_a_list_is_reported(tmp_path, monkeypatch, separator, header):
    no_probing(monkeypatch)
    for split, clips in ("train", "abcd"), ("validation", "ef"):
        rows = [f"{clip}{separator}{('run', 'jump')[i % 2]}\n" for i, clip in enumerate(clips)]
        (tmp_path / f"{split}.csv").write_text(f"{header}\n{''.join(rows)}")
        for clip in clips:
            save_frames(tmp_path / clip, grey_frames(2, first=ord(clip)))
    code, printed, ids, _ = run_check(tmp_path, "folder")
    found = lines_of("header?", printed)
    clip, label = header.split(separator)
    assert len(found) == 2 and all(repr(clip) in f and repr(label) in f for f in found), printed
    assert "in train" in found[0] and "in validation" in found[1] and "delete" in found[0]
    assert code == 1 and ids == {clip}


def test_a_class_with_a_single_line_whose_clip_does_not_exist_is_reported(tmp_path, monkeypatch):
    no_probing(monkeypatch)
    (tmp_path / "train.csv").write_text("naam klasse\na run\nb run\nc jump\nd run\n")
    for clip in "abc":  # d is missing, but its class has other clips
        save_frames(tmp_path / clip, grey_frames(2))
    _, printed, ids, _ = run_check(tmp_path, "folder")
    found = lines_of("header?", printed)
    assert len(found) == 1 and "'naam' of class 'klasse'" in found[0] and ids == {"naam", "d"}


def test_the_header_of_the_labels_is_reported(tmp_path, monkeypatch):
    no_probing(monkeypatch)
    v1_set(tmp_path / "v1", {"1": (grey_frames(2), SIDES[0])})
    labels = tmp_path / "v1" / "something-something-v1-labels.csv"
    labels.write_text("label\n" + labels.read_text())
    assert "class 'label'" in lines_of("header?", run_check(tmp_path / "v1", "ssv1")[1])[0]
    own = tmp_path / "own"
    own.mkdir()
    (own / "train.csv").write_text("a 0\nb 1\n")
    (own / "classes.txt").write_text("id name\n0 run\n1 jump\n")  # then 0 would be "id name"
    for clip in "ab":
        save_frames(own / clip, grey_frames(2))
    assert "class 'id name'" in lines_of("header?", run_check(own, "folder")[1])[0]


def test_letters_and_plain_words_are_no_headers(tmp_path, monkeypatch):
    no_probing(monkeypatch)
    for name in ("A", "S", "name", "file a letter"):
        save_frames(tmp_path / "train" / name / "1", grey_frames(2))
        save_frames(tmp_path / "train" / name / "2", grey_frames(2))
    assert lines_of("header?", run_check(tmp_path, "folder")[1]) == []


@pytest.mark.parametrize("layout", [1, 2])
def test_if_every_clip_is_missing_it_says_so_once(tmp_path, layout):
    write = write_v1 if layout == 1 else write_v2
    write(tmp_path, [(str(i), SIDES[0]) for i in range(50)], [("99", SIDES[1])])
    clips = tmp_path / f"20bn-something-something-v{layout}"
    suffix = "" if layout == 1 else ".webm"
    (clips / "part1" / f"0{suffix}").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as e, contextlib.redirect_stdout(io.StringIO()) as out:
        run_check(tmp_path, f"ssv{layout}")
    assert "none of the 51 clips" in str(e.value) and "\n" not in str(e.value)
    # the expected place, and what is there instead
    assert str(clips / f"0{suffix}") in str(e.value) and str(clips / "part1") in str(e.value)
    assert "unreadable" not in out.getvalue() and not (tmp_path / "skip.txt").exists()


def test_missing_clips_among_others_are_listed(tmp_path, monkeypatch):
    no_probing(monkeypatch)
    write_v1(tmp_path, [(str(i), SIDES[i % 2]) for i in range(40)])
    save_frames(tmp_path / "20bn-something-something-v1" / "39", grey_frames(2))
    code, printed, ids, _ = run_check(tmp_path, "ssv1")
    assert code == 1 and ids == {str(i) for i in range(39)}
    assert all("does not exist" in line for line in lines_of("unreadable", printed))
    assert "40 frame folders: 1 readable" in printed


def test_files_in_class_folders_that_are_no_clips_are_named_with_their_remedy(
    tmp_path, monkeypatch
):
    pytest.importorskip("decord")
    no_probing(monkeypatch)
    folder = tmp_path / "train" / "run"
    folder.mkdir(parents=True)
    (folder / "1.mp4").touch()
    (folder / "2.ts").write_bytes(transport_stream(9))
    (folder / "notes.txt").write_text("recorded in May")
    (folder / ".DS_Store").touch()
    save_frames(folder / "3", grey_frames(2))
    (tmp_path / "train" / "jump").mkdir()
    (tmp_path / "train" / "jump" / "4.mp4").touch()
    code, printed, _, _ = run_check(tmp_path, "folder")
    video, text = lines_of("unused", printed)
    assert video.startswith(f"{folder / '2.ts'}; to use it, remux it with: ffmpeg")
    assert text == str(folder / "notes.txt") and code == 0


def test_clip_root_and_folder_data(tmp_path, monkeypatch):
    no_probing(monkeypatch)
    (tmp_path / "lists").mkdir()
    save_frames(tmp_path / "clips" / "a", grey_frames(2))
    (tmp_path / "lists" / "train.csv").write_text("a run\nb run\n")
    flags = ["--clip_root", str(tmp_path / "clips")]
    code, printed, ids, _ = run_check(tmp_path / "lists", "folder", *flags)
    assert code == 1 and ids == {"b"} and "2 clips: 1 readable" in printed


# ----- show -----

TINY = ["--model", "tiny", "--num_frames", "4", "--image_size", "16", "--clip", "none"]


def test_show_writes_a_contact_sheet(tmp_path):
    clips = {str(i): (grey_frames(9, 20, 24), SIDES[i % 2]) for i in range(3)}
    v1_set(tmp_path / "set", clips)
    out = tmp_path / "show.png"
    flags = ["--dataset", "ssv1", "--data_root", str(tmp_path / "set"), "--out", str(out)]
    check_data.main(["show", *flags, "--samples", "2", *TINY])
    picture = np.asarray(Image.open(out))
    # 8 columns of at least 96 pixels, 3 between them; 22 for the label's line
    assert picture.shape == (2 * (96 + 22 + 3), 8 * (96 + 3), 3)
    assert picture.std() > 10


def test_show_names_a_broken_clip_in_one_line(tmp_path):
    v1_set(tmp_path / "set", {"1": (grey_frames(4), SIDES[0])})
    for frame in (tmp_path / "set" / "20bn-something-something-v1" / "1").iterdir():
        frame.write_bytes(b"no picture")
    flags = ["--dataset", "ssv1", "--data_root", str(tmp_path / "set"), "--out", "show.png", *TINY]
    command = [sys.executable, str(ROOT / "scripts" / "check_data.py"), "show", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 1 and re.fullmatch(r"check_data\.py: .*v1/1 cannot be read.*", last)
    assert "Traceback" not in done.stdout


def test_the_command_runs_from_another_folder_and_exits_with_one(tmp_path):
    v1_set(tmp_path / "set", {i: (grey_frames(2), SIDES[0]) for i in ("1", "2")})
    break_clip("broken jpeg", tmp_path / "new")
    shutil.rmtree(tmp_path / "set" / "20bn-something-something-v1" / "2")
    (tmp_path / "new").rename(tmp_path / "set" / "20bn-something-something-v1" / "2")
    flags = ["--dataset", "ssv1", "--data_root", "set", "--jobs", "1"]
    command = [sys.executable, str(ROOT / "scripts" / "check_data.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert data.read_skip_list(tmp_path / "skip_list.txt") == {"2"}


def test_damage_in_the_header_of_a_webm_is_found(tmp_path):
    raw = bytearray(WEBM.read_bytes())
    size = raw.index(bytes.fromhex("4286")) + 2  # of the version, an element in the header
    assert raw[size] == 0x81 and check_data.webm_damage(WEBM) is None
    raw[size] = 0xBF  # longer than the header
    (tmp_path / "damaged.webm").write_bytes(raw)
    assert check_data.webm_damage(tmp_path / "damaged.webm") == size - 2
