"""Toy data in the layout of Something-Something V1. Only the order of frames tells the class.

    python scripts/toy_data.py                          # datasets/toy; train.py does so by itself
    python scripts/toy_data.py --task order --data_root datasets/order
    python scripts/toy_data.py --task cycle --data_root datasets/cycle

motion  Ten classes. An object moves, turns, grows or lights up over clutter, or does so in reverse.
        A few neighbouring frames tell them apart.
order   Six classes. Of three shapes, two light up, one after the other, and the class is which two
        and in which order. The second follows after a gap, so neighbouring frames do not reveal it.
cycle   Two classes. Three shapes light up in turn, and the class is their cyclic order.

In each task a clip played backwards belongs to another class, with the same frames. So a single
frame tells nothing of the direction, and all frames in random order tell no more.

    motion          toy_scene   -> toy_render   -> toy_clip   -> make_toy
    order, cycle    shape_scene -> shape_render -> shape_clip -> make_toy
                    all draws      frames          label         the folder

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
from itertools import permutations
from pathlib import Path

import numpy as np
from PIL import Image

TOY_VERSION = 1
TOY_SIZE = 64                                           # pixels, square
TOY_CLASSES = (                                         # each motion, and the same in reverse
    ("Moving something from left to right", "Moving something from right to left"),
    ("Moving something up", "Moving something down"),
    ("Turning something clockwise", "Turning something counterclockwise"),
    ("Moving something closer to the camera", "Moving something away from the camera"),
    ("Lighting something up", "Letting something grow dark"),
)
SHAPES = ("disc", "square", "cross")
ORDER_CLASSES = {pair: f"Lighting up a {pair[0]}, then a {pair[1]}"
                 for pair in permutations(SHAPES, 2)}
CYCLE_CLASSES = {("disc", "square", "cross"): "Lighting up disc, square and cross in turn",
                 ("disc", "cross", "square"): "Lighting up disc, cross and square in turn"}

# ----- Scenes of the motion task --------------------------------------------

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

def toy_scene(rng, motion, n):
    """Draw everything random about a clip. Motion 0 to 4 (a row of TOY_CLASSES) runs forward.

    The object has five states, one for each motion: x, y, angle, size and brightness, in periods.
    Each is periodic with a uniform phase, and all else is drawn alike for all classes. So a single
    frame tells nothing, and the frames without their order tell the motion, but not its
    direction. Returns a dict for toy_render.
    """
    states = np.repeat(rng.random(5)[:, None], n, axis=1)           # all but one stay as they are
    sign = (1, -1, 1, 1, 1)[motion]                     # image rows count downwards: up is -y
    motion_course = sign * toy_progress(rng, n, 1.0, 1.7)

    distractors = []
    for moving in (False, False, True, True):
        angle = rng.uniform(0, 2 * np.pi)
        course = toy_progress(rng, n, 0.3, 1.0) if moving else np.zeros(n)
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
    states[motion] += motion_course
    return dict(states=states, distractors=distractors, blobs=blobs, texture=texture,
                profile=profile, colors=colors, noise=noise)

# ----- Scenes of the tasks order and cycle ----------------------------------

# A shape lights up for two frames, so that sampling 16 frames of a clip cannot miss it.

def order_times(rng, frames, gap):
    """The frames at which two shapes light up: gap or gap + 1 apart, anywhere they fit.

    So a window of fewer than `gap` frames never shows both.
    """
    gap = gap + rng.integers(2)
    first = rng.integers(frames - 1 - gap)
    return [int(first), int(first + gap)]

def cycle_times(rng, frames):
    """The frames at which three shapes light up: a third of the clip apart, from anywhere."""
    times = rng.uniform(0, frames) + np.arange(3) * frames / 3
    return [int(time) % frames for time in times]

def shape_scene(rng, shapes, times, frames):
    """Draw everything random about a clip in which `shapes` light up at `times`.

    All three shapes are in every frame, each at a random position. Returns a dict for shape_render.
    """
    cells = rng.permutation(4)[:len(SHAPES)]            # quarters of the frame, so none overlap
    objects = []
    for shape, cell in zip(SHAPES, cells):
        light = np.zeros(frames)
        if shape in shapes:
            first = times[shapes.index(shape)]
            light[[first, (first + 1) % frames]] = 1
        objects.append(dict(shape=shape, light=light, radius=rng.uniform(0.13, 0.18),
                            x=(cell % 2) / 2 + rng.uniform(0.19, 0.31),
                            y=(cell // 2) / 2 + rng.uniform(0.19, 0.31),
                            color=rng.uniform(0.5, 1, 3)))
    return dict(objects=objects, texture=rng.uniform(0.05, 0.25, (6, 6, 3)), blobs=[],
                noise=int(rng.integers(2 ** 31)), frames=frames)

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
    """Paint the object whose motion is the class. Its ends differ in width and colour."""
    x, y, angle, scale, light = scene["states"][:, :, None, None]       # (n, 1, 1) each
    radius = np.float32(0.14 + 0.2 * (scale % 1))       # a sawtooth: grows, then starts small again
    light = 0.25 + 0.75 * (light % 1)
    cos, sin = np.float32(np.cos(2 * np.pi * angle)), np.float32(np.sin(2 * np.pi * angle))
    profile = scene["profile"]

    # u is the position along the object's axis, v across it. From here on we only need the pixels
    # in the rectangle around the object.
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
    return add_noise(frames, scene)

def shape_render(scene, size=TOY_SIZE):
    """Paint a scene of the tasks order and cycle: uint8 RGB (n, size, size, 3)."""
    frames = np.repeat(toy_background(scene, size)[None], scene["frames"], axis=0)
    centers = pixel_centers(size)
    for item in scene["objects"]:
        dx = np.abs(centers[None, :] - item["x"]) / item["radius"]
        dy = np.abs(centers[:, None] - item["y"]) / item["radius"]
        if item["shape"] == "disc":
            inside = np.hypot(dx, dy) < 1
        elif item["shape"] == "square":
            inside = np.maximum(dx, dy) < 0.85
        else:
            inside = (np.minimum(dx, dy) < 0.3) & (np.maximum(dx, dy) < 1)
        light = (0.4 + 0.6 * item["light"])[:, None, None]             # dark, but always there
        frames[:, inside] = (light * item["color"]).astype(np.float32)
    return add_noise(frames, scene)

def add_noise(frames, scene):
    frames += 0.02 * np.random.default_rng(scene["noise"]).standard_normal(frames.shape)
    return (np.clip(frames, 0, 1) * 255).round().astype(np.uint8)

# ----- Clips ----------------------------------------------------------------

def toy_clip(seed, split, number):
    """One clip of the motion task and its class: uint8 (n, 64, 64, 3), with n 18 to 30.

    The numbers 0, 1, 2 ... run through the classes in turn.
    """
    rng = np.random.default_rng([TOY_VERSION, seed, ("train", "validation").index(split), number])
    motion, backward = divmod(number % (2 * len(TOY_CLASSES)), 2)
    frames = toy_render(toy_scene(rng, motion, int(rng.integers(18, 31))))
    return (frames[::-1] if backward else frames), TOY_CLASSES[motion][backward]

def shape_clip(seed, split, number, task, frames=16, gap=4):
    """One clip of the task order or cycle: uint8 (frames, 64, 64, 3), class and {shape: time}."""
    rng = np.random.default_rng([TOY_VERSION, seed, ("train", "validation").index(split), number,
                                 ("order", "cycle").index(task)])
    classes = ORDER_CLASSES if task == "order" else CYCLE_CLASSES
    shapes = list(classes)[number % len(classes)]
    times = order_times(rng, frames, gap) if task == "order" else cycle_times(rng, frames)
    scene = shape_scene(rng, shapes, times, frames)
    return shape_render(scene), classes[shapes], dict(zip(shapes, times))

# ----- The folder -----------------------------------------------------------

def class_names(task):
    if task == "motion":
        return [name for pair in TOY_CLASSES for name in pair]
    return list((ORDER_CLASSES if task == "order" else CYCLE_CLASSES).values())

def write_toy_clip(job):
    """job: folder, id, and which clip it is. Returns its lines of the annotations."""
    folder, clip, seed, split, number, task, length, gap = job
    if task == "motion":
        frames, text = toy_clip(seed, split, number)
        events = {}
    else:
        frames, text, events = shape_clip(seed, split, number, task, length, gap)
    os.mkdir(f"{folder}/{clip}")
    for i, frame in enumerate(frames, 1):
        with open(f"{folder}/{clip}/{i:05d}.jpg", "wb") as file:
            Image.fromarray(frame).save(file, "JPEG", quality=92)
    return f"{clip};{text}\n", f"{clip};{json.dumps(events)}\n"

def write_toy(folder, made):
    """Write clips and annotations into an empty folder. Ids count from 1, first those to train."""
    from tqdm import tqdm                               # the processes do not need it
    clips = folder / "20bn-something-something-v1"
    clips.mkdir()
    jobs = []
    for split in ("train", "validation"):
        for i in range(made[split]):
            jobs.append((clips, 1 + len(jobs), made["seed"], split, i, made["task"],
                         made["frames"], made["gap"]))
    lines, events = [], []
    with multiprocessing.Pool(min(8, os.cpu_count())) as pool:
        written = pool.imap(write_toy_clip, jobs, chunksize=16)
        for line, event in tqdm(written, "making the toy data", len(jobs), unit=" clips",
                                disable=None):
            lines.append(line)
            events.append(event)
    train = made["train"]
    names = [name + "\n" for name in class_names(made["task"])]
    for name, rows in (("train", lines[:train]), ("validation", lines[train:]), ("labels", names)):
        (folder / f"something-something-v1-{name}.csv").write_text("".join(rows))
    if made["task"] != "motion":
        (folder / "events.csv").write_text("".join(events))

def make_toy(root, task="motion", frames=16, gap=4, seed=0, train=6000, validation=500):
    """Make toy data in `root`, a new or empty folder.

    They are written beside `root` and renamed at the end. So `root` is never half made, even if the
    process is killed. ValueError if `root` holds something, or if a number is out of range.
    """
    root = Path(root)
    if task == "order" and not 2 <= gap <= frames - 3:
        raise ValueError(f"--gap {gap} does not fit: expected 2 to {frames - 3} for --frames "
                         f"{frames}")
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"--data_root {root} is not empty: delete it, or give another folder")
    made = dict(version=TOY_VERSION, task=task, frames=frames, gap=gap, seed=seed, train=train,
                validation=validation)
    start = time.time()
    root.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=root.name + ".", dir=root.parent))
    try:
        folder = scratch / root.name                    # scratch itself is closed to other users
        folder.mkdir()
        write_toy(folder, made)
        (folder / "toy.json").write_text(json.dumps(made) + "\n")
        if root.exists():
            root.rmdir()
        os.rename(folder, root)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{root}: made {train} training and {validation} validation clips in "
          f"{time.time() - start:.0f} s")

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data_root", default="datasets/toy", help="new folder (default: datasets/toy)")
    add("--task", default="motion", choices=("motion", "order", "cycle"))
    add("--frames", type=int, default=16, help="frames of a clip, for order and cycle")
    add("--gap", type=int, default=4, help="frames from the first event of order to the second: "
        "this or one more")
    add("--seed", type=int, default=0, help="another seed makes other clips")
    add("--train", type=int, default=6000, help="training clips")
    add("--validation", type=int, default=500, help="validation clips")
    args = p.parse_args(argv)
    make_toy(args.data_root, args.task, args.frames, args.gap, args.seed, args.train,
             args.validation)

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"toy_data.py: {e}")
