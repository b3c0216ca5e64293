"""train.py: a run is what its flags say, on any number of processes, and a stop costs nothing.

Protects: recipes and flags; the steps of a plain loop; bit-exact resume after SIGKILL, SIGTERM or
--max_steps; checkpoints that are whole or not there; two processes that train as one; NaN that
stops all of them; the four files alone in a folder.

python -m pytest -q tests/test_train.py
"""
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import model
import train
from conftest import (PROCESSES, ROOT, free_port, on_two_ranks, save_frames, torchrun_variables,
                      write_v1)
from model import STDFormer, build_model, load_checkpoint

CLASSES = ["Pulling something from left to right", "Pulling something from right to left",
           "Showing something, then hiding it"]
SMALL = ("--dataset ssv1 --recipe toy --dim 32 --depth 2 --heads 2 --num_frames 4 --image_size 16 "
         "--epochs 2 --warmup_epochs 0.5 --batch_size 4 --workers 0 --device cpu "
         "--log_every 1").split()
EVERYTHING = ("--mixup 0.8 --cutmix 1.0 --randaugment 9 --random_erasing 0.5 --repeat_aug 2 "
              "--drop_path 0.2 --ctm_drop_path 0.4 --ctm_dropout 0.5 --head_dropout 0.5 "
              "--seed 5").split()                       # all that is random
TIMING = ("clips_per_s", "data_wait", "memory_gib")     # of a log row; they differ between runs
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

def write_clips(root, classes=CLASSES, train=18, validation=6):
    """A bright bar goes right, goes left, or blinks, over noise. In V1's layout."""
    rng = np.random.default_rng(0)
    number = 0
    splits = {"train": [], "validation": []}
    for split, n in ("train", train), ("validation", validation):
        for i in range(n):
            number += 1
            frames = rng.integers(0, 90, (6 + i % 3, 16, 20, 3))
            for t, frame in enumerate(frames):
                if i % 3 == 2:
                    frame[:] = 250 * (t % 2)
                else:
                    x = 2 * t if i % 3 == 0 else 16 - 2 * t
                    frame[:, x:x + 4] = 250
            save_frames(root / "20bn-something-something-v1" / str(number), frames)
            splits[split].append((str(number), classes[i % len(classes)]))
    write_v1(root, classes, **splits)
    return root

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """18 training clips are four steps of 4 an epoch. Two clips are left over."""
    return write_clips(tmp_path_factory.mktemp("train") / "clips")

def flags_for(clips, out, *flags):
    return [*SMALL, "--data_root", str(clips), "--out_dir", str(out), *flags]

def train_only(clips, out, *flags, Model=STDFormer):
    train.main(flags_for(clips, out, *flags), Model)

def run(clips, out, *flags, Model=STDFormer):
    """train.py in this process. Returns its last checkpoint and the rows of its log."""
    train_only(clips, out, *flags, Model=Model)
    return load_checkpoint(out / "last.pt"), read_log(out)

def read_log(out):
    """The rows, without what a clock measures."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]

def losses(rows):
    return [row["loss"] for row in rows if row["kind"] == "train"]

def same(a, b):
    """Equal to the last bit, through dicts and lists of tensors."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def assert_same_run(found, expected):
    """Two runs, as run returns them, ended with the same bits and the same log."""
    for part in ("model", "optimizer", "scaler", "step", "epoch", "step_in_epoch", "best"):
        assert same(found[0][part], expected[0][part]), part
    assert found[1] == expected[1]

def assert_close_weights(a, b, atol=1e-4):
    """Equal but for rounding. The bias of keys has no gradient but rounding, which Adam blows up"""
    assert a.keys() == b.keys()
    for name, value in a.items():
        other = b[name]
        if name.endswith("in_proj_bias"):
            value, other = value.clone(), other.clone()
            D = len(value) // 3
            value[D:2 * D] = other[D:2 * D]
        assert torch.allclose(value, other, atol=atol), name

class FrozenBNFormer(STDFormer):
    """BatchNorm that does not see the batch, so that the parts of a batch can be added up."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        return self

# ----- Recipes and flags ----------------------------------------------------

RECIPES = """
                    paper   uniformerv2  toy
model               b16     b16          tiny
clip                openai  openai       none
epochs              60      22           4
warmup_epochs       5       5            0.4
batch_size          16      128          16
lr                  1e-4    4e-5         1e-3
grad_clip           20      20           1
crop_scale          0.08    0.08         0.5
randaugment         21      21           0
randaugment_first   False   True         False
repeat_aug          2       2            1
random_erasing      0.25    0            0
flip                True    False        True
mixup               0.8     0            0
cutmix              1.0     0            0
label_smoothing     0.1     0            0.1
drop_path           0.2     0.2          None
ctm_drop_path       0.4     0.4          None
ctm_dropout         0.5     0.5          None
head_dropout        0.5     0.5          None
weight_decay        0.05    0.05         0.05
"""

def test_recipes():
    recipes, *lines = RECIPES.strip().splitlines()
    for column, recipe in enumerate(recipes.split()):
        args = train.get_args(["--dataset", "ssv1", "--recipe", recipe])
        for line in lines:
            name, *values = line.split()
            found = getattr(args, name)
            expected = values[column]
            assert str(found) == expected or float(found) == float(expected), (recipe, name)

@pytest.mark.parametrize("flags, expected", [
    ("", dict(dataset="toy", recipe="toy", data_root="datasets/toy", out_dir="out/toy")),
    ("--dataset ssv1", dict(recipe="paper", flip=True, epochs=60)),
    ("--dataset ssv2", dict(recipe="paper", flip=True, epochs=50, data_root="datasets/ssv2")),
    ("--dataset ssv2 --epochs 60", dict(epochs=60)),
    ("--dataset ssv2 --recipe uniformerv2", dict(epochs=22)),
    ("--dataset folder", dict(recipe="paper", flip=False)),     # we do not know these classes
    ("--dataset folder --flip --recipe toy", dict(recipe="toy", flip=True)),
    ("--dataset ssv1 --lr 3e-5 --clip none --drop_path 0 --no-flip --repeat_aug 1",
     dict(lr=3e-5, clip="none", drop_path=0, flip=False, repeat_aug=1, batch_size=16)),
    ("--dataset ssv1 --init_from a.pt", dict(clip="none", recipe="paper")),
])
def test_what_follows_from_flags_and_explicit_flags_win(flags, expected):
    args = vars(train.get_args(flags.split()))
    assert {name: args[name] for name in expected} == expected

def test_a_data_set_of_a_fork_is_not_mirrored(monkeypatch):
    monkeypatch.setitem(data.LAYOUTS, "kinetics", (data.read_folder, "", ""))
    assert not train.get_args(["--dataset", "kinetics"]).flip
    assert train.get_args(["--dataset", "kinetics", "--flip"]).flip

@pytest.mark.parametrize("flags", [
    "--learning_rate 1", "--batch_size 0", "--eval_every 0", "--log_every 0", "--repeat_aug 0",
    "--randaugment 31", "--init_from a.pt --clip openai", "--freeze_clip",      # of the toy
    "--warmup_epochs 4",
])
def test_flags_that_make_no_sense_are_refused_by_name(flags, capsys):
    with pytest.raises(SystemExit) as e:
        train.get_args(flags.split())
    assert e.value.code == 2 and flags.split()[0] in capsys.readouterr().err.splitlines()[-1]

def test_flags_describe_the_model():
    """What no flag says is the recipe's model, or that of the run to start from."""
    args = train.get_args("--depth 6 --ptm_layers 1 2 --stdm_layers --alpha 0.5 --no-learn_fusion "
                          "--smem_fusion add --head_dropout 0.3 --smem_grid 4".split())
    config = train.model_config(args, 7)
    assert config == model.ModelConfig(num_classes=7, dim=64, depth=6, heads=4, patch_size=8,
                                       image_size=32, ptm_layers=(1, 2), stdm_layers=(), alpha=0.5,
                                       learn_fusion=False, smem_fusion="add", head_dropout=0.3)
    base = dict(dim=24, heads=3, depth=2, smem_grid=5)
    config = train.model_config(train.get_args(["--depth", "3"]), 7, base)
    assert (config.dim, config.depth, config.smem_grid) == (24, 3, 5)

def test_data_flags_reach_both_splits(clips, tmp_path):
    (tmp_path / "skip.txt").write_text("3\n20\n")
    args = train.get_args(flags_for(
        clips, tmp_path, "--control", "single", "--seed", "4", "--crop_scale", "0.3", "--no-flip",
        "--randaugment", "9", "--randaugment_first", "--skip_list", str(tmp_path / "skip.txt")))
    training, validation = train.make_datasets(args, 24, 8)
    expected = data.TrainingDataset("ssv1", clips, "train", 8, 24, 0.3, 9, True, False, "single", 4)
    for i in range(2):                                  # the third is left out
        video, label, _ = training[1, i, 0]
        assert torch.equal(video, expected[1, i, 0][0]) and label == expected[1, i, 0][1]
    assert training.ids.tolist() == [i for i in expected.ids.tolist() if i != "3"]
    assert (len(training), len(validation), validation.skipped) == (17, 5, 1)
    assert (validation[0][0] == validation[0][0][:, :1]).all()
    args.flip = True
    training, _ = train.make_datasets(args, 24, 8)
    assert {training[epoch, 0, 0][1] for epoch in range(12)} == {0, 1}

def test_get_lr_at_its_corners():
    lr = [train.get_lr(step, total=100, warmup=10, peak=1.0, floor=0.1) for step in range(101)]
    assert [lr[0], lr[4], lr[9], lr[10]] == pytest.approx([0.1, 0.5, 1, 1])
    assert [lr[55], lr[100]] == pytest.approx([0.55, 0.1])      # half way down the cosine, its end
    assert train.get_lr(0, total=5, warmup=0, peak=2.0) == 2
    assert train.get_lr(5, total=5, warmup=5, peak=2.0) == 2

def test_param_groups_hold_each_trainable_parameter_once():
    net = build_model("tiny", dim=32, depth=3, heads=2, image_size=16, num_classes=3)
    net.blocks[0].ln_1.weight.requires_grad = False
    groups = train.param_groups(net, weight_decay=0.05, clip_lr_scale=0.1)
    found = {}
    for group in groups:
        for p in group["params"]:
            assert id(p) not in found
            found[id(p)] = (group["weight_decay"], group["lr_scale"])
    parameters = dict(net.named_parameters())
    assert set(found) == {id(p) for p in parameters.values() if p.requires_grad}
    for name, expected in {"conv1.weight": (0.05, 0.1), "blocks.1.attn.in_proj_weight": (0.05, 0.1),
                           "ln_post.bias": (0, 0.1), "blocks.2.alpha": (0, 1),
                           "blocks.2.dpe.reduce.weight": (0.05, 1), "head.bias": (0, 1),
                           "ctm.0.out_proj.weight": (0.05, 1)}.items():
        assert found[id(parameters[name])] == expected, name

def test_random_erasing_hits_one_rectangle_in_all_frames():
    video = torch.full((6, 3, 4, 24, 24), 7.0)
    assert (train.erase(video.clone(), 0.0) == 7).all()
    torch.manual_seed(0)
    erased = train.erase(video.clone(), 1.0)
    # Else the clips from MixUp and those from CutMix have other strides, and compile twice.
    assert erased.is_contiguous()
    hit = erased != 7
    assert (hit == hit[:, :1, :1]).all()                # in all channels and frames
    masks = hit[:, 0, 0]
    for clip, mask in zip(erased, masks):
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns) and 0 < mask.sum() < 24 * 24 / 2
        assert not torch.equal(clip[:, 0], clip[:, 1])  # the noise of each frame is its own
    assert len(torch.unique(masks, dim=0)) > 3          # each clip has its own
    noise = erased[hit]
    assert abs(noise.mean()) < 0.2 and 0.8 < noise.std() < 1.2
    hits = [(train.erase(video[:1].clone(), 0.25) != 7).any().item() for _ in range(200)]
    assert 0.12 < sum(hits) / 200 < 0.38

# ----- A run ----------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    """A run that nothing happened to, with all that is random: its checkpoint and its log."""
    return run(clips, tmp_path_factory.mktemp("train") / "finished", *EVERYTHING)

def test_a_run_writes_what_is_documented(clips, tmp_path, capsys):
    checkpoint, rows = run(clips, tmp_path / "out", "--lr", "1e-3")
    printed = capsys.readouterr().out
    assert f"flips swap these labels: '{CLASSES[0]}' and '{CLASSES[1]}'\n" in printed
    assert sorted(os.listdir("out")) == ["best.pt", "last.pt", "log.jsonl"]
    assert (checkpoint["epoch"], checkpoint["step"], checkpoint["step_in_epoch"]) == (2, 8, 0)
    assert checkpoint["classes"] == sorted(CLASSES) and checkpoint["clips"] == 18
    assert checkpoint["model_config"]["num_classes"] == 3 and checkpoint["args"]["lr"] == 1e-3
    assert tuple(checkpoint["mean"]) == data.CLIP_MEAN and tuple(checkpoint["std"]) == data.CLIP_STD
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 9)) and steps[4]["epoch"] == 1.25
    rates = [train.get_lr(step, 8, 2, 1e-3, 1e-6) for step in range(8)]
    assert [row["lr"] for row in steps] == pytest.approx(rates)
    tests = [row for row in rows if row["kind"] == "eval"]
    assert [(row["step"], row["epoch"], row["clips"], row["top5"]) for row in tests] == [
        (4, 1, 6, 100), (8, 2, 6, 100)]
    best = load_checkpoint(tmp_path / "out" / "best.pt")
    first_best = max(tests, key=lambda row: row["top1"])
    assert (best["best"], best["step"]) == (first_best["top1"], first_best["step"])
    assert checkpoint["best"] == tests[0]["top1"]       # last.pt is written before the validation
    evaluate.main(["--ckpt", "out/best.pt", "--crops", "1", "--workers", "0", "--device", "cpu"])
    assert f"top1 {best['best']:.2f} " in capsys.readouterr().out.splitlines()[-1]

def test_best_pt_stays_when_accuracy_falls(clips, tmp_path, monkeypatch):
    results = iter([50.0, 75.0, 60.0])

    def evaluated(*args):
        return dict(top1=next(results), top5=90.0, loss=1.0, clips=6, probabilities=None)

    monkeypatch.setattr(train, "evaluate", evaluated)
    last, rows = run(clips, tmp_path, "--epochs", "3")
    best = load_checkpoint(tmp_path / "best.pt")
    assert (best["step"], best["best"], last["best"]) == (8, 75, 75)
    assert [row["top1"] for row in rows if row["kind"] == "eval"] == [50, 75, 60]

def test_steps_are_those_of_a_plain_loop(clips, tmp_path):
    """Rates, groups, clipping, smoothing and decay, away from their defaults."""
    flags = ["--max_steps", "3", "--clip_lr_scale", "0.1", "--grad_clip", "0.05", "--seed", "3",
             "--label_smoothing", "0.3", "--weight_decay", "0.5", "--lr", "1e-3"]
    trained, rows = run(clips, tmp_path / "out", *flags)
    args = train.get_args(flags_for(clips, tmp_path, *flags))
    config = train.model_config(args, num_classes=3)
    dataset, _ = train.make_datasets(args, 16, 4)
    torch.manual_seed(3)
    net = STDFormer(config).train()
    groups = []
    for name, p in net.named_parameters():
        groups.append(dict(params=[p], weight_decay=0.5 if p.ndim > 1 else 0.0,
                           scale=0.1 if model.is_clip_parameter(name) else 1.0))
    optimizer = torch.optim.AdamW(groups)
    expected = []
    for step, batch in enumerate(data.step_batches(18, 4, 0, 3, seed=3)):
        video, label, _ = torch.utils.data.default_collate([dataset[item] for item in batch])
        loss = F.cross_entropy(net(data.normalize(video)), label, label_smoothing=0.3)
        loss.backward()
        expected.append(loss.item())
        assert torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05) > 0.1    # the limit matters
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * train.get_lr(step, 8, 2, 1e-3, 1e-6)
        optimizer.step()
        optimizer.zero_grad()
    assert losses(rows) == pytest.approx(expected, abs=1e-5)
    assert_close_weights(trained["model"], net.state_dict(), atol=1e-6)

def test_everything_random_changes_the_first_loss(clips, tmp_path):
    found = set()
    for i, flags in enumerate(("", "--mixup 0.8", "--cutmix 1", "--random_erasing 1",
                               "--head_dropout 0.5", "--repeat_aug 2", "--seed 1")):
        _, rows = run(clips, tmp_path / str(i), "--max_steps", "1", *flags.split())
        found.add(losses(rows)[0])
    assert len(found) == 7

def test_a_run_learns_its_only_batch(tmp_path):
    clips = write_clips(tmp_path / "clips", train=6, validation=2)
    flags = ("--batch_size 6 --epochs 30 --warmup_epochs 3 --lr 3e-3 --no-flip --crop_scale 1 "
             "--label_smoothing 0 --eval_every 30")
    _, rows = run(clips, tmp_path / "out", *flags.split())
    assert losses(rows)[0] > 0.9 and losses(rows)[-1] < 0.2, losses(rows)

def test_micro_batches_add_up_to_the_batch(clips, tmp_path):
    flags = ["--max_steps", "3", "--lr", "1e-4", "--repeat_aug", "2"]
    full, rows = run(clips, tmp_path / "full", *flags, Model=FrozenBNFormer)
    micro, micro_rows = run(clips, tmp_path / "micro", *flags, "--micro_batch", "2",
                            Model=FrozenBNFormer)
    assert losses(rows) == pytest.approx(losses(micro_rows), abs=1e-5)
    assert_close_weights(full["model"], micro["model"])

def test_the_flag_for_checkpointing_arrives(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "recompute", lambda *inputs, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(clips, tmp_path, "--checkpointing")

# ----- Stop and resume ------------------------------------------------------

def test_resume_in_mid_epoch_is_exact_to_the_last_bit(clips, finished, tmp_path):
    half, _ = run(clips, tmp_path, *EVERYTHING, "--max_steps", "3")
    assert (half["step"], half["epoch"], half["step_in_epoch"]) == (3, 0, 3)
    with open(tmp_path / "log.jsonl", "a") as f:        # as if it had been killed two steps later
        f.write('{"kind": "train", "step": 4, "loss": 9}\n{"kind": "train", "st')
    del half["args"]["sync_bn"]                         # a flag that was not there yet
    torch.save(half, tmp_path / "last.pt")
    assert_same_run(run(clips, tmp_path, *EVERYTHING, "--resume", "--workers", "2"), finished)

def test_resume_after_sigkill_is_exact_to_the_last_bit(clips, finished, tmp_path):
    flags = [*EVERYTHING, "--save_minutes", "0"]
    process = PROCESSES.Process(target=train_only, args=(clips, tmp_path, *flags, "--workers", "1"))
    process.start()
    until = time.time() + 120
    while time.time() < until and not (tmp_path / "last.pt").is_file():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert 1 <= load_checkpoint(tmp_path / "last.pt")["step"] < 8
    assert_same_run(run(clips, tmp_path, *flags, "--resume"), finished)

def test_a_run_that_died_in_a_validation_begins_with_it(clips, finished, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            run(clips, tmp_path, *EVERYTHING)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 4
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")       # as torchrun starts it again
    assert_same_run(run(clips, tmp_path, *EVERYTHING), finished)

def test_a_run_that_died_before_its_first_checkpoint_starts_anew(clips, tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    checkpoint, rows = run(clips, tmp_path, "--max_steps", "1")
    assert checkpoint["step"] == 1 and [row["step"] for row in rows] == [1]

def test_a_tiny_model_takes_one_thread_unless_it_is_told(clips, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    run(clips, tmp_path / "told", "--max_steps", "1")               # by OMP_NUM_THREADS
    assert calls == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    run(clips, tmp_path / "not", "--max_steps", "1")
    assert calls == [1]

def test_resume_without_the_log(clips, tmp_path):
    run(clips, tmp_path, "--max_steps", "4")            # best.pt will be written again
    (tmp_path / "log.jsonl").unlink()
    _, rows = run(clips, tmp_path, "--max_steps", "5", "--resume")
    assert [row["step"] for row in rows] == [4, 5]

def test_a_checkpoint_that_is_half_written_leaves_the_old_one(clips, tmp_path, monkeypatch):
    run(clips, tmp_path, "--max_steps", "2")

    def half(checkpoint, file):
        Path(file).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        run(clips, tmp_path, "--max_steps", "3", "--resume")
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2

FORKSERVER = """
import multiprocessing, sys
multiprocessing.set_start_method("forkserver")          # Python 3.14's default
sys.path.insert(0, sys.argv.pop(1))
import evaluate, train
evaluate.run_command(train.main)
"""

@pytest.mark.skipif(sys.platform == "win32", reason="needs process groups")
def test_sigterm_to_the_process_group_saves_whatever_starts_the_workers(clips, tmp_path):
    """torchrun and Slurm signal the data workers along with the process that trains."""
    flags = flags_for(clips, tmp_path, "--epochs", "5000", "--eval_every", "5000", "--workers", "2")
    process = subprocess.Popen([sys.executable, "-c", FORKSERVER, ROOT, *flags], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    try:
        lines = [process.stdout.readline() for _ in range(9)]   # it prints line by line
        os.killpg(process.pid, signal.SIGTERM)
        printed, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, "".join(lines) + printed
    step = load_checkpoint(tmp_path / "last.pt")["step"]
    assert f"stopped after step {step} of" in printed and read_log(tmp_path)[-1]["step"] == step

def at_step(number, action):
    """Let a training step, counted from 0, see action(video) instead of its video."""
    plain = data.normalize
    calls = []

    def normalize(video, *statistics):
        calls.append(1)
        video = plain(video, *statistics)
        return action(video) if len(calls) == number + 1 else video

    data.normalize = normalize

def signal_to_rank_1(clips, out, *flags):
    """Returns the seed that is left after the last step."""
    if os.environ["RANK"] == "1":
        at_step(1, lambda video: os.kill(os.getpid(), signal.SIGTERM) or video)
    train_only(clips, out, *flags)
    return torch.initial_seed()

def test_sigterm_to_one_of_two_ranks_stops_both_and_resume_is_exact(clips, tmp_path):
    flags = [*EVERYTHING, "--epochs", "1"]
    on_two_ranks(train_only, clips, tmp_path / "whole", *flags)
    seeds = on_two_ranks(signal_to_rank_1, clips, tmp_path / "out", *flags)
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 2
    assert isinstance(seeds[0], int) and seeds[0] != seeds[1]   # else their dropout would be alike
    on_two_ranks(train_only, clips, tmp_path / "out", *flags, "--resume")
    runs = [(load_checkpoint(tmp_path / name / "last.pt"), read_log(tmp_path / name))
            for name in ("out", "whole")]
    assert_same_run(*runs)

# ----- Numbers that are not finite ------------------------------------------

def nan_on_rank_1(clips, out, *flags):
    if os.environ["RANK"] == "1":
        at_step(5, lambda video: video * math.nan)
    train_only(clips, out, *flags)

def test_nan_on_one_rank_stops_both_and_last_pt_stays_finite(clips, tmp_path):
    errors = on_two_ranks(nan_on_rank_1, clips, tmp_path, "--save_minutes", "0", "--log_every", "3")
    for e in errors:
        assert isinstance(e, FloatingPointError) and "step 6" in str(e) and "--lr" in str(e)
    last = load_checkpoint(tmp_path / "last.pt")
    assert last["step"] == 4 and all(v.isfinite().all() for v in last["model"].values())

def test_a_gradient_that_is_not_finite_stops_the_run_too(clips, tmp_path, monkeypatch):
    clip_grad_norm = torch.nn.utils.clip_grad_norm_
    calls = []

    def overflows_once(parameters, limit):
        calls.append(limit)
        norm = clip_grad_norm(parameters, limit)
        return norm * math.inf if len(calls) == 6 else norm     # the loss of this step is finite

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflows_once)
    with pytest.raises(FloatingPointError, match="gradient norm inf at step 6"):
        run(clips, tmp_path, "--save_minutes", "0")
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 5

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision(clips, tmp_path, precision, device):
    flags = ["--device", device, "--epochs", "1"]
    _, exact = run(clips, tmp_path / "fp32", *flags, "--precision", "fp32", "--max_steps", "1")
    assert torch.get_float32_matmul_precision() == "highest"
    flags += ["--precision", precision]
    mixed, rows = run(clips, tmp_path / "mixed", *flags)
    assert torch.get_float32_matmul_precision() == "high"       # TF32; fp32 does without
    assert losses(rows)[0] == pytest.approx(losses(exact)[0], abs=0.05)
    assert losses(rows)[0] != losses(exact)[0]          # it is not float32 under another name
    assert all(v.dtype not in (torch.float16, torch.bfloat16) for v in mixed["model"].values())
    norms = [row["grad_norm"] for row in rows if row["kind"] == "train" and not row["skipped"]]
    assert norms and max(norms) < 1000                  # taken after unscaling
    assert (mixed["scaler"] == {}) == (precision == "bf16")
    if device == "cpu":
        run(clips, tmp_path / "out", *flags, "--max_steps", "2")
        resumed = run(clips, tmp_path / "out", *flags, "--resume")
        assert_same_run(resumed, (mixed, rows))

@pytest.mark.parametrize("exponent", (20, 90))
def test_fp16_skips_steps_that_overflow_but_not_for_ever(clips, tmp_path, monkeypatch, exponent):
    """The scaler's first scale is too large. It is halved in each step that overflows."""
    Scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0 ** exponent)
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    flags = ["--precision", "fp16", "--epochs", "5", "--eval_every", "9", "--log_every", "3"]
    if exponent == 90:                                  # it gives up after 20 such steps
        with pytest.raises(FloatingPointError, match="gradient norm .* at step 20"):
            run(clips, tmp_path, *flags)
        return
    last, rows = run(clips, tmp_path, *flags)
    skipped = sum(row["skipped"] for row in rows if row["kind"] == "train")
    assert 0 < skipped < 20 and last["scaler"]["scale"] == 2.0 ** (exponent - skipped)
    assert last["optimizer"]["state"][0]["step"] == last["step"] - skipped

# ----- Refusals -------------------------------------------------------------

def test_resume_refuses_another_run(clips, finished, tmp_path):
    for flags, changes, words in [
        (["--dim", "40"], {}, "dim was 32 and is 40"),
        (["--batch_size", "2"], {}, "batch_size was 4 and is 2"),
        (["--no-flip"], {}, "flip was True and is False"),
        ([], dict(clips=12), "clips was 12 and is 18"),
        ([], dict(classes=["A", "B"]), "classes was .* and is "),
    ]:
        torch.save({**finished[0], **changes}, tmp_path / "last.pt")
        with pytest.raises(ValueError, match=words):
            run(clips, tmp_path, *EVERYTHING, "--resume", *flags)

def test_resume_takes_another_micro_batch(clips, tmp_path):
    """The cure for a run that has met "out of memory"."""
    run(clips, tmp_path, "--max_steps", "1")
    _, rows = run(clips, tmp_path, "--max_steps", "2", "--resume", "--micro_batch", "2")
    assert [row["step"] for row in rows] == [1, 2]

def test_mixing_needs_two_clips_per_process(clips, tmp_path, capsys):
    for batch_size, printed in ((1, True), (2, False)):
        run(clips, tmp_path / str(batch_size), "--batch_size", str(batch_size), "--repeat_aug", "2",
            "--mixup", "0.8", "--max_steps", "1")
        assert ("MixUp and CutMix do nothing" in capsys.readouterr().out) == printed

def test_folders_and_batches_that_do_not_fit_are_refused(clips, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "best.pt").touch()
    with pytest.raises(ValueError, match="old holds a run: add --resume"):
        run(clips, tmp_path / "old")
    with pytest.raises(FileNotFoundError, match="last.pt"):
        run(clips, tmp_path / "new", "--resume")
    with pytest.raises(ValueError, match="18 training clips .* --batch_size 19"):
        run(clips, tmp_path / "a", "--batch_size", "19")
    with pytest.raises(ValueError, match="--micro_batch is 3, expected a divisor of 4"):
        run(clips, tmp_path / "b", "--micro_batch", "3")
    with pytest.raises(ValueError, match="does not hold toy data.*--dataset folder"):
        run(clips / "20bn-something-something-v1", tmp_path / "c", "--dataset", "toy")
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))          # without scripts/
    with pytest.raises(FileNotFoundError, match="no toy data.*--dataset folder"):
        run(tmp_path / "none", tmp_path / "d", "--dataset", "toy")

# ----- Weights to start from ------------------------------------------------

STILL = "--lr 0 --min_lr 0 --max_steps 1".split()       # a step that moves no weight

def test_init_from_takes_the_model_and_renews_the_head_for_other_classes(clips, finished, tmp_path):
    torch.save(finished[0], tmp_path / "a.pt")
    source = finished[0]["model"]
    bare = [*SMALL[:4], "--batch_size", "4", "--workers", "0", "--device", "cpu", "--init_from",
            str(tmp_path / "a.pt"), *STILL]
    for classes in (["B", "A"], ["C", "B", "A"], CLASSES):
        root = write_clips(tmp_path / classes[0], classes=classes)
        train.main([*bare, "--data_root", str(root), "--out_dir", f"out{classes[0]}"],
                   FrozenBNFormer)                      # no flag about the model
        found = load_checkpoint(tmp_path / f"out{classes[0]}" / "last.pt")["model"]
        for name, value in found.items():
            if name.startswith("head.") and classes != CLASSES:
                assert len(value) == len(classes) and not same(value, source[name])
            else:
                assert torch.equal(value, source[name]), name
    with pytest.raises(ValueError, match="--init_from .*a.pt does not fit"):
        run(clips, tmp_path / "wider", "--init_from", str(tmp_path / "a.pt"), "--dim", "40")

def test_init_from_at_another_size_resizes_positions_and_keeps_smem(clips, finished, tmp_path):
    torch.save(finished[0], tmp_path / "a.pt")
    larger, _ = run(clips, tmp_path / "out", "--init_from", str(tmp_path / "a.pt"), "--image_size",
                    "32", *STILL)
    assert larger["model"]["positional_embedding"].shape == (1 + 4 * 4, 32)
    assert (larger["model_config"]["image_size"], larger["model_config"]["smem_grid"]) == (32, 2)
    name = "smem_t.0.conv_out.weight"
    assert torch.equal(larger["model"][name], finished[0]["model"][name])

def clip_file(path):
    """CLIP's image tower of the test's size, with random weights."""
    net = build_model("tiny", dim=32, depth=2, heads=2, image_size=16, ptm_layers=(), num_classes=3)
    state = {"visual.proj": torch.zeros(32, 16)}
    for name, value in net.state_dict().items():
        if model.is_clip_parameter(name):
            value = value[:, :, 1] if name == "conv1.weight" else value
            state["visual." + name.replace("blocks.", "transformer.resblocks.")] = value + 0.01
    torch.save(state, path)
    return state

def test_clip_weights_are_loaded_and_can_be_frozen(clips, tmp_path, capsys):
    state = clip_file(tmp_path / "clip.pt")
    flags = ["--clip", str(tmp_path / "clip.pt"), "--max_steps", "2", "--lr", "1e-2"]
    frozen, _ = run(clips, tmp_path / "frozen", *flags, "--freeze_clip")
    assert f"CLIP weights: {len(state) - 1} tensors loaded" in capsys.readouterr().out
    free, _ = run(clips, tmp_path / "free", *flags)
    for name, value in state.items():
        name = name.removeprefix("visual.").replace("transformer.resblocks.", "blocks.")
        if name == "proj":                              # our head takes its place
            continue
        found = [checkpoint["model"][name] for checkpoint in (frozen, free)]
        if name == "conv1.weight":                      # the stem learns in both
            assert not torch.equal(found[0][:, :, 1], value)
        else:
            assert torch.equal(found[0], value) and not torch.equal(found[1], value), name
    assert not torch.equal(frozen["model"]["head.weight"], free["model"]["head.weight"])

# ----- Several processes, own data, the files alone -------------------------

def test_two_processes_train_as_one(clips, tmp_path):
    clip_file(tmp_path / "clip.pt")
    flags = ["--clip", str(tmp_path / "clip.pt"), "--lr", "1e-4", "--repeat_aug", "2"]
    one, one_rows = run(clips, tmp_path / "one", *flags, Model=FrozenBNFormer)
    on_two_ranks(functools.partial(train_only, Model=FrozenBNFormer), clips, tmp_path / "two",
                 *flags, "--micro_batch", "1")
    two, two_rows = load_checkpoint(tmp_path / "two" / "last.pt"), read_log(tmp_path / "two")
    assert losses(two_rows) == pytest.approx(losses(one_rows), abs=1e-5)
    assert_close_weights(one["model"], two["model"])
    accuracy = [[(row["top1"], row["top5"], row["clips"]) for row in rows if row["kind"] == "eval"]
                for rows in (one_rows, two_rows)]
    assert accuracy[0] == accuracy[1] and len(accuracy[0]) == 2

def test_crops_of_a_tracked_face_train(tmp_path):
    """Own data whose frames differ in size, even within a clip."""
    rng = np.random.default_rng(0)
    for split, n in ("train", 4), ("validation", 2):
        for i in range(2 * n):
            name = ("smile", "frown")[i % 2]
            frames = [rng.integers(0, 255, (20 + rng.integers(9), 24, 3)) for _ in range(5)]
            save_frames(tmp_path / "own" / split / name / str(i), frames, kind="jpg")
    last, rows = run(tmp_path / "own", tmp_path / "out", "--dataset", "folder", "--epochs", "1")
    assert last["classes"] == ["frown", "smile"] and rows[-1]["clips"] == 4

ALONE = """
import multiprocessing, os, sys
import evaluate, train

def train_as_rank(rank, flags):
    os.environ.update(RANK=rank, LOCAL_RANK=rank)
    train.main(flags)

if __name__ == "__main__":
    flags = sys.argv[1:]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ranks = [context.Process(target=train_as_rank, args=(rank, [*flags, "--max_steps", "3"]))
             for rank in "01"]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    del os.environ["RANK"]
    train.main([*flags, "--resume"])
    common = ["--ckpt", "out/last.pt", "--workers", "0", "--device", "cpu"]
    evaluate.main(common)
    evaluate.main([*common, "--video", "clips/20bn-something-something-v1/19"])
    print([name for name in sys.modules if name.split(".")[0] in ("scripts", "tests")])
"""

def test_the_four_files_work_alone(clips, tmp_path):
    """Training on two processes, resume, evaluation and one clip, in an otherwise empty folder."""
    for name in ("model.py", "data.py", "train.py", "evaluate.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(clips, tmp_path / "clips")
    (tmp_path / "alone.py").write_text(ALONE)
    environment = dict(os.environ, **torchrun_variables(0, free_port()))
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, "alone.py", *flags_for("clips", "out")], text=True,
                          env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "stopped after step 3 of 8" in done.stdout and "done: best top1" in done.stdout
    assert "clips 6 views 4x3x1\nclips/20bn-something-something-v1/19\n" in done.stdout
    assert done.stdout.endswith("\n[]\n")              # nothing of scripts/ was imported

@cuda
def test_compiled_steps_equal_eager_ones(clips, tmp_path):
    flags = ["--device", "cuda", "--precision", "fp32", "--max_steps", "3"]
    eager, eager_rows = run(clips, tmp_path / "eager", *flags)
    compiled, rows = run(clips, tmp_path / "compiled", *flags, "--compile")
    assert losses(rows) == pytest.approx(losses(eager_rows), abs=2e-3)
    assert compiled["model"].keys() == eager["model"].keys()    # no _orig_mod. before the names

@cuda
def test_sync_batchnorm_on_two_ranks_is_batchnorm_on_one(clips, tmp_path):
    flags = ["--device", "cuda", "--precision", "fp32", "--max_steps", "3"]
    _, rows = run(clips, tmp_path / "one", *flags)
    on_two_ranks(train_only, clips, tmp_path / "two", *flags, "--sync_bn")
    assert losses(read_log(tmp_path / "two")) == pytest.approx(losses(rows), abs=2e-3)
