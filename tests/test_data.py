"""data.py: annotations, frame sampling, decoding, transforms, samples, the toy data and the commands.

    python -m pytest -q tests/test_data.py
"""
import contextlib
import io
import json
import multiprocessing.pool
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from PIL import Image

import data
from conftest import ROOT

# 24 frames of 32 x 32, VP9, a key frame every 8; frame i is grey, of value 20 + 9 i. Made once with PyAV 18 (ffmpeg's libvpx-vp9,
# 12 fps, crf 30, g 8, lag-in-frames 0) from np.full((32, 32, 3), 20 + 9 * i, np.uint8); no test needs ffmpeg.
WEBM = Path(__file__).parent / "clip.webm"
SIDES = ["Pulling something from left to right", "Pulling something from right to left"]


def save_frames(folder, frames, kind="png"):
    """frames: an iterable of uint8 (h, w, 3); png is exact, jpg is what Something-Something V1 has."""
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


def write_v2(root, train, validation=(), test=None, classes=SIDES, prefix="something-something-v2-", labels=None):
    """The same for V2: the class texts here carry [brackets], as the released templates do."""
    root.mkdir(parents=True, exist_ok=True)

    def bare(text):
        return text.replace("[", "").replace("]", "")

    def entries(pairs):
        return [dict(id=i, label=bare(c).replace("something", "a cup"), template=c, placeholders=["a cup"]) for i, c in pairs]

    labels = labels if labels is not None else {bare(c): str(i) for i, c in enumerate(sorted(classes))}
    (root / f"{prefix}labels.json").write_text(json.dumps(labels))
    (root / f"{prefix}train.json").write_text(json.dumps(entries(train)))
    (root / f"{prefix}validation.json").write_text(json.dumps(entries(validation)))
    if test is not None:
        (root / f"{prefix}test.json").write_text(json.dumps([dict(id=i) for i in test]))


def v1_set(root, content, split="train", **options):
    """A VideoDataset in V1's layout, the same clips in both splits: content is {id: (frames, class text)}."""
    write_v1(root, *[[(i, text) for i, (_, text) in content.items()]] * 2)
    for i, (frames, _) in content.items():
        save_frames(root / "20bn-something-something-v1" / i, frames)
    return data.VideoDataset("ssv1", root, split, train=split == "train", **{**dict(num_frames=4, size=16), **options})


# ----- sampling -----


@pytest.mark.parametrize("n, F, expected", [
    (17, 4, [2, 6, 10, 14]),                            # longer: s = 4, segments of 4, their centres
    (8, 8, [0, 1, 2, 3, 4, 4, 5, 6]),                   # equal: s = 7/8, edges 0 .875 1.75 2.625 3.5 4.375 5.25 6.125 rounded, no shift
    (3, 4, [0, 0, 1, 2]),                               # shorter: s = 1/2, edges 0 .5 1 1.5, halves to even
    (1, 4, [0, 0, 0, 0]),
    (2, 1, [0]),
])
def test_sample_indices_by_hand(n, F, expected):
    got = data.sample_indices(n, F)
    assert got.tolist() == expected and got.dtype == np.int64


def test_temporal_views_differ_and_stay_in_their_segments():
    # n = 41, F = 8: s = 5, segments start at 0 5 ... 35; floor(5/3) = 1 and floor(10/3) = 3
    first, second = (data.sample_indices(41, 8, view=v, views=2) for v in (0, 1))
    assert first.tolist() == [1, 6, 11, 16, 21, 26, 31, 36]
    assert second.tolist() == [3, 8, 13, 18, 23, 28, 33, 38]


def test_sample_indices_follow_their_docstring_for_any_length():
    for n in [*range(1, 40), 77, 300]:
        for F in (1, 4, 16):
            s = (n - 1) / F
            edges = [round(s * i) for i in range(F + 1)]
            for views in (1, 2, 3):
                for view in range(views):
                    got = data.sample_indices(n, F, view=view, views=views)
                    assert got.tolist() == [e + int(s * (view + 1) / (views + 1)) for e in edges[:-1]]
                    assert got.min() >= 0 and got.max() <= n - 1 and (np.diff(got) >= 0).all()
            for seed in range(5):
                got = data.sample_indices(n, F, np.random.default_rng(seed))
                assert all(low <= i <= high for low, i, high in zip(edges, got, edges[1:]))
                assert (np.diff(got) >= 0).all() and got.max() <= n - 1
                assert got.tolist() == data.sample_indices(n, F, np.random.default_rng(seed)).tolist()


def test_training_draws_both_ends_of_every_segment():
    rng = np.random.default_rng(0)
    drawn = np.stack([data.sample_indices(17, 4, rng) for _ in range(300)])
    assert [set(column) for column in drawn.T.tolist()] == [set(range(4 * i, 4 * i + 5)) for i in range(4)]


# ----- annotations -----


def test_v1_as_released(tmp_path):
    classes = ["Showing something, then hiding it", "Approaching something", "Moving something up"]     # not alphabetical, one comma
    write_v1(tmp_path, [("7", classes[0]), ("100", classes[2])], [("5", classes[1])], test=["9", "8"], classes=classes)
    ids, labels, names = data.read_annotations("ssv1", tmp_path, "train")
    assert names == ["Approaching something", "Moving something up", "Showing something, then hiding it"] == data.read_classes("ssv1", tmp_path)
    assert ids.tolist() == [b"7", b"100"] and labels.tolist() == [2, 1]
    assert ids.dtype.kind == "S" and labels.dtype == np.int64       # arrays: no Python object per clip
    assert data.read_annotations("ssv1", tmp_path, "validation")[1].tolist() == [0]
    ids, labels, _ = data.read_annotations("ssv1", tmp_path, "test")
    assert ids.tolist() == [b"9", b"8"] and labels.tolist() == [-1, -1]


@pytest.mark.parametrize("prefix", ["something-something-v2-", ""])
@pytest.mark.parametrize("folder", ["", "labels"])
def test_v2_as_released_both_generations(tmp_path, capsys, prefix, folder):
    classes = ["Showing [something] next to [something]", "Moving [something], then [something else]"]
    write_v2(tmp_path / folder, [("4", classes[0]), ("2", classes[1])], [("6", classes[1])], ["1", "3"], classes=classes, prefix=prefix)
    ids, labels, names = data.read_annotations("ssv2", tmp_path, "train")
    assert names == ["Moving something, then something else", "Showing something next to something"]
    assert ids.tolist() == [b"4", b"2"] and labels.tolist() == [1, 0]
    assert data.read_annotations("ssv2", tmp_path, "test")[1].tolist() == [-1, -1]
    (tmp_path / folder / "test-answers.csv").write_text("3;" + names[0] + "\n1;" + names[1] + "\n")    # in another order, class text after ;
    ids, labels, _ = data.read_annotations("ssv2", tmp_path, "test")
    assert ids.tolist() == [b"1", b"3"] and labels.tolist() == [1, 0]
    assert data.read_classes("ssv2", tmp_path) == names
    assert capsys.readouterr().out == ""                # official ids are the sorted order: nothing to say


def test_other_ids_in_own_labels_get_one_line(tmp_path, capsys):
    write_v2(tmp_path, [("1", "B")], classes=["A", "B", "C"], labels={"C": "0", "B": "1", "A": "2"})
    assert data.read_classes("ssv2", tmp_path) == ["A", "B", "C"]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and "2 of 3 ids" in printed[0] and "labels.json" in printed[0]
    data.read_classes("ssv2", tmp_path, quiet=True)
    assert capsys.readouterr().out == ""


V2_TRAIN = "something-something-v2-train.json"


@pytest.mark.parametrize("name, content, words", [
    ("something-something-v2-labels.json", {"0": "A", "1": "B"}, ["labels.json", "class text", "id"]),             # the other way round
    ("something-something-v2-labels.json", ["A", "B"], ["labels.json", "class text"]),
    ("something-something-v2-labels.json", {"A": "0"}, ["labels.json", "two or more"]),
    (V2_TRAIN, [{"id": 1, "label_id": 0}], ["train.json", "ids are strings"]),                                    # other people's conversions
    (V2_TRAIN, [{"id": "1", "label": "A"}], ["train.json", "clip 1", "template"]),
    (V2_TRAIN, {"1": {"id": "1", "template": "A"}}, ["train.json", "a list"]),
    (V2_TRAIN, [{"id": "1", "template": "Ghost"}], ["train.json", "clip 1", "Ghost", "2 classes"]),                 # unknown class
    (V2_TRAIN, [{"id": "1", "template": "A"}, {"id": "1", "template": "B"}], ["train.json", "2 lines", "1 different"]),
    (V2_TRAIN, [], ["train.json", "one or more"]),
    (V2_TRAIN, "not json", ["train.json", "not a JSON file"]),
])
def test_v2_in_a_wrong_format_is_one_clear_error(tmp_path, name, content, words):
    write_v2(tmp_path, [("1", "A")], classes=["A", "B"])
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as e:
        data.read_annotations("ssv2", tmp_path, "train")
    assert all(w in str(e.value) for w in words) and len(str(e.value).splitlines()) == 1, e.value


@pytest.mark.parametrize("name, content, words", [
    ("train", "1,A\n", ["train.csv", "line 1", "id;class text"]),
    ("train", "1;A\n1;B\n", ["train.csv", "2 lines", "1 different"]),
    ("train", "1;A\n2;Ghost\n", ["train.csv", "clip 2", "Ghost"]),
    ("labels", "A\nB\nA\n", ["labels.csv", "different"]),
])
def test_v1_in_a_wrong_format_is_one_clear_error(tmp_path, name, content, words):
    write_v1(tmp_path, [("1", "A")], classes=["A", "B"])
    (tmp_path / f"something-something-v1-{name}.csv").write_text(content)
    with pytest.raises(ValueError) as e:
        data.read_annotations("ssv1", tmp_path, "train")
    assert all(w in str(e.value) for w in words) and len(str(e.value).splitlines()) == 1, e.value


@pytest.mark.parametrize("dataset", ["ssv1", "ssv2"])
def test_missing_files_name_the_expected_tree(tmp_path, dataset):
    with pytest.raises(FileNotFoundError) as e:
        data.read_annotations(dataset, tmp_path, "train")
    assert str(tmp_path) in str(e.value) and "labels" in str(e.value) and f"20bn-something-something-v{dataset[-1]}" in str(e.value)
    (write_v1 if dataset == "ssv1" else write_v2)(tmp_path, [("1", SIDES[0])])
    with pytest.raises(FileNotFoundError) as e:         # annotations are there, the clips are not
        data.VideoDataset(dataset, tmp_path, "train")
    assert f"20bn-something-something-v{dataset[-1]} not found" in str(e.value) and "expected layouts" in str(e.value)


def test_mirror_labels_pairs_sides_by_whole_text():
    pairs = [SIDES, ["Pushing something from left to right", "Pushing something from right to left"],
             ["Turning the camera left while filming something", "Turning the camera right while filming something"]]
    others = ["Pulling something out of something", "Something falling like a feather or paper", "Putting something upright on the table",
              "Plugging something into something but pulling it right out as you remove your hand", "Moving something up", "Moving something down",
              "Putting something that can't actually stand upright on the table, so it falls on its side", "Turning something upside down",
              "Lifting up one end of something, then letting it drop down", "Moving something to the left"]     # its partner is no class
    classes = sorted(sum(pairs, []) + others)
    mirrored = data.mirror_labels(classes)
    found = {frozenset((classes[i], classes[j])) for i, j in enumerate(mirrored) if i != j}
    assert found == {frozenset(p) for p in pairs}
    assert mirrored[mirrored].tolist() == list(range(len(classes)))
    assert all(mirrored[classes.index(o)] == classes.index(o) for o in others)


def test_mirror_labels_of_the_toy():
    classes = sorted(sum(data.TOY_CLASSES, ()))
    mirrored = data.mirror_labels(classes)
    found = {frozenset((classes[i], classes[j])) for i, j in enumerate(mirrored) if i != j}
    assert found == {frozenset(data.TOY_CLASSES[0]), frozenset(data.TOY_CLASSES[2])}       # left/right and the two senses of turning


def test_skip_list_has_comments(tmp_path):
    (tmp_path / "skip.txt").write_text("# made by hand\n12  # broken\n\n 7\n")
    assert data.read_skip_list(tmp_path / "skip.txt") == {"12", "7"}
    clips = {i: (grey_frames(3), SIDES[0]) for i in ("7", "12", "13")}
    kept = v1_set(tmp_path / "set", clips, skip={"12", "7", "99"})
    assert isinstance(kept.ids, np.ndarray) and isinstance(kept.labels, np.ndarray)
    assert kept.ids.tolist() == [b"13"] and len(kept.labels) == len(kept) == 1 and kept.skipped == 2


# ----- frames and transforms -----


def test_normalize_is_clips():
    video = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    got = data.normalize(video)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (data.CLIP_MEAN, data.CLIP_STD))
    assert got.dtype == torch.float32 and torch.allclose(got, (video / 255 - mean) / std, atol=1e-5)
    assert data.normalize(video[0]).shape == (3, 4, 8, 8) and data.normalize(video[None]).shape == (1, 2, 3, 4, 8, 8)
    assert torch.equal(data.normalize(video[None])[0], got)
    assert torch.equal(data.normalize(video, (0, 0, 0), (1, 1, 1)), video / 255)


def test_red_is_channel_zero(tmp_path):
    red = [np.full((24, 32, 3), (255, 0, 0))] * 5
    write_v1(tmp_path, [("1", SIDES[0])], [("1", SIDES[0])])
    save_frames(tmp_path / "20bn-something-something-v1" / "1", red, kind="jpg")
    for split in ("train", "validation"):
        video, _, _ = data.VideoDataset("ssv1", tmp_path, split, num_frames=4, size=16, train=split == "train")[0]
        assert video.shape == (3, 4, 16, 16) and video.dtype == torch.uint8
        assert video[0].min() >= 250 and video[1:].max() <= 5       # JPEG is off by one or two
        value = data.normalize(video)
        assert torch.allclose(value[0], (video[0] / 255 - 0.48145466) / 0.26862954, atol=1e-5)
        assert (value[0] > 1.8).all() and (value[1:] < -1.4).all()


@pytest.mark.parametrize("options", [dict(scale=(0.3, 1.0), augment=21), dict(scale=(0.3, 1.0), augment=0), dict(scale=(0.08, 1.0), augment=30)])
def test_one_transform_for_all_frames(tmp_path, options):
    frame = np.random.default_rng(0).integers(0, 256, (40, 60, 3))
    dataset = v1_set(tmp_path / "set", {"1": ([frame] * 6, SIDES[0])}, size=24, **options)
    seen = set()
    for epoch in range(25):                             # many draws: RandAugment has some fourteen operations
        video, _, _ = dataset[(epoch, 0)]
        assert (video == video[:, :1]).all(), f"epoch {epoch}: frames of one clip differ"
        seen.add(video.numpy().tobytes())
    assert len(seen) == 25


def test_randaugment_applies_each_of_four_operations_with_probability_one_half(monkeypatch):
    drawn = []
    monkeypatch.setattr(v2.RandAugment, "forward", lambda self, video: drawn.append((self.num_ops, self.magnitude, tuple(video.shape))) or video)
    transform, video, counts = data.TrainTransform(16, magnitude=21), torch.zeros(5, 3, 20, 24, dtype=torch.uint8), []
    torch.manual_seed(0)
    for _ in range(2000):
        drawn.clear()
        transform(video)
        counts.append(len(drawn))
        assert set(drawn) <= {(1, 21, (5, 3, 16, 16))}  # one operation at a time, on all frames of the clip at once
    shares = np.bincount(counts, minlength=5) / len(counts)
    assert np.abs(shares - np.array([1, 4, 6, 4, 1]) / 16).max() < 0.05, shares         # binomial; 0.05 is 4.5 standard deviations


def test_three_crops_cover_left_centre_right(tmp_path):
    frame = np.zeros((20, 60, 3))
    for channel in range(3):                            # three squares side by side: red, green, blue
        frame[:, 20 * channel:20 * (channel + 1), channel] = 200
    for name, picture in (("wide", frame), ("tall", frame.transpose(1, 0, 2))):
        clips = {"1": ([picture] * 3, SIDES[0])}
        views, label, index = v1_set(tmp_path / name, clips, "validation", crops=3)[0]
        assert views.shape == (3, 3, 4, 16, 16) and (label, index) == (0, 0)
        assert [view.float().mean((1, 2, 3)).argmax().item() for view in views] == [0, 1, 2]
        centre, _, _ = data.VideoDataset("ssv1", tmp_path / name, "validation", num_frames=4, size=16)[0]
        assert torch.equal(centre, views[1])


def test_views_are_crops_of_clips(tmp_path):
    clips = {"1": (grey_frames(30, 16, 24), SIDES[0])}
    views, _, _ = v1_set(tmp_path / "set", clips, "validation", crops=3, clips=2)[0]
    assert views.shape == (6, 3, 4, 16, 16)
    for v, view in enumerate(views):                    # grey frames: every crop of a clip shows the same frames
        assert (view[0, :, 0, 0] // 5).tolist() == data.sample_indices(30, 4, view=v // 3, views=2).tolist()


def test_evaluation_is_deterministic_and_ignores_training_options(tmp_path):
    rng = np.random.default_rng(0)
    clips = {"1": (rng.integers(0, 256, (9, 20, 24, 3)), SIDES[0])}
    first = v1_set(tmp_path / "set", clips, "validation", seed=1)
    second = data.VideoDataset("ssv1", tmp_path / "set", "validation", num_frames=4, size=16, scale=(0.1, 1.0), augment=21, flip=True, seed=2)
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
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpy_before).all()
    torch.manual_seed(99)
    assert torch.equal(dataset[(1, 2)][0], video) and dataset[(1, 2)][1:] == (label, index)
    assert not torch.equal(dataset[(2, 2)][0], video)
    assert not torch.equal(noise_set(tmp_path / "other", seed=4)[(1, 2)][0], video)


def test_a_sample_does_not_depend_on_the_workers(tmp_path):
    dataset = noise_set(tmp_path / "set")
    items = [(epoch, i) for epoch in range(2) for i in (2, 0, 3, 1)]
    runs = [list(torch.utils.data.DataLoader(dataset, batch_size=None, sampler=items, num_workers=workers)) for workers in (0, 2)]
    for (a, label_a, index_a), (b, label_b, index_b) in zip(*runs, strict=True):
        assert torch.equal(a, b) and label_a == label_b and index_a == index_b


def test_flip_mirrors_the_label_with_the_frames(tmp_path):
    frame = np.zeros((16, 16, 3))
    frame[:, 8:] = 255                                  # bright on the right
    dataset = v1_set(tmp_path / "set", {"1": ([frame] * 4, SIDES[0])}, scale=(1.0, 1.0))
    seen = set()
    for epoch in range(40):
        video, label, _ = dataset[(epoch, 0)]
        bright_right = bool(video[..., 12:].float().mean() > video[..., :4].float().mean())
        assert bright_right == (label == 0)
        seen.add(label)
    assert seen == {0, 1}
    dataset.flip = False
    assert {dataset[(epoch, 0)][1] for epoch in range(40)} == {0}


@pytest.mark.parametrize("split", ["train", "validation"])
def test_controls(tmp_path, split):
    clips = {"1": (grey_frames(24), SIDES[0])}
    plain = v1_set(tmp_path / "set", clips, split, num_frames=8)
    root, options = tmp_path / "set", dict(num_frames=8, size=16, train=split == "train")
    shuffled, single = (data.VideoDataset("ssv1", root, split, control=c, **options) for c in ("shuffle", "single"))

    def values(dataset, epoch=0):
        return dataset[(epoch, 0)][0][0, :, 0, 0].tolist()

    assert values(plain) == sorted(values(plain)) and len(set(values(plain))) == 8
    assert values(shuffled) != values(plain) and sorted(values(shuffled)) == values(plain)
    assert len(set(values(single))) == 1 and values(single)[0] in values(plain)
    assert values(shuffled) == values(shuffled)         # drawn once per clip, not per look


# ----- broken clips -----


def break_clip(kind, path):
    """Put one kind of broken clip at path (a folder in V1, a .webm in V2); returns a word of the reason."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "missing":
        return "no such file"
    if kind == "empty folder":
        path.mkdir()
        return "no .jpg"
    if kind == "broken jpeg":
        save_frames(path, [np.random.default_rng(0).integers(0, 256, (32, 32, 3))] * 4, kind="jpg")
        for frame in path.iterdir():
            frame.write_bytes(frame.read_bytes()[:300])
        return "cannot be read"
    if kind == "two sizes":
        save_frames(path, [np.zeros((16, 16, 3)), np.zeros((16, 20, 3))])
        return "different sizes"
    if kind == "empty file":
        path.touch()
        return "empty"
    path.write_bytes(np.random.default_rng(0).bytes(2000))             # garbage
    return "cannot be read"


@pytest.mark.parametrize("kind, layout", [("missing", 1), ("empty folder", 1), ("broken jpeg", 1), ("two sizes", 1),
                                          ("missing", 2), ("empty file", 2), ("garbage", 2)])
def test_a_broken_clip_raises_with_id_path_and_reason(tmp_path, kind, layout):
    if kind == "garbage":
        pytest.importorskip("decord")
    (write_v1 if layout == 1 else write_v2)(tmp_path, [("17", SIDES[0])])
    path = tmp_path / f"20bn-something-something-v{layout}" / ("17" if layout == 1 else "17.webm")
    words = ["clip 17", str(path), break_clip(kind, path)]
    dataset = data.VideoDataset(f"ssv{layout}", tmp_path, "train", num_frames=4, size=16, train=True)
    for workers in (0, 1):
        try:
            list(torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=workers))
            line = "nothing was raised"
        except data.ClipError as e:
            line = data.reason(e.with_traceback(None))  # else it keeps the loader alive, whose worker then takes 5 s to end
        assert all(w in line for w in words) and "\n" not in line and "Traceback" not in line, line


def test_an_error_without_a_message_is_a_clip_error_too(tmp_path, monkeypatch):
    save_frames(tmp_path / "1", grey_frames(2))

    def fail(*_, **__):
        raise EOFError                                  # str() of it is empty

    monkeypatch.setattr(data.Image, "open", fail)
    with pytest.raises(data.ClipError, match="EOFError"):
        data.read_clip(tmp_path / "1", lambda n: [0])


def test_frames_come_out_upright_and_in_8_bits(tmp_path):
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:, :8] = 255                                # bright on the left
    turned = Image.Exif()
    turned[0x0112] = 6                                  # to be shown after a quarter turn clockwise: left is up then
    (tmp_path / "turned").mkdir()
    Image.fromarray(picture).save(tmp_path / "turned" / "1.jpg", exif=turned)
    frame = data.read_clip(tmp_path / "turned", lambda n: [0])[0].float().mean(0)
    assert frame.shape == (24, 16) and frame[:6].min() > 240 and frame[10:].max() < 15
    for name, other in (("cmyk", Image.fromarray(picture).convert("CMYK")), ("grey", Image.fromarray(picture).convert("L"))):
        (tmp_path / name).mkdir()
        other.save(tmp_path / name / "1.jpg")
        frame = data.read_clip(tmp_path / name, lambda n: [0])[0].float()
        assert frame.shape == (3, 16, 24) and frame[:, :, :6].min() > 240 and frame[:, :, 10:].max() < 15
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((16, 24), 1000, np.uint16)).save(tmp_path / "deep" / "1.png")
    with pytest.raises(data.ClipError, match="8 bits"):
        data.read_clip(tmp_path / "deep", lambda n: [0])


def test_a_link_out_of_the_data_root_is_refused(tmp_path):
    dataset = v1_set(tmp_path / "set", {i: (grey_frames(3), SIDES[0]) for i in ("1", "2", "3")})
    folder = tmp_path / "set" / "20bn-something-something-v1"
    (folder / "1").rename(tmp_path / "elsewhere")
    (folder / "1").symlink_to(tmp_path / "elsewhere")
    (folder / "2").rename(tmp_path / "set" / "inside")
    (folder / "2").symlink_to("../inside")
    with pytest.raises(data.ClipError, match="clip 1: .*is a link to .*elsewhere.*--data_root"):
        dataset[0]
    assert dataset[1][0].shape == dataset[2][0].shape == (3, 4, 16, 16)
    with pytest.raises(data.ClipError, match="is a link"):
        data.probe(str(folder / "1"))
    folder.rename(tmp_path / "disk")                    # the whole folder on another disk, as people do
    (tmp_path / "elsewhere").rename(tmp_path / "disk" / "4")
    folder.symlink_to(tmp_path / "disk")
    assert dataset[2][0].shape == (3, 4, 16, 16) and data.probe(str(folder / "4")) == ""


# ----- video files -----


DAMAGED = WEBM.read_bytes()[:700] + bytes(WEBM.stat().st_size - 700)      # as an interrupted download may leave it: the rest is zeros


def webm_values(path, choose):
    """Which frames of clip.webm these are, told by their brightness (studio range, so 20 + 9 i comes out a little off)."""
    frames = data.read_clip(path, choose)
    assert frames.shape[1:] == (3, 32, 32) and frames.dtype == torch.uint8
    return ((frames.float().mean((1, 2, 3)) - 20) / 9).round().int().tolist()


@pytest.mark.parametrize("indices", [list(range(24)), [2, 6, 10, 14, 18, 22], [0, 0, 5, 5, 5, 23], [23], [20, 3, 20, 9]])
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
        except data.ClipError as e:
            assert str(path) in str(e)
            counts.append(0)
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 12


def test_a_damaged_webm_reads_the_same_each_time(tmp_path):
    # decord's threads race when a file is damaged. A clip may then be refused; what it may not is read in two ways.
    pytest.importorskip("decord")
    path = tmp_path / "1.webm"
    path.write_bytes(DAMAGED)
    outcomes = set()
    for _ in range(12):
        try:
            outcomes.add(str(webm_values(path, lambda n: data.sample_indices(n, 8))))
        except data.ClipError:
            outcomes.add("refused")
    assert len(outcomes - {"refused"}) <= 1, outcomes   # decord may notice the damage or not, but never gives other frames


def test_a_webm_that_lost_bytes_in_its_middle_is_refused(tmp_path):
    pytest.importorskip("decord")
    whole, path = WEBM.read_bytes(), tmp_path / "1.webm"
    assert data.webm_damage(WEBM) is None
    for at in range(300, len(whole) - 60, 50):
        path.write_bytes(whole[:at] + whole[at + 40:])
        with pytest.raises(data.ClipError, match=str(path)):
            data.read_clip(path, np.arange)
    path.write_bytes(whole + b"what follows the segment")
    assert data.webm_damage(path) is None and webm_values(path, np.arange) == list(range(24))
    path.write_bytes(whole + whole[200:])               # frames there: one player shows them, another does not
    assert data.webm_damage(path) > len(whole)
    for length in range(4, len(whole), 7):              # only cut off: what is there fits
        path.write_bytes(whole[:length])
        assert data.webm_damage(path) is None


def mp4_box(kind, content):
    return (8 + len(content)).to_bytes(4, "big") + kind + content


@pytest.mark.parametrize("matrix, mirrored", [((1, 0, 0, 1), False), ((0, 1, -1, 0), False), ((-1, 0, 0, -1), False), ((0, -1, 1, 0), False),
                                              ((-1, 0, 0, 1), True), ((0, 1, 1, 0), True), ((1, 1, -1, 1), True)])
def test_a_mirrored_mp4_is_noticed(tmp_path, matrix, mirrored):
    a, b, c, d = (round(65536 * v).to_bytes(4, "big", signed=True) for v in matrix)
    header = bytes(40) + a + b + bytes(4) + c + d + bytes(24)          # version 0: the matrix is at byte 40
    raw = mp4_box(b"ftyp", b"isom") + mp4_box(b"moov", mp4_box(b"mvhd", bytes(100)) + mp4_box(b"trak", mp4_box(b"tkhd", header))) + mp4_box(b"mdat", bytes(50))
    (tmp_path / "1.mp4").write_bytes(raw)
    assert data.mp4_mirrored(tmp_path / "1.mp4") == mirrored
    assert data.declared_bytes(tmp_path / "1.mp4") == len(raw)
    (tmp_path / "1.mp4").write_bytes(raw[:-20])
    assert data.declared_bytes(tmp_path / "1.mp4") == len(raw)          # 20 more than it has


# ----- check and show -----


def run_check(root, dataset, *flags):
    """`data.py check` in this process: (exit status, what it printed, ids on the skip list, its text)."""
    out, printed = root / "skip.txt", io.StringIO()
    with pytest.raises(SystemExit) as e, contextlib.redirect_stdout(printed):
        data.main(["check", "--dataset", dataset, "--data_root", str(root), "--out", str(out), "--jobs", "1", *flags])
    return e.value.code, printed.getvalue(), data.read_skip_list(out), out.read_text()


def test_check_on_frame_folders_with_one_that_hangs(tmp_path):
    kinds = {"11": "missing", "12": "empty folder", "13": "broken jpeg", "14": "two sizes"}
    write_v1(tmp_path, [(i, SIDES[0]) for i in ("10", *kinds)], [("20", SIDES[1])])
    clips = tmp_path / "20bn-something-something-v1"
    save_frames(clips / "10", grey_frames(3), kind="jpg")
    for clip, kind in kinds.items():
        break_clip(kind, clips / clip)
    (clips / "20").mkdir()
    os.mkfifo(clips / "20" / "00001.jpg")               # opening a pipe that nobody writes to waits for ever
    code, printed, ids, _ = run_check(tmp_path, "ssv1", "--timeout", "2")      # shorter than the start of a process, on purpose
    assert code == 1 and ids == {"11", "12", "13", "14", "20"}, printed
    assert "train: 5 clips, 2 classes" in printed and "test: no annotation file" in printed
    assert "6 frame folders: 1 readable" in printed and "5 unreadable" in printed and "--skip_list" in printed
    lines = {line.split()[1].rstrip(":"): line for line in printed.splitlines() if line.startswith("unreadable")}
    assert "hang" in lines["20"] and "no such file" in lines["11"] and str(clips / "12") in lines["12"]


def test_check_reports_missing_numbers_and_clips_that_no_split_lists(tmp_path):
    v1_set(tmp_path / "set", {i: (grey_frames(4), SIDES[0]) for i in ("1", "2", "3")})
    folder = tmp_path / "set" / "20bn-something-something-v1"
    (folder / "2" / "00003.png").unlink()
    shutil.copytree(folder / "1", folder / "4")
    code, printed, ids, text = run_check(tmp_path / "set", "ssv1")
    assert code == 0 and ids == set() and "1 clips are in none of these splits" in printed and "as '4'" in printed
    assert "short       2: has 3 frames, and 1 numbers between the first and the last are missing" in printed and "# short, kept: 2" in text


def test_check_on_good_data_succeeds_wherever_it_lies(tmp_path, capfd):
    root = tmp_path / "a folder of mine"                # words of our own messages in a path must not matter
    v1_set(root, {"1": (grey_frames(2), SIDES[0])})
    code, printed, ids, _ = run_check(root, "ssv1")
    assert code == 0 and ids == set() and "1 readable" in printed and "unreadable  " not in printed
    time.sleep(0.5)                                     # its probing process has ended
    assert "Traceback" not in capfd.readouterr().err


def test_check_without_any_split_says_what_is_missing(tmp_path):
    write_v1(tmp_path, [("1", SIDES[0])], [("2", SIDES[1])])
    for split in ("train", "validation"):
        (tmp_path / f"something-something-v1-{split}.csv").unlink()
    with pytest.raises(FileNotFoundError, match="something-something-v1-train.csv"):
        data.main(["check", "--dataset", "ssv1", "--data_root", str(tmp_path), "--out", str(tmp_path / "skip.txt")])
    assert not (tmp_path / "skip.txt").exists()


@pytest.fixture(scope="module")
def checked_videos(tmp_path_factory):
    """One run of check over whole and bad videos; the tests below look at its outcome."""
    pytest.importorskip("decord")
    root, whole, kinds = tmp_path_factory.mktemp("videos"), WEBM.read_bytes(), {"11": "missing", "12": "empty file", "13": "garbage"}
    write_v2(root, [(i, SIDES[0]) for i in ("10", *kinds)], [("20", SIDES[1])], test=["30", "31", "32"])
    clips = root / "20bn-something-something-v2"
    for clip, kind in kinds.items():
        break_clip(kind, clips / f"{clip}.webm")
    (clips / "10.webm").write_bytes(whole)
    (clips / "20.webm").write_bytes(whole[:300])        # truncated before its first frame
    (clips / "30.webm").write_bytes(whole[:800])        # truncated after half of its frames
    (clips / "31.webm").write_bytes(DAMAGED)
    (clips / "32.webm").write_bytes(whole)
    return run_check(root, "ssv2")


def test_check_on_videos(checked_videos):
    code, printed, ids, text = checked_videos
    assert code == 1 and ids >= {"11", "12", "13", "20"} and not ids & {"10", "30", "32"}, printed
    assert "train: 4 clips" in printed and "test: 3 clips" in printed and "8 videos (.webm)" in printed
    assert text.startswith("#") and all(f"\n{i}  # " in text for i in ids)     # each id with its reason


def test_check_reports_a_video_shorter_than_its_container_declares(checked_videos):
    _, printed, ids, text = checked_videos
    assert "30" not in ids and "short       30" in printed and "# short, kept: 30" in text


def test_check_lists_a_damaged_video(checked_videos):
    assert "31" in checked_videos[2], "training may fail on it, so it belongs on the skip list"


def test_show_writes_a_contact_sheet(tmp_path):
    clips = {str(i): (grey_frames(9, 20, 24), SIDES[i % 2]) for i in range(3)}
    v1_set(tmp_path / "set", clips)
    out = tmp_path / "show.png"
    data.main(["show", "--dataset", "ssv1", "--data_root", str(tmp_path / "set"), "--out", str(out), "--samples", "2",
               "--model", "tiny", "--num_frames", "4", "--image_size", "16", "--clip", "none"])
    picture = np.asarray(Image.open(out))
    assert picture.shape == (2 * (96 + 22 + 3), 8 * (96 + 3), 3)                # 8 columns of at least 96 pixels, 3 between them; 22 for the label's line
    assert picture.std() > 10


def test_show_names_a_broken_clip_in_one_line(tmp_path):
    v1_set(tmp_path / "set", {"1": (grey_frames(4), SIDES[0])})
    for frame in (tmp_path / "set" / "20bn-something-something-v1" / "1").iterdir():
        frame.write_bytes(b"no picture")
    flags = ["--dataset", "ssv1", "--data_root", str(tmp_path / "set"), "--out", str(tmp_path / "show.png"), "--clip", "none", "--device", "cpu"]
    done = subprocess.run([sys.executable, str(ROOT / "data.py"), "show", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 1 and re.fullmatch(r"data\.py: .*v1/1: .* is not a JPEG or PNG picture\..*", done.stdout.strip().splitlines()[-1])
    assert "Traceback" not in done.stdout


# ----- the toy -----


class NoNoise:
    """Stands in for the generator of the pixel noise, which no mirror or clock turns round."""

    def normal(self, *_):
        return 0.0


def render_quietly(scene, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: NoNoise())
        return data.toy_render(scene).astype(int)


def toy_scene(motion, seed=0, n=8, difficulty=0.0):
    return data.toy_scene(np.random.default_rng([seed, motion]), motion, n, difficulty)


def test_toy_clips_follow_from_the_seed():
    frames, text = data.toy_clip(0, "train", 5)
    again, _ = data.toy_clip(0, "train", 5)
    assert frames.dtype == np.uint8 and frames.shape[1:] == (64, 64, 3) and 18 <= len(frames) <= 30 and (frames == again).all()
    for other in ((1, "train", 5), (0, "validation", 5), (0, "train", 15)):
        clip, other_text = data.toy_clip(*other)
        assert other_text == text and (len(clip) != len(frames) or (clip != frames).any())
    assert [data.toy_clip(0, "train", i)[1] for i in range(10)] == list(sum(data.TOY_CLASSES, ()))


@pytest.mark.parametrize("difficulty", (0.0, 1.0))
@pytest.mark.parametrize("motion", range(5))
def test_toy_backward_is_forward_reversed_in_time(motion, difficulty, monkeypatch):
    # The same draws, so the same scene, for the two classes of a pair: one is exactly the other's frames in reverse.
    monkeypatch.setattr(data.np.random, "default_rng", lambda seed, make=np.random.default_rng: make(
        seed[:-1] if isinstance(seed, list) else seed))                # forget the clip's number
    (forward, a), (backward, b) = (data.toy_clip(0, "train", 2 * motion + k, difficulty) for k in (0, 1))
    assert (a, b) == data.TOY_CLASSES[motion]
    assert (forward == backward[::-1]).all() and (forward != backward).any()


@pytest.mark.parametrize("motion", range(5))
def test_toy_moves_one_state_in_the_direction_of_its_name(motion, monkeypatch):
    # Nothing but the object, red with a green tip, on black: its pixels must do what the class text says.
    scene = toy_scene(motion, seed=1, n=24)
    scene.update(distractors=[], blobs=[], texture=np.zeros((6, 6, 3)), colors=np.array([[1.0, 0, 0], [0, 1.0, 0]]))
    if motion != 4:
        scene["states"][4] = 0.9                        # bright all the time
    if motion != 3:
        scene["states"][3] = 0.5
    frames = render_quietly(scene, monkeypatch) / 255
    weight = frames.sum(-1)                             # (n, row, column)

    def place(w):                                       # centre of mass on the circle, in periods
        wave = np.exp(2j * np.pi * (np.arange(64) + 0.5) / 64)
        return np.stack([np.angle((w.sum(axis) * wave).sum(-1)) / (2 * np.pi) for axis in (1, 2)], -1)     # (n, 2): x, y

    def course(values):                                 # steps on a circle of circumference 1
        return (np.diff(values) + 0.5) % 1 - 0.5

    if motion == 0:
        steps = course(place(weight)[:, 0])             # left to right
    elif motion == 1:
        steps = -course(place(weight)[:, 1])            # up: rows count downwards
    elif motion == 2:
        tip = course(np.stack([place(frames[..., 0]), place(frames[..., 1])]).transpose(1, 2, 0))[..., 0]     # tail to tip: x, y
        steps = course(np.arctan2(tip[:, 1], tip[:, 0]) / (2 * np.pi))  # with rows downwards, growing angles turn clockwise
    elif motion == 3:
        steps = np.diff((weight > 0.1).sum((1, 2)) / 1000)             # larger, that is closer
    else:
        steps = np.diff(weight.sum((1, 2)) / 300)       # lighter
    steps = steps[np.abs(steps) < 0.5] if motion > 2 else steps        # a sawtooth falls back once or twice
    assert (steps > -0.02).all() and steps.sum() > 0.5, steps


def mirrored_scene(scene):
    """The same scene in a mirror: x counts from the other side, angles turn the other way."""
    states = scene["states"].copy()
    states[0], states[2] = 1 - states[0], 0.5 - states[2]
    return dict(scene, states=states, texture=scene["texture"][:, ::-1], fine_texture=scene["fine_texture"][:, ::-1],
                distractors=[dict(d, x=1 - d["x"]) for d in scene["distractors"]],
                blobs=[(np.array([cy, 1 - cx]), size, color) for (cy, cx), size, color in scene["blobs"]])


@pytest.mark.parametrize("difficulty", (0.0, 1.0))
@pytest.mark.parametrize("motion", range(5))
def test_a_mirrored_toy_clip_is_one_of_the_mirrored_class(motion, difficulty, monkeypatch):
    scene = toy_scene(motion, difficulty=difficulty)
    mirror = mirrored_scene(scene)
    difference = np.abs(render_quietly(mirror, monkeypatch) - render_quietly(scene, monkeypatch)[:, :, ::-1])
    assert (difference > 2).mean() < 1e-3               # the edge of a blob may round to the other pixel

    # ... and its states move as those of the class that mirror_labels gives (its scenes, or their reversal)
    classes = sorted(sum(data.TOY_CLASSES, ()))
    mirrored = data.mirror_labels(classes)
    for backward in (0, 1):
        partner = classes[mirrored[classes.index(data.TOY_CLASSES[motion][backward])]]
        motion2, backward2 = next((m, pair.index(partner)) for m, pair in enumerate(data.TOY_CLASSES) if partner in pair)
        seen = np.diff(mirror["states"]).sum(1) * (-1) ** backward
        expected = np.diff(toy_scene(motion2, seed=5)["states"]).sum(1) * (-1) ** backward2
        assert (np.sign(np.round(seen, 9)) == np.sign(np.round(expected, 9))).all()


@pytest.mark.parametrize("difficulty", (0.0, 1.0))
def test_a_single_toy_frame_says_nothing_about_the_class(difficulty):
    # At a random frame every state must be uniform on its circle for every motion, and the nuisances drawn alike.
    frame = np.random.default_rng(0)
    for motion in range(5):
        states, nuisances = [], []
        for seed in range(400):
            scene = toy_scene(motion, seed, 18, difficulty)
            t = frame.integers(scene["states"].shape[1])
            states.append(scene["states"][:, t] % 1)
            nuisances.append([scene["colors"].mean(), scene["texture"].mean(), scene["profile"].mean(), scene["distractors"][2]["x"][t] % 1])
        for values in np.array(states).T:
            counts = np.histogram(values, 5, (0, 1))[0]
            assert ((counts - 80) ** 2 / 80).sum() < 23.5, (motion, counts)               # chi squared, 4 degrees: p = 1e-4
        assert np.abs(np.mean(nuisances, axis=0) - [0.525, 0.375, 0.494, 0.5]).max() < 0.06


@pytest.mark.parametrize("difficulty", (0.0, 0.5, 1.0))
def test_toy_steps_are_shorter_than_half_a_period(difficulty):
    # Else 16 sampled frames would not tell forward from backward.
    largest = 0
    rng = np.random.default_rng(0)
    for seed in range(300):
        for motion in (0, 1):
            states = toy_scene(motion, seed, int(rng.integers(18, 31)), difficulty)["states"]
            for indices in (data.sample_indices(states.shape[1], 16), data.sample_indices(states.shape[1], 16, rng)):
                largest = max(largest, np.abs(np.diff(states[:, indices])).max())
    assert largest < 0.5


@pytest.mark.parametrize("motion", range(5))
def test_a_difficult_toy_clip_is_long_and_moves_for_a_short_part_of_it(motion):
    for seed in range(20):
        easy, hard = toy_scene(motion, seed, 24), toy_scene(motion, seed, 24, 1.0)
        assert easy["states"].shape[1] == 24 and hard["states"].shape[1] == 96
        moves = np.flatnonzero(np.diff(hard["states"][motion]))
        assert 0 < len(moves) <= 23 and moves[-1] - moves[0] < 24
        assert 0.4 <= abs(np.diff(hard["states"][motion]).sum()) <= 1.7 / 2.8
        assert (np.diff(np.delete(hard["states"], motion, axis=0)) == 0).all()
        assert hard["contrast"] < easy["contrast"] == 1 and not easy["fine_texture"].any() and hard["fine_texture"].any()
        assert len(hard["distractors"]) > len(easy["distractors"])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "new" / "toy"
    data.make_toy(root, seed=1, train=20, validation=10)
    return root


def test_make_toy_is_in_v1s_layout_and_made_once(toy, capsys):
    ids, labels, classes = data.read_annotations("ssv1", toy, "train")
    assert classes == sorted(sum(data.TOY_CLASSES, ())) and len(ids) == 20
    for split, clips in (("train", 20), ("validation", 10)):
        dataset = data.VideoDataset("toy", toy, split, num_frames=8, size=32)
        assert len(dataset) == clips and np.bincount(dataset.labels).tolist() == [clips // 10] * 10
        frames, text = data.toy_clip(1, split, 3)
        assert dataset.classes[dataset.labels[3]] == text
        stored = data.read_clip(dataset.path(3), lambda n: np.arange(n)).permute(0, 2, 3, 1).numpy().astype(int)
        assert stored.shape == frames.shape and np.abs(stored - frames).mean() < 6        # JPEG
    before = {p: p.stat().st_mtime_ns for p in toy.rglob("*")}
    data.make_toy(toy, seed=1, train=20, validation=10)                # is there: nothing happens
    assert {p: p.stat().st_mtime_ns for p in toy.rglob("*")} == before
    assert [p.name for p in toy.parent.iterdir()] == [toy.name]        # nothing left beside it
    for other in (dict(seed=2), dict(difficulty=0.5)):                  # another stamp
        with pytest.raises(ValueError, match="delete the folder or give another"):
            data.make_toy(toy, **{**dict(seed=1, train=20, validation=10), **other})
    with pytest.raises(ValueError, match="--difficulty 1.5: expected 0 to 1"):
        data.make_toy(toy.parent / "impossible", difficulty=1.5)
    assert {p: p.stat().st_mtime_ns for p in toy.rglob("*")} == before


def test_make_toy_respects_the_umask(toy):
    plain = toy.parent.parent / "plain"
    plain.mkdir()
    assert toy.stat().st_mode == plain.stat().st_mode   # others in the group can read it as they can any new folder


def test_make_toy_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="other files"):
        data.make_toy(tmp_path, train=2, validation=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def threads_for_processes(monkeypatch):
    """Toy makers in threads: a pool of processes would cost seconds to start."""
    monkeypatch.setattr(data.multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=multiprocessing.pool.ThreadPool))


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_make_toy_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch, error):
    threads_for_processes(monkeypatch)

    def fail(job):
        raise error

    def interrupted(*_, **__):
        raise error

    monkeypatch.setattr(*((data, "write_toy_clip", fail) if isinstance(error, OSError) else (data, "progress", interrupted)))
    with pytest.raises(type(error)):
        data.make_toy(tmp_path / "toy", train=2, validation=1)
    assert list(tmp_path.iterdir()) == []


def test_make_toy_takes_an_empty_folder_and_a_faster_process_wins(tmp_path, monkeypatch):
    threads_for_processes(monkeypatch)
    (tmp_path / "toy").mkdir()
    data.make_toy(tmp_path / "toy", train=2, validation=1)
    assert (tmp_path / "toy" / "toy.json").is_file()

    rename = os.rename

    def slow(source, target):                           # meanwhile another process has put the same data there
        shutil.copytree(tmp_path / "toy", target)
        rename(source, target)

    monkeypatch.setattr(data.os, "rename", slow)
    data.make_toy(tmp_path / "second", train=2, validation=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["second", "toy"]
    assert len(data.VideoDataset("toy", tmp_path / "second", "train")) == 2
