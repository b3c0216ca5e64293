"""Break training runs on purpose: is anything lost, or does anything go wrong without a word?

    python scripts/faults.py                              # everything, at most a quarter of an hour on two cores
    python scripts/faults.py --only kill --kills 5        # one kind of fault
    python scripts/faults.py --out faults.md              # the table to a file too

Small toy runs are killed, stopped, starved of disk and given broken files, then compared bit for bit with runs that nothing
happened to. Prints a Markdown table, one row per fault, with what was counted in this run; exits with 1 when anything was lost or
silent. Each function yields rows (fault, tried, outcome, bad): bad is the number of lost or silent ones. Linux, CPU.
"""
import argparse
import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import evaluate
import train

TIMING = ("clips_per_s", "data_wait", "memory_gib")     # of a log row; they differ from run to run
# 8 steps an epoch; log rows every 3 steps and at the end of an epoch, last.pt about every third step
SMALL = ("--num_frames 4 --image_size 16 --depth 2 --batch_size 8 --epochs 6 --warmup_epochs 1 --log_every 3 --save_minutes 0.005 "
         "--mixup 0.8 --drop_path 0.1 --ctm_dropout 0.1 --workers 1 --timeout 60 --device cpu").split()
STEPS_PER_EPOCH = 8

# ----------------------------------------------------------------------------------------------------
# Runs, and what is left of them
# ----------------------------------------------------------------------------------------------------


def toy(folder):
    """64 training and 64 validation clips of the toy data; made once."""
    with contextlib.redirect_stdout(io.StringIO()):
        data.make_toy(folder / "toy", train=8 * STEPS_PER_EPOCH, validation=64)
    return folder / "toy"


def command(folder, out, *flags):
    return [str(ROOT / "train.py"), *SMALL, "--data_root", str(toy(folder)), "--out_dir", str(out), *map(str, flags)]


def start(arguments, **options):
    """One Python process on one thread, in a process group of its own; what it prints is in the file process.printed."""
    printed = tempfile.NamedTemporaryFile("w+", suffix=".txt", delete=False)
    env = {**os.environ, "LOCAL_WORLD_SIZE": str(os.cpu_count()), "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    process = subprocess.Popen([sys.executable, *arguments], stdout=printed, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True, **options)
    process.printed = Path(printed.name)
    return process


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_two_ranks(arguments):
    """What torchrun --nproc_per_node=2 starts, without its agent."""
    common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    return [start(arguments, env=dict(common, RANK=str(r), LOCAL_RANK=str(r))) for r in range(2)]


def finish(*processes, seconds=180):
    """Wait for them; returns the exit code of the first and what it printed. What takes longer is killed; its code is None."""
    code, until = None, time.time() + seconds
    try:
        for p in processes:
            p.wait(max(0.0, until - time.time()))
        code = processes[0].returncode
    except subprocess.TimeoutExpired:
        pass
    finally:
        for p in processes:
            p.kill()
            p.wait()
    return code, processes[0].printed.read_text() + ("" if code is not None else f"\n(hung: killed after {seconds} s)")


def succeed(*processes):
    code, printed = finish(*processes)
    assert code == 0, printed[-3000:]
    return printed


def processes(**wanted):
    """Ids of the processes with this parent= or in this group=, from /proc (fields 4 and 5 of stat)."""
    (what, number), = wanted.items()
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):              # it may end meanwhile
            if int(stat.read_text().rsplit(")", 1)[1].split()[{"parent": 1, "group": 2}[what]]) == number:
                found.append(int(stat.parent.name))
    return found


def rows_of_log(out):
    """The whole lines of log.jsonl without what is measured by the clock."""
    text = (out / "log.jsonl").read_text() if (out / "log.jsonl").is_file() else ""
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in text.splitlines() if line.endswith("}")]


def same(a, b):
    """Equal to the last bit, through dicts and lists of tensors."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(out, expected):
    """What of a finished run is not as in the undisturbed one: entries of last.pt and best.pt, the log. [] is what we want."""
    found = []
    for name in ("last.pt", "best.pt"):
        a, b = evaluate.load_checkpoint(out / name), evaluate.load_checkpoint(expected / name)
        found += [f"{name}: {k}" for k in a.keys() | b.keys() if k != "args" and not same(a.get(k), b.get(k))]
    if rows_of_log(out) != rows_of_log(expected):
        found.append("log.jsonl")
    return found + [f.name for f in out.glob("*.tmp")]


def changes(path):
    """A sign that becomes true when the file is written (again)."""
    def stamp():
        try:
            return path.stat().st_mtime_ns
        except OSError:
            return None
    before = stamp()
    return lambda: stamp() not in (None, before)


def epoch_logged(out):
    """A sign that becomes true with the row of an epoch's last step, just before its validation."""
    def last():
        rows = [r for r in rows_of_log(out) if r["kind"] == "train" and r["step"] % STEPS_PER_EPOCH == 0]
        return rows[-1]["step"] if rows else 0
    before = last()
    return lambda: last() > before


def wait_for(sign, process, seconds=120):
    """Poll until the sign is true (returns True) or the process has ended (returns False)."""
    until = time.time() + seconds
    while process.poll() is None and time.time() < until:
        if sign():
            return True
        time.sleep(0.0005)
    return False


def undisturbed(folder, ranks=1):
    """The run that all others are compared with; made once per number of ranks."""
    out = folder / f"undisturbed{ranks}"
    if not out.exists():
        succeed(*(start_two_ranks(command(folder, out)) if ranks == 2 else [start(command(folder, out))]))
    return out


def one_line(code, printed, *words):
    """Whether a program failed as it should: exit code not 0, one line on its error, no traceback, the words in it."""
    last = (printed.strip().splitlines() or [""])[-1]
    return code not in (0, None) and "Traceback" not in printed and printed.count(": error") == 0 and \
        last.startswith(("train.py: ", "evaluate.py: ", "data.py: ")) and all(str(w) in last for w in words)


# ----------------------------------------------------------------------------------------------------
# Killed and stopped
# ----------------------------------------------------------------------------------------------------

MOMENTS = ("write", "anywhere", "step", "validation", "write", "log line", "best and last", "write")


def kill_once(process, out, moment, rng):
    """SIGKILL at a moment of a run, in the first turn of which it comes; returns whether it was still running."""
    last = changes(out / "last.pt")
    if moment == "anywhere":                            # from the start of Python on; often before the first step
        time.sleep(rng.uniform(0, 6))
    elif moment == "step":
        wait_for(last, process)
        time.sleep(rng.uniform(0, 0.5))
    elif moment == "write":                             # the second one, so that each attempt gets further
        wait_for(last, process)
        wait_for(lambda: os.path.exists(out / "last.pt.tmp") or os.path.exists(out / "best.pt.tmp"), process)
    elif moment == "log line":                          # its checkpoint comes later
        wait_for(last, process)
        wait_for(changes(out / "log.jsonl"), process)
    elif moment == "validation":                        # the row of the epoch's last step is written just before
        wait_for(epoch_logged(out), process)
        time.sleep(rng.uniform(0, 0.05))
    elif moment == "best and last":
        wait_for(changes(out / "best.pt"), process)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def kill_and_resume(folder, kills=24, seed=0):
    """SIGKILL a run in turn at each of MOMENTS, start it again with --resume until it is done, compare. New runs until `kills` are spent."""
    expected, rng = undisturbed(folder), random.Random(seed)
    counts, in_write, runs, found, workers = dict.fromkeys(MOMENTS, 0), 0, 0, [], []
    while sum(counts.values()) < kills:
        out, runs = folder / f"killed{runs}", runs + 1
        while True:
            process = start(command(folder, out, *(["--resume"] if (out / "config.json").is_file() else [])))
            killed, moment = sum(counts.values()), MOMENTS[sum(counts.values()) % len(MOMENTS)]
            if killed < kills and kill_once(process, out, moment, rng):
                counts[moment] += 1
                in_write += any(out.glob("*.pt.tmp"))
            else:
                code, printed = finish(process)
                found += differences(out, expected) if code == 0 else [f"run {runs} does not go on: {printed[-300:]}"]
                break
            workers += [p for p in processes(group=process.pid) if p != process.pid]       # start() made the group; its leader is dead
        shutil.rmtree(out)
    until = time.time() + 30                            # a worker looks for its parent every five seconds
    while (alive := [p for p in workers if is_training(p)]) and time.time() < until:
        time.sleep(0.5)
    found += [f"data worker {p} lives on" for p in alive]
    yield (f"SIGKILL, started again with `--resume` ({', '.join(f'{m} {n}' for m, n in counts.items())})", sum(counts.values()),
           f"{in_write} fell into the writing of a checkpoint; {runs} runs ended with the weights, optimizer and log of the undisturbed one: "
           f"{len(found)} differences; {len(workers)} orphaned data workers, {len(alive)} still there" + told(found), len(found))


def is_training(pid):
    try:
        return b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def told(found):
    return ": " + "; ".join(" ".join(f.split()) for f in found) if found else ""


def kill_a_rank(folder, kills=4, seed=0, standalone=False):
    """torchrun with two ranks and --max_restarts; one rank, drawn at random, gets SIGKILL, `kills` times. Nobody starts anything again."""
    expected, out, rng = undisturbed(folder, ranks=2), folder / f"rank_killed{standalone}", random.Random(seed)
    meeting = "--standalone" if standalone else f"--master_port={free_port()}"
    agent = start(["-m", "torch.distributed.run", "--nproc_per_node=2", meeting, f"--max_restarts={kills + 2}", *command(folder, out)])
    killed, seen = 0, set()
    while killed < kills:
        sign = changes(out / "last.pt")
        if not wait_for(lambda: len([c for c in processes(parent=agent.pid) if c not in seen and is_training(c)]) == 2 and sign(), agent):
            break
        time.sleep(rng.uniform(0, 0.3))
        ranks = [c for c in processes(parent=agent.pid) if c not in seen and is_training(c)]
        if len(ranks) == 2:
            os.kill(rng.choice(ranks), signal.SIGKILL)
            seen |= set(ranks)
            killed += 1
    code, printed = finish(agent)
    reasons = [line for line in printed.splitlines() if "train.py: " in line or re.match(r"(\[rank\d\]: )?[\w.]*Error", line)]
    found = [f"torchrun ended with {code}: {' | '.join(reasons)}"] if code != 0 else differences(out, expected)
    yield (f"SIGKILL of one of two ranks under `torchrun{' --standalone' * standalone} --max_restarts={kills + 2}`", killed,
           f"went on by itself each time; {len(found)} differences from the undisturbed run" + told(found), len(found) + (killed < kills))


def sigterm(folder, times=3, seed=0):
    """SIGTERM to one of two ranks in training, and to both in a validation: one step, saved, left at once, resumed exactly."""
    expected, rng, found, slowest, in_validation, stops = undisturbed(folder, ranks=2), random.Random(seed), [], 0.0, 0, []
    out = folder / "stopped"
    for i in range(times):
        ranks = start_two_ranks(command(folder, out, *(["--resume"] if i else [])))
        wait_for(epoch_logged(out) if i % 2 else changes(out / "last.pt"), ranks[0])
        for p in ranks if i % 2 else [rng.choice(ranks)]:
            p.send_signal(signal.SIGTERM)
        before = time.time()
        code, printed = finish(*ranks, seconds=60)
        slowest = max(slowest, time.time() - before)
        checkpoint = evaluate.load_checkpoint(out / "last.pt")
        stops.append(checkpoint["step"])
        in_validation += checkpoint["step"] % STEPS_PER_EPOCH == 0 and checkpoint["validated"] < checkpoint["step"]
        if [p.returncode for p in ranks] != [0, 0] or f"stopped after step {checkpoint['step']} of" not in printed:
            found.append(f"exit codes {[p.returncode for p in ranks]}: {printed[-300:]}")
    succeed(*start_two_ranks(command(folder, out, "--resume")))
    found += differences(out, expected)
    yield ("SIGTERM to one of two ranks in training, to both in a validation", times,
           f"both left within {slowest:.1f} s, after steps {', '.join(map(str, stops))} ({in_validation} of these in a validation); {len(found)} differences after the resume" + told(found),
           len(found) + (slowest > 20))


# ----------------------------------------------------------------------------------------------------
# The disk
# ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, size):
    """A tmpfs of so many bytes. Raises PermissionError where mounting is not allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True).returncode:
        raise PermissionError("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def begun(folder, out):
    """A run that was stopped in its first epoch, and so has no best.pt yet; returns its last.pt and that file's bytes."""
    succeed(start(command(folder, out, "--max_steps", "6", "--workers", "0", "--save_minutes", "60")))
    return out / "last.pt", (out / "last.pt").read_bytes()


def broken_write(folder, out, name, last, whole, **options):
    """Go on with a run that cannot write; yields the row: one line that names the out_dir, the earlier checkpoint whole, nothing half-written."""
    code, printed = finish(start(command(folder, out, "--resume", "--workers", "0", "--save_minutes", "60"), **options))
    bad = not one_line(code, printed, out, "could not be written") or last.read_bytes() != whole or any(out.glob("*.tmp"))
    yield (name, 1, "went wrong: " + " ".join(printed[-300:].split()) if bad else "one line names the file, exit code 1, the earlier last.pt is whole, no .tmp is left", int(bad))


def file_size_limit(folder):
    """A limit on the size of files (RLIMIT_FSIZE) stands in for a full disk where nothing can be mounted: writes fail half way."""
    out = folder / "limited"
    last, whole = begun(folder, out)
    limit = len(whole) // 2
    yield from broken_write(folder, out, "no file may become larger than half a checkpoint (RLIMIT_FSIZE)", last, whole,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))


def full_disk(folder):
    """A disk with room for two checkpoints (best.pt, last.pt) but not for writing one anew beside them, then one without a free byte, then one that is read-only; each run goes on when there is room."""
    try:
        size = len(begun(folder, folder / "measure")[1])
        shutil.rmtree(folder / "measure")
        with small_disk(folder / "disk", int(2.6 * size)) as disk:
            out = disk / "run"
            last, whole = begun(folder, out)
            yield from broken_write(folder, out, "disk with room for two checkpoints and a half (three are needed)", last, whole)
            with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as f:
                while True:
                    f.write(bytes(4096))
            yield from broken_write(folder, out, "disk without a free byte", last, whole)
            (disk / "filler").unlink()
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            yield from broken_write(folder, out, "disk that is read-only", last, whole)
            subprocess.run(["mount", "-o", "remount,rw,size=100m", str(disk)], check=True)
            succeed(start(command(folder, out, "--resume", "--workers", "0")))
            found = differences(out, undisturbed(folder))
            yield ("after the three small disks above, with room again: `--resume`", 1, f"{len(found)} differences from the undisturbed run" + told(found), len(found))
    except PermissionError as e:
        yield ("full and read-only disks", 0, f"not tried, {e}", 0)


def deleted_folder(folder):
    """Somebody deletes the out_dir of a run."""
    out = folder / "deleted"
    process = start(command(folder, out, "--epochs", "1000", "--workers", "0"))
    wait_for(changes(out / "log.jsonl"), process)
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)              # it may have written in between
    code, printed = finish(process)
    bad = not one_line(code, printed, out, "could not be written")
    yield ("out_dir deleted under a run", 1, "went wrong: " + " ".join(printed[-300:].split()) if bad else "one line says that the folder is gone, exit code 1", int(bad))


# ----------------------------------------------------------------------------------------------------
# Checkpoints that are none
# ----------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled by a careless program, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def foreign_files(folder, checkpoint):
    """{what it is: path} of files that are no checkpoint of ours; `checkpoint` is a whole one. Bombs would create folder/exploded."""
    folder.mkdir()
    bomb = Bomb(str(folder / "exploded"))

    def without(*names):
        return lambda path: torch.save({k: v for k, v in checkpoint.items() if k not in names}, path)

    makers = {
        "empty": lambda path: path.touch(),
        "folder": lambda path: path.mkdir(),
        "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),         # a clone without Git LFS
        "numpy array": lambda path: np.save(open(path, "wb"), np.zeros(9)),
        "numpy archive": lambda path: np.savez(open(path, "wb"), model=np.zeros(9)),
        "list": lambda path: torch.save([1, 2], path),
        "another project's state dict": lambda path: torch.save({"layer1.weight": torch.zeros(3, 3)}, path),
        "pickle with code": lambda path: path.write_bytes(pickle.dumps(dict(checkpoint, model=bomb), protocol=2)),
        "checkpoint with code": lambda path: torch.save(dict(checkpoint, model=bomb), path),
        "checkpoint without optimizer": without("optimizer"),
        "checkpoint without step": without("step"),
        "checkpoint without weights": without("model"),
        "checkpoint of another model": lambda path: torch.save(dict(checkpoint, model={"layer1.weight": torch.zeros(3)}), path),
    }
    files = {kind: folder / f"{i}.pt" for i, kind in enumerate(makers)}
    for kind, path in files.items():
        makers[kind](path)
    return files


def refusal(main, arguments):
    """The message with which a program of ours refuses its arguments, run in this process; "" when it does not."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main([str(a) for a in arguments])
    except (ValueError, OSError) as e:                  # what the programs print as one line
        return str(e)
    except SystemExit as e:                             # argparse has printed it
        return f"exit code {e.code}"
    return ""


def foreign_checkpoints(folder):
    """Each foreign file to --resume, --init_from, --clip and evaluate.py: refused with its name, nothing executed."""
    out = undisturbed(folder)
    files = foreign_files(folder / "foreign", evaluate.load_checkpoint(out / "last.pt"))
    tried, wrong = 0, []
    for kind, path in files.items():
        run = folder / "foreign" / "run"
        run.mkdir()
        shutil.copy(out / "config.json", run)
        shutil.copytree(path, run / "last.pt") if path.is_dir() else shutil.copy(path, run / "last.pt")
        whole_enough = kind in ("checkpoint without optimizer", "checkpoint without step")              # for weights alone they are
        for name, main, arguments in [
            ("--resume", train.main, command(folder, run, "--resume")[1:]),
            ("--init_from", train.main, command(folder, folder / "new", "--init_from", path)[1:]),
            ("--clip", train.main, command(folder, folder / "new", "--clip", path)[1:]),
            ("evaluate.py --ckpt", evaluate.main, ["--ckpt", path, "--device", "cpu"]),
        ]:
            if whole_enough and name in ("--init_from", "evaluate.py --ckpt") or name == "--resume" and kind == "folder":
                continue                                # (a folder last.pt is no file, so the run begins anew and cannot write: tried with the disks)
            tried += 1
            text = refusal(main, arguments)
            if str(run / "last.pt" if name == "--resume" else path) not in text:
                wrong.append(f"{name}, {kind}: {text or 'not refused'}")
        shutil.rmtree(run)
        shutil.rmtree(folder / "new", ignore_errors=True)
    executed = (folder / "foreign" / "exploded").exists()
    yield (f"{len(files)} kinds of foreign file (empty, text, numpy, pickles with code, another project's weights ...) to `--resume`, `--init_from`, `--clip`, `evaluate.py --ckpt`", tried,
           f"{tried - len(wrong)} refused by name; code executed: {int(executed)}" + told(wrong), len(wrong) + executed)


def damaged_checkpoints(folder, cuts=30, flips=100, seed=0):
    """A checkpoint cut off, or with one bit flipped, at random places: refused, or (in padding) read as it was."""
    path, rng = folder / "damaged.pt", random.Random(seed)
    whole = (undisturbed(folder) / "last.pt").read_bytes()
    checkpoint = evaluate.load_checkpoint(undisturbed(folder) / "last.pt")
    for name, times in (("cut off", cuts), ("one bit flipped", flips)):
        refused = identical = silent = 0
        for _ in range(times):
            damaged, place = bytearray(whole), rng.randrange(len(whole))
            if name == "cut off":
                del damaged[place:]
            else:
                damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                read = evaluate.load_checkpoint(path, needs=train.CHECKPOINT)
                identical, silent = identical + same(read, checkpoint), silent + (not same(read, checkpoint))
            except ValueError as e:
                refused, silent = refused + (str(path) in str(e)), silent + (str(path) not in str(e))
        yield (f"checkpoint {name} at random places", times, f"{refused} refused by name, {identical} read with all values right, {silent} wrong without a word", silent)


# ----------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------

# train.py with one rank whose sixth step sees NaN, as broken memory or a bad kernel would give it.
NAN_ON_RANK_1 = """
import math, os, runpy, sys
sys.path.insert(0, {root!r})
import data
plain, calls = data.normalize, []
def normalize(video, *more):
    calls.append(1)
    return plain(video, *more) * (math.nan if len(calls) == 6 and os.environ["RANK"] == "1" else 1)
data.normalize = normalize
sys.argv[0] = "train.py"
runpy.run_path({train!r}, run_name="__main__")
"""


def not_finite(folder):
    """NaN on one of two ranks: both stop at that step, each with one line, and last.pt is of an earlier one."""
    script, out = folder / "nan.py", folder / "nan"
    script.write_text(NAN_ON_RANK_1.format(root=str(ROOT), train=str(ROOT / "train.py")))
    ranks = start_two_ranks([str(script), *command(folder, out, "--save_minutes", "0", "--log_every", "20")[1:]])
    finish(*ranks)
    last = evaluate.load_checkpoint(out / "last.pt")
    bad = [p.printed.read_text()[-300:] for p in ranks if not one_line(p.returncode, p.printed.read_text(), "nan", "at step 5")]
    bad += ["last.pt"] if last["step"] > 5 or not all(v.isfinite().all() for v in last["model"].values()) else []
    yield ("NaN on one of two ranks", 1, f"both stop at step 5 with its clips; last.pt is of step {last['step']}, finite" if not bad else "went wrong" + told(bad), len(bad))


def repeated(folder):
    """The same command twice gives the same bits."""
    out = folder / "repeated"
    succeed(start(command(folder, out)))
    found = differences(out, undisturbed(folder))
    yield ("the same command twice", 1, f"{len(found)} differences" + told(found), len(found))


# ----------------------------------------------------------------------------------------------------
# Flags that cannot work
# ----------------------------------------------------------------------------------------------------

# (program, flags, what the message names). {here} is a folder with the empty file "file" in it.
BAD_FLAGS = [("train", flags, words) for flags, words in [
    ("--epochs 0", "--epochs 0"), ("--epochs -3", "--epochs -3"), ("--warmup_epochs -1", "--warmup_epochs -1"), ("--epochs 3 --warmup_epochs 4", "--warmup_epochs 4"),
    ("--batch_size 0", "--batch_size 0"), ("--batch_size -8", "--batch_size -8"), ("--micro_batch 0", "--micro_batch 0"), ("--micro_batch -1", "--micro_batch -1"),
    ("--batch_size 8 --micro_batch 3", "--micro_batch 3"), ("--batch_size 8 --micro_batch 16", "--micro_batch 16"),
    ("--lr -0.001", "--lr -0.001"), ("--lr nan", "--lr nan"), ("--lr inf", "--lr inf"), ("--min_lr -1", "--min_lr -1"), ("--lr 1e-4 --min_lr 1e-3", "--min_lr 0.001"),
    ("--clip_lr_scale -1", "--clip_lr_scale"), ("--weight_decay -0.1", "--weight_decay"), ("--weight_decay nan", "--weight_decay nan"), ("--grad_clip -1", "--grad_clip"),
    ("--label_smoothing 1", "--label_smoothing 1"), ("--label_smoothing -0.1", "--label_smoothing"), ("--mixup -0.5", "--mixup"), ("--cutmix -1", "--cutmix"),
    ("--mixup 0.8 --batch_size 1", "--mixup"), ("--cutmix 1 --batch_size 1", "--cutmix"), ("--crop_scale 0", "--crop_scale 0"), ("--crop_scale 1.5", "--crop_scale 1.5"),
    ("--randaugment -1", "--randaugment -1"), ("--randaugment 31", "--randaugment 31"), ("--seed -1", "--seed -1"), ("--workers -1", "--workers -1"),
    ("--log_every 0", "--log_every 0"), ("--eval_every 0", "--eval_every 0"), ("--save_minutes -1", "--save_minutes"), ("--timeout -1", "--timeout"), ("--max_steps 0", "--max_steps 0"),
    ("--max_steps 3 --dry_run", "--max_steps 3"), ("--clip nowhere.pt", "--clip nowhere.pt"), ("--init_from nowhere.pt", "--init_from nowhere.pt"),
    ("--clip {here}/file --init_from {here}/file", "--init_from"), ("--freeze_clip", "--freeze_clip"), ("--freeze_clip --clip {here}/file --clip_lr_scale 0.1", "--freeze_clip"),
    ("--skip_list nowhere.txt", "--skip_list nowhere.txt"), ("--dataset ssv1 --clip none", "--data_root"), ("--data_root {here}/file", "--data_root"), ("--out_dir {here}/file", "--out_dir"),
    ("--out_dir {here}/data", "--out_dir"), ("--resume", "--resume"), ("--num_frames 1", "num_frames"), ("--num_frames 7", "num_frames"), ("--num_frames 0", "num_frames"),
    ("--image_size 33", "image_size"), ("--heads 3", "heads"), ("--depth 0", "depth"), ("--ptm_layers 9", "ptm_layers"), ("--head_dropout 1", "head_dropout"), ("--alpha nan", "alpha"),
    *([("--device cuda", "--device cuda")] if not torch.cuda.is_available() else []), *([("--device mps", "--device mps")] if not torch.backends.mps.is_available() else []),
]] + [("evaluate", "--ckpt {here}/file " + flags, words) for flags, words in [
    ("--clips 0", "--clips 0"), ("--batch_size 0", "--batch_size 0"), ("--workers -1", "--workers -1"), ("--timeout nan", "--timeout nan"), ("--skip_list nowhere.txt", "--skip_list nowhere.txt"),
    ("--data_root nowhere", "--data_root nowhere"), ("--save {here}", "--save"), ("--report {here}/file", "--report"), ("--video a.webm --save a.csv", "--save a.csv"),
    ("--video a.webm --report a", "--report a"), ("--video a.webm --split test", "--split test"), ("--video a.webm --dataset ssv1", "--dataset ssv1"),
    ("--video a.webm --data_root {here}", "--data_root"), ("--video a.webm --skip_list {here}/file", "--skip_list"), ("--video a.webm --control single", "--control single"),
    *([("--device cuda", "--device cuda")] if not torch.cuda.is_available() else []),
]] + [("data", flags, words) for flags, words in [
    ("check --jobs 0", "--jobs 0"), ("check --timeout 0", "--timeout 0"), ("check --timeout nan", "--timeout nan"), ("check --out nowhere/skip.txt", "--out nowhere/skip.txt"),
    ("check --out {here}", "--out"), ("show --samples 0", "--samples 0"), ("show --out nowhere/show.png", "--out nowhere/show.png"), ("show --crop_scale 2", "--crop_scale 2"),
    ("toy --train 0", "--train 0"), ("toy --validation -1", "--validation -1"), ("toy --seed -1", "--seed -1"),
]]


def refuse_flags(folder, program, flags, words):
    """Run a program with flags that cannot work: what is wrong with its refusal, "" for nothing. `folder` must stay as it is."""
    folder.mkdir(exist_ok=True)
    (folder / "file").touch()
    arguments = flags.format(here=folder).split()
    if program != "evaluate" and "--data_root" not in arguments:
        arguments += ["--data_root", str(folder / "data")]
    if program == "train" and "--out_dir" not in arguments:
        arguments += ["--out_dir", str(folder / "out")]
    if "--device" not in arguments and program == "train":
        arguments += ["--device", "cpu"]
    text = refusal({"train": train, "evaluate": evaluate, "data": data}[program].main, arguments)
    created = [f.name for f in folder.iterdir() if f.name != "file"]
    return "" if words in text and "\n" not in text and not created else f"{program} {flags}: {text or 'not refused'}; created: {created}"


def bad_flags(folder):
    """Every flag out of its range, every pair that cannot go together: one line before any file is touched."""
    wrong = [problem for case in BAD_FLAGS if (problem := refuse_flags(folder / "flags", *case))]
    yield ("flags out of range, or that cannot go together", len(BAD_FLAGS), f"{len(BAD_FLAGS) - len(wrong)} refused in one line that names the flag, before any file was made" + told(wrong), len(wrong))


# ----------------------------------------------------------------------------------------------------


def next_row(kind, faults):
    """The next row of a fault, None behind the last. A program that fails where none should is a row too, and ends its fault alone."""
    try:
        return next(faults, None)
    except AssertionError as e:
        return kind, 1, f"not finished: {' '.join(str(e).split())[-300:]}", 1


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=24, help="of one process; a sixth as many of a rank under torchrun")
    p.add_argument("--seed", type=int, default=0, help="of the moments and places where things break")
    p.add_argument("--only", nargs="+", metavar="KIND", help="kill torchrun sigterm disk checkpoints numbers flags fuzz; default: all")
    p.add_argument("--out", metavar="FILE.md", help="write the table here too")
    args = p.parse_args()

    kinds = {
        "flags": [bad_flags],
        "kill": [lambda folder: kill_and_resume(folder, args.kills, args.seed)],
        "torchrun": [lambda folder: kill_a_rank(folder, max(1, args.kills // 6), args.seed),
                     lambda folder: kill_a_rank(folder, max(1, args.kills // 6), args.seed, standalone=True)],
        "sigterm": [lambda folder: sigterm(folder, 4, args.seed)],
        "disk": [file_size_limit, full_disk, deleted_folder],
        "checkpoints": [foreign_checkpoints, lambda folder: damaged_checkpoints(folder, seed=args.seed)],
        "numbers": [not_finite, repeated],
    }
    with contextlib.suppress(ImportError):
        import fuzz                                     # broken videos and annotations: scripts/fuzz.py
        kinds["fuzz"] = [lambda folder: fuzz.run(folder / "fuzz", seed=args.seed)[0]]
    for kind in args.only or ():
        if kind not in kinds:
            p.error(f"--only {kind}: expected some of {' '.join(kinds)}")

    folder, rows = Path(tempfile.mkdtemp(prefix="faults.")), []
    try:
        for kind in args.only or kinds:
            for fault in kinds[kind]:
                before = time.time()
                faults = fault(folder)
                while row := next_row(kind, faults):
                    rows.append(row)
                    print(f"{row[0]}: {row[1]} tried, {row[2]}" + (f"  <-- {row[3]} LOST OR SILENT" if row[3] else ""), flush=True)
                print(f"  ({kind}, {time.time() - before:.0f} s)", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = "| fault | tried | outcome | lost or silent |\n|---|---|---|---|\n" + "".join(f"| {a} | {b} | {c} | {d} |\n" for a, b, c, d in rows)
    print("\n" + table)
    if args.out:
        Path(args.out).write_text(table)
    sys.exit(1 if any(row[3] for row in rows) else 0)


if __name__ == "__main__":
    main()
