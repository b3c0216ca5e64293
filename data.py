"""Video clips for STD-Former: Something-Something V1 and V2 as released, and your own videos.

    ssv1    20bn-something-something-v1/<id>/00001.jpg ... (Jester has the same layout)
            something-something-v1-{labels,train,validation,test}.csv
    ssv2    20bn-something-something-v2/<id>.webm
            something-something-v2-{labels,train,validation,test}.json
    folder  {train,validation}/<class>/<clip>.mp4, or a folder of frames for each clip;
            or {train,validation}.csv with lines "path label", and classes.txt to name numbers
    toy     made by scripts/toy_data.py, in the layout of ssv1

One clip, from disk to the model:

    read_annotations -> sample_indices -> read_clip -> TrainTransform, eval_views -> normalize
    id, label           16 frame numbers  uint8 frames 224 x 224 crops               float32

Every random choice about a sample follows from (seed, epoch, index), so the number of data workers
changes nothing.
"""
import functools
import glob
import json
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)         # RGB, for values in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGES = (".jpg", ".jpeg", ".png")
VIDEOS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp")

# ----- Annotations ----------------------------------------------------------

def find_file(root, *patterns):
    """The first file that matches one of these patterns, in `root` or in `root`/labels."""
    for pattern in patterns:
        for path in [*sorted(Path(root).glob(pattern)), *Path(root, "labels").glob(pattern)]:
            return path
    raise FileNotFoundError(f"{root} holds no {' or '.join(patterns)}; give its place with "
                            "--data_root (layouts: see the top of data.py)")


def read_lines(path):
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()     # without a BOM
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text, save it as such: {e}") from e
    return [line.strip() for line in lines if line.strip()]


def clean(name):
    """A class name without V2's [brackets] and without double blanks."""
    return " ".join(re.sub(r"[\[\]]", "", name).split())


def read_ssv1(root, split):
    path = find_file(root, f"*-v1-{split}.csv")
    rows = [line.split(";", 1) for line in read_lines(path)]
    return path, rows, read_lines(find_file(root, "*-v1-labels.csv"))


def read_ssv2(root, split):
    path = find_file(root, f"something-something-v2-{split}.json", f"{split}.json")
    labels = find_file(root, "something-something-v2-labels.json", "labels.json")
    clips = json.loads(path.read_text(encoding="utf-8-sig"))
    rows = [[clip[key] for key in ("id", "template") if key in clip] for clip in clips]
    answers = path.with_name("test-answers.csv")
    if split == "test" and answers.is_file():
        answer = dict(line.split(";", 1) for line in read_lines(answers))
        rows = [[clip["id"], answer[clip["id"]]] for clip in clips]
    return path, rows, json.loads(labels.read_text(encoding="utf-8-sig"))


def read_folder(root, split):
    """Class folders, or a list. The classes are those of the training split."""
    path, rows = read_folder_split(root, split)
    _, train_rows = read_folder_split(root, "train")
    return path, rows, [row[1] for row in train_rows]


def read_folder_split(root, split):
    names = ("validation", "val") if split == "validation" else (split,)
    for folder in [Path(root, name) for name in names if Path(root, name).is_dir()]:
        rows = []                                       # the first folder is the class
        for here, folders, files in os.walk(folder, followlinks=True):
            folders[:] = [name for name in folders if name[0] != "."]
            kept = [name for name in files if name[0] != "."]
            clips = [Path(here, name) for name in kept if name.lower().endswith(VIDEOS)]
            if not clips and any(name.lower().endswith(IMAGES) for name in kept):
                clips = [Path(here)]                    # a folder of frames
            for clip in clips:
                label = clip.relative_to(folder).parts[:-1][:1]
                if not label and split != "test":
                    raise ValueError(f"{clip} has no class, expected {folder}/CLASS/{clip.name}")
                rows.append((clip.relative_to(root).as_posix(), *label))
        return folder, sorted(rows)

    path = find_file(root, *(name + end for name in names for end in ("/", ".csv", ".txt")))
    rows, class_names = [], Path(root, "classes.txt")
    for line in read_lines(path):
        separator = next((s for s in "\t;," if s in line), None)        # None: blanks
        rows.append([field.strip() for field in line.split(separator)])
        if len(rows[-1]) != 2 and split != "test":
            raise ValueError(f"{path} has the line {line!r}, expected a path and a label, "
                             "with a tab between them if they hold blanks or commas")
    if class_names.is_file():                           # lines "number name", or names from 0 on
        lines = [line.split(maxsplit=1) for line in read_lines(class_names)]
        if not all(len(line) == 2 and line[0].isdecimal() for line in lines):
            lines = [(str(i), " ".join(line)) for i, line in enumerate(lines)]
        named = dict(lines)
        for _, *labels in rows:
            if labels and labels[0].isdecimal() and labels[0] not in named:
                raise ValueError(f"{class_names} has no name for the label {labels[0]} of {path}")
        rows = [(clip, *(named.get(label, label) for label in labels)) for clip, *labels in rows]
    return path, rows


LAYOUTS = {                                             # reader, folder of the clips, their suffix
    "ssv1": (read_ssv1, "20bn-*-v1", ""),
    "ssv2": (read_ssv2, "20bn-*-v2", ".webm"),
    "folder": (read_folder, "", ""),
    "toy": (read_ssv1, "20bn-*-v1", ""),
}


def read_annotations(dataset, root, split, clip_root=None):
    """One split ("train", "validation" or "test"): clip ids, labels, and the names of all classes.

    Classes are numbered in the order of their sorted names, which is V2's official order. Numbers
    in a list are names, too. A label is -1 if a test split has none. Raises FileNotFoundError, or
    ValueError naming file and clip.
    """
    read, clip_folder, _ = LAYOUTS[dataset]
    path, rows, classes = read(root, split)
    classes = sorted({clean(name) for name in classes})
    number = {name: i for i, name in enumerate(classes)}
    if not clip_folder:                                 # ids are paths, and may be absolute
        root = Path(clip_root or root).absolute()
        rows = [(os.path.relpath(Path(root, clip), root), *name) for clip, *name in rows]
    listed, labels = Counter(row[0] for row in rows), []
    for clip, *name in rows:
        label = number.get(clean(name[0])) if name else -1
        outside = ".." in Path(clip).parts or (clip_folder and re.search(r"[/\\]", clip))
        if label is None or (label < 0 and split != "test"):
            problem = f"its class is {name}, expected one of {len(classes)}, such as {classes[:2]}"
        elif listed[clip] > 1:
            problem = f"it is listed {listed[clip]} times, expected once"
        elif outside:
            problem = "it lies outside of the data's folder: give its folder with --clip_root"
        else:
            labels.append(label)
            continue
        raise ValueError(f"{path}: clip {clip}: {problem}")
    return np.array([row[0] for row in rows]), np.array(labels, dtype=np.int64), classes


# ----- The labels of mirrored clips -----------------------------------------

SIDES = {                                               # ways to write a side, and one word for it
    r"\bl ?(2|to|t)? ?r\b": "left right", r"\br ?(2|to|t)? ?l\b": "right left",
    r"\bl(f?t)?(?=( \d+|hs?)?\b)": "left ", r"\br(g?h?t)?(?=( \d+|hs?)?\b)": "right ",
    r"\b(anti|counter) ?clockwise|\b[ac]cw\b": "counterclockwise", r"\bcw\b": "clockwise",
}
SWAP = dict(left="right", right="left", counterclockwise="clockwise", clockwise="counterclockwise")


def mirror_labels(classes):
    """The label of each class after a horizontal flip, our reading of 4.2's "random inversion".

    Two classes are a pair if swapping left and right, or clockwise and counterclockwise, turns the
    name of one into the name of the other. "swipe_left", "SwipeLeft", "swipe-L" and "swipeleft"
    all name a side, but not "sign L" among the signs of an alphabet. Returns an integer for each
    class, and the names that have a side but no partner.
    """
    between = (r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|"         # camel case
               r"(?<=[a-zA-Z])(?=\d)|(?<=\d)(?=[a-zA-Z])|[\W_]+")
    names = [re.sub(between, " ", name).lower() for name in classes]
    shapes = [re.sub(r"\b[a-z]\b", "?", name) for name in names]           # "sign ?"
    words = []
    for name, shape in zip(names, shapes):
        alike = [other for other, its_shape in zip(names, shapes) if its_shape == shape]
        letters = {*re.findall(r"\b[a-z]\b", " ".join(alike))}
        if len(alike) <= 2 or letters <= {*"lrudfbcm"}:         # left, up, ...: no alphabet
            for pattern, side in SIDES.items():
                name = re.sub(pattern, side, name)
        words.append(name.replace(" ", ""))
    place = {word: i for i, word in enumerate(words) if words.count(word) == 1}
    swapped = [re.sub("|".join(SWAP), lambda match: SWAP[match[0]], word) for word in words]
    mirrored = np.array([place.get(word, i) for i, word in enumerate(swapped)])
    # not upright, bright, copyright
    has_side = [re.search("left|(?<!up)(?<!b)(?<!copy)right|clockwise", name) for name in words]
    alone = [c for i, c in enumerate(classes) if has_side[i] and mirrored[i] == i]
    return mirrored, alone


# ----- From a clip on disk to frames ----------------------------------------

def sample_indices(n, F, rng=None, view=0, views=1):
    """Choose F of the n frames of a clip, one from each of F equal segments (section 3.1).

    With s = (n-1)/F, segment i runs from round(s i) to round(s (i+1)), as in UniFormerV2. Training
    (with an rng) draws in it. Evaluation takes its start plus floor(s (view+1) / (views+1)), which
    is its middle if there is one view and the clip is long. Short clips repeat frames.
    """
    s = (n - 1) / F
    edges = np.round(s * np.arange(F + 1)).astype(np.int64)
    if rng is not None:
        return rng.integers(edges[:-1], edges[1:], endpoint=True)
    return edges[:-1] + int(s / (views + 1) * (view + 1))


def eval_indices(n, F, clips=1):
    """The frames of all temporal views of a clip, one view after the other: (clips * F,)"""
    return np.concatenate([sample_indices(n, F, view=v, views=clips) for v in range(clips)])


def find_clip(folder, name):
    """The absolute path of a clip, whichever Unicode normalisation its name has on disk."""
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        if os.path.exists(os.path.join(folder, form)):
            return Path(folder, form).absolute()
    path = Path(folder, name).absolute()
    near = [*path.parent.glob(f"{glob.escape(path.stem)}.*"),
            *path.parent.glob(f"*/{glob.escape(path.name)}")]
    found = f", but {near[0]} does: rename or move it, or use --dataset folder" if near else ""
    raise FileNotFoundError(f"{path} does not exist{found}")


def frame_names(folder):
    """The frames of a folder, in the order of the clip. Hidden files are none."""
    names = [name for name in os.listdir(folder)
             if name.lower().endswith(IMAGES) and name[0] != "."]
    return sorted(names, key=lambda name: (len(name), name))            # frame2 before frame10


def read_frame_folder(folder, choose):
    names = frame_names(folder)
    series = sorted({re.sub(r"\d+(?=\D*$)", "#", name.lower()) for name in names})
    if len(series) != 1:                                # flow_x_#.jpg beside img_#.jpg, say
        raise ValueError(f"it holds {' and '.join(series) or 'no frames'}, expected one series")
    frames = []
    for i in choose(len(names)):
        with Image.open(Path(folder, names[i]), formats=("JPEG", "PNG")) as image:
            if image.mode.startswith(("I", "F")):       # Pillow would cut these off at 255
                raise ValueError(f"{names[i]} has more than 8 bits per channel")
            frames.append(np.asarray(ImageOps.exif_transpose(image).convert("RGB")))
    return frames


def read_video_file(path, choose, count=None):
    """Decode the whole file and keep the chosen frames, as seeking in video is not exact."""
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")           # damage shows at once
    import decord                                       # only needed for video files
    decord.logging.set_level(decord.logging.QUIET)
    # Without fault_tol, decord repeats the frame before one that does not decode.
    reader = decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9)
    n, frames = count or len(reader), {}
    wanted = choose(n).tolist()
    try:
        for i in range(n):
            frame = reader.next()
            if i in wanted:
                frames[i] = frame.asnumpy()
    except decord.DECORDLimitReachedError:
        # decord also counts frames that are never shown: those that an edit list hides have times
        # before 0, VP8's invisible ones the time of another. If every shown frame came, the file
        # is whole: read it again with their number.
        times = reader.get_frame_timestamp(range(n))[:, 0]
        if count or i == 0 or i != len(np.unique(times[times >= 0])):
            raise
        return read_video_file(path, choose, i)
    return [frames[i] for i in wanted]


def read_clip(path, choose):
    """Read the frames choose(n) of a clip with n frames: uint8 RGB (F, 3, height, width).

    A clip that does not read raises ValueError with its path. No other takes its place.
    """
    try:
        read = read_frame_folder if os.path.isdir(path) else read_video_file
        return torch.from_numpy(np.stack(read(path, choose))).permute(0, 3, 1, 2)
    except ImportError:
        raise
    except Exception as e:                              # Pillow and decord have many kinds
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{path} cannot be read ({reason}). scripts/check_data.py finds all such "
                         "clips, says how to repair them and writes a --skip_list") from e


def read_skip_list(path):
    """Clip ids in a text file, one per line. A # after two blanks begins a comment."""
    return {re.split(r"(^|\s\s)#", line)[0].strip() for line in read_lines(path)} - {""}


# ----- From frames to the input of the model --------------------------------

class TrainTransform:
    """Random resized crop, then RandAugment: uint8 (F, 3, h, w) -> (F, 3, S, S).

    Both draw once per clip, from torch's global random state.
    scale      range of the area of the crop, as a share of the picture
    magnitude  of RandAugment, on torchvision's scale of 0 to 30; 0 switches it off. Each of four
               operations is applied with probability 0.5, as in UniFormerV2
    """

    def __init__(self, size, scale=(0.08, 1.0), magnitude=0):
        self.crop = v2.RandomResizedCrop(size, scale, antialias=True)
        one = v2.RandAugment(1, magnitude, interpolation=InterpolationMode.BILINEAR)
        self.augment = v2.Compose([v2.RandomApply([one], p=0.5)] * 4) if magnitude else None

    def __call__(self, video):
        video = self.crop(video)
        return self.augment(video.contiguous()) if self.augment else video


def eval_views(video, F, size, crops=1):
    """All views of a clip: uint8 (clips * F, 3, h, w) -> (clips * crops, 3, F, S, S).

    The short side is resized to S. One crop is the centre, three lie along the long side.
    """
    h, w = (max(size, round(n * size / min(video.shape[-2:]))) for n in video.shape[-2:])
    views = []
    for clip in TF.resize(video, [h, w], antialias=True).split(F):
        for place in (0.5,) if crops == 1 else (0.0, 0.5, 1.0):
            top, left = round((h - size) * place), round((w - size) * place)
            views.append(TF.crop(clip, top, left, size, size).transpose(0, 1))
    return torch.stack(views)


def normalize(video, mean=CLIP_MEAN, std=CLIP_STD):
    """uint8 (..., 3, F, S, S) -> float32 with this mean and std, on the device of the video."""
    return (video - per_channel(tuple(mean), video.device)) / per_channel(tuple(std), video.device)


@functools.cache                                        # copied to the GPU once, not in each step
def per_channel(values, device):
    return 255 * torch.tensor(values, device=device).view(3, 1, 1, 1)


class VideoDataset(torch.utils.data.Dataset):
    """One split of a data set. Yields (video, label, index).

    video is uint8 (3, F, S, S), or (views, 3, F, S, S) for several views. label is -1 if unknown.
    train      random frames, crop, RandAugment (of magnitude `augment`) and flip, which mirrors
               the label, too. Otherwise the middle of each segment, in `crops` x `clips` views
    control    "shuffle" puts the frames in random order, "single" repeats one of them: then a
               model that needs motion must fail
    skip       ids of clips to leave out; evaluation counts them as wrong
    clip_root  where the clips are, if not in root
    """

    def __init__(self, dataset, root, split, num_frames=16, size=224, train=False,
                 scale=(0.08, 1.0), augment=0, flip=True, crops=1, clips=1, control="none", seed=0,
                 skip=(), clip_root=None):
        ids, labels, self.classes = read_annotations(dataset, root, split, clip_root)
        keep = ~np.isin(ids, list(skip))
        self.ids, self.labels, self.skipped = ids[keep], labels[keep], int((~keep).sum())
        self.mirrored, self.without_partner = mirror_labels(self.classes)
        _, clip_folder, self.suffix = LAYOUTS[dataset]
        self.folder = Path(clip_root or root)
        if clip_folder:
            self.folder = find_file(self.folder, clip_folder)
        self.num_frames, self.size, self.crops, self.clips = num_frames, size, crops, clips
        self.train, self.flip, self.control, self.seed = train, flip, control, seed
        self.transform = TrainTransform(size, scale, augment)

    def __len__(self):
        return len(self.ids)

    def path(self, index):
        return find_clip(self.folder, self.ids[index] + self.suffix)

    def __getitem__(self, item):
        """item: an index, or (epoch, index) as train.py's batches have it."""
        epoch, index = item if isinstance(item, tuple) else (0, item)
        rng = np.random.default_rng([self.seed, epoch if self.train else 0, int(index)])
        F, label = self.num_frames, int(self.labels[index])

        def choose(n):
            return sample_indices(n, F, rng) if self.train else eval_indices(n, F, self.clips)

        video = read_clip(self.path(index), choose)     # (clips * F, 3, h, w)
        if self.control == "shuffle":
            video = torch.cat([clip[rng.permutation(F)] for clip in video.split(F)])
        elif self.control == "single":
            video = torch.cat([clip[[rng.integers(F)] * F] for clip in video.split(F)])
        if not self.train:
            views = eval_views(video, F, self.size, self.crops)
            return (views[0] if len(views) == 1 else views), label, index

        with torch.random.fork_rng(devices=[]):         # torchvision draws from the global state
            torch.default_generator.manual_seed(int(rng.integers(2 ** 63)))
            video = self.transform(video)
        if self.flip and rng.random() < 0.5:
            video, label = video.flip(-1), int(self.mirrored[label])
        return video.transpose(0, 1).contiguous(), label, index                 # (3, F, S, S)
