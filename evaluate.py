"""Evaluate a checkpoint of train.py as the paper does: 16 frames x 3 crops x 1 clip.

    python evaluate.py --ckpt out/ssv1/best.pt                  # or under torchrun: same numbers
    python evaluate.py --ckpt out/ssv1/best.pt --save top5.csv  # or .npz: all probabilities
    python evaluate.py --ckpt out/ssv1/best.pt --video clip.webm folder_of_frames folder_of_videos

The model, its classes, frames and size come from the checkpoint. Every clip counts exactly once, on
any number of processes. We average probabilities over the views, not logits, as UniFormerV2 and
VideoMAE do.
"""
import argparse
import csv
import multiprocessing
import os
import pickle
import signal
import sys
import zipfile
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import ModelConfig, STDFormer, require_same_shapes

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
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def make_loader(dataset, workers, timeout, device, **batches):
    return torch.utils.data.DataLoader(
        dataset, num_workers=workers, timeout=timeout if workers else 0,
        pin_memory=device.type == "cuda", worker_init_fn=setup_worker, **batches)


def setup_worker(worker):
    """Data workers ignore Ctrl-C and SIGTERM, so that train.py can finish its step and save."""
    if os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)                             # the trainer died before this worker started
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def load_checkpoint(path):
    """A checkpoint of train.py, on the CPU. weights_only: a file from elsewhere runs no code."""
    try:
        damaged = zipfile.ZipFile(path).testzip()       # torch.load does not compare checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError) as e:
        raise ValueError(f"{path} is no checkpoint of train.py: {e}") from e
    if damaged or "model_config" not in checkpoint:
        raise ValueError(f"{path} is damaged, or no checkpoint of train.py")
    return checkpoint


REMEDIES = {"shared memory": "give the container more with --shm-size=8g, or take fewer --workers",
            "DataLoader": "scripts/check_data.py finds clips that crash or hang the decoder",
            "out of memory": "lower --batch_size, or train with --checkpointing or --micro_batch"}


def run_program(main):
    """Run a command. An error that its user can fix is one line, others keep their traceback."""
    sys.stdout.reconfigure(errors="replace")    # class names that the terminal cannot show
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as e:
        sys.exit(f"{Path(sys.argv[0]).name}: {e}")
    except RuntimeError as e:
        text = f"{e} {e.__cause__}"
        for word, remedy in REMEDIES.items():           # "Caught ...": Python code in a worker
            if word in text and (word == "shared memory" or "Caught" not in text):
                print(f"To fix this, {remedy}.", file=sys.stderr)
                break
        raise
    finally:
        if hasattr(signal, "SIGCHLD"):          # or PyTorch reports the workers that we kill
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()                       # they ignore SIGTERM, and one may hang


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

    Process r takes clips r, r + world, ..., so no clip is counted twice. Clips on the skip list
    count as wrong. Returns on rank 0 (else None): top1 and top5 in percent, loss (without label
    smoothing), the number of clips, and probabilities (clips, classes) in the data set's order.
    """
    mine = torch.utils.data.Subset(dataset, range(rank, len(dataset), world))
    loader = make_loader(mine, workers, timeout, device, batch_size=batch_size)
    model.eval()
    parts = []
    for views, _, index in tqdm(loader, "evaluating", leave=False, disable=rank > 0 or None):
        parts.append((index, predict(model, views, device, precision, mean, std)))
    if world > 1:
        gathered = [None] * world if rank == 0 else None
        dist.gather_object(parts, gathered)
        if rank > 0:
            return None
        parts = sum(gathered, [])
    index, probabilities = (torch.cat(column) for column in zip(*parts))
    assert index.sort().values.tolist() == list(range(len(dataset))), "not each clip counted once"
    probabilities = probabilities[index.argsort()]

    labels, clips = torch.from_numpy(dataset.labels), len(dataset) + dataset.skipped
    hits = probabilities.topk(min(5, probabilities.shape[1])).indices == labels[:, None]
    return dict(top1=100 * hits[:, 0].sum().item() / clips, top5=100 * hits.sum().item() / clips,
                loss=F.nll_loss(probabilities.log(), labels, ignore_index=-1).item(), clips=clips,
                probabilities=probabilities)


def top5(probabilities, classes):
    """[(name, probability)] of the five most likely classes. probabilities: (classes,)"""
    top = probabilities.topk(min(5, len(classes)))
    return [(classes[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist())]


def save_predictions(path, ids, labels, probabilities, classes):
    """FILE.csv: id, true class (empty if unknown) and the top 5. FILE.npz: all probabilities."""
    if path.endswith(".npz"):
        np.savez(path, ids=ids, labels=labels, probabilities=probabilities, classes=classes)
        return
    with open(path, "w", newline="", encoding="utf-8") as f:
        f.write("id,label,top1,p1,top2,p2,top3,p3,top4,p4,top5,p5\r\n")
        for clip, label, p in zip(ids, labels, probabilities):
            pairs = [x for name, q in top5(p, classes) for x in (name, f"{q:.5f}")]
            csv.writer(f).writerow([clip, classes[label] if label >= 0 else "", *pairs])


# ----- The command ----------------------------------------------------------

def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="checkpoint of train.py: best.pt or last.pt")
    p.add_argument("--video", nargs="+", metavar="PATH", help="print the top 5 of these, and stop")
    p.add_argument("--dataset", choices=data.LAYOUTS, help="another data set, of the same classes")
    p.add_argument("--data_root", help="folder of the data set, if it has moved")
    p.add_argument("--clip_root", help="folder of the clips, if not DATA_ROOT")
    p.add_argument("--split", default="validation", choices=("train", "validation", "test"),
                   help="papers report validation; test may have no labels: use --save")
    p.add_argument("--num_frames", type=int, help="frames per clip, if not those of training")
    p.add_argument("--image_size", type=int, help="pixels of a frame, if not those of training")
    p.add_argument("--crops", type=int, default=3, choices=(1, 3), help="spatial views")
    p.add_argument("--clips", type=int, default=1, help="temporal views")
    p.add_argument("--control", choices=("none", "shuffle", "single"),
                   help="disturb the order of frames; default: as in training")
    p.add_argument("--skip_list", metavar="FILE", help="unreadable clips, which count as wrong")
    p.add_argument("--save", metavar="FILE", help=".csv: the top 5 of each clip, .npz: everything")
    p.add_argument("--batch_size", type=int, default=8, help="clips per process at once")
    p.add_argument("--workers", type=int, default=min(8, cores_per_process()),
                   help="data workers per process")
    p.add_argument("--timeout", type=float, default=600, help="seconds to wait for a data worker")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"),
                   help="fp32 for numbers to report")
    return p.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    rank, world = setup_processes(args.device)
    device = pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = args.precision != "fp32"      # convolutions in full float32
    checkpoint = load_checkpoint(args.ckpt)
    if args.save and rank == 0:
        open(args.save, "a").close()            # fail now rather than after hours
    trained, classes = checkpoint["args"], checkpoint["classes"]
    statistics = checkpoint["mean"], checkpoint["std"]
    model = STDFormer(ModelConfig(**checkpoint["model_config"]))
    require_same_shapes(args.ckpt, checkpoint["model"], model.state_dict())
    model.load_state_dict(checkpoint["model"])
    model.to(device).eval()
    n, size = args.num_frames or model.config.num_frames, args.image_size or model.config.image_size

    if args.video:
        paths, probabilities = [], []
        for path in map(Path, args.video):      # one clip, or a folder of videos
            videos = [p for p in path.glob("*") if p.name.lower().endswith(data.VIDEOS)]
            paths += sorted(videos) or [path]
        for path in paths:
            video = data.read_clip(path.absolute(), lambda k: data.eval_indices(k, n, args.clips))
            views = data.eval_views(video, n, size, args.crops)
            probability, = predict(model, views[None], device, args.precision, *statistics)
            probabilities.append(probability)
            print(path)
            for name, p in top5(probability, classes):
                print(f"  {100 * p:6.2f} %  {name}")
        if args.save:
            ids, unknown = [str(path) for path in paths], [-1] * len(paths)
            save_predictions(args.save, ids, unknown, torch.stack(probabilities), classes)
        return

    dataset = data.VideoDataset(
        args.dataset or trained["dataset"], args.data_root or trained["data_root"], args.split, n,
        size, crops=args.crops, clips=args.clips, control=args.control or trained["control"],
        skip=data.read_skip_list(args.skip_list) if args.skip_list else (),
        clip_root=args.clip_root or (None if args.data_root else trained["clip_root"]))
    if dataset.classes != classes:
        differ = sorted({*dataset.classes} ^ {*classes})
        raise ValueError(f"--data_root has other classes than {args.ckpt}, such as {differ[:3]}")
    result = evaluate(model, dataset, device, rank, world, args.batch_size, args.workers,
                      args.timeout, args.precision, *statistics)
    if rank == 0:
        if args.save:
            predictions = dataset.ids, dataset.labels, result["probabilities"]
            save_predictions(args.save, *predictions, classes)
        if dataset.skipped:
            print(f"{dataset.skipped} clips on the skip list count as wrong")
        if dataset.labels.min() < 0:
            print("This split has no labels, so no accuracy. --save keeps the predictions.")
        else:
            print(f"top1 {result['top1']:.2f} top5 {result['top5']:.2f} clips {result['clips']} "
                  f"views {n}x{args.crops}x{args.clips}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
