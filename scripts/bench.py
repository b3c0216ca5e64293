"""How fast, against what the arithmetic allows: STD-Former beside CLIP, Swin3D and MViTv2, and the input pipeline beside bare decoding.

    python scripts/bench.py                                        # b16, float32, batch 1 on a CPU; about 5 minutes on 2 cores
    python scripts/bench.py --precision bf16 --compile --batch 16  # on a GPU
    python scripts/bench.py --breakdown                            # which module takes which share of the time
    python scripts/bench.py --pipeline --webm clips/*.webm         # samples per second and core

Every number is a median over rounds in which the models take turns. Ratios are to the first row: CLIP's ViT on the same token
frames behind the same stem, with open_clip's blocks where that is installed, else the plain ViT below (listed too). A time ratio
at or below the ratio of the arithmetic means that the new modules cost no more than their arithmetic.
MFU: arithmetic of the pass (training: 3 forward passes; recomputation is not counted) over the rate of a large matrix product
of the same type, measured in the same run. Needs torch, torchvision and numpy only.
"""
import argparse
import statistics
import subprocess
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from evaluate import autocast, pick_device, run_program
from model import Block, STDFormer, build_model, count_macs

# ----------------------------------------------------------------------------------------------------
# The models that are compared
# ----------------------------------------------------------------------------------------------------


class FrameCLIP(nn.Module):
    """CLIP's image transformer on every token frame behind STD-Former's stem; class tokens averaged over time, linear head."""

    stem = STDFormer.stem

    def __init__(self, ours, block):
        super().__init__()
        c = self.config = ours.config
        self.conv1 = nn.Conv3d(3, c.dim, ours.conv1.kernel_size, ours.conv1.stride, ours.conv1.padding, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(c.dim))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + ours.grid[0] * ours.grid[1], c.dim))
        self.ln_pre, self.ln_post = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        self.blocks = nn.ModuleList(block(c.dim, c.heads) for _ in range(c.depth))
        self.head = nn.Linear(c.dim, c.num_classes)
        self.checkpointing = False

    def forward(self, video):
        x, _ = self.stem(video)
        B, T = x.shape[:2]
        x = x.flatten(0, 1)                                                     # (B*T, 1+N, D)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return self.head(self.ln_post(x[:, 0].view(B, T, -1).mean(1)))


class PlainBlock(Block):
    """The same block as open_clip's, in this project's code; frames are its batch."""

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def open_clip_block(dim, heads):
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock
    return ResidualAttentionBlock(dim, heads, act_layer=QuickGELU)


def make_models(args):
    """{name: model}; the first is the baseline."""
    overrides = {k: v for k, v in dict(num_frames=args.num_frames, image_size=args.image_size).items() if v}
    ours = build_model(args.model, **overrides)
    models = {}
    try:
        import open_clip  # noqa: F401
        models["CLIP ViT, open_clip's blocks"] = FrameCLIP(ours, open_clip_block)
    except ImportError:
        pass
    models["CLIP ViT, plain"] = FrameCLIP(ours, PlainBlock)
    models[f"STD-Former {args.model}"] = ours
    if not args.ours_only and ours.config.image_size == 224:
        models["Swin3D-B (torchvision)"] = torchvision.models.video.swin3d_b(num_classes=174)
        models["MViTv2-S (torchvision)"] = torchvision.models.video.mvit_v2_s(num_classes=174)
    for m in models.values():
        m.checkpointing = args.checkpointing            # torchvision's models have none and ignore it
    return models, (3, ours.config.num_frames, ours.config.image_size, ours.config.image_size)


# ----------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------


def seconds(device, f):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fits(f, repeat):
    """Run f so many times. False where GPU memory does not suffice (here, so that the exception and all that it holds is gone at once)."""
    try:
        for _ in range(repeat):
            f()
    except torch.OutOfMemoryError:
        return False
    return True


def matmul_rate(device, dtype):
    """Multiply-accumulates per second of a square matrix product: 8192 on a GPU, 2048 on a CPU. The best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return n ** 3 / min(seconds(device, lambda: a @ b) for _ in range(10))


def few_digits(x):
    return f"{x:.1f}" if x > 9 else f"{x:.3f}"


def gmacs(model, *inputs):
    model.train()                                       # in eval mode nn.MultiheadAttention has a fast path that is not counted
    return count_macs(model, *inputs)["Global"] / 1e9


def saved_gib(model, run):
    """What autograd keeps for the backward pass: distinct storages, parameters left out."""
    known, total = {p.untyped_storage().data_ptr() for p in model.parameters()}, 0

    def pack(t):
        nonlocal total
        pointer = t.untyped_storage().data_ptr()
        if pointer not in known:
            known.add(pointer)
            total += t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return total / 2 ** 30


def compare(args, device, dtype):
    torch.manual_seed(0)
    models, shape = make_models(args)
    video = torch.randn(args.batch, *shape, device=device)
    label = torch.zeros(args.batch, dtype=torch.long, device=device)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    rows, steps = {}, {}
    for name, m in models.items():
        m.to(device)
        rows[name] = dict(params=sum(p.numel() for p in m.parameters()) / 1e6, macs=gmacs(m, video[:1]), forward=[], train=[])
        run = torch.compile(m) if args.compile else m

        def forward(m=m, run=run):
            m.eval()
            with torch.no_grad(), autocast(device, args.precision):
                run(video)

        def train(m=m, run=run):                        # forward and backward; the optimizer is timed nowhere, it is the same for all
            m.train()
            with autocast(device, args.precision):
                loss = F.cross_entropy(run(video).float(), label)
            scaler.scale(loss).backward()
            m.zero_grad(set_to_none=True)

        start = time.perf_counter()
        warm_ups = 3 if device.type == "cuda" else 1    # compile, pick algorithms
        if not (fits(forward, warm_ups) and fits(train, warm_ups)):
            m.to("cpu").zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            print(f"{name}: out of memory at batch {args.batch}", flush=True)
            continue
        print(f"{name}: warmed up in {time.perf_counter() - start:.0f} s", flush=True)
        steps[name] = forward, train
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            base = torch.cuda.memory_allocated()
            train()
            rows[name]["memory"] = (torch.cuda.max_memory_allocated() - base) / 2 ** 30 + rows[name]["params"] * 1e6 * 12 / 2 ** 30
        else:
            m.train()
            rows[name]["memory"] = saved_gib(m, lambda: run(video))
    repeat = 5 if device.type == "cuda" else 1
    for _ in range(args.rounds):
        for name, functions in list(steps.items()):     # taking turns: all see the same weather
            for key, f in zip(("forward", "train"), functions):
                try:
                    rows[name][key].append(seconds(device, lambda: [f() for _ in range(repeat)]) / repeat / args.batch)
                except torch.OutOfMemoryError:          # it fitted as long as later models were not there
                    print(f"{name}: out of memory at batch {args.batch} beside the other models' weights", flush=True)
                    steps.pop(name, None)

    rate = matmul_rate(device, dtype)
    rows = {name: r for name, r in rows.items() if name in steps}
    if not rows:
        sys.exit(f"bench.py: --batch {args.batch}: no model fits into memory; lower it, or add --checkpointing")
    first = next(iter(rows.values()))
    for r in rows.values():
        r.update(forward=statistics.median(r["forward"]), train=statistics.median(r["train"]))
    memory = "peak GiB" if device.type == "cuda" else "saved GiB"
    print(f"\n{args.model}, {shape[1]} frames of {shape[2]} x {shape[3]}, batch {args.batch}, {args.precision}, {'compiled' if args.compile else 'eager'}"
          f"{', checkpointing' if args.checkpointing else ''}, {args.rounds} rounds; matrix product {rate / 1e9:.0f} GMAC/s")
    print(f"{'':30}{'':>9}{'':>8}{'':>8}   | forward {'':20} | training step {'':14} |")
    print(f"{'model':30}{'M params':>9}{'GMACs':>8}{'ratio':>8}   | {'s/clip':>9}{'ratio':>8}{'MFU':>10} | {'s/clip':>9}{'ratio':>8}{'MFU':>10}  | {memory:>9}{'ratio':>8}")
    for name, r in rows.items():
        print(f"{name:30}{few_digits(r['params']):>9}{few_digits(r['macs']):>8}{r['macs'] / first['macs']:8.2f}   | "
              f"{r['forward']:9.4g}{r['forward'] / first['forward']:8.2f}{r['macs'] * 1e9 / rate / r['forward']:10.1%} | "
              f"{r['train']:9.4g}{r['train'] / first['train']:8.2f}{3 * r['macs'] * 1e9 / rate / r['train']:10.1%}  | "
              f"{r['memory']:9.2f}{r['memory'] / first['memory']:8.2f}")
    print("memory: " + ("the step's peak of allocated memory above what was there, and 12 bytes per parameter: weights and AdamW's two moments" if device.type == "cuda"
                        else "tensors that autograd saves for the backward pass (a CPU has no allocator statistics)"))


def breakdown(args, device, dtype):
    """Time (forward and backward) and arithmetic of each kind of module on its own, times how often it stands in the model."""
    torch.manual_seed(0)
    model = make_models(args)[0][f"STD-Former {args.model}"].to(device).train()
    c = model.config
    video = torch.randn(args.batch, 3, c.num_frames, c.image_size, c.image_size, device=device)
    with torch.no_grad(), autocast(device, args.precision):
        x, grid = model.stem(video)                     # tokens of the type that the modules get
    y = x[:, :, 1:].unflatten(2, grid).contiguous()
    plain = [b for i, b in enumerate(model.blocks) if i not in c.ptm_layers]
    kinds = {"stem": ([model.conv1], (video,)), "Block (CLIP)": (plain, (x, grid)), "PTM": ([model.blocks[i] for i in c.ptm_layers], (x, grid)),
             "CTM": (list(model.ctm), (y, y.clone())), "STDM": ([model.stdm[i] for i in c.stdm_layers], (y,)), "SMEM": ([model.smem_t[i] for i in c.smem_layers], (y,))}

    def step(m, inputs):
        inputs = [t.detach().requires_grad_(t is not video) if torch.is_tensor(t) else t for t in inputs]
        with autocast(device, args.precision):
            out = m(*inputs)
        out.backward(torch.ones_like(out))

    def whole():
        with autocast(device, args.precision):
            loss = model(video).float().mean()
        loss.backward()

    rows = []
    for kind, (modules, inputs) in kinds.items():
        if modules:
            run = torch.compile(modules[0]) if args.compile else modules[0]
            step(run, inputs)
            rows.append((kind, len(modules), statistics.median(seconds(device, lambda: step(run, inputs)) for _ in range(args.rounds + 2)),
                         1e9 * gmacs(modules[0], *inputs)))
    model = torch.compile(model) if args.compile else model
    whole()
    total = statistics.median(seconds(device, whole) for _ in range(args.rounds))
    with torch.profiler.profile() as profile:
        whole()
    events = {e.key: e for e in profile.key_averages()}
    products = sum(getattr(e, "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total") for k, e in events.items()
                   if k in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")) / 1e6
    macs = sum(n * m for _, n, _, m in rows)
    rate = matmul_rate(device, dtype)
    print(f"\n{'module':16}{'times':>6}{'s each':>10}{'of the time':>13}{'of the arithmetic':>19}{'MFU':>8}")
    for kind, n, s, m in rows:
        print(f"{kind:16}{n:6}{s:10.4g}{n * s / total:13.1%}{n * m / macs:19.1%}{3 * m / rate / s:8.1%}")
    rest = total - sum(n * s for _, n, s, _ in rows)
    print(f"{'between them':16}{'':6}{'':10}{rest / total:13.1%}{'':>19}   (slices and sums of the branches; embeddings, head)")
    print(f"{'whole model':16}{1:6}{total:10.4f}{1:13.1%}{1:19.1%}{3 * macs / rate / total:8.1%}")
    print(f"its matrix products alone take {products:.4f} s of the step: the whole is {total / products:.2f} times that")


# ----------------------------------------------------------------------------------------------------
# The input pipeline
# ----------------------------------------------------------------------------------------------------


def make_ssv1_like(folder, clips=8):
    """Frame folders with the size and length of SSV1's: 45 JPEGs of 176 x 100."""
    from PIL import Image
    for clip in range(clips):
        path = folder / "20bn-something-something-v1" / str(clip)
        path.mkdir(parents=True)
        scene = data.toy_scene(np.random.default_rng(clip), clip % 5, 45)
        for i, frame in enumerate(data.toy_render(scene, 100), 1):
            Image.fromarray(frame).resize((176, 100)).save(path / f"{i:05d}.jpg", quality=90)
    return [str(folder / "20bn-something-something-v1" / str(clip)) for clip in range(clips)]


def make_ssv2_like(folder, clips=4):
    """VP9 webm files with the size and length of SSV2's, 48 frames of 427 x 240, where ffmpeg is installed."""
    from PIL import Image
    for clip in range(clips):
        frames = folder / f"frames{clip}"
        frames.mkdir()
        for i, frame in enumerate(data.toy_render(data.toy_scene(np.random.default_rng(clip), clip % 5, 48), 240)):
            Image.fromarray(frame).resize((427, 240)).save(frames / f"{i:03d}.png")
        subprocess.run(["ffmpeg", "-loglevel", "error", "-framerate", "12", "-i", str(frames / "%03d.png"), "-c:v", "libvpx-vp9", "-b:v", "180k",
                        "-pix_fmt", "yuv420p", str(folder / f"{clip}.webm")], check=True)
    return [str(folder / f"{clip}.webm") for clip in range(clips)]


def pipeline(args):
    torch.set_num_threads(1)                            # as a data worker has it
    size, F_ = args.image_size or 224, args.num_frames or 16
    rng = np.random.default_rng(0)

    def choose(n):
        return data.sample_indices(n, F_, rng)

    def per_sample(functions, paths):
        """Median seconds of each function. They take turns in random order: all see the same weather, none always finds another's caches."""
        times = [[] for _ in functions]
        for _ in range(args.rounds + 2):
            for path in paths:
                for i in rng.permutation(len(functions)):
                    start = time.perf_counter()
                    functions[i](path)
                    times[i].append(time.perf_counter() - start)
        return [statistics.median(t) for t in times]

    def bare_decord(path):
        reader = data.import_decord().VideoReader(path, num_threads=1)
        reader.get_batch(np.unique(choose(len(reader)))).asnumpy()

    def sample(path, transform):
        video = transform(data.read_clip(path, choose)).flip(-1)
        return video.transpose(0, 1).contiguous()

    plain, augmented = data.TrainTransform(size), data.TrainTransform(size, magnitude=21)
    with tempfile.TemporaryDirectory() as folder:
        sets = {"SSV1-like frame folders, 45 x 176 x 100": make_ssv1_like(Path(folder))}
        if args.webm:
            sets[f"{len(args.webm)} webm files given"] = args.webm
        elif shutil.which("ffmpeg"):
            sets["SSV2-like webm, 48 x 427 x 240, VP9"] = make_ssv2_like(Path(folder))
        else:
            print("no webm timed: give some with --webm, or install ffmpeg to have them made")
        print(f"\none core, {F_} frames to {size} x {size}")
        print(f"{'':44}{'ms':>8}{'samples/s':>11}{'ratio to bare decoding':>25}")
        for name, paths in sets.items():
            print(name)
            for path in paths:
                data.read_clip(path, choose)            # a file that does not read is named before anything is timed
            functions = {"  read_clip": lambda p: data.read_clip(p, choose), "  sample: read, crop, flip": lambda p: sample(p, plain),
                         "  sample with RandAugment (4 operations)": lambda p: sample(p, augmented)}
            bare = "  decord alone, the same frames"
            if not Path(paths[0]).is_dir():
                functions = {bare: bare_decord, **functions}
            seconds_of = dict(zip(functions, per_sample(list(functions.values()), paths)))
            for label, s in seconds_of.items():
                print(f"{label:44}{1e3 * s:8.1f}{1 / s:11.1f}" + (f"{s / seconds_of[bare]:25.2f}" if bare in seconds_of else ""))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="b16", choices=("b16", "l14", "tiny"), help="size of STD-Former, and of the CLIP beside it")
    p.add_argument("--num_frames", type=int, help="frames per clip (default: the model's)")
    p.add_argument("--image_size", type=int, help="pixels (default: the model's); torchvision's models are left out unless 224")
    p.add_argument("--batch", type=int, default=1, help="clips; 16 or 64 on a GPU")
    p.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    p.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    p.add_argument("--compile", action="store_true", help="torch.compile all models")
    p.add_argument("--checkpointing", action="store_true", help="recompute activations (CLIP and STD-Former)")
    p.add_argument("--rounds", type=int, default=3, help="the median of so many; more on a busy machine")
    p.add_argument("--ours_only", action="store_true", help="leave torchvision's models out")
    p.add_argument("--breakdown", action="store_true", help="time per kind of module instead of the comparison")
    p.add_argument("--pipeline", action="store_true", help="time the input pipeline instead")
    p.add_argument("--webm", nargs="*", help="videos for --pipeline, such as some of SSV2's")
    args = p.parse_args()
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {torch.get_num_threads()} CPU threads"
          + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""))
    if args.pipeline:
        return pipeline(args)
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high")          # as train.py: TF32 for what stays float32 on a GPU
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    (breakdown if args.breakdown else compare)(args, device, dtype)


if __name__ == "__main__":
    run_program("bench.py", main)
