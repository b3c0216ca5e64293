"""The path on an NVIDIA GPU, as far as a machine without one can show it.

Protects: the model, normalize and predict never mix tensors of the CPU and the GPU, never wait for
the GPU until the probabilities are copied back, and keep the dtypes of each precision.

make_fx(..., tracing_mode="fake") runs a function on tensors that have a shape, a dtype and a device
but no values, and records each operation. So no value, kernel or backward pass is tested here.

python -m pytest -q tests/test_cuda_path.py
"""
import pytest
import torch
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import evaluate
from model import build_model

OLD = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9)
pytestmark = [
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch without CUDA"),
    pytest.mark.skipif(OLD, reason="old versions, such as 2.6, ask the driver for a GPU"),
]
TOKENS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float32}
# .item(), bool(tensor) and the like; nonzero(), masks as indices and the like
WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

@pytest.mark.parametrize("precision", TOKENS)
def test_one_batch_of_views_on_a_gpu(precision, monkeypatch):
    # Without a GPU, autocast would do nothing.
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *options: True)
    # In training mode, for BatchNorm and dropout as well
    network = build_model("tiny", dim=16, depth=2, num_frames=4, image_size=16, num_classes=5,
                          smem_t_layers=(1,), ptm_layers=(1,), drop_path=0.1, ctm_drop_path=0.1,
                          ctm_dropout=0.1, head_dropout=0.1).train()
    state = network.state_dict()
    inputs = []                                 # of the last CTM: patches of x, and y
    network.ctm[1].register_forward_hook(lambda module, args, output: inputs.extend(args))

    def predict(views):
        on_gpu = {}
        for name, tensor in state.items():
            on_gpu[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        def model(video):
            return functional_call(network, on_gpu, (video,))

        # A tensor of the CPU that meets one of the GPU is an error here. So is a wrong dtype.
        probabilities = evaluate.predict(model, views, torch.device("cuda", 0), precision)
        assert probabilities.device.type == "cpu" and probabilities.dtype == torch.float32
        return probabilities

    views = torch.zeros(2, 3, 3, 4, 16, 16, dtype=torch.uint8)
    operations = make_fx(predict, tracing_mode="fake")(views).graph.nodes
    for node in operations:
        assert not any(tag in WAITS for tag in getattr(node.target, "tags", ())), node
    to_cpu = [node for node in operations if node.kwargs.get("device") == torch.device("cpu")]
    assert len(to_cpu) == 1                     # the probabilities
    assert {x.device.type for x in inputs} == {"cuda"}
    assert {x.dtype for x in inputs} == {TOKENS[precision]}
