"""Variants of STD-Former, trained and tested by train.py and evaluate.py: same data, recipe, loop.

    python scripts/variants.py frames train --out_dir out/frames            # then train.py's flags
    python scripts/variants.py frames evaluate --ckpt out/frames/last.pt    # then evaluate.py's
    python scripts/variants.py ctm_memory visualize --ckpt out/memory/best.pt --toy 0
    python scripts/variants.py ctm_memory describe --model b16

Other architectures. Is it the design, or would any transformer do? They have the width and heads of
the STD-Former that the flags describe, and enough layers to have as many parameters.

    frames            frame-wise ViT: CLIP's blocks on single frames, class tokens averaged. It
                      cannot know the order of the frames
    divided           space-time ViT with divided attention, after TimeSformer (Bertasius et al.,
                      ICML 2021)

CLIP's weights fit neither of these two. With a recipe other than toy, add --clip none, also to the
STD-Former that they are compared with.

Other readings of the paper (docs/readings.md): STD-Former with one module replaced.

    dpe_no_bn         DPE without BatchNorm
    dpe_wide          DPE as wide as its input, without BatchNorm
    dpe_double        a second DPE before the FFN, as UniFormerV2 has it
    ptm_plane_space   PTM's 2D convolution runs on (H, W) of each frame instead of (T, H*W)
    ptm_spacetime     PTM attends to all T*(1+N) tokens ("global spatiotemporal feature")
    ptm_shortcut      Eq. 1 to the letter: PTM's convolution stands in place of the identity
    ptm_serial        Table 3's "attention" as one path: x + Conv(MHA(LN x)) + alpha FFN(LN x)
    ctm_memory        CTM's residual connection is on the memory instead of the query
    ctm_both          CTM's residual connection is on both
    ctm_zero          CTM's attention starts at 0
    ctm_zero_ffn      CTM's attention and FFN start at 0, as in UniFormerV2
    cpe_query         CPE on CTM's query instead of its memory; UniFormerV2 has it on the backbone
    cpe_both          CPE on CTM's memory, and another CPE on its query
    stdm_dense        STDM with dense convolutions, as in R(2+1)D (Tran et al., CVPR 2018)
    stdm_bottleneck   STDM with dense convolutions at a quarter of the width
    stdm_before_smem  STDM takes y from before SMEM
    smem_gate         SMEM scales its input instead of adding to it, as TEA (Li et al., CVPR 2020)
    smem_unit         SMEM compares features of unit length, as MotionSqueeze (Kwon et al., ECCV
                      2020)
    smem_relu         a ReLU after SMEM's correlation, as there
    smem_unit_relu    both
    smem_window       SMEM compares by displacement, at most 7 patches away, as MotionSqueeze does
    head_fused        the head gets y and the ST-branch's class token, mixed by a learned gate, as
                      in UniFormerV2 ("features from both branches", says the paper's conclusion)

What is a part of CTM worth?

    no_cpe            CTM without CPE
    ctm_values        CTM without attention: each frame gets its own value

A choice of training, and a control at test time.

    bn_frozen         BatchNorm keeps its running statistics, which suits very few clips per step
    shuffle_tokens    STD-Former with the token frames of each clip in random order after the stem:
                      evaluate a checkpoint of train.py with it

To add a variant, write its class, a line in VARIANTS, and a line in the lists above, in the same
order. The last layer of each path keeps its name and type (see STDFormer in model.py).
"""
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
import train
from model import (CPE, CTM, DPE, MLP, PTM, SMEM, STDM, Attention, Block, PTMConv, STDFormer,
                   conv_tokens, pad_class_token)
from scripts import describe, visualize

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
        self.config = config
        self.checkpointing = False
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
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                ends_branch = name.endswith(("out_proj", "c_proj"))
                nn.init.trunc_normal_(module.weight, std=output_std if ends_branch else std)
                nn.init.zeros_(module.bias)
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
    """Attention over time at each position, then over the patches of each frame, then the FFN.

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
    """A space-time ViT: attention over time, then over space, as in TimeSformer.

    The time embedding starts at 0, as there. What differs: it has STD-Former's stem, so that both
    see the same token frames. Each frame has a class token, which attends over time as well, and
    the head averages them. TimeSformer has another Linear layer after the attention over time,
    which starts at 0 in all blocks but the first.
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
# Each forward repeats PTM's with one change, so that the two can be compared line by line.

class NoBNDPEPTM(PTM):
    def __init__(self, dim, *args):
        super().__init__(dim, *args)
        self.dpe.bn = nn.Identity()

class WideDPE(DPE):
    def __init__(self, dim):
        super().__init__(dim)
        self.bn = nn.Identity()
        self.reduce = nn.Linear(dim, dim)
        self.expand = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0), groups=dim)

class WideDPEPTM(PTM):
    def __init__(self, dim, *args):
        super().__init__(dim, *args)
        self.dpe = WideDPE(dim)

class DoubleDPEPTM(PTM):
    def __init__(self, dim, *args):
        super().__init__(dim, *args)
        self.dpe.second = DPE(dim)              # in dpe, so that load_clip takes it for new

    def forward(self, x, grid):
        x = x + self.drop_path(pad_class_token(self.dpe(x[:, :, 1:])))
        y1 = self.attn(self.ln_1(x).flatten(0, 1)).view_as(x)
        z = x + self.drop_path(pad_class_token(self.dpe.second(x[:, :, 1:])))
        y2 = self.mlp(self.ln_2(z))
        y3 = pad_class_token(self.conv(x[:, :, 1:], grid))
        return x + self.drop_path(y1 + self.alpha * y2 + self.beta * y3)

class SpacePTMConv(PTMConv):
    def forward(self, patches, grid):
        z = self.reduce(patches).unflatten(2, grid).flatten(0, 1)               # (B*T, H, W, D/4)
        z = conv_tokens(self.conv, z).reshape(*patches.shape[:3], -1)           # (B, T, N, D/4)
        return self.expand(z)

class SpacePTM(PTM):
    def __init__(self, dim, *args):
        super().__init__(dim, *args)
        if self.conv.dims != 2:
            raise ValueError("ptm_plane_space needs a 2D convolution: leave out --ptm_conv ...3d")
        self.conv = SpacePTMConv(dim)

class SpacetimePTM(PTM):
    """MHA sees one sequence of T*(1+N) tokens."""

    def forward(self, x, grid):
        x = x + self.drop_path(pad_class_token(self.dpe(x[:, :, 1:])))
        y1 = self.attn(self.ln_1(x).flatten(1, 2)).view_as(x)                   # (B, T*(1+N), D)
        y2 = self.mlp(self.ln_2(x))
        z = y1 if self.conv_after_attention else x
        y3 = pad_class_token(self.conv(z[:, :, 1:], grid))
        return x + self.drop_path(y1 + self.alpha * y2 + self.beta * y3)

class ShortcutPTM(PTM):
    """No "x +" for patches: x = y1 + alpha y2 + beta Conv(x).

    The class token takes no part in Conv, so it keeps its identity. There is no drop path, since
    nothing would be left of the patches of a dropped clip.
    """

    def forward(self, x, grid):
        x = x + pad_class_token(self.dpe(x[:, :, 1:]))
        y1 = self.attn(self.ln_1(x).flatten(0, 1)).view_as(x)
        y2 = self.mlp(self.ln_2(x))
        y3 = pad_class_token(self.conv(x[:, :, 1:], grid))
        class_token = F.pad(x[:, :, :1], (0, 0, 0, x.shape[2] - 1))             # patches: 0
        return class_token + (y1 + self.alpha * y2 + self.beta * y3)

class SerialPTM(PTM):
    """x + Conv(y1) + alpha y2, where PTM's "attention2d" has x + y1 + alpha y2 + beta Conv(y1)."""

    def __init__(self, dim, *args):
        super().__init__(dim, *args)
        del self.beta

    def forward(self, x, grid):
        x = x + self.drop_path(pad_class_token(self.dpe(x[:, :, 1:])))
        y1 = self.attn(self.ln_1(x).flatten(0, 1)).view_as(x)
        y2 = self.mlp(self.ln_2(x))
        conv = self.conv(y1[:, :, 1:], grid)
        y1 = torch.cat([y1[:, :, :1], conv], dim=2)     # the class token takes no part in Conv
        return x + self.drop_path(y1 + self.alpha * y2)

# ----- Readings of section 3.3: CTM -----------------------------------------

class MemoryCTM(CTM):
    def forward(self, x, y):
        y = y + self.cpe(y)
        z = y + self.drop_path(self.cross_attention(self.ln_q(x), self.ln_kv(y)))
        return z + self.drop_path(self.mlp(self.ln_2(z)))

class SumCTM(CTM):
    def forward(self, x, y):
        y = y + self.cpe(y)
        z = x + y + self.drop_path(self.cross_attention(self.ln_q(x), self.ln_kv(y)))
        return z + self.drop_path(self.mlp(self.ln_2(z)))

class QueryCPECTM(CTM):
    def forward(self, x, y):
        x = x + self.cpe(x)
        z = x + self.drop_path(self.cross_attention(self.ln_q(x), self.ln_kv(y)))
        return z + self.drop_path(self.mlp(self.ln_2(z)))

class TwoCPECTM(CTM):
    def __init__(self, dim, *args):
        super().__init__(dim, *args)
        self.cpe_query = CPE(dim)

    def forward(self, x, y):
        return super().forward(x + self.cpe_query(x), y)

class NoCPECTM(CTM):
    def __init__(self, dim, *args):
        super().__init__(dim, *args)
        del self.cpe

    def forward(self, x, y):
        z = x + self.drop_path(self.cross_attention(self.ln_q(x), self.ln_kv(y)))
        return z + self.drop_path(self.mlp(self.ln_2(z)))

class ValuesCTM(CTM):
    def __init__(self, dim, *args):
        super().__init__(dim, *args)
        self.ln_q = nn.Identity()               # there are no queries and keys
        self.q = nn.Identity()
        self.kv = nn.Linear(dim, dim, bias=False)

    def cross_attention(self, x, y):
        return self.out_proj(self.kv(y))

class ZeroCTMFormer(STDFormer):
    """Until out_proj has grown, the y of a layer reaches the next layer's only by STDM and x."""

    def init_weights(self):
        super().init_weights()
        for ctm in self.ctm:
            nn.init.zeros_(ctm.out_proj.weight)

class ZeroFFNCTMFormer(ZeroCTMFormer):
    def init_weights(self):
        super().init_weights()
        for ctm in self.ctm:
            nn.init.zeros_(ctm.mlp.c_proj.weight)

# ----- Readings of sections 3.4 and 3.5, and of the head --------------------

class DenseSTDM(STDM):
    def __init__(self, dim):
        super().__init__(dim)
        self.conv_s = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.conv_t = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0), bias=False)

class BottleneckSTDM(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.reduce = nn.Linear(dim, dim // 4)
        self.stdm = DenseSTDM(dim // 4)
        self.pointwise = nn.Linear(dim // 4, dim)

    def forward(self, y):
        return self.pointwise(F.relu(self.stdm(self.reduce(y))))

class STDMBeforeSMEMFormer(STDFormer):
    def forward_features(self, video):
        c = self.config
        x, grid = self.stem(video)
        y = x[:, :, 1:].unflatten(2, grid)
        for i in range(c.depth):
            x = self.run(self.blocks[i], x, grid)
            patches = x[:, :, 1:].unflatten(2, grid)
            if i in c.smem_st_layers:
                patches = self.smem_st[i](patches)
                x = torch.cat([x[:, :, :1], patches.flatten(2, 3)], dim=2)
            y = self.run(self.ctm[i], patches, y)
            if i in c.stdm_layers:
                x = x + pad_class_token(self.stdm[i](y).flatten(2, 3))
            if i in c.smem_t_layers:
                y = self.smem_t[i](y)
        return x, y

class GatedSMEM(SMEM):
    """Motion m scales each channel of each patch by 2 sigmoid(m), which is 1 if m is 0."""

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

class WindowSMEM(SMEM):
    """Channel d of patch i is its product with the patch displaced by d, or 0 beyond the frame."""

    def __init__(self, dim, grid, fusion="mul", reach=7):
        super().__init__(dim, grid, fusion)
        H, W = self.grid
        rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
        rows, columns = rows.flatten(), columns.flatten()
        dy = rows - rows[:, None]                       # (N, N), from patch i to patch j
        dx = columns - columns[:, None]
        side = 2 * reach + 1
        inside = (dy.abs() <= reach) & (dx.abs() <= reach)
        channel = torch.where(inside, (dy + reach) * side + dx + reach, side ** 2)
        self.register_buffer("channel", channel, persistent=False)
        self.channels = side ** 2
        self.stages[0] = nn.Conv2d(self.channels, dim // 4, 3, 2, padding=1, bias=False)

    def correlation(self, f):
        c = super().correlation(f)                                              # (B, T-1, N, N)
        by_displacement = c.new_zeros(*c.shape[:3], self.channels + 1)          # the last: too far
        by_displacement = by_displacement.scatter(-1, self.channel.expand_as(c), c)
        return by_displacement[..., :-1]                                        # (B, T-1, N, 225)

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

class FrozenBNFormer(STDFormer):
    """BatchNorm keeps its running statistics. So the clips of a step do not affect each other."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                module.eval()
        return self

class ShuffledTokensFormer(STDFormer):
    """The stem still sees neighbouring frames. Whatever needs a longer order is lost.

    Test it with --crops 1, or each crop of a clip gets an order of its own.
    """

    def __init__(self, config):
        super().__init__(config)
        self.generator = torch.Generator().manual_seed(0)       # the same orders in each evaluation

    def stem(self, video):
        x, grid = super().stem(video)
        clips = []
        for clip in x:                                                          # (T, 1+N, D)
            clips.append(clip[torch.randperm(len(clip), generator=self.generator)])
        return torch.stack(clips), grid

# ----- All variants, and the command ----------------------------------------

def variant(name, base=STDFormer, **modules):
    """A subclass of `base` with other modules, such as PTM=ShortcutPTM."""

    class Variant(base):
        def __init__(self, config):
            super().__init__(config)
            # evaluate.py alone does not know this name, and so refuses the checkpoint.
            self.head.register_buffer(f"variant_{name}", torch.ones(()))

    for module, replacement in modules.items():
        setattr(Variant, module, replacement)
    return Variant

VARIANTS = {
    "frames": FrameViT,
    "divided": DividedViT,
    "dpe_no_bn": variant("dpe_no_bn", PTM=NoBNDPEPTM),
    "dpe_wide": variant("dpe_wide", PTM=WideDPEPTM),
    "dpe_double": variant("dpe_double", PTM=DoubleDPEPTM),
    "ptm_plane_space": variant("ptm_plane_space", PTM=SpacePTM),
    "ptm_spacetime": variant("ptm_spacetime", PTM=SpacetimePTM),
    "ptm_shortcut": variant("ptm_shortcut", PTM=ShortcutPTM),
    "ptm_serial": variant("ptm_serial", PTM=SerialPTM),
    "ctm_memory": variant("ctm_memory", CTM=MemoryCTM),
    "ctm_both": variant("ctm_both", CTM=SumCTM),
    "ctm_zero": variant("ctm_zero", ZeroCTMFormer),
    "ctm_zero_ffn": variant("ctm_zero_ffn", ZeroFFNCTMFormer),
    "cpe_query": variant("cpe_query", CTM=QueryCPECTM),
    "cpe_both": variant("cpe_both", CTM=TwoCPECTM),
    "stdm_dense": variant("stdm_dense", STDM=DenseSTDM),
    "stdm_bottleneck": variant("stdm_bottleneck", STDM=BottleneckSTDM),
    "stdm_before_smem": variant("stdm_before_smem", STDMBeforeSMEMFormer),
    "smem_gate": variant("smem_gate", SMEM=GatedSMEM),
    "smem_unit": variant("smem_unit", SMEM=UnitSMEM),
    "smem_relu": variant("smem_relu", SMEM=ReluSMEM),
    "smem_unit_relu": variant("smem_unit_relu", SMEM=UnitReluSMEM),
    "smem_window": variant("smem_window", SMEM=WindowSMEM),
    "head_fused": variant("head_fused", FusedFormer),
    "no_cpe": variant("no_cpe", CTM=NoCPECTM),
    "ctm_values": variant("ctm_values", CTM=ValuesCTM),
    "bn_frozen": variant("bn_frozen", FrozenBNFormer),
    "shuffle_tokens": ShuffledTokensFormer,
}

def main(argv):
    programs = dict(train=train, evaluate=evaluate, visualize=visualize, describe=describe)
    if len(argv) < 2 or argv[0] not in VARIANTS or argv[1] not in programs:
        usage = f"python scripts/variants.py {'|'.join(VARIANTS)} {'|'.join(programs)} FLAGS"
        sys.exit(f"usage: {usage}\n\n{__doc__}")
    name, program, *flags = argv
    Model = VARIANTS[name]
    if program in ("visualize", "describe") and not issubclass(Model, STDFormer):
        raise ValueError(f"{program} shows the modules of STD-Former, and {name} has none of them")
    programs[program].main(flags, Model)

if __name__ == "__main__":
    evaluate.run_command(lambda: main(sys.argv[1:]))
