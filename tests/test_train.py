"""train.py: schedule, sampler, flags, checkpoints, exact resume, stopping, several processes.

python -m pytest -q tests/test_train.py
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import model
import train
from conftest import ROOT, SMALL_MODEL, run_two_ranks
from model import build_model, load_checkpoint
from scripts import guards
from scripts.variants import VARIANTS, FrozenBNFormer

CLASSES = [
    "Pulling something from left to right",
    "Pulling something from right to left",
    "Showing something, then hiding it",
]
TIMING = ("clips_per_s", "data_wait", "memory_gib")  # of a log row; they differ between runs
DOCUMENTED = {
    "model",
    "optimizer",
    "scaler",
    "epoch",
    "step",
    "step_in_epoch",
    "best",
    "model_config",
    "classes",
    "clips",
    "log_bytes",
    "mean",
    "std",
    "args",
}
SMALL = (
    "--dataset ssv1 --clip none --model tiny --dim 32 --depth 2 --heads 2 --num_frames 4 "
    "--image_size 16 --patch_size 8 --epochs 2 --warmup_epochs 0.5 --batch_size 4 --lr 1e-3 "
    "--randaugment 0 --mixup 0 --cutmix 0 --crop_scale 0.5 --workers 0 --device cpu --log_every 1"
).split()
# no dropout of any kind
PLAIN = "--drop_path 0 --ctm_drop_path 0 --ctm_dropout 0 --head_dropout 0".split()
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def write_clips(root, classes=CLASSES, train=18, validation=6):
    """A data set in Something-Something V1's layout: a bright bar goes right, left, or blinks, over
    noise.
    """
    rng, number = np.random.default_rng(0), 0
    root.mkdir()
    (root / "something-something-v1-labels.csv").write_text("".join(c + "\n" for c in classes))
    for split, n in (("train", train), ("validation", validation)):
        lines = []
        for i in range(n):
            number, kind, frames = number + 1, i % 3, 6 + i % 3
            folder = root / "20bn-something-something-v1" / str(number)
            folder.mkdir(parents=True)
            for t in range(frames):
                picture = rng.integers(0, 90, (16, 20, 3), dtype=np.uint8)
                if kind < 2:
                    x = 2 * t if kind == 0 else 16 - 2 * t
                    picture[:, x : x + 4] = 250
                elif t % 2:
                    picture[:] = 250
                Image.fromarray(picture).save(folder / f"{t + 1:05d}.png")
            lines.append(f"{number};{classes[i % len(classes)]}\n")
        (root / f"something-something-v1-{split}.csv").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """18 training clips, so four steps of 4 an epoch (two clips are left over), and 6 for
    validation.
    """
    return write_clips(tmp_path_factory.mktemp("train") / "clips")


@pytest.fixture
def bn_frozen(monkeypatch):
    """train.py's model keeps the running statistics of BatchNorm."""
    monkeypatch.setattr(train, "STDFormer", FrozenBNFormer)


def train_here(clips, out, *flags):
    """train.py in this process, which gets its signal handlers back."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        train.main([*SMALL, "--data_root", str(clips), "--out_dir", str(out), *flags])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(clips, out, *flags):
    """The same; returns its last checkpoint and the rows of its log."""
    train_here(clips, out, *flags)
    return load_checkpoint(out / "last.pt"), read_log(out)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


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


def assert_close_weights(a, b, atol=1e-4):
    """Two runs that differ in the order of their sums only. A bias of keys has no gradient but
    rounding, which AdamW scales up.
    """
    for name, value in a["model"].items():
        other = b["model"][name]
        if name.endswith("in_proj_bias"):
            (query, _, v), (query2, _, v2) = value.chunk(3), other.chunk(3)
            value, other = torch.cat([query, v]), torch.cat([query2, v2])
        assert torch.allclose(value, other, atol=atol), name


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def on_two_ranks(clips, out, *flags, variant=None):
    program = ["scripts/variants.py", variant, "train"] if variant else ["train.py"]
    run_two_ranks(*program, *SMALL, "--data_root", clips, "--out_dir", out, *flags)
    return load_checkpoint(out / "last.pt"), read_log(out)


# ----- pure helpers -----


def test_get_lr_at_its_corners():
    lr = [train.get_lr(step, total=100, warmup=10, peak=1.0, floor=0.1) for step in range(101)]
    assert (
        lr[0] == pytest.approx(0.1)
        and lr[4] == pytest.approx(0.5)
        and lr[9] == 1.0
        and lr[10] == 1.0
    )
    assert lr[55] == pytest.approx(0.55)  # half way down the cosine
    assert lr[100] == pytest.approx(0.1) and lr[99] > 0.1
    assert all(a > b for a, b in zip(lr[10:], lr[11:]))
    assert train.get_lr(0, total=5, warmup=0, peak=2.0) == 2.0  # no warm-up
    assert train.get_lr(4, total=5, warmup=5, peak=2.0) == 2.0 and math.isfinite(
        train.get_lr(5, total=5, warmup=5, peak=2.0)
    )


def test_param_groups_hold_each_trainable_parameter_once():
    net = build_model("tiny", dim=32, depth=3, heads=2, image_size=16, num_classes=3)
    net.blocks[0].ln_1.weight.requires_grad = False
    groups = train.param_groups(net, weight_decay=0.05, clip_lr_scale=0.1)
    listed = [id(p) for g in groups for p in g["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {
        id(p) for p in net.parameters() if p.requires_grad
    }
    for g in groups:
        assert all(
            (p.ndim > 1) == (g["weight_decay"] == 0.05) and p.ndim > 0 or g["weight_decay"] == 0
            for p in g["params"]
        )
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    names = dict(net.named_parameters())
    for name, expected in {
        "conv1.weight": 0.1,
        "positional_embedding": 0.1,
        "blocks.1.attn.in_proj_weight": 0.1,
        "ln_post.bias": 0.1,
        "blocks.2.alpha": 1.0,
        "ctm.0.out_proj.weight": 1.0,
        "head.weight": 1.0,
    }.items():
        assert scale[id(names[name])] == expected, name


def test_sampler_deals_each_clip_at_most_once_per_epoch():
    steps = list(train.step_batches(18, 4, 0, 12, seed=0, rank=0, world=1))
    assert len(steps) == 12
    orders = []
    for epoch in range(3):
        items = sum(steps[4 * epoch : 4 * epoch + 4], [])
        assert {e for e, _ in items} == {epoch}
        orders.append([i for _, i in items])
        assert len(set(orders[-1])) == 16 and set(orders[-1]) <= set(range(18))
    assert orders[0] != orders[1] != orders[2]
    assert steps != list(train.step_batches(18, 4, 0, 12, seed=1, rank=0, world=1))


def test_sampler_on_two_ranks_and_from_the_middle():
    whole = list(train.step_batches(18, 4, 0, 12, seed=0, rank=0, world=1))
    ranks = [list(train.step_batches(18, 4, 0, 12, seed=0, rank=r, world=2)) for r in range(2)]
    for batch, a, b in zip(whole, *ranks, strict=True):
        assert len(a) == len(b) == 2 and sorted(a + b) == sorted(batch)
    assert list(train.step_batches(18, 4, 5, 12, seed=0, rank=0, world=1)) == whole[5:]


def test_recipes_are_real_flags_and_explicit_flags_win(capsys):
    for flags, recipe in (
        ("--dataset ssv1", "paper"),
        ("--dataset ssv2", "paper"),
        ("", "toy"),
        ("--dataset ssv2 --recipe toy", "toy"),
        ("--dataset folder", "toy"),
        ("--dataset folder --clip openai", "paper"),
        ("--dataset folder --init_from a.pt", "paper"),
    ):
        flags = flags.split()
        args = train.get_args(flags)
        given = {word[2:] for word in flags if word.startswith("--")}
        assert (
            all(getattr(args, k) == v for k, v in train.RECIPES[recipe].items() if k not in given)
            and args.recipe == recipe
        )
        assert (
            args.data_root == f"datasets/{args.dataset}" and args.out_dir == f"out/{args.dataset}"
        )
    args = train.get_args(
        [
            "--dataset",
            "ssv2",
            "--lr",
            "3e-5",
            "--clip",
            "none",
            "--epochs",
            "7",
            "--data_root",
            "elsewhere",
            "--drop_path",
            "0",
        ]
    )
    assert (args.lr, args.clip, args.epochs, args.data_root, args.drop_path) == (
        3e-5,
        "none",
        7,
        "elsewhere",
        0.0,
    )
    assert args.batch_size == 16 and train.get_args([]).dataset == "toy"
    with pytest.raises(SystemExit) as e:
        train.get_args(["--learning_rate", "1"])
    assert e.value.code == 2 and "--learning_rate" in capsys.readouterr().err
    flags = vars(train.get_args([]))
    assert all(set(recipe) <= set(flags) for recipe in train.RECIPES.values()) and set(
        guards.FREE
    ) <= set(flags)


def test_a_checkpoint_that_is_half_written_leaves_the_old_one(clips, tmp_path, monkeypatch):
    run(clips, tmp_path / "out", "--max_steps", "2")

    def half(checkpoint, file):
        Path(file).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        train_here(clips, tmp_path / "out", "--max_steps", "3", "--resume")
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 2


# ----- a run -----


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    """One short run with everything random switched on: (folder, its last checkpoint, its log)."""
    out = tmp_path_factory.mktemp("train") / "finished"
    return (out, *run(clips, out, *EVERYTHING))


# The recipe's dropouts come with --dataset ssv1; the rest that is random:
EVERYTHING = "--mixup 0.8 --cutmix 1.0 --randaugment 9 --seed 5".split()


def test_a_run_writes_what_is_documented(finished, clips):
    out, checkpoint, rows = finished
    raw = torch.load(out / "last.pt", map_location="cpu", weights_only=True)
    assert set(raw) == DOCUMENTED
    assert (raw["epoch"], raw["step"], raw["step_in_epoch"]) == (2, 8, 0)
    assert (
        raw["classes"] == sorted(CLASSES)
        and raw["model_config"]["num_classes"] == 3
        and raw["args"]["mixup"] == 0.8
    )
    assert tuple(raw["mean"]) == data.CLIP_MEAN and tuple(raw["std"]) == data.CLIP_STD
    assert {p.name for p in out.iterdir()} - {"curves.png"} == {
        "last.pt",
        "best.pt",
        "log.jsonl",
        "config.json",
    }
    assert json.loads((out / "config.json").read_text())["model_config"]["dim"] == 32

    steps = [r for r in rows if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert all(
        set(r) == {"kind", "step", "epoch", "loss", "lr", "grad_norm", "skipped", *TIMING}
        for r in steps
    )
    assert [r["lr"] for r in steps] == pytest.approx(
        [train.get_lr(s, 8, 2, 1e-3, 1e-6) for s in range(8)]
    )
    assert steps[4]["epoch"] == 1.25 and all(0 <= r["data_wait"] <= 1 for r in steps)
    evals = [r for r in rows if r["kind"] == "eval"]
    assert all(
        set(r) == {"kind", "step", "epoch", "top1", "top5", "loss", "clips"} and r["loss"] > 0
        for r in evals
    )
    assert [(r["step"], r["epoch"], r["clips"], r["top5"]) for r in evals] == [
        (4, 1, 6, 100.0),
        (8, 2, 6, 100.0),
    ]
    best = load_checkpoint(out / "best.pt")
    assert best["best"] == max(r["top1"] for r in evals)


def test_curves_are_drawn(finished):
    pytest.importorskip("matplotlib")
    with Image.open(finished[0] / "curves.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize("stop", [3, 6])
def test_resume_is_exact_to_the_last_bit(finished, clips, tmp_path, stop):
    # Stopped in the middle of an epoch, gone on with another number of workers: the run that was
    # never stopped.
    _, expected, expected_rows = finished
    half, _ = run(clips, tmp_path / "out", *EVERYTHING, "--max_steps", str(stop))
    assert (half["step"], half["epoch"], half["step_in_epoch"]) == (stop, stop // 4, stop % 4)
    # as if it had been killed some steps after it saved
    with open(tmp_path / "out" / "log.jsonl", "a") as f:
        f.write(json.dumps(dict(kind="train", step=stop + 1, loss=123.0)) + "\n")
    resumed, rows = run(clips, tmp_path / "out", *EVERYTHING, "--resume", "--workers", "2")
    assert same(resumed["model"], expected["model"]) and not same(half["model"], expected["model"])
    assert same(resumed["optimizer"], expected["optimizer"])
    assert untimed(rows) == untimed(expected_rows)
    assert {k: resumed[k] for k in ("step", "epoch", "step_in_epoch", "best")} == {
        k: expected[k] for k in ("step", "epoch", "step_in_epoch", "best")
    }


def test_a_log_cut_in_half_keeps_its_whole_rows(clips, tmp_path):
    run(clips, tmp_path / "out", "--max_steps", "3")
    log = tmp_path / "out" / "log.jsonl"
    os.truncate(log, log.stat().st_size - 10)
    _, rows = run(clips, tmp_path / "out", "--max_steps", "5", "--resume")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 4, 5]
    log.unlink()
    _, rows = run(clips, tmp_path / "out", "--max_steps", "6", "--resume")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [6]


def test_a_flag_that_is_newer_than_the_checkpoint_changes_nothing(finished, clips, tmp_path):
    half, _ = run(clips, tmp_path / "out", *EVERYTHING, "--max_steps", "5")
    del half["args"]["sync_bn"], half["model_config"]["learn_fusion"]
    torch.save(half, tmp_path / "out" / "last.pt")
    resumed, _ = run(clips, tmp_path / "out", *EVERYTHING, "--resume")
    assert same(resumed["model"], finished[1]["model"])


def test_a_restart_by_torchrun_resumes_by_itself(finished, clips, tmp_path, monkeypatch):
    run(clips, tmp_path / "out", *EVERYTHING, "--max_steps", "5")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    resumed, _ = run(clips, tmp_path / "out", *EVERYTHING)
    assert same(resumed["model"], finished[1]["model"])


@pytest.mark.parametrize("attempt", ("0", "1"))
def test_a_run_that_ended_before_its_first_checkpoint_starts_anew(
    clips, tmp_path, monkeypatch, attempt
):
    out = tmp_path / "out"
    # the first attempt came as far as this, then it was killed
    out.mkdir()
    (out / "config.json").write_text("{}")
    (out / "log.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
    assert run(clips, out, "--max_steps", "1")[0]["step"] == 1
    assert [row["step"] for row in read_log(out)] == [1]


def test_a_run_stopped_before_a_validation_begins_with_it(finished, clips, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", killed)  # at the end of the first epoch
        with pytest.raises(KeyboardInterrupt):
            run(clips, tmp_path / "out", *EVERYTHING)
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 4  # already on disk
    resumed, rows = run(clips, tmp_path / "out", *EVERYTHING, "--resume")
    assert same(resumed["model"], finished[1]["model"]) and untimed(rows) == untimed(finished[2])
    assert same(
        load_checkpoint(tmp_path / "out" / "best.pt")["model"],
        load_checkpoint(finished[0] / "best.pt")["model"],
    )


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(clips, tmp_path):
    first, rows = run(clips, tmp_path / "out")
    again, rows_again = run(clips, tmp_path / "out", "--resume")
    assert (
        same(first["model"], again["model"])
        and first["best"] == again["best"]
        and untimed(rows) == untimed(rows_again)
    )


def test_overfits_one_batch(tmp_path):
    clips = write_clips(tmp_path / "clips", train=6, validation=2)
    _, rows = run(
        clips,
        tmp_path / "out",
        *PLAIN,
        "--batch_size",
        "6",
        "--epochs",
        "60",
        "--warmup_epochs",
        "5",
        "--lr",
        "3e-3",
        "--no-flip",
        "--crop_scale",
        "1",
        "--label_smoothing",
        "0",
        "--eval_every",
        "60",
        "--save_minutes",
        "60",
    )
    assert losses(rows)[0] > 0.9 and losses(rows)[-1] < 0.1, losses(rows)[::10]


def test_micro_batches_are_the_full_batch(clips, tmp_path, bn_frozen):
    # Adam divides small gradients by themselves, rounding included
    flags = [*PLAIN, "--max_steps", "3", "--lr", "1e-4"]
    full, full_rows = run(clips, tmp_path / "full", *flags)
    micro, micro_rows = run(clips, tmp_path / "micro", *flags, "--micro_batch", "1")
    assert losses(full_rows) == pytest.approx(losses(micro_rows), abs=1e-5)
    assert_close_weights(full, micro)


def test_bn_frozen_leaves_the_running_statistics(clips, tmp_path, monkeypatch):
    moving, _ = run(clips, tmp_path / "moving", "--max_steps", "2")
    monkeypatch.setattr(train, "STDFormer", FrozenBNFormer)
    frozen, _ = run(clips, tmp_path / "frozen", "--max_steps", "2")
    means = [k for k in frozen["model"] if k.endswith("running_mean")]
    assert means and all(
        (frozen["model"][k] == 0).all() and (moving["model"][k] != 0).any() for k in means
    )


def test_activation_checkpointing_changes_nothing(clips, tmp_path, monkeypatch):
    flags, recomputed = ["--max_steps", "2"], []  # with the recipe's dropouts
    plain, _ = run(clips, tmp_path / "a", *flags)
    recompute = model.recompute
    monkeypatch.setattr(
        model,
        "recompute",
        lambda *inputs, **options: recomputed.append(1) or recompute(*inputs, **options),
    )
    checkpointed, _ = run(clips, tmp_path / "b", *flags, "--checkpointing")
    # two steps of two blocks and two CTMs
    assert len(recomputed) == 2 * 4 and same(plain["model"], checkpointed["model"])


def made_datasets(clips, *flags):
    """(config, training split, validation split), as train.py makes them."""
    args = train.get_args([*SMALL, "--data_root", str(clips), *flags])
    config = model.model_config(args, num_classes=3)
    return config, *train.make_datasets(args, config)


def test_steps_are_those_of_a_plain_loop(clips, tmp_path, bn_frozen):
    """Rates, groups, clipping, smoothing and decay away from their defaults, against the same two
    steps written down plainly.
    """
    flags = [
        *PLAIN,
        "--max_steps",
        "2",
        "--clip_lr_scale",
        "0.1",
        "--grad_clip",
        "0.05",
        "--label_smoothing",
        "0.3",
        "--weight_decay",
        "0.5",
        "--seed",
        "3",
    ]
    trained, _ = run(clips, tmp_path / "out", *flags)
    config, dataset, _ = made_datasets(clips, *flags)
    torch.manual_seed(3)
    net = model.STDFormer(config).train()
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.eval()
    optimizer = torch.optim.AdamW(
        [
            dict(
                params=[p],
                weight_decay=0.5 * (p.ndim > 1),
                scale=0.1 if model.is_clip_parameter(name) else 1.0,
            )
            for name, p in net.named_parameters()
        ]
    )
    for step, batch in enumerate(train.step_batches(18, 4, 0, 2, seed=3, rank=0, world=1)):
        video, label, _ = torch.utils.data.default_collate([dataset[item] for item in batch])
        torch.nn.functional.cross_entropy(
            net(data.normalize(video)), label, label_smoothing=0.3
        ).backward()
        # the limit matters
        assert torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05) > 0.1
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * train.get_lr(step, 8, 2, 1e-3, 1e-6)
        optimizer.step()
        optimizer.zero_grad()
    assert_close_weights(trained, dict(model=net.state_dict()), atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    (
        ["--control", "single"],
        ["--control", "shuffle"],
        ["--crop_scale", "0.1"],
        ["--randaugment", "9"],
        ["--seed", "1"],
    ),
    ids=" ".join,
)
def test_data_flags_reach_the_samples(clips, flags):
    def samples(*flags):
        _, training, validation = made_datasets(clips, *flags)
        return [training[0, i][0] for i in range(6)], [validation[i][0] for i in range(6)]

    (plain, plain_views), (other, other_views) = samples(), samples(*flags)
    assert not all(map(torch.equal, plain, other))
    # validation knows the control and no augmentation
    assert all(map(torch.equal, plain_views, other_views)) == (flags[0] != "--control")
    if "single" in flags:
        assert all((video == video[:, :1]).all() for video in other)


def test_no_flip_keeps_the_labels(clips):
    def labels(*flags):
        dataset = made_datasets(clips, *flags)[1]
        return {dataset[epoch, 0][1] for epoch in range(12)}

    assert len(labels()) == 2 and len(labels("--no-flip")) == 1


# ----- stopping -----


def at_call(monkeypatch, number, action):
    """Let the number-th training step (from 0) see action(video) instead of its video."""
    plain, calls = data.normalize, []

    def normalize(video, *args):
        calls.append(1)
        return action(plain(video, *args)) if len(calls) == number + 1 else plain(video, *args)

    monkeypatch.setattr(data, "normalize", normalize)


def test_sigterm_finishes_the_step_saves_and_can_be_resumed(
    finished, clips, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        at_call(patch, 2, lambda video: os.kill(os.getpid(), signal.SIGTERM) or video)
        stopped, _ = run(clips, tmp_path / "out", *EVERYTHING)
    assert stopped["step"] == 3 and "stopped after step 3 of 8" in capsys.readouterr().out
    resumed, rows = run(clips, tmp_path / "out", *EVERYTHING, "--resume")
    assert same(resumed["model"], finished[1]["model"]) and untimed(rows) == untimed(finished[2])


def test_sigterm_to_the_whole_process_group_saves_too(clips, tmp_path):
    # torchrun and job schedulers signal the data workers along with the process that trains.
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "train.py"),
            *SMALL,
            "--data_root",
            str(clips),
            "--out_dir",
            str(out),
            "--epochs",
            "5000",
            "--eval_every",
            "5000",
            "--workers",
            "2",
        ],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # one thread
        start_new_session=True,
        env=dict(os.environ, LOCAL_WORLD_SIZE=str(os.cpu_count())),
    )
    try:
        until = time.time() + 180
        while (
            time.time() < until
            and process.poll() is None
            and not ((out / "log.jsonl").is_file() and len(read_log(out)) > 5)
        ):
            time.sleep(0.1)
        assert time.time() < until, "it does not train"
        os.killpg(process.pid, signal.SIGTERM)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, printed[-3000:]
    step = load_checkpoint(out / "last.pt")["step"]
    assert f"stopped after step {step} of" in printed and read_log(out)[-1]["step"] == step


@pytest.mark.parametrize("log_every", ("1", "3", "20"))
def test_a_loss_that_is_not_finite_stops_the_run_and_last_pt_stays_finite(
    clips, tmp_path, monkeypatch, log_every
):
    at_call(monkeypatch, 5, lambda video: video * math.nan)
    with pytest.raises(FloatingPointError) as e:
        run(
            clips,
            tmp_path / "out",
            "--eval_every",
            "9",
            "--log_every",
            log_every,
            "--save_minutes",
            "0",
        )
    text, noticed = str(e.value), {"1": 6, "3": 6, "20": 8}[log_every]
    assert "loss nan" in text and f"step {noticed}" in text and "\n" not in text
    assert f"lr {train.get_lr(noticed - 1, 8, 2, 1e-3, 1e-6):.2e}" in text and "--lr" in text
    last = load_checkpoint(tmp_path / "out" / "last.pt")
    assert last["step"] == {"1": 5, "3": 4, "20": 4}[log_every]
    assert all(v.isfinite().all() for v in last["model"].values() if v.is_floating_point())


def test_a_gradient_that_is_not_finite_stops_the_run_too(clips, tmp_path, monkeypatch):
    clip_grad_norm, calls = torch.nn.utils.clip_grad_norm_, []

    def overflows_once(parameters, limit):
        calls.append(limit)
        norm = clip_grad_norm(parameters, limit)
        # the loss of that step is finite
        return norm * math.inf if len(calls) == 6 else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflows_once)
    with pytest.raises(FloatingPointError, match="gradient norm inf, step 6"):
        run(clips, tmp_path / "out", "--eval_every", "9", "--save_minutes", "0")
    assert load_checkpoint(tmp_path / "out" / "last.pt")["step"] == 5


# ----- refusals -----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--dim", "40"], ["dim was 32, is 40"]),
        (["--batch_size", "2"], ["batch_size was 4, is 2"]),
        (["--weight_decay", "0.1"], ["weight_decay was 0.05, is 0.1"]),
        (
            ["--label_smoothing", "0.2", "--no-flip"],
            ["label_smoothing was 0.1, is 0.2", "flip was True, is False"],
        ),
        # every difference
        (["--seed", "6", "--stdm_layers"], ["seed was 5, is 6", "stdm_layers was None, is []"]),
    ],
)
def test_resume_refuses_another_run(finished, clips, flags, words):
    before = {p: p.read_bytes() for p in finished[0].iterdir()}
    with pytest.raises(ValueError) as e:
        run(clips, finished[0], *EVERYTHING, "--resume", *flags)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)
    assert {p: p.read_bytes() for p in finished[0].iterdir()} == before


def test_resume_refuses_another_number_of_clips(finished, clips, tmp_path):
    ids = data.read_annotations("ssv1", clips, "train")[0].tolist()
    (tmp_path / "skip.txt").write_text("\n".join(ids[:6]))
    with pytest.raises(ValueError, match="clips was 18, is 12"):
        run(clips, finished[0], *EVERYTHING, "--resume", "--skip_list", str(tmp_path / "skip.txt"))


def test_resume_refuses_other_classes(finished, tmp_path):
    other = write_clips(tmp_path / "other", classes=[*CLASSES[:2], "Waving something"])
    with pytest.raises(ValueError, match="classes was"):
        run(other, finished[0], *EVERYTHING, "--resume")


def test_folders_and_batches_that_do_not_fit_are_refused(finished, clips, tmp_path):
    with pytest.raises(ValueError, match="holds a run: add --resume"):
        run(clips, finished[0], *EVERYTHING)
    with pytest.raises(FileNotFoundError, match="last.pt"):
        run(clips, tmp_path / "new", "--resume")
    with pytest.raises(ValueError, match="18 training and 6 .* --batch_size 19"):
        run(clips, tmp_path / "a", "--batch_size", "19")
    with pytest.raises(ValueError, match="--micro_batch 3"):
        run(clips, tmp_path / "b", "--micro_batch", "3")
    with pytest.raises(ValueError, match="dim is 32, expected a multiple of heads"):
        run(clips, tmp_path / "c", "--heads", "3")


def test_mixing_a_single_clip_is_said_to_do_nothing(clips, tmp_path, capsys):
    train_here(clips, tmp_path / "one", "--dry_run", "--batch_size", "1", "--mixup", "0.8")
    assert "MixUp and CutMix do nothing" in capsys.readouterr().out
    train_here(clips, tmp_path / "two", "--dry_run", "--batch_size", "2", "--mixup", "0.8")
    assert "do nothing" not in capsys.readouterr().out


def test_dry_run_writes_nothing(clips, tmp_path, capsys):
    before = sorted(clips.rglob("*"))
    train_here(clips, tmp_path / "out", "--dry_run")
    assert "clips/s" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and sorted(clips.rglob("*")) == before


def test_the_skip_list_counts_in_validation(clips, tmp_path, capsys):
    (tmp_path / "skip.txt").write_text("3  # a training clip\n20\n")
    _, rows = run(
        clips, tmp_path / "out", "--epochs", "1", "--skip_list", str(tmp_path / "skip.txt")
    )
    assert "17 training and 5 validation clips" in capsys.readouterr().out
    result = rows[-1]
    assert (
        result["kind"] == "eval"
        and result["clips"] == 6
        and result["top5"] == pytest.approx(100 * 5 / 6)
    )


def test_mirrored_labels_are_printed_and_names_with_a_side_but_no_partner_too(tmp_path, capsys):
    clips = write_clips(tmp_path / "clips", classes=["swipe_left", "swipe_right", "turn right"])
    train_here(clips, tmp_path / "out", "--dry_run")
    printed = capsys.readouterr().out
    assert "flips swap these labels: 'swipe_left' and 'swipe_right'" in printed
    assert "'turn right'" in printed and "--no-flip" in printed
    train_here(clips, tmp_path / "out", "--dry_run", "--no-flip")
    assert "flips" not in capsys.readouterr().out
    clips = write_clips(tmp_path / "numbers", classes=["0", "1"])
    train_here(clips, tmp_path / "out", "--dry_run")
    assert "flips swap these labels: none; --no-flip" in capsys.readouterr().out


def test_an_empty_validation_split_is_an_error_before_the_first_epoch(tmp_path):
    clips = write_clips(tmp_path / "clips")
    next(clips.glob("*validation.csv")).write_text("")
    with pytest.raises(ValueError, match="18 training and 0 validation clips are too few"):
        train_here(clips, tmp_path / "out")


# ----- starting points -----


def test_init_from_renews_the_head_for_other_classes(finished, clips, tmp_path, bn_frozen):
    source = finished[1]["model"]
    # a step that moves nothing
    still = [
        "--init_from",
        str(finished[0] / "last.pt"),
        "--lr",
        "0",
        "--min_lr",
        "0",
        "--max_steps",
        "1",
    ]
    kept, _ = run(clips, tmp_path / "kept", *still)
    assert same(kept["model"], source) and kept["step"] == 1
    other = write_clips(tmp_path / "other", classes=["B", "A"])
    renewed, _ = run(other, tmp_path / "renewed", *still)
    for name, value in renewed["model"].items():
        assert (
            value.shape[0] == 2 if name.startswith("head.") else torch.equal(value, source[name])
        ), name
    # as many classes, but others
    three = write_clips(tmp_path / "three", classes=["C", "B", "A"])
    renewed, _ = run(three, tmp_path / "third", *still)
    assert not torch.equal(renewed["model"]["head.weight"], source["head.weight"])
    with pytest.raises(ValueError, match="--init_from"):
        run(clips, tmp_path / "wider", *still, "--dim", "40")


def test_init_from_takes_the_model_of_the_other_run_whatever_the_recipe(finished, clips, tmp_path):
    bare = [word for word in SMALL if word not in ("--model", "tiny")]
    for flag in ("--dim", "--depth", "--heads", "--num_frames", "--image_size", "--patch_size"):
        i = bare.index(flag)
        del bare[i : i + 2]
    train.main(
        [
            *bare,
            "--data_root",
            str(clips),
            "--out_dir",
            str(tmp_path / "out"),
            "--init_from",
            str(finished[0] / "last.pt"),
            "--max_steps",
            "1",
        ]
    )
    found = load_checkpoint(tmp_path / "out" / "last.pt")["model_config"]
    assert all(
        found[k] == v
        for k, v in finished[1]["model_config"].items()
        if not k.endswith(("drop_path", "dropout"))
    )


def test_init_from_at_another_image_size_keeps_the_grid_of_smem(finished, clips, tmp_path):
    larger, _ = run(
        clips,
        tmp_path / "out",
        "--init_from",
        str(finished[0] / "last.pt"),
        "--image_size",
        "32",
        "--max_steps",
        "2",
    )
    assert larger["model"]["positional_embedding"].shape == (1 + 4 * 4, 32)
    assert larger["model_config"]["image_size"] == 32 and larger["model_config"]["smem_grid"] == 2
    assert [k for k in larger["model"] if k.startswith("smem_t")]


def test_init_from_resizes_positions():
    small = {**SMALL_MODEL, "num_classes": 3, "smem_t_layers": ()}
    net = build_model("tiny", **{**small, "image_size": 32})
    source = build_model("tiny", **small)
    train.init_from(net, dict(model=source.state_dict(), classes=CLASSES), "a.pt", CLASSES)
    assert net.positional_embedding.shape == (17, 32) and torch.equal(
        net.positional_embedding[0], source.positional_embedding[0]
    )


def clip_file(path):
    """CLIP's image tower of the test's size with random weights, under OpenAI's names."""
    torch.manual_seed(1)
    D, state = 32, {}
    shapes = {
        "class_embedding": (D,),
        "positional_embedding": (5, D),
        "proj": (D, 16),
        "conv1.weight": (D, 3, 8, 8),
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    for i in range(2):
        block = f"transformer.resblocks.{i}."
        for name, out, width in (
            ("attn.in_proj_", 3 * D, D),
            ("attn.out_proj.", D, D),
            ("mlp.c_fc.", 4 * D, D),
            ("mlp.c_proj.", D, 4 * D),
        ):
            shapes |= {f"{block}{name}weight": (out, width), f"{block}{name}bias": (out,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}{name}.weight": (D,), f"{block}{name}.bias": (D,)}
    for name, shape in shapes.items():
        state["visual." + name] = torch.randn(shape) * 0.1
    state["logit_scale"] = torch.tensor(4.6)  # of the text side
    torch.save(state, path)
    return state


def test_clip_weights_are_loaded_and_can_be_frozen(clips, tmp_path, capsys):
    state = clip_file(tmp_path / "clip.pt")
    flags = [
        "--clip",
        str(tmp_path / "clip.pt"),
        "--ptm_layers",
        "1",
        "--max_steps",
        "2",
        "--lr",
        "1e-2",
    ]
    frozen, _ = run(clips, tmp_path / "frozen", *flags, "--freeze_clip")
    # but proj, logit_scale
    assert (
        f"CLIP weights: {len(state) - 2} tensors loaded"
        in capsys.readouterr().out
    )
    free, _ = run(clips, tmp_path / "free", *flags)
    for name, value in state.items():
        name = name.removeprefix("visual.").replace("transformer.resblocks.", "blocks.")
        if name in ("proj", "logit_scale"):
            continue
        trained = {
            k: c["model"][name][:, :, 1] if name == "conv1.weight" else c["model"][name]
            for k, c in (("frozen", frozen), ("free", free))
        }
        # the stem learns from motion, so it is not frozen
        assert torch.equal(trained["frozen"], value) == (name != "conv1.weight"), name
        assert not torch.equal(trained["free"], value), name
    fresh = build_model("tiny", **SMALL_MODEL, num_classes=3, ptm_layers=(1,)).state_dict()
    assert any(
        k.startswith("ctm.") and not torch.equal(v, fresh[k]) for k, v in frozen["model"].items()
    )
    assert len(frozen["optimizer"]["state"]) < len(free["optimizer"]["state"])


# ----- several processes, GPUs -----


def test_two_processes_train_as_one(clips, tmp_path, monkeypatch):
    clip_file(tmp_path / "clip.pt")  # only rank 0 reads it
    flags = [*PLAIN, "--clip", str(tmp_path / "clip.pt"), "--lr", "1e-4"]
    monkeypatch.setattr(train, "STDFormer", VARIANTS["bn_frozen"])
    one, one_rows = run(clips, tmp_path / "one", *flags)
    two, two_rows = on_two_ranks(
        clips, tmp_path / "two", *flags, "--micro_batch", "1", variant="bn_frozen"
    )
    assert losses(two_rows) == pytest.approx(losses(one_rows), abs=1e-5)
    accuracy = [
        [(r["step"], r["top1"], r["top5"], r["clips"]) for r in rows if r["kind"] == "eval"]
        for rows in (one_rows, two_rows)
    ]
    assert accuracy[0] == accuracy[1] and len(accuracy[0]) == 2
    assert_close_weights(one, two)
    assert (
        two["step"] == one["step"]
        and two["best"] == one["best"]
        and two["model"].keys() == one["model"].keys()
    )


def test_two_processes_go_on_with_the_run_of_one(clips, tmp_path, capsys):
    one, _ = run(clips, tmp_path / "out", *PLAIN, "--max_steps", "5")
    two, rows = on_two_ranks(clips, tmp_path / "out", *PLAIN, "--resume")
    assert (one["step"], two["step"]) == (5, 8) and [
        r["step"] for r in rows if r["kind"] == "train"
    ] == list(range(1, 9))
    capsys.readouterr()
    evaluate.main(
        [
            "--ckpt",
            str(tmp_path / "out" / "last.pt"),
            "--crops",
            "1",
            "--workers",
            "0",
            "--device",
            "cpu",
        ]
    )
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith(f"top1 {rows[-1]['top1']:.2f} ")
        and rows[-1]["kind"] == "eval"
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_steps(clips, tmp_path, precision, device, bn_frozen):
    flags = [*PLAIN, "--device", device]
    _, exact = run(clips, tmp_path / "fp32", *flags, "--precision", "fp32", "--max_steps", "1")
    flags += ["--precision", precision]
    mixed, rows = run(clips, tmp_path / "mixed", *flags)
    assert losses(rows)[0] == pytest.approx(losses(exact)[0], abs=0.05) and all(
        map(math.isfinite, losses(rows))
    )
    assert losses(rows)[0] != losses(exact)[0]  # it is not float32 under another name
    assert all(v.dtype not in (torch.float16, torch.bfloat16) for v in mixed["model"].values())
    if precision == "bf16":
        assert mixed["scaler"] == {}  # needs none
    else:
        # starts at 65536 and halves (skipping the step) until nothing overflows
        assert mixed["scaler"]["scale"] >= 1
        # 0 where the step overflowed
        changed = [r["grad_norm"] for r in rows if r["kind"] == "train" and not r["skipped"]]
        assert changed and max(changed) < 1000  # the norm is taken after unscaling
    # the scaler's state is part of what a resume needs
    if device == "cpu":
        run(clips, tmp_path / "resumed", *flags, "--max_steps", "3")
        resumed, _ = run(clips, tmp_path / "resumed", *flags, "--resume")
        assert same(resumed["model"], mixed["model"]) and same(resumed["scaler"], mixed["scaler"])


@cuda
def test_compiled_steps_equal_eager(clips, tmp_path):
    flags = [*PLAIN, "--device", "cuda", "--precision", "fp32", "--max_steps", "3"]
    eager, eager_rows = run(clips, tmp_path / "eager", *flags)
    compiled, rows = run(clips, tmp_path / "compiled", *flags, "--compile")
    assert losses(rows) == pytest.approx(losses(eager_rows), abs=2e-3)
    assert compiled["model"].keys() == eager["model"].keys()  # no _orig_mod. prefix


@cuda
def test_compiled_steps_on_two_ranks_without_sync_bn_equal_eager(clips, tmp_path):
    flags = [*PLAIN, "--device", "cuda", "--precision", "fp32", "--max_steps", "3", "--no-sync_bn"]
    eager, eager_rows = on_two_ranks(clips, tmp_path / "eager", *flags)
    compiled, rows = on_two_ranks(clips, tmp_path / "compiled", *flags, "--compile")
    assert losses(rows) == pytest.approx(losses(eager_rows), abs=2e-3)
    assert compiled["model"].keys() == eager["model"].keys()


@cuda
def test_sync_batchnorm_on_two_ranks_is_batchnorm_on_one(clips, tmp_path):
    # Two processes share the GPU (gloo); batch statistics over both must be those of the whole
    # batch.
    flags = [*PLAIN, "--device", "cuda", "--precision", "fp32", "--max_steps", "3"]
    one, one_rows = run(clips, tmp_path / "one", *flags)
    two, two_rows = on_two_ranks(clips, tmp_path / "two", *flags)
    assert losses(two_rows) == pytest.approx(losses(one_rows), abs=2e-3)
    for name, value in one["model"].items():
        if "running_" in name:
            assert torch.allclose(value, two["model"][name], atol=1e-2), name
