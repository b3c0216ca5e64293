"""Run the tables of the paper: train and test every row, on any data set, and write the table and its plot.

    python scripts/ablate.py --table 2                                      # components, on the toy data, 3 seeds
    python scripts/ablate.py --table readings controls                      # our readings of the paper; what a table cannot show without
    python scripts/ablate.py --table 5 --dataset ssv1 --seeds 0 --gpus_per_run 4
    python scripts/ablate.py --table 3 --dry_run -- --epochs 2              # only print the commands; flags behind -- go to train.py

Each row is a call of train.py and one of evaluate.py (for some, of scripts/variants.py), printed as it is run. What is
finished is not run again, what was stopped goes on, and a row that stands in several tables is trained once. One process
per --out_dir: nothing locks it. Reported is last.pt, not best.pt: choosing by validation accuracy would favour rows that fluctuate.
"""
import argparse
import json
import os
import queue
import re
import shlex
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
from model import MODELS, STDFormer, config_from_flags, count_macs, one_video
from train import get_args, replacing
from variants import VARIANTS

# ----------------------------------------------------------------------------------------------------
# The rows
# ----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    label: str
    flags: str | None = ""                              # of train.py; None: a published number, nothing to run
    paper: str | None = None                            # its top-1 / top-5
    variant: str = ""                                   # of scripts/variants.py, "" for STD-Former itself
    difficulty: float = 0                               # of the toy


class Table(NamedTuple):
    title: str
    base: str                                           # what all of its rows have in common
    rows: list
    source: str = "SSV1"                                # the data set of the paper's numbers


CTM_ONLY = "--ptm_layers --stdm_layers --smem_layers"
CTM_PTM = "--stdm_layers --smem_layers"
CTM_SMEM = "--ptm_layers --stdm_layers"
DIFFICULTIES = (0, 0.25, 0.5)                           # at 0.5 four epochs lead to a third; 1 was not tried


def layer_numbers(first, last, depth):
    """Our layers for the paper's positions first ... last of 12, as a flag takes them: equal shares of the depth."""
    return " ".join(str(i) for i in range(first * depth // 12, (last + 1) * depth // 12))


def make_tables(dataset, depth):
    """{name: Table} for a data set and a model of `depth` layers.

    Tables 5 and 6 tell halves of thirds apart: where the depth is no multiple of 6, their models get six layers instead.
    """
    layers, deeper = (depth, "") if depth % 6 == 0 else (6, " --depth 6")

    def here(numbers):                                  # beside the paper's positions, where ours differ
        return "" if layers == 12 else f" (here {numbers.replace(' ', ', ')})"

    def ptm_row(first, last, paper):
        at = layer_numbers(first, last, layers)
        return Row(f"{first}-{last}{here(at)}", f"--ptm_layers {at} {CTM_PTM}{deeper}", paper)

    def smem_row(ptm, branch, position, paper=None):
        at, smem = layer_numbers(*ptm, layers), str(position * layers // 12)
        where = {"temporal": "the T-branch", "spatiotemporal": "the ST-branch", "both": "both"}[branch]
        return Row(f"PTM {ptm[0]}-{ptm[1]}{here(at)}, SMEM in {where} at {position}{here(smem)}",
                   f"--ptm_layers {at} --smem_branch {branch} --smem_layers {smem}{deeper}", paper)

    def fixed(alpha, beta):
        return Row(f"alpha {alpha}, beta {beta}", f"--no-learn_fusion --alpha {alpha} --beta {beta}")

    published = dict(
        ssv1={"MSNet": "52.1 / 82.3", "TEA": "52.3 / 81.9", "TDN": "55.1 / 82.9", "CT-Net": "53.4 / 81.7", "AE-Net": "54.1 / 81.7",
              "MSMA": "55.8 / 83.1", "UniFormerV2-B": "56.8 / 84.2", "STD-Former": "57.3 / 84.4"},
        ssv2={"TimeSformer-L": "62.4 / -", "MSNet": "64.7 / 89.4", "ViViT-L": "65.4 / 89.8", "TEA": "65.1 / 89.9", "CT-Net": "65.9 / 90.1",
              "MViT-B": "66.2 / 90.2", "MSMA": "66.2 / 90.4", "TDN": "67.0 / 90.3", "MTV-B": "67.6 / 90.4", "AIM-B": "68.1 / 91.8",
              "UniFormerV2-B": "69.5 / 92.3", "STD-Former": "69.2 / 92.1"})["ssv2" if dataset == "ssv2" else "ssv1"]
    into_last_third = " ".join(str(i) for i in range(depth - 1 - depth // 3, depth - 1))
    # The plain ViTs have no CLIP weights that fit; where STD-Former starts from CLIP, it is compared with them without.
    untrained, without = ("", "") if dataset == "toy" else (" --clip none", ", without CLIP weights")
    plain = (("STD-Former", ""), ("ViT with divided attention", "divided"), ("frame-wise ViT, averaged", "frames"))
    return {
        "1": Table("STD-Former beside published models", "the paper's numbers have several protocols, 16x1x1 to 64x1x3; ours and UniFormerV2-B's is 16x3x1", [
            Row(name, "" if name == "STD-Former" else None, paper) for name, paper in published.items()], "SSV2" if dataset == "ssv2" else "SSV1"),
        "2": Table("components", "the base is CTM with plain blocks", [
            Row("CTM", CTM_ONLY, "56.8 / 84.0"), Row("CTM + PTM", CTM_PTM, "57.2 / 84.3"), Row("CTM + STDM", "--ptm_layers --smem_layers", "57.0 / 84.2"),
            Row("CTM + SMEM", CTM_SMEM, "57.1 / 84.2"), Row("all four", "", "57.3 / 84.4")]),
        "3": Table("design of PTM", "CTM + PTM; the paper's prose gives 57.0 / 84.1 for the third row", [
            Row("attention + 2D conv", "--ptm_conv attention2d " + CTM_PTM, "56.8 / 83.9"), Row("attention + 3D conv", "--ptm_conv attention3d " + CTM_PTM, "55.6 / 82.9"),
            Row("residual + 2D conv", CTM_PTM, "57.2 / 84.3"), Row("residual + 3D conv", "--ptm_conv residual3d " + CTM_PTM, "54.5 / 81.8")]),
        "4": Table("fusion in SMEM", "CTM + SMEM; two of the paper's rows are lost, both below the first", [
            Row("multiplication", CTM_SMEM, "57.1 / 84.2"), Row("addition", "--smem_fusion add " + CTM_SMEM), Row("both", "--smem_fusion mul+add " + CTM_SMEM)]),
        "5": Table("positions of PTM", f"CTM + PTM, {layers} layers; the paper's prose gives 57.2 / 84.1 for 8-11", [
            ptm_row(0, 11, "55.2 / 82.6"), ptm_row(0, 3, "55.8 / 82.9"), ptm_row(4, 11, "56.6 / 83.5"), ptm_row(4, 7, "57.0 / 84.1"),
            ptm_row(8, 11, "57.2 / 84.3"), ptm_row(8, 9, "56.8 / 84.0"), ptm_row(10, 11, "56.6 / 83.4")]),
        "6": Table("PTM and SMEM together", f"the full model, {layers} layers; only the paper's best row is known, and that both branches at once are low. The other positions are ours", [
            smem_row((8, 11), "temporal", 4, "57.3 / 84.4"), smem_row((8, 11), "temporal", 0), smem_row((8, 11), "temporal", 8),
            smem_row((8, 11), "spatiotemporal", 4), smem_row((8, 11), "spatiotemporal", 8), smem_row((8, 11), "both", 4),
            smem_row((4, 7), "temporal", 4), smem_row((4, 7), "spatiotemporal", 4)]),
        "7": Table("alpha and beta of Eq. 1", "the full model with fixed alpha and beta, which are learned elsewhere; the paper's numbers are lost, but that 1, 1 is best. The other values are ours", [
            fixed(*pair) for pair in ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0), (0.5, 0.5), (2.0, 2.0))]),
        "readings": Table("where the paper is silent", "the full model, one choice changed at a time", [
            Row("default"),
            Row("DPE: no BatchNorm", variant="dpe_no_bn"), Row("DPE: as wide as its input, no BatchNorm, no drop path", variant="dpe_wide"),
            Row("PTM: 2D conv on (H, W)", "--ptm_conv_plane space"), Row("PTM: conv instead of identity", "--ptm_shortcut conv"),
            Row("PTM: attention over space and time", "--ptm_attention spacetime"), Row("PTM: alpha, beta fixed at 1", fixed(1.0, 1.0).flags),
            Row("CTM: residual on the memory", "--ctm_residual memory"), Row("CTM: residual on both", "--ctm_residual both"),
            Row("CTM: CPE on the query", variant="cpe_query"), Row("CTM: CPE on query and memory", "--ctm_cpe both"),
            Row("CTM: output starts at zero", variant="ctm_zero"),
            Row("stem: stride 1, twice the token frames", "--stem_stride 1"), Row("stem: kernel over 1 frame, skips every second", "--stem_kernel 1"),
            Row("STDM: dense convolutions", variant="stdm_dense"),
            Row("STDM: into the last third only", f"--stdm_layers {into_last_third}"), Row("STDM: nowhere", "--stdm_layers"),
            Row("SMEM: features of unit length", variant="smem_unit"), Row("SMEM: ReLU behind the correlation", variant="smem_relu"),
            Row("SMEM: unit length and ReLU", variant="smem_unit_relu"), Row("SMEM: gates instead of adds", variant="smem_gate"),
            Row("head: fused with the ST-branch", "--head fused"),
            Row("loss: MixUp and CutMix too", "--mixup 0.8 --cutmix 1.0")]),
        "controls": Table("controls", "what is learned without order or without motion, and by plain transformers: parameters within 7 %, arithmetic within 11 %", [
            *(Row(name + without, untrained, variant=variant) for name, variant in plain), *([Row("STD-Former")] if without else []),
            Row("STD-Former, frames shuffled", "--control shuffle"), Row("STD-Former, one frame", "--control single")]),
        "difficulty": Table("accuracy against difficulty", "the toy's --difficulty: long clips with a short motion, low contrast, texture, moving distractors", [
            Row(f"{name}, difficulty {d:g}", variant=variant, difficulty=d) for name, variant in plain for d in DIFFICULTIES]),
    }


# ----------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------

NO_MATTER = ("out_dir", "resume", "workers", "timeout", "log_every", "eval_every", "save_minutes")       # to the result of a run
running = set()                                         # processes, for SIGTERM


def python(*words):
    """A command line for this Python; programs of the repository by their path from here, so that it can be copied from the screen."""
    return [sys.executable] + [os.path.relpath(ROOT / word) if word.endswith(".py") else word for word in words]


def printable(command):
    return shlex.join(["python"] + command[1:])


class Run:
    """One row with one seed: its commands, its folder, its result."""

    def __init__(self, args, row, seed):
        self.variant, self.make_data, root = row.variant, None, args.data_root
        if row.difficulty:                              # as many clips of the same seed as the plain toy has
            stamp = data.read_json(Path(root, "toy.json")) if Path(root, "toy.json").is_file() else {}
            root = f"{root}_difficulty{row.difficulty:g}"
            self.make_data = python("data.py") + ["toy", "--data_root", root, "--difficulty", f"{row.difficulty:g}"]
            self.make_data += [word for key in ("seed", "train", "validation") if key in stamp for word in (f"--{key}", str(stamp[key]))]

        # A row's own flags come last, and so win.
        common = ["--dataset", args.dataset, "--data_root", root] + args.train_flags
        flags = common + shlex.split(row.flags) + ["--seed", str(seed)]
        trained, plain, bare = (get_args(words) for words in (flags, common, ["--dataset", args.dataset]))
        self.config, plain_config = (config_from_flags(a, num_classes=args.classes) for a in (trained, plain))
        self.settings = {key: value for key, value in {**vars(trained), **asdict(self.config)}.items() if key not in NO_MATTER}
        self.settings.update(variant=row.variant, data_root=os.path.abspath(root), gpus_per_run=args.gpus_per_run)

        # The folder is named by what differs from the plain model, so that equal rows of two tables are one run.
        name = [row.variant or "std_former"]
        for key, value in {**vars(plain), **asdict(plain_config)}.items():
            if self.settings.get(key, value) != value and key not in ("seed", "data_root"):
                found = self.settings[key]
                name.append(f"{key}-" + (".".join(map(str, found)) or "none" if isinstance(found, tuple) else str(found)))
        name += [f"difficulty-{row.difficulty:g}"] * bool(row.difficulty)
        self.folder = Path(args.out_dir) / args.dataset / ",".join(name) / f"seed{seed}"
        self.result_file = self.folder.with_suffix(".json")

        start = [] if args.gpus_per_run < 2 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus_per_run}"]
        def program(which):
            return python(*start, *(["scripts/variants.py", self.variant, which] if self.variant else [f"{which}.py"]))
        self.train = program("train") + flags + ["--out_dir", str(self.folder)]
        self.evaluate = program("evaluate") + ["--ckpt", str(self.folder / "last.pt")]
        for flag in ("device", "workers", "timeout", "skip_list"):
            if getattr(trained, flag) != getattr(bare, flag):
                self.evaluate += [f"--{flag}", str(getattr(trained, flag))]

    def result(self):
        """dict(top1, top5, line), or None when the run is not finished. Raises ValueError when it was run with other flags."""
        if not self.result_file.is_file():
            return None
        found, now = data.read_json(self.result_file), json.loads(json.dumps(self.settings))             # tuples as JSON has them
        then = found.get("settings", {})
        other = [f"  {k}: {then.get(k)!r}, now {v!r}" for k, v in now.items() if then.get(k) != v]
        if other:
            raise ValueError(f"{self.result_file}: was run with other flags; give the same, or another --out_dir:\n" + "\n".join(other))
        return found

    def go(self, environment):
        """Train (or go on), evaluate, write the result. Returns what went wrong, "" for nothing."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        said = self.folder.with_suffix(".txt")
        for command, end in (self.train + ["--resume"] * (self.folder / "config.json").is_file(), "done: .*"), (self.evaluate, r"top1 ([\d.]+) top5 ([\d.]+) clips .*"):
            with open(said, "ab") as f:
                start = f.tell()
                process = subprocess.Popen(command, env=environment, stdout=f, stderr=subprocess.STDOUT)
                running.add(process)
                process.wait()
                running.discard(process)
            output = said.read_bytes()[start:].decode(errors="replace")
            found = re.search(f"^{end}$", output, re.MULTILINE)
            if not found:                               # failed, or stopped by Ctrl-C: then there is nothing to evaluate yet
                lines = output.strip().splitlines() or ["nothing was printed"]
                return f"{self.folder}: {next((line for line in lines if re.match(r'(train|evaluate|variants).py: ', line)), lines[-1])} (all of it: {said})"
        result = dict(top1=float(found[1]), top5=float(found[2]), line=found[0], command=printable(self.train), settings=self.settings)
        with replacing(self.result_file) as beside:
            beside.write_text(json.dumps(result, indent=1) + "\n")
        return ""


def visible_gpus():
    """What CUDA_VISIBLE_DEVICES may name, one entry per GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return named if named != [""] and torch.cuda.is_available() else [str(i) for i in range(torch.cuda.device_count())]


def make_all_data(runs):
    """Make the harder toys that are needed (again and again costs nothing)."""
    for command in {tuple(run.make_data): run.make_data for run in runs if run.make_data and run.result() is None}.values():
        print(printable(command), flush=True)
        if subprocess.run(command).returncode:
            raise ValueError(f"{printable(command)}: failed, see above")


def run_all(runs, args):
    """Run what is not finished, args.jobs at a time, each on its own GPUs or cores. Returns what went wrong."""
    todo = list({run.folder: run for run in runs if run.result() is None}.values())
    gpus, cores = visible_gpus(), data.usable_cores()
    slots, errors = queue.Queue(), []
    for i in range(args.jobs):
        slots.put(i)

    def one(run):
        slot, environment = slots.get(), dict(os.environ)
        try:
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[(slot * args.gpus_per_run + k) % len(gpus)] for k in range(args.gpus_per_run))
            if hasattr(os, "sched_setaffinity") and len(cores) >= args.jobs:              # of this thread, and so of the processes that it starts
                share = len(cores) // args.jobs
                os.sched_setaffinity(0, cores[slot * share:(slot + 1) * share])
            print(f"{printable(run.train)}\n{printable(run.evaluate)}\n", end="", flush=True)       # in one piece, as other threads print too
            error = run.go(environment)
            print(f"  {error or run.result()['line']}  <- {run.folder}\n", end="", flush=True)
        except OSError as e:                            # a full disk, say
            error = f"{run.folder}: {e}"
        finally:
            slots.put(slot)
        errors.extend([error] if error else [])

    threads = ThreadPoolExecutor(args.jobs)
    try:
        list(threads.map(one, todo))
    finally:                                            # Ctrl-C reached the runs too, and they save; no other is begun
        threads.shutdown(cancel_futures=True)
    return errors


def stop(*_):
    """For SIGTERM, which unlike Ctrl-C reaches this process alone: pass it on, so that the runs save and end."""
    for process in list(running):
        process.terminate()
    raise KeyboardInterrupt


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


def write_table(path, title, table, runs, args):
    """Markdown: one line per row, with the paper's numbers beside ours where it has any. runs: a list per row, one Run per seed."""
    paper = [f"paper, {table.source}, top-1 / top-5"] * any(row.paper for row in table.rows)
    columns = ["row", *paper, "top-1", "top-5", "seeds", "M params", "GMACs"]
    lines = [f"**{title}** ({table.base}). {args.dataset}, seeds {' '.join(map(str, args.seeds))}" + (f", train.py flags {shlex.join(args.train_flags)}" if args.train_flags else ""), "",
             "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row, row_runs in zip(table.rows, runs):
        results = [r for r in (run.result() for run in row_runs) if r]
        cost = ["", ""]
        if row_runs:
            with torch.device("meta"):
                model = VARIANTS.get(row.variant, STDFormer)(row_runs[0].config)
                cost = [f"{sum(p.numel() for p in model.parameters()) / 1e6:.3g}", f"{count_macs(model, one_video(model.config))['Global'] / 1e9:.3g}"]
        ours = [spread([r[k] for r in results]) if results else "not run" if row_runs else "" for k in ("top1", "top5")]
        lines.append("| " + " | ".join([row.label, *[row.paper or ""] * len(paper), *ours, str(len(results)) if row_runs else "", *cost]) + " |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print("\n" + path.read_text())


def top1_by_row(table, runs):
    """[(row, top-1 of each finished seed)], without rows that have none."""
    return [(row, values) for row, row_runs in zip(table.rows, runs) if (values := [r["top1"] for r in (run.result() for run in row_runs) if r])]


def draw_table(path, title, table, runs):
    """One dot per seed and a bar of one standard deviation around their mean, row by row. Needs matplotlib."""
    from matplotlib.figure import Figure
    rows = top1_by_row(table, runs)
    figure = Figure(figsize=(7, 0.9 + 0.32 * max(len(rows), 3)), layout="constrained")
    axis = figure.subplots()
    for y, (_, values) in enumerate(rows):
        mean, deviation = mean_and_deviation(values)
        axis.errorbar(mean, y, xerr=deviation, fmt="|", color="#0072B2", capsize=4, markersize=12)
        axis.plot(values, [y] * len(values), "o", color="#D55E00", markersize=4, alpha=0.7)
    axis.set_yticks(range(len(rows)), [row.label for row, _ in rows])
    axis.set(xlabel="top-1, %\ndots: seeds; bar: mean and one standard deviation", title=title, ylim=(max(len(rows), 1) - 0.5, -0.5))
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_difficulty(path, table, runs):
    """Accuracy against difficulty, one line per model, with one standard deviation."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axis = figure.subplots()
    rows = top1_by_row(table, runs)
    for variant, color, marker in zip(dict.fromkeys(row.variant for row, _ in rows), ("#0072B2", "#D55E00", "#999999"), "os^"):
        ours = [(row, *mean_and_deviation(values)) for row, values in rows if row.variant == variant]
        axis.errorbar([row.difficulty for row, _, _ in ours], [mean for _, mean, _ in ours], yerr=[deviation for _, _, deviation in ours],
                      label=ours[0][0].label.split(", difficulty")[0], color=color, marker=marker, capsize=3)
    axis.axhline(10, color="black", linewidth=0.8, linestyle=":")
    axis.annotate("chance", (0, 10), xytext=(2, 3), textcoords="offset points", fontsize=9)
    axis.set(xlabel="difficulty of the toy", ylabel="top-1, % (bar: one standard deviation)", ylim=(0, 100), xticks=DIFFICULTIES)
    axis.grid(alpha=0.3)
    if rows:
        axis.legend()
    figure.savefig(path, dpi=110)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    names = list(make_tables("toy", 12))
    p.add_argument("--table", nargs="+", required=True, choices=names + ["all"], help="numbers are the paper's; 5 and 6 use six layers where the model's depth is no multiple of 6. "
                   "all leaves out 1 on the toy, and difficulty elsewhere")
    p.add_argument("--dataset", default="toy", choices=data.DATASETS, help="ssv1 is the paper's; the toy takes minutes per row on a CPU core")
    p.add_argument("--data_root", help="folder of the data set (default: datasets/DATASET)")
    p.add_argument("--out_dir", default="out/ablate", help="runs, tables and plots go here; the same folder goes on where it stopped (default: %(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="differences below the deviation over seeds mean nothing (default: 0 1 2)")
    p.add_argument("--jobs", type=int, help="rows at a time (default: as many as there are GPUs for, or CPU cores). One GPU has room for several tiny models")
    p.add_argument("--gpus_per_run", type=int, default=1, help="processes (torchrun) of each row; 4 for b16 as in the paper")
    p.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    p.add_argument("--report_only", action="store_true", help="run nothing, write tables and plots of what is finished, for instance while another process runs the rows")
    p.add_argument("train_flags", nargs="*", metavar="-- FLAGS", help="for every row's train.py, behind --; a row's own flags win")
    args = p.parse_args(argv)
    taken = [word for word in args.train_flags if re.match(r"--(dataset|data_root|out_dir|seed|resume|control|dry_run|max_steps)\b", word)]
    if taken:
        p.error(f"{taken[0]} behind --: ablate.py sets it itself; use its own flag of that name, if it has one")
    plain = get_args(["--dataset", args.dataset] + args.train_flags)
    args.data_root = (args.data_root or f"datasets/{args.dataset}").rstrip("/")
    gpus = visible_gpus()
    if gpus and len(gpus) < args.gpus_per_run:
        p.error(f"--gpus_per_run {args.gpus_per_run}: expected at most the {len(gpus)} GPUs that are there")
    args.jobs = args.jobs or max(1, len(gpus or data.usable_cores()) // args.gpus_per_run)
    if "difficulty" in args.table and args.dataset != "toy":
        p.error("--table difficulty: only the toy has a difficulty; use --dataset toy")
    if args.dataset == "toy" and not (args.dry_run or args.report_only):
        data.make_toy(args.data_root)
    args.classes = 174 if args.dry_run else len(data.read_classes(args.dataset, args.data_root, quiet=True))

    tables = make_tables(args.dataset, plain.depth or MODELS[plain.model]["depth"])
    if "all" in args.table:
        args.table = [name for name in names if name != ("1" if args.dataset == "toy" else "difficulty")]
    runs = {name: [[Run(args, row, seed) for seed in args.seeds] if row.flags is not None else [] for row in tables[name].rows] for name in args.table}
    flat = [run for rows in runs.values() for row in rows for run in row]
    if args.dry_run:
        for command in dict.fromkeys(printable(run.make_data) for run in flat if run.make_data):
            print(command)
        for run in {run.folder: run for run in flat}.values():
            print(f"{printable(run.train)}\n{printable(run.evaluate)}")
        return 0
    errors = []
    if not args.report_only:
        make_all_data(flat)
        errors = run_all(flat, args)
    for name, rows in runs.items():
        table, stem = tables[name], Path(args.out_dir) / args.dataset / (f"table{name}" if name.isdecimal() else name)
        write_table(stem.with_suffix(".md"), f"Table {name}: {table.title}" if name.isdecimal() else table.title, table, rows, args)
        try:
            draw_difficulty(stem.with_suffix(".png"), table, rows) if name == "difficulty" else draw_table(stem.with_suffix(".png"), table.title, table, rows)
        except ImportError:
            print(f"{stem}.png: not drawn, it needs matplotlib (pip install matplotlib)")
    for error in errors:
        print(error)
    return 1 if errors else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("ablate.py: stopped; the same command goes on")
    except (ValueError, OSError) as e:
        sys.exit(f"ablate.py: {e}")
