"""STD-Former, the spatio-temporal diffusion transformer for action recognition. All modules.

Paper: "Spatio-Temporal Diffusion Transformer for Action Recognition" (anonymous, under review,
OpenReview ICR3swcnaa). Where it is silent we follow UniFormerV2 (Li et al., ICCV 2023) or take
the plainest choice that trains. docs/readings.md lists every such choice.

Letters of the docstrings, and of data.py (elsewhere F is torch.nn.functional)
    B clips       F input frames   S x S pixels of a frame    D width     L layers
    T token frames (F / stride of the stem)    H x W patch grid    N = H * W patches per frame
    video (B, 3, F, S, S)      x (B, T, 1+N, D)  spatio-temporal tokens, class token first
                               y (B, T, H, W, D)  temporal tokens, no class token

Figure 1 in code (STDFormer.forward_features). One of L layers; only some have SMEM and STDM:

    video -- stem --+-- x --[ Block or PTM ]--[ SMEM ]--+-----------(+)-- x   spatio-temporal branch
                    |                        (Table 6)  | query       ^
                    |                                   v             | STDM
                    +-- y ----------- memory --------[ CTM ]--[ SMEM ]+-- y   temporal branch

    logits = head(LN(mean of the last y over T, H and W))
"""
import math
import pickle
import zipfile
from dataclasses import dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute
from torchvision.ops import StochasticDepth

# ----- Configuration --------------------------------------------------------

def option(default, help, choices=None):
    """A field of ModelConfig, with the help text and the choices of its flag."""
    help += f": {', '.join(choices)}" if choices else ""
    return field(default=default, metadata=dict(help=help, choices=choices))

@dataclass
class ModelConfig:
    """Everything that defines a model. It can express each row of Tables 2 to 7 that we know.

    Positions count layers from 0, as the paper does. () means nowhere. None means the paper's best,
    scaled to the depth (for STDM, all it can have). ValueError names a field with a wrong value.
    """
    num_classes: int = option(174, "classes; train.py takes them from the data")
    num_frames: int = option(16, "frames per clip; 32 take twice the time of 16")
    image_size: int = option(224, "pixels of a frame; a multiple of the patch size")
    patch_size: int = option(16, "pixels of a patch; CLIP's weights fix it")
    stem_stride: int = option(2, "input frames per token frame; 1 doubles the cost")
    stem_kernel: int = option(3, "frames that the stem's convolution sees; an odd number")
    dim: int = option(768, "width")
    depth: int = option(12, "layers of each branch")
    heads: int = option(12, "attention heads; a divisor of the width")
    ptm_layers: tuple = option(None, "positions of PTM (Table 5); default: the last third")
    ptm_conv: str = option("residual2d", "place and kind of PTM's convolution (Table 3)",
                           ("residual2d", "residual3d", "attention2d", "attention3d"))
    alpha: float = option(1.0, "weight of the FFN in Eq. 1 (Table 7)")
    beta: float = option(1.0, "weight of the convolution in Eq. 1 (Table 7)")
    learn_fusion: bool = option(True, "learn alpha and beta, starting from these values")
    stdm_layers: tuple = option(None, "layers that feed y back into x; default: all but the last")
    smem_t_layers: tuple = option(None, "SMEM in the T-branch (Table 6); default: L // 3")
    smem_st_layers: tuple = option(None, "SMEM in the ST-branch (Table 6); default: nowhere")
    smem_fusion: str = option("mul", "how SMEM compares (Table 4)", ("mul", "add", "mul+add"))
    smem_grid: int = option(None, "patches per side SMEM is built for; default: those of a frame")
    drop_path: float = option(0.0, "stochastic depth of the ST-branch, at its last layer")
    ctm_drop_path: float = option(0.0, "stochastic depth of the CTMs, at the last one")
    ctm_dropout: float = option(0.0, "dropout in the FFN of the CTMs")
    head_dropout: float = option(0.0, "dropout before the classifier")

    def __post_init__(self):
        last, third = self.depth - 1, self.depth // 3
        best = dict(ptm_layers=range(self.depth - third, self.depth), stdm_layers=range(last),
                    smem_t_layers=(third,), smem_st_layers=())
        for name, default in best.items():
            layers = default if getattr(self, name) is None else getattr(self, name)
            setattr(self, name, tuple(sorted(set(layers))))
        if self.smem_grid is None:
            self.smem_grid = max(1, self.image_size // max(1, self.patch_size))

        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if f.type is int:
                self.require(f.name, value >= 1, "1 or more")
            elif f.type is tuple:
                top = last - 1 if f.name == "stdm_layers" else last     # the last y has no next x
                self.require(f.name, set(value) <= {*range(top + 1)}, f"layers from 0 to {top}")
            elif choices:
                self.require(f.name, value in choices, "one of " + ", ".join(choices))
            elif f.name.endswith(("drop_path", "dropout")):
                self.require(f.name, 0 <= value < 1, "a probability below 1")
        divisors = dict(num_frames="stem_stride", image_size="patch_size", dim="heads")
        for name, part in divisors.items():
            n = getattr(self, part)
            self.require(name, getattr(self, name) % n == 0, f"a multiple of {part}, which is {n}")
        self.require("stem_kernel", self.stem_kernel % 2 == 1, "an odd number")
        self.require("num_frames", self.num_frames > self.stem_stride, "two token frames or more")

    def require(self, name, fine, expected):
        if not fine:
            raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")

MODELS = {
    "b16": dict(dim=768, depth=12, heads=12, patch_size=16, image_size=224),    # CLIP ViT-B/16
    "l14": dict(dim=1024, depth=24, heads=16, patch_size=14, image_size=224),   # CLIP ViT-L/14
    "tiny": dict(dim=64, depth=4, heads=4, patch_size=8, image_size=32),        # for a laptop
}

def model_config(args, num_classes=174, base=None):
    """The ModelConfig that the flags describe. base: fields of the model to start from."""
    flags = {f.name: getattr(args, f.name) for f in fields(ModelConfig)[1:]}
    given = {name: value for name, value in flags.items() if value is not None}
    return ModelConfig(**{**(base or MODELS[args.model]), **given, "num_classes": num_classes})

# ----- Shared pieces --------------------------------------------------------

def conv_tokens(conv, x):
    """Run a convolution or BatchNorm over channel-last tokens: (B, ..., C)"""
    return conv(x.movedim(-1, 1)).movedim(1, -1)

class Attention(nn.Module):
    """Multi-head self-attention (MHA), with CLIP's parameter names. x: (B, n, D) -> (B, n, D)."""
    output_layer = "out_proj"

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        nn.init.trunc_normal_(self.in_proj_weight, std=dim ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, n, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)               # (B, n, 3D)
        qkv = qkv.view(B, n, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv                                                   # (B, heads, n, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).reshape(B, n, D))

class MLP(nn.Module):
    """Feed-forward network (FFN), with CLIP's parameter names. x: (..., D) -> (..., D)."""
    output_layer = "c_proj"

    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.dropout = nn.Dropout(dropout)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x):
        z = self.c_fc(x)
        z = F.silu(1.702 * z) / 1.702           # CLIP's QuickGELU, which is z * sigmoid(1.702 z)
        return self.c_proj(self.dropout(z))

class Block(nn.Module):
    """CLIP's transformer block, frame by frame: what is where in this frame?

    The paper's "conventional transformer module" (section 4.4, appendix A), where no PTM stands.
        x = x + MHA(LN x);  x = x + FFN(LN x)
    x: (B, T, 1+N, D) -> (B, T, 1+N, D)
    """

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x, grid=None):            # PTM needs the grid, a Block does not
        frames = self.ln_1(x).flatten(0, 1)     # (B*T, 1+N, D): a frame sees only itself
        x = x + self.drop_path(self.attn(frames).view_as(x))
        return x + self.drop_path(self.mlp(self.ln_2(x)))

def zero_output(module):
    """Let a module add nothing at first. Its output_layer names a layer with weight and bias."""
    last = getattr(module, module.output_layer)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)

# ----- Section 3.2: parallel transformer module -----------------------------

class DPE(nn.Module):
    """Dynamic position encoding: what is at this place one frame before, and one frame after?

    Section 3.2, Fig. 2: "depthwise separable" 1x1x1, 3x1x1 and 1x1x1 convolutions. UniFormerV2
    has the same three in its local MHRA. We take the rest from there, since the paper does not
    say: BatchNorm first, width D/1.5 between them, no activation. The 3x1x1 is depthwise.
    patches: (B, T, N, D) -> (B, T, N, D)
    """
    output_layer = "expand"

    def __init__(self, dim):
        super().__init__()
        width = 2 * dim // 3
        self.bn = nn.BatchNorm2d(dim)
        self.reduce = nn.Linear(dim, width)     # on tokens, a Linear layer is a 1x1x1 convolution
        self.conv = nn.Conv2d(width, width, (3, 1), padding=(1, 0), groups=width)       # on (T, N)
        self.expand = nn.Linear(width, dim)

    def forward(self, patches):
        z = self.reduce(conv_tokens(self.bn, patches))                          # (B, T, N, D/1.5)
        return self.expand(conv_tokens(self.conv, z))

class PTMConv(nn.Module):
    """PTM's convolution path, "2D Conv": what changes from one frame to the next around here?

    Section 3.2, Fig. 2: 1x1, 3x3 and 1x1 convolutions that extract "temporal feature from adjacent
    frames". So the 3x3 runs on the plane (T, H*W), whose rows are frames. Table 3 also tries 3D; we
    take 1x1x1, 3x3x3 and 1x1x1 (dims=3). The width between is not given either; we take D/4.
    patches: (B, T, N, D) -> (B, T, N, D), grid: (H, W) with H*W = N
    """
    output_layer = "expand"

    def __init__(self, dim, dims=2):
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.dims = dims
        self.reduce = nn.Linear(dim, dim // 4)
        self.conv = conv(dim // 4, dim // 4, 3, padding=1)
        self.expand = nn.Linear(dim // 4, dim)

    def forward(self, patches, grid):
        z = self.reduce(patches)                                                # (B, T, N, D/4)
        if self.dims == 3:
            z = z.unflatten(2, grid)                                            # (B, T, H, W, D/4)
        z = conv_tokens(self.conv, z).reshape(*patches.shape[:3], -1)           # (B, T, N, D/4)
        return self.expand(z)

class PTM(nn.Module):
    """Parallel transformer module: attention, FFN and a convolution look at the same tokens.

    Section 3.2, Fig. 2, Eq. 1. The residual connection is from Table 3 and section 4.5:
        x = x + DPE(x)
        y1 = MHA(LN x),  y2 = FFN(LN x),  y3 = Conv(x)
        x = x + y1 + alpha y2 + beta y3
    MHA and FFN take CLIP's weights. The class token takes no part in DPE and Conv.

    conv            Table 3. "residual2d" is the above, "residual3d" has a 3D convolution.
                    "attention2d" and "attention3d" convolve after attention: y3 = Conv(y1)
    alpha, beta     1.0 is best in Table 7. Learned from there on, unless learn_fusion is False
    x: (B, T, 1+N, D) -> (B, T, 1+N, D), grid: (H, W) with H*W = N
    """

    def __init__(self, dim, heads, conv="residual2d", alpha=1.0, beta=1.0, learn_fusion=True,
                 drop_path=0.0):
        super().__init__()
        self.dpe = DPE(dim)
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)
        self.conv = PTMConv(dim, dims=3 if conv.endswith("3d") else 2)
        self.conv_after_attention = conv.startswith("attention")
        self.alpha = nn.Parameter(torch.tensor(float(alpha))) if learn_fusion else alpha
        self.beta = nn.Parameter(torch.tensor(float(beta))) if learn_fusion else beta
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x, grid):
        z = self.dpe(x[:, :, 1:])
        x = x + self.drop_path(F.pad(z, (0, 0, 1, 0)))                          # class token: + 0
        y1 = self.attn(self.ln_1(x).flatten(0, 1)).view_as(x)
        y2 = self.mlp(self.ln_2(x))
        z = y1 if self.conv_after_attention else x
        y3 = F.pad(self.conv(z[:, :, 1:], grid), (0, 0, 1, 0))
        return x + self.drop_path(y1 + self.alpha * y2 + self.beta * y3)        # Eq. 1

# ----- Section 3.3: cross transformer module --------------------------------

class CPE(nn.Module):
    """Convolutional position encoding: a 3x3x3 convolution tells each token its surroundings.

    Section 3.3, Fig. 3. We make it depthwise, as conditional position encodings are (Chu et al.,
    2021) and UniFormerV2's is. A dense one would add 190 M parameters to b16.
    y: (B, T, H, W, D) -> (B, T, H, W, D)
    """

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, y):
        # Depthwise 3D convolutions are slow, so run the kernel's three frames in 2D, one by one.
        taps = []
        for k, weight in enumerate(self.conv.weight.unbind(2)):                 # (D, 1, 3, 3)
            z = y.flatten(0, 1).movedim(-1, 1)                                  # (B*T, D, H, W)
            bias = self.conv.bias if k == 1 else None
            z = F.conv2d(z, weight, bias, padding=1, groups=y.shape[-1])
            z = z.movedim(1, -1).reshape(y.shape)
            # Frame k of the kernel reads frame t+k-1, so shift along T: pad one end, cut the other.
            taps.append(F.pad(z, (0, 0, 0, 0, 0, 0, 1 - k, k - 1)))
        return taps[0] + taps[1] + taps[2]

class CTM(nn.Module):
    """Cross transformer module: what happened over time, at this place of the picture?

    Section 3.3, Fig. 3. The query comes from this layer's x, key and value from the y of the layer
    before. Attention runs over the T frames, separately at each of the N places:
        y = y + CPE(y)
        z = x + CMHA(LN x, LN y)
        y = z + FFN(LN z)
    Our copy of the paper breaks off before it says where a residual connection is. We put it on the
    query. So x, with CLIP's features, reaches the classifier directly, and the y of the layer
    before only through attention. out_proj must not start at zero. From CLIP, STDM does
    (load_clip). If both did, the first step would send no gradient to the CTMs below.
    x, y: (B, T, H, W, D) -> y: (B, T, H, W, D)
    """
    output_layer = "out_proj"

    def __init__(self, dim, heads, dropout=0.0, drop_path=0.0):
        super().__init__()
        self.heads = heads
        self.cpe = CPE(dim)
        self.ln_q = nn.LayerNorm(dim)
        self.ln_kv = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        # No bias: on k it cancels in the softmax, on v out_proj's bias already covers it.
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, dropout)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x, y):
        y = y + self.cpe(y)
        z = x + self.drop_path(self.cross_attention(self.ln_q(x), self.ln_kv(y)))
        return z + self.drop_path(self.mlp(self.ln_2(z)))

    def cross_attention(self, x, y):
        """CMHA. These are many small T x T problems, for which a fused kernel does not pay."""
        B, T, H, W, D = x.shape
        k, v = self.kv(y).chunk(2, dim=-1)
        shape = (B, T, H * W * self.heads, D // self.heads)
        q, k, v = (z.reshape(shape).transpose(1, 2) for z in (self.q(x), k, v))
        q = q * shape[-1] ** -0.5                                       # (B, N*heads, T, D/heads)
        z = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out_proj(z.transpose(1, 2).reshape(B, T, H, W, D))

# ----- Section 3.4: spatio-temporal diffusion module ------------------------

class STDM(nn.Module):
    """Spatio-temporal diffusion module: what y knows spreads to its surroundings and into x.

    Section 3.4, Fig. 4: 1x3x3, 3x1x1 and 1x1x1 convolutions with BatchNorm between them and ReLU.
    The first two are depthwise here, the last one mixes the channels. There is no ReLU after it:
    if it starts at zero (load_clip), a ReLU would never let a gradient through.
    y: (B, T, H, W, D) -> (B, T, H, W, D)
    """
    output_layer = "pointwise"

    def __init__(self, dim):
        super().__init__()
        self.conv_s = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)             # 1x3x3
        self.bn_s = nn.BatchNorm2d(dim)
        self.conv_t = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0), groups=dim, bias=False)   # 3x1x1
        self.bn_t = nn.BatchNorm2d(dim)
        self.pointwise = nn.Linear(dim, dim)                                                # 1x1x1

    def forward(self, y):
        B, T, H, W, D = y.shape
        z = conv_tokens(self.conv_s, y.flatten(0, 1))                           # (B*T, H, W, D)
        z = F.relu(conv_tokens(self.bn_s, z))
        z = conv_tokens(self.conv_t, z.reshape(B, T, H * W, D))                 # (B, T, N, D)
        z = F.relu(conv_tokens(self.bn_t, z))
        return self.pointwise(z).view(B, T, H, W, D)

# ----- Section 3.5: salient motion excitation module ------------------------

class SMEM(nn.Module):
    """Salient motion excitation module: which place of the next frame resembles this place?

    Section 3.5, Fig. 5: a 3x3 convolution, the correlation of each frame with the next one, three
    3x3 convolutions with BatchNorm and ReLU (the first halves the resolution), a 3x3 convolution,
    upsampling. The result is added to the input. The correlation of frame t is a map: its pixels
    are the places of frame t, its channels are the places of frame t+1. The last map is repeated,
    so that there are T. The widths D/8 and D/4 and the scale 1/sqrt(D/8) are ours.

    grid     (H, W) that it is built for. Features of another grid are resized to it first
    fusion   Table 4, for places i and j. "mul": sum_c a_ic b_jc, "add": sum_c (a_ic + b_jc),
             "mul+add": their sum
    y: (B, T, H, W, D) -> (B, T, H, W, D), for T >= 2
    """
    output_layer = "conv_out"

    def __init__(self, dim, grid, fusion="mul"):
        super().__init__()
        self.grid, self.fusion = tuple(grid), fusion
        N, width = self.grid[0] * self.grid[1], dim // 4
        self.conv_in = nn.Conv2d(dim, dim // 8, 3, padding=1)
        self.stages = nn.Sequential()
        for channels, stride in (N, 2), (width, 1), (width, 1):
            conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
            self.stages.extend([conv, nn.BatchNorm2d(width), nn.ReLU()])
        self.conv_out = nn.Conv2d(width, dim, 3, padding=1)

    def correlation(self, f):
        """Compare each place of a frame with each of the next. f: (B, T, N, C) -> (B, T-1, N, N)"""
        a, b, scale = f[:, :-1], f[:, 1:], f.shape[-1] ** -0.5
        mul = add = 0
        if "mul" in self.fusion:
            mul = (a * scale) @ b.transpose(-2, -1)     # scaled first, or float16 would overflow
        if "add" in self.fusion:
            add = scale * (a.sum(-1)[..., :, None] + b.sum(-1)[..., None, :])
        return mul + add

    def forward(self, y):
        B, T, H, W, D = y.shape
        if T == 1:
            raise ValueError("SMEM compares neighbouring token frames, but got only one: take a "
                             "larger --num_frames")
        f = self.conv_in(y.flatten(0, 1).movedim(-1, 1))                        # (B*T, D/8, H, W)
        if (H, W) != self.grid:
            f = F.interpolate(f, self.grid, mode="bilinear")
        f = f.flatten(2).transpose(1, 2).unflatten(0, (B, T))                   # (B, T, N, D/8)
        c = self.correlation(f)
        c = torch.cat([c, c[:, -1:]], dim=1)                                    # (B, T, N, N)
        c = c.flatten(0, 1).unflatten(1, self.grid).movedim(-1, 1)              # (B*T, N, *grid)
        motion = self.conv_out(self.stages(c))                          # (B*T, D, half the grid)
        motion = F.interpolate(motion, (H, W), mode="bilinear")
        return y + motion.movedim(1, -1).unflatten(0, (B, T))

# ----- Figure 1: the whole model --------------------------------------------

class STDFormer(nn.Module):
    """The two branches of Figure 1 (section 3.1): video (B, 3, F, S, S) -> logits (B, num_classes)

    The video comes from data.normalize. F is a multiple of the stem's stride, twice it or more. S
    is a multiple of the patch size. Both may differ from training. x attends within a frame: time
    enters it only through the stem, PTM's DPE and convolution, STDM and the ST-branch's SMEM.
    Layer i has blocks[i] (a Block or a PTM), ctm[i], stdm[i], smem_t[i] and smem_st[i]. An absent
    STDM or SMEM is an nn.Identity. With checkpointing = True, Blocks and CTMs are computed again in
    the backward pass, which takes less memory and more time.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.checkpointing = False
        side = c.image_size // c.patch_size
        self.grid = (side, side)
        kernel, stride, patch = c.stem_kernel, c.stem_stride, c.patch_size
        self.conv1 = nn.Conv3d(3, c.dim, (kernel, patch, patch), (stride, patch, patch),
                               padding=(kernel // 2, 0, 0), bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(c.dim))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + side * side, c.dim))
        self.ln_pre = nn.LayerNorm(c.dim)

        self.blocks = nn.ModuleList()
        for i in range(c.depth):                # stochastic depth rises from layer to layer
            p = c.drop_path * i / max(1, c.depth - 1)
            if i in c.ptm_layers:
                block = PTM(c.dim, c.heads, c.ptm_conv, c.alpha, c.beta, c.learn_fusion, p)
            else:
                block = Block(c.dim, c.heads, p)
            self.blocks.append(block)
        self.ctm = nn.ModuleList()
        for i in range(c.depth):
            p = c.ctm_drop_path * i / max(1, c.depth - 1)
            self.ctm.append(CTM(c.dim, c.heads, c.ctm_dropout, p))
        self.stdm = self.at(c.stdm_layers, lambda: STDM(c.dim))
        grid = (c.smem_grid, c.smem_grid)
        self.smem_t = self.at(c.smem_t_layers, lambda: SMEM(c.dim, grid, c.smem_fusion))
        self.smem_st = self.at(c.smem_st_layers, lambda: SMEM(c.dim, grid, c.smem_fusion))

        self.ln_post = nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.head_dropout)
        self.head = nn.Linear(c.dim, c.num_classes)
        self.init_weights()

    def at(self, layers, make):
        """One module per layer: make() at these layers, nn.Identity elsewhere."""
        depth = self.config.depth
        return nn.ModuleList([make() if i in layers else nn.Identity() for i in range(depth)])

    def init_weights(self):
        """The start of all parameters. load_clip then replaces CLIP's. The paper gives none.

        every Linear layer     normal, std D^-0.5, bias 0, about as in CLIP's text tower
        ... at an output       normal, std (2 L D)^-0.5, as so many of them add to a branch
        convolutions, norms    PyTorch's
        class and positions    normal, std D^-0.5, as CLIP's
        """
        std = self.config.dim ** -0.5
        output_std = std * (2 * self.config.depth) ** -0.5
        outputs = {getattr(m, m.output_layer) for m in self.modules() if hasattr(m, "output_layer")}
        for m in self.modules():
            if isinstance(m, Attention):
                nn.init.trunc_normal_(m.in_proj_weight, std=std)
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=output_std if m in outputs else std)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.normal_(self.class_embedding, std=std)
        nn.init.normal_(self.positional_embedding, std=std)

    def stem(self, video):
        """Cut the video into tokens: (B, 3, F, S, S) -> x (B, T, 1+N, D) and the grid (H, W)."""
        frames, height, width = video.shape[2:]
        stride, patch = self.config.stem_stride, self.config.patch_size
        if height != width or height % patch or frames % stride:
            raise ValueError(f"video is {tuple(video.shape)}, expected (B, 3, F, S, S) with F a "
                             f"multiple of {stride} and S a multiple of {patch}")
        x = self.conv1(video).movedim(1, -1)                                    # (B, T, H, W, D)
        B, T, *grid = x.shape[:4]
        class_token = self.class_embedding.to(x.dtype).expand(B, T, 1, -1)
        x = torch.cat([class_token, x.flatten(2, 3)], dim=2)                    # (B, T, 1+N, D)
        z = self.ln_pre(x + resize_positions(self.positional_embedding, grid))
        # Under autocast LayerNorm returns float32. Cast back, or every later module moves twice
        # the data. Not to float16, where tokens might overflow.
        if x.dtype == torch.bfloat16:
            z = z.to(x.dtype)
        return z, tuple(grid)

    def forward_features(self, video):
        """Figure 1: video (B, 3, F, S, S) -> the last x (B, T, 1+N, D) and y (B, T, H, W, D)."""
        c = self.config
        x, grid = self.stem(video)
        y = x[:, :, 1:].unflatten(2, grid)
        for i in range(c.depth):
            x = self.run(self.blocks[i], x, grid)
            patches = x[:, :, 1:].unflatten(2, grid)                            # (B, T, H, W, D)
            if i in c.smem_st_layers:
                patches = self.smem_st[i](patches)
                x = torch.cat([x[:, :, :1], patches.flatten(2, 3)], dim=2)
            y = self.run(self.ctm[i], patches, y)
            y = self.smem_t[i](y)
            if i in c.stdm_layers:              # added to the patches; the class token gets 0
                x = x + F.pad(self.stdm[i](y).flatten(2, 3), (0, 0, 1, 0))
        return x, y

    def run(self, module, *inputs):
        """Call a module. With checkpointing, the backward pass computes its inside again."""
        # Not a PTM: computed twice, its BatchNorm would count each batch twice.
        if self.checkpointing and self.training and not isinstance(module, PTM):
            return recompute(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def forward(self, video):
        x, y = self.forward_features(video)
        return self.head(self.dropout(self.ln_post(y.mean(dim=(1, 2, 3)))))

def build_model(name="b16", **overrides):
    """One of MODELS, with any field of ModelConfig changed: build_model("b16", num_frames=32)"""
    return STDFormer(ModelConfig(**{**MODELS[name], **overrides}))

# ----- Checkpoints and CLIP's weights ---------------------------------------

def load_checkpoint(path):
    """A checkpoint of train.py, on the CPU. It loads data only, so a foreign file runs no code."""
    try:
        damaged = zipfile.ZipFile(path).testzip()       # torch.load does not compare checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError) as e:
        raise ValueError(f"{path} is no checkpoint of train.py: {e}") from e
    if damaged or "model_config" not in checkpoint:
        raise ValueError(f"{path} is damaged, or no checkpoint of train.py")
    return checkpoint

HUGGING_FACE = {                                # Hugging Face's part of a name: CLIP's
    "encoder.layers.": "blocks.", "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding", "pre_layrnorm": "ln_pre",
    "embeddings.patch_embedding": "conv1", "post_layernorm": "ln_post", "layer_norm": "ln_",
    "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj"}

def rename_hugging_face(state):
    """CLIP's names for the image tower of Hugging Face's CLIPModel or CLIPVisionModel."""
    for theirs, ours in HUGGING_FACE.items():
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    for name in [name for name in state if "q_proj" in name]:       # CLIP has these in one tensor
        qkv = [state.pop(name.replace("q_proj", p)) for p in ("q_proj", "k_proj", "v_proj")]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(qkv)
    return state

def read_clip_weights(source, dim):
    """The image tower of a CLIP checkpoint: {CLIP's name: float32 tensor}. See load_clip."""
    try:
        if source == "openai":
            import open_clip                    # only needed to download
            name = "ViT-L-14-quickgelu" if dim == 1024 else "ViT-B-16-quickgelu"
            state = open_clip.create_model(name, pretrained="openai").state_dict()
        elif str(source).endswith(".safetensors"):
            from safetensors.torch import load_file
            state = load_file(source)
        elif zipfile.is_zipfile(source) and "/code/" in str(zipfile.ZipFile(source).namelist()):
            state = torch.jit.load(source, map_location="cpu").state_dict()     # OpenAI's archives
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):     # a training checkpoint holds more than weights
            state = state.get(key, state)
    except Exception as e:                      # each library has its own
        raise ValueError(f"--clip {source} cannot be read for a model of width {dim} "
                         f"({type(e).__name__}: {e}); give a CLIP checkpoint as --clip FILE") from e
    # DDP and torch.compile (in any order), CLIP and Hugging Face put these in front.
    for prefix in ("_orig_mod.", "module.", "_orig_mod.", "visual.", "vision_model."):
        if any(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if "pre_layrnorm.weight" in state:
        state = rename_hugging_face(state)
    if not {"conv1.weight", "positional_embedding"} <= set(state):
        raise ValueError(f"--clip {source} holds {', '.join(list(state)[:3])} ..., not CLIP's "
                         "names: take OpenAI's ViT, or a file of open_clip or Hugging Face")
    state.pop("proj", None)                     # into the text space; our head replaces it
    return {k.replace("transformer.resblocks.", "blocks."): v.float() for k, v in state.items()
            if v.is_floating_point()}

def resize_positions(positions, grid):
    """Resize a position table to another grid, in 2D: (1+N, D) -> (1+H*W, D)."""
    side = math.isqrt(len(positions) - 1)       # CLIP's grids are square
    if tuple(grid) == (side, side):
        return positions
    p = positions[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]         # (1, D, side, side)
    p = F.interpolate(p, tuple(grid), mode="bicubic")[0].permute(1, 2, 0)       # (H, W, D)
    return torch.cat([positions[:1], p.flatten(0, 1)])

def require_same_shapes(source, state, expected):
    """ValueError with the tensors that only one of two state dicts has, or in another shape."""
    theirs, ours = ({k: tuple(v.shape) for k, v in d.items()} for d in (state, expected))
    problems = [f"{k}: {theirs.get(k, 'missing')}, the model's: {ours.get(k, 'missing')}"
                for k in sorted({*theirs, *ours}) if theirs.get(k) != ours.get(k)]
    if problems:
        raise ValueError("\n  ".join([f"{source} does not fit this model:", *problems]))

def is_clip_parameter(name):
    """Whether CLIP has this parameter of STDFormer. All others are new."""
    clip = ("conv1.", "class_embedding", "positional_embedding", "ln_pre.", "ln_post.", "blocks.")
    return name.startswith(clip) and not {"dpe", "conv", "alpha", "beta"} & set(name.split("."))

def load_clip(model, source):
    """Start from CLIP: copy its image tower and silence every new path that adds to x.

    Section 4.2 says that training starts from CLIP, not how. The centre frame of the stem's kernel
    is CLIP's patch embedding, the others are 0 (as in ViViT, Arnab et al., 2021). So at stride 2,
    only every other frame counts at first. DPE, PTM's convolution, STDM and the ST-branch's SMEM
    add 0 at first. So x is what CLIP makes of single frames, except that a PTM runs CLIP's
    attention and FFN side by side. CTM, the T-branch's SMEM and the head start at random.
    source: "openai" downloads with open_clip. Otherwise a file: OpenAI's .pt, or a checkpoint of
    open_clip or Hugging Face (.pt, .bin, .safetensors). Its model must be trained with QuickGELU,
    as OpenAI's are. Loading OpenAI's .pt can run code from the file; the others cannot.
    Returns how many tensors were loaded and how many are new. ValueError says what does not fit.
    """
    state = read_clip_weights(source, model.config.dim)
    pad = model.config.stem_kernel // 2
    state["conv1.weight"] = F.pad(state["conv1.weight"][:, :, None], (0, 0, 0, 0, pad, pad))
    state["positional_embedding"] = resize_positions(state["positional_embedding"], model.grid)

    expected = {k: v for k, v in model.state_dict().items() if is_clip_parameter(k)}
    require_same_shapes(f"--clip {source}", state, expected)
    model.load_state_dict(state, strict=False)
    for i in model.config.ptm_layers:
        zero_output(model.blocks[i].dpe)
        zero_output(model.blocks[i].conv)
    for i in model.config.stdm_layers:
        zero_output(model.stdm[i])
    for i in model.config.smem_st_layers:
        zero_output(model.smem_st[i])
    return len(expected), len(list(model.parameters())) - len(expected)
