"""data.py: no clip, label or order that is silently wrong.

Protects: which frames are chosen; each layout of data, and one clear error for a wrong one; exact
frames from videos and folders; crops, RandAugment and flips; samples that depend only on (seed,
epoch, index, repetition); the batches of a step.

python -m pytest -q tests/test_data.py
"""
import json
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import data
from conftest import save_frames, write_v1

HERE = Path(__file__).parent
WEBM = HERE / "clip.webm"       # VP9, 24 frames of 32 x 32, frame i is grey of value 20 + 9 i
SIDES = ["Pulling something from left to right", "Pulling something from right to left"]
V2 = "something-something-v2-"

def grey_frames(n, h=16, w=16):
    """Frame i is grey, of value 5 i: every frame says which one it is."""
    return [np.full((h, w, 3), 5 * i) for i in range(n)]

def frame_numbers(video):
    """The numbers of grey frames. video: (3, F, S, S)"""
    return (video[0, :, 0, 0] // 5).tolist()

def v1_set(root, frames, Set=data.TrainingDataset, **options):
    """A data set in V1's layout. frames: {clip: its frames}, all of the first class"""
    folder = write_v1(root, SIDES, train=[(clip, SIDES[0]) for clip in frames])
    for clip in frames:
        save_frames(folder / clip, frames[clip])
    return Set("ssv1", root, "train", num_frames=4, size=16, **options)

# ----- Which frames ---------------------------------------------------------

@pytest.mark.parametrize("n, num_frames, expected", [
    (17, 4, [2, 6, 10, 14]),                # segments of 4, their middles
    (41, 4, [5, 15, 25, 35]),               # the example of the docstring
    (8, 8, [0, 1, 2, 3, 4, 4, 5, 6]),       # edges 0 .875 1.75 2.625 3.5 4.375 5.25 6.125, rounded
    (3, 4, [0, 0, 1, 2]),                   # edges 0 .5 1 1.5: halves to even
    (1, 4, [0, 0, 0, 0]),
])
def test_sample_indices_by_hand(n, num_frames, expected):
    assert data.sample_indices(n, num_frames).tolist() == expected

def test_sample_indices_are_those_of_a_slow_loop():
    for n in [*range(1, 40), 77, 300]:
        for num_frames in (1, 4, 16):
            s = (n - 1) / num_frames
            edges = [round(s * i) for i in range(num_frames + 1)]
            for clips in (1, 2, 3):
                expected = []
                for view in range(clips):
                    expected += [start + int(s / (clips + 1) * (view + 1)) for start in edges[:-1]]
                assert data.sample_indices(n, num_frames, clips=clips).tolist() == expected
            drawn = data.sample_indices(n, num_frames, np.random.default_rng(n))
            for low, i, high in zip(edges, drawn, edges[1:], strict=False):
                assert low <= i <= high

def test_training_draws_every_frame_of_a_segment_with_both_ends():
    rng = np.random.default_rng(0)
    drawn = np.stack([data.sample_indices(17, 4, rng) for _ in range(300)])
    for i in range(4):
        assert set(drawn[:, i].tolist()) == set(range(4 * i, 4 * i + 5))

# ----- Layouts --------------------------------------------------------------

def test_v1_and_jester_as_released(tmp_path):
    classes = ["Showing something, then hiding it", "Approaching something"]       # not sorted
    write_v1(tmp_path, classes, train=[("7", classes[0]), ("100", classes[1])], test=["9", "8"])
    ids, labels, names, source = data.read_annotations("ssv1", tmp_path, "train")
    assert (ids.tolist(), labels.tolist(), names) == (["7", "100"], [1, 0], sorted(classes))
    assert source.name == "something-something-v1-train.csv"
    ids, labels, _, _ = data.read_annotations("ssv1", tmp_path, "test")
    assert (ids.tolist(), labels.tolist()) == (["9", "8"], [-1, -1])

    # Jester has other names, and here lines end as on Windows, after the mark that Excel writes.
    root = tmp_path / "jester"
    root.mkdir()
    for name, text in ("labels", "Up\r\nDown\r\n"), ("train", "34870;Up\r\n1;Down\r\n"):
        (root / f"jester-v1-{name}.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    save_frames(root / "20bn-jester-v1" / "34870", grey_frames(9), kind="jpg")
    dataset = data.VideoDataset("ssv1", root, "train", num_frames=4, size=16)
    assert dataset.classes == ["Down", "Up"] and dataset.labels.tolist() == [1, 0]
    assert frame_numbers(dataset[0][0]) == [1, 3, 5, 7]

@pytest.mark.parametrize("prefix, folder", [(V2, ""), ("", "labels")])
def test_v2_as_released_by_20bn_and_by_qualcomm(tmp_path, prefix, folder):
    lists = tmp_path / folder
    lists.mkdir(exist_ok=True)
    names = ["Moving something, then something else", "Showing something next to something"]
    labels = {names[1]: "0", names[0]: "1"}             # our numbers follow the sorted names
    train = [dict(id="4", label="showing a cup next to a box", placeholders=["a cup", "a box"],
                  template="Showing [something] next to [something]"),
             dict(id="2", template="Moving [something], then [something else]")]
    files = dict(labels=labels, train=train, test=[dict(id="1"), dict(id="3")])
    for name, content in files.items():
        (lists / f"{prefix}{name}.json").write_text(json.dumps(content))
    ids, labels, classes, _ = data.read_annotations("ssv2", tmp_path, "train")
    assert (ids.tolist(), labels.tolist(), classes) == (["4", "2"], [1, 0], names)
    assert data.read_annotations("ssv2", tmp_path, "test")[1].tolist() == [-1, -1]
    (lists / "test-answers.csv").write_text(f"3;{names[1]}\n1;{names[0]}\n")
    ids, labels, _, _ = data.read_annotations("ssv2", tmp_path, "test")
    assert (ids.tolist(), labels.tolist()) == (["3", "1"], [1, 0])

def own_folder(root, *clips):
    """Empty files: own_folder(root, "train/run/1.mp4", "train.csv: a.mp4 run", ...)"""
    for clip in clips:
        name, _, text = clip.partition(": ")
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.replace("|", "\n").encode("latin-1" if "\xe9" in text else "utf-8"))
    return root

def read_own(root, split="train"):
    """[(clip, class name)] of a folder of own data."""
    ids, labels, classes, _ = data.read_annotations("folder", root, split)
    return [(clip, classes[label] if label >= 0 else None)
            for clip, label in zip(ids.tolist(), labels, strict=True)]

def test_class_folders_hold_videos_of_any_kind_or_folders_of_frames(tmp_path):
    own_folder(tmp_path, "train/run/1.mp4", "train/run/2.MKV", "train/jump/1.webm",
               "train/.DS_Store", "train/@eaDir/1.mp4", "train/run/@eaDir/1.jpg",
               "train/run/._1.mp4", "train/run/thumbnail.jpg", "train/cover.jpg", "val/jump/3.avi",
               "frames/train/walk.mov/1/001.png", "frames/train/sit/1.avi/001.png")
    assert read_own(tmp_path) == [("train/jump/1.webm", "jump"), ("train/run/1.mp4", "run"),
                                  ("train/run/2.MKV", "run")]
    assert read_own(tmp_path, "validation") == [("val/jump/3.avi", "jump")]
    assert read_own(tmp_path / "frames") == [("train/sit/1.avi", "sit"),
                                             ("train/walk.mov/1", "walk.mov")]

def test_a_list_counts_before_a_folder_and_the_source_says_so(tmp_path):
    own_folder(tmp_path, "train/run/1.mp4", "train/run/2.mp4", "train.csv: train/run/2.mp4 walk")
    assert read_own(tmp_path) == [("train/run/2.mp4", "walk")]
    assert data.read_annotations("folder", tmp_path, "train")[3] == tmp_path / "train.csv"

@pytest.mark.parametrize("separator", (" ", "\t", ",", "; "))
def test_lists_in_every_usual_form(tmp_path, separator):
    own_folder(tmp_path, "val.txt: c/9.mp4 run", "test.csv: c/7.mp4|c/8.mp4",
               f"train.csv: c/0.mp4{separator}jump|c/1.mp4{separator}run|")
    assert read_own(tmp_path) == [("c/0.mp4", "jump"), ("c/1.mp4", "run")]
    assert read_own(tmp_path, "validation") == [("c/9.mp4", "run")]
    assert read_own(tmp_path, "test") == [("c/7.mp4", None), ("c/8.mp4", None)]
    own_folder(tmp_path, "train.csv: my clips/a, b.mp4\tShowing something, then hiding it")
    assert read_own(tmp_path) == [("my clips/a, b.mp4", "Showing something, then hiding it")]

def test_classes_txt_gives_names_to_numbers_in_any_order(tmp_path):
    own_folder(tmp_path, "train.csv: a.mp4 0|b.mp4 1", "validation.csv: c.mp4 1",
               "classes.txt: 1 run fast|0 walk")
    assert read_own(tmp_path) == [("a.mp4", "walk"), ("b.mp4", "run fast")]
    assert read_own(tmp_path, "validation") == [("c.mp4", "run fast")]

def test_one_name_in_two_unicode_forms_is_one_class_and_one_file(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for split, name in ("train", composed), ("validation", decomposed):
        save_frames(tmp_path / split / name / "1", grey_frames(4))
    for split in ("train", "validation"):
        dataset = data.VideoDataset("folder", tmp_path, split, num_frames=4, size=16)
        assert dataset.classes == [composed] and dataset[0][1] == 0
    (tmp_path / decomposed).mkdir()
    assert data.find_clip(tmp_path, composed) == tmp_path / decomposed

@pytest.mark.parametrize("files, words", [
    # class folders
    (["validation/run/1.mp4"], "no train split, train.csv"),
    (["train/run/1.mp4"], "no validation split, validation.csv"),
    (["train/1.mp4"], "train/1.mp4, train/CLASS/1.mp4"),
    (["train/clip1/001.jpg", "train/clip1/002.jpg"], "train/clip1, no clips, frames"),
    (["train/run/1.gif"], "train/run, no clips, .mp4"),
    (["train/run/person/1.mp4"], "train/run/person, directly in the folder of its class"),
    (["train/run/1.mp4", "train/run/1/001.jpg"], "train/run/1.mp4, train/run/1, remove one kind"),
    (["train/.DS_Store"], "train has no clips"),
    # lists
    (["train.csv: "], "train.csv has no clips"),
    (["train.csv: a.mp4 run|b.mp4"], "train.csv, 'b.mp4', 1 columns"),
    (["train.csv: a.mp4 120 3"], "train.csv, 'a.mp4 120 3', 3 columns"),
    (["train.csv: my clips/1.mp4 run"], "train.csv, 'my clips/1.mp4 run', 3 columns"),
    (["train.csv: clips\\1.mp4 run"], "train.csv, clips\\1.mp4, expected /"),
    (["train.csv: a.mp4 run|a.mp4 walk"], "train.csv, a.mp4, more than once"),
    (["train.csv: a.mp4 caf\xe9"], "train.csv, UTF-8"),
    (["train.csv: a.mp4 run", "validation.csv: b.mp4 fly"], "validation.csv, 'fly', b.mp4"),
    # classes.txt
    (["train.csv: a.mp4 0", "classes.txt: id name|0 run"], "classes.txt, 'id name'"),
    (["train.csv: a.mp4 0", "classes.txt: 0,run"], "classes.txt, '0,run'"),
    (["train.csv: a.mp4 0", "classes.txt: run|walk"], "classes.txt, 'run'"),
    (["train.csv: a.mp4 0", "classes.txt: 0 run|1 run"], "classes.txt, '1 run'"),
    (["train.csv: a.mp4 0", "classes.txt: 0 run|0 walk"], "classes.txt, '0 walk'"),
    (["train.csv: a.mp4 0", "classes.txt: 1 run"], "train.csv, 'a.mp4 0', classes.txt"),
    (["train.csv: a.mp4 0.0", "classes.txt: 0 run"], "train.csv, 'a.mp4 0.0', classes.txt"),
])
def test_own_data_in_another_form_get_one_true_sentence(tmp_path, files, words):
    own_folder(tmp_path, *files)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        for split in ("train", "validation"):
            read_own(tmp_path, split)
    assert "\n" not in str(e.value)
    for word in words.split(", "):
        assert word in str(e.value)

@pytest.mark.parametrize("text, words", [
    ('[{"vid_name": "a", "vid_label": 1}]', "vid_name, id and template"),      # Diving48's keys
    ('{"1": "A"}', "id and template"),
    ('[{"id": 1, "template": "Ghost"}]', "'Ghost', clip 1, 'A'"),
    ('[{"id": "1", "template": "A"}, {"id": "1", "template": "A"}]', "clip 1, more than once"),
    ('[{"id": "1", "temp', "not valid JSON"),
])
def test_v2_lists_in_another_form_are_named(tmp_path, text, words):
    (tmp_path / f"{V2}labels.json").write_text('{"A": "0"}')
    (tmp_path / f"{V2}train.json").write_text(text)
    with pytest.raises(ValueError) as e:
        data.read_annotations("ssv2", tmp_path, "train")
    for word in ["train.json", *words.split(", ")]:
        assert word in str(e.value)

def test_what_is_missing_is_named(tmp_path):
    for dataset in ("ssv1", "ssv2"):
        with pytest.raises(FileNotFoundError, match="top of data.py"):
            data.read_annotations(dataset, tmp_path, "train")
    write_v1(tmp_path, SIDES, train=["7"])
    with pytest.raises(ValueError, match="train.csv has no class for the clip 7"):
        data.read_annotations("ssv1", tmp_path, "train")
    write_v1(tmp_path, SIDES, train=[("7", SIDES[0])])
    with pytest.raises(FileNotFoundError, match="20bn-"):
        data.VideoDataset("ssv1", tmp_path, "train")
    (tmp_path / "20bn-something-something-v1").mkdir()
    with pytest.raises(FileNotFoundError, match="v1/7 does not exist"):
        data.VideoDataset("ssv1", tmp_path, "train")    # not only when the clip is read

def test_the_skip_list_leaves_clips_out_and_counts_them(tmp_path):
    (tmp_path / "skip.txt").write_text("# a comment\n12\n99\nTake #2\n")
    assert data.read_skip_list(tmp_path / "skip.txt") == ["12", "99", "Take #2"]
    clips = {i: grey_frames(5) for i in ("7", "12", "13")}
    kept = v1_set(tmp_path / "set", clips, Set=data.VideoDataset, skip_list=tmp_path / "skip.txt")
    assert (kept.ids.tolist(), len(kept), kept.skipped) == (["7", "13"], 2, 1)
    assert kept.path(1).name == "13"

# ----- Labels of mirrored clips ---------------------------------------------

LEFT_AND_RIGHT = [              # the pairs of Something-Something V1 and V2, Jester and the toy
    SIDES,
    ["Pushing something from left to right", "Pushing something from right to left"],
    ["Turning the camera left while filming something",
     "Turning the camera right while filming something"],
    ["Swiping Left", "Swiping Right"],
    ["Sliding Two Fingers Left", "Sliding Two Fingers Right"],
    ["Turning Hand Clockwise", "Turning Hand Counterclockwise"],
    ["Moving something from left to right", "Moving something from right to left"],
    ["Turning something clockwise", "Turning something counterclockwise"],
    ["rotate_clockwise", "rotate_anticlockwise"],
    ["swipe-left.hand", "swipe-right.hand"],
]
KEPT = [                        # no side, or no class for the other side
    "Putting something upright on the table", "Moving something up", "Moving something down",
    "Plugging something into something but pulling it right out as you remove your hand",
    "Moving something closer to the camera", "Moving something away from the camera",
    "Moving something to the left", "Swiping Up", "Swiping Down", "No gesture", "bright light",
]

def test_a_mirrored_clip_has_the_label_of_the_other_side():
    classes = sorted(sum(LEFT_AND_RIGHT, []) + KEPT)
    mirrored = data.mirror_labels(classes)
    expected = {name: name for name in KEPT}
    for a, b in LEFT_AND_RIGHT:
        expected[a] = b
        expected[b] = a
    assert {classes[i]: classes[j] for i, j in enumerate(mirrored)} == expected

def test_a_flip_mirrors_the_label_with_the_frames(tmp_path):
    frame = np.zeros((16, 16, 3))
    frame[:, 8:] = 255                                  # bright on the right is class 0
    dataset = v1_set(tmp_path, {"1": [frame] * 4}, crop_scale=1.0, flip=True)
    labels = []
    for epoch in range(60):
        video, label, _ = dataset[epoch, 0, 0]
        bright_right = video[..., 12:].float().mean() > video[..., :4].float().mean()
        assert bright_right == (label == 0)
        labels.append(label)
    assert 15 < sum(labels) < 45
    dataset.flip = False
    assert {dataset[epoch, 0, 0][1] for epoch in range(20)} == {0}

# ----- Frames from disk -----------------------------------------------------

def read(path, n=1, **options):
    """Frames of a clip as lists of grey values. n: how many are chosen"""
    return data.read_clip(path, n, **options).float().mean((1, 2, 3)).round().int().tolist()

@pytest.mark.parametrize("names", [
    ["frame1.png", "frame2.png", "frame9.png", "frame10.png", "frame11.png", "frame100.png"],
    ["0001.png", "0009.png", "10.png", "11.png", "100.png"],
    ["IMG_0001.PNG", "img_0002.png", "Img_0010.png"],
    ["take2_9.png", "take2_10.png"],
])
def test_frames_are_ordered_by_number(tmp_path, names):
    for value, name in enumerate(names):
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / name)
    for other in ("._frame1.png", ".DS_Store", "Thumbs.db", "notes.txt"):
        (tmp_path / other).write_bytes(b"not a frame")
    found = read(tmp_path, 16)
    assert found == sorted(found) and set(found) == set(range(len(names)))

@pytest.mark.parametrize("names, words", [
    (["img_1.png", "flow_1.png"], "flow_#.png and img_#.png"),
    (["1.png", "2.jpg"], "#.jpg and #.png"),
    (["1.png", "01.png"], "the same number"),
    (["cover.png"], "cover.png"),
    ([], "no images"),
])
def test_frames_that_are_not_one_series_are_refused(tmp_path, names, words):
    for name in names:
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    with pytest.raises(ValueError) as e:
        data.read_clip(tmp_path, 2)
    assert str(tmp_path) in str(e.value) and words in str(e.value)

def test_frames_come_out_upright_in_rgb_and_of_one_size(tmp_path):
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:, :8] = 255                                # bright on the left
    image = Image.fromarray(picture)
    turned = Image.Exif()
    turned[0x0112] = 6                                  # show it after a quarter turn: left is up
    for name, saved in ("grey", image.convert("L")), ("cmyk", image.convert("CMYK")):
        save_frames(tmp_path / name, [])
        saved.save(tmp_path / name / "1.jpg")
        frame = data.read_clip(tmp_path / name, 1)[0].float()
        assert frame.shape == (3, 16, 24)
        assert frame[:, :, :6].min() > 240 and frame[:, :, 10:].max() < 15
    save_frames(tmp_path / "turned", [])
    image.save(tmp_path / "turned" / "1.jpg", exif=turned)
    frame = data.read_clip(tmp_path / "turned", 1)[0].float()
    assert frame.shape == (3, 24, 16) and frame[:, :6].min() > 240 and frame[:, 10:].max() < 15
    save_frames(tmp_path / "deep", [])
    Image.fromarray(np.full((16, 24), 1000, np.uint16)).save(tmp_path / "deep" / "1.png")
    with pytest.raises(ValueError, match="8 bits"):
        data.read_clip(tmp_path / "deep", 1)
    crops = [np.full((20 + i, 30 - i, 3), 40 * i) for i in range(5)]        # of a tracked face
    save_frames(tmp_path / "tracked", crops)
    frames = data.read_clip(tmp_path / "tracked", 4)
    assert frames.shape == (4, 3, 20, 30) and read(tmp_path / "tracked", 4) == [0, 40, 80, 120]

@pytest.mark.parametrize("kind, suffix", [("broken jpeg", ""), ("empty file", ".webm"),
                                          ("garbage", ".webm"), ("text", ".mp4")])
def test_a_broken_clip_is_named_and_no_other_takes_its_place(tmp_path, kind, suffix):
    path = tmp_path / f"17{suffix}"
    if kind == "broken jpeg":
        save_frames(path, np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)), kind="jpg")
        for frame in path.iterdir():
            frame.write_bytes(frame.read_bytes()[:300])
    else:
        pytest.importorskip("decord")
        content = {"empty file": b"", "garbage": bytes(range(256)) * 9, "text": b"a.mp4 run\n" * 9}
        path.write_bytes(content[kind])
    with pytest.raises(ValueError) as e:
        data.read_clip(path, 4)
    assert str(path) in str(e.value) and "\n" not in str(e.value)

# ----- Frames from video files. The files were made once with ffmpeg --------

def webm_numbers(path, *arguments, **options):
    """Which frames of clip.webm these are, told by their brightness."""
    return [round((value - 20) / 9) for value in read(path, *arguments, **options)]

def test_a_video_gives_exactly_the_frames_that_are_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("decord")
    for num_frames in (1, 4, 16, 40):
        expected = data.sample_indices(24, num_frames).tolist()
        assert webm_numbers(WEBM, num_frames) == expected
    expected = data.sample_indices(24, 8, np.random.default_rng(5)).tolist()
    assert webm_numbers(WEBM, 8, rng=np.random.default_rng(5)) == expected
    assert webm_numbers(WEBM, 4, clips=2) == data.sample_indices(24, 4, clips=2).tolist()
    # decord looks inside of a file. Nothing in a name makes it a protocol or a flag.
    monkeypatch.chdir(tmp_path)
    for name in ("a.avi", "pipe:1.webm", "-i.webm"):
        shutil.copy(WEBM, name)
        assert webm_numbers(data.find_clip(".", name), 4) == [2, 8, 14, 19]

def test_a_narrow_video_is_not_sheared():
    # 48 pixels wide, whose rows decord pads. The left half grows brighter, the right one is 214.
    pytest.importorskip("decord")
    frames = data.read_clip(HERE / "narrow.webm", 4).float()
    assert frames.shape == (4, 3, 32, 48)
    left, right = frames[..., :20], frames[..., 28:]
    assert (right - 214).abs().max() < 6
    assert left.std(dim=(1, 2, 3)).max() < 2 and (left.mean((1, 2, 3)).diff() > 15).all()

def test_a_video_that_was_cut_off_is_read_as_far_as_it_goes_or_refused(tmp_path):
    pytest.importorskip("decord")
    whole, path, seen = WEBM.read_bytes(), tmp_path / "cut.webm", []
    for length in range(40, len(whole), 90):
        path.write_bytes(whole[:length])
        try:
            numbers = webm_numbers(path, 4)
        except ValueError as e:
            assert str(path) in str(e)
            continue
        lengths = [n for n in range(1, 25) if data.sample_indices(n, 4).tolist() == numbers]
        assert lengths, f"{numbers} are the frames of no length"
        seen.append(lengths[-1])
    assert seen == sorted(seen) and seen[-1] > 12

def test_a_video_with_damage_in_the_middle_is_refused(monkeypatch):
    decord = pytest.importorskip("decord")

    class Damaged:                                      # ten frames, of which seven can be decoded
        left = 7

        def __len__(self):
            return 10

        def next(self):
            if self.left == 0:
                raise decord.DECORDLimitReachedError("end of file")
            self.left -= 1
            return decord.nd.array(np.zeros((4, 4, 3), np.uint8))

        def get_frame_timestamp(self, indices):
            return np.arange(20.0).reshape(10, 2)

    monkeypatch.setattr(data, "open_video", lambda path: Damaged())
    with pytest.raises(ValueError, match="clip.mp4 cannot be read .7 of its 10 frames"):
        data.read_clip("clip.mp4", 4)

@pytest.mark.parametrize("name, shown", [("cut.mp4", 15), ("altref.webm", 24)])
def test_frames_that_are_not_shown_are_not_read(name, shown):
    # In cut.mp4 an edit list hides the first frames. altref.webm is VP8 with an invisible frame.
    # decord counts them, players do not.
    pytest.importorskip("decord")
    frames = data.read_clip(HERE / name, 60)            # all that are shown, some of them repeated
    indices = data.sample_indices(shown, 60)
    numbers, first = np.unique(indices, return_index=True)
    assert numbers.tolist() == list(range(shown))
    distinct = frames[torch.from_numpy(first)].float()
    assert torch.equal(frames.float(), distinct[torch.from_numpy(indices)])
    if name == "cut.mp4":                               # it grows brighter
        assert (distinct.mean((1, 2, 3)).diff() > 1).all()

# ----- From frames to the input of the model --------------------------------

def test_red_is_channel_zero_and_the_input_is_normalized_as_clips(tmp_path):
    red = [np.full((24, 32, 3), (255, 0, 0))] * 5
    for Set, item in (data.TrainingDataset, (0, 0, 0)), (data.VideoDataset, 0):
        dataset = v1_set(tmp_path / Set.__name__, {"1": red}, Set=Set)
        video, label, index = dataset[item]
        assert (video.shape, video.dtype) == ((3, 4, 16, 16), torch.uint8)
        assert (label, index) == (0, 0)
        x = data.normalize(video)
        assert x.dtype == torch.float32
        for channel, mean, std in ((0, 0.48145466, 0.26862954), (1, 0.4578275, 0.26130258),
                                   (2, 0.40821073, 0.27577711)):
            expected = ((channel == 0) - mean) / std
            assert torch.allclose(x[channel], torch.tensor(expected), atol=1e-5)
        assert torch.allclose(data.normalize(video[None, None])[0, 0], x)
    assert torch.allclose(data.normalize(video, (0, 0, 0), (1, 1, 1)), video / 255)

@pytest.mark.parametrize("first", (False, True))
def test_one_draw_of_crop_and_randaugment_for_all_frames(tmp_path, first):
    frame = np.random.default_rng(0).integers(0, 256, (40, 60, 3))
    dataset = v1_set(tmp_path, {"1": [frame] * 6}, crop_scale=0.3, randaugment=21,
                     randaugment_first=first)
    seen = set()
    for epoch in range(25):
        video, _, _ = dataset[epoch, 0, 0]
        assert (video == video[:, :1]).all(), f"epoch {epoch}: frames of one clip differ"
        seen.add(video.numpy().tobytes())
    assert len(seen) == 25

@pytest.mark.parametrize("first", (False, True))
def test_randaugment_applies_each_of_four_operations_with_probability_one_half(monkeypatch, first):
    drawn = []

    def forward(self, video):
        drawn.append((self.num_ops, self.magnitude, tuple(video.shape)))
        return video

    monkeypatch.setattr(v2.RandAugment, "forward", forward)
    transform = data.train_transform(16, randaugment=21, randaugment_first=first)
    size = (20, 24) if first else (16, 16)
    counts = []
    torch.manual_seed(0)
    for _ in range(1000):
        drawn.clear()
        transform(torch.zeros(5, 3, 20, 24, dtype=torch.uint8))
        counts.append(len(drawn))
        assert set(drawn) <= {(1, 21, (5, 3, *size))}   # one operation, on all frames at once
    shares = np.bincount(counts, minlength=5) / len(counts)
    assert np.abs(shares - np.array([1, 4, 6, 4, 1]) / 16).max() < 0.06         # binomial

def test_crops_are_as_large_as_crop_scale_allows():
    column = torch.arange(200, dtype=torch.uint8).expand(1, 3, 200, 200)       # value = position
    torch.manual_seed(0)
    for crop_scale, narrowest in ((0.08, 0.2), (0.5, 0.59), (1.0, 0.95)):       # sqrt(3/4 scale)
        widths = []
        for _ in range(100):
            crop = data.train_transform(100, crop_scale)(column)[0, 0].float()
            widths.append((crop[0, -1] - crop[0, 0]).item() / 200)
        assert narrowest < min(widths) < narrowest + 0.2 and max(widths) > 0.9

def test_three_crops_are_left_centre_right_or_top_centre_bottom(tmp_path):
    frame = np.zeros((20, 60, 3))
    for channel in range(3):                            # a red, a green and a blue square
        frame[:, 20 * channel:20 * (channel + 1), channel] = 200
    for picture in (frame, frame.transpose(1, 0, 2)):
        video = torch.tensor(picture, dtype=torch.uint8).permute(2, 0, 1).expand(4, 3, -1, -1)
        views = data.eval_views(video, num_frames=4, size=16, crops=3)
        assert views.shape == (3, 3, 4, 16, 16)
        for channel, view in enumerate(views):
            assert view[channel].min() > 180 and view.sum() < 1.05 * view[channel].sum()
        assert torch.equal(data.eval_views(video, num_frames=4, size=16)[0], views[1])

def test_views_of_a_data_set_are_crops_of_clips(tmp_path):
    dataset = v1_set(tmp_path, {"1": grey_frames(30, 16, 24)}, Set=data.VideoDataset, crops=3,
                     clips=2)
    views, _, _ = dataset[0]
    assert views.shape == (6, 3, 4, 16, 16)
    expected = data.sample_indices(30, 4, clips=2).reshape(2, 4).tolist()
    assert [frame_numbers(view) for view in views] == [expected[v // 3] for v in range(6)]

@pytest.mark.parametrize("Set, item", [(data.VideoDataset, 0), (data.TrainingDataset, (1, 0, 0))])
def test_control_experiments(tmp_path, Set, item):
    write_v1(tmp_path, SIDES, train=[("1", SIDES[0])])
    save_frames(tmp_path / "20bn-something-something-v1" / "1", grey_frames(40))
    seen = {}
    for control in ("none", "shuffle", "single"):
        dataset = Set("ssv1", tmp_path, "train", num_frames=8, size=16, control=control)
        seen[control] = frame_numbers(dataset[item][0])
        assert frame_numbers(dataset[item][0]) == seen[control]
    assert seen["none"] == sorted(set(seen["none"]))
    assert seen["shuffle"] != seen["none"] and sorted(seen["shuffle"]) == seen["none"]
    assert len(set(seen["single"])) == 1 and seen["single"][0] in seen["none"]

# ----- Samples and batches --------------------------------------------------

def noise_set(root, seed=3):
    """Three times the same clip."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 20, 24, 3))
    return v1_set(root, dict.fromkeys("123", noise), crop_scale=0.3, randaugment=21, flip=True,
                  seed=seed)

def test_a_sample_depends_only_on_seed_epoch_index_and_repetition(tmp_path):
    dataset = noise_set(tmp_path / "set")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    video, label, index = dataset[1, 2, 1]
    assert torch.equal(torch.get_rng_state(), state) and index == 2
    torch.manual_seed(99)
    np.random.seed(99)
    again, label_again, _ = dataset[1, 2, 1]
    assert torch.equal(again, video) and label_again == label
    for other in (dataset[2, 2, 1], dataset[1, 1, 1], dataset[1, 2, 0],
                  noise_set(tmp_path / "other", seed=4)[1, 2, 1]):
        assert not torch.equal(other[0], video)

def test_training_draws_other_frames_each_time_and_evaluation_the_middle(tmp_path):
    training = v1_set(tmp_path / "a", {"1": grey_frames(40)})
    assert len({tuple(frame_numbers(training[0, 0, r][0])) for r in range(5)}) == 5
    evaluation = v1_set(tmp_path / "b", {"1": grey_frames(40)}, Set=data.VideoDataset)
    assert frame_numbers(evaluation[0][0]) == data.sample_indices(40, 4).tolist()

def test_a_sample_does_not_depend_on_the_workers(tmp_path):
    dataset = noise_set(tmp_path)
    batches = [[(epoch, i, r) for r in range(2) for i in (2, 0, 1)] for epoch in range(3)]
    runs = []
    for workers in (0, 2):
        loader = data.make_loader(dataset, workers, 60, torch.device("cpu"), batch_sampler=batches)
        runs.append(list(loader))
    for (a, label_a, index_a), (b, label_b, index_b) in zip(*runs, strict=True):
        assert torch.equal(a, b) and torch.equal(label_a, label_b)
        assert index_a.tolist() == index_b.tolist() == [2, 0, 1, 2, 0, 1]

def test_an_epoch_deals_each_clip_at_most_once_and_drops_the_last_batch():
    steps = list(data.step_batches(18, 4, 0, 12, seed=0))
    assert len(steps) == 12
    orders = []
    for epoch in range(3):
        items = sum(steps[4 * epoch:4 * epoch + 4], [])
        assert {(e, r) for e, _, r in items} == {(epoch, 0)}
        orders.append([i for _, i, _ in items])
        assert len(set(orders[-1])) == 16 and set(orders[-1]) <= set(range(18))
    assert orders[0] != orders[1] != orders[2]
    assert steps != list(data.step_batches(18, 4, 0, 12, seed=1))
    assert list(data.step_batches(18, 4, 5, 12, seed=0)) == steps[5:]           # a resumed run

def test_ranks_share_each_batch_and_repetitions_stay_in_their_step():
    whole = list(data.step_batches(18, 4, 0, 8, seed=0, repeat=2))
    ranks = [list(data.step_batches(18, 4, 0, 8, 0, rank, 2, repeat=2)) for rank in range(2)]
    for batch, a, b in zip(whole, *ranks, strict=True):
        assert len(a) == len(b) == 4 and sorted(a + b) == sorted(batch)
        for part in (batch, a, b):
            clips = [i for _, i, _ in part]
            assert sorted(r for _, _, r in part) == sorted([0, 1] * (len(part) // 2))
            assert all(clips.count(i) == 2 for i in clips)
            assert all(i != j for i, j in zip(clips, clips[1:]))                # MixUp mixes these

def test_data_workers_ignore_the_signals_that_stop_a_run():
    class Handlers(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            ignored = [signal.getsignal(n) == signal.SIG_IGN
                       for n in (signal.SIGTERM, signal.SIGINT)]
            return torch.tensor(ignored)

    loader = data.make_loader(Handlers(), 1, 60, torch.device("cpu"), batch_size=1)
    if sys.platform == "linux":                         # whatever Python's default is
        assert loader.multiprocessing_context == multiprocessing.get_context("fork")
    assert next(iter(loader)).all()

def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    for processes, cores in (("1", 12), ("4", 3), ("99", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert data.cores_per_process() == cores
