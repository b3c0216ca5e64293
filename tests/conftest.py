"""What the test files share: imports that find the repository, small data sets, two processes.

python -m pytest -q tests
"""
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                                # tiny models: more threads only wait
# The processes that tests start take one thread, too, and as many data workers on any machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

@pytest.fixture(autouse=True)
def as_it_was(tmp_path, monkeypatch):
    """Each test runs in an empty folder, and what main sets for its process ends with the test."""
    monkeypatch.chdir(tmp_path)
    precision = torch.get_float32_matmul_precision()
    tf32 = torch.backends.cudnn.allow_tf32
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32

def save_frames(folder, frames, kind="png"):
    """Frames are (h, w, 3). png is exact, jpg is what Something-Something V1 has."""
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames, 1):
        Image.fromarray(np.asarray(frame, dtype=np.uint8)).save(folder / f"{i:05d}.{kind}")

def write_v1(root, classes, **splits):
    """Annotation files as released for V1. splits: train=[(clip, class), ...]; test=[clip, ...]"""
    root.mkdir(parents=True, exist_ok=True)
    for split, rows in dict(labels=classes, **splits).items():
        lines = [row if isinstance(row, str) else ";".join(row) for row in rows]
        path = root / f"something-something-v1-{split}.csv"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return root / "20bn-something-something-v1"         # where the clips belong

# ----- Two processes --------------------------------------------------------

def torchrun_variables(rank, port):
    """What torchrun --nproc_per_node=2 tells its processes."""
    return dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

# A fork does not import torch again, which takes seconds. After CUDA has been used it cannot.
FORK = sys.platform == "linux" and not torch.cuda.is_available()
PROCESSES = multiprocessing.get_context("fork" if FORK else "spawn")
# At its first backward pass autograd starts a thread for each GPU, and then nothing can be forked.
# Tracing with fake tensors makes torch count a GPU that is not there. So the first pass is here.
torch.zeros(1, requires_grad=True).sum().backward()

def as_rank(rank, port, results, function, arguments):
    os.environ.update(torchrun_variables(rank, port))
    try:
        result = function(*arguments)
    except Exception as e:
        result = e
    results.put((rank, result))

def on_two_ranks(function, *arguments):
    """Call a function of a module in two processes.

    Returns what it has returned in each, something short, or the error that it has raised there.
    """
    port = free_port()
    results = PROCESSES.SimpleQueue()
    ranks = []
    for rank in range(2):
        ranks.append(PROCESSES.Process(target=as_rank,
                                       args=(rank, port, results, function, arguments)))
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    found = dict([results.get(), results.get()])
    return found[0], found[1]
