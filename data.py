"""Video clips for STD-Former: Something-Something V1 and V2 as released, a toy set that is made here, and own data.

    python data.py check --dataset ssv2 --data_root DIR     probe every clip, write the skip list
    python data.py show  --dataset toy                      one picture of training samples, as the model sees them
    python data.py toy                                      make the toy data (train.py does so by itself)

A data set is a folder in one of two layouts, with its own label file (own data: the same, with other clips and classes):

    ssv1, toy   20bn-something-something-v1/<id>/00001.jpg ...     something-something-v1-{labels,train,validation,test}.csv
    ssv2        20bn-something-something-v2/<id>.webm              something-something-v2-{labels,train,validation,test}.json,
                                                                   or {labels,train,validation,test}.json and test-answers.csv

VideoDataset yields (video, label, index): video uint8 RGB (3, F, S, S); `normalize` makes it the model's input, on its device.
Every random choice for a sample follows from (seed, epoch, index) alone: the number of workers changes nothing.
"""
import argparse
import functools
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)     # RGB, of values in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DATASETS = ("ssv1", "ssv2", "toy")
LAYOUTS = next(part for part in __doc__.split("\n\n") if part.startswith("    ssv1, toy"))


def normalize(video, mean=CLIP_MEAN, std=CLIP_STD):
    """What CLIP expects: uint8 (..., 3, F, S, S) in 0 ... 255 -> float32, (v / 255 - mean) / std per RGB channel.

    Runs on the video's device, so that videos travel as bytes.
    """
    return (video - per_channel(tuple(mean), video.device)) / per_channel(tuple(std), video.device)


@functools.lru_cache                                    # a new tensor per step would make the GPU wait for the CPU
def per_channel(values, device):
    return torch.tensor(values, device=device).view(3, 1, 1, 1) * 255


def progress(items, **options):
    """A tqdm bar around items where a person watches, else the items themselves."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:                                 # it comes with open_clip; toy and benchmark do without
        return items
    return tqdm(items, dynamic_ncols=True, **options)


# ----------------------------------------------------------------------------------------------------
# Annotations, in the official formats
# ----------------------------------------------------------------------------------------------------


def find_file(root, names):
    """The first of `names` that exists in `root` or `root`/labels; else FileNotFoundError with the expected tree."""
    for folder in (Path(root), Path(root) / "labels"):
        for name in names:
            if (folder / name).is_file():
                return folder / name
    raise FileNotFoundError(f"--data_root {root}: {' or '.join(names)} not found there or in labels/. The expected layouts:\n\n{LAYOUTS}")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not a JSON file ({e})") from e


def read_csv(path, columns):
    """Lines of `id` or `id;class text` (no header; the text may hold commas)."""
    rows = [line.split(";", columns - 1) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != columns or not row[0]:
            raise ValueError(f"{path}: line {number} is {';'.join(row)!r}, expected {'id;class text' if columns == 2 else 'id'}")
    return rows


def read_classes(dataset, root, quiet=False):
    """Class texts, sorted: V2's official order, and the one order used here for every data set. dataset: "ssv1", "ssv2", "toy"."""
    if dataset == "ssv2":
        path = find_file(root, ("something-something-v2-labels.json", "labels.json"))
        labels = read_json(path)
        if not isinstance(labels, dict) or not all(str(v).isdecimal() for v in labels.values()):
            raise ValueError(f'{path}: expected {{"class text": "id", ...}} as in the official labels.json; found {str(labels)[:60]} ...')
        classes = sorted(labels)
        moved = sum(int(labels[c]) != i for i, c in enumerate(classes))
        if moved and not quiet:
            print(f"{path}: {moved} of {len(classes)} ids differ from the order of the sorted class texts; here the sorted order counts")
    else:
        path = find_file(root, ("something-something-v1-labels.csv",))
        classes = sorted(row[0] for row in read_csv(path, 1))
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise ValueError(f"{path}: expected two or more different class texts, found {len(set(classes))} different in {len(classes)} lines")
    return classes


def read_annotations(dataset, root, split):
    """One split: ids (numpy bytes), labels (int64; -1 where the split has none), class texts (sorted).

    dataset: "ssv1" (also the toy's layout) or "ssv2"; split: "train", "validation" or "test". Arrays, not a Python object
    per clip, so that the memory of forked workers stays shared. Raises FileNotFoundError, ValueError naming file and entry.
    """
    classes = read_classes(dataset, root, quiet=True)
    number = {text: i for i, text in enumerate(classes)}
    if dataset == "ssv2":
        path = find_file(root, (f"something-something-v2-{split}.json", f"{split}.json"))
        entries = read_json(path)
        if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in entries):
            raise ValueError(f'{path}: expected a list of {{"id": "...", "template": "..."}} as released (ids are strings); '
                             f"found {str(entries)[:80]} ...")
        ids = [e["id"] for e in entries]
        if split == "test":
            answers = path.parent / "test-answers.csv"
            texts = dict(read_csv(answers, 2)) if answers.is_file() else {}
            texts = [texts.get(i) for i in ids] if texts else None
        else:
            missing = [e["id"] for e in entries if not isinstance(e.get("template"), str)]
            if missing:
                raise ValueError(f"{path}: clip {missing[0]} has no template (the class with [something] in it), expected as released")
            texts = [re.sub(r"[\[\]]", "", e["template"]) for e in entries]
    else:
        path = find_file(root, (f"something-something-v1-{split}.csv",))
        rows = read_csv(path, 1 if split == "test" else 2)
        ids = [row[0] for row in rows]
        texts = [row[1] for row in rows] if split != "test" else None
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"{path}: expected one or more clips, each once; found {len(ids)} lines with {len(set(ids))} different ids")
    for clip, text in zip(ids, texts or ()):
        if text not in number:
            raise ValueError(f"{path}: clip {clip} is of class {text!r}, which the label file does not have ({len(classes)} classes)")
    labels = np.array([number[t] for t in texts] if texts else [-1] * len(ids), dtype=np.int64)
    return np.array([i.encode() for i in ids]), labels, classes


def mirror_labels(classes):
    """The label that a mirrored clip takes, one entry per class.

    "Random inversion" (section 4.2) turns left into right: where swapping left/right or clockwise/counterclockwise in a whole
    class text gives another class, the two are a pair. "upright" or "right out" have no such partner and stay.
    """
    swap = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise"}

    def plain(text):
        return re.sub(r"counter-clockwise|anticlockwise", "counterclockwise", text.lower())

    number = {plain(text): i for i, text in enumerate(classes)}
    mirrored = [re.sub(r"\b(left|right|clockwise|counterclockwise)\b", lambda m: swap[m[0]], plain(text)) for text in classes]
    return np.array([number.get(m, i) for i, m in enumerate(mirrored)], dtype=np.int64)


def read_skip_list(path):
    """Clip ids from a text file, one per line; # starts a comment."""
    lines = (line.split("#")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return {line for line in lines if line}


# ----------------------------------------------------------------------------------------------------
# From a clip on disk to frames
# ----------------------------------------------------------------------------------------------------


def sample_indices(n, F, rng=None, view=0, views=1):
    """Which F of a clip's n frames: one from each of F equal segments (TSN sampling, section 3.1 "sparse sampling").

    With s = (n-1)/F, segment i is [round(s i), round(s (i+1))], as in UniFormerV2. Training (an rng is given) draws
    uniformly in it, ends included; evaluation takes start + floor(s (view+1) / (views+1)), the centre for one view.
    Works for any n >= 1; short clips repeat frames. Returns int64 (F,), never decreasing, in 0 ... n-1.
    """
    s = (n - 1) / F
    edges = np.round(s * np.arange(F + 1)).astype(np.int64)
    if rng is not None:
        return rng.integers(edges[:-1], edges[1:], endpoint=True)
    return edges[:-1] + int(s / (views + 1) * (view + 1))


def eval_indices(n, F, clips=1):
    """The frames of all temporal views of a clip, view after view: int64 (clips * F,)."""
    return np.concatenate([sample_indices(n, F, view=v, views=clips) for v in range(clips)])


class ClipError(Exception):
    """A clip that cannot be read; the message has its path and the reason."""


def reason(error):
    """The message of an error; of one from a data worker, without the worker's traceback around it."""
    text = str(error).strip()
    return text.splitlines()[-1] if isinstance(error, ClipError) else text


def read_frame_folder(path, choose):
    names = [e.name for e in os.scandir(path) if e.name.lower().endswith((".jpg", ".jpeg", ".png"))]
    names.sort(key=lambda name: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", name)])     # frame2 before frame10
    if not names:
        raise ClipError(f"{path}: no .jpg or .png frames in the folder")
    unique, place = np.unique(choose(len(names)), return_inverse=True)
    frames = []
    for i in unique:
        with Image.open(os.path.join(path, names[i])) as image:
            frames.append(np.asarray(image.convert("RGB")))
    if len({f.shape for f in frames}) != 1:
        raise ClipError(f"{path}: frames of different sizes, {sorted({f.shape[:2] for f in frames})}")
    return torch.from_numpy(np.stack(frames)[place]).permute(0, 3, 1, 2)


def import_decord():
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")   # a damaged file fails in a moment, not after minutes
    try:
        import decord                                   # only here, after torch: frame folders never need it
    except ImportError as e:
        raise ImportError("video files are read with decord: pip install decord; where it has no wheel (ARM, macOS), "
                          "pip install decord2 or eva-decord (same import), or extract frames to folders") from e
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def read_video_file(path, choose):
    reader = import_decord().VideoReader(str(path), num_threads=1)              # one reader per call: decord's keep memory
    unique, place = np.unique(choose(len(reader)), return_inverse=True)         # len: frames found in the file, whatever its header says
    frames = reader.get_batch(unique).asnumpy()                                 # sorted and at once: decord seeks badly
    return torch.from_numpy(frames[place]).permute(0, 3, 1, 2)


def read_clip(path, choose):
    """Frames of a video file or of a folder of images: uint8 RGB (F, 3, height, width).

    choose(n) -> indices is called with the number of frames found, so a file that was cut off gives those that it still has.
    Raises ClipError with path and reason, also when a chosen frame does not decode; nothing ever takes its place.
    """
    try:
        if os.path.isdir(path):
            return read_frame_folder(path, choose)
        if not os.path.isfile(path):
            raise ClipError(f"{path}: no such file or folder")
        if os.path.getsize(path) == 0:
            raise ClipError(f"{path}: the file is empty")
        return read_video_file(path, choose)
    except (ClipError, ImportError):
        raise
    except Exception as e:                              # Pillow and decord raise many kinds; all mean: broken
        raise ClipError(f"{path}: cannot be read ({type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]})") from e


# ----------------------------------------------------------------------------------------------------
# From frames to the model's input: one spatial and colour transform for all frames of a clip
# ----------------------------------------------------------------------------------------------------


class TrainTransform:
    """Scale-jittered random resized crop, then RandAugment, on uint8 clips: (F, 3, h, w) -> (F, 3, S, S).

    Both draw once per call from torch's global random state, so all frames of a clip get the same transform.
    scale      range of the crop's share of the area (UniFormerV2: 0.08 to 1); aspect ratios 3/4 to 4/3
    magnitude  of RandAugment's 4 operations, on torchvision's scale of 31 bins (UniFormerV2's m 7 of 10: 21); 0: none
    """

    def __init__(self, size, scale=(0.08, 1.0), magnitude=0):
        self.crop = v2.RandomResizedCrop(size, scale, antialias=True)
        self.augment = v2.RandAugment(4, magnitude, interpolation=InterpolationMode.BILINEAR) if magnitude else None

    def __call__(self, video):
        video = self.crop(video)
        return self.augment(video.contiguous()) if self.augment else video      # contiguous: twice as fast as decord's layout


def eval_transform(video, size, crops=1):
    """Short side to S, then 1 (centre) or 3 crops along the long side. (F, 3, h, w) -> list of (F, 3, S, S)."""
    h, w = video.shape[-2:]
    short = min(h, w)
    video = TF.resize(video, [max(size, round(h * size / short)), max(size, round(w * size / short))], antialias=True)
    rest_h, rest_w = video.shape[-2] - size, video.shape[-1] - size
    places = (0.5,) if crops == 1 else (0.0, 0.5, 1.0)
    return [TF.crop(video, round(rest_h * p), round(rest_w * p), size, size) for p in places]


def eval_views(video, F, size, crops=1):
    """All views of a clip whose frames eval_indices chose: uint8 (clips * F, 3, h, w) -> (clips * crops, 3, F, S, S)."""
    return torch.stack([crop.transpose(0, 1) for clip in video.split(F) for crop in eval_transform(clip, size, crops)])


class VideoDataset(torch.utils.data.Dataset):
    """One split of a data set. Yields (video, label, index).

    video: uint8 (3, F, S, S); with several views (crops x clips, evaluation) (views, 3, F, S, S). label: int, -1 if unknown.
    train       random frames, crops, RandAugment and flips; else centre frames and `crops` crops of `clips` clips
    augment     RandAugment's magnitude of 31; 0 for none
    flip        mirror half of the training clips, with the mirrored class's label
    control     "none"; "shuffle" puts the frames in random order, "single" repeats one frame: what is then learned
                needs no order, or no motion. Also applied in evaluation
    skip        ids to leave out (evaluation counts them as wrong: `skipped`)
    Raises what read_annotations and read_clip raise.
    """

    def __init__(self, dataset, root, split, num_frames=16, size=224, train=False, scale=(0.08, 1.0), augment=0, flip=True,
                 crops=1, clips=1, control="none", seed=0, skip=()):
        layout = "ssv2" if dataset == "ssv2" else "ssv1"
        self.ids, self.labels, self.classes = read_annotations(layout, root, split)
        self.folder = Path(root) / f"20bn-something-something-v{layout[-1]}"
        self.suffix = ".webm" if layout == "ssv2" else ""
        if not self.folder.is_dir():
            raise FileNotFoundError(f"--data_root {root}: folder {self.folder.name} not found. The expected layouts:\n\n{LAYOUTS}")
        keep = ~np.isin(self.ids, np.array([i.encode() for i in skip])) if skip else np.ones(len(self.ids), bool)
        self.skipped = int((~keep).sum())
        self.ids, self.labels = self.ids[keep], self.labels[keep]
        self.mirrored = mirror_labels(self.classes)
        self.num_frames, self.size, self.crops, self.clips = num_frames, size, crops, clips
        self.train, self.flip, self.control, self.seed = train, flip, control, seed
        self.transform = TrainTransform(size, scale, augment)

    def __len__(self):
        return len(self.ids)

    def path(self, index):
        return str(self.folder / (self.ids[index].decode() + self.suffix))

    def __getitem__(self, item):
        """item: an index, or (epoch, index) as train.py's sampler gives it, so that persistent workers know the epoch."""
        epoch, index = item if isinstance(item, tuple) else (0, item)
        rng = np.random.default_rng([self.seed, epoch if self.train else 0, int(index)])
        F, label = self.num_frames, int(self.labels[index])

        def choose(n):
            if self.train:
                return sample_indices(n, F, rng)
            return eval_indices(n, F, self.clips)

        try:
            video = read_clip(self.path(index), choose)                         # (F, 3, h, w)
        except ClipError as e:
            raise ClipError(f"clip {self.ids[index].decode()}: {e}. `python data.py check` finds all such clips and writes a --skip_list") from None
        if self.control == "shuffle":
            video = torch.cat([clip[rng.permutation(F)] for clip in video.split(F)])
        elif self.control == "single":
            video = torch.cat([clip[[rng.integers(F)] * F] for clip in video.split(F)])

        if not self.train:
            views = eval_views(video, F, self.size, self.crops)
            return (views[0] if len(views) == 1 else views), label, index
        with torch.random.fork_rng(devices=[]):         # torchvision draws from torch's global state
            torch.default_generator.manual_seed(int(rng.integers(2 ** 63)))
            video = self.transform(video)
        if self.flip and rng.random() < 0.5:
            video, label = video.flip(-1), int(self.mirrored[label])
        return video.transpose(0, 1).contiguous(), label, index


# ----------------------------------------------------------------------------------------------------
# The toy data: small motions over clutter, in SSV1's layout
# ----------------------------------------------------------------------------------------------------

TOY_VERSION = 1
TOY_SIZE = 64                                           # pixels, square
TOY_CLASSES = (                                         # (the motion, the same reversed in time), one state variable each
    ("Moving something from left to right", "Moving something from right to left"),                 # x
    ("Moving something up", "Moving something down"),                                               # y
    ("Turning something clockwise", "Turning something counterclockwise"),                          # angle
    ("Moving something closer to the camera", "Moving something away from the camera"),             # size
    ("Lighting something up", "Letting something grow dark"),                                       # brightness
)


def toy_progress(rng, n, low, high):
    """How far a motion has come at each of n frames: low to high periods in all, uneven, with a pause. (n,)

    Steps are independent and the pause stands anywhere, so the reversed course is as likely as the course itself.
    """
    steps = rng.uniform(0.6, 1.4, n - 1)
    pause = rng.integers(0, n // 4 + 1)
    start = rng.integers(0, n - pause)
    steps[start:start + pause] = 0
    return np.concatenate([[0], np.cumsum(steps / steps.sum() * rng.uniform(low, high))])


def toy_scene(rng, motion, n):
    """Draw everything random about a clip, for motion 0 to 4 (rows of TOY_CLASSES) run forward.

    Every state variable is periodic with a uniform phase and all else is drawn in the same way for all classes, so a single
    frame tells nothing, and the unordered frames no more than the pair. Returns a dict for toy_render; states are in periods.
    """
    states = np.repeat(rng.random(5)[:, None], n, axis=1)           # x, y, angle, size, brightness: still ...
    sign = (1, -1, 1, 1, 1)[motion]                                 # image rows count downwards: up is -y
    states[motion] += sign * toy_progress(rng, n, 1.0, 1.7)         # ... but for one
    distractors = []
    for moving in (False, False, True, True):
        angle = rng.uniform(0, 2 * np.pi)
        course = toy_progress(rng, n, 0.3, 1.0) if moving else np.zeros(n)
        distractors.append(dict(x=rng.random() + np.cos(angle) * course, y=rng.random() + np.sin(angle) * course,
                                radius=rng.uniform(0.04, 0.08), color=rng.uniform(0, 1, 3), front=rng.random() < 0.3))
    blobs = [(rng.random(2), rng.uniform(0.1, 0.35, 2), rng.uniform(0.15, 0.6, 3)) for _ in range(5)]
    return dict(states=states, distractors=distractors, blobs=blobs, texture=rng.uniform(0.2, 0.55, (6, 6, 3)),
                profile=np.append(np.sort(rng.uniform(0.35, 0.9, 3))[::-1], 0.1),       # half width of the object, from tail to tip
                colors=np.stack([rng.uniform(0.6, 1, 3), rng.uniform(0, 0.5, 3)]), noise=int(rng.integers(2 ** 31)))


def toy_render(scene, size=TOY_SIZE):
    """Paint a scene: uint8 RGB (n, size, size, 3). What leaves on one side comes back on the other."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    row, column = grid[:, None], grid[None, :]

    def away(a, b):                                     # distance on a circle of circumference 1, in -0.5 ... 0.5
        return (a - np.float32(b) + 0.5) % 1 - 0.5

    def soft(distance):                                 # inside 1, outside 0, with an edge one pixel wide
        return np.clip(0.5 - distance * size, 0, 1)[..., None]

    def paint_distractors(picture, t, front):
        for d in scene["distractors"]:
            if d["front"] == front:
                mask = soft(np.hypot(away(column, d["x"][t]), away(row, d["y"][t])) - np.float32(d["radius"]))
                picture += mask * (d["color"] - picture)

    texture = Image.fromarray((scene["texture"] * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    background = np.asarray(texture, dtype=np.float32) / 255
    for (cy, cx), (h, w), color in scene["blobs"]:
        inside = (np.abs(away(row, cy)) < h / 2) & (np.abs(away(column, cx)) < w / 2)
        background[inside] = 0.5 * background[inside] + 0.5 * color

    frames, noise = [], np.random.default_rng(scene["noise"])
    for t, (x, y, angle, scale, light) in enumerate(scene["states"].T):
        picture = background.copy()
        paint_distractors(picture, t, front=False)
        dx, dy = away(column, x), away(row, y)
        cos, sin = np.float32(np.cos(2 * np.pi * angle)), np.float32(np.sin(2 * np.pi * angle))
        radius = np.float32(0.14 + 0.2 * (scale % 1))   # sawtooth: grows, then starts small again
        u, v = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius   # along and across the object's axis
        width = np.interp(u, np.linspace(-1, 1, len(scene["profile"])), scene["profile"]).astype(np.float32)
        tail = np.clip(0.5 - 4 * (u + 0.1), 0, 1)[..., None]                    # two colours: which end is which
        color = (scene["colors"][0] * tail + scene["colors"][1] * (1 - tail)) * (0.25 + 0.75 * (light % 1))
        picture += soft(np.maximum(np.abs(v) - width, np.abs(u) - 1) * radius) * (color - picture)
        paint_distractors(picture, t, front=True)
        picture += noise.normal(0, 0.02, picture.shape)
        frames.append((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    return np.stack(frames)


def toy_clip(seed, split, number):
    """One clip and its label: frames uint8 (n, 64, 64, 3), 18 to 30 of them. Labels run through the classes in turn."""
    rng = np.random.default_rng([TOY_VERSION, seed, ("train", "validation").index(split), number])
    motion, backward = divmod(number % (2 * len(TOY_CLASSES)), 2)
    frames = toy_render(toy_scene(rng, motion, int(rng.integers(18, 31))))
    return (frames[::-1] if backward else frames), TOY_CLASSES[motion][backward]


def write_toy_clip(job):
    folder, seed, split, number, clip = job
    frames, text = toy_clip(seed, split, number)
    os.mkdir(os.path.join(folder, str(clip)))
    for i, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(os.path.join(folder, str(clip), f"{i:05d}.jpg"), quality=92)
    return clip, text


def make_toy(root, seed=None, train=None, validation=None):
    """Make the toy data set in `root`, in SSV1's layout: 6000 training and 500 validation clips of seed 0, unless told otherwise.

    Where there is one already, it is kept, and must be of this version and have what was told. Deterministic by seed.
    Built in a folder beside it and renamed into place, so a killed or second process leaves nothing half made.
    Raises ValueError where `root` holds something else.
    """
    root = Path(root)
    asked = {k: v for k, v in dict(version=TOY_VERSION, seed=seed, train=train, validation=validation).items() if v is not None}
    if (root / "toy.json").is_file():
        found = read_json(root / "toy.json")
        if not asked.items() <= found.items():
            raise ValueError(f"{root}/toy.json: found {found}, expected {asked}; delete the folder or give another --data_root")
        return
    stamp = {"seed": 0, "train": 6000, "validation": 500, **asked}
    seed, train, validation = stamp["seed"], stamp["train"], stamp["validation"]
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"--data_root {root}: holds other files; the toy data needs a new or empty folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    start, aside = time.time(), Path(tempfile.mkdtemp(prefix=root.name + ".", dir=root.parent))
    try:
        aside.chmod(0o755)                              # mkdtemp's folders are closed to others
        frames = aside / "20bn-something-something-v1"
        frames.mkdir()
        jobs = [(str(frames), seed, "train", i, i + 1) for i in range(train)]
        jobs += [(str(frames), seed, "validation", i, train + i + 1) for i in range(validation)]
        with multiprocessing.get_context("spawn").Pool(min(8, os.cpu_count())) as pool:
            done = list(progress(pool.imap(write_toy_clip, jobs, chunksize=16), total=len(jobs), desc=f"making toy data in {root}", unit=" clips"))
        for split, lines in ("train", done[:train]), ("validation", done[train:]):
            (aside / f"something-something-v1-{split}.csv").write_text("".join(f"{clip};{text}\n" for clip, text in lines))
        (aside / "something-something-v1-labels.csv").write_text("".join(text + "\n" for pair in TOY_CLASSES for text in pair))
        (aside / "toy.json").write_text(json.dumps(stamp) + "\n")
        if root.exists():
            root.rmdir()                                # empty, as seen above
        os.rename(aside, root)
        print(f"{root}: {train} training and {validation} validation clips made in {time.time() - start:.0f} s")
    except OSError:
        if not (root / "toy.json").is_file():           # else another process was faster: its data are the same
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------
# python data.py check: is every clip there and whole?
# ----------------------------------------------------------------------------------------------------


def declared_bytes(path):
    """The length that a webm file declares for itself, or 0: it says so in the size of its EBML segment, id 18 53 80 67."""
    with open(path, "rb") as f:
        head = f.read(4096)
    at = head.find(b"\x18\x53\x80\x67") + 4
    if at < 4 or not head[at:at + 1] or not head[at]:
        return 0
    width = 9 - head[at].bit_length()                   # EBML: leading zeros of the first byte tell the size of the number
    size = int.from_bytes(head[at:at + width], "big") - (1 << 7 * width)
    return 0 if size == (1 << 7 * width) - 1 else at + width + size             # all ones: unknown, as in a live stream


def probe(path):
    """Decode every frame of a clip. Returns what is odd about it, "" for nothing; raises ClipError as read_clip does."""
    n = 0

    def every(found):
        nonlocal n
        n = found
        return np.arange(found)

    read_clip(path, every)
    if os.path.isfile(path) and declared_bytes(path) > os.path.getsize(path):
        return f"declares {declared_bytes(path)} bytes and has {os.path.getsize(path)}, with {n} frames"
    return ""


def probe_process(connection):
    connection.send("ready")                            # importing torch takes seconds that are not the clip's
    try:
        while True:
            path = connection.recv()
            try:
                connection.send((True, probe(path)))
            except ClipError as e:
                connection.send((False, str(e)))
    except EOFError:                                    # the check is over
        pass


def probe_all(paths, jobs, timeout):
    """probe() every path, in processes that may crash and are killed when they hang. Yields (readable, what is odd or wrong)."""
    local, context = threading.local(), multiprocessing.get_context("spawn")

    def one(path):
        if not hasattr(local, "process"):
            local.connection, other = context.Pipe()
            local.process = context.Process(target=probe_process, args=(other,), daemon=True)
            local.process.start()
            other.close()
            local.connection.recv()
        try:
            local.connection.send(path)
            if local.connection.poll(timeout):
                return local.connection.recv()
            problem = f"{path}: the decoder hangs (no answer in {timeout:.0f} s)"
        except (EOFError, OSError):
            problem = f"{path}: the decoder crashed on it"
        local.process.kill()
        del local.process
        return False, problem

    with ThreadPoolExecutor(jobs) as threads:
        yield from threads.map(one, paths)


def check(args):
    """Probe the clips of all splits, print what is wrong, write the skip list. Returns the number of unreadable clips."""
    read_classes(args.dataset, args.data_root)
    if args.dataset == "ssv2":
        import_decord()                                 # say at once that it is not installed
    paths = {}
    for split in ("train", "validation", "test"):
        try:
            read_annotations(args.dataset, args.data_root, split)
        except FileNotFoundError:
            print(f"{split}: no annotation file, left out")
            continue
        dataset = VideoDataset(args.dataset, args.data_root, split)
        print(f"{split}: {len(dataset)} clips, {len(dataset.classes)} classes")
        paths.update({dataset.ids[i].decode(): dataset.path(i) for i in range(len(dataset))})
    bad, short = {}, {}
    results = progress(probe_all(paths.values(), args.jobs, args.timeout), total=len(paths), unit=" clips")
    for clip, (readable, text) in zip(paths, results):
        if not readable:
            bad[clip] = text
        elif text:
            short[clip] = text
    for clip, text in bad.items():
        print(f"unreadable  {clip}: {text}")
    for clip, text in short.items():
        print(f"short       {clip}: {text}; it is used with those")
    with open(args.out, "w", encoding="utf-8") as f:
        f.write(f"# written by: data.py check --dataset {args.dataset}; clips of {args.data_root} that cannot be read\n")
        f.writelines(f"{clip}  # {text}\n" for clip, text in bad.items())
        f.writelines(f"# short, kept: {clip}  {text}\n" for clip, text in short.items())
    kind = "videos (.webm)" if args.dataset == "ssv2" else "frame folders"
    print(f"{len(paths)} {kind}: {len(paths) - len(bad)} readable, of them {len(short)} shorter than they declare; "
          f"{len(bad)} unreadable, listed in {args.out}" + (f" (train.py and evaluate.py: --skip_list {args.out})" if bad else ""))
    return len(bad)


# ----------------------------------------------------------------------------------------------------
# python data.py show: look at what the model sees
# ----------------------------------------------------------------------------------------------------


def show(args, train_flags):
    """Write a contact sheet of training samples, after augmentation: one row each, 8 of its frames, its label above."""
    from train import check_args, get_args, make_datasets       # the very data set that train.py would use with these flags
    from model import ModelConfig, MODELS, model_overrides
    train_args = get_args(["--dataset", args.dataset, "--data_root", args.data_root] + train_flags)
    check_args(train_args)
    if args.dataset == "toy":
        make_toy(args.data_root)
    dataset, _ = make_datasets(train_args, ModelConfig(**{**MODELS[train_args.model], **model_overrides(train_args)}))
    order = np.random.default_rng(train_args.seed).permutation(len(dataset))[:args.samples]
    size, columns, text = max(96, min(dataset.size, 160)), 8, 16
    sheet = Image.new("RGB", (columns * size, len(order) * (size + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, index in enumerate(order):
        video, label, index = dataset[(0, int(index))]
        top = row * (size + text)
        draw.text((4, top + 2), f"{dataset.ids[index].decode()}: {dataset.classes[label]}", fill="black")
        for column, t in enumerate(np.linspace(0, dataset.num_frames - 1, columns).round().astype(int)):
            frame = Image.fromarray(video[:, t].permute(1, 2, 0).numpy())
            sheet.paste(frame.resize((size, size), Image.Resampling.NEAREST), (column * size, top + text))
    sheet.save(args.out)
    print(f"{args.out}: {len(order)} training samples of {args.dataset}, frames of {dataset.size} x {dataset.size}")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    for name, text, out in (("check", "probe every clip, write the skip list", "skip_list.txt"),
                            ("show", "write a PNG of training samples; takes all flags of train.py too", "show.png")):
        c = commands.add_parser(name, help=text)
        c.add_argument("--dataset", default="toy", choices=DATASETS, help="which layout to expect")
        c.add_argument("--data_root", help="folder of the data set (default: datasets/DATASET)")
        c.add_argument("--out", default=out, help="file to write")
    commands.choices["check"].add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that decode side by side")
    commands.choices["check"].add_argument("--timeout", type=float, default=60, help="seconds after which a decoder counts as hanging; raise it for long clips on slow disks")
    commands.choices["show"].add_argument("--samples", type=int, default=12, help="rows of the picture")
    toy = commands.add_parser("toy", help="make the toy data")
    toy.add_argument("--data_root", help="new folder (default: datasets/toy)")
    toy.add_argument("--seed", type=int, help="another seed makes other clips of the same kind (default: 0)")
    toy.add_argument("--train", type=int, help="training clips (default: 6000)")
    toy.add_argument("--validation", type=int, help="validation clips (default: 500)")
    args, rest = p.parse_known_args(argv)
    if rest and args.command != "show":
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    for flag, least in dict(jobs=1, timeout=1, samples=1, seed=0, train=1, validation=1).items():
        if getattr(args, flag, None) is not None and not getattr(args, flag) >= least:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected {least} or more")
    if args.command != "toy" and (os.path.isdir(args.out) or not os.path.isdir(os.path.dirname(args.out) or ".")):
        raise ValueError(f"--out {args.out}: expected the name of a file in a folder that is there")    # hours of checking come before it
    args.data_root = args.data_root or f"datasets/{getattr(args, 'dataset', 'toy')}"
    if args.command == "toy":
        make_toy(args.data_root, args.seed, args.train, args.validation)
    elif args.command == "check":
        sys.exit(1 if check(args) else 0)
    else:
        show(args, rest)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ClipError) as e:
        sys.exit(f"data.py: {reason(e)}")
