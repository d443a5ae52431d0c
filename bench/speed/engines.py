"""Our predictor with its text encoder on another engine: ONNX Runtime, OpenVINO.

Knows export and engines; knows nothing of what is measured. Pages are split, packed and decoded as ever.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_outputs import BaseModelOutput

from copydesk.encode import collate_pages
from copydesk.predictor import Document, Predictor, tune_malloc
from copydesk.saved import SavedModel, load_saved

Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Token ids and mask (rows, tokens) to hidden states (rows, tokens, width)."""
_INPUTS, _OUTPUT = ("input_ids", "attention_mask"), "hidden"


class Engine(nn.Module):
    """Stands where the text encoder stood."""

    def __init__(self, run: Run, config: Any) -> None:
        super().__init__()
        self.run, self.config = run, config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> BaseModelOutput:
        """Return hidden states."""
        return BaseModelOutput(torch.from_numpy(self.run(input_ids.numpy(), attention_mask.numpy())))


class _Hidden(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def export(encoder: nn.Module, path: Path) -> None:
    """Write a text encoder in float32 as ONNX, rows and tokens free."""
    ids = torch.ones(3, 16, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0  # a mask of ones might be taken for no mask
    free = {0: torch.export.Dim("rows"), 1: torch.export.Dim("tokens")}
    torch.onnx.export(
        _Hidden(encoder).eval(),
        (ids, mask),
        path,
        input_names=_INPUTS,
        output_names=[_OUTPUT],
        dynamo=True,
        dynamic_shapes=(free, free),
        external_data=False,
        verbose=False,
    )


def with_onnx_runtime(model: str) -> Predictor:
    """Return a predictor whose text encoder runs in int8 on ONNX Runtime: weights fixed, activations by call.

    Raises:
        ImportError: the engine is not installed.
    """
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def start(exported: Path) -> Run:
        quantized = exported.with_name("int8.onnx")
        quantize_dynamic(exported, quantized, weight_type=QuantType.QInt8, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
        return lambda ids, mask: session.run([_OUTPUT], dict(zip(_INPUTS, (ids, mask), strict=True)))[0]

    return _predictor(model, start)


def with_openvino(model: str, *, calibration: Sequence[str] = ()) -> Predictor:
    """Return a predictor whose text encoder runs on OpenVINO, in bfloat16 where the processor has it.

    Args:
        model: our model folder.
        calibration: pages by which weights and activations are quantized to int8; without any nothing is.

    Raises:
        ImportError: the engine is not installed.
    """
    import openvino

    def start(exported: Path) -> Run:
        core = openvino.Core()
        graph = core.read_model(exported)
        if calibration:
            graph = _quantized(graph, _inputs(model, calibration))
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            settings["INFERENCE_PRECISION_HINT"] = "bf16"
        request = core.compile_model(graph, "CPU", settings).create_infer_request()
        return lambda ids, mask: request.infer([ids, mask])[0]

    return _predictor(model, start)


def _quantized(graph: object, inputs: Sequence[list[np.ndarray]]) -> object:
    os.environ["NNCF_CI"] = "1"  # else it reports its use to its makers
    import nncf

    dataset = nncf.Dataset(inputs)
    return nncf.quantize(graph, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(inputs))


def _inputs(model: str, pages: Sequence[str]) -> list[list[np.ndarray]]:
    """Return token ids and masks as the text encoder gets them."""
    saved = load_saved(model)
    desk = Predictor(saved, device="cpu", precision="float32")
    encoded = [desk.prepare(Document(page, kind="html")).encoded for page in pages]
    rows = collate_pages(encoded).rows
    pad_id = saved.model.encoder.config.pad_token_id or 0
    return [[x.numpy() for x in rows.take(part).padded(pad_id)] for part in rows.stretches(padded=True)]


def _padded_encoder(saved: SavedModel) -> nn.Module:
    """Return the text encoder as transformers computes it, since ONNX cannot say what ours does without padding."""
    encoder = AutoModel.from_config(AutoConfig.for_model(**saved.model.shape.encoder))
    encoder.pooler = None
    encoder.load_state_dict(saved.model.encoder.state_dict())
    return encoder.float()


def _predictor(model: str, start: Callable[[Path], Run]) -> Predictor:
    tune_malloc()
    saved = load_saved(model)
    with tempfile.TemporaryDirectory() as folder:
        export(_padded_encoder(saved), Path(folder) / "encoder.onnx")
        run = start(Path(folder) / "encoder.onnx")
    desk = Predictor(saved, device="cpu")  # whose page layers compute as ours do
    desk.model.encoder = Engine(run, desk.model.encoder.config)
    return desk
