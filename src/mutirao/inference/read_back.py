"""Read a GGUF file back as the engine understands it, to check an export.

Through the oracle in plain PyTorch and without rounding activations, so that what differs from
the source is the file's. A weight store is built beside the file meanwhile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mutirao.inference.reference import ReferenceBackend
from mutirao.inference.store.weight_store import WeightStore


def engine_logits(path: Path, windows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """Return (tokens, vocabulary) logits of each window; for ``export_model``'s check.

    Args:
        path: a GGUF file.
        windows: token ids, each window at most the model's context.

    Raises:
        FormatError: the file is damaged, or of a kind that the engine does not run.
        DiskFullError: no room for the store.
    """
    with tempfile.TemporaryDirectory(prefix=".check-", dir=path.parent) as folder:
        store = WeightStore.build(path, Path(folder) / "store", lambda done, total: None)
        backend = ReferenceBackend(store, exact_activations=True)
        return [np.array(backend.run(list(window), 0, logits="all")) for window in windows]
