# SPDX-License-Identifier: Apache-2.0
"""onnxruntime and OpenVINO: requirements-peers.txt. Both are given float32 copies
of the tensors, which they like best on the CPU; making them is not timed."""

from __future__ import annotations

from typing import Any

import torch

from ..inputs import Inputs
from .base import Call, Finder, Missing, Peer, only, rows_first


def check(inputs: Inputs) -> None:
    case = inputs.case
    only(not case.dtype.startswith("int8"), "no int8 attention of this kind")
    only(case.heads == case.heads_k, "no grouped heads")


def make_onnxruntime(inputs: Inputs) -> Call:
    """The com.microsoft operator MultiHeadAttention, on (B, S, N * D)."""
    import onnxruntime
    from onnx import TensorProto, helper

    check(inputs)
    case, added = inputs.case, None if inputs.causal else inputs.added
    names = ["q", "k", "v"]
    feed = {
        name: rows_first(x.float()).flatten(2).numpy()
        for name, x in zip(names, inputs.qkv, strict=True)
    }
    operands = list(names)
    if added is not None:
        feed["bias"] = added.float().contiguous().numpy()
        operands += ["", "", "bias"]
    node = helper.make_node(
        "MultiHeadAttention",
        operands,
        ["out"],
        domain="com.microsoft",
        num_heads=case.heads,
        scale=inputs.scale,
        unidirectional=int(inputs.causal),
    )
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, kind, x.shape) for name, x in feed.items()],
        [helper.make_tensor_value_info("out", kind, None)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    shape = (case.batch, case.seqlen, case.heads, case.head_dim)
    return Call(
        lambda: session.run(None, feed)[0],
        lambda out: torch.from_numpy(out).view(shape).transpose(1, 2),
        note="in float32",
    )


def make_openvino(inputs: Inputs) -> Call:
    import openvino
    from openvino import opset13

    check(inputs)
    added = None if inputs.causal else inputs.added
    arrays = [x.float().numpy() for x in inputs.qkv]
    if added is not None:
        arrays.append(added.float().contiguous().numpy())
    parameters = [opset13.parameter(list(x.shape), openvino.Type.f32) for x in arrays]
    node = opset13.scaled_dot_product_attention(*parameters, causal=inputs.causal)
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    settings["PERFORMANCE_HINT"] = "LATENCY"
    model = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", settings)
    request = model.create_infer_request()
    for i, array in enumerate(arrays):
        request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
    precision = model.get_property("INFERENCE_PRECISION_HINT").to_string()

    def run() -> Any:
        assert arrays  # they are shared, not owned, by the request
        return request.infer()

    return Call(
        run,
        lambda _: torch.from_numpy(request.get_output_tensor().data.copy()),
        note=f"in {precision}",
    )


def find_onnxruntime(device: str) -> Peer:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise Missing(f"{error}: pip install onnx onnxruntime") from error
    return Peer("onnxruntime", f"{onnxruntime.__version__}, onnx {onnx.__version__}",
                make_onnxruntime)  # fmt: skip


def find_openvino(device: str) -> Peer:
    try:
        import openvino
    except ImportError as error:
        raise Missing(f"{error}: pip install openvino") from error
    return Peer("openvino", openvino.__version__, make_openvino)


FINDERS = (
    Finder("onnxruntime", ("cpu",), find_onnxruntime),
    Finder("openvino", ("cpu",), find_openvino),
)
