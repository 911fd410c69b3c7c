"""The number formats that the engine computes with, and the sizes they give a matrix.

Names and block sizes are those of ggml (github.com/ggml-org/ggml, src/ggml-common.h); how
a matrix is stored in each is told in ``planes``. Two formats are the store's own: 16-bit floats
split into codes and an exact rest (``split_floats``).
"""

from __future__ import annotations

from dataclasses import dataclass

from mutirao.errors import FormatError, ShapeError
from mutirao.inference.store.split_floats import CODE_BITS, CODE_CENTRE

PANEL_ROWS = 16
BLOCK_COLUMNS = 32
LINE_BYTES = 64


@dataclass(frozen=True)
class Format:
    """How a matrix's numbers are stored; see the module's docstring."""

    name: str
    bits: int
    """Bits of a code, or of a number in the float formats."""
    plane_widths: tuple[int, ...]
    """Bits of each plane, most significant first."""
    scales: str
    """'H', 'HM', 'K6', 'K8', 'E', or '' in the float formats."""
    code_offset: float
    """Code that stands for zero; 0 where a minimum is added instead."""
    block_columns: int
    """Numbers in a GGUF block."""
    block_bytes: int
    """Bytes of a GGUF block."""
    split_from: str = ""
    """The float format whose numbers the planes make up when they are all there; their last one
    is then the rest, which is no part of a code. '': codes are all there is."""

    @property
    def code_widths(self) -> tuple[int, ...]:
        """Bits of each plane of the codes; without the rest of a split float."""
        return self.plane_widths[:-1] if self.split_from else self.plane_widths

    @property
    def is_float(self) -> bool:
        """Whether numbers are stored as they are, without codes and scales."""
        return not self.scales

    @property
    def scales_bytes(self) -> int:
        """Bytes of the scales of one panel and one GGUF block; 0 in the float formats."""
        return _SCALES_BYTES[self.scales]

    @property
    def scale_columns(self) -> int:
        """Columns that share one scale: 16 in Q6_K, else 32; 0 in the float formats."""
        return _SCALE_COLUMNS[self.scales]


_SCALES_BYTES = {"": 0, "H": 32, "HM": 64, "K6": 256, "K8": 288, "E": 16}
_SCALE_COLUMNS = {"": 0, "H": 32, "HM": 32, "K6": 32, "K8": 16, "E": 32}
_CODE_WIDTHS = (2, 1, 1, 2)

FORMATS = {
    each.name: each
    for each in (
        Format("F32", 32, (32,), "", 0, 1, 4),
        Format("F16", 16, (16,), "", 0, 1, 2),
        Format("BF16", 16, (16,), "", 0, 1, 2),
        Format("Q4_0", 4, (2, 1, 1), "H", 8, 32, 18),
        Format("Q4_1", 4, (2, 1, 1), "HM", 0, 32, 20),
        Format("Q5_0", 5, (2, 1, 1, 1), "H", 16, 32, 22),
        Format("Q5_1", 5, (2, 1, 1, 1), "HM", 0, 32, 24),
        Format("Q8_0", 8, (2, 1, 1, 2, 2), "H", 128, 32, 34),
        Format("Q4_K", 4, (2, 1, 1), "K6", 0, 256, 144),
        Format("Q5_K", 5, (2, 1, 1, 1), "K6", 0, 256, 176),
        Format("Q6_K", 6, (2, 1, 1, 2), "K8", 32, 256, 210),
        Format("BF16_SPLIT", CODE_BITS, (*_CODE_WIDTHS, 8), "E", CODE_CENTRE, 32, 64, "BF16"),
        Format("F16_SPLIT", CODE_BITS, (*_CODE_WIDTHS, 10), "E", CODE_CENTRE, 32, 64, "F16"),
    )
}

FILE_FORMATS = tuple(name for name, each in FORMATS.items() if not each.split_from)
"""Those that a model's own files may hold."""


def split_format(name: str, num_columns: int) -> str:
    """Return the split format in which a matrix is stored, or its own where there is none.

    Args:
        name: format in the model's file.
        num_columns: of the matrix.
    """
    whole_blocks = num_columns % BLOCK_COLUMNS == 0
    found = (each.name for each in FORMATS.values() if each.split_from == name)
    return next(found, name) if whole_blocks else name


def find_format(name: str) -> Format:
    """Return a format by its GGUF name.

    Raises:
        FormatError: it is not one of those that are computed with.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise FormatError(
            f"matrices of type {name} are not supported (expected one of {', '.join(FILE_FORMATS)})"
        ) from None


def row_bytes(name: str, num_columns: int) -> int:
    """Return the bytes of one row as GGUF stores it.

    Raises:
        FormatError: unknown format.
        ShapeError: the columns are not a whole number of blocks.
    """
    form = find_format(name)
    if num_columns < 0 or num_columns % form.block_columns:
        raise ShapeError(
            f"a {name} matrix cannot have {num_columns} columns (expected a multiple of "
            f"{form.block_columns})"
        )
    return num_columns // form.block_columns * form.block_bytes


def num_panels(num_rows: int) -> int:
    """Return how many panels of 16 rows hold so many rows."""
    return -(-num_rows // PANEL_ROWS)


def scales_panel_bytes(name: str, num_columns: int) -> int:
    """Return the bytes of one panel's scales; 0 in the float formats."""
    form = find_format(name)
    return num_columns // form.block_columns * form.scales_bytes


def plane_panel_bytes(name: str, num_columns: int) -> tuple[int, ...]:
    """Return the bytes of one panel in each plane, most significant plane first."""
    widths = find_format(name).plane_widths
    return tuple(num_columns * width * PANEL_ROWS // 8 for width in widths)
