"""The thread that generates, one text at a time, and the bounded queue before it.

An engine reads its weights for one text at a time: two at once would only take turns. So
requests wait in line, and one too many is refused at once instead of waiting for ever. Whoever
leaves gives up the place, in the line or in mid-text.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from mutirao.errors import InputError, MutiraoError
from mutirao.serve.engine import TextEngine
from mutirao.serve.reply import ApiError, FinishReason, Usage
from mutirao.serve.request import TextRequest

RETRY_AFTER_S = 5
"""Told to those who are refused; a guess, for answers take seconds to minutes."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Started:
    """The prompt is accepted; text follows."""

    prompt_tokens: int


@dataclass(frozen=True)
class Ended:
    """The text is complete."""

    finish_reason: FinishReason
    usage: Usage


Event = Started | str | Ended
"""What comes of a job, in order: its start, pieces of text, its end."""


class Job:
    """A request on its way; its events are read by the event loop that made it."""

    def __init__(self, request: TextRequest, worker: Worker) -> None:
        """Use ``Worker.submit``."""
        self.request = request
        self.is_cancelled = threading.Event()
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | ApiError | None] = asyncio.Queue()

    async def next_event(self) -> Event | None:
        """Wait for what comes next; None: the job was cancelled.

        Raises:
            ApiError: the request is refused, or generation failed.
        """
        event = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        return event

    def cancel(self) -> None:
        """Give the place up; harmless when the job has ended."""
        self.is_cancelled.set()
        self._worker.forget(self)
        self.post(None)

    def post(self, event: Event | ApiError | None) -> None:
        """Hand an event to the loop, from any thread."""
        with suppress(RuntimeError):  # the loop has ended, and with it whoever would read
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Worker:
    """Runs jobs one after the other on a thread of its own."""

    def __init__(self, engine: TextEngine, *, max_waiting: int) -> None:
        """Start the thread.

        Args:
            engine: used by this thread alone.
            max_waiting: requests that may wait while one is answered.
        """
        self.engine = engine
        self.max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mutirao-serve", daemon=True)
        self._thread.start()

    def submit(self, request: TextRequest) -> Job:
        """Put a request in line.

        Raises:
            ApiError: the line is full, or the server is ending.
        """
        with self._changed:
            if self._is_closed:
                raise ApiError(503, "the server is ending", code="shutting_down")
            num_ahead = len(self._waiting) + (self._running is not None)
            if num_ahead > self.max_waiting:
                raise ApiError(
                    503,
                    f"{num_ahead} requests are being answered or wait already (at most "
                    f"{self.max_waiting} may wait); try again later",
                    code="server_busy",
                    headers={"Retry-After": str(RETRY_AFTER_S)},
                )
            job = Job(request, self)
            self._waiting.append(job)
            self._changed.notify()
            return job

    def forget(self, job: Job) -> None:
        """Take a job out of the line, if it still waits there."""
        with self._changed, suppress(ValueError):
            self._waiting.remove(job)

    def cancel_all(self) -> None:
        """Accept nothing more, and end what runs and waits."""
        with self._changed:
            self._is_closed = True
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._changed.notify()
        for job in jobs:
            job.is_cancelled.set()
            job.post(ApiError(503, "the server is ending", code="shutting_down"))

    def close(self) -> None:
        """End the thread; it stops at the next piece of text."""
        self.cancel_all()
        self._thread.join()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._generate(job)
            except ApiError as error:
                job.post(error)
            except InputError as error:
                job.post(ApiError(400, str(error), code="invalid_prompt"))
            except MutiraoError as error:
                _log.error("a generation failed: %s", error)
                job.post(ApiError(500, str(error), code="generation_failed"))
            except Exception:
                # The request is not logged: prompts are private.
                _log.exception("a generation failed")
                job.post(ApiError(500, "the server failed; its log says why", code="internal"))
            finally:
                with self._changed:
                    self._running = None

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _generate(self, job: Job) -> None:
        if job.is_cancelled.is_set():
            return
        request = job.request
        prompt_tokens = len(self.engine.encode_prompt(request.prompt))
        room = self.engine.context - prompt_tokens
        if room < 1:
            raise ApiError(
                400,
                f"the prompt has {prompt_tokens} tokens, too long for a context of "
                f"{self.engine.context}; shorten it",
                code="context_length_exceeded",
                param="messages" if request.is_chat else "prompt",
            )
        limit = room if request.max_new_tokens is None else min(request.max_new_tokens, room)
        pieces: list[str] = []
        with self.engine.stream(
            request.prompt,
            max_new_tokens=limit,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=secrets.randbits(32) if request.seed is None else request.seed,
            stop=request.stop,
        ) as stream:
            job.post(Started(prompt_tokens))
            for piece in stream:
                if job.is_cancelled.is_set():
                    return
                pieces.append(piece)
                job.post(piece)
        num_tokens = stream.finish("".join(pieces)).num_tokens
        reason: FinishReason = "length" if num_tokens >= limit else "stop"
        job.post(Ended(reason, Usage(prompt_tokens, num_tokens)))
