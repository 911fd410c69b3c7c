"""What the SuperLink's filter lets through, from where, and of which size."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from mutirao.federated.flower.connection import SECRET_HEADER
from mutirao.federated.flower.superlink import MAX_BODY_BYTES, MAX_TRANSFERS, Doors

SECRET = "s" * 64


async def inside(_):
    return PlainTextResponse("inside")


def ask(path: str, client: str, content=b"x", **headers: str) -> int:
    routes = [Route("/{rest:path}", inside, methods=["POST"])]
    app = Starlette(routes=routes, middleware=[Middleware(Doors, secret=SECRET)])
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    async def post() -> int:
        transport = httpx.ASGITransport(app, client=(client, 5000))
        async with httpx.AsyncClient(transport=transport, base_url="http://link") as line:
            return (await line.post(path, content=content, headers=named)).status_code

    return asyncio.run(post())


FAR, HERE, HERE_6 = "192.0.2.7", "127.0.0.1", "::1"
KNOWN = {SECRET_HEADER: SECRET}


@pytest.mark.parametrize(
    ("path", "client", "headers", "status"),
    [
        ("/v1/fleet/pull-messages", FAR, {}, 200),
        ("/v1/fleet/pull-messages", HERE, {}, 200),
        ("/v1/fleet/push-object", FAR, {"content_length": str(MAX_BODY_BYTES + 1)}, 413),
        ("/v1/control/start-run", FAR, {}, 404),
        ("/v1/control/start-run", FAR, KNOWN, 404),
        ("/v1/control/start-run", HERE, {}, 404),
        ("/v1/control/start-run", HERE, {SECRET_HEADER: "guess"}, 404),
        ("/v1/control/start-run", HERE, KNOWN, 200),
        ("/v1/control/start-run", HERE_6, KNOWN, 200),
        ("/v1/runtime/acquire-task", FAR, {}, 404),
        ("/v1/runtime/acquire-task", FAR, KNOWN, 404),
        ("/v1/runtime/acquire-task", HERE, {}, 200),
        ("/v1/fleet", FAR, {}, 404),
        ("/docs", FAR, {}, 404),
    ],
)
def test_who_may_reach_what(path, client, headers, status):
    assert ask(path, client, **headers) == status


def test_a_body_of_unknown_length_is_refused():
    async def chunks():
        yield b"x"

    assert ask("/v1/fleet/push-object", FAR, content=chunks()) == 411


def test_few_objects_pass_at_the_same_time_and_all_pass_in_the_end():
    inside_now, most = 0, 0

    async def take_up(request):
        nonlocal inside_now, most
        inside_now += 1
        most = max(most, inside_now)
        await request.body()
        await asyncio.sleep(0.001)
        inside_now -= 1
        return PlainTextResponse("taken")

    routes = [Route("/{rest:path}", take_up, methods=["POST"])]
    app = Starlette(routes=routes, middleware=[Middleware(Doors, secret=SECRET)])

    async def post_all() -> list[int]:
        transport = httpx.ASGITransport(app, client=(FAR, 5000))
        async with httpx.AsyncClient(transport=transport, base_url="http://link") as line:
            asked = [line.post("/v1/fleet/push-object", content=b"x") for _ in range(50)]
            return [each.status_code for each in await asyncio.gather(*asked)]

    assert asyncio.run(post_all()) == [200] * 50
    assert most == MAX_TRANSFERS
