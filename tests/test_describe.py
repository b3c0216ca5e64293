"""scripts/describe.py counts parameters and arithmetic, in one way on every version and device.

python -m pytest -q tests/test_describe.py
"""
import re
import sys
from dataclasses import asdict

import pytest
import torch
import torch.nn as nn

from scripts.guards import run_program
from model import MODELS, ModelConfig, STDFormer, build_model
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
    x = torch.empty(2, 7, 16)
    projections, products = 4 * 2 * 7 * 16 * 16, 2 * 2 * 7 * 7 * 16
    assert count_macs(attention, x, x, x)["Global"] == projections + products
    x = x.to(torch.bfloat16)
    assert count_macs(attention, x, x, x)["Global"] == projections + products


def test_count_macs_leaves_the_model_as_it_is():
    model = build_model("tiny").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    on_cpu = count_macs(model, video_of(model.config))
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.device("meta"):
        assert count_macs(build_model("tiny"), video_of(model.config)) == on_cpu


def test_video_of_a_config():
    video = video_of(ModelConfig(num_frames=8, image_size=32))
    assert video.shape == (1, 3, 8, 32, 32)
    assert video.device.type == "meta"


def test_it_prints_what_is_in_the_model(capsys):
    flags = "--model tiny --depth 3 --ptm_layers 0 2 --no-learn_fusion --smem_fusion add"
    describe.main(flags.split())
    out = capsys.readouterr().out
    changes = dict(depth=3, ptm_layers=(0, 2), learn_fusion=False, smem_fusion="add")
    config = ModelConfig(**{**MODELS["tiny"], **changes})
    parameters = sum(p.numel() for p in STDFormer(config).parameters())
    assert f"config: {asdict(config)}" in out
    assert re.search(rf"total, with embeddings +{parameters / 1e6:.2f} ", out)
    for row in ("stem (conv1)", "blocks, CLIP's (1)", "blocks, PTM (2)", "ctm (3)", "stdm (2)",
                "smem_t (1)", "head"):
        assert f"\n{row} " in out


def test_modules_add_up_to_the_total(capsys):
    describe.main("--model b16 --smem_st_layers 3 --num_frames 8".split())
    lines = capsys.readouterr().out.splitlines()
    rows = [re.match(r"(.{26}) *([\d.]+) +([\d.]+)", line) for line in lines]
    rows = {row[1].strip(): (float(row[2]), float(row[3])) for row in rows if row}
    parameters, gmacs = rows.pop("total, with embeddings")
    assert "smem_st (1)" in rows
    assert sum(g for _, g in rows.values()) == pytest.approx(gmacs, abs=0.05)
    embeddings = (198 + 2) * 768 / 1e6          # positions, the class token, ln_pre
    assert sum(p for p, _ in rows.values()) + embeddings == pytest.approx(parameters, abs=0.05)


def test_absent_modules_have_no_row(capsys):
    describe.main("--model tiny --smem_t_layers --ptm_layers --stdm_layers".split())
    out = capsys.readouterr().out
    assert not re.search("^(smem|stdm|blocks, PTM)", out, re.MULTILINE)


def test_an_impossible_model_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["describe.py", "--heads", "7"])
    with pytest.raises(SystemExit, match="^describe.py: dim is 768, expected a multiple of heads"):
        run_program(describe.main)
