"""How requests and replies of a round lie in Flower's records.

Arrays travel in array records, which Flower chunks and checks by hash; settings and the
site's few numbers travel as one JSON text each, checked by pydantic on arrival. Whatever
does not fit raises an error that names what came; nothing that is received is executed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from mutirao.errors import FederationError, UpdateError
from mutirao.federated.codec import EncodedUpdate
from mutirao.federated.plan import Plan
from mutirao.federated.site import RoundAnswer, RoundReply

ARRAYS = "arrays"
TEXT = "text"
MAX_SENTENCE = 500
"""Characters of a site's error that are shown."""


def pack_request(plan: Plan, round_number: int, state: NDArray[np.float32]) -> RecordDict:
    """Return the content of a round's request."""
    request = {"plan": plan.model_dump(mode="json"), "round": round_number}
    return _pack({"state": state}, request)


def unpack_request(content: RecordDict) -> tuple[Plan, int, NDArray[np.float32]]:
    """Return plan, round and global state.

    Raises:
        FederationError: the request is malformed.
    """
    try:
        arrays, request = _unpack(content)
        plan = Plan.model_validate(request["plan"])
        round_number = int(request["round"])
        state = arrays["state"]
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FederationError(f"the coordinator sent a malformed request: {error}") from None
    if state.dtype != np.float32 or state.ndim != 1 or not np.isfinite(state).all():
        raise FederationError(
            f"the coordinator sent a state of type {state.dtype} and shape {state.shape} "
            "(expected finite float32 in one dimension)"
        )
    return plan, round_number, state


def pack_reply(reply: RoundReply) -> RecordDict:
    """Return the content of a site's reply: all that leaves the site in a round."""
    arrays: dict[str, NDArray[Any]] = {"codes": reply.update.codes, "scales": reply.update.scales}
    return _pack(arrays, {"answer": reply.answer.model_dump(mode="json")})


def pack_error(message: str) -> RecordDict:
    """Return the content of a reply that says, in a sentence, why there is no update."""
    return _pack({}, {"error": message})


def unpack_reply(content: RecordDict) -> RoundReply:
    """Return a site's reply, its form checked; its values are checked when decoded.

    Raises:
        FederationError: the site says why it could not answer.
        UpdateError: the reply is malformed.
    """
    try:
        arrays, text = _unpack(content)
        if (error := text.get("error")) is not None:
            raise FederationError(_printable(str(error)))
        answer = RoundAnswer.model_validate(text["answer"])
        update = EncodedUpdate(arrays["codes"], arrays["scales"])
    except (KeyError, ValueError, TypeError, AttributeError, EOFError, RecursionError) as error:
        raise UpdateError(f"a site sent a malformed reply: {error}") from None
    return RoundReply(update, answer)


def _printable(text: str) -> str:
    """A stranger's sentence, safe for a terminal and not too long for one."""
    return "".join(each if each.isprintable() else " " for each in text[:MAX_SENTENCE])


def count_bytes(content: RecordDict) -> int:
    """Return the bytes of a message's content as Flower counts them: arrays, names, texts."""
    return sum(int(record.count_bytes()) for record in content.values())


def hash_content(content: RecordDict) -> str:
    """Return the sha256 of what ``count_bytes`` counts: each name and array, then the text."""
    digest = hashlib.sha256()
    for name, array in content[ARRAYS].items():
        digest.update(name.encode())
        digest.update(array.data)
    for name, text in content[TEXT].items():
        digest.update(name.encode())
        digest.update(str(text).encode())
    return digest.hexdigest()


def _pack(arrays: dict[str, NDArray[Any]], text: dict[str, Any]) -> RecordDict:
    packed = {name: Array(array) for name, array in arrays.items()}
    return RecordDict({ARRAYS: ArrayRecord(packed), TEXT: ConfigRecord({"json": json.dumps(text)})})


def _unpack(content: RecordDict) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    arrays = {name: array.numpy() for name, array in content[ARRAYS].items()}
    text = json.loads(str(content[TEXT]["json"]))
    if not isinstance(text, dict):
        raise TypeError("its text is not a JSON object")
    return arrays, text
