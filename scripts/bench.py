"""How fast is it, compared with what its arithmetic allows?

    python scripts/bench.py                                        # b16, float32: minutes on a CPU
    python scripts/bench.py --precision bf16 --compile --batch 16  # on a GPU
    python scripts/bench.py --breakdown                            # the share of each module
    python scripts/bench.py --pipeline --webm clips/*.webm         # samples per second and core

The models take turns, and every number is a median over the rounds. Ratios are to the first row:
CLIP's ViT on the same token frames after the same stem. It has open_clip's blocks if open_clip is
installed, else those of the plain ViT, which is listed in any case. If the ratio of the time is not
above the ratio of the arithmetic, the new modules cost no more than their arithmetic.

MFU is the arithmetic of a pass, divided by its time and by the rate of a large matrix product of
the same type, measured in the same run. A training step counts as 3 forward passes. What
checkpointing computes again does not count.
"""
import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from evaluate import autocast, pick_device
from model import MODELS, Block, build_model
from scripts.describe import count_macs
from scripts.guards import run_program
from scripts.variants import FrameViT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ----- The models that are compared -----------------------------------------

class FrameCLIP(FrameViT):
    """CLIP's image transformer on every token frame after STD-Former's stem, as deep as CLIP's.

    The class tokens are averaged over time, then comes a linear head.
    video: (B, 3, F, S, S) -> logits (B, num_classes)
    """
    block = Block

    def make_stem(self):
        super().make_stem(self.config.stem_kernel)

    def make_blocks(self):
        return self.stack(self.block, self.config.depth)


class OpenCLIPBlock(nn.Module):
    """open_clip's block, frame by frame. x: (B, T, 1+N, D) -> (B, T, 1+N, D)"""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        from open_clip.transformer import QuickGELU, ResidualAttentionBlock     # optional
        self.block = ResidualAttentionBlock(dim, heads, act_layer=QuickGELU)

    def forward(self, x):
        return self.block(x.flatten(0, 1)).view_as(x)


class OpenCLIP(FrameCLIP):
    """FrameCLIP with open_clip's blocks. ImportError if open_clip is not installed."""
    block = OpenCLIPBlock


def make_std_former(args):
    asked = dict(num_frames=args.num_frames, image_size=args.image_size)
    std_former = build_model(args.model, **{k: v for k, v in asked.items() if v})
    std_former.checkpointing = args.checkpointing
    return std_former


def make_models(args):
    """{name: model}. The first is the baseline."""
    std_former, models = make_std_former(args), {}
    try:
        models["CLIP ViT, open_clip's blocks"] = OpenCLIP(std_former.config)
    except ImportError:
        pass
    models["CLIP ViT, plain"] = FrameCLIP(std_former.config)
    for m in models.values():
        m.checkpointing = args.checkpointing
    models[f"STD-Former {args.model}"] = std_former
    if not args.ours_only and std_former.config.image_size == 224:
        video_models = torchvision.models.video
        models["Swin3D-B (torchvision)"] = video_models.swin3d_b(num_classes=174)
        models["MViTv2-S (torchvision)"] = video_models.mvit_v2_s(num_classes=174)
    return models


def make_video(config, args, device):
    size = config.image_size
    return torch.randn(args.batch, 3, config.num_frames, size, size, device=device)


# ----- Measuring ------------------------------------------------------------

def seconds(device, function, repeat=1):
    """Seconds of one call of function(), on average over `repeat` calls."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat


def fits(function, repeat):
    """Call function() so many times. False if the GPU's memory does not suffice."""
    try:
        for _ in range(repeat):
            function()
    except torch.OutOfMemoryError:              # leaving `except` frees what the error still holds
        return False
    return True


def matmul_rate(device, precision):
    """Multiply-accumulates per second of a large square matrix product, the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=DTYPES[precision])
    b = torch.randn_like(a)
    a @ b
    return n ** 3 / min(seconds(device, lambda: a @ b) for _ in range(10))


def saved_bytes(model, function):
    """What autograd keeps for the backward pass of function(), without the parameters."""
    known, total = {p.untyped_storage().data_ptr() for p in model.parameters()}, 0

    def pack(tensor):
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:     # several tensors may share a storage
            known.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return total


def peak_bytes(model, function):
    """The GPU's peak of allocated memory during function(), and 12 bytes per parameter."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    parameters = sum(p.numel() for p in model.parameters())
    return torch.cuda.max_memory_allocated() - before + 12 * parameters


# ----- The comparison -------------------------------------------------------

def make_steps(model, video, args):
    """Two functions to time: a forward pass, and a training step without the optimizer's update."""
    device = video.device
    label = torch.zeros(len(video), dtype=torch.long, device=device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    run = torch.compile(model) if args.compile else model

    def forward():
        model.eval()
        with torch.no_grad(), autocast(device, args.precision):
            run(video)

    def train():
        model.train()
        with autocast(device, args.precision):
            loss = F.cross_entropy(run(video).float(), label)
        scaler.scale(loss).backward()
        model.zero_grad(set_to_none=True)

    return forward, train


def warm_up(name, model, steps, video):
    """Let it compile and pick algorithms. Returns False if it does not fit into memory."""
    device = video.device
    repeat = 3 if device.type == "cuda" else 1
    start = time.perf_counter()
    if all(fits(step, repeat) for step in steps):
        print(f"{name}: warmed up in {time.perf_counter() - start:.0f} s", flush=True)
        return True
    model.to("cpu").zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    print(f"{name}: out of memory at batch {len(video)}", flush=True)
    return False


def take_turns(steps, rounds, device):
    """Time all steps round by round, so that all see the same load of the machine.

    steps: {name: (forward, train)} -> {name: (seconds of a forward pass, of a training step)}
    A model that does not fit beside the weights of the others is left out.
    """
    repeat = 5 if device.type == "cuda" else 1
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, functions in steps.items():
            if name in times:
                try:
                    times[name].append([seconds(device, f, repeat) for f in functions])
                except torch.OutOfMemoryError:
                    print(f"{name}: out of memory beside the other models' weights", flush=True)
                    del times[name]
    return {name: [statistics.median(column) for column in zip(*rows)]
            for name, rows in times.items()}


def compare(args, device):
    torch.manual_seed(0)
    models = make_models(args)
    config = models[f"STD-Former {args.model}"].config
    video = make_video(config, args, device)
    measure_memory = peak_bytes if device.type == "cuda" else saved_bytes
    steps, rows = {}, {}
    for name, model in models.items():
        forward, train = make_steps(model.to(device), video, args)
        if warm_up(name, model, (forward, train), video):
            steps[name] = forward, train
            rows[name] = dict(parameters=sum(p.numel() for p in model.parameters()),
                              macs=count_macs(model, video[:1])["Global"],
                              memory=measure_memory(model, train))
    times = take_turns(steps, args.rounds, device)
    if not times:
        raise ValueError(f"--batch {args.batch} is too much for every model: lower it, or add "
                         "--checkpointing")
    for name, (forward, train) in times.items():
        rows[name].update(forward=forward / args.batch, train=train / args.batch)
    rate = matmul_rate(device, args.precision)

    how = "compiled" if args.compile else "eager"
    how += ", checkpointing" if args.checkpointing else ""
    print(f"\n{args.model}, {config.num_frames} frames of {config.image_size} x "
          f"{config.image_size}, batch {args.batch}, {args.precision}, {how}, "
          f"{args.rounds} rounds; matrix product {rate / 1e9:.0f} GMAC/s")
    print_comparison({name: rows[name] for name in times}, rate, device)


def few_digits(x):
    return f"{x:.1f}" if x > 9 else f"{x:.3f}"


def print_comparison(rows, rate, device):
    gpu = device.type == "cuda"
    print(f"{'':55}   | forward {'':20} | training step {'':14} |")
    print(f"{'model':30}{'M params':>9}{'GMACs':>8}{'ratio':>8}   "
          f"| {'s/clip':>9}{'ratio':>8}{'MFU':>10} | {'s/clip':>9}{'ratio':>8}{'MFU':>10}  "
          f"| {'peak GiB' if gpu else 'saved GiB':>9}{'ratio':>8}")
    first = next(iter(rows.values()))
    for name, row in rows.items():
        ratio = {key: value / first[key] for key, value in row.items()}
        parameters, gmacs = few_digits(row["parameters"] / 1e6), few_digits(row["macs"] / 1e9)
        mfu = row["macs"] / rate / row["forward"]
        train_mfu = 3 * row["macs"] / rate / row["train"]
        print(f"{name:30}{parameters:>9}{gmacs:>8}{ratio['macs']:8.2f}   "
              f"| {row['forward']:9.4g}{ratio['forward']:8.2f}{mfu:10.1%} "
              f"| {row['train']:9.4g}{ratio['train']:8.2f}{train_mfu:10.1%}  "
              f"| {row['memory'] / 2 ** 30:9.2f}{ratio['memory']:8.2f}")
    if gpu:
        print("memory: the most that a step allocates, and 12 bytes per parameter for the weights "
              "and AdamW's two moments")
    else:
        print("memory: what autograd saves for the backward pass; a CPU does not tell its peak")


# ----- The breakdown --------------------------------------------------------

def modules_and_inputs(model, video, args):
    """{kind: (its modules, the inputs of one)}. Inputs have the type of the model's."""
    c = model.config
    with torch.no_grad(), autocast(video.device, args.precision):
        x, grid = model.stem(video)
    y = x[:, :, 1:].unflatten(2, grid).contiguous()
    plain = [block for i, block in enumerate(model.blocks) if i not in c.ptm_layers]
    return {"stem": ([model.conv1], (video,)),
            "Block (CLIP)": (plain, (x, grid)),
            "PTM": ([model.blocks[i] for i in c.ptm_layers], (x, grid)),
            "CTM": (list(model.ctm), (y, y.clone())),
            "STDM": ([model.stdm[i] for i in c.stdm_layers], (y,)),
            "SMEM": ([model.smem_t[i] for i in c.smem_t_layers], (y,))}


def forward_backward(module, inputs, video, precision):
    """A forward and a backward pass, with gradients for all tensors but the video."""
    inputs = [x.detach().requires_grad_(x is not video) if torch.is_tensor(x) else x
              for x in inputs]
    with autocast(video.device, precision):
        out = module(*inputs)
    out.backward(torch.ones_like(out))


def matmul_seconds(function, device):
    """How much of function() its matrix products take, by torch's profiler."""
    with torch.profiler.profile() as profile:
        function()
    field = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    events = [event for event in profile.key_averages() if event.key in products]
    return sum(getattr(event, field) for event in events) / 1e6


def breakdown(args, device):
    """Time (forward and backward) and arithmetic of each kind of module by itself."""
    torch.manual_seed(0)
    model = make_std_former(args).to(device).train()
    video = make_video(model.config, args, device)

    rows = []                                   # kind, number of modules, seconds and MACs of one
    for kind, (modules, inputs) in modules_and_inputs(model, video, args).items():
        if modules:
            run = torch.compile(modules[0]) if args.compile else modules[0]

            def step():
                forward_backward(run, inputs, video, args.precision)

            step()
            times = [seconds(device, step) for _ in range(args.rounds + 2)]
            macs = count_macs(modules[0], *inputs)["Global"]
            rows.append((kind, len(modules), statistics.median(times), macs))

    run = torch.compile(model) if args.compile else model

    def whole():
        forward_backward(run, (video,), video, args.precision)

    whole()
    total = statistics.median([seconds(device, whole) for _ in range(args.rounds)])
    products = matmul_seconds(whole, device)
    rate = matmul_rate(device, args.precision)
    all_macs = sum(count * macs for _, count, _, macs in rows)
    rest = total - sum(count * time for _, count, time, _ in rows)

    print(f"\n{'module':16}{'times':>6}{'s each':>10}{'of the time':>13}{'of the arithmetic':>19}"
          f"{'MFU':>8}")
    for kind, count, time_each, macs in rows:
        print(f"{kind:16}{count:6}{time_each:10.4g}{count * time_each / total:13.1%}"
              f"{count * macs / all_macs:19.1%}{3 * macs / rate / time_each:8.1%}")
    print(f"{'between them':16}{'':6}{'':10}{rest / total:13.1%}{'':>19}"
          "   (slices and sums of the branches; embeddings, head)")
    print(f"{'whole model':16}{1:6}{total:10.4f}{1:13.1%}{1:19.1%}"
          f"{3 * all_macs / rate / total:8.1%}")
    print(f"its matrix products alone take {products:.4f} s of the step: the whole is "
          f"{total / products:.2f} times that")


# ----- The input pipeline ---------------------------------------------------

def draw_frames(clip, length, size):
    """Frames of a toy clip, stretched to a size (width, height): a list of PIL images."""
    from scripts.toy_data import toy_render, toy_scene
    scene = toy_scene(np.random.default_rng(clip), clip % 5, length)
    return [Image.fromarray(frame).resize(size) for frame in toy_render(scene, size[1])]


def make_ssv1_like(folder, clips=8):
    """Frame folders with the size and length of SSV1's: 45 JPEGs of 176 x 100. Returns paths."""
    paths = [folder / f"ssv1_{clip}" for clip in range(clips)]
    for clip, path in enumerate(paths):
        path.mkdir()
        for i, frame in enumerate(draw_frames(clip, 45, (176, 100)), 1):
            frame.save(path / f"{i:05d}.jpg", quality=90)
    return paths


def make_ssv2_like(folder, clips=4):
    """VP9 files with the size and length of SSV2's: 48 frames of 427 x 240. Needs ffmpeg."""
    paths = [folder / f"{clip}.webm" for clip in range(clips)]
    for clip, path in enumerate(paths):
        frames = folder / f"frames{clip}"
        frames.mkdir()
        for i, frame in enumerate(draw_frames(clip, 48, (427, 240))):
            frame.save(frames / f"{i:03d}.png")
        command = ["ffmpeg", "-loglevel", "error", "-framerate", "12", "-i", frames / "%03d.png",
                   "-c:v", "libvpx-vp9", "-b:v", "180k", "-pix_fmt", "yuv420p", path]
        subprocess.run(command, check=True)
    return paths


def make_clips(folder, webm):
    """{what they are: paths}, of clips made in a folder and of given webm files."""
    clips = {"SSV1-like frame folders, 45 x 176 x 100": make_ssv1_like(folder)}
    if webm:
        clips[f"{len(webm)} webm files given"] = webm
    elif shutil.which("ffmpeg"):
        clips["SSV2-like webm, 48 x 427 x 240, VP9"] = make_ssv2_like(folder)
    else:
        print("no webm timed: give some with --webm, or install ffmpeg, which can make them")
    return clips


def pipeline(args):
    torch.set_num_threads(1)                    # as in a data worker
    size, F_ = args.image_size or 224, args.num_frames or 16
    rng = np.random.default_rng(0)
    plain, augmented = data.train_transform(size), data.train_transform(size, magnitude=21)

    def choose(n):
        return data.sample_indices(n, F_, rng)

    def bare(path):
        import decord
        reader = decord.VideoReader(str(path), num_threads=1)
        reader.get_batch(np.unique(choose(len(reader)))).asnumpy()

    def read(path):
        return data.read_clip(path, choose)

    def sample(path):
        return plain(read(path)).flip(-1).transpose(0, 1).contiguous()

    def sample_augmented(path):
        return augmented(read(path)).flip(-1).transpose(0, 1).contiguous()

    functions = {"  decord alone, the same frames": bare, "  read_clip": read,
                 "  sample: read, crop, flip": sample,
                 "  sample with RandAugment": sample_augmented}
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(Path(folder), args.webm)
        print(f"\none core, {F_} frames to {size} x {size}")
        print(f"{'':44}{'ms':>8}{'samples/s':>11}{'ratio to bare decoding':>25}")
        for name, paths in clips.items():
            print(name)
            for path in paths:
                read(path)                      # names a file that does not read
            videos = not Path(paths[0]).is_dir()
            timed = {k: f for k, f in functions.items() if videos or f is not bare}
            times = median_seconds(timed, paths, args.rounds + 2, rng)
            for label, s in times.items():
                ratio = f"{s / next(iter(times.values())):25.2f}" if videos else ""
                print(f"{label:44}{1e3 * s:8.1f}{1 / s:11.1f}{ratio}")


def median_seconds(functions, paths, rounds, rng):
    """Median seconds of each function of a path: {label: function} -> {label: seconds}

    They take turns in random order, so that all see the same load, and none always finds what
    another one has left in a cache.
    """
    times = {label: [] for label in functions}
    for _ in range(rounds):
        for path in paths:
            for label in rng.permutation(list(functions)):
                start = time.perf_counter()
                functions[label](path)
                times[label].append(time.perf_counter() - start)
    return {label: statistics.median(values) for label, values in times.items()}


# ----- The command ----------------------------------------------------------

def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model", default="b16", choices=MODELS, help="size of STD-Former and of CLIP's ViT")
    add("--num_frames", type=int, help="frames per clip (default: the model's)")
    add("--image_size", type=int, help="pixels of a frame (default: the model's); torchvision's "
        "models are left out if it is not 224")
    add("--batch", type=int, default=1, help="clips; 16 or 64 on a GPU")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--precision", default="fp32", choices=DTYPES)
    add("--compile", action="store_true", help="torch.compile all models")
    add("--checkpointing", action="store_true", help="of STD-Former and CLIP's ViT")
    add("--rounds", type=int, default=3, help="of each measurement; more on a busy machine")
    add("--ours_only", action="store_true", help="leave torchvision's models out")
    add("--breakdown", action="store_true", help="time each kind of module instead")
    add("--pipeline", action="store_true", help="time the input pipeline instead")
    add("--webm", nargs="*", metavar="FILE", help="videos for --pipeline, such as some of SSV2")
    return p.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
          f"{torch.get_num_threads()} CPU threads{gpu}")
    torch.set_float32_matmul_precision("high")  # TF32, as in train.py
    if args.pipeline:
        pipeline(args)
    elif args.breakdown:
        breakdown(args, pick_device(args.device))
    else:
        compare(args, pick_device(args.device))


if __name__ == "__main__":
    run_program(main)
