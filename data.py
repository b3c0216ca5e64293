"""Video clips for STD-Former: Something-Something V1 and V2 as released, and your own videos.

    ssv1    20bn-something-something-v1/<id>/00001.jpg ... (Jester has the same layout)
            something-something-v1-{labels,train,validation,test}.csv
    ssv2    20bn-something-something-v2/<id>.webm
            something-something-v2-{labels,train,validation,test}.json, or without the long prefix;
            files of annotations may also be in a folder labels/
    folder  {train,validation}/<class>/<clip>.mp4, or a folder of frames for each clip; or lists,
            {train,validation}.csv with lines "path label". If both exist, the lists count
    toy     made by scripts/toy_data.py, in the layout of ssv1

One clip, from disk to the model:

    read_annotations -> read_clip -> train_transform or eval_views -> normalize
    -> id, label        -> 16 frames -> 224 x 224 crops, uint8        -> float32, on the device

A training sample depends only on (seed, epoch, index, repetition), whatever the number of workers.
"""
import csv
import json
import os
import re
import signal
import sys
import unicodedata
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
# A reader returns the file or folder that it has read, a row (clip, class) for each clip of a split
# (class None if the split has no labels), and the names of all classes.

def find_file(root, *patterns):
    """The first file or folder that matches a pattern, in `root` or in `root`/labels."""
    for pattern in patterns:
        found = sorted(Path(root).glob(pattern)) + sorted(Path(root, "labels").glob(pattern))
        if found:
            return found[0]
    raise FileNotFoundError(f"{root} has no {' or '.join(patterns)}; the layouts of data sets are "
                            "described at the top of data.py")

def read_lines(path):
    """The lines of a text file that are not blank."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")       # drops the mark that Excel writes
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text; save it as UTF-8 ({e})") from e
    return [line.strip() for line in text.splitlines() if line.strip()]

def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from e

def read_ssv1_list(path):
    """Lines "id;class", or "id" where the classes are not public."""
    rows = []
    for line in read_lines(path):
        clip, separator, name = line.partition(";")
        rows.append((clip, name if separator else None))
    return rows

def read_ssv1(root, split):
    path = find_file(root, f"*-v1-{split}.csv")
    classes = read_lines(find_file(root, "*-v1-labels.csv"))
    return path, read_ssv1_list(path), classes

def read_ssv2(root, split):
    path = find_file(root, f"something-something-v2-{split}.json", f"{split}.json")
    labels = find_file(root, "something-something-v2-labels.json", "labels.json")
    answers = path.with_name("test-answers.csv")        # the later release has the test's labels
    if split == "test" and answers.is_file():
        return answers, read_ssv1_list(answers), list(read_json(labels))

    expected = {"id"} if split == "test" else {"id", "template"}
    rows = []
    for clip in read_json(path):
        if not isinstance(clip, dict) or not expected <= clip.keys():
            raise ValueError(f"{path} has the entry {str(clip)[:80]}, expected a list of objects "
                             f"with the keys {' and '.join(sorted(expected))}")
        name = clip.get("template")
        if name is not None:
            name = name.replace("[", "").replace("]", "")       # "[something]"
        rows.append((str(clip["id"]), name))
    return path, rows, list(read_json(labels))

def read_folder(root, split):
    """Own data: a list if there is one, else class folders. The classes are those of training."""
    path = find_split(root, split)
    rows = read_class_folders(path) if path.is_dir() else read_list(path, split)
    train_rows = rows if split == "train" else read_folder(root, "train")[1]
    return path, rows, [name for _, name in train_rows]

def find_split(root, split):
    names = ("validation", "val") if split == "validation" else (split,)
    for suffix in (".csv", ".txt", ""):                 # "" is the folder
        for name in names:
            path = Path(root, name + suffix)
            if path.exists():
                return path
    raise FileNotFoundError(f"{root} has no {split} split, expected a list {root}/{split}.csv, or "
                            f"a folder {root}/{split} with a folder for each class")

def is_hidden(name):
    """Files of the system, such as .DS_Store, ._clip.mp4 and @eaDir, are not data."""
    return name.startswith((".", "@"))

def read_class_folders(folder):
    """Rows of folder/CLASS/CLIP, where all clips are videos, or all are folders of frames."""
    videos, frame_folders = [], []
    for class_folder in sorted(folder.iterdir()):
        if is_hidden(class_folder.name):
            continue
        if class_folder.suffix.lower() in VIDEOS and class_folder.is_file():
            raise ValueError(f"{class_folder} is not in the folder of a class, expected "
                             f"{folder}/CLASS/{class_folder.name}")
        if not class_folder.is_dir():
            continue
        before = len(videos) + len(frame_folders)
        for clip in sorted(class_folder.iterdir()):
            row = (f"{folder.name}/{class_folder.name}/{clip.name}", class_folder.name)
            if is_hidden(clip.name):
                continue
            if clip.is_dir():
                if not list_images(clip):
                    raise ValueError(f"{clip} has no frames; a clip, which is a video or a folder "
                                     "of frames, must be directly in the folder of its class")
                frame_folders.append(row)
            elif clip.suffix.lower() in VIDEOS:
                videos.append(row)
        if len(videos) + len(frame_folders) == before:
            raise ValueError(f"{class_folder} has no clips, expected videos ({' '.join(VIDEOS)}) "
                             "or a folder of frames for each clip")
    if videos and frame_folders:
        raise ValueError(f"{folder} has both videos and folders of frames, such as {videos[0][0]} "
                         f"and {frame_folders[0][0]}; remove one kind")
    return videos + frame_folders

def read_list(path, split):
    """Lines "path label". A tab, semicolon or comma separates them, or else a space.

    If there is a classes.txt beside the list, it names the labels.
    """
    lines = read_lines(path)
    separator = " "
    for s in (",", ";", "\t"):
        if lines and s in lines[0]:
            separator = s
    names = read_class_names(path.with_name("classes.txt"))
    rows = []
    for fields in csv.reader(lines, delimiter=separator, skipinitialspace=True):
        line = separator.join(fields)
        if len(fields) == 1 and split == "test":
            fields.append(None)
        if len(fields) != 2:
            raise ValueError(f"{path} has the line {line!r} with {len(fields)} columns, expected a "
                             f"path and a label with {separator!r} between them")
        clip, label = fields
        if label == "":
            raise ValueError(f"{path} has the line {line!r} without a label")
        if "\\" in clip:
            raise ValueError(f"{path} has the path {clip}, expected / instead of \\")
        if names and label is not None:
            if label not in names:
                raise ValueError(f"{path} has the line {line!r}, whose label is not a number of "
                                 "classes.txt")
            label = names[label]
        rows.append((clip, label))
    return rows

def read_class_names(path):
    """{number: name} of the lines "number name" of a classes.txt, or {} if there is none."""
    names = {}
    if path.is_file():
        for line in read_lines(path):
            number, _, name = line.partition(" ")
            if not number.isdecimal() or not name or number in names or name in names.values():
                raise ValueError(f"{path} has the line {line!r}, expected a number and a name with "
                                 "a space between them, each used only once")
            names[number] = name
    return names

LAYOUTS = {                                             # reader, folder of the clips, their suffix
    "ssv1": (read_ssv1, "20bn-*-v1", ""),
    "ssv2": (read_ssv2, "20bn-*-v2", ".webm"),
    "folder": (read_folder, "", ""),
    "toy": (read_ssv1, "20bn-*-v1", ""),
}

def clean(name):
    """A class name in one Unicode form, without double blanks."""
    return " ".join(unicodedata.normalize("NFC", name).split())

def read_annotations(dataset, root, split):
    """The clips of a split: ids, labels (-1 if unknown), class names, and the list or folder read.

    Classes are numbered in the order of their sorted names, which is V2's own order. (If names are
    numbers, 10 comes before 2.) ValueError if a list is malformed, FileNotFoundError if there is
    none.
    """
    read, _, _ = LAYOUTS[dataset]
    source, rows, classes = read(root, split)
    classes = sorted({clean(name) for name in classes})
    numbers = {name: i for i, name in enumerate(classes)}
    if not rows:
        raise ValueError(f"{source} has no clips")

    ids, labels, seen = [], [], set()
    for clip, name in rows:
        if clip in seen:
            raise ValueError(f"{source} has the clip {clip} more than once")
        if name is None and split != "test":
            raise ValueError(f"{source} has no class for the clip {clip}")
        if name is not None and clean(name) not in numbers:
            raise ValueError(f"{source} has the class {name!r} for the clip {clip}, expected one "
                             f"of {len(classes)} classes such as {classes[0]!r}")
        seen.add(clip)
        ids.append(clip)
        labels.append(-1 if name is None else numbers[clean(name)])
    return np.array(ids), np.array(labels, dtype=np.int64), classes, source

OPPOSITES = {"left": "right", "right": "left",
             "clockwise": "counterclockwise", "counterclockwise": "clockwise"}

def mirror_labels(classes):
    """The label of each class after a horizontal flip: left becomes right.

    Section 4.2 has "random inversion" without saying what becomes of the label. We pair two classes
    if swapping the words left and right, or clockwise and counterclockwise, turns one name into the
    other. All other classes keep their label. Returns a list of integers.
    """
    numbers = {}
    for i, name in enumerate(classes):
        name = name.lower().replace("anticlockwise", "counterclockwise")
        numbers[name.replace("counter-clockwise", "counterclockwise")] = i
    mirrored = list(range(len(classes)))
    for name, i in numbers.items():
        words = re.split("([^a-z]+)", name)             # the brackets keep what is between
        opposite = "".join([OPPOSITES.get(word, word) for word in words])
        mirrored[i] = numbers.get(opposite, i)
    return mirrored

# ----- From a clip on disk to frames ----------------------------------------

def sample_indices(n, num_frames, rng=None, clips=1):
    """Choose num_frames of the n frames of a clip, one from each of as many segments (section 3.1).

    As in UniFormerV2, segment i is round(s i) to round(s (i+1)), with s = (n-1) / num_frames.
    Training (with an rng) draws one frame of each segment. Both ends belong to a segment, so two
    neighbours can draw the same frame. Evaluation takes the middle, rounded down: for n = 41 and 4
    frames, segments begin at 0, 10, 20 and 30, and it takes 5, 15, 25, 35. If n is at most twice
    num_frames, it takes the frame with which the segment begins. Short clips repeat frames. Even if
    n and num_frames are both 16, evaluation takes frame 8 twice and never the last.

    clips is the last number of a protocol such as 16 x 3 x 1. All of these "clips" span the whole
    video: number v has frame floor(s (v+1) / (clips+1)) of each segment.
    """
    s = (n - 1) / num_frames
    edges = np.round(s * np.arange(num_frames + 1)).astype(np.int64)
    starts, ends = edges[:-1], edges[1:]
    if rng is not None:
        return rng.integers(starts, ends, endpoint=True)
    views = []
    for v in range(clips):
        views.append(starts + int(s / (clips + 1) * (v + 1)))
    return np.concatenate(views)

def find_clip(folder, name):
    """The path of a clip, whose name may be in another Unicode form on disk than in a list."""
    for form in (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)):
        path = Path(folder, form).absolute()
        if path.exists():
            return path
    raise FileNotFoundError(f"{Path(folder, name).absolute()} does not exist")

def list_images(folder):
    return [name for name in os.listdir(folder)
            if name.lower().endswith(IMAGES) and not is_hidden(name)]

def frame_number(name):
    """The last number in the name of a frame."""
    return int(re.findall(r"\d+", name)[-1])

def frame_names(folder):
    """The frames of a folder, in the order of their numbers. They must be a single series."""
    names = list_images(folder)
    # Optical flow in the same folder, say, would be a second series: flow_#.jpg beside img_#.jpg
    series = sorted({re.sub(r"\d+(?=\D*$)", "#", name.lower()) for name in names})
    if len(series) != 1 or "#" not in series[0]:
        found = " and ".join(series[:3]) or "no images"
        raise ValueError(f"it holds {found}, expected one series of numbered images")
    names.sort(key=frame_number)
    for a, b in zip(names, names[1:]):
        if frame_number(a) == frame_number(b):
            raise ValueError(f"{a} and {b} have the same number")
    return names

def read_frames(folder, names):
    """Images of a folder. All take the size of the first: tracked crops may differ in size."""
    frames = []
    for name in names:
        with Image.open(Path(folder, name), formats=("JPEG", "PNG")) as image:
            if image.mode.startswith(("I", "F")):       # Pillow would cut these off at 255
                raise ValueError(f"{name} has more than 8 bits per channel")
            frame = ImageOps.exif_transpose(image).convert("RGB")
        if frames and frame.size != frames[0].size:
            frame = frame.resize(frames[0].size, Image.Resampling.BILINEAR)
        frames.append(frame)
    return np.stack(frames)

def open_video(path):
    """A decord reader. If a file is damaged, it raises an error instead of repeating frames."""
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")       # it gives up sooner than by default
    import decord                                       # folders of frames do not need it
    decord.logging.set_level(decord.logging.QUIET)
    return decord.VideoReader(str(path), num_threads=1, fault_tol=1e-9)

def decode(reader, n, indices):
    """Decode up to n frames, and keep those at `indices`. Returns them, and how many were decoded.

    It decodes in order, and to the end: seeking is not exact, and would step over damage.
    """
    import decord
    kept, wanted = {}, set(indices.tolist())
    for i in range(n):
        try:
            frame = reader.next()
        except decord.DECORDLimitReachedError:
            return kept, i
        if i in wanted:
            frame = frame.asnumpy()
            height, width = frame.shape[:2]             # decord pads the rows of narrow videos
            kept[i] = frame.reshape(height, -1)[:, :3 * width].reshape(height, width, 3)
    return kept, n

def read_video(path, num_frames, rng, clips):
    reader = open_video(path)
    n = len(reader)
    indices = sample_indices(n, num_frames, rng, clips)
    frames, decoded = decode(reader, n, indices)
    if decoded < n:
        # decord also counts frames that are never shown. They have a time below 0 (cut off by an
        # edit list) or the time of another frame (VP8). Without them, the count must be right;
        # otherwise the file is damaged.
        times = reader.get_frame_timestamp(range(n))[:, 0]
        shown = len(np.unique(times[times >= 0]))
        if decoded == 0 or decoded != shown:
            raise ValueError(f"{decoded} of its {shown} frames can be decoded")
        indices = sample_indices(shown, num_frames, rng, clips)
        frames, _ = decode(open_video(path), shown, indices)
    return np.stack([frames[i] for i in indices.tolist()])

def read_clip(path, num_frames, rng=None, clips=1):
    """Frames of a video or a folder, chosen by sample_indices: uint8 RGB (frames, 3, h, w).

    ValueError names a clip that cannot be read. No other clip takes its place.
    """
    try:
        if os.path.isdir(path):
            names = frame_names(path)
            indices = sample_indices(len(names), num_frames, rng, clips)
            frames = read_frames(path, [names[i] for i in indices])
        else:
            frames = read_video(path, num_frames, rng, clips)
    except Exception as e:                              # Pillow and decord raise many kinds
        reason = str(e).partition("\n")[0] or type(e).__name__
        reason = re.sub(r"\[[\d:]+\] \S+ ", "", reason)    # decord's time and line of code
        raise ValueError(f"{path} cannot be read ({reason})") from e
    return torch.from_numpy(frames).permute(0, 3, 1, 2)

def read_skip_list(path):
    """Clip ids in a text file, one per line. Lines that begin with # are comments."""
    return [line for line in read_lines(path) if not line.startswith("#")]

# ----- From frames to the input of the model --------------------------------

def train_transform(size, crop_scale=0.08, randaugment=0, randaugment_first=False):
    """Random resized crop and RandAugment, one draw for all frames: (F, 3, h, w) -> (F, 3, S, S).

    crop_scale         smallest area of the crop, as a share of the frame's. A frame that is more
                       than 4 / (3 crop_scale) times as wide as high always gives the centre
    randaugment        magnitude on torchvision's scale of 0 to 30; 0 switches it off. Each of four
                       operations is applied with probability 0.5, as in UniFormerV2
    randaugment_first  before the crop, as in UniFormerV2: slow if the frames are large
    """
    crop = [v2.RandomResizedCrop(size, (crop_scale, 1.0), antialias=True),
            v2.Lambda(torch.Tensor.contiguous)]         # RandAugment is faster on contiguous frames
    augment = []
    if randaugment > 0:
        one = v2.RandAugment(1, randaugment, interpolation=InterpolationMode.BILINEAR)
        augment = [v2.RandomApply([one], p=0.5)] * 4
    return v2.Compose(augment + crop if randaugment_first else crop + augment)

def eval_views(video, num_frames, size, crops=1):
    """All views of a clip: uint8 (clips * F, 3, h, w) -> (clips * crops, 3, F, S, S).

    The short side is resized to S. crops is 1, the centre, or 3 along the long side.
    """
    h, w = video.shape[-2:]
    scale = size / min(h, w)
    h, w = max(size, round(h * scale)), max(size, round(w * scale))
    video = v2.functional.resize(video, [h, w], antialias=True)
    positions = [0.5] if crops == 1 else [0.0, 0.5, 1.0]
    views = []
    for clip in video.split(num_frames):
        for p in positions:
            top, left = round((h - size) * p), round((w - size) * p)
            views.append(v2.functional.crop(clip, top, left, size, size).transpose(0, 1))
    return torch.stack(views)

def control_frames(video, num_frames, control, rng):
    """For control experiments: "shuffle" the frames of each view, or repeat a "single" one."""
    views = []
    for view in video.split(num_frames):                # video: (clips * F, 3, h, w)
        if control == "shuffle":
            order = rng.permutation(num_frames)
        else:
            order = [rng.integers(num_frames)] * num_frames
        views.append(view[order])
    return torch.cat(views)

def normalize(video, mean=CLIP_MEAN, std=CLIP_STD):
    """uint8 (..., 3, F, S, S) -> float32 with this mean and std, on the device of the video."""
    mean = 255 * torch.tensor(mean).view(3, 1, 1, 1)
    std = 255 * torch.tensor(std).view(3, 1, 1, 1)
    on_gpu = video.is_cuda                              # then the CPU need not wait for the copy
    mean = mean.to(video.device, non_blocking=on_gpu)
    std = std.to(video.device, non_blocking=on_gpu)
    return (video - mean) / std

# ----- Data sets ------------------------------------------------------------

class VideoDataset(torch.utils.data.Dataset):
    """One split of a data set, for evaluation. Yields (video, label, index).

    video is uint8 (3, F, S, S), or (views, 3, F, S, S) for several views. label is -1 if unknown.
    crops, clips  views of a clip, see eval_views and sample_indices
    control       "none", or "shuffle" or "single", see control_frames
    skip_list     file with ids of clips to leave out; evaluation counts them as wrong
    clip_root     folder that holds 20bn-*, or the clips of a "folder" data set; default: root
    """

    def __init__(self, dataset, root, split, num_frames=16, size=224, crops=1, clips=1,
                 control="none", seed=0, skip_list=None, clip_root=None):
        ids, labels, self.classes, self.source = read_annotations(dataset, root, split)
        skipped = np.isin(ids, read_skip_list(skip_list) if skip_list else [])
        self.ids = ids[~skipped]
        self.labels = labels[~skipped]
        self.skipped = int(skipped.sum())
        _, folder, self.suffix = LAYOUTS[dataset]
        self.folder = find_file(clip_root or root, folder) if folder else Path(clip_root or root)
        self.num_frames = num_frames
        self.size = size
        self.crops = crops
        self.clips = clips
        self.control = control
        self.seed = seed
        if len(self.ids) == 0:
            raise ValueError(f"{skip_list} leaves no clip of {self.source}")
        self.path(0)                            # a wrong folder should fail now, not in step 1

    def __len__(self):
        return len(self.ids)

    def path(self, index):
        return find_clip(self.folder, self.ids[index] + self.suffix)

    def __getitem__(self, index):
        video = read_clip(self.path(index), self.num_frames, clips=self.clips)
        if self.control != "none":
            rng = np.random.default_rng([self.seed, 0, index])
            video = control_frames(video, self.num_frames, self.control, rng)
        views = eval_views(video, self.num_frames, self.size, self.crops)
        if len(views) == 1:
            views = views[0]
        return views, int(self.labels[index]), index

class TrainingDataset(VideoDataset):
    """One split of a data set, with random frames, crop, RandAugment and flip.

    Indexed by (epoch, index, repetition), as step_batches has them. Yields (video, label, index).
    video is uint8 (3, F, S, S). If the clip was mirrored, label is that of the mirrored class.
    crop_scale, randaugment, randaugment_first   see train_transform
    flip                                         mirror half of the clips
    """

    def __init__(self, dataset, root, split, num_frames=16, size=224, crop_scale=0.08,
                 randaugment=0, randaugment_first=False, flip=False, control="none", seed=0,
                 skip_list=None, clip_root=None):
        super().__init__(dataset, root, split, num_frames, size, control=control, seed=seed,
                         skip_list=skip_list, clip_root=clip_root)
        self.transform = train_transform(size, crop_scale, randaugment, randaugment_first)
        self.flip = flip
        self.mirrored = mirror_labels(self.classes)

    def __getitem__(self, item):
        epoch, index, repetition = item
        rng = np.random.default_rng([self.seed, epoch, index, repetition])
        video = read_clip(self.path(index), self.num_frames, rng)               # (F, 3, h, w)
        if self.control != "none":
            video = control_frames(video, self.num_frames, self.control, rng)
        with torch.random.fork_rng(devices=[]):         # torchvision draws from the global state
            torch.manual_seed(int(rng.integers(2 ** 63)))
            video = self.transform(video)
        label = int(self.labels[index])
        if self.flip and rng.random() < 0.5:
            video = video.flip(-1)
            label = self.mirrored[label]
        return video.transpose(0, 1).contiguous(), label, index                 # (3, F, S, S)

# ----- Batches --------------------------------------------------------------

def cores_per_process():
    """CPU cores for each of the processes that torchrun has started on this machine."""
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):                # fewer in some containers
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

def step_batches(num_clips, batch_size, start, stop, seed, rank=0, world=1, repeat=1):
    """Yield this rank's samples of each step from start to stop: [(epoch, index, repetition), ...]

    Each epoch is a new permutation, without its last, incomplete batch. The ranks share each batch.
    Each clip comes `repeat` times in its step. MixUp mixes neighbours, so a clip is not followed by
    itself, unless it is the only one of its rank.
    """
    steps_per_epoch = num_clips // batch_size
    for step in range(start, stop):
        epoch, i = divmod(step, steps_per_epoch)
        if i == 0 or step == start:
            order = np.random.default_rng([seed, epoch]).permutation(num_clips).tolist()
        batch = order[i * batch_size:(i + 1) * batch_size]
        yield [(epoch, index, r) for r in range(repeat) for index in batch[rank::world]]

def make_loader(dataset, workers, timeout, device, **batches):
    """A DataLoader. batches: its batch_size or batch_sampler"""
    return torch.utils.data.DataLoader(
        dataset, num_workers=workers, timeout=timeout if workers > 0 else 0,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
        # Python 3.14 would start workers by a server process, and SIGTERM would end that.
        multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
        **batches)

def ignore_signals(worker):
    """Data workers ignore Ctrl-C and SIGTERM, so that train.py can finish its step and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
