"""Video clips for STD-Former: Something-Something V1 and V2 as released, and your own videos.

    ssv1    20bn-something-something-v1/<id>/00001.jpg ... (Jester has the same layout)
            something-something-v1-{labels,train,validation,test}.csv
    ssv2    20bn-something-something-v2/<id>.webm
            something-something-v2-{labels,train,validation,test}.json
    folder  {train,validation}/<class>/<clip>.mp4, or a folder of frames for each clip;
            or {train,validation}.csv with lines "path label", and classes.txt to name numbers
    toy     made by scripts/toy_data.py, in the layout of ssv1

One clip, from disk to the model:

    read_annotations -> sample_indices -> read_clip -> train_transform, eval_views -> normalize
    id, label           16 frame numbers  uint8 frames 224 x 224 crops                float32

A sample follows from (seed, epoch, index) alone, whatever the number of data workers.
"""
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

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)         # RGB, for values in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGES = (".jpg", ".jpeg", ".png")
VIDEOS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp")

# ----- Annotations ----------------------------------------------------------

def find_file(root, *patterns):
    """The first file or folder that matches a pattern, in `root` or in `root`/labels."""
    for pattern in patterns:
        for path in [*sorted(Path(root).glob(pattern)), *Path(root, "labels").glob(pattern)]:
            return path
    raise FileNotFoundError(f"{root} holds no {' or '.join(patterns)}; give the folder around that "
                            "as --data_root or --clip_root (layouts: see the top of data.py)")

def read_lines(path):
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()     # drops a BOM
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text, save it as such: {e}") from e
    return [line.strip() for line in lines if line.strip()]

def clean(name):
    """A class name without V2's [brackets] and without double blanks."""
    return " ".join(re.sub(r"[\[\]]", "", name).split())

def read_ssv1(root, split):
    path, labels = (find_file(root, f"*-v1-{name}.csv") for name in (split, "labels"))
    return path, [line.split(";", 1) for line in read_lines(path)], read_lines(labels)

def read_ssv2(root, split):
    path = find_file(root, f"something-something-v2-{split}.json", f"{split}.json")
    labels = find_file(root, "something-something-v2-labels.json", "labels.json")
    clips = json.loads(path.read_text(encoding="utf-8-sig"))
    rows = [[clip[key] for key in ("id", "template") if key in clip] for clip in clips]
    answers = path.with_name("test-answers.csv")
    if split == "test" and answers.is_file():
        rows = [line.split(";", 1) for line in read_lines(answers)]
    return path, rows, json.loads(labels.read_text(encoding="utf-8-sig"))

def read_folder(root, split):
    """Class folders, or else a list. The classes are those of the training split."""
    names = ("validation", "val") if split == "validation" else (split,)
    path = find_file(root, *(name + end for end in ("/", ".csv", ".txt") for name in names))
    rows = read_list(root, path) if path.is_file() else list_class_folders(path)
    train_rows = rows if split == "train" else read_folder(root, "train")[1]
    return path, rows, [label for _, *labels in train_rows for label in labels]

def list_class_folders(path):
    """Videos, and folders of frames with no video inside. The first folder is the class."""
    files = glob.glob("**/*.*", root_dir=path, recursive=True)          # leaves out hidden ones
    videos = {f for f in files if f.lower().endswith(VIDEOS) and os.path.isfile(path / f)}
    frames = {os.path.dirname(f) for f in files if f.lower().endswith(IMAGES)}
    clips = videos | (frames - {os.path.dirname(video) for video in videos})
    return sorted((f"{path.name}/{clip}", *Path(clip).parts[:-1][:1]) for clip in clips)

def read_list(root, path):
    """Lines "path label". A classes.txt names the labels that are numbers."""
    rows, class_names = [], Path(root, "classes.txt")
    for line in read_lines(path):
        separator = next((s for s in "\t;," if s in line), None)        # None: blanks
        rows.append([field.strip() for field in line.split(separator)])
        if len(rows[-1]) > 2:
            raise ValueError(f"{path} has the line {line!r}, expected a path and a label, "
                             "with a tab between them if they hold blanks or commas")
    if class_names.is_file():                           # lines "number name", or names from 0 on
        lines = read_lines(class_names)
        if not all(re.match(r"\d+\s", line) for line in lines):
            lines = [f"{i} {line}" for i, line in enumerate(lines)]
        named = dict(line.split(maxsplit=1) for line in lines)
        if unnamed := {x for row in rows for x in row[1:] if x.isdecimal()} - {*named}:
            raise ValueError(f"{class_names} has no name for the label {min(unnamed)} of {path}")
        rows = [[clip, *(named.get(label, label) for label in labels)] for clip, *labels in rows]
    return rows

LAYOUTS = {                                             # reader, folder of the clips, their suffix
    "ssv1": (read_ssv1, "20bn-*-v1", ""),
    "ssv2": (read_ssv2, "20bn-*-v2", ".webm"),
    "folder": (read_folder, "", ""),
    "toy": (read_ssv1, "20bn-*-v1", ""),
}

def read_annotations(dataset, root, split):
    """Clip ids, labels (-1 if a test split has none) and class names of a split.

    Classes are numbered by their sorted names, as V2's are. ValueError says what a list has wrong.
    """
    path, rows, classes = LAYOUTS[dataset][0](root, split)
    classes = sorted({clean(name) for name in classes})
    number = {name: i for i, name in enumerate(classes)}
    listed, labels = Counter(row[0] for row in rows), []
    for clip, *name in rows:
        label = number.get(clean(name[0])) if name else -1
        if label is None or (label < 0 and split != "test"):
            raise ValueError(f"{path}: the class of clip {clip} is {''.join(name) or 'missing'}, "
                             f"expected one of {len(classes)}, such as {classes[:2]}")
        if listed[clip] > 1:
            raise ValueError(f"{path}: clip {clip} is listed {listed[clip]} times, expected once")
        labels.append(label)
    return np.array([row[0] for row in rows]), np.array(labels, dtype=np.int64), classes

# ----- From a clip on disk to frames ----------------------------------------

def sample_indices(n, F, rng=None, clips=1):
    """Choose F of the n frames of a clip, one from each of F equal segments (section 3.1).

    With s = (n-1)/F, segment i runs from round(s i) to round(s (i+1)), as in UniFormerV2. Training
    (with an rng) draws in it. Evaluation has `clips` views of F frames. Each spans the whole clip:
    view v takes the starts plus floor(s (v+1) / (clips+1)). So one view takes the middle, or the
    start if n <= 2F. Short clips repeat frames.
    """
    s = (n - 1) / F
    edges = np.round(s * np.arange(F + 1)).astype(np.int64)
    if rng is not None:
        return rng.integers(edges[:-1], edges[1:], endpoint=True)
    return np.concatenate([edges[:-1] + int(s / (clips + 1) * (v + 1)) for v in range(clips)])

def find_clip(folder, name):
    """The absolute path of a clip in a folder, in any Unicode normalisation of its name."""
    folder = Path(folder).absolute()
    if ".." in Path(os.path.relpath(Path(folder, name), folder)).parts:
        raise ValueError(f"clip {name} lies outside of {folder}: give its folder with --clip_root")
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        path = Path(folder, form)
        if path.exists():
            return path
    near = [*path.parent.glob(f"{glob.escape(path.stem)}.*"),
            *path.parent.glob(f"*/{glob.escape(path.name)}")]
    found = f", but {near[0]} does: rename or move it, or use --dataset folder" if near else ""
    raise FileNotFoundError(f"{folder / name} does not exist{found}")

def frame_names(folder):
    """The frames of a folder, in the order of the clip. Hidden files do not count."""
    names = [n for n in os.listdir(folder) if n.lower().endswith(IMAGES) and n[0] != "."]
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
    """Decode all n frames and keep the chosen: seeking is not exact, and could miss damage."""
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")           # gives up soon after damage
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
        # Only i frames came. decord also counts frames that are never shown: their time is below 0
        # (edit list) or that of another frame (VP8). If only such frames are missing, n is i.
        times = reader.get_frame_timestamp(range(n))[:, 0]
        if count or i == 0 or i != len(np.unique(times[times >= 0])):
            raise
        return read_video_file(path, choose, i)
    return [frames[i] for i in wanted]

def read_clip(path, choose):
    """Frames choose(n) of a clip of n: uint8 RGB (frames, 3, h, w). ValueError names its path."""
    read = read_frame_folder if os.path.isdir(path) else read_video_file
    try:
        return torch.from_numpy(np.stack(read(path, choose))).permute(0, 3, 1, 2)
    except ImportError:                                 # no decord
        raise
    except Exception as e:                              # no other clip takes its place
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{path} cannot be read ({reason}). scripts/check_data.py finds all such "
                         "clips, says how to repair them and writes a --skip_list") from e

def read_skip_list(path):
    """Clip ids in a text file, one per line. A # at the start or after two blanks is a comment."""
    return {re.split(r"(^|\s\s)#", line)[0].strip() for line in read_lines(path)} - {""}

# ----- From frames to the input of the model --------------------------------

def train_transform(size, scale=(0.08, 1.0), magnitude=0):
    """Random resized crop and RandAugment, one draw for all frames: (F, 3, h, w) -> (F, 3, S, S).

    scale      range of the area of the crop, as a share of the picture
    magnitude  of RandAugment, on torchvision's scale of 0 to 30; 0 switches it off. Each of four
               operations is applied with probability 0.5, as in UniFormerV2
    """
    crop = v2.RandomResizedCrop(size, scale, antialias=True)
    one = v2.RandAugment(1, magnitude, interpolation=InterpolationMode.BILINEAR)
    four = [v2.RandomApply([one], p=0.5)] * 4 if magnitude else []
    return v2.Compose([crop, v2.Lambda(torch.Tensor.contiguous), *four])        # so it is faster

def eval_views(video, F, size, crops=1):
    """All views of a clip: uint8 (clips * F, 3, h, w) -> (clips * crops, 3, F, S, S).

    The short side is resized to S. One crop is the centre, three lie along the long side.
    """
    h, w = (max(size, round(n * size / min(video.shape[-2:]))) for n in video.shape[-2:])
    views = []
    for clip in v2.functional.resize(video, [h, w], antialias=True).split(F):
        for place in (0.5,) if crops == 1 else (0.0, 0.5, 1.0):
            top, left = round((h - size) * place), round((w - size) * place)
            views.append(v2.functional.crop(clip, top, left, size, size).transpose(0, 1))
    return torch.stack(views)

def normalize(video, mean=CLIP_MEAN, std=CLIP_STD):
    """uint8 (..., 3, F, S, S) -> float32 with this mean and std, on the device of the video."""
    m, s = 255 * torch.tensor((mean, std)).view(2, 3, 1, 1, 1).to(video.device, non_blocking=True)
    return (video - m) / s

class VideoDataset(torch.utils.data.Dataset):
    """One split of a data set. Yields (video, label, index).

    video is uint8 (3, F, S, S), or (views, 3, F, S, S) for several views. label is -1 if unknown.
    train      random frames, crop, RandAugment (of magnitude `augment`) and flip. Otherwise the
               frames of sample_indices without rng, in `crops` x `clips` views
    mirrored   the label that each class has after a flip; without it there are no flips
    control    for experiments: "shuffle" the frames of a clip, or repeat a "single" one
    skip_list  file with ids of clips to leave out; evaluation counts them as wrong
    clip_root  folder around the clips (around 20bn-*), if not root
    """

    def __init__(self, dataset, root, split, num_frames=16, size=224, train=False,
                 scale=(0.08, 1.0), augment=0, mirrored=None, crops=1, clips=1, control="none",
                 seed=0, skip_list=None, clip_root=None):
        ids, labels, self.classes = read_annotations(dataset, root, split)
        keep = ~np.isin(ids, list(read_skip_list(skip_list)) if skip_list else [])
        self.ids, self.labels, self.skipped = ids[keep], labels[keep], int((~keep).sum())
        _, folder, self.suffix = LAYOUTS[dataset]
        self.folder = find_file(clip_root or root, folder) if folder else Path(clip_root or root)
        self.num_frames, self.size, self.crops, self.clips = num_frames, size, crops, clips
        self.train, self.mirrored, self.control, self.seed = train, mirrored, control, seed
        self.transform = train_transform(size, scale, augment)

    def __len__(self):
        return len(self.ids)

    def path(self, index):
        return find_clip(self.folder, self.ids[index] + self.suffix)

    def __getitem__(self, item):
        """item: an index, or (epoch, index) as train.py's batches have it."""
        epoch, index = item if isinstance(item, tuple) else (0, item)
        rng = np.random.default_rng([self.seed, epoch if self.train else 0, int(index)])
        F, label = self.num_frames, int(self.labels[index])
        draw = rng if self.train else None
        video = read_clip(self.path(index), lambda n: sample_indices(n, F, draw, self.clips))
        if self.control == "shuffle":                   # video: (clips * F, 3, h, w)
            video = torch.cat([view[rng.permutation(F)] for view in video.split(F)])
        elif self.control == "single":
            video = torch.cat([view[[rng.integers(F)] * F] for view in video.split(F)])
        if not self.train:
            views = eval_views(video, F, self.size, self.crops)
            return (views[0] if len(views) == 1 else views), label, index
        with torch.random.fork_rng(devices=[]):         # torchvision draws from the global state
            torch.default_generator.manual_seed(int(rng.integers(2 ** 63)))
            video = self.transform(video)
        if self.mirrored is not None and rng.random() < 0.5:
            video, label = video.flip(-1), int(self.mirrored[label])
        return video.transpose(0, 1).contiguous(), label, index                 # (3, F, S, S)
