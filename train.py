"""Train STD-Former: plain PyTorch DDP, mixed precision on CUDA.

    python train.py                                            # toy data, tiny model, CPU or one GPU, minutes
    torchrun --nproc_per_node=4 train.py --dataset ssv1        # the paper's recipe, from CLIP weights
    python train.py --dataset ssv2 --data_root DIR --dry_run   # five steps: time and peak memory

Everything random follows from --seed: samples from (seed, epoch, clip), dropout from (seed, step, rank). So a run that was
stopped or killed and resumed is, on a CPU, the same run to the last bit, log included, with any number of data workers.
"""
import argparse
import json
import math
import os
import platform
import shutil
import signal
import sys
import textwrap
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torchvision import tv_tensors
from torchvision.transforms import v2

import data
from evaluate import autocast, build_trained, evaluate, load_checkpoint, pick_device, refuse, run_program, setup_processes, setup_worker
from model import ModelConfig, STDFormer, add_model_flags, config_from_flags, is_clip_parameter, load_clip, resize_positions

# ----------------------------------------------------------------------------------------------------
# Configuration
# ----------------------------------------------------------------------------------------------------

# The paper gives frames, size, AdamW, lr, batch, cosine, soft cross-entropy, flips and CLIP; the rest is UniFormerV2's SSV1 run.
PAPER = dict(model="b16", clip="openai", epochs=22, warmup_epochs=5.0, batch_size=16, lr=1e-4, weight_decay=0.05, label_smoothing=0.1,
             crop_scale=0.08, randaugment=21, drop_path=0.2, ctm_drop_path=0.4, ctm_dropout=0.5, head_dropout=0.5, grad_clip=20.0)
# Measured on two CPU cores (README, "Quick start").
TOY = dict(model="tiny", clip="none", epochs=4, warmup_epochs=0.4, batch_size=16, lr=1e-3, weight_decay=0.05, label_smoothing=0.1,
           crop_scale=0.5, randaugment=0, grad_clip=1.0)
RECIPES = {"paper": PAPER, "toy": TOY}


def get_args(argv=None):
    """Read the flags. The recipe gives the defaults; a flag that is set wins."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)         # these two decide the defaults of the rest
    first.add_argument("--dataset", default="toy")
    first.add_argument("--recipe")
    known, _ = first.parse_known_args(argv)
    recipe = known.recipe or ("toy" if known.dataset == "toy" else "paper")

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                                epilog=textwrap.fill(f"Defaults shown are those of --dataset and --recipe as given beside --help; recipe {recipe} sets "
                                                          + ", ".join(f"{k} {v}" for k, v in RECIPES.get(recipe, {}).items()), 100))
    # files
    p.add_argument("--dataset", default="toy", choices=data.DATASETS, help="ssv1: frame folders, ssv2: webm files (own data too, in either layout), toy: made here")
    p.add_argument("--recipe", choices=list(RECIPES), help="whose defaults to take (default: paper for ssv1 and ssv2); toy trains the tiny model from scratch, on any data")
    p.add_argument("--data_root", help="folder of the data set (default: datasets/DATASET)")
    p.add_argument("--out_dir", help="checkpoints and logs go here (default: out/DATASET); must be new or empty without --resume")
    p.add_argument("--resume", action="store_true", help="go on from OUT_DIR/last.pt (from the start where the run was killed before its first); by itself under a torchrun restart")
    p.add_argument("--init_from", metavar="CHECKPOINT", help="start from the weights of another run; the head is new where the classes differ")
    p.add_argument("--clip", metavar="openai|FILE|none", help="CLIP weights to start from; a FILE where there is no internet (OpenAI's .pt, open_clip's .pt/.bin/.safetensors) (default: %(default)s)")
    p.add_argument("--skip_list", metavar="FILE", help="clip ids to leave out, one per line (data.py check writes it); validation counts them as wrong")
    # data
    p.add_argument("--crop_scale", type=float, help="smallest share of the picture in a training crop; raise it when small things matter (default: %(default)s)")
    p.add_argument("--randaugment", type=int, metavar="M", help="magnitude 1-30 of RandAugment's 4 operations, 0 for none; lower it when training accuracy stays low (default: %(default)s)")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the clips, with the mirrored class's label")
    p.add_argument("--control", default="none", choices=("none", "shuffle", "single"), help="control experiments: frames in random order, or one frame repeated, in training and validation")
    p.add_argument("--workers", type=int, help="data workers per process (default: cores / processes, at most 8; 0 on a single core: no worker, so a decoder that crashes takes the run with it and leaves only a stack trace)")
    p.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="a data worker that gives nothing for so long counts as hanging; raise it for long clips on slow disks (default: %(default)s)")
    # model: one flag per field of ModelConfig
    add_model_flags(p)
    # optimisation
    p.add_argument("--epochs", type=int, help="passes over the training clips (default: %(default)s)")
    p.add_argument("--warmup_epochs", type=float, help="linear warm-up; lengthen it when the loss jumps early (default: %(default)s)")
    p.add_argument("--batch_size", type=int, help="clips per step over all processes; --lr belongs to it, nothing is scaled behind your back (default: %(default)s)")
    p.add_argument("--micro_batch", type=int, help="clips per process that go through the model at once (default: all); lower it when memory runs out. Same clips, gradient and lr; BatchNorm sees smaller batches, dropout draws differ")
    p.add_argument("--lr", type=float, help="peak learning rate for this batch size; the paper's 1e-4 at 16 is 40 times UniFormerV2's per clip: lower it when the loss diverges (default: %(default)s)")
    p.add_argument("--min_lr", type=float, default=1e-6, help="where the cosine ends (default: %(default)s)")
    p.add_argument("--clip_lr_scale", type=float, default=1.0, help="learning rate of CLIP's parameters relative to --lr; 0.1 is gentle (default: %(default)s)")
    p.add_argument("--freeze_clip", action="store_true", help="train the new parameters only; saves memory")
    p.add_argument("--weight_decay", type=float, help="AdamW's; parameters with fewer than two dimensions get none (default: %(default)s)")
    p.add_argument("--grad_clip", type=float, help="largest gradient norm of a step, 0 for no limit; look at grad_norm in the log before changing it (default: %(default)s)")
    p.add_argument("--label_smoothing", type=float, help='the "soft" in soft cross-entropy (default: %(default)s)')
    p.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA", help="MixUp with Beta(ALPHA, ALPHA); 0.8 is usual, 0 is off")
    p.add_argument("--cutmix", type=float, default=0.0, metavar="ALPHA", help="CutMix likewise; with both, a coin decides for each step")
    # system
    p.add_argument("--seed", type=int, default=0, help="of everything; report several (default: %(default)s)")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto takes the first that is there")
    p.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 on GPUs that have it, else fp16 with a loss scaler; fp32 on CPU and MPS")
    p.add_argument("--compile", action="store_true", help="torch.compile: a few minutes at the start, then faster; for CUDA. On several GPUs add --no-sync_bn")
    p.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass: much less memory, about a third more time")
    p.add_argument("--sync_bn", action=argparse.BooleanOptionalAction, default=True, help="on several GPUs BatchNorm takes its statistics over all of them, as one GPU with all clips would; off, each over its own clips. torch.compile cannot capture it (its graph breaks there; the cost was not measured)")
    p.add_argument("--freeze_bn", action="store_true", help="BatchNorm keeps its running statistics in training; with --init_from, or to compare runs exactly (in a new run it then only scales and shifts)")
    p.add_argument("--log_every", type=int, default=20, help="steps between log lines (default: %(default)s)")
    p.add_argument("--eval_every", type=int, default=1, help="epochs between validations (default: %(default)s)")
    p.add_argument("--save_minutes", type=float, default=10, help="minutes between writing last.pt within an epoch; it is also written after each epoch and on SIGTERM or SIGINT (default: %(default)s)")
    p.add_argument("--max_steps", type=int, help="stop after this step of the schedule, as if interrupted (for trying things)")
    p.add_argument("--dry_run", action="store_true", help="five steps on real data, print time and peak memory, write nothing")

    if recipe not in RECIPES:
        p.error(f"--recipe: got {recipe!r}, expected {' or '.join(RECIPES)}")
    unknown = set(RECIPES[recipe]) - set(vars(p.parse_args([])))
    assert not unknown, f"recipe keys that are no flags: {unknown}"
    p.set_defaults(recipe=recipe, data_root=f"datasets/{known.dataset}", out_dir=f"out/{known.dataset}", **RECIPES[recipe])
    return p.parse_args(argv)


def check_args(args):
    """Refuse flags that cannot work, alone or together, before any file is touched. Raises ValueError naming flag, found and expected."""
    a, world = args, int(os.environ.get("WORLD_SIZE", 1))

    refuse(args, ((flag, math.isfinite(value), "a number") for flag, value in vars(args).items() if isinstance(value, float)))
    refuse(args, [
        ("epochs", a.epochs >= 1, "1 or more"),
        ("warmup_epochs", 0 <= a.warmup_epochs <= a.epochs, f"0 to the {a.epochs} of --epochs"),
        ("batch_size", a.batch_size >= 1, "1 or more"),
        ("micro_batch", a.micro_batch is None or a.micro_batch >= 1, "1 or more"),
        ("workers", a.workers is None or a.workers >= 0, "0 or more"),
        ("lr", a.lr >= 0, "0 or more"),
        ("min_lr", 0 <= a.min_lr <= a.lr, f"0 to the {a.lr} of --lr"),
        ("clip_lr_scale", a.clip_lr_scale >= 0, "0 or more"),
        ("weight_decay", a.weight_decay >= 0, "0 or more"),
        ("grad_clip", a.grad_clip >= 0, "0 (no limit) or more"),
        ("label_smoothing", 0 <= a.label_smoothing < 1, "0 to below 1"),
        ("mixup", a.mixup >= 0, "0 (off) or more"),
        ("cutmix", a.cutmix >= 0, "0 (off) or more"),
        ("crop_scale", 0 < a.crop_scale <= 1, "a share of the picture, above 0 and at most 1"),
        ("randaugment", 0 <= a.randaugment <= 30, "0 (off) to 30"),
        ("seed", a.seed >= 0, "0 or more"),
        ("log_every", a.log_every >= 1, "1 or more"),
        ("eval_every", a.eval_every >= 1, "1 or more"),
        ("save_minutes", a.save_minutes >= 0, "0 (after each step) or more"),
        ("max_steps", a.max_steps is None or a.max_steps >= 1, "1 or more"),
        ("timeout", a.timeout >= 0, "0 (no limit) or more"),
    ])
    local = a.batch_size // world
    refuse(args, [
        ("batch_size", a.batch_size % world == 0, f"a multiple of the {world} processes"),
        ("micro_batch", not a.micro_batch or local % a.micro_batch == 0, f"a divisor of the {local} clips that each process has per step"),
        ("mixup", not a.mixup or local > 1, f"0: with {local} clip per process there is none to mix it with"),
        ("cutmix", not a.cutmix or local > 1, f"0: with {local} clip per process there is none to mix it with"),
        ("max_steps", a.max_steps is None or not a.dry_run, "to be left out with --dry_run, which takes five"),
        ("clip", a.clip in ("openai", "none") or a.resume or os.path.isfile(a.clip), "openai, none or a file that is there"),
        ("init_from", not a.init_from or a.resume or os.path.isfile(a.init_from), "a checkpoint file that is there"),
        ("init_from", not a.init_from or a.clip in ("openai", "none"), f"to be left out with --clip {a.clip}, for a run starts from one of them"),
        ("freeze_clip", not a.freeze_clip or a.clip != "none" or a.init_from or a.resume, "--clip or --init_from beside it: with --clip none this would freeze random weights"),
        ("freeze_clip", not a.freeze_clip or a.clip_lr_scale == 1, f"to be left out with --clip_lr_scale {a.clip_lr_scale}: what is frozen has no learning rate"),
        ("skip_list", not a.skip_list or os.path.isfile(a.skip_list), "a file that is there"),
        ("data_root", os.path.isdir(a.data_root) or a.dataset == "toy" and not os.path.exists(a.data_root), "the folder of the data set"),
        ("out_dir", os.path.isdir(a.out_dir) or not os.path.exists(a.out_dir), "a folder, or a name for a new one"),
        ("out_dir", os.path.abspath(a.out_dir) != os.path.abspath(a.data_root), "another folder than --data_root"),
    ])
    config_from_flags(args)                             # refuses impossible models


# ----------------------------------------------------------------------------------------------------
# Pure helpers
# ----------------------------------------------------------------------------------------------------


def get_lr(step, total, warmup, peak, floor=0.0):
    """Linear warm-up over `warmup` steps, then a cosine from peak to floor at step `total` (section 4.2: cosine annealing)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def param_groups(model, weight_decay, clip_lr_scale=1.0):
    """AdamW's groups: (CLIP's, new) x (weight decay, none for fewer than two dimensions); empty ones left out.

    Each has `lr_scale`, its factor on the learning rate. Every trainable parameter is in exactly one.
    """
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((is_clip_parameter(name, model.config), p.ndim > 1), []).append(p)
    return [dict(params=params, weight_decay=weight_decay if decay else 0.0, lr_scale=clip_lr_scale if clip else 1.0,
                 name=("CLIP" if clip else "new") + (", decay" if decay else ", no decay")) for (clip, decay), params in groups.items()]


def make_datasets(args, config):
    """The training and the validation split (one centre view), as the flags and the model want them."""
    common = dict(num_frames=config.num_frames, size=config.image_size, control=args.control, seed=args.seed,
                  skip=data.read_skip_list(args.skip_list) if args.skip_list else ())
    return (data.VideoDataset(args.dataset, args.data_root, "train", train=True, scale=(args.crop_scale, 1.0),
                              augment=args.randaugment, flip=args.flip, **common),
            data.VideoDataset(args.dataset, args.data_root, "validation", **common))


def step_batches(clips, batch_size, start, stop, seed, rank, world):
    """The clips of each optimisation step from `start` to before `stop`, for this rank: yields lists of (epoch, index).

    An epoch is a permutation drawn from (seed, epoch); its last, incomplete batch is dropped. Ranks deal out each global
    batch among themselves, so any number of ranks sees the same batches.
    """
    order, order_epoch = None, None
    for step in range(start, stop):
        epoch, b = divmod(step, clips // batch_size)
        if epoch != order_epoch:
            order, order_epoch = np.random.default_rng([seed, epoch]).permutation(clips), epoch
        batch = order[b * batch_size:(b + 1) * batch_size]
        yield [(epoch, int(i)) for i in batch[rank::world]]


def not_written(path, error):
    """The one line for a file that could not be written: which, why, how much room is left, what to do."""
    folder = Path(path).parent
    room = f"{shutil.disk_usage(folder).free / 2 ** 30:.2f} GiB free there" if folder.is_dir() else "its folder is gone"
    why = getattr(error, "strerror", None) or "torch.save: " + str(error).splitlines()[0]
    return OSError(f"{path}: could not be written ({why}; {room}). Checkpoints written before are whole: see to space and rights, then go on with --resume")


@contextmanager
def replacing(path):
    """Write beside `path` (to the path that is given), then rename: a crash leaves the old file or the new one, never half of one.

    fsync brings the bytes to the disk before the name: else a power cut may leave the new name on an empty file. Raises OSError,
    with the half-written file removed, so that the disk has its space again.
    """
    beside = Path(f"{path}.tmp")
    try:
        yield beside
        with open(beside, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:                # torch.save raises RuntimeError where the disk is full
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise not_written(path, e) from e


# What a run needs to go on exactly: weights, optimizer, scaler; where it stands; the open row of the log.
CHECKPOINT = ("model", "optimizer", "scaler", "epoch", "step", "step_in_epoch", "best", "validated", "window", "model_config", "classes", "mean", "std", "args")


def save_checkpoint(path, checkpoint):
    with replacing(path) as beside:
        torch.save(checkpoint, beside)


def init_from(model, checkpoint, path, classes):
    """Copy another run's weights; positions are resized, the head stays new where the classes differ."""
    state = dict(checkpoint["model"])
    if "positional_embedding" in state:
        state["positional_embedding"] = resize_positions(state["positional_embedding"], model.grid)
    if checkpoint["classes"] != classes:
        state.update({k: v for k, v in model.state_dict().items() if k.startswith("head.")})
    own = model.state_dict()
    problems = [f"{k}: checkpoint {tuple(state[k].shape) if k in state else 'lacks it'}, model {tuple(own[k].shape) if k in own else 'lacks it'}"
                for k in sorted(set(state) | set(own)) if k not in own or k not in state or state[k].shape != own[k].shape]
    if problems:
        raise ValueError(f"--init_from {path} does not fit this model; take the same --model and model flags (SMEM keeps its --image_size):\n  "
                         + "\n  ".join(problems[:20]))
    model.load_state_dict(state)


def cut_log(path, step, validated=math.inf):
    """Drop the lines of log.jsonl beyond a checkpoint's step, or half written: the resumed run writes them again.

    validated: the step of the checkpoint's last validation; one behind it is repeated too.
    """
    if path.is_file():
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.startswith("{") and line.endswith("}")]
        rows = [(line, json.loads(line)) for line in lines]
        with replacing(path) as beside:
            beside.write_text("".join(line + "\n" for line, row in rows if row["step"] <= (step if row["kind"] == "train" else min(step, validated))))


def launched_by():
    """What tells this torchrun from another: its restarts may go on in the folder that it began, other runs may not."""
    one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return os.environ.get("TORCHELASTIC_RUN_ID", "") + (f" {platform.node()} {os.getppid()}" if one_node else "")


def draw_curves(out_dir):
    """curves.png from log.jsonl: loss, learning rate, validation accuracy. Does nothing where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    train, evals = [r for r in rows if r["kind"] == "train"], [r for r in rows if r["kind"] == "eval"]
    figure = Figure(figsize=(10, 3), layout="constrained", dpi=100)
    for axis, (title, points) in zip(figure.subplots(1, 3), {
            "training loss": [(train, "loss", None)], "learning rate": [(train, "lr", None)],
            "validation accuracy, %": [(evals, "top1", "top-1"), (evals, "top5", "top-5")]}.items()):
        for (source, key, label), colour in zip(points, ("#0072B2", "#D55E00")):                   # Okabe and Ito's
            axis.plot([r["step"] for r in source], [r[key] for r in source], label=label, color=colour, lw=1.5, marker="o" if source is evals else None, ms=4)
        axis.set_title(title, fontsize=11.5, loc="left")
        axis.set_xlabel("step", fontsize=9)
        axis.set_xlim(left=0)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        if points[0][2] and evals:
            axis.legend(fontsize=9, frameon=False, loc="lower right")
    with replacing(out_dir / "curves.png") as beside:
        figure.savefig(beside, format="png")


def memory_gib(device):
    """Peak memory: allocated on the GPU, else resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    try:
        import resource
    except ImportError:                                 # Windows does not tell
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


# What decides a run's result beside model and data, and so must not change on --resume.
THE_SAME = ("dataset", "batch_size", "epochs", "seed", "lr", "min_lr", "warmup_epochs", "weight_decay", "clip_lr_scale", "freeze_clip", "freeze_bn", "sync_bn", "grad_clip",
            "control", "crop_scale", "randaugment", "flip", "label_smoothing", "mixup", "cutmix")


def check_resume(checkpoint, path, args, config, classes):
    """Refuse to go on with another model, class list or recipe; name every difference. A flag that is newer than the checkpoint had its default."""
    old = {**asdict(ModelConfig()), **checkpoint["model_config"]}
    old_args = {**vars(get_args(["--dataset", args.dataset, "--recipe", args.recipe])), **checkpoint["args"]}
    problems = [f"{k}: checkpoint {old[k]!r}, now {v!r}" for k, v in config.items() if old[k] != v]
    if checkpoint["classes"] != classes:
        gone, new = set(checkpoint["classes"]) - set(classes), set(classes) - set(checkpoint["classes"])
        problems.append(f"classes: {len(checkpoint['classes'])} in the checkpoint, {len(classes)} now; only there {sorted(gone)[:3]}, only now {sorted(new)[:3]}")
    problems += [f"{k}: checkpoint {old_args[k]!r}, now {getattr(args, k)!r}" for k in THE_SAME if old_args[k] != getattr(args, k)]
    if problems:
        raise ValueError(f"--resume: {path} is another run; give it the same flags, or start anew in another --out_dir:\n  " + "\n  ".join(problems))


# ----------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------


def main(argv=None):
    args = get_args(argv)
    check_args(args)

    # ===== processes and device =====
    rank, world = setup_processes(args.device)
    device = pick_device(args.device)
    master = rank == 0
    writes = master and not args.dry_run
    if device.type == "cpu":
        torch.set_num_threads(data.cores_per_process())                         # torchrun sets one thread
    torch.set_float32_matmul_precision("high")          # TF32 for what stays float32 on a GPU
    if args.workers is None:
        args.workers = data.default_workers()
    if args.precision == "auto":
        args.precision = "fp32" if device.type != "cuda" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    local_batch = args.batch_size // world
    micro = args.micro_batch or local_batch

    # ===== files =====
    out_dir = Path(args.out_dir)
    last, config_file = out_dir / "last.pt", out_dir / "config.json"
    restarts = torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=device)
    if world > 1:
        dist.all_reduce(restarts, dist.ReduceOp.MAX)    # only the node that failed counts its restart
    ours = bool(restarts) and config_file.is_file() and data.read_json(config_file).get("launcher") == launched_by()
    # A run that was killed behind its first validation has best.pt only; one that was killed before, neither: it begins again.
    resume_from = [None, last, out_dir / "best.pt"]
    found = next((i for i in (1, 2) if resume_from[i].is_file()), 0)
    found = torch.tensor(found if args.resume or ours else 0, device=device)
    if world > 1:
        dist.broadcast(found, 0)                        # rank 0 writes the files, so its word counts
    resume = resume_from[found]
    if args.resume and not resume and not config_file.is_file():
        raise FileNotFoundError(f"--resume: {last} not found, nor a run that was begun there; give its --out_dir, or leave out --resume to begin one")
    if writes:
        if not (args.resume or ours) and out_dir.exists() and any(f.suffix != ".tmp" for f in out_dir.iterdir()):
            raise ValueError(f"--out_dir {out_dir}: not empty; --resume goes on from its last.pt, else give a new folder")
        out_dir.mkdir(parents=True, exist_ok=True)
        for leftover in out_dir.glob("*.tmp"):          # of a process that was killed while it wrote
            leftover.unlink()
    if args.dataset == "toy" and master:
        data.make_toy(args.data_root)
    if world > 1:
        dist.barrier()                                  # nobody reads before the toy data are made

    # ===== data =====
    classes = data.read_classes(args.dataset, args.data_root, quiet=not master)
    config = config_from_flags(args, num_classes=len(classes))
    torch.manual_seed(args.seed)
    model = STDFormer(config)
    train_set, val_set = make_datasets(args, config)
    steps_per_epoch = len(train_set) // args.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"--batch_size {args.batch_size}: more than the {len(train_set)} training clips")
    total, warmup = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)

    # ===== model and weights =====
    if resume:
        checkpoint = load_checkpoint(resume, needs=CHECKPOINT)
        check_resume(checkpoint, resume, args, asdict(config), classes)
        build_trained(checkpoint, resume, model)
    elif args.init_from:
        init_from(model, load_checkpoint(args.init_from), args.init_from, classes)
    elif args.clip != "none" and master:                # DDP sends rank 0's weights to the others
        loaded, new = load_clip(model, args.clip)
        print(f"CLIP weights from {args.clip}: {loaded} tensors loaded, {new} new")
    if args.freeze_clip:
        for name, p in model.named_parameters():
            p.requires_grad = not is_clip_parameter(name, config)
    model.checkpointing = args.checkpointing
    model.to(device)
    if world > 1 and device.type == "cuda" and args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    groups = param_groups(model, args.weight_decay, args.clip_lr_scale)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    # ===== where the run stands =====
    step, best, validated, window = 0, -1.0, 0, []      # window: (loss, gradient norm) of each step since the last row of the log
    if resume:
        try:
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"--resume: {resume} has the optimizer of another run ({e})") from e
        if checkpoint["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(checkpoint["scaler"])
        step, best, validated = checkpoint["step"], checkpoint["best"], checkpoint["validated"]
        window = [torch.tensor(pair, device=device) for pair in checkpoint["window"]]
        if divmod(step, steps_per_epoch) != (checkpoint["epoch"], checkpoint["step_in_epoch"]):
            raise ValueError(f"--resume: {resume} is from another number of training clips ({len(train_set)} now); give it the same data and --skip_list")
        del checkpoint
    if writes:
        cut_log(out_dir / "log.jsonl", step, validated)
    stop_at = total if args.max_steps is None else min(total, args.max_steps)
    if args.dry_run:
        stop_at = min(total, step + 5)
        if step == total:
            raise ValueError(f"--dry_run: {resume} is the end of its run, no step is left to try")
    if master:
        print(textwrap.fill("  ".join(f"{k}={v}" for k, v in dict(vars(args), **asdict(config)).items()), 120,
                            break_long_words=False, break_on_hyphens=False))
        if writes:
            with replacing(config_file) as beside:
                beside.write_text(json.dumps(dict(args=vars(args), model_config=asdict(config), launcher=launched_by()), indent=1) + "\n")
        print(f"{args.dataset}: {len(train_set)} training and {len(val_set)} validation clips, {len(classes)} classes"
              + (f"; {train_set.skipped} + {val_set.skipped} on the skip list" if args.skip_list else ""))
        for i in range(min(3, len(train_set))):
            print(f"  clip {train_set.ids[i].decode()}: {classes[train_set.labels[i]]}")
        for g in groups:
            print(f"  parameters, {g['name']}: {len(g['params'])} tensors, {sum(p.numel() for p in g['params']) / 1e6:.2f} M, lr x {g['lr_scale']}")
        print(f"global batch {args.batch_size} = {world} processes x {local_batch // micro} micro-batches x {micro} clips at lr {args.lr}; "
              f"{args.epochs} epochs x {steps_per_epoch} steps; {device.type}, {args.precision}" + (f"; resumed at step {step}" if resume else ""))
        if args.resume and not resume:
            print(f"--resume: {out_dir} has no checkpoint yet, so the run begins at step 0")

    def save(name):
        if writes:
            save_checkpoint(out_dir / name, dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                epoch=step // steps_per_epoch, step=step, step_in_epoch=step % steps_per_epoch, best=best, validated=validated,
                window=[pair.tolist() for pair in window],
                model_config=asdict(config), classes=classes, mean=list(data.CLIP_MEAN), std=list(data.CLIP_STD), args=vars(args)))

    def log(**row):
        if writes:
            try:
                with open(out_dir / "log.jsonl", "a") as f:
                    f.write(json.dumps({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}) + "\n")
            except OSError as e:
                raise not_written(out_dir / "log.jsonl", e) from e

    # ===== wrap and loop =====
    forward = torch.compile(model) if args.compile else model
    if world > 1:
        for m in model.modules():                       # same memory, but the strides of their gradients: DDP warns otherwise
            if isinstance(m, nn.Conv2d) and m.groups > 1:
                m.to(memory_format=torch.channels_last)
        forward = DDP(forward, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    mixes = [v2.MixUp(alpha=args.mixup, num_classes=len(classes))] if args.mixup else []
    mixes += [v2.CutMix(alpha=args.cutmix, num_classes=len(classes))] if args.cutmix else []
    loader = iter(torch.utils.data.DataLoader(
        train_set, batch_sampler=step_batches(len(train_set), args.batch_size, step, stop_at, args.seed, rank, world),
        num_workers=args.workers, pin_memory=device.type == "cuda", worker_init_fn=setup_worker, timeout=args.timeout if args.workers else 0))

    asked_to_stop = []                                  # filled by a signal; the step in progress is finished first
    handlers = {s: signal.signal(s, lambda number, frame: asked_to_stop.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}

    def on_its_way(stats):
        """A copy for the CPU, and the event that tells when it is there: to read the tensor itself would wait for all that the GPU was given since."""
        if device.type != "cuda":
            return stats, None
        copy, there = stats.to("cpu", non_blocking=True), torch.cuda.Event()
        there.record()
        return copy, there

    def finite(loss, norm):
        return math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled())             # the scaler skips such steps itself

    def read(stats, there, at_step, lr, index):
        """What all ranks know about a step: raise if it is not finite, return whether anyone was asked to stop."""
        if there:
            there.synchronize()
        loss, norm, stops = stats.tolist()
        if not finite(loss, norm):
            clips = ", ".join(train_set.ids[i].decode() for i in index.tolist())
            raise FloatingPointError(f"loss {loss}, gradient norm {norm} at step {at_step}, lr {lr:.2e}; clips on rank {rank}: {clips}. "
                                     "last.pt holds an earlier step. Lower --lr, lengthen --warmup_epochs, or use --precision bf16 or fp32")
        return stops > 0

    def train_mode():
        model.train()
        if args.freeze_bn:
            for m in model.modules():
                if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                    m.eval()

    def validation_due():
        return step > validated and (step % (steps_per_epoch * args.eval_every) == 0 or step == total) and not args.dry_run

    def validate():
        """Accuracy at this step to the log, and best.pt. False where anyone was asked to stop meanwhile: the resumed run begins with it."""
        nonlocal best, validated
        if world > 1:
            for buffer in model.buffers():              # BatchNorm's statistics as rank 0 saves them
                dist.broadcast(buffer, 0)
        result = evaluate(model, val_set, device, rank, world, batch_size=4 * micro, workers=args.workers, precision=args.precision,
                          timeout=args.timeout, asked_to_stop=asked_to_stop)
        train_mode()
        if result is None:
            return False
        validated = step
        log(kind="eval", step=step, epoch=step // steps_per_epoch, top1=result["top1"], top5=result["top5"], clips=result["clips"])
        if result["top1"] > best:
            best = result["top1"]
            save("best.pt")
        if master:
            say(f"epoch {step // steps_per_epoch:3d}  validation, one centre view: top1 {result['top1']:.2f} top5 {result['top5']:.2f} "
                f"clips {result['clips']}  best {best:.2f}")
            draw_curves(out_dir)
        return True

    bar = data.progress(None, total=stop_at, initial=step, unit=" steps") if master else None
    say = print if bar is None else bar.write
    stopped, saved, previous = False, time.time(), None
    if validation_due():                                # the run was stopped in front of it
        stopped = not validate()
        save("last.pt")
    timed, waited, since = 0, 0.0, time.perf_counter()      # of this row of the log: steps, seconds waited for data, its begin
    train_mode()
    while step < stop_at and not stopped:
        lr = get_lr(step, total, warmup, args.lr, args.min_lr)
        for g in optimizer.param_groups:
            g["lr"] = lr * g["lr_scale"]

        t = time.perf_counter()
        video, label, index = next(loader)
        waited += time.perf_counter() - t
        torch.manual_seed(int(np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0]))   # dropout, drop path, MixUp
        video, label = video.to(device, non_blocking=True), label.to(device, non_blocking=True)
        video = data.normalize(video)
        if mixes:
            video, label = mixes[int(torch.randint(len(mixes), ()))](tv_tensors.Video(video), label)

        loss = torch.zeros((), device=device)
        for i in range(0, local_batch, micro):
            final = i + micro >= local_batch            # gradients are exchanged once, with the last micro-batch
            with nullcontext() if world == 1 or final else forward.no_sync():
                with autocast(device, args.precision):
                    logits = forward(video[i:i + micro])
                part = F.cross_entropy(logits.float(), label[i:i + micro], label_smoothing=args.label_smoothing) * (micro / local_batch)
                scaler.scale(part).backward()
            loss += part.detach()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        stats = torch.stack([loss, grad_norm, torch.full_like(loss, len(asked_to_stop))])
        if world > 1:
            dist.all_reduce(stats)
            stats /= world
        if previous:                                    # the step before is long done: this does not wait for the GPU
            stopped = read(*previous)
        previous = (*on_its_way(stats), step, lr, index)
        window.append(stats[:2])
        step, timed = step + 1, timed + 1
        if bar is not None:
            bar.update()

        epoch_end = step % steps_per_epoch == 0
        row_due = step % args.log_every == 0 or epoch_end
        if row_due or step == stop_at:
            stopped = read(*previous) or stopped
            seconds, steps = time.perf_counter() - since, torch.stack(window)
            row = dict(step=step, epoch=round(step / steps_per_epoch, 4), loss=steps[:, 0].mean().item(), lr=lr, grad_norm=grad_norm.item(),
                       clips_per_s=timed * args.batch_size / seconds, data_wait=waited / seconds, memory_gib=memory_gib(device))
            if scaler.is_enabled():
                row["skipped"] = int((~steps[:, 1].isfinite()).sum())           # steps that overflowed, which the scaler leaves out
                if row["skipped"] == len(steps) and scaler.get_scale() < 1:     # no scale helps: these are real
                    raise FloatingPointError(f"the gradients of {len(steps)} steps in a row overflow fp16 up to step {step}, at a loss scale down to "
                                             f"{scaler.get_scale():.2g}: nothing is learned. Lower --lr, or use --precision bf16 or fp32")
            if master:
                say(f"epoch {row['epoch']:6.2f}  step {step}/{total}  loss {row['loss']:.4f}  lr {lr:.2e}  grad {row['grad_norm']:.2f}  "
                    f"{row['clips_per_s']:.3g} clips/s  data {row['data_wait']:.0%}  {row['memory_gib']:.2f} GiB"
                    + (f"  skipped {row['skipped']}" if row.get("skipped") else ""))
            if row_due:                                 # a mere stop leaves no row: the resumed run writes it where it belongs
                log(kind="train", **row)
                window = []
            timed, waited, since = 0, 0.0, time.perf_counter()
        if args.dry_run:
            if stop_at - step == 3:                     # the first steps start workers, pick kernels, compile
                read(*previous)
                timed, waited, since = 0, 0.0, time.perf_counter()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            continue
        trained = time.perf_counter()
        if validation_due() and not stopped:
            stopped = not validate()
        if epoch_end or stopped or step == stop_at:
            read(*previous)                             # never save a step that is not finite
            save("last.pt")
            saved = time.time()
        elif master and time.time() - saved > 60 * args.save_minutes and finite(*stats[:2].tolist()):       # else all ranks stop together in the next step
            save("last.pt")
            saved = time.time()
        since += time.perf_counter() - trained          # neither counts as training

    # ===== the end =====
    if bar is not None:
        bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if master and args.dry_run:
        print(f"dry run: {row['clips_per_s']:.3g} clips/s, peak memory {memory_gib(device):.2f} GiB; nothing was written")
    elif master and (step < total or validation_due()):
        print(f"stopped after step {step} of {total}; the same command with --resume goes on from {last}")
    elif master:
        print(f"done: best top1 {best:.2f}. The test protocol, 3 crops: python evaluate.py --ckpt {out_dir / 'best.pt'}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_program("train.py", main)
