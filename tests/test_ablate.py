"""scripts/ablate.py reaches every row of the paper's tables, and scripts/variants.py's models are what they are said to be.

    python -m pytest tests/test_ablate.py
"""
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
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
from model import CTM, DPE, MODELS, SMEM, STDM, ModelConfig, build_model, count_macs, one_video
from variants import VARIANTS, GatedSMEM


def args(**changes):
    return SimpleNamespace(**{**dict(dataset="toy", data_root="datasets/toy", out_dir="out/ablate", train_flags=[], gpus_per_run=1, classes=10, seeds=[0]), **changes})


def runs_of(table, **changes):
    return [ablate.Run(args(**changes), row, 0) for row in table.rows if row.flags is not None]


# ----------------------------------------------------------------------------------------------------
# The rows
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset, model, depth", [("toy", "tiny", 4), ("ssv1", "b16", 12), ("ssv2", "l14", 24), ("ssv1", "b16", 18)])
def test_every_row_is_a_model_that_exists_and_rows_differ(dataset, model, depth):
    by_folder = {}
    for name, table in ablate.make_tables(dataset, depth).items():
        runs = runs_of(table, dataset=dataset, train_flags=["--model", model, "--depth", str(depth)])
        assert len({run.folder for run in runs}) == len(runs) >= 1, name
        assert len({row.label for row in table.rows}) == len(table.rows)
        for run in runs:                                # rows that share a folder are one run, whatever flags led there
            assert by_folder.setdefault(run.folder, run.settings) == run.settings, (name, run.folder)


def test_positions_of_b16_are_the_papers():
    tables = ablate.make_tables("ssv1", 12)
    assert [run.config.ptm_layers for run in runs_of(tables["5"], dataset="ssv1")] == [
        tuple(range(12)), (0, 1, 2, 3), (4, 5, 6, 7, 8, 9, 10, 11), (4, 5, 6, 7), (8, 9, 10, 11), (8, 9), (10, 11)]
    best = runs_of(tables["6"], dataset="ssv1")[0]
    assert best.folder == ablate.Run(args(dataset="ssv1"), ablate.Row(""), 0).folder           # Table 6's best row is the full model: one run for both


def test_positions_scale_with_the_depth():
    for depth, shares in ((4, [(0, 1, 2, 3, 4, 5), (0, 1), (2, 3, 4, 5), (2, 3), (4, 5), (4,), (5,)]),         # gets six layers
                          (24, [tuple(range(24)), tuple(range(8)), tuple(range(8, 24)), tuple(range(8, 16)), tuple(range(16, 24)), (16, 17, 18, 19), (20, 21, 22, 23)])):
        runs = runs_of(ablate.make_tables("ssv1", depth)["5"], dataset="ssv1", train_flags=["--depth", str(depth)])
        assert [run.config.ptm_layers for run in runs] == shares
        assert {run.config.depth for run in runs} == {6 if depth == 4 else depth}
    assert ablate.make_tables("ssv1", 4)["5"].rows[3].label == "4-7 (here 2, 3)" and "6 layers" in ablate.make_tables("ssv1", 4)["5"].base
    assert [run.config.smem_layers for run in runs_of(ablate.make_tables("ssv1", 24)["6"], dataset="ssv1", train_flags=["--depth", "24"])][:3] == [(8,), (0,), (16,)]


def test_paper_numbers_are_those_of_the_paper():
    tables = ablate.make_tables("ssv1", 12)
    numbers = lambda name: [row.paper for row in tables[name].rows]
    assert numbers("2") == ["56.8 / 84.0", "57.2 / 84.3", "57.0 / 84.2", "57.1 / 84.2", "57.3 / 84.4"]
    assert numbers("3") == ["56.8 / 83.9", "55.6 / 82.9", "57.2 / 84.3", "54.5 / 81.8"]
    assert numbers("5") == ["55.2 / 82.6", "55.8 / 82.9", "56.6 / 83.5", "57.0 / 84.1", "57.2 / 84.3", "56.8 / 84.0", "56.6 / 83.4"]
    assert numbers("4") == ["57.1 / 84.2", None, None] and set(numbers("7")) == {None}
    assert tables["1"].rows[-1].paper == "57.3 / 84.4" and ablate.make_tables("ssv2", 12)["1"].rows[-1].paper == "69.2 / 92.1"


def test_table_2_switches_the_modules():
    have = [(bool(c.ptm_layers), bool(c.stdm_layers), bool(c.smem_layers)) for c in (run.config for run in runs_of(ablate.make_tables("ssv1", 12)["2"], dataset="ssv1"))]
    assert have == [(False, False, False), (True, False, False), (False, True, False), (False, False, True), (True, True, True)]


def test_a_rows_own_flags_win_and_evaluation_gets_what_it_needs():
    row = ablate.make_tables("toy", 8)["5"].rows[3]
    run = ablate.Run(args(train_flags=["--depth", "8", "--ptm_layers", "0", "--skip_list", "bad.txt", "--workers", "3", "--lr", "5e-4"]), row, 1)
    assert run.config.depth == 6 and run.config.ptm_layers == (2, 3)
    trained = train.get_args(run.train[2:])
    assert trained.lr == 5e-4 and trained.seed == 1 and trained.out_dir == str(run.folder)
    assert run.evaluate[-4:] == ["--workers", "3", "--skip_list", "bad.txt"]


def test_plain_vits_are_compared_with_what_starts_as_they_do():
    for dataset in ("ssv1", "toy"):
        ours, *vits = runs_of(ablate.make_tables(dataset, 12)["controls"], dataset=dataset)[:3]
        assert [run.settings["clip"] for run in (ours, *vits)] == ["none"] * 3 and [run.variant for run in vits] == ["divided", "frames"]
    assert ablate.Run(args(dataset="ssv1"), ablate.make_tables("ssv1", 12)["controls"].rows[3], 0).settings["clip"] == "openai"


@pytest.mark.parametrize("flags", (["--seed", "1"], ["--dataset=ssv1"], ["--max_steps", "3"]))
def test_flags_that_ablate_sets_itself_are_refused_behind_the_dashes(flags, capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--table", "2", "--dry_run", "--", *flags])
    assert f"{flags[0]} behind --" in capsys.readouterr().err


def test_dry_run_prints_every_command_and_all_leaves_out_what_has_no_sense(capsys):
    assert ablate.main(["--table", "all", "--dry_run", "--seeds", "0", "--dataset", "ssv1"]) == 0
    assert "difficulty" not in capsys.readouterr().out
    assert ablate.main(["--table", "difficulty", "--dry_run", "--seeds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    made = [line for line in lines if line.startswith("python data.py toy")]
    assert made == [f"python data.py toy --data_root datasets/toy_difficulty{d} --difficulty {d}" for d in ablate.DIFFICULTIES if d]
    assert len(lines) == len(made) + 2 * 3 * len(ablate.DIFFICULTIES)


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
    with pytest.raises(ValueError, match="other flags.*\\n  lr: 0.001, now 0.0001"):            # another run, not these results
        ablate.main(flags + ["--lr", "1e-4"])


def test_a_failing_row_is_reported_and_not_tabled(toy, tmp_path, capfd):
    assert ablate.main(["--table", "1", "--seeds", "0", "--data_root", str(toy), "--out_dir", str(tmp_path), "--", "--batch_size", "1000"]) == 1
    assert "--batch_size 1000: more than the 20 training clips" in capfd.readouterr().out
    assert "| STD-Former | 57.3 / 84.4 | not run |" in (tmp_path / "toy" / "table1.md").read_text()


def test_a_stopped_row_goes_on(toy, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "ablate.py"), "--table", "1", "--seeds", "0", "--data_root", str(toy), "--out_dir", str(tmp_path), "--",
               "--epochs", "30", "--warmup_epochs", "0", "--batch_size", "20", "--depth", "2", "--save_minutes", "0", "--eval_every", "30", "--workers", "0"]
    seed = tmp_path / "toy" / "std_former" / "seed0"
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_until = time.monotonic() + 120
    while not (seed / "last.pt").is_file():
        assert process.poll() is None and time.monotonic() < wait_until
        time.sleep(0.05)
    process.terminate()
    assert "stopped; the same command goes on" in process.communicate(timeout=120)[0] and process.returncode
    assert "stopped after step" in seed.with_suffix(".txt").read_text() and not seed.with_suffix(".json").exists()
    again = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert again.returncode == 0, again.stdout
    assert "--resume" not in again.stdout and seed.with_suffix(".json").is_file()
    steps = [json.loads(line)["step"] for line in (seed / "log.jsonl").read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, 31))                           # a row per epoch of one step, none twice


def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    table = ablate.make_tables("toy", 4)["difficulty"]
    fake = [[SimpleNamespace(result=lambda v=v: dict(top1=v)) for v in (90 - 50 * row.difficulty, 92 - 50 * row.difficulty)] for row in table.rows]
    fake[-1] = []                                       # not run
    ablate.draw_difficulty(tmp_path / "a.png", table, fake)
    ablate.draw_table(tmp_path / "b.png", "title", table, fake)
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("a.png", "b.png"))


def test_mean_and_deviation():
    assert ablate.spread([90.0]) == "90.0" and ablate.spread([90.0, 92.0, 94.0]) == "92.0 ± 2.0"


# ----------------------------------------------------------------------------------------------------
# The models to compare with
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "stdm_dense"])       # which is five times as large
@pytest.mark.parametrize("size", ("tiny", "b16"))
def test_variants_have_equal_parameters_and_arithmetic(variant, size):
    with torch.device("meta"):
        ours, other = build_model(size), VARIANTS[variant](ModelConfig(**MODELS[size]))
    count = [sum(p.numel() for p in m.parameters()) for m in (ours, other)]
    assert abs(count[1] / count[0] - 1) < 0.07, count
    macs = [count_macs(m, one_video(m.config))["Global"] for m in (ours, other)]
    assert abs(macs[1] / macs[0] - 1) < 0.11, macs


def small(variant, **changes):
    torch.manual_seed(0)
    return VARIANTS[variant](ModelConfig(**{**MODELS["tiny"], **dict(depth=2, num_frames=8, num_classes=5), **changes})).eval()


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


def part(variant, base, **changes):
    """The first module of this kind in a small variant, with random parameters."""
    found = next(m for m in small(variant, ptm_layers=(1,), **changes).modules() if isinstance(m, base))
    for p in found.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return found


@pytest.mark.parametrize("variant, width", [("dpe_no_bn", 42), ("dpe_wide", 64)])
def test_dpe_without_batchnorm(variant, width):
    dpe, patches = part(variant, DPE).train(), torch.randn(2, 4, 16, 64)
    assert dpe.conv.weight.shape == (width, 1, 3, 1)
    assert torch.allclose(dpe(patches)[:1], dpe(patches[:1]), atol=1e-6)        # clips of a batch do not see each other


def test_cpe_on_the_query_only():
    ctm, x, y = part("cpe_query", CTM), *torch.randn(2, 2, 4, 4, 4, 64)
    encoded = x + ctm.cpe(x)
    z = encoded + ctm.cross_attention(ctm.ln_q(encoded), ctm.ln_kv(y))
    assert torch.allclose(ctm(x, y), z + ctm.mlp(ctm.ln_2(z)), atol=1e-5)


def test_dense_stdm_mixes_channels_in_every_convolution():
    stdm = part("stdm_dense", STDM)
    assert stdm.conv_s.weight.shape == (64, 64, 3, 3) and stdm.conv_t.weight.shape == (64, 64, 3, 1)
    with torch.device("meta"):
        b16 = VARIANTS["stdm_dense"](ModelConfig(**MODELS["b16"]))
    assert sum(p.numel() for p in b16.stdm[0].parameters()) == 768 ** 2 * 13 + 4 * 768 + 768
    assert stdm(torch.randn(2, 4, 4, 4, 64)).shape == (2, 4, 4, 4, 64)


@pytest.mark.parametrize("variant", ("smem_unit", "smem_relu", "smem_unit_relu"))
def test_smem_correlation_variants(variant):
    f = torch.randn(2, 3, 16, 8)
    c = torch.zeros(2, 2, 16, 16)
    for t in range(2):
        a, b = f[:, t], f[:, t + 1]
        if "unit" in variant:
            c[:, t] = torch.nn.functional.cosine_similarity(a[:, :, None], b[:, None], dim=-1)
        else:
            c[:, t] = a @ b.transpose(1, 2) / 8 ** 0.5
    if "relu" in variant:
        c = c.clamp(min=0)
    assert torch.allclose(part(variant, SMEM).correlation(f), c, atol=1e-6)


def test_plain_evaluation_refuses_the_gate(tmp_path):
    model = small("smem_gate")
    checkpoint = dict(model=model.state_dict(), model_config=asdict(model.config))
    with pytest.raises(ValueError, match="variant_smem_gate"):
        evaluate.build_trained(checkpoint, "x.pt")


@pytest.fixture
def put_back(monkeypatch):
    """What variants.main replaces is put back afterwards."""
    for module, name in ((train, "STDFormer"), (train, "load_clip"), (evaluate, "STDFormer")):
        monkeypatch.setattr(module, name, getattr(module, name))


def test_plain_vits_refuse_clip_weights(toy, tmp_path, put_back):
    with pytest.raises(ValueError, match="--clip openai: DividedViT has .* layers"):
        variants.main(["divided", "train", "--data_root", str(toy), "--out_dir", str(tmp_path / "out"), "--clip", "openai", "--device", "cpu"])


def test_a_variant_trains_and_evaluates_with_the_same_programs(toy, tmp_path, put_back, capsys):
    variants.main(["divided", "train", "--data_root", str(toy), "--out_dir", str(tmp_path / "out"), "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "20",
                   "--workers", "0", "--depth", "2", "--device", "cpu"])
    assert "time_embedding" in torch.load(tmp_path / "out" / "last.pt", weights_only=True)["model"]
    variants.main(["divided", "evaluate", "--ckpt", str(tmp_path / "out" / "last.pt"), "--workers", "0", "--device", "cpu"])
    assert re.fullmatch(r"top1 [\d.]+ top5 [\d.]+ clips 10 views 16x3x1", capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("argv", ([], ["frames"], ["nothing", "train"], ["frames", "walk"]))
def test_an_unknown_variant_is_refused_with_the_list(argv):
    with pytest.raises(SystemExit, match="frames.divided.dpe_no_bn.* train.evaluate"):
        variants.main(argv)
