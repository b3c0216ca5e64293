"""Damage clips by the hundred: is each read as ffmpeg reads it, or refused?

    python tests/stress/fuzz.py                             # a few minutes on two cores
    python tests/stress/fuzz.py --videos 100 --frames 0     # fewer of them

Small videos and JPEG and PNG frames are damaged in nine ways. data.read_clip reads each, and the
result is compared with ffmpeg (with Pillow for frames). Then scripts/check_data.py checks them all.
No clip that it calls readable may be refused or differ. Prints a Markdown table:

    as expected    read_clip gives the frames of ffmpeg or Pillow
    refused        read_clip raises its error with the path, or decord crashes or hangs
    different      read_clip gives other frames, or another error
    listed         check_data.py calls the clip unreadable
    wrong          check_data.py calls it readable, but it is refused or different

Exits with 1 if a clip is wrong, and names it after the table. pytest does not collect this file. It
needs decord and the command ffmpeg with its encoders libvpx, libvpx-vp9 and libx264.
"""
import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import data
from scripts.check_data import isolated

# ----- Damage ---------------------------------------------------------------
# Each function takes the bytes of a file, those of another file, and a random generator.

def flipped_bits(raw, other, rng, last=None):
    bits = np.frombuffer(raw, np.uint8).copy()
    places = rng.integers(0, min(len(raw), last or len(raw)), rng.integers(1, 9))
    bits[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
    return bits.tobytes()


def flipped_header(raw, other, rng):
    """Like flipped_bits, but in the first bytes, which describe the rest."""
    return flipped_bits(raw, other, rng, last=400)


def random_bytes(raw, other, rng):
    at, n = rng.integers(len(raw)), rng.integers(1, 200)
    return (raw[:at] + rng.bytes(n) + raw[at + n:])[:len(raw)]


def truncated(raw, other, rng):
    return raw[:rng.integers(len(raw))]


def tail_lost(raw, other, rng):
    return raw[:-rng.integers(1, 41)]


def zeros(raw, other, rng):
    at, n = rng.integers(len(raw)), int(rng.integers(1, len(raw) // 4 + 2))
    return (raw[:at] + bytes(n) + raw[at + n:])[:len(raw)]


def block_lost(raw, other, rng):
    at, n = rng.integers(len(raw)), rng.integers(1, len(raw) // 4 + 2)
    return raw[:at] + raw[at + n:]


def swapped_header(raw, other, rng):
    n = rng.integers(4, 400)
    return other[:n] + raw[n:]


def garbage_after(raw, other, rng):
    return raw + other[rng.integers(len(other)):]


def no_damage(raw, other, rng):
    return raw


DAMAGE = (flipped_bits, flipped_header, random_bytes, truncated, tail_lost, zeros, block_lost,
          swapped_header, garbage_after, no_damage)

# ----- Clips ----------------------------------------------------------------

VIDEOS = {                                              # flags of ffmpeg
    "vp9.webm": "-c:v libvpx-vp9 -b:v 60k",
    "keyframes.webm": "-c:v libvpx-vp9 -b:v 60k -g 5",
    "odd_times.webm": "-vf setpts=N/12/TB+0.07*mod(N*N\\,5)/TB -fps_mode passthrough -b:v 60k",
    "vp8.webm": "-c:v libvpx -b:v 60k",
    "b_frames.mp4": "-c:v libx264 -bf 3 -g 10",
    "index_first.mp4": "-c:v libx264 -bf 2 -movflags faststart",
    "fragments.mp4": "-c:v libx264 -movflags frag_keyframe+empty_moov -g 8",
    "variable_rate.mp4": "-vf select=mod(n\\,5) -fps_mode vfr -c:v libx264 -bf 2 -g 8",
    "b_frames.mkv": "-c:v libx264 -bf 3 -g 6",
}
PICTURES = {"baseline.jpg": "RGB", "progressive.jpg": "RGB", "grey.jpg": "L", "cmyk.jpg": "CMYK",
            "colour.png": "RGB", "palette.png": "P", "alpha.png": "RGBA"}       # modes of Pillow


def whole_videos(folder):
    """Two seconds of a test picture, encoded in each of these ways: {name: bytes}"""
    made = {"clip.webm": (ROOT / "tests" / "clip.webm").read_bytes()}
    source = "-f lavfi -i testsrc2=size=96x64:rate=12:duration=2 -pix_fmt yuv420p".split()
    for name, flags in VIDEOS.items():
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *source, *flags.split(),
                        str(folder / name)], check=True)
        made[name] = (folder / name).read_bytes()
    return made


def whole_pictures():
    """One picture, stored in each of these ways: {name: bytes}"""
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture, made = Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC), {}
    for name, mode in PICTURES.items():
        file, kind = io.BytesIO(), "PNG" if name.endswith("png") else "JPEG"
        picture.convert(mode).save(file, kind, progressive=name == "progressive.jpg")
        made[name] = file.getvalue()
    return made


def make_clips(folder, kind, whole, number, seed):
    """Write clips, and return what was done to each: {path: words}

    A clip is a damaged video file, or a folder of four frames of which the third is damaged.
    """
    names, done = sorted(whole), {}
    for i in range(number):
        rng, damage = np.random.default_rng([seed, i]), DAMAGE[i % len(DAMAGE)]
        name, other = names[rng.integers(len(names))], names[rng.integers(len(names))]
        raw, suffix = damage(whole[name], whole[other], rng), Path(name).suffix
        if kind == "video":
            path = folder / f"video{i}{suffix}"
            path.write_bytes(raw)
        else:
            path = folder / f"frames{i}"
            path.mkdir()
            for frame in (1, 2, 3, 4):
                (path / f"{frame}{suffix}").write_bytes(raw if frame == 3 else whole[name])
        done[path] = f"{kind}, {damage.__name__.replace('_', ' ')}"
    return done

# ----- What comes out -------------------------------------------------------

def compare_with_ffmpeg(path, frames):
    """How the frames of a video differ from ffmpeg's: "" if not at all. frames: uint8 (n, h, w, 3)

    Two versions of ffmpeg may round colours differently. So a frame may be off by 3 of 255 on
    average, as long as no neighbour of it is nearer.
    """
    n, h, w = frames.shape[:3]
    raw = subprocess.run(["ffmpeg", "-nostdin", "-v", "quiet", "-threads", "1", "-i", path,
                          "-fps_mode", "passthrough", "-frames:v", str(n + 1), "-f", "rawvideo",
                          "-pix_fmt", "rgb24", "-"], stdout=subprocess.PIPE).stdout
    if len(raw) != frames.size:
        return f"{n} frames of {w} x {h}, ffmpeg has {len(raw) / (h * w * 3):.2f} of these"
    expected = np.frombuffer(raw, np.uint8).reshape(frames.shape)
    for i, frame in enumerate(frames.astype(np.int16)):
        near = {j: np.abs(frame - expected[j]).mean() for j in (i - 1, i, i + 1) if 0 <= j < n}
        if near[i] > min(3, *near.values()):
            return f"frame {i} of {n} differs by {near[i]:.2f} of 255 on average"
    return ""


def compare_with_pillow(folder, frames):
    try:
        expected = [Image.open(path).convert("RGB") for path in sorted(Path(folder).iterdir())]
    except (OSError, SyntaxError, ValueError) as e:
        return f"Pillow does not read it: {e}"
    return "" if np.array_equal(frames, np.stack(expected)) else "other frames than Pillow's"


def look(path):
    """Read a clip. Returns how it differs from what is expected, or raises read_clip's error."""
    frames = data.read_clip(path, np.arange).permute(0, 2, 3, 1).numpy()
    compare = compare_with_pillow if os.path.isdir(path) else compare_with_ffmpeg
    return compare(path, frames)


def check(root):
    """Run scripts/check_data.py over a data set. Returns the ids that it calls unreadable."""
    skip = root / "skip_list.txt"
    command = [sys.executable, str(ROOT / "scripts" / "check_data.py"), "check", "--dataset",
               "folder", "--data_root", str(root), "--out", str(skip), "--timeout", "300"]
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    listed = data.read_skip_list(skip)
    assert code == bool(listed), f"check_data.py ended with {code} and lists {len(listed)} clips"
    return listed


# ----- The command ----------------------------------------------------------

COLUMNS = ("clips", "as expected", "refused", "different", "listed", "wrong")


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--videos", type=int, default=400, help="videos; a tenth has no damage")
    p.add_argument("--frames", type=int, default=130, help="folders of frames; the same")
    p.add_argument("--seed", type=int, default=0, help="another seed damages other places")
    p.add_argument("--keep", metavar="DIR", help="new folder for the clips, to look into them")
    args = p.parse_args()
    if not shutil.which("ffmpeg"):
        sys.exit("fuzz.py: install the command ffmpeg, which says how a clip is read")

    root = Path(args.keep or tempfile.mkdtemp(prefix="fuzz.")).absolute()
    folder = root / "train" / "something"               # the layout of --dataset folder
    folder.mkdir(parents=True)
    done = make_clips(folder, "video", whole_videos(root), args.videos, args.seed)
    done |= make_clips(folder, "frame", whole_pictures(), args.frames, args.seed)
    listed, counts, wrong = check(root), defaultdict(Counter), []
    for path, (read, text) in zip(done, isolated(look, map(str, done), 2, 300)):
        refused = not read and (str(path) in text or text.startswith("the decoder"))
        outcome = "refused" if refused else "different" if text else "as expected"
        columns = ["clips", outcome]
        if path.relative_to(root).as_posix() in listed:
            columns.append("listed")
        elif outcome != "as expected":
            columns.append("wrong")
            wrong.append(f"{path.name}, {done[path]}: {outcome}: {text}")
        for row in (done[path], f"{done[path].split()[0]} all"):
            counts[row].update(columns)

    print(f"| damage | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for row in sorted(counts):
        print(f"| {row} | {' | '.join(str(counts[row][column]) for column in COLUMNS)} |")
    print("\n".join(["", *wrong]))
    if not args.keep:
        shutil.rmtree(root)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
