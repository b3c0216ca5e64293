"""scripts/bench.py runs and prints whole tables. Its times are not tested.

    python -m pytest tests/test_bench.py
"""
import re

import pytest
import torch

from model import build_model
from scripts import bench
from scripts.describe import count_macs, video_of

def table(capsys, *flags):
    """{label: numbers} of the rows that bench.py prints for the tiny model on a CPU."""
    bench.main(["--model", "tiny", "--batch", "2", "--rounds", "1", "--device", "cpu", *flags])
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        label, numbers = re.fullmatch(r"(.*?)((?:[ |]+[\d.e-]+%?)*)", line).groups()
        rows[label.strip()] = [float(n.strip("%")) for n in numbers.replace("|", " ").split()]
    return rows

def test_models_have_their_parameters_and_arithmetic(capsys):
    rows = table(capsys)
    ours, clip = rows["STD-Former tiny"], rows["CLIP ViT, open_clip's blocks"]
    model = build_model("tiny")
    parameters = sum(p.numel() for p in model.parameters())
    macs = count_macs(model, video_of(model.config))["Global"]
    assert ours[:2] == pytest.approx([parameters / 1e6, macs / 1e9], rel=1e-3)
    assert ours[2] == pytest.approx(ours[1] / clip[1], abs=0.01) and ours[2] > 1.5
    assert len(ours) == 11 and all(number > 0 for number in ours)
    assert [clip[i] for i in (2, 4, 7, 10)] == [1, 1, 1, 1]     # the baseline's ratios

def test_breakdown_accounts_for_all_arithmetic(capsys):
    rows = table(capsys, "--breakdown")
    kinds = ("stem", "Block", "PTM", "CTM", "STDM", "SMEM")
    assert sum(rows[kind][3] for kind in kinds) == pytest.approx(100, abs=1)
    assert rows["whole model"][2:4] == [100, 100]
    assert [rows[kind][0] for kind in kinds] == [1, 3, 1, 4, 3, 1]

def test_what_is_kept_for_the_backward_pass():
    """A product keeps its input, 3 x 4 numbers. Its weight is a parameter, and not counted."""
    linear = torch.nn.Linear(4, 5)
    assert bench.saved_bytes(linear, torch.randn(3, 4), "fp32") == 3 * 4 * 4

def test_the_pipeline_is_timed_step_by_step(capsys, tmp_path):
    from scripts.toy_data import make_toy
    make_toy(tmp_path / "toy", train=2, validation=1)
    clip = tmp_path / "toy" / "20bn-something-something-v1" / "1"
    rows = table(capsys, "--pipeline", str(clip))
    steps = ("decoding as many frames", "read_clip", "read_clip, crop",
             "read_clip, crop, RandAugment")
    assert all(len(rows[step]) == 3 for step in steps) and rows[steps[0]][2] == 1
    with pytest.raises(ValueError, match="no_clip"):
        bench.main(["--pipeline", str(tmp_path / "no_clip")])
