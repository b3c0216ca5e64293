"""Print what a model consists of: parameters, GMACs and shapes of each kind of module.

    python scripts/describe.py --model b16
    python scripts/describe.py --model tiny --image_size 48 --smem_t_layers     # train.py's flags
"""
import copy
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import STDFormer, model_config
from scripts.guards import run_program
from train import get_args

# ----- Counting -------------------------------------------------------------

def count_macs(module, *inputs):
    """Multiply-accumulates of module(*inputs): {name of a submodule: MACs}, "Global" for all.

    We count in float32 on the meta device, which computes nothing. So no kernel of a device
    matters, some of which some versions of torch do not count. We count in training mode, because
    in evaluation nn.MultiheadAttention takes a fast path that is not counted.
    """
    inputs = [x.to("meta", torch.float32) if torch.is_tensor(x) else x for x in inputs]
    module = copy.deepcopy(module).to("meta").train()
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
        module(*inputs)
    counts = counter.get_flop_counts()
    return {name: sum(operations.values()) // 2 for name, operations in counts.items()}


def video_of(config):
    """One video as this ModelConfig expects it, without data: (1, 3, F, S, S) on the meta device"""
    size = config.image_size
    return torch.empty(1, 3, config.num_frames, size, size, device="meta")


def record_shapes(model):
    """A dict that a forward pass fills: {name of a submodule: (shape of its input, its output)}"""
    shapes = {}
    for name, module in model.named_modules():

        def record(module, inputs, output, name=name):
            if torch.is_tensor(output):
                shapes[name] = tuple(inputs[0].shape), tuple(output.shape)

        module.register_forward_hook(record)
    return shapes


# ----- Printing -------------------------------------------------------------

def kinds_of_modules(model):
    """[(label, names of the submodules of this kind)] in the order of the forward pass."""
    c = model.config
    plain = [i for i in range(c.depth) if i not in c.ptm_layers]
    kinds = [("stem (conv1)", ["conv1"]),
             (f"blocks, CLIP's ({len(plain)})", [f"blocks.{i}" for i in plain]),
             (f"blocks, PTM ({len(c.ptm_layers)})", [f"blocks.{i}" for i in c.ptm_layers])]
    for part in ("ctm", "stdm", "smem_t", "smem_st"):
        modules = getattr(model, part)
        layers = [i for i, m in enumerate(modules) if not isinstance(m, nn.Identity)]
        kinds.append((f"{part} ({len(layers)})", [f"{part}.{i}" for i in layers]))
    return kinds + [("ln_post", ["ln_post"]), ("head", ["head"])]


def describe(model):
    """Print a line for each kind of module of an STDFormer on the meta device."""
    shapes = record_shapes(model)
    macs = count_macs(model, video_of(model.config))
    print(f"{'module':<26}{'M params':>10}{'GMACs':>10}   shapes (of the last one)")
    for label, names in kinds_of_modules(model):
        if names:
            modules = [model.get_submodule(name) for name in names]
            parameters = sum(p.numel() for m in modules for p in m.parameters())
            gmacs = sum(macs.get(f"STDFormer.{name}", 0) for name in names) / 1e9
            before, after = shapes[names[-1]]
            print(f"{label:<26}{parameters / 1e6:>10.2f}{gmacs:>10.2f}   {before} -> {after}")
    parameters = sum(p.numel() for p in model.parameters())
    total = macs["Global"] / 1e9
    print(f"{'total, with embeddings':<26}{parameters / 1e6:>10.2f}{total:>10.2f}")


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    args = get_args(["--recipe", "toy", "--model", "b16", *words])       # no dropout
    c = model_config(args)
    with torch.device("meta"):                  # shapes only: nothing is allocated or computed
        model = STDFormer(c)
    print(f"{args.model}: {c.num_frames} frames of {c.image_size} x {c.image_size}, B = 1")
    describe(model)
    print("config:", asdict(c))


if __name__ == "__main__":
    run_program(main)
