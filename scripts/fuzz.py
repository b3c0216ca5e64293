"""Damaged clips by the hundred: each is read as ffmpeg (Pillow for JPEG) reads the same bytes, or refused with id, path and reason.

    python scripts/fuzz.py                              # 500 damaged files, made from tests/clip.webm and what ffmpeg can make
    python scripts/fuzz.py --clips DIR                  # real files too: damaged, and as they are

The files lie in data sets of both layouts and go through read_clip, a VideoDataset made for evaluation, `data.py check` and
evaluate.py. Prints a Markdown table, and ends with status 1 if anything was lost or silent: a clip read differently, an error
without its path, a crash that nobody named. Without ffmpeg on this machine there are fewer kinds of files, and those that
are read are only compared with a second reading in another process.
"""
import argparse
import functools
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
from model import build_model

CLASSES = ["Pulling something from left to right", "Pulling something from right to left"]
FFMPEG = shutil.which("ffmpeg")
KEPT = 64                                               # frames of a clip that are compared: all of them, or so many spread over it

# ----------------------------------------------------------------------------------------------------
# Damage: (bytes of a file, bytes of another file, rng) -> bytes
# ----------------------------------------------------------------------------------------------------


def flipped_bits(raw, other, rng, first=0, last=None, most=8):
    """1 to 8 bits anywhere, as a bad memory or disk leaves them."""
    bits = np.frombuffer(raw, np.uint8).copy()
    places = rng.integers(first, min(len(raw), last or len(raw)), rng.integers(1, most + 1))
    bits[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
    return bits.tobytes()


def flipped_header(raw, other, rng):
    """1 to 8 bits of the first 400 bytes, where the containers keep what the rest depends on."""
    return flipped_bits(raw, other, rng, last=400)


def random_bytes(raw, other, rng):
    """A run of up to 200 random bytes in place of the file's own."""
    at, n = rng.integers(0, len(raw)), int(rng.integers(1, 200))
    return (raw[:at] + rng.bytes(n) + raw[at + n:])[:len(raw)]


def truncated(raw, other, rng):
    """Cut off anywhere, as a full disk leaves it."""
    return raw[:rng.integers(0, len(raw))]


def tail_lost(raw, other, rng):
    """The last 1 to 40 bytes are missing."""
    return raw[:-rng.integers(1, 41)]


def zeros(raw, other, rng):
    """Up to a quarter of the file is zeros, as an interrupted download leaves it."""
    at, n = rng.integers(0, len(raw)), int(rng.integers(1, len(raw) // 4 + 2))
    return raw[:at] + bytes(min(n, len(raw) - at)) + raw[at + n:]


def block_lost(raw, other, rng):
    """Up to a quarter of the file is missing from its middle."""
    at, n = rng.integers(0, len(raw)), int(rng.integers(1, len(raw) // 4 + 2))
    return raw[:at] + raw[at + n:]


def swapped_header(raw, other, rng):
    """The first bytes are those of another file."""
    n = int(rng.integers(4, 400))
    return other[:n] + raw[n:]


def garbage_behind(raw, other, rng):
    """Another file's bytes follow the last one."""
    return raw + other[int(rng.integers(0, len(other))):]


DAMAGE = (flipped_bits, flipped_header, random_bytes, truncated, tail_lost, zeros, block_lost, swapped_header, garbage_behind)

# ----------------------------------------------------------------------------------------------------
# Whole files to damage
# ----------------------------------------------------------------------------------------------------


def made_with_ffmpeg(folder):
    """{name: bytes} of small videos, as many kinds as this ffmpeg has encoders for; {} without ffmpeg."""
    kinds = {"vp9.webm": "-c:v libvpx-vp9 -b:v 60k", "vp9_keyframes.webm": "-c:v libvpx-vp9 -b:v 60k -g 5", "vp8.webm": "-c:v libvpx -b:v 60k",
             "vp9_odd_times.webm": "-vf setpts='N/12/TB+0.07*mod(N*N\\,5)/TB' -fps_mode passthrough -c:v libvpx-vp9 -b:v 60k",
             "h264_b_frames.mp4": "-c:v libx264 -bf 3 -g 10", "h264_index_first.mp4": "-c:v libx264 -bf 2 -movflags faststart",
             "h264_b_frames.mkv": "-c:v libx264 -bf 3 -g 6", "h264_variable_rate.mp4": "-vf select='mod(N\\,5)' -fps_mode vfr -c:v libx264 -bf 2 -g 8",
             "h264_fragments.mp4": "-c:v libx264 -movflags frag_keyframe+empty_moov -g 8"}
    made = {}
    for name, flags in kinds.items() if FFMPEG else ():
        flags = [flag.replace("'", "") for flag in flags.split()]
        source = ["-f", "lavfi", "-i", "testsrc2=size=96x64:rate=12:duration=2"]
        done = subprocess.run([FFMPEG, "-nostdin", "-v", "error", *source, "-pix_fmt", "yuv420p", *flags, str(folder / name)], capture_output=True)
        if done.returncode == 0:                        # else this ffmpeg lacks the encoder
            made[name] = (folder / name).read_bytes()
    return made


def pictures():
    """{name: bytes} of one frame in every way that a frame may be stored."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6                                  # orientation: a quarter turn
    ways = {"baseline.jpg": (colour, dict(quality=90)), "progressive.jpg": (colour, dict(progressive=True)), "grey.jpg": (colour.convert("L"), {}),
            "cmyk.jpg": (colour.convert("CMYK"), {}), "turned.jpg": (colour, dict(exif=turned)), "colour.png": (colour, {}),
            "palette.png": (colour.convert("P"), {}), "alpha.png": (colour.convert("RGBA"), {})}
    made = {}
    for name, (picture, options) in ways.items():
        file = io.BytesIO()
        picture.save(file, "PNG" if name.endswith("png") else "JPEG", **options)
        made[name] = file.getvalue()
    return made


def odd_pictures():
    """{name: bytes} of files that are no 8-bit JPEG or PNG, or hardly one."""
    good = pictures()
    deep, gif, bomb = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20).save(deep, "PNG")
    Image.new("RGB", (64, 48), "red").save(gif, "GIF")
    Image.new("1", (20000, 20000)).save(bomb, "PNG")
    return {"16-bit.png": deep.getvalue(), "a GIF.jpg": gif.getvalue(), "decompression bomb.png": bomb.getvalue(), "no bytes.jpg": b"",
            "a PNG.jpg": good["colour.png"], "without its end mark.jpg": good["baseline.jpg"][:-2], "a video.jpg": (ROOT / "tests" / "clip.webm").read_bytes()}


# ----------------------------------------------------------------------------------------------------
# What should come out, and what does. These run in child processes, which a decoder may take with it
# ----------------------------------------------------------------------------------------------------


def spread(n):
    return np.arange(n) if n <= KEPT else np.linspace(0, n - 1, KEPT).round().astype(int)


def compare_with_ffmpeg(path, frames, n):
    """"" where frames spread(n) of `path` are ffmpeg's, else what differs. frames: uint8 (kept, h, w, 3).

    Equal to the bit. Two versions of ffmpeg round colours differently where a side is odd or values have 10 bits, so there
    a frame may be off by 3 of 255 on average, as long as no neighbour of it is nearer.
    """
    h, w = frames.shape[1:3]
    process = subprocess.Popen([FFMPEG, "-nostdin", "-v", "error", "-threads", "1", "-i", path, "-fps_mode", "passthrough", "-frames:v", str(n + 1),
                                "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    kept, seen, wanted = {}, 0, set(spread(n).tolist())
    with process:
        while len(raw := process.stdout.read(h * w * 3)) == h * w * 3:
            if any(seen + d in wanted for d in (-1, 0, 1)):
                kept[seen] = np.frombuffer(raw, np.uint8).reshape(h, w, 3)
            seen += 1
    if seen != n or raw:
        return f"{n} frames of {w} x {h}, ffmpeg has {seen}" + (" and a part of one, so another size" if raw else "")
    for k, frame in zip(spread(n).tolist(), frames):
        if not (frame == kept[k]).all():
            off = {i: np.abs(frame.astype(np.int16) - kept[i]).mean() for i in (k - 1, k, k + 1) if i in kept}
            if off[k] > 3 or off[k] > min(off.values()):
                return f"frame {k} of {n} differs from ffmpeg's by {off[k]:.2f} of 255 on average"
    return ""


def ffmpeg_has_no_complaint(path):
    done = subprocess.run([FFMPEG, "-nostdin", "-v", "error", "-i", path, "-frames:v", "500", "-f", "rawvideo", "-pix_fmt", "rgb24", "-y", "/dev/null"],
                          capture_output=True, timeout=60)
    return done.returncode == 0 and not done.stderr


def pillow_frames(path):
    """Every picture of a folder as Pillow reads it, upright, or None where it reads one of them not at all."""
    try:
        return np.stack([np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(p.read_bytes()))).convert("RGB")) for p in sorted(Path(path).iterdir())])
    except Exception:
        return None


@functools.cache
def dataset_of(root):
    layout = "ssv2" if (Path(root) / "20bn-something-something-v2").is_dir() else "ssv1"
    return data.VideoDataset(layout, root, "validation", num_frames=4, size=32, crops=3)


def look(path):
    """How one clip is read: (outcome, what is wrong with that, CRC of the frames); nothing is wrong with "read" or "refused" as such."""
    def attempt(read):
        try:
            return read()
        except data.ClipError as e:
            return str(e)

    count = []

    def choose(n):
        count.append(n)
        return spread(n)

    dataset = dataset_of(str(Path(path).parent.parent))
    clip = Path(path).stem if dataset.suffix else Path(path).name
    video = attempt(lambda: data.read_clip(path, choose))
    sample = attempt(lambda: dataset[dataset.ids.tolist().index(clip.encode())])
    if isinstance(video, str) != isinstance(sample, str):
        return "differs", f"{path}: read_clip and the data set disagree: {video if isinstance(video, str) else sample}", 0
    if isinstance(video, str):
        named = path in video and path in sample and f"clip {clip}:" in sample and "\n" not in video + sample
        return "refused", "" if named else f"{path}: an error without id, path or reason: {sample}", 0
    frames, n = video.permute(0, 2, 3, 1).numpy(), count[-1]
    if n <= KEPT and not torch.equal(sample[0], data.eval_views(video[data.eval_indices(n, 4)], 4, 32, 3)):
        return "differs", f"{path}: the data set has other frames than read_clip", 0
    if dataset.suffix:
        wrong = compare_with_ffmpeg(path, frames, n) if FFMPEG else ""
    else:
        expected = pillow_frames(path)
        wrong = "" if expected is not None and np.array_equal(expected, frames) else "not what Pillow reads"
    return "differs" if wrong else "read", f"{path}: {wrong}" if wrong else "", zlib.crc32(frames.tobytes())


# ----------------------------------------------------------------------------------------------------
# The whole of it
# ----------------------------------------------------------------------------------------------------


def write_set(root, layout, ids):
    """A data set whose clips lie there already: annotation files, all clips in its validation split."""
    name = f"something-something-v{layout[-1]}-"
    if layout == "ssv2":
        (root / f"{name}labels.json").write_text(json.dumps({c: str(i) for i, c in enumerate(CLASSES)}))
        (root / f"{name}validation.json").write_text(json.dumps([dict(id=i, template=CLASSES[0]) for i in ids]))
    else:
        (root / f"{name}labels.csv").write_text("".join(c + "\n" for c in CLASSES))
        (root / f"{name}validation.csv").write_text("".join(f"{i};{CLASSES[0]}\n" for i in ids))


def make_videos(root, files, seed, seeds, oddities):
    """Write <number>.webm into a data set in V2's layout; returns {id: fault}. seeds, oddities: {name: bytes}."""
    folder, faults = root / "20bn-something-something-v2", {}
    folder.mkdir(parents=True)
    names = sorted(seeds)
    for number in range(files):
        rng = np.random.default_rng([seed, number])
        damage = DAMAGE[number % len(DAMAGE)]
        raw, other = (seeds[names[int(rng.integers(len(names)))]] for _ in range(2))
        (folder / f"{number}.webm").write_bytes(damage(raw, other, rng))
        faults[str(number)] = f"video, {damage.__name__.replace('_', ' ')}"
    for number, (name, raw) in enumerate({**seeds, **oddities}.items(), files):
        (folder / f"{number}.webm").write_bytes(raw)
        faults[str(number)] = "video as it is, renamed to .webm"
    write_set(root, "ssv2", faults)
    return faults


def make_folders(root, files, seed):
    """The same in V1's layout, four frames each: the third is damaged, or all are of one odd kind."""
    folder, faults, seeds = root / "20bn-something-something-v1", {}, pictures()
    folder.mkdir(parents=True)

    def write(clip, raws, end):
        (folder / clip).mkdir()
        for i, raw in enumerate(raws, 1):
            (folder / clip / f"{i:05d}.{end}").write_bytes(raw)

    names = sorted(seeds)
    for number in range(files):
        rng = np.random.default_rng([seed, 1, number])
        damage = DAMAGE[number % len(DAMAGE)]
        name, other = (names[int(rng.integers(len(names)))] for _ in range(2))
        write(str(number), [seeds[name]] * 2 + [damage(seeds[name], seeds[other], rng), seeds[name]], name[-3:])
        faults[str(number)] = f"frame, {damage.__name__.replace('_', ' ')}"
    for number, (name, raw) in enumerate({**seeds, **odd_pictures()}.items(), files):
        write(str(number), [raw] * 4, name[-3:])
        faults[str(number)] = "frame as it is, odd kinds"
    write_set(root, "ssv1", faults)
    return faults


def command(*words):
    """Runs a command of this repository; (exit status, what it printed, what it complained of)."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, errors="replace")
    return done.returncode, done.stdout, done.stderr


def read_all(layout, paths, faults, jobs, timeout):
    """Rows of what read_clip and VideoDataset make of each clip, a line for each thing that is wrong, and the ids that are refused."""
    found, wrong, refused = defaultdict(Counter), defaultdict(list), set()
    results = list(data.isolated(look, paths.values(), jobs, timeout))
    again = list(data.isolated(look, paths.values(), jobs, timeout)) if not FFMPEG and layout == "ssv2" else results
    for (clip, path), (survived, value), second in zip(paths.items(), results, again):
        outcome, problem, _ = value if survived else ("crashed", "" if path in value else value, 0)
        if (survived, value) != second and {outcome, second[1][0]} != {"read", "refused"}:       # to refuse it once is not wrong
            problem = f"{path}: read in two ways"
        if outcome in ("refused", "crashed"):
            refused.add(clip)
        if outcome == "refused" and FFMPEG and layout == "ssv2" and ffmpeg_has_no_complaint(path):
            found[faults[clip]]["spared"] += 1
        found[faults[clip]][outcome] += 1
        if problem:
            wrong[faults[clip]].append(problem)
    rows = []
    reader = "Pillow" if layout == "ssv1" else "ffmpeg" if FFMPEG else "itself a second time (no ffmpeg here)"
    for fault in sorted(found):
        c = found[fault]
        text = f"{c['read']} read as by {reader}, {c['refused']} refused with id, path and reason"
        text += f" ({c['spared']} of them ffmpeg reads without complaint)" if c["spared"] else ""
        text += f", {c['crashed']} crashed or hung a decoder and are named" if c["crashed"] else ""
        rows.append((fault, c.total() - c["spared"], text, len(wrong[fault])))
    return rows, sum(wrong.values(), []), refused


def run_commands(root, layout, paths, refused, jobs, timeout):
    """Rows of `data.py check`, which should list what is refused, and of evaluate.py without and with its skip list; lines for what is wrong."""
    rows, wrong = [], []
    skip = root / "skip_list.txt"
    code, printed, complaint = command("data.py", "check", "--dataset", layout, "--data_root", root, "--out", skip, "--jobs", jobs, "--timeout", timeout)
    listed = data.read_skip_list(skip) if skip.is_file() else set()
    lost = len(refused ^ listed) + (code != (1 if listed else 0))
    rows.append((f"`data.py check` on all of these ({layout})", len(paths), f"{len(listed)} listed with path and reason, "
                 f"{len(re.findall('^short ', printed, re.M))} read but shorter than they declare", lost))
    for clip in refused ^ listed:
        wrong.append(f"{paths[clip]}: {'only the reader refuses it' if clip in refused else 'only check lists it'}")

    torch.manual_seed(0)
    model = build_model("tiny", dim=32, depth=2, heads=2, num_frames=4, image_size=32, patch_size=8, num_classes=2)
    torch.save(dict(model=model.state_dict(), model_config=asdict(model.config), classes=CLASSES, mean=list(data.CLIP_MEAN), std=list(data.CLIP_STD),
                    args=dict(dataset=layout, data_root=str(root), control="none")), root / "model.pt")
    evaluation = ("evaluate.py", "--ckpt", root / "model.pt", "--device", "cpu", "--workers", 1, "--timeout", timeout)
    code, printed, complaint = command(*evaluation)
    named = [clip for clip in refused if re.search(rf"\bclip {clip}\b", complaint) and paths[clip] in complaint]
    rows.append((f"evaluate.py on all of these ({layout})", 1, "stops and names a clip with path and reason" if named else "no such clip: it ends well",
                 int((code == 0) == bool(refused) or bool(refused) and not named)))
    code, printed, complaint = command(*evaluation, "--skip_list", skip)
    counted = re.search(r"clips (\d+) views", printed)
    right = code == 0 and counted and int(counted[1]) == len(paths)
    rows.append((f"evaluate.py with the skip list of check ({layout})", 1, f"every clip counts once, {len(listed)} of {len(paths)} as wrong" if right else complaint[-200:], int(not right)))
    if not right:
        wrong.append(complaint[-500:])
    return rows, wrong


def run(folder, files=500, seed=0, clips=None, jobs=2, timeout=60, commands=True):
    """Damage `files` files in the new `folder` and try them all; commands=False leaves out check and evaluate.py.

    Returns rows (fault, tried, outcome, bad) and a line for every bad one.
    """
    folder = Path(folder)
    (folder / "made").mkdir(parents=True)
    seeds, oddities = {"clip.webm": (ROOT / "tests" / "clip.webm").read_bytes(), **made_with_ffmpeg(folder / "made")}, {}
    for path in sorted(Path(clips).iterdir()) if clips else ():
        if path.is_file() and path.suffix != ".md":
            oddities[path.name] = path.read_bytes()
    real = [(folder / "made" / name, raw) for name, raw in oddities.items() if 0 < len(raw) < 100_000]
    for path, raw in real:
        path.write_bytes(raw)
    for (path, raw), (readable, _) in zip(real, data.isolated(data.probe, [str(path) for path, _ in real], jobs, timeout)):
        if readable:                                    # a whole file of a kind that we read: worth damaging
            seeds[path.name] = oddities.pop(path.name)
    rows, wrong = [], []
    for root, layout, faults in ((folder / "videos", "ssv2", make_videos(folder / "videos", files - files // 4, seed, seeds, oddities)),
                                 (folder / "frames", "ssv1", make_folders(folder / "frames", files // 4, seed))):
        paths = {clip: str(root / f"20bn-something-something-v{layout[-1]}" / clip) + (".webm" if layout == "ssv2" else "") for clip in faults}
        more, lines, refused = read_all(layout, paths, faults, jobs, timeout)
        rows, wrong = rows + more, wrong + lines
        if commands:
            more, lines = run_commands(root, layout, paths, refused, jobs, timeout)
            rows, wrong = rows + more, wrong + lines
    return rows, wrong


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--files", type=int, default=500, help="damaged files; a quarter of them are frames, the others videos")
    p.add_argument("--seed", type=int, default=0, help="another seed damages other places")
    p.add_argument("--clips", metavar="DIR", help="a folder of real videos, to be tried as they are and, if small, damaged")
    p.add_argument("--keep", metavar="DIR", help="a new folder for the damaged files, to look into them (default: they are deleted)")
    p.add_argument("--jobs", type=int, default=2, help="processes that decode side by side")
    args = p.parse_args()
    if not FFMPEG:
        print("ffmpeg is not installed: files that are read are only compared with a second reading")
    with tempfile.TemporaryDirectory() as temporary:
        rows, wrong = run(Path(args.keep or temporary) / "fuzz", args.files, args.seed, args.clips, args.jobs)
    print("| fault | tried | outcome | lost or silent |\n|---|---|---|---|")
    for fault, tried, outcome, bad in rows:
        print(f"| {fault} | {tried} | {outcome} | {bad} |")
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if any(bad for *_, bad in rows) else 0)


if __name__ == "__main__":
    main()
