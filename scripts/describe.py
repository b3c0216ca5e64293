"""Print what a model consists of: parameters, GMACs and shapes of each kind of module.

    python scripts/describe.py --model b16
    python scripts/describe.py --model tiny --image_size 48 --smem_t_layers     # train.py's flags
"""
import copy
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import run_command
from model import STDFormer
from train import get_args, model_config

def count_macs(module, *inputs):
    """Multiply-accumulates of module(*inputs): {name of a submodule: MACs}, "Global" for all.

    We count in float32 on the meta device, which computes nothing. So no kernel of a device
    matters, some of which some versions of torch do not count. We count in training mode, because
    in evaluation nn.MultiheadAttention takes a fast path that is not counted.
    """
    inputs = [x.detach().to("meta", torch.float32) if torch.is_tensor(x) else x for x in inputs]
    module = copy.deepcopy(module).to("meta").train()
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
        module(*inputs)
    counts = counter.get_flop_counts()
    return {name: sum(operations.values()) // 2 for name, operations in counts.items()}

def video_of(config):
    """One video as this ModelConfig expects it, without data: (1, 3, F, S, S) on the meta device"""
    size = config.image_size
    return torch.empty(1, 3, config.num_frames, size, size, device="meta")

def kinds_of_modules(model):
    """{label: modules of this kind}, in the order of the forward pass."""
    c = model.config
    plain = [i for i in range(c.depth) if i not in c.ptm_layers]
    return {"stem (conv1)": [model.conv1],
            f"blocks, CLIP's ({len(plain)})": [model.blocks[i] for i in plain],
            f"blocks, PTM ({len(c.ptm_layers)})": [model.blocks[i] for i in c.ptm_layers],
            f"smem_st ({len(c.smem_st_layers)})": [model.smem_st[i] for i in c.smem_st_layers],
            f"ctm ({c.depth})": list(model.ctm),
            f"smem_t ({len(c.smem_t_layers)})": [model.smem_t[i] for i in c.smem_t_layers],
            f"stdm ({len(c.stdm_layers)})": [model.stdm[i] for i in c.stdm_layers],
            "ln_post": [model.ln_post],
            "head": [model.head]}

def describe(model):
    """Print a line for each kind of module of an STDFormer on the meta device."""
    calls = {}                                  # module: its inputs and its output

    def record(module, inputs, output):
        calls[module] = inputs, output

    kinds = {label: modules for label, modules in kinds_of_modules(model).items() if modules}
    handles = [modules[-1].register_forward_hook(record) for modules in kinds.values()]
    with torch.no_grad():
        model(video_of(model.config))
    for handle in handles:
        handle.remove()

    print(f"{'module':<26}{'M params':>10}{'GMACs':>10}   shapes")
    for label, modules in kinds.items():
        inputs, output = calls[modules[-1]]
        parameters = sum(p.numel() for module in modules for p in module.parameters())
        macs = len(modules) * count_macs(modules[-1], *inputs).get("Global", 0)
        print(f"{label:<26}{parameters / 1e6:>10.2f}{macs / 1e9:>10.2f}   "
              f"{tuple(inputs[0].shape)} -> {tuple(output.shape)}")
    parameters = sum(p.numel() for p in model.parameters())
    macs = count_macs(model, video_of(model.config))["Global"]
    print(f"{'total, with embeddings':<26}{parameters / 1e6:>10.2f}{macs / 1e9:>10.2f}")

def main(argv=None, Model=STDFormer):
    words = sys.argv[1:] if argv is None else argv
    args = get_args(["--model", "b16", *words])
    with torch.device("meta"):                  # shapes only: nothing is allocated or computed
        model = Model(model_config(args, num_classes=174))
    c = model.config
    print(f"{args.model}: {c.num_frames} frames of {c.image_size} x {c.image_size}, B = 1")
    describe(model)
    print("config:", asdict(c))

if __name__ == "__main__":
    run_command(main)
