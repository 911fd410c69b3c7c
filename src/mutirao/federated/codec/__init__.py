"""The update codec: what a site's update looks like on the wire.

Two wire forms. **Version 1** (``vector``) is what runs send today: one vector in 8-bit codes,
with a float32 scale for each 256 of them, as two arrays. **Version 2** (``tensors``) is a
payload of bytes for each named tensor, in float32, bfloat16 or 8, 4 or 2 bits with a scale per
block, dense or only the largest values with their places; with error feedback (``feedback``)
what a round's rounding lost goes out with the next.

``config`` is the settings; ``layout`` says how many bytes there will be, before there are any;
``rounding``, ``blocks`` and ``places`` are the arithmetic; ``shapes`` is what a receiver
expects. A receiver knows format and shapes from the plan, so nothing that a stranger writes
decides how much is read or allocated.

Wired into runs: version 1, between ``site`` and ``server_app``. Not wired yet: all of version
2. Not here: entropy coding (every size is fixed in advance, which also keeps it from telling
anything of the content), and the integers with one step for all sites that secure aggregation
needs.
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
from mutirao.federated.codec.vector import (
    BLOCK_SIZE,
    EncodedUpdate,
    decode_update,
    encode_update,
)

__all__ = [
    "BLOCK_SIZE",
    "WIRE_VERSION",
    "CodecConfig",
    "EncodedUpdate",
    "Payload",
    "Shapes",
    "Tensors",
    "check_tensors",
    "count_bytes",
    "count_decode_bytes",
    "count_payload_bytes",
    "decode_tensor",
    "decode_tensors",
    "decode_update",
    "encode_tensor",
    "encode_tensors",
    "encode_update",
    "encode_with_feedback",
    "start_residuals",
]
