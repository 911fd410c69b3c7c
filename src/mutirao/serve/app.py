"""The routes, and what stands before them: the key, the size of a request, the time to send it.

Starlette, which FastAPI builds on, does what is needed here; FastAPI itself would add 15 MB to
a process whose memory is the user's budget (2026-11, fastapi 0.138).
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mutirao.serve.reply import ApiError, Replies, describe_model, event
from mutirao.serve.request import TextRequest, read_chat, read_completion
from mutirao.serve.worker import Ended, Job, Worker

T = TypeVar("T")

MIN_REQUEST_BYTES = 1 << 16
BYTES_PER_TOKEN = 64
"""A request may have so many bytes for each token of the context: a token is about four
characters, and JSON may write each in six bytes, or in twelve."""
BODY_TIMEOUT_S = 30.0
"""Longest that a client may take to send a request."""
KEEP_ALIVE_S = 10.0
"""A stream that is silent so long sends a comment, so that nothing on the way takes the
connection for dead while a long prompt is read."""


def create_app(worker: Worker, *, model: str, api_key: str) -> ASGIApp:
    """Return the server as an ASGI application.

    Args:
        worker: what generates.
        model: name by which clients ask for the model.
        api_key: what every request must bring, as ``Authorization: Bearer KEY``.
    """
    api = _Api(worker, model)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completion, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{name:path}", api.model, methods=["GET"]),
        ],
        exception_handlers={
            ApiError: _refused,
            HTTPException: _http_error,
            Exception: _failed,
        },
    )
    return _KeyRequired(app, api_key)


class _KeyRequired:
    """Refuses whoever brings no key, before anything else is looked at."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = b"bearer " + api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # nothing else is served
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = f"{scheme.lower()} {key.strip()}".encode("utf-8", "replace")
        if hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "the API key is missing or wrong (expected the header 'Authorization: Bearer KEY')",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await _reply(error)(scope, receive, send)


class _Api:
    def __init__(self, worker: Worker, model: str) -> None:
        self._worker = worker
        self._model = model
        self._created = int(time.time())
        self._max_bytes = max(MIN_REQUEST_BYTES, BYTES_PER_TOKEN * worker.engine.context)

    async def models(self, request: Request) -> Response:
        entry = describe_model(self._model, self._created)
        return JSONResponse({"object": "list", "data": [entry]})

    async def model(self, request: Request) -> Response:
        self._check_model(str(request.path_params["name"]))
        return JSONResponse(describe_model(self._model, self._created))

    async def chat(self, request: Request) -> Response | _Stream:
        return await self._answer(request, read_chat)

    async def completion(self, request: Request) -> Response | _Stream:
        return await self._answer(request, read_completion)

    async def _answer(
        self, request: Request, read: Callable[[bytes], TextRequest]
    ) -> Response | _Stream:
        asked = read(await self._body(request))
        self._check_model(asked.model)
        if asked.is_chat and not self._worker.engine.has_chat_template:
            raise ApiError(
                400,
                f"{self._model} has no chat template and takes no messages; use /v1/completions",
                code="no_chat_template",
                param="messages",
            )
        replies = Replies(self._model, asked.is_chat)
        job = self._worker.submit(asked)
        try:
            # Until the prompt is accepted, an error can still be told by a status.
            started = await _unless_gone(request.receive, job.next_event(), job)
            if started is not None and asked.stream:
                return _Stream(job, replies, asked.include_usage)
            whole = await _unless_gone(request.receive, _whole(job, replies), job)
            return _nobody_there() if whole is None else JSONResponse(whole)
        except BaseException:
            job.cancel()
            raise

    async def _body(self, request: Request) -> bytes:
        """Read a request's body, of which no more is believed than may come."""
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    chunks.append(chunk)
                    if sum(map(len, chunks)) > self._max_bytes:
                        raise ApiError(
                            413,
                            f"the request has more than {self._max_bytes} bytes; shorten it",
                            code="request_too_large",
                            headers={"Connection": "close"},
                        )
        except TimeoutError:
            raise ApiError(
                408,
                f"the request did not come within {BODY_TIMEOUT_S:.0f} s",
                code="request_timeout",
                headers={"Connection": "close"},
            ) from None
        except ClientDisconnect:
            raise ApiError(400, "the request ended early", code="invalid_json") from None
        return b"".join(chunks)

    def _check_model(self, name: str) -> None:
        if name != self._model:
            shown = "".join(c if c.isprintable() else "?" for c in name[:100])
            raise ApiError(
                404,
                f"the model {shown!r} is not served here (expected {self._model!r})",
                code="model_not_found",
                param="model",
            )


class _Stream:
    """A text as server-sent events; an ASGI application, as responses are."""

    def __init__(self, job: Job, replies: Replies, include_usage: bool) -> None:
        self._job = job
        self._replies = replies
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx would collect the pieces
        ]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await _unless_gone(receive, self._send_all(send), self._job)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._job.cancel()

    async def _send_all(self, send: Send) -> None:
        async def send_line(line: bytes) -> None:
            await send({"type": "http.response.body", "body": line, "more_body": True})

        if (opening := self._replies.opening()) is not None:
            await send_line(event(opening))
        while True:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    item = await self._job.next_event()
            except TimeoutError:
                await send_line(b": still here\n\n")
                continue
            except ApiError as error:
                await send_line(event(error.body()))
                return
            if not isinstance(item, str):
                break
            await send_line(event(self._replies.piece(item)))
        if isinstance(item, Ended):
            await send_line(event(self._replies.closing(item.finish_reason)))
            if self._include_usage:
                await send_line(event(self._replies.usage(item.usage)))
            await send_line(event("[DONE]"))


async def _whole(job: Job, replies: Replies) -> dict[str, Any] | None:
    pieces: list[str] = []
    while isinstance(item := await job.next_event(), str):
        pieces.append(item)
    if not isinstance(item, Ended):
        return None
    return replies.whole("".join(pieces), item.finish_reason, item.usage)


async def _unless_gone(receive: Receive, work: Awaitable[T], job: Job) -> T | None:
    """Do something for a client, but cancel the job and return None when the client leaves."""
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([doing, watching], return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        job.cancel()
        return None
    finally:
        doing.cancel()
        watching.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _reply(error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _reply(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Say in OpenAI's shape that there is no such route, or that it takes another method."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{request.method} {request.url.path[:200]}: {str(error.detail).lower()}"
    return _reply(ApiError(error.status_code, message, code=code, headers=error.headers))


async def _failed(request: Request, error: Exception) -> Response:
    return _reply(ApiError(500, "the server failed; its log says why", code="internal"))


def _nobody_there() -> Response:
    """Return what nobody reads: the client has left (nginx's status for that)."""
    return Response(status_code=499)
