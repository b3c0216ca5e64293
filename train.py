"""Train STD-Former: plain PyTorch DDP, mixed precision on CUDA.

    python train.py                                        # toy data, tiny model: minutes on a CPU
    torchrun --nproc_per_node=4 train.py --dataset ssv1    # the paper's recipe, from CLIP weights
    python train.py --dataset folder --data_root DIR       # your own videos: see the README

--batch_size counts the clips of one step over all processes. So 1, 4 and 8 GPUs see the same clips
in each step, at the same --lr. Everything random follows from --seed: samples from (seed, epoch,
index); dropout, MixUp and CutMix from (seed, step, rank). So with as many processes, --resume goes
on as if nothing had happened.
"""
import argparse
import json
import math
import os
import signal
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
from evaluate import (autocast, cores_per_process, evaluate, make_loader, pick_device,
                      setup_processes)
from model import (MODELS, ModelConfig, STDFormer, is_clip_parameter, load_checkpoint, load_clip,
                   model_config, require_same_shapes, resize_positions)
from scripts.guards import check_resume, run_program
from scripts.mirror_labels import mirror_labels
from scripts.output import print_run
from scripts.plots import draw_curves
from scripts.toy_data import make_toy

# ----- Recipes and flags ----------------------------------------------------

# The paper gives frames, size, AdamW, learning rate, batch size, cosine, soft cross-entropy, flips
# and CLIP. UniFormer's recipe has a soft cross-entropy with MixUp and CutMix, so ours has them. The
# rest is UniFormerV2's recipe for SSV1. The flags' own defaults are common to both recipes.
PAPER = dict(model="b16", clip="openai", epochs=22, warmup_epochs=5.0, batch_size=16, lr=1e-4,
             crop_scale=0.08, randaugment=21, drop_path=0.2, ctm_drop_path=0.4, ctm_dropout=0.5,
             head_dropout=0.5, grad_clip=20.0, mixup=0.8, cutmix=1.0)
TOY = dict(model="tiny", clip="none", epochs=4, warmup_epochs=0.4, batch_size=16, lr=1e-3,
           crop_scale=0.5, randaugment=0, grad_clip=1.0, mixup=0.0, cutmix=0.0)
RECIPES = {"paper": PAPER, "toy": TOY}

def get_args(argv=None):
    """Read the flags. The recipe sets defaults, a flag on the command line wins."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add, on_off = p.add_argument, argparse.BooleanOptionalAction
    # files
    add("--dataset", default="toy", choices=data.LAYOUTS, help="see the top of data.py")
    add("--recipe", choices=RECIPES, help="defaults: toy for toy and for folder without weights")
    add("--data_root", help="folder of the data set (default: datasets/DATASET)")
    add("--clip_root", help="folder around the clips, if not DATA_ROOT")
    add("--out_dir", help="folder for checkpoints and logs (default: out/DATASET)")
    add("--resume", action="store_true", help="go on from OUT_DIR/last.pt")
    add("--init_from", metavar="CHECKPOINT", help="model and weights of another run to start from")
    add("--clip", metavar="openai|FILE|none", help="CLIP weights to start from")
    add("--skip_list", metavar="FILE", help="clips to leave out; scripts/check_data.py writes it")
    # data
    add("--crop_scale", type=float, help="smallest area of a crop; raise it if small things matter")
    add("--randaugment", type=int, choices=range(31), metavar="M", help="magnitude, 0 for none")
    add("--flip", action=on_off, default=True, help="mirror half of the clips, and their labels")
    add("--control", default="none", choices=("none", "shuffle", "single"))
    add("--workers", type=int, default=min(8, cores_per_process()), help="data workers per process")
    add("--timeout", type=float, default=600, help="seconds to wait for a data worker")
    # optimization
    add("--epochs", type=int, help="passes over the data")
    add("--warmup_epochs", type=float, help="length of the linear warm-up")
    add("--batch_size", type=int, help="clips per step, over all processes")
    add("--micro_batch", type=int, help="clips per forward pass; less if memory runs out")
    add("--lr", type=float, help="peak, for this batch size; lower it if the loss diverges")
    add("--min_lr", type=float, default=1e-6, help="where the cosine ends")
    add("--clip_lr_scale", type=float, default=1.0, help="factor on --lr for CLIP's parameters")
    add("--freeze_clip", action="store_true", help="train the stem and the new parameters only")
    add("--weight_decay", type=float, default=0.05, help="not of biases, norms and other vectors")
    add("--grad_clip", type=float, help="largest gradient norm, 0 for no limit")
    add("--label_smoothing", type=float, default=0.1)
    add("--mixup", type=float, help="alpha of MixUp, 0 for none")
    add("--cutmix", type=float, help="alpha of CutMix, 0 for none")
    # system
    add("--seed", type=int, default=0, help="of everything; report the mean over several")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    add("--compile", action="store_true", help="faster after a slow start; best with --no-sync_bn")
    add("--checkpointing", action="store_true", help="less memory, about a third more time")
    add("--sync_bn", action=on_off, default=True, help="BatchNorm sees the clips of all GPUs")
    add("--log_every", type=int, default=20, help="steps between log lines; a signal waits for one")
    add("--eval_every", type=int, default=1, help="epochs between validations")
    add("--save_minutes", type=float, default=10, help="time between two last.pt in an epoch")
    add("--max_steps", type=int, help="stop after this step, as if interrupted")
    add("--dry_run", action="store_true", help="five steps, to see time and memory; keep nothing")
    # model: one flag for each field of ModelConfig, except num_classes
    add("--model", choices=MODELS, help="size of the model; --init_from brings its own")
    for f in fields(ModelConfig)[1:]:
        kind = {bool: dict(action=on_off), tuple: dict(type=int, nargs="*", metavar="LAYER")}
        add(f"--{f.name}", help=f.metadata["help"], **kind.get(f.type, dict(type=f.type)))

    known, _ = p.parse_known_args(argv)                 # to find the recipe
    own_weights = known.init_from or known.clip not in (None, "none")
    toy = known.dataset == "toy" or (known.dataset == "folder" and not own_weights)
    recipe = known.recipe or ("toy" if toy else "paper")
    p.set_defaults(recipe=recipe, data_root=f"datasets/{known.dataset}",
                   out_dir=f"out/{known.dataset}", **RECIPES[recipe])
    return p.parse_args(argv)

# ----- The parts of training ------------------------------------------------

def get_lr(step, total, warmup, peak, floor=0.0):
    """Linear warm-up, then a cosine from peak to floor (section 4.2, "cosine annealing")."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))

def param_groups(model, weight_decay, clip_lr_scale=1.0):
    """AdamW's groups: (CLIP's parameters, new ones) x (tables and kernels with decay, the rest)."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((is_clip_parameter(name), p.ndim > 1), []).append(p)
    return [dict(params=params, weight_decay=weight_decay if decay else 0.0,
                 lr_scale=clip_lr_scale if from_clip else 1.0)
            for (from_clip, decay), params in groups.items()]

def make_datasets(args, config):
    common = dict(num_frames=config.num_frames, size=config.image_size, control=args.control,
                  seed=args.seed, skip_list=args.skip_list, clip_root=args.clip_root)
    val = data.VideoDataset(args.dataset, args.data_root, "validation", **common)
    mirrored = mirror_labels(val.classes)[0] if args.flip else None
    train = data.VideoDataset(args.dataset, args.data_root, "train", train=True, mirrored=mirrored,
                              scale=(args.crop_scale, 1.0), augment=args.randaugment, **common)
    return train, val

def step_batches(num_clips, batch_size, start, stop, seed, rank, world):
    """Yield this rank's clips of each step, as a list of (epoch, index).

    Each epoch is a new permutation, without its last, incomplete batch. The ranks share each batch.
    """
    for step in range(start, stop):
        epoch, i = divmod(step, num_clips // batch_size)
        if i == 0 or step == start:
            order = np.random.default_rng([seed, epoch]).permutation(num_clips)
        batch = order[i * batch_size:(i + 1) * batch_size]
        yield [(epoch, int(index)) for index in batch[rank::world]]

def init_from(model, checkpoint, path, classes):
    """Take the weights of another run. Positions are resized, a head for other classes is new."""
    state, own = dict(checkpoint["model"]), model.state_dict()
    state["positional_embedding"] = resize_positions(state["positional_embedding"], model.grid)
    if checkpoint["classes"] != classes:
        state.update({name: own[name] for name in ("head.weight", "head.bias")})
    require_same_shapes(f"--init_from {path}", state, own)
    model.load_state_dict(state)

def set_weights(model, args, checkpoint, resume, classes, master):
    """Take the weights of last.pt, of another run or of CLIP, and say which of them learn.

    --freeze_clip leaves the stem to learn: it has new frames, which start at 0.
    """
    if resume:
        model.load_state_dict(checkpoint["model"])
    elif args.init_from:
        init_from(model, checkpoint, args.init_from, classes)
    elif args.clip != "none" and master:                # DDP sends rank 0's weights to the others
        print("CLIP weights: {} tensors loaded, {} new".format(*load_clip(model, args.clip)))
    for name, p in model.named_parameters():
        frozen = is_clip_parameter(name) and name != "conv1.weight"
        p.requires_grad = not (args.freeze_clip and frozen)

def wrap(model, args, world):
    """The model as training calls it: compiled, and in DDP if there are several processes."""
    if world > 1 and args.sync_bn and next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # changes the model itself
    forward = torch.compile(model) if args.compile else model
    if world > 1:
        for m in model.modules():                       # avoids a warning of DDP about strides
            if isinstance(m, nn.Conv2d) and m.groups > 1:
                m.to(memory_format=torch.channels_last)
        forward = DDP(forward, gradient_as_bucket_view=True)
    return forward

def train_step(forward, model, video, label, optimizer, scaler, args, micro):
    """Forward, backward and update for one batch, `micro` clips at a time.

    forward: the model as wrap() returns it
    video: (B, 3, F, S, S), label: (B,) or (B, classes) -> loss and gradient norm, (2,)
    """
    model.train()
    total_loss = torch.zeros((), device=video.device)
    for i in range(0, len(video), micro):
        # DDP averages gradients over the processes. Once a step is enough, with the last clips.
        if isinstance(forward, DDP):
            forward.require_backward_grad_sync = i + micro >= len(video)
        with autocast(video.device, args.precision):
            logits = forward(video[i:i + micro])
        loss = F.cross_entropy(logits.float(), label[i:i + micro],
                               label_smoothing=args.label_smoothing) * (micro / len(video))
        scaler.scale(loss).backward()
        total_loss += loss.detach()
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
    scaler.step(optimizer)                              # in fp16, leaves out a step that overflows
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([total_loss, grad_norm])

# ----- The run --------------------------------------------------------------

def main(argv=None):
    args = get_args(argv)
    # processes, device, precision
    rank, world = setup_processes(args.device)
    device = pick_device(args.device)
    master = rank == 0                                  # this process prints and writes files
    torch.set_float32_matmul_precision("high")          # TF32
    if args.precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.precision = "bf16" if bf16 else "fp16" if device.type == "cuda" else "fp32"
    micro = args.micro_batch or max(1, args.batch_size // world)
    if args.batch_size % (world * micro):
        raise ValueError(f"--batch_size must be a multiple of {world} x --micro_batch {micro}")

    # output folder
    out_dir, last = Path(args.out_dir), Path(args.out_dir, "last.pt")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0    # by torchrun
    resume = args.resume or (restarted and last.is_file())
    writes = master and not args.dry_run
    if writes:
        out_dir.mkdir(parents=True, exist_ok=True)
        if any(out_dir.glob("*.pt")) and not resume:
            raise ValueError(f"--out_dir {out_dir} holds a run: add --resume, or take another")

    # data
    if args.dataset == "toy" and master:
        make_toy(args.data_root)
    if world > 1:
        dist.barrier()
    source = last if resume else args.init_from
    checkpoint = load_checkpoint(source) if source else {}
    config = model_config(args, base=checkpoint.get("model_config"))
    train_set, val_set = make_datasets(args, config)
    classes, num_clips = train_set.classes, len(train_set)
    config.num_classes = len(classes)
    steps_per_epoch = num_clips // args.batch_size
    if steps_per_epoch == 0 or len(val_set) == 0:
        raise ValueError(f"{num_clips} training and {len(val_set)} validation clips are too few "
                         f"for --batch_size {args.batch_size}, or --data_root is wrong")
    total, warmup = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)

    # model, weights, optimizer
    torch.manual_seed(args.seed)
    model = STDFormer(config)
    if resume:
        check_resume(checkpoint, classes=classes, clips=num_clips, **vars(args))
    set_weights(model, args, checkpoint, resume, classes, master)
    step, best = (checkpoint["step"], checkpoint["best"]) if resume else (0, -1.0)
    model.checkpointing = args.checkpointing
    model.to(device)
    forward = wrap(model, args, world)  # for training; checkpoints and evaluation use the plain one
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay, args.clip_lr_scale),
                                  fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if resume:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())     # {}: not in fp16

    log_file = out_dir / "log.jsonl"
    if writes:                                          # keep the rows of steps before last.pt
        logged = log_file.read_bytes() if resume and log_file.is_file() else b""
        log_file.write_bytes(logged[:logged.rfind(b"\n", 0, checkpoint.get("log_bytes")) + 1])
        described = dict(args=vars(args), model_config=asdict(config))
        Path(out_dir, "config.json").write_text(json.dumps(described, indent=1) + "\n")
    if master:
        print_run(args, train_set, val_set, model, world, micro)
    del checkpoint

    # batches; MixUp and CutMix mix the clips of one process, and each step takes one of the two
    stop_at = min(total, step + 5) if args.dry_run else min(total, args.max_steps or total)
    batches = step_batches(num_clips, args.batch_size, step, stop_at, args.seed, rank, world)
    loader = iter(make_loader(train_set, args.workers, args.timeout, device, batch_sampler=batches))
    mixes = [v2.MixUp(alpha=args.mixup, num_classes=len(classes))] if args.mixup else []
    mixes += [v2.CutMix(alpha=args.cutmix, num_classes=len(classes))] if args.cutmix else []

    def save(name):
        """Write another file first, then rename it: a crash leaves the old checkpoint as it was."""
        if not writes:
            return
        torch.save(dict(
            model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
            step=step, epoch=step // steps_per_epoch, step_in_epoch=step % steps_per_epoch,
            best=best, classes=classes, clips=num_clips, log_bytes=log_file.stat().st_size,
            model_config=asdict(config), mean=data.CLIP_MEAN, std=data.CLIP_STD, args=vars(args),
        ), out_dir / f"{name}.tmp")
        os.replace(out_dir / f"{name}.tmp", out_dir / name)

    def log(line, **row):
        """Print a row in this form, and write it to log.jsonl."""
        if master:
            print(line.format(total=total, **row))
        if writes:
            with open(log_file, "a") as f:
                f.write(json.dumps(row) + "\n")

    # Slurm and torchrun stop a job with SIGTERM, you with Ctrl-C: go on to the next log line, save.
    signals = []
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, lambda signum, frame: signals.append(signum))

    # ===== the loop =====
    stopped, saved, window_start, waited, window = False, time.time(), time.time(), 0.0, []
    while True:
        # Validation comes after last.pt is written. If a run ends in it, --resume begins with it.
        epoch, step_in_epoch = divmod(step, steps_per_epoch)
        due = step_in_epoch == 0 and step > 0 and epoch % args.eval_every == 0
        if (due or step == total) and not stopped and not args.dry_run:
            if world > 1:                               # without SyncBatchNorm each has its own
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)
            result = evaluate(model, val_set, device, rank, world, 4 * micro, args.workers,
                              args.timeout, args.precision)
            del result["probabilities"]
            if result["top1"] > best:
                best = result["top1"]
                save("best.pt")
            log("epoch {epoch}  validation, one centre view: top1 {top1:.2f} top5 {top5:.2f} "
                "loss {loss:.4f} clips {clips}", kind="eval", step=step, epoch=epoch, **result)
            if writes:
                draw_curves(out_dir)
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
        torch.manual_seed(int(seed))                    # dropout, stochastic depth, MixUp
        video = data.normalize(video.to(device, non_blocking=True))
        label = label.to(device, non_blocking=True)
        if mixes:
            mix = mixes[int(torch.randint(len(mixes), ()))]
            video, label = mix(tv_tensors.Video(video), label)      # they take 5D as Video only

        # the update
        window.append(train_step(forward, model, video, label, optimizer, scaler, args, micro))
        step += 1
        epoch_end = step % steps_per_epoch == 0
        if step % args.log_every and not epoch_end and step < stop_at:
            continue

        # All processes learn here of a signal or a broken loss, so that they leave together.
        stats = torch.stack([*window, torch.tensor([len(signals), 0.0], device=device)])
        if world > 1:
            dist.all_reduce(stats)
        *rows, (stopped, _) = (stats / world).tolist()  # stopped is not 0 if any got a signal
        losses, norms = zip(*rows)
        loss, finite = sum(losses) / len(losses), [n for n in norms if math.isfinite(n)]
        skipped = len(norms) - len(finite)              # by the scaler, in fp16
        if not math.isfinite(loss) or (skipped and not scaler.is_enabled()):
            raise FloatingPointError(f"loss {loss}, summed gradient norm {sum(norms)}, step {step} "
                                     f"at lr {lr:.2e}: lower --lr or lengthen --warmup_epochs")
        seconds = time.time() - window_start
        log("epoch {epoch:6.2f}  step {step}/{total}  loss {loss:.4f}  lr {lr:.2e}  grad "
            "{grad_norm:.2f}  {clips_per_s:.3g} clips/s  data {data_wait:.0%}"
            + ("  {memory_gib:.1f} GiB" if device.type == "cuda" else ""),
            kind="train", step=step, epoch=round(step / steps_per_epoch, 4), loss=loss, lr=lr,
            grad_norm=finite[-1] if finite else 0.0, skipped=skipped, data_wait=waited / seconds,
            clips_per_s=len(window) * args.batch_size / seconds,
            memory_gib=torch.cuda.max_memory_allocated() / 2 ** 30)
        if epoch_end or stopped or step == stop_at or time.time() - saved > 60 * args.save_minutes:
            save("last.pt")
            saved = time.time()
        window_start, waited, window = time.time(), 0.0, []

    # ===== the end =====
    ending = f"stopped after step {step} of {total}; the same command with --resume goes on"
    if step == total and not stopped:
        ending = f"done: best top1 {best:.2f}. Test: python evaluate.py --ckpt {out_dir}/best.pt"
    if master:
        print("dry run: nothing was kept" if args.dry_run else ending)
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    run_program(main)
