"""The model beyond float32 and eager mode: autocast, torch.compile, torch.export and ONNX.

Protects: bf16 and fp16 are finite and near float32, and bf16 reaches the tokens between modules;
a compiled training step has no graph break and compiles once; exported models give equal logits.

python -m pytest -q tests/test_export.py
"""
import pytest
import torch
import torch.nn.functional as F

from model import build_model

VERSION = tuple(int(number) for number in torch.__version__.split(".")[:2])
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

def small(**changes):
    """A model with all modules: PTM in layer 1, STDM in layer 0, SMEM in both branches."""
    torch.manual_seed(0)
    size = dict(dim=32, depth=2, num_frames=4, image_size=16, num_classes=5, ptm_layers=(1,),
                smem_t_layers=(0,), smem_st_layers=(1,))
    return build_model("tiny", **{**size, **changes})

def noise(clips):
    return torch.randn(clips, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))

# ----- Mixed precision ------------------------------------------------------

@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=cuda)))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("fusion", ("mul", "add", "mul+add"))
def test_half_precision_is_finite_and_near_float32(fusion, dtype, device):
    model = small(smem_fusion=fusion).to(device).eval()
    video = noise(2).to(device)
    with torch.no_grad():
        logits = model(video)
        with torch.autocast(device, dtype):
            rounded = model(video)
    assert (rounded - logits).abs().max() < 0.05 * logits.abs().max()

@pytest.mark.parametrize("conv", ("residual2d", "attention3d"))
def test_bf16_reaches_the_tokens_between_modules(conv):
    # Half of the memory and traffic of float32. A module that returns float32 would pass it on to
    # all that follow.
    model = small(ptm_conv=conv, drop_path=0.1).train()
    dtypes = {}
    for name, module in model.named_modules():
        if name.startswith(("blocks.", "ctm.", "stdm.", "smem_")) and name.count(".") == 1:
            module.register_forward_hook(
                lambda module, inputs, output, name=name: dtypes.update({name: output.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        x, y = model.forward_features(noise(2))
    assert {x.dtype, y.dtype, *dtypes.values()} == {torch.bfloat16}, dtypes
    with torch.autocast("cpu", torch.float16):
        x, y = model.forward_features(noise(2))
    assert {x.dtype, y.dtype} == {torch.float32}        # in float16, tokens might overflow

# ----- torch.compile --------------------------------------------------------

def test_a_compiled_step_has_no_graph_break_and_compiles_once():
    model = small(drop_path=0.1, ctm_drop_path=0.1, ctm_dropout=0.1, head_dropout=0.1).train()
    model.checkpointing = True                  # harder to compile than without
    compiled = torch.compile(model, fullgraph=True, backend="eager")    # raises at a graph break
    compiled(noise(2)).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(noise(2)).sum().backward()

@cuda
def test_a_compiled_model_equals_the_eager_one():
    model = small().cuda().train()
    losses, gradients = [], []
    for run in model, torch.compile(model):
        model.zero_grad()
        loss = F.cross_entropy(run(noise(2).cuda()), torch.tensor([1, 3], device="cuda"))
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3, rtol=1e-2)

# ----- Export ---------------------------------------------------------------

def test_torch_export():
    model = small().eval()
    batch = {"video": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(model, (noise(2),), dynamic_shapes=batch).module()
    video = noise(3)                            # not the clips that it was traced with, nor as many
    torch.testing.assert_close(exported(video), model(video), atol=1e-5, rtol=0)

@pytest.mark.skipif(VERSION < (2, 9), reason="older versions cannot export it")
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = small().eval()
    torch.onnx.export(model, (noise(2),), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx",
                                           providers=["CPUExecutionProvider"])
    logits, = session.run(None, {session.get_inputs()[0].name: noise(2).numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(noise(2)).detach(), atol=1e-5,
                               rtol=0)
