from __future__ import annotations

import numpy as np
import pytest
import torch

from mutirao.errors import FormatError, InputError
from mutirao.formats.huggingface import load_causal_lm
from mutirao.models import head as head_module
from mutirao.models.batching import pad_sequences
from mutirao.models.causal import CausalModel, masked_loss_sum
from mutirao.models.protocol import LanguageModel

SEQUENCES = [[5, 6, 7, 8, 9, 10], [11, 12], [40, 41, 42, 43], [7], [9, 8, 7, 6, 5, 4, 3, 2]]
STARTS = [1, 1, 3, 1, 5]


@pytest.fixture(scope="module")
def causal(tiny_model_directory):
    return CausalModel.open(tiny_model_directory, dtype="float32", max_batch_tokens=16)


def full_logprobs(model, ids):
    """Plain computation: one sequence, all logits, float64 softmax."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double()
    return torch.log_softmax(logits, dim=-1).numpy()


def test_it_is_a_language_model(causal):
    assert isinstance(causal, LanguageModel)
    assert causal.name == "tiny"
    text = "Olá, fever!"
    assert causal.tokenizer.decode(causal.encode(text)) == text


def test_token_logprobs_agree_with_full_logits_one_by_one(causal):
    results = causal.token_logprobs(SEQUENCES, STARTS)
    for ids, start, result in zip(SEQUENCES, STARTS, results, strict=True):
        full = full_logprobs(causal.model, ids)
        expected = [full[t - 1, ids[t]] for t in range(start, len(ids))]
        assert result.dtype == np.float64
        np.testing.assert_allclose(result, expected, atol=2e-5)
    assert len(results[3]) == 0


def test_next_token_logprobs_agree_with_full_logits(causal):
    candidates = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], []]
    results = causal.next_token_logprobs(SEQUENCES, candidates)
    for ids, options, result in zip(SEQUENCES, candidates, results, strict=True):
        np.testing.assert_allclose(result, full_logprobs(causal.model, ids)[-1, options], atol=2e-5)


def test_chunks_of_the_head_leave_no_seam(causal, monkeypatch):
    whole = causal.token_logprobs(SEQUENCES, STARTS)
    monkeypatch.setattr(head_module, "ROWS_PER_CHUNK", 3)
    for one, other in zip(whole, causal.token_logprobs(SEQUENCES, STARTS), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("sequences", "starts", "message"),
    [
        ([[1, 2]], [0], "start=0"),
        ([[]], [1], "empty"),
        ([list(range(129))], [1], "at most 128"),
        ([[1, 2]], [1, 1], "1 sequences came with 2 starts"),
    ],
)
def test_bad_requests_are_refused(causal, sequences, starts, message):
    with pytest.raises(InputError, match=message):
        causal.token_logprobs(sequences, starts)


def test_nothing_asked_gives_nothing(causal):
    assert causal.token_logprobs([], []) == []
    assert causal.next_token_logprobs([], []) == []


def _plain_loss(model, ids, mask, loss_mask):
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    return (losses * loss_mask[:, 1:]).sum()


def _batch():
    ids, mask = pad_sequences(SEQUENCES, pad_id=2)
    loss_mask = mask.bool()
    loss_mask[0, :3] = False
    loss_mask[4, 2] = False
    return ids, mask, loss_mask


def _peft(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def test_masked_loss_and_gradients_agree_with_full_logits_through_peft(
    tiny_model_directory, monkeypatch
):
    monkeypatch.setattr(head_module, "ROWS_PER_CHUNK", 4)
    model = _peft(load_causal_lm(tiny_model_directory, dtype="float32")[0])
    trained = [p for p in model.parameters() if p.requires_grad]
    ids, mask, loss_mask = _batch()
    expected = _plain_loss(model, ids, mask, loss_mask)
    expected_gradients = torch.autograd.grad(expected / 7, trained)
    loss = masked_loss_sum(model, ids, mask, loss_mask)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for got, want in zip(torch.autograd.grad(loss / 7, trained), expected_gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_masked_loss_under_autocast_stays_near_float32(tiny_model_directory):
    model = _peft(load_causal_lm(tiny_model_directory, dtype="bfloat16")[0])
    ids, mask, loss_mask = _batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_loss_sum(model, ids, mask, loss_mask)
    loss.backward()
    expected = _plain_loss(model.float(), ids, mask, loss_mask)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=0.02)


def test_masked_loss_trains_a_head_that_is_not_frozen(tiny_model_directory):
    model = load_causal_lm(tiny_model_directory, dtype="float32")[0]
    ids, mask, loss_mask = _batch()
    _plain_loss(model, ids, mask, loss_mask).backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    masked_loss_sum(model, ids, mask, loss_mask).backward()
    torch.testing.assert_close(model.lm_head.weight.grad, expected, atol=1e-4, rtol=1e-4)


def test_masked_loss_of_nothing_is_zero(tiny_model_directory):
    model = _peft(load_causal_lm(tiny_model_directory, dtype="float32")[0])
    ids, mask, _ = _batch()
    loss = masked_loss_sum(model, ids, mask, torch.zeros_like(mask))
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_models_that_change_their_logits_are_refused(tiny_model_directory):
    model, tokenizer = load_causal_lm(tiny_model_directory, dtype="float32")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(FormatError, match=r"final_logit_softcapping=30\.0"):
        CausalModel(model, tokenizer)


def test_a_tokenizer_without_an_end_is_refused(tiny_model_directory):
    model, tokenizer = load_causal_lm(tiny_model_directory, dtype="float32")
    tokenizer.eos_token = None
    with pytest.raises(FormatError, match="no end-of-text token"):
        CausalModel(model, tokenizer)
