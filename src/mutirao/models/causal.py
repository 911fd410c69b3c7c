"""A Hugging Face causal model behind the ``LanguageModel`` protocol, on one device.

Sequences are batched by length and the output head is evaluated only at the positions
asked for. Caches, shared prefixes and generation are left to ``inference``.

Measured on 2 cores of an AMD EPYC with AVX512_BF16, SmolLM2-135M, torch 2.13 (2026-11):
bfloat16 scores about 1.8 times as many tokens per second as float32. Without AVX-512 it is
the other way round (``arithmetic``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mutirao.errors import FormatError, InputError
from mutirao.formats.compressed_tensors import is_packed, load_packed
from mutirao.formats.huggingface import Dtype, load_causal_lm
from mutirao.models.arithmetic import fast_dtype
from mutirao.models.batching import group_by_length, pad_sequences
from mutirao.models.head import hidden_states, masked_loss_sum, selected_logprobs, split_model

__all__ = ["CausalModel", "masked_loss_sum"]


class CausalModel:
    """Scores tokens with a transformers model; implements ``LanguageModel``."""

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str = "model", max_batch_tokens: int = 1024
    ) -> None:
        """Wrap a model that is already in memory; it is put into evaluation mode.

        Args:
            model: a causal model, plain or wrapped by PEFT.
            tokenizer: the tokenizer that belongs to it.
            name: what people call it.
            max_batch_tokens: largest padded area of a batch, in tokens.

        Raises:
            FormatError: the tokenizer has no end-of-text token, or the model is of a kind
                that is not supported.
        """
        if tokenizer.eos_token_id is None:
            raise FormatError(
                f"the tokenizer of {name} has no end-of-text token; "
                'name one as "eos_token" in its tokenizer_config.json'
            )
        self.name = name
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens
        self.eos_id = int(tokenizer.eos_token_id)
        self.context_tokens: int | None = getattr(model.config, "max_position_embeddings", None)
        self._decoder, self._head = split_model(model)

    @classmethod
    def open(
        cls, path: Path, dtype: Dtype | None = None, *, max_batch_tokens: int = 1024
    ) -> CausalModel:
        """Read a Hugging Face directory, plain or compressed by ``mutirao.compress``.

        Args:
            path: the model's directory.
            dtype: of the weights in memory, for example 'bfloat16' or 'float32'; None for what
                the processor multiplies fast.
            max_batch_tokens: see ``__init__``.

        Raises:
            FormatError: the directory is no model, is damaged, or is not supported.
        """
        load = load_packed if is_packed(path) else load_causal_lm
        model, tokenizer = load(path, dtype=dtype or fast_dtype())
        return cls(model, tokenizer, name=path.name, max_batch_tokens=max_batch_tokens)

    @property
    def pad_id(self) -> int:
        """Token that fills batches; masked, so that any will do."""
        pad_id = self.tokenizer.pad_token_id
        return self.eos_id if pad_id is None else int(pad_id)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    @torch.inference_mode()
    def token_logprobs(
        self, sequences: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[NDArray[np.float64]]:
        """Score given tokens; see ``LanguageModel.token_logprobs``."""
        if len(sequences) != len(starts):
            raise InputError(
                f"{len(sequences)} sequences came with {len(starts)} starts (expected as many)"
            )
        if any(start < 1 for start in starts):
            raise InputError(f"start={min(starts)} is not accepted (expected at least 1)")
        self._check_lengths(sequences)
        results: list[NDArray[np.float64]] = [np.zeros(0) for _ in sequences]
        wanted = [index for index, ids in enumerate(sequences) if starts[index] < len(ids)]
        for batch in self._batches(sequences, wanted):
            ids_BT, states_BTD = self._run([sequences[index] for index in batch])
            counts = [len(sequences[index]) - starts[index] for index in batch]
            rows = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(counts))
            positions = torch.cat(
                [torch.arange(starts[index], len(sequences[index])) for index in batch]
            )
            targets_N1 = ids_BT[rows, positions][:, None]
            scores_N1 = selected_logprobs(self._head, states_BTD[rows, positions - 1], targets_N1)
            for index, scores in zip(batch, torch.split(scores_N1[:, 0], counts), strict=True):
                results[index] = _to_numpy(scores)
        return results

    @torch.inference_mode()
    def next_token_logprobs(
        self, contexts: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]
    ) -> list[NDArray[np.float64]]:
        """Score tokens that could follow; see ``LanguageModel.next_token_logprobs``."""
        if len(contexts) != len(candidates):
            raise InputError(
                f"{len(contexts)} contexts came with {len(candidates)} lists of candidates "
                "(expected as many)"
            )
        self._check_lengths(contexts)
        results: list[NDArray[np.float64]] = [np.zeros(0) for _ in contexts]
        for batch in self._batches(contexts, range(len(contexts))):
            _, states_BTD = self._run([contexts[index] for index in batch])
            last = torch.tensor([len(contexts[index]) - 1 for index in batch])
            targets_BK, _ = pad_sequences([candidates[index] for index in batch], pad_id=0)
            states_BD = states_BTD[torch.arange(len(batch)), last]
            scores_BK = selected_logprobs(self._head, states_BD, targets_BK.to(states_BD.device))
            for index, scores in zip(batch, scores_BK, strict=True):
                results[index] = _to_numpy(scores[: len(candidates[index])])
        return results

    def _run(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return (B, T) padded ids and (B, T, D) hidden states."""
        ids_BT, mask_BT = pad_sequences(sequences, self.pad_id)
        device = next(self._decoder.parameters()).device
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        return ids_BT, hidden_states(self._decoder, ids_BT, mask_BT)

    def _batches(
        self, sequences: Sequence[Sequence[int]], wanted: Sequence[int]
    ) -> list[list[int]]:
        lengths = [len(sequences[index]) for index in wanted]
        groups = group_by_length(lengths, self.max_batch_tokens)
        return [[wanted[position] for position in group] for group in groups]

    def _check_lengths(self, sequences: Sequence[Sequence[int]]) -> None:
        lengths = [len(sequence) for sequence in sequences]
        if lengths and min(lengths) < 1:
            raise InputError("an empty token sequence came (expected at least one token)")
        if lengths and self.context_tokens is not None and max(lengths) > self.context_tokens:
            raise InputError(
                f"a sequence of {max(lengths)} tokens is too long for {self.name} "
                f"(at most {self.context_tokens}); lower max_tokens"
            )


def _to_numpy(scores: Tensor) -> NDArray[np.float64]:
    result: NDArray[np.float64] = scores.to("cpu", torch.float64).numpy()
    return result
