"""Generate text through transformers: for models that the engine does not know.

Generation runs in a thread of its own and hands its pieces over as they come; whoever
stops reading stops it. The whole model is in memory, a compressed one expanded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from mutirao.errors import InputError
from mutirao.formats.huggingface import Dtype
from mutirao.inference.conversation import Generation, Message
from mutirao.inference.text.text_stream import until_stop
from mutirao.models.causal import CausalModel


class TextGenerator:
    """A model that writes."""

    def __init__(self, model: CausalModel) -> None:
        """Use a model that is already in memory."""
        self.model = model

    @classmethod
    def open(cls, path: Path, dtype: Dtype | None = None) -> TextGenerator:
        """Read a model directory, plain or compressed.

        Raises:
            FormatError: the directory is no model, is damaged, or is not supported.
        """
        return cls(CausalModel.open(path, dtype=dtype))

    @property
    def has_chat_template(self) -> bool:
        """Say whether the model takes messages; a plain prompt always works."""
        return bool(self.model.tokenizer.chat_template)

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> TextStream:
        """Generate text piece by piece.

        Args:
            prompt: text to go on from as it is, or messages, to which the tokenizer's chat
                template is applied.
            max_new_tokens: tokens to generate at most.
            temperature: 0 takes the most probable token; above, tokens are drawn.
            seed: of the draws.
            stop: generation ends before the first of these texts.

        Returns:
            An iterator of pieces of text; closing it, or leaving its ``with`` block, stops
            generation.

        Raises:
            InputError: the prompt is empty or too long, a setting is out of range, or the
                model takes no messages.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens={max_new_tokens} is not accepted (expected >= 1)")
        if not 0 <= temperature <= 100:
            raise InputError(f"temperature={temperature} is not accepted (expected 0 to 100)")
        prompt_ids = self._encode_prompt(prompt)
        limit = self.model.context_tokens
        if limit is not None:
            if len(prompt_ids) >= limit:
                raise InputError(
                    f"the prompt has {len(prompt_ids)} tokens, too long for {self.model.name} "
                    f"(at most {limit - 1}); shorten it"
                )
            max_new_tokens = min(max_new_tokens, limit - len(prompt_ids))
        return TextStream(self.model, prompt_ids, max_new_tokens, temperature, seed, stop)

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Generate a whole text; see ``stream`` for arguments and errors."""
        with self.stream(
            prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=stop
        ) as stream:
            text = "".join(stream)
        return stream.finish(text)

    def _encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        tokenizer = self.model.tokenizer
        if not isinstance(prompt, str):
            if not self.has_chat_template:
                raise InputError(
                    f"{self.model.name} has no chat template and takes no messages; "
                    "give it a plain prompt to go on from"
                )
            prompt = str(
                tokenizer.apply_chat_template(
                    [dict(message) for message in prompt],
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
        prompt_ids = self.model.encode(prompt)
        if not prompt_ids:
            raise InputError("the prompt is empty (expected some text)")
        return prompt_ids


class TextStream(Iterator[str]):
    """Pieces of text from a generation that runs in a thread; also a context manager."""

    def __init__(
        self,
        model: CausalModel,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop: Sequence[str],
    ) -> None:
        """Start generating; ``TextGenerator.stream`` checks the arguments."""
        self._stop_asked = threading.Event()
        self._error: BaseException | None = None
        self._streamer = _CountingStreamer(model.tokenizer)
        self._pieces = until_stop(self._streamer, stop)
        self._started_s = time.perf_counter()
        self._thread = threading.Thread(
            target=self._run,
            args=(model, prompt_ids, _generation_config(model, max_new_tokens, temperature), seed),
            name="mutirao-generate",
            daemon=True,
        )
        self._thread.start()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._stop_asked.set()

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            self.close()
            if self._error is not None:
                error, self._error = self._error, None
                raise error from None
            raise

    def close(self) -> None:
        """Stop generating and wait until the thread has ended."""
        self._stop_asked.set()
        self._thread.join()

    def finish(self, text: str) -> Generation:
        """Describe the generation once it has ended.

        Args:
            text: its pieces, joined.
        """
        times_s = self._streamer.token_times_s or [time.perf_counter()]
        num_tokens = len(self._streamer.token_times_s)
        seconds = times_s[-1] - self._started_s
        after_first_s = times_s[-1] - times_s[0]
        if num_tokens > 1 and after_first_s > 0:
            tokens_per_s = (num_tokens - 1) / after_first_s
        else:
            tokens_per_s = num_tokens / seconds
        return Generation(text, num_tokens, seconds, times_s[0] - self._started_s, tokens_per_s)

    def _run(
        self, model: CausalModel, prompt_ids: Sequence[int], config: GenerationConfig, seed: int
    ) -> None:
        try:
            ids_BT = torch.tensor([list(prompt_ids)], device=model.model.device)
            # Draws come from the seed alone, and leave the caller's random state as it was.
            with torch.random.fork_rng(devices=[]), torch.inference_mode():
                torch.manual_seed(seed)
                model.model.generate(
                    input_ids=ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    generation_config=config,
                    streamer=self._streamer,
                    stopping_criteria=StoppingCriteriaList([_StopWhenAsked(self._stop_asked)]),
                )
        except BaseException as error:  # handed to the reading thread, whatever it is
            self._error = error
        finally:
            self._streamer.end()


class _CountingStreamer(TextIteratorStreamer):  # type: ignore[misc]
    """Decodes tokens as they come, and notes when each came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.token_times_s: list[float] = []
        self._has_ended = False

    def put(self, value: Any) -> None:
        if not self.next_tokens_are_prompt:
            self.token_times_s.append(time.perf_counter())
        super().put(value)

    def end(self) -> None:
        # transformers ends the stream itself, but not when it fails.
        if not self._has_ended:
            self._has_ended = True
            super().end()


class _StopWhenAsked(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, stop_asked: threading.Event) -> None:
        self._stop_asked = stop_asked

    def __call__(self, input_ids: Any, scores: Any, **settings: Any) -> Any:
        shape, device = input_ids.shape[:1], input_ids.device
        return torch.full(shape, self._stop_asked.is_set(), dtype=torch.bool, device=device)


def _generation_config(
    model: CausalModel, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    own = getattr(model.model, "generation_config", None)
    eos = getattr(own, "eos_token_id", None)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=model.eos_id if eos is None else eos,
        pad_token_id=model.pad_id,
        **sampling,
    )
