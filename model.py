"""STD-Former, the spatio-temporal diffusion transformer for action recognition: all its modules.

Paper: "Spatio-Temporal Diffusion Transformer for Action Recognition" (anonymous, under review,
OpenReview ICR3swcnaa). Where it is silent we follow UniFormerV2 (Li et al., ICCV 2023), its likely
base, or make the plainest choice that trains. docs/readings.md lists these choices.

Letters in the shapes
    B clips       F frames of a clip   S x S pixels of a frame    D width     L layers
    T token frames (F / stride of the stem)    H x W patch grid    N = H * W patches per frame
    video (B, 3, F, S, S)      x (B, T, 1+N, D)  spatio-temporal tokens, class token first
                               y (B, T, H, W, D)  temporal tokens, no class token

Figure 1 in code (STDFormer.forward_features). One of L layers; only some have SMEM and STDM:

    video -- stem --+-- x --[ Block or PTM ]--[ SMEM ]--+-----------(+)-- x   spatio-temporal branch
                    |                        (Table 6)  | query       ^
                    |                                   v             | STDM
                    +-- y --------- key, value ------[ CTM ]--[ SMEM ]+-- y   temporal branch

    logits = head(LN(mean of the last y over T, H and W))       (3.1; section 5 fuses both branches)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute
from torchvision.ops import StochasticDepth

# ----- Configuration --------------------------------------------------------

@dataclass
class ModelConfig:
    """Everything that defines a model.

    It covers each row of Tables 2 to 7 that can be read in our copy of the paper.
    Layers are counted from 0, as in the paper. An empty tuple means no layer. None means the
    default in the field's comment. For PTM and SMEM it is the paper's best row, scaled to the
    depth. ValueError names a field with a wrong value.
    """
    num_classes: int = 174
    num_frames: int = 16            # F
    image_size: int = 224           # S
    patch_size: int = 16            # CLIP's weights fix it
    stem_stride: int = 2            # frames per token frame
    stem_kernel: int = 3            # frames that the stem's convolution sees
    dim: int = 768                  # D
    depth: int = 12                 # L
    heads: int = 12
    ptm_layers: tuple = None        # layers with a PTM (Table 5); None: the last L // 3
    ptm_conv: str = "residual2d"    # PTM's convolution (Table 3): residual2d, residual3d, ...
    alpha: float = 1.0              # weight of the FFN in Eq. 1 (Table 7)
    beta: float = 1.0               # weight of the convolution in Eq. 1 (Table 7)
    learn_fusion: bool = True       # alpha and beta are learned, starting from these values
    stdm_layers: tuple = None       # layers whose y is added to x; None: all but the last
    smem_t_layers: tuple = None     # SMEM in the temporal branch (Table 6); None: layer L // 3
    smem_st_layers: tuple = ()      # SMEM in the spatio-temporal branch (Table 6)
    smem_fusion: str = "mul"        # how SMEM compares two patches (Table 4): mul, add, mul+add
    smem_grid: int = None           # patches per side that SMEM is built for; None: S / patch_size
    drop_path: float = 0.0          # stochastic depth of Blocks and PTMs, rising from 0 to this
    ctm_drop_path: float = 0.0      # stochastic depth of the CTMs, rising from 0 to this
    ctm_dropout: float = 0.0        # dropout in the FFN of the CTMs
    head_dropout: float = 0.0       # dropout before the classifier

    def __post_init__(self):
        if self.ptm_layers is None:
            self.ptm_layers = range(self.depth - self.depth // 3, self.depth)
        if self.stdm_layers is None:
            self.stdm_layers = range(self.depth - 1)
        if self.smem_t_layers is None:
            self.smem_t_layers = [self.depth // 3]
        if self.smem_grid is None:
            self.smem_grid = self.image_size // self.patch_size
        self.ptm_layers = tuple(self.ptm_layers)
        self.stdm_layers = tuple(self.stdm_layers)
        self.smem_t_layers = tuple(self.smem_t_layers)
        self.smem_st_layers = tuple(self.smem_st_layers)

        if self.dim % self.heads:
            raise ValueError(f"dim is {self.dim}, expected a multiple of heads, {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size is {self.image_size}, "
                             f"expected a multiple of patch_size, {self.patch_size}")
        if self.num_frames % self.stem_stride or self.num_frames < 2 * self.stem_stride:
            raise ValueError(f"num_frames is {self.num_frames}, expected a multiple of "
                             f"stem_stride, {self.stem_stride}, and at least twice that")
        if self.stem_kernel % 2 == 0:
            raise ValueError(f"stem_kernel is {self.stem_kernel}, expected an odd number")
        if self.ptm_conv not in ("residual2d", "residual3d", "attention2d", "attention3d"):
            raise ValueError(f"ptm_conv is {self.ptm_conv}, expected residual2d, residual3d, "
                             "attention2d or attention3d")
        if self.smem_fusion not in ("mul", "add", "mul+add"):
            raise ValueError(f"smem_fusion is {self.smem_fusion}, expected mul, add or mul+add")
        for name in ("ptm_layers", "stdm_layers", "smem_t_layers", "smem_st_layers"):
            # STDM feeds the x of the next layer, and the last layer has none.
            end = self.depth - 1 if name == "stdm_layers" else self.depth
            for i in getattr(self, name):
                if i not in range(end):
                    raise ValueError(f"{name} has layer {i}, expected layers below {end}")

MODELS = {
    "b16": dict(dim=768, depth=12, heads=12, patch_size=16, image_size=224),    # CLIP ViT-B/16
    "l14": dict(dim=1024, depth=24, heads=16, patch_size=14, image_size=224),   # CLIP ViT-L/14
    "tiny": dict(dim=64, depth=4, heads=4, patch_size=8, image_size=32),        # for a laptop
}

# ----- Shared pieces --------------------------------------------------------

def conv_tokens(conv, x):
    """Run a convolution or BatchNorm over channel-last tokens: (B, ..., C)

    Under DDP, give depthwise convolutions weights in channels_last, as train.py does. Otherwise DDP
    has to copy their gradients.
    """
    return conv(x.movedim(-1, 1)).movedim(1, -1)

def pad_class_token(patches):
    """A 0 for the class token, so that a sum with x leaves it alone: (.., N, D) -> (.., 1+N, D)"""
    return F.pad(patches, (0, 0, 1, 0))

class Attention(nn.Module):
    """Multi-head self-attention (MHA), with CLIP's parameter names. x: (B, n, D) -> (B, n, D)."""

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

    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.dropout = nn.Dropout(dropout)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x):
        z = self.c_fc(x)
        # CLIP's QuickGELU, z * sigmoid(1.702 z). Written with SiLU, u * sigmoid(u), it keeps one
        # tensor for the backward pass instead of two.
        z = F.silu(1.702 * z) / 1.702
        return self.c_proj(self.dropout(z))

class Block(nn.Module):
    """CLIP's transformer block, frame by frame: what is where in this frame?

    The paper's "conventional transformer module" (section 4.4, appendix A), in layers without PTM.
        x = x + MHA(LN x);  x = x + FFN(LN x)
    x: (B, T, 1+N, D) -> (B, T, 1+N, D). A Block ignores the grid; it takes one because a PTM does.
    """

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x, grid=None):
        frames = self.ln_1(x).flatten(0, 1)     # (B*T, 1+N, D): a frame sees only itself
        x = x + self.drop_path(self.attn(frames).view_as(x))
        return x + self.drop_path(self.mlp(self.ln_2(x)))

# ----- Section 3.2: parallel transformer module -----------------------------

class DPE(nn.Module):
    """Dynamic position encoding: what is at this position in the frames before and after?

    Section 3.2, Fig. 2: "depthwise separable" 1x1x1, 3x1x1 and 1x1x1 convolutions. UniFormerV2
    has the same three in its local relation aggregator (MHRA). The paper says no more, so the rest
    is from there: BatchNorm first, width D/1.5 in the middle, no activation. The 3x1x1 is
    depthwise.
    patches: (B, T, N, D) -> (B, T, N, D)
    """

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
    """PTM's convolution path, "2D Conv": what changes around here from one frame to the next?

    Section 3.2, Fig. 2: 1x1, 3x3 and 1x1 convolutions. They extract "temporal feature from adjacent
    frames" (section 4.5). So the 3x3 runs on the plane (T, H*W), whose rows are frames; this is our
    reading. Along H*W a patch has its left and right neighbours, none above or below, and at the
    end of a row the first patch of the next row. Table 3 also tries 3D; we use 1x1x1, 3x3x3 and
    1x1x1 (dims=3). The width in the middle is not given; we use D/4. The paper names no activation
    and no normalisation between the three, so there is none.
    patches: (B, T, N, D) -> (B, T, N, D), grid: (H, W) with H*W = N
    """

    def __init__(self, dim, dims=2):
        super().__init__()
        self.dims = dims
        self.reduce = nn.Linear(dim, dim // 4)
        if dims == 3:
            self.conv = nn.Conv3d(dim // 4, dim // 4, 3, padding=1)
        else:
            self.conv = nn.Conv2d(dim // 4, dim // 4, 3, padding=1)
        self.expand = nn.Linear(dim // 4, dim)

    def forward(self, patches, grid):
        z = self.reduce(patches)                                                # (B, T, N, D/4)
        if self.dims == 3:
            z = conv_tokens(self.conv, z.unflatten(2, grid)).flatten(2, 3)
        else:
            z = conv_tokens(self.conv, z)
        return self.expand(z)

class PTM(nn.Module):
    """Parallel transformer module: attention, FFN and a convolution look at the same tokens.

    Section 3.2, Fig. 2, Eq. 1. Eq. 1 has no residual connection. "x +" in the last line is our
    reading of "residual" in Table 3:
        x = x + DPE(x)
        y1 = MHA(LN x),  y2 = FFN(LN x),  y3 = Conv(x)
        x = x + y1 + alpha y2 + beta y3
    MHA and FFN take CLIP's weights. So MHA looks within a frame, where section 3.2 speaks of a
    "global spatiotemporal feature". DPE and Conv leave out the class token.

    conv            Table 3. "residual2d" is the above, "residual3d" has a 3D convolution.
                    "attention2d" and "attention3d" convolve after attention: y3 = Conv(y1)
    alpha, beta     1.0 is best in Table 7. If learn_fusion, which section 3.2 speaks of, learning
                    starts from these values
    x: (B, T, 1+N, D) -> (B, T, 1+N, D), D a multiple of heads; grid: (H, W) with H*W = N
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
        if learn_fusion:
            alpha = nn.Parameter(torch.tensor(float(alpha)))
            beta = nn.Parameter(torch.tensor(float(beta)))
        self.alpha = alpha
        self.beta = beta
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x, grid):
        x = x + self.drop_path(pad_class_token(self.dpe(x[:, :, 1:])))
        y1 = self.attn(self.ln_1(x).flatten(0, 1)).view_as(x)
        y2 = self.mlp(self.ln_2(x))
        z = y1 if self.conv_after_attention else x
        y3 = pad_class_token(self.conv(z[:, :, 1:], grid))
        return x + self.drop_path(y1 + self.alpha * y2 + self.beta * y3)        # Eq. 1

# ----- Section 3.3: cross transformer module --------------------------------

class CPE(nn.Module):
    """Convolutional position encoding: what is around each token, in space and time?

    Section 3.3, Fig. 3: a 3x3x3 convolution. Ours is depthwise, as conditional position encodings
    (Chu et al., 2021) and UniFormerV2's are. A dense one would add 190 M parameters to b16.
    y: (B, T, H, W, D) -> (B, T, H, W, D)
    """

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, y):
        # The same as conv_tokens(self.conv, y), as a sum over the kernel's three frames. On a CPU,
        # PyTorch's depthwise Conv3d takes about twice as long to train. A GPU was never tried.
        taps = []
        for k, weight in enumerate(self.conv.weight.unbind(2)):                 # (D, 1, 3, 3)
            frames = y.flatten(0, 1).movedim(-1, 1)                             # (B*T, D, H, W)
            bias = self.conv.bias if k == 1 else None
            z = F.conv2d(frames, weight, bias, padding=1, groups=y.shape[-1])
            z = z.movedim(1, -1).reshape(y.shape)
            # Frame k of the kernel reads frame t+k-1, so shift along T: pad one end, cut the other.
            taps.append(F.pad(z, (0, 0, 0, 0, 0, 0, 1 - k, k - 1)))
        return taps[0] + taps[1] + taps[2]

class CTM(nn.Module):
    """Cross transformer module: what happened over time at this position?

    Section 3.3, Fig. 3. The query comes from this layer's x, key and value from the y of the layer
    before. Attention runs over the T frames, separately at each of the N positions:
        y = y + CPE(y)
        z = x + CMHA(LN x, LN y)
        y = z + FFN(LN z)
    Our copy of section 3.3 breaks off before it tells of a residual connection. Ours is on the
    query, so CLIP's features in x reach the classifier directly. UniFormerV2's Extractor has it on
    the query, too, but its query is the stream that passes from layer to layer, as our y does.
    UniFormerV2 starts out_proj and the last layer of the FFN at zero, ours start at random. On the
    toy it makes little difference (docs/readings.md).
    x, y: (B, T, H, W, D) -> y: (B, T, H, W, D), D a multiple of heads
    """

    def __init__(self, dim, heads, dropout=0.0, drop_path=0.0):
        super().__init__()
        self.heads = heads
        self.cpe = CPE(dim)
        self.ln_q = nn.LayerNorm(dim)
        self.ln_kv = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        # No bias: on k it would cancel in the softmax; on v, out_proj's bias has the same effect.
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
        """CMHA. Each position and head is a small T x T problem of its own. So positions and heads
        share one axis, N*heads, and the attention is written out.
        """
        B, T, H, W, D = x.shape
        k, v = self.kv(y).chunk(2, dim=-1)
        shape = (B, T, H * W * self.heads, D // self.heads)
        q = self.q(x).reshape(shape).transpose(1, 2)                    # (B, N*heads, T, D/heads)
        k = k.reshape(shape).transpose(1, 2)
        v = v.reshape(shape).transpose(1, 2)
        q = q * (D // self.heads) ** -0.5
        z = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out_proj(z.transpose(1, 2).reshape(B, T, H, W, D))

# ----- Section 3.4: spatio-temporal diffusion module ------------------------

class STDM(nn.Module):
    """Spatio-temporal diffusion module: what y knows spreads to its surroundings and into x.

    Section 3.4, Fig. 4: 1x3x3, 3x1x1 and 1x1x1 convolutions with BatchNorm between them and ReLU.
    In ours the first two are depthwise and the last one mixes the channels. No ReLU follows the
    last one: load_clip sets its weights to zero, and a ReLU would never let a gradient through.
    y: (B, T, H, W, D) -> (B, T, H, W, D)
    """

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
    """Salient motion excitation module: which patch of the next frame resembles this patch?

    Section 3.5, Fig. 5: a 3x3 convolution, the correlation of each frame with the next one, three
    3x3 convolutions with BatchNorm and ReLU (the first halves the resolution), a 3x3 convolution,
    upsampling. The result is added to the input. The correlation of frame t is a map whose pixels
    are the patches of frame t and whose channels are the patches of frame t+1. The last map is
    repeated to give T maps. The paper does not say that; the ReLU, the addition, where to halve the
    resolution, the widths D/8 and D/4 and the scale 1/sqrt(D/8) are our choices, too.

    grid     (H, W) that the module is built for. Features of another grid are first resized to it
    fusion   Table 4, for patches i and j. "mul": sum_c a_ic b_jc, "add": sum_c (a_ic + b_jc),
             "mul+add": their sum
    y: (B, T, H, W, D) -> (B, T, H, W, D), D at least 8. ValueError if T is 1: there is no next
    frame.
    """

    def __init__(self, dim, grid, fusion="mul"):
        super().__init__()
        self.grid = tuple(grid)
        self.fusion = fusion
        N = self.grid[0] * self.grid[1]
        width = dim // 4
        self.conv_in = nn.Conv2d(dim, dim // 8, 3, padding=1)
        self.stages = nn.Sequential()
        for channels, stride in ((N, 2), (width, 1), (width, 1)):
            self.stages.append(nn.Conv2d(channels, width, 3, stride, padding=1, bias=False))
            self.stages.append(nn.BatchNorm2d(width))
            self.stages.append(nn.ReLU())
        self.conv_out = nn.Conv2d(width, dim, 3, padding=1)

    def correlation(self, f):
        """Compare each patch of a frame with each of the next. f: (B, T, N, C) -> (B, T-1, N, N)"""
        a, b = f[:, :-1], f[:, 1:]
        scale = f.shape[-1] ** -0.5
        c = 0
        if self.fusion in ("mul", "mul+add"):
            # Scaled first, which keeps the product further from float16's limit.
            c = c + (a * scale) @ b.transpose(-2, -1)
        if self.fusion in ("add", "mul+add"):
            c = c + scale * (a.sum(-1)[..., :, None] + b.sum(-1)[..., None, :])
        return c

    def forward(self, y):
        B, T, H, W, D = y.shape
        if T == 1:
            raise ValueError("SMEM compares each token frame with the next, but there is only one")
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

    The video comes from data.normalize. F is a multiple of the stem's stride, and at least twice
    it. S is a multiple of the patch size. Both may differ from training. x attends within a frame:
    time enters it only through the stem, PTM's DPE and convolution, STDM and the SMEM of its
    branch. Layer i has blocks[i] (a Block or a PTM), ctm[i], stdm[i], smem_t[i] and smem_st[i]. In
    a layer without STDM or SMEM, an nn.Identity stands in for it and is never called.

    checkpointing = True computes Blocks and CTMs again in the backward pass, to save memory.
    A subclass can set Block, PTM, CTM, STDM or SMEM to another class, as scripts/variants.py does.
    init_weights and load_clip find the last layer of each path by its name, such as STDM's
    pointwise. Keep these names, and let STDM's and PTM's stay Linear layers with a bias.
    """
    Block = Block
    PTM = PTM
    CTM = CTM
    STDM = STDM
    SMEM = SMEM

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False
        c = config
        side = c.image_size // c.patch_size
        self.grid = (side, side)
        # conv1 to ln_pre, the layers in blocks, and ln_post have the names of CLIP's image tower.
        self.conv1 = nn.Conv3d(3, c.dim, kernel_size=(c.stem_kernel, c.patch_size, c.patch_size),
                               stride=(c.stem_stride, c.patch_size, c.patch_size),
                               padding=(c.stem_kernel // 2, 0, 0), bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(c.dim))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + side * side, c.dim))
        self.ln_pre = nn.LayerNorm(c.dim)

        # Stochastic depth rises linearly, from 0 in the first layer.
        last = max(1, c.depth - 1)
        self.blocks = nn.ModuleList()
        for i in range(c.depth):
            drop_path = c.drop_path * i / last
            if i in c.ptm_layers:
                block = self.PTM(c.dim, c.heads, c.ptm_conv, c.alpha, c.beta, c.learn_fusion,
                                 drop_path)
            else:
                block = self.Block(c.dim, c.heads, drop_path)
            self.blocks.append(block)

        self.ctm = nn.ModuleList()
        for i in range(c.depth):
            self.ctm.append(self.CTM(c.dim, c.heads, c.ctm_dropout, c.ctm_drop_path * i / last))

        self.stdm = nn.ModuleList()
        for i in range(c.depth):
            self.stdm.append(self.STDM(c.dim) if i in c.stdm_layers else nn.Identity())

        self.smem_t = self.make_smem(c.smem_t_layers)
        self.smem_st = self.make_smem(c.smem_st_layers)

        self.ln_post = nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.head_dropout)
        self.head = nn.Linear(c.dim, c.num_classes)
        self.init_weights()

    def make_smem(self, layers):
        """A list with an SMEM for each of these layers, and an nn.Identity for all others."""
        c = self.config
        smem = nn.ModuleList()
        for i in range(c.depth):
            if i in layers:
                smem.append(self.SMEM(c.dim, (c.smem_grid, c.smem_grid), c.smem_fusion))
            else:
                smem.append(nn.Identity())
        return smem

    def init_weights(self):
        """Initial values. The paper does not give any; load_clip then replaces those CLIP has.

        every Linear layer       truncated normal, std D^-0.5, bias 0, about as CLIP's text tower
        ... that ends a branch   the same, std (2 L D)^-0.5, since about 2 L of them add up
        convolutions, norms      PyTorch's own
        class and positions      normal, std D^-0.5, as CLIP's
        """
        std = self.config.dim ** -0.5
        output_std = std * (2 * self.config.depth) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                # The same start as in Attention, drawn a second time: to leave out one of the two
                # would change the weights of every seed.
                nn.init.trunc_normal_(module.in_proj_weight, std=std)
            if isinstance(module, nn.Linear):
                ends_branch = name.endswith(("out_proj", "c_proj", "expand", "pointwise"))
                nn.init.trunc_normal_(module.weight, std=output_std if ends_branch else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embedding, std=std)
        nn.init.normal_(self.positional_embedding, std=std)

    def stem(self, video):
        """Cut the video into tokens: (B, 3, F, S, S) -> x (B, T, 1+N, D) and the grid (H, W)."""
        num_frames, height, width = video.shape[2:]
        stride, patch = self.config.stem_stride, self.config.patch_size
        if height != width or height % patch or num_frames % stride:
            raise ValueError(f"video is {tuple(video.shape)}, expected (B, 3, F, S, S) with F a "
                             f"multiple of {stride} and S a multiple of {patch}")
        patches = self.conv1(video).movedim(1, -1)                              # (B, T, H, W, D)
        B, T, H, W, D = patches.shape
        class_token = self.class_embedding.to(patches.dtype).expand(B, T, 1, D)
        x = torch.cat([class_token, patches.flatten(2, 3)], dim=2)              # (B, T, 1+N, D)
        x = self.ln_pre(x + resize_positions(self.positional_embedding, (H, W)))
        # Under autocast LayerNorm returns float32. We cast back to bfloat16, which takes half the
        # memory. With float16 the tokens stay in float32, because they might overflow.
        if patches.dtype == torch.bfloat16:
            x = x.to(torch.bfloat16)
        return x, (H, W)

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
            if i in c.smem_t_layers:
                y = self.smem_t[i](y)
            if i in c.stdm_layers:
                x = x + pad_class_token(self.stdm[i](y).flatten(2, 3))
        return x, y

    def run(self, module, *inputs):
        """Call a module. With checkpointing, the backward pass computes its inside again."""
        # PTMs are left out: a second pass would update their BatchNorm twice.
        if self.checkpointing and self.training and not isinstance(module, self.PTM):
            return recompute(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def forward(self, video):
        _, y = self.forward_features(video)
        return self.head(self.dropout(self.ln_post(y.mean(dim=(1, 2, 3)))))

def build_model(name="b16", **overrides):
    """One of MODELS, with any field of ModelConfig changed: build_model("b16", num_frames=32)"""
    return STDFormer(ModelConfig(**{**MODELS[name], **overrides}))

# ----- Checkpoints and CLIP's weights ---------------------------------------

def load_checkpoint(path):
    """A checkpoint of train.py, on the CPU. It holds data only, so an untrusted file runs no code.

    ValueError if the file is damaged, or is not a checkpoint of train.py.
    """
    with open(path, "rb") as file:              # if it cannot be opened, the error names it
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as e:                  # pickle and torch raise many kinds
            raise ValueError(f"{path} is damaged, or not a checkpoint of train.py: {e}") from e
    if not isinstance(checkpoint, dict) or "model_config" not in checkpoint:
        raise ValueError(f"{path} has no model_config, so it is not a checkpoint of train.py")
    return checkpoint

def load_weights(model, state, source):
    """Give a model all weights of a state dict. ValueError, which names the source, if it does not
    fit.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f"{source} does not fit this model; it belongs to a model of "
                         "scripts/variants.py (then use that script), or to another version of "
                         f"model.py: {e}") from e

def resize_positions(positions, grid):
    """Resize position embeddings to another grid, in 2D: (1+N, D) -> (1+H*W, D)."""
    side = math.isqrt(len(positions) - 1)       # CLIP's grids are square
    if tuple(grid) == (side, side):
        return positions
    p = positions[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]         # (1, D, side, side)
    p = F.interpolate(p, tuple(grid), mode="bicubic")[0].permute(1, 2, 0)       # (H, W, D)
    return torch.cat([positions[:1], p.flatten(0, 1)])

def is_clip_parameter(name):
    """Whether CLIP has this parameter of STDFormer. All others are new."""
    if name.startswith("blocks."):
        return not any(part in name for part in (".dpe.", ".conv.", ".alpha", ".beta"))
    return name.startswith(("conv1.", "class_embedding", "positional_embedding", "ln_pre.",
                            "ln_post."))

def read_clip_weights(source, dim):
    """The state dict of a CLIP model: OpenAI's from the internet, or a file. See load_clip."""
    if source == "openai":
        import open_clip                        # it downloads the weights, and keeps them
        names = {768: "ViT-B-16-quickgelu", 1024: "ViT-L-14-quickgelu"}
        if dim not in names:
            raise ValueError(f"dim is {dim}, but OpenAI's models have 768 (ViT-B/16) or 1024 "
                             "(ViT-L/14)")
        name = names[dim]
        return open_clip.create_model(name, pretrained="openai").state_dict()
    if str(source).endswith(".safetensors"):
        from safetensors.torch import load_file
        return load_file(source)
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except RuntimeError:                        # OpenAI's own files are TorchScript archives
        state = torch.jit.load(source, map_location="cpu").state_dict()
    return state.get("state_dict", state)       # open_clip's training writes more than weights

HUGGING_FACE_NAMES = {                          # part of a name: the same in CLIP
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "layer_norm": "ln_", "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj",
}

def rename_hugging_face(state):
    """A state dict of Hugging Face's CLIPModel or CLIPVisionModel, with CLIP's names."""
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in HUGGING_FACE_NAMES.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for name in list(renamed):
        if "q_proj" in name:                    # CLIP has query, key and value in one tensor
            q = renamed.pop(name)
            k = renamed.pop(name.replace("q_proj", "k_proj"))
            v = renamed.pop(name.replace("q_proj", "v_proj"))
            renamed[name.replace("q_proj.", "in_proj_")] = torch.cat([q, k, v])
    return renamed

def load_clip(model, source):
    """Start from CLIP: copy its image tower and silence every new path that adds to x.

    Section 4.2 says that training starts from CLIP, but not how. The centre frame of the stem's
    kernel is CLIP's patch embedding, the others are 0 (as in UniFormerV2, and in ViViT before). So
    at stride 2, only every other frame counts at first. DPE, PTM's convolution, STDM and the SMEMs
    of the spatio-temporal branch add 0 at first. So x is what CLIP makes of single frames, except
    that a PTM runs CLIP's attention and FFN side by side. CTM, the SMEMs of the temporal branch and
    the head start at random.

    source: "openai" downloads OpenAI's weights with open_clip. Otherwise a file: OpenAI's .pt, or a
    checkpoint of open_clip or Hugging Face (.pt, .bin, .safetensors). It must have been trained
    with QuickGELU, as OpenAI's weights were. A .pt or .bin may be a TorchScript archive, as
    OpenAI's is, and loading that can run code from the file; .safetensors cannot. Returns how many
    tensors were loaded, and how many are new. ValueError if the file cannot be read, or does not
    fit.
    """
    try:
        state = read_clip_weights(source, model.config.dim)
    except Exception as e:                      # each library has its own
        reason = f"{type(e).__name__}: {e}"
        raise ValueError(f"{source} cannot be read as CLIP weights ({reason})") from e
    if any("vision_model." in name for name in state):
        state = rename_hugging_face(state)

    clip = {}
    for name, tensor in state.items():
        name = name.removeprefix("module.")     # the prefix of DDP
        if name.startswith("visual.") and name != "visual.proj":        # our head replaces proj
            name = name.removeprefix("visual.").replace("transformer.resblocks.", "blocks.")
            clip[name] = tensor.float()
    if "conv1.weight" not in clip or "positional_embedding" not in clip:
        raise ValueError(f"{source} is not a CLIP ViT of OpenAI, open_clip or Hugging Face: it has "
                         "no visual.conv1.weight or no visual.positional_embedding")
    pad = model.config.stem_kernel // 2
    clip["conv1.weight"] = F.pad(clip["conv1.weight"][:, :, None], (0, 0, 0, 0, pad, pad))
    clip["positional_embedding"] = resize_positions(clip["positional_embedding"], model.grid)

    try:
        missing, unexpected = model.load_state_dict(clip, strict=False)
    except RuntimeError as e:                   # shapes that differ
        raise ValueError(f"{source} does not fit this model: {e}") from e
    missing = [name for name in missing if is_clip_parameter(name)]
    if missing or unexpected:
        raise ValueError(f"{source} does not fit this model: it lacks {missing}, and the model has "
                         f"no {unexpected}")

    silent = []
    for i in model.config.ptm_layers:
        silent += [model.blocks[i].dpe.expand, model.blocks[i].conv.expand]
    for i in model.config.stdm_layers:
        silent.append(model.stdm[i].pointwise)
    for i in model.config.smem_st_layers:
        silent.append(model.smem_st[i].conv_out)
    for layer in silent:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return len(clip), len(list(model.parameters())) - len(clip)
