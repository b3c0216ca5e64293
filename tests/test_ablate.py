"""scripts/ablate.py has every row of the paper's tables, runs each once, resumes and reports.

    python -m pytest tests/test_ablate.py
"""
import json
import re
import time

import pytest

import train
from conftest import PROCESSES, ROOT
from scripts import ablate
from scripts.variants import VARIANTS

SHORT = ["--epochs", "1", "--warmup_epochs", "0", "--batch_size", "20", "--depth", "2",
         "--workers", "0"]

def configs(*flags):
    """{table: configs of its rows that are run}, from the commands that ablate.py would run."""
    args, tables = ablate.get_args(["--table", "2", "--seeds", "0", *flags])
    found = {}
    for name, (_, rows) in tables.items():
        found[name] = []
        for row in rows:
            for run in ablate.runs_of(row, args):
                words = run.train[run.train.index("--dataset"):]
                found[name].append(train.model_config(train.get_args(words), 174))
    return found

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    from scripts.toy_data import make_toy
    root = tmp_path_factory.mktemp("ablate") / "toy"
    make_toy(root, train=20, validation=10)
    return str(root)

# ----- The rows -------------------------------------------------------------

@pytest.mark.parametrize("flags", (
    ["--", "--model", "tiny"], ["--dataset", "ssv1"], ["--dataset", "ssv2", "--", "--model", "l14"],
    ["--dataset", "folder", "--", "--recipe", "toy"]))
def test_every_row_is_a_model_that_exists_and_rows_differ(flags):
    configs(*flags)                             # ValueError for a layer that does not exist
    args, tables = ablate.get_args(["--table", "2", "--seeds", "0", *flags])
    for name, (_, rows) in tables.items():
        runs = [run for row in rows for run in ablate.runs_of(row, args)]
        assert len({run.folder for run in runs}) == len(runs) >= 1, name
        assert {row.variant for row in rows} <= {"", *VARIANTS}

def test_rows_of_b16_are_the_papers():
    of = configs("--dataset", "ssv1")
    parts = [(bool(c.ptm_layers), bool(c.stdm_layers), bool(c.smem_t_layers)) for c in of["2"]]
    assert parts == [(False, False, False), (True, False, False), (False, True, False),
                     (False, False, True), (True, True, True)]
    assert [c.ptm_conv for c in of["3"]] == ["attention2d", "attention3d", "residual2d",
                                             "residual3d"]
    assert [c.smem_fusion for c in of["4"]] == ["mul", "add", "mul+add"]
    assert [(c.ptm_layers[0], c.ptm_layers[-1]) for c in of["5"]] == [
        (0, 11), (0, 3), (4, 11), (4, 7), (8, 11), (8, 9), (10, 11)]
    assert [(c.smem_t_layers, c.smem_st_layers) for c in of["6"][:6]] == [
        ((4,), ()), ((0,), ()), ((8,), ()), ((), (4,)), ((), (8,)), ((4,), (4,))]
    assert [(c.alpha, c.beta) for c in of["7"][:4]] == [(1, 1), (0.5, 1), (2, 1), (1, 0.5)]
    assert not any(c.learn_fusion for c in of["7"])
    assert of["6"][0] == of["2"][-1] and of["5"][4] == of["2"][1]

def test_positions_scale_with_the_depth():
    l14 = configs("--dataset", "ssv1", "--", "--model", "l14")["5"][3]
    tiny = configs()["5"][3]
    assert l14.ptm_layers == tuple(range(8, 16))
    assert tiny.depth == 6 and tiny.ptm_layers == (2, 3)

def test_every_variant_has_a_row():
    _, tables = ablate.get_args(["--table", "2"])
    rows = [row for name in ("readings", "controls", "evidence") for row in tables[name][1]]
    assert {row.variant for row in rows} == {"", *VARIANTS} - {"bn_frozen", "shuffle_tokens"}

def test_plain_vits_start_as_the_std_former_beside_them():
    for dataset in ("toy", "ssv1"):
        args, tables = ablate.get_args(["--table", "2", "--dataset", dataset])
        for name in ("controls", "evidence"):
            words = [ablate.Run(row, 0, args).train for row in tables[name][1][:3]]
            clips = [train.get_args(w[w.index("--dataset"):]).clip for w in words]
            assert clips == ["none"] * 3

def test_commands_are_printed_only(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)                     # commands name the programs by their path from here
    flags = "--table controls 5 --dry_run --seeds 3 --gpus_per_run 2 --data_root no/where"
    ablate.main([*flags.split(), "--", "--skip_list", "bad.txt", "--depth", "4"])
    lines = capsys.readouterr().out.splitlines()
    divided = ("python -m torch.distributed.run --standalone --nproc_per_node=2 "
               "scripts/variants.py divided")
    folder = "out/ablate/where/divided/seed3"
    assert (f"{divided} train --dataset toy --data_root no/where --skip_list bad.txt --depth 4 "
            f"--seed 3 --out_dir {folder}") in lines
    assert f"{divided} evaluate --ckpt {folder}/last.pt --skip_list bad.txt" in lines
    assert any("--depth 4 --ptm_layers 2 3" in line and "--depth 6" in line for line in lines)

# ----- The runs -------------------------------------------------------------

def test_rows_are_run_once_and_reported(tmp_path, monkeypatch, capsys):
    """Here the two programs only print what they would. The next tests run them."""
    executed = []

    def execute(run, command, environment, running):
        executed.append(command)
        if command is not run.evaluate:
            return "model: 0.49 M parameters\ndone: best top1 99.00\n"
        seed = int(run.folder.name[-1])
        return f"top1 {90 + 2 * seed}.00 top5 100.00 clips 10 views 16x3x1\n"

    monkeypatch.setattr(ablate.Run, "execute", execute)
    monkeypatch.setattr(train, "make_toy", lambda root: None)
    flags = ["--table", "1", "--seeds", "0", "1", "--jobs", "2", "--out_dir", str(tmp_path), "--",
             *SHORT]
    ablate.main(flags)
    assert len(executed) == 4                   # training and evaluation of each seed
    table = (tmp_path / "table1.md").read_text(encoding="utf-8")
    assert "| STD-Former | 57.3 / 84.4 | 91.0 ± 1.4 | 100.0 ± 0.0 | 2 | 0.49 |" in table
    assert "| TEA | 52.3 / 81.9 |  |" in table

    ablate.main(flags)                          # nothing is left to do
    assert len(executed) == 4
    with pytest.raises(ValueError, match="seed0/result.json is the result of .*another --out_dir"):
        ablate.main([*flags, "--lr", "1e-4"])

def test_a_failing_run_is_reported_and_not_tabled(toy, tmp_path, capsys):
    with pytest.raises(SystemExit, match="not finished.*\n.*std_former/seed0"):
        ablate.main(["--table", "1", "--seeds", "0", "--data_root", toy, "--out_dir",
                     str(tmp_path), "--", "--batch_size", "1000"])
    printed = capsys.readouterr().out
    assert "seed0: train.py: 20 training clips are too few" in printed
    assert "| STD-Former | 57.3 / 84.4 |  |" in printed

def test_a_stopped_run_is_resumed(toy, tmp_path, capfd):
    flags = ["--table", "1", "--seeds", "0", "--data_root", toy, "--out_dir", str(tmp_path), "--",
             *SHORT, "--epochs", "12", "--eval_every", "12"]
    process = PROCESSES.Process(target=ablate.main, args=(flags,))
    process.start()
    seed = tmp_path / "std_former" / "seed0"
    while not (seed / "last.pt").is_file():
        assert process.is_alive()
        time.sleep(0.05)
    process.terminate()
    process.join(timeout=600)
    assert "stopped after step" in capfd.readouterr().out
    assert process.exitcode == 1 and not (seed / "result.json").exists()

    ablate.main(flags)
    assert (seed / "result.json").exists()
    rows = [json.loads(line) for line in (seed / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, 13))          # a row for each epoch of one step, none twice

def test_means():
    assert ablate.as_text([90.0]) == "90.0"
    assert ablate.as_text([90.0, 92.0, 94.0]) == "92.0 ± 2.0"
