"""The engine: text out of a model, in as much memory as it is given.

    engine = Engine.open("model.gguf", memory="600MB")
    print(engine.generate("The capital of Portugal is").text)

The first opening builds the weight store (once per model, in the cache); with less memory than
the model, it also calibrates the draft. Memory means the peak of the whole process. Imports
neither PyTorch nor transformers, except where there is no native kernel.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import resource
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mutirao.environment import release_memory
from mutirao.errors import InputError, MissingKernelError
from mutirao.inference.architecture.program import compile_program
from mutirao.inference.calibration import TEXT, Calibration, calibrate
from mutirao.inference.conversation import Generation, Message
from mutirao.inference.decoding import Backend, Counts, Decoder
from mutirao.inference.native.backend import NativeBackend, Placement
from mutirao.inference.native.library import load_library
from mutirao.inference.planning.placement import Choice, multiplied, only_looked_up
from mutirao.inference.planning.planner import (
    ALL_RESIDENT,
    LOOKUP_ROWS,
    PINNED,
    PREFILL_TOKENS,
    SPECULATION,
    Plan,
    Plans,
    TooLittleMemoryError,
    all_resident,
    make_plans,
)
from mutirao.inference.planning.probe import probe
from mutirao.inference.sampling import Sampling
from mutirao.inference.sizes import parse_size
from mutirao.inference.speculation import PassTimes
from mutirao.inference.store.weight_store import WeightStore
from mutirao.inference.text.text_stream import Detokenizer, until_stop
from mutirao.inference.text.tokenizer import Tokenizer

Speculation = Literal["auto", "on", "off"]

DEFAULT_CONTEXT = 2048
CALIBRATION_TOKENS = 104
START_SPREAD_BYTES = 1_000_000
"""By which this process's size when it has started may differ the next time (measured: 0.3 MB)."""
SLACK_BYTES = 14 << 20
"""Left for what Python and the C library need while generating (measured: 6 to 12 MB)."""


@dataclass
class _Opened:
    """What an engine was opened with."""

    choice: Choice
    placement: Placement
    has_draft: bool
    plan: str
    predicted_tokens_per_s: float | None = None
    memory: dict[str, int] = field(default_factory=dict)


class Engine:
    """A model ready to write; close it, or use it as a context manager."""

    def __init__(
        self, store: WeightStore, backend: Backend, tokenizer: Tokenizer, opened: _Opened
    ) -> None:
        """Use ``Engine.open``."""
        self.store, self.backend, self.tokenizer, self.opened = store, backend, tokenizer, opened
        self.name = store.directory.name
        speculates = opened.placement.max_logit_rows > 1
        self.decoder = Decoder(
            backend,
            times=PassTimes(0.03, 0.1, 0.01),
            max_draft=opened.placement.max_logit_rows - 1 if speculates else 0,
            has_draft=opened.has_draft,
        )
        self._counts = Counts()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        memory: int | str | None = None,
        threads: int | None = None,
        context: int | None = None,
        speculation: Speculation = "auto",
        direct: bool = True,
    ) -> Engine:
        """Open a model: build its store if need be, plan, and load what is to be resident.

        Args:
            path: a GGUF file, a Hugging Face directory, or a weight store.
            memory: peak of the whole process, in bytes or as '600MB'; None: as much as the
                model takes.
            threads: to compute with; None: all cores.
            context: most tokens of prompt and answer; None: the model's own, up to 2048.
            speculation: "off": one pass for each token; "on": drafts even where all is
                resident; "auto": drafts where weights are streamed.
            direct: read past the page cache.

        Raises:
            InputError: a setting is out of range, or the memory is too small; the message says
                the least that works.
            FormatError: the model is damaged, or of a kind that is not supported.
            InferenceError: no kernel, no memory, or the store cannot be read.
        """
        if isinstance(memory, str):
            memory = parse_size(memory)
        _check_settings(memory, threads, context, speculation)
        store = WeightStore.open_or_build(Path(path))
        tokenizer = Tokenizer.open(store.directory)
        threads = threads or os.cpu_count() or 1
        limit = min(store.spec.context_length, context or DEFAULT_CONTEXT)
        try:
            load_library()
        except MissingKernelError as error:
            if memory is not None:
                raise
            return cls._through_oracle(store, tokenizer, limit, error)
        opened = _plan(store, tokenizer, memory, threads, limit, speculation, direct)
        gc.collect()
        return cls(store, NativeBackend(store, opened.placement), tokenizer, opened)

    @classmethod
    def _through_oracle(
        cls, store: WeightStore, tokenizer: Tokenizer, context: int, reason: MissingKernelError
    ) -> Engine:
        """Run in plain PyTorch, with four bytes for each weight; slow, and told."""
        from mutirao.console import console
        from mutirao.inference.reference import ReferenceBackend

        console.print(f"in plain PyTorch, slowly: {reason}", style="dim")
        choice = Choice({}, sum(each.num_bytes for each in store.tensors.values()), 0)
        opened = _Opened(choice, Placement(context=context), False, "in plain PyTorch")
        return cls(store, ReferenceBackend(store), tokenizer, opened)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all memory back."""
        self.backend.close()

    @property
    def has_chat_template(self) -> bool:
        """Say whether the model takes messages; a plain prompt always works."""
        return self.tokenizer.has_chat_template

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.opened.placement.context

    def generate_tokens(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        counts: Counts | None = None,
    ) -> Generator[int, None, None]:
        """Yield token ids after a prompt, the one that ends the text included.

        Args:
            prompt_ids: token ids, at least one.
            max_new_tokens: at most so many.
            sampling: greedy where None.
            counts: added to as tokens come.

        Raises:
            InputError: the prompt is empty or does not fit into the context.
        """
        self._check_length(len(prompt_ids))
        num = min(max_new_tokens, self.context - len(prompt_ids))
        tokens = self.decoder.generate(
            list(prompt_ids), num, sampling or Sampling(), counts or Counts()
        )
        for token in tokens:
            yield token
            if token in self.tokenizer.eos_ids:
                return

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> TextStream:
        """Generate text piece by piece.

        Args:
            prompt: text to go on from as it is, or messages, to which the model's chat template
                is applied.
            max_new_tokens: tokens to generate at most.
            temperature: 0 takes the most probable token; above, tokens are drawn.
            top_p: draw among the fewest tokens that together have this probability.
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
        sampling = Sampling(temperature, top_p, seed=seed)
        prompt_ids = self.encode_prompt(prompt)
        self._check_length(len(prompt_ids))
        return TextStream(self, prompt_ids, max_new_tokens, sampling, stop)

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Generation:
        """Generate a whole text; see ``stream`` for arguments and errors."""
        with self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
        ) as stream:
            text = "".join(stream)
        return stream.finish(text)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Turn text, or messages through the chat template, into token ids.

        Raises:
            InputError: it is empty, or the model takes no messages.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif not self.has_chat_template:
            raise InputError(
                f"{self.name} has no chat template and takes no messages; "
                "give it a plain prompt to go on from"
            )
        else:
            messages = [dict(message) for message in prompt]
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
            ids = self.tokenizer.encode(text, special=False)
        if not ids:
            raise InputError("the prompt is empty (expected some text)")
        return ids

    def statistics(self) -> dict[str, Any]:
        """Return what the engine holds and has read, as plain values."""
        return {
            "plan": self.opened.plan,
            "kernels": self.backend.kernels,
            "resident_bytes": self.opened.choice.resident_bytes,
            "streamed_bytes_per_pass": self.opened.choice.streamed_bytes,
            "bytes_read": self.backend.bytes_read,
            "wait_s": self.backend.wait_s,
            "memory": self.opened.memory,
            "peak_memory_bytes": peak_memory_bytes(),
            "op_seconds": self.backend.op_seconds(),
        }

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens >= self.context:
            raise InputError(
                f"the prompt has {num_tokens} tokens, too long for {self.name} "
                f"(at most {self.context - 1}); shorten it, or raise --context"
            )


class TextStream(Iterator[str]):
    """Pieces of text as they are generated; also a context manager."""

    def __init__(
        self,
        engine: Engine,
        prompt_ids: list[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
    ) -> None:
        """Use ``Engine.stream``, which checks the arguments."""
        self._engine, self._counts = engine, Counts()
        self._started_s = time.perf_counter()
        self._times_s: list[float] = []
        self._bytes_at_first = 0
        self._tokens = engine.generate_tokens(
            prompt_ids, max_new_tokens=max_new_tokens, sampling=sampling, counts=self._counts
        )
        self._text = self._decode(prompt_ids)
        self._pieces = until_stop(self._text, stop)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating."""
        self._text.close()
        self._tokens.close()

    def finish(self, text: str) -> Generation:
        """Describe the generation once it has ended.

        Args:
            text: its pieces, joined.
        """
        times_s = self._times_s or [time.perf_counter()]
        num_tokens, seconds = len(self._times_s), times_s[-1] - self._started_s
        after_first_s = times_s[-1] - times_s[0]
        is_timed = num_tokens > 1 and after_first_s > 0
        num_after = max(num_tokens - 1, 1)
        return Generation(
            text=text,
            num_tokens=num_tokens,
            seconds=seconds,
            time_to_first_token_s=times_s[0] - self._started_s,
            tokens_per_s=(num_tokens - 1) / after_first_s if is_timed else num_tokens / seconds,
            bytes_read_per_token=(self._engine.backend.bytes_read - self._bytes_at_first)
            / num_after,
            acceptance=self._counts.acceptance,
            peak_memory_bytes=peak_memory_bytes(),
            predicted_tokens_per_s=self._engine.opened.predicted_tokens_per_s,
            plan=self._engine.opened.plan,
        )

    def _decode(self, prompt_ids: Sequence[int]) -> Generator[str, None, None]:
        detokenizer = Detokenizer(self._engine.tokenizer, prompt_ids)
        for token in self._tokens:
            self._times_s.append(time.perf_counter())
            if len(self._times_s) == 1:
                self._bytes_at_first = self._engine.backend.bytes_read
            if piece := detokenizer.push([token]):
                yield piece
        if piece := detokenizer.finish():
            yield piece


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process, in bytes.

    Not from ``getrusage``: to a child it gives its parent's peak, if that was larger.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory_bytes() -> int:
    """Return the resident memory of this process now, in bytes, once what is free is given back."""
    release_memory()  # what building and calibrating left
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _check_settings(
    memory: int | None, threads: int | None, context: int | None, speculation: str
) -> None:
    for name, value in (("memory", memory), ("threads", threads), ("context", context)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value} is not accepted (expected 1 or more)")
    if speculation not in ("auto", "on", "off"):
        raise InputError(f"speculation={speculation!r} is not accepted (expected auto, on or off)")


def _plan(
    store: WeightStore,
    tokenizer: Tokenizer,
    memory: int | None,
    threads: int,
    context: int,
    speculation: Speculation,
    direct: bool,
) -> _Opened:
    """Decide what is resident within the memory, and whether to draft."""
    if memory is None:
        return _all_resident(store, threads, context, speculation, direct)
    calibration = None
    model = (probe(store.directory, threads), store.spec, store.tensors, memory)
    process_bytes = resident_memory_bytes() + SLACK_BYTES
    looks_up = speculation != "off"
    settings: dict[str, Any] = {"context": context, "looks_up": looks_up}
    try:
        plans = make_plans(*model, process_bytes=process_bytes, **settings)
    except TooLittleMemoryError as error:
        least_bytes = error.least_bytes + START_SPREAD_BYTES
        raise TooLittleMemoryError(memory, least_bytes, context) from None
    if looks_up and any(plan.name == SPECULATION for plan in plans.plans):
        calibration = _calibration(store, tokenizer, threads, direct)
        process_bytes = resident_memory_bytes() + SLACK_BYTES
        plans = make_plans(*model, process_bytes=process_bytes, calibration=calibration, **settings)
    plan = _wanted(plans, speculation)
    placement = dataclasses.replace(plan.placement, direct=direct and plan.placement.direct)
    words = f"{plan.name}: {plan.choice.resident_bytes / 1e6:.0f} MB of weights resident"
    if plan.choice.streamed_bytes:
        words += f", {plan.choice.streamed_bytes / 1e6:.0f} MB streamed per pass"
    return _Opened(
        plan.choice,
        placement,
        plan.name == SPECULATION,
        words,
        plan.prediction.tokens_per_s,
        dataclasses.asdict(plan.memory),
    )


def _wanted(plans: Plans, speculation: Speculation) -> Plan:
    """Return the fastest plan that fits and that the setting allows."""
    fitting = [plan for plan in plans.plans if plan.fits]
    if speculation == "off":
        fitting = [plan for plan in fitting if plan.name != SPECULATION]
    elif speculation == "on":
        fitting = [plan for plan in fitting if plan.name != PINNED] or fitting
    return max(fitting, key=lambda plan: plan.prediction.tokens_per_s)


def _all_resident(
    store: WeightStore, threads: int, context: int, speculation: Speculation, direct: bool
) -> _Opened:
    """Keep all weights in memory, whatever that takes."""
    program = compile_program(store.spec)
    lookups = only_looked_up(program, store.tensors)
    choice = all_resident(multiplied(program, store.tensors), lookups, joined=True)
    placement = Placement(
        choice.resident,
        joined=True,
        num_threads=threads,
        direct=direct,
        max_tokens=min(PREFILL_TOKENS, context),
        max_logit_rows=1 if speculation == "off" else LOOKUP_ROWS,
        context=context,
    )
    return _Opened(choice, placement, False, ALL_RESIDENT)


def _calibration(
    store: WeightStore, tokenizer: Tokenizer, threads: int, direct: bool
) -> Calibration:
    calibration = Calibration.load(store.directory)
    if calibration is None:
        from mutirao.console import console, part_progress

        tokens = tokenizer.encode(TEXT)[:CALIBRATION_TOKENS]
        # A bar is not shown where nobody looks; that it takes a while is told in any case.
        console.print("calibrating the draft, once", style="dim")
        with part_progress("calibrating") as tell:
            calibration = calibrate(
                store, tokens, num_threads=threads, direct=direct, progress=tell
            )
        calibration.save(store.directory)
    return calibration
