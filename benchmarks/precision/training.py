"""One run: a trunk at a constant rate, and at each number of tokens a branch that decays.

A branch leaves the trunk after four fifths of its tokens and ends at rate 0 (warm-up, stable,
decay: Hu et al. 2024, arXiv:2404.06395), so that one trunk serves all numbers of tokens. The
trunk's own state at each number is kept as well: what decay changes is among the questions.
Finished checkpoints stay; an interrupted run goes on from its last.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mutirao.train.config import TrainConfig
from mutirao.train.loop import apply_step, autocast, make_optimizer
from mutirao.train.packed import next_token_loss_sum
from precision.family import SIZES, make_model
from precision.text import WINDOW, Text

WINDOWS = 16
"""Of a step."""
STEP_TOKENS = WINDOWS * WINDOW
WARMUP_STEPS = 100
DECAY_SHARE = 0.2
CHECKPOINT_STEPS = 1_000
"""Between states that an interrupted run goes on from."""


@dataclass(frozen=True)
class Run:
    """What is trained."""

    size: str
    seed: int
    num_steps: tuple[int, ...]
    """Lengths of the branches, in steps, rising."""
    train_bits: int | None = None
    """Bits of the weights in forward passes (straight-through); None for full precision."""
    compute_dtype: str = "auto"

    @property
    def name(self) -> str:
        bits = f"-w{self.train_bits}" if self.train_bits else ""
        return f"d{self.size}-s{self.seed}{bits}"

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(
            learning_rate=SIZES[self.size].learning_rate,
            tokens_per_step=STEP_TOKENS,
            max_tokens_per_example=WINDOW,
            weight_decay=0.1,
            beta2=0.98,
            compute_dtype=self.compute_dtype,  # type: ignore[arg-type]
        )


def checkpoint(folder: Path, run: Run, num_steps: int, *, is_decayed: bool) -> Path:
    """Return where a branch's end, or the trunk's state beside it, is kept."""
    return folder / run.name / f"{num_steps}-{'decayed' if is_decayed else 'stable'}.pt"


def train_run(
    folder: Path, run: Run, text: Text, on_step: Callable[[int], None] | None = None
) -> Iterator[tuple[int, bool, Path]]:
    """Train what is missing; yield (steps, is decayed, checkpoint) as each is there."""
    (folder / run.name).mkdir(parents=True, exist_ok=True)
    model = make_model(SIZES[run.size], run.seed)
    trunk = _Trunk(folder / run.name / "trunk.pt", model, run)
    for num_steps in run.num_steps:
        leave = round(num_steps * (1 - DECAY_SHARE))
        ends = checkpoint(folder, run, num_steps, is_decayed=True)
        if not ends.is_file():
            trunk.advance(leave, text, on_step)
            state = trunk.copy()
            for step in range(leave, num_steps):
                rate = (num_steps - step - 0.5) / (num_steps - leave)
                trunk.step(step, rate, text)
                if on_step is not None:
                    on_step(step)
            save(trunk.model.state_dict(), ends)
            trunk.restore(state)
        yield num_steps, True, ends
        stable = checkpoint(folder, run, num_steps, is_decayed=False)
        if not stable.is_file():
            trunk.advance(num_steps, text, on_step)
            save(trunk.model.state_dict(), stable)
        yield num_steps, False, stable


def save(state: Any, path: Path) -> None:
    """Write beside the target, then rename."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


class _Trunk:
    """A model, its optimizer and how far they are."""

    def __init__(self, path: Path, model: Any, run: Run) -> None:
        self.path, self.model, self.run, self.done = path, model, run, 0
        state = None
        if path.is_file():
            kept = torch.load(path)
            model.load_state_dict(kept["model"])
            state, self.done = kept["optimizer"], kept["done"]
        self.parameters, self.optimizer = make_optimizer(model, run.config, state, fused=True)

    def advance(self, to: int, text: Text, on_step: Callable[[int], None] | None) -> None:
        if self.done > to:
            raise SystemExit(f"{self.path} is past step {to}: delete its folder and start again")
        while self.done < to:
            self.step(self.done, min(1.0, (self.done + 1) / WARMUP_STEPS), text)
            self.done += 1
            if self.done % CHECKPOINT_STEPS == 0 or self.done == to:
                save({**self.copy(), "done": self.done}, self.path)
            if on_step is not None:
                on_step(self.done)

    def step(self, number: int, rate_share: float, text: Text) -> None:
        run = self.run
        ids_BT = text.training(WINDOWS, run.seed, number)
        self.model.train()
        with rounded_weights(self.model, run.train_bits), autocast(self.model, run.config):
            loss = next_token_loss_sum(self.model, ids_BT) / STEP_TOKENS
        loss.backward()
        rate = run.config.learning_rate * rate_share
        apply_step(self.parameters, self.optimizer, rate, run.config)

    def copy(self) -> dict[str, Any]:
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        clone: dict[str, Any] = _clone(parts)
        return clone

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _clone(each) for key, each in value.items()}
    return [_clone(each) for each in value] if isinstance(value, list) else value


@contextmanager
def rounded_weights(model: Any, bits: int | None) -> Iterator[None]:
    """Let blocks multiply by weights rounded per channel; gradients pass as if they were not."""
    handles = []
    if bits is not None:
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                handles.append(_replace_forward(module, bits))
    try:
        yield
    finally:
        for module in handles:
            del module.forward


def _replace_forward(module: nn.Linear, bits: int) -> nn.Linear:
    highest = 2 ** (bits - 1) - 1

    def forward(x: Tensor) -> Tensor:
        weight = module.weight
        step = weight.detach().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / highest
        rounded = (weight.detach() / step).round() * step
        return nn.functional.linear(x, weight + (rounded - weight).detach(), module.bias)

    module.forward = forward  # type: ignore[method-assign]
    return module
