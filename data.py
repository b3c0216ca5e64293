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
import contextlib
import functools
import json
import mmap
import multiprocessing
import os
import re
import shutil
import struct
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
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


def usable_cores():
    """The numbers of the CPU cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def cores_per_process():
    return max(1, len(usable_cores()) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))           # torchrun's number of processes here


def default_workers():
    """Data workers per process where none are asked for. A single core has none: it would only switch between the two."""
    return min(8, cores_per_process()) if len(usable_cores()) > 1 else 0


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


def read_text(path):
    """UTF-8, with or without Windows' byte order mark and line ends. Raises ValueError naming file and line."""
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: line {raw[:e.start].count(10) + 1} is not UTF-8 (byte {raw[e.start]:#04x}); save the file as UTF-8") from e
    if "\0" in text:
        raise ValueError(f"{path}: line {text[:text.index(chr(0))].count(chr(10)) + 1} holds a NUL byte, expected text; the file is damaged or not UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path):
    def each_key_once(pairs):                           # json keeps the last of two without a word
        if len(dict(pairs)) != len(pairs):
            raise ValueError(f"a key twice in {str(pairs)[:80]}")
        return dict(pairs)

    try:
        return json.loads(read_text(path), object_pairs_hook=each_key_once)
    except (ValueError, RecursionError) as e:
        raise e if str(e).startswith(str(path)) else ValueError(f"{path}: not a JSON file ({e})") from e


def read_csv(path, columns):
    """Lines of `id` or `id;class text` (no header; the text may hold commas; blanks around a line mean nothing): fields and line number."""
    rows = [(line.strip().split(";", columns - 1), number) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    for row, number in rows:
        if len(row) != columns or not row[0]:
            raise ValueError(f"{path}: line {number} is {';'.join(row)!r}, expected {'id;class text' if columns == 2 else 'id'}")
    return rows


def check_ids(path, ids, rows, row="line"):
    """Raises ValueError unless every id is there once and is a plain file name: no annotation can lead out of the data's folder.

    ids: of the file's `rows`, their line numbers (row="entry": their places in a JSON list). "#" starts a comment in skip lists.
    """
    for clip, number in zip(ids, rows):
        if clip in ("", ".", "..") or clip != clip.strip() or not clip.isprintable() or set(clip) & set("/\\;#") or os.path.splitdrive(clip)[0]:
            raise ValueError(f"{path}: {row} {number}: id {clip!r}, expected a plain name, without / \\ ; # or blanks around it")
        if len(clip.encode()) > 200:                    # no file can be called so; as an array, all ids would be as long
            raise ValueError(f"{path}: {row} {number}: an id of {len(clip)} characters, {clip[:40]!r} ..., expected 200 at most")
    if not ids:
        raise ValueError(f"{path}: expected one or more clips, found none")
    if len(set(ids)) != len(ids):
        first = {}
        clip, number = next((c, n) for c, n in zip(ids, rows) if first.setdefault(c, n) != n)
        raise ValueError(f"{path}: {row} {number}: clip {clip} again, first in {row} {first[clip]}; expected each once, "
                         f"found {len(ids)} lines with {len(set(ids))} different ids")


def read_classes(dataset, root, quiet=False):
    """Class texts, sorted: V2's official order, and the one order used here for every data set. dataset: "ssv1", "ssv2", "toy"."""
    if dataset == "ssv2":
        path = find_file(root, ("something-something-v2-labels.json", "labels.json"))
        labels = read_json(path)
        if not isinstance(labels, dict) or not all(str(v).isdecimal() and len(str(v)) < 10 for v in labels.values()):
            raise ValueError(f'{path}: expected {{"class text": "id", ...}} as in the official labels.json; found {str(labels)[:60]!r} ...')
        classes = sorted(labels)
        moved = sum(int(labels[c]) != i for i, c in enumerate(classes))
        if moved and not quiet:
            print(f"{path}: {moved} of {len(classes)} ids differ from the order of the sorted class texts; here the sorted order counts")
    else:
        path = find_file(root, ("something-something-v1-labels.csv",))
        classes = sorted(row[0] for row, _ in read_csv(path, 1))
    if len(set(classes)) != len(classes) or len(classes) < 2:
        twice = next((c for c, d in zip(classes, classes[1:]) if c == d), None)
        raise ValueError(f"{path}: expected two or more different class texts, found {len(set(classes))} different in {len(classes)} lines"
                         + (f"; {twice!r} is there twice" if twice else ""))
    return classes


def read_annotations(dataset, root, split):
    """One split: ids (numpy bytes), labels (int64; -1 where the split has none), class texts (sorted).

    dataset: "ssv1" (also the toy's layout) or "ssv2"; split: "train", "validation" or "test". Arrays, not a Python object
    per clip, so that the memory of forked workers stays shared. Raises FileNotFoundError, and ValueError with one line that
    names file, line or entry, what was found and what was expected.
    """
    classes = read_classes(dataset, root, quiet=True)
    number = {text: i for i, text in enumerate(classes)}
    texts, row = None, "line"
    if dataset == "ssv2":
        path, row = find_file(root, (f"something-something-v2-{split}.json", f"{split}.json")), "entry"
        entries = read_json(path)
        if not isinstance(entries, list):
            raise ValueError(f'{path}: expected a list of {{"id": "...", "template": "..."}} as released; found {str(entries)[:80]!r} ...')
        for k, e in enumerate(entries, 1):
            if not isinstance(e, dict) or not isinstance(e.get("id"), str):
                raise ValueError(f'{path}: entry {k} is {str(e)[:80]!r}, expected {{"id": "...", "template": "..."}} as released (ids are strings)')
        ids, rows = [e["id"] for e in entries], range(1, len(entries) + 1)
        if split != "test":
            texts = [re.sub(r"[\[\]]", "", e["template"]) if isinstance(e.get("template"), str) else None for e in entries]
    else:
        path = find_file(root, (f"something-something-v1-{split}.csv",))
        fields = read_csv(path, 1 if split == "test" else 2)
        ids, rows = [f[0] for f, _ in fields], [n for _, n in fields]
        if split != "test":
            texts = [f[1] for f, _ in fields]
    check_ids(path, ids, rows, row)
    answers = path.parent / "test-answers.csv"
    if dataset == "ssv2" and split == "test" and answers.is_file():
        fields = read_csv(answers, 2)
        check_ids(answers, [f[0] for f, _ in fields], [n for _, n in fields])
        found = {f[0]: (f[1], n) for f, n in fields}
        missing = [i for i in ids if i not in found]
        if missing:
            raise ValueError(f"{answers}: expected a line for every clip of {path.name}; none for {len(missing)} of them, as clip {missing[0]}")
        texts, rows, path, row = [found[i][0] for i in ids], [found[i][1] for i in ids], answers, "line"
    for clip, text, k in zip(ids, texts or (), rows):
        if text is None:
            raise ValueError(f"{path}: entry {k}: clip {clip} has no template (the class with [something] in it), expected as released")
        if text not in number:
            raise ValueError(f"{path}: {row} {k}: clip {clip} is of class {text!r}, which the label file does not have ({len(classes)} classes)")
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
    lines = (line.split("#")[0].strip() for line in read_text(path).split("\n"))
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


class ClipError(ValueError):
    """A clip that cannot be read, or that a data worker died on; the message has its path and the reason."""


def reason(error):
    """The message of an error; of one from a data worker, without the worker's traceback around it."""
    text = str(error).strip()
    return text.splitlines()[-1] if isinstance(error, ClipError) else text


def frame_names(path):
    """The frames of a folder in the order of the numbers in their names: frame2 before frame10."""
    names = [e.name for e in os.scandir(path) if e.name.lower().endswith((".jpg", ".jpeg", ".png"))]
    return sorted(names, key=lambda name: [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", name)])


def read_frame(path):
    """One picture, upright (its EXIF orientation is applied, as players do with rotated videos): uint8 RGB (h, w, 3)."""
    with Image.open(path, formats=("JPEG", "PNG")) as image:        # by content: no other decoder is let loose on a .jpg
        if image.mode[0] in "IF":                       # Pillow would cut 16-bit grey off at 255
            raise ClipError(f"{path}: a picture of more than 8 bits (Pillow's mode {image.mode}), expected 8 bits per channel")
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(image.convert("RGB"))


def read_frame_folder(path, choose):
    names = frame_names(path)
    if not names:
        raise ClipError(f"{path}: no .jpg or .png frames in the folder")
    unique, place = np.unique(choose(len(names)), return_inverse=True)
    frames = []
    for i in unique:
        try:
            frames.append(read_frame(os.path.join(path, names[i])))
        except UnidentifiedImageError as e:
            raise ClipError(f"{path}: {names[i]} is not a JPEG or PNG picture") from e
        except OSError as e:                            # Pillow's messages leave out which file it was
            raise ClipError(f"{path}: {names[i]} cannot be read ({(str(e).splitlines() or [''])[0][:200]})") from e
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
    """Every frame in turn from the first to the last, keeping the chosen ones: right without trusting time stamps, key frames or seeking.

    decord would give the frame before in place of one that does not decode; fault_tol forbids it (rounded down: not a single one).
    To the end, so that damage anywhere refuses the clip, whichever frames are drawn. At 240 pixels this costs about a fifth of reading.
    (decord's skip_frames would save that, and on some damaged files it gives other frames.)
    """
    if at := webm_damage(path):
        raise ClipError(f"{path}: damaged at byte {at}, where a part of the webm file does not fit into the others")
    if mp4_mirrored(path):
        raise ClipError(f"{path}: to be shown mirrored, or turned by other than 90, 180 or 270 degrees; convert it with ffmpeg, which applies that")
    reader = import_decord().VideoReader(str(path), num_threads=1, fault_tol=1e-9)         # one reader per call: decord's keep memory
    unique, place = np.unique(choose(len(reader)), return_inverse=True)         # len: frames found in the file, whatever its header says
    wanted, frames = set(unique.tolist()), []
    for i in range(len(reader)):
        frame = reader.next()
        if i in wanted:
            frames.append(frame.asnumpy())
    return torch.from_numpy(np.stack(frames)[place]).permute(0, 3, 1, 2)


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
        text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+: ", "", (str(e).splitlines() or [""])[0])        # without the time and decord's own source lines
        if "duplicate frames" in text:                  # decord's words for what fault_tol forbids
            text = "fewer frames decode than the file holds"
        raise ClipError(f"{path}: cannot be read ({type(e).__name__}: {text[:200]})") from e


def refuse_link_outside(path):
    """Raises ClipError for a clip that is a symbolic link to a place outside of its data root (the whole clip folder may be a link)."""
    if os.path.islink(path):                            # else it lies where it seems to: ids are plain names
        target, folder = os.path.realpath(path), os.path.dirname(path)
        if not any(target.startswith(os.path.realpath(d) + os.sep) for d in (folder, os.path.dirname(folder))):
            raise ClipError(f"{path}: is a link to {target}, outside of --data_root; link the whole folder {os.path.basename(folder)} instead, "
                            "or give the place where the clips are as --data_root")


@functools.cache
def reading_now():
    """What the data workers of this process are reading: shared memory with a line of text for each, chosen by process id. uint8 (1024, 512)"""
    return torch.zeros(1024, 512, dtype=torch.uint8).share_memory_()


@contextlib.contextmanager
def note_reading(notes, text):
    """Writes down what this process is about to read, and wipes it out afterwards, unless a decoder takes the process with it."""
    line = notes[os.getpid() % len(notes)]
    note = torch.tensor(list(text.encode()[-len(line):]), dtype=torch.uint8)
    line[:len(note)] = note
    try:
        yield
    finally:
        line.zero_()


def worker_error(error):
    """The ClipError for a DataLoader whose worker died or hangs: it names the clips that were being read. Other errors stay as they are.

    PyTorch only says that some worker is gone; a decoder that crashes or hangs inside its C code can say nothing itself.
    """
    if not isinstance(error, RuntimeError) or not re.search(r"DataLoader (worker|timed out)", str(error)):
        return error
    pids = re.search(r"pid(?:\(s\))? ([\d, ]+)", str(error))             # named where they died, not where they hang
    notes = reading_now()
    lines = notes[[int(pid) % len(notes) for pid in pids[1].split(",")]] if pids else notes[(notes > 0).any(1)]
    clips = [bytes(line.tolist()).rstrip(b"\0").decode(errors="replace") for line in lines if line.any()]
    return ClipError(f"{str(error).splitlines()[0].rstrip('. ')}, while reading {'; '.join(clips) if clips else 'no clip (out of memory?)'}. "
                     "`python data.py check` finds the clips that crash or hang a decoder and writes a --skip_list")


# ----------------------------------------------------------------------------------------------------
# From frames to the model's input: one spatial and colour transform for all frames of a clip
# ----------------------------------------------------------------------------------------------------


class TrainTransform:
    """Scale-jittered random resized crop, then RandAugment, on uint8 clips: (F, 3, h, w) -> (F, 3, S, S).

    Both draw once per call from torch's global random state, so all frames of a clip get the same transform.
    scale      range of the crop's share of the area (UniFormerV2: 0.08 to 1); aspect ratios 3/4 to 4/3
    magnitude  of RandAugment, on torchvision's scale of 31 bins (UniFormerV2's m 7 of 10: 21); 0: none. Of four
               operations each is applied with probability 0.5, as there. Its magnitude noise is left out, and the list
               of operations is torchvision's: Identity instead of Invert and SolarizeAdd, at least 4 bits in Posterize
    """

    def __init__(self, size, scale=(0.08, 1.0), magnitude=0):
        self.crop = v2.RandomResizedCrop(size, scale, antialias=True)
        one = v2.RandomApply([v2.RandAugment(1, magnitude, interpolation=InterpolationMode.BILINEAR)], p=0.5)
        self.augment = v2.Compose([one] * 4) if magnitude else None

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
        self.reading = reading_now()                    # travels with the data set to the workers

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
            with note_reading(self.reading, f"clip {self.ids[index].decode()} ({self.path(index)})"):
                refuse_link_outside(self.path(index))
                video = read_clip(self.path(index), choose)                     # (F, 3, h, w)
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


def toy_scene(rng, motion, n, difficulty=0.0):
    """Draw everything random about a clip, for motion 0 to 4 (rows of TOY_CLASSES) run forward.

    Every state variable is periodic with a uniform phase and all else is drawn in the same way for all classes, so a single
    frame tells nothing, and the unordered frames no more than the pair. Difficulty 0 to 1 puts the motion of n frames into a
    clip of up to 4 n (and shortens it, so that 16 sampled frames still tell its direction), fades the object, and adds texture
    and moving distractors. Returns a dict for toy_render; states are in periods.
    """
    length = round(n * (1 + 3 * difficulty))
    states = np.repeat(rng.random(5)[:, None], length, axis=1)      # x, y, angle, size, brightness: still, but for one
    sign = (1, -1, 1, 1, 1)[motion]                                 # image rows count downwards: up is -y
    motion_course = sign * toy_progress(rng, n, 1.0 / (1 + 1.5 * difficulty), 1.7 / (1 + 1.8 * difficulty))
    distractors = []
    for moving in (False, False, True, True) + (True,) * round(4 * difficulty):
        angle = rng.uniform(0, 2 * np.pi)
        course = toy_progress(rng, length, 0.3 * length / n, 1.0 * length / n) if moving else np.zeros(length)
        distractors.append(dict(x=rng.random() + np.cos(angle) * course, y=rng.random() + np.sin(angle) * course,
                                radius=rng.uniform(0.04, 0.08), color=rng.uniform(0, 1, 3), front=rng.random() < 0.3))
    blobs = [(rng.random(2), rng.uniform(0.1, 0.35, 2), rng.uniform(0.15, 0.6, 3)) for _ in range(5)]
    scene = dict(states=states, distractors=distractors, blobs=blobs, texture=rng.uniform(0.2, 0.55, (6, 6, 3)),
                 profile=np.append(np.sort(rng.uniform(0.35, 0.9, 3))[::-1], 0.1),      # half width of the object, from tail to tip
                 colors=np.stack([rng.uniform(0.6, 1, 3), rng.uniform(0, 0.5, 3)]), noise=int(rng.integers(2 ** 31)))
    before = rng.integers(0, length - n + 1)
    states[motion] += np.pad(motion_course, (before, length - n - before), mode="edge")
    return dict(scene, contrast=1 - 0.5 * difficulty, fine_texture=0.14 * difficulty * rng.uniform(-1, 1, (24, 24, 3)))


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

    def enlarge(texture):
        return np.asarray(Image.fromarray((texture * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255

    background = enlarge(scene["texture"])
    for (cy, cx), (h, w), color in scene["blobs"]:
        inside = (np.abs(away(row, cy)) < h / 2) & (np.abs(away(column, cx)) < w / 2)
        background[inside] = 0.5 * background[inside] + 0.5 * color
    if scene["fine_texture"].any():
        background += enlarge(0.5 + scene["fine_texture"]) - 0.5

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
        picture += scene["contrast"] * soft(np.maximum(np.abs(v) - width, np.abs(u) - 1) * radius) * (color - picture)
        paint_distractors(picture, t, front=True)
        picture += noise.normal(0, 0.02, picture.shape)
        frames.append((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    return np.stack(frames)


def toy_clip(seed, split, number, difficulty=0.0):
    """One clip and its label: frames uint8 (n, 64, 64, 3), 18 to 30 of them (difficulty 1: 72 to 120). Labels run through the classes in turn."""
    rng = np.random.default_rng([TOY_VERSION, seed, ("train", "validation").index(split), number])
    motion, backward = divmod(number % (2 * len(TOY_CLASSES)), 2)
    frames = toy_render(toy_scene(rng, motion, int(rng.integers(18, 31)), difficulty))
    return (frames[::-1] if backward else frames), TOY_CLASSES[motion][backward]


def write_toy_clip(job):
    folder, clip, *which = job
    frames, text = toy_clip(*which)
    os.mkdir(os.path.join(folder, str(clip)))
    for i, frame in enumerate(frames, 1):
        Image.fromarray(frame).save(os.path.join(folder, str(clip), f"{i:05d}.jpg"), quality=92)
    return clip, text


def make_toy(root, seed=None, train=None, validation=None, difficulty=None):
    """Make the toy data set in `root`, in SSV1's layout: 6000 training and 500 validation clips of seed 0 and difficulty 0, unless told otherwise.

    Where there is one already, it is kept, and must be of this version and have what was told. Deterministic by seed.
    Built in a folder beside it and renamed into place, so a killed or second process leaves nothing half made.
    Raises ValueError where `root` holds something else.
    """
    root = Path(root)
    if difficulty is not None and not 0 <= difficulty <= 1:
        raise ValueError(f"--difficulty {difficulty}: expected 0 to 1")
    asked = {k: v for k, v in dict(version=TOY_VERSION, seed=seed, train=train, validation=validation, difficulty=difficulty).items() if v is not None}
    if (root / "toy.json").is_file():
        found = {"difficulty": 0, **read_json(root / "toy.json")}
        if not asked.items() <= found.items():
            raise ValueError(f"{root}/toy.json: found {found}, expected {asked}; delete the folder or give another --data_root")
        return
    stamp = {"seed": 0, "train": 6000, "validation": 500, "difficulty": 0, **asked}
    seed, train, validation, difficulty = (stamp[k] for k in ("seed", "train", "validation", "difficulty"))
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"--data_root {root}: holds other files; the toy data needs a new or empty folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    start, scratch = time.time(), Path(tempfile.mkdtemp(prefix=root.name + ".", dir=root.parent))
    try:
        aside = scratch / root.name                     # mkdtemp's own folder is closed to others
        aside.mkdir()
        frames = aside / "20bn-something-something-v1"
        frames.mkdir()
        jobs = [(str(frames), i + 1, seed, "train", i, difficulty) for i in range(train)]
        jobs += [(str(frames), train + i + 1, seed, "validation", i, difficulty) for i in range(validation)]
        with multiprocessing.get_context("spawn").Pool(min(8, len(usable_cores()))) as pool:
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
        shutil.rmtree(scratch, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------
# Video files: damage that one decoder steps over and another does not
# ----------------------------------------------------------------------------------------------------


MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")

# What webm (Matroska, RFC 9559) nests: the elements to look into, and what those may hold that the frames lie in
WEBM_SEGMENT = {"114d9b74", "1549a966", "1654ae6b", "1f43b675", "1c53bb6b", "1254c367", "1043a770", "1941a469", "ec", "bf"}
WEBM_INSIDE = {"": {"1a45dfa3", "18538067", "ec"}, "18538067": WEBM_SEGMENT, "1f43b675": {"e7", "a7", "ab", "a3", "a0", "5854", "af", "ec", "bf"},
               **dict.fromkeys(("114d9b74", "4dbb", "1549a966", "1654ae6b", "ae", "e0"))}


def webm_damage(path):
    """Where a webm file's elements, each of which has its length before it, do not fit into each other: a byte, or None.

    Versions of ffmpeg go on after such damage in different ways. Only cut off, a file still fits (declared_bytes sees that).
    """
    with open(path, "rb") as f:
        raw = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)        # what lies between the lengths stays on the disk
    if raw[:4] != b"\x1a\x45\xdf\xa3":
        return None                                     # another container
    at, inside = 0, [("", float("inf"))]                # the elements that byte `at` is in, with their ends
    while at < len(raw):
        while at == inside[-1][1]:
            if inside.pop()[0] == "18538067":           # the end of the segment: what follows is no matter, unless it has frames
                behind = raw.find(bytes.fromhex("1f43b675"), at)
                return None if behind < 0 else behind
        id_width = 9 - raw[at].bit_length()             # leading zeros of its first byte tell the width of a number
        size_at = at + id_width
        size_width = 9 - raw[size_at].bit_length() if size_at < len(raw) else 1
        name, start = raw[at:size_at].hex(), size_at + size_width
        if id_width > 4 or size_width > 8:
            return at
        if start > len(raw):
            return None                                 # cut off
        size = int.from_bytes(raw[size_at:start], "big") - (1 << 7 * size_width)
        unknown = size == (1 << 7 * size_width) - 1     # all ones, as live streams have it: until the next of its kind
        if inside[-1][0] == "1f43b675" and name in WEBM_SEGMENT - {"ec", "bf"}:
            inside.pop()
        parent, end = inside[-1]
        stop = end if unknown else start + size
        if stop > end or WEBM_INSIDE[parent] and name not in WEBM_INSIDE[parent]:
            return at
        if name in WEBM_INSIDE:
            inside.append((name, stop))
        at = start if name in WEBM_INSIDE else stop
    return None


def mp4_boxes(f, at, end):
    """The boxes of an open mp4 or mov file between two places: (type, start and end of its content). The last may end behind the file."""
    while at + 8 <= end:
        f.seek(at)
        head = f.read(16)
        size, skip = int.from_bytes(head[:4], "big"), 8
        if size == 1:                                   # a long one
            size, skip = int.from_bytes(head[8:], "big"), 16
        size = size or end - at                         # 0: all the rest
        if size < skip:
            return
        yield head[4:8], at + skip, at + size
        at += size


def mp4_mirrored(path):
    """Whether an mp4 or mov file wants to be shown mirrored, or turned by other than 90, 180 or 270 degrees, which decord would not do."""
    with open(path, "rb") as f:
        def inside(kind, boxes):
            return [box for k, at, end in boxes if k == kind for box in mp4_boxes(f, at, end)]

        if f.read(8)[4:] not in MP4_STARTS:
            return False
        movie = inside(b"moov", mp4_boxes(f, 0, os.path.getsize(path)))
        for kind, at, _ in movie + inside(b"trak", movie):
            if kind in (b"mvhd", b"tkhd"):              # of the whole film, of one track: times and more, then the matrix a b u c d v x y w
                f.seek(at)
                box = f.read(80)
                place = (36 if kind == b"mvhd" else 40) + (12 if box[:1] == b"\1" else 0)          # version 1 has longer times
                a, b, _, c, d = struct.unpack(">5i", box[place:place + 20].ljust(20, b"\0"))
                if not ((min(a, d) > 0 or max(a, d) < 0) and b == c == 0 or a == d == 0 and b * c < 0 or a == b == c == d == 0):
                    return True
    return False


def declared_bytes(path):
    """The length that a webm or mp4 file declares for itself, or 0 where it does not say.

    webm: the size of its EBML segment, id 18 53 80 67. mp4: the end of its last box, each of which starts with size and type.
    """
    with open(path, "rb") as f:
        head = f.read(4096)
        if head[4:8] in MP4_STARTS:
            return max(end for _, _, end in mp4_boxes(f, 0, os.path.getsize(path)))
    at = head.find(b"\x18\x53\x80\x67") + 4
    if at < 4 or not head[at:at + 1] or not head[at]:
        return 0
    width = 9 - head[at].bit_length()                   # EBML: leading zeros of the first byte tell the size of the number
    size = int.from_bytes(head[at:at + width], "big") - (1 << 7 * width)
    return 0 if size == (1 << 7 * width) - 1 else at + width + size             # all ones: unknown, as in a live stream


# ----------------------------------------------------------------------------------------------------
# python data.py check: is every clip there and whole?
# ----------------------------------------------------------------------------------------------------


def missing_frames(path):
    """How many numbers a folder of numbered frames (00001.jpg, 00002.jpg, 00004.jpg ...) leaves out between its first and its last."""
    numbers = [re.findall(r"\d+", name) for name in frame_names(path)]
    numbers = {int(n[-1]) for n in numbers if n}
    return max(numbers) - min(numbers) + 1 - len(numbers) if numbers else 0


def probe(path):
    """Decode every frame of a clip. Returns what is odd about it, "" for nothing; raises ClipError as reading it in training does."""
    n = 0

    def every(found):
        nonlocal n
        n = found
        return np.arange(found)

    refuse_link_outside(path)
    read_clip(path, every)
    if os.path.isdir(path):
        return f"has {n} frames, and {missing_frames(path)} numbers between the first and the last are missing" if missing_frames(path) else ""
    if declared_bytes(path) > os.path.getsize(path):
        return f"declares {declared_bytes(path)} bytes and has {os.path.getsize(path)}, with {n} frames"
    return ""


def isolated_process(connection, function):
    connection.send("ready")                            # importing torch takes seconds that are not the clip's
    try:
        while True:
            path = connection.recv()
            try:
                connection.send((True, function(path)))
            except ClipError as e:
                connection.send((False, str(e)))
    except EOFError:                                    # nothing is left to do
        pass


def isolated(function, paths, jobs, timeout):
    """function(path) for every path, in processes that may crash and are killed when they hang.

    Yields (True, its value) or (False, the message of its ClipError, of a crash or of a hang), in order.
    """
    local, context = threading.local(), multiprocessing.get_context("spawn")

    def one(path):
        if not hasattr(local, "process"):
            local.connection, other = context.Pipe()
            local.process = context.Process(target=isolated_process, args=(other, function), daemon=True)
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
    paths, missing = {}, []
    for split in ("train", "validation", "test"):
        try:
            read_annotations(args.dataset, args.data_root, split)
        except FileNotFoundError as e:
            print(f"{split}: no annotation file, left out")
            missing.append(e)
            continue
        dataset = VideoDataset(args.dataset, args.data_root, split)
        print(f"{split}: {len(dataset)} clips, {len(dataset.classes)} classes")
        paths.update({dataset.ids[i].decode(): dataset.path(i) for i in range(len(dataset))})
    if len(missing) == 3:
        raise missing[0]
    extra = sorted({e.name for e in os.scandir(dataset.folder) if e.name[0] != "."} - {os.path.basename(path) for path in paths.values()})
    if extra:
        print(f"{dataset.folder}: {len(extra)} clips are in none of these splits and stay unused, as {', '.join(map(repr, extra[:3]))}")
    bad, short = {}, {}
    results = progress(isolated(probe, paths.values(), args.jobs, args.timeout), total=len(paths), unit=" clips")
    for clip, (readable, text) in zip(paths, results):
        if not readable:
            bad[clip] = text
        elif text:
            short[clip] = text
    for clip, text in bad.items():
        print(f"unreadable  {clip}: {text}")
    for clip, text in short.items():
        print(f"short       {clip}: {text}; it is used as it is")
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
    from model import config_from_flags
    train_args = get_args(["--dataset", args.dataset, "--data_root", args.data_root] + train_flags)
    check_args(train_args)
    if args.dataset == "toy":
        make_toy(args.data_root)
    dataset, _ = make_datasets(train_args, config_from_flags(train_args))
    order = np.random.default_rng(train_args.seed).permutation(len(dataset))[:args.samples]
    size, columns, text, gap = max(96, min(dataset.size, 120)), 8, 22, 3
    sheet = Image.new("RGB", (columns * (size + gap), len(order) * (size + text + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, index in enumerate(order):
        video, label, index = dataset[(0, int(index))]
        top = row * (size + text + gap)
        draw.text((3, top + text / 2 + 1), f"{dataset.ids[index].decode()}: {dataset.classes[label]}", "#222222", font, anchor="lm")
        for column, t in enumerate(np.linspace(0, dataset.num_frames - 1, columns).round().astype(int)):
            frame = Image.fromarray(video[:, t].permute(1, 2, 0).numpy())
            sheet.paste(frame.resize((size, size), Image.Resampling.NEAREST if dataset.size <= size else Image.Resampling.LANCZOS), (column * (size + gap), top + text))
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
    commands.choices["check"].add_argument("--jobs", type=int, default=len(usable_cores()), help="processes that decode side by side")
    commands.choices["check"].add_argument("--timeout", type=float, default=60, help="seconds after which a decoder counts as hanging; raise it for long clips on slow disks")
    commands.choices["show"].add_argument("--samples", type=int, default=12, help="rows of the picture")
    toy = commands.add_parser("toy", help="make the toy data")
    toy.add_argument("--data_root", help="new folder (default: datasets/toy)")
    toy.add_argument("--seed", type=int, help="another seed makes other clips of the same kind (default: 0)")
    toy.add_argument("--train", type=int, help="training clips (default: 6000)")
    toy.add_argument("--validation", type=int, help="validation clips (default: 500)")
    toy.add_argument("--difficulty", type=float, help="0 to 1: long clips with a short motion, low contrast, texture, more moving distractors (default: 0)")
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
        make_toy(args.data_root, args.seed, args.train, args.validation, args.difficulty)
    elif args.command == "check":
        sys.exit(1 if check(args) else 0)
    else:
        show(args, rest)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"data.py: {reason(e)}")
