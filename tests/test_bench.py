"""scripts/bench.py runs and prints whole tables; its times are not tested.

python -m pytest -q tests/test_bench.py
"""
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from model import build_model
from scripts import bench
from scripts.describe import count_macs, video_of


def run(*flags):
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *flags]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=600)


def table(*flags):
    """The rows that bench.py prints for the tiny model on a CPU, each split into words."""
    done = run("--model", "tiny", "--batch", "2", "--rounds", "1", "--device", "cpu", *flags)
    assert done.returncode == 0, done.stdout[-3000:]
    return [line.split() for line in done.stdout.splitlines() if "%" in line]


def test_comparison_has_both_models_and_their_arithmetic():
    rows = {" ".join(words[:2]): words for words in table()}
    std_former, plain = rows["STD-Former tiny"][2:], rows["CLIP ViT,"][3:]
    model = build_model("tiny")
    parameters = sum(p.numel() for p in model.parameters())
    macs = count_macs(model, video_of(model.config))["Global"]
    assert float(std_former[0]) == pytest.approx(parameters / 1e6, rel=0.01)
    assert float(std_former[1]) == pytest.approx(macs / 1e9, rel=0.01)
    ratio = float(std_former[1]) / float(plain[1])
    assert float(std_former[2]) == pytest.approx(ratio, rel=0.02)
    assert ratio > 1.5
    numbers = [word for word in std_former if word != "|" and not word.endswith("%")]
    assert len(numbers) == 9 and all(float(word) > 0 for word in numbers)
    shares = [float(word.rstrip("%")) for word in std_former if word.endswith("%")]
    assert len(shares) == 2 and all(share >= 0 for share in shares)     # MFU


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_breakdown_accounts_for_every_module(precision):
    rows = {words[0]: words for words in table("--breakdown", "--precision", precision)}
    modules = {"stem", "Block", "PTM", "CTM", "STDM", "SMEM"}
    assert set(rows) == modules | {"between", "whole"}
    shares = [float(rows[kind][-2].rstrip("%")) for kind in modules]
    assert sum(shares) == pytest.approx(100, abs=0.5)       # of the arithmetic


def test_the_pipeline_is_timed_from_frames_to_samples(monkeypatch, capsys):
    monkeypatch.setattr(bench, "make_clips", lambda folder, webm: {
        "frames": bench.make_ssv1_like(folder, clips=1)})
    threads = torch.get_num_threads()
    bench.main(["--pipeline", "--image_size", "32", "--num_frames", "4", "--rounds", "1"])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    labels = [line[:44].strip() for line in lines if line.startswith("  ") and "ms" not in line]
    assert labels == ["read_clip", "sample: read, crop, flip", "sample with RandAugment"]


def test_a_video_that_does_not_read_is_named():
    pytest.importorskip("decord")
    done = run("--pipeline", "--webm", "missing.webm")
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("bench.py: ") and "missing.webm cannot be read" in last


def test_a_model_that_does_not_fit_is_told_from_one_that_does():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken():
        raise RuntimeError("other")

    calls = []
    assert bench.fits(lambda: calls.append(1), 3) and len(calls) == 3
    assert not bench.fits(too_large, 3)
    with pytest.raises(RuntimeError, match="other"):
        bench.fits(broken, 1)


def test_a_model_without_room_beside_the_others_is_left_out():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fine():
        pass

    steps = {"small": (fine, fine), "large": (fine, too_large)}
    assert set(bench.take_turns(steps, 2, torch.device("cpu"))) == {"small"}
