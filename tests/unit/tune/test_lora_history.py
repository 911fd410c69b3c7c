"""A history beside a model: the same outputs as weights that hold it, on any kind of weight."""

import pytest
import torch
from torch import nn

from mutirao.errors import FormatError, ShapeError
from mutirao.formats.huggingface import load_causal_lm
from mutirao.tune.config import LoRAConfig
from mutirao.tune.lora import adapter_state, attach_lora, frozen_sha256
from mutirao.tune.lora_history import clear_history, merge_history, set_history

CONFIG = LoRAConfig(
    rank=2, alpha=4, target_modules=("q_proj", "down_proj"), num_layers=1, freeze_a=False
)
IDS = torch.arange(1, 13).reshape(1, -1)


@pytest.fixture
def adapted(tiny_model_directory):
    model, _ = load_causal_lm(tiny_model_directory, dtype="float32")
    return attach_lora(model, CONFIG, seed=3).eval()


def _history(model, rank=3, size=0.3):
    torch.manual_seed(0)
    state = adapter_state(model)
    return {
        name.removesuffix(".lora_A.default.weight"): (
            size * torch.randn(state[name.replace("lora_A", "lora_B")].shape[0], rank),
            size * torch.randn(rank, values.shape[1]),
        )
        for name, values in state.items()
        if "lora_A" in name
    }


def _logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_second_path_is_as_merged_weights(adapted):
    before, history = _logits(adapted), _history(adapted)
    names, digest = list(adapted.state_dict()), frozen_sha256(adapted)
    set_history(adapted, history)
    beside = _logits(adapted)
    assert list(adapted.state_dict()) == names
    assert frozen_sha256(adapted) == digest
    clear_history(adapted)
    assert torch.equal(_logits(adapted), before)
    merge_history(adapted, history)
    assert (beside - before).abs().max() > 1e-2
    torch.testing.assert_close(beside, _logits(adapted), rtol=1e-4, atol=1e-5)


def test_history_is_replaced_not_piled_up_and_rank_zero_adds_nothing(adapted):
    before, history = _logits(adapted), _history(adapted)
    set_history(adapted, history)
    once = _logits(adapted)
    set_history(adapted, history)
    assert torch.equal(_logits(adapted), once)
    set_history(adapted, {n: (b[:, :0], a[:0]) for n, (b, a) in history.items()})
    assert torch.equal(_logits(adapted), before)


def test_only_the_adapter_learns_beside_a_history(adapted):
    history = _history(adapted)
    kept = {name: (b.clone(), a.clone()) for name, (b, a) in history.items()}
    names = list(adapter_state(adapted))
    set_history(adapted, history)
    assert list(adapter_state(adapted)) == names
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    assert all(torch.equal(history[n][k], kept[n][k]) for n in kept for k in (0, 1))


class FourBit(nn.Module):
    """A layer whose weight is packed codes, as those of 4-bit bases are."""

    def __init__(self, weight):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.step = weight.abs().max() / 7
        codes = (weight / self.step).round().to(torch.int8) + 8
        packed = (codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def dense(self):
        high, low = self.weight // 16, self.weight % 16
        return (torch.stack([high, low], -1).flatten(1).float() - 8) * self.step

    def forward(self, x):
        return (x.float() @ self.dense().T).to(x.dtype)


def test_packed_weights_take_a_second_path_and_refuse_to_be_merged():
    torch.manual_seed(1)
    model = nn.Sequential(FourBit(torch.randn(6, 8)))
    b, a, x = torch.randn(6, 2), torch.randn(2, 8), torch.randn(3, 8)
    set_history(model, {"0": (b, a)})
    torch.testing.assert_close(model(x), x @ (model[0].dense() + b @ a).T)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(FormatError, match=r"torch\.uint8 and cannot take a history"):
        merge_history(model, {"0": (b, a)})


def test_what_does_not_fit_changes_nothing(adapted):
    before, history = _logits(adapted), _history(adapted)
    name, (b, a) = next(iter(history.items()))
    for bad in ({"elsewhere": (b, a)}, {name: (b[:-1], a)}, {name: (b[:, :1], a)}):
        with pytest.raises(ShapeError, match="history"):
            set_history(adapted, {**history, **bad})
        with pytest.raises(ShapeError, match="history"):
            merge_history(adapted, {**history, **bad})
    assert torch.equal(_logits(adapted), before)
    with pytest.raises(FormatError, match="bfloat16"):
        merge_history(adapted.bfloat16(), history)
