"""What a token costs, and what the machine could do: FLOPs of the network, peak of matrix multiplication.

Knows the network's shapes; knows nothing of pages. A multiplication with an addition counts as two FLOPs.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.speed.apart import Sample
from copydesk import int8
from copydesk.network import CopydeskModel
from copydesk.predictor import native_bfloat16

TRAINING = 3
"""Forward once, backward twice (arXiv:2001.08361): to the inputs and to the weights."""


def linear_flops(module: nn.Module) -> int:
    """Return what the linear layers below a module cost a row."""
    return sum(2 * part.in_features * part.out_features for part in module.modules() if isinstance(part, nn.Linear))


def text_flops(config: Any, lengths: Iterable[int]) -> float:
    """Return what the text encoder's forward pass costs.

    Args:
        config: with the `hidden_size`, `intermediate_size` and `num_hidden_layers` of a BERT.
        lengths: tokens of each row.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    linear = 2 * layers * width * (4 * width + 2 * config.intermediate_size)
    attention = 4 * layers * width  # scores, weighted values
    return float(sum(length * (linear + attention * length) for length in lengths))


def page_flops(model: CopydeskModel, page_lengths: Iterable[int]) -> float:
    """Return what the page encoders and section heads cost, each section once although windows overlap.

    Args:
        model: the network.
        page_lengths: sections of each page.
    """
    shape = model.shape
    linear = linear_flops(model.page_encoders) + linear_flops(model.section_heads)
    attention = 4 * shape.page_width * shape.page_layers * shape.page_encoders
    return float(sum(length * (linear + attention * min(length, shape.window_sections)) for length in page_lengths))


def peak(sizes: Sequence[int], seconds: float) -> Callable[[], Sample]:
    """Set up the measurement of the matmul peak of each precision: the best that any square size reaches.

    Args:
        sizes: of the square matrices.
        seconds: for each size and type.

    Returns:
        What gives GFLOP/s by precision; bfloat16 and int8 only where the processor multiplies them natively.
    """
    products = {(precision, size): product for size in sizes for precision, product in _products(size).items()}

    def run() -> Sample:
        best: dict[str, float] = defaultdict(float)
        for (precision, size), product in products.items():
            best[precision] = max(best[precision], 2e-9 * size**3 / _fastest(product, seconds))
        return dict(best)

    run()
    return run


def _products(size: int) -> dict[str, Callable[[], object]]:
    """Return what multiplies two square matrices in each precision that the processor knows."""
    matrix = torch.randn(size, size)
    found: dict[str, Callable[[], object]] = {"float32": partial(torch.matmul, matrix, matrix)}
    if native_bfloat16(torch.device("cpu")):
        found["bfloat16"] = partial(torch.matmul, matrix.bfloat16(), matrix.bfloat16())
    if int8.is_native():
        linear = int8.Int8Linear([nn.Linear(size, size)], (-4.0, 4.0))
        found["int8"] = partial(linear, linear.scale.integers(matrix), torch.float32)
    return found


def _fastest(work: Callable[[], object], seconds: float) -> float:
    ends, fastest = time.perf_counter() + seconds, float("inf")
    while (began := time.perf_counter()) < ends or fastest == float("inf"):
        work()
        fastest = min(fastest, time.perf_counter() - began)
    return fastest
