"""The model that NVFlare's server starts from: the benchmark's tensors, and no more."""

from __future__ import annotations

import torch
from aggregator_task import make_tensor, shapes_of


class Model(torch.nn.Module):
    """Tensors by name."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.size = size
        for name, shape in shapes_of(size).items():
            values = torch.from_numpy(make_tensor(name, shape, 0))
            self.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))
