"""Break training runs on purpose: do they end with the same bits as a run that is left in peace?

    python tests/stress/faults.py                           # all faults, half an hour on two cores
    python tests/stress/faults.py --only kill --times 40    # one kind of fault, more often

Small runs of train.py on the toy are killed, stopped, given NaN or a damaged checkpoint. What goes
on after that is compared to the last bit: weights, optimizer, and the log's losses and accuracies.
Prints a Markdown table with a row for each fault, and exits with 1 if anything is wrong. pytest
does not collect this file. It needs Linux, and runs on the CPU.
"""
import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from model import load_checkpoint
from scripts.toy_data import make_toy

EPOCH = 8                                               # steps
# The log has a row after steps 3, 6 and 8 of each epoch. last.pt is written with almost every row.
FLAGS = ("--num_frames 4 --image_size 16 --depth 2 --batch_size 8 --epochs 6 --warmup_epochs 1 "
         "--log_every 3 --save_minutes 0.001 --mixup 0.8 --drop_path 0.1 --ctm_dropout 0.1 "
         "--workers 1 --timeout 300 --device cpu").split()
CLOCK = ("clips_per_s", "data_wait")                    # in the log; they differ in every run
PATIENCE = 900                                          # seconds until a run counts as hanging

# ----- Runs -----------------------------------------------------------------

def command(out, *flags, script=ROOT / "train.py"):
    data_root = str(out.parent / "toy")
    return [str(script), *FLAGS, "--data_root", data_root, "--out_dir", str(out), *flags]


def start(out, arguments, **env):
    """Start Python on one thread, in a process group of its own. It prints to OUT.txt."""
    env = {**os.environ, "LOCAL_WORLD_SIZE": str(os.cpu_count()), "OMP_NUM_THREADS": "1", **env}
    with open(f"{out}.txt", "a") as printed:
        return subprocess.Popen([sys.executable, *arguments], stdout=printed, cwd=ROOT, env=env,
                                stderr=subprocess.STDOUT, start_new_session=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start_ranks(out, arguments):
    """Start the two processes that torchrun --nproc_per_node=2 would start."""
    common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2",
                  LOCAL_WORLD_SIZE="2")
    return [start(out, arguments, RANK=r, LOCAL_RANK=r, **common) for r in ("0", "1")]


def trainers(field, number):
    """Ids of all processes of train.py with this parent (field 1) or process group (field 2)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            stat = (process / "stat").read_text().rsplit(")", 1)[1].split()
            alive = b"train.py" in (process / "cmdline").read_bytes()           # empty for a zombie
        except OSError:                                 # it ended meanwhile
            continue
        if alive and int(stat[field]) == number:
            found.append(int(process.name))
    return found


def failure(out, processes):
    """Wait until all processes have ended. Returns "" if they succeed, else what they printed."""
    until = time.time() + PATIENCE
    while time.time() < until and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            for pid in [*trainers(1, process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
    codes = [process.wait() for process in processes]
    if not any(codes):
        return ""
    lines = Path(f"{out}.txt").read_text().splitlines()
    reasons = [line for line in lines if "Error" in line or line.startswith("train.py: ")]
    return f"exit codes {codes}: {' / '.join(reasons or lines)[-500:]}"


def undisturbed(folder, ranks=1):
    """The run that others are compared with. It is made once for each number of processes."""
    out = folder / f"undisturbed{ranks}"
    if not out.exists():
        run = start_ranks(out, command(out)) if ranks == 2 else [start(out, command(out))]
        if problem := failure(out, run):
            sys.exit(f"faults.py: a run that nothing happened to failed: {problem}")
    return out

# ----- What is left of a run ------------------------------------------------

def log_rows(out):
    """The whole rows of log.jsonl, without what a clock measures."""
    path = out / "log.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def training_rows(rows):
    """Training rows by the two steps between which they average."""
    rows = [row for row in rows if row["kind"] == "train"]
    steps = [row["step"] for row in rows]
    return dict(zip(zip([0, *steps], steps), rows))


def same(a, b):
    """Equal to the last bit, through dicts and lists of tensors."""
    if type(a) is not type(b):
        return False
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(out, expected):
    """What of a finished run is not as in the other one, in words: [] if all is equal."""
    found = [path.name for path in out.glob("*.tmp")]
    for name in ("last.pt", "best.pt"):
        a, b = load_checkpoint(out / name), load_checkpoint(expected / name)
        a["args"] = b["args"]                           # --out_dir and --resume may differ
        a["log_bytes"] = b["log_bytes"]                 # seconds have more or fewer digits
        found += [f"{name}: {k}" for k in a.keys() | b.keys() if not same(a.get(k), b.get(k))]
    rows, others = log_rows(out), log_rows(expected)
    if [r for r in rows if r["kind"] == "eval"] != [r for r in others if r["kind"] == "eval"]:
        found.append("validations in the log")
    # A stop between two rows moves the limits of the next row. All other rows must be equal.
    rows, others = training_rows(rows), training_rows(others)
    if any(rows[steps] != others[steps] for steps in rows.keys() & others.keys()):
        found.append("losses in the log")
    return found

# ----- Moments --------------------------------------------------------------

def written(path):
    """A question to ask again and again: was this file written since now?"""
    def stamp():
        return path.stat().st_mtime_ns if path.exists() else None
    before = stamp()
    return lambda: stamp() != before


def epoch_ended(out):
    """The same for the log's row of an epoch's last step, which comes before a validation."""
    def rows():
        return sum(row["step"] % EPOCH == 0 for row in log_rows(out))
    before = rows()
    return lambda: rows() > before


def wait_for(question, process):
    """Ask until the answer is yes, or the process has ended, or hangs."""
    until = time.time() + PATIENCE
    while not question() and process.poll() is None and time.time() < until:
        time.sleep(0.0005)

# ----- Faults ---------------------------------------------------------------
# Each returns a row of the table: what was done, how often, what was seen, and a list of what is
# wrong. `folder` holds the toy and the runs.

MOMENTS = ("checkpoint", "any time", "log", "validation")


def kill(process, out, moment, rng):
    """SIGKILL at a moment of a run. Returns what the run was doing then, "" if it had ended."""
    if moment == "any time":                            # from the start of Python on
        time.sleep(rng.uniform(0, 10))
    else:
        wait_for(written(out / "last.pt"), process)     # so that each attempt gets further
    if moment == "checkpoint":
        wait_for(lambda: any(out.glob("*.pt.tmp")), process)
    elif moment == "log":
        wait_for(written(out / "log.jsonl"), process)
    elif moment == "validation":
        wait_for(epoch_ended(out), process)
        time.sleep(rng.uniform(0, 0.5))
    if process.poll() is not None:
        return ""
    process.kill()
    process.wait()
    if not (out / "last.pt").is_file():
        return "before the first checkpoint"
    last_row, step = log_rows(out)[-1], load_checkpoint(out / "last.pt")["step"]
    if moment == "log" and last_row["step"] > step:     # cut it, as this moment is hard to meet
        os.truncate(out / "log.jsonl", (out / "log.jsonl").stat().st_size - 20)
        return "writing the log"
    if any(out.glob("*.pt.tmp")):
        return "writing a checkpoint"
    validating = step % EPOCH == 0 and last_row["kind"] == "train"
    return "validating" if validating else "training"


def kill_and_resume(folder, times, rng):
    """New runs are begun until all kills are spent. Each is resumed until it is done."""
    expected, doing, wrong, groups, runs = undisturbed(folder), Counter(), [], [], 0
    while doing.total() < times:
        out, runs, killed = folder / f"killed{runs}", runs + 1, True
        while killed:
            if not (out / "last.pt").is_file():         # nothing was saved, so begin anew
                shutil.rmtree(out, ignore_errors=True)
            process = start(out, command(out, *["--resume"] * out.exists()))
            killed = ""
            if doing.total() < times:
                killed = kill(process, out, MOMENTS[doing.total() % len(MOMENTS)], rng)
            if killed:
                doing[killed] += 1
                groups.append(process.pid)
        problem = failure(out, [process])
        wrong += [problem] if problem else differences(out, expected)
    until = time.time() + 60                            # orphaned data workers need some seconds
    while any(trainers(2, group) for group in groups) and time.time() < until:
        time.sleep(1)
    wrong += [f"data worker {pid} lives on" for group in groups for pid in trainers(2, group)]
    seen = ", ".join(f"{what} ({n})" for what, n in doing.most_common())
    return "SIGKILL, then --resume", times, f"killed while {seen}", wrong


def kill_a_rank(folder, times, rng):
    """torchrun starts both processes again. It may do so only once for each kill."""
    expected, killed, wrong = undisturbed(folder, ranks=2), 0, []
    for meeting in ("--standalone", f"--master_port={free_port()}"):
        out = folder / f"killed{meeting[:6]}"
        torchrun = start(out, ["-m", "torch.distributed.run", "--nproc_per_node=2", meeting,
                               f"--max_restarts={times}", *command(out)])
        old = set()
        for _ in range(times):
            saved = written(out / "last.pt")
            wait_for(lambda: saved() and len({*trainers(1, torchrun.pid)} - old) == 2, torchrun)
            time.sleep(rng.uniform(0, 0.3))
            ranks = {*trainers(1, torchrun.pid)} - old
            if len(ranks) == 2:                         # else a restart has failed
                os.kill(rng.choice(sorted(ranks)), signal.SIGKILL)
                killed, old = killed + 1, old | ranks
        problem = failure(out, [torchrun])
        found = [problem] if problem else differences(out, expected)
        wrong += [f"{meeting}: {text}" for text in found]
    seen = "half of them with --standalone"
    wrong += [f"only {killed} kills came to pass"] * (killed < 2 * times)
    return f"SIGKILL of a rank, torchrun --max_restarts={times}", killed, seen, wrong


def sigterm(folder, times, rng):
    """In turn to one of two ranks in training, and to both in a validation."""
    expected, out, wrong, steps = undisturbed(folder, ranks=2), folder / "stopped", [], []
    for i in range(times):
        ranks = start_ranks(out, command(out, *["--resume"] * (i > 0)))
        wait_for(epoch_ended(out) if i % 2 else written(out / "last.pt"), ranks[0])
        for process in ranks if i % 2 else [rng.choice(ranks)]:
            process.terminate()
        wrong += filter(None, [failure(out, ranks)])
        steps.append(str(load_checkpoint(out / "last.pt")["step"]))
    problem = failure(out, start_ranks(out, command(out, "--resume")))
    wrong += [problem] if problem else differences(out, expected)
    what = "SIGTERM to one of two ranks in training, to both in a validation, then --resume"
    return what, times, f"both leave after steps {', '.join(steps)} of {6 * EPOCH}", wrong


# train.py, but rank 1 gets NaN in its sixth step, as from broken memory.
NAN = """
import math, os, runpy, sys
sys.path.insert(0, {root!r})
import data
normalize, calls = data.normalize, []
def broken(video, *statistics):
    calls.append(1)
    bad = len(calls) == 6 and os.environ["RANK"] == "1"
    return normalize(video, *statistics) * (math.nan if bad else 1)
data.normalize = broken
runpy.run_path({train!r}, run_name="__main__")
"""


def not_finite(folder, times, rng):
    """Both ranks stop before the next checkpoint is written."""
    script, out = folder / "nan_train.py", folder / "nan"
    script.write_text(NAN.format(root=str(ROOT), train=str(ROOT / "train.py")))
    ranks = start_ranks(out, command(out, script=script))
    problem, last = failure(out, ranks), load_checkpoint(out / "last.pt")
    stopped = [process.returncode for process in ranks] == [1, 1]
    wrong = [name for name, value in last["model"].items() if not value.isfinite().all()]
    wrong += [] if stopped else [problem or "both ranks go on"]
    return "NaN in step 6 of one of two ranks", 1, f"last.pt is of step {last['step']}", wrong


def flipped_bits(folder, times, rng):
    """A damaged checkpoint is refused, or all its values are as they were."""
    source, path, seen = undisturbed(folder) / "last.pt", folder / "damaged.pt", Counter()
    whole, expected = source.read_bytes(), load_checkpoint(source)
    for _ in range(20 * times):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            equal = same(load_checkpoint(path), expected)
            seen["read with the same values" if equal else "read with other values"] += 1
        except ValueError:
            seen["refused"] += 1
    words = [f"{n} {what}" for what, n in seen.items()]
    wrong = [word for word in words if "other" in word]
    return "one bit of a checkpoint flipped", 20 * times, ", ".join(words), wrong


def repeated(folder, times, rng):
    out = folder / "repeated"
    problem = failure(out, [start(out, command(out, "--workers", "0"))])
    wrong = [problem] if problem else differences(out, undisturbed(folder))
    return "the same command twice, once without data workers", 1, "", wrong

# ----- The command ----------------------------------------------------------

KINDS = {"twice": repeated, "nan": not_finite, "bits": flipped_bits, "kill": kill_and_resume,
         "sigterm": sigterm, "torchrun": kill_a_rank}


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of faults")
    p.add_argument("--times", type=int, default=8, help="how often, for bits 20 times as often")
    p.add_argument("--seed", type=int, default=0, help="of the moments and places")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults.") as folder:
        make_toy(Path(folder, "toy"), train=8 * EPOCH, validation=64)
        print("| fault | times | seen | wrong |\n|---|---|---|---|", flush=True)
        failed = False
        for kind in args.only:
            *row, wrong = KINDS[kind](Path(folder), args.times, random.Random(args.seed))
            cells = map(str, [*row, "; ".join(wrong) or "nothing"])
            print(f"| {' | '.join(cells)} |", flush=True)
            failed = failed or bool(wrong)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
