"""scripts/toy_data.py: scenes, painting, what the classes say, and the folder.

python -m pytest -q tests/test_toy_data.py
"""

import json
import multiprocessing.pool
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import data
from conftest import ROOT
from scripts import toy_data
from scripts.mirror_labels import mirror_labels
from scripts.toy_data import TOY_CLASSES, make_toy, toy_clip, toy_render

ALL_CLASSES = sorted(sum(TOY_CLASSES, ()))


def toy_scene(motion, seed=0, n=8, difficulty=0.0):
    return toy_data.toy_scene(np.random.default_rng([seed, motion]), motion, n, difficulty)


# ----- Scenes ---------------------------------------------------------------


def test_toy_clips_follow_from_the_seed():
    frames, text = toy_clip(0, "train", 5)
    again, _ = toy_clip(0, "train", 5)
    assert frames.dtype == np.uint8 and frames.shape[1:] == (64, 64, 3)
    assert 18 <= len(frames) <= 30 and (frames == again).all()
    for other in ((1, "train", 5), (0, "validation", 5), (0, "train", 15)):
        clip, other_text = toy_clip(*other)
        assert other_text == text and (len(clip) != len(frames) or (clip != frames).any())
    assert [toy_clip(0, "train", i)[1] for i in range(10)] == list(sum(TOY_CLASSES, ()))


@pytest.mark.parametrize("difficulty", (0.0, 1.0))
def test_a_single_toy_frame_says_nothing_about_the_class(difficulty):
    # At a random frame every state must be uniform on its circle for every motion, and the
    # nuisances drawn alike.
    frame = np.random.default_rng(0)
    for motion in range(5):
        states, nuisances = [], []
        for seed in range(400):
            scene = toy_scene(motion, seed, 18, difficulty)
            t = frame.integers(scene["states"].shape[1])
            states.append(scene["states"][:, t] % 1)
            means = [scene[name].mean() for name in ("colors", "texture", "profile")]
            nuisances.append([*means, scene["distractors"][2]["x"][t] % 1])
        for values in np.array(states).T:
            counts = np.histogram(values, 5, (0, 1))[0]
            # chi squared, 4 degrees of freedom: p = 1e-4
            assert ((counts - 80) ** 2 / 80).sum() < 23.5, (motion, counts)
        assert np.abs(np.mean(nuisances, axis=0) - [0.525, 0.375, 0.494, 0.5]).max() < 0.06


@pytest.mark.parametrize("difficulty", (0.0, 0.5, 1.0))
def test_toy_steps_are_shorter_than_half_a_period(difficulty):
    # Else 16 sampled frames would not tell forward from backward.
    largest = 0
    rng = np.random.default_rng(0)
    for seed in range(300):
        for motion in (0, 1):
            states = toy_scene(motion, seed, int(rng.integers(18, 31)), difficulty)["states"]
            n = states.shape[1]
            for indices in (data.sample_indices(n, 16), data.sample_indices(n, 16, rng)):
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
        assert hard["contrast"] < easy["contrast"] == 1
        assert not easy["fine_texture"].any() and hard["fine_texture"].any()
        assert len(hard["distractors"]) > len(easy["distractors"])


# ----- Painting -------------------------------------------------------------


def paint_every_pixel(scene, size):
    """The plain way to paint a scene: frame by frame, each thing on the whole picture."""
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
        picture += scene["contrast"] * mask * (color - picture)
        paint_distractors(picture, t, front=True)
        picture += noise.normal(0, 0.02, picture.shape)
        frames.append((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    return np.stack(frames)


@pytest.mark.parametrize("motion", range(5))
def test_painting_around_the_things_equals_painting_every_pixel(motion):
    for seed, (size, difficulty) in enumerate(((64, 0.0), (64, 0.5), (100, 1.0), (10, 0.0))):
        scene = toy_scene(motion, seed, 12, difficulty)
        frames = toy_render(scene, size)
        assert frames.shape == (scene["states"].shape[1], size, size, 3)
        assert np.array_equal(frames, paint_every_pixel(scene, size))


class NoNoise:
    """Stands in for the generator of the pixel noise, which no mirror or clock turns round."""

    def standard_normal(self, *_):
        return 0.0


def render_quietly(scene, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: NoNoise())
        return toy_render(scene).astype(int)


@pytest.mark.parametrize("difficulty", (0.0, 1.0))
@pytest.mark.parametrize("motion", range(5))
def test_toy_backward_is_forward_reversed_in_time(motion, difficulty, monkeypatch):
    # The same draws, so the same scene, for the two classes of a pair: one is exactly the other's
    # frames in reverse.
    make = np.random.default_rng

    def forget_the_number_of_the_clip(seed):
        return make(seed[:-1] if isinstance(seed, list) else seed)

    monkeypatch.setattr(np.random, "default_rng", forget_the_number_of_the_clip)
    forward, a = toy_clip(0, "train", 2 * motion, difficulty)
    backward, b = toy_clip(0, "train", 2 * motion + 1, difficulty)
    assert (a, b) == TOY_CLASSES[motion]
    assert (forward == backward[::-1]).all() and (forward != backward).any()


@pytest.mark.parametrize("motion", range(5))
def test_toy_moves_one_state_in_the_direction_of_its_name(motion, monkeypatch):
    # Nothing but the object, red with a green tip, on black: its pixels must do what the class
    # text says.
    scene = toy_scene(motion, seed=1, n=24)
    scene.update(distractors=[], blobs=[], texture=np.zeros((6, 6, 3)))
    scene["colors"] = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    if motion != 4:
        scene["states"][4] = 0.9  # bright all the time
    if motion != 3:
        scene["states"][3] = 0.5
    frames = render_quietly(scene, monkeypatch) / 255
    weight = frames.sum(-1)  # (n, row, column)

    def place(w):  # centre of mass on the circle, in periods: (n, 2), x and y
        wave = np.exp(2j * np.pi * (np.arange(64) + 0.5) / 64)
        angles = [np.angle((w.sum(axis) * wave).sum(-1)) for axis in (1, 2)]
        return np.stack(angles, -1) / (2 * np.pi)

    def course(values):  # steps on a circle of circumference 1
        return (np.diff(values) + 0.5) % 1 - 0.5

    if motion == 0:
        steps = course(place(weight)[:, 0])  # left to right
    elif motion == 1:
        steps = -course(place(weight)[:, 1])  # up: rows count downwards
    elif motion == 2:
        ends = np.stack([place(frames[..., 0]), place(frames[..., 1])])
        tip = course(ends.transpose(1, 2, 0))[..., 0]  # from tail to tip: x, y
        # with rows downwards, growing angles turn clockwise
        steps = course(np.arctan2(tip[:, 1], tip[:, 0]) / (2 * np.pi))
    elif motion == 3:
        steps = np.diff((weight > 0.1).sum((1, 2)) / 1000)  # larger, that is closer
    else:
        steps = np.diff(weight.sum((1, 2)) / 300)  # lighter
    if motion > 2:
        steps = steps[np.abs(steps) < 0.5]  # a sawtooth falls back once or twice
    assert (steps > -0.02).all() and steps.sum() > 0.5, steps


# ----- Mirrors --------------------------------------------------------------


def mirrored_scene(scene):
    """The same scene in a mirror: x counts from the other side, angles turn the other way."""
    states = scene["states"].copy()
    states[0], states[2] = 1 - states[0], 0.5 - states[2]
    blobs = [(np.array([cy, 1 - cx]), size, color) for (cy, cx), size, color in scene["blobs"]]
    return dict(
        scene,
        states=states,
        texture=scene["texture"][:, ::-1],
        fine_texture=scene["fine_texture"][:, ::-1],
        distractors=[dict(d, x=1 - d["x"]) for d in scene["distractors"]],
        blobs=blobs,
    )


@pytest.mark.parametrize("difficulty", (0.0, 1.0))
@pytest.mark.parametrize("motion", range(5))
def test_a_mirrored_toy_clip_is_one_of_the_mirrored_class(motion, difficulty, monkeypatch):
    scene = toy_scene(motion, difficulty=difficulty)
    mirror = mirrored_scene(scene)
    plain, mirrored = render_quietly(scene, monkeypatch), render_quietly(mirror, monkeypatch)
    # the edge of a blob may round to the other pixel
    assert (np.abs(mirrored - plain[:, :, ::-1]) > 2).mean() < 1e-3

    # ... and its states move as those of the class that mirror_labels gives (its scenes, or their
    # reversal)
    labels, _ = mirror_labels(ALL_CLASSES)
    for backward in (0, 1):
        partner = ALL_CLASSES[labels[ALL_CLASSES.index(TOY_CLASSES[motion][backward])]]
        motion2 = next(m for m, pair in enumerate(TOY_CLASSES) if partner in pair)
        backward2 = TOY_CLASSES[motion2].index(partner)
        seen = np.diff(mirror["states"]).sum(1) * (-1) ** backward
        expected = np.diff(toy_scene(motion2, seed=5)["states"]).sum(1) * (-1) ** backward2
        assert (np.sign(np.round(seen, 9)) == np.sign(np.round(expected, 9))).all()


# ----- The folder -----------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "new" / "toy"
    make_toy(root, seed=1, train=20, validation=10)
    return root


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_make_toy_is_in_v1s_layout_and_made_once(toy):
    ids, labels, classes = data.read_annotations("ssv1", toy, "train")
    assert classes == ALL_CLASSES and len(ids) == 20
    for split, clips in (("train", 20), ("validation", 10)):
        dataset = data.VideoDataset("toy", toy, split, num_frames=8, size=32)
        assert len(dataset) == clips
        assert np.bincount(dataset.labels).tolist() == [clips // 10] * 10
        frames, text = toy_clip(1, split, 3)
        assert dataset.classes[dataset.labels[3]] == text
        stored = data.read_clip(dataset.path(3), np.arange).permute(0, 2, 3, 1).numpy()
        assert stored.shape == frames.shape
        assert np.abs(stored.astype(int) - frames).mean() < 6  # JPEG
    before = times(toy)
    make_toy(toy, seed=1, train=20, validation=10)  # it exists: nothing happens
    make_toy(toy)
    assert times(toy) == before
    assert [p.name for p in toy.parent.iterdir()] == [toy.name]  # nothing left beside it
    for other in (dict(seed=2), dict(difficulty=0.5)):
        with pytest.raises(ValueError, match="delete the folder or give another"):
            make_toy(toy, **{**dict(seed=1, train=20, validation=10), **other})
    assert times(toy) == before


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(difficulty=1.5), "--difficulty 1.5: expected 0 to 1"),
        (dict(difficulty=float("nan")), "--difficulty nan: expected 0 to 1"),
        (dict(train=0), "--train 0"),
        (dict(validation=-1), "--validation -1"),
        (dict(seed=-1), "--seed -1"),
    ],
)
def test_make_toy_refuses_numbers_out_of_range(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        make_toy(tmp_path / "impossible", **flags)
    assert list(tmp_path.iterdir()) == []


def test_make_toy_respects_the_umask(toy):
    plain = toy.parent.parent / "plain"
    plain.mkdir()
    # others in the group can read it as they can any new folder
    assert toy.stat().st_mode == plain.stat().st_mode


def test_make_toy_refuses_a_foreign_folder(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="other files"):
        make_toy(tmp_path, train=2, validation=1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture
def threads_for_processes(monkeypatch):
    """Toy makers in threads: a pool of processes would cost seconds to start."""
    monkeypatch.setattr(toy_data, "start_processes", lambda: multiprocessing.pool.ThreadPool(2))


def test_make_toy_leaves_nothing_if_a_clip_cannot_be_written(
    tmp_path, monkeypatch, threads_for_processes
):
    def fail(job):
        raise OSError("disk full")

    monkeypatch.setattr(toy_data, "write_toy_clip", fail)
    with pytest.raises(OSError, match="disk full"):
        make_toy(tmp_path / "toy", train=2, validation=1)
    assert list(tmp_path.iterdir()) == []


def test_make_toy_leaves_nothing_if_it_is_interrupted(
    tmp_path, monkeypatch, threads_for_processes
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_toy(tmp_path / "toy", train=2, validation=1)
    assert list(tmp_path.iterdir()) == []


def test_make_toy_takes_an_empty_folder_and_a_faster_process_wins(
    tmp_path, monkeypatch, threads_for_processes
):
    (tmp_path / "toy").mkdir()
    make_toy(tmp_path / "toy", train=2, validation=1)
    assert (tmp_path / "toy" / "toy.json").is_file()

    rename = os.rename

    def slow(source, target):  # meanwhile another process has put the same data there
        shutil.copytree(tmp_path / "toy", target)
        rename(source, target)

    monkeypatch.setattr(toy_data.os, "rename", slow)
    make_toy(tmp_path / "second", train=2, validation=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["second", "toy"]
    assert len(data.VideoDataset("toy", tmp_path / "second", "train")) == 2


def test_the_processes_do_not_import_the_main_program(tmp_path):
    # The main program is train.py as a rule, and importing torch again takes seconds.
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "print('imported', flush=True)\n"
        "from scripts.toy_data import make_toy\n"
        "if __name__ == '__main__':\n"
        "    make_toy('toy', train=2, validation=1)\n"
        "    print('torch' in sys.modules)\n"
        "    print(sys.modules['__main__'].__file__ == __file__)\n"
    )
    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("imported") == 1 and lines[-2:] == ["False", "True"]


def test_the_command(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "toy_data.py"), "--data_root", "toy"]
    flags = ["--seed", "3", "--train", "2", "--validation", "1", "--difficulty", "0.25"]
    done = subprocess.run(command + flags, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stamp = json.loads((tmp_path / "toy" / "toy.json").read_text())
    version = toy_data.TOY_VERSION
    assert stamp == dict(seed=3, train=2, validation=1, difficulty=0.25, version=version)
    frames, _ = toy_clip(3, "validation", 0, 0.25)
    clip = tmp_path / "toy" / "20bn-something-something-v1" / "3"
    assert len(list(clip.iterdir())) == len(frames)
    with Image.open(clip / "00001.jpg") as image:
        assert np.abs(np.asarray(image).astype(int) - frames[0]).mean() < 6  # JPEG

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # nothing asked for: what is there will do
    done = subprocess.run(command + ["--seed", "4"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("toy_data.py: ") and "--data_root" in done.stderr
