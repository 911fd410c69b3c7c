"""Small models and units of few records, for the tests of private training."""

import math

import torch
from torch import nn

from mutirao.data.tokenization import Example
from mutirao.formats.huggingface import load_causal_lm
from mutirao.train.accountant import PrivacyBudget
from mutirao.tune.config import LoRAConfig
from mutirao.tune.lora import attach_lora


def count_only():
    """A budget that never ends."""
    return PrivacyBudget(math.inf, 1e-5)


def squared_error(model, records):
    """Summed over records (x, y)."""
    x_BI = torch.stack([x for x, _ in records])
    y_B1 = torch.stack([y for _, y in records])
    return ((model(x_BI) - y_B1) ** 2).sum()


def toy_units(num_records=(1, 3, 2, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (torch.randn(3, generator=generator), torch.randn(1, generator=generator))
            for _ in range(num)
        ]
        for num in num_records
    ]


def toy_model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 1)


def language_units():
    """Examples of five units, of one to three each."""
    lengths = ((4, 9), (16,), (7, 12, 3), (5,), (11,))
    units = []
    for number, unit in enumerate(lengths):
        first = 5 + 7 * number
        units.append([Example(tuple(range(first, first + n)), 1 + n % 3) for n in unit])
    return units


def adapted_model(folder, *, freeze_a):
    """The model with LoRA whose B is not zero."""
    model, _ = load_causal_lm(folder, dtype="float32")
    config = LoRAConfig(
        rank=2, alpha=4, target_modules=("q_proj", "down_proj"), num_layers=2, freeze_a=freeze_a
    )
    model = attach_lora(model, config, seed=3)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:  # B begins at zero, where the gradient of A is zero too
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return model
