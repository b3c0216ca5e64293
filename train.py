"""Train STD-Former: plain PyTorch DDP, mixed precision on CUDA.

    python train.py                                        # toy data, tiny model: minutes on a CPU
    torchrun --nproc_per_node=4 train.py --dataset ssv1    # the paper's recipe, from CLIP weights
    python train.py --dataset folder --data_root DIR       # your own videos: see the README

--batch_size counts the clips of one step over all processes, and --lr is for that batch. So 1, 4
and 8 GPUs see the same clips in each step. Everything random follows from --seed: samples from
(seed, epoch, index, repetition); dropout, erasing and mixing from (seed, step, rank). So with the
same flags and the same number of processes, a resumed run is the same run: on a CPU to the last
bit, on a GPU with the same samples.
"""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
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
from evaluate import autocast, evaluate, positive, run_command, set_tf32, setup
from model import (MODELS, ModelConfig, STDFormer, is_clip_parameter, load_checkpoint, load_clip,
                   load_weights, resize_positions)

# ----- Recipes and flags ----------------------------------------------------

# The paper gives frames, size, AdamW, learning rate, batch size, cosine, soft cross-entropy, flips
# and CLIP. UniFormer's runs on SSV1 have the same learning rate per clip and a soft cross-entropy,
# so what the paper does not say is theirs. (RandAugment's magnitude is 7 of timm's 10, which is 21
# of torchvision's 30.) Drop path and dropout are UniFormerV2's, which starts from CLIP as well.
PAPER = dict(
    model="b16", clip="openai", epochs=60, warmup_epochs=5, batch_size=16, lr=1e-4, grad_clip=20,
    crop_scale=0.08, randaugment=21, repeat_aug=2, random_erasing=0.25, mixup=0.8, cutmix=1.0,
    label_smoothing=0.1, drop_path=0.2, ctm_drop_path=0.4, ctm_dropout=0.5, head_dropout=0.5)
# UniFormerV2's run on SSV1, which has no mixing, smoothing, erasing or flips.
UNIFORMERV2 = dict(
    model="b16", clip="openai", epochs=22, warmup_epochs=5, batch_size=128, lr=4e-5, grad_clip=20,
    crop_scale=0.08, randaugment=21, randaugment_first=True, repeat_aug=2, random_erasing=0,
    mixup=0, cutmix=0, label_smoothing=0, flip=False, drop_path=0.2, ctm_drop_path=0.4,
    ctm_dropout=0.5, head_dropout=0.5)
# For the tiny model, from random weights.
TOY = dict(
    model="tiny", clip="none", epochs=4, warmup_epochs=0.4, batch_size=16, lr=1e-3, grad_clip=1,
    crop_scale=0.5, randaugment=0, repeat_aug=1, random_erasing=0, mixup=0, cutmix=0,
    label_smoothing=0.1)
RECIPES = {"paper": PAPER, "uniformerv2": UNIFORMERV2, "toy": TOY}

def get_args(argv=None):
    """Read the flags. The recipe sets defaults; a flag on the command line wins."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    on_off = argparse.BooleanOptionalAction
    # files
    add("--dataset", default="toy", choices=data.LAYOUTS, help="see the top of data.py")
    add("--recipe", choices=RECIPES, help="default: toy for --dataset toy, paper for all others")
    add("--data_root", help="folder of the data set (default: datasets/DATASET)")
    add("--clip_root", help="folder that holds 20bn-*, or the clips of --dataset folder, if it "
        "is not DATA_ROOT")
    add("--out_dir", help="folder for checkpoints and logs (default: out/DATASET)")
    add("--resume", action="store_true", help="continue from OUT_DIR/last.pt")
    add("--init_from", metavar="CHECKPOINT", help="start from model and weights of another run")
    add("--clip", metavar="openai|FILE|none", help="start from the weights of CLIP")
    add("--skip_list", metavar="FILE", help="clips to leave out; scripts/check_data.py writes it")
    # data
    add("--crop_scale", type=float, help="smallest area of a crop; raise it for small objects")
    add("--randaugment", type=int, choices=range(31), metavar="M", help="magnitude, 0 for none")
    add("--randaugment_first", action=on_off, default=False, help="RandAugment before the crop")
    add("--repeat_aug", type=positive, help="samples of each clip in a step; memory grows with it")
    add("--random_erasing", type=float, metavar="P", help="probability of a rectangle of "
        "noise")
    add("--flip", action=on_off, help="mirror half of the clips, and their labels; on for ssv1, "
        "ssv2 and the toy, off for --recipe uniformerv2")
    add("--control", default="none", choices=("none", "shuffle", "single"),
        help="control experiment: shuffle the frames of each clip, or repeat a single one")
    add("--workers", type=int, default=min(8, data.cores_per_process()),
        help="data workers per process")
    add("--timeout", type=float, default=600, help="seconds to wait for a data worker")
    # optimization
    add("--epochs", type=positive, help="passes over the data")
    add("--warmup_epochs", type=float, help="length of the linear warm-up")
    add("--batch_size", type=positive, help="clips per step, over all processes")
    add("--micro_batch", type=positive, help="samples per forward pass; fewer need less memory, "
        "and give BatchNorm less to average over")
    add("--lr", type=float, help="peak, for this batch size; lower it if the loss diverges")
    add("--min_lr", type=float, default=1e-6, help="where the cosine ends")
    add("--clip_lr_scale", type=float, default=1.0, help="factor on --lr for CLIP's parameters")
    add("--freeze_clip", action="store_true", help="train only the new parameters and the stem's "
        "convolution")
    add("--weight_decay", type=float, default=0.05, help="of matrices and convolution kernels")
    add("--grad_clip", type=float, help="largest gradient norm, 0 for no limit")
    add("--label_smoothing", type=float, help="share of the label that is spread over all classes")
    add("--mixup", type=float, help="alpha of MixUp, 0 for none")
    add("--cutmix", type=float, help="alpha of CutMix, 0 for none")
    # system
    add("--seed", type=int, default=0, help="of everything random; report the mean over several")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    add("--compile", action="store_true", help="slower start, faster steps")
    add("--checkpointing", action="store_true", help="less memory, but more time")
    add("--sync_bn", action="store_true", help="BatchNorm over the clips of all GPUs; slower, and "
        "--compile then gains little")
    add("--log_every", type=positive, default=20, help="steps between log lines; Ctrl-C and "
        "SIGTERM take effect at the next one, or after a running validation")
    add("--eval_every", type=positive, default=1, help="epochs between validations")
    add("--save_minutes", type=float, default=10, help="minutes between saves within an epoch")
    add("--max_steps", type=positive, help="stop after this step, as if interrupted")
    # model: the fields of ModelConfig
    add("--model", choices=MODELS, help="size of the model; --init_from brings its own")
    add("--num_frames", type=positive, help="frames per clip; 32 take twice the time of 16")
    add("--image_size", type=positive, help="pixels of a frame; a multiple of the patch size")
    add("--patch_size", type=positive, help="pixels of a patch; CLIP's weights fix it")
    add("--stem_stride", type=positive, help="input frames per token frame; 1 doubles the cost")
    add("--stem_kernel", type=positive, help="frames that the stem's convolution sees; odd")
    add("--dim", type=positive, help="width")
    add("--depth", type=positive, help="layers of each branch")
    add("--heads", type=positive, help="attention heads; a divisor of the width")
    layers = dict(type=int, nargs="*", metavar="LAYER")
    add("--ptm_layers", **layers, help="layers with a PTM (Table 5); default: the last third")
    add("--ptm_conv", choices=("residual2d", "residual3d", "attention2d", "attention3d"),
        help="PTM's convolution (Table 3)")
    add("--alpha", type=float, help="weight of the FFN in Eq. 1 (Table 7)")
    add("--beta", type=float, help="weight of the convolution in Eq. 1 (Table 7)")
    add("--learn_fusion", action=on_off, help="learn alpha and beta, starting from these values")
    add("--stdm_layers", **layers, help="layers with an STDM; default: all but the last")
    add("--smem_t_layers", **layers, help="SMEM in the temporal branch (Table 6); default: layer "
        "L // 3")
    add("--smem_st_layers", **layers, help="SMEM in the spatio-temporal branch; default: none")
    add("--smem_fusion", choices=("mul", "add", "mul+add"), help="how SMEM compares (Table 4)")
    add("--smem_grid", type=positive, help="patches per side that SMEM is built for")
    add("--drop_path", type=float, help="stochastic depth of Blocks and PTMs: 0 in the "
        "first layer, this in the last")
    add("--ctm_drop_path", type=float, help="stochastic depth of the CTMs: 0 in the first "
        "layer, this in the last")
    add("--ctm_dropout", type=float, help="dropout in the FFN of the CTMs")
    add("--head_dropout", type=float, help="dropout before the classifier")

    first, _ = p.parse_known_args(argv)
    recipe = first.recipe or ("toy" if first.dataset == "toy" else "paper")
    defaults = dict(RECIPES[recipe])
    if recipe == "paper" and first.dataset == "ssv2":
        defaults["epochs"] = 50                         # UniFormer's on V2
    clip = defaults.pop("clip")                         # no default: see if it was given
    p.set_defaults(**defaults)
    args = p.parse_args(argv)

    args.recipe = recipe
    args.data_root = args.data_root or f"datasets/{args.dataset}"
    args.out_dir = args.out_dir or f"out/{args.dataset}"
    if args.init_from and args.clip not in (None, "none"):
        p.error("--init_from and --clip both give weights to start from; use one of them")
    args.clip = args.clip or ("none" if args.init_from else clip)
    if args.init_from and first.model:
        p.error("--init_from brings its own model; leave out --model")
    if args.freeze_clip and args.clip == "none" and not args.init_from:
        p.error("--freeze_clip keeps CLIP's weights, but --clip none gives no weights")
    if args.warmup_epochs >= args.epochs:
        p.error(f"--warmup_epochs {args.warmup_epochs} leaves none of --epochs {args.epochs} for "
                "the learning rate to decay; lower it")
    if args.flip is None:       # mirror_labels knows the classes of these
        args.flip = args.dataset in ("ssv1", "ssv2", "toy")
    return args

# ----- The parts of training ------------------------------------------------

def get_lr(step, total, warmup, peak, floor=0.0):
    """Linear warm-up, then a cosine from peak to floor (section 4.2, "cosine annealing")."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))

def param_groups(model, weight_decay, clip_lr_scale=1.0):
    """AdamW's groups: CLIP's parameters and new ones, each with and without weight decay.

    Biases, norms and other vectors have no decay, as in UniFormerV2. Positions are a matrix.
    """
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = (is_clip_parameter(name), p.ndim > 1)
            if key not in groups:
                from_clip, has_decay = key
                groups[key] = dict(params=[], weight_decay=weight_decay if has_decay else 0.0,
                                   lr_scale=clip_lr_scale if from_clip else 1.0)
            groups[key]["params"].append(p)
    return list(groups.values())

def model_config(args, num_classes, base=None):
    """The ModelConfig that the flags describe. base: the fields of the model to start from"""
    config = dict(base or MODELS[args.model])
    for field in fields(ModelConfig):
        value = getattr(args, field.name, None)
        if value is not None:
            config[field.name] = value
    config["num_classes"] = num_classes
    return ModelConfig(**config)

def make_toy(root):
    """Make the toy data, if there are none yet."""
    if Path(root, "something-something-v1-train.csv").is_file():
        return
    script = Path(__file__).parent / "scripts" / "toy_data.py"
    if not script.is_file():
        raise FileNotFoundError(f"{root} has no toy data, and {script} to make them does not exist;"
                                " for your own videos use --dataset folder")
    if Path(root).is_dir() and os.listdir(root):
        raise ValueError(f"{root} does not hold toy data; for your own videos use --dataset folder")
    print(f"making the toy data in {root} with {script.name}")
    if subprocess.run([sys.executable, script, "--data_root", root]).returncode != 0:
        raise ValueError(f"{script} has failed, see above")

def make_datasets(args, image_size, num_frames):
    common = dict(num_frames=num_frames, size=image_size, control=args.control, seed=args.seed,
                  skip_list=args.skip_list, clip_root=args.clip_root)
    train_set = data.TrainingDataset(
        args.dataset, args.data_root, "train", crop_scale=args.crop_scale, flip=args.flip,
        randaugment=args.randaugment, randaugment_first=args.randaugment_first, **common)
    val_set = data.VideoDataset(args.dataset, args.data_root, "validation", **common)
    return train_set, val_set

def print_run(args, train_set, val_set, model, device, world, micro):
    """The first lines: data, labels that flips change, model, batches."""
    classes = train_set.classes
    print(f"{args.dataset}: {len(train_set)} training clips of {train_set.source}, {len(val_set)} "
          f"validation clips of {val_set.source}, {len(classes)} classes")
    if train_set.skipped or val_set.skipped:
        print(f"  skipped: {train_set.skipped} and {val_set.skipped} clips")
    if args.flip:
        pairs = [f"{classes[i]!r} and {classes[j]!r}"
                 for i, j in enumerate(train_set.mirrored) if i < j]
        print("  flips swap these labels:", "; ".join(pairs) or "none")
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"model: {model.config.depth} layers of width {model.config.dim}, "
          f"{parameters:.2f} M parameters, {args.precision} on {device.type}")
    samples = args.batch_size * args.repeat_aug
    print(f"{args.recipe} recipe: {args.batch_size} clips per step at lr {args.lr}, each sampled "
          f"{args.repeat_aug} times; {world} processes x {samples // (world * micro)} passes x "
          f"{micro} samples")
    if args.batch_size == world and (args.mixup or args.cutmix):
        print("  MixUp and CutMix do nothing: they mix clips within a process, and each has one")

# Flags that a resumed run may change: it still sees the same clips, by the same recipe.
FREE = ("resume", "out_dir", "data_root", "clip_root", "init_from", "clip", "workers", "timeout",
        "device", "precision", "compile", "checkpointing", "micro_batch", "log_every",
        "eval_every", "save_minutes", "max_steps")

def check_resume(checkpoint, args, classes, num_clips):
    """ValueError if this is another run than the one that was stopped."""
    before = dict(checkpoint["args"], classes=checkpoint["classes"], clips=checkpoint["clips"])
    now = dict(vars(args), classes=classes, clips=num_clips)
    for name, value in now.items():
        # A flag that is newer than the checkpoint counts as unchanged.
        if name not in FREE and before.get(name, value) != value:
            raise ValueError(f"--resume needs the same run, but {name} was {str(before[name])[:60]}"
                             f" and is {str(value)[:60]}; change it back, or use another --out_dir")

def init_from(model, checkpoint, path, classes):
    """Take the weights of another run. Positions are resized, a head for other classes is new."""
    state = dict(checkpoint["model"])
    state["positional_embedding"] = resize_positions(state["positional_embedding"], model.grid)
    if checkpoint["classes"] != classes:
        state["head.weight"] = model.head.weight
        state["head.bias"] = model.head.bias
    load_weights(model, state, f"--init_from {path}")

def erase(video, p):
    """Fill a rectangle of some clips with noise, in place. video: normalized, (B, 3, F, S, S)

    The noise is new in each frame, as in UniFormer. It is drawn on the device, because a copy from
    the CPU would make the CPU wait for the GPU.
    """
    erasing = v2.RandomErasing()
    for clip in video:                                                          # (3, F, S, S)
        if torch.rand(()) < p:
            r = erasing.make_params([clip])             # top i, left j, height h, width w, value v
            if r["v"] is not None:                      # None: no rectangle fits
                rectangle = clip.narrow(2, r["i"], r["h"]).narrow(3, r["j"], r["w"])
                rectangle.normal_()
    return video

def train_step(model, raw_model, video, label, optimizer, scaler, args, micro):
    """Forward, backward and update for one batch, `micro` samples at a time.

    model, raw_model: with and without DDP and compilation
    video: (B, 3, F, S, S), label: (B,) or (B, classes) -> loss and gradient norm
    """
    raw_model.train()
    total_loss = torch.zeros((), device=video.device)
    for i in range(0, len(video), micro):
        # DDP averages gradients over the processes. Once a step is enough, in the last pass.
        if isinstance(model, DDP):
            model.require_backward_grad_sync = i + micro >= len(video)
        with autocast(video.device, args.precision):
            logits = model(video[i:i + micro])
        loss = F.cross_entropy(logits.float(), label[i:i + micro],
                               label_smoothing=args.label_smoothing) * (micro / len(video))
        scaler.scale(loss).backward()
        total_loss += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(raw_model.parameters(), args.grad_clip or math.inf)
    scaler.step(optimizer)                              # in fp16, leaves out a step that overflows
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total_loss, grad_norm

# ----- The run --------------------------------------------------------------

def main(argv=None, Model=STDFormer):
    """argv: the flags. Model: STDFormer or a subclass, see scripts/variants.py"""
    args = get_args(argv)

    # ----- processes, device, precision
    device, rank, world = setup(args.device)
    master = rank == 0                                  # this process prints and writes files
    if args.precision == "auto":
        args.precision = "fp32"
        if device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            args.precision = "bf16" if bf16 else "fp16"
    set_tf32(args.precision != "fp32")
    if args.batch_size % world != 0:
        raise ValueError(f"--batch_size is {args.batch_size}, expected a multiple of the number of "
                         f"processes, {world}")
    samples = args.batch_size * args.repeat_aug // world        # of this process, in each step
    micro = args.micro_batch or samples
    if samples % micro != 0:
        raise ValueError(f"--micro_batch is {micro}, expected a divisor of {samples}, the samples "
                         "of a process in a step")

    # ----- output folder
    out_dir = Path(args.out_dir)
    last = out_dir / "last.pt"
    log_file = out_dir / "log.jsonl"
    resume = args.resume
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and last.is_file():
        resume = True                                   # torchrun starts again after a crash
    if master:
        out_dir.mkdir(parents=True, exist_ok=True)
        if any(out_dir.glob("*.pt")) and not resume:
            raise ValueError(f"--out_dir {out_dir} holds a run: add --resume to continue it, "
                             "or use another folder")

    # ----- data
    if args.dataset == "toy" and master:
        make_toy(args.data_root)
    if world > 1:
        dist.barrier()                                  # the others wait for the toy
    checkpoint, base = None, None
    if resume or args.init_from:
        checkpoint = load_checkpoint(last if resume else args.init_from)
        base = checkpoint["model_config"]
    # The data sets need the size and number of frames. Then they tell the number of classes.
    config = model_config(args, num_classes=1, base=base)
    train_set, val_set = make_datasets(args, config.image_size, config.num_frames)
    classes = train_set.classes
    num_clips = len(train_set)
    config.num_classes = len(classes)
    steps_per_epoch = num_clips // args.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"{num_clips} training clips are too few for --batch_size "
                         f"{args.batch_size}; lower it")
    total = args.epochs * steps_per_epoch
    warmup = round(args.warmup_epochs * steps_per_epoch)

    # ----- model and its weights
    torch.manual_seed(args.seed)
    raw_model = Model(config)
    raw_model.checkpointing = args.checkpointing
    step, best = 0, -1.0
    if resume:
        check_resume(checkpoint, args, classes, num_clips)
        load_weights(raw_model, checkpoint["model"], last)
        step, best = checkpoint["step"], checkpoint["best"]
    elif args.init_from:
        init_from(raw_model, checkpoint, args.init_from, classes)
    elif args.clip != "none" and master:                # DDP sends rank 0's weights to the others
        loaded, new = load_clip(raw_model, args.clip)
        print(f"CLIP weights: {loaded} tensors loaded, {new} new")
    if args.freeze_clip:
        for name, p in raw_model.named_parameters():
            # The stem learns: its outer frames are new, and start at 0.
            p.requires_grad = not is_clip_parameter(name) or name == "conv1.weight"
    raw_model.to(device)
    if device.type == "cpu" and config.dim < 256 and "OMP_NUM_THREADS" not in os.environ:
        # A second thread helps a tiny model little, and halves its speed on a busy machine.
        torch.set_num_threads(1)

    # `model` is what training calls. Checkpoints and evaluation use raw_model.
    if world > 1 and args.sync_bn and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(raw_model)      # it replaces the layers in place
    model = raw_model
    if args.compile:
        model = torch.compile(model)
    if world > 1:
        # Tokens have their channels last, and so have the gradients of depthwise 2D convolutions.
        # DDP would have to copy them, and would warn, if the weights were laid out in another way.
        for module in raw_model.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.to(memory_format=torch.channels_last)
        model = DDP(model, gradient_as_bucket_view=True)

    # ----- optimizer
    # The loop sets the learning rate before each step.
    optimizer = torch.optim.AdamW(param_groups(raw_model, args.weight_decay, args.clip_lr_scale),
                                  fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:                        # empty unless it was fp16
            scaler.load_state_dict(checkpoint["scaler"])
    if master:
        log_file.touch()                                # somebody may have deleted it
        written = log_file.stat().st_size
        kept = min(written, checkpoint["log_bytes"]) if resume else 0
        os.truncate(log_file, kept)                     # drop the lines of lost steps
    del checkpoint

    # ----- batches
    stop_at = min(total, args.max_steps or total)
    batches = data.step_batches(num_clips, args.batch_size, step, stop_at, args.seed, rank, world,
                                args.repeat_aug)
    loader = iter(data.make_loader(train_set, args.workers, args.timeout, device,
                                   batch_sampler=batches))
    mixes = []                                          # each step uses one of them
    if args.mixup > 0:
        mixes.append(v2.MixUp(alpha=args.mixup, num_classes=len(classes)))
    if args.cutmix > 0:
        mixes.append(v2.CutMix(alpha=args.cutmix, num_classes=len(classes)))
    if master:
        print_run(args, train_set, val_set, raw_model, device, world, micro)

    # ----- what is written
    def save(name):
        """Write another file first, then rename it: a crash leaves the old checkpoint as it was."""
        if not master:
            return
        torch.save(dict(
            model=raw_model.state_dict(), optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(), step=step, epoch=step // steps_per_epoch,
            step_in_epoch=step % steps_per_epoch, best=best, classes=classes, clips=num_clips,
            log_bytes=log_file.stat().st_size, model_config=asdict(config), mean=data.CLIP_MEAN,
            std=data.CLIP_STD, args=vars(args),
        ), out_dir / f"{name}.tmp")
        os.replace(out_dir / f"{name}.tmp", out_dir / name)

    def log(line, **row):
        """Print a line, and write a row to log.jsonl."""
        if master:
            print(line)
            with open(log_file, "a") as f:
                f.write(json.dumps(row) + "\n")

    # Slurm and torchrun stop a job with SIGTERM, you with Ctrl-C. The loop sees it at its next log
    # line, and saves.
    signals = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))

    # ----- the loop
    stopped = False
    saved = time.time()
    window_start = time.time()
    waited = 0.0                                        # seconds for data, in this window
    losses, norms = [], []                              # of the steps in this window
    skipped_in_vain = 0                                 # steps, in windows without a good one
    while True:
        # Validation, at the end of an epoch. last.pt is already written, at the end of this loop.
        # So if a run dies during validation, --resume begins with that validation.
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        is_due = epoch % args.eval_every == 0 or step == total
        if step > 0 and step_in_epoch == 0 and is_due and not stopped:
            if world > 1:                               # BatchNorm's means differ: use rank 0's
                for buffer in raw_model.buffers():
                    dist.broadcast(buffer, 0)
            batch_size = 4 * micro                      # without gradients, more fit into memory
            result = evaluate(raw_model, val_set, device, rank, world, batch_size, args.workers,
                              args.timeout, args.precision)
            del result["probabilities"]                 # the rest goes to the log
            if result["top1"] > best:
                best = result["top1"]
                save("best.pt")
            log(f"epoch {epoch}  validation, one centre view: top1 {result['top1']:.2f} "
                f"top5 {result['top5']:.2f} loss {result['loss']:.4f} clips {result['clips']}",
                kind="eval", step=step, epoch=epoch, **result)
            window_start = time.time()
        if stopped or step >= stop_at:
            break

        # the batch
        lr = get_lr(step, total, warmup, args.lr, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        wait_start = time.time()
        video, label, _ = next(loader)
        waited += time.time() - wait_start
        seed = np.random.SeedSequence([args.seed, step, rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))                    # for all that is random from here on
        non_blocking = device.type == "cuda"            # from pinned memory
        video = data.normalize(video.to(device, non_blocking=non_blocking))
        label = label.to(device, non_blocking=non_blocking)
        if args.random_erasing > 0:
            video = erase(video, args.random_erasing)
        if mixes:
            mix = mixes[int(torch.randint(len(mixes), ()))]
            video, label = mix(tv_tensors.Video(video), label)  # 5D only as tv_tensors.Video

        # the update
        loss, grad_norm = train_step(model, raw_model, video, label, optimizer, scaler, args, micro)
        losses.append(loss)
        norms.append(grad_norm)
        step += 1
        epoch_is_over = step % steps_per_epoch == 0
        if step % args.log_every != 0 and not epoch_is_over and step < stop_at:
            continue

        # The end of a window, where the CPU waits for the GPU. Processes share their losses, and
        # whether one of them got a signal. So they stop together.
        losses = torch.stack(losses)
        stop = torch.tensor(float(len(signals) > 0), device=device)
        if world > 1:
            dist.all_reduce(losses)
            dist.all_reduce(stop)
        loss = losses.mean().item() / world
        stopped = stop.item() > 0
        norms = torch.stack(norms).tolist()             # DDP makes them equal on all processes
        finite = [norm for norm in norms if math.isfinite(norm)]
        skipped = len(norms) - len(finite)              # by fp16's scaler
        skipped_in_vain = 0 if finite else skipped_in_vain + skipped
        diverged = skipped > 0 and not scaler.is_enabled()
        if not math.isfinite(loss) or diverged or skipped_in_vain >= 20:
            raise FloatingPointError(f"loss {loss}, gradient norm {norms[-1]} at step {step}, lr "
                                     f"{lr:.2e}: lower --lr or lengthen --warmup_epochs")
        seconds = time.time() - window_start
        row = dict(kind="train", step=step, epoch=round(step / steps_per_epoch, 4), loss=loss,
                   lr=lr, grad_norm=finite[-1] if finite else 0.0, skipped=skipped,
                   clips_per_s=len(norms) * args.batch_size / seconds, data_wait=waited / seconds,
                   memory_gib=torch.cuda.max_memory_allocated() / 2 ** 30)
        line = (f"epoch {row['epoch']:6.2f}  step {step}/{total}  loss {loss:.4f}  lr {lr:.2e}  "
                f"grad {row['grad_norm']:.2f}  {row['clips_per_s']:.3g} clips/s  "
                f"data {row['data_wait']:.0%}")
        if device.type == "cuda":
            line += f"  {row['memory_gib']:.1f} GiB"
        if skipped > 0:
            line += f"  {skipped} steps skipped"
        log(line, **row)
        save_is_due = time.time() - saved > 60 * args.save_minutes
        if epoch_is_over or stopped or step == stop_at or save_is_due:
            save("last.pt")
            saved = time.time()
        window_start = time.time()
        waited = 0.0
        losses, norms = [], []

    # ----- the end
    if master and step == total and not stopped:
        program = "evaluate.py" if Model is STDFormer else "scripts/variants.py NAME evaluate"
        print(f"done: best top1 {best:.2f}. Evaluate: python {program} --ckpt {out_dir}/best.pt")
    elif master:
        print(f"stopped after step {step} of {total}; rerun with --resume to continue")
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    run_command(main)
