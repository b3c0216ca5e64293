"""load_clip: the tokens x of a loaded model are open_clip's own, from every kind of file.

Protects: parity with open_clip, at a small width and at that of ViT-B/16; each format of CLIP's
weights; which new paths start at zero, and that they can learn; positions for another image size;
errors that name the file. And load_checkpoint, which runs no code of a file.

python -m pytest -q tests/test_weights.py
"""
import os

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import build_model, is_clip_parameter, load_checkpoint, load_clip, resize_positions

open_clip = pytest.importorskip("open_clip")
D, DEPTH = 32, 3
TEXT = dict(layers=1, width=8, heads=1, vocab_size=8, context_length=4)     # it is not used
ALL_SILENT = dict(ptm_layers=(), smem_st_layers=(0, 2))     # CLIP's layers, with new paths into x
TENSORS = 5 + 12 * DEPTH + 2                                # stem with ln_pre, layers, ln_post

def small(**changes):
    """A model with all modules, and a PTM in its last layer."""
    torch.manual_seed(0)
    size = dict(dim=D, depth=DEPTH, heads=4, num_frames=8, num_classes=5)
    return build_model("tiny", **{**size, **changes})

@pytest.fixture(scope="module")
def clip():
    """A small CLIP of open_clip, with no parameter at 0 or 1, and all of them exact in fp16."""
    torch.manual_seed(1)
    vision = dict(layers=DEPTH, width=D, head_width=D // 4, patch_size=8, image_size=32)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT, quick_gelu=True)
    for p in model.eval().requires_grad_(False).parameters():
        p += 0.2 * torch.randn_like(p)
        p.copy_(p.half())
    return model

@pytest.fixture
def file(clip, tmp_path):
    path = tmp_path / "clip.pt"
    torch.save(clip.state_dict(), path)
    return path

# ----- Formats --------------------------------------------------------------

def openai_archive(clip, path):
    """As OpenAI's ViT-B-16.pt: TorchScript, fp16, with three integers among its tensors."""
    state = {name: tensor.half() for name, tensor in clip.state_dict().items()}
    for name in "input_resolution", "context_length", "vocab_size":
        state[name] = torch.tensor(32)
    archive = nn.Identity()                     # any module with a forward; only its state counts
    for name, tensor in state.items():
        *parents, name = name.split(".")
        module = archive
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_buffer(name, tensor)
    torch.jit.trace(archive, torch.zeros(1)).save(str(path))

def save(state, path):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)

def state_dict(clip, path):
    save(clip.state_dict(), path)

def open_clip_training(clip, path):
    state = {f"module.{name}": tensor for name, tensor in clip.state_dict().items()}
    save({"epoch": 3, "name": "a run", "state_dict": state}, path)

HUGGING_FACE = {"class_embedding": "embeddings.class_embedding", "ln_pre": "pre_layrnorm",
                "positional_embedding": "embeddings.position_embedding.weight",
                "conv1": "embeddings.patch_embedding", "ln_post": "post_layernorm"}
HUGGING_FACE_LAYER = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
                      "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}

def hugging_face(clip, path):
    """As CLIPModel saves it, with a text tower: query, key and value apart."""
    own = clip.visual.state_dict()
    state = {"text_model.final_layer_norm.weight": torch.zeros(8), "logit_scale": torch.tensor(4.6),
             "visual_projection.weight": own["proj"].T}
    for ours, theirs in HUGGING_FACE.items():
        for end in "", ".weight", ".bias":
            if ours + end in own:
                state[f"vision_model.{theirs}{end}"] = own[ours + end]
    for i in range(DEPTH):
        block, layer = f"transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
        for end in "weight", "bias":
            for ours, theirs in HUGGING_FACE_LAYER.items():
                state[f"{layer}.{theirs}.{end}"] = own[f"{block}.{ours}.{end}"]
            thirds = own[f"{block}.attn.in_proj_{end}"].chunk(3)
            for letter, tensor in zip("qkv", thirds):
                state[f"{layer}.self_attn.{letter}_proj.{end}"] = tensor
    save(state, path)

FORMATS = {
    "openai.pt": openai_archive,
    "open_clip.pt": state_dict,
    "open_clip_model.safetensors": state_dict,
    "epoch_3.pt": open_clip_training,
    "pytorch_model.bin": hugging_face,
    "model.safetensors": hugging_face,
}

# ----- Parity with open_clip ------------------------------------------------

def stem_tokens(clip, video):
    """What open_clip's transformer sees of frames 0, 2, ..., the centres of the stem's kernel."""
    v = clip.visual
    frames = video[:, :, ::2].transpose(1, 2).flatten(0, 1)                     # (B*T, 3, S, S)
    patches = v.conv1(frames).flatten(2).transpose(1, 2)
    x = torch.cat([v.class_embedding.expand(len(frames), 1, -1), patches], dim=1)
    return v.ln_pre(x + v.positional_embedding)

@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_those_of_open_clip(name, clip, tmp_path):
    FORMATS[name](clip, tmp_path / name)
    model = small(**ALL_SILENT).eval().requires_grad_(False)
    loaded, new = load_clip(model, tmp_path / name)
    assert loaded == TENSORS and loaded + new == len(list(model.parameters()))
    video = torch.randn(2, 3, 8, 32, 32)
    x, y = model.forward_features(video)
    expected = clip.visual.transformer(stem_tokens(clip, video))
    assert x.dtype == torch.float32             # of fp16 files as well
    assert (x.flatten(0, 1) - expected).abs().max() < 1e-4
    assert (y.flatten(2, 3) - x[:, :, 1:]).abs().max() > 0.1    # y is at work, and leaves x alone

def test_a_ptm_has_the_same_attention_and_ffn_side_by_side(clip, file):
    model = small().eval().requires_grad_(False)
    load_clip(model, file)
    video = torch.randn(2, 3, 8, 32, 32)
    expected = stem_tokens(clip, video)
    for block in clip.visual.transformer.resblocks[:2]:
        expected = block(expected)
    last = clip.visual.transformer.resblocks[2]
    expected = expected + last.attention(last.ln_1(expected)) + last.mlp(last.ln_2(expected))
    x, _ = model.forward_features(video)
    assert (x.flatten(0, 1) - expected).abs().max() < 1e-4

def test_vit_b16_at_its_full_size(monkeypatch):
    config = open_clip.get_model_config("ViT-B-16-quickgelu")
    config["text_cfg"] = TEXT
    torch.manual_seed(1)
    clip = open_clip.CLIP(**config).eval().requires_grad_(False)
    asked = []
    monkeypatch.setattr(open_clip, "create_model",
                        lambda name, pretrained: asked.append((name, pretrained)) or clip)
    with torch.device("meta"):                  # random numbers for the CTMs would take seconds
        model = build_model("b16", ptm_layers=(), stdm_layers=(), smem_t_layers=())
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for p in model.parameters():
        p.zero_()
    loaded, _ = load_clip(model, "openai")
    assert asked == [("ViT-B-16-quickgelu", "openai")] and loaded == 5 + 12 * 12 + 2
    video = torch.randn(1, 3, 2, 224, 224)
    x, _ = model.forward_features(video)
    feature = model.ln_post(x[:, 0, 0]) @ clip.visual.proj
    assert (feature - clip.encode_image(video[:, :, 0])).abs().max() < 1e-4

def test_vit_l14_has_the_names_and_shapes_of_open_clip():
    with torch.device("meta"):                  # nothing is allocated
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-L-14-quickgelu"))
        model = build_model("l14")
    theirs = {}
    for name, tensor in clip.visual.state_dict().items():
        theirs[name.replace("transformer.resblocks", "blocks")] = tensor.shape
    ours = {name: tensor.shape for name, tensor in model.state_dict().items()
            if is_clip_parameter(name)}
    assert theirs.pop("proj") == (1024, 768)
    assert theirs.pop("conv1.weight") == (1024, 3, 14, 14)
    assert ours.pop("conv1.weight") == (1024, 3, 3, 14, 14)
    assert ours == theirs

# ----- The rest of the model ------------------------------------------------

@pytest.mark.parametrize("kernel", (1, 5))
def test_the_patch_embedding_is_the_centre_of_the_stems_kernel(kernel, clip, file):
    model = small(stem_kernel=kernel)
    load_clip(model, file)
    expected = torch.zeros_like(model.conv1.weight)
    expected[:, :, kernel // 2] = clip.visual.conv1.weight
    assert torch.equal(model.conv1.weight, expected)

def silent_layers(config):
    """The last layer of each new path into x."""
    names = []
    for i in config.ptm_layers:
        names += [f"blocks.{i}.dpe.expand", f"blocks.{i}.conv.expand"]
    names += [f"stdm.{i}.pointwise" for i in config.stdm_layers]
    return names + [f"smem_st.{i}.conv_out" for i in config.smem_st_layers]

def test_new_paths_into_x_start_at_zero_and_nothing_else_does(file):
    model = small(ptm_layers=(0, 2), smem_st_layers=(1,))
    for p in model.parameters():
        nn.init.normal_(p)                      # biases too, so that every 0 is load_clip's
    before = {name: p.clone() for name, p in model.named_parameters()}
    load_clip(model, file)
    for name, p in model.named_parameters():
        if name.rpartition(".")[0] in silent_layers(model.config):
            assert not p.any(), name
        elif is_clip_parameter(name):
            assert p.any() and not torch.equal(p, before[name]), name
        else:
            assert torch.equal(p, before[name]), name

def test_silent_paths_can_learn(file):
    model = small(smem_st_layers=(1,)).double().train()
    load_clip(model, file)

    def without_gradient():
        model.zero_grad()
        video = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64)
        F.cross_entropy(model(video), torch.tensor([1, 3])).backward()
        return [name for name, p in model.named_parameters() if p.grad.abs().max() < 1e-11]

    # At first only what lies before a silent layer waits. The silent layers learn at once.
    silent = silent_layers(model.config)
    waiting = tuple(name.rpartition(".")[0] + "." for name in silent) + ("blocks.2.beta",)
    idle = without_gradient()
    assert idle and all(name.startswith(waiting) for name in idle)
    assert not [name for name in idle if name.rpartition(".")[0] in silent]
    for name in silent:
        nn.init.normal_(model.get_submodule(name).weight, std=0.1)
    assert not without_gradient()

def test_positions_are_resized_for_another_image_size(clip, file):
    positions = clip.visual.positional_embedding
    square = positions[1:].T.reshape(1, D, 4, 4)                                # (1, D, H, W)
    square = F.interpolate(square, size=(6, 6), mode="bicubic", align_corners=False)
    expected = torch.cat([positions[:1], square.reshape(D, 36).T])
    model = small(image_size=48)
    load_clip(model, file)
    torch.testing.assert_close(model.positional_embedding.data, expected)
    assert torch.equal(resize_positions(positions, (4, 4)), positions)

    # A clip of 48 pixels in a model that is built for 32 sees the same positions.
    smaller = small()
    load_clip(smaller, file)
    video = torch.randn(1, 3, 8, 48, 48)
    torch.testing.assert_close(smaller.stem(video)[0], model.stem(video)[0])

# ----- What does not fit ----------------------------------------------------

@pytest.mark.parametrize("changed, named", [
    ({"visual.transformer.resblocks.1.mlp.c_fc.bias": None}, "blocks.1.mlp.c_fc.bias"),     # gone
    ({"visual.transformer.resblocks.3.ln_1.bias": torch.zeros(D)}, "blocks.3.ln_1.bias"),   # more
    ({"visual.ln_post.bias": torch.zeros(D - 1)}, "ln_post.bias"),
    ({"visual.conv1.weight": torch.zeros(D, 3, 16, 16)}, "conv1.weight"),
    ({"visual.conv1.weight": None}, "conv1.weight"),            # as in a ResNet, or timm's ViT
])
def test_a_tensor_that_does_not_fit_is_named(changed, named, clip, tmp_path):
    state = {**clip.state_dict(), **changed}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError) as e:
        load_clip(small(), tmp_path / "other.pt")
    assert "other.pt" in str(e.value) and named in str(e.value)

@pytest.mark.parametrize("name", ("broken.pt", "broken.safetensors", "missing.pt"))
def test_a_file_that_cannot_be_read_is_named(name, tmp_path):
    if name != "missing.pt":
        (tmp_path / name).write_text("not a checkpoint")
    with pytest.raises(ValueError, match=name):
        load_clip(small(), tmp_path / name)

def test_openai_without_a_network_says_why(monkeypatch):
    def offline(name, pretrained):
        raise OSError(f"no route to {name} of {pretrained}")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with torch.device("meta"):
        model = build_model("l14", depth=1, image_size=28)
    with pytest.raises(ValueError, match="openai .*no route to ViT-L-14-quickgelu of openai"):
        load_clip(model, "openai")

class Evil:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("evil",)

@pytest.mark.parametrize("kind", ("another file", "cut off", "with code"))
def test_load_checkpoint_names_the_file_and_runs_no_code(kind, tmp_path):
    held = {"model_config": {}, "model": torch.randn(10000)}
    if kind == "another file":
        del held["model_config"]
    if kind == "with code":
        held["model_config"] = Evil()
    path = tmp_path / "last.pt"
    torch.save(held, path)
    if kind == "cut off":
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="last.pt"):
        load_checkpoint(path)
    assert not (tmp_path / "evil").exists()
