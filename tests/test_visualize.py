"""visualize.py: it computes what the modules compute, arrows and relevance point at what moves, and
every picture is drawn of every kind of model.

    python -m pytest -q tests/test_visualize.py
"""
import runpy
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import ROOT
from model import build_model
from scripts import visualize
from test_evaluate import CLASSES, write_checkpoint, write_clips

TINY = dict(dim=32, depth=2, heads=2, num_frames=4, image_size=16, patch_size=8, num_classes=3)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("visualize") / "clips")


def model_with(**options):
    """A tiny model with random weights."""
    torch.manual_seed(0)
    return build_model("tiny", **{**TINY, **options}).eval()


def save(model, path, clips):
    config = asdict(model.config)
    return write_checkpoint(path, clips, model=model.state_dict(), model_config=config)


@pytest.fixture(scope="module")
def ckpt(clips):
    model = model_with(ptm_layers=(1,), stdm_layers=(0,), smem_t_layers=(0,))
    return save(model, clips.parent / "best.pt", clips)


def input_of(module, run):
    """The first input of a module during run()."""
    caught = []
    hook = module.register_forward_pre_hook(lambda m, inputs: caught.append(inputs[0]))
    run()
    hook.remove()
    return caught[0]

# ----- What is computed -----------------------------------------------------

def test_attention_is_the_modules_own():
    model = model_with()
    video = torch.randn(1, 3, 4, 16, 16)
    logits, seen = visualize.look_inside(model, video)
    with torch.no_grad():
        assert torch.equal(logits, model(video)[0])
        for i in range(2):
            attention = visualize.ctm_attention(seen, i, heads=2)               # (N, heads, T, T)
            assert attention.shape == (4, 2, 2, 2)
            assert torch.allclose(attention.sum(-1), torch.ones(4, 2, 2))
            v = seen[f"ctm.{i}.kv"][1][0, ..., 32:]                             # (T, H, W, D)
            v = v.flatten(1, 2).unflatten(-1, (2, 16)).permute(1, 2, 0, 3)
            expected = input_of(model.ctm[i].out_proj, lambda: model(video))
            expected = expected[0].flatten(1, 2)                                # (T, N, D)
            attended = (attention @ v).permute(2, 0, 1, 3).flatten(2)
            assert torch.allclose(attended, expected, atol=1e-6)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("fusion", ["mul", "add", "mul+add"])
@pytest.mark.parametrize("size", [16, 24])              # 24: features are resized to SMEM's grid
def test_smem_features_give_the_modules_own_correlation(fusion, size):
    model = model_with(smem_fusion=fusion, smem_t_layers=(1,), smem_st_layers=(0,))
    assert visualize.smem_names(model) == ["smem_t.1", "smem_st.0"]
    video = torch.randn(1, 3, 4, size, size)
    _, seen = visualize.look_inside(model, video)
    for name in "smem_t.1", "smem_st.0":
        smem = model.get_submodule(name)
        with torch.no_grad():
            # The channels of these maps, (T, N, H, W), are the places of frame t+1.
            maps = input_of(smem.stages, lambda: model(video))
            features = visualize.smem_features(seen, name, smem)
            correlation = smem.correlation(features[None])[0]
        assert torch.allclose(maps[:1].movedim(1, -1).flatten(1, 2), correlation, atol=1e-6)


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (-1, 0), (1, -1)], ids=str)
def test_motion_field_follows_shifted_features(step):
    H, W, T = 8, 8, 4
    world = torch.randn(40, 40, 16, generator=torch.manual_seed(0))
    frames = []
    for t in range(T):
        top, left = 16 - t * step[0], 16 - t * step[1]
        frames.append(world[top:top + H, left:left + W].flatten(0, 1))
    field, trust = visualize.motion_field(torch.stack(frames), (H, W))
    inner = field[:, 1:-1, 1:-1][trust[:, 1:-1, 1:-1]]
    assert len(inner) > 0.9 * 3 * 36
    assert torch.allclose(inner.mean(0), torch.tensor(step).float(), atol=0.1)
    standing = world[:H, :W].flatten(0, 1).expand(T, -1, -1)
    field, trust = visualize.motion_field(standing, (H, W))
    assert not trust.any() and torch.isfinite(field).all()


def test_motion_field_leaves_out_what_stands_still():
    f = torch.randn(1, 8, 8, 16, generator=torch.manual_seed(0)).repeat(4, 1, 1, 1)
    thing = torch.randn(3, 3, 16, generator=torch.manual_seed(1)) * 3
    for t in range(4):
        f[t, 3:6, 1 + t:4 + t] = thing                  # moves right over a standing background
    field, trust = visualize.motion_field(f.flatten(1, 2), (8, 8))
    assert not trust[:, 0].any() and not trust[:, -1].any()
    for t in range(3):
        centre = field[t, 4, 2 + t]
        assert trust[t, 4, 2 + t] and centre[1] > 0.5 and abs(centre[0]) < 0.2, centre


def test_relevance_lies_where_the_clip_changes_and_sums_to_the_difference():
    model = model_with()
    video = torch.randn(1, 3, 1, 16, 16).repeat(1, 1, 4, 1, 1)
    still = visualize.relevance(model, video)[0]
    assert torch.allclose(still, torch.zeros_like(still))
    video[:, :, :, :8, 8:] += torch.randn(1, 3, 4, 8, 8)                # one place of four flickers
    heat, own, standing = visualize.relevance(model, video, steps=32)
    with torch.no_grad():
        logits = model(video)[0]
        expected = model(video.mean(2, keepdim=True).expand_as(video))[0, logits.argmax()]
    assert own == pytest.approx(logits.max().item(), abs=1e-5)
    assert standing == pytest.approx(expected.item(), abs=1e-5)
    assert heat.shape == (2, 2, 2) and abs(own - standing) > 0.05
    assert heat.sum().item() == pytest.approx(own - standing, abs=0.02 * abs(own - standing))
    flicker = heat[:, 0, 1].clone()
    heat[:, 0, 1] = 0
    assert flicker.abs().min() > 1e-4 and heat.abs().max() < 1e-5


def test_most_moving_place():
    video = torch.zeros(3, 4, 24, 24, dtype=torch.uint8)
    video[:, ::2, 16:, 8:16] = 200
    assert visualize.most_moving(video, (3, 3)) == (2, 1)


def test_long_class_texts_are_wrapped():
    text = ("Putting something that cannot actually stand upright upright on the table, so it "
            "falls on its side")
    lines = visualize.wrap(text, 260, 12)
    assert len(lines) == 2 and lines[1].endswith(" ...")
    assert all(visualize.font(12).getlength(line) <= 260 for line in lines)
    assert " ".join(visualize.wrap(text, 300, 12)) == text

# ----- What is drawn --------------------------------------------------------

def run(ckpt, out, *flags):
    common = ("--ckpt", ckpt, "--device", "cpu", "--steps", 2, "--out", out)
    visualize.main([str(flag) for flag in (*common, *flags)])


def assert_drawn(path):
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 150 and pixels.std() > 15, (path, pixels.shape, pixels.std())
    problem = f"{path}: something is cut off, or the background is not white"
    assert pixels[0].min() > 250 and pixels[:, 0].min() > 250, problem


def test_every_picture_of_a_clip(ckpt, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run(ckpt, tmp_path, "--clip", 2, "--place", 1, 0)
    printed = capsys.readouterr().out
    assert f'clip 2, "{CLASSES[1]}"' in printed and "of 2 x 2" in printed
    assert "left out" not in printed
    expected = {f"{name}.png" for name in visualize.PICTURES} - {"clip.png"} | {"clip.webp"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    for path in tmp_path.iterdir():
        assert_drawn(path)
        with Image.open(path) as picture:               # GitHub shows 830 pixels at most
            assert path.suffix == ".webp" or picture.width <= 830
    with Image.open(tmp_path / "clip.webp") as animation:
        assert animation.n_frames == 4


KINDS_OF_MODELS = {
    "CTM only": (dict(ptm_layers=(), stdm_layers=(), smem_t_layers=()), {"ptm", "stdm", "smem"}),
    "ST-branch": (dict(smem_t_layers=(), smem_st_layers=(0,), ptm_layers=(0, 1),
                       ptm_conv="attention2d"), set()),
    "addition": (dict(smem_t_layers=(0,), smem_st_layers=(0,), smem_fusion="add", ptm_layers=(1,),
                      ptm_conv="residual3d", learn_fusion=False), set()),
    "no stride": (dict(ptm_conv="attention3d", stem_stride=1, smem_fusion="mul+add", depth=1),
                  {"stdm", "ptm"}),
    "many layers and heads": (dict(depth=12, heads=8), set()),
}


@pytest.mark.parametrize("kind", KINDS_OF_MODELS)
def test_every_kind_of_model(kind, clips, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    options, absent = KINDS_OF_MODELS[kind]
    ckpt = save(model_with(**options), tmp_path / "best.pt", clips)
    run(ckpt, tmp_path / "out", "--video", clips / "20bn-something-something-v1" / "3")
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(":")[0] for line in lines if "left out" in line} == absent
    drawn = {path.stem for path in (tmp_path / "out").iterdir()}
    assert drawn == set(visualize.PICTURES) - absent
    for path in (tmp_path / "out").iterdir():
        assert_drawn(path)


def test_the_rows_of_order_are_what_the_model_answers(ckpt, clips, tmp_path, monkeypatch):
    answers = []

    def draw_top(draw, y, probability, classes, rows):
        answers.append(probability)

    monkeypatch.setattr(visualize, "draw_top", draw_top)
    run(ckpt, tmp_path, "--clip", 1, "--only", "order")
    folder = clips / "20bn-something-something-v1" / "1"
    video, _, _ = visualize.read_frames(folder, 4, 16)
    checkpoint = torch.load(ckpt)
    model = build_model("tiny", **checkpoint["model_config"]).eval()
    model.load_state_dict(checkpoint["model"])
    expected = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 2, 2, 2]):
        with torch.no_grad():
            expected.append(model(data.normalize(video[None, :, order]))[0].softmax(-1))
    own, backwards, still = expected
    assert len(answers) == 4
    assert torch.allclose(answers[0], own)
    assert torch.allclose(answers[1], backwards)
    assert torch.allclose(answers[3], still)
    assert not torch.allclose(own, backwards, atol=1e-4)


def test_a_video_file_has_times(ckpt, tmp_path, monkeypatch):
    pytest.importorskip("decord")
    drawn, strip = [], visualize.strip

    def record_captions(video, captions=()):
        drawn.extend(captions)
        return strip(video, captions)

    monkeypatch.setattr(visualize, "strip", record_captions)
    run(ckpt, tmp_path, "--video", ROOT / "tests" / "clip.webm", "--only", "frames")
    assert len(drawn) == 4 and all(caption.endswith(" s") for caption in drawn)
    seconds = [float(caption.split()[0]) for caption in drawn]
    assert seconds == sorted(seconds) and seconds[-1] > 0


def test_without_matplotlib_one_line_says_so(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(ckpt, tmp_path, "--clip", 1, "--only", "frames", "ctm", "ptm")
    lines = capsys.readouterr().out.splitlines()
    assert "ctm, ptm: left out, they need matplotlib (pip install matplotlib)" in lines
    assert [path.name for path in tmp_path.iterdir()] == ["frames.png"]


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_toy_classes(tmp_path, kind):
    path = tmp_path / f"toy.{kind}"
    visualize.draw_toy_classes(path, size=64, n=3)
    with Image.open(path) as animation:
        assert animation.n_frames == 3
        first = np.asarray(animation.convert("RGB")).astype(int)
        animation.seek(2)
        last = np.asarray(animation.convert("RGB")).astype(int)
    upper, lower = np.s_[8:72, 10:74], np.s_[144:208, 10:74]
    # The lower row begins with what the upper one ends with.
    assert np.abs(first[upper] - last[lower]).mean() < 12
    assert np.abs(first[upper] - last[upper]).mean() > 12

# ----- Refusals -------------------------------------------------------------

def message(monkeypatch, *flags):
    """What the command exits with: an error in one line, or 2 for wrong flags."""
    argv = ["visualize.py", "--device", "cpu", *map(str, flags)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / "scripts" / "visualize.py"), run_name="__main__")
    return str(e.value)


def test_what_cannot_be_shown_is_one_clear_error(ckpt, tmp_path, monkeypatch):
    common = ("--ckpt", ckpt, "--out", tmp_path / "out")
    text = message(monkeypatch, *common, "--clip", "77")
    assert text.startswith("visualize.py: --clip is 77, ") and "such as 1, 2, 3" in text
    assert "\n" not in text
    text = message(monkeypatch, *common, "--video", tmp_path / "none.webm")
    assert "none.webm does not exist" in text and "\n" not in text
    assert "none.pt" in message(monkeypatch, "--ckpt", tmp_path / "none.pt", "--clip", "1")
    assert ".webp or .gif" in message(monkeypatch, "--toy_classes", tmp_path / "toy.mp4")
    text = message(monkeypatch, *common, "--clip", "1", "--place", "0", "2")
    assert "--place is 0 2, expected a row from 0 to 1 and a column from 0 to 1" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, expected", [
    (("--clip", "1", "--video", "x"), "either --video PATH or --clip ID"),
    ((), "either --video PATH or --clip ID"),
    (("--clip", "1", "--steps", "0"), "--steps is 0"),
], ids=["both", "neither", "steps"])
def test_wrong_flags(flags, expected, ckpt, tmp_path, monkeypatch, capsys):
    assert message(monkeypatch, "--ckpt", ckpt, "--out", tmp_path / "out", *flags) == "2"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_is_not_there_is_named(ckpt, tmp_path, monkeypatch):
    flags = ("--ckpt", ckpt, "--clip", "1", "--data_root", tmp_path / "elsewhere")
    text = message(monkeypatch, *flags)
    assert text.startswith("visualize.py: ") and "elsewhere" in text and "\n" not in text


def test_with_another_data_root_the_clip_root_of_training_does_not_count(monkeypatch):
    asked = []
    monkeypatch.setattr(visualize, "find_in_dataset", lambda *where: asked.append(where) or (1, ""))
    trained = dict(dataset="ssv1", data_root="old", clip_root="old_clips")
    for flags in ([], ["--data_root", "new"], ["--data_root", "new", "--clip_root", "clips"]):
        args = visualize.get_args(["--ckpt", "a.pt", "--clip", "7", *flags])
        visualize.find_path(args, trained)
    assert [where[2:] for where in asked] == [
        ("old", "old_clips"),
        ("new", None),
        ("new", "clips"),
    ]
