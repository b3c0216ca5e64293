"""load_clip: what comes out equals open_clip's own model, for every file format; files that do not fit are refused.

python -m pytest -q tests/test_weights.py
"""
import os
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import CTM, PTM, SMEM, STDM, build_model, is_clip_parameter, load_clip, resize_positions

# ----------------------------------------------------------------------------------------------------
# A whole ViT-B/16 against open_clip
# ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    """open_clip's ViT-B-16-quickgelu, nothing in its image tower at an initial value, all of it exact in fp16."""
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16-quickgelu").eval().requires_grad_(False)
    for p in model.visual.parameters():
        p += 0.2 * torch.randn_like(p) if p.ndim == 1 else 0.02 * torch.randn_like(p)
        p.copy_(p.half())                                   # OpenAI's archive holds fp16: with this it holds the same numbers
    return model


@pytest.fixture(scope="module")
def video():
    return torch.randn(1, 3, 4, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stem_tokens(clip, video):
    """What open_clip's transformer gets to see of frames 0 and 2, the centres of the stem's kernel. (T, 1+N, D)"""
    v = clip.visual
    x = v.conv1(video[0, :, ::2].transpose(0, 1)).flatten(2).transpose(1, 2)
    x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1) + v.positional_embedding
    return v.ln_pre(x)


@pytest.fixture(scope="module")
def clip_tokens(clip, stem_tokens):
    return clip.visual.transformer(stem_tokens)


@pytest.fixture(scope="module")
def parallel_tokens(clip, stem_tokens):
    """The same with attention and FFN side by side in the last four layers, where b16 has PTMs."""
    x = stem_tokens
    for i, block in enumerate(clip.visual.transformer.resblocks):
        if i < 8:
            x = block(x)
        else:
            x = x + block.attention(block.ln_1(x)) + block.mlp(block.ln_2(x))
    return x


@pytest.fixture(scope="module")
def b16():
    """Built once, as building takes longer than loading. SMEM is absent: it stands in the way of fact 2."""
    torch.manual_seed(1)
    return build_model("b16", num_frames=4, ptm_layers=(), smem_layers=()).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def b16_ptm():
    torch.manual_seed(1)
    return build_model("b16", num_frames=4, smem_layers=()).eval().requires_grad_(False)


def openai_archive(clip, file):
    """OpenAI's ViT-B-16.pt: a TorchScript archive in fp16, with three integers among its tensors."""
    archive = nn.Identity()                                 # any module with a forward; traced for its state alone
    sizes = dict(input_resolution=torch.tensor(224), context_length=torch.tensor(77), vocab_size=torch.tensor(49408))
    for name, tensor in {**whole_clip(clip), **sizes}.items():
        *path, name = name.split(".")
        module = archive
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(name, tensor.half() if tensor.is_floating_point() else tensor)
    torch.jit.trace(archive, torch.zeros(1)).save(file)


def whole_clip(clip):
    """The state of both towers; the text tower's tensors cut to one number each, which keeps the files small."""
    return {k: v if k.startswith("visual.") else v.flatten()[:1].clone() for k, v in clip.state_dict().items()}


def open_clip_training(clip, file):
    torch.save({"epoch": 3, "name": "a run", "state_dict": {"module." + k: v for k, v in whole_clip(clip).items()}}, file)


def plain_state(clip, file):
    torch.save(whole_clip(clip), file)


def safetensors(clip, file):
    pytest.importorskip("safetensors.torch").save_file(whole_clip(clip), file)


def image_tower(clip, file):
    torch.save(clip.visual.state_dict(), file)


FORMATS = {"openai.pt": openai_archive, "epoch_3.pt": open_clip_training, "open_clip_pytorch_model.bin": plain_state,
           "open_clip_model.safetensors": safetensors, "visual.pth": image_tower}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", FORMATS)
def test_a_loaded_model_starts_from_clip(name, clip, b16, b16_ptm, video, clip_tokens, parallel_tokens, tmp_path):
    file = str(tmp_path / name)
    FORMATS[name](clip, file)
    counts = []
    for model in (b16, b16_ptm):
        for parameter, p in model.named_parameters():
            if is_clip_parameter(parameter, model.config):
                p.fill_(torch.nan)                          # so that nothing is left of what another test loaded
        counts.append(load_clip(model, file))
        assert {p.dtype for p in model.state_dict().values() if p.is_floating_point()} == {torch.float32}
    os.remove(file)                                         # pytest keeps its folders for three runs

    tensors = 5 + 12 * 12 + 2                               # stem with ln_pre, 12 per block, ln_post
    assert counts == [(tensors, len(list(m.parameters())) - tensors) for m in (b16, b16_ptm)]

    x, y = b16.forward_features(video)
    assert (x[0] - clip_tokens).abs().max() < 1e-4                                      # fact 1
    assert (x[0] - parallel_tokens).abs().max() > 1

    x, _ = b16_ptm.forward_features(video)
    assert (x[0] - parallel_tokens).abs().max() < 1e-4                                  # fact 3
    print((x[0]-parallel_tokens).abs().max(), x.abs().max(), (clip_tokens-parallel_tokens).abs().max())
