"""Run the tables of the paper: train and test every row, on any data set, and write the table and its plot.

    python scripts/ablate.py --table 2                                      # components, on the toy data, 3 seeds
    python scripts/ablate.py --table readings controls                      # our readings of the paper; what a table cannot show without
    python scripts/ablate.py --table 5 --dataset ssv1 --seeds 0 --gpus_per_run 4
    python scripts/ablate.py --table 3 --dry_run -- --epochs 2              # only print the commands; flags behind -- go to train.py

Each row is a call of train.py and one of evaluate.py (for controls, of scripts/variants.py), printed as it is run. What is
finished is not run again, what was stopped goes on, and a row that stands in several tables is trained once.
Reported is last.pt, not best.pt: choosing by validation accuracy would favour rows that fluctuate.
"""
import argparse
import json
import os
import queue
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
from model import MODELS, ModelConfig, STDFormer, count_macs, model_overrides
from train import get_args, replacing
from variants import VARIANTS

# ----------------------------------------------------------------------------------------------------
# The rows. (what stands in the first column, the paper's top-1 / top-5 on SSV1, flags of train.py)
# ----------------------------------------------------------------------------------------------------

CTM_ONLY = "--ptm_layers --stdm_layers --smem_layers"
CTM_PTM = "--stdm_layers --smem_layers"
CTM_SMEM = "--ptm_layers --stdm_layers"
DIFFICULTIES = (0, 0.5, 1)


def make_tables(dataset, depth):
    """{table: (title, the base it stands on, rows)}. A position p of the paper's 12 layers becomes p * depth // 12.

    Tables 5 and 6 tell thirds and halves of thirds apart: where the depth is no multiple of 6, they get six layers instead.
    """
    if depth % 6:
        six = make_tables(dataset, 6)
        deeper = {table: (*six[table][:2], [(label, paper, flags + " --depth 6") for label, paper, flags in six[table][2]]) for table in "56"}
    else:
        deeper = {}

    def at(*positions):
        return " ".join(str(i) for i in sorted({p * depth // 12 for p in positions}))

    def scaled(text, positions, flags):                 # the paper's positions, and ours where the depth differs
        return text if depth == 12 else f"{text} (here {at(*positions).replace(' ', ', ')})", flags.format(at(*positions))

    def ptm_at(text, positions, paper):
        text, flags = scaled(text, positions, "--ptm_layers {} " + CTM_PTM)
        return text, paper, flags

    def smem_at(ptm, branch, position, paper=None):
        text, flags = scaled(f"SMEM in {branch} at {position}", [position], {"T": "", "ST": "--smem_branch spatiotemporal ", "both": "--smem_branch both "}[branch] + "--smem_layers {}")
        ptm_text, ptm_flags = scaled(f"PTM {ptm[0]}-{ptm[-1]}", ptm, "--ptm_layers {}")
        return f"{ptm_text}, {text}", paper, f"{ptm_flags} {flags}"

    first, middle, last, every = range(0, 4), range(4, 8), range(8, 12), range(12)
    full = ("all four", "57.3 / 84.4", "")
    return {
        "1": ("STD-Former beside published models", "published rows as the paper cites them; test protocol 16x3x1", [
            ("MSNet", "52.1 / 82.3", None), ("TEA", "52.3 / 81.9", None), ("TDN", "55.1 / 82.9", None), ("CT-Net", "53.4 / 81.7", None),
            ("AE-Net", "54.1 / 81.7", None), ("MSMA", "55.8 / 83.1", None), ("UniFormerV2-B", "56.8 / 84.2", None),
            ("STD-Former", "57.3 / 84.4", "")] if dataset != "ssv2" else [
            ("TimeSformer-L", "62.4 / -", None), ("MSNet", "64.7 / 89.4", None), ("ViViT-L", "65.4 / 89.8", None), ("TEA", "65.1 / 89.9", None),
            ("CT-Net", "65.9 / 90.1", None), ("MViT-B", "66.2 / 90.2", None), ("MSMA", "66.2 / 90.4", None), ("TDN", "67.0 / 90.3", None),
            ("MTV-B", "67.6 / 90.4", None), ("AIM-B", "68.1 / 91.8", None), ("UniFormerV2-B", "69.5 / 92.3", None), ("STD-Former", "69.2 / 92.1", "")]),
        "2": ("components", "CTM with CLIP blocks", [
            ("CTM", "56.8 / 84.0", CTM_ONLY), ("CTM + PTM", "57.2 / 84.3", CTM_PTM), ("CTM + STDM", "57.0 / 84.2", "--ptm_layers --smem_layers"),
            ("CTM + SMEM", "57.1 / 84.2", CTM_SMEM), full]),
        "3": ("design of PTM", "CTM + PTM; the paper's prose gives 57.0 / 84.1 for the third row", [
            ("attention + 2D conv", "56.8 / 83.9", "--ptm_conv attention2d " + CTM_PTM), ("attention + 3D conv", "55.6 / 82.9", "--ptm_conv attention3d " + CTM_PTM),
            ("residual + 2D conv", "57.2 / 84.3", CTM_PTM), ("residual + 3D conv", "54.5 / 81.8", "--ptm_conv residual3d " + CTM_PTM)]),
        "4": ("fusion in SMEM", "CTM + SMEM; two of the paper's rows are lost, both below the first", [
            ("multiplication", "57.1 / 84.2", CTM_SMEM), ("addition", None, "--smem_fusion add " + CTM_SMEM), ("both", None, "--smem_fusion mul+add " + CTM_SMEM)]),
        "5": ("positions of PTM", "CTM + PTM", [
            ptm_at("0-11", every, "55.2 / 82.6"), ptm_at("0-3", first, "55.8 / 82.9"), ptm_at("4-11", range(4, 12), "56.6 / 83.5"), ptm_at("4-7", middle, "57.0 / 84.1"),
            ptm_at("8-11", last, "57.2 / 84.3"), ptm_at("8, 9", (8, 9), "56.8 / 84.0"), ptm_at("10, 11", (10, 11), "56.6 / 83.4")]),
        "6": ("PTM and SMEM together", "the full model; only the paper's best row is known, and that both branches at once are low. The other positions are ours", [
            smem_at(last, "T", 4, "57.3 / 84.4"), smem_at(last, "T", 0), smem_at(last, "T", 8), smem_at(last, "ST", 4), smem_at(last, "ST", 8), smem_at(last, "both", 4),
            smem_at(middle, "T", 4), smem_at(middle, "ST", 4)]),
        "7": ("alpha and beta of Eq. 1", "the full model, alpha and beta fixed; only the paper's best row is known, the other values are ours", [
            (f"alpha {a}, beta {b}", "57.3 / 84.4" if a == b == 1.0 else None, f"--no-learn_fusion --alpha {a} --beta {b}")
            for a, b in ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0), (0.5, 0.5), (2.0, 2.0))]),
        "readings": ("where the paper is silent", "the full model, one choice changed at a time", [
            ("default", None, ""),
            ("CTM: residual on the memory", None, "--ctm_residual memory"), ("CTM: residual on both", None, "--ctm_residual both"),
            ("CTM: CPE on query and memory", None, "--ctm_cpe both"), ("CTM: output starts at zero", None, "ctm_zero:"),
            ("PTM: 2D conv on (H, W)", None, "--ptm_conv_plane space"), ("PTM: conv instead of identity", None, "--ptm_shortcut conv"),
            ("PTM: attention over space and time", None, "--ptm_attention spacetime"), ("PTM: alpha, beta fixed at 1", None, "--no-learn_fusion --alpha 1.0 --beta 1.0"),
            ("stem: stride 1, twice the frames", None, "--stem_stride 1"), ("stem: kernel over 1 frame", None, "--stem_kernel 1"),
            ("STDM: last third only", None, f"--stdm_layers {' '.join(str(i) for i in range(depth - 1 - depth // 3, depth - 1))}"), ("STDM: nowhere", None, "--stdm_layers"),
            ("SMEM: gates instead of adds", None, "smem_gate:"), ("head: fused with the ST-branch", None, "--head fused")]),
        "controls": ("controls", "what is learned without order, without motion, and by plain transformers of equal parameters and arithmetic", [
            ("STD-Former", None, ""), ("ViT with divided attention", None, "divided:"), ("frame-wise ViT, averaged", None, "frames:"),
            ("STD-Former, frames shuffled", None, "--control shuffle"), ("STD-Former, one frame", None, "--control single")]),
        "difficulty": ("accuracy against difficulty", "the toy's --difficulty: long clips with a short motion, low contrast, texture, moving distractors", [
            (f"{name}, difficulty {d:g}", None, f"{flags}@{d:g}")
            for name, flags in (("STD-Former", ""), ("ViT with divided attention", "divided:"), ("frame-wise ViT, averaged", "frames:")) for d in DIFFICULTIES]),
        **deeper,
    }


# ----------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------


def python(*words):
    """A command line for this Python; programs of the repository by their path from here, so that it can be copied from the screen."""
    return [sys.executable] + [os.path.relpath(ROOT / word) if word.endswith(".py") else word for word in words]


def printable(command):
    return shlex.join(["python"] + command[1:])


class Run:
    """One row with one seed: its commands, its folder, its result."""

    def __init__(self, args, flags, seed):
        flags, _, difficulty = flags.partition("@")
        self.variant, _, flags = flags.rpartition(":")
        root = args.data_root + (f"_difficulty{difficulty}" if float(difficulty or 0) else "")
        self.make_data = python("data.py") + ["toy", "--data_root", root, "--difficulty", difficulty] if root != args.data_root else None
        data_flags = ["--dataset", args.dataset, "--data_root", root]
        train_flags = data_flags + shlex.split(flags) + args.train_flags

        # The folder is named by what differs from the plain model, so that equal rows of two tables are one run.
        self.config, plain = (ModelConfig(**{**MODELS[a.model], **model_overrides(a), "num_classes": args.classes})
                              for a in (get_args(train_flags), get_args(data_flags + args.train_flags)))
        name = [self.variant or "std_former"]
        for field, value in asdict(self.config).items():
            if value != asdict(plain)[field]:
                name.append(f"{field}-" + (".".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)))
        name += [f"control-{control}" for control in re.findall(r"--control (\w+)", flags)] + [f"difficulty-{difficulty}"] * bool(self.make_data)
        self.folder = Path(args.out_dir) / args.dataset / ",".join(name) / f"seed{seed}"
        self.result_file = self.folder.with_suffix(".json")

        start = [] if args.gpus_per_run < 2 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus_per_run}"]
        def program(name):
            return python(*start, *(["scripts/variants.py", self.variant, name] if self.variant else [f"{name}.py"]))
        self.train = program("train") + train_flags + ["--seed", str(seed), "--out_dir", str(self.folder)]
        self.evaluate = program("evaluate") + ["--ckpt", str(self.folder / "last.pt")]

    def result(self):
        """dict(top1, top5, line), or None when the run is not finished. Raises ValueError when it was run with other flags."""
        if not self.result_file.is_file():
            return None
        found = json.loads(self.result_file.read_text())
        if found["command"] != printable(self.train):
            raise ValueError(f"{self.result_file}: was run as\n  {found['command']}\nand would now be\n  {printable(self.train)}\ngive the same flags, or another --out_dir")
        return found

    def go(self, environment):
        """Train (or go on), evaluate, write the result. Returns what went wrong, "" for nothing."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        said = self.folder.with_suffix(".txt")
        for command, end in (self.train + ["--resume"] * (self.folder / "config.json").is_file(), "done: .*"), (self.evaluate, r"top1 ([\d.]+) top5 ([\d.]+) clips .*"):
            output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace").stdout
            with open(said, "a") as f:
                f.write(output)
            found = re.search(f"^{end}$", output, re.MULTILINE)
            if not found:                               # failed, or stopped by Ctrl-C: then there is nothing to evaluate yet
                lines = output.strip().splitlines() or ["nothing was printed"]
                return f"{self.folder}: {next((line for line in lines if re.match(r'(train|evaluate|variants).py: ', line)), lines[-1])} (all of it: {said})"
        result = dict(top1=float(found[1]), top5=float(found[2]), line=found[0], command=printable(self.train))
        with replacing(self.result_file) as beside:
            beside.write_text(json.dumps(result, indent=1) + "\n")
        return ""


def run_all(runs, args):
    """Run what is not finished, args.jobs at a time, each on its own GPUs or cores. Returns what went wrong."""
    todo = list({run.folder: run for run in runs if run.result() is None}.values())
    for command in {tuple(run.make_data): run.make_data for run in todo if run.make_data}.values():
        subprocess.run(command, check=True)
    gpus, cores = torch.cuda.device_count(), sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    slots, errors = queue.Queue(), []
    for i in range(args.jobs):
        slots.put(i)

    def one(run):
        slot, environment = slots.get(), dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str((slot * args.gpus_per_run + k) % gpus) for k in range(args.gpus_per_run))
        elif len(cores) >= args.jobs:                   # of this thread, and so of the processes that it starts
            share = len(cores) // args.jobs
            os.sched_setaffinity(0, cores[slot * share:(slot + 1) * share])
        print(f"{printable(run.train)}\n{printable(run.evaluate)}\n", end="", flush=True)       # in one piece, as other threads print too
        error = run.go(environment)
        slots.put(slot)
        print(f"  {error or run.result()['line']}  <- {run.folder}\n", end="", flush=True)
        errors.extend([error] if error else [])

    threads = ThreadPoolExecutor(args.jobs)
    try:
        list(threads.map(one, todo))
    finally:                                            # Ctrl-C reached the runs too, and they save; no other is begun
        threads.shutdown(cancel_futures=True)
    return errors


# ----------------------------------------------------------------------------------------------------
# Tables and plots
# ----------------------------------------------------------------------------------------------------


def mean_and_deviation(values):
    """Over seeds; a single one has no deviation, which counts as 0."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0


def spread(values):
    """Both as text, without the deviation for a single seed."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.1f}" + (f" ± {deviation:.1f}" if len(values) > 1 else "")


def write_table(path, title, base, rows, args):
    """Markdown: one line per row with the paper's numbers beside ours. rows: (label, paper, [Run per seed])."""
    lines = [f"**{title}** ({base}). {args.dataset}, seeds {' '.join(map(str, args.seeds))}" + (f", train.py flags {shlex.join(args.train_flags)}" if args.train_flags else ""), "",
             "| | paper, top-1 / top-5 | top-1 | top-5 | seeds | M params | GMACs |", "|---|---|---|---|---|---|---|"]
    for label, paper, runs in rows:
        results = [r for r in (run.result() for run in runs) if r]
        cost = ["", ""]
        if runs:
            with torch.device("meta"):
                model = VARIANTS.get(runs[0].variant, STDFormer)(runs[0].config)
                cost = [f"{sum(p.numel() for p in model.parameters()) / 1e6:.3g}", f"{count_macs(model)['Global'] / 1e9:.3g}"]
        ours = [spread([r[k] for r in results]) if results else "not run" if runs else "" for k in ("top1", "top5")]
        lines.append("| " + " | ".join([label, paper or "", *ours, str(len(results)) if runs else "", *cost]) + " |")
    path.write_text("\n".join(lines) + "\n")
    print("\n" + path.read_text())


def top1_by_row(rows):
    """[(label, top-1 of each finished seed)], without rows that have none."""
    return [(label, values) for label, _, runs in rows if (values := [r["top1"] for r in (run.result() for run in runs) if r])]


def draw_table(path, title, rows):
    """One dot per seed and a bar of one standard deviation around their mean, row by row. Needs matplotlib."""
    from matplotlib.figure import Figure
    rows = top1_by_row(rows)
    figure = Figure(figsize=(7, 0.9 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for y, (label, values) in enumerate(rows):
        mean, deviation = mean_and_deviation(values)
        axis.errorbar(mean, y, xerr=deviation, fmt="|", color="#0072B2", capsize=4, markersize=12)
        axis.plot(values, [y] * len(values), "o", color="#D55E00", markersize=4, alpha=0.7)
    axis.set_yticks(range(len(rows)), [label for label, _ in rows])
    axis.set(xlabel="top-1, % (dots: seeds; bar: mean and one standard deviation)", title=title, ylim=(max(len(rows), 1) - 0.5, -0.5))
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_difficulty(path, rows):
    """Accuracy against difficulty, one line per model, with one standard deviation."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(label.split(", difficulty ")[0] for label, _, _ in rows))
    for name, color, marker in zip(names, ("#0072B2", "#D55E00", "#999999"), "os^"):
        points = [(float(label.split(", difficulty ")[1]), *mean_and_deviation(values))
                  for label, values in top1_by_row(rows) if label.startswith(name + ", difficulty")]
        if points:
            d, mean, deviation = zip(*points)
            axis.errorbar(d, mean, yerr=deviation, label=name, color=color, marker=marker, capsize=3)
    axis.axhline(10, color="black", linewidth=0.8, linestyle=":")
    axis.annotate("chance", (0, 10), xytext=(2, 2), textcoords="offset points")
    axis.set(xlabel="difficulty of the toy", ylabel="top-1, %", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    names = list(make_tables("toy", 12))
    p.add_argument("--table", nargs="+", required=True, choices=names + ["all"], help="numbers are the paper's; 5 and 6 use six layers where the model's depth does not divide into the paper's positions")
    p.add_argument("--dataset", default="toy", choices=data.DATASETS, help="ssv1 is the paper's; the toy takes minutes per row on a CPU core")
    p.add_argument("--data_root", help="folder of the data set (default: datasets/DATASET)")
    p.add_argument("--out_dir", default="out/ablate", help="runs, tables and plots go here; the same folder goes on where it stopped (default: %(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="differences below the deviation over seeds mean nothing (default: 0 1 2)")
    p.add_argument("--jobs", type=int, help="rows at a time (default: as many as there are GPUs for, or CPU cores). One GPU has room for several tiny models")
    p.add_argument("--gpus_per_run", type=int, default=1, help="processes (torchrun) of each row; 4 for b16 as in the paper")
    p.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    p.add_argument("--report_only", action="store_true", help="run nothing, write tables and plots of what is finished, for instance while another process runs the rows")
    p.add_argument("train_flags", nargs="*", metavar="-- FLAGS", help="for every row's train.py, behind --")
    args = p.parse_args(argv)
    args.data_root = (args.data_root or f"datasets/{args.dataset}").rstrip("/")
    args.jobs = args.jobs or max(1, torch.cuda.device_count() // args.gpus_per_run if torch.cuda.is_available() else (os.cpu_count() or 1) // args.gpus_per_run)
    if "difficulty" in args.table and args.dataset != "toy":
        p.error("--table difficulty: only the toy has a difficulty; use --dataset toy")
    if args.dataset == "toy" and not args.dry_run:
        data.make_toy(args.data_root)
    args.classes = 174 if args.dry_run else len(data.read_classes(args.dataset, args.data_root, quiet=True))

    plain = get_args(["--dataset", args.dataset] + args.train_flags)
    tables, wanted = make_tables(args.dataset, plain.depth or MODELS[plain.model]["depth"]), {}
    for table in names if "all" in args.table else args.table:
        title, base, rows = tables[table]
        wanted[table] = title, base, [(label, paper, [Run(args, flags, seed) for seed in args.seeds] if flags is not None else []) for label, paper, flags in rows]
    runs = [run for _, _, rows in wanted.values() for _, _, row in rows for run in row]
    if args.dry_run:
        for run in {run.folder: run for run in runs}.values():
            print(f"{printable(run.train)}\n{printable(run.evaluate)}")
        return 0
    errors = [] if args.report_only else run_all(runs, args)
    for table, (title, base, rows) in wanted.items():
        stem = Path(args.out_dir) / args.dataset / (f"table{table}" if table.isdecimal() else table)
        write_table(stem.with_suffix(".md"), f"Table {table}: {title}" if table.isdecimal() else title, base, rows, args)
        try:
            draw_difficulty(stem.with_suffix(".png"), rows) if table == "difficulty" else draw_table(stem.with_suffix(".png"), title, rows)
        except ImportError:
            print(f"{stem}.png: not drawn, it needs matplotlib (pip install matplotlib)")
    for error in errors:
        print(error)
    return 1 if errors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"ablate.py: {e}")
