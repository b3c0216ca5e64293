"""data.py: annotations, frame sampling, decoding, transforms, samples, own videos.

python -m pytest -q tests/test_data.py
"""

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import data
from scripts.mirror_labels import mirror_labels

# 24 frames of 32 x 32, VP9, a key frame every 8; frame i is grey, of value 20 + 9 i. Made once with
# PyAV 18 (ffmpeg's libvpx-vp9,
# 12 fps, crf 30, g 8, lag-in-frames 0) from np.full((32, 32, 3), 20 + 9 * i, np.uint8); no test
# needs ffmpeg.
WEBM = Path(__file__).parent / "clip.webm"
SIDES = ["Pulling something from left to right", "Pulling something from right to left"]


def save_frames(folder, frames, kind="png"):
    """frames: uint8 (h, w, 3) each. png is exact, jpg is what Something-Something V1 has."""
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames, 1):
        Image.fromarray(np.asarray(frame, dtype=np.uint8)).save(folder / f"{i:05d}.{kind}")


def grey_frames(n, h=16, w=16, first=0, step=5):
    """Frame i is grey of value first + step * i: every frame says which one it is."""
    return [np.full((h, w, 3), first + step * i) for i in range(n)]


def write_v1(root, train, validation=(), test=None, classes=SIDES):
    """Annotation files as released for V1: train and validation are lists of (id, class text)."""
    root.mkdir(exist_ok=True)
    name = "something-something-v1-"
    (root / f"{name}labels.csv").write_text("".join(c + "\n" for c in classes))
    (root / f"{name}train.csv").write_text("".join(f"{i};{c}\n" for i, c in train))
    (root / f"{name}validation.csv").write_text("".join(f"{i};{c}\n" for i, c in validation))
    if test is not None:
        (root / f"{name}test.csv").write_text("".join(f"{i}\n" for i in test))


def write_v2(
    root,
    train,
    validation=(),
    test=None,
    classes=SIDES,
    prefix="something-something-v2-",
    labels=None,
):
    """The same for V2: the class texts here carry [brackets], as the released templates do."""
    root.mkdir(parents=True, exist_ok=True)

    def bare(text):
        return text.replace("[", "").replace("]", "")

    def entries(pairs):
        return [
            dict(
                id=i,
                label=bare(c).replace("something", "a cup"),
                template=c,
                placeholders=["a cup"],
            )
            for i, c in pairs
        ]

    labels = (
        labels if labels is not None else {bare(c): str(i) for i, c in enumerate(sorted(classes))}
    )
    (root / f"{prefix}labels.json").write_text(json.dumps(labels))
    (root / f"{prefix}train.json").write_text(json.dumps(entries(train)))
    (root / f"{prefix}validation.json").write_text(json.dumps(entries(validation)))
    if test is not None:
        (root / f"{prefix}test.json").write_text(json.dumps([dict(id=i) for i in test]))


def v1_set(root, content, split="train", **options):
    """A VideoDataset in V1's layout, the same clips in both splits: content is {id: (frames, class
    text)}.
    """
    write_v1(root, *[[(i, text) for i, (_, text) in content.items()]] * 2)
    for i, (frames, _) in content.items():
        save_frames(root / "20bn-something-something-v1" / i, frames)
    options = {**dict(num_frames=4, size=16, mirrored=mirror_labels(sorted(SIDES))[0]), **options}
    return data.VideoDataset("ssv1", root, split, train=split == "train", **options)


# ----- sampling -----


@pytest.mark.parametrize(
    "n, F, expected",
    [
        # longer: s = 4, segments of 4, their centres
        (17, 4, [2, 6, 10, 14]),
        # equal: s = 7/8, edges 0 .875 1.75 2.625 3.5 4.375 5.25 6.125 rounded, no shift
        (8, 8, [0, 1, 2, 3, 4, 4, 5, 6]),
        # shorter: s = 1/2, edges 0 .5 1 1.5, halves to even
        (3, 4, [0, 0, 1, 2]),
        (1, 4, [0, 0, 0, 0]),
        (2, 1, [0]),
    ],
)
def test_sample_indices_by_hand(n, F, expected):
    got = data.sample_indices(n, F)
    assert got.tolist() == expected and got.dtype == np.int64


def test_temporal_views_differ_and_stay_in_their_segments():
    # n = 41, F = 8: s = 5, segments start at 0 5 ... 35; floor(5/3) = 1 and floor(10/3) = 3
    first, second = data.sample_indices(41, 8, clips=2).reshape(2, 8)
    assert first.tolist() == [1, 6, 11, 16, 21, 26, 31, 36]
    assert second.tolist() == [3, 8, 13, 18, 23, 28, 33, 38]


def test_sample_indices_follow_their_docstring_for_any_length():
    for n in [*range(1, 40), 77, 300]:
        for F in (1, 4, 16):
            s = (n - 1) / F
            edges = [round(s * i) for i in range(F + 1)]
            for views in (1, 2, 3):
                for view, got in enumerate(data.sample_indices(n, F, clips=views).reshape(-1, F)):
                    assert got.tolist() == [
                        e + int(s * (view + 1) / (views + 1)) for e in edges[:-1]
                    ]
                    assert got.min() >= 0 and got.max() <= n - 1 and (np.diff(got) >= 0).all()
            for seed in range(5):
                got = data.sample_indices(n, F, np.random.default_rng(seed))
                assert all(low <= i <= high for low, i, high in zip(edges, got, edges[1:]))
                assert (np.diff(got) >= 0).all() and got.max() <= n - 1
                assert (
                    got.tolist() == data.sample_indices(n, F, np.random.default_rng(seed)).tolist()
                )


def test_training_draws_both_ends_of_every_segment():
    rng = np.random.default_rng(0)
    drawn = np.stack([data.sample_indices(17, 4, rng) for _ in range(300)])
    assert [set(column) for column in drawn.T.tolist()] == [
        set(range(4 * i, 4 * i + 5)) for i in range(4)
    ]


# ----- annotations -----


def test_v1_as_released(tmp_path):
    # not alphabetical, one comma
    classes = ["Showing something, then hiding it", "Approaching something", "Moving something up"]
    write_v1(
        tmp_path,
        [("7", classes[0]), ("100", classes[2])],
        [("5", classes[1])],
        test=["9", "8"],
        classes=classes,
    )
    ids, labels, names = data.read_annotations("ssv1", tmp_path, "train")
    assert names == [
        "Approaching something",
        "Moving something up",
        "Showing something, then hiding it",
    ]
    assert ids.tolist() == ["7", "100"] and labels.tolist() == [2, 1]
    # one object for all clips
    assert isinstance(ids, np.ndarray) and labels.dtype == np.int64
    assert data.read_annotations("ssv1", tmp_path, "validation")[1].tolist() == [0]
    ids, labels, _ = data.read_annotations("ssv1", tmp_path, "test")
    assert ids.tolist() == ["9", "8"] and labels.tolist() == [-1, -1]


@pytest.mark.parametrize("prefix", ["something-something-v2-", ""])
@pytest.mark.parametrize("folder", ["", "labels"])
def test_v2_as_released_both_generations(tmp_path, prefix, folder):
    classes = [
        "Showing [something] next to [something]",
        "Moving [something], then [something else]",
    ]
    write_v2(
        tmp_path / folder,
        [("4", classes[0]), ("2", classes[1])],
        [("6", classes[1])],
        ["1", "3"],
        classes=classes,
        prefix=prefix,
    )
    ids, labels, names = data.read_annotations("ssv2", tmp_path, "train")
    assert names == ["Moving something, then something else", "Showing something next to something"]
    assert ids.tolist() == ["4", "2"] and labels.tolist() == [1, 0]
    assert data.read_annotations("ssv2", tmp_path, "test")[1].tolist() == [-1, -1]
    # in another order, class text after ;
    (tmp_path / folder / "test-answers.csv").write_text("3;" + names[0] + "\n1;" + names[1] + "\n")
    ids, labels, _ = data.read_annotations("ssv2", tmp_path, "test")
    assert ids.tolist() == ["3", "1"] and labels.tolist() == [0, 1]


def test_classes_are_numbered_in_the_order_of_their_names_whatever_the_file_says(tmp_path):
    write_v2(tmp_path, [("1", "B")], classes=["A", "B", "C"], labels={"C": "0", "B": "1", "A": "2"})
    _, labels, names = data.read_annotations("ssv2", tmp_path, "train")
    assert names == ["A", "B", "C"] and labels.tolist() == [1]


V2_TRAIN = "something-something-v2-train.json"


@pytest.mark.parametrize(
    "content, words",
    [
        ([{"id": "1", "label": "A"}], ["class of clip 1 is missing", "expected one of 2"]),
        ([{"id": "1", "template": "Ghost"}], ["clip 1", "Ghost", "expected one of 2"]),
        (
            [{"id": "1", "template": "A"}, {"id": "1", "template": "B"}],
            ["clip 1", "listed 2 times"],
        ),
    ],
)
def test_v2_in_a_wrong_format_is_one_clear_error(tmp_path, content, words):
    write_v2(tmp_path, [("1", "A")], classes=["A", "B"])
    (tmp_path / V2_TRAIN).write_text(json.dumps(content))
    with pytest.raises(ValueError) as e:
        data.read_annotations("ssv2", tmp_path, "train")
    assert all(w in str(e.value) for w in ["train.json", *words]) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "content, words",
    [
        ("1,A\n", ["class of clip 1,A is missing"]),
        ("1;A\n1;B\n", ["clip 1", "listed 2 times"]),
        ("1;A\n2;Ghost\n", ["clip 2", "Ghost"]),
    ],
)
def test_v1_in_a_wrong_format_is_one_clear_error(tmp_path, content, words):
    write_v1(tmp_path, [("1", "A")], classes=["A", "B"])
    (tmp_path / "something-something-v1-train.csv").write_text(content)
    with pytest.raises(ValueError) as e:
        data.read_annotations("ssv1", tmp_path, "train")
    assert all(w in str(e.value) for w in ["train.csv", *words]) and "\n" not in str(e.value)


@pytest.mark.parametrize("clip", ("../1", "/etc/1", "a/../../1"))
def test_a_clip_cannot_lie_outside_of_the_data(tmp_path, clip):
    write_v2(tmp_path, [(clip, "A")], classes=["A", "B"])
    (tmp_path / "20bn-something-something-v2").mkdir()
    dataset = data.VideoDataset("ssv2", tmp_path, "train")
    with pytest.raises(ValueError, match=f"clip {clip}.webm lies outside of {tmp_path}"):
        dataset[0]


def test_class_names_are_compared_after_the_same_cleaning(tmp_path):
    labels = {"Moving [something]  up": "0", "Moving something down ": "1"}
    write_v2(
        tmp_path, [("1", "Moving [something] up"), ("2", "Moving something  down")], labels=labels
    )
    _, numbers, names = data.read_annotations("ssv2", tmp_path, "train")
    assert names == ["Moving something down", "Moving something up"] and numbers.tolist() == [1, 0]
    write_v1(tmp_path, [("1", "Moving something   up")], classes=["Moving [something] up", "Other"])
    assert data.read_annotations("ssv1", tmp_path, "train")[1].tolist() == [0]


def test_windows_files_read_alike(tmp_path):
    write_v1(tmp_path, [("1", "A")], classes=["A", "B"])
    for name, text in (("labels", "A\r\nB\r\n"), ("train", "1;A\r\n2;B\r\n")):
        path = tmp_path / f"something-something-v1-{name}.csv"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    ids, labels, names = data.read_annotations("ssv1", tmp_path, "train")
    assert (ids.tolist(), labels.tolist(), names) == (["1", "2"], [0, 1], ["A", "B"])


def test_jester_needs_no_renaming(tmp_path):
    (tmp_path / "jester-v1-labels.csv").write_text("Swiping Left\nSwiping Right\nNo gesture\n")
    (tmp_path / "jester-v1-train.csv").write_text("34870;Swiping Left\n1;No gesture\n")
    save_frames(tmp_path / "20bn-jester-v1" / "34870", grey_frames(5), kind="jpg")
    dataset = data.VideoDataset("ssv1", tmp_path, "train", num_frames=4, size=16, train=True)
    assert dataset.classes == ["No gesture", "Swiping Left", "Swiping Right"]
    assert dataset[0][0].shape == (3, 4, 16, 16)
    assert mirror_labels(dataset.classes)[0].tolist() == [0, 2, 1]


@pytest.mark.parametrize("dataset", ["ssv1", "ssv2"])
def test_missing_files_name_the_expected_tree(tmp_path, dataset):
    with pytest.raises(FileNotFoundError) as e:
        data.read_annotations(dataset, tmp_path, "train")
    assert str(tmp_path) in str(e.value) and "top of data.py" in str(e.value)
    (write_v1 if dataset == "ssv1" else write_v2)(tmp_path, [("1", SIDES[0])])
    with pytest.raises(FileNotFoundError) as e:  # annotations are there, the clips are not
        data.VideoDataset(dataset, tmp_path, "train")
    assert f"20bn-*-v{dataset[-1]}" in str(e.value) and str(tmp_path) in str(e.value)


def found_pairs(classes):
    """The pairs that mirror_labels finds, as sets of names, and the names it leaves alone."""
    mirrored, alone = mirror_labels(classes)
    assert mirrored[mirrored].tolist() == list(range(len(classes)))
    return {frozenset((classes[i], classes[j])) for i, j in enumerate(mirrored) if i != j}, alone


def test_mirror_labels_pairs_the_sides_of_something_something():
    pairs = [
        SIDES,
        ["Pushing something from left to right", "Pushing something from right to left"],
        [
            "Turning the camera left while filming something",
            "Turning the camera right while filming something",
        ],
    ]
    others = [
        "Pulling something out of something",
        "Something falling like a feather or paper",
        "Putting something upright on the table",
        "Moving something up",
        "Moving something down",
        "Turning something upside down",
        "Putting something that can't actually stand upright on the table, so it falls on its side",
        "Lifting up one end of something, then letting it drop down",
    ]
    alone = [
        "Moving something to the left",  # its partner is no class
        "Plugging something into something but pulling it right out as you remove your hand",
    ]
    found, left = found_pairs(sorted(sum(pairs, []) + others + alone))
    assert found == {frozenset(p) for p in pairs} and sorted(left) == sorted(alone)


@pytest.mark.parametrize(
    "a, b",
    [
        ("swipe_left", "swipe_right"),
        ("swipe-left", "swipe-right"),
        ("SwipeLeft", "SwipeRight"),
        ("swipeleft", "swiperight"),
        ("Swiping Left", "Swiping Right"),
        ("LEFT TURN", "RIGHT TURN"),
        ("turnLEFT", "turnRIGHT"),
        ("left.hand.wave", "right.hand.wave"),
        ("swipe_l", "swipe_r"),
        ("SwipeL", "SwipeR"),
        ("L-turn", "R-turn"),
        ("move_l2r", "move_r2l"),
        ("moveLtoR", "moveRtoL"),
        ("pan lr", "pan rl"),
        ("pan_L_to_R", "pan_R_to_L"),
        ("wave_lh", "wave_rh"),
        ("lhs", "rhs"),
        ("arm_l1", "arm_r1"),
        ("leftward", "rightward"),
        ("moving leftwards", "moving rightwards"),
        ("left-handed throw", "right-handed throw"),
        ("from left to right", "from right to left"),
        ("left to right then back left", "right to left then back right"),
        ("turn_cw", "turn_ccw"),
        ("TurnCW", "TurnACW"),
        ("Turning Hand Clockwise", "Turning Hand Counterclockwise"),
        ("rotate clockwise", "rotate anti-clockwise"),
        ("rotate_clockwise", "rotate_counter_clockwise"),
        ("LTurn", "RTurn"),
        ("LHWave", "RHWave"),
        ("Move_1L", "Move_1R"),
        ("turn lft", "turn rgt"),
        ("turn lft", "turn rght"),
        ("swipe_ltr", "swipe_rtl"),
        ("swipe ltor", "swipe rtol"),
    ],
)
def test_mirror_labels_finds_a_side_however_it_is_written(a, b):
    found, alone = found_pairs(sorted([a, b, "jump", "upright", "bright light", "clap"]))
    assert found == {frozenset((a, b))} and not alone
    found, alone = found_pairs(sorted([a, "jump", "upright", "bright light", "clap"]))
    assert not found and alone == [a]  # without its partner it is named


def test_letters_of_an_alphabet_are_no_sides():
    for names in (
        list("ABCLMRZ"),
        [f"letter_{c}" for c in "abclmrz"],
        [f"sign {c}" for c in "LRX"],
    ):
        assert found_pairs(names) == (set(), [])


@pytest.mark.parametrize("rest", (("swipe_u", "swipe_d"), ("swipe_c",), ("swipe_f", "swipe_b")))
def test_letters_of_directions_are_no_alphabet(rest):
    found, alone = found_pairs(sorted(("swipe_l", "swipe_r", *rest)))
    assert found == {frozenset(("swipe_l", "swipe_r"))} and not alone


@pytest.mark.parametrize("a, b", (("zoom +", "zoom -"), ("C", "C++"), ("step 1.1", "step 11")))
def test_names_that_differ_in_signs_alone_keep_their_labels(a, b):
    assert found_pairs([a, b, "clap"]) == (set(), [])


def test_mirror_labels_of_the_toy():
    from scripts.toy_data import TOY_CLASSES

    found, _ = found_pairs(sorted(sum(TOY_CLASSES, ())))
    # left/right and the two senses of turning
    assert found == {frozenset(TOY_CLASSES[0]), frozenset(TOY_CLASSES[2])}


@pytest.mark.parametrize("a, b", [("swipe_left", "swipe_right"), ("WaveL", "WaveR")])
def test_a_flipped_sample_of_such_a_class_has_the_label_of_its_mirror_image(tmp_path, a, b):
    bright_right = np.zeros((16, 16, 3))
    bright_right[:, 8:] = 255
    for name, frame in ((a, bright_right[:, ::-1]), (b, bright_right), ("clap", bright_right * 0)):
        for i in range(2):
            save_frames(tmp_path / "train" / name / str(i), [frame] * 4)
    dataset = data.VideoDataset(
        "folder", tmp_path, "train", num_frames=4, size=16, train=True, scale=(1.0, 1.0)
    )
    dataset.mirrored, _ = mirror_labels(dataset.classes)
    flipped = 0
    for epoch in range(20):
        for i in range(6):
            video, label, _ = dataset[(epoch, i)]
            sides = video[..., :4].float().mean(), video[..., 12:].float().mean()
            seen = a if sides[0] > sides[1] else b if sides[1] > sides[0] else "clap"
            assert dataset.classes[label] == seen
            flipped += label != dataset.labels[i]
    # about half of the 80 samples that have a side
    assert 20 < flipped < 60


def test_skip_list_has_comments(tmp_path):
    (tmp_path / "skip.txt").write_text(
        "# made by hand\n12  # broken\n\n 7\nclap/#20_a.avi\nTake #2\n"
    )
    assert data.read_skip_list(tmp_path / "skip.txt") == {"12", "7", "clap/#20_a.avi", "Take #2"}
    clips = {i: (grey_frames(3), SIDES[0]) for i in ("7", "12", "13")}
    (tmp_path / "three.txt").write_text("12\n7\n99\n")
    kept = v1_set(tmp_path / "set", clips, skip_list=tmp_path / "three.txt")
    assert isinstance(kept.ids, np.ndarray) and isinstance(kept.labels, np.ndarray)
    assert kept.ids.tolist() == ["13"] and len(kept.labels) == len(kept) == 1 and kept.skipped == 2


# ----- frames and transforms -----


def test_normalize_is_clips():
    video = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    got = data.normalize(video)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (data.CLIP_MEAN, data.CLIP_STD))
    assert got.dtype == torch.float32 and torch.allclose(got, (video / 255 - mean) / std, atol=1e-5)
    assert data.normalize(video[0]).shape == (3, 4, 8, 8) and data.normalize(video[None]).shape == (
        1,
        2,
        3,
        4,
        8,
        8,
    )
    assert torch.equal(data.normalize(video[None])[0], got)
    assert torch.equal(data.normalize(video, (0, 0, 0), (1, 1, 1)), video / 255)


def test_red_is_channel_zero(tmp_path):
    red = [np.full((24, 32, 3), (255, 0, 0))] * 5
    write_v1(tmp_path, [("1", SIDES[0])], [("1", SIDES[0])])
    save_frames(tmp_path / "20bn-something-something-v1" / "1", red, kind="jpg")
    for split in ("train", "validation"):
        video, _, _ = data.VideoDataset(
            "ssv1", tmp_path, split, num_frames=4, size=16, train=split == "train"
        )[0]
        assert video.shape == (3, 4, 16, 16) and video.dtype == torch.uint8
        assert video[0].min() >= 250 and video[1:].max() <= 5  # JPEG is off by one or two
        value = data.normalize(video)
        assert torch.allclose(value[0], (video[0] / 255 - 0.48145466) / 0.26862954, atol=1e-5)
        assert (value[0] > 1.8).all() and (value[1:] < -1.4).all()


@pytest.mark.parametrize(
    "options",
    [
        dict(scale=(0.3, 1.0), augment=21),
        dict(scale=(0.3, 1.0), augment=0),
        dict(scale=(0.08, 1.0), augment=30),
    ],
)
def test_one_transform_for_all_frames(tmp_path, options):
    frame = np.random.default_rng(0).integers(0, 256, (40, 60, 3))
    dataset = v1_set(tmp_path / "set", {"1": ([frame] * 6, SIDES[0])}, size=24, **options)
    seen = set()
    # many draws: RandAugment has some fourteen operations
    for epoch in range(25):
        video, _, _ = dataset[(epoch, 0)]
        assert (video == video[:, :1]).all(), f"epoch {epoch}: frames of one clip differ"
        seen.add(video.numpy().tobytes())
    assert len(seen) == 25


def test_randaugment_applies_each_of_four_operations_with_probability_one_half(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        v2.RandAugment,
        "forward",
        lambda self, video: (
            drawn.append((self.num_ops, self.magnitude, tuple(video.shape))) or video
        ),
    )
    transform, video, counts = (
        data.train_transform(16, magnitude=21),
        torch.zeros(5, 3, 20, 24, dtype=torch.uint8),
        [],
    )
    torch.manual_seed(0)
    for _ in range(2000):
        drawn.clear()
        transform(video)
        counts.append(len(drawn))
        # one operation at a time, on all frames of the clip at once
        assert set(drawn) <= {(1, 21, (5, 3, 16, 16))}
    shares = np.bincount(counts, minlength=5) / len(counts)
    # binomial; 0.05 is 4.5 standard deviations
    assert np.abs(shares - np.array([1, 4, 6, 4, 1]) / 16).max() < 0.05, shares


def test_three_crops_cover_left_centre_right(tmp_path):
    frame = np.zeros((20, 60, 3))
    # three squares side by side: red, green, blue
    for channel in range(3):
        frame[:, 20 * channel : 20 * (channel + 1), channel] = 200
    for name, picture in (("wide", frame), ("tall", frame.transpose(1, 0, 2))):
        clips = {"1": ([picture] * 3, SIDES[0])}
        views, label, index = v1_set(tmp_path / name, clips, "validation", crops=3)[0]
        assert views.shape == (3, 3, 4, 16, 16) and (label, index) == (0, 0)
        assert [view.float().mean((1, 2, 3)).argmax().item() for view in views] == [0, 1, 2]
        centre, _, _ = data.VideoDataset(
            "ssv1", tmp_path / name, "validation", num_frames=4, size=16
        )[0]
        assert torch.equal(centre, views[1])


def test_views_are_crops_of_clips(tmp_path):
    clips = {"1": (grey_frames(30, 16, 24), SIDES[0])}
    views, _, _ = v1_set(tmp_path / "set", clips, "validation", crops=3, clips=2)[0]
    assert views.shape == (6, 3, 4, 16, 16)
    # grey frames: every crop of a clip shows the same frames
    for v, view in enumerate(views):
        expected = data.sample_indices(30, 4, clips=2).reshape(2, 4)[v // 3]
        assert (view[0, :, 0, 0] // 5).tolist() == expected.tolist()


def test_evaluation_is_deterministic_and_ignores_training_options(tmp_path):
    rng = np.random.default_rng(0)
    clips = {"1": (rng.integers(0, 256, (9, 20, 24, 3)), SIDES[0])}
    first = v1_set(tmp_path / "set", clips, "validation", seed=1)
    second = data.VideoDataset(
        "ssv1",
        tmp_path / "set",
        "validation",
        num_frames=4,
        size=16,
        scale=(0.1, 1.0),
        augment=21,
        mirrored=np.array([1, 0]),
        seed=2,
    )
    assert torch.equal(first[0][0], first[(3, 0)][0]) and torch.equal(first[0][0], second[0][0])


def noise_set(root, **options):
    rng = np.random.default_rng(0)
    clips = {str(i): (rng.integers(0, 256, (7, 20, 24, 3)), SIDES[i % 2]) for i in range(4)}
    return v1_set(root, clips, **{**dict(scale=(0.3, 1.0), augment=21, seed=3), **options})


def test_a_sample_follows_from_seed_epoch_and_index_alone(tmp_path):
    dataset = noise_set(tmp_path / "set")
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    video, label, index = dataset[(1, 2)]
    assert (
        torch.equal(torch.get_rng_state(), before)
        and (np.random.get_state()[1] == numpy_before).all()
    )
    torch.manual_seed(99)
    assert torch.equal(dataset[(1, 2)][0], video) and dataset[(1, 2)][1:] == (label, index)
    assert not torch.equal(dataset[(2, 2)][0], video)
    assert not torch.equal(noise_set(tmp_path / "other", seed=4)[(1, 2)][0], video)


def test_a_sample_does_not_depend_on_the_workers(tmp_path):
    dataset = noise_set(tmp_path / "set")
    items = [(epoch, i) for epoch in range(2) for i in (2, 0, 3, 1)]
    runs = [
        list(
            torch.utils.data.DataLoader(
                dataset, batch_size=None, sampler=items, num_workers=workers
            )
        )
        for workers in (0, 2)
    ]
    for (a, label_a, index_a), (b, label_b, index_b) in zip(*runs, strict=True):
        assert torch.equal(a, b) and label_a == label_b and index_a == index_b


def test_flip_mirrors_the_label_with_the_frames(tmp_path):
    frame = np.zeros((16, 16, 3))
    frame[:, 8:] = 255  # bright on the right
    dataset = v1_set(tmp_path / "set", {"1": ([frame] * 4, SIDES[0])}, scale=(1.0, 1.0))
    seen = set()
    for epoch in range(40):
        video, label, _ = dataset[(epoch, 0)]
        bright_right = bool(video[..., 12:].float().mean() > video[..., :4].float().mean())
        assert bright_right == (label == 0)
        seen.add(label)
    assert seen == {0, 1}
    dataset.mirrored = None
    assert {dataset[(epoch, 0)][1] for epoch in range(40)} == {0}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_controls(tmp_path, split):
    clips = {"1": (grey_frames(24), SIDES[0])}
    plain = v1_set(tmp_path / "set", clips, split, num_frames=8)
    root, options = tmp_path / "set", dict(num_frames=8, size=16, train=split == "train")
    shuffled, single = (
        data.VideoDataset("ssv1", root, split, control=c, **options) for c in ("shuffle", "single")
    )

    def values(dataset, epoch=0):
        return dataset[(epoch, 0)][0][0, :, 0, 0].tolist()

    assert values(plain) == sorted(values(plain)) and len(set(values(plain))) == 8
    assert values(shuffled) != values(plain) and sorted(values(shuffled)) == values(plain)
    assert len(set(values(single))) == 1 and values(single)[0] in values(plain)
    assert values(shuffled) == values(shuffled)  # drawn once per clip, not per look


# ----- broken clips -----


def break_clip(kind, path):
    """Put one kind of broken clip at path: a folder in V1, a .webm in V2."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3))
    if kind == "empty folder":
        path.mkdir()
    elif kind == "broken jpeg":
        save_frames(path, noise, kind="jpg")
        for frame in path.iterdir():
            frame.write_bytes(frame.read_bytes()[:300])
    elif kind == "two sizes":
        save_frames(path, [np.zeros((16, 16, 3)), np.zeros((16, 20, 3))])
    elif kind == "empty file":
        path.touch()
    elif kind == "garbage":
        path.write_bytes(noise.tobytes())


@pytest.mark.parametrize(
    "kind, layout",
    [
        ("missing", 1),
        ("empty folder", 1),
        ("broken jpeg", 1),
        ("two sizes", 1),
        ("missing", 2),
        ("empty file", 2),
        ("garbage", 2),
    ],
)
def test_a_broken_clip_raises_with_its_path_and_nothing_takes_its_place(tmp_path, kind, layout):
    if kind in ("garbage", "empty file"):
        pytest.importorskip("decord")
    (write_v1 if layout == 1 else write_v2)(tmp_path, [("17", SIDES[0])])
    path = tmp_path / f"20bn-something-something-v{layout}" / ("17" if layout == 1 else "17.webm")
    break_clip(kind, path)
    dataset = data.VideoDataset(
        f"ssv{layout}", tmp_path, "train", num_frames=4, size=16, train=True
    )
    expected = FileNotFoundError if kind == "missing" else ValueError
    with pytest.raises(expected) as e:
        dataset[0]
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    # the same out of a data worker, with its traceback
    with pytest.raises(expected) as e:
        list(torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=1))
    assert str(path) in str(e.value) and "Traceback" in str(e.value)


def test_an_error_in_a_transform_passes_through_a_worker_with_its_traceback(tmp_path):
    dataset = v1_set(tmp_path / "set", {"1": (grey_frames(4), SIDES[0])})
    dataset.transform = lambda video: video @ torch.zeros(7, 7)
    with pytest.raises(RuntimeError) as e:
        list(torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=1))
    assert "dataset.transform = lambda" in str(e.value) or "test_data.py" in str(e.value)
    assert "cannot be read" not in str(e.value) and "check_data" not in str(e.value)


def test_a_folder_with_two_series_of_frames_is_refused_and_names_both(tmp_path):
    for name in ("img", "flow_x", "flow_y"):
        save_frames(tmp_path / name, grey_frames(3), kind="jpg")
    (tmp_path / "clip").mkdir()
    for name in ("img", "flow_x", "flow_y"):  # as tools for optical flow leave them
        for i in (1, 2, 3):
            shutil.copy(tmp_path / name / f"{i:05d}.jpg", tmp_path / "clip" / f"{name}_{i:05d}.jpg")
    with pytest.raises(ValueError) as e:
        data.read_clip(tmp_path / "clip", np.arange)
    assert "flow_x_#.jpg and flow_y_#.jpg and img_#.jpg" in str(e.value) and str(
        tmp_path / "clip"
    ) in str(e.value)
    save_frames(tmp_path / "mixed", grey_frames(3), kind="jpg")
    save_frames(tmp_path / "png", grey_frames(3), kind="png")
    shutil.copy(tmp_path / "png" / "00002.png", tmp_path / "mixed")
    with pytest.raises(ValueError, match="#.jpg and #.png"):
        data.read_clip(tmp_path / "mixed", np.arange)


def test_hidden_files_and_other_files_are_no_frames(tmp_path):
    save_frames(tmp_path / "clip", grey_frames(3))
    for name in ("._00001.png", ".DS_Store", "Thumbs.db", "notes.txt", ".00009.png"):
        (tmp_path / "clip" / name).write_bytes(b"not a frame")
    assert data.read_clip(tmp_path / "clip", np.arange)[:, 0, 0, 0].tolist() == [0, 5, 10]


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "clip").mkdir()
    for i in (1, 2, 9, 10, 11, 100):  # without leading zeros
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "clip" / f"frame{i}.png")
    assert data.read_clip(tmp_path / "clip", np.arange)[:, 0, 0, 0].tolist() == [
        1,
        2,
        9,
        10,
        11,
        100,
    ]


@pytest.mark.parametrize("on_disk, listed", [("NFD", "NFC"), ("NFC", "NFD"), ("NFC", "NFC")])
def test_a_clip_is_found_in_another_unicode_normalisation(tmp_path, on_disk, listed):
    name = "gl\u00fcck-caf\u00e9"
    (tmp_path / unicodedata.normalize(on_disk, name)).mkdir()
    found = data.find_clip(tmp_path, unicodedata.normalize(listed, name))
    assert found.is_dir() and found.is_absolute()


def test_a_clip_under_another_suffix_or_a_folder_deeper_is_named(tmp_path):
    (tmp_path / "12.mp4").touch()
    with pytest.raises(FileNotFoundError) as e:
        data.find_clip(tmp_path, "12.webm")
    assert f"{tmp_path}/12.webm does not exist, but {tmp_path}/12.mp4 does: " in str(e.value)
    (tmp_path / "part1").mkdir()
    (tmp_path / "part1" / "13.webm").touch()
    with pytest.raises(FileNotFoundError, match="but .*/part1/13.webm does: rename or move it"):
        data.find_clip(tmp_path, "13.webm")
    with pytest.raises(FileNotFoundError, match=r"14\.webm does not exist$"):
        data.find_clip(tmp_path, "14.webm")


def test_a_path_is_never_taken_for_a_protocol(tmp_path, monkeypatch):
    pytest.importorskip("decord")
    monkeypatch.chdir(tmp_path)  # and a relative root makes no difference
    (tmp_path / "http:").mkdir()
    for name in ("http:/a.webm", "pipe:1.webm", "concat:b.webm", "-i.webm"):
        shutil.copy(WEBM, tmp_path / name)
        assert webm_values(data.find_clip(".", name), np.arange) == list(range(24))


def test_frames_come_out_upright_and_in_8_bits(tmp_path):
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:, :8] = 255  # bright on the left
    turned = Image.Exif()
    # to be shown after a quarter turn clockwise: left is up then
    turned[0x0112] = 6
    (tmp_path / "turned").mkdir()
    Image.fromarray(picture).save(tmp_path / "turned" / "1.jpg", exif=turned)
    frame = data.read_clip(tmp_path / "turned", lambda n: [0])[0].float().mean(0)
    assert frame.shape == (24, 16) and frame[:6].min() > 240 and frame[10:].max() < 15
    for name, other in (
        ("cmyk", Image.fromarray(picture).convert("CMYK")),
        ("grey", Image.fromarray(picture).convert("L")),
    ):
        (tmp_path / name).mkdir()
        other.save(tmp_path / name / "1.jpg")
        frame = data.read_clip(tmp_path / name, lambda n: [0])[0].float()
        assert (
            frame.shape == (3, 16, 24)
            and frame[:, :, :6].min() > 240
            and frame[:, :, 10:].max() < 15
        )
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((16, 24), 1000, np.uint16)).save(tmp_path / "deep" / "1.png")
    with pytest.raises(ValueError, match="8 bits"):
        data.read_clip(tmp_path / "deep", lambda n: [0])


# ----- video files -----


DAMAGED = WEBM.read_bytes()[:700] + bytes(WEBM.stat().st_size - 700)  # the rest is zeros


def webm_values(path, choose):
    """Which frames of clip.webm these are, told by their brightness (studio range, so 20 + 9 i
    comes out a little off).
    """
    frames = data.read_clip(path, choose)
    assert frames.shape[1:] == (3, 32, 32) and frames.dtype == torch.uint8
    return ((frames.float().mean((1, 2, 3)) - 20) / 9).round().int().tolist()


@pytest.mark.parametrize(
    "indices", [list(range(24)), [2, 6, 10, 14, 18, 22], [0, 0, 5, 5, 5, 23], [23], [20, 3, 20, 9]]
)
def test_webm_gives_exactly_the_frames_asked_for(indices):
    pytest.importorskip("decord")
    seen = []
    assert webm_values(WEBM, lambda n: seen.append(n) or np.array(indices)) == indices
    assert seen == [24]


def test_truncated_webm_reads_what_decodes_or_raises(tmp_path):
    pytest.importorskip("decord")
    whole, path, counts = WEBM.read_bytes(), tmp_path / "cut.webm", []
    for length in range(40, len(whole), 90):
        path.write_bytes(whole[:length])
        asked = []

        def choose(n):
            asked.append(n)
            return data.sample_indices(n, 4)

        try:
            assert webm_values(path, choose) == data.sample_indices(asked[-1], 4).tolist()
            counts.append(asked[-1])
        except ValueError as e:
            assert str(path) in str(e)
            counts.append(0)
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 12


def test_a_damaged_webm_reads_the_same_each_time(tmp_path):
    # decord's threads race when a file is damaged. A clip may then be refused; what it may not is
    # read in two ways.
    pytest.importorskip("decord")
    path = tmp_path / "1.webm"
    path.write_bytes(DAMAGED)
    outcomes = set()
    for _ in range(12):
        try:
            outcomes.add(str(webm_values(path, lambda n: data.sample_indices(n, 8))))
        except ValueError:
            outcomes.add("refused")
    # decord may notice the damage or not, but never gives other frames
    assert len(outcomes - {"refused"}) <= 1, outcomes


@pytest.mark.parametrize("name, counted, shown", [("cut.mp4", 24, 15), ("altref.webm", 25, 24)])
def test_frames_that_are_not_shown_are_not_read(name, counted, shown):
    # cut.mp4 was cut with `ffmpeg -ss T -c copy`: an edit list hides the frames before T.
    # altref.webm
    # is VP8 with an invisible frame. decord counts them, players do not.
    pytest.importorskip("decord")
    asked = []
    path = Path(__file__).parent / name
    frames = data.read_clip(path, lambda n: asked.append(n) or np.arange(n))
    assert len(frames) == asked[-1] == shown and asked[0] == counted
    # the next frame each time, none of them twice
    if name == "cut.mp4":
        assert (frames.float().mean((1, 2, 3)).diff() > 1).all()
    some = data.read_clip(path, lambda n: data.sample_indices(n, 4))
    assert torch.equal(some, frames[torch.from_numpy(data.sample_indices(shown, 4))])


# ----- own videos: class folders and lists -----


def own_folder(root, kind="png"):
    """Two classes in train and validation, with a clip in a sub-folder and one behind a link."""
    for split, clips in ("train", ("a", "b", "deep/c")), ("validation", ("d",)):
        for number, name in enumerate(("swipe_left", "swipe_right")):
            for i, clip in enumerate(clips):
                save_frames(
                    root / split / name / clip, grey_frames(6, first=40 * number + 10 * i), kind
                )
    save_frames(root.parent / "elsewhere", grey_frames(6, first=200), kind)
    (root / "train" / "swipe_right" / "linked").symlink_to(root.parent / "elsewhere")
    return root


def test_class_folders(tmp_path):
    root = own_folder(tmp_path / "own")
    (root / "train" / "swipe_left" / ".DS_Store").touch()
    ids, labels, classes = data.read_annotations("folder", root, "train")
    assert classes == ["swipe_left", "swipe_right"]
    assert dict(zip(ids, labels)) == {
        "train/swipe_left/a": 0,
        "train/swipe_left/b": 0,
        "train/swipe_left/deep/c": 0,
        "train/swipe_right/a": 1,
        "train/swipe_right/b": 1,
        "train/swipe_right/deep/c": 1,
        "train/swipe_right/linked": 1,
    }
    for name in ("validation", "val"):
        if name == "val":
            (root / "validation").rename(root / "val")
        assert data.read_annotations("folder", root, "validation")[0].tolist() == [
            f"{name}/swipe_left/d",
            f"{name}/swipe_right/d",
        ]
    dataset = data.VideoDataset("folder", root, "train", num_frames=4, size=16)
    assert [dataset[i][0].shape for i in range(7)] == [(3, 4, 16, 16)] * 7


def test_class_folders_take_videos_of_any_container_without_renaming(tmp_path):
    pytest.importorskip("decord")
    suffixes = (".webm", ".mp4", ".MKV", ".avi", ".mov", ".m4v", ".mpg")
    for i, suffix in enumerate(suffixes):
        (tmp_path / "train" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        # decord looks inside
        shutil.copy(WEBM, tmp_path / "train" / f"class{i % 2}" / f"clip{i}{suffix}")
    shutil.copytree(tmp_path / "train", tmp_path / "validation")
    # beside videos, a picture is no clip
    (tmp_path / "train" / "class0" / "thumbnail.jpg").touch()
    (tmp_path / "train" / "class0" / "._clip0.webm").touch()
    dataset = data.VideoDataset("folder", tmp_path, "train", num_frames=4, size=16)
    assert [dataset[i][1] for i in range(len(dataset))] == [0, 0, 0, 0, 1, 1, 1]
    (tmp_path / "train" / ".trash").mkdir()
    shutil.copy(WEBM, tmp_path / "train" / ".trash" / "old.webm")
    assert data.read_annotations("folder", tmp_path, "train")[2] == ["class0", "class1"]
    (tmp_path / "test").mkdir()
    shutil.copy(WEBM, tmp_path / "test" / "unknown.webm")
    ids, labels, _ = data.read_annotations("folder", tmp_path, "test")
    assert ids.tolist() == ["test/unknown.webm"] and labels.tolist() == [-1]


def test_a_clip_without_a_class_folder_is_refused(tmp_path):
    own_folder(tmp_path / "own")
    (tmp_path / "own" / "train" / "lost.mp4").touch()
    with pytest.raises(ValueError, match="the class of clip train/lost.mp4 is missing"):
        data.read_annotations("folder", tmp_path / "own", "train")


@pytest.mark.parametrize("separator", (" ", ",", ", ", ";", "\t"))
@pytest.mark.parametrize("kind", ("csv", "txt"))
def test_lists_in_every_usual_form(tmp_path, separator, kind):
    (tmp_path / f"train.{kind}").write_text(
        "".join(
            f"clips/{i}.mp4{separator}{name}\n" for i, name in enumerate(("jump", "run", "jump"))
        )
    )
    (tmp_path / f"val.{kind}").write_text(f"clips/9.mp4{separator}run\n")
    (tmp_path / f"test.{kind}").write_text("clips/7.mp4\nclips/8.mp4\n")
    ids, labels, classes = data.read_annotations("folder", tmp_path, "train")
    assert (ids.tolist(), labels.tolist(), classes) == (
        ["clips/0.mp4", "clips/1.mp4", "clips/2.mp4"],
        [0, 1, 0],
        ["jump", "run"],
    )
    assert data.read_annotations("folder", tmp_path, "validation")[1].tolist() == [1]
    assert data.read_annotations("folder", tmp_path, "test")[1].tolist() == [-1, -1]


@pytest.mark.parametrize("names", ("run\njump\n", "0 run\n1 jump\n", "1 jump\n0 run\n"))
def test_numbers_in_a_list_may_have_names(tmp_path, names):
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 1\n")
    ids, labels, classes = data.read_annotations("folder", tmp_path, "train")
    assert labels.tolist() == [0, 1] and classes == ["0", "1"]
    (tmp_path / "classes.txt").write_text(names)
    ids, labels, classes = data.read_annotations("folder", tmp_path, "train")
    assert classes == ["jump", "run"] and [classes[i] for i in labels] == ["run", "jump"]


def test_a_number_without_a_name_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 1\n")
    (tmp_path / "classes.txt").write_text("1 run\n2 jump\n")
    with pytest.raises(ValueError, match="classes.txt has no name for the label 0"):
        data.read_annotations("folder", tmp_path, "train")


def test_a_list_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "train.csv").write_bytes("a.mp4 caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="train.csv is not UTF-8"):
        data.read_annotations("folder", tmp_path, "train")


def test_a_folder_in_no_layout_hears_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="train/ or train.csv or train.txt"):
        data.read_annotations("folder", tmp_path, "train")


def test_names_that_begin_with_a_number_in_classes_txt(tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 1\nc.mp4 2\n")
    (tmp_path / "classes.txt").write_text("walk\nrun\n1 finger\n")
    _, labels, classes = data.read_annotations("folder", tmp_path, "train")
    assert [classes[i] for i in labels] == ["walk", "run", "1 finger"]


def test_folders_that_are_named_as_videos(tmp_path):
    save_frames(tmp_path / "train" / "clap" / "v1.avi", grey_frames(2))
    save_frames(tmp_path / "train" / "st.mov" / "deep", grey_frames(2))
    ids, labels, classes = data.read_annotations("folder", tmp_path, "train")
    assert ids.tolist() == ["train/clap/v1.avi", "train/st.mov/deep"]
    assert [classes[i] for i in labels] == ["clap", "st.mov"]


def test_names_with_blanks_in_classes_txt(tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 1\n")
    (tmp_path / "classes.txt").write_text("Moving left\nMoving right\n")
    assert data.read_annotations("folder", tmp_path, "train")[2] == ["Moving left", "Moving right"]


def test_a_line_without_a_label_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("b.mp4 run\na.mp4\n")
    with pytest.raises(ValueError, match="the class of clip a.mp4 is missing, expected one of 1"):
        data.read_annotations("folder", tmp_path, "train")


@pytest.mark.parametrize("line", ("my clips/1.mp4 run", "a.mp4,run,fast", "a.mp4 120 3"))
def test_an_ambiguous_line_is_refused_with_the_line(tmp_path, line):
    (tmp_path / "train.csv").write_text(f"b.mp4 run\n{line}\n")
    with pytest.raises(ValueError) as e:
        data.read_annotations("folder", tmp_path, "train")
    assert repr(line) in str(e.value) and "train.csv" in str(e.value) and "tab" in str(e.value)


def test_a_tab_makes_blanks_and_commas_unambiguous(tmp_path):
    (tmp_path / "train.csv").write_text(
        "my clips/a, b.mp4\tShowing something, then hiding it\nb.mp4\tOther\n"
    )
    ids, labels, classes = data.read_annotations("folder", tmp_path, "train")
    assert ids[0] == "my clips/a, b.mp4" and classes == [
        "Other",
        "Showing something, then hiding it",
    ]


def test_paths_of_a_list_are_below_the_data_or_the_clip_root(tmp_path):
    root, clips = own_folder(tmp_path / "own"), tmp_path / "lists"
    clips.mkdir()
    lines = [f"{root}/train/swipe_left/a left", f"{root}/train/swipe_right/b right"]
    for split in ("train", "validation"):
        (clips / f"{split}.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="outside of .*: give its folder with --clip_root"):
        data.VideoDataset("folder", clips, "train")[0]
    dataset = data.VideoDataset("folder", clips, "train", num_frames=4, size=16, clip_root=root)
    assert dataset[1][0].float().mean() > dataset[0][0].float().mean()
    (clips / "train.csv").write_text("train/swipe_left/a left\ntrain/swipe_right/b right\n")
    again = data.VideoDataset("folder", clips, "train", num_frames=4, size=16, clip_root=root)
    assert torch.equal(again[1][0], dataset[1][0])
    dataset.folder = Path(f"{clips}/../own")
    assert torch.equal(again[1][0], dataset[1][0])
    (clips / "train.csv").write_text("../elsewhere left\nb right\n")
    with pytest.raises(ValueError, match="clip ../elsewhere lies outside of"):
        data.VideoDataset("folder", clips, "train", clip_root=root)[0]


def test_a_class_that_training_does_not_have_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("a.mp4 run\nb.mp4 jump\n")
    (tmp_path / "validation.csv").write_text("c.mp4 fly\n")
    with pytest.raises(
        ValueError, match="validation.csv: the class of clip c.mp4 is fly, expected one of 2"
    ):
        data.read_annotations("folder", tmp_path, "validation")


def test_the_same_clips_in_three_layouts_give_the_same_samples(tmp_path):
    pytest.importorskip("decord")
    classes, clips = ["jump high", "run"], {}
    for i in range(4):
        clips[str(i)] = classes[i % 2]
    for split in ("train", "validation"):
        for i, name in clips.items():
            (tmp_path / "folders" / split / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(WEBM, tmp_path / "folders" / split / name / f"{i}.webm")
    write_v2(tmp_path / "v2", clips.items(), clips.items(), classes=classes)
    (tmp_path / "v2" / "20bn-something-something-v2").mkdir()
    for i in clips:
        shutil.copy(WEBM, tmp_path / "v2" / "20bn-something-something-v2" / f"{i}.webm")
    (tmp_path / "lists").mkdir()
    for split in ("train", "validation"):
        rows = [f"20bn-something-something-v2/{i}.webm\t{name}" for i, name in clips.items()]
        (tmp_path / "lists" / f"{split}.csv").write_text("\n".join(sorted(rows)))

    def samples(*args, **options):
        dataset = data.VideoDataset(*args, num_frames=4, size=16, **options)
        # class folders are listed class by class
        order = np.argsort([Path(i).stem for i in dataset.ids])
        return [dataset[int(i)][:2] for i in order], dataset.classes

    for split in ("train", "validation"):
        a, names = samples("ssv2", tmp_path / "v2", split)
        b, names_b = samples("folder", tmp_path / "folders", split)
        c, names_c = samples("folder", tmp_path / "lists", split, clip_root=tmp_path / "v2")
        assert names == names_b == names_c
        for one, two, three in zip(a, b, c, strict=True):
            assert torch.equal(one[0], two[0]) and torch.equal(one[0], three[0])
            assert one[1] == two[1] == three[1]
