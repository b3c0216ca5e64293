"""scripts/bench.py runs and prints whole tables; its times are not tested.

    python -m pytest -q tests/test_bench.py
"""
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from model import build_model, count_macs, one_video

sys.path.insert(0, str(ROOT / "scripts"))
import bench


def printed(*flags):
    """The lines of bench.py for the tiny model, each split into words."""
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "bench.py"), "--model", "tiny", "--batch", "2", "--rounds", "1", *flags],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    return [line.split() for line in done.stdout.splitlines()]


def test_comparison_has_both_models_and_their_arithmetic():
    rows = {" ".join(words[:2]): words for words in printed("--device", "cpu") if "%" in " ".join(words)}
    ours, plain = rows["STD-Former tiny"][2:], rows["CLIP ViT,"][3:]
    with torch.device("meta"):
        model = build_model("tiny")
    assert float(ours[0]) == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, rel=0.01)
    assert float(ours[1]) == pytest.approx(count_macs(model, one_video(model.config))["Global"] / 1e9, rel=0.01)
    assert float(ours[2]) == pytest.approx(float(ours[1]) / float(plain[1]), rel=0.02) and float(ours[2]) > 1.5
    assert all(float(word.rstrip("%")) > 0 for word in ours if word != "|")


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_breakdown_accounts_for_every_module(precision):
    rows = {words[0]: words for words in printed("--device", "cpu", "--breakdown", "--precision", precision) if "%" in " ".join(words)}
    assert set(rows) == {"stem", "Block", "PTM", "CTM", "STDM", "SMEM", "between", "whole"}
    shares = [float(words[-2].rstrip("%")) for kind, words in rows.items() if kind not in ("between", "whole")]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_a_video_that_does_not_read_is_named():
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "bench.py"), "--pipeline", "--webm", "missing.webm"],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith("bench.py: missing.webm: "), done.stdout[-3000:]


def test_a_model_that_does_not_fit_is_told_from_one_that_does():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    calls = []
    assert bench.fits(lambda: calls.append(1), 3) and len(calls) == 3
    assert not bench.fits(too_large, 3)
    with pytest.raises(RuntimeError, match="other"):
        bench.fits(lambda: (_ for _ in ()).throw(RuntimeError("other")), 1)
