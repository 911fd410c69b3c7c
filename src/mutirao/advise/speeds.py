"""What the engine is predicted to do with a model in some bits, as the GGUF it would run from."""

from __future__ import annotations

import logging
from pathlib import Path

from mutirao.advise.choosing import Speed
from mutirao.errors import FormatError, InputError, MissingKernelError
from mutirao.inference.planning.model_plans import plan_model

logger = logging.getLogger(__name__)

QUANTIZATIONS = {2: "Q4_1", 3: "Q4_1", 4: "Q4_1", 8: "Q8_0"}
"""What ``mutirao export --type`` is to write for codes of so many bits. Q4_1 holds those of 2 to 4
as they are; Q8_0 rounds those of 8 bits once more, to blocks without zero points."""


def predict_speeds(model: Path, memory_bytes: int | None) -> dict[int, Speed]:
    """Return what is predicted for codes of 2, 3, 4 and 8 bits.

    Args:
        model: a Hugging Face directory.
        memory_bytes: peak of the process; None for what is available.

    Returns:
        By bits; nothing, with a warning, where there is no engine and no memory was asked for.

    Raises:
        InputError: memory was asked for, and there is nothing to plan it with.
    """
    kinds = tuple(dict.fromkeys(QUANTIZATIONS.values()))
    try:
        whole = plan_model(str(model), quantizations=kinds)
        within = whole
        if memory_bytes is not None:
            within = plan_model(str(model), memory_bytes=memory_bytes, quantizations=kinds)
    except (MissingKernelError, FormatError, InputError) as error:
        if memory_bytes is not None:
            raise InputError(
                f"what fits in {memory_bytes / 1e6:.0f} MB of memory cannot be planned: {error}; "
                "ask for disk instead"
            ) from None
        logger.warning("no speed is predicted: %s", error)
        return {}
    speeds = {}
    for bits, quantization in QUANTIZATIONS.items():
        (_, resident), (_, given) = whole.models[quantization], within.models[quantization]
        if resident is not None:
            tokens_per_s = given.best.prediction.tokens_per_s if given else None
            least_bytes = whole.least_bytes[quantization]
            speeds[bits] = Speed(
                quantization, resident.all_resident_bytes, least_bytes, tokens_per_s
            )
    return speeds
