"""scripts/toy_data.py: that only the order of frames tells the classes of a toy apart.

It protects the drawing of scenes and the bounds on what a model can know without order, the
painting against a slow reference, mirrored clips, and the folder.

    python -m pytest -q tests/test_toy_data.py
"""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
from conftest import ROOT
from scripts import toy_data
from scripts.toy_data import (CYCLE_CLASSES, ORDER_CLASSES, SHAPES, TOY_CLASSES, cycle_times,
                              make_toy, order_times, shape_clip, toy_clip, toy_render)

ALL_CLASSES = sorted(sum(TOY_CLASSES, ()))

def toy_scene(motion, seed=0, n=8):
    return toy_data.toy_scene(np.random.default_rng([seed, motion]), motion, n)

# ----- The motion task ------------------------------------------------------

def test_clips_follow_from_the_seed():
    frames, text = toy_clip(0, "train", 5)
    again, _ = toy_clip(0, "train", 5)
    assert frames.dtype == np.uint8 and frames.shape[1:] == (64, 64, 3)
    assert 18 <= len(frames) <= 30 and (frames == again).all()
    for other in ((1, "train", 5), (0, "validation", 5), (0, "train", 15)):
        clip, other_text = toy_clip(*other)
        assert other_text == text and (len(clip) != len(frames) or (clip != frames).any())
    assert [toy_clip(0, "train", i)[1] for i in range(10)] == list(sum(TOY_CLASSES, ()))

def test_a_single_frame_says_nothing_about_the_class():
    # At a random frame every state must be uniform on its circle for every motion, and the
    # nuisances drawn alike.
    frame = np.random.default_rng(0)
    for motion in range(5):
        states, nuisances = [], []
        for seed in range(400):
            scene = toy_scene(motion, seed, 18)
            t = frame.integers(18)
            states.append(scene["states"][:, t] % 1)
            means = [scene[name].mean() for name in ("colors", "texture", "profile")]
            nuisances.append([*means, scene["distractors"][2]["x"][t] % 1])
        for values in np.array(states).T:
            counts = np.histogram(values, 5, (0, 1))[0]
            # chi squared, 4 degrees of freedom: p = 1e-4
            assert ((counts - 80) ** 2 / 80).sum() < 23.5, (motion, counts)
        assert np.abs(np.mean(nuisances, axis=0) - [0.525, 0.375, 0.494, 0.5]).max() < 0.06

def test_steps_are_shorter_than_half_a_period():
    # Else 16 sampled frames would not tell forward from backward.
    largest = 0
    rng = np.random.default_rng(0)
    for seed in range(300):
        for motion in (0, 1):
            states = toy_scene(motion, seed, int(rng.integers(18, 31)))["states"]
            n = states.shape[1]
            for indices in (data.sample_indices(n, 16), data.sample_indices(n, 16, rng)):
                largest = max(largest, np.abs(np.diff(states[:, indices])).max())
    assert largest < 0.5

def paint_every_pixel(scene, size):
    """The plain way to paint a scene: frame by frame, each object on the whole frame."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    row, column = grid[:, None], grid[None, :]

    def away(a, b):
        return (a - np.float32(b) + 0.5) % 1 - 0.5

    def soft(distance):
        return np.clip(0.5 - distance * size, 0, 1)[..., None]

    def paint_distractors(picture, t, front):
        for d in scene["distractors"]:
            if d["front"] == front:
                distance = np.hypot(away(column, d["x"][t]), away(row, d["y"][t]))
                picture += soft(distance - np.float32(d["radius"])) * (d["color"] - picture)

    frames, noise = [], np.random.default_rng(scene["noise"])
    profile, (tail_color, tip_color) = scene["profile"], scene["colors"]
    for t, (x, y, angle, scale, light) in enumerate(scene["states"].T):
        picture = toy_data.toy_background(scene, size)
        paint_distractors(picture, t, front=False)
        dx, dy = away(column, x), away(row, y)
        cos, sin = np.float32(np.cos(2 * np.pi * angle)), np.float32(np.sin(2 * np.pi * angle))
        radius = np.float32(0.14 + 0.2 * (scale % 1))
        u, v = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius
        width = np.interp(u, np.linspace(-1, 1, len(profile)), profile).astype(np.float32)
        tail = np.clip(0.5 - 4 * (u + 0.1), 0, 1)[..., None]
        color = (tail_color * tail + tip_color * (1 - tail)) * (0.25 + 0.75 * (light % 1))
        mask = soft(np.maximum(np.abs(v) - width, np.abs(u) - 1) * radius)
        picture += mask * (color - picture)
        paint_distractors(picture, t, front=True)
        picture += noise.normal(0, 0.02, picture.shape)
        frames.append((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    return np.stack(frames)

@pytest.mark.parametrize("motion, size", [(0, 64), (1, 100), (2, 64), (3, 10), (4, 64)])
def test_painting_around_the_objects_equals_painting_every_pixel(motion, size):
    scene = toy_scene(motion, 7, 12)
    assert np.array_equal(toy_render(scene, size), paint_every_pixel(scene, size))

class NoNoise:
    """Stands in for the generator of the pixel noise, which no mirror or clock turns round."""

    def standard_normal(self, *_):
        return 0.0

def render_quietly(scene, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: NoNoise())
        return toy_render(scene).astype(int)

@pytest.mark.parametrize("motion", range(5))
def test_backward_is_forward_reversed_in_time(motion, monkeypatch):
    # With the same draws, one class of a pair has exactly the other's frames in reverse.
    make = np.random.default_rng

    def forget_the_number_of_the_clip(seed):
        return make(seed[:-1] if isinstance(seed, list) else seed)

    monkeypatch.setattr(np.random, "default_rng", forget_the_number_of_the_clip)
    forward, a = toy_clip(0, "train", 2 * motion)
    backward, b = toy_clip(0, "train", 2 * motion + 1)
    assert (a, b) == TOY_CLASSES[motion]
    assert (forward == backward[::-1]).all() and (forward != backward).any()

def course(values):
    """Steps on a circle of circumference 1."""
    return (np.diff(values) + 0.5) % 1 - 0.5

def center(weight):
    """Centre of mass on the circle, in periods: (n, row, column) -> (n, 2), x and y"""
    wave = np.exp(2j * np.pi * (np.arange(64) + 0.5) / 64)
    angles = [np.angle((weight.sum(axis) * wave).sum(-1)) for axis in (1, 2)]
    return np.stack(angles, -1) / (2 * np.pi)

@pytest.mark.parametrize("motion", range(5))
def test_one_state_moves_in_the_direction_of_its_name(motion, monkeypatch):
    # Nothing but the object, red with a green tip, on black: its pixels must do what the class
    # text says.
    scene = toy_scene(motion, seed=1, n=24)
    scene.update(distractors=[], blobs=[], texture=np.zeros((6, 6, 3)))
    scene["colors"] = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    if motion != 4:
        scene["states"][4] = 0.9        # bright all the time
    if motion != 3:
        scene["states"][3] = 0.5
    frames = render_quietly(scene, monkeypatch) / 255
    weight = frames.sum(-1)             # (n, row, column)
    if motion == 0:
        steps = course(center(weight)[:, 0])
    elif motion == 1:
        steps = -course(center(weight)[:, 1])           # up: rows count downwards
    elif motion == 2:
        ends = np.stack([center(frames[..., 0]), center(frames[..., 1])])
        tip = course(ends.transpose(1, 2, 0))[..., 0]   # from tail to tip: x, y
        # with rows downwards, growing angles turn clockwise
        steps = course(np.arctan2(tip[:, 1], tip[:, 0]) / (2 * np.pi))
    elif motion == 3:
        steps = np.diff((weight > 0.1).sum((1, 2)) / 1000)      # larger, that is closer
    else:
        steps = np.diff(weight.sum((1, 2)) / 300)               # lighter
    if motion > 2:
        steps = steps[np.abs(steps) < 0.5]              # a sawtooth falls back once or twice
    assert (steps > -0.02).all() and steps.sum() > 0.5, steps

def mirrored_scene(scene):
    """The same scene in a mirror: x counts from the other side, angles turn the other way."""
    states = scene["states"].copy()
    states[0], states[2] = 1 - states[0], 0.5 - states[2]
    blobs = [(np.array([cy, 1 - cx]), size, color) for (cy, cx), size, color in scene["blobs"]]
    return dict(scene, states=states, blobs=blobs, texture=scene["texture"][:, ::-1],
                distractors=[dict(d, x=1 - d["x"]) for d in scene["distractors"]])

@pytest.mark.parametrize("motion", range(5))
def test_a_mirrored_clip_is_one_of_the_mirrored_class(motion, monkeypatch):
    scene = toy_scene(motion)
    mirror = mirrored_scene(scene)
    plain, mirrored = render_quietly(scene, monkeypatch), render_quietly(mirror, monkeypatch)
    # the edge of a blob may round to the other pixel
    assert (np.abs(mirrored - plain[:, :, ::-1]) > 2).mean() < 1e-3

    # ... and its states move as those of the class that mirror_labels gives
    labels = data.mirror_labels(ALL_CLASSES)
    for backward in (0, 1):
        partner = ALL_CLASSES[labels[ALL_CLASSES.index(TOY_CLASSES[motion][backward])]]
        motion2 = next(m for m, pair in enumerate(TOY_CLASSES) if partner in pair)
        backward2 = TOY_CLASSES[motion2].index(partner)
        seen = np.diff(mirror["states"]).sum(1) * (-1) ** backward
        expected = np.diff(toy_scene(motion2, seed=5)["states"]).sum(1) * (-1) ** backward2
        assert (np.sign(np.round(seen, 9)) == np.sign(np.round(expected, 9))).all()

# ----- The tasks order and cycle --------------------------------------------

def best_guess(*columns):
    """How often the best guess is right from what columns of integers say. Last: the class"""
    table = {}
    for *seen, label in zip(*columns):
        counts = table.setdefault(tuple(seen), {})
        counts[label] = counts.get(label, 0) + 1
    return sum(max(counts.values()) for counts in table.values()) / len(columns[0])

# The bounds are exact: each gap and each start, counted by its probability.
@pytest.mark.parametrize("frames, gap, bound", [
    (16, 4, 0.716), (32, 4, 0.585), (32, 8, 0.689), (32, 9, 0.721)])
def test_the_time_of_one_event_says_little_about_their_order(frames, gap, bound):
    # A and B are two shapes; the class says which lights up first.
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 10_000)
    times = np.array([order_times(rng, frames, gap) for _ in labels])
    a = times[np.arange(len(labels)), labels]           # A is the second one in class 1
    b = times[np.arange(len(labels)), 1 - labels]
    assert times.min() == 0 and times.max() + 1 == frames - 1           # each event fits
    assert {*np.diff(times).ravel()} == {gap, gap + 1}
    for event in (a, b):                                # a best guess on a sample is a bit higher
        assert bound - 0.01 < best_guess(event, labels) < bound + 0.02
    assert best_guess(a < b, labels) == 1

def test_a_window_shorter_than_the_gap_never_shows_both_events():
    for number in range(12):
        frames, _, events = shape_clip(0, "train", number, "order", 16, 4)
        lit = np.zeros((2, 16), dtype=bool)
        for row, time in enumerate(events.values()):
            lit[row, [time, time + 1]] = True
        for start in range(16 - 3 + 1):
            window = lit[:, start:start + 3]
            assert not window.any(axis=1).all()

def test_the_cyclic_order_needs_three_events_or_their_distances():
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 10_000)
    times = np.array([cycle_times(rng, 16) for _ in labels])
    a = times[:, 0]
    b = times[np.arange(len(labels)), 1 + labels]       # ABC in class 0, ACB in class 1
    c = times[np.arange(len(labels)), 2 - labels]
    for event in (a, b, c):
        assert best_guess(event, labels) < 0.52
    for first, second in ((a, b), (b, c), (a, c)):
        assert 0.63 < best_guess(first < second, labels) < 0.69
    assert best_guess(a < b, b < c, a < c, labels) == 1
    assert best_guess((b - a) % 16, labels) == 1        # a third of the clip, or two thirds

@pytest.mark.parametrize("task, classes", [("order", ORDER_CLASSES), ("cycle", CYCLE_CLASSES)])
def test_shapes_light_up_when_the_events_say(task, classes):
    order = []
    for number in range(len(classes)):
        frames, text, events = shape_clip(3, "validation", number, task)
        assert frames.shape == (16, 64, 64, 3) and frames.dtype == np.uint8
        order.append(tuple(events))
        brightest = frames.max(axis=-1).reshape(16, -1).astype(int)
        brighter = (brightest - np.median(brightest, axis=0) > 60).sum(axis=1)  # lit pixels
        lit = {time % 16 for start in events.values() for time in (start, start + 1)}
        assert {*np.flatnonzero(brighter > 10)} == lit
        assert [classes[tuple(events)], set(events) <= set(SHAPES)] == [text, True]
    assert order == list(classes)

def test_reversed_order_clips_belong_to_the_reversed_class():
    # The times of a reversed clip are distributed as those of the other class, so a clip played
    # backwards is one of that class.
    rng = np.random.default_rng(0)
    times = np.array([order_times(rng, 16, 4) for _ in range(20_000)])
    backwards = 16 - 2 - times[:, ::-1]                 # the later event becomes the earlier one
    for column in (0, 1):
        forwards_counts = np.bincount(times[:, column], minlength=16)
        backwards_counts = np.bincount(backwards[:, column], minlength=16)
        assert np.abs(forwards_counts - backwards_counts).max() < 250

@pytest.mark.parametrize("length", (16, 32))
def test_no_sampling_misses_an_event(length):
    rng = np.random.default_rng(0)
    for start in range(length - 1):
        for _ in range(50):
            assert {start, start + 1} & {*data.sample_indices(length, length, rng)}
        assert {start, start + 1} & {*data.sample_indices(length, length)}

def test_shuffled_token_frames_are_the_same_tokens():
    from model import MODELS, ModelConfig, STDFormer
    from scripts.variants import VARIANTS
    config = ModelConfig(**MODELS["tiny"], num_classes=6)
    torch.manual_seed(0)
    plain = STDFormer(config)
    shuffled = VARIANTS["shuffle_tokens"](config)
    shuffled.load_state_dict(plain.state_dict())        # a checkpoint of STD-Former fits
    video = torch.randn(2, 3, 16, 32, 32)
    x, y = plain.stem(video)[0], shuffled.stem(video)[0]
    assert not torch.equal(x, y)
    assert torch.equal(x.sort(dim=1).values, y.sort(dim=1).values)

# ----- The folder -----------------------------------------------------------

@pytest.mark.parametrize("task", ("motion", "order"))
def test_the_folder_has_v1s_layout(tmp_path, task):
    root = tmp_path / "new" / "toy"
    make_toy(root, task=task, seed=1, train=24, validation=12)
    for split, clips in (("train", 24), ("validation", 12)):
        dataset = data.VideoDataset("toy", root, split, num_frames=16, size=32)
        assert len(dataset) == clips
        frames, text, *events = toy_clip(1, split, 3) if task == "motion" else shape_clip(
            1, split, 3, task)
        assert dataset.classes[dataset.labels[3]] == text
        stored = data.read_frames(dataset.path(3), data.frame_names(dataset.path(3)))
        assert stored.shape == frames.shape
        assert np.abs(stored.astype(int) - frames).mean() < 6           # JPEG
    if task == "order":
        lines = (root / "events.csv").read_text().splitlines()
        clip, written = lines[24 + 3].split(";")
        assert clip == dataset.ids[3] and json.loads(written) == events[0]
    assert [p.name for p in root.parent.iterdir()] == ["toy"]           # nothing left beside it

def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="not empty"):
        make_toy(tmp_path, train=2, validation=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

def test_nothing_is_left_if_a_clip_cannot_be_written(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(toy_data, "write_toy", fail)
    with pytest.raises(OSError, match="disk full"):
        make_toy(tmp_path / "toy", train=2, validation=1)
    assert list(tmp_path.iterdir()) == []

def test_an_error_of_the_command_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "toy_data.py"), "--data_root", "toy"]
    done = subprocess.run(command + ["--task", "order", "--gap", "14"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("toy_data.py: --gap 14")
    assert len(done.stderr.splitlines()) == 1
