"""The update codec: what an update, or a change of the state, looks like on the wire.

A payload of bytes for each named tensor, in float32, bfloat16 or 8, 4 or 2 bits with a scale per
block, dense or only the largest values with their places; with error feedback (``feedback``)
what a round's rounding lost goes out with the next.

``config`` is the settings; ``layout`` says how many bytes there will be, before there are any;
``tensors`` encodes and decodes; ``rounding``, ``blocks`` and ``places`` are the arithmetic;
``shapes`` is what a receiver expects. A receiver knows format and shapes from the plan, so
nothing that a stranger writes decides how much is read or allocated.

Not here: entropy coding (every size is fixed in advance, which also keeps it from telling
anything of the content), and the integers with one step for all sites that secure aggregation
needs (``secure.fixed_point``).
"""

from __future__ import annotations

from mutirao.federated.codec.config import CodecConfig
from mutirao.federated.codec.feedback import encode_with_feedback, start_residuals
from mutirao.federated.codec.layout import (
    WIRE_VERSION,
    count_bytes,
    count_decode_bytes,
    count_payload_bytes,
)
from mutirao.federated.codec.shapes import Shapes, Tensors, check_tensors
from mutirao.federated.codec.tensors import (
    Payload,
    decode_tensor,
    decode_tensors,
    encode_tensor,
    encode_tensors,
)

__all__ = [
    "WIRE_VERSION",
    "CodecConfig",
    "Payload",
    "Shapes",
    "Tensors",
    "check_tensors",
    "count_bytes",
    "count_decode_bytes",
    "count_payload_bytes",
    "decode_tensor",
    "decode_tensors",
    "encode_tensor",
    "encode_tensors",
    "encode_with_feedback",
    "start_residuals",
]
