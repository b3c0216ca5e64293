"""scripts/ablate.py reaches every row of the paper's tables, runs it once and reports it.

python -m pytest -q tests/test_ablate.py
"""
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import train
from conftest import ROOT
from scripts import ablate
from scripts.variants import VARIANTS


def args(**changes):
    default = dict(dataset="toy", data_root="datasets/toy", out_dir="out/ablate", train_flags=[],
                   gpus_per_run=1, classes=10, seeds=[0])
    return SimpleNamespace(**{**default, **changes})


def runs_of(table, **changes):
    return [ablate.Run(args(**changes), row, 0) for row in table.rows if row.flags is not None]


def ssv1_configs(name, depth=12):
    table = ablate.make_tables("ssv1", depth)[name]
    flags = ["--depth", str(depth)]
    return [run.config for run in runs_of(table, dataset="ssv1", train_flags=flags)]


# ----- The rows -------------------------------------------------------------

@pytest.mark.parametrize("dataset, model, depth", [
    ("toy", "tiny", 4), ("ssv1", "b16", 12), ("ssv2", "l14", 24), ("ssv1", "b16", 18)])
def test_every_row_is_a_model_that_exists_and_rows_differ(dataset, model, depth):
    by_folder = {}
    flags = ["--model", model, "--depth", str(depth)]
    for name, table in ablate.make_tables(dataset, depth).items():
        runs = runs_of(table, dataset=dataset, train_flags=flags)
        assert len({run.folder for run in runs}) == len(runs) >= 1, name
        assert len({row.label for row in table.rows}) == len(table.rows)
        for run in runs:                        # rows that share a folder are one run
            settings = by_folder.setdefault(run.folder, run.settings)
            assert settings == run.settings, (name, run.folder)


def test_positions_of_b16_are_the_papers():
    assert [c.ptm_layers for c in ssv1_configs("5")] == [
        tuple(range(12)), (0, 1, 2, 3), (4, 5, 6, 7, 8, 9, 10, 11), (4, 5, 6, 7), (8, 9, 10, 11),
        (8, 9), (10, 11)]
    # Table 6's best row is the full model: one run for both.
    best = runs_of(ablate.make_tables("ssv1", 12)["6"], dataset="ssv1")[0]
    assert best.folder == ablate.Run(args(dataset="ssv1"), ablate.Row(""), 0).folder


@pytest.mark.parametrize("depth, used, positions", [
    (4, 6, [(0, 1, 2, 3, 4, 5), (0, 1), (2, 3, 4, 5), (2, 3), (4, 5), (4,), (5,)]),
    (24, 24, [tuple(range(24)), tuple(range(8)), tuple(range(8, 24)), tuple(range(8, 16)),
              tuple(range(16, 24)), (16, 17, 18, 19), (20, 21, 22, 23)])])
def test_positions_scale_with_the_depth(depth, used, positions):
    configs = ssv1_configs("5", depth)
    assert [c.ptm_layers for c in configs] == positions
    assert {c.depth for c in configs} == {used}


def test_labels_name_our_positions_beside_the_papers():
    table = ablate.make_tables("ssv1", 4)["5"]
    assert table.rows[3].label == "4-7 (here 2, 3)"
    assert "6 layers" in table.base


def test_smem_positions_are_in_the_branch_that_the_label_names():
    for depth, at in ((12, (4, 0, 8)), (24, (8, 0, 16))):
        configs = ssv1_configs("6", depth)
        assert [c.smem_t_layers for c in configs[:3]] == [(i,) for i in at]
        branches = [(bool(c.smem_t_layers), bool(c.smem_st_layers)) for c in configs]
        temporal, spatiotemporal, both = (True, False), (False, True), (True, True)
        assert branches == [*[temporal] * 3, *[spatiotemporal] * 2, both, temporal, spatiotemporal]


def test_paper_numbers_are_those_of_the_paper():
    tables = ablate.make_tables("ssv1", 12)

    def numbers(name):
        return [row.paper for row in tables[name].rows]

    assert numbers("2") == ["56.8 / 84.0", "57.2 / 84.3", "57.0 / 84.2", "57.1 / 84.2",
                            "57.3 / 84.4"]
    assert numbers("3") == ["56.8 / 83.9", "55.6 / 82.9", "57.2 / 84.3", "54.5 / 81.8"]
    assert numbers("5") == ["55.2 / 82.6", "55.8 / 82.9", "56.6 / 83.5", "57.0 / 84.1",
                            "57.2 / 84.3", "56.8 / 84.0", "56.6 / 83.4"]
    assert numbers("4") == ["57.1 / 84.2", None, None]
    assert set(numbers("7")) == {None}
    assert tables["1"].rows[-1].paper == "57.3 / 84.4"
    assert ablate.make_tables("ssv2", 12)["1"].rows[-1].paper == "69.2 / 92.1"


def test_table_2_switches_the_modules():
    have = [(bool(c.ptm_layers), bool(c.stdm_layers), bool(c.smem_t_layers))
            for c in ssv1_configs("2")]
    assert have == [(False, False, False), (True, False, False), (False, True, False),
                    (False, False, True), (True, True, True)]


def test_every_reading_of_variants_is_a_row():
    variants = [row.variant for row in ablate.make_tables("toy", 4)["readings"].rows]
    assert {*variants} - {""} == {*VARIANTS} - {"frames", "divided", "bn_frozen"}


def test_a_rows_own_flags_win_and_evaluation_gets_what_it_needs():
    row = ablate.make_tables("toy", 8)["5"].rows[3]
    flags = ["--depth", "8", "--ptm_layers", "0", "--skip_list", "bad.txt", "--workers", "3",
             "--lr", "5e-4"]
    run = ablate.Run(args(train_flags=flags), row, 1)
    assert run.config.depth == 6 and run.config.ptm_layers == (2, 3)
    trained = train.get_args(run.train[2:])
    assert trained.lr == 5e-4 and trained.seed == 1 and trained.out_dir == str(run.folder)
    assert run.evaluate[-4:] == ["--workers", "3", "--skip_list", "bad.txt"]


def test_several_gpus_per_run_are_started_by_torchrun():
    row = ablate.Row("", variant="frames")
    run = ablate.Run(args(gpus_per_run=4), row, 0)
    words = " ".join(run.train)
    assert re.search(r"-m torch.distributed.run --standalone --nproc_per_node=4 \S*variants.py "
                     "frames train --dataset toy", words)


def test_plain_vits_are_compared_with_what_starts_as_they_do():
    for dataset in ("ssv1", "toy"):
        table = ablate.make_tables(dataset, 12)["controls"]
        std_former, *vits = runs_of(table, dataset=dataset)[:3]
        assert [run.settings["clip"] for run in (std_former, *vits)] == ["none"] * 3
        assert [run.row.variant for run in vits] == ["divided", "frames"]
    row = ablate.make_tables("ssv1", 12)["controls"].rows[3]
    assert ablate.Run(args(dataset="ssv1"), row, 0).settings["clip"] == "openai"


@pytest.mark.parametrize("flags", (["--seed", "1"], ["--dataset=ssv1"], ["--max_steps", "3"]))
def test_flags_that_ablate_sets_itself_are_refused_after_the_dashes(flags, capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--table", "2", "--dry_run", "--", *flags])
    assert f"{flags[0]} after -- is set by ablate.py" in capsys.readouterr().err


def test_dry_run_prints_every_command_and_all_leaves_out_what_has_no_sense(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)                     # commands are printed by their path from here
    everything = ["--table", "all", "--dry_run", "--seeds", "0", "--data_root", "nowhere"]
    assert ablate.main([*everything, "--dataset", "ssv1"]) == 0
    assert "difficulty" not in capsys.readouterr().out
    assert ablate.main(["--table", "difficulty", *everything[2:]]) == 0
    lines = capsys.readouterr().out.splitlines()
    made = [line for line in lines if line.startswith("python scripts/toy_data.py")]
    assert made == [f"python scripts/toy_data.py --data_root nowhere_difficulty{d} --difficulty {d}"
                    for d in ablate.DIFFICULTIES if d]
    assert len(lines) == len(made) + 2 * 3 * len(ablate.DIFFICULTIES)


def test_a_harder_toy_has_the_size_of_the_plain_one(tmp_path):
    stamp = dict(version=1, seed=3, train=20, validation=10, difficulty=0)
    (tmp_path / "toy.json").write_text(json.dumps(stamp))
    row = ablate.Row("", difficulty=0.5)
    words = " ".join(ablate.Run(args(data_root=str(tmp_path)), row, 0).make_toy)
    assert words.endswith("_difficulty0.5 --difficulty 0.5 --seed 3 --train 20 --validation 10")


# ----- Results --------------------------------------------------------------

def finished(tmp_path, row=ablate.Row(""), **changes):
    """A run with a result file, as if it had been trained."""
    run = ablate.Run(args(out_dir=str(tmp_path), **changes), row, 0)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    result = dict(top1=50.0, top5=90.0, line="top1 50.00", settings=run.settings)
    run.result_file.write_text(json.dumps(result))
    return run


def test_a_finished_run_is_recognised_by_its_settings(tmp_path):
    assert ablate.Run(args(out_dir=str(tmp_path)), ablate.Row(""), 0).result() is None
    finished(tmp_path)
    again = ablate.Run(args(out_dir=str(tmp_path)), ablate.Row(""), 0)
    assert again.result()["top1"] == 50.0
    # What does not change a result may change, but nothing else.
    free = ["--workers", "7", "--log_every", "3"]
    assert ablate.Run(args(out_dir=str(tmp_path), train_flags=free), ablate.Row(""), 0).result()
    other = ablate.Run(args(out_dir=str(tmp_path), train_flags=["--lr", "1"]), ablate.Row(""), 0)
    with pytest.raises(ValueError, match="other flags.*\\n  lr: 0.001, now 1.0"):
        other.result()


def test_a_flag_newer_than_a_result_had_its_default(tmp_path):
    run = finished(tmp_path)
    result = json.loads(run.result_file.read_text())
    del result["settings"]["freeze_clip"]
    run.result_file.write_text(json.dumps(result))
    assert run.result()["top1"] == 50.0
    flags = ["--freeze_clip"]
    other = ablate.Run(args(out_dir=str(tmp_path), train_flags=flags), ablate.Row(""), 0)
    with pytest.raises(ValueError, match="freeze_clip: False, now True"):
        other.result()


def test_equal_rows_of_two_tables_are_one_run(tmp_path):
    a = ablate.Run(args(), ablate.Row("all four"), 0)
    b = ablate.Run(args(), ablate.Row("default", "--ptm_layers 3"), 0)
    assert ablate.once_each([a, b]) == [b]


# ----- Running them ---------------------------------------------------------

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    from scripts.toy_data import make_toy
    root = tmp_path_factory.mktemp("ablate") / "toy"
    make_toy(root, seed=0, train=20, validation=10)
    return str(root)


def start(flags):
    command = [sys.executable, str(ROOT / "scripts" / "ablate.py"), *flags]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def test_rows_are_trained_once_and_tabled(toy, tmp_path, capfd, monkeypatch):
    flags = ["--table", "1", "--seeds", "0", "1", "--data_root", toy, "--out_dir", str(tmp_path),
             "--jobs", "2", "--", "--epochs", "1", "--warmup_epochs", "0", "--batch_size", "20",
             "--depth", "2"]
    process = start(flags)
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    assert len(re.findall(r"^python train.py .*--seed [01]", printed, re.MULTILINE)) == 2
    table = tmp_path / "toy" / "table1.md"
    first = table.read_text(encoding="utf-8")
    results = sorted((tmp_path / "toy" / "std_former").glob("seed*.json"))
    scores = [json.loads(path.read_text())["top1"] for path in results]
    assert f"| STD-Former | 57.3 / 84.4 | {ablate.mean_as_text(scores)} |" in first
    assert "| UniFormerV2-B | 56.8 / 84.2 |" in first

    monkeypatch.chdir(ROOT)                     # commands are printed by their path from here
    table.unlink()
    assert ablate.main(["--report_only", *flags]) == 0
    assert table.read_text(encoding="utf-8") == first
    assert ablate.main(flags) == 0              # nothing is left to do
    assert "train.py --dataset" not in capfd.readouterr().out
    assert table.read_text(encoding="utf-8") == first
    with pytest.raises(ValueError, match="other flags.*\\n  lr: 0.001, now 0.0001"):
        ablate.main(flags + ["--lr", "1e-4"])   # another run, not these results


def test_a_failing_row_is_reported_and_not_tabled(toy, tmp_path, capfd):
    flags = ["--table", "1", "--seeds", "0", "--data_root", toy, "--out_dir", str(tmp_path)]
    assert ablate.main([*flags, "--", "--batch_size", "1000"]) == 1
    assert "too few for --batch_size 1000" in capfd.readouterr().out
    table = (tmp_path / "toy" / "table1.md").read_text(encoding="utf-8")
    assert "| STD-Former | 57.3 / 84.4 | not run |" in table


def test_a_stopped_row_goes_on(toy, tmp_path):
    flags = ["--table", "1", "--seeds", "0", "--data_root", toy, "--out_dir", str(tmp_path), "--",
             "--epochs", "30", "--warmup_epochs", "0", "--batch_size", "20", "--depth", "2",
             "--save_minutes", "0", "--eval_every", "30", "--workers", "0"]
    seed = tmp_path / "toy" / "std_former" / "seed0"
    process = start(flags)
    wait_until = time.monotonic() + 300
    while not (seed / "last.pt").is_file():
        assert process.poll() is None and time.monotonic() < wait_until
        time.sleep(0.05)
    process.terminate()
    assert "stopped; the same command goes on" in process.communicate(timeout=300)[0]
    assert process.returncode
    assert "stopped after step" in seed.with_suffix(".txt").read_text()
    assert not seed.with_suffix(".json").exists()

    process = start(flags)
    printed = process.communicate(timeout=600)[0]
    assert process.returncode == 0, printed
    assert "--resume" not in printed and seed.with_suffix(".json").is_file()
    rows = [json.loads(line) for line in (seed / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, 31))          # a row for each epoch of one step, none twice


def test_a_run_that_ended_before_it_saved_starts_anew(toy, tmp_path):
    flags = ["--epochs", "1", "--warmup_epochs", "0", "--batch_size", "20", "--depth", "2",
             "--workers", "0"]
    folder = tmp_path / "toy" / "std_former" / "seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    command = ["--table", "1", "--seeds", "0", "--data_root", toy, "--out_dir", str(tmp_path)]
    assert ablate.main([*command, "--", *flags]) == 0
    assert folder.with_suffix(".json").is_file()


# ----- Reports --------------------------------------------------------------

def test_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    table = ablate.make_tables("toy", 4)["difficulty"]
    runs = []
    for row in table.rows:
        results = [dict(top1=best - 50 * row.difficulty) for best in (90, 92)]
        runs.append([SimpleNamespace(result=lambda result=result: result) for result in results])
    runs[-1] = []                               # not run
    ablate.draw_difficulty(tmp_path / "a.png", table, runs)
    ablate.draw_table(tmp_path / "b.png", "title", table, runs)
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_mean_and_deviation():
    assert ablate.mean_as_text([90.0]) == "90.0"
    assert ablate.mean_as_text([90.0, 92.0, 94.0]) == "92.0 ± 2.0"
