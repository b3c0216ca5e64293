"""load_clip: what comes out equals open_clip's own model, for every file format; files that do not
fit are refused.

python -m pytest -q tests/test_weights.py
"""

import os
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import SMEM, STDM, build_model, is_clip_parameter, load_clip, resize_positions

# ----- A whole ViT-B/16 against open_clip -----------------------------------


@pytest.fixture(scope="module")
def clip():
    """open_clip's ViT-B-16-quickgelu, nothing in its image tower at an initial value, all of it
    exact in fp16.
    """
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-16-quickgelu").eval().requires_grad_(False)
    for p in model.visual.parameters():
        p += 0.2 * torch.randn_like(p) if p.ndim == 1 else 0.02 * torch.randn_like(p)
        # OpenAI's archive holds fp16: with this it holds the same numbers
        p.copy_(p.half())
    return model


@pytest.fixture(scope="module")
def video():
    return torch.randn(1, 3, 4, 224, 224, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stem_tokens(clip, video):
    """What open_clip's transformer gets to see of frames 0 and 2, the centres of the stem's kernel.
    (T, 1+N, D)
    """
    v = clip.visual
    x = v.conv1(video[0, :, ::2].transpose(0, 1)).flatten(2).transpose(1, 2)
    x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1) + v.positional_embedding
    return v.ln_pre(x)


@pytest.fixture(scope="module")
def clip_tokens(clip, stem_tokens):
    return clip.visual.transformer(stem_tokens)


@pytest.fixture(scope="module")
def parallel_tokens(clip, stem_tokens):
    """The first of these frames, with attention and FFN side by side in the last four layers, where
    b16 has PTMs.
    """
    x = stem_tokens[:1]
    for i, block in enumerate(clip.visual.transformer.resblocks):
        if i < 8:
            x = block(x)
        else:
            x = x + block.attention(block.ln_1(x)) + block.mlp(block.ln_2(x))
    return x


@pytest.fixture(scope="module")
def b16():
    """Without PTM and SMEM, each CTM silenced: what it adds is zero. Built once, as building takes
    longer than loading.
    """
    torch.manual_seed(1)
    model = (
        build_model("b16", num_frames=4, ptm_layers=(), smem_t_layers=())
        .eval()
        .requires_grad_(False)
    )
    for ctm in model.ctm:
        for layer in (ctm.out_proj, ctm.mlp.c_proj):
            layer.weight.zero_()
            layer.bias.zero_()
    return model


@pytest.fixture(scope="module")
def b16_ptm():
    """With PTMs, and CTMs that do work."""
    torch.manual_seed(1)
    return build_model("b16", num_frames=4, smem_t_layers=()).eval().requires_grad_(False)


def openai_archive(clip, file):
    """OpenAI's ViT-B-16.pt: a TorchScript archive in fp16, with three integers among its tensors.
    """
    # any module with a forward; traced for its state alone
    archive = nn.Identity()
    sizes = dict(
        input_resolution=torch.tensor(224),
        context_length=torch.tensor(77),
        vocab_size=torch.tensor(49408),
    )
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
    """The state of both towers; the text tower's tensors cut to one number each, which keeps the
    files small.
    """
    return {
        k: v if k.startswith("visual.") else v.flatten()[:1].clone()
        for k, v in clip.state_dict().items()
    }


def open_clip_training(clip, file):
    torch.save(
        {
            "epoch": 3,
            "name": "a run",
            "state_dict": {"module." + k: v for k, v in whole_clip(clip).items()},
        },
        file,
    )


def plain_state(clip, file):
    torch.save(whole_clip(clip), file)


def safetensors(clip, file):
    pytest.importorskip("safetensors.torch").save_file(whole_clip(clip), file)


def image_tower(clip, file):
    torch.save(clip.visual.state_dict(), file)


def hugging_face(clip, file):
    """CLIPModel as Hugging Face saves it: query, key and value apart, and the text tower's names.
    """
    state = {
        "logit_scale": torch.tensor(4.6),
        "text_projection.weight": torch.zeros(2, 2),
        "text_model.embeddings.token_embedding.weight": torch.zeros(2, 2),
        "vision_model.embeddings.position_ids": torch.arange(197)[None],
    }
    v = "vision_model."
    names = {
        "class_embedding": v + "embeddings.class_embedding",
        "positional_embedding": v + "embeddings.position_embedding.weight",
        "conv1.weight": v + "embeddings.patch_embedding.weight",
        "proj": "visual_projection.weight",
    }
    for part in "weight", "bias":
        names[f"ln_pre.{part}"] = f"{v}pre_layrnorm.{part}"
        names[f"ln_post.{part}"] = f"{v}post_layernorm.{part}"
        for i in range(12):
            ours, theirs = f"transformer.resblocks.{i}.", f"{v}encoder.layers.{i}."
            names[f"{ours}ln_1.{part}"] = f"{theirs}layer_norm1.{part}"
            names[f"{ours}ln_2.{part}"] = f"{theirs}layer_norm2.{part}"
            names[f"{ours}attn.out_proj.{part}"] = f"{theirs}self_attn.out_proj.{part}"
            names[f"{ours}mlp.c_fc.{part}"] = f"{theirs}mlp.fc1.{part}"
            names[f"{ours}mlp.c_proj.{part}"] = f"{theirs}mlp.fc2.{part}"
    for name, tensor in clip.visual.state_dict().items():
        if ".in_proj_" in name:
            layer, part = name.split(".")[2], name.rpartition("_")[2]
            for letter, third in zip("qkv", tensor.chunk(3)):
                own = f"{v}encoder.layers.{layer}.self_attn.{letter}_proj.{part}"
                state[own] = third.contiguous()
        else:
            state[names[name]] = tensor
    if file.endswith(".safetensors"):
        pytest.importorskip("safetensors.torch").save_file(state, file)
    else:
        torch.save(state, file)


def compiled_training(clip, file):
    """A run of somebody's own: weights below "model", with the prefixes of DDP and torch.compile.
    """
    state = {"module._orig_mod." + k: v for k, v in whole_clip(clip).items()}
    torch.save({"epoch": 3, "model": state}, file)


FORMATS = {
    "openai.pt": openai_archive,
    "epoch_3.pt": open_clip_training,
    "open_clip_pytorch_model.bin": plain_state,
    "open_clip_model.safetensors": safetensors,
    "visual.pth": image_tower,
    "pytorch_model.bin": hugging_face,
    "model.safetensors": hugging_face,
    "compiled.pt": compiled_training,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", FORMATS)
def test_a_loaded_model_starts_from_clip(
    name, clip, b16, b16_ptm, video, clip_tokens, parallel_tokens, tmp_path
):
    file = str(tmp_path / name)
    FORMATS[name](clip, file)
    counts = []
    for model in (b16, b16_ptm):
        for parameter, p in model.named_parameters():
            if is_clip_parameter(parameter):
                # so that nothing is left of what another test loaded
                p.fill_(torch.nan)
        counts.append(load_clip(model, file))
        assert {p.dtype for p in model.state_dict().values() if p.is_floating_point()} == {
            torch.float32
        }
    # pytest keeps its folders for three runs
    os.remove(file)

    # stem with ln_pre, 12 per block, ln_post
    tensors = 5 + 12 * 12 + 2
    assert counts == [(tensors, len(list(m.parameters())) - tensors) for m in (b16, b16_ptm)]

    x, y = b16.forward_features(video)
    # fact 1: x is CLIP, run on the frames in the centre of the kernel
    assert (x[0] - clip_tokens).abs().max() < 1e-4
    # fact 2: y is the patches of x
    assert (y.flatten(2, 3) - x[:, :, 1:]).abs().max() < 1e-4

    x, y = b16_ptm.forward_features(video[:, :, :2])  # one token frame: half the time
    # fact 3: CLIP's layers side by side
    assert (x[0] - parallel_tokens).abs().max() < 1e-4
    # ... which is another function
    assert (clip_tokens[:1] - parallel_tokens).abs().max() > 0.1
    # and a y at work does not disturb x
    assert (y.flatten(2, 3) - x[:, :, 1:]).abs().max() > 0.1


def test_l14_has_the_names_and_shapes_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):  # nothing is allocated
        theirs = open_clip.create_model("ViT-L-14-quickgelu", device="meta").visual.state_dict()
        model = build_model("l14")
    theirs = {
        k.replace("transformer.resblocks", "blocks"): tuple(v.shape)
        for k, v in theirs.items()
        if k != "proj"
    }
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items() if is_clip_parameter(k)}
    assert ours.pop("conv1.weight") == (1024, 3, 3, 14, 14) and theirs.pop("conv1.weight") == (
        1024,
        3,
        14,
        14,
    )
    assert ours == theirs


# ----- Details, on a file of CLIP's form for the small model of these tests -


def tiny(**overrides):
    torch.manual_seed(0)
    size = dict(dim=32, depth=3, heads=4, patch_size=8, image_size=32, num_frames=8, num_classes=5)
    return build_model("tiny", **{**size, **overrides})


def small_clip(dim=32, depth=3, patch=8, positions=17):
    """Random tensors under CLIP's names: an image tower, and one tensor of a text tower."""
    shapes = {
        "class_embedding": [dim],
        "positional_embedding": [positions, dim],
        "proj": [dim, 16],
        "conv1.weight": [dim, 3, patch, patch],
    }
    for ln in ("ln_pre", "ln_post"):
        shapes |= {ln + ".weight": [dim], ln + ".bias": [dim]}
    for i in range(depth):
        shapes |= {
            f"transformer.resblocks.{i}.{name}": shape
            for name, shape in {
                "ln_1.weight": [dim],
                "ln_1.bias": [dim],
                "ln_2.weight": [dim],
                "ln_2.bias": [dim],
                "attn.in_proj_weight": [3 * dim, dim],
                "attn.in_proj_bias": [3 * dim],
                "attn.out_proj.weight": [dim, dim],
                "attn.out_proj.bias": [dim],
                "mlp.c_fc.weight": [4 * dim, dim],
                "mlp.c_fc.bias": [4 * dim],
                "mlp.c_proj.weight": [dim, 4 * dim],
                "mlp.c_proj.bias": [dim],
            }.items()
        }
    generator = torch.Generator().manual_seed(3)
    state = {
        "visual." + name: 0.1 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    return {**state, "transformer.resblocks.0.ln_1.weight": torch.zeros(7)}


def saved(state, tmp_path):
    torch.save(state, tmp_path / "clip.pt")
    return tmp_path / "clip.pt"


@pytest.mark.parametrize("kernel", (1, 3, 5))
def test_every_tensor_of_the_file_lands_where_it_belongs(kernel, tmp_path):
    model, state = tiny(stem_kernel=kernel), small_clip()
    loaded, new = load_clip(model, saved(state, tmp_path))
    assert loaded + new == len(list(model.parameters()))
    # all but the projection to text
    assert loaded == len([k for k in state if k.startswith("visual.")]) - 1
    own = model.state_dict()
    for name, tensor in state.items():
        name = name.removeprefix("visual.")
        if name == "conv1.weight":
            assert torch.equal(own[name][:, :, kernel // 2], tensor)
            # the other frames' slices are zero
            assert own[name].count_nonzero() == tensor.count_nonzero()
        elif name.startswith("transformer") and len(tensor) == 7 or name == "proj":
            # the text side of CLIP
            continue
        else:
            assert torch.equal(own[name.replace("transformer.resblocks", "blocks")], tensor), name


def outputs_added_to_x(model):
    """The last layer of each new path into the ST-branch, by module name, for a model with all of
    them.
    """
    paths = {
        f"blocks.{i}.{part}.expand" for i in model.config.ptm_layers for part in ("dpe", "conv")
    }
    paths |= {f"stdm.{i}.pointwise" for i, m in enumerate(model.stdm) if isinstance(m, STDM)}
    return paths | {
        f"smem_st.{i}.conv_out" for i, m in enumerate(model.smem_st) if isinstance(m, SMEM)
    }


@pytest.mark.parametrize(
    "variant",
    [
        dict(),
        dict(smem_st_layers=(1,)),
        dict(smem_t_layers=(), smem_st_layers=(0,)),
        dict(ptm_conv="attention3d", learn_fusion=False),
    ],
    ids=str,
)
def test_what_load_clip_zeroes_and_what_it_leaves(variant, tmp_path):
    model = tiny(**variant)
    for p in model.parameters():
        # biases too, so that every zero is load_clip's
        nn.init.normal_(p)
    before = {name: p.clone() for name, p in model.named_parameters()}
    load_clip(model, saved(small_clip(), tmp_path))
    silenced = outputs_added_to_x(model)
    assert len(silenced) == 4 + ("smem_st_layers" in variant)
    for name, p in model.named_parameters():
        if name.rpartition(".")[0] in silenced:
            assert not p.any(), name
        # among them CTM's output projection and the T-branch's SMEM
        elif not is_clip_parameter(name):
            assert torch.equal(p, before[name]), name


def test_gradients_after_load_clip(tmp_path):
    model = tiny(smem_st_layers=(1,)).double().train()
    load_clip(model, saved(small_clip(), tmp_path))
    video, labels = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64), torch.tensor([1, 3])

    def without_gradient():
        model.zero_grad()
        F.cross_entropy(model(video), labels).backward()
        return {
            name
            for name, p in model.named_parameters()
            if p.grad is None or p.grad.abs().max() < 1e-11
        }

    # At first only what lies before a zeroed layer waits; the zeroed layers themselves get going at
    # once.
    silenced = outputs_added_to_x(model)
    waiting = tuple(path.rpartition(".")[0] + "." for path in silenced) + tuple(
        f"blocks.{i}.beta" for i in model.config.ptm_layers
    )
    idle = without_gradient()
    assert idle and all(
        name.startswith(waiting) and name.rpartition(".")[0] not in silenced for name in idle
    )

    for path in silenced:
        nn.init.normal_(model.get_submodule(path).weight, std=0.1)
    assert not without_gradient()


def test_positions_are_resized_for_another_image_size(tmp_path):
    # as OpenAI's; resized in float32
    state = {name: tensor.half() for name, tensor in small_clip().items()}
    positions = state["visual.positional_embedding"].float()
    # (1, D, H, W), rows of the table run along W first
    square = positions[1:].T.reshape(1, 32, 4, 4)
    square = F.interpolate(square, size=(6, 6), mode="bicubic", align_corners=False)
    expected = torch.cat([positions[:1], square.reshape(32, 36).T])

    model = tiny(image_size=48)
    load_clip(model, saved(state, tmp_path))
    torch.testing.assert_close(model.positional_embedding.data, expected)
    # untouched where nothing changes
    assert torch.equal(resize_positions(positions, (4, 4)), positions)

    # a clip of 48 pixels in a model built for 32 sees the same positions
    small = tiny()
    load_clip(small, saved(state, tmp_path))
    video = torch.randn(1, 3, 8, 48, 48)
    torch.testing.assert_close(small.stem(video)[0], model.stem(video)[0])


# ----- What does not fit ----------------------------------------------------


def test_a_dropped_key_is_named(tmp_path):
    for name in small_clip():
        if name.startswith("visual.") and name not in (
            "visual.proj",
            "visual.positional_embedding",
        ):
            state = small_clip()
            del state[name]
            own = name.removeprefix("visual.").replace("transformer.resblocks", "blocks")
            wanted = (
                "not CLIP's names" if own == "conv1.weight" else f"{own}: missing, the model's: ("
            )
            with pytest.raises(ValueError, match=re.escape(wanted)):
                load_clip(tiny(), saved(state, tmp_path))


def test_dropped_positions_are_named(tmp_path):
    state = small_clip()
    # OpenAI's ResNets have none at this place
    del state["visual.positional_embedding"]
    with pytest.raises(ValueError, match="not CLIP's names"):
        load_clip(tiny(), saved(state, tmp_path))


@pytest.mark.parametrize(
    "surplus",
    ("adapter.weight", "transformer.resblocks.3.ln_1.weight", "transformer.resblocks.1.ls_1.gamma"),
)
def test_a_surplus_key_is_named(surplus, tmp_path):
    state = {**small_clip(), "visual." + surplus: torch.zeros(32)}
    with pytest.raises(
        ValueError,
        match=re.escape(
            surplus.replace("transformer.resblocks", "blocks") + ": (32,), the model's: missing"
        ),
    ):
        load_clip(tiny(), saved(state, tmp_path))


@pytest.mark.parametrize(
    "name, shape",
    [
        ("conv1.weight", (32, 3, 16, 16)),
        ("ln_post.bias", (31,)),
        ("positional_embedding", (17, 48)),
        ("transformer.resblocks.2.attn.in_proj_weight", (32, 96)),
    ],
)
def test_a_misshapen_key_is_named_with_both_shapes(name, shape, tmp_path):
    model, state = tiny(), small_clip()
    state["visual." + name] = torch.zeros(shape)
    name = name.replace("transformer.resblocks", "blocks")
    expected = tuple(model.state_dict()[name].shape)
    found = (shape[0], 3, 3, 16, 16) if name == "conv1.weight" else shape  # inflated
    with pytest.raises(ValueError, match=re.escape(f"{name}: {found}, the model's: {expected}")):
        load_clip(model, saved(state, tmp_path))


def test_a_refused_file_leaves_the_model_as_it_was(tmp_path):
    model, untouched = tiny(), tiny().state_dict()
    with pytest.raises(ValueError):
        load_clip(model, saved(small_clip(dim=48), tmp_path))
    assert all(torch.equal(v, untouched[k]) for k, v in model.state_dict().items())


def test_a_file_for_another_size_lists_what_differs(tmp_path):
    file = saved(small_clip(dim=48, depth=4), tmp_path)
    with pytest.raises(ValueError) as e:
        load_clip(tiny(), file)
    for text in (
        "clip.pt does not fit this model",
        "blocks.3.ln_1.bias: (48,), the model's: missing",
        "ln_pre.bias: (48,), the model's: (32,)",
    ):
        assert text in str(e.value)


def timm_names():
    return {
        "cls_token": torch.zeros(1, 1, 32),
        "pos_embed": torch.zeros(1, 17, 32),
        "patch_embed.proj.weight": torch.zeros(32, 3, 8, 8),
    }


@pytest.mark.parametrize(
    "held, found",
    [
        (
            {"layer1.0.weight": torch.zeros(3), "fc.weight": torch.zeros(3)},
            "layer1.0.weight, fc.weight",
        ),
        (timm_names(), "cls_token, pos_embed, patch_embed.proj.weight"),
    ],
)
def test_a_file_with_other_names_says_which_and_what_to_take_instead(held, found, tmp_path):
    with pytest.raises(ValueError) as e:
        load_clip(tiny(), saved(held, tmp_path))
    assert f"clip.pt holds {found}" in str(e.value) and "open_clip or Hugging Face" in str(e.value)


@pytest.mark.parametrize("held", [torch.zeros(3), [1, 2], "not a checkpoint"])
def test_a_file_that_holds_no_weights_is_named(held, tmp_path):
    file = saved(held, tmp_path)
    if isinstance(held, str):
        file.write_text(held)
    with pytest.raises(ValueError, match="--clip .*clip.pt cannot be read"):
        load_clip(tiny(), file)
    with pytest.raises(ValueError, match="--clip .*nowhere.pt cannot be read"):
        load_clip(tiny(), tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    "size, patch, name", [("b16", 16, "ViT-B-16-quickgelu"), ("l14", 14, "ViT-L-14-quickgelu")]
)
def test_openai_without_a_network_says_why_and_what_to_do(size, patch, name, monkeypatch):
    open_clip = pytest.importorskip("open_clip")
    asked = []

    def offline(name, pretrained):
        asked.append((name, pretrained))
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with torch.device("meta"):
        model = build_model(size, depth=1, image_size=2 * patch)
    with pytest.raises(ValueError, match="--clip openai .*no route to host.*--clip FILE"):
        load_clip(model, "openai")
    assert asked == [(name, "openai")]


def test_openai_has_nothing_for_other_widths():
    pytest.importorskip("open_clip")
    with pytest.raises(ValueError, match="--clip openai .* width 32"):
        load_clip(tiny(), "openai")
