"""How fast is STD-Former, compared with what its arithmetic allows?

    python scripts/bench.py                                        # b16, float32: minutes on a CPU
    python scripts/bench.py --precision bf16 --compile --batch 16  # on a GPU
    python scripts/bench.py --breakdown                            # the share of each module
    python scripts/bench.py --pipeline clips/*.webm                # reading and augmenting

Seconds depend on the machine and on its load. So each has a ratio beside it, to a baseline that is
timed alternately with it, in the same run. All are medians over the rounds.

models       The baseline is the first row: CLIP's ViT with open_clip's blocks, on the same token
             frames after the same stem. If the ratio of the time is not above the ratio of the
             arithmetic, our new modules cost no more than their arithmetic.
--breakdown  The baseline is the whole model.
--pipeline   The baseline is decoding as many frames of the same clips.

MFU is the arithmetic of a pass, divided by its time and by the rate of a large matrix product of
the same type. A training step counts as 3 forward passes.
"""
import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torchvision
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from evaluate import autocast, positive, run_command, set_tf32, setup
from model import MODELS, Block, ModelConfig, build_model
from scripts.describe import count_macs
from scripts.variants import FrameViT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ----- The models that are compared -----------------------------------------

class FrameCLIP(FrameViT):
    """CLIP's image transformer on each token frame, after STD-Former's stem and as deep as it."""
    block = Block

    def make_stem(self):
        super().make_stem(self.config.stem_kernel)

    def make_blocks(self):
        return self.stack(self.block, self.config.depth)

class OpenCLIPBlock(nn.Module):
    """open_clip's block, frame by frame. x: (B, T, 1+N, D) -> (B, T, 1+N, D)"""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.block = ResidualAttentionBlock(dim, heads, act_layer=QuickGELU)

    def forward(self, x):
        return self.block(x.flatten(0, 1)).view_as(x)

class OpenCLIP(FrameCLIP):
    block = OpenCLIPBlock

def make_models(name):
    """{label: model}. The first is the baseline. torchvision's models need 224 pixels."""
    std_former = build_model(name)
    models = {"CLIP ViT, open_clip's blocks": OpenCLIP(std_former.config),
              "CLIP ViT, our blocks": FrameCLIP(std_former.config),
              f"STD-Former {name}": std_former}
    if std_former.config.image_size == 224:
        models["Swin3D-B (torchvision)"] = torchvision.models.video.swin3d_b(num_classes=174)
        models["MViTv2-S (torchvision)"] = torchvision.models.video.mvit_v2_s(num_classes=174)
    return models

def make_video(config, args, device):
    size = config.image_size
    return torch.randn(args.batch, 3, config.num_frames, size, size, device=device)

# ----- Measuring ------------------------------------------------------------

def seconds(function, device):
    """Seconds of one call of function(). On a GPU, the mean of five, and the CPU waits for it."""
    on_gpu = device.type != "cpu"
    calls = 5 if on_gpu else 1
    if on_gpu:
        torch.accelerator.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if on_gpu:
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / calls

def take_turns(functions, rounds, device):
    """Time all functions round by round, so that all see the same load: {label: median seconds}."""
    times = {label: [] for label in functions}
    for _ in range(rounds):
        for label, function in functions.items():
            times[label].append(seconds(function, device))
    return {label: statistics.median(values) for label, values in times.items()}

def matmul_rate(device, precision):
    """Multiply-accumulates per second of a large square matrix product, the best of ten."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=DTYPES[precision])
    return n ** 3 / min(seconds(lambda: a @ a, device) for _ in range(10))

def saved_bytes(model, video, precision):
    """What autograd keeps of a forward pass for the backward pass, without the parameters."""
    sizes = {}                                  # by address: several tensors may share their memory
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast(video.device, precision):
            out = model(video)                  # while it lives, no address is used twice
    del out
    return sum(sizes.values())

def forward(model, video, args):
    model.eval()
    with torch.no_grad(), autocast(video.device, args.precision):
        model(video)

def forward_backward(module, inputs, args):
    module.train()
    with autocast(inputs[0].device, args.precision):
        out = module(*inputs)
    out.backward(torch.ones_like(out))
    module.zero_grad(set_to_none=True)
    for x in inputs:
        if torch.is_tensor(x):
            x.grad = None

# ----- The models -----------------------------------------------------------

def compare(args, device):
    """Print a row for each model, whose ratios are to the first one."""
    models = make_models(args.model)
    video = make_video(models[f"STD-Former {args.model}"].config, args, device)
    rows, functions = {}, {}
    for label, model in models.items():
        model.to(device)
        run = torch.compile(model) if args.compile else model
        functions[label, "forward"] = partial(forward, run, video, args)
        functions[label, "train"] = partial(forward_backward, run, (video,), args)
        try:
            memory = saved_bytes(model, video, args.precision) / args.batch
            functions[label, "forward"]()       # compiles, and picks algorithms
            functions[label, "train"]()
        except torch.OutOfMemoryError as e:
            raise ValueError(f"--batch {args.batch} is too much for the GPU's memory in {label}; "
                             "lower it") from e
        rows[label] = dict(parameters=sum(p.numel() for p in model.parameters()),
                           macs=count_macs(model, video[:1])["Global"], memory=memory)
    for (label, name), time_each in take_turns(functions, args.rounds, device).items():
        rows[label][name] = time_each / args.batch
    rate = matmul_rate(device, args.precision)

    print(f"{args.model}, {video.shape[2]} frames of {video.shape[3]} x {video.shape[4]}, batch "
          f"{args.batch}, {args.precision}; matrix product {rate / 1e9:.0f} GMAC/s. For one clip:")
    print(f"{'':55}|{'forward':^25}|{'training step':^25}|{'kept for backward':^18}")
    print(f"{'model':30}{'M params':>9}{'GMACs':>8}{'ratio':>7} |{'s':>9}{'ratio':>7}{'MFU':>8} "
          f"|{'s':>9}{'ratio':>7}{'MFU':>8} |{'GiB':>9}{'ratio':>7}")
    first = next(iter(rows.values()))
    for label, row in rows.items():
        ratio = {name: value / first[name] for name, value in row.items()}
        mfu = row["macs"] / rate / row["forward"]
        train_mfu = 3 * row["macs"] / rate / row["train"]
        print(f"{label:30}{row['parameters'] / 1e6:9.4g}{row['macs'] / 1e9:8.4g}"
              f"{ratio['macs']:7.2f} |{row['forward']:9.3g}{ratio['forward']:7.2f}{mfu:8.1%} "
              f"|{row['train']:9.3g}{ratio['train']:7.2f}{train_mfu:8.1%} "
              f"|{row['memory'] / 2 ** 30:9.3g}{ratio['memory']:7.2f}")

# ----- The breakdown --------------------------------------------------------

def modules_and_inputs(model, video, args):
    """{kind: (its modules, the inputs of one)}"""
    c = model.config
    with torch.no_grad(), autocast(video.device, args.precision):
        x, grid = model.stem(video)
    y = x[:, :, 1:].unflatten(2, grid).clone().requires_grad_()
    query = y.detach().clone().requires_grad_()
    x.requires_grad_()
    return {"stem": ([model.conv1], (video,)),
            "Block": ([model.blocks[i] for i in range(c.depth) if i not in c.ptm_layers], (x,)),
            "PTM": ([model.blocks[i] for i in c.ptm_layers], (x, grid)),
            "CTM": (list(model.ctm), (query, y)),
            "STDM": ([model.stdm[i] for i in c.stdm_layers], (y,)),
            "SMEM": ([model.smem_t[i] for i in c.smem_t_layers], (y,))}

def breakdown(args, device):
    """Print the share of each kind of module in the time and arithmetic of a training step."""
    model = build_model(args.model).to(device)
    video = make_video(model.config, args, device)
    kinds = modules_and_inputs(model, video, args)
    kinds["whole model"] = [model], (video,)
    functions = {}
    for kind, (modules, inputs) in kinds.items():
        run = torch.compile(modules[0]) if args.compile else modules[0]
        functions[kind] = partial(forward_backward, run, inputs, args)
        functions[kind]()
    times = take_turns(functions, args.rounds, device)
    rate = matmul_rate(device, args.precision)
    total = count_macs(model, video)["Global"]

    print(f"{'module':14}{'times':>6}{'s each':>10}{'of the time':>13}{'of the arithmetic':>19}"
          f"{'MFU':>8}")
    for kind, (modules, inputs) in kinds.items():
        macs = count_macs(modules[0], *inputs)["Global"]
        share = len(modules) * times[kind] / times["whole model"]
        print(f"{kind:14}{len(modules):6}{times[kind]:10.4g}{share:13.1%}"
              f"{len(modules) * macs / total:19.1%}{3 * macs / rate / times[kind]:8.1%}")

# ----- The input pipeline ---------------------------------------------------

def pipeline(args):
    """Print how long one core takes for a training sample, step by step."""
    torch.set_num_threads(1)                    # as in a data worker
    size, num_frames = MODELS[args.model]["image_size"], ModelConfig.num_frames
    rng = np.random.default_rng(0)
    crop = data.train_transform(size)
    crop_and_augment = data.train_transform(size, randaugment=21)

    def decode(path):
        if Path(path).is_dir():
            names = data.frame_names(path)
            for i in data.sample_indices(len(names), num_frames, rng):
                np.asarray(Image.open(Path(path, names[i])).convert("RGB"))
        else:
            reader = data.open_video(path)
            reader.get_batch(data.sample_indices(len(reader), num_frames, rng)).asnumpy()

    def read(path):
        return data.read_clip(path, num_frames, rng)

    steps = {"decoding as many frames": decode,
             "read_clip": read,
             "read_clip, crop": lambda path: crop(read(path)),
             "read_clip, crop, RandAugment": lambda path: crop_and_augment(read(path))}
    functions = {}
    for path in args.pipeline:
        read(path)                              # names a clip that cannot be read
        for label, step in steps.items():
            functions[label, path] = partial(step, path)
    times = take_turns(functions, args.rounds + 2, torch.device("cpu"))

    print(f"one core, {num_frames} frames to {size} x {size}, {len(args.pipeline)} clips")
    print(f"{'':32}{'ms':>8}{'samples/s':>11}{'ratio':>8}")
    first = None
    for label in steps:
        mean = statistics.mean(times[label, path] for path in args.pipeline)
        first = first or mean
        print(f"{label:32}{1e3 * mean:8.1f}{1 / mean:11.1f}{mean / first:8.2f}")

# ----- The command ----------------------------------------------------------

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model", default="b16", choices=MODELS, help="size of STD-Former and of CLIP's ViT")
    add("--batch", type=positive, default=1, help="clips; 16 or more on a GPU")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--precision", default="fp32", choices=DTYPES)
    add("--compile", action="store_true", help="torch.compile all models")
    add("--rounds", type=positive, default=3, help="of each measurement; more on a busy machine")
    add("--breakdown", action="store_true", help="time each kind of module instead")
    add("--pipeline", nargs="+", metavar="CLIP", help="time reading and augmenting these videos or "
        "folders of frames instead")
    args = p.parse_args(argv)
    device, _, _ = setup(args.device)
    set_tf32(args.precision != "fp32")
    torch.manual_seed(0)
    gpu = f", {torch.cuda.get_device_name()}" if device.type == "cuda" else ""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads{gpu}")
    if args.pipeline:
        pipeline(args)
    elif args.breakdown:
        breakdown(args, device)
    else:
        compare(args, device)

if __name__ == "__main__":
    run_command(main)
