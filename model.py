"""STD-Former: spatio-temporal diffusion transformer for action recognition, all modules in one file.

Paper: "Spatio-Temporal Diffusion Transformer for Action Recognition" (anonymous, under review,
OpenReview ICR3swcnaa). Where it is silent we follow UniFormerV2 (Li et al., ICCV 2023) or take the
plainest choice that trains; README.md, "Where the paper is silent", lists every such choice.

Letters, the same in every file
    B clips         F input frames       S x S input pixels     D width          L layers
    T token frames (F / stem stride)     H x W patch grid       N = H * W patches per frame
    video (B, 3, F, S, S)    x, ST-branch tokens (B, T, 1+N, D), class token first
                             y, T-branch tokens  (B, T, H, W, D), no class token

Figure 1 in code (STDFormer.forward_features), for each layer i

    video -- stem --+-- x --[ Block or PTM ]--[ SMEM ]--+-------------(+)-- x    spatio-temporal branch
                    |                        (Table 6)  | query         ^
                    |                                   v               | STDM
                    +-- y ----------- memory --------[ CTM ]--[ SMEM ]--+-- y    temporal branch

    logits = head(mean over T, H, W of the last y)
"""
import argparse
import copy
import math
import pickle
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------
# Configuration
# ----------------------------------------------------------------------------------------------------


def option(default, text, choices=None):
    """A ModelConfig field with the advice that `--help` prints for it and, where it has some, its choices."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class ModelConfig:
    """Everything that defines one model. Reaches every row of the paper's Tables 2 to 7.

    Positions count layers from 0, as the paper does. `None` for a set of positions means the paper's best
    one, scaled to the depth; `()` means nowhere. Impossible values raise ValueError and name the field.
    """
    num_classes: int = option(174, "classes; train.py counts them from the data")
    num_frames: int = option(16, "F, frames per clip; 32 costs twice the time of 16")
    image_size: int = option(224, "S, pixels of a (square) frame; a multiple of the patch size")
    patch_size: int = option(16, "pixels of a patch; fixed by the CLIP weights")
    stem_stride: int = option(2, "temporal stride of the stem: T = F / stride. 1 makes a token frame of every frame, at twice the cost")
    stem_kernel: int = option(3, "frames under the stem's convolution, odd; 1 looks at single frames")
    dim: int = option(768, "D, the width")
    depth: int = option(12, "L, layers of each branch")
    heads: int = option(12, "attention heads; must divide the width")
    ptm_layers: tuple = option(None, "PTM positions, the others are plain CLIP blocks (Table 5); default: the last third")
    ptm_conv: str = option("residual2d", "where PTM's convolution stands and its kind (Table 3)",
                           ("residual2d", "residual3d", "attention2d", "attention3d"))
    ptm_conv_plane: str = option("time", "PTM's 2D convolution runs on (T, H*W), or per frame on (H, W)", ("time", "space"))
    ptm_attention: str = option("space", "PTM attends within a frame, or over all T*(1+N) tokens", ("space", "spacetime"))
    ptm_shortcut: str = option("identity", "residual connection around PTM, or Eq. 1 to the letter with the convolution in its place",
                               ("identity", "conv"))
    alpha: float = option(1.0, "weight of PTM's FFN in Eq. 1 (Table 7)")
    beta: float = option(1.0, "weight of PTM's convolution in Eq. 1 (Table 7)")
    learn_fusion: bool = option(True, "learn alpha and beta from these values on; off keeps them fixed")
    ctm_residual: str = option("query", "what CTM's attention is added to", ("query", "memory", "both"))
    ctm_cpe: str = option("memory", "CPE on CTM's memory, or on its query too", ("memory", "both"))
    stdm_layers: tuple = option(None, "layers whose y is diffused into the next layer's x; default: all but the last")
    smem_layers: tuple = option(None, "SMEM positions (Table 6), in the branch of smem_branch; default: L // 3 (of 12: 4)")
    smem_branch: str = option("temporal", "branch that SMEM acts on (Table 6)", ("temporal", "spatiotemporal", "both"))
    smem_st_layers: tuple = option(None, "with smem_branch both: the positions in the ST-branch, smem_layers then being the T-branch's; default: the same")
    smem_fusion: str = option("mul", "how SMEM compares two places (Table 4)", ("mul", "add", "mul+add"))
    head: str = option("temporal", "classify y, or y fused with the ST-branch's class token", ("temporal", "fused"))
    drop_path: float = option(0.0, "stochastic depth of the ST-branch, rising to this at the last layer")
    ctm_drop_path: float = option(0.0, "stochastic depth of the CTMs, rising to this at the last layer")
    ctm_dropout: float = option(0.0, "dropout inside the CTMs' FFN")
    head_dropout: float = option(0.0, "dropout before the classifier")

    def __post_init__(self):
        def refuse(name, expected):
            raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

        for name in ("num_classes", "num_frames", "image_size", "patch_size", "stem_stride", "stem_kernel", "dim", "depth", "heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                refuse(name, "a whole number of at least 1")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                refuse(f.name, "one of " + ", ".join(f.metadata["choices"]))
            if f.type is float and not (isinstance(value, (int, float)) and math.isfinite(value)):
                refuse(f.name, "a number")
            if f.type is bool and not isinstance(value, bool):
                refuse(f.name, "True or False")
            if f.type is tuple and not (value is None or isinstance(value, (tuple, list, range)) and all(isinstance(i, int) for i in value)):
                refuse(f.name, "layer positions, such as (8, 9, 10, 11)")
        for name in ("drop_path", "ctm_drop_path", "ctm_dropout", "head_dropout"):
            if not 0 <= getattr(self, name) < 1:
                refuse(name, "a probability from 0 to below 1")
        if self.num_frames % self.stem_stride:
            refuse("num_frames", f"a multiple of stem_stride = {self.stem_stride}")
        if self.image_size % self.patch_size:
            refuse("image_size", f"a multiple of patch_size = {self.patch_size}")
        if self.stem_kernel % 2 == 0:
            refuse("stem_kernel", "an odd number, so that one frame is its centre")
        if self.ptm_shortcut == "conv" and not self.ptm_conv.startswith("residual"):
            refuse("ptm_shortcut", f"identity: with ptm_conv = {self.ptm_conv} no convolution stands beside the attention")
        if self.beta != 1 and not self.ptm_conv.startswith("residual"):
            refuse("beta", f"1: with ptm_conv = {self.ptm_conv} the convolution has no weight of its own")
        if self.ptm_conv_plane == "space" and not self.ptm_conv.endswith("2d"):
            refuse("ptm_conv_plane", f"time: with ptm_conv = {self.ptm_conv} the convolution has no plane")
        if self.dim % self.heads:
            refuse("heads", f"a divisor of dim = {self.dim}")
        if self.dim % 8:
            refuse("dim", "a multiple of 8, since SMEM reduces it eightfold")

        if self.ptm_layers is None:
            self.ptm_layers = range(self.depth - self.depth // 3, self.depth)
        if self.stdm_layers is None:
            self.stdm_layers = range(self.depth - 1)
        if self.smem_layers is None:
            self.smem_layers = (self.depth // 3,)
        if self.smem_branch != "both":
            if self.smem_st_layers:
                refuse("smem_st_layers", "nothing unless smem_branch is both (smem_layers holds the positions)")
            self.smem_st_layers = ()
        elif self.smem_st_layers is None:
            self.smem_st_layers = self.smem_layers
        for name in ("ptm_layers", "stdm_layers", "smem_layers", "smem_st_layers"):
            setattr(self, name, tuple(sorted(set(getattr(self, name)))))
            if any(i not in range(self.depth) for i in getattr(self, name)):
                refuse(name, f"positions from 0 to {self.depth - 1} (depth is {self.depth})")
        if self.depth - 1 in self.stdm_layers:
            refuse("stdm_layers", f"positions below {self.depth - 1}: behind the last layer no x is left to feed")
        if self.smem_layers + self.smem_st_layers and self.num_frames // self.stem_stride < 2:
            refuse("num_frames", f"at least {2 * self.stem_stride}: SMEM compares neighbouring token frames (or set smem_layers to nothing)")


MODELS = {
    "b16": dict(dim=768, depth=12, heads=12, patch_size=16, image_size=224),
    "l14": dict(dim=1024, depth=24, heads=16, patch_size=14, image_size=224),
    "tiny": dict(dim=64, depth=4, heads=4, patch_size=8, image_size=32),
}

# ----------------------------------------------------------------------------------------------------
# Pieces that the modules share
# ----------------------------------------------------------------------------------------------------


def conv_tokens(conv, x):
    """Run a convolution (or BatchNorm) over channel-last tokens: (B, ..., C) -> (B, ..., C').

    `movedim` only relabels strides (PyTorch's channels_last format), so no data is copied.
    """
    return conv(x.movedim(-1, 1)).movedim(1, -1)


def quick_gelu(x):
    """CLIP's activation x * sigmoid(1.702 x), through SiLU: same values, a backward pass four times as fast on a CPU."""
    return F.silu(1.702 * x) / 1.702


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): drops a residual path for whole clips. Any shape with B first."""

    def __init__(self, p=0.0):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * (keep / (1 - self.p))


class Attention(nn.Module):
    """Multi-head self-attention ("MHA"), with the parameter names of CLIP. x: (B, n, D) -> (B, n, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(3 * dim, dim), std=dim ** -0.5))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, n, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)              # (B, n, 3D)
        q, k, v = qkv.view(B, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)     # 3 x (B, heads, n, D/heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).reshape(B, n, D))


class MLP(nn.Module):
    """Feed-forward network ("FFN"), with the parameter names of CLIP. x: (..., D) -> (..., D)."""

    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.c_fc = nn.Linear(dim, 4 * dim)
        self.dropout = nn.Dropout(dropout)
        self.c_proj = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.c_proj(self.dropout(quick_gelu(self.c_fc(x))))


class Block(nn.Module):
    """CLIP's transformer block, frame by frame: where is what, in this frame?

    Paper: the "conventional transformer module" of section 4.4 and appendix A, at positions without PTM.
        x = x + MHA(LN x);  x = x + FFN(LN x)
    x: (B, T, 1+N, D) -> the same.
    """

    def __init__(self, dim, heads, drop_path=0.0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, grid=None):                    # `grid` is PTM's; a Block needs none
        y1 = self.attn(self.ln_1(x).flatten(0, 1))      # (B*T, 1+N, D): frames do not see each other
        x = x + self.drop_path(y1.view_as(x))
        return x + self.drop_path(self.mlp(self.ln_2(x)))


# ----------------------------------------------------------------------------------------------------
# Section 3.2: parallel transformer module
# ----------------------------------------------------------------------------------------------------


class DPE(nn.Module):
    """Dynamic position encoding: tells each place what stands there just before and after.

    Section 3.2, Fig. 2: 1x1x1, 3x1x1 and 1x1x1 convolutions, "depthwise separable": the 3x1x1 is depthwise. These
    are the convolutions of UniFormerV2's local MHRA, whose form we take: BatchNorm in front, width D / 1.5 between,
    no activation. The paper names neither. On tokens a 1x1x1 convolution is a Linear layer.
    patches: (B, T, N, D) -> the same.
    """

    def __init__(self, dim):
        super().__init__()
        width = 2 * dim // 3
        self.bn = nn.BatchNorm2d(dim)                                           # over the (T, N) plane
        self.reduce = nn.Linear(dim, width)
        self.conv = nn.Conv2d(width, width, (3, 1), padding=(1, 0), groups=width)
        self.expand = nn.Linear(width, dim)

    def forward(self, patches):
        return self.expand(conv_tokens(self.conv, self.reduce(conv_tokens(self.bn, patches))))


class PTMConv(nn.Module):
    """The convolution path of PTM ("2D Conv"): local change between adjacent frames.

    Section 3.2, Fig. 2: 1x1, 3x3, 1x1, giving y3, "temporal feature from adjacent frames". So the 3x3 runs on the
    (T, H*W) plane, where its rows are frames (`plane="time"`); `plane="space"` is the other reading, per frame
    on (H, W). Table 3 also tries 1x1x1, 3x3x3, 1x1x1 (`dims=3`). The width between is ours: D/4, a bottleneck.
    patches: (B, T, N, D), N = H*W with grid = (H, W) -> the same.
    """

    def __init__(self, dim, dims=2, plane="time"):
        super().__init__()
        assert dims in (2, 3) and plane in ("time", "space"), (dims, plane)
        self.dims, self.plane = dims, plane
        self.reduce = nn.Linear(dim, dim // 4)
        self.conv = (nn.Conv2d if dims == 2 else nn.Conv3d)(dim // 4, dim // 4, 3, padding=1)
        self.expand = nn.Linear(dim // 4, dim)

    def forward(self, patches, grid):
        z = self.reduce(patches)                                                # (B, T, N, D/4)
        if self.dims == 3:
            z = conv_tokens(self.conv, z.unflatten(2, grid)).flatten(2, 3)      # on (T, H, W)
        elif self.plane == "time":
            z = conv_tokens(self.conv, z)                                       # on (T, N)
        else:
            z = z.unflatten(2, grid).flatten(0, 1)                              # (B*T, H, W, D/4)
            z = conv_tokens(self.conv, z).reshape(*patches.shape[:3], -1)
        return self.expand(z)


class PTM(nn.Module):
    """Parallel transformer module: appearance, mixing and local motion, computed side by side and summed.

    Section 3.2, Fig. 2, Eq. 1:  y = y1 + alpha y2 + beta y3. With the residual connection of section 4.5:
        x = x + DPE(x)
        out = x + MHA(LN x) + alpha FFN(LN x) + beta Conv(x)
    The class token takes no part in DPE and Conv. MHA and FFN take CLIP's weights.

    dim, heads       D and the attention heads
    conv             Table 3. "residual2d" (above), "residual3d"; "attention2d", "attention3d" put the convolution
                     behind the attention, which leaves no beta: out = x + (y1 + Conv(y1)) + alpha y2
    conv_plane       plane of a 2D convolution: "time" is (T, H*W), "space" is (H, W)
    attention        "space" within a frame; "spacetime" over all T*(1+N) tokens ("modified" MHA, "global
                     spatiotemporal feature")
    shortcut         "identity" as above; "conv" reads Eq. 1 to the letter: the convolution replaces the identity
                     (for patches; the class token keeps it)
    alpha, beta      1.0 is the best of Table 7; learnable from there unless learn_fusion is False
    x: (B, T, 1+N, D), grid = (H, W) with H*W = N -> x: (B, T, 1+N, D).
    """

    def __init__(self, dim, heads, conv="residual2d", conv_plane="time", attention="space", shortcut="identity",
                 alpha=1.0, beta=1.0, learn_fusion=True, drop_path=0.0):
        super().__init__()
        assert conv in ("residual2d", "residual3d", "attention2d", "attention3d"), conv
        assert attention in ("space", "spacetime") and shortcut in ("identity", "conv"), (attention, shortcut)
        self.conv_at, self.attention, self.shortcut = conv[:-2], attention, shortcut
        self.dpe = DPE(dim)
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)
        self.conv = PTMConv(dim, dims=int(conv[-2]), plane=conv_plane)
        self.alpha = nn.Parameter(torch.tensor(float(alpha))) if learn_fusion else alpha
        self.beta = 1.0                                 # without a weight of its own: behind the attention
        if self.conv_at == "residual":
            self.beta = nn.Parameter(torch.tensor(float(beta))) if learn_fusion else beta
        self.drop_path = DropPath(drop_path if shortcut == "identity" else 0.0)     # without an identity nothing would be left

    def forward(self, x, grid):
        def on_patches(z):                              # (B, T, N, D) -> (B, T, 1+N, D): nothing for the class token
            return F.pad(z, (0, 0, 1, 0))

        x = x + self.drop_path(on_patches(self.dpe(x[:, :, 1:])))
        z = self.ln_1(x)
        y1 = self.attn(z.flatten(0, 1) if self.attention == "space" else z.flatten(1, 2)).view_as(x)
        y2 = self.mlp(self.ln_2(x))
        y3 = on_patches(self.conv((x if self.conv_at == "residual" else y1)[:, :, 1:], grid))
        y = y1 + self.alpha * y2 + self.beta * y3       # Eq. 1
        if self.shortcut == "conv":
            x = F.pad(x[:, :, :1], (0, 0, 0, x.shape[2] - 1))                   # only the class token keeps its identity
        return x + self.drop_path(y)


# ----------------------------------------------------------------------------------------------------
# Section 3.3: cross transformer module
# ----------------------------------------------------------------------------------------------------


class CPE(nn.Module):
    """Convolutional position encoding: a depthwise 3x3x3 convolution, so that each token knows its surroundings.

    Section 3.3, Fig. 3. Depthwise as in conditional position encodings (Chu et al., 2021); a full one would add
    190 M parameters to b16. y: (B, T, H, W, D) -> the same.
    """

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, y):
        # The kernel's three frames as three 2D convolutions: half the time of the 3D one, whose depthwise kernels are slow.
        def frame_tap(k, bias=None):
            z = F.conv2d(y.flatten(0, 1).movedim(-1, 1), self.conv.weight[:, :, k], bias, padding=1, groups=y.shape[-1])
            z = z.movedim(1, -1).reshape(y.shape)
            return F.pad(z, (0, 0, 0, 0, 0, 0, 1 - k, k - 1))                   # tap k adds frame t+k-1 to frame t: shift along T

        return frame_tap(0) + frame_tap(1, self.conv.bias) + frame_tap(2)


class CTM(nn.Module):
    """Cross transformer module: at this place of the picture, what happened over time?

    Section 3.3, Fig. 3. Query from this layer's ST-branch, key and value from the layer above in the T-branch;
    attention runs over the T frames, separately at each of the N places:
        y = y + CPE(y);  z = x + CMHA(LN x, LN y);  out = z + FFN(LN z)

    residual    "query" as above (CLIP's features reach the head without passing through attention weights);
                "memory": z = y + CMHA; "both": z = x + y + CMHA
    cpe         "memory" as above; "both" gives the query a CPE of its own (else it does not know its time)
    dropout     inside the FFN;  drop_path: on CMHA and on FFN
    x, y: (B, T, H, W, D) -> (B, T, H, W, D). The output projection must not start at zero: beside an STDM that does
    (load_clip), it is all that gives earlier CTMs a gradient.
    """

    def __init__(self, dim, heads, residual="query", cpe="memory", dropout=0.0, drop_path=0.0):
        super().__init__()
        assert residual in ("query", "memory", "both") and cpe in ("memory", "both"), (residual, cpe)
        self.heads, self.residual = heads, residual
        self.cpe = CPE(dim)
        self.cpe_q = CPE(dim) if cpe == "both" else None
        self.ln_q = nn.LayerNorm(dim)
        self.ln_kv = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)   # softmax cancels a bias on k; one on v equals out_proj's
        self.out_proj = nn.Linear(dim, dim)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x, y):
        if x.shape != y.shape:
            raise ValueError(f"CTM: query {tuple(x.shape)} and memory {tuple(y.shape)} must both be (B, T, H, W, D)")
        y = y + self.cpe(y)
        if self.cpe_q is not None:
            x = x + self.cpe_q(x)
        residual = {"query": x, "memory": y}[self.residual] if self.residual != "both" else x + y
        z = residual + self.drop_path(self.cross_attention(self.ln_q(x), self.ln_kv(y)))
        return z + self.drop_path(self.mlp(self.ln_2(z)))

    def cross_attention(self, x, y):
        """CMHA over time at each place: N * heads problems of T x T per clip, too small for a fused kernel (measured)."""
        B, T, H, W, D = x.shape

        def per_place(z):                               # (B, T, H, W, D) -> (B, N*heads, T, D/heads)
            return z.reshape(B, T, H * W * self.heads, D // self.heads).transpose(1, 2)

        q = per_place(self.q(x)) * (D // self.heads) ** -0.5
        k, v = map(per_place, self.kv(y).chunk(2, dim=-1))
        z = (q @ k.transpose(-2, -1)).softmax(-1) @ v                           # (B, N*heads, T, D/heads)
        return self.out_proj(z.transpose(1, 2).reshape(x.shape))


# ----------------------------------------------------------------------------------------------------
# Section 3.4: spatio-temporal diffusion module
# ----------------------------------------------------------------------------------------------------


class STDM(nn.Module):
    """Spatio-temporal diffusion module: lets what the T-branch knows seep into its neighbourhood and into the ST-branch.

    Section 3.4, Fig. 4: 1x3x3, 3x1x1 and 1x1x1 convolutions, BatchNorm between neighbours, ReLU. The first two are
    depthwise (the third mixes channels). No activation behind the last: load_clip starts it at zero, and a ReLU there
    would never get a gradient. Plug-and-play: the sum with its target is left to the caller.
    y: (B, T, H, W, D) -> the same.
    """

    def __init__(self, dim):
        super().__init__()
        self.conv_s = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)                 # 1x3x3: on (H, W)
        self.bn_s = nn.BatchNorm2d(dim)
        self.conv_t = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0), groups=dim, bias=False)       # 3x1x1: on (T, N)
        self.bn_t = nn.BatchNorm2d(dim)
        self.pointwise = nn.Linear(dim, dim)                                                    # 1x1x1

    def forward(self, y):
        B, T, H, W, D = y.shape
        z = conv_tokens(self.conv_s, y.flatten(0, 1))                           # (B*T, H, W, D)
        z = F.relu(conv_tokens(self.bn_s, z))
        z = conv_tokens(self.conv_t, z.reshape(B, T, H * W, D))                 # (B, T, N, D)
        z = F.relu(conv_tokens(self.bn_t, z))
        return self.pointwise(z).view(y.shape)


# ----------------------------------------------------------------------------------------------------
# Section 3.5: salient motion excitation module
# ----------------------------------------------------------------------------------------------------


class SMEM(nn.Module):
    """Salient motion excitation module: where did each place of this frame go in the next one?

    Section 3.5, Fig. 5. A 3x3 convolution; correlation of each frame with the next (all N x N pairs of places,
    a map whose pixels are the places of frame t and whose channels are the places of frame t+1; the last map
    repeated, so that T remain); three 3x3 convolutions with BatchNorm and ReLU, the first downsampling by 2; a 3x3
    convolution; upsampling; added to the input. Widths D/8 and D/4 and the scale 1/sqrt(D/8) are ours.

    grid      (H, W) it is built for; features of another grid are resized to it before the correlation
    fusion    Table 4, for places i, j: "mul" sum_c a_ic b_jc; "add" sum_c (a_ic + b_jc); "mul+add" their sum
    y: (B, T, H, W, D) with T >= 2 -> the same. Raises ValueError for T = 1.
    """

    def __init__(self, dim, grid, fusion="mul"):
        super().__init__()
        assert fusion in ("mul", "add", "mul+add"), fusion
        self.grid, self.fusion = tuple(grid), fusion
        N = self.grid[0] * self.grid[1]
        self.conv_in = nn.Conv2d(dim, dim // 8, 3, padding=1)
        self.stages = nn.Sequential()
        for channels, stride in (N, 2), (dim // 4, 1), (dim // 4, 1):
            self.stages.extend([nn.Conv2d(channels, dim // 4, 3, stride, padding=1, bias=False), nn.BatchNorm2d(dim // 4), nn.ReLU()])
        self.conv_out = nn.Conv2d(dim // 4, dim, 3, padding=1)

    def correlation(self, f):
        """Compare each place of a frame with each place of the next. f: (B, T, N, C) -> (B, T-1, N, N)."""
        a, b, scale = f[:, :-1], f[:, 1:], f.shape[-1] ** -0.5
        mul = add = 0
        if "mul" in self.fusion:
            mul = (a * scale) @ b.transpose(-2, -1)     # scaled first: float16 would overflow
        if "add" in self.fusion:
            add = scale * (a.sum(-1)[..., :, None] + b.sum(-1)[..., None, :])
        return mul + add

    def forward(self, y):
        B, T, H, W, D = y.shape
        if T < 2:
            raise ValueError("SMEM compares neighbouring frames: got T = 1, expected at least 2")
        f = self.conv_in(y.flatten(0, 1).movedim(-1, 1))                        # (B*T, D/8, H, W)
        if (H, W) != self.grid:
            f = F.interpolate(f, self.grid, mode="bilinear")
        c = self.correlation(f.flatten(2).transpose(1, 2).unflatten(0, (B, T)))
        c = torch.cat([c, c[:, -1:]], dim=1)                                    # (B, T, N, N)
        c = c.flatten(0, 1).unflatten(1, self.grid).movedim(-1, 1)              # (B*T, N, *grid)
        motion = self.conv_out(self.stages(c))                                  # (B*T, D, half of the grid)
        motion = F.interpolate(motion, (H, W), mode="bilinear")
        return y + motion.movedim(1, -1).unflatten(0, (B, T))


# ----------------------------------------------------------------------------------------------------
# Figure 1: the whole model
# ----------------------------------------------------------------------------------------------------


class STDFormer(nn.Module):
    """The two-branch network of Figure 1 (section 3.1). See the picture at the top of this file.

    forward(video) -> logits (B, num_classes); forward_features(video) -> (x, y) of the last layer.
    video: float (B, 3, F, S, S), normalised with CLIP's mean and std (data.normalize). Any F divisible by the stem's
    stride and any square S divisible by the patch size; positions are interpolated to it. Raises ValueError
    for what does not fit.

    Submodules by position: blocks[i] (Block or PTM), ctm[i], stdm[i], smem_t[i], smem_st[i]; nn.Identity marks
    a position where the module is absent. `checkpointing = True` recomputes blocks and CTMs in the backward pass.
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.grid = (c.image_size // c.patch_size,) * 2
        self.checkpointing = False
        self.conv1 = nn.Conv3d(3, c.dim, (c.stem_kernel, c.patch_size, c.patch_size), bias=False,
                               stride=(c.stem_stride, c.patch_size, c.patch_size), padding=(c.stem_kernel // 2, 0, 0))
        self.class_embedding = nn.Parameter(torch.zeros(c.dim))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + self.grid[0] * self.grid[1], c.dim))
        self.ln_pre = nn.LayerNorm(c.dim)

        def at(layers, make):
            return nn.ModuleList(make() if i in layers else nn.Identity() for i in range(c.depth))

        def rising(p):                                  # stochastic depth grows linearly with depth
            return [p * i / max(1, c.depth - 1) for i in range(c.depth)]

        self.blocks = nn.ModuleList(
            PTM(c.dim, c.heads, c.ptm_conv, c.ptm_conv_plane, c.ptm_attention, c.ptm_shortcut, c.alpha, c.beta, c.learn_fusion, p)
            if i in c.ptm_layers else Block(c.dim, c.heads, p) for i, p in enumerate(rising(c.drop_path)))
        self.ctm = nn.ModuleList(CTM(c.dim, c.heads, c.ctm_residual, c.ctm_cpe, c.ctm_dropout, p) for p in rising(c.ctm_drop_path))
        self.stdm = at(c.stdm_layers, lambda: STDM(c.dim))
        t_layers, st_layers = ((), c.smem_layers) if c.smem_branch == "spatiotemporal" else (c.smem_layers, c.smem_st_layers)
        self.smem_t = at(t_layers, lambda: SMEM(c.dim, self.grid, c.smem_fusion))
        self.smem_st = at(st_layers, lambda: SMEM(c.dim, self.grid, c.smem_fusion))

        if c.head == "fused":
            self.gate = nn.Parameter(torch.zeros(c.dim))
        self.ln_post = nn.LayerNorm(c.dim)
        self.dropout = nn.Dropout(c.head_dropout)
        self.head = nn.Linear(c.dim, c.num_classes)
        self.init_weights()

    def init_weights(self):
        """Random start (the paper always starts from CLIP; this is ours, for what CLIP does not have, and for training without it).

        every Linear               truncated normal, std D^-0.5; bias 0. As in CLIP's text tower, where it is normal; the usual 0.02 learns far more slowly in a narrow model
        outputs added to a branch  the same, std (2 L D)^-0.5: attn.out_proj, mlp.c_proj, ctm.out_proj, dpe.expand,
                                   PTM's conv.expand, stdm.pointwise
        convolutions, norms        PyTorch's
        class and positions        normal, std D^-0.5, as CLIP's
        alpha, beta; gate          as configured; 0, which is half and half
        """
        std = self.config.dim ** -0.5
        residual_std = std * (2 * self.config.depth) ** -0.5
        for name, m in self.named_modules():
            if isinstance(m, Attention):
                nn.init.trunc_normal_(m.in_proj_weight, std=std)
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=residual_std if name.endswith(("out_proj", "c_proj", "expand", "pointwise")) else std)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        for p in (self.class_embedding, self.positional_embedding):
            nn.init.normal_(p, std=std)

    def stem(self, video):
        """Cut the video into tokens: (B, 3, F, S, S) -> x (B, T, 1+N, D) and the grid (H, W)."""
        c = self.config
        B, C, n, S, S2 = video.shape if video.ndim == 5 else (0,) * 5           # n: F, whose letter is torch.nn.functional's here
        if C != 3 or S != S2 or S % c.patch_size or n % c.stem_stride:
            raise ValueError(f"video: got {tuple(video.shape)}, expected (B, 3, F, S, S) with F a multiple of {c.stem_stride} "
                             f"and S of {c.patch_size} (this model was built for F = {c.num_frames}, S = {c.image_size})")
        x = self.conv1(video).movedim(1, -1)                                    # (B, T, H, W, D)
        T, *grid = x.shape[1:4]
        x = torch.cat([self.class_embedding.to(x.dtype).expand(B, T, 1, -1), x.flatten(2, 3)], dim=2)
        z = self.ln_pre(x + resize_positions(self.positional_embedding, tuple(grid)))
        if x.dtype == torch.bfloat16:           # autocast's LN gives float32, and all behind it would keep that: twice the traffic.
            z = z.to(x.dtype)                   # bfloat16 has its range; float16 might overflow, so there float32 stays
        return z, tuple(grid)

    def forward_features(self, video):
        """Both branches to the last layer: video (B, 3, F, S, S) -> x (B, T, 1+N, D), y (B, T, H, W, D)."""
        def run(module, *inputs):                       # not PTM: recomputed, its BatchNorm would count each batch twice
            if self.checkpointing and self.training and not isinstance(module, PTM):
                return checkpoint(module, *inputs, use_reentrant=False)
            return module(*inputs)

        def patches(x):
            return x[:, :, 1:].unflatten(2, grid)                               # (B, T, H, W, D)

        def add_to_patches(x, z):                                               # the class token receives nothing
            return x + F.pad(z.flatten(2, 3), (0, 0, 1, 0))

        def present(module):
            return not isinstance(module, nn.Identity)

        x, grid = self.stem(video)
        y = patches(x)
        for i in range(self.config.depth):
            x = run(self.blocks[i], x, grid)
            if present(self.smem_st[i]):
                x = torch.cat([x[:, :, :1], self.smem_st[i](patches(x)).flatten(2, 3)], dim=2)
            y = run(self.ctm[i], patches(x), y)
            y = self.smem_t[i](y)
            if present(self.stdm[i]):
                x = add_to_patches(x, self.stdm[i](y))
        return x, y

    def forward(self, video):
        x, y = self.forward_features(video)
        z = y.mean(dim=(1, 2, 3))                                               # (B, D)
        if self.config.head == "fused":                 # the conclusion's "features from both branches", as in UniFormerV2
            gate = self.gate.sigmoid()
            z = gate * z + (1 - gate) * x[:, :, 0].mean(dim=1)
        return self.head(self.dropout(self.ln_post(z)))


def build_model(name="b16", **overrides):
    """Build a model by its size, with any ModelConfig field changed: build_model("b16", num_frames=32).

    name: "b16" (CLIP ViT-B/16), "l14" (CLIP ViT-L/14) or "tiny" (for a laptop). Raises ValueError for an
    unknown size or field, and for impossible values.
    """
    if name not in MODELS:
        raise ValueError(f"model: got {name!r}, expected one of {', '.join(MODELS)}")
    unknown = set(overrides) - {f.name for f in fields(ModelConfig)}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such field; ModelConfig has {', '.join(f.name for f in fields(ModelConfig))}")
    return STDFormer(ModelConfig(**{**MODELS[name], **overrides}))


# ----------------------------------------------------------------------------------------------------
# CLIP weights
# ----------------------------------------------------------------------------------------------------


def resize_positions(positions, grid):
    """Resize CLIP's position table in 2D (bicubic); the class token's row stays. (1+N, D) -> (1+H*W, D)."""
    side = math.isqrt(len(positions) - 1)               # CLIP's own grid is always square
    if grid == (side, side) or side ** 2 + 1 != len(positions):
        return positions                                # (a table that is no grid is left to the check of shapes)
    p = positions[1:].unflatten(0, (side, side)).permute(2, 0, 1)[None]         # (1, D, side, side)
    p = F.interpolate(p, grid, mode="bicubic")[0].permute(1, 2, 0).flatten(0, 1)
    return torch.cat([positions[:1], p])


def load_tensors(path, script=False):
    """torch.load for a file that nobody vouches for: tensors and plain values only, never code, and all of them whole.

    The CRC sums are compared here because torch.load does not: with one bit flipped it returns other weights without a word.
    script: take a TorchScript archive too, as OpenAI published CLIP. Loading one does run code from the file.
    Raises ValueError that names the file and says what it is; OSError where it cannot be opened.
    """
    with open(path, "rb") as f:
        start, size = f.read(24), f.seek(0, 2)
    try:
        names = []
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names, damaged = archive.namelist(), archive.testzip()
            if damaged:
                raise ValueError(f"the CRC of {damaged} is wrong")
        with warnings.catch_warnings():                 # TorchScript is deprecated
            warnings.simplefilter("ignore")
            if script and any("/code/" in n for n in names):
                return torch.jit.load(path, map_location="cpu").state_dict()
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                              # zipfile and torch raise many kinds
        if isinstance(e, pickle.UnpicklingError) and start.startswith((b"PK", b"\x80")):
            found = "it holds more than tensors and plain values, which could run code when read"
        elif start.startswith(b"PK"):
            found = f"a file of PyTorch that is damaged or cut off ({(str(e).splitlines() or [''])[0][:100]})"
        else:
            found = f"not a file that PyTorch wrote; its {size} bytes begin with {start!r}"
        raise ValueError(f"{path}: {found}") from e


def read_clip_weights(source, model):
    """The image tower of a CLIP checkpoint, as {CLIP's name: float32 tensor}, its `visual.` prefix removed."""
    c = model.config
    if source == "openai":
        name = {(768, 16): "ViT-B-16-quickgelu", (1024, 14): "ViT-L-14-quickgelu"}.get((c.dim, c.patch_size))
        if name is None:
            raise ValueError(f"--clip openai: there are weights for b16 and l14, not for width {c.dim} and patch {c.patch_size}; use --clip none")
        try:
            import open_clip
        except ImportError as e:
            raise ImportError("--clip openai: open_clip fetches the weights and is not installed: pip install open_clip_torch") from e
        try:
            state = open_clip.create_model(name, pretrained="openai").state_dict()
        except Exception as e:                          # open_clip, the hub client and the network each raise their own
            raise ConnectionError(f"--clip openai: could not fetch {name} ({e}). On a machine with internet access download "
                               f"{open_clip.get_pretrained_url(name, 'openai')} and pass it here as --clip FILE") from e
    elif str(source).endswith(".safetensors"):
        from safetensors.torch import load_file
        try:
            state = load_file(source)
        except Exception as e:                          # its own kind
            raise ValueError(f"--clip {source}: not a whole safetensors file ({e})") from e
    else:
        state = load_tensors(source, script=True)
        if isinstance(state, dict):
            state = state.get("state_dict", state)      # open_clip's training checkpoints
    state = {str(k).removeprefix("module."): v for k, v in state.items()} if isinstance(state, dict) else {}
    if any(k.startswith("visual.") for k in state):     # a whole CLIP: drop the text tower
        state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    state.pop("proj", None)                             # CLIP's projection to the text space; our head replaces it
    if not torch.is_tensor(state.get("conv1.weight")):
        raise ValueError(f"--clip {source}: no CLIP vision transformer in it (no conv1.weight); found {', '.join(list(state)[:5])} ... "
                         "Expected OpenAI's ViT-B-16.pt or ViT-L-14.pt, or a checkpoint of open_clip")
    return {k: v.float() for k, v in state.items() if torch.is_tensor(v)}


def is_clip_parameter(name, config):
    """Whether a parameter of STDFormer comes from CLIP (else it is new)."""
    if name.startswith("blocks."):
        _, layer, part = name.split(".")[:3]
        return int(layer) not in config.ptm_layers or part not in ("dpe", "conv", "alpha", "beta")
    return name.startswith(("conv1.", "class_embedding", "positional_embedding", "ln_pre.", "ln_post."))


def load_clip(model, source):
    """Start from CLIP: copy its image tower and silence every new path into the ST-branch, so that fine-tuning starts there.

    Section 4.2: "trained based on the parameters of Contrastive Language-Image Pre-training (CLIP)"; the how is ours.
    CLIP's patch embedding goes into the centre frame of the stem's kernel (inflation, Carreira & Zisserman 2017), its
    ln_post to the head. Zeroed: the last layer of DPE, of PTM's convolution (unless it is the shortcut), of STDM, and of
    an ST-branch SMEM.
    source: "openai" (fetched by open_clip), or a file: OpenAI's TorchScript archive, an open_clip checkpoint (.pt, .bin,
    .safetensors), or a plain state dict. OpenAI's weights belong to QuickGELU; a file trained with GELU does not fit.
    Returns (loaded, new): the numbers of parameter tensors. Raises ValueError listing what is missing, left over or
    misshapen; ConnectionError when "openai" cannot be fetched.
    """
    state = {k.replace("transformer.resblocks.", "blocks."): v for k, v in read_clip_weights(source, model).items()}
    own = model.state_dict()

    flat, stem = state["conv1.weight"], torch.zeros_like(own["conv1.weight"])
    if flat.shape == stem[:, :, 0].shape:
        stem[:, :, model.config.stem_kernel // 2] = flat
        state["conv1.weight"] = stem
    if len(state.get("positional_embedding", ())) > 1:
        state["positional_embedding"] = resize_positions(state["positional_embedding"], model.grid)

    expected = {k for k in own if is_clip_parameter(k, model.config)}
    problems = [f"missing: {k}" for k in sorted(expected - set(state))]
    problems += [f"left over: {k}" for k in sorted(set(state) - expected)]
    problems += [f"shape of {k}: file {tuple(state[k].shape)}, model {tuple(own[k].shape)}"
                 for k in sorted(expected & set(state)) if state[k].shape != own[k].shape]
    if problems:
        raise ValueError(f"--clip {source} does not fit this model (width {model.config.dim}, depth {model.config.depth}, patch "
                         f"{model.config.patch_size}); is it the file for another --model?\n  " + "\n  ".join(problems))
    model.load_state_dict(state, strict=False)

    last = [block.dpe.expand for block in model.blocks if isinstance(block, PTM)]
    last += [block.conv.expand for block in model.blocks if isinstance(block, PTM) and block.shortcut == "identity"]
    last += [stdm.pointwise for stdm in model.stdm if isinstance(stdm, STDM)]
    last += [smem.conv_out for smem in model.smem_st if isinstance(smem, SMEM)]
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return len(expected), len(list(model.parameters())) - len(expected)


# ----------------------------------------------------------------------------------------------------
# python model.py --model b16: what is in it, and what it costs
# ----------------------------------------------------------------------------------------------------


def add_model_flags(parser):
    """One flag per ModelConfig field (but num_classes), all with default None: "as the size has it"."""
    parser.add_argument("--model", default="b16", choices=list(MODELS), help="size: b16 and l14 are CLIP's, tiny trains on a laptop")
    for f in fields(ModelConfig):
        kind = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(type=int, nargs="*", metavar="LAYER")}.get(f.type, dict(type=f.type))
        if f.metadata["choices"]:
            kind["choices"] = f.metadata["choices"]
        if f.name != "num_classes":
            parser.add_argument(f"--{f.name}", default=None, help=f.metadata["help"] + ("" if f.default is None else f" (b16 as built by model.py: {f.default})"), **kind)


def config_from_flags(args, **overrides):
    """The ModelConfig of --model with the fields that flags of add_model_flags set, then the overrides. Raises ValueError for impossible values."""
    flags = {f.name: getattr(args, f.name) for f in fields(ModelConfig) if getattr(args, f.name, None) is not None}
    return ModelConfig(**{**MODELS[args.model], **flags, **overrides})


def count_macs(module, *inputs):
    """Multiply-accumulates of module(*inputs), {submodule name: MACs}, the whole under "Global".

    Counted by torch's FlopCounterMode on the meta device in float32: nothing is computed, and no kernel of a device matters,
    some of which some versions do not count.
    """
    from torch.utils.flop_counter import FlopCounterMode
    inputs = [x.to("meta", torch.float32) if torch.is_tensor(x) else x for x in inputs]
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad():
        copy.deepcopy(module).to("meta")(*inputs)
    return {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}


def one_video(config):
    """A normalised video of one clip as this configuration has it, without data."""
    return torch.empty(1, 3, config.num_frames, config.image_size, config.image_size, device="meta")


def main():
    parser = argparse.ArgumentParser(description="Print parameters, GMACs and tensor shapes of a model.")
    add_model_flags(parser)
    args = parser.parse_args()
    try:
        with torch.device("meta"):                      # shapes only: nothing is allocated or computed
            model = STDFormer(config_from_flags(args)).eval()
    except ValueError as e:
        parser.error(str(e))
    c = model.config

    shapes = {}
    for name, m in model.named_modules():
        def record(m, inputs, output, name=name):
            shapes[name] = (inputs[0].shape, output.shape if torch.is_tensor(output) else None)
        m.register_forward_hook(record)
    macs = count_macs(model, one_video(c))

    def row(label, names):
        names = [n for n in names if n in shapes]
        params = sum(p.numel() for n in names for p in model.get_submodule(n).parameters())
        gmacs = sum(macs.get("STDFormer." + n, 0) for n in names) / 1e9
        if names and params:
            (i, o) = shapes[names[-1]]
            print(f"{label:<26}{params / 1e6:>10.2f}{gmacs:>10.2f}   {tuple(i)} -> {tuple(o)}")

    print(f"{args.model}: {c.num_frames} frames of {c.image_size} x {c.image_size}, B = 1")
    print(f"{'module':<26}{'M params':>10}{'GMACs':>10}   shapes (of the last one)")
    row("stem (conv1)", ["conv1"])
    plain = [i for i in range(c.depth) if i not in c.ptm_layers]
    row(f"blocks, CLIP's ({len(plain)})", [f"blocks.{i}" for i in plain])
    row(f"blocks, PTM ({len(c.ptm_layers)})", [f"blocks.{i}" for i in c.ptm_layers])
    for name in ("ctm", "stdm", "smem_t", "smem_st"):
        layers = [i for i in range(c.depth) if not isinstance(getattr(model, name)[i], nn.Identity)]
        row(f"{name} ({len(layers)})", [f"{name}.{i}" for i in layers])
    row("ln_post", ["ln_post"])
    row("head", ["head"])
    print(f"{'total, with embeddings':<26}{sum(p.numel() for p in model.parameters()) / 1e6:>10.2f}{macs['Global'] / 1e9:>10.2f}")
    print("config:", asdict(c))


if __name__ == "__main__":
    main()
