"""scripts/describe.py counts parameters and arithmetic, in one way on every version and device.

    python -m pytest tests/test_describe.py
"""
import pytest
import torch
import torch.nn as nn

from model import ModelConfig, build_model
from scripts import describe
from scripts.describe import count_macs, video_of

def test_count_macs_of_layers_that_are_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(2), nn.Linear(20, 5))
    macs = count_macs(model, torch.empty(2, 3, 4, 5))
    assert macs["Sequential.0"] == 2 * (4 * 5) * 8 * 3 * 3 * 3
    assert macs["Sequential.2"] == 2 * 8 * 20 * 5
    assert macs["Global"] == macs["Sequential.0"] + macs["Sequential.2"]

def test_count_macs_of_attention_in_evaluation_and_under_any_type():
    attention = nn.MultiheadAttention(16, 4, batch_first=True).eval()
    projections, products = 4 * 2 * 7 * 16 * 16, 2 * 2 * 7 * 7 * 16
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(2, 7, 16, dtype=dtype)
        assert count_macs(attention, x, x, x)["Global"] == projections + products
    assert not attention.training               # it counts on a copy

def test_video_of_a_config():
    video = video_of(ModelConfig(num_frames=8, image_size=32))
    assert video.shape == (1, 3, 8, 32, 32) and video.device.type == "meta"

def test_modules_add_up_to_the_model(capsys):
    flags = "--model tiny --depth 3 --ptm_layers 0 2 --smem_st_layers 1 --no-learn_fusion"
    describe.main(flags.split())
    rows = {}
    for line in capsys.readouterr().out.splitlines()[2:-1]:
        rows[line[:26].strip()] = [float(number) for number in line[26:].split()[:2]]
    total = rows.pop("total, with embeddings")
    assert list(rows) == ["stem (conv1)", "blocks, CLIP's (1)", "blocks, PTM (2)", "smem_st (1)",
                          "ctm (3)", "smem_t (1)", "stdm (2)", "ln_post", "head"]
    model = build_model("tiny", depth=3, ptm_layers=(0, 2), smem_st_layers=(1,),
                        learn_fusion=False)
    parameters = sum(p.numel() for p in model.parameters())
    embeddings = (model.positional_embedding.numel() + 3 * 64) / 1e6    # class token and ln_pre
    assert total[0] == pytest.approx(parameters / 1e6, abs=0.006)
    assert sum(row[0] for row in rows.values()) + embeddings == pytest.approx(total[0], abs=0.05)
    assert sum(row[1] for row in rows.values()) == pytest.approx(total[1], abs=0.05)

def test_absent_modules_have_no_row(capsys):
    describe.main("--model tiny --smem_t_layers --ptm_layers --stdm_layers".split())
    out = capsys.readouterr().out
    assert "PTM (" not in out and "\nstdm" not in out and "\nsmem" not in out
