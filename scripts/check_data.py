"""Look at a data set before training: is every clip whole, and what does the model see of it?

    python scripts/check_data.py check --dataset ssv2 --data_root DIR    # writes skip_list.txt
    python scripts/check_data.py show --dataset ssv2 --data_root DIR     # writes show.png

check (also without the word) decodes every frame of every clip, in processes that may crash or
hang. It finds clips that do not read, and damage that decoders step over in different ways. It says
how to repair a clip that may be whole. It also reports clips that are both in training and
validation, and header lines that became a clip or a class. It exits with 1 if clips are unreadable.

show takes every flag of train.py and draws training samples after their augmentation.
"""
import argparse
import hashlib
import importlib.util
import mmap
import multiprocessing
import os
import re
import shlex
import struct
import sys
import threading
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from evaluate import cores_per_process
from model import load_checkpoint, model_config
from scripts.guards import run_program
from train import get_args, make_datasets

# ----- The structure of video files -----------------------------------------

EBML_START = b"\x1a\x45\xdf\xa3"                        # webm and mkv, bytes 0 to 3
MP4_STARTS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")     # mp4 and mov, bytes 4 to 7
OTHER_STARTS = (b"RIFF", b"FLV\x01", b"\0\0\x01\xba", b"0&\xb2u")       # avi, flv, mpg, wmv

# The elements of webm (Matroska, RFC 9559) that hold others, and which those may be.
SEGMENT, CLUSTER = "18538067", "1f43b675"
IN_SEGMENT = {"114d9b74", "1549a966", "1654ae6b", "1c53bb6b", "1254c367", "1043a770", "1941a469",
              CLUSTER}
CHILDREN = {"": {"1a45dfa3", SEGMENT, "ec"}, SEGMENT: IN_SEGMENT | {"ec", "bf"},
            CLUSTER: {"e7", "a7", "ab", "a3", "a0", "5854", "af", "ec", "bf"},
            # any
            **dict.fromkeys(("1a45dfa3", "114d9b74", "4dbb", "1549a966", "1654ae6b", "ae", "e0"))}


def webm_damage(path):
    """The first byte at which the elements of a webm or mkv file do not fit together, or None.

    Each element begins with its id and its length, and lies inside of another. Versions of ffmpeg
    go on after such damage in different ways. A file that was only cut off fits: see
    declared_bytes. Other containers give None.
    """
    with open(path, "rb") as f:
        raw = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)         # only the lengths are read
    if raw[:4] != EBML_START:
        return None
    at, open_elements = 0, [("", float("inf"))]         # the ids around byte `at`, and their ends
    while at < len(raw):
        while at == open_elements[-1][1]:
            if open_elements.pop()[0] == SEGMENT:       # only frames after it are damage
                more = raw.find(bytes.fromhex(CLUSTER), at)
                return None if more < 0 else more
        id_width = 9 - raw[at].bit_length()             # leading zeros give the width of a number
        size_at = at + id_width
        size_width = 9 - raw[size_at].bit_length() if size_at < len(raw) else 1
        name, start = raw[at:size_at].hex(), size_at + size_width
        if id_width > 4 or size_width > 8:
            return at
        if start > len(raw):
            return None                                 # cut off
        size = int.from_bytes(raw[size_at:start], "big") - (1 << 7 * size_width)
        unknown = size == (1 << 7 * size_width) - 1     # a live stream: up to the next of its kind
        if open_elements[-1][0] == CLUSTER and name in IN_SEGMENT:
            open_elements.pop()
        parent, end = open_elements[-1]
        stop = end if unknown else start + size
        if stop > end or CHILDREN[parent] and name not in CHILDREN[parent]:
            return at
        if name in CHILDREN:
            open_elements.append((name, stop))
        at = start if name in CHILDREN else stop
    return None


def mp4_boxes(f, at, end):
    """The boxes of an open mp4 or mov file between two bytes: type, start and end of their content.

    The last one may end after the file.
    """
    while at + 8 <= end:
        f.seek(at)
        head = f.read(16)
        size, skip = int.from_bytes(head[:4], "big"), 8
        if size == 1:                                   # a long box
            size, skip = int.from_bytes(head[8:], "big"), 16
        size = size or end - at                         # 0: all the rest
        if size < skip:
            return
        yield head[4:8], at + skip, at + size
        at += size


def boxes_inside(f, kind, boxes):
    return [box for name, at, end in boxes if name == kind for box in mp4_boxes(f, at, end)]


def mp4_mirrored(path):
    """Whether an mp4 or mov file is to be shown mirrored, or turned by other than 90, 180, 270.

    Players and ffmpeg do that. decord does not.
    """
    with open(path, "rb") as f:
        if f.read(8)[4:] not in MP4_STARTS:
            return False
        movie = boxes_inside(f, b"moov", mp4_boxes(f, 0, os.path.getsize(path)))
        for kind, at, _ in movie + boxes_inside(f, b"trak", movie):
            if kind not in (b"mvhd", b"tkhd"):          # the headers of the movie, of a track
                continue
            f.seek(at)
            box = f.read(80)                            # version, times, ..., matrix a b u c d ...
            place = (36 if kind == b"mvhd" else 40) + (12 if box[:1] == b"\1" else 0)
            a, b, _, c, d = struct.unpack(">5i", box[place:place + 20].ljust(20, b"\0"))
            upright = b == c == 0 and (min(a, d) > 0 or max(a, d) < 0)          # 0 or 180 degrees
            sideways = a == d == 0 and b * c < 0                                # 90 or 270
            if not (upright or sideways or a == b == c == d == 0):
                return True
    return False


def declared_bytes(path):
    """The length that a webm or mp4 file declares for itself, or 0 if it declares none.

    webm: the end of its segment. mp4: the end of its last box.
    """
    with open(path, "rb") as f:
        head = f.read(4096)
        if head[4:8] in MP4_STARTS:
            boxes = mp4_boxes(f, 0, os.path.getsize(path))
            return max((end for _, _, end in boxes), default=0)
    at = head.find(bytes.fromhex(SEGMENT)) + 4
    if at < 4 or not head[at:at + 1] or not head[at]:
        return 0
    width = 9 - head[at].bit_length()
    size = int.from_bytes(head[at:at + width], "big") - (1 << 7 * width)
    unknown = size == (1 << 7 * width) - 1
    return 0 if unknown else at + width + size


def remedy(path):
    """What to do about a video that decord does not read: "remux it with: ffmpeg ...", or "".

    decord reads no stream without a duration (a browser's recording), .ts, .m2ts, .gif and .ogv. It
    reads the same frames from another container, so copying them is enough, and they stay equal.
    Other videos are encoded again. A file that does not begin like a video gives "".
    """
    with open(path, "rb") as f:
        head = f.read(4096)
    ts = b"G" in (head[:1], head[4:5]) and b"G" in (head[188:189], head[196:197])
    no_duration = head[:4] == EBML_START and b"\x44\x89" not in head and b"V_AV1" not in head
    if ts or no_duration or head[:4] in (b"OggS", b"GIF8"):
        kind, flags = ".new.mkv", "-c copy -an -sn"
    elif head[:4] in (EBML_START, *OTHER_STARTS) or head[4:8] in MP4_STARTS:
        kind = ".new.webm"
        flags = "-fps_mode passthrough -pix_fmt yuv420p -c:v libvpx-vp9 -crf 24 -b:v 0 -an -sn"
    else:
        return ""
    old, new = (shlex.quote(str(p)) for p in (path, Path(path).with_suffix(kind)))
    verb = "remux" if "copy" in flags else "re-encode"
    return f"{verb} it with: ffmpeg -i {old} {flags} {new}"


# ----- One clip -------------------------------------------------------------

def missing_frames(folder):
    """How many numbers the frames of a folder leave out between the first and the last."""
    digits = [re.findall(r"\d+", name) for name in data.frame_names(folder)]
    numbers = {int(groups[-1]) for groups in digits if groups}
    return max(numbers) - min(numbers) + 1 - len(numbers) if numbers else 0


def probe(path):
    """Decode all frames of a clip. Returns what is odd about it, or "" if nothing is.

    Raises ValueError, with the reason and what to do, if the clip should not be trained on.
    """
    video, count = os.path.isfile(path), []
    if video and os.path.getsize(path) == 0:
        raise ValueError("the file is empty")
    if video and (byte := webm_damage(path)) is not None:
        raise ValueError(f"it is damaged at byte {byte}, where parts of the file do not fit")
    if video and mp4_mirrored(path):
        raise ValueError("it is to be shown mirrored or turned, which decord does not do; "
                         f"{remedy(path)}")
    short = video and declared_bytes(path) > os.path.getsize(path)

    def choose(n):
        count.append(n)
        return np.arange(1 if video else n)             # video is decoded to its end in any case

    try:
        data.read_clip(path, choose)
    except ValueError as e:
        kind = type(e.__cause__).__name__               # below: without decord's time and path
        lines = str(e.__cause__).splitlines() or [kind]
        reason = re.sub(r"\[[\d:]+\] \S+: |\[/.*?\] ?", "", lines[0])[:200]
        if kind == "DECORDLimitReachedError":
            reason = "fewer frames decode than the file holds"
        if short:
            reason += "; the file is cut off"
        elif video and remedy(path):
            reason += f"; it may be whole: {remedy(path)}"
        raise ValueError(reason) from e
    if short:
        return (f"has {os.path.getsize(path)} bytes of the {declared_bytes(path)} that it "
                f"declares, with {count[-1]} frames")
    if not video and missing_frames(path):
        return (f"has {count[-1]} frames, and {missing_frames(path)} numbers between the first "
                "and the last are missing")
    return ""


# ----- All clips, in processes that may die ---------------------------------

def isolated_process(connection, function):
    connection.send("ready")                            # the seconds of importing torch are over
    try:
        while True:
            path = connection.recv()
            try:
                connection.send((True, function(path)))
            except (ValueError, OSError) as e:
                connection.send((False, str(e)))
    except EOFError:                                    # nothing is left to do
        pass


def isolated(function, paths, jobs, timeout):
    """Call function(path) for every path, in `jobs` processes that may crash or hang.

    A process that does not answer in `timeout` seconds is killed. Yields, in order, (True, value)
    or (False, text of its ValueError, of a crash or of a hang).
    """
    local, context = threading.local(), multiprocessing.get_context("spawn")

    def call(path):
        if not hasattr(local, "process"):               # each thread has one process
            local.connection, other = context.Pipe()
            local.process = context.Process(target=isolated_process, args=(other, function),
                                            daemon=True)
            local.process.start()
            other.close()
            local.connection.recv()
        try:
            local.connection.send(path)
            if local.connection.poll(timeout):
                return local.connection.recv()
            problem = f"the decoder hangs (no answer in {timeout:g} s)"
        except (EOFError, OSError):
            problem = "the decoder crashed on it"
        local.process.kill()
        del local.process
        return False, problem

    with ThreadPoolExecutor(jobs) as threads:
        yield from threads.map(call, paths)


# ----- The lists ------------------------------------------------------------

HEADER_WORD = re.compile(r"(video|clip|file|class|label|action)s?(_?(id|name|path))?s?|"
                         r"(id|name|path|template|category|target)s?", re.IGNORECASE)


def read_splits(dataset, root, clip_root):
    """The VideoDataset of each split that has a list. Raises FileNotFoundError if none has one."""
    splits = {}
    for split in ("train", "validation", "test"):
        try:
            data.read_annotations(dataset, root, split)
        except FileNotFoundError as e:
            print(f"{split}: left out, as {e}")
            continue
        splits[split] = data.VideoDataset(dataset, root, split, clip_root=clip_root)
        print(f"{split}: {len(splits[split])} clips, {len(splits[split].classes)} classes")
    if not splits:
        raise FileNotFoundError(f"--data_root {root} has no list of clips")
    return splits


def find_clips(splits):
    """The path of each clip that exists and the error of each that does not, by id.

    Raises FileNotFoundError if no clip exists.
    """
    paths, missing = {}, {}
    for dataset in splits.values():
        for index, clip in enumerate(dataset.ids.tolist()):
            name = clip + dataset.suffix
            forms = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
            exists = any(os.path.exists(Path(dataset.folder, form)) for form in forms)
            if exists or len(missing) < 20:             # looking for near names takes seconds each
                try:
                    paths[clip] = dataset.path(index)
                except (FileNotFoundError, ValueError) as e:
                    missing[clip] = str(e)
            else:
                missing[clip] = f"{Path(dataset.folder, name).absolute()} does not exist"
    if missing and not paths:
        raise FileNotFoundError(f"none of the {len(missing)} clips exists; the first of them: "
                                f"{next(iter(missing.values()))}")
    return paths, missing


def header_lines(splits, missing):
    """Clips and classes that look like the first line of a list, "id;label", as lines of text."""
    classes = next(iter(splits.values())).classes
    labels = Counter(label for dataset in splits.values() for label in dataset.labels.tolist())
    found = []
    for split, dataset in splits.items():
        for clip, label in zip(dataset.ids.tolist(), dataset.labels.tolist()):
            only_one = label >= 0 and labels[label] == 1
            if clip in missing and (only_one or HEADER_WORD.fullmatch(Path(clip).stem)):
                name = f" of class {classes[label]!r}" if label >= 0 else ""
                found.append(f"clip {clip!r}{name} in {split}, which does not exist")
    for label, name in enumerate(classes):
        words = name.split()
        if all(map(HEADER_WORD.fullmatch, words)) and (labels[label] == 0 or len(words) > 1):
            found.append(f"class {name!r}")
    return [f"{line}; if it is the header of a list, delete it there" for line in found]


def clip_files(path):
    return [Path(path, name) for name in data.frame_names(path)] if path.is_dir() else [path]


def same_clips(splits, paths):
    """Clips that are in two splits, with the same id or the same bytes, as lines of text."""
    found, by_size = [], defaultdict(list)
    for (a, first), (b, second) in combinations(splits.items(), 2):
        for clip in sorted(set(first.ids.tolist()) & set(second.ids.tolist())):
            found.append(f"{clip} is both in {a} and in {b}")
    for split, dataset in splits.items():
        for clip in set(dataset.ids.tolist()) & paths.keys():
            size = sum(file.stat().st_size for file in clip_files(paths[clip]))
            by_size[size].append((split, clip))
    for size, clips in by_size.items():
        if size == 0 or len({split for split, _ in clips}) == 1:
            continue                                    # only equal sizes cost a look at the bytes
        by_bytes = defaultdict(list)
        for split, clip in sorted(clips):
            content = b"".join(file.read_bytes() for file in clip_files(paths[clip]))
            by_bytes[hashlib.sha256(content).digest()].append((split, clip))
        for equal in by_bytes.values():
            a, first = equal[0]
            for b, second in equal[1:]:
                if a != b and first != second:
                    found.append(f"{first} in {a} and {second} in {b} hold the same bytes")
    return found


def unused_files(dataset, splits, root, paths):
    """Files beside the clips that no split lists, or that --dataset folder does not take."""
    known = {str(path) for path in paths.values()}
    if dataset != "folder":
        folder = next(iter(splits.values())).folder.absolute()
        return [str(path) for path in sorted(folder.iterdir())
                if path.name[0] != "." and str(path) not in known]
    found = []
    for split in ("train", "validation", "val", "test"):
        for here, _, files in os.walk(Path(root, split).absolute(), followlinks=True):
            for path in [Path(here, name) for name in sorted(files) if name[0] != "."]:
                if str(path) not in known and path.suffix.lower() not in data.IMAGES:
                    line = remedy(path)
                    found.append(f"{path}; to use it, {line}" if line else str(path))
    return found


def print_some(kind, lines, most=20):
    for line in lines[:most]:
        print(f"{kind:12}{line}")
    if len(lines) > most:
        print(f"{kind:12}... and {len(lines) - most} more")


# ----- python scripts/check_data.py check -----------------------------------

def check(args):
    """Probe the clips of all splits, print what is wrong, write the skip list.

    Returns the number of unreadable clips.
    """
    splits = read_splits(args.dataset, args.data_root, args.clip_root)
    paths, missing = find_clips(splits)
    if any(path.is_file() for path in paths.values()) and not importlib.util.find_spec("decord"):
        raise ValueError("video files are read with decord: pip install decord (ARM and macOS: "
                         "decord2 or eva-decord)")
    open(args.out, "a").close()                         # fail now rather than after hours
    print_some("header?", header_lines(splits, missing))
    print_some("same clip", same_clips(splits, paths))
    print_some("unused", unused_files(args.dataset, splits, args.data_root, paths))

    bad, short = dict(missing), {}
    results = isolated(probe, list(map(str, paths.values())), args.jobs, args.timeout)
    bar = tqdm(results, total=len(paths), unit=" clips", leave=False, disable=None)
    for (clip, path), (readable, text) in zip(paths.items(), bar):
        if not readable:
            bad[clip] = f"{path}: {text}"
        elif text:
            short[clip] = text
    for clip, text in bad.items():
        print(f"unreadable  {clip}: {text}")
    for clip, text in short.items():
        print(f"short       {clip}: {text}; it is used as it is")

    with open(args.out, "w", encoding="utf-8") as f:
        f.write(f"# clips of --dataset {args.dataset} --data_root {args.data_root} that cannot be "
                "read; written by scripts/check_data.py\n")
        f.writelines(f"{clip}  # {text}\n" for clip, text in bad.items())
        f.writelines(f"# short, kept: {clip}  {text}\n" for clip, text in short.items())
    total = len(paths) + len(missing)
    kinds = {"ssv2": "videos (.webm)", "folder": "clips"}
    print(f"{total} {kinds.get(args.dataset, 'frame folders')}: {total - len(bad)} readable, of "
          f"them {len(short)} shorter than they declare; {len(bad)} unreadable, listed in "
          f"{args.out}" + (f" (train.py and evaluate.py: --skip_list {args.out})" if bad else ""))
    return len(bad)


# ----- python scripts/check_data.py show ------------------------------------

def show(out, samples, flags):
    """Draw a contact sheet of training samples: a row each, 8 of its frames, its label above."""
    args = get_args(flags)
    if args.dataset == "toy":
        from scripts.toy_data import make_toy
        make_toy(args.data_root)
    base = load_checkpoint(args.init_from)["model_config"] if args.init_from else None
    dataset, _ = make_datasets(args, model_config(args, base=base))
    order = np.random.default_rng(args.seed).permutation(len(dataset))[:samples]
    size, columns, text, gap = max(96, min(dataset.size, 120)), 8, 22, 3
    sheet = Image.new("RGB", (columns * (size + gap), len(order) * (size + text + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    sharp = dataset.size <= size
    resample = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
    for row, index in enumerate(order):
        video, label, _ = dataset[(0, int(index))]
        top = row * (size + text + gap)
        line = f"{dataset.ids[index]}: {dataset.classes[label]}"
        draw.text((3, top + text / 2 + 1), line, "#222222", font, anchor="lm")
        chosen = np.linspace(0, dataset.num_frames - 1, columns).round().astype(int)
        for column, t in enumerate(chosen):
            frame = Image.fromarray(video[:, t].permute(1, 2, 0).numpy())
            sheet.paste(frame.resize((size, size), resample), (column * (size + gap), top + text))
    sheet.save(out)
    print(f"{out}: {len(order)} training samples of {args.dataset}, frames of "
          f"{dataset.size} x {dataset.size}")


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv[:1] in (["check"], ["show"]) else "check"
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    if command == "show":
        add("--out", default="show.png", help="picture to write")
        add("--samples", type=int, default=12, help="rows of the picture")
        args, flags = p.parse_known_args(argv)
        show(args.out, args.samples, flags)
        return
    add("--dataset", default="toy", choices=data.LAYOUTS, help="see the top of data.py")
    add("--data_root", help="folder of the data set (default: datasets/DATASET)")
    add("--clip_root", help="folder around the clips, if not DATA_ROOT")
    add("--out", default="skip_list.txt", help="skip list to write")
    add("--jobs", type=int, default=cores_per_process(), help="processes that decode clips")
    add("--timeout", type=float, default=60,
        help="seconds after which a decoder counts as hanging; more for long clips, slow disks")
    args = p.parse_args(argv)
    if args.jobs < 1 or args.timeout <= 0:
        raise ValueError(f"--jobs {args.jobs} and --timeout {args.timeout} must be positive")
    args.data_root = args.data_root or f"datasets/{args.dataset}"
    sys.exit(1 if check(args) else 0)


if __name__ == "__main__":
    run_program(main)
