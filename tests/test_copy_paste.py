"""Each module of model.py can be copied out of it: with the few helpers that are listed here, and
torch and torchvision, it runs. And none of the helpers is listed in vain.

python -m pytest -q tests/test_copy_paste.py
"""
import inspect

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import StochasticDepth

import model

GRID = (3, 2)
TOKENS = (2, 4, 7, 32)          # (B, T, 1+N, D)
PATCHES = (2, 4, *GRID, 32)     # (B, T, H, W, D)

# module: helpers that are copied with it, how it is built, shapes of its inputs, other inputs
MODULES = {
    "Block": ("Attention MLP", "Block(32, 4)", [TOKENS], []),
    "PTM": ("Attention MLP DPE PTMConv conv_tokens pad_class_token", "PTM(32, 4)", [TOKENS],
            [GRID]),
    "CTM": ("CPE MLP", "CTM(32, 4)", [PATCHES, PATCHES], []),
    "STDM": ("conv_tokens", "STDM(32)", [PATCHES], []),
    "SMEM": ("", "SMEM(32, (3, 2))", [PATCHES], []),
}
PAIRS = [(name, helper) for name in MODULES for helper in MODULES[name][0].split()]

def copy_and_run(name, helpers):
    """Forward and backward, where nothing is known but the libraries, the helpers and the module"""
    _, build, shapes, others = MODULES[name]
    namespace = {"torch": torch, "nn": nn, "F": F, "StochasticDepth": StochasticDepth}
    for piece in (*helpers, name):
        exec(inspect.getsource(getattr(model, piece)), namespace)
    module = eval(build, namespace)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    out = module(*inputs, *others)
    assert out.shape == inputs[0].shape
    out.square().sum().backward()
    for p in (*module.parameters(), *inputs):
        assert p.grad.isfinite().all()

@pytest.mark.parametrize("name", MODULES)
def test_a_module_runs_outside_of_model_py(name):
    copy_and_run(name, MODULES[name][0].split())

@pytest.mark.parametrize("name, helper", PAIRS)
def test_each_helper_is_needed(name, helper):
    helpers = MODULES[name][0].split()
    helpers.remove(helper)
    with pytest.raises(NameError, match=f"'{helper}'"):
        copy_and_run(name, helpers)
