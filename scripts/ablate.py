"""Run the tables of the paper: train and test each row, then write a table and a plot.

    python scripts/ablate.py --table 2                          # components, on the toy, 3 seeds
    python scripts/ablate.py --table readings controls
    python scripts/ablate.py --table evidence --data_root datasets/order    # see toy_data.py
    python scripts/ablate.py --table evidence --dataset folder --data_root DIR -- --recipe toy
    python scripts/ablate.py --table 5 --dataset ssv1 --seeds 0 --gpus_per_run 4
    python scripts/ablate.py --table 3 --dry_run -- --epochs 2  # only prints the commands

Flags after -- go to train.py. A run is one row with one seed: a call of train.py and a call of
evaluate.py, or of scripts/variants.py for both. Its result is OUT_DIR/ROW/seedN/result.json. The
same command skips runs that have a result, and resumes those that were stopped. A row that
occurs in two tables is run once. Do not run two copies at a time with the same --out_dir.

The tables report last.pt. best.pt is chosen by validation accuracy, which would favour rows whose
accuracy fluctuates. They are tested with three crops. If the outer crops of wide frames miss the
action, test the same last.pt with evaluate.py --crops 1.
"""
import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import train
from evaluate import positive, run_command
from model import MODELS

# ----- The tables -----------------------------------------------------------

@dataclass
class Row:
    label: str
    flags: str = ""             # of train.py. None: a published number, nothing is run
    variant: str = ""           # of scripts/variants.py. "": STD-Former itself
    paper: str = ""             # the paper's top-1 / top-5

CTM_ONLY = "--ptm_layers --stdm_layers --smem_t_layers"             # each of them nowhere
CTM_PTM = "--stdm_layers --smem_t_layers"
CTM_STDM = "--ptm_layers --smem_t_layers"
CTM_SMEM = "--ptm_layers --stdm_layers"

PUBLISHED_SSV1 = {                              # Table 1: top-1 / top-5
    "MSNet": "52.1 / 82.3", "TEA": "52.3 / 81.9", "TDN": "55.1 / 82.9", "CT-Net": "53.4 / 81.7",
    "AE-Net": "54.1 / 81.7", "MSMA": "55.8 / 83.1", "UniFormerV2-B": "56.8 / 84.2",
    "STD-Former": "57.3 / 84.4"}
PUBLISHED_SSV2 = {
    "TimeSformer-L": "62.4 / -", "MSNet": "64.7 / 89.4", "ViViT-L": "65.4 / 89.8",
    "TEA": "65.1 / 89.9", "CT-Net": "65.9 / 90.1", "MViT-B": "66.2 / 90.2", "MSMA": "66.2 / 90.4",
    "TDN": "67.0 / 90.3", "MTV-B": "67.6 / 90.4", "AIM-B": "68.1 / 91.8",
    "UniFormerV2-B": "69.5 / 92.3", "STD-Former": "69.2 / 92.1"}

def published(numbers):
    """Ours and UniFormerV2-B's have 16x3x1 views, the others 16x1x1 to 64x1x3."""
    rows = []
    for name, paper in numbers.items():
        rows.append(Row(name, "" if name == "STD-Former" else None, paper=paper))
    return rows

def scaled(first, last, depth):
    """Layers that correspond to the paper's first ... last of 12: value of a flag, and label."""
    layers = [str(i) for i in range(first * depth // 12, (last + 1) * depth // 12)]
    label = f"{first}-{last}" if depth == 12 else f"{first}-{last} (here {', '.join(layers)})"
    return " ".join(layers), label

def ptm_positions(depth, depth_flag):
    """Table 5. The best row is the default, so without a flag of its own it is a run of Table 2."""
    rows = []
    for first, last, paper in (
            (0, 11, "55.2 / 82.6"), (0, 3, "55.8 / 82.9"), (4, 11, "56.6 / 83.5"),
            (4, 7, "57.0 / 84.1"), (8, 11, "57.2 / 84.3"), (8, 9, "56.8 / 84.0"),
            (10, 11, "56.6 / 83.4")):
        layers, label = scaled(first, last, depth)
        ptm = "" if (first, last) == (8, 11) else f"--ptm_layers {layers} "
        rows.append(Row(label, ptm + CTM_PTM + depth_flag, paper=paper))
    return rows

def smem_positions(depth, depth_flag):
    """Table 6, for SMEM in the branches T and ST. Only its best row is known; it is the default."""
    rows = []
    for first, last, branches, at in (
            (8, 11, "T", 4), (8, 11, "T", 0), (8, 11, "T", 8), (8, 11, "ST", 4), (8, 11, "ST", 8),
            (8, 11, "T and ST", 4), (4, 7, "T", 4), (4, 7, "ST", 4)):
        ptm_layers, ptm_label = scaled(first, last, depth)
        layer = at * depth // 12
        smem = {"T": f"--smem_t_layers {layer}",
                "ST": f"--smem_t_layers --smem_st_layers {layer}",
                "T and ST": f"--smem_t_layers {layer} --smem_st_layers {layer}"}[branches]
        label = f"PTM {ptm_label}, SMEM in {branches} at {at}"
        if depth != 12:
            label += f" (here {layer})"
        rows.append(Row(label, f"--ptm_layers {ptm_layers} {smem}{depth_flag}"))
    rows[0].flags = depth_flag.strip()
    rows[0].paper = "57.3 / 84.4"
    return rows

def fixed(alpha, beta):
    return f"--no-learn_fusion --alpha {alpha} --beta {beta}"

def readings(depth, mixes):
    last_third = " ".join(str(i) for i in range(depth - 1 - depth // 3, depth - 1))
    loss = Row("loss: MixUp and CutMix too", "--mixup 0.8 --cutmix 1.0")
    if mixes:
        loss = Row("loss: no MixUp, no CutMix", "--mixup 0 --cutmix 0")
    return [
        Row("default"),
        Row("stem: stride 1, twice the token frames", "--stem_stride 1"),
        Row("stem: kernel over 1 frame, skips every second", "--stem_kernel 1"),
        Row("DPE: no BatchNorm", variant="dpe_no_bn"),
        Row("DPE: as wide as its input, no BatchNorm", variant="dpe_wide"),
        Row("DPE: a second one before the FFN", variant="dpe_double"),
        Row("PTM: 2D conv on (H, W)", variant="ptm_plane_space"),
        Row("PTM: conv instead of identity", variant="ptm_shortcut"),
        Row("PTM: conv after attention, as one path", variant="ptm_serial"),
        Row("PTM: attention over space and time", variant="ptm_spacetime"),
        Row("PTM: alpha, beta fixed at 1", fixed(1.0, 1.0)),
        Row("CTM: residual on the memory", variant="ctm_memory"),
        Row("CTM: residual on both", variant="ctm_both"),
        Row("CTM: CPE on the query", variant="cpe_query"),
        Row("CTM: CPE on query and memory", variant="cpe_both"),
        Row("CTM: attention starts at 0", variant="ctm_zero"),
        Row("CTM: attention and FFN start at 0", variant="ctm_zero_ffn"),
        Row("STDM: dense convolutions", variant="stdm_dense"),
        Row("STDM: dense, a quarter as wide", variant="stdm_bottleneck"),
        Row("STDM: y from before SMEM", variant="stdm_before_smem"),
        Row("STDM: into the last third only", f"--stdm_layers {last_third}"),
        Row("STDM: nowhere", "--stdm_layers"),
        Row("STDM: nowhere, CTM: residual on the memory", "--stdm_layers", variant="ctm_memory"),
        Row("SMEM: features of unit length", variant="smem_unit"),
        Row("SMEM: ReLU after the correlation", variant="smem_relu"),
        Row("SMEM: unit length and ReLU", variant="smem_unit_relu"),
        Row("SMEM: by displacement, in a window", variant="smem_window"),
        Row("SMEM: scales its input", variant="smem_gate"),
        Row("head: fused with the ST-branch", variant="head_fused"),
        loss]

def beside_vits(clip):
    """STD-Former and two plain ViTs from the same start. CLIP's weights do not fit the ViTs."""
    flags, start = "", ""
    if clip != "none":
        flags, start = "--clip none", ", without CLIP weights"
    rows = [Row("STD-Former" + start, flags),
            Row("ViT with divided attention" + start, flags, "divided"),
            Row("frame-wise ViT, averaged" + start, flags, "frames")]
    if clip != "none":
        rows.append(Row("STD-Former"))
    return rows

def make_tables(dataset, depth, clip, mixes):
    """{name: (title, rows)}, for a data set, a depth, what runs start from, and whether they mix.

    Tables 5 and 6 distinguish sixths of the depth. If the depth is not a multiple of 6, their
    models get six layers.
    """
    layers, flag = (depth, "") if depth % 6 == 0 else (6, " --depth 6")
    pairs = ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0), (0.5, 0.5), (2.0, 2.0))
    return {
        "1": ("published models",
              published(PUBLISHED_SSV2 if dataset == "ssv2" else PUBLISHED_SSV1)),
        "2": ("components", [
            Row("CTM with plain blocks", CTM_ONLY, paper="56.8 / 84.0"),
            Row("CTM + PTM", CTM_PTM, paper="57.2 / 84.3"),
            Row("CTM + STDM", CTM_STDM, paper="57.0 / 84.2"),
            Row("CTM + SMEM", CTM_SMEM, paper="57.1 / 84.2"),
            Row("all four", paper="57.3 / 84.4")]),
        "3": ("design of PTM, in CTM + PTM", [
            Row("attention + 2D conv", f"--ptm_conv attention2d {CTM_PTM}", paper="56.8 / 83.9"),
            Row("attention + 3D conv", f"--ptm_conv attention3d {CTM_PTM}", paper="55.6 / 82.9"),
            Row("residual + 2D conv", CTM_PTM, paper="57.2 / 84.3"),
            Row("residual + 3D conv", f"--ptm_conv residual3d {CTM_PTM}", paper="54.5 / 81.8")]),
        "4": ("fusion in SMEM, in CTM + SMEM", [
            Row("multiplication", CTM_SMEM, paper="57.1 / 84.2"),
            Row("addition", f"--smem_fusion add {CTM_SMEM}"),
            Row("both", f"--smem_fusion mul+add {CTM_SMEM}")]),
        "5": (f"positions of PTM, in CTM + PTM, {layers} layers", ptm_positions(layers, flag)),
        "6": (f"PTM and SMEM together, {layers} layers", smem_positions(layers, flag)),
        "7": ("fixed alpha and beta of Eq. 1",
              [Row(f"alpha {a}, beta {b}", fixed(a, b)) for a, b in pairs]),
        "readings": ("where the paper is silent", readings(depth, mixes)),
        "controls": ("controls", beside_vits(clip) + [
            Row("STD-Former, frames shuffled", "--control shuffle"),
            Row("STD-Former, one frame", "--control single")]),
        "evidence": ("what the parts are worth", beside_vits(clip) + [
            Row("without STDM", "--stdm_layers"),
            Row("without SMEM", "--smem_t_layers"),
            Row("without PTM", "--ptm_layers"),
            Row("CTM's values instead of its attention", variant="ctm_values"),
            Row("without CPE", variant="no_cpe")]),
    }

# ----- The runs -------------------------------------------------------------

class Run:
    """A row with a seed: its two commands, its folder and its result."""

    def __init__(self, row, seed, args):
        # The folder's name says what differs from the default.
        name = ",".join([row.variant or "std_former", *row.flags.split()])
        self.folder = Path(args.out_dir, name.replace(",--", "--"), f"seed{seed}")
        self.result_file = self.folder / "result.json"
        self.log_file = self.folder / "printed.txt"
        self.train = [*self.program(row, "train", args.gpus_per_run), "--dataset", args.dataset,
                      "--data_root", args.data_root, *args.train_flags, *row.flags.split(),
                      "--seed", str(seed), "--out_dir", str(self.folder)]
        self.evaluate = [*self.program(row, "evaluate", args.gpus_per_run),
                         "--ckpt", str(self.folder / "last.pt"), *args.evaluate_flags]

    def program(self, row, which, processes):
        words = ["python"]
        if processes > 1:
            words += f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split()
        if row.variant:
            return words + [os.path.relpath(ROOT / "scripts" / "variants.py"), row.variant, which]
        return words + [os.path.relpath(ROOT / f"{which}.py")]

    def result(self):
        """What run() has written, or None. ValueError if that was another command."""
        if not self.result_file.is_file():
            return None
        result = json.loads(self.result_file.read_text())
        if result["command"] != shlex.join(self.train):
            raise ValueError(f"{self.result_file} is the result of `{result['command']}`, not of "
                             f"`{shlex.join(self.train)}`; give another --out_dir")
        return result

    def run(self, environment, running):
        """Train or resume, evaluate, and write the result. Returns what to print."""
        self.folder.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if Path(self.folder, "last.pt").is_file() else []
        printed = self.execute(self.train + resume, environment, running)
        if re.search("^done: ", printed, re.MULTILINE):
            printed += self.execute(self.evaluate, environment, running)
        score = re.search(r"^top1 ([\d.]+) top5 ([\d.]+) .*", printed, re.MULTILINE)
        if not score:
            errors = re.findall(r"^(?:train|evaluate|variants)\.py: .*", printed, re.MULTILINE)
            lines = errors or printed.strip().split("\n")
            return f"{lines[-1]} (all of it: {self.log_file})"
        parameters = re.search(r"([\d.]+) M parameters", printed)[1]
        result = dict(top1=float(score[1]), top5=float(score[2]), parameters=float(parameters),
                      command=shlex.join(self.train))
        unfinished = self.result_file.with_suffix(".tmp")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(unfinished, self.result_file)
        return score[0]

    def execute(self, command, environment, running):
        """Run a command. What it prints is added to the log, and returned."""
        with open(self.log_file, "ab") as f:
            start = f.tell()
            process = subprocess.Popen([sys.executable, *command[1:]], env=environment, stdout=f,
                                       stderr=subprocess.STDOUT)
            running.append(process)
            process.wait()
            running.remove(process)
        return self.log_file.read_bytes()[start:].decode(errors="replace")

def runs_of(row, args):
    """A run for each seed, and none for a published number."""
    if row.flags is None:
        return []
    return [Run(row, seed, args) for seed in args.seeds]

def visible_gpus():
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    names = [str(i) for i in range(torch.cuda.device_count())]
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(names)).split(",")[:len(names)]

def run_all(runs, args):
    """Run what has no result, args.jobs at a time. Ctrl-C and SIGTERM let the runs save and end."""
    todo = [run for run in runs if run.result() is None]
    running = []                                # processes
    gpus = visible_gpus()

    def stop(number, frame):
        todo.clear()
        for process in list(running):
            process.terminate()

    def work(job):
        environment = dict(os.environ)
        if gpus:
            first = job * args.gpus_per_run % len(gpus)
            mine = gpus[first:first + args.gpus_per_run]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        while todo:
            run = todo.pop(0)
            # Each print is one piece with its line end, since other threads print, too.
            print(shlex.join(run.train) + "\n", end="")
            print(f"{run.folder}: {run.run(environment, running)}\n", end="")

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    threads = [threading.Thread(target=work, args=[job]) for job in range(args.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

# ----- Tables and plots -----------------------------------------------------

def results_of(row, args):
    """The results of a row, one for each seed that is finished."""
    results = [run.result() for run in runs_of(row, args)]
    return [result for result in results if result is not None]

def as_text(values):
    """Mean and standard deviation over seeds: "92.0 ± 2.0", or "90.0" for a single one."""
    text = f"{np.mean(values):.1f}"
    return f"{text} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else text

def write_table(path, title, rows, args):
    """Write and print a table in Markdown."""
    flags = shlex.join(args.train_flags)
    lines = [f"**{title}**. {Path(args.data_root).name}, {args.recipe} recipe {flags}", "",
             "| row | paper, top-1 / top-5 | top-1 | top-5 | seeds | M params |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        results = results_of(row, args)
        cells = ["", "", "", ""]
        if results:
            cells = [as_text([result["top1"] for result in results]),
                     as_text([result["top5"] for result in results]),
                     str(len(results)), f"{results[0]['parameters']:.2f}"]
        lines.append("| " + " | ".join([row.label, row.paper, *cells]) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("", *lines, sep="\n")

def draw_table(path, title, rows, args):
    """A dot for each seed, and a line at their mean."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} needs matplotlib: pip install matplotlib")
        return
    rows = [row for row in rows if row.flags is not None]
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for y, row in enumerate(rows):
        scores = [result["top1"] for result in results_of(row, args)]
        if scores:
            axis.plot(np.mean(scores), y, "|", color="#0072B2", markersize=14)
            axis.plot(scores, [y] * len(scores), "o", color="#D55E00", markersize=4, alpha=0.7)
    axis.set_yticks(range(len(rows)), [row.label for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)        # the first row is at the top
    axis.set_xlabel("top-1, % (dots: seeds, line: their mean)")
    figure.suptitle(title)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)

# ----- The command ----------------------------------------------------------

def get_args(argv=None):
    """Read the flags, and those of train.py after --. Returns them and the tables."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--table", nargs="+", required=True, choices=make_tables("toy", 12, "none", False),
        help="a number is that table of the paper")
    add("--dataset", default="toy", choices=data.LAYOUTS, help="as for train.py; ssv1 is the "
        "paper's, and on the toy a run takes minutes on a CPU core")
    add("--data_root", help="folder of the data set (default: datasets/DATASET)")
    add("--out_dir", help="folder for runs, tables and plots (default: out/ablate/ and the last "
        "part of DATA_ROOT)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="with three seeds, a difference "
        "counts only if it is more than twice the deviation over them (default: 0 1 2)")
    add("--jobs", type=positive, help="runs at a time (default: as many as the GPUs allow). "
        "One GPU has room for several tiny models. On a CPU set OMP_NUM_THREADS=1 as well")
    add("--gpus_per_run", type=positive, default=1, help="processes of each run, by torchrun")
    add("--dry_run", action="store_true", help="print the commands, run nothing")
    add("train_flags", nargs="*", metavar="-- FLAGS", help="for train.py in every run; a row's own "
        "flags win")
    args = p.parse_args(argv)

    for word in ("--dataset", "--data_root", "--out_dir", "--seed", "--resume", "--max_steps"):
        if word in args.train_flags:
            p.error(f"{word} is given after --, but ablate.py chooses data, folders and seeds, and "
                    "needs complete runs; leave it out there")
    args.jobs = args.jobs or max(1, len(visible_gpus()) // args.gpus_per_run)
    args.data_root = args.data_root or f"datasets/{args.dataset}"
    args.out_dir = args.out_dir or f"out/ablate/{Path(args.data_root).name}"

    default = train.get_args(["--dataset", args.dataset])
    plain = train.get_args(["--dataset", args.dataset, *args.train_flags])
    args.recipe = plain.recipe
    args.evaluate_flags = []
    for flag in ("device", "workers", "timeout", "skip_list"):
        if getattr(plain, flag) != getattr(default, flag):
            args.evaluate_flags += [f"--{flag}", str(getattr(plain, flag))]
    depth = plain.depth or MODELS[plain.model]["depth"]
    return args, make_tables(args.dataset, depth, plain.clip, plain.mixup > 0 or plain.cutmix > 0)

def main(argv=None):
    args, tables = get_args(argv)
    runs = {}                                   # by folder: equal rows of two tables are one run
    for name in args.table:
        for row in tables[name][1]:
            for run in runs_of(row, args):
                runs[run.folder] = run
    if args.dry_run:
        for run in runs.values():
            print(shlex.join(run.train), shlex.join(run.evaluate), sep="\n")
        return
    if args.dataset == "toy":
        train.make_toy(args.data_root)          # once, before several runs look for it
    run_all(runs.values(), args)
    for name in args.table:
        title, rows = tables[name]
        if name.isdecimal():
            name, title = f"table{name}", f"Table {name}: {title}"
        write_table(Path(args.out_dir, f"{name}.md"), title, rows, args)
        draw_table(Path(args.out_dir, f"{name}.png"), title, rows, args)
    unfinished = [str(run.folder) for run in runs.values() if run.result() is None]
    if unfinished:
        sys.exit("\n".join(["\nnot finished; the same command continues:", *unfinished]))

if __name__ == "__main__":
    run_command(main)
