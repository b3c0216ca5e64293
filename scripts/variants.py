"""Models to compare STD-Former with, trained and tested by train.py and evaluate.py themselves: same data, recipe, loop and samples.

    python scripts/variants.py frames train --out_dir out/frames             # flags behind `train` are train.py's
    python scripts/variants.py frames evaluate --ckpt out/frames/last.pt     # and behind `evaluate` are evaluate.py's

Other architectures, with the width and heads of the STD-Former that the flags describe, and as many layers as its parameters
make, behind its own stem: is it the architecture, or would any transformer do?

    frames          frame-wise ViT: CLIP's blocks on every frame, class tokens averaged. It cannot know the order of the frames
    divided         space-time ViT with divided attention (TimeSformer: Bertasius et al., ICML 2021)

Readings of the paper (README, "Where the paper is silent") that are not worth an argument in model.py: STD-Former with one of its
modules replaced.

    dpe_no_bn       DPE without BatchNorm
    dpe_wide        DPE as wide as its input, without BatchNorm and drop path
    cpe_query       CPE on CTM's query instead of its memory: UniFormerV2 has it on the backbone's features
    ctm_zero        CTM's cross attention starts with an output of zero, as one does for paths added to a trained network
    stdm_dense      STDM with dense convolutions, as in R(2+1)D (Tran et al., CVPR 2018): 7.7 M parameters each in b16
    smem_gate       SMEM scales its input (by 2 sigmoid(m), as in TEA: Li et al., CVPR 2020) instead of adding to it
    smem_unit       SMEM compares features of unit length, as MotionSqueeze does (Kwon et al., ECCV 2020)
    smem_relu       ReLU behind SMEM's correlation, as there
    smem_unit_relu  both
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import train
import model
from model import Attention, Block, CTM, DPE, DropPath, MLP, SMEM, STDFormer, STDM


def layers_for(config, parameters_per_layer):
    """How many layers of a plain transformer have the parameters that the STD-Former of this config has behind its stem, rounded."""
    with torch.device("meta"):
        whole = sum(p.numel() for p in STDFormer(config).parameters())
    outside = config.dim * (3 * config.stem_kernel * config.patch_size ** 2 + (config.image_size // config.patch_size) ** 2 + config.num_classes)
    return max(1, round((whole - outside) / parameters_per_layer))


class FrameViT(nn.Module):
    """A frame-wise ViT: what can be said from looking at each frame alone?

    CLIP's transformer on T frames, class tokens averaged over time, linear head; no frame sees another, and the mean forgets
    their order. video: float (B, 3, F, S, S) -> logits (B, num_classes).
    """
    stem = STDFormer.stem

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.grid = (config.image_size // config.patch_size,) * 2
        self.make_stem()
        self.blocks = self.make_blocks()
        self.ln_post = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(config.dim, config.num_classes)
        self.init_weights()

    def make_stem(self, kernel=1):
        """Of each pair of frames that STD-Former makes one token frame of, this sees the first: as many token frames, and no motion in them."""
        c = self.config
        self.conv1 = nn.Conv3d(3, c.dim, (kernel, c.patch_size, c.patch_size), (c.stem_stride, c.patch_size, c.patch_size), (kernel // 2, 0, 0), bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(c.dim))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + self.grid[0] * self.grid[1], c.dim))
        self.ln_pre = nn.LayerNorm(c.dim)

    def make_blocks(self):
        c = self.config
        depth = layers_for(c, 12 * c.dim ** 2 + 13 * c.dim)
        return nn.ModuleList(Block(c.dim, c.heads, c.drop_path * i / max(1, depth - 1)) for i in range(depth))

    def init_weights(self):
        """STDFormer.init_weights, for this number of layers."""
        std = self.config.dim ** -0.5
        residual_std = std * (2 * len(self.blocks)) ** -0.5
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=residual_std if name.endswith(("out_proj", "c_proj")) else std)
                nn.init.zeros_(m.bias)
        for p in (self.class_embedding, self.positional_embedding):
            nn.init.normal_(p, std=std)

    def tokens(self, video):
        return self.stem(video)[0]                                              # (B, T, 1+N, D)

    def forward(self, video):
        x = self.tokens(video)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
        return self.head(self.dropout(self.ln_post(x[:, :, 0].mean(dim=1))))


class DividedBlock(nn.Module):
    """Attention over time at each place, then over the places of each frame, then FFN. x: (B, T, 1+N, D) -> the same."""

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.ln_t, self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn_t, self.attn = Attention(dim, heads), Attention(dim, heads)
        self.mlp = MLP(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        time = self.attn_t(self.ln_t(x).transpose(1, 2).flatten(0, 1))          # (B*(1+N), T, D)
        x = x + self.drop_path(time.view(x.shape[0], x.shape[2], x.shape[1], -1).transpose(1, 2))
        x = x + self.drop_path(self.attn(self.ln_1(x).flatten(0, 1)).view_as(x))
        return x + self.drop_path(self.mlp(self.ln_2(x)))


class DividedViT(FrameViT):
    """A plain space-time ViT with divided attention: TimeSformer's blocks and time embedding.

    Ours: STD-Former's own stem (so that both see the same token frames), and one class token per frame, averaged at the end.
    """

    def make_stem(self):                                # over several frames, as STD-Former's
        super().make_stem(self.config.stem_kernel)
        T = self.config.num_frames // self.config.stem_stride
        self.time_embedding = nn.Parameter(torch.zeros(T, 1, self.config.dim))      # zero at the start, as TimeSformer's

    def make_blocks(self):
        c = self.config
        depth = layers_for(c, 16 * c.dim ** 2 + 19 * c.dim)
        return nn.ModuleList(DividedBlock(c.dim, c.heads, c.drop_path * i / max(1, depth - 1)) for i in range(depth))

    def tokens(self, video):
        return super().tokens(video) + self.time_embedding


class DPEWithoutBN(DPE):
    def __init__(self, dim):
        super().__init__(dim)
        self.bn = nn.Identity()


class WideDPE(DPE):
    def __init__(self, dim):
        super().__init__(dim)
        self.bn = nn.Identity()
        self.reduce, self.expand = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0), groups=dim)


class QueryCPE(CTM):
    def forward(self, x, y):
        x = x + self.cpe(x)
        z = x + self.drop_path(self.cross_attention(self.ln_q(x), self.ln_kv(y)))
        return z + self.drop_path(self.mlp(self.ln_2(z)))


class ZeroCTM(CTM):
    """Until out_proj has grown, y_{i-1} reaches y_i by way of STDM and x_i alone."""


class DenseSTDM(STDM):
    def __init__(self, dim):
        super().__init__(dim)
        self.conv_s = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.conv_t = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0), bias=False)


class GatedSMEM(SMEM):
    """Motion m scales each channel of each place by 2 sigmoid(m), which is 1 where there is none."""

    def forward(self, y):
        motion = super().forward(y) - y
        return y * 2 * motion.sigmoid()


class UnitSMEM(SMEM):
    """Cosines: f of unit length, so nothing is left to scale. f: (B, T, N, C) -> (B, T-1, N, N)."""

    def correlation(self, f):
        return super().correlation(F.normalize(f, dim=-1)) * f.shape[-1] ** 0.5


class ReluSMEM(SMEM):
    def correlation(self, f):
        return super().correlation(f).relu()


class UnitReluSMEM(UnitSMEM):
    def correlation(self, f):
        return super().correlation(f).relu()


def with_module(name, new):
    """STDFormer built with the class `new` in the place of its base class, which is one of model.py's."""
    old = next(base for base in new.__mro__ if base.__module__ == "model")

    class Variant(STDFormer):
        def __init__(self, config):
            setattr(model, old.__name__, new)           # model.py looks its parts up by name
            try:
                super().__init__(config)
            finally:
                setattr(model, old.__name__, old)
            self.register_buffer("variant_" + name, torch.ones(()))             # so that evaluate.py alone refuses its checkpoints

        def init_weights(self):
            super().init_weights()
            for m in self.modules():
                if isinstance(m, ZeroCTM):
                    nn.init.zeros_(m.out_proj.weight)

    return Variant


MODULES = {"dpe_no_bn": DPEWithoutBN, "dpe_wide": WideDPE, "cpe_query": QueryCPE, "ctm_zero": ZeroCTM, "stdm_dense": DenseSTDM,
           "smem_gate": GatedSMEM, "smem_unit": UnitSMEM, "smem_relu": ReluSMEM, "smem_unit_relu": UnitReluSMEM}
VARIANTS = {"frames": FrameViT, "divided": DividedViT, **{name: with_module(name, new) for name, new in MODULES.items()}}


def no_clip(model, source):
    raise ValueError(f"--clip {source}: {type(model).__name__} has {len(model.blocks)} layers, which CLIP's weights do not fit; give --clip none")


def main(argv):
    if len(argv) < 2 or argv[0] not in VARIANTS or argv[1] not in ("train", "evaluate"):
        sys.exit(f"usage: python scripts/variants.py {'|'.join(VARIANTS)} train|evaluate FLAGS\n\n{__doc__}")
    variant, program, *flags = argv
    train.STDFormer = evaluate.STDFormer = VARIANTS[variant]
    if issubclass(VARIANTS[variant], FrameViT):
        train.load_clip = no_clip
    (train if program == "train" else evaluate).main(flags)


if __name__ == "__main__":
    evaluate.run_program("variants.py", lambda: main(sys.argv[1:]))
