"""Nothing lost, nothing silent: a fast sample of scripts/faults.py, which breaks runs in more ways and more often.

    python -m pytest -q tests/test_faults.py
"""
import multiprocessing
import os
import signal
import sys
import time

import pytest
import torch

import evaluate
import train
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs of this file lie, with the toy data and the undisturbed run that the others are compared with."""
    return tmp_path_factory.mktemp("faults")


def check(rows):
    for fault, tried, outcome, bad in rows:
        assert tried and not bad, f"{fault}: {outcome}"


# ----- killed and stopped -----


def test_a_killed_run_goes_on_to_the_last_bit(folder):
    check(faults.kill_and_resume(folder, kills=2))      # in the writing of a checkpoint, and anywhere


def test_sigterm_to_one_of_two_ranks_stops_both_at_one_step(folder):
    ranks = faults.start_two_ranks(faults.command(folder, folder / "stopped"))
    faults.wait_for(faults.changes(folder / "stopped" / "last.pt"), ranks[0])
    ranks[1].terminate()
    code, printed = faults.finish(*ranks, seconds=60)
    step = evaluate.load_checkpoint(folder / "stopped" / "last.pt")["step"]
    assert [p.returncode for p in ranks] == [0, 0] and 0 < step < 48 and f"stopped after step {step} of 48" in printed


def stop_in(monkeypatch, which):
    """The run asks itself to stop in the which-th batch of its validations (from 0)."""
    plain, calls = evaluate.predict, []

    def predict(*args):
        calls.append(1)
        if len(calls) == which + 1:
            os.kill(os.getpid(), faults.signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(evaluate, "predict", predict)


def run_here(folder, out, *flags):
    """train.py in this process."""
    train.main(faults.command(folder, out, "--workers", "0", *flags)[1:])
    return evaluate.load_checkpoint(out / "last.pt")


def test_a_validation_that_was_left_is_made_up_for(folder, tmp_path, monkeypatch, capsys):
    flags = ("--epochs", "2")
    run_here(folder, tmp_path / "expected", *flags)
    with monkeypatch.context() as patch:
        stop_in(patch, 1)                               # the first of two batches is done
        stopped = run_here(folder, tmp_path / "out", *flags)
    assert (stopped["step"], stopped["validated"], stopped["best"]) == (8, 0, -1.0) and "stopped after step 8 of 16" in capsys.readouterr().out
    with monkeypatch.context() as patch:                # the last one: no step is left, but the run is not done
        stop_in(patch, 3)
        stopped = run_here(folder, tmp_path / "out", *flags, "--resume")
    assert (stopped["step"], stopped["validated"]) == (16, 8) and "stopped after step 16 of 16" in capsys.readouterr().out
    run_here(folder, tmp_path / "out", *flags, "--resume")
    assert faults.differences(tmp_path / "out", tmp_path / "expected") == [] and "done: best top1" in capsys.readouterr().out


def test_stops_between_log_rows_leave_no_trace(folder, tmp_path):
    run_here(folder, tmp_path / "expected", "--epochs", "1")
    for step in ("1", "2", "4", "8"):                   # rows are due at 3, 6 and 8
        run_here(folder, tmp_path / "out", "--epochs", "1", "--max_steps", step, *(["--resume"] if step != "1" else []))
    assert [r["step"] for r in faults.rows_of_log(tmp_path / "out")] == [3, 6, 8, 8]
    assert faults.differences(tmp_path / "out", tmp_path / "expected") == []


def test_resume_where_nothing_or_only_best_was_saved(folder, tmp_path, capsys):
    out, flags = tmp_path / "out", ("--epochs", "2", "--max_steps", "9")
    expected = run_here(folder, tmp_path / "expected", *flags)
    run_here(folder, out, "--epochs", "2", "--max_steps", "8")
    (out / "last.pt").unlink()                          # killed between best.pt and the first last.pt
    run_here(folder, out, *flags, "--resume")
    assert "resumed at step 8" in capsys.readouterr().out and faults.differences(out, tmp_path / "expected") == []
    (out / "last.pt").unlink(), (out / "best.pt").unlink()              # killed before it had saved anything
    (out / "last.pt.tmp").write_bytes(b"half of it")
    assert faults.same(run_here(folder, out, *flags, "--resume")["model"], expected["model"])
    assert "has no checkpoint yet, so the run begins at step 0" in capsys.readouterr().out and faults.differences(out, tmp_path / "expected") == []


# ----- the disk -----


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(folder):
    check(faults.file_size_limit(folder))


def test_a_deleted_folder_is_one_clear_line(folder):
    check(faults.deleted_folder(folder))


def test_a_failed_write_names_the_file_and_frees_the_disk(tmp_path, monkeypatch):
    def half(obj, file):
        file.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match=r"last\.pt: could not be written \(No space left on device; [\d.]+ GiB free there\).*--resume"):
        train.save_checkpoint(tmp_path / "last.pt", {})
    assert list(tmp_path.iterdir()) == []


def test_the_accuracy_is_printed_where_a_report_cannot_be_written(folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file.*could not be written"):
        evaluate.main(["--ckpt", str(faults.undisturbed(folder) / "best.pt"), "--device", "cpu", "--workers", "0", "--save", str(tmp_path / "file" / "a.csv")])
    assert capsys.readouterr().out.splitlines()[-1].startswith("top1 ")


# ----- files that are none of ours -----


def test_foreign_files_are_refused_and_never_executed(folder):
    check(faults.foreign_checkpoints(folder))


def test_damaged_checkpoints_are_refused_or_read_right(folder):
    check(faults.damaged_checkpoints(folder, cuts=10, flips=40))


def test_a_bomb_explodes_where_nobody_looks(tmp_path):
    # Else the test above could not fail.
    files = faults.foreign_files(tmp_path / "foreign", {"model": {}})
    torch.load(files["checkpoint with code"], weights_only=False)["model"].close()
    assert (tmp_path / "foreign" / "exploded").exists()


# ----- data workers -----


def test_a_worker_that_begins_after_its_trainer_was_killed_ends():
    fork = multiprocessing.get_context("fork")
    until, lives = os.pipe()

    def trainer():
        pid = os.getpid()

        def worker():
            while os.getppid() == pid:
                time.sleep(0.01)
            evaluate.setup_worker(0)
            os.write(lives, b"the worker lives on")

        fork.Process(target=worker).start()
        os.kill(pid, signal.SIGKILL)

    fork.Process(target=trainer).start()
    os.close(lives)
    with open(until, "rb") as f:
        assert f.read() == b""                          # ends when the last process that could write has ended


# ----- numbers -----


def test_nan_on_one_of_two_ranks_stops_both(folder):
    check(faults.not_finite(folder))


def test_a_run_repeats_bit_for_bit(folder, tmp_path):
    run_here(folder, tmp_path / "out")                  # here without, there with a data worker
    assert faults.differences(tmp_path / "out", faults.undisturbed(folder)) == []


def test_steps_that_the_scaler_skips_are_counted(folder, tmp_path, monkeypatch):
    plain = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **options: plain(*args, init_scale=2.0 ** 19, **options))       # overflows at first
    flags = ("--precision", "fp16", "--max_steps")
    whole = run_here(folder, tmp_path / "whole", *flags, "6")
    run_here(folder, tmp_path / "out", *flags, "2")     # a stop before the first row loses no count
    resumed = run_here(folder, tmp_path / "out", *flags, "6", "--resume")
    rows = faults.rows_of_log(tmp_path / "whole")
    skipped = sum(r["skipped"] for r in rows)
    assert [r["step"] for r in rows] == [3, 6] and 2 <= skipped < 6
    assert whole["scaler"]["scale"] == 2.0 ** 19 / 2 ** skipped         # halved by each step that overflows
    assert faults.rows_of_log(tmp_path / "out") == rows and all(faults.same(whole[k], resumed[k]) for k in ("model", "optimizer", "scaler", "window"))
    assert all("skipped" not in r for r in faults.rows_of_log(faults.undisturbed(folder)))


# ----- flags -----


@pytest.mark.parametrize("program, flags, words", faults.BAD_FLAGS, ids=[f"{program} {flags}" for program, flags, _ in faults.BAD_FLAGS])
def test_flags_that_cannot_work_are_refused_before_any_file_is_made(tmp_path, program, flags, words):
    assert faults.refuse_flags(tmp_path, program, flags, words) == ""


def test_batches_must_be_divisible_by_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert faults.refuse_flags(tmp_path, "train", "--batch_size 16", "--batch_size 16: expected a multiple of the 3 processes") == ""
    assert faults.refuse_flags(tmp_path, "evaluate", "--ckpt {here}/file --video a.webm", "without torchrun") == ""


def test_the_recipes_pass_their_own_check(tmp_path):
    for dataset in ("ssv1", "ssv2", "toy"):
        train.check_args(train.get_args(["--dataset", dataset, "--data_root", str(tmp_path)]))
