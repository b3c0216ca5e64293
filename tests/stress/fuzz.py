"""Damage clips by the hundred: is each read as ffmpeg reads it, or refused?

    python tests/stress/fuzz.py                             # a few minutes on two cores
    python tests/stress/fuzz.py --videos 100 --frames 0     # fewer of them

Small videos and JPEG and PNG frames are damaged in six ways. data.read_clip reads each, and the
result is compared with ffmpeg (with Pillow for frames). Then scripts/check_data.py looks at them.
Prints a Markdown table:

    as expected    read_clip gives the frames of ffmpeg or Pillow
    refused        read_clip raises its error with the path, or decord crashes or hangs
    different      read_clip gives other frames, or another error
    listed         check_data.py calls the clip unreadable
    wrong          check_data.py calls it readable, but it is refused or different

Exits with 1 if a clip is wrong, and names it. pytest does not collect this file. It needs Linux,
decord, and the command ffmpeg with its encoders libvpx, libvpx-vp9 and libx264.
"""
import argparse
import io
import multiprocessing
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

NUM_FRAMES = 16

# ----- Damage ---------------------------------------------------------------
# Each function takes the bytes of a file, those of another file, and a random generator.

def flipped_bits(raw, other, rng, end=None):
    bits = np.frombuffer(raw, np.uint8).copy()
    positions = rng.integers(0, min(len(raw), end or len(raw)), rng.integers(1, 9))
    bits[positions] ^= (1 << rng.integers(0, 8, len(positions))).astype(np.uint8)
    return bits.tobytes()

def flipped_header(raw, other, rng):
    return flipped_bits(raw, other, rng, end=400)

def truncated(raw, other, rng):
    return raw[:rng.integers(len(raw))]

def zeros(raw, other, rng):
    at, n = rng.integers(len(raw)), int(rng.integers(1, len(raw) // 4 + 2))
    return (raw[:at] + bytes(n) + raw[at + n:])[:len(raw)]

def block_lost(raw, other, rng):
    at, n = rng.integers(len(raw)), rng.integers(1, len(raw) // 4 + 2)
    return raw[:at] + raw[at + n:]

def swapped_header(raw, other, rng):
    n = rng.integers(4, 400)
    return other[:n] + raw[n:]

def no_damage(raw, other, rng):
    return raw

DAMAGE = (flipped_bits, flipped_header, truncated, zeros, block_lost, swapped_header, no_damage)

# ----- Clips ----------------------------------------------------------------

VIDEOS = {                                              # flags of ffmpeg
    "vp9.webm": "-c:v libvpx-vp9 -b:v 60k",
    "odd_times.webm": "-vf setpts=N/12/TB+0.07*mod(N*N\\,5)/TB -fps_mode passthrough -b:v 60k",
    "vp8.webm": "-c:v libvpx -b:v 60k",
    "b_frames.mp4": "-c:v libx264 -bf 3 -g 10",
    "variable_rate.mp4": "-vf select=mod(n\\,5) -fps_mode vfr -c:v libx264 -bf 2 -g 8",
    "b_frames.mkv": "-c:v libx264 -bf 3 -g 6",
}
PICTURES = {"colour.jpg": "RGB", "grey.jpg": "L", "cmyk.jpg": "CMYK",           # modes of Pillow
            "colour.png": "RGB", "palette.png": "P", "alpha.png": "RGBA"}

def whole_videos(folder):
    """Two seconds of a test picture, encoded in each of these ways: {name: bytes}"""
    source = "-f lavfi -i testsrc2=size=96x64:rate=12:duration=2 -pix_fmt yuv420p".split()
    made = {}
    for name, flags in VIDEOS.items():
        subprocess.run(["ffmpeg", "-nostdin", "-v", "error", *source, *flags.split(),
                        str(folder / name)], check=True)
        made[name] = (folder / name).read_bytes()
    return made

def whole_pictures(folder):
    """One picture, stored in each of these ways: {name: bytes}"""
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC)
    made = {}
    for name, mode in PICTURES.items():
        file = io.BytesIO()
        picture.convert(mode).save(file, "PNG" if name.endswith("png") else "JPEG")
        made[name] = file.getvalue()
    return made

def make_clips(folder, kind, whole, number, seed):
    """Write clips: damaged videos, or folders of four frames of which the third is damaged.

    Returns what was done to each: {path: words}
    """
    names = sorted(whole)
    done = {}
    for i in range(number):
        rng = np.random.default_rng([seed, i])
        damage = DAMAGE[i % len(DAMAGE)]
        name, other = rng.choice(names, 2)
        raw = damage(whole[name], whole[other], rng)
        suffix = Path(name).suffix
        path = folder / (f"video{i}{suffix}" if kind == "video" else f"frames{i}")
        if kind == "video":
            path.write_bytes(raw)
        else:
            path.mkdir()
            for frame in (1, 2, 3, 4):
                (path / f"{frame}{suffix}").write_bytes(raw if frame == 3 else whole[name])
        done[path] = f"{kind}, {damage.__name__.replace('_', ' ')}"
    return done

# ----- What comes out -------------------------------------------------------

def read_by_ffmpeg(path, h, w):
    """All frames: (n, h, w, 3)"""
    raw = subprocess.run(["ffmpeg", "-nostdin", "-v", "quiet", "-threads", "1", "-i", path,
                          "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
                         stdout=subprocess.PIPE).stdout
    return np.frombuffer(raw[:len(raw) // (h * w * 3) * h * w * 3], np.uint8).reshape(-1, h, w, 3)

def read_by_pillow(folder):
    return np.stack([Image.open(path).convert("RGB") for path in sorted(folder.iterdir())])

def difference(path):
    """How the frames of read_clip differ from those of the other reader: "" if not at all.

    Two versions of ffmpeg may round colours differently. So a frame may be off by 3 of 255 on
    average, as long as no neighbour of it is nearer.
    """
    frames = data.read_clip(path, NUM_FRAMES).permute(0, 2, 3, 1).numpy().astype(np.int16)
    h, w = frames.shape[1:3]
    expected = read_by_pillow(path) if path.is_dir() else read_by_ffmpeg(path, h, w)
    n = len(expected)
    if n == 0:
        return "the other reader has no frames"
    for frame, i in zip(frames, data.sample_indices(n, NUM_FRAMES)):
        near = expected[max(0, i - 1):i + 2]
        distances = np.abs(frame - near).mean(axis=(1, 2, 3))
        distance = np.abs(frame - expected[i]).mean()
        if distance > min(3, *distances):
            return f"frame {i} of {n} differs by {distance:.2f} of 255 on average"
    return ""

def outcome_of(path, seconds=60):
    """Read a clip in a process of its own. Returns its column of the table, and the reason."""
    def look():
        try:
            text = difference(path)
            results.put(("different" if text else "as expected", text))
        except Exception as e:
            refused = isinstance(e, ValueError) and str(path) in str(e)
            results.put(("refused" if refused else "different", f"{type(e).__name__}: {e}"))

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=look)
    process.start()
    process.join(seconds)
    process.kill()
    if results.empty():
        return "refused", "the decoder crashed or hung"
    return results.get()

def check(root):
    """Run scripts/check_data.py over a data set. Returns the ids that it calls unreadable."""
    skip_list = root / "skip_list.txt"
    code = subprocess.run([sys.executable, str(ROOT / "scripts" / "check_data.py"), "check",
                           "--dataset", "folder", "--data_root", str(root), "--out",
                           str(skip_list)], stdout=subprocess.DEVNULL).returncode
    listed = data.read_skip_list(skip_list) if skip_list.is_file() else []
    assert code == bool(listed), f"check_data.py ended with {code} and lists {len(listed)} clips"
    return listed

# ----- The command ----------------------------------------------------------

COLUMNS = ("clips", "as expected", "refused", "different", "listed", "wrong")

def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--videos", type=int, default=400, help="videos; a seventh has no damage")
    p.add_argument("--frames", type=int, default=130, help="folders of frames; the same")
    p.add_argument("--seed", type=int, default=0, help="another seed damages other positions")
    args = p.parse_args()
    counts = defaultdict(Counter)
    wrong = []
    for kind, number, whole in (("video", args.videos, whole_videos),
                                ("frames", args.frames, whole_pictures)):
        with tempfile.TemporaryDirectory(prefix="fuzz.") as root:
            folder = Path(root) / "train" / "something"         # as --dataset folder expects it
            folder.mkdir(parents=True)
            done = make_clips(folder, kind, whole(Path(root)), number, args.seed)
            if not done:
                continue
            listed = check(Path(root))
            for path, words in done.items():
                outcome, reason = outcome_of(path)
                columns = ["clips", outcome]
                if path.relative_to(root).as_posix() in listed:
                    columns.append("listed")
                elif outcome != "as expected":
                    columns.append("wrong")
                    wrong.append(f"{path.name}, {words}: {outcome}: {reason}")
                counts[words].update(columns)
                counts[f"{kind} all"].update(columns)

    print(f"| damage | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for words in sorted(counts):
        print(f"| {words} | {' | '.join(str(counts[words][column]) for column in COLUMNS)} |")
    print("\n".join(["", *wrong]))
    sys.exit(1 if wrong else 0)

if __name__ == "__main__":
    main()
