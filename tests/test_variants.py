"""scripts/variants.py: each variant is what its line in the table says, and trains like the rest.

python -m pytest -q tests/test_variants.py
"""
import json
import re
from dataclasses import asdict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import evaluate
import model
import train
from model import (CTM, DPE, MODELS, PTM, SMEM, STDM, ModelConfig, PTMConv, STDFormer,
                   build_model)
from scripts import variants
from scripts.describe import count_macs, video_of
from scripts.variants import VARIANTS, GatedSMEM

PLAIN_VITS = ("frames", "divided")
READINGS = [name for name in VARIANTS if name not in (*PLAIN_VITS, "bn_frozen")]
B, T, GRID, D, HEADS = 2, 3, (3, 2), 32, 4
N = GRID[0] * GRID[1]


def small(variant, **changes):
    torch.manual_seed(0)
    config = dict(MODELS["tiny"], depth=2, num_frames=8, num_classes=5)
    return VARIANTS[variant](ModelConfig(**{**config, **changes})).eval()


def part(variant, base, **changes):
    """The first module of this kind in a small variant, with random parameters."""
    modules = small(variant, dim=D, ptm_layers=(1,), **changes).modules()
    found = next(m for m in modules if isinstance(m, base))
    for p in found.parameters():
        nn.init.normal_(p, std=0.1)
    return found


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def close(a, b):
    return torch.allclose(a, b, atol=1e-5)


# ----- All variants ---------------------------------------------------------

@pytest.mark.parametrize("size", ("tiny", "b16"))
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "stdm_dense"])
def test_variants_have_equal_parameters_and_arithmetic(variant, size):
    # All but the dense STDM, which has five times the parameters.
    with torch.device("meta"):
        default, other = build_model(size), VARIANTS[variant](ModelConfig(**MODELS[size]))
    count = [sum(p.numel() for p in m.parameters()) for m in (default, other)]
    assert abs(count[1] / count[0] - 1) < 0.07, count
    macs = [count_macs(m, video_of(m.config))["Global"] for m in (default, other)]
    # Attention over T times as many tokens costs more on the large grid of b16.
    assert abs(macs[1] / macs[0] - 1) < 0.11, macs


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    network = small(variant, ptm_layers=(1,)).train()
    if variant == "ctm_zero":                   # as after some steps; it has a test of its own
        for ctm in network.ctm:
            nn.init.normal_(ctm.out_proj.weight)
    network(tokens(2, 3, 8, 32, 32)).square().sum().backward()
    without = [name for name, p in network.named_parameters() if not p.grad.any()]
    assert not without


@pytest.mark.parametrize("variant", READINGS)
def test_a_reading_differs_from_the_default_and_leaves_it_as_it_is(variant):
    parts = {name: getattr(model, name) for name in ("DPE", "PTMConv", "PTM", "CPE", "CTM", "STDM")}
    network, video = small(variant, ptm_layers=(1,)), tokens(2, 3, 8, 32, 32)
    assert isinstance(network, STDFormer)
    assert parts == {name: getattr(model, name) for name in parts}
    torch.manual_seed(0)
    default = build_model("tiny", depth=2, num_frames=8, num_classes=5, ptm_layers=(1,)).eval()
    assert not torch.equal(network(video), default(video))


def test_a_model_that_cannot_be_built_leaves_the_default_as_it_is():
    with pytest.raises(ValueError, match="ptm_shortcut needs --ptm_conv residual"):
        small("ptm_shortcut", ptm_layers=(0,), ptm_conv="attention2d")
    with pytest.raises(ValueError, match="ptm_plane_space needs a 2D convolution"):
        small("ptm_plane_space", ptm_layers=(0,), ptm_conv="residual3d")
    assert model.PTM is PTM
    assert model.PTMConv is PTMConv


@pytest.mark.parametrize("variant", READINGS)
def test_plain_evaluation_refuses_the_checkpoint_of_a_reading(variant, tmp_path):
    network = small(variant)
    checkpoint = dict(model=network.state_dict(), model_config=asdict(network.config), args={},
                      classes=list("abcde"), mean=[0.5] * 3, std=[0.5] * 3)
    torch.save(checkpoint, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=f"variant_{variant}"):
        evaluate.main(["--ckpt", str(tmp_path / "last.pt"), "--device", "cpu"])


# ----- Other architectures --------------------------------------------------

def test_frames_ignores_order_and_divided_does_not():
    video = torch.randn(2, 3, 8, 32, 32)
    # Reversed by temporal strides of two frames
    reversed_pairs = video.unflatten(2, (4, 2)).flip(2).flatten(2, 3)
    frames, divided = small("frames"), small("divided")
    assert close(frames(video), frames(reversed_pairs))
    nn.init.normal_(divided.time_embedding)
    assert (divided(video) - divided(reversed_pairs)).abs().max() > 1e-3
    used = torch.zeros(2, 3, 8, 32, 32)
    used[:, :, ::2] = video[:, :, ::2]
    assert torch.equal(frames(video), frames(used))     # one frame of each stride, and no other


def test_divided_attention_sees_time_at_a_place_only():
    block = small("divided").blocks[0]
    x = torch.randn(1, 4, 1 + 16, 64)

    def over_time(z):
        z = block.ln_t(z).transpose(1, 2).flatten(0, 1)
        return block.attn_t(z).view(1, 17, 4, 64).transpose(1, 2)

    changed = x.clone()
    changed[:, :, 3] += 1
    different = (over_time(x) != over_time(changed)).any(-1)[0]         # (T, 1+N)
    assert different[:, 3].all()
    assert not different[:, torch.arange(17) != 3].any()


@pytest.mark.parametrize("variant", PLAIN_VITS)
def test_checkpointing_changes_nothing(variant):
    network, video = small(variant).train(), tokens(2, 3, 8, 32, 32)
    gradients = []
    for network.checkpointing in (False, True):
        network.zero_grad()
        network(video).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# ----- Readings of section 3.2 ----------------------------------------------

@pytest.mark.parametrize("variant, width", [("dpe_no_bn", 2 * D // 3), ("dpe_wide", D)])
def test_dpe_without_batchnorm(variant, width):
    dpe, patches = part(variant, DPE).train(), tokens(B, T, N, D)
    assert dpe.conv.weight.shape == (width, 1, 3, 1)
    # The clips of a batch do not see each other.
    assert close(dpe(patches)[:1], dpe(patches[:1]))


def test_ptms_convolution_on_the_plane_of_a_frame():
    conv, patches = part("ptm_plane_space", PTM).conv, tokens(B, T, N, D)
    frames = []
    for t in range(T):
        z = conv.reduce(patches[:, t]).unflatten(1, GRID).permute(0, 3, 1, 2)       # (B, C, H, W)
        z = F.conv2d(z, conv.conv.weight, conv.conv.bias, padding=1)
        frames.append(conv.expand(z.flatten(2).transpose(1, 2)))
    assert close(conv(patches, GRID), torch.stack(frames, dim=1))


def slow_ptm(ptm, x, attend, convolve):
    """Eq. 1 without its residual connection: the x after DPE, and y1 + alpha y2 + beta y3."""
    dpe = ptm.dpe(x[:, :, 1:])
    x = torch.cat([x[:, :, :1], x[:, :, 1:] + dpe], dim=2)
    y1 = attend(ptm.ln_1(x))
    y3 = torch.zeros_like(x)
    y3[:, :, 1:] = convolve(x, y1)
    return x, y1 + ptm.alpha * ptm.mlp(ptm.ln_2(x)) + ptm.beta * y3


@pytest.mark.parametrize("conv", ("residual2d", "residual3d", "attention2d", "attention3d"))
def test_ptm_attends_over_space_and_time(conv):
    ptm, x = part("ptm_spacetime", PTM, ptm_conv=conv), tokens(B, T, 1 + N, D)

    def attend(z):                              # one clip after the other, all tokens in a row
        return torch.stack([ptm.attn(torch.cat(list(clip))[None]).view_as(clip) for clip in z])

    def convolve(x, y1):
        return ptm.conv((x if "residual" in conv else y1)[:, :, 1:], GRID)

    x_dpe, y = slow_ptm(ptm, x, attend, convolve)
    assert close(ptm(x, GRID), x_dpe + y)


@pytest.mark.parametrize("conv", ("residual2d", "residual3d"))
def test_ptms_convolution_in_place_of_the_identity(conv):
    ptm = part("ptm_shortcut", PTM, ptm_conv=conv, drop_path=0.9)
    x = tokens(B, T, 1 + N, D)

    def attend(z):                              # one frame after the other
        return torch.stack([ptm.attn(z[:, t]) for t in range(T)], dim=1)

    x_dpe, y = slow_ptm(ptm, x, attend, lambda x, y1: ptm.conv(x[:, :, 1:], GRID))
    out = ptm(x, GRID)
    assert close(out[:, :, 1:], y[:, :, 1:])
    assert close(out[:, :, :1], x[:, :, :1] + y[:, :, :1])      # the class token keeps its identity

    # Without an identity, no path is dropped. BatchNorm aside, training changes nothing.
    ptm.train().dpe.bn.eval()
    assert torch.equal(ptm(x, GRID), out)


# ----- Readings of section 3.3 ----------------------------------------------

@pytest.mark.parametrize("variant, residual", [
    ("ctm_memory", lambda x, y: y), ("ctm_both", lambda x, y: x + y)])
def test_the_residual_connection_of_ctm(variant, residual):
    ctm, (x, y) = part(variant, CTM), tokens(2, B, T, *GRID, D)
    encoded = y + ctm.cpe(y)
    z = residual(x, encoded) + ctm.cross_attention(ctm.ln_q(x), ctm.ln_kv(encoded))
    assert close(ctm(x, y), z + ctm.mlp(ctm.ln_2(z)))


def test_cpe_on_the_query_only():
    ctm, (x, y) = part("cpe_query", CTM), tokens(2, B, T, *GRID, D)
    encoded = x + ctm.cpe(x)
    z = encoded + ctm.cross_attention(ctm.ln_q(encoded), ctm.ln_kv(y))
    assert close(ctm(x, y), z + ctm.mlp(ctm.ln_2(z)))


def test_cpe_on_query_and_memory():
    ctm, (x, y) = part("cpe_both", CTM), tokens(2, B, T, *GRID, D)
    assert not torch.equal(ctm.cpe.query.conv.weight, ctm.cpe.conv.weight)
    query, memory = x + ctm.cpe.query(x), y + ctm.cpe(y)
    z = query + ctm.cross_attention(ctm.ln_q(query), ctm.ln_kv(memory))
    assert close(ctm(x, y), z + ctm.mlp(ctm.ln_2(z)))


def test_zero_ctm_starts_without_memory_and_starves_the_one_below():
    network = small("ctm_zero", stdm_layers=(), smem_t_layers=())
    video = torch.randn(2, 3, 8, 32, 32)
    before = network.forward_features(video)[1]
    nn.init.normal_(network.ctm[0].kv.weight)
    assert torch.equal(before, network.forward_features(video)[1])
    network(video).sum().backward()
    grads = [ctm.out_proj.weight.grad.abs().sum() for ctm in network.ctm]
    # This is why it is not the default: what lies below a silent CTM learns nothing.
    assert grads[-1] > 0 and grads[0] == 0


# ----- Readings of sections 3.4 and 3.5, and of the head --------------------

def test_dense_stdm_mixes_channels_in_every_convolution():
    stdm = part("stdm_dense", STDM)
    assert stdm.conv_s.weight.shape == (D, D, 3, 3)
    assert stdm.conv_t.weight.shape == (D, D, 3, 1)
    with torch.device("meta"):
        b16 = VARIANTS["stdm_dense"](ModelConfig(**MODELS["b16"]))
    parameters = sum(p.numel() for p in b16.stdm[0].parameters())
    assert parameters == 768 ** 2 * 13 + 4 * 768 + 768
    assert stdm(torch.randn(B, T, *GRID, D)).shape == (B, T, *GRID, D)


def test_smem_gate_multiplies():
    network = small("smem_gate")
    gates = [m for m in network.modules() if isinstance(m, SMEM)]
    assert gates and all(type(m) is GatedSMEM for m in gates)
    y, plain = torch.randn(2, 4, 4, 4, 64), SMEM(64, (4, 4)).eval()
    plain.load_state_dict(gates[0].state_dict())
    motion = plain(y) - y
    assert close(gates[0](y), y * 2 * torch.sigmoid(motion))


@pytest.mark.parametrize("variant", ("smem_unit", "smem_relu", "smem_unit_relu"))
def test_smem_correlation_variants(variant):
    f = torch.randn(2, 3, 16, 8)
    c = torch.zeros(2, 2, 16, 16)
    for t in range(2):
        a, b = f[:, t], f[:, t + 1]
        if "unit" in variant:
            c[:, t] = F.cosine_similarity(a[:, :, None], b[:, None], dim=-1)
        else:
            c[:, t] = a @ b.transpose(1, 2) / 8 ** 0.5
    if "relu" in variant:
        c = c.clamp(min=0)
    assert torch.allclose(part(variant, SMEM).correlation(f), c, atol=1e-6)


def test_the_head_sees_both_branches():
    network, video = small("head_fused"), tokens(2, 3, 8, 32, 32)
    x, y = network.forward_features(video)
    patches, class_token = y.flatten(1, 3).mean(1), x[:, :, 0].mean(1)
    half = network.head(network.ln_post((patches + class_token) / 2))
    assert close(network(video), half)          # where it starts
    nn.init.normal_(network.head.gate)
    gate = torch.sigmoid(network.head.gate)
    z = gate * patches + (1 - gate) * class_token
    assert close(network(video), network.head(network.ln_post(z)))


# ----- From CLIP's weights --------------------------------------------------

def clip_file(path):
    """A file with the names and shapes of a CLIP that fits small()."""
    torch.manual_seed(1)
    state = {}
    for name, tensor in build_model("tiny", depth=2, num_frames=8).state_dict().items():
        if model.is_clip_parameter(name):
            shape = tensor[:, :, 0].shape if name == "conv1.weight" else tensor.shape
            name = name.replace("blocks.", "transformer.resblocks.")
            state[f"visual.{name}"] = 0.1 * torch.randn(shape)
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("variant", READINGS)
def test_readings_start_from_clip(variant, tmp_path):
    network = small(variant, ptm_layers=(1,), smem_st_layers=(0,))
    conv = {name: p.clone() for name, p in network.blocks[1].conv.named_parameters()}
    loaded, new = variants.load_clip(network, clip_file(tmp_path / "clip.pt"))
    assert loaded + new == len(list(network.parameters()))
    silent = [network.blocks[1].dpe.expand, network.stdm[0].pointwise, network.smem_st[0].conv_out]
    if variant == "ptm_shortcut":               # it has to carry x on
        assert all(torch.equal(p, conv[n]) for n, p in network.blocks[1].conv.named_parameters())
        assert conv["expand.weight"].any()
    else:
        silent.append(network.blocks[1].conv.expand)
    assert not any(p.any() for layer in silent for p in layer.parameters())


def test_new_parameters_of_a_reading_are_not_clips():
    # train.py gives CLIP's parameters another learning rate, or freezes them.
    default = {name for name, _ in small("ctm_memory").named_parameters()}
    for variant in READINGS:
        names = {name for name, _ in small(variant).named_parameters()}
        assert not [name for name in names - default if model.is_clip_parameter(name)], variant


# ----- The command ----------------------------------------------------------

@pytest.fixture
def put_back(monkeypatch):
    """What variants.main replaces is put back afterwards."""
    for module, name in ((train, "STDFormer"), (train, "load_clip"), (evaluate, "STDFormer")):
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    from scripts.toy_data import make_toy
    root = tmp_path_factory.mktemp("variants") / "toy"
    make_toy(root, seed=0, train=20, validation=10)
    return str(root)


@pytest.mark.parametrize("variant", PLAIN_VITS)
def test_plain_vits_refuse_clip_weights(variant, toy, tmp_path, put_back):
    flags = ["--data_root", toy, "--out_dir", str(tmp_path / "out"), "--clip", "openai",
             "--device", "cpu"]
    with pytest.raises(ValueError, match="--clip openai does not fit the [0-9]+ layers of .*ViT"):
        variants.main([variant, "train", *flags])


@pytest.mark.parametrize("variant", ("divided", "cpe_both"))
def test_a_variant_trains_and_evaluates_with_the_same_programs(
        variant, toy, tmp_path, put_back, capsys):
    out = tmp_path / "out"
    variants.main([variant, "train", "--data_root", toy, "--out_dir", str(out), "--epochs", "1",
                   "--warmup_epochs", "0", "--batch_size", "20", "--workers", "0", "--depth", "2",
                   "--device", "cpu"])
    state = torch.load(out / "last.pt", weights_only=True)["model"]
    assert state.keys() == small(variant).state_dict().keys()
    ckpt = str(out / "last.pt")
    variants.main([variant, "evaluate", "--ckpt", ckpt, "--workers", "0", "--device", "cpu"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"top1 [\d.]+ top5 [\d.]+ clips 10 views 16x3x1", last)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["train", "eval"]


@pytest.mark.parametrize("argv", ([], ["frames"], ["nothing", "train"], ["frames", "walk"]))
def test_an_unknown_variant_is_refused_with_the_list(argv):
    with pytest.raises(SystemExit, match="frames.divided.dpe_no_bn.* train.evaluate"):
        variants.main(argv)


def test_every_variant_is_described():
    described = re.findall(r"^    (\w+)  +\S", variants.__doc__, re.MULTILINE)
    assert described == list(VARIANTS)
