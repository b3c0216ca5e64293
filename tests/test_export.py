"""The model leaves PyTorch's eager mode with the same logits: torch.export, ONNX, and on a GPU
torch.compile and bf16.

python -m pytest -q tests/test_export.py
"""

import pytest
import torch
import torch.nn.functional as F

from model import build_model

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def tiny_and_clip(**overrides):
    torch.manual_seed(0)
    size = dict(dim=32, depth=3, heads=4, patch_size=8, image_size=32, num_frames=8, num_classes=5)
    return build_model("tiny", **{**size, **overrides}).eval(), torch.randn(2, 3, 8, 32, 32)


@pytest.mark.parametrize(
    "variant",
    [dict(), dict(smem_st_layers=(1,), smem_fusion="mul+add", ptm_conv="attention3d")],
    ids=["default", "others"],
)
def test_torch_export(variant):
    model, video = tiny_and_clip(**variant)
    exported = torch.export.export(
        model, (video,), dynamic_shapes={"video": {0: torch.export.Dim("batch", min=1, max=64)}}
    ).module()
    # neither the clips it was traced with nor as many
    other = torch.randn(3, *video.shape[1:])
    torch.testing.assert_close(exported(other), model(other), atol=1e-5, rtol=0)


@pytest.mark.skipif(
    tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 9),
    reason="torch 2.6 cannot export it, 2.9 can",
)
def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, video = tiny_and_clip()
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (video,), dynamo=True, verbose=False).save(file)
    onnx.checker.check_model(file)
    other = torch.randn_like(video)
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    except ImportError:  # slow, but it comes with onnx
        (logits,) = run_with_onnx_alone(file, other.numpy())
    torch.testing.assert_close(torch.from_numpy(logits), model(other).detach(), atol=1e-5, rtol=0)


def run_with_onnx_alone(file, video):
    """onnx's own evaluator; its Pad cannot crop, which ONNX allows (negative pads) and CPE's shift
    along T does.
    """
    import numpy as np
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    def pad_or_crop(self, x, pads, *ignored, **attributes):
        before, after = pads.reshape(2, -1)
        x = np.pad(x, list(zip(before.clip(0), after.clip(0))))
        return (
            x[tuple(slice(max(0, -b), n + min(0, a)) for b, a, n in zip(before, after, x.shape))],
        )

    Pad = type("Pad", (OpRun,), {"_run": pad_or_crop})
    evaluator = ReferenceEvaluator(str(file), new_ops=[Pad])
    return evaluator.run(None, {evaluator.input_names[0]: video})


@needs_cuda
def test_a_compiled_model_equals_the_eager_one():
    model, video = tiny_and_clip()
    model, video = model.cuda().train(), video.cuda()
    labels = torch.tensor([1, 3], device="cuda")
    losses, gradients = [], []
    for run in (model, torch.compile(model)):
        model.zero_grad()
        loss = F.cross_entropy(run(video), labels)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=needs_cuda)))
@pytest.mark.parametrize("fusion", ("mul", "add", "mul+add"))
def test_bf16_is_finite_and_near_fp32(fusion, device):
    model, video = tiny_and_clip(smem_fusion=fusion, smem_st_layers=(1,))
    model, video = model.to(device), video.to(device)
    with torch.no_grad():
        logits = model(video)
        with torch.autocast(device, torch.bfloat16):
            rounded = model(video)
    assert rounded.isfinite().all()
    assert (rounded - logits).abs().max() < 0.05 * logits.abs().max()


@pytest.mark.parametrize(
    "overrides",
    (
        dict(),
        dict(smem_st_layers=(1,), smem_fusion="mul+add", drop_path=0.1),
        dict(ptm_conv="attention3d"),
    ),
)
def test_bf16_reaches_the_tokens_between_modules(overrides):
    # Half of the memory and traffic of float32 tokens. One module that returns float32 would pass
    # it on to all behind it.
    model, video = tiny_and_clip(**overrides)
    found = {}
    for name, m in model.train().named_modules():
        if name.startswith(("blocks.", "ctm.", "stdm.", "smem_")) and name.count(".") == 1:
            m.register_forward_hook(
                lambda m, inputs, output, name=name: found.update({name: output.dtype})
            )
    x, y = model.forward_features(video)
    assert {x.dtype, y.dtype, *found.values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        x, y = model.forward_features(video)
    assert {x.dtype, y.dtype} == {torch.bfloat16} and set(found.values()) == {torch.bfloat16}, found
    with torch.autocast("cpu", torch.float16):
        x, y = model.forward_features(video)
    assert {x.dtype, y.dtype} == {torch.float32}  # float16 tokens might overflow


@pytest.mark.parametrize("checkpointing", (False, True))
def test_no_graph_break_and_no_recompilation(checkpointing):
    # `fullgraph` raises at the first graph break; after one training and one evaluation step
    # nothing may compile again.
    model, video = tiny_and_clip(
        drop_path=0.1, ctm_drop_path=0.1, ctm_dropout=0.1, head_dropout=0.1, smem_st_layers=(1,)
    )
    model.checkpointing = checkpointing
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def step():
        model.train()
        compiled(video).sum().backward()
        model.eval()
        with torch.no_grad():
            compiled(video)

    step()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            step()
