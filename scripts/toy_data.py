"""The toy data: small motions over clutter, ten classes, in the layout of Something-Something V1.

    python scripts/toy_data.py                          # datasets/toy; train.py does so by itself
    python scripts/toy_data.py --data_root DIR --difficulty 0.5

Each clip shows a thing that moves, turns, grows or lights up, or does so in reverse. A single frame
tells nothing about the class, and neither do all frames in random order: only motion does.

    toy_scene -> toy_render -> toy_clip -> make_toy
    all draws    frames        label       the folder

Everything follows from the seed, the split and the number of a clip.
"""
import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from scripts.guards import run_program

TOY_VERSION = 1
TOY_SIZE = 64                                           # pixels, square
TOY_CLASSES = (                                         # each motion, and the same in reverse
    ("Moving something from left to right", "Moving something from right to left"),
    ("Moving something up", "Moving something down"),
    ("Turning something clockwise", "Turning something counterclockwise"),
    ("Moving something closer to the camera", "Moving something away from the camera"),
    ("Lighting something up", "Letting something grow dark"),
)

# ----- Scenes ---------------------------------------------------------------

def toy_progress(rng, n, low, high):
    """How far a motion has come at each of n frames: low to high periods in all. (n,)

    Its steps are uneven, with a pause. They are independent and the pause is anywhere, so the
    reversed course is as likely as the course itself.
    """
    steps = rng.uniform(0.6, 1.4, n - 1)
    pause = rng.integers(0, n // 4 + 1)
    start = rng.integers(0, n - pause)
    steps[start:start + pause] = 0
    return np.concatenate([[0], np.cumsum(steps / steps.sum() * rng.uniform(low, high))])


def toy_scene(rng, motion, n, difficulty=0.0):
    """Draw everything random about a clip. Motion 0 to 4 (a row of TOY_CLASSES) runs forward.

    The object has five states, one for each motion: x, y, angle, size and brightness, in periods.
    Each is periodic with a uniform phase, and all else is drawn alike for all classes. So a single
    frame tells nothing, and the frames without their order tell no more than the pair.

    A difficulty above 0, up to 1, puts the motion of n frames into a clip of up to 4 n. The motion
    is shorter then, so that 16 sampled frames still tell its direction. It also fades the object,
    and adds texture and moving distractors. Returns a dict for toy_render.
    """
    length = round(n * (1 + 3 * difficulty))
    states = np.repeat(rng.random(5)[:, None], length, axis=1)      # all but one stay as they are
    sign = (1, -1, 1, 1, 1)[motion]                     # image rows count downwards: up is -y
    low, high = 1.0 / (1 + 1.5 * difficulty), 1.7 / (1 + 1.8 * difficulty)
    motion_course = sign * toy_progress(rng, n, low, high)

    distractors = []
    for moving in (False, False, True, True) + (True,) * round(4 * difficulty):
        angle, course = rng.uniform(0, 2 * np.pi), np.zeros(length)
        if moving:
            course = toy_progress(rng, length, 0.3 * length / n, 1.0 * length / n)
        distractors.append(dict(x=rng.random() + np.cos(angle) * course,
                                y=rng.random() + np.sin(angle) * course,
                                radius=rng.uniform(0.04, 0.08), color=rng.uniform(0, 1, 3),
                                front=rng.random() < 0.3))

    blobs = []                                          # centre, height and width, colour
    for _ in range(5):
        blobs.append((rng.random(2), rng.uniform(0.1, 0.35, 2), rng.uniform(0.15, 0.6, 3)))
    texture = rng.uniform(0.2, 0.55, (6, 6, 3))
    # Half the object's width, from its tail to its tip, and the colours of these two ends.
    profile = np.append(np.sort(rng.uniform(0.35, 0.9, 3))[::-1], 0.1)
    colors = np.stack([rng.uniform(0.6, 1, 3), rng.uniform(0, 0.5, 3)])
    noise = int(rng.integers(2 ** 31))

    before = rng.integers(0, length - n + 1)
    states[motion] += np.pad(motion_course, (before, length - n - before), mode="edge")
    fine_texture = 0.14 * difficulty * rng.uniform(-1, 1, (24, 24, 3))
    return dict(states=states, distractors=distractors, blobs=blobs, texture=texture,
                profile=profile, colors=colors, noise=noise, contrast=1 - 0.5 * difficulty,
                fine_texture=fine_texture)


# ----- Painting -------------------------------------------------------------
# A thing is painted into all frames of a clip at once, and only into the pixels around it. Pixels
# are numbered through all frames, row by row: (frame * size + row) * size + column.

def away(a, b):
    """a - b on a circle of circumference 1, float32: -0.5 to 0.5."""
    return (a - np.float32(b) + 0.5) % 1 - 0.5


def pixel_centers(size):
    return (np.arange(size, dtype=np.float32) + 0.5) / size


def pixels_around(x, y, reach, size):
    """The k x k pixels around a point that moves, in each frame. x, y: (n, 1, 1)

    All pixels at most `reach` away are among them. Returns their distances from the point along x
    (n, 1, k) and along y (n, k, 1), and their numbers (n, k, k).
    """
    k = min(size, int(2 * reach * size) + 2)
    columns = (np.floor((x - reach) * size).astype(int) + np.arange(k)) % size
    rows = (np.floor((y - reach) * size).astype(int) + np.arange(k)[:, None]) % size
    frames = np.arange(len(x))[:, None, None]
    centers = pixel_centers(size)
    numbers = (frames * size + rows) * size + columns
    return away(centers[columns], x), away(centers[rows], y), numbers


def soft(distance, size):
    """1 inside (distance < 0), 0 outside, with an edge one pixel wide."""
    return np.clip(0.5 - distance * size, 0, 1)


def blend(channel, pixels, mask, color):
    """Mix a colour into some pixels of a channel, which is a flat view of all frames."""
    before = channel[pixels]
    channel[pixels] = before + mask * (color - before)


def toy_background(scene, size):
    """What stands still behind all the rest: float32 (size, size, 3)."""
    def enlarge(texture):
        image = Image.fromarray((texture * 255).astype(np.uint8))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(image, dtype=np.float32) / 255

    background, centers = enlarge(scene["texture"]), pixel_centers(size)
    for (cy, cx), (h, w), color in scene["blobs"]:
        rows, columns = np.abs(away(centers, cy)) < h / 2, np.abs(away(centers, cx)) < w / 2
        inside = rows[:, None] & columns
        background[inside] = 0.5 * background[inside] + 0.5 * color
    if scene["fine_texture"].any():
        background += enlarge(0.5 + scene["fine_texture"]) - 0.5
    return background


def paint_distractors(frames, scene, front, size):
    """Paint the discs in front of the object, or those behind it."""
    for disc in scene["distractors"]:
        if disc["front"] == front:
            x, y = disc["x"][:, None, None], disc["y"][:, None, None]
            dx, dy, pixels = pixels_around(x, y, disc["radius"] + 1 / size, size)
            mask = soft(np.hypot(dx, dy) - np.float32(disc["radius"]), size)
            inside = mask > 0
            pixels, mask = pixels[inside], mask[inside]
            for channel, color in zip(frames.reshape(-1, 3).T, disc["color"][:, None]):
                blend(channel, pixels, mask, color)


def paint_object(frames, scene, size):
    """Paint the thing whose motion is the class. Its ends differ in width and colour."""
    x, y, angle, scale, light = scene["states"][:, :, None, None]       # (n, 1, 1) each
    radius = np.float32(0.14 + 0.2 * (scale % 1))       # a sawtooth: grows, then starts small again
    light = 0.25 + 0.75 * (light % 1)
    cos, sin = np.float32(np.cos(2 * np.pi * angle)), np.float32(np.sin(2 * np.pi * angle))
    profile = scene["profile"]

    # u is the place along the object's axis, v across it. Only pixels in the rectangle around the
    # object go on from here.
    reach = radius.max() * np.hypot(1, profile.max()) + 1 / size
    dx, dy, pixels = pixels_around(x, y, reach, size)
    u, v = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius
    edge = 1 / size / radius
    inside = (np.abs(u) < 1 + edge) & (np.abs(v) < profile.max() + edge)
    u, v, pixels = u[inside], v[inside], pixels[inside]
    frame = pixels // size ** 2
    radius, light = radius.ravel()[frame], light.ravel()[frame]

    width = np.interp(u, np.linspace(-1, 1, len(profile)), profile).astype(np.float32)
    mask = soft(np.maximum(np.abs(v) - width, np.abs(u) - 1) * radius, size)
    mask = scene["contrast"] * mask
    tail = np.clip(0.5 - 4 * (u + 0.1), 0, 1)           # 1 at the tail, 0 at the tip
    tail_color, tip_color = scene["colors"][:, :, None]
    for i, channel in enumerate(frames.reshape(-1, 3).T):
        color = (tail_color[i] * tail + tip_color[i] * (1 - tail)) * light
        blend(channel, pixels, mask, color)


def toy_render(scene, size=TOY_SIZE):
    """Paint a scene: uint8 RGB (n, size, size, 3).

    What leaves on one side comes back on the other.
    """
    frames = np.repeat(toy_background(scene, size)[None], scene["states"].shape[1], axis=0)
    paint_distractors(frames, scene, False, size)
    paint_object(frames, scene, size)
    paint_distractors(frames, scene, True, size)
    frames += 0.02 * np.random.default_rng(scene["noise"]).standard_normal(frames.shape)
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)


def toy_clip(seed, split, number, difficulty=0.0):
    """One clip and its class: uint8 (n, 64, 64, 3), with n 18 to 30, or 72 to 120 at difficulty 1.

    The numbers 0, 1, 2 ... run through the classes in turn.
    """
    rng = np.random.default_rng([TOY_VERSION, seed, ("train", "validation").index(split), number])
    motion, backward = divmod(number % (2 * len(TOY_CLASSES)), 2)
    frames = toy_render(toy_scene(rng, motion, int(rng.integers(18, 31)), difficulty))
    return (frames[::-1] if backward else frames), TOY_CLASSES[motion][backward]


# ----- The folder -----------------------------------------------------------

def write_toy_clip(job):
    """job: the folder of all clips, the clip's id, and toy_clip's arguments. Returns id, class."""
    folder, clip, *which = job
    frames, text = toy_clip(*which)
    os.mkdir(f"{folder}/{clip}")
    for i, frame in enumerate(frames, 1):
        with open(f"{folder}/{clip}/{i:05d}.jpg", "wb") as file:
            Image.fromarray(frame).save(file, "JPEG", quality=92)
    return clip, text


def start_processes():
    """A pool with a process for each core, 8 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Each new process imports the file of the main program. If that is train.py, it imports torch,
    # which takes seconds. So let this file stand in for the main program meanwhile.
    main_program = sys.modules["__main__"]
    sys.modules["__main__"] = sys.modules[__name__]
    try:
        return multiprocessing.get_context("spawn").Pool(min(8, cores))
    finally:
        sys.modules["__main__"] = main_program


def write_toy(folder, seed, train, validation, difficulty):
    """Write clips and annotations into an empty folder. Ids count from 1, first those to train."""
    from tqdm import tqdm                               # the processes do not need it
    clips = folder / "20bn-something-something-v1"
    clips.mkdir()
    jobs = [(clips, 1 + i, seed, "train", i, difficulty) for i in range(train)]
    jobs += [(clips, 1 + train + i, seed, "validation", i, difficulty) for i in range(validation)]
    lines = []
    with start_processes() as pool:
        written = pool.imap(write_toy_clip, jobs, chunksize=16)
        for clip, text in tqdm(written, "making the toy data", len(jobs), unit=" clips",
                               disable=None):
            lines.append(f"{clip};{text}\n")
    names = [text + "\n" for pair in TOY_CLASSES for text in pair]
    for name, rows in (("train", lines[:train]), ("validation", lines[train:]), ("labels", names)):
        (folder / f"something-something-v1-{name}.csv").write_text("".join(rows))


def make_toy(root, seed=None, train=None, validation=None, difficulty=None):
    """Make the toy data in `root`: by default 6000 training and 500 validation clips of seed 0.

    If `root` holds toy data already, they stay, and must have what is asked for. New data are
    written to a folder beside `root` that is renamed at the end, so `root` is never half made, not
    even if the process is killed or another makes the same. Raises ValueError if the toy data in
    `root` are others, if it holds something else, or if a number is out of range.
    """
    root = Path(root)
    flags = dict(seed=seed, train=train, validation=validation, difficulty=difficulty)
    flags = {name: value for name, value in flags.items() if value is not None}
    for name, least in (("seed", 0), ("train", 1), ("validation", 1)):
        if flags.get(name, least) < least:
            raise ValueError(f"--{name} {flags[name]}: expected {least} or more")
    if not 0 <= flags.get("difficulty", 0) <= 1:
        raise ValueError(f"--difficulty {difficulty}: expected 0 to 1")

    asked = {"version": TOY_VERSION, **flags}
    if (root / "toy.json").is_file():
        found = json.loads((root / "toy.json").read_text())
        if not asked.items() <= found.items():
            raise ValueError(f"{root}/toy.json: found {found}, expected {asked}; "
                             "delete the folder or give another --data_root")
        return
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"--data_root {root}: holds other files; "
                         "the toy data needs a new or empty folder")

    made = {"seed": 0, "train": 6000, "validation": 500, "difficulty": 0, **asked}
    start = time.time()
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=root.name + ".", dir=root.parent))
    try:
        folder = scratch / root.name                    # scratch itself is closed to other users
        folder.mkdir()
        write_toy(folder, made["seed"], made["train"], made["validation"], made["difficulty"])
        (folder / "toy.json").write_text(json.dumps(made) + "\n")
        if root.exists():
            root.rmdir()                                # it is empty
        os.rename(folder, root)
        print(f"{root}: made {made['train']} training and {made['validation']} validation clips "
              f"in {time.time() - start:.0f} s")
    except OSError:
        if not (root / "toy.json").is_file():           # else another process was faster
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data_root", default="datasets/toy", help="new folder (default: datasets/toy)")
    p.add_argument("--seed", type=int, help="another seed makes other clips (default: 0)")
    p.add_argument("--train", type=int, help="training clips (default: 6000)")
    p.add_argument("--validation", type=int, help="validation clips (default: 500)")
    p.add_argument("--difficulty", type=float, help="0 to 1: longer clips with a shorter motion, "
                   "low contrast, texture, more moving distractors (default: 0)")
    args = p.parse_args(argv)
    make_toy(args.data_root, args.seed, args.train, args.validation, args.difficulty)


if __name__ == "__main__":
    run_program(main)
