"""Variants of STD-Former, trained and tested by train.py and evaluate.py: same data, recipe, loop.

    python scripts/variants.py frames train --out_dir out/frames            # then train.py's flags
    python scripts/variants.py frames evaluate --ckpt out/frames/last.pt    # then evaluate.py's

Other architectures. Is it the design, or would any transformer do? They have the width and heads of
the STD-Former that the flags describe, and as many layers as give them its parameters.

    frames           frame-wise ViT: CLIP's blocks on single frames, class tokens averaged. It
                     cannot know the order of the frames
    divided          space-time ViT with divided attention, as TimeSformer (Bertasius et al.,
                     ICML 2021)

Other readings of the paper (docs/readings.md). These are STD-Former with a module replaced.

    dpe_no_bn        DPE without BatchNorm
    dpe_wide         DPE as wide as its input, without BatchNorm
    ptm_plane_space  PTM's 2D convolution runs on (H, W) of each frame instead of (T, H*W)
    ptm_spacetime    PTM attends to all T*(1+N) tokens ("global spatiotemporal feature")
    ptm_shortcut     Eq. 1 to the letter: PTM's convolution stands in place of the identity
    ctm_memory       CTM's residual connection is on the memory instead of the query
    ctm_both         CTM's residual connection is on both
    cpe_query        CPE on CTM's query instead of its memory; UniFormerV2 has it on the backbone
    cpe_both         CPE on CTM's memory, and another CPE on its query
    ctm_zero         CTM's attention starts at 0, as new paths of a trained network often do
    stdm_dense       STDM with dense convolutions, as in R(2+1)D (Tran et al., CVPR 2018)
    smem_gate        SMEM scales its input instead of adding to it, as TEA (Li et al., CVPR 2020)
    smem_unit        SMEM compares features of unit length, as MotionSqueeze (Kwon et al., ECCV
                     2020)
    smem_relu        a ReLU after SMEM's correlation, as there
    smem_unit_relu   both
    head_fused       the head gets y and the ST-branch's class token, mixed by a learned gate, as in
                     UniFormerV2 ("features from both branches", says the paper's conclusion)

A choice of training.

    bn_frozen        BatchNorm keeps its running statistics, which suits very few clips per step
"""
import copy
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import model
import train
from model import (CPE, CTM, DPE, MLP, PTM, SMEM, STDM, Attention, Block, PTMConv, STDFormer,
                   conv_tokens, zero_output)
from scripts.guards import run_program

# ----- Other architectures --------------------------------------------------

def layers_for(config, layer_parameters):
    """How many layers of a plain transformer have the parameters of STDFormer(config), rounded."""
    c = config
    with torch.device("meta"):
        whole = sum(p.numel() for p in STDFormer(c).parameters())
    stem = c.dim * 3 * c.stem_kernel * c.patch_size ** 2
    positions = c.dim * (c.image_size // c.patch_size) ** 2
    head = c.dim * c.num_classes
    return max(1, round((whole - stem - positions - head) / layer_parameters))


class FrameViT(nn.Module):
    """A frame-wise ViT: what can be said from looking at each frame alone?

    CLIP's transformer on T frames. The class tokens are averaged over time, then comes a linear
    head. No frame sees another, and an average does not know their order.
    video: (B, 3, F, S, S) -> logits (B, num_classes)
    """
    stem = STDFormer.stem

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        side = config.image_size // config.patch_size
        self.grid = (side, side)
        self.make_stem()
        self.blocks = self.make_blocks()
        self.ln_post = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(config.dim, config.num_classes)
        self.init_weights()

    def make_stem(self, kernel=1):
        """STD-Former's stem, but over one frame: the first of each stride. So it sees no motion."""
        c = self.config
        stride, patch = c.stem_stride, c.patch_size
        self.conv1 = nn.Conv3d(3, c.dim, (kernel, patch, patch), (stride, patch, patch),
                               padding=(kernel // 2, 0, 0), bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(c.dim))
        N = self.grid[0] * self.grid[1]
        self.positional_embedding = nn.Parameter(torch.zeros(1 + N, c.dim))
        self.ln_pre = nn.LayerNorm(c.dim)

    def make_blocks(self):
        dim = self.config.dim
        return self.stack(Block, layers_for(self.config, 12 * dim ** 2 + 13 * dim))

    def stack(self, block, depth):
        """Blocks whose stochastic depth rises from layer to layer."""
        c, blocks = self.config, nn.ModuleList()
        for i in range(depth):
            blocks.append(block(c.dim, c.heads, c.drop_path * i / max(1, depth - 1)))
        return blocks

    def init_weights(self):
        """STDFormer.init_weights, for this number of layers."""
        std = self.config.dim ** -0.5
        output_std = std * (2 * len(self.blocks)) ** -0.5
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                is_output = name.endswith(("out_proj", "c_proj"))
                nn.init.trunc_normal_(m.weight, std=output_std if is_output else std)
                nn.init.zeros_(m.bias)
        nn.init.normal_(self.class_embedding, std=std)
        nn.init.normal_(self.positional_embedding, std=std)

    def tokens(self, video):
        return self.stem(video)[0]                                              # (B, T, 1+N, D)

    def forward(self, video):
        x = self.tokens(video)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(self.dropout(self.ln_post(x[:, :, 0].mean(dim=1))))


class DividedBlock(nn.Module):
    """Attention over time at each place, then over the places of each frame, then the FFN.

    x: (B, T, 1+N, D) -> (B, T, 1+N, D)
    """

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.ln_t = nn.LayerNorm(dim)
        self.ln_1 = nn.LayerNorm(dim)
        self.ln_2 = nn.LayerNorm(dim)
        self.attn_t = Attention(dim, heads)
        self.attn = Attention(dim, heads)
        self.mlp = MLP(dim)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):
        B, T, n, D = x.shape
        z = self.attn_t(self.ln_t(x).transpose(1, 2).flatten(0, 1))             # (B*(1+N), T, D)
        x = x + self.drop_path(z.view(B, n, T, D).transpose(1, 2))
        x = x + self.drop_path(self.attn(self.ln_1(x).flatten(0, 1)).view_as(x))
        return x + self.drop_path(self.mlp(self.ln_2(x)))


class DividedViT(FrameViT):
    """A space-time ViT with TimeSformer's blocks and time embedding.

    The time embedding starts at 0, as TimeSformer's. Unlike TimeSformer, it has STD-Former's stem,
    so that both see the same token frames, and one class token per frame, averaged at the end.
    """

    def make_stem(self):                        # over several frames, as STD-Former's
        super().make_stem(self.config.stem_kernel)
        T = self.config.num_frames // self.config.stem_stride
        self.time_embedding = nn.Parameter(torch.zeros(T, 1, self.config.dim))

    def make_blocks(self):
        dim = self.config.dim
        return self.stack(DividedBlock, layers_for(self.config, 16 * dim ** 2 + 19 * dim))

    def tokens(self, video):
        return super().tokens(video) + self.time_embedding


# ----- Readings of section 3.2: PTM -----------------------------------------

class DPEWithoutBN(DPE):
    def __init__(self, dim):
        super().__init__(dim)
        self.bn = nn.Identity()


class WideDPE(DPE):
    def __init__(self, dim):
        super().__init__(dim)
        self.bn = nn.Identity()
        self.reduce = nn.Linear(dim, dim)
        self.expand = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0), groups=dim)


class SpacePTMConv(PTMConv):
    def __init__(self, dim, dims=2):
        super().__init__(dim, dims)
        if dims != 2:
            raise ValueError("ptm_plane_space needs a 2D convolution: leave out --ptm_conv ...3d")

    def forward(self, patches, grid):
        z = self.reduce(patches).unflatten(2, grid).flatten(0, 1)               # (B*T, H, W, D/4)
        z = conv_tokens(self.conv, z).reshape(*patches.shape[:3], -1)           # (B, T, N, D/4)
        return self.expand(z)


class SpacetimePTM(PTM):
    """PTM.forward, but MHA sees one sequence of T*(1+N) tokens."""

    def forward(self, x, grid):
        z = self.dpe(x[:, :, 1:])
        x = x + self.drop_path(F.pad(z, (0, 0, 1, 0)))
        y1 = self.attn(self.ln_1(x).flatten(1, 2)).view_as(x)                   # (B, T*(1+N), D)
        y2 = self.mlp(self.ln_2(x))
        z = y1 if self.conv_after_attention else x
        y3 = F.pad(self.conv(z[:, :, 1:], grid), (0, 0, 1, 0))
        return x + self.drop_path(y1 + self.alpha * y2 + self.beta * y3)


class ShortcutPTM(PTM):
    """PTM.forward without "x +" for patches: x = y1 + alpha y2 + beta Conv(x).

    The class token takes no part in Conv, so it keeps its identity. There is no drop path, since
    nothing would be left of the patches of a dropped clip.
    """

    def __init__(self, *args):
        super().__init__(*args)
        if self.conv_after_attention:
            raise ValueError("ptm_shortcut needs --ptm_conv residual2d or residual3d")

    def forward(self, x, grid):
        x = x + F.pad(self.dpe(x[:, :, 1:]), (0, 0, 1, 0))
        y1 = self.attn(self.ln_1(x).flatten(0, 1)).view_as(x)
        y2 = self.mlp(self.ln_2(x))
        y3 = F.pad(self.conv(x[:, :, 1:], grid), (0, 0, 1, 0))
        class_token = F.pad(x[:, :, :1], (0, 0, 0, x.shape[2] - 1))             # patches: 0
        return class_token + (y1 + self.alpha * y2 + self.beta * y3)


# ----- Readings of section 3.3: CTM -----------------------------------------

class MemoryCTM(CTM):
    """CTM.forward with z = y + CMHA(LN x, LN y)"""

    def forward(self, x, y):
        y = y + self.cpe(y)
        z = y + self.drop_path(self.cross_attention(self.ln_q(x), self.ln_kv(y)))
        return z + self.drop_path(self.mlp(self.ln_2(z)))


class SumCTM(CTM):
    """CTM.forward with z = x + y + CMHA(LN x, LN y)"""

    def forward(self, x, y):
        y = y + self.cpe(y)
        z = x + y + self.drop_path(self.cross_attention(self.ln_q(x), self.ln_kv(y)))
        return z + self.drop_path(self.mlp(self.ln_2(z)))


class QueryCPECTM(CTM):
    """CTM.forward with x = x + CPE(x) instead of y = y + CPE(y)"""

    def forward(self, x, y):
        x = x + self.cpe(x)
        z = x + self.drop_path(self.cross_attention(self.ln_q(x), self.ln_kv(y)))
        return z + self.drop_path(self.mlp(self.ln_2(z)))


class CPEPair(CPE):
    """The memory's CPE, with the query's as its part `query`."""

    def __init__(self, dim):
        super().__init__(dim)
        self.query = CPE(dim)


class CPEPairCTM(CTM):
    def forward(self, x, y):
        return super().forward(x + self.cpe.query(x), y)


class ZeroCTMFormer(STDFormer):
    """Until out_proj has grown, the last y reaches the next one by way of STDM and x alone."""

    def init_weights(self):
        super().init_weights()
        for ctm in self.ctm:
            zero_output(ctm)


# ----- Readings of sections 3.4 and 3.5, and of the head --------------------

class DenseSTDM(STDM):
    def __init__(self, dim):
        super().__init__(dim)
        self.conv_s = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.conv_t = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0), bias=False)


class GatedSMEM(SMEM):
    """Motion m scales each channel of each place by 2 sigmoid(m), which is 1 if m is 0."""

    def forward(self, y):
        motion = super().forward(y) - y
        return y * 2 * motion.sigmoid()


class UnitSMEM(SMEM):
    """Cosines: features of unit length, and no scale. f: (B, T, N, C) -> (B, T-1, N, N)"""

    def correlation(self, f):
        return super().correlation(F.normalize(f, dim=-1)) * f.shape[-1] ** 0.5


class ReluSMEM(SMEM):
    def correlation(self, f):
        return super().correlation(f).relu()


class UnitReluSMEM(UnitSMEM):
    def correlation(self, f):
        return super().correlation(f).relu()


class FrozenBNFormer(STDFormer):
    """BatchNorm keeps its running statistics. So the clips of a step do not affect each other."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                module.eval()
        return self


class FusedFormer(STDFormer):
    """The head gets g * y + (1 - g) * class token, both averaged, with a learned g per channel."""

    def __init__(self, config):
        super().__init__(config)
        # Inside of head, so that load_clip and train.py's learning rates take it for new.
        self.head.gate = nn.Parameter(torch.zeros(config.dim))                  # half and half

    def forward(self, video):
        x, y = self.forward_features(video)
        gate = self.head.gate.sigmoid()
        z = gate * y.mean(dim=(1, 2, 3)) + (1 - gate) * x[:, :, 0].mean(dim=1)
        return self.head(self.dropout(self.ln_post(z)))


# ----- All variants, and the command ----------------------------------------

def variant(name, *modules, base=STDFormer):
    """A subclass of `base` whose parts are these subclasses of model.py's modules."""

    class Variant(base):
        def __init__(self, config):
            originals = {}
            for module in modules:              # STDFormer finds its parts by their names in model
                original = next(c for c in module.__mro__ if c.__module__ == model.__name__)
                originals[original.__name__] = original
                setattr(model, original.__name__, module)
            try:
                super().__init__(config)
            finally:
                for original_name, original in originals.items():
                    setattr(model, original_name, original)
            # evaluate.py alone does not know this name, and so refuses the checkpoint.
            self.head.register_buffer(f"variant_{name}", torch.ones(()))

    return Variant


VARIANTS = {
    "frames": FrameViT,
    "divided": DividedViT,
    "dpe_no_bn": variant("dpe_no_bn", DPEWithoutBN),
    "dpe_wide": variant("dpe_wide", WideDPE),
    "ptm_plane_space": variant("ptm_plane_space", SpacePTMConv),
    "ptm_spacetime": variant("ptm_spacetime", SpacetimePTM),
    "ptm_shortcut": variant("ptm_shortcut", ShortcutPTM),
    "ctm_memory": variant("ctm_memory", MemoryCTM),
    "ctm_both": variant("ctm_both", SumCTM),
    "cpe_query": variant("cpe_query", QueryCPECTM),
    "cpe_both": variant("cpe_both", CPEPair, CPEPairCTM),
    "ctm_zero": variant("ctm_zero", base=ZeroCTMFormer),
    "stdm_dense": variant("stdm_dense", DenseSTDM),
    "smem_gate": variant("smem_gate", GatedSMEM),
    "smem_unit": variant("smem_unit", UnitSMEM),
    "smem_relu": variant("smem_relu", ReluSMEM),
    "smem_unit_relu": variant("smem_unit_relu", UnitReluSMEM),
    "head_fused": variant("head_fused", base=FusedFormer),
    "bn_frozen": variant("bn_frozen", base=FrozenBNFormer),
}


def load_clip(network, source):
    """model.load_clip for a variant.

    A convolution in place of the identity keeps its random start, since it has to carry x on.
    ValueError for the plain ViTs: CLIP has another number of layers.
    """
    if isinstance(network, FrameViT):
        raise ValueError(f"--clip {source} does not fit the {len(network.blocks)} layers of "
                         f"{type(network).__name__}: add --clip none")
    shortcuts = [block.conv for block in network.blocks if isinstance(block, ShortcutPTM)]
    starts = [copy.deepcopy(conv.state_dict()) for conv in shortcuts]
    counts = model.load_clip(network, source)
    for conv, start in zip(shortcuts, starts):
        conv.load_state_dict(start)
    return counts


def main(argv):
    if len(argv) < 2 or argv[0] not in VARIANTS or argv[1] not in ("train", "evaluate"):
        names = "|".join(VARIANTS)
        sys.exit(f"usage: python scripts/variants.py {names} train|evaluate FLAGS\n\n{__doc__}")
    name, program, *flags = argv
    train.STDFormer = evaluate.STDFormer = VARIANTS[name]
    train.load_clip = load_clip
    (train if program == "train" else evaluate).main(flags)


if __name__ == "__main__":
    run_program(lambda: main(sys.argv[1:]))
