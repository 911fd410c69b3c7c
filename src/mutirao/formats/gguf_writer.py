"""Write a planned GGUF file, tensor by tensor, through the gguf package.

Memory holds one matrix and not the model. What a file holds is decided in ``gguf_plan``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mutirao.errors import explain_disk_errors
from mutirao.formats.gguf_description import Metadata
from mutirao.formats.gguf_header import DEFAULT_ALIGNMENT
from mutirao.formats.gguf_plan import GGUFPlan


def write_gguf(plan: GGUFPlan, path: Path, progress: Callable[[float], None] | None = None) -> None:
    """Write a plan's file.

    Args:
        plan: the file.
        path: where; written in place, so that the caller names a place that may stay unfinished.
        progress: told the part that is done, 0 to 1.

    Raises:
        DiskFullError: no room; the unfinished file was removed.
        FormatError: a source became unreadable, or a number does not fit its type.
    """
    import gguf

    writer = gguf.GGUFWriter(path, plan.architecture)
    _add_metadata(writer, plan.metadata)
    for tensor in plan.tensors:
        kind = gguf.GGMLQuantizationType[tensor.type_name]
        # Bytes are told by their shape in the file, numbers by their own.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=kind
        )
    try:
        with explain_disk_errors(path):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            _reserve(writer, plan)
            done = 0
            for tensor in plan.tensors:
                writer.write_tensor_data(tensor.read())
                done += tensor.num_bytes
                if progress is not None:
                    progress(done / plan.size_bytes)
            writer.flush()
            os.fsync(writer.fout[0].fileno())
    except BaseException:
        writer.close()
        path.unlink(missing_ok=True)
        raise
    writer.close()


def _add_metadata(writer: Any, metadata: Metadata) -> None:
    """Add each value in the type that readers expect of such a one."""
    by_type = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in metadata.items():
        by_type[type(value)](key, value)


def _reserve(writer: Any, plan: GGUFPlan) -> None:
    """Take all of the file's room at once: numpy does not say why a write fails."""
    if not hasattr(os, "posix_fallocate"):
        return
    file = writer.fout[0]
    file.flush()
    num_bytes = sum(map(_aligned, (file.tell(), *(each.num_bytes for each in plan.tensors))))
    try:
        os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not on this file system
            raise


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
