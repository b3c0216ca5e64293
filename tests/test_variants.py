"""scripts/variants.py: each variant is what its line in the table says, and trains like the rest.

Protects: every variant builds, gives each parameter a gradient and cannot be taken for the default
model; every reading starts from CLIP; what each variant promises, against a slow reference; the
command.

python -m pytest -q tests/test_variants.py
"""
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from conftest import save_frames, write_v1
from model import (CTM, DPE, MODELS, PTM, SMEM, STDM, ModelConfig, build_model, is_clip_parameter,
                   load_clip, load_weights)
from scripts import variants
from scripts.variants import VARIANTS

OTHERS = ("frames", "divided", "shuffle_tokens")        # the rest are readings of the paper
READINGS = [name for name in VARIANTS if name not in OTHERS]
B, T, GRID, D, HEADS = 2, 6, (3, 2), 32, 4
N = GRID[0] * GRID[1]
SMALL = dict(MODELS["tiny"], dim=D, depth=2, num_frames=8, num_classes=5, ptm_layers=(1,))

def small(variant, **changes):
    torch.manual_seed(0)
    return VARIANTS[variant](ModelConfig(**{**SMALL, **changes})).eval()

def part(variant, base, **changes):
    """The first module of this kind in a small variant, with random parameters."""
    found = next(m for m in small(variant, **changes).modules() if isinstance(m, base))
    for p in found.parameters():
        nn.init.normal_(p, std=0.2)
    return found

def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))

VIDEO = noise(2, 3, 8, 32, 32)

def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

# ----- All variants ---------------------------------------------------------

def test_every_variant_is_described():
    described = re.findall(r"^    (\w+)  +\S", variants.__doc__, re.MULTILINE)
    assert described == list(VARIANTS)

@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_reaches_every_parameter_and_lowers_the_loss(variant):
    network = small(variant).train()
    if variant.startswith("ctm_zero"):          # as after some steps; there is another test of it
        for ctm in network.ctm:
            nn.init.normal_(ctm.out_proj.weight, std=0.1)
            nn.init.normal_(ctm.mlp.c_proj.weight, std=0.1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(network(VIDEO), torch.tensor([1, 3]))
        loss.backward()
        assert not [name for name, p in network.named_parameters() if not p.grad.any()]
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]

@pytest.fixture(scope="module")
def default():
    torch.manual_seed(0)
    return build_model("tiny", **SMALL)

@pytest.mark.parametrize("variant", READINGS)
def test_a_reading_differs_from_the_default_and_is_not_taken_for_it(variant, default):
    network = small(variant).train()            # some differ in training only
    assert (network(VIDEO) - default.train()(VIDEO)).abs().max() > 1e-3
    with pytest.raises(ValueError, match=f"best.pt does not fit(.|\n)*variant_{variant}"):
        load_weights(default, network.state_dict(), "best.pt")          # as evaluate.py does

@pytest.fixture(scope="module")
def clip_file(default, tmp_path_factory):
    """A file with the names and shapes of a CLIP that fits small()."""
    state = {}
    for name, tensor in default.state_dict().items():
        if is_clip_parameter(name):
            name = name.replace("blocks.", "transformer.resblocks.")
            state[f"visual.{name}"] = noise(*tensor.shape)
    state["visual.conv1.weight"] = state["visual.conv1.weight"][:, :, 0]
    path = tmp_path_factory.mktemp("variants") / "clip.pt"
    torch.save(state, path)
    return path

@pytest.mark.parametrize("variant", READINGS)
def test_a_reading_starts_from_clip(variant, clip_file):
    network = small(variant, smem_st_layers=(0,))
    loaded, _ = load_clip(network, clip_file)
    # No new parameter counts as CLIP's, for which train.py has another learning rate.
    assert loaded == sum(is_clip_parameter(name) for name, _ in network.named_parameters())

@pytest.mark.parametrize("variant", ("frames", "divided"))
def test_plain_vits_refuse_clip_and_have_as_many_parameters(variant, clip_file):
    with pytest.raises(ValueError, match="does not fit"):
        load_clip(small(variant), clip_file)
    for size in "tiny", "b16":
        with torch.device("meta"):
            models = build_model(size), VARIANTS[variant](ModelConfig(**MODELS[size]))
        default, other = [sum(p.numel() for p in m.parameters()) for m in models]
        assert abs(other / default - 1) < 0.07

# ----- Other architectures --------------------------------------------------

def test_frames_ignores_order_and_divided_does_not():
    backwards = VIDEO.unflatten(2, (4, 2)).flip(2).flatten(2, 3)        # by strides of two frames
    frames = small("frames")
    divided = small("divided")
    assert_close(frames(VIDEO), frames(backwards))
    nn.init.normal_(divided.time_embedding)
    assert (divided(VIDEO) - divided(backwards)).abs().max() > 1e-3
    used = torch.zeros_like(VIDEO)
    used[:, :, ::2] = VIDEO[:, :, ::2]
    assert torch.equal(frames(VIDEO), frames(used))     # one frame of each stride, and no other

def test_divided_attention_is_over_time_at_a_position_then_over_a_frame():
    block = small("divided").blocks[0]
    x = noise(B, T, 1 + N, D)
    over_time = [block.attn_t(block.ln_t(x[:, :, i])) for i in range(1 + N)]
    z = x + torch.stack(over_time, dim=2)
    z = z + torch.stack([block.attn(block.ln_1(z[:, t])) for t in range(T)], dim=1)
    assert_close(block(x), z + block.mlp(block.ln_2(z)))

# ----- Readings of section 3.2 ----------------------------------------------

@pytest.mark.parametrize("variant, width", [("dpe_no_bn", 2 * D // 3), ("dpe_wide", D)])
def test_dpe_without_batchnorm(variant, width):
    dpe = part(variant, DPE).train()
    patches = noise(B, T, N, D)
    z = dpe.reduce(patches)
    assert z.shape[-1] == width
    z = F.conv1d(z.permute(0, 2, 3, 1).flatten(0, 1), dpe.conv.weight[..., 0], dpe.conv.bias,
                 padding=1, groups=width)                                       # (B*N, width, T)
    assert_close(dpe(patches), dpe.expand(z.unflatten(0, (B, N)).permute(0, 3, 1, 2)))

def add_to_patches(x, patches):
    return torch.cat([x[:, :, :1], x[:, :, 1:] + patches], dim=2)

def slow_ptm(variant, ptm, x):
    """Eq. 1 with the change of each variant."""
    x = add_to_patches(x, ptm.dpe(x[:, :, 1:]))
    z = ptm.ln_1(x)
    if variant == "ptm_spacetime":              # all tokens of a clip in a row
        y1 = torch.stack([ptm.attn(torch.cat(list(clip))[None]).view_as(clip) for clip in z])
    else:                                       # one frame after the other
        y1 = torch.stack([ptm.attn(z[:, t]) for t in range(T)], dim=1)
    z = add_to_patches(x, ptm.dpe.second(x[:, :, 1:])) if variant == "dpe_double" else x
    y2 = ptm.alpha * ptm.mlp(ptm.ln_2(z))
    if variant == "ptm_serial":                 # the convolution of y1 in place of y1
        return x + y2 + torch.cat([y1[:, :, :1], ptm.conv(y1[:, :, 1:], GRID)], dim=2)
    y3 = ptm.beta * ptm.conv(x[:, :, 1:], GRID)
    if variant == "ptm_shortcut":               # the convolution of x in place of x, but ...
        x = torch.cat([x[:, :, :1], torch.zeros_like(x[:, :, 1:])], dim=2)      # the class token's
    return add_to_patches(x + y1 + y2, y3)

@pytest.mark.parametrize("variant", ("dpe_double", "ptm_spacetime", "ptm_shortcut", "ptm_serial"))
def test_ptm(variant):
    ptm = part(variant, PTM)
    x = noise(B, T, 1 + N, D)
    assert_close(ptm(x, GRID), slow_ptm(variant, ptm, x))

def test_shortcut_drops_no_path():
    ptm = part("ptm_shortcut", PTM, drop_path=0.9)
    x = noise(B, T, 1 + N, D)
    expected = ptm(x, GRID)
    ptm.train().dpe.bn.eval()
    assert torch.equal(ptm(x, GRID), expected)

def test_ptms_convolution_on_the_plane_of_a_frame():
    conv = part("ptm_plane_space", PTM).conv
    patches = noise(B, T, N, D)
    frames = []
    for t in range(T):
        z = conv.reduce(patches[:, t]).unflatten(1, GRID).permute(0, 3, 1, 2)   # (B, D/4, H, W)
        z = F.conv2d(z, conv.conv.weight, conv.conv.bias, padding=1)
        frames.append(conv.expand(z.flatten(2).transpose(1, 2)))
    assert_close(conv(patches, GRID), torch.stack(frames, dim=1))
    with pytest.raises(ValueError, match="ptm_plane_space"):
        small("ptm_plane_space", ptm_conv="residual3d")

# ----- Readings of section 3.3 ----------------------------------------------

def slow_ctm(variant, ctm, x, y):
    query, memory = x, y
    if variant in ("ctm_memory", "ctm_both", "cpe_both", "ctm_values"):
        memory = y + ctm.cpe(y)
    if variant == "cpe_query":
        query = x + ctm.cpe(x)
    if variant == "cpe_both":
        query = x + ctm.cpe_query(x)
    residual = {"ctm_memory": memory, "ctm_both": query + memory}.get(variant, query)
    if variant == "ctm_values":
        z = residual + ctm.out_proj(ctm.kv(ctm.ln_kv(memory)))
    else:
        z = residual + ctm.cross_attention(ctm.ln_q(query), ctm.ln_kv(memory))
    return z + ctm.mlp(ctm.ln_2(z))

@pytest.mark.parametrize("variant", ("ctm_memory", "ctm_both", "cpe_query", "cpe_both", "no_cpe",
                                     "ctm_values"))
def test_ctm(variant):
    ctm = part(variant, CTM)
    x, y = noise(2, B, T, *GRID, D)
    assert_close(ctm(x, y), slow_ctm(variant, ctm, x, y))

@pytest.mark.parametrize("variant", ("ctm_zero", "ctm_zero_ffn"))
def test_a_ctm_that_starts_at_zero_starves_the_one_below(variant):
    network = small(variant, stdm_layers=(), smem_t_layers=())
    x, y = noise(2, B, T, *GRID, D)
    z = x if variant == "ctm_zero_ffn" else x + network.ctm[0].mlp(network.ctm[0].ln_2(x))
    assert torch.equal(network.ctm[0](x, y), z)         # nothing comes from the memory
    # This is why it is not the default: what is below a silent CTM learns nothing.
    network(VIDEO).sum().backward()
    first, last = [ctm.out_proj.weight.grad.abs().sum() for ctm in network.ctm]
    assert last > 0 and first == 0

# ----- Readings of sections 3.4 and 3.5, and of the head --------------------

@pytest.mark.parametrize("variant, width", [("stdm_dense", D), ("stdm_bottleneck", D // 4)])
def test_dense_convolutions_in_stdm(variant, width):
    stdm = part(variant, STDM)
    assert stdm.conv_s.weight.shape == (width, width, 3, 3)
    assert stdm.conv_t.weight.shape == (width, width, 3, 1)
    whole = small(variant).stdm[0]
    assert whole(noise(B, T, *GRID, D)).shape == (B, T, *GRID, D)

def test_stdm_takes_y_from_before_smem():
    network = small("stdm_before_smem", smem_t_layers=(0,))
    found = {}
    for name in "ctm", "smem_t", "stdm":
        module = getattr(network, name)[0]
        module.register_forward_hook(
            lambda module, inputs, output, name=name: found.update({name: (inputs, output)}))
    network(VIDEO)
    assert found["stdm"][0][0] is found["ctm"][1] and found["smem_t"][0][0] is found["ctm"][1]

def test_smem_gate_multiplies():
    gate = part("smem_gate", SMEM)
    y = noise(B, T, 4, 4, D)
    plain = SMEM(D, (4, 4)).eval()
    plain.load_state_dict(gate.state_dict())
    assert_close(gate(y), y * 2 * torch.sigmoid(plain(y) - y))

@pytest.mark.parametrize("variant", ("smem_unit", "smem_relu", "smem_unit_relu"))
def test_the_correlation_of_smem(variant):
    f = noise(B, 3, 16, 8)
    if "unit" in variant:
        c = F.cosine_similarity(f[:, :-1, :, None], f[:, 1:, None], dim=-1)
    else:
        c = f[:, :-1] @ f[:, 1:].transpose(-2, -1) / 8 ** 0.5
    assert_close(part(variant, SMEM).correlation(f), c.clamp(min=0) if "relu" in variant else c)

def test_smem_window_compares_by_displacement():
    reach = 7
    side = 9                                    # so that some patches are too far from each other
    f = noise(1, 2, side * side, 4)
    found = variants.WindowSMEM(32, (side, side)).correlation(f)
    a, b = f[0].unflatten(1, (side, side))
    expected = torch.zeros(side, side, 2 * reach + 1, 2 * reach + 1)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            rows = slice(max(0, -dy), side - max(0, dy))
            columns = slice(max(0, -dx), side - max(0, dx))
            shifted = b.roll((-dy, -dx), (0, 1))
            product = (a * shifted).sum(-1) / 4 ** 0.5
            expected[rows, columns, reach + dy, reach + dx] = product[rows, columns]
    assert_close(found, expected.flatten(2).flatten(0, 1)[None, None])

def test_the_head_sees_both_branches():
    network = small("head_fused")
    x, y = network.forward_features(VIDEO)
    patches, class_token = y.flatten(1, 3).mean(1), x[:, :, 0].mean(1)
    half = network.head(network.ln_post((patches + class_token) / 2))
    assert_close(network(VIDEO), half)          # where it starts
    nn.init.normal_(network.head.gate)
    gate = torch.sigmoid(network.head.gate)
    z = gate * patches + (1 - gate) * class_token
    assert_close(network(VIDEO), network.head(network.ln_post(z)))

# ----- A choice of training, and a control ----------------------------------

def test_frozen_batchnorm_keeps_its_statistics():
    network = small("bn_frozen").train()
    before = {name: b.clone() for name, b in network.named_buffers()}
    together = network(VIDEO)
    assert all(torch.equal(b, before[name]) for name, b in network.named_buffers())
    assert_close(together[:1], network(VIDEO[:1]))      # clips do not see each other

def test_shuffled_tokens_are_the_token_frames_of_the_default_in_another_order(default):
    network = small("shuffle_tokens")
    network.load_state_dict(default.state_dict())       # it evaluates checkpoints of the default
    x, _ = network.stem(VIDEO)
    expected, _ = default.stem(VIDEO)
    for clip, frames in zip(x, expected):
        order = [(frames == frame).flatten(1).all(1).nonzero().item() for frame in clip]
        assert sorted(order) == [0, 1, 2, 3]
    assert not torch.equal(x, expected)

# ----- The command ----------------------------------------------------------

def test_a_variant_is_trained_and_evaluated_by_the_same_programs(tmp_path, capsys):
    classes = ["dark", "light"]
    clips = {split: [(f"{split}{i}", classes[i % 2]) for i in range(4)]
             for split in ("train", "validation")}
    folder = write_v1(tmp_path / "data", classes, **clips)
    for clip, name in clips["train"] + clips["validation"]:
        save_frames(folder / clip, np.full((4, 16, 16, 3), 255 * (name == "light")))
    flags = ("--dataset ssv1 --data_root data --recipe toy --dim 32 --depth 2 --num_frames 4 "
             "--image_size 16 --epochs 1 --batch_size 4 --out_dir out --workers 0 --device cpu")
    variants.main(["ptm_serial", "train", *flags.split()])
    state = torch.load("out/last.pt", weights_only=True)["model"]
    assert "head.variant_ptm_serial" in state and "blocks.1.beta" not in state
    variants.main("ptm_serial evaluate --ckpt out/last.pt --workers 0 --device cpu".split())
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"top1 [\d.]+ top5 [\d.]+ clips 4 views 4x3x1", last)

def test_a_variant_is_described_by_the_same_program(capsys):
    variants.main("stdm_dense describe --model tiny".split())
    stdm = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("stdm"))
    D = MODELS["tiny"]["dim"]
    dense = 9 * D * D + 3 * D * D + D * D           # parameters of the convolutions of one STDM
    assert float(stdm.split()[2]) == pytest.approx(3 * dense / 1e6, abs=0.01)

def test_the_pictures_of_a_variant_are_drawn_by_the_same_program(tmp_path):
    pytest.importorskip("matplotlib")
    network = small("smem_gate", num_classes=2)
    torch.save(dict(model=network.state_dict(), model_config=asdict(network.config),
                    classes=["dark", "light"], mean=data.CLIP_MEAN, std=data.CLIP_STD), "best.pt")
    flags = "--ckpt best.pt --toy 0 --only smem ctm --out out --device cpu"
    variants.main(["smem_gate", "visualize", *flags.split()])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ctm.png", "smem.png"]

@pytest.mark.parametrize("program", ("describe --model tiny", "visualize --ckpt a.pt --toy 0"))
def test_the_plain_transformers_have_no_modules_to_show(program):
    with pytest.raises(ValueError, match="divided has none"):
        variants.main(["divided", *program.split()])

@pytest.mark.parametrize("argv", (["frames"], ["nothing", "train"], ["frames", "walk"]))
def test_an_unknown_variant_is_refused_with_the_list(argv):
    with pytest.raises(SystemExit, match="frames.divided.dpe_no_bn.* train.evaluate.visual"):
        variants.main(argv)
