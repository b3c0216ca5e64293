"""Evaluate a checkpoint of train.py as the paper does: 16 frames x 3 crops x 1 clip, softmax averaged over the views.

    python evaluate.py --ckpt out/ssv1/best.pt                              # or under torchrun, same numbers
    python evaluate.py --ckpt out/ssv1/best.pt --save top5.csv --report report
    python evaluate.py --ckpt out/ssv1/best.pt --video clip.webm folder_of_frames

Model, classes, frames, size and normalisation come from the checkpoint. Every clip counts exactly once, on any number of
processes. The three crops (left, centre, right of the long side) see all of the picture; probabilities are averaged, not
logits, as UniFormerV2 and VideoMAE do.
"""
import argparse
import csv
import faulthandler
import multiprocessing
import os
import signal
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import data
from model import ModelConfig, STDFormer, load_tensors

PAPER = {"ssv1": "STD-Former (paper, Table 1) SSV1 validation: top1 57.30 top5 84.40 clips 11522 views 16x3x1",
         "ssv2": "STD-Former (paper, Table 1) SSV2 validation: top1 69.20 top5 92.10 clips 24777 views 16x3x1"}

# ----------------------------------------------------------------------------------------------------
# Devices and processes (train.py uses these too)
# ----------------------------------------------------------------------------------------------------


def setup_processes(device="auto"):
    """(rank, world); joins the process group under torchrun. nccl, or gloo on CPUs and where processes share a GPU."""
    if "RANK" not in os.environ:
        return 0, 1
    one_gpu_each = torch.cuda.is_available() and int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()
    rendezvous, attempt = {}, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["GROUP_WORLD_SIZE"] == "1":
        # torchrun restarts its ranks with the same store, in which they would find each other's dead addresses (torch 2.15 then hangs)
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        rendezvous = dict(store=dist.PrefixStore(f"attempt {attempt}", store), rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    dist.init_process_group("nccl" if device in ("auto", "cuda") and one_gpu_each else "gloo", timeout=timedelta(minutes=30), **rendezvous)
    return dist.get_rank(), dist.get_world_size()


def pick_device(name="auto"):
    """This process's torch.device. Raises ValueError where the machine has none of that name."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n, there in available.items() if there)
    elif not available[name]:
        raise ValueError(f"--device {name}: this machine (or this build of PyTorch) has none; use --device cpu")
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def autocast(device, precision):
    """Mixed precision for "bf16" and "fp16", nothing for "fp32"."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def load_checkpoint(path, needs=("model", "model_config", "classes")):
    """A checkpoint of train.py with the entries that are needed, on the CPU. Raises FileNotFoundError, ValueError naming the file and what it is."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: " + ("a folder, expected a checkpoint file of train.py" if Path(path).is_dir() else "no such checkpoint"))
    try:
        checkpoint = load_tensors(path)
    except ValueError as e:
        raise ValueError(f"{e}. Expected a checkpoint of train.py") from e
    found = list(map(str, checkpoint)) if isinstance(checkpoint, dict) else [type(checkpoint).__name__]
    missing = [k for k in needs if k not in found]
    if missing:
        raise ValueError(f"{path}: not a checkpoint of train.py, it lacks {', '.join(missing)}; found {', '.join(found[:5])}" + (" ..." if len(found) > 5 else ""))
    if not isinstance(checkpoint["model"], dict) or not all(map(torch.is_tensor, checkpoint["model"].values())):
        raise ValueError(f"{path}: not a checkpoint of train.py, its entry model is not tensors by name")
    return checkpoint


def build_trained(checkpoint, path, model=None):
    """The model of a checkpoint; `model`: where it is built already. Raises ValueError naming the file where its weights and its configuration are not one model's."""
    try:
        model = model or STDFormer(ModelConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
    except Exception as e:                              # each of the three steps has its own kinds
        raise ValueError(f"{path}: not a checkpoint of this train.py, its weights and model_config make no model "
                         f"({type(e).__name__}: {' '.join(str(e).split())[:200]})") from e
    return model


def setup_worker(worker):
    """Data workers leave Ctrl-C, and torchrun's SIGTERM to all, to the process that trains: it finishes its step and saves.

    Where that process ends, it alone says why: a worker that was just handing it a batch does not report the lost connection.
    """
    if multiprocessing.get_start_method() == "fork" and os.getppid() != multiprocessing.parent_process().pid:
        os._exit(1)                                     # it was killed already, before PyTorch's watchdog knew it: nobody else would end this worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.disable()                              # when a decoder crashes, that process names the clip instead
    sys.excepthook = lambda kind, error, trace: None if isinstance(error, (ConnectionError, EOFError)) else sys.__excepthook__(kind, error, trace)


def kill_workers():
    """At the end of a process: its data workers ignore SIGTERM, and one may hang in a decoder."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # else PyTorch takes this for a crash
    for worker in multiprocessing.active_children():
        worker.kill()


def run_program(name, main):
    """main() as a command line: what a person can mend ends it with one line behind the program's name, and no data worker stays behind."""
    faulthandler.enable()                               # without workers, a decoder that crashes leaves at least a stack trace
    try:
        main()
    except torch.OutOfMemoryError as e:
        sys.exit(f"{name}: {str(e).splitlines()[0][:200]} Try --checkpointing, then a smaller --micro_batch (train.py), or a smaller --batch_size (evaluate.py)")
    except (ValueError, OSError, FloatingPointError, RuntimeError, ImportError) as e:
        e = data.worker_error(e)
        if isinstance(e, RuntimeError):
            raise
        sys.exit(f"{name}: {data.reason(e)}")
    finally:
        kill_workers()


# ----------------------------------------------------------------------------------------------------
# Prediction
# ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model, views, device, precision="fp32", mean=data.CLIP_MEAN, std=data.CLIP_STD):
    """Class probabilities of clips, averaged over their views: uint8 (B, views, 3, F, S, S) or (B, 3, F, S, S) -> (B, classes)."""
    B = len(views)
    video = views.flatten(0, 1) if views.ndim == 6 else views
    with autocast(device, precision):
        logits = model(data.normalize(video.to(device, non_blocking=True), mean, std))
    return logits.float().softmax(-1).view(B, -1, logits.shape[-1]).mean(dim=1)


def evaluate(model, dataset, device, rank=0, world=1, batch_size=8, workers=0, precision="fp32", mean=data.CLIP_MEAN, std=data.CLIP_STD,
             timeout=600, asked_to_stop=None):
    """Score a VideoDataset made for evaluation. Returns top1, top5 (percent), clips and, on rank 0, rows.

    Ranks take every world-th clip, so nothing is padded or counted twice; integer counts are summed and divided once. Clips on
    the skip list count as wrong. rows: a list of (index, label, top-5 classes, their probabilities). Leaves the model in eval mode.
    asked_to_stop: a list that a signal fills; a rank that was asked leaves early, and all of them return None.
    """
    mine = torch.utils.data.Subset(dataset, range(rank, len(dataset), world))
    loader = torch.utils.data.DataLoader(mine, batch_size=batch_size, num_workers=workers, pin_memory=device.type == "cuda", worker_init_fn=setup_worker,
                                         timeout=timeout if workers else 0)
    model.eval()
    rows = []
    for views, label, index in data.progress(loader, desc="evaluating", leave=False) if rank == 0 else loader:
        if asked_to_stop:
            break
        probability, top = predict(model, views, device, precision, mean, std).cpu().topk(min(5, len(dataset.classes)))
        rows += zip(index.tolist(), label.tolist(), top.tolist(), probability.tolist())
    if asked_to_stop is not None:
        stopped = torch.tensor(len(asked_to_stop), device=device)
        if world > 1:
            dist.all_reduce(stopped)
        if stopped:
            return None
    counts = torch.tensor([sum(label == top[0] for _, label, top, _ in rows), sum(label in top for _, label, top, _ in rows), len(rows)], device=device)
    if world > 1:
        dist.all_reduce(counts)
        gathered = [None] * world if rank == 0 else None
        dist.gather_object(rows, gathered)
        rows = sorted(sum(gathered, [])) if rank == 0 else []
    top1, top5, seen = counts.tolist()
    if seen != len(dataset):
        raise RuntimeError(f"{seen} clips were scored, the split has {len(dataset)}")
    clips = seen + dataset.skipped
    return dict(top1=100 * top1 / clips, top5=100 * top5 / clips, clips=clips, rows=rows)


# ----------------------------------------------------------------------------------------------------
# What is written
# ----------------------------------------------------------------------------------------------------


def write_csv(path, rows, ids, classes):
    """One line per clip: id, true label (empty where unknown), then five pairs of class text and probability."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        n = min(5, len(classes))
        out.writerow(["id", "label"] + [f"{what}{k}" for k in range(1, n + 1) for what in ("top", "probability")])
        for index, label, top, probability in rows:
            pairs = [x for c, p in zip(top, probability) for x in (classes[c], f"{p:.5f}")]
            out.writerow([ids[index].decode(), classes[label] if label >= 0 else ""] + pairs)


def write_report(folder, rows, classes):
    """per_class.csv, confused.csv (the most frequent mistakes) and, where matplotlib is installed, confusion.png."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)          # [true, predicted]
    for _, label, top, _ in rows:
        confusion[label, top[0]] += 1
    clips, right = confusion.sum(1), confusion.diagonal()
    with open(folder / "per_class.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(["class", "clips", "top1"])
        for i in np.argsort(right / np.maximum(clips, 1), kind="stable"):
            out.writerow([classes[i], clips[i], f"{100 * right[i] / clips[i]:.2f}" if clips[i] else ""])
    wrong = confusion - np.diag(right)
    order = np.argsort(-wrong, axis=None, kind="stable")[:50]
    with open(folder / "confused.csv", "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(["true class", "taken for", "clips", "of the true class"])
        for i, j in zip(*np.unravel_index(order, wrong.shape)):
            if wrong[i, j]:
                out.writerow([classes[i], classes[j], wrong[i, j], clips[i]])
    try:
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{folder}: per_class.csv and confused.csv written; confusion.png needs matplotlib (pip install matplotlib)")
        return
    n, share = len(classes), confusion / np.maximum(clips[:, None], 1)
    many = n > 30                                       # then columns have numbers, and cells none
    side = max(3, n * (0.118 if many else 0.42))        # inches; many: 15 pixels a class, with letters of 12
    figure = Figure(figsize=(side + (7 if many else 4.5), side + (1.5 if many else 3.6)), layout="constrained", dpi=130 if many else 100)
    axis = figure.subplots()
    picture = axis.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))     # roots: single mistakes stay visible
    size = 6.5 if many else 9
    axis.set_yticks(range(n), [f"{c}  {i}" for i, c in enumerate(classes)] if many else classes, fontsize=size)
    axis.set_xticks(range(n), range(n) if many else classes, fontsize=size, rotation=90)
    axis.tick_params(length=2, labeltop=many)
    if many:
        axis.set_yticks(np.arange(4.5, n, 5), minor=True)
        axis.set_xticks(np.arange(4.5, n, 5), minor=True)
        axis.grid(which="minor", color="#DDDDDD", lw=0.6)
        axis.tick_params(which="minor", length=0)
        axis.secondary_yaxis("right").set_yticks(range(n), range(n), fontsize=size)
    else:
        for i, j in zip(*share.nonzero()):
            axis.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=8, color="white" if share[i, j] > 0.4 else "#222222")
    axis.set_xlabel("predicted class" + (", by its number" if many else ""), fontsize=10)
    axis.set_ylabel("true class", fontsize=10)
    axis.set_title("Which class is taken for which" + ("" if many else ", % of the true class's clips"), fontsize=11.5, loc="left")
    bar = figure.colorbar(picture, shrink=min(1, 3.5 / side), aspect=15, pad=0.01, ticks=[0, 0.05, 0.2, 0.5, 1])
    bar.set_label("share of the true class's clips", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(folder / "confusion.png", bbox_inches="tight")
    print(f"{folder}: per_class.csv, confused.csv and confusion.png written")


def refuse(args, table):
    """Raises ValueError for the first row of a table (flag, whether it is fine, what is expected) that is not."""
    for flag, fine, expected in table:
        if not fine:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected {expected}")


def check_args(args):
    """Refuse flags that cannot work, alone or together, before any file is touched. Raises ValueError naming flag, found and expected."""
    a, alone = args, "to be left out with --video, which prints the top 5 and stops"
    refuse(args, [
        ("clips", a.clips >= 1, "1 or more"),
        ("batch_size", a.batch_size >= 1, "1 or more"),
        ("workers", a.workers >= 0, "0 or more"),
        ("timeout", a.timeout >= 0, "0 (no limit) or more"),
        ("skip_list", not a.skip_list or os.path.isfile(a.skip_list), "a file that is there"),
        ("data_root", not a.data_root or os.path.isdir(a.data_root), "the folder of a data set"),
        ("save", not a.save or not os.path.isdir(a.save), "the name of a file"),
        ("report", not a.report or os.path.isdir(a.report) or not os.path.exists(a.report), "a folder, or a name for a new one"),
        *((flag, not a.video or getattr(a, flag) is None, alone) for flag in ("save", "report", "dataset", "data_root", "skip_list", "control")),
        ("split", not a.video or a.split == "validation", alone),
        ("video", not a.video or os.environ.get("WORLD_SIZE", "1") == "1", "one process: start evaluate.py without torchrun"),
    ])


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="checkpoint of train.py, best.pt or last.pt")
    p.add_argument("--video", nargs="+", metavar="PATH", help="print the top 5 for these videos or folders of frames, and stop")
    p.add_argument("--data_root", help="folder of the data set, where it is not the one trained from")
    p.add_argument("--dataset", choices=data.DATASETS, help="evaluate on another data set of the same classes (default: the one trained on)")
    p.add_argument("--split", default="validation", choices=("train", "validation", "test"), help="papers report validation; test has no labels: predictions only, with --save")
    p.add_argument("--crops", type=int, default=3, choices=(1, 3), help="spatial views; 1 (the centre) costs a third and sees less of wide pictures")
    p.add_argument("--clips", type=int, default=1, help="temporal views: several sets of frames per clip, shifted within their segments")
    p.add_argument("--control", choices=("none", "shuffle", "single"), help="disturb time (default: as in training)")
    p.add_argument("--skip_list", metavar="FILE", help="clip ids that cannot be read, one per line; they count as wrong")
    p.add_argument("--save", metavar="FILE.csv", help="per clip: id, true label, top-5 names and probabilities")
    p.add_argument("--report", metavar="DIR", help="per-class accuracy, most confused pairs, confusion matrix")
    p.add_argument("--batch_size", type=int, default=8, help="clips per process at once; each has crops x clips views")
    p.add_argument("--workers", type=int, default=data.default_workers(), help="data workers per process (default: %(default)s)")
    p.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="a data worker that gives nothing for so long counts as hanging; raise it for long clips on slow disks")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"), help="auto takes the first that is there")
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="fp32 for numbers to report; bf16 is faster on GPUs")
    args = p.parse_args(argv)
    check_args(args)

    rank, world = setup_processes(args.device)
    device = pick_device(args.device)
    if args.precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False         # else cuDNN rounds what a convolution reads to TF32
    checkpoint = load_checkpoint(args.ckpt, ("model", "model_config", "classes", "mean", "std", "args"))
    trained = checkpoint["args"]
    model = build_trained(checkpoint, args.ckpt).to(device).eval()
    c, classes, mean, std = model.config, checkpoint["classes"], checkpoint["mean"], checkpoint["std"]

    if args.video:
        for path in args.video:
            video = data.read_clip(path, lambda n: data.eval_indices(n, c.num_frames, args.clips))
            views = data.eval_views(video, c.num_frames, c.image_size, args.crops)
            probability, top = predict(model, views[None], device, args.precision, mean, std)[0].cpu().topk(min(5, len(classes)))
            print(path)
            for q, i in zip(probability.tolist(), top.tolist()):
                print(f"  {100 * q:6.2f} %  {classes[i]}")
        return

    name = args.dataset or trained["dataset"]
    root = args.data_root or (trained["data_root"] if name == trained["dataset"] else f"datasets/{name}")
    dataset = data.VideoDataset(name, root, args.split, c.num_frames, c.image_size,
                                crops=args.crops, clips=args.clips, control=args.control or trained["control"],
                                skip=data.read_skip_list(args.skip_list) if args.skip_list else ())
    if dataset.classes != classes:
        raise ValueError(f"--data_root: its {len(dataset.classes)} classes are not the {len(classes)} of the checkpoint; only there: "
                         f"{sorted(set(dataset.classes) - set(classes))[:3]}, missing: {sorted(set(classes) - set(dataset.classes))[:3]}")
    labelled = bool((dataset.labels >= 0).all())
    if args.report and not labelled:
        raise ValueError(f"--report {args.report}: expected a split with labels, {args.split} of {root} has none; --save FILE.csv keeps the predictions")
    result = evaluate(model, dataset, device, rank, world, args.batch_size, args.workers, args.precision, mean, std, args.timeout)
    if rank == 0:
        rows, not_written = result["rows"], None
        try:
            if args.save:
                write_csv(args.save, rows, dataset.ids, classes)
                print(f"{args.save}: {len(rows)} predictions written")
            if args.report:
                write_report(args.report, rows, classes)
        except OSError as e:                            # the accuracy is printed all the same
            not_written = OSError(f"{e.filename or args.save or args.report}: could not be written ({e.strerror or e}); the numbers above are complete")
        if dataset.skipped:
            print(f"{dataset.skipped} clips of the skip list count as wrong")
        print(f"{args.split} split, {c.num_frames} frames x {args.crops} crops x {args.clips} clips, softmax averaged over the views"
              + (f", control: {dataset.control}" if dataset.control != "none" else ""))
        if not labelled:
            print(f"no labels in this split: {len(rows)} predictions, no accuracy" + ("" if args.save else "; --save FILE.csv keeps them"))
        else:
            if len(classes) == 174 and name in PAPER and args.split == "validation" and dataset.control == "none":
                print(PAPER[name])
            print(f"top1 {result['top1']:.2f} top5 {result['top5']:.2f} clips {result['clips']} views {c.num_frames}x{args.crops}x{args.clips}")
        if not_written:
            raise not_written
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_program("evaluate.py", main)
