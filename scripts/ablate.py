"""Run the tables of the paper: train and test every row, write the table and draw it.

    python scripts/ablate.py --table 2                          # components, on the toy, 3 seeds
    python scripts/ablate.py --table readings controls
    python scripts/ablate.py --table 5 --dataset ssv1 --seeds 0 --gpus_per_run 4
    python scripts/ablate.py --table 3 --dry_run -- --epochs 2  # prints the commands only

Flags after -- go to train.py. Each row is a call of train.py and one of evaluate.py, or of
scripts/variants.py, and is printed. What is finished is not run again, and what was stopped goes
on. A row of several tables is trained once. Start one process per --out_dir: nothing locks it.

The tables report last.pt. best.pt is chosen by validation accuracy, which would favour rows that
fluctuate.
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
from model import MODELS, STDFormer, model_config
from scripts.describe import count_macs, video_of
from scripts.guards import run_program
from scripts.variants import VARIANTS
from train import get_args

# ----- The rows of the paper's tables ---------------------------------------

class Row(NamedTuple):
    label: str
    flags: str | None = ""                      # of train.py; None: a published number, not run
    paper: str | None = None                    # its top-1 / top-5
    variant: str = ""                           # of scripts/variants.py, "" for STD-Former itself
    difficulty: float = 0                       # of the toy


class Table(NamedTuple):
    title: str
    base: str                                   # what all rows have in common
    rows: list
    source: str = "SSV1"                        # the data set of the paper's numbers


CTM_ONLY = "--ptm_layers --stdm_layers --smem_t_layers"             # each of them nowhere
CTM_PTM = "--stdm_layers --smem_t_layers"
CTM_STDM = "--ptm_layers --smem_t_layers"
CTM_SMEM = "--ptm_layers --stdm_layers"

PUBLISHED = {                                   # Table 1: top-1 / top-5
    "ssv1": {"MSNet": "52.1 / 82.3", "TEA": "52.3 / 81.9", "TDN": "55.1 / 82.9",
             "CT-Net": "53.4 / 81.7", "AE-Net": "54.1 / 81.7", "MSMA": "55.8 / 83.1",
             "UniFormerV2-B": "56.8 / 84.2", "STD-Former": "57.3 / 84.4"},
    "ssv2": {"TimeSformer-L": "62.4 / -", "MSNet": "64.7 / 89.4", "ViViT-L": "65.4 / 89.8",
             "TEA": "65.1 / 89.9", "CT-Net": "65.9 / 90.1", "MViT-B": "66.2 / 90.2",
             "MSMA": "66.2 / 90.4", "TDN": "67.0 / 90.3", "MTV-B": "67.6 / 90.4",
             "AIM-B": "68.1 / 91.8", "UniFormerV2-B": "69.5 / 92.3", "STD-Former": "69.2 / 92.1"},
}


def share(first, last, depth):
    """The layers of a model that correspond to the paper's first ... last of 12: "2 3"."""
    return " ".join(str(i) for i in range(first * depth // 12, (last + 1) * depth // 12))


def here(numbers, depth):
    """For labels: our layers after the paper's, if they differ."""
    return "" if depth == 12 else f" (here {numbers.replace(' ', ', ')})"


def published_table(dataset):
    key = "ssv2" if dataset == "ssv2" else "ssv1"
    rows = [Row(name, "" if name == "STD-Former" else None, paper)
            for name, paper in PUBLISHED[key].items()]
    return Table("STD-Former beside published models",
                 "the paper's numbers have several protocols, 16x1x1 to 64x1x3; ours and "
                 "UniFormerV2-B's is 16x3x1", rows, key.upper())


def components_table():
    return Table("components", "the base is CTM with plain blocks", [
        Row("CTM", CTM_ONLY, "56.8 / 84.0"),
        Row("CTM + PTM", CTM_PTM, "57.2 / 84.3"),
        Row("CTM + STDM", CTM_STDM, "57.0 / 84.2"),
        Row("CTM + SMEM", CTM_SMEM, "57.1 / 84.2"),
        Row("all four", "", "57.3 / 84.4")])


def ptm_table():
    base = "CTM + PTM; the paper's prose gives 57.0 / 84.1 for the third row"
    return Table("design of PTM", base, [
        Row("attention + 2D conv", f"--ptm_conv attention2d {CTM_PTM}", "56.8 / 83.9"),
        Row("attention + 3D conv", f"--ptm_conv attention3d {CTM_PTM}", "55.6 / 82.9"),
        Row("residual + 2D conv", CTM_PTM, "57.2 / 84.3"),
        Row("residual + 3D conv", f"--ptm_conv residual3d {CTM_PTM}", "54.5 / 81.8")])


def fusion_table():
    base = "CTM + SMEM; two of the paper's rows are lost, both below the first"
    return Table("fusion in SMEM", base, [
        Row("multiplication", CTM_SMEM, "57.1 / 84.2"),
        Row("addition", f"--smem_fusion add {CTM_SMEM}"),
        Row("both", f"--smem_fusion mul+add {CTM_SMEM}")])


def ptm_positions_table(depth, depth_flag):
    def row(first, last, paper):
        layers = share(first, last, depth)
        flags = f"--ptm_layers {layers} {CTM_PTM}{depth_flag}"
        return Row(f"{first}-{last}{here(layers, depth)}", flags, paper)

    base = f"CTM + PTM, {depth} layers; the paper's prose gives 57.2 / 84.1 for 8-11"
    return Table("positions of PTM", base, [
        row(0, 11, "55.2 / 82.6"), row(0, 3, "55.8 / 82.9"), row(4, 11, "56.6 / 83.5"),
        row(4, 7, "57.0 / 84.1"), row(8, 11, "57.2 / 84.3"), row(8, 9, "56.8 / 84.0"),
        row(10, 11, "56.6 / 83.4")])


def smem_positions_table(depth, depth_flag):
    def row(first, last, branch, position, paper=None):
        ptm, smem = share(first, last, depth), str(position * depth // 12)
        smem_flags = {"the T-branch": f"--smem_t_layers {smem}",
                      "the ST-branch": f"--smem_t_layers --smem_st_layers {smem}",
                      "both": f"--smem_t_layers {smem} --smem_st_layers {smem}"}[branch]
        label = (f"PTM {first}-{last}{here(ptm, depth)}, "
                 f"SMEM in {branch} at {position}{here(smem, depth)}")
        return Row(label, f"--ptm_layers {ptm} {smem_flags}{depth_flag}", paper)

    base = (f"the full model, {depth} layers; only the paper's best row is known, and that both "
            "branches at once are low. The other positions are ours")
    return Table("PTM and SMEM together", base, [
        row(8, 11, "the T-branch", 4, "57.3 / 84.4"), row(8, 11, "the T-branch", 0),
        row(8, 11, "the T-branch", 8), row(8, 11, "the ST-branch", 4),
        row(8, 11, "the ST-branch", 8), row(8, 11, "both", 4),
        row(4, 7, "the T-branch", 4), row(4, 7, "the ST-branch", 4)])


def fixed(alpha, beta):
    return f"--no-learn_fusion --alpha {alpha} --beta {beta}"


def alpha_beta_table():
    pairs = [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0), (0.5, 0.5), (2.0, 2.0)]
    base = ("the full model with fixed alpha and beta, which are learned elsewhere; the paper's "
            "numbers are lost, but that 1, 1 is best. The other values are ours")
    return Table("alpha and beta of Eq. 1", base, [
        Row(f"alpha {alpha}, beta {beta}", fixed(alpha, beta)) for alpha, beta in pairs])


# ----- Our own tables -------------------------------------------------------

DIFFICULTIES = (0, 0.25, 0.5)
PLAIN_VITS = {"divided": "ViT with divided attention", "frames": "frame-wise ViT, averaged"}


def readings_table(dataset, depth):
    last_third = " ".join(str(i) for i in range(depth - 1 - depth // 3, depth - 1))
    loss = Row("loss: no MixUp, no CutMix", "--mixup 0 --cutmix 0")
    if dataset == "toy":                        # its recipe has neither
        loss = Row("loss: MixUp and CutMix too", "--mixup 0.8 --cutmix 1.0")
    return Table("where the paper is silent", "the full model, one choice changed at a time", [
        Row("default"),
        Row("DPE: no BatchNorm", variant="dpe_no_bn"),
        Row("DPE: as wide as its input, no BatchNorm", variant="dpe_wide"),
        Row("PTM: 2D conv on (H, W)", variant="ptm_plane_space"),
        Row("PTM: conv instead of identity", variant="ptm_shortcut"),
        Row("PTM: attention over space and time", variant="ptm_spacetime"),
        Row("PTM: alpha, beta fixed at 1", fixed(1.0, 1.0)),
        Row("CTM: residual on the memory", variant="ctm_memory"),
        Row("CTM: residual on both", variant="ctm_both"),
        Row("CTM: CPE on the query", variant="cpe_query"),
        Row("CTM: CPE on query and memory", variant="cpe_both"),
        Row("CTM: output starts at zero", variant="ctm_zero"),
        Row("stem: stride 1, twice the token frames", "--stem_stride 1"),
        Row("stem: kernel over 1 frame, skips every second", "--stem_kernel 1"),
        Row("STDM: dense convolutions", variant="stdm_dense"),
        Row("STDM: into the last third only", f"--stdm_layers {last_third}"),
        Row("STDM: nowhere", "--stdm_layers"),
        Row("SMEM: features of unit length", variant="smem_unit"),
        Row("SMEM: ReLU after the correlation", variant="smem_relu"),
        Row("SMEM: unit length and ReLU", variant="smem_unit_relu"),
        Row("SMEM: gates instead of adds", variant="smem_gate"),
        Row("head: fused with the ST-branch", variant="head_fused"),
        loss])


def controls_table(dataset):
    """No CLIP weights fit the plain ViTs, so STD-Former is compared with them without."""
    flags, note = ("", "") if dataset == "toy" else ("--clip none", ", without CLIP weights")
    rows = [Row("STD-Former" + note, flags)]
    rows += [Row(name + note, flags, variant=variant) for variant, name in PLAIN_VITS.items()]
    if flags:
        rows.append(Row("STD-Former"))
    rows.append(Row("STD-Former, frames shuffled", "--control shuffle"))
    rows.append(Row("STD-Former, one frame", "--control single"))
    base = ("what is learned without order or without motion, and by plain transformers: "
            "parameters within 7 %, arithmetic within 11 %")
    return Table("controls", base, rows)


def difficulty_table():
    rows = []
    for variant, name in {"": "STD-Former", **PLAIN_VITS}.items():
        for d in DIFFICULTIES:
            rows.append(Row(f"{name}, difficulty {d:g}", variant=variant, difficulty=d))
    base = ("the toy's --difficulty: long clips with a short motion, low contrast, texture, moving "
            "distractors")
    return Table("accuracy against difficulty", base, rows)


def make_tables(dataset, depth):
    """{name: Table} for a data set and a model of `depth` layers.

    Tables 5 and 6 tell halves of thirds apart. If the depth is no multiple of 6, their models get
    six layers instead.
    """
    positions = (depth, "") if depth % 6 == 0 else (6, " --depth 6")
    return {"1": published_table(dataset), "2": components_table(), "3": ptm_table(),
            "4": fusion_table(), "5": ptm_positions_table(*positions),
            "6": smem_positions_table(*positions), "7": alpha_beta_table(),
            "readings": readings_table(dataset, depth), "controls": controls_table(dataset),
            "difficulty": difficulty_table()}


# ----- One run --------------------------------------------------------------

# Flags of train.py that do not matter to the result.
FREE = ("out_dir", "resume", "workers", "timeout", "log_every", "eval_every", "save_minutes")
PROGRAM_ERROR = r"(train|evaluate|variants)\.py: "
running = set()                                 # processes, which SIGTERM has to reach


def python(*words):
    """A command line that runs a program of the repository, by its path from here."""
    words = [os.path.relpath(ROOT / word) if word.endswith(".py") else word for word in words]
    return [sys.executable, *words]


def printable(command):
    """A command line that can be copied from the screen."""
    return shlex.join(["python", *command[1:]])


def settings_of(train_args, classes):
    """What defines the result of train.py: its flags and the model's config, by name."""
    settings = {**vars(train_args), **asdict(model_config(train_args, classes))}
    return {name: value for name, value in settings.items() if name not in FREE}


def in_a_path(value):
    """A setting as a part of a folder's name: "8.9.10.11", "none", "0.5"."""
    return ".".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


class Run:
    """One row with one seed: its commands, its folder, its result."""

    def __init__(self, args, row, seed):
        self.row, self.seed, self.make_toy = row, seed, None
        root = args.data_root
        if row.difficulty:
            root = f"{args.data_root}_difficulty{row.difficulty:g}"
            self.make_toy = toy_command(args.data_root, root, row.difficulty)

        common = ["--dataset", args.dataset, "--data_root", root, *args.train_flags]
        own = [*shlex.split(row.flags), "--seed", str(seed)]        # come last, and so win
        trained, default = get_args(common + own), get_args(["--dataset", args.dataset])
        self.config = model_config(trained, args.classes)
        self.settings = settings_of(trained, args.classes)
        self.settings.update(variant=row.variant, data_root=os.path.abspath(root),
                             gpus_per_run=args.gpus_per_run)
        self.defaults = settings_of(default, args.classes)
        plain = settings_of(get_args(common), args.classes)
        self.folder = Path(args.out_dir, args.dataset, self.name(plain), f"seed{seed}")
        self.result_file = self.folder.with_suffix(".json")
        self.log_file = self.folder.with_suffix(".txt")

        self.train = self.program("train") + common + own + ["--out_dir", str(self.folder)]
        self.evaluate = self.program("evaluate") + ["--ckpt", str(self.folder / "last.pt")]
        for flag in ("device", "workers", "timeout", "skip_list"):
            value = getattr(trained, flag)
            if value != getattr(default, flag):
                self.evaluate += [f"--{flag}", str(value)]

    def name(self, plain):
        """What differs from the plain model. So equal rows of two tables are one run."""
        parts = [self.row.variant or "std_former"]
        for key, value in plain.items():
            if self.settings[key] != value and key not in ("seed", "data_root"):
                parts.append(f"{key}-{in_a_path(self.settings[key])}")
        if self.row.difficulty:
            parts.append(f"difficulty-{self.row.difficulty:g}")
        return ",".join(parts)

    def program(self, which):
        processes = self.settings["gpus_per_run"]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        script = [f"{which}.py"]
        if self.row.variant:
            script = ["scripts/variants.py", self.row.variant, which]
        return python(*(torchrun if processes > 1 else []), *script)

    def result(self):
        """dict(top1, top5, line), or None if the run is not finished.

        ValueError if it was run with other flags. A flag newer than the result had its default.
        """
        if not self.result_file.is_file():
            return None
        result = json.loads(self.result_file.read_text())
        now = json.loads(json.dumps(self.settings))                 # lists for tuples, as in a file
        before = {**json.loads(json.dumps(self.defaults)), **result["settings"]}
        different = [f"  {name}: {before[name]!r}, now {value!r}" for name, value in now.items()
                     if before[name] != value]
        if different:
            raise ValueError("\n".join([f"{self.result_file} was run with other flags: give the "
                                        "same ones, or another --out_dir", *different]))
        return result

    def execute(self, command, environment):
        """Run a command and add what it prints to the run's log. Returns what it has printed."""
        with open(self.log_file, "ab") as f:
            start = f.tell()
            process = subprocess.Popen(command, env=environment, stdout=f,
                                       stderr=subprocess.STDOUT)
            running.add(process)
            process.wait()
            running.discard(process)
        return self.log_file.read_bytes()[start:].decode(errors="replace").strip()

    def go(self, environment):
        """Train or go on, evaluate, write the result. Returns what went wrong, or ""."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if Path(self.folder, "last.pt").is_file() else []
        printed = self.execute(self.train + resume, environment)
        if not re.search("^done: ", printed, re.MULTILINE):         # failed, or stopped by Ctrl-C
            return self.problem(printed)
        printed = self.execute(self.evaluate, environment)
        found = re.search(r"^top1 ([\d.]+) top5 ([\d.]+) clips .*$", printed, re.MULTILINE)
        if not found:
            return self.problem(printed)
        result = dict(top1=float(found[1]), top5=float(found[2]), line=found[0],
                      command=printable(self.train), settings=self.settings)
        unfinished = Path(f"{self.result_file}.tmp")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(unfinished, self.result_file)
        return ""

    def problem(self, printed):
        """The line that says what went wrong: a program's error, else the last one."""
        lines = printed.splitlines() or ["nothing was printed"]
        errors = [line for line in lines if re.match(PROGRAM_ERROR, line)]
        return f"{self.folder}: {(errors or lines[-1:])[0]} (all of it: {self.log_file})"


def toy_command(plain_root, root, difficulty):
    """Makes a harder toy, with as many clips of the same seed as the plain toy has."""
    command = python("scripts/toy_data.py", "--data_root", root, "--difficulty", f"{difficulty:g}")
    stamp = Path(plain_root, "toy.json")
    if stamp.is_file():
        for name, value in json.loads(stamp.read_text()).items():
            if name in ("seed", "train", "validation"):
                command += [f"--{name}", str(value)]
    return command


# ----- All runs -------------------------------------------------------------

def visible_gpus():
    """The names of the GPUs for CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named and count else [str(i) for i in range(count)]


def usable_cores():
    """The numbers of the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count()))


def once_each(runs):
    """Rows of several tables share a folder, and are one run."""
    return list({run.folder: run for run in runs}.values())


def make_all_toys(runs):
    """Make the harder toys that unfinished runs need. What exists is left as it is."""
    commands = [run.make_toy for run in runs if run.make_toy and run.result() is None]
    for command in {tuple(command): command for command in commands}.values():
        print(printable(command), flush=True)
        if subprocess.run(command).returncode:
            raise ValueError(f"{printable(command)} has failed, see above")


def take_share(slot, args, gpus, cores):
    """Give the processes that this thread starts their own cores. Returns their environment."""
    environment, n = dict(os.environ), args.gpus_per_run
    if gpus:
        mine = [gpus[(slot * n + i) % len(gpus)] for i in range(n)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    cores_each = len(cores) // args.jobs
    if cores_each and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[slot * cores_each:(slot + 1) * cores_each])
    return environment


def run_all(runs, args):
    """Run what is not finished, args.jobs at a time. Returns what went wrong, a line for each."""
    gpus, cores, errors = visible_gpus(), usable_cores(), []
    slots = queue.Queue()
    for slot in range(args.jobs):
        slots.put(slot)

    def go(run):
        slot = slots.get()
        try:
            environment = take_share(slot, args, gpus, cores)
            # Other threads print too, so each print is one piece with its line ends.
            print(f"{printable(run.train)}\n{printable(run.evaluate)}\n", end="", flush=True)
            error = run.go(environment)
            line = error or run.result()["line"]
            print(f"  {line}  <- {run.folder}\n", end="", flush=True)
        except OSError as e:                    # such as a full disk
            error = f"{run.folder}: {e}"
        finally:
            slots.put(slot)
        if error:
            errors.append(error)

    threads = ThreadPoolExecutor(args.jobs)
    try:
        list(threads.map(go, [run for run in once_each(runs) if run.result() is None]))
    finally:                                    # Ctrl-C reaches the runs, which save and end
        threads.shutdown(cancel_futures=True)
    return errors


def stop(*_):
    """Pass SIGTERM on. Unlike Ctrl-C, it reaches this process only."""
    for process in list(running):
        process.terminate()
    raise KeyboardInterrupt


# ----- Tables and plots -----------------------------------------------------

def mean_and_deviation(values):
    """Over seeds. A single one has no deviation, which counts as 0."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0


def mean_as_text(values):
    """Mean and deviation: "92.0 ± 2.0", or "90.0" for a single seed."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.1f} ± {deviation:.1f}" if len(values) > 1 else f"{mean:.1f}"


def results_of(runs):
    return [result for result in (run.result() for run in runs) if result]


def cells_of(runs):
    """top-1, top-5, seeds, M params and GMACs of the runs of a row, as text."""
    if not runs:                                # a published number
        return [""] * 5
    results = results_of(runs)
    scores = ["not run", "not run"]
    if results:
        scores = [mean_as_text([r[key] for r in results]) for key in ("top1", "top5")]
    build = VARIANTS.get(runs[0].row.variant, STDFormer)
    with torch.device("meta"):
        model = build(runs[0].config)
    parameters = sum(p.numel() for p in model.parameters())
    macs = count_macs(model, video_of(model.config))["Global"]
    return [*scores, str(len(results)), f"{parameters / 1e6:.3g}", f"{macs / 1e9:.3g}"]


def as_line(cells):
    return "| " + " | ".join(cells) + " |"


def write_table(path, title, table, runs, args):
    """Markdown, with a line for each row. runs: a list for each row, one Run for each seed."""
    seeds = " ".join(map(str, args.seeds))
    caption = f"**{title}** ({table.base}). {args.dataset}, seeds {seeds}"
    if args.train_flags:
        caption += f", train.py flags {shlex.join(args.train_flags)}"
    with_paper = any(row.paper for row in table.rows)
    paper = [f"paper, {table.source}, top-1 / top-5"] if with_paper else []
    columns = ["row", *paper, "top-1", "top-5", "seeds", "M params", "GMACs"]
    lines = [caption, "", as_line(columns), "|---" * len(columns) + "|"]
    for row, row_runs in zip(table.rows, runs):
        paper = [row.paper or ""] if with_paper else []
        lines.append(as_line([row.label, *paper, *cells_of(row_runs)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("", *lines, sep="\n")


def top1_by_row(table, runs):
    """[(row, top-1 of each finished seed)], without rows that have none."""
    pairs = [(row, [result["top1"] for result in results_of(row_runs)])
             for row, row_runs in zip(table.rows, runs)]
    return [(row, values) for row, values in pairs if values]


def draw_table(path, title, table, runs):
    """A dot for each seed, and a bar of one standard deviation around their mean, row by row."""
    from matplotlib.figure import Figure
    rows = top1_by_row(table, runs)
    figure = Figure(figsize=(7, 0.9 + 0.32 * max(len(rows), 3)), layout="constrained")
    axis = figure.subplots()
    for y, (_, values) in enumerate(rows):
        mean, deviation = mean_and_deviation(values)
        axis.errorbar(mean, y, xerr=deviation, fmt="|", color="#0072B2", capsize=4, markersize=12)
        axis.plot(values, [y] * len(values), "o", color="#D55E00", markersize=4, alpha=0.7)
    axis.set_yticks(range(len(rows)), [row.label for row, _ in rows])
    axis.set_xlabel("top-1, %\ndots: seeds; bar: mean and one standard deviation")
    axis.set(title=title, ylim=(max(len(rows), 1) - 0.5, -0.5))
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def draw_difficulty(path, table, runs):
    """Accuracy against difficulty, a line for each model, with one standard deviation."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axis = figure.subplots()
    rows = top1_by_row(table, runs)
    variants = dict.fromkeys(row.variant for row, _ in rows)
    for variant, color, marker in zip(variants, ("#0072B2", "#D55E00", "#999999"), "os^"):
        of_variant = [(row, values) for row, values in rows if row.variant == variant]
        scores = [mean_and_deviation(values) for _, values in of_variant]
        axis.errorbar([row.difficulty for row, _ in of_variant], [mean for mean, _ in scores],
                      yerr=[deviation for _, deviation in scores], color=color, marker=marker,
                      label=of_variant[0][0].label.split(", difficulty")[0], capsize=3)
    axis.axhline(10, color="black", linewidth=0.8, linestyle=":")
    axis.annotate("chance", (0, 10), xytext=(2, 3), textcoords="offset points", fontsize=9)
    axis.set(xlabel="difficulty of the toy", ylabel="top-1, % (bar: one standard deviation)",
             ylim=(0, 100), xticks=DIFFICULTIES)
    axis.grid(alpha=0.3)
    if rows:
        axis.legend()
    figure.savefig(path, dpi=110)


def report(name, table, runs, args):
    """Write a table and draw it."""
    numbered = name.isdecimal()
    stem = Path(args.out_dir, args.dataset, f"table{name}" if numbered else name)
    title = f"Table {name}: {table.title}" if numbered else table.title
    write_table(stem.with_suffix(".md"), title, table, runs, args)
    picture = stem.with_suffix(".png")
    try:
        if name == "difficulty":
            draw_difficulty(picture, table, runs)
        else:
            draw_table(picture, table.title, table, runs)
    except ImportError:
        print(f"{picture} is not drawn, since matplotlib is not installed: pip install matplotlib")


# ----- The command ----------------------------------------------------------

def make_parser():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--table", nargs="+", required=True, choices=[*make_tables("toy", 12), "all"],
        help="numbers are the paper's; 5 and 6 use six layers if the model's depth is no multiple "
        "of 6. all leaves out 1 on the toy, and difficulty elsewhere")
    add("--dataset", default="toy", choices=("toy", "ssv1", "ssv2"),
        help="ssv1 is the paper's; on the toy a row takes minutes on a CPU core")
    add("--data_root", help="folder of the data set (default: datasets/DATASET)")
    add("--out_dir", default="out/ablate", help="folder for runs, tables and plots; with the same "
        "one the work goes on (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="differences below the deviation "
        "over seeds mean nothing (default: 0 1 2)")
    add("--jobs", type=int, help="rows at a time (default: as many as GPUs or CPU cores allow). "
        "One GPU has room for several tiny models")
    add("--gpus_per_run", type=int, default=1, help="processes of each row, by torchrun; 4 for b16 "
        "as in the paper")
    add("--dry_run", action="store_true", help="print the commands, run nothing")
    add("--report_only", action="store_true", help="run nothing, report what is finished, for "
        "instance while another process runs the rows")
    add("train_flags", nargs="*", metavar="-- FLAGS", help="for train.py in every row, after --; a "
        "row's own flags win")
    return p


def get_ablate_args(argv=None):
    """Read the flags and fill in what follows from others."""
    p = make_parser()
    args = p.parse_args(argv)
    own = r"--(dataset|data_root|out_dir|seed|resume|control|dry_run|max_steps)\b"
    for word in args.train_flags:
        if re.match(own, word):
            p.error(f"{word} after -- is set by ablate.py itself: use its flag of that name, if it "
                    "has one")
    gpus = visible_gpus()
    if gpus and len(gpus) < args.gpus_per_run:
        p.error(f"--gpus_per_run {args.gpus_per_run}: expected at most {len(gpus)}, as many as "
                "there are GPUs")
    if "difficulty" in args.table and args.dataset != "toy":
        p.error("--table difficulty needs --dataset toy: no other data set has a difficulty")
    if "all" in args.table:
        left_out = "1" if args.dataset == "toy" else "difficulty"
        args.table = [name for name in make_tables(args.dataset, 12) if name != left_out]
    args.jobs = args.jobs or max(1, len(gpus or usable_cores()) // args.gpus_per_run)
    args.data_root = (args.data_root or f"datasets/{args.dataset}").rstrip("/")
    return args


def main(argv=None):
    """Returns the exit status: 1 if a run has failed."""
    args = get_ablate_args(argv)
    if args.dataset == "toy" and not (args.dry_run or args.report_only):
        from scripts.toy_data import make_toy
        make_toy(args.data_root)
    args.classes = 174
    if not args.dry_run:
        args.classes = len(data.read_annotations(args.dataset, args.data_root, "train")[2])

    plain = get_args(["--dataset", args.dataset, *args.train_flags])
    tables = make_tables(args.dataset, plain.depth or MODELS[plain.model]["depth"])
    runs = {}                                   # name of a table: for each row, a Run for each seed
    for name in args.table:
        runs[name] = [[Run(args, row, seed) for seed in args.seeds if row.flags is not None]
                      for row in tables[name].rows]
    all_runs = [run for rows in runs.values() for row_runs in rows for run in row_runs]

    if args.dry_run:
        for command in dict.fromkeys(printable(run.make_toy) for run in all_runs if run.make_toy):
            print(command)
        for run in once_each(all_runs):
            print(printable(run.train), printable(run.evaluate), sep="\n")
        return 0
    errors = []
    if not args.report_only:
        make_all_toys(all_runs)
        errors = run_all(all_runs, args)
    for name, rows in runs.items():
        report(name, tables[name], rows, args)
    print(*errors, sep="\n", end="\n" if errors else "")
    return 1 if errors else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        run_program(lambda: sys.exit(main()))
    except KeyboardInterrupt:
        sys.exit("ablate.py: stopped; the same command goes on")
