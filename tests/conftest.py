"""What every test file shares: `import model` finds the repository, and one thread. Run all: python -m pytest -q tests"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)                # the models here are tiny: more threads only wait for each other
