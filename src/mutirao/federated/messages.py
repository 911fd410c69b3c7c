"""Which parcels there are in a round, and the fields of each.

    request     payloads                      answer      payloads
    hello       -                             hello       -
    train       state or change of it         update      the site's change, encoded
                with secure: "terms"          ready       "advert"
    secure      "message"                     secure      "message", or "chunk/0" and on
    evaluate    a change to measure           losses      -
    finish      the last change               done        -
                                              refusal     -         (to any request)

A state or a change is one payload for each tensor, named ``t/`` and the tensor's name. Every
answer names the hash of the request it answers, so that an answer of another round, or to
another question, is known as such. Fields are checked by pydantic on arrival; whatever does
not fit raises an error that names what came.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from mutirao.config import Config
from mutirao.errors import UpdateError
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Plan

TENSOR_PREFIX = "t/"
MAX_SENTENCE = 500
"""Characters of a stranger's sentence that are shown."""

Form = Literal["none", "whole", "change"]
Reason = Literal["policy", "needs_state", "budget", "stale", "failed"]
SecureStep = Literal["share_keys", "mask", "survivors", "unmask"]


class HelloRequest(Config):
    """Who are you? Answered at once, also while the site trains."""

    nonce: str
    """Random, so that an answer cannot be an old one."""


class HelloAnswer(Config):
    """The signature says who; the rest, whether an earlier request is still known."""

    request_sha256: str
    """Hash of the request."""
    working_on: str = ""
    """Hash of the request that the site is answering just now; empty for none."""


class StateFields(Config):
    """What a request's tensors are, and to which state they lead."""

    form: Form
    """'whole': the state itself; 'change': to be added to the state it is ``based_on``;
    'none': the site is known to have it."""
    based_on: str = ""
    """Hash of the state that a change is to be added to; see ``site.replica``."""
    state_sha256: str
    """Hash of the state that results."""
    ranks: dict[str, int] = Field(default_factory=dict)
    """Columns of the history that comes for each adapted layer, where there is one; see
    ``aggregation.low_rank_rounds``."""


class TrainRequest(Config):
    """Train on your own data from this state."""

    plan: Plan
    """What was agreed."""
    state: StateFields
    """The state to start from."""
    last_counted: int | None = Field(default=None, ge=0)
    """The last round in which this site's update counted, 0 for none: what later ones of it left
    behind at the site is void. None where nothing is said of it."""


class UpdateAnswer(Config):
    """The numbers beside an update, or beside the promise of one ('ready')."""

    request_sha256: str
    """Hash of the request."""
    state_sha256: str
    """Hash of the state that was trained from."""
    num_tokens: int = Field(gt=0)
    """Training tokens; under differential privacy the plan's nominal number."""
    num_steps: int = Field(ge=0)
    """Optimizer steps."""
    train_loss: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Mean training loss, nats per token; None under differential privacy."""
    heldout_loss: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Loss of the state as received on held-out text, nats per token; None where it is not
    measured, or under differential privacy."""
    epsilon: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Spent so far in this run; None without differential privacy."""
    num_clipped: int = Field(default=0, ge=0)
    """Values that secure aggregation's clip cut off."""
    rank: int | None = Field(default=None, ge=1)
    """The adapter's rank at this site, where ranks may differ."""
    seconds: float = Field(ge=0, allow_inf_nan=False)
    """Time of the work, in seconds."""


class SecureRequest(Config):
    """One later step of secure aggregation; the first travels with the train request."""

    plan: Plan
    """What was agreed."""
    step: SecureStep
    """Which step."""


class SecureAnswer(Config):
    """The answer to it."""

    request_sha256: str
    """Hash of the request."""
    step: SecureStep
    """Which step."""


class EvaluateRequest(Config):
    """Measure a state, or a state plus somebody's change, on your held-out text."""

    plan: Plan
    """What was agreed."""
    label: str
    """What is measured: 'global', or a site's name."""
    state: StateFields
    """The state; ``form='change'`` is added for this measurement alone and is not kept."""
    max_tokens: int = Field(ge=1)
    """Held-out tokens to score."""


class LossesAnswer(Config):
    """How well it predicts this site's held-out text."""

    request_sha256: str
    """Hash of the request."""
    label: str
    """As in the request."""
    loss: float = Field(ge=0, allow_inf_nan=False)
    """Nats per token."""
    num_tokens: int = Field(gt=0)
    """Tokens scored."""


class FinishRequest(Config):
    """Take the final state; training is over."""

    plan: Plan
    """What was agreed."""
    state: StateFields
    """The final state."""


class DoneAnswer(Config):
    """The site has the final state."""

    request_sha256: str
    """Hash of the request."""


class Refusal(Config):
    """Why a request is not answered, in a sentence."""

    request_sha256: str
    """Hash of the request, or empty where it could not be read."""
    reason: Reason
    """What the coordinator can do about it: 'needs_state' asks for the whole state."""
    sentence: str
    """For people; shown cut and without control characters."""


F = TypeVar("F", bound=Config)


def read_fields(kind: type[F], parcel: Parcel) -> F:
    """Return a parcel's fields.

    Raises:
        UpdateError: they do not fit.
    """
    try:
        return kind.model_validate(dict(parcel.fields))
    except (ValidationError, RecursionError) as error:
        what = str(error).splitlines()
        told = printable(" ".join(line.strip() for line in what[1:3]))
        raise UpdateError(
            f"a malformed {printable(parcel.kind)[:40]!r} came from "
            f"{printable(parcel.sender)[:64]!r}: {told}"
        ) from None


def tensor_payloads(payloads: dict[str, NDArray[np.uint8]]) -> dict[str, NDArray[np.uint8]]:
    """Return encoded tensors under their names in a parcel."""
    return {TENSOR_PREFIX + name: payload for name, payload in payloads.items()}


def payload_tensors(parcel: Parcel) -> dict[str, NDArray[np.uint8]]:
    """Return a parcel's encoded tensors by tensor name; other payloads are left out."""
    start = len(TENSOR_PREFIX)
    return {
        name[start:]: payload
        for name, payload in parcel.payloads.items()
        if name.startswith(TENSOR_PREFIX)
    }


def printable(text: str) -> str:
    """Return a stranger's text, safe for a terminal and not too long for one."""
    return "".join(each if each.isprintable() else " " for each in text[:MAX_SENTENCE])
