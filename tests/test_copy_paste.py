"""Each module of model.py can be lifted out: its source, the few pieces listed here, torch and
torchvision
are enough.

python -m pytest -q tests/test_copy_paste.py
"""

import inspect

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import StochasticDepth

import model

# (B, T, 1+N, D), (B, T, H, W, D)
TOKENS, PATCHES, GRID = (2, 4, 7, 32), (2, 4, 3, 2, 32), (3, 2)

# class: what has to come along, how it is built, what goes in
LIFTED = {
    "Block": ("Attention MLP", "Block(32, 4)", [TOKENS]),
    "PTM": ("Attention MLP DPE PTMConv conv_tokens", "PTM(32, 4)", [TOKENS, GRID]),
    "CTM": ("CPE MLP", "CTM(32, 4)", [PATCHES, PATCHES]),
    "STDM": ("conv_tokens", "STDM(32)", [PATCHES]),
    "SMEM": ("", "SMEM(32, (3, 2))", [PATCHES]),
}


def lift_and_run(name, helpers):
    """Run the class forward and backward in a namespace with nothing in it but the libraries, the
    helpers and itself.
    """
    _, build, shapes = LIFTED[name]
    namespace = {"torch": torch, "nn": nn, "F": F, "StochasticDepth": StochasticDepth}
    for piece in (*helpers, name):
        exec(inspect.getsource(getattr(model, piece)), namespace)
    module = eval(build, namespace)
    inputs = [
        shape if shape is GRID else torch.randn(shape, requires_grad=True) for shape in shapes
    ]
    out = module(*inputs)
    out.square().sum().backward()
    assert out.shape == inputs[0].shape
    for p in (*module.parameters(), *(x for x in inputs if x is not GRID)):
        assert p.grad is not None and p.grad.isfinite().all()


@pytest.mark.parametrize("name", LIFTED)
def test_a_module_runs_outside_of_this_repository(name):
    lift_and_run(name, LIFTED[name][0].split())


@pytest.mark.parametrize(
    "name, helper", [(name, helper) for name in LIFTED for helper in LIFTED[name][0].split()]
)
def test_no_piece_is_listed_that_is_not_needed(name, helper):
    with pytest.raises(NameError, match=f"'{helper}'"):
        lift_and_run(name, [h for h in LIFTED[name][0].split() if h != helper])


def test_ptm_needs_six_pieces_at_most():
    assert len(LIFTED["PTM"][0].split()) + 1 <= 6  # with PTM itself
