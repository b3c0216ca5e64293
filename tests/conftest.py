"""What the test files share: imports that find the repository, an empty folder, two processes.

python -m pytest -q tests
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models here are tiny: more threads only wait for each other
# The processes that tests start take one thread, too, and as many data workers on any machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())

# The small model that test_train.py and test_evaluate.py build by hand
SMALL_MODEL = dict(dim=32, depth=2, heads=2, num_frames=4, image_size=16, patch_size=8)


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    """No test sees datasets/ or out/ of the checkout, nor writes into it."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def precision_as_it_was():
    """train.py and evaluate.py say how exact float32 is on GPUs, for the whole process."""
    matmul, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = tf32


def run_two_ranks(script, *flags):
    """What torchrun --nproc_per_node=2 starts, without its agent, which would cost another process
    start. Returns what each printed.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = dict(
        os.environ,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        OMP_NUM_THREADS="1",
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / script), *map(str, flags)],
            env=dict(common, RANK=str(r), LOCAL_RANK=str(r)),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for r in range(2)
    ]
    try:
        printed = [p.communicate(timeout=900)[0] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(printed)
    return printed
