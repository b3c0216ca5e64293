"""Evaluate a checkpoint of train.py as the paper does: 16 frames x 3 crops x 1 clip.

    python evaluate.py --ckpt out/ssv1/best.pt                  # or under torchrun: same numbers
    python evaluate.py --ckpt out/ssv1/best.pt --save top5.csv  # or .npz: all probabilities
    python evaluate.py --ckpt out/ssv1/best.pt --video clip.webm folder_of_frames folder_of_videos

The model, its classes, frames and size come from the checkpoint. Every clip counts exactly once, on
any number of processes. We average the probabilities of the views, as UniFormerV2 and VideoMAE do.
"""
import argparse
import os
import signal
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import ModelConfig, STDFormer, load_checkpoint, require_same_shapes
from scripts.guards import run_program
from scripts.output import print_result, print_top5, save_predictions

# ----- Processes and devices (train.py uses these, too) ---------------------

def setup_processes(device="auto"):
    """Join the other processes, if there are any. Returns (rank, number of processes)."""
    if "RANK" not in os.environ:
        return 0, 1
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    one_gpu_each = 0 < int(os.environ.get("LOCAL_WORLD_SIZE", gpus)) <= gpus
    # torchrun restarts processes with the same store. Each attempt gets keys of its own, or it may
    # find the address of a dead process, and hang. Several nodes do not count attempts alike.
    one_node = os.environ.get("GROUP_WORLD_SIZE") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
    store, rank, world = next(dist.rendezvous("env://"))
    dist.init_process_group("nccl" if one_gpu_each else "gloo", timeout=timedelta(minutes=30),
                            store=dist.PrefixStore(attempt, store), rank=rank, world_size=world)
    return rank, world

def pick_device(name="auto"):
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda":
        gpus = max(1, torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % gpus)
    return torch.device(name)

def cores_per_process():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

def autocast(device, precision):
    """Mixed precision for "bf16" and "fp16", nothing for "fp32"."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")

def make_loader(dataset, workers, timeout, device, **batches):
    return torch.utils.data.DataLoader(
        dataset, num_workers=workers, timeout=timeout if workers else 0,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals, **batches)

def ignore_signals(worker):
    """Data workers ignore Ctrl-C and SIGTERM, so that train.py can finish its step and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

# ----- Prediction -----------------------------------------------------------

@torch.no_grad()
def predict(model, views, device, precision="fp32", mean=data.CLIP_MEAN, std=data.CLIP_STD):
    """Class probabilities, averaged over the views of each clip.

    views: uint8 (B, views, 3, F, S, S) or (B, 3, F, S, S) -> (B, classes), on the CPU
    """
    video = views.flatten(0, 1) if views.ndim == 6 else views
    with autocast(device, precision):
        logits = model(data.normalize(video.to(device, non_blocking=True), mean, std))
    return logits.float().softmax(-1).view(len(views), -1, logits.shape[-1]).mean(dim=1).cpu()

def evaluate(model, dataset, device, rank=0, world=1, batch_size=8, workers=0, timeout=600,
             precision="fp32", mean=data.CLIP_MEAN, std=data.CLIP_STD):
    """Score a VideoDataset. Leaves the model in eval mode.

    Process r takes clips r, r + world, ..., so no clip is counted twice. Returns top1 and top5 in
    percent of `clips`, which counts skipped ones as wrong; loss of the averaged probabilities, over
    the labelled clips; and probabilities (len(dataset), classes), in the data set's order.
    """
    mine = torch.utils.data.Subset(dataset, range(rank, len(dataset), world))
    loader = make_loader(mine, workers, timeout, device, batch_size=batch_size)
    model.eval()
    parts = []
    for views, _, index in tqdm(loader, "evaluating", leave=False, disable=rank > 0 or None):
        parts.append((index, predict(model, views, device, precision, mean, std)))
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, parts)
        parts = sum(gathered, [])
    index, probabilities = (torch.cat(column) for column in zip(*parts))
    assert index.sort().values.tolist() == list(range(len(dataset))), "not each clip counted once"
    probabilities = probabilities[index.argsort()]

    labels, clips = torch.from_numpy(dataset.labels), len(dataset) + dataset.skipped
    hits = probabilities.topk(min(5, probabilities.shape[1])).indices == labels[:, None]
    return dict(top1=100 * hits[:, 0].sum().item() / clips, top5=100 * hits.sum().item() / clips,
                loss=F.nll_loss(probabilities.log(), labels, ignore_index=-1).item(), clips=clips,
                probabilities=probabilities)

# ----- The command ----------------------------------------------------------

def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--ckpt", required=True, help="checkpoint of train.py: best.pt or last.pt")
    add("--video", nargs="+", metavar="PATH", help="print the top 5 of these clips instead")
    add("--dataset", choices=data.LAYOUTS, help="another data set of these classes, at --data_root")
    add("--data_root", help="folder of the data set, if it has moved")
    add("--clip_root", help="folder around the clips, if not DATA_ROOT")
    add("--split", default="validation", choices=("train", "validation", "test"))
    add("--num_frames", type=int, help="frames per clip, if not those of training")
    add("--image_size", type=int, help="pixels of a frame, if not those of training")
    add("--crops", type=int, default=3, choices=(1, 3), help="spatial views")
    add("--clips", type=int, default=1, help="temporal views, each over the whole clip")
    add("--control", choices=("none", "shuffle", "single"), help="if not that of training")
    add("--skip_list", metavar="FILE", help="clips that count as wrong; give training's again")
    add("--save", metavar="FILE", help=".csv: the top 5 of each clip, .npz: all probabilities")
    add("--batch_size", type=int, default=8, help="clips per process at once")
    add("--workers", type=int, default=min(8, cores_per_process()), help="data workers per process")
    add("--timeout", type=float, default=600, help="seconds to wait for a data worker")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    return p.parse_args(argv)

def main(argv=None):
    args = get_args(argv)
    rank, world = setup_processes(args.device)
    device = pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"      # fp32: no TF32 in convolutions
    checkpoint = load_checkpoint(args.ckpt)
    if args.save and rank == 0:
        open(args.save, "a").close()            # fail now rather than after hours
    train_args, classes = checkpoint["args"], checkpoint["classes"]
    numerics = args.precision, checkpoint["mean"], checkpoint["std"]
    model = STDFormer(ModelConfig(**checkpoint["model_config"]))
    require_same_shapes(args.ckpt, checkpoint["model"], model.state_dict())
    model.load_state_dict(checkpoint["model"])
    model.to(device).eval()
    frames = args.num_frames or model.config.num_frames
    size = args.image_size or model.config.image_size

    if args.video:
        paths, rows = [], []
        for path in map(Path, args.video):      # one clip, or a folder of videos
            videos = [p for p in path.glob("*") if p.name.lower().endswith(data.VIDEOS)]
            paths += sorted(videos) or [path]
        for path in paths:
            video = data.read_clip(path.absolute(),
                                   lambda n: data.sample_indices(n, frames, clips=args.clips))
            views = data.eval_views(video, frames, size, args.crops)
            rows.append(predict(model, views[None], device, *numerics))
            if rank == 0:
                print_top5(path, rows[-1][0], classes)
        predictions = [str(path) for path in paths], [-1] * len(paths), torch.cat(rows)
    else:
        dataset = data.VideoDataset(
            args.dataset or train_args["dataset"], args.data_root or train_args["data_root"],
            args.split, frames, size, crops=args.crops, clips=args.clips, skip_list=args.skip_list,
            control=args.control or train_args["control"],
            clip_root=args.clip_root or (None if args.data_root else train_args["clip_root"]))
        if len(dataset) == 0:
            raise ValueError(f"--split {args.split} has no clips, or all are on the --skip_list")
        if dataset.classes != classes:
            differ = sorted({*dataset.classes} ^ {*classes})[:3]
            raise ValueError(f"--data_root has other classes than {args.ckpt}, such as {differ}")
        result = evaluate(model, dataset, device, rank, world, args.batch_size, args.workers,
                          args.timeout, *numerics)
        predictions = dataset.ids, dataset.labels, result["probabilities"]
        if rank == 0:
            print_result(result, dataset, f"{frames}x{args.crops}x{args.clips}")
    if args.save and rank == 0:
        save_predictions(args.save, *predictions, classes)
    if world > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    run_program(main)
