"""scripts/ablate.py reaches every row of the paper's tables, and scripts/variants.py's models are what they are said to be.

    python -m pytest tests/test_ablate.py
"""
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import ablate
import data
import evaluate
import train
import variants
from model import MODELS, SMEM, build_model, count_macs
from variants import VARIANTS, GatedSMEM, build


def args(**changes):
    return SimpleNamespace(**{**dict(dataset="toy", data_root="datasets/toy", out_dir="out/ablate", train_flags=[], gpus_per_run=1, classes=10, seeds=[0]), **changes})


# ----------------------------------------------------------------------------------------------------
# The rows
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset, model", [("toy", "tiny"), ("ssv1", "b16"), ("ssv2", "l14")])
def test_every_row_is_a_model_that_exists_and_rows_differ(dataset, model):
    for table, (title, base, rows) in ablate.make_tables(dataset, MODELS[model]["depth"]).items():
        runs = [ablate.Run(args(dataset=dataset, train_flags=["--model", model]), flags, 0) for _, _, flags in rows if flags is not None]
        assert len({run.folder for run in runs}) == len(runs) >= 1, table
        assert len({label for label, *_ in rows}) == len(rows)


def test_positions_of_b16_are_the_papers():
    tables = ablate.make_tables("ssv1", 12)
    assert [row[2].split(" --stdm")[0] for row in tables["5"][2]] == [
        "--ptm_layers 0 1 2 3 4 5 6 7 8 9 10 11", "--ptm_layers 0 1 2 3", "--ptm_layers 4 5 6 7 8 9 10 11", "--ptm_layers 4 5 6 7", "--ptm_layers 8 9 10 11",
        "--ptm_layers 8 9", "--ptm_layers 10 11"]
    best = ablate.Run(args(dataset="ssv1"), tables["6"][2][0][2], 0)
    assert best.folder == ablate.Run(args(dataset="ssv1"), "", 0).folder            # Table 6's best row is the full model: one run for both
    for depth in (4, 6):
        label, _, flags = ablate.make_tables("ssv1", depth)["5"][2][3]
        assert flags.startswith("--ptm_layers 2 3 ") and label == "4-7 (here 2, 3)" and ("--depth 6" in flags) == (depth == 4)


def test_paper_numbers_are_those_of_the_paper():
    tables = ablate.make_tables("ssv1", 12)
    assert [row[1] for row in tables["2"][2]] == ["56.8 / 84.0", "57.2 / 84.3", "57.0 / 84.2", "57.1 / 84.2", "57.3 / 84.4"]
    assert [row[1] for row in tables["3"][2]] == ["56.8 / 83.9", "55.6 / 82.9", "57.2 / 84.3", "54.5 / 81.8"]
    assert [row[1] for row in tables["5"][2]] == ["55.2 / 82.6", "55.8 / 82.9", "56.6 / 83.5", "57.0 / 84.1", "57.2 / 84.3", "56.8 / 84.0", "56.6 / 83.4"]
    assert [row[1] for row in tables["4"][2]] == ["57.1 / 84.2", None, None]


def test_table_2_switches_the_modules():
    have = []
    for _, _, flags in ablate.make_tables("ssv1", 12)["2"][2]:
        c = ablate.Run(args(dataset="ssv1"), flags, 0).config
        have.append((bool(c.ptm_layers), bool(c.stdm_layers), bool(c.smem_layers)))
    assert have == [(False, False, False), (True, False, False), (False, True, False), (False, False, True), (True, True, True)]


# ----------------------------------------------------------------------------------------------------
# Running them
# ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("ablate") / "toy"
    data.make_toy(root, seed=0, train=20, validation=10)
    return root


def test_rows_are_trained_once_and_tabled(toy, tmp_path, capfd, monkeypatch):
    flags = ["--table", "1", "--seeds", "0", "1", "--data_root", str(toy), "--out_dir", str(tmp_path), "--jobs", "2", "--",
             "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "20", "--depth", "2"]
    first = subprocess.run([sys.executable, str(ROOT / "scripts" / "ablate.py"), *flags], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert first.returncode == 0, first.stdout
    assert len(re.findall(r"^python train.py .*--seed [01]", first.stdout, re.MULTILINE)) == 2
    table = (tmp_path / "toy" / "table1.md").read_text()
    scores = [json.loads(p.read_text())["top1"] for p in sorted((tmp_path / "toy" / "std_former").glob("seed*.json"))]
    assert f"| STD-Former | 57.3 / 84.4 | {ablate.spread(scores)} |" in table and "| UniFormerV2-B | 56.8 / 84.2 |" in table

    monkeypatch.chdir(ROOT)                                                    # commands are printed by their path from here
    (tmp_path / "toy" / "table1.md").unlink()
    assert ablate.main(["--report_only"] + flags) == 0 and (tmp_path / "toy" / "table1.md").read_text() == table
    assert ablate.main(flags) == 0                                       # nothing is left to do
    assert "train.py --dataset" not in capfd.readouterr().out and (tmp_path / "toy" / "table1.md").read_text() == table
    with pytest.raises(ValueError, match="was run as"):                  # other flags are another run, not these results
        ablate.main(flags + ["--lr", "1e-4"])


def test_a_failing_row_is_reported_and_not_tabled(toy, tmp_path, capfd):
    assert ablate.main(["--table", "1", "--seeds", "0", "--data_root", str(toy), "--out_dir", str(tmp_path), "--", "--batch_size", "1000"]) == 1
    assert "--batch_size 1000: more than the 20 training clips" in capfd.readouterr().out
    assert "| STD-Former | 57.3 / 84.4 | not run |" in (tmp_path / "toy" / "table1.md").read_text()


def test_mean_and_deviation():
    assert ablate.spread([90.0]) == "90.0" and ablate.spread([90.0, 92.0, 94.0]) == "92.0 ± 2.0"


# ----------------------------------------------------------------------------------------------------
# The models to compare with
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", ("tiny", "b16"))
def test_variants_have_equal_parameters_and_arithmetic(variant, size):
    with torch.device("meta"):
        ours, other = build_model(size), build(variant, size)
    count = [sum(p.numel() for p in m.parameters()) for m in (ours, other)]
    assert abs(count[1] / count[0] - 1) < 0.07, count
    macs = [count_macs(m)["Global"] for m in (ours, other)]
    assert abs(macs[1] / macs[0] - 1) < 0.11, macs


def small(variant, **changes):
    torch.manual_seed(0)
    return build(variant, "tiny", **{**dict(depth=2, num_frames=8, num_classes=5), **changes}).eval()


def test_frames_ignores_order_and_divided_does_not():
    video = torch.randn(2, 3, 8, 32, 32)
    reversed_pairs = video.unflatten(2, (4, 2)).flip(2).flatten(2, 3)    # reversed by temporal strides of two frames
    frames, divided = small("frames"), small("divided")
    assert torch.allclose(frames(video), frames(reversed_pairs), atol=1e-5)
    torch.nn.init.normal_(divided.time_embedding)
    assert (divided(video) - divided(reversed_pairs)).abs().max() > 1e-3
    used = torch.zeros(2, 3, 8, 32, 32)
    used[:, :, ::2] = video[:, :, ::2]
    assert torch.equal(frames(video), frames(used))                      # one frame of each temporal stride, and no other


def test_divided_attention_sees_time_at_a_place_only():
    block = small("divided").blocks[0]
    x = torch.randn(1, 4, 1 + 16, 64)
    time = lambda z: block.attn_t(block.ln_t(z).transpose(1, 2).flatten(0, 1)).view(1, 17, 4, 64).transpose(1, 2)
    changed = x.clone()
    changed[:, :, 3] += 1
    different = (time(x) != time(changed)).any(-1)[0]                    # (T, 1+N)
    assert different[:, 3].all() and not different[:, torch.arange(17) != 3].any()


def test_zero_ctm_starts_without_memory_and_starves_the_one_below():
    model = small("ctm_zero", stdm_layers=(), smem_layers=())
    video = torch.randn(2, 3, 8, 32, 32)
    before = model.forward_features(video)[1]
    torch.nn.init.normal_(model.ctm[0].kv.weight)
    assert torch.equal(before, model.forward_features(video)[1])
    model(video).sum().backward()
    grads = [ctm.out_proj.weight.grad.abs().sum() for ctm in model.ctm]
    assert grads[-1] > 0 and grads[0] == 0              # why this is not the default: what lies below a silent CTM learns nothing


def test_smem_gate_multiplies():
    model = small("smem_gate")
    gates = [m for m in model.modules() if isinstance(m, SMEM)]
    assert gates and all(type(m) is GatedSMEM for m in gates)
    y, plain = torch.randn(2, 4, 4, 4, 64), SMEM(64, (4, 4)).eval()
    plain.load_state_dict(gates[0].state_dict())
    motion = plain(y) - y
    assert torch.allclose(gates[0](y), y * 2 * torch.sigmoid(motion), atol=1e-5)


def test_a_variant_trains_and_evaluates_with_the_same_programs(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "build_model", train.build_model)         # what variants.py replaces, put back afterwards
    monkeypatch.setattr(evaluate, "STDFormer", evaluate.STDFormer)
    variants.main(["divided", "train", "--data_root", str(toy), "--out_dir", str(tmp_path / "out"), "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "20",
                   "--workers", "0", "--depth", "2", "--device", "cpu"])
    assert "time_embedding" in torch.load(tmp_path / "out" / "last.pt", weights_only=True)["model"]
    variants.main(["divided", "evaluate", "--ckpt", str(tmp_path / "out" / "last.pt"), "--workers", "0", "--device", "cpu"])
    assert re.fullmatch(r"top1 [\d.]+ top5 [\d.]+ clips 10 views 16x3x1", capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("argv", ([], ["frames"], ["nothing", "train"], ["frames", "walk"]))
def test_an_unknown_variant_is_refused_with_the_list(argv):
    with pytest.raises(SystemExit, match="frames.divided.ctm_zero.smem_gate train.evaluate"):
        variants.main(argv)
