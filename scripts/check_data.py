"""Look at a data set before training: which clips are broken, and what does the model see of them?

    python scripts/check_data.py check --dataset ssv2 --data_root DIR   # writes skip_list.txt
    python scripts/check_data.py show --dataset ssv2 --data_root DIR    # writes show.png

check, the default, decodes every frame of every clip, in processes that may crash or
hang. It writes the ids of unreadable clips to a skip list, and then exits with status 1. It also
reports clips that are odd but readable, clips that are in two splits, and files that no split uses.

show takes every flag of train.py, and draws the first samples of training after augmentation.
Random erasing and mixing are not shown, because they follow on the device.

    check   find_clips -> isolated(examine) -> write_skip_list
    show    train.make_datasets -> draw
"""
import argparse
import hashlib
import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import train
from evaluate import positive, run_command
from model import load_checkpoint

# ----- One clip -------------------------------------------------------------

def examine(path):
    """Decode all frames of a clip. Returns a hash of its bytes, and a list of what is odd about it.

    Raises an error if the clip cannot be read.
    """
    odd = []
    if path.is_dir():
        names = data.frame_names(path)
        for name in names:                              # one by one: memory may not hold them all
            data.read_frames(path, [name])
        frames = len(names)
        files = [path / name for name in names]
        first, last = data.frame_number(names[0]), data.frame_number(names[-1])
        missing = last - first + 1 - frames
        if missing > 0:
            odd.append(f"lacks {missing} of the numbers from {names[0]} to {names[-1]}")
        if path.suffix.lower() in data.VIDEOS:
            odd.append("is a folder, but has the name of a video")
    else:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        data.read_clip(path, 1)                         # decodes up to the end, and compares counts
        frames = len(data.open_video(path))
        files = [path]
    if frames == 1:
        odd.append("has only one frame")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest(), odd

# ----- All clips, in processes that may crash or hang -----------------------

def serve(connection, function):
    """A process of `isolated`: it calls function(path) for each path that it receives."""
    connection.send("ready")                            # torch has been imported, which takes long
    try:
        while True:
            path = connection.recv()
            try:
                connection.send((True, function(path)))
            except Exception as e:                      # Pillow and decord raise many kinds
                lines = str(e).splitlines() or [type(e).__name__]
                connection.send((False, lines[0]))
    except (EOFError, KeyboardInterrupt):               # no paths are left, or Ctrl-C
        pass

def isolated(function, paths, jobs, timeout):
    """Call function(path) for every path, in `jobs` processes.

    Yields, in the order of the paths, (True, result), or (False, reason) after an error, a crash or
    a call of more than `timeout` seconds.
    """
    context = multiprocessing.get_context("spawn")
    local = threading.local()                           # each thread has one process at a time

    def call(path):
        if not hasattr(local, "process"):
            local.connection, other = context.Pipe()
            local.process = context.Process(target=serve, args=(other, function), daemon=True)
            local.process.start()
            other.close()                               # so that a crash closes the connection
            local.connection.recv()
        try:
            local.connection.send(path)
            if local.connection.poll(timeout):
                return local.connection.recv()
            problem = f"the decoder did not finish within {timeout} s"
        except (EOFError, OSError):
            problem = "the decoder crashed"
        local.process.kill()
        local.process.join()
        del local.process                               # the next path starts another
        return False, problem

    with ThreadPoolExecutor(jobs) as threads:
        yield from threads.map(call, paths)

# ----- python scripts/check_data.py check -----------------------------------

def find_clips(dataset, root, clip_root):
    """Returns {split: {id: path}}, and {id: error} of the clips that do not exist."""
    splits, missing = {}, {}
    for split in ("train", "validation", "test"):
        try:
            ids, _, classes, source = data.read_annotations(dataset, root, split)
        except FileNotFoundError as e:
            if split == "train":
                raise
            print(f"{split}: not checked, because {e}")
            continue
        print(f"{split}: {len(ids)} clips of {source}, {len(classes)} classes")
        folder = clip_root or root
        _, pattern, suffix = data.LAYOUTS[dataset]
        if pattern:
            folder = data.find_file(folder, pattern)
        splits[split] = {}
        for clip in ids.tolist():
            try:
                splits[split][clip] = data.find_clip(folder, clip + suffix)
            except FileNotFoundError as e:
                missing[clip] = str(e)
    if not any(splits.values()):
        raise FileNotFoundError(f"none of the clips exists; the first: {list(missing.values())[0]}")
    return splits, missing

def unused_files(paths):
    """What is beside the clips, but not used by any split. Lists of clips do not count."""
    found = []
    for folder in sorted({path.parent for path in paths}):
        for path in sorted(folder.iterdir()):
            is_list = path.suffix in (".csv", ".txt", ".json")
            if path not in paths and not is_list and not data.is_hidden(path.name):
                found.append(str(path))
    return found

def report(kind, lines, most=20):
    for line in lines[:most]:
        print(f"{kind:12}{line}")
    if len(lines) > most:
        print(f"{kind:12}... and {len(lines) - most} more")

def write_skip_list(path, unreadable, args):
    """Write {id: reason}, in the form that data.read_skip_list reads."""
    with open(path, "w", encoding="utf-8", errors="replace") as f:
        f.write(f"# Unreadable clips of --dataset {args.dataset} --data_root {args.data_root}, "
                "written by scripts/check_data.py\n")
        for clip, text in unreadable.items():
            f.write(f"# {text}\n{clip}\n")
    # A list cannot hold names that are not UTF-8, begin with #, or have blanks at an end.
    lost = unreadable.keys() - data.read_skip_list(path)
    report("rename", [f"{clip!r}: a skip list cannot hold this name" for clip in sorted(lost)])

def check(args):
    """Report what is wrong, and write the skip list. Returns the number of unreadable clips."""
    splits, unreadable = find_clips(args.dataset, args.data_root, args.clip_root)
    paths = sorted({path for clips in splits.values() for path in clips.values()})
    has_videos = any(path.is_file() for path in paths)
    if has_videos:
        try:
            import decord
        except ImportError as e:
            raise ValueError(f"videos need decord, which cannot be imported ({e}): pip install "
                             "decord, on ARM and macOS decord2 or eva-decord") from e
    open(args.out, "a").close()                         # fail now rather than after hours
    total = len(paths) + len(unreadable)
    results = isolated(examine, paths, args.jobs, args.timeout)
    results = dict(zip(paths, tqdm(results, "reading", len(paths), leave=False, disable=None)))

    odd, same, seen = [], [], {}
    for split, clips in splits.items():
        for clip, path in clips.items():
            readable, result = results[path]
            if not readable:
                unreadable[clip] = result
                continue
            digest, remarks = result
            for remark in remarks:
                odd.append(f"{clip} {remark}")
            first_split, first = seen.setdefault(digest, (split, clip))
            if first_split != split:
                same.append(f"{first} of {first_split} has the same bytes as {clip} of {split}")

    report("unused", unused_files(set(paths)))
    report("same clip", same)
    report("odd", odd)
    report("unreadable", [f"{clip}: {text}" for clip, text in unreadable.items()])
    write_skip_list(args.out, unreadable, args)
    print(f"{total} clips, {len(unreadable)} of them unreadable, see {args.out}")
    if unreadable:
        print(f"train.py and evaluate.py leave them out with --skip_list {args.out}")
    if unreadable and has_videos:
        print("If a player can show a video, this may make it readable: "
              "ffmpeg -i OLD -fps_mode passthrough -pix_fmt yuv420p -an NEW.webm")
    return len(unreadable)

# ----- python scripts/check_data.py show ------------------------------------

def draw(dataset, samples, size=112, text=20, gap=3):
    """A contact sheet. Each row has the label of a sample, and up to 8 of its frames."""
    columns = min(8, dataset.num_frames)
    chosen = np.linspace(0, dataset.num_frames - 1, columns).round().astype(int)
    height = text + size + gap
    sheet = Image.new("RGB", (columns * (size + gap), len(samples) * height), "white")
    canvas = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for row, sample in enumerate(samples):
        video, label, index = dataset[sample]                                   # (3, F, S, S)
        canvas.text((gap, row * height + gap), f"{dataset.ids[index]}: {dataset.classes[label]}",
                    "black", font)
        for column, t in enumerate(chosen):
            frame = Image.fromarray(video[:, t].permute(1, 2, 0).numpy())
            sheet.paste(frame.resize((size, size)), (column * (size + gap), row * height + text))
    return sheet

def show(out, rows, flags):
    args = train.get_args(flags)
    if args.dataset == "toy":
        train.make_toy(args.data_root)
    base = load_checkpoint(args.init_from)["model_config"] if args.init_from else None
    config = train.model_config(args, 1, base)
    dataset, _ = train.make_datasets(args, config.image_size, config.num_frames)
    # The first steps of training, if a step had one clip. So the samples of a clip are together.
    samples = []
    for step in data.step_batches(len(dataset), 1, 0, min(rows, len(dataset)), args.seed,
                                  repeat=args.repeat_aug):
        samples += step
    samples = samples[:rows]
    draw(dataset, samples).save(out)
    print(f"{out}: {len(samples)} training samples of {dataset.source}, frames of "
          f"{dataset.size} x {dataset.size}")

# ----- The command ----------------------------------------------------------

def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    command = "check"
    if argv and argv[0] in ("check", "show"):
        command = argv.pop(0)
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    if command == "show":
        add("--out", default="show.png", help="image to write")
        add("--samples", type=positive, default=12, help="rows of the image")
        args, flags = p.parse_known_args(argv)
        show(args.out, args.samples, flags)
        return
    add("--dataset", default="toy", choices=data.LAYOUTS, help="see the top of data.py")
    add("--data_root", help="folder of the data set (default: datasets/DATASET)")
    add("--clip_root", help="as for train.py")
    add("--out", default="skip_list.txt", help="skip list to write")
    add("--jobs", type=positive, default=data.cores_per_process(), help="clips decoded at once")
    add("--timeout", type=positive, default=60, help="seconds for a clip; raise it for long clips")
    args = p.parse_args(argv)
    args.data_root = args.data_root or f"datasets/{args.dataset}"
    if check(args) > 0:
        sys.exit(1)

if __name__ == "__main__":
    run_command(main)
