"""Kill and stop training runs at random: do they end with the bits of a run left in peace?

    python tests/stress/faults.py                           # all faults, half an hour on two cores
    python tests/stress/faults.py --only kill --times 40    # one kind of fault, more often

tests/test_train.py does each of these once, at one moment. Prints a Markdown table with a row for
each fault, and exits with 1 if anything is wrong. pytest does not collect this file. It needs
Linux, and runs on the CPU.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import ROOT, free_port, torchrun_variables
from test_train import EVERYTHING, SMALL, read_log, same, write_clips

from model import load_checkpoint

# 8 steps in an epoch. The log has rows after steps 3, 6 and 8, and last.pt is written with each.
FLAGS = [*SMALL, *EVERYTHING, *"--epochs 6 --log_every 3 --save_minutes 0 --workers 1".split()]
PATIENCE = 900                                          # seconds until a run counts as hanging

# ----- Runs -----------------------------------------------------------------

def command(out):
    flags = [*FLAGS, "--data_root", str(out.parent / "clips"), "--out_dir", str(out)]
    if (out / "last.pt").is_file():
        flags.append("--resume")
    return [str(ROOT / "train.py"), *flags]

def start(out, arguments, **environment):
    """Start Python in a process group of its own. It prints to OUT.txt."""
    with open(f"{out}.txt", "a") as printed:
        return subprocess.Popen([sys.executable, *arguments], env={**os.environ, **environment},
                                stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)

def start_run(out, ranks):
    if ranks == 1:
        return [start(out, command(out))]
    port = free_port()
    return [start(out, command(out), **torchrun_variables(rank, port)) for rank in range(ranks)]

def failure(out, processes):
    """Wait until all processes have ended. Returns "" if they succeed, else the end of OUT.txt."""
    until = time.time() + PATIENCE
    while time.time() < until and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    codes = [process.wait() for process in processes]
    if not any(codes):
        return ""
    return f"exit codes {codes}: {Path(f'{out}.txt').read_text()[-500:]}"

def trainers(field, number):
    """Ids of all processes of train.py with this parent (field 1) or process group (field 2)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            stat = (process / "stat").read_text().rsplit(")", 1)[1].split()
            alive = b"train.py" in (process / "cmdline").read_bytes()           # empty for a zombie
        except OSError:                                 # it has ended meanwhile
            continue
        if alive and int(stat[field]) == number:
            found.append(int(process.name))
    return found

def undisturbed(folder, ranks):
    """The run that others are compared with, and its seconds. It is made once for each number."""
    out = folder / f"undisturbed{ranks}"
    if not out.exists():
        problem = failure(out, start_run(out, ranks))
        if problem:
            sys.exit(f"faults.py: a run that nothing happened to failed: {problem}")
    return out

def differences(out, expected):
    """What of a finished run is not as in the other one, in words: [] if all is equal."""
    found = [path.name for path in out.glob("*.tmp")]
    for name in ("last.pt", "best.pt"):
        a, b = load_checkpoint(out / name), load_checkpoint(expected / name)
        for part in a:
            if part not in ("args", "log_bytes") and not same(a[part], b[part]):
                found.append(f"{name}: {part}")
    if read_log(out) != read_log(expected):
        found.append("the log")
    return found

def wait_for(question, process):
    """Ask until the answer is yes, or the process has ended, or hangs."""
    until = time.time() + PATIENCE
    while not question() and process.poll() is None and time.time() < until:
        time.sleep(0.0005)

def written(path):
    """A question to ask again and again: was this file written since now?"""
    def stamp():
        return path.stat().st_mtime_ns if path.exists() else None

    before = stamp()
    return lambda: stamp() != before

# ----- Faults ---------------------------------------------------------------
# Each returns a row of the table: what was done, how often, and a list of what is wrong.

def kill(folder, times, rng):
    """SIGKILL in the start or in training, while a checkpoint is written, after a row of the log"""
    expected, wrong, killed, runs = undisturbed(folder, 1), [], [], 0
    while len(killed) < times:
        out = folder / f"killed{runs}"
        runs += 1
        while True:
            process = start(out, command(out))
            moment = len(killed) % 3
            if len(killed) < times:
                if moment == 0:
                    time.sleep(rng.uniform(0, 15))
                else:
                    wait_for(written(out / "last.pt"), process)         # each gets further
                    name = "last.pt.tmp" if moment == 1 else "log.jsonl"
                    wait_for(written(out / name), process)
                if process.poll() is None:
                    process.kill()
                    process.wait()
                    killed.append(process.pid)
                    continue
            problem = failure(out, [process])
            wrong += [problem] if problem else differences(out, expected)
            break
    until = time.time() + 60                            # orphaned data workers need some seconds
    while any(trainers(2, group) for group in killed) and time.time() < until:
        time.sleep(1)
    wrong += [f"data worker {pid} lives on" for group in killed for pid in trainers(2, group)]
    return f"SIGKILL, then --resume ({runs} runs)", len(killed), wrong

def sigterm(folder, times, rng):
    """In turn to one of two ranks, and to both."""
    expected, out, wrong = undisturbed(folder, 2), folder / "stopped", []
    for i in range(times):
        ranks = start_run(out, 2)
        wait_for(written(out / "last.pt"), ranks[0])
        time.sleep(rng.uniform(0, 0.5))
        for process in ranks if i % 2 else [rng.choice(ranks)]:
            process.terminate()
        problem = failure(out, ranks)
        if problem:
            wrong.append(problem)
    problem = failure(out, start_run(out, 2))
    wrong += [problem] if problem else differences(out, expected)
    return "SIGTERM to one of two ranks or to both, then --resume", times, wrong

def torchrun(folder, times, rng):
    """SIGKILL of one of two ranks. torchrun starts both again, only once for each kill."""
    expected, out, wrong, killed = undisturbed(folder, 2), folder / "torchrun", [], 0
    agent = start(out, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                        f"--max_restarts={times}", *command(out)])
    old = set()
    for _ in range(times):
        saved = written(out / "last.pt")
        wait_for(lambda: saved() and len({*trainers(1, agent.pid)} - old) == 2, agent)
        time.sleep(rng.uniform(0, 0.3))
        ranks = {*trainers(1, agent.pid)} - old
        if len(ranks) == 2:                             # else a restart has failed
            os.kill(rng.choice(sorted(ranks)), signal.SIGKILL)
            killed += 1
            old |= ranks
    problem = failure(out, [agent])
    wrong += [problem] if problem else differences(out, expected)
    if killed < times:
        wrong.append(f"only {killed} kills came to pass")
    return f"SIGKILL of a rank under torchrun --max_restarts={times}", killed, wrong

KINDS = {"kill": kill, "sigterm": sigterm, "torchrun": torchrun}

def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of faults")
    p.add_argument("--times", type=int, default=8, help="how often")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    args = p.parse_args()
    failed = False
    print("| fault | times | wrong |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="faults.") as folder:
        write_clips(Path(folder, "clips"), train=32, validation=12)
        for kind in args.only:
            what, times, wrong = KINDS[kind](Path(folder), args.times, random.Random(args.seed))
            print(f"| {what} | {times} | {'; '.join(wrong) or 'nothing'} |", flush=True)
            failed = failed or bool(wrong)
    sys.exit(1 if failed else 0)

if __name__ == "__main__":
    main()
