"""Evaluate a checkpoint of train.py as the paper does: 16 frames x 3 crops x 1 clip.

    python evaluate.py --ckpt out/ssv1/best.pt                  # or under torchrun: same numbers
    python evaluate.py --ckpt out/ssv1/best.pt --save top5.csv  # or .npz: all probabilities
    python evaluate.py --ckpt out/ssv1/best.pt --video clip.webm folder_of_frames folder_of_videos

The model, its classes, frames and size come from the checkpoint. Every clip counts exactly once, on
any number of processes. Views are fused by averaging their probabilities, as in UniFormerV2.
"""
import argparse
import csv
import multiprocessing
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import ModelConfig, STDFormer, load_checkpoint, load_weights

# ----- Evaluation -----------------------------------------------------------

@torch.no_grad()
def predict(model, views, device, precision="fp32", mean=data.CLIP_MEAN, std=data.CLIP_STD):
    """Class probabilities, averaged over the views of each clip.

    views: uint8 (B, views, 3, F, S, S) or (B, 3, F, S, S) -> (B, classes), on the CPU
    """
    B = len(views)
    video = views.flatten(0, 1) if views.ndim == 6 else views                   # (B*views, 3, ...)
    video = data.normalize(video.to(device, non_blocking=device.type == "cuda"), mean, std)
    with autocast(device, precision):
        logits = model(video)
    probabilities = logits.float().softmax(-1)                                  # (B*views, classes)
    return probabilities.view(B, -1, logits.shape[-1]).mean(dim=1).cpu()

def evaluate(model, dataset, device, rank=0, world=1, batch_size=8, workers=0, timeout=600,
             precision="fp32", mean=data.CLIP_MEAN, std=data.CLIP_STD):
    """Score a VideoDataset. Leaves the model in eval mode.

    Process r takes clips r, r + world, ..., so no clip is counted twice. Returns top1 and top5 in
    percent of `clips`, where skipped clips count as wrong; the loss of the averaged probabilities
    over the labelled clips; and the probabilities (clips, classes), in the order of the data set.
    """
    mine = torch.utils.data.Subset(dataset, range(rank, len(dataset), world))
    loader = data.make_loader(mine, workers, timeout, device, batch_size=batch_size)
    model.eval()
    parts = []                                          # (index, probabilities) of each batch
    # disable=None: no progress bar in a log file
    for views, _, index in tqdm(loader, "evaluating", leave=False, disable=rank > 0 or None):
        # A copy, because a tensor of a data worker keeps a file open.
        parts.append((index.clone(), predict(model, views, device, precision, mean, std)))
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, parts)
        parts = sum(gathered, [])                       # the lists of all processes, joined
    index = torch.cat([i for i, _ in parts])
    probabilities = torch.cat([p for _, p in parts])
    counted = index.sort().values.tolist()
    assert counted == list(range(len(dataset))), "a clip was not counted exactly once"
    probabilities = probabilities[index.argsort()]

    labels = torch.from_numpy(dataset.labels)
    clips = len(dataset) + dataset.skipped
    top5 = probabilities.topk(min(5, probabilities.shape[1])).indices           # (clips, 5)
    hits = top5 == labels[:, None]
    return dict(top1=100 * hits[:, 0].sum().item() / clips, top5=100 * hits.sum().item() / clips,
                loss=F.nll_loss(probabilities.log(), labels, ignore_index=-1).item(), clips=clips,
                probabilities=probabilities)

# ----- The command ----------------------------------------------------------

def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--ckpt", required=True, help="checkpoint of train.py: best.pt or last.pt")
    add("--video", nargs="+", metavar="PATH", help="classify these clips instead of a data set")
    add("--dataset", choices=data.LAYOUTS, help="another data set with the same classes; "
        "needs --data_root")
    add("--data_root", help="folder of the data set, if it has moved")
    add("--clip_root", help="folder that holds 20bn-*, or the clips of --dataset folder, if it "
        "is not DATA_ROOT")
    add("--split", default="validation", choices=("train", "validation", "test"))
    add("--num_frames", type=positive, help="frames per clip (default: as in training)")
    add("--image_size", type=positive, help="pixels of a frame (default: as in training)")
    add("--crops", type=int, default=3, choices=(1, 3), help="spatial views")
    add("--clips", type=positive, default=1, help="temporal views, each over the whole clip")
    add("--control", choices=("none", "shuffle", "single"), help="default: as in training; "
        "ignored with --video")
    add("--skip_list", metavar="FILE", help="clips to leave out, which count as wrong; "
        "default: none, even if training had a list")
    add("--save", metavar="FILE", help=".csv: the top 5 of each clip, .npz: all probabilities")
    add("--batch_size", type=positive, default=8, help="clips per process at once")
    add("--workers", type=int, default=min(8, data.cores_per_process()),
        help="data workers per process")
    add("--timeout", type=float, default=600, help="seconds to wait for a data worker")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="that of "
        "training may give slightly different numbers")
    args = p.parse_args(argv)
    if args.dataset and not args.data_root:
        p.error("--dataset names another data set; give its folder, too, with --data_root")
    return args

def main(argv=None, Model=STDFormer):
    """argv: the flags. Model: STDFormer or a subclass, see scripts/variants.py"""
    args = get_args(argv)
    device, rank, world = setup(args.device)
    set_tf32(args.precision != "fp32")
    checkpoint = load_checkpoint(args.ckpt)
    if args.save and rank == 0:
        open(args.save, "a").close()                    # fail now rather than after hours
    model = Model(ModelConfig(**checkpoint["model_config"]))
    load_weights(model, checkpoint["model"], args.ckpt)
    model.to(device).eval()
    args.num_frames = args.num_frames or model.config.num_frames
    args.image_size = args.image_size or model.config.image_size
    if args.video:
        evaluate_videos(args, model, checkpoint, device, rank)
    else:
        evaluate_dataset(args, model, checkpoint, device, rank, world)
    if world > 1:
        dist.destroy_process_group()

def evaluate_dataset(args, model, checkpoint, device, rank, world):
    """Print the accuracy on a split. The data set is that of training, unless flags differ."""
    flags = checkpoint["args"]                          # of training
    clip_root = args.clip_root
    if not args.data_root and not args.clip_root:       # the data are where they were
        clip_root = flags["clip_root"]
    dataset = data.VideoDataset(
        args.dataset or flags["dataset"], args.data_root or flags["data_root"], args.split,
        args.num_frames, args.image_size, crops=args.crops, clips=args.clips,
        control=args.control or flags["control"], seed=flags.get("seed", 0),
        skip_list=args.skip_list, clip_root=clip_root)
    if dataset.classes != checkpoint["classes"]:
        differ = sorted(set(dataset.classes) ^ set(checkpoint["classes"]))
        raise ValueError(f"{dataset.source} has other classes than {args.ckpt}, such as "
                         f"{differ[0]!r}")
    result = evaluate(model, dataset, device, rank, world, args.batch_size, args.workers,
                      args.timeout, args.precision, checkpoint["mean"], checkpoint["std"])
    if rank > 0:
        return
    broken = (~result["probabilities"].isfinite().all(dim=1)).sum().item()
    if broken > 0:
        raise FloatingPointError(f"{broken} clips have no finite probabilities with --precision "
                                 f"{args.precision}; use another precision")
    if args.save:
        save_predictions(args.save, dataset.ids, dataset.labels, result["probabilities"],
                         dataset.classes)
    if dataset.skipped > 0:
        print(f"{dataset.skipped} clips on the skip list count as wrong")
    if dataset.labels.min() < 0:
        print("This split has no labels, so there is no accuracy to compute. --save writes "
              "the predictions.")
    else:
        print(f"top1 {result['top1']:.2f} top5 {result['top5']:.2f} clips {result['clips']} "
              f"views {args.num_frames}x{args.crops}x{args.clips}")

def evaluate_videos(args, model, checkpoint, device, rank):
    """Print the five most likely classes of each clip. ValueError at the end if some are broken."""
    paths = []
    for name in args.video:
        paths += find_videos(name)
    read, probabilities = [], []
    for path in paths:
        try:
            video = data.read_clip(path.absolute(), args.num_frames, clips=args.clips)
        except ValueError as e:
            print(e, file=sys.stderr)
            continue
        views = data.eval_views(video, args.num_frames, args.image_size, args.crops)
        p = predict(model, views[None], device, args.precision, checkpoint["mean"],
                    checkpoint["std"])[0]
        read.append(str(path))
        probabilities.append(p)
        if rank == 0:
            print(path)
            for name, share in top_classes(p, checkpoint["classes"]):
                print(f"  {100 * share:6.2f} %  {name}")
    if args.save and read and rank == 0:
        save_predictions(args.save, read, [-1] * len(read), torch.stack(probabilities),
                         checkpoint["classes"])
    broken = len(paths) - len(read)
    if broken > 0:
        raise ValueError(f"{broken} of {len(paths)} clips cannot be read, see above")

def find_videos(name):
    """The clips at a path: a video, a folder of frames, or a folder that holds several of them."""
    path = Path(name)
    if path.is_dir():
        videos = []
        for p in sorted(path.iterdir()):
            is_clip = p.suffix.lower() in data.VIDEOS or (p.is_dir() and data.list_images(p))
            if is_clip and not data.is_hidden(p.name):
                videos.append(p)
        if videos:
            return videos
        if data.list_images(path):
            return [path]
        raise ValueError(f"--video {name} has no videos and no frames in it")
    if not path.exists():
        raise ValueError(f"--video {name} is not a file or folder on this machine")
    if path.suffix.lower() not in data.VIDEOS:
        raise ValueError(f"--video {name} is not a video, expected a name that ends in one of "
                         f"{' '.join(data.VIDEOS)}")
    return [path]

# ----- Results --------------------------------------------------------------

def top_classes(probabilities, classes, k=5):
    """[(name, probability)] of the k most likely classes. probabilities: (classes,)"""
    top = probabilities.topk(min(k, len(classes)))
    return [(classes[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist())]

def save_predictions(path, ids, labels, probabilities, classes):
    """FILE.csv: id, true class (empty if unknown) and the top 5. FILE.npz: all probabilities."""
    if path.endswith(".npz"):
        np.savez(path, ids=ids, labels=labels, probabilities=probabilities, classes=classes)
        return
    with open(path, "w", newline="", encoding="utf-8") as f:
        rows = csv.writer(f)
        rows.writerow("id label top1 p1 top2 p2 top3 p3 top4 p4 top5 p5".split())
        for clip, label, p in zip(ids, labels, probabilities):
            row = [clip, classes[label] if label >= 0 else ""]
            for name, share in top_classes(p, classes):
                row += [name, f"{share:.5f}"]
            rows.writerow(row)

# ----- Devices, processes and flags; train.py uses these, too ---------------

def autocast(device, precision):
    """Mixed precision for "bf16" and "fp16", nothing for "fp32"."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")

def set_tf32(allowed):
    """Let an NVIDIA GPU round float32 products to TF32, which is faster, or forbid it."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed

def positive(text):
    """The type of a flag that counts something."""
    if int(text) < 1:
        raise ValueError
    return int(text)

def setup(name="auto"):
    """Choose the device, and join the other processes if torchrun has started several.

    Returns the device, the rank of this process and the number of processes. ValueError if there is
    no such device, or if srun has started several processes that do not know of each other.
    """
    if name == "auto":
        name = "cpu"
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
    device = torch.device(name)
    rank = int(os.environ.get("RANK", 0))
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if gpus == 0:
            raise ValueError("--device cuda finds no NVIDIA GPU that PyTorch can use")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) % gpus)
        torch.cuda.set_device(device)

    if "RANK" not in os.environ:
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
        if tasks > 1:
            raise ValueError(f"srun has started {tasks} processes that are not connected; start "
                             "one task per node, and run torchrun in it")
        return device, 0, 1

    # NCCL needs a GPU for each process. We tell it which one, or it might guess another.
    backend, device_id = "gloo", None
    if device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= gpus:
        backend, device_id = "nccl", device
    # If torchrun restarts the processes of a node, they meet in the same store, where the addresses
    # of dead processes would make them wait for ever. So each attempt has its own keys. This works
    # on one node only, since several may count their attempts differently.
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world,
                            timeout=timedelta(minutes=30), device_id=device_id)
    return device, rank, world

def run_command(main):
    """Run a program. A ValueError, OSError or FloatingPointError becomes one line: our own errors
    are of these types, and say what to do. All others keep their traceback. With TRACEBACK=1 in the
    environment these keep theirs, too, which helps to find a mistake in your own changes.
    """
    # Log lines appear at once, also in a file. No class name is too exotic for a terminal.
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as e:
        if os.environ.get("TRACEBACK"):
            raise
        message = str(e)
        if "DataLoader worker" in message:      # with the worker's traceback; take its last line
            message = message.splitlines()[-1].partition(": ")[2]
        sys.exit(f"{Path(sys.argv[0]).name}: {message}")
    finally:
        if hasattr(signal, "SIGCHLD"):          # else PyTorch would report the workers we kill
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()                       # they ignore SIGTERM, and one may hang

if __name__ == "__main__":
    run_command(main)
