"""model.py: each module against slow loops written from the paper, the whole against Figure 1.

Protects: the equation of each module; the wiring of Figure 1; the number of parameters; initial
values; gradients that reach every parameter; other sizes and numbers of frames; dropout, stochastic
depth and checkpointing; errors that name the field.

python -m pytest -q tests/test_model.py
"""
from dataclasses import asdict
from itertools import product

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (CPE, CTM, DPE, MLP, PTM, SMEM, STDM, Attention, Block, ModelConfig,
                   STDFormer, build_model)

GRID = (3, 2)                   # not square, so that H and W cannot be exchanged unnoticed
B, T, D, HEADS = 2, 4, 32, 4
N = GRID[0] * GRID[1]
SMALL = dict(dim=D, depth=3, heads=HEADS, num_frames=2 * T, num_classes=5)

def small(**changes):
    """A whole model with all modules: PTM in layer 2, SMEM in layer 1, STDM in layers 0 and 1."""
    torch.manual_seed(0)
    return build_model("tiny", **{**SMALL, **changes})

def filled(module):
    """The module in double precision, where 1e-9 is strict, with no parameter left at 0 or 1."""
    torch.manual_seed(0)
    for p in module.double().parameters():
        nn.init.normal_(p, std=0.3)
    for name, buffer in module.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 2.0)
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
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.weight + m.bias

def batch_norm(m, y):
    """Over all patches of all frames of all clips. y: (..., C)"""
    mean = m.running_mean
    var = m.running_var
    if m.training:
        mean = y.flatten(0, -2).mean(0)
        var = y.flatten(0, -2).var(0, unbiased=False)
    return (y - mean) / (var + 1e-5).sqrt() * m.weight + m.bias

def conv3d(y, weight, bias=None, groups=1):
    """The paper's 3D kernels, zero-padded, on channel-last features. y: (B, T, H, W, C)"""
    padding = [size // 2 for size in weight.shape[2:]]
    z = F.conv3d(y.permute(0, 4, 1, 2, 3), weight, bias, padding=padding, groups=groups)
    return z.permute(0, 2, 3, 4, 1)

def slow_mha(m, x):
    """softmax(q k^T / sqrt(d)) v, with a loop over frames and heads. x: (B, T, n, D)"""
    out = torch.empty_like(x)
    d = x.shape[-1] // m.heads
    for b, t in product(range(x.shape[0]), range(x.shape[1])):
        qkv = x[b, t] @ m.in_proj_weight.T + m.in_proj_bias
        q, k, v = qkv.chunk(3, dim=-1)
        heads = []
        for h in range(m.heads):
            c = slice(h * d, (h + 1) * d)
            heads.append((q[:, c] @ k[:, c].T / d ** 0.5).softmax(-1) @ v[:, c])
        out[b, t] = linear(m.out_proj, torch.cat(heads, dim=-1))
    return out

def slow_ffn(m, x):
    z = linear(m.c_fc, x)
    return linear(m.c_proj, z * torch.sigmoid(1.702 * z))

def slow_dpe(m, patches):
    """BatchNorm, 1x1x1, 3x1x1 and 1x1x1 convolutions. patches: (B, T, N, D)"""
    z = linear(m.reduce, batch_norm(m.bn, patches))
    out = m.conv.bias.expand_as(z).clone()
    for t, k in product(range(T), range(3)):
        if 0 <= t + k - 1 < T:
            out[:, t] += m.conv.weight[:, 0, k, 0] * z[:, t + k - 1]
    return linear(m.expand, out)

def slow_ptm_conv(m, patches, dims):
    """On the plane (T, H*W), or on (T, H, W). patches: (B, T, N, D)"""
    z = linear(m.reduce, patches)
    if dims == 2:
        z = conv3d(z[:, :, :, None], m.conv.weight[..., None], m.conv.bias)
    else:
        z = conv3d(z.unflatten(2, GRID), m.conv.weight, m.conv.bias)
    return linear(m.expand, z.reshape(B, T, N, -1))

def slow_ptm(m, x, conv):
    """Eq. 1, y1 + alpha y2 + beta y3, its residual connection and the variants of Table 3."""
    x = torch.cat([x[:, :, :1], x[:, :, 1:] + slow_dpe(m.dpe, x[:, :, 1:])], dim=2)
    y1 = slow_mha(m.attn, norm(m.ln_1, x))
    out = x + y1 + m.alpha * slow_ffn(m.mlp, norm(m.ln_2, x))
    z = y1 if conv.startswith("attention") else x
    out[:, :, 1:] += m.beta * slow_ptm_conv(m.conv, z[:, :, 1:], int(conv[-2]))
    return out

def slow_ctm(m, x, y):
    """Section 3.3 with a loop over clips, positions and heads. x, y: (B, T, H, W, D)"""
    y = y + conv3d(y, m.cpe.conv.weight, m.cpe.conv.bias, groups=D)
    d = D // m.heads
    z = torch.empty_like(x)
    for b, h, w in product(range(B), range(GRID[0]), range(GRID[1])):
        query = linear(m.q, norm(m.ln_q, x[b, :, h, w]))                        # (T, D)
        key, value = (norm(m.ln_kv, y[b, :, h, w]) @ m.kv.weight.T).chunk(2, dim=-1)
        for head, t in product(range(m.heads), range(T)):
            c = slice(head * d, (head + 1) * d)
            scores = torch.stack([query[t, c] @ key[u, c] / d ** 0.5 for u in range(T)]).exp()
            z[b, t, h, w, c] = scores @ value[:, c] / scores.sum()
    z = x + linear(m.out_proj, z)
    return z + slow_ffn(m.mlp, norm(m.ln_2, z))

def slow_stdm(m, y):
    """1x3x3, 3x1x1 and 1x1x1 convolutions with BatchNorm and ReLU. y: (B, T, H, W, D)"""
    z = conv3d(y, m.conv_s.weight[:, :, None], groups=D)
    z = batch_norm(m.bn_s, z).clamp(min=0)
    z = conv3d(z, m.conv_t.weight[..., None], groups=D)
    return linear(m.pointwise, batch_norm(m.bn_t, z).clamp(min=0))

def slow_smem(m, y, fusion):
    """Section 3.5 with a loop over frames and pairs of patches. y: (B, T, H, W, D)"""
    grid = y.shape[2:4]
    n = m.grid[0] * m.grid[1]
    f = conv3d(y, m.conv_in.weight[:, :, None], m.conv_in.bias)
    f = f.flatten(0, 1).permute(0, 3, 1, 2)                                     # (B*T, D/8, H, W)
    f = F.interpolate(f, m.grid, mode="bilinear").view(B, T, -1, n)            # (B, T, D/8, n)
    maps = torch.empty(B, T, n, n, dtype=y.dtype)       # channels: frame t+1, pixels: frame t
    for b, t, i, j in product(range(B), range(T - 1), range(n), range(n)):
        a, a_next = f[b, t, :, i], f[b, t + 1, :, j]
        mul, add = (a * a_next).sum(), (a + a_next).sum()
        maps[b, t, j, i] = {"mul": mul, "add": add, "mul+add": mul + add}[fusion] / len(a) ** 0.5
    maps[:, -1] = maps[:, -2]
    z = maps.view(B * T, n, *m.grid)
    for i, stride in enumerate((2, 1, 1)):
        z = F.conv2d(z, m.stages[3 * i].weight, stride=stride, padding=1)
        z = batch_norm(m.stages[3 * i + 1], z.movedim(1, -1)).clamp(min=0).movedim(-1, 1)
    z = F.conv2d(z, m.conv_out.weight, m.conv_out.bias, padding=1)
    z = F.interpolate(z, grid, mode="bilinear")
    return y + z.movedim(1, -1).view_as(y)

# ----- Each module against its equation -------------------------------------

def test_mlp_and_its_activation():
    m = filled(MLP(D))
    x = noise(B, T, D)
    assert_same(m(x), slow_ffn(m, x))

def test_attention_is_torchs_multihead_attention():
    m = filled(Attention(D, HEADS))
    x = noise(B, T, N, D)
    theirs = nn.MultiheadAttention(D, HEADS, batch_first=True).double()
    theirs.load_state_dict(m.state_dict())                      # CLIP's names are torch's
    z = x.flatten(0, 1)
    assert_same(m(z), theirs(z, z, z)[0])
    assert_same(m(z), slow_mha(m, x).flatten(0, 1))

def test_block():
    m = filled(Block(D, HEADS))
    x = noise(B, T, 1 + N, D)
    z = x + slow_mha(m.attn, norm(m.ln_1, x))
    assert_same(m(x), z + slow_ffn(m.mlp, norm(m.ln_2, z)))

@pytest.mark.parametrize("training", (True, False))
def test_dpe(training):
    m = filled(DPE(D)).train(training)
    patches = noise(B, T, N, D)
    assert_same(m(patches), slow_dpe(m, patches))

@pytest.mark.parametrize("conv", ("residual2d", "residual3d", "attention2d", "attention3d"))
def test_ptm(conv):
    m = filled(PTM(D, HEADS, conv)).eval()
    x = noise(B, T, 1 + N, D)
    assert_same(m(x, GRID), slow_ptm(m, x, conv))

def test_ptm_with_weights_that_are_not_learned():
    m = filled(PTM(D, HEADS, alpha=0.7, beta=-1.3, learn_fusion=False)).eval()
    x = noise(B, T, 1 + N, D)
    assert (m.alpha, m.beta) == (0.7, -1.3)
    assert_same(m(x, GRID), slow_ptm(m, x, "residual2d"))
    learned = dict(PTM(D, HEADS, alpha=0.7, beta=-1.3).named_parameters())
    assert_same([learned["alpha"].item(), learned["beta"].item()], [0.7, -1.3], 1e-6)

def test_cpe():
    m = filled(CPE(D))
    y = noise(B, T, *GRID, D)
    assert_same(m(y), conv3d(y, m.conv.weight, m.conv.bias, groups=D))

def test_ctm():
    m = filled(CTM(D, HEADS))
    x, y = noise(2, B, T, *GRID, D)
    assert_same(m(x, y), slow_ctm(m, x, y))

@pytest.mark.parametrize("training", (True, False))
def test_stdm(training):
    m = filled(STDM(D)).train(training)
    y = noise(B, T, *GRID, D)
    assert_same(m(y), slow_stdm(m, y))

@pytest.mark.parametrize("fusion, grid, training", [
    ("mul", GRID, True), ("add", GRID, False), ("mul+add", GRID, True),
    ("mul", (4, 4), False),                                     # not the grid that it is built for
])
def test_smem(fusion, grid, training):
    m = filled(SMEM(D, GRID, fusion)).train(training)
    y = noise(B, T, *grid, D)
    assert_same(m(y), slow_smem(m, y, fusion))

def test_smem_refuses_a_single_token_frame():
    with pytest.raises(ValueError, match="only one"):
        SMEM(D, GRID)(torch.zeros(B, 1, *GRID, D))
    one_frame = torch.zeros(B, 3, 2, 32, 32)
    assert small(smem_t_layers=())(one_frame).shape == (B, 5)   # without SMEM it is fine

# ----- Figure 1 -------------------------------------------------------------

@pytest.mark.parametrize("stride, kernel", [(1, 1), (2, 3), (4, 5)])
def test_stem(stride, kernel):
    m = filled(small(stem_stride=stride, stem_kernel=kernel))
    video = noise(B, 3, 8, 32, 32)
    x = torch.zeros(B, 8 // stride, 17, D, dtype=video.dtype)
    x[:, :, 0] = m.class_embedding + m.positional_embedding[0]
    for t, h, w in product(range(8 // stride), range(4), range(4)):
        i = 1 + 4 * h + w
        x[:, t, i] = m.positional_embedding[i]
        for k in range(kernel):
            frame = stride * t + k - kernel // 2
            if 0 <= frame < 8:
                patch = video[:, :, frame, 8 * h:8 * h + 8, 8 * w:8 * w + 8]
                x[:, t, i] += torch.einsum("bchw,dchw->bd", patch, m.conv1.weight[:, :, k])
    tokens, grid = m.stem(video)
    assert grid == (4, 4)
    assert_same(tokens, norm(m.ln_pre, x))

@pytest.mark.parametrize("changes", [
    dict(),
    dict(ptm_layers=(0,), smem_t_layers=(), smem_st_layers=(1,), stdm_layers=(1,)),
    dict(ptm_layers=(1, 2), smem_t_layers=(1,), smem_st_layers=(0, 2)),
])
def test_the_modules_are_wired_as_in_figure_1(changes):
    m = filled(small(**changes)).eval()
    video = noise(B, 3, 8, 32, 32)
    c = m.config
    x, _ = m.stem(video)
    y = x[:, :, 1:].reshape(B, 4, 4, 4, D)
    for i in range(3):
        assert type(m.blocks[i]) is (PTM if i in c.ptm_layers else Block)
        x = m.blocks[i](x, (4, 4))
        class_token, patches = x[:, :, :1], x[:, :, 1:].reshape(B, 4, 4, 4, D)
        if i in c.smem_st_layers:
            patches = m.smem_st[i](patches)
        y = m.ctm[i](patches, y)
        if i in c.smem_t_layers:
            y = m.smem_t[i](y)
        if i in c.stdm_layers:
            patches = patches + m.stdm[i](y)
        x = torch.cat([class_token, patches.reshape(B, 4, 16, D)], dim=2)
    assert_same(m.forward_features(video), (x, y))
    assert_same(m(video), linear(m.head, norm(m.ln_post, y.sum(dim=(1, 2, 3)) / 64)))

BLIND = dict(stem_kernel=1, stem_stride=1, ptm_layers=(), stdm_layers=(), smem_t_layers=())

@pytest.mark.parametrize("path", [{}, dict(stem_kernel=3), dict(ptm_layers=(1,)),
                                  dict(stdm_layers=(0,)), dict(smem_t_layers=(1,)), "cpe"])
def test_each_path_for_time_tells_a_clip_from_its_reverse(path):
    # Without these paths, frames are a set. CPE is the only one that no field switches off.
    m = filled(small(**{**BLIND, **({} if path == "cpe" else path)})).eval()
    if path != "cpe":
        for ctm in m.ctm:
            ctm.cpe.conv.weight.data[:, :, [0, 2]] = 0
    video = noise(B, 3, 8, 32, 32)
    with torch.no_grad():
        difference = (m(video) - m(video.flip(2))).abs().max() / m(video).abs().max()
    assert difference > 1e-6 if path else difference < 1e-12

def test_clips_of_a_batch_do_not_see_each_other_in_evaluation():
    m = filled(small(smem_st_layers=(0,))).eval()
    video = noise(3, 3, 8, 32, 32)
    with torch.no_grad():
        assert_same(m(video), torch.cat([m(clip[None]) for clip in video]))

def test_a_subclass_can_replace_any_module():
    for name in ("Block", "PTM", "CTM", "STDM", "SMEM"):
        Own = type("Own", (getattr(STDFormer, name),), {})
        Changed = type("Changed", (STDFormer,), {name: Own})
        modules = Changed(small().config).modules()
        assert any(type(m) is Own for m in modules), name

# ----- Shapes, parameters, gradients ----------------------------------------

@pytest.mark.parametrize("frames, size", [(4, 32), (12, 32), (8, 16), (8, 48)])
def test_other_frames_and_sizes_than_it_is_built_for(frames, size):
    m = small().eval()
    video = torch.randn(B, 3, frames, size, size)
    x, y = m.forward_features(video)
    assert x.shape == (B, frames // 2, 1 + (size // 8) ** 2, D)
    assert y.shape == (B, frames // 2, size // 8, size // 8, D)
    assert m(video).shape == (B, 5) and m(video).isfinite().all()

@pytest.mark.parametrize("shape", [(1, 3, 8, 32, 40), (1, 3, 8, 36, 36), (1, 3, 7, 32, 32)])
def test_a_video_that_does_not_fit_is_refused_with_its_shape(shape):
    with pytest.raises(ValueError) as e:
        small()(torch.zeros(shape))
    assert str(shape) in str(e.value) and "multiple of 8" in str(e.value)

def test_b16_has_the_parameters_of_the_architecture():
    with torch.device("meta"):
        m = build_model("b16")
    D, N, L = 768, 14 * 14, 12

    def lin(i, o):
        return i * o + o

    def stage(channels):                        # a 3x3 convolution without bias, and its BatchNorm
        return 9 * channels * (D // 4) + 2 * (D // 4)

    ln = 2 * D
    mlp = lin(D, 4 * D) + lin(4 * D, D)
    stem = D * 3 * 3 * 16 * 16 + D + (1 + N) * D + ln   # conv1, class token, positions, ln_pre
    block = 2 * ln + lin(D, 3 * D) + lin(D, D) + mlp
    dpe = 2 * D + lin(D, 512) + 3 * 512 + 512 + lin(512, D)     # its BatchNorm; D / 1.5 is 512
    conv = lin(D, D // 4) + 9 * (D // 4) ** 2 + D // 4 + lin(D // 4, D)
    ptm = block + dpe + conv + 2                        # alpha and beta
    ctm = 27 * D + D + 3 * ln + lin(D, D) + D * 2 * D + lin(D, D) + mlp     # no bias on key, value
    stdm = 9 * D + 2 * D + 3 * D + 2 * D + lin(D, D)
    smem = 9 * D * (D // 8) + D // 8 + stage(N) + 2 * stage(D // 4) + 9 * (D // 4) * D + D
    expected = stem + 8 * block + 4 * ptm + L * ctm + 11 * stdm + smem + ln + lin(D, 174)
    assert sum(p.numel() for p in m.parameters()) == expected
    assert round(expected / 1e6, 2) == 187.73

@pytest.mark.parametrize("changes", [
    dict(), dict(ptm_conv="residual3d"), dict(ptm_conv="attention2d"), dict(ptm_conv="attention3d"),
    dict(smem_fusion="add"), dict(smem_fusion="mul+add"), dict(smem_t_layers=(0,)),
    dict(smem_st_layers=(2,)), dict(smem_t_layers=()), dict(smem_grid=3), dict(stdm_layers=()),
    dict(ptm_layers=()), dict(ptm_layers=(0, 1, 2), learn_fusion=False),
    dict(stem_stride=1, stem_kernel=1), dict(depth=1),
], ids=str)
def test_every_parameter_gets_a_gradient_and_every_buffer_is_used(changes):
    m = small(**changes).double().train()
    before = {name: b.clone() for name, b in m.named_buffers()}
    F.cross_entropy(m(noise(B, 3, 8, 32, 32)), torch.tensor([1, 3])).backward()
    for name, p in m.named_parameters():
        # Channel by channel. A gradient that is 0 by nature is rounding noise of about 1e-17.
        alive = p.grad.reshape(len(p) if p.ndim else 1, -1).abs().amax(1) > 1e-11
        if name.endswith("in_proj_bias"):
            alive[D:2 * D] = True               # CLIP has a bias on keys, which the softmax cancels
        assert alive.all(), name
    for name, b in m.named_buffers():           # all are BatchNorm's, which a training step moves
        assert not torch.equal(b, before[name]), name

def test_initial_values_are_those_of_the_table():
    width = 128
    depth = 4
    m = small(dim=width, depth=depth)

    def assert_std(tensor, expected, name):
        chance = 0.02 + 5 / (2 * tensor.numel()) ** 0.5         # of so many random numbers
        assert tensor.std().item() == pytest.approx(expected, rel=chance), name

    for name, layer in m.named_modules():
        if isinstance(layer, nn.Linear):
            ends_branch = name.endswith(("out_proj", "c_proj", "expand", "pointwise"))
            assert_std(layer.weight, ((2 * depth if ends_branch else 1) * width) ** -0.5, name)
            assert layer.bias is None or not layer.bias.any(), name
        if isinstance(layer, Attention):        # its q, k and v are one bare parameter, as in CLIP
            assert_std(layer.in_proj_weight, width ** -0.5, name)
            assert not layer.in_proj_bias.any(), name
        if isinstance(layer, (nn.LayerNorm, nn.BatchNorm2d)):
            assert (layer.weight == 1).all() and not layer.bias.any(), name
    assert_std(m.class_embedding, width ** -0.5, "class_embedding")
    assert_std(m.positional_embedding, width ** -0.5, "positional_embedding")

# ----- Training: stochastic depth, dropout, checkpointing -------------------

def test_stochastic_depth_rises_with_the_layers():
    m = small(depth=5, drop_path=0.2, ctm_drop_path=0.4)
    assert [b.drop_path.p for b in m.blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [c.drop_path.p for c in m.ctm] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])

def test_stochastic_depth_drops_whole_clips_from_every_residual_path():
    tokens = torch.randn(16, T, 1 + N, D)
    x, y = torch.randn(2, 16, T, *GRID, D)
    for Module, inputs in (Block, (tokens,)), (PTM, (tokens, GRID)), (CTM, (x, y)):
        # Nearly everything dropped leaves the residual connection.
        out = Module(D, HEADS, drop_path=1 - 1e-9).train()(*inputs)
        assert torch.equal(out, inputs[0]), Module
        torch.manual_seed(0)
        out = Module(D, HEADS, drop_path=0.5).train()(*inputs)
        untouched = (out == inputs[0]).flatten(1).all(1)
        assert 0 < untouched.sum() < 16, Module

@pytest.mark.parametrize("field", ("drop_path", "ctm_drop_path", "ctm_dropout", "head_dropout"))
def test_dropout_acts_in_training_only(field):
    m = small(**{field: 0.5})
    plain = small()
    video = torch.randn(B, 3, 8, 32, 32)
    with torch.no_grad():
        assert torch.equal(m.eval()(video), plain.eval()(video))
        assert not torch.equal(m.train()(video), plain.train()(video))

def test_checkpointing_changes_nothing_but_memory():
    def step(checkpointing):
        m = small(drop_path=0.4, ctm_drop_path=0.4, ctm_dropout=0.3, head_dropout=0.3).train()
        m.checkpointing = checkpointing
        runs = []
        for module in (*m.blocks, *m.ctm):
            module.register_forward_pre_hook(lambda module, inputs: runs.append(type(module)))
        torch.manual_seed(2)
        loss = F.cross_entropy(m(torch.randn(B, 3, 8, 32, 32)), torch.tensor([1, 3]))
        loss.backward()
        return runs, [loss.detach(), *[p.grad for p in m.parameters()], *m.buffers()]

    runs, plain = step(False)
    runs_again, checkpointed = step(True)
    assert_same(plain, checkpointed, 1e-6)
    # All but the PTM run a second time, in the backward pass.
    assert len(runs) == 6 and len(runs_again) == 11 and runs_again.count(PTM) == 1

# ----- ModelConfig ----------------------------------------------------------

@pytest.mark.parametrize("depth, ptm, stdm, smem", [
    (12, range(8, 12), range(11), 4), (24, range(16, 24), range(23), 8), (1, [], [], 0)])
def test_positions_of_the_modules_scale_with_the_depth(depth, ptm, stdm, smem):
    c = ModelConfig(depth=depth)
    assert c.ptm_layers == tuple(ptm) and c.stdm_layers == tuple(stdm)
    assert c.smem_t_layers == (smem,) and c.smem_st_layers == ()

def test_a_config_survives_its_dict():
    for c in ModelConfig(), ModelConfig(ptm_layers=[], smem_st_layers=[1, 2], smem_grid=7):
        assert ModelConfig(**asdict(c)) == c

@pytest.mark.parametrize("field, value", [
    ("heads", 7), ("image_size", 200), ("num_frames", 15), ("num_frames", 2), ("stem_kernel", 4),
    ("ptm_conv", "unknown"), ("smem_fusion", "unknown"), ("ptm_layers", (12,)),
    ("stdm_layers", (3, 11)),                   # there is no x after the last layer
    ("smem_t_layers", (-1,)), ("smem_st_layers", (12,)),
])
def test_an_impossible_value_is_refused_with_its_field(field, value):
    found = value[-1] if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=rf"\b{field}\b.* {found}\b"):
        ModelConfig(**{field: value})
