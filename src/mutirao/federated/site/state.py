"""The state that a request leads to, from what came with it and what the site holds.

Tensors may come in float32, bfloat16, or either codec of the plan; which one, each payload's
header says, and it must then be exactly what such a codec writes for a tensor of the agreed
shape, so that a stranger's bytes never decide how much is read.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mutirao.errors import UpdateError
from mutirao.federated.codec import CodecConfig, Shapes, decode_tensor
from mutirao.federated.codec.layout import HEADER, lay_out, write_header
from mutirao.federated.codec.shapes import check_names, count_values
from mutirao.federated.messages import StateFields, payload_tensors
from mutirao.federated.parcel import Parcel
from mutirao.federated.plan import Plan
from mutirao.federated.site.refusal import Refused
from mutirao.federated.site.replica import add_change, hash_tensors

WITH_HISTORY = ("stacked", "fedex")
"""Values of ``aggregation`` under which the state holds what earlier rounds added to layers."""

NO_BASIS = "this site does not hold the state that the request is about"

State = dict[str, NDArray[np.float32]]
Held = tuple[str, State]
"""A state's hash, and the state."""


def has_basis(fields: StateFields, held: Held | None) -> bool:
    """Whether a request's state can be made from what came with it and what is held."""
    if fields.form == "whole":
        return True
    wanted = {fields.state_sha256} | ({fields.based_on} if fields.form == "change" else set())
    return held is not None and held[0] in wanted


def take_state(
    request: Parcel, fields: StateFields, held: Held | None, plan: Plan, shapes: Shapes
) -> State:
    """Return the state that a request leads to.

    Args:
        request: carries the tensors.
        fields: say what they are.
        held: what the site holds; its arrays are returned where nothing changes.
        plan: what was agreed.
        shapes: of what is trained, by name.

    Raises:
        Refused: the site does not hold what the tensors are to be added to.
        UpdateError: tensors are missing, malformed, or do not lead where the request says.
    """
    if not has_basis(fields, held):
        raise Refused("needs_state", NO_BASIS)
    if held is not None and held[0] == fields.state_sha256:
        return held[1]
    state = _make(request, fields, held, plan, shapes)
    if hash_tensors(state) != fields.state_sha256:
        message = "the request's tensors do not lead to the state that it names"
        # A whole state mends whatever went wrong with a change, but not a whole state.
        raise UpdateError(message) if fields.form == "whole" else Refused("needs_state", message)
    return state


def _make(
    request: Parcel, fields: StateFields, held: Held | None, plan: Plan, shapes: Shapes
) -> State:
    payloads = payload_tensors(request)
    if plan.federated.aggregation not in WITH_HISTORY:
        tensors = decode_any(payloads, shapes, plan)
        return tensors if fields.form == "whole" or held is None else add_change(held[1], tensors)
    from mutirao.federated.aggregation.low_rank_state import advance, history_shapes

    expected: dict[str, tuple[int, ...]] = {**history_shapes(shapes, fields.ranks)}
    if plan.federated.aggregation == "fedex":
        expected.update(shapes)
    tensors = decode_any(payloads, expected, plan)
    base = {} if fields.form == "whole" or held is None else held[1]
    return advance(base, "whole" if fields.form == "whole" else "change", tensors)


def decode_any(
    payloads: Mapping[str, NDArray[np.uint8]], shapes: Shapes, plan: Plan
) -> dict[str, NDArray[np.float32]]:
    """Decode tensors, each by the codec that its header names.

    Raises:
        UpdateError: a tensor is missing, unknown or malformed, or in none of the plan's forms.
    """
    check_names(payloads, shapes, "the coordinator")
    download, upload = plan.federated.download, plan.federated.upload
    codecs = (CodecConfig(format="fp32"), CodecConfig(format="bf16"), download, upload)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        header = payloads[name][: HEADER.size].tobytes()
        layouts = ((lay_out(count_values(shape), codec), codec) for codec in codecs)
        found = [codec for layout, codec in layouts if write_header(layout, codec) == header]
        # None of them fits: the plan's own says what is wrong.
        codec = found[0] if found else download
        tensors[name] = decode_tensor(name, payloads[name], shape, codec)
    return tensors
