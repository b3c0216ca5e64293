"""model.py: every module against slow loops written from the paper, the whole model against Figure
1, what is refused.

python -m pytest -q tests/test_model.py
"""

import re
from dataclasses import asdict, fields
from itertools import product

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as std_former
from model import (
    CPE,
    CTM,
    DPE,
    MLP,
    PTM,
    SMEM,
    STDM,
    Attention,
    Block,
    ModelConfig,
    PTMConv,
    build_model,
)
from scripts.describe import count_macs, video_of

GRID = (3, 2)  # not square, so that H and W cannot be exchanged unnoticed
B, T, D, HEADS = 2, 4, 32, 4
N = GRID[0] * GRID[1]


def tiny(**overrides):
    """A whole model with everything in it: PTM at layer 2, SMEM at 1, STDM behind 0 and 1."""
    torch.manual_seed(0)
    size = dict(
        dim=D, depth=3, heads=HEADS, patch_size=8, image_size=32, num_frames=8, num_classes=5
    )
    return build_model("tiny", **{**size, **overrides})


def filled(module):
    """The module in double precision (so that 1e-9 is a strict tolerance), with no parameter left
    at 0 or 1.
    """
    torch.manual_seed(0)
    for p in module.double().parameters():
        nn.init.normal_(p, std=0.3)
    for name, b in module.named_buffers():
        if "running" in name:
            nn.init.uniform_(b, 0.5, 2.0)
    return module


def noise(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ----- The paper's equations, written slowly --------------------------------


def linear(m, x):
    return x @ m.weight.T + m.bias


def norm(m, x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + m.eps).sqrt() * m.weight + m.bias


def mha(m, x):
    """softmax(q k^T / sqrt(d)) v, one head after the other. x: (n, D)."""
    q, k, v = (x @ w.T + b for w, b in zip(m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3)))
    heads = zip(*(z.chunk(m.heads, dim=-1) for z in (q, k, v)))
    return linear(
        m.out_proj,
        torch.cat([(q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v for q, k, v in heads], dim=-1),
    )


def ffn(m, x):
    z = linear(m.c_fc, x)
    return linear(m.c_proj, z * torch.sigmoid(1.702 * z))


def slow_conv(z, weight, bias):
    """A zero-padded convolution in any number of dimensions, tap by tap. z: (B, *places, C) -> (B,
    *places, C').
    """
    sizes = z.shape[1:-1]
    out = bias.expand(*z.shape[:-1], -1).clone()
    for place in product(*map(range, sizes)):
        for tap in product(*map(range, weight.shape[2:])):
            source = [p + t - size // 2 for p, t, size in zip(place, tap, weight.shape[2:])]
            if all(0 <= s < size for s, size in zip(source, sizes)):
                out[(slice(None), *place)] += (
                    z[(slice(None), *source)] @ weight[(slice(None), slice(None), *tap)].T
                )
    return out


def conv3d(y, weight, bias=None, **kwargs):
    """F.conv3d for channel-last features, with the paper's 3D kernels (a Linear's weight is a 1x1x1
    one). y: (B, T, H, W, C).
    """
    weight = weight.view(*weight.shape, *[1] * (5 - weight.ndim))
    return F.conv3d(y.permute(0, 4, 1, 2, 3), weight, bias, **kwargs).permute(0, 2, 3, 4, 1)


def batch_norm(bn, y):
    """Over all places of all frames of all clips. Returns the result and the running statistics
    that it leaves. y: (..., C).
    """
    z = y.reshape(-1, y.shape[-1])
    mean, var, left = bn.running_mean, bn.running_var, (bn.running_mean, bn.running_var)
    if bn.training:
        mean, var = z.mean(0), z.var(0, unbiased=False)
        left = (
            0.9 * bn.running_mean + 0.1 * mean,
            0.9 * bn.running_var + 0.1 * z.var(0, unbiased=True),
        )
    return (y - mean) / (var + bn.eps).sqrt() * bn.weight + bn.bias, left


def slow_dpe(m, patches, grid):
    v, _ = batch_norm(m.bn, patches)
    v = conv3d(v.unflatten(2, grid), m.reduce.weight, m.reduce.bias)  # 1x1x1
    v = conv3d(
        v, m.conv.weight[..., None], m.conv.bias, padding=(1, 0, 0), groups=v.shape[-1]
    )  # 3x1x1
    return conv3d(v, m.expand.weight, m.expand.bias).flatten(2, 3)  # 1x1x1


def slow_ptm_conv(m, patches, grid, dims):
    z = linear(m.reduce, patches)
    if dims == 3:
        z = z.unflatten(2, grid)  # on (T, H, W), else on (T, H*W)
    z = slow_conv(z, m.conv.weight, m.conv.bias).reshape(*patches.shape[:3], -1)
    return linear(m.expand, z)


def slow_ptm(m, x, grid, conv):
    """Eq. 1, y = y1 + alpha y2 + beta y3, its residual connection and Table 3's variants."""
    x = torch.cat([x[:, :, :1], x[:, :, 1:] + slow_dpe(m.dpe, x[:, :, 1:], grid)], dim=2)
    y1 = torch.empty_like(x)
    for b in range(len(x)):
        y1[b] = torch.stack([mha(m.attn, frame) for frame in norm(m.ln_1, x[b])])
    out = x + y1 + m.alpha * ffn(m.mlp, norm(m.ln_2, x))
    source = y1 if conv.startswith("attention") else x
    out[:, :, 1:] += m.beta * slow_ptm_conv(m.conv, source[:, :, 1:], grid, int(conv[-2]))
    return out


def slow_ctm(m, x, y):
    """Section 3.3 with a loop over clips, places, heads and pairs of frames."""
    y = y + conv3d(y, m.cpe.conv.weight, m.cpe.conv.bias, padding=1, groups=y.shape[-1])
    frames, (H, W), d = x.shape[1], x.shape[2:4], x.shape[-1] // m.heads
    z = torch.zeros_like(x)
    for b, h, w in product(range(len(x)), range(H), range(W)):
        query = linear(m.q, norm(m.ln_q, x[b, :, h, w]))
        key, value = (norm(m.ln_kv, y[b, :, h, w]) @ m.kv.weight.T).chunk(2, dim=-1)
        for head in range(m.heads):
            c = slice(head * d, (head + 1) * d)
            for t in range(frames):
                scores = torch.stack(
                    [query[t, c] @ key[u, c] / d**0.5 for u in range(frames)]
                ).exp()
                z[b, t, h, w, c] = sum(
                    scores[u] / scores.sum() * value[u, c] for u in range(frames)
                )
    z = x + linear(m.out_proj, z)
    return z + ffn(m.mlp, norm(m.ln_2, z))


def slow_smem(m, y, fusion):
    """Section 3.5 with a loop over neighbouring frames and pairs of places."""

    def conv2d(c, z, stride=1):
        return F.conv2d(z, c.weight, c.bias, stride, padding=1)

    clips, frames, grid = y.shape[0], y.shape[1], y.shape[2:4]
    f = conv2d(m.conv_in, y.flatten(0, 1).permute(0, 3, 1, 2))
    if grid != m.grid:
        f = F.interpolate(f, m.grid, mode="bilinear")
    places = m.grid[0] * m.grid[1]
    f = f.view(clips, frames, -1, places)  # (B, T, D/8, N)
    c = torch.zeros(
        clips, frames, places, places, dtype=y.dtype
    )  # pixel i of frame t, channel j of frame t+1
    for b, t, i, j in product(range(clips), range(frames - 1), range(places), range(places)):
        a, a_next = f[b, t, :, i], f[b, t + 1, :, j]
        mul, add = (a * a_next).sum(), (a + a_next).sum()
        c[b, t, i, j] = {"mul": mul, "add": add, "mul+add": mul + add}[fusion] / len(a) ** 0.5
    c[:, -1] = c[:, -2]
    z = c.flatten(0, 1).transpose(1, 2).unflatten(2, m.grid)  # (B*T, N, H, W)
    for i, stride in enumerate((2, 1, 1)):
        z, left = batch_norm(m.stages[3 * i + 1], conv2d(m.stages[3 * i], z, stride).movedim(1, -1))
        z = z.clamp(min=0).movedim(-1, 1)
    z = F.interpolate(conv2d(m.conv_out, z), grid, mode="bilinear")
    return y + z.movedim(1, -1).view_as(y), left


# ----- Each module against its equation -------------------------------------


def test_the_activation_is_quick_gelu_and_so_is_its_gradient():
    m = MLP(8).double()
    for p in m.parameters():
        nn.init.zeros_(p)
    m.c_fc.weight.data[:8] = torch.eye(8)  # the layers around it pass values on
    m.c_proj.weight.data[:, :8] = torch.eye(8)
    x = noise(100, 8).mul(5).requires_grad_()
    reference = x * torch.sigmoid(1.702 * x)
    assert_same(m(x), reference, 1e-12)
    gradients = [torch.autograd.grad(z.sum(), x) for z in (m(x), reference)]
    assert_same(*gradients, 1e-12)


def test_attention_is_torchs_multihead_attention():
    m = filled(Attention(D, HEADS))
    theirs = nn.MultiheadAttention(D, HEADS, batch_first=True).double()
    theirs.load_state_dict(m.state_dict())  # the names are CLIP's, hence torch's
    x = noise(B, 7, D)
    assert_same(m(x), theirs(x, x, x)[0])
    assert_same(m(x)[1], mha(m, x[1]))


def test_block():
    m, x = filled(Block(D, HEADS)), noise(B, T, 1 + N, D)
    z = x + torch.stack(
        [torch.stack([mha(m.attn, frame) for frame in norm(m.ln_1, clip)]) for clip in x]
    )
    assert_same(m(x), z + ffn(m.mlp, norm(m.ln_2, z)))


@pytest.mark.parametrize("training", (True, False))
def test_dpe(training):
    m, patches = filled(DPE(D)).train(training), noise(B, T, N, D)
    reference, (_, left) = slow_dpe(m, patches, GRID), batch_norm(m.bn, patches)
    assert_same(m(patches), reference)
    assert_same((m.bn.running_mean, m.bn.running_var), left)


@pytest.mark.parametrize("dims", (2, 3))
def test_ptm_conv(dims):
    m, patches = filled(PTMConv(D, dims)), noise(B, T, N, D)
    assert_same(m(patches, GRID), slow_ptm_conv(m, patches, GRID, dims))


@pytest.mark.parametrize("conv", ("residual2d", "residual3d", "attention2d", "attention3d"))
def test_ptm(conv):
    m, x = filled(PTM(D, HEADS, conv)).eval(), noise(B, T, 1 + N, D)
    assert_same(m(x, GRID), slow_ptm(m, x, GRID, conv))


def test_ptm_with_fixed_fusion_weights():
    m, x = (
        filled(PTM(D, HEADS, alpha=0.7, beta=-1.3, learn_fusion=False)).eval(),
        noise(B, T, 1 + N, D),
    )
    assert (m.alpha, m.beta) == (0.7, -1.3)
    assert not {"alpha", "beta"} & {name for name, _ in m.named_parameters()}
    assert_same(m(x, GRID), slow_ptm(m, x, GRID, "residual2d"))


def test_cpe():
    m, y = filled(CPE(D)), noise(B, T, *GRID, D)
    assert_same(m(y), conv3d(y, m.conv.weight, m.conv.bias, padding=1, groups=D))


def test_ctm():
    m, (x, y) = filled(CTM(D, HEADS)), noise(2, B, T, *GRID, D)
    assert_same(m(x, y), slow_ctm(m, x, y))


@pytest.mark.parametrize("training", (True, False))
def test_stdm(training):
    m, y = filled(STDM(D)).train(training), noise(B, T, *GRID, D)
    z = conv3d(y, m.conv_s.weight[:, :, None], padding=(0, 1, 1), groups=D)  # 1x3x3
    z, left_s = batch_norm(m.bn_s, z)
    z = conv3d(z.clamp(min=0), m.conv_t.weight[..., None], padding=(1, 0, 0), groups=D)  # 3x1x1
    z, left_t = batch_norm(m.bn_t, z)
    assert_same(m(y), conv3d(z.clamp(min=0), m.pointwise.weight, m.pointwise.bias))  # 1x1x1
    assert_same(
        (m.bn_s.running_mean, m.bn_s.running_var, m.bn_t.running_mean, m.bn_t.running_var),
        left_s + left_t,
    )


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("grid", (GRID, (4, 4)))  # the second is another grid than it is built for
@pytest.mark.parametrize("fusion", ("mul", "add", "mul+add"))
def test_smem(fusion, grid, training):
    m, y = filled(SMEM(D, GRID, fusion)).train(training), noise(B, 3, *grid, D)
    reference, left = slow_smem(m, y, fusion)
    assert_same(m(y), reference)
    assert_same((m.stages[-2].running_mean, m.stages[-2].running_var), left)


@pytest.mark.parametrize("kernel", (1, 3, 5))
@pytest.mark.parametrize("stride", (1, 2, 4))
def test_stem(stride, kernel):
    m = filled(tiny(stem_stride=stride, stem_kernel=kernel))
    video = noise(B, 3, 8, 32, 32)
    x = torch.zeros(B, 8 // stride, 17, D, dtype=video.dtype)
    x[:, :, 0] = m.class_embedding + m.positional_embedding[0]
    for t, h, w in product(range(8 // stride), range(4), range(4)):
        place = 1 + 4 * h + w
        x[:, t, place] = m.positional_embedding[place]
        for k in range(kernel):
            frame = stride * t + k - kernel // 2
            if 0 <= frame < 8:
                patch = video[:, :, frame, 8 * h : 8 * h + 8, 8 * w : 8 * w + 8]
                x[:, t, place] += torch.einsum("bchw,dchw->bd", patch, m.conv1.weight[:, :, k])
    tokens, grid = m.stem(video)
    assert grid == (4, 4)
    assert_same(tokens, norm(m.ln_pre, x))


@pytest.mark.parametrize("st_layers, t_layers", [((), (1,)), ((1,), ()), ((0, 2), (1,))])
def test_the_modules_are_wired_as_in_figure_1(st_layers, t_layers):
    m = filled(tiny(smem_t_layers=t_layers, smem_st_layers=st_layers)).eval()
    video = noise(B, 3, 8, 32, 32)
    x, _ = m.stem(video)
    y = x[:, :, 1:].reshape(B, 4, 4, 4, D)
    for i in range(3):
        x = m.blocks[i](x, (4, 4))
        cls, patches = x[:, :, 0], x[:, :, 1:].reshape(B, 4, 4, 4, D)
        if i in st_layers:
            patches = m.smem_st[i](patches)
        y = m.ctm[i](patches, y)
        if i in t_layers:
            y = m.smem_t[i](y)
        if i < 2:
            patches = patches + m.stdm[i](y)
        x = torch.cat([cls[:, :, None], patches.flatten(2, 3)], dim=2)
    assert_same(m.forward_features(video), (x, y))

    z = y.sum(dim=(1, 2, 3)) / 64
    assert_same(m(video), linear(m.head, norm(m.ln_post, z)))


# ----- The whole model: shapes, size, gradients -----------------------------


@pytest.mark.parametrize(
    "frames, size", [(8, 32), (4, 32), (12, 32), (16, 32), (8, 16), (8, 24), (8, 48)]
)
def test_shapes_of_any_number_of_frames_and_any_square(frames, size):
    m, video = tiny().eval(), torch.randn(B, 3, frames, size, size)
    x, y = m.forward_features(video)
    assert x.shape == (B, frames // 2, 1 + (size // 8) ** 2, D)
    assert y.shape == (B, frames // 2, size // 8, size // 8, D)
    assert m(video).shape == (B, 5) and m(video).isfinite().all()


@pytest.mark.parametrize(
    "shape", [(1, 3, 8, 32, 40), (1, 3, 8, 36, 36), (1, 3, 7, 32, 32), (1, 8, 3, 32, 32)]
)
def test_a_video_that_does_not_fit_is_refused_with_what_fits(shape):
    with pytest.raises(ValueError) as e:
        tiny()(torch.zeros(shape))
    fits = "(B, 3, F, S, S) with F a multiple of 2 and S a multiple of 8"
    assert str(shape) in str(e.value) and fits in str(e.value)


def test_smem_refuses_a_single_token_frame():
    with pytest.raises(ValueError, match="only one"):
        SMEM(D, GRID)(torch.zeros(B, 1, *GRID, D))
    one_frame = torch.zeros(B, 3, 2, 32, 32)
    assert tiny(smem_t_layers=())(one_frame).shape == (B, 5)  # without SMEM it is fine


def test_b16_has_the_parameters_and_macs_of_the_architecture():
    with torch.device("meta"):
        m = build_model("b16")
    D, N, L = 768, 14 * 14, 12

    def lin(i, o):
        return i * o + o

    def bottleneck(d):  # 3x3 convolution without bias, and its BatchNorm
        return 9 * d * (D // 4) + 2 * (D // 4)

    ln, mlp = 2 * D, lin(D, 4 * D) + lin(4 * D, D)
    stem = D * 3 * 3 * 16 * 16 + D + (1 + N) * D + ln  # conv1, class token, positions, ln_pre
    block = ln + lin(D, 3 * D) + lin(D, D) + ln + mlp
    dpe = 2 * D + lin(D, 512) + 3 * 512 + 512 + lin(512, D)  # its BatchNorm; D / 1.5 = 512
    conv = lin(D, D // 4) + 9 * (D // 4) ** 2 + D // 4 + lin(D // 4, D)
    ctm = (
        27 * D + D + 2 * ln + lin(D, D) + D * 2 * D + lin(D, D) + ln + mlp
    )  # no bias on key and value
    stdm = 9 * D + 2 * D + 3 * D + 2 * D + lin(D, D)
    smem = 9 * D * (D // 8) + D // 8 + bottleneck(N) + 2 * bottleneck(D // 4) + 9 * (D // 4) * D + D
    expected = (
        stem + L * block + 4 * (dpe + conv + 2) + L * ctm + (L - 1) * stdm + smem + ln + lin(D, 174)
    )

    assert sum(p.numel() for p in m.parameters()) == expected
    assert round(expected / 1e6, 2) == 187.73
    assert count_macs(m, video_of(m.config))["Global"] / 1e9 == pytest.approx(297.34, rel=1e-3)


# every choice of every field once, and the values that add or remove a path
VARIANTS = [{f.name: choice} for f in fields(ModelConfig) for choice in f.metadata["choices"] or ()]
VARIANTS += [
    dict(stem_stride=1),
    dict(stem_kernel=1),
    dict(learn_fusion=False),
    dict(ptm_layers=()),
    dict(ptm_layers=(0, 1, 2)),
    dict(stdm_layers=()),
    dict(smem_t_layers=()),
    dict(smem_t_layers=(0,), smem_st_layers=(2,)),
    dict(smem_grid=3),
    dict(depth=1),
]


@pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items())
)
def test_every_parameter_gets_a_gradient_and_every_buffer_is_used(variant):
    m = tiny(**variant).double().train()
    before = {name: b.clone() for name, b in m.named_buffers()}
    F.cross_entropy(m(noise(B, 3, 8, 32, 32)), torch.tensor([1, 3])).backward()
    for name, p in m.named_parameters():
        assert p.grad is not None, name
        # Channel by channel; what is zero by nature (a bias before a BatchNorm, say) is rounding
        # noise of about 1e-17.
        alive = (p.grad.reshape(len(p) if p.ndim else 1, -1).abs().amax(1) > 1e-11).tolist()
        if name.endswith("attn.in_proj_bias"):
            alive[D : 2 * D] = []  # CLIP has a bias on its keys, which softmax cancels
        assert all(alive), name
    unused = [name for name, b in m.named_buffers() if torch.equal(b, before[name])]
    assert not unused  # all are BatchNorm's, and a training step moves them


def test_init_weights_table():
    depth = 4
    m = tiny(dim=128, depth=depth)
    ends = re.compile(
        r"attn\.out_proj|mlp\.c_proj|ctm\.\d\.out_proj|dpe\.expand|conv\.expand|stdm\.\d\.pointwise"
    )
    linears = {name: layer for name, layer in m.named_modules() if isinstance(layer, nn.Linear)}
    outputs = {name for name in linears if ends.search(name)}
    ordinary = {
        name: layer.weight.std().item() for name, layer in linears.items() if name not in outputs
    }
    common = sorted(ordinary.values())[len(ordinary) // 2]
    assert len(outputs) == depth * 2 + depth * 2 + 2 + (
        depth - 1
    )  # blocks, CTMs, one PTM's two more, STDMs
    for name, layer in linears.items():
        expected = common / (2 * depth) ** 0.5 if name in outputs else common
        chance = 0.02 + 5 / (2 * layer.weight.numel()) ** 0.5  # of so many random numbers
        assert layer.weight.std().item() == pytest.approx(expected, rel=chance), name
        assert layer.bias is None or not layer.bias.any(), name
    for layer in m.modules():
        if isinstance(layer, Attention):  # its q, k and v are one bare parameter, as in CLIP
            assert (
                layer.in_proj_weight.std().item() == pytest.approx(common, rel=0.06)
                and not layer.in_proj_bias.any()
            )
    for p in (m.class_embedding, m.positional_embedding):
        assert p.std().item() == pytest.approx(128**-0.5, rel=0.25 if p.ndim == 1 else 0.06)
    for name, layer in m.named_modules():
        if isinstance(layer, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (layer.weight == 1).all() and not layer.bias.any(), name


# ----- The whole model: behaviour -------------------------------------------


def test_the_order_of_frames_changes_the_logits():
    m, video = tiny().eval(), torch.randn(B, 3, 8, 32, 32)
    with torch.no_grad():
        logits, backwards = m(video), m(video.flip(2))
    assert (logits - backwards).abs().max() > 1e-3 * logits.abs().max()


@pytest.mark.parametrize(
    "time_aware",
    (
        {},
        dict(stem_kernel=3),
        dict(ptm_layers=(1,)),
        dict(stdm_layers=(0,)),
        dict(smem_t_layers=(1,)),
        "cpe",
    ),
)
def test_the_order_of_frames_reaches_the_logits_only_through_the_paths_made_for_it(time_aware):
    # One frame under the stem, no PTM, STDM or SMEM, and a CPE that looks at its own frame only:
    # what is left treats
    # the frames as a set. Each of those paths alone is enough to tell a clip from the same clip
    # backwards.
    blind = dict(stem_kernel=1, stem_stride=1, ptm_layers=(), stdm_layers=(), smem_t_layers=())
    m = filled(tiny(**{**blind, **({} if time_aware == "cpe" else time_aware)})).eval()
    if time_aware != "cpe":
        for ctm in m.ctm:
            ctm.cpe.conv.weight.data[:, :, [0, 2]] = 0
    video = noise(B, 3, 8, 32, 32)
    with torch.no_grad():
        difference = (m(video) - m(video.flip(2))).abs().max() / m(video).abs().max()
    assert difference > 1e-6 if time_aware else difference < 1e-12


def test_clips_of_a_batch_do_not_see_each_other_in_eval_mode():
    m, video = (
        filled(tiny(smem_st_layers=(0,), ptm_conv="attention3d")).eval(),
        noise(3, 3, 8, 32, 32),
    )
    with torch.no_grad():
        assert_same(m(video), torch.cat([m(clip[None]) for clip in video]))


def test_building_and_running_are_reproducible():
    video = torch.randn(B, 3, 8, 32, 32)
    assert torch.equal(tiny().eval()(video), tiny().eval()(video))


def test_drop_path_rises_with_depth_and_acts_on_every_residual_path():
    m = tiny(depth=5, drop_path=0.2, ctm_drop_path=0.4)
    assert [b.drop_path.p for b in m.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [c.drop_path.p for c in m.ctm] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    # With nearly everything dropped, what is left is each module's residual connection.
    x, y = torch.randn(2, B, T, *GRID, D)
    tokens = torch.randn(B, T, 1 + N, D)
    p = 1 - 1e-9
    assert torch.equal(Block(D, HEADS, drop_path=p).train()(tokens), tokens)
    assert torch.equal(PTM(D, HEADS, drop_path=p).train()(tokens, GRID), tokens)
    assert torch.equal(CTM(D, HEADS, drop_path=p).train()(x, y), x)


def test_dropouts_act_in_training_only():
    video = torch.randn(B, 3, 8, 32, 32)
    for where in ("ctm_dropout", "head_dropout", "drop_path", "ctm_drop_path"):
        m, plain = tiny(**{where: 0.5}), tiny()
        with torch.no_grad():
            assert torch.equal(m.eval()(video), plain.eval()(video)), where
            assert not torch.equal(m.train()(video), plain.train()(video)), where


def test_checkpointing_changes_nothing_but_memory():
    def step(checkpointing):
        m = tiny(drop_path=0.4, ctm_drop_path=0.4, ctm_dropout=0.3, head_dropout=0.3).train()
        m.checkpointing = checkpointing
        runs = []
        for module in (*m.blocks, *m.ctm):
            module.register_forward_pre_hook(lambda module, inputs: runs.append(1))
        torch.manual_seed(2)
        loss = F.cross_entropy(m(torch.randn(B, 3, 8, 32, 32)), torch.tensor([1, 3]))
        loss.backward()
        return len(runs), loss.detach(), [p.grad for p in m.parameters()], list(m.buffers())

    runs, *plain = step(False)
    runs_again, *checkpointed = step(True)
    assert (runs, runs_again) == (
        6,
        11,
    )  # all but the PTM are run a second time in the backward pass
    assert_same(plain, checkpointed, 1e-6)


# ----- ModelConfig ----------------------------------------------------------


@pytest.mark.parametrize(
    "depth, ptm, stdm, smem",
    [
        (12, range(8, 12), range(11), 4),
        (24, range(16, 24), range(23), 8),
        (4, [3], range(3), 1),
        (1, [], [], 0),
    ],
)
def test_positions_scale_with_depth(depth, ptm, stdm, smem):
    c = ModelConfig(depth=depth)
    found = c.ptm_layers, c.stdm_layers, c.smem_t_layers, c.smem_st_layers
    assert found == (tuple(ptm), tuple(stdm), (smem,), ())
    assert ModelConfig(ptm_layers=[11, 8, 8]).ptm_layers == (8, 11)


def test_a_config_survives_its_dict():
    for c in (ModelConfig(), ModelConfig(ptm_layers=(), smem_st_layers=(1, 2), smem_grid=7)):
        assert ModelConfig(**asdict(c)) == c


RATES = ("drop_path", "ctm_drop_path", "ctm_dropout", "head_dropout")
COUNTS = (
    "num_classes",
    "num_frames",
    "image_size",
    "patch_size",
    "stem_stride",
    "stem_kernel",
    "dim",
    "depth",
    "heads",
    "smem_grid",
)
LAYERS = ("ptm_layers", "stdm_layers", "smem_t_layers", "smem_st_layers")
REFUSED = [(f.name, {f.name: "unknown"}) for f in fields(ModelConfig) if f.metadata["choices"]]
REFUSED += [(name, {name: value}) for name in RATES for value in (1.0, -0.1)]
REFUSED += [(name, {name: value}) for name in COUNTS for value in (0, -8)]
REFUSED += [(name, {name: layers}) for name in LAYERS for layers in ((12,), (-1,))]
REFUSED += [
    ("stdm_layers", dict(stdm_layers=(3, 11))),  # no x follows the last layer
    ("num_frames", dict(num_frames=15)),  # the stride is 2
    ("num_frames", dict(num_frames=2)),  # one token frame
    ("image_size", dict(image_size=200)),
    ("stem_kernel", dict(stem_kernel=4)),
    ("dim", dict(heads=7)),
]


@pytest.mark.parametrize("name, values", REFUSED, ids=str)
def test_an_impossible_value_is_refused_in_one_line_with_name_value_and_choice(name, values):
    with pytest.raises(ValueError) as e:
        ModelConfig(**values)
    assert re.fullmatch(rf"{name} is .*, expected .+", str(e.value))
    if name in values:
        assert str(values[name]) in str(e.value)


def test_a_changed_module_that_names_its_last_layer_is_one_edit():
    # scripts/variants.py and everybody's own STDM rely on it: scaled at the start, silenced by
    # CLIP.
    class Own(nn.Module):
        output_layer = "out"

        def __init__(self, dim):
            super().__init__()
            self.out = nn.Linear(dim, dim)

    plain, m = tiny(dim=128), tiny(dim=128)
    m.stdm[0] = Own(128)
    m.init_weights()
    expected = plain.stdm[0].pointwise.weight.std().item()
    assert m.stdm[0].out.weight.std().item() == pytest.approx(expected, rel=0.05)
    std_former.zero_output(m.stdm[0])
    assert not m.stdm[0].out.weight.any() and not m.stdm[0].out.bias.any()
