"""scripts/visualize.py shows what the modules compute, relevance lies on what changes, and each
picture is drawn of each kind of model.

python -m pytest -q tests/test_visualize.py
"""
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import data
from model import MODELS, ModelConfig, STDFormer
from scripts import visualize
from scripts.toy_data import TOY_CLASSES

CLASSES = ["Closing", "Opening", "Pushing something that cannot actually stand upright"]
TINY = dict(dim=32, depth=2, heads=2, num_frames=4, image_size=16, patch_size=8, num_classes=3,
            ptm_layers=(1,), stdm_layers=(0,), smem_t_layers=(0,))

def model_with(**options):
    """A tiny model with random weights."""
    torch.manual_seed(0)
    return STDFormer(ModelConfig(**{**MODELS["tiny"], **TINY, **options})).eval()

def save(model, path):
    checkpoint = dict(model=model.state_dict(), model_config=asdict(model.config), classes=CLASSES,
                      mean=data.CLIP_MEAN, std=data.CLIP_STD)
    torch.save(checkpoint, path)
    return path

def input_of(module, run):
    """The first input of a module during run()."""
    inputs = []
    hook = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    run()
    hook.remove()
    return inputs[0]

# ----- What is computed -----------------------------------------------------

def test_attention_is_what_ctm_computes():
    model = model_with()
    video = torch.randn(1, 3, 4, 16, 16)
    logits, seen = visualize.look_inside(model, video)
    with torch.no_grad():
        assert torch.equal(logits, model(video)[0])
        for i in range(2):
            weights = visualize.ctm_attention(seen, i, heads=2)                 # (N, heads, T, T)
            assert weights.shape == (4, 2, 2, 2)
            assert torch.allclose(weights.sum(-1), torch.ones(4, 2, 2))
            _, v = seen[f"ctm.{i}.kv"][1].chunk(2, dim=-1)
            v = v[0].flatten(1, 2).unflatten(-1, (2, 16)).permute(1, 2, 0, 3)
            attended = (weights @ v).permute(2, 0, 1, 3).flatten(2)             # (T, N, D)
            expected = input_of(model.ctm[i].out_proj, lambda: model(video))
            assert torch.allclose(attended, expected[0].flatten(1, 2), atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())

@pytest.mark.parametrize("size", (16, 24))              # 24: features take the size of the grid
def test_products_are_what_smem_computes(size):
    model = model_with(smem_st_layers=(1,))
    video = torch.randn(1, 3, 4, size, size)
    _, seen = visualize.look_inside(model, video)
    for name in "smem_t.0", "smem_st.1":
        smem = model.get_submodule(name)
        with torch.no_grad():
            # The channels of these maps, (T, N, H, W), are the patches of the next frame.
            maps = input_of(smem.stages, lambda: model(video))
            features = visualize.smem_features(seen, name, smem)
            products = smem.correlation(features[None])[0]
        assert torch.allclose(maps[:1].movedim(1, -1).flatten(1, 2), products, atol=1e-6)

def test_relevance_lies_where_the_clip_changes_and_sums_to_the_difference():
    model = model_with()
    video = torch.randn(1, 3, 1, 16, 16).repeat(1, 1, 4, 1, 1)
    heat, _, _ = visualize.relevance(model, video)
    assert torch.allclose(heat, torch.zeros_like(heat))
    video[:, :, :, :8, 8:] += torch.randn(1, 3, 4, 8, 8)                # one patch of four changes
    heat, own, static = visualize.relevance(model, video, steps=32)
    with torch.no_grad():
        logits = model(video)[0]
        expected = model(video.mean(2, keepdim=True).expand_as(video))[0, logits.argmax()]
    assert own == pytest.approx(logits.max().item(), abs=1e-5)
    assert static == pytest.approx(expected.item(), abs=1e-5)
    assert heat.shape == (2, 2, 2)
    assert heat.sum().item() == pytest.approx(own - static, abs=0.02 * abs(own - static) + 1e-3)
    assert heat[:, 0, 1].abs().min() > 1e-4
    heat[:, 0, 1] = 0
    assert heat.abs().max() < 1e-5

def test_the_patch_that_changes_most():
    video = torch.zeros(3, 4, 24, 24, dtype=torch.uint8)
    video[:, ::2, 16:, 8:16] = 200
    assert visualize.most_moving(video, (3, 3)) == (2, 1)

def test_the_outline_of_a_toy_clip_is_its_object():
    """Clip 8 lights an object up, so the object is what changes most."""
    video, masks, name = visualize.toy_view(8)
    assert name == TOY_CLASSES[4][0]
    assert video.shape == (3, 16, 48, 48) and masks.shape == (16, 48, 48)
    change = (video[:, -1].float() - video[:, 0].float()).abs().mean(0)
    inside = masks[0] > 0.5
    assert 50 < inside.sum() < 1200
    assert change[inside].mean() > 2 * change[~inside].mean()

# ----- What is drawn --------------------------------------------------------

def draw(ckpt, out, *flags):
    common = ("--ckpt", ckpt, "--device", "cpu", "--steps", 2, "--out", out)
    visualize.main([str(flag) for flag in (*common, *flags)])

KINDS = {
    "CTM only": (dict(ptm_layers=(), stdm_layers=(), smem_t_layers=()), {"stdm", "smem"}),
    "all modules": (dict(smem_st_layers=(0,)), set()),
    "six layers, ten token frames": (dict(depth=6, num_frames=20), set()),
}

@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_of_every_kind_of_model(kind, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options, absent = KINDS[kind]
    ckpt = save(model_with(**options), tmp_path / "best.pt")
    draw(ckpt, tmp_path / "out", "--toy", 3)
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(":")[0] for line in lines if "left out" in line} == absent
    pictures = {path.stem: path for path in (tmp_path / "out").iterdir()}
    assert set(pictures) == set(visualize.PICTURES) - absent
    for path in pictures.values():
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L"))
        assert pixels.shape[1] == 830 and pixels.std() > 15, path

def test_the_rows_of_order_are_what_the_model_answers(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    model = model_with()
    answers = []

    def ask(case, video):
        answers.append(video)
        return "Opening", 0.5

    monkeypatch.setattr(visualize.Case, "ask", ask)
    draw(save(model, tmp_path / "best.pt"), tmp_path, "--toy", 1, "--only", "order")
    video, _, _ = visualize.toy_view(1, 4, 16)
    _, own, reversed_, shuffled, still = answers        # the first is printed
    assert torch.equal(own, video)
    assert torch.equal(reversed_, video.flip(1))
    assert torch.equal(still, video[:, [2, 2, 2, 2]])
    assert sorted(shuffled.sum((0, 2, 3)).tolist()) == sorted(video.sum((0, 2, 3)).tolist())
    assert not torch.equal(shuffled, video)

def test_the_toys_classes_are_an_animation(tmp_path):
    pytest.importorskip("matplotlib")
    visualize.draw_toy_classes(tmp_path / "toy.webp", n=3)
    with Image.open(tmp_path / "toy.webp") as animation:
        assert animation.n_frames == 3

# ----- Refusals -------------------------------------------------------------

def test_what_cannot_be_shown_is_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    ckpt = save(model_with(), tmp_path / "best.pt")
    with pytest.raises(ValueError, match="--position is 0 2, expected .* a column from 0 to 1"):
        draw(ckpt, tmp_path / "out", "--toy", 0, "--position", 0, 2)
    with pytest.raises((ValueError, OSError), match="none.webm"):
        draw(ckpt, tmp_path / "out", "--video", tmp_path / "none.webm")
    for flags in (), ("--toy", 0, "--video", "x"), ("--toy", -1), ("--toy", 0, "--steps", 0):
        with pytest.raises(SystemExit):
            draw(ckpt, tmp_path / "out", *flags)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        draw(ckpt, tmp_path / "out", "--toy", 0)
    assert not (tmp_path / "out").exists()
