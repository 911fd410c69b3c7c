"""What compression is asked to do, step by step; light enough to be read by the command line."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mutirao.config import Config
from mutirao.errors import RecipeError

SUPPORTED_BITS = (2, 3, 4, 8)
DEFAULT_BITS = 4
DEFAULT_GROUP_SIZE = 32

CHANGERS = ("wanda", "magnitude", "svd", "share", "distill", "qat")
"""Steps after which weights are still bfloat16 numbers, in the order in which they are listed in
messages; any number of them, in any order."""
GRID_ROUNDERS = ("rtn", "gptq", "awq", "awq,gptq")
"""Last steps whose weights stand on grids of ``bits`` bits in groups."""
FIXED_BITS = {"nf4": 4, "fp8": 8}
"""Last steps that leave no choice of bits."""
ROUNDERS = (*GRID_ROUNDERS, *FIXED_BITS)
TUNE = "tune"
"""A step after a rounding on grids that leaves its codes and moves the grids."""
NEED_TEXT = ("wanda", "svd", "distill", "qat", "gptq", "awq", "awq,gptq", TUNE)
"""Steps that look at text."""

STEP_CONFIGS = {
    "wanda": "prune",
    "magnitude": "prune",
    "svd": "low_rank",
    "share": "sharing",
    "distill": "distillation",
    "qat": "quantized_training",
    TUNE: "tuning",
}
"""The field of ``CompressConfig`` that is about a step."""


class PruneConfig(Config):
    """Which weights become zero."""

    method: Literal["wanda", "magnitude"] = "wanda"
    """'magnitude' takes the smallest; 'wanda' those that matter least on the text."""
    sparsity: float = Field(default=0.5, gt=0, lt=1)
    """Share of the weights that become zero."""
    pattern: Literal["free", "2:4"] = "free"
    """'free' anywhere in a row; '2:4' two of every four neighbours, which sets the sparsity to one
    half."""


class LowRankConfig(Config):
    """Matrices as products of two smaller ones."""

    kept: float = Field(default=0.8, gt=0, lt=1)
    """Share of a layer's parameters that its two factors have."""


class SharingConfig(Config):
    """Neighbouring blocks with one set of weights."""

    every: int = Field(default=2, ge=2)
    """So many neighbouring blocks use one set."""


class DistillConfig(Config):
    """A student that learns from the model's predictions."""

    layers: int | None = Field(default=None, ge=1)
    """Blocks of the student; None for half of the model's. Where steps before it changed the model,
    what they made of it is the student."""
    hidden: int | None = Field(default=None, ge=8)
    """Width of the student, in channels; None for the model's own."""
    steps: int = Field(default=200, ge=1)
    """Training steps."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Highest learning rate, for AdamW."""
    temperature: float = Field(default=1.0, gt=0)
    """What logits are divided by before they are compared; dimensionless."""
    windows_per_step: int = Field(default=8, ge=1)
    """Windows of text in a training step."""


class QatConfig(Config):
    """Training with weights as they will be once rounded."""

    bits: int = DEFAULT_BITS
    """Bits per weight code: those of the rounding that follows."""
    group_size: int = Field(default=DEFAULT_GROUP_SIZE, ge=8, le=4096)
    """Weights that share a grid: those of the rounding that follows."""
    steps: int = Field(default=100, ge=1)
    """Training steps."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Highest learning rate, for AdamW."""


class TuneConfig(Config):
    """Scales that learn after codes are fixed."""

    steps: int | None = Field(default=None, ge=1)
    """Training steps; None for two passes over the windows."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Highest learning rate, for AdamW: about the share of itself by which a step moves a scale;
    None for 2 over the model's width in channels."""
    windows_per_step: int = Field(default=4, ge=1)
    """Windows of text in a training step."""


class CompressConfig(Config):
    """What is done to a model, in order, and how."""

    method: str = "rtn"
    """Steps in order, separated by commas. Any number of 'wanda', 'magnitude', 'svd', 'share',
    'distill' and 'qat' change the model; at most one way of rounding ends it: 'rtn' (to the
    nearest; no data), 'gptq', 'awq', 'awq,gptq', 'nf4' or 'fp8'. After the first four, 'tune' may
    follow, which trains scales. Without rounding, the result is a plain model in
    bfloat16."""
    bits: int = Field(default=DEFAULT_BITS, json_schema_extra={"enum": [*SUPPORTED_BITS, 16]})
    """Bits per weight code: 2, 3, 4 or 8; scales come on top. nf4 always has 4, fp8 8, and a model
    that is not rounded 16."""
    group_size: int | None = Field(default=DEFAULT_GROUP_SIZE, ge=8, le=4096)
    """Weights along the input that share a scale and a zero point; must divide every layer's
    input size. Only for rtn, gptq and awq."""
    layer_bits: dict[str, int] | None = None
    """Bits per weight code of some linear layers of the blocks, by their full names; the others
    have ``bits``. Only for rtn, gptq and awq, and not after qat."""
    prune: PruneConfig | None = None
    """How wanda and magnitude prune."""
    low_rank: LowRankConfig | None = None
    """How svd lowers ranks."""
    sharing: SharingConfig | None = None
    """How share makes blocks share."""
    distillation: DistillConfig | None = None
    """How distill trains a student."""
    quantized_training: QatConfig | None = None
    """How qat trains; its bits and group size are those of the rounding."""
    tuning: TuneConfig | None = None
    """How tune trains."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, document: Any) -> Any:
        """Check the order of steps, and fill in what it fixes."""
        if not isinstance(document, dict) or not isinstance(document.get("method", ""), str):
            return document
        steps = split_method(document.get("method", "rtn"))
        method = ",".join(steps)
        rounder = _rounder(steps)
        document = {**document, "method": method}
        if rounder not in GRID_ROUNDERS:
            fixed = FIXED_BITS.get(rounder or "", 16)
            _refuse_other(document, "bits", fixed, method)
            _refuse_other(document, "group_size", None, method)
            if document.get("layer_bits"):
                raise RecipeError(
                    f"compress.layer_bits is not for compress.method={method} (expected one of "
                    f"{', '.join(GRID_ROUNDERS)} at the end); leave it out"
                )
            if "qat" in steps:
                raise RecipeError(
                    f"compress.method={method} trains for rounding that does not follow (expected "
                    f"one of {', '.join(GRID_ROUNDERS)} at the end)"
                )
            document |= {"bits": fixed, "group_size": None}
        for name in sorted({*STEP_CONFIGS.values()}):
            users = [step for step, field in STEP_CONFIGS.items() if field == name]
            if set(users) & set(steps):
                document[name] = _fill_in(document.get(name), name, steps, document)
            elif document.get(name) is not None:
                raise RecipeError(
                    f"compress.{name} is for {' and '.join(users)}, which compress.method={method} "
                    "does not have; leave it out, or name the step"
                )
        return document

    @model_validator(mode="after")
    def _check(self) -> CompressConfig:
        self._check_student()
        if self.rounder in GRID_ROUNDERS:
            self._check_bits()
            if self.group_size is None:
                raise RecipeError(
                    f"compress.group_size is missing; compress.method={self.method} rounds in "
                    "groups of, for example, 32"
                )
            qat = self.quantized_training
            if qat is not None and (qat.bits, qat.group_size) != (self.bits, self.group_size):
                raise RecipeError(
                    f"compress.quantized_training has {qat.bits} bits in groups of "
                    f"{qat.group_size} (expected {self.bits} in groups of {self.group_size}, as in "
                    "the rounding that follows)"
                )
        return self

    def _check_bits(self) -> None:
        by_layer = {f"layer_bits.{name}": bits for name, bits in (self.layer_bits or {}).items()}
        for name, bits in {"bits": self.bits, **by_layer}.items():
            if bits not in SUPPORTED_BITS:
                accepted = ", ".join(map(str, SUPPORTED_BITS))
                # Not a ValueError: pydantic would wrap it into a longer sentence.
                raise RecipeError(
                    f"compress.{name}={bits} is not supported (expected one of {accepted})"
                )
        if self.layer_bits and self.quantized_training is not None:
            raise RecipeError(
                f"compress.method={self.method}: qat trains for the same bits in all layers "
                "(expected no compress.layer_bits)"
            )

    def _check_student(self) -> None:
        student = self.distillation
        before = self.steps[: self.steps.index("distill")] if student else ()
        if student and before and (student.layers or student.hidden):
            raise RecipeError(
                f"compress.method={self.method}: the student of distill is what "
                f"{', '.join(before)} made of the model, whose size is given (expected no "
                "compress.distillation.layers or hidden); put distill first for a smaller one"
            )

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of all steps in order; AWQ followed by GPTQ is one."""
        return split_method(self.method)

    @property
    def changers(self) -> tuple[str, ...]:
        """Names of the steps that leave bfloat16 numbers."""
        return tuple(step for step in self.steps if step in CHANGERS)

    @property
    def rounder(self) -> str | None:
        """Name of the step that rounds, the last before tune; None where none does."""
        return _rounder(self.steps)

    @property
    def needs_text(self) -> tuple[str, ...]:
        """Names of the steps that look at text."""
        return tuple(step for step in self.steps if step in NEED_TEXT)


def split_method(method: str) -> tuple[str, ...]:
    """Return the steps of a method in order, AWQ followed by GPTQ as one.

    Raises:
        RecipeError: a step is unknown, or a way of rounding, or tune, is not at the end.
    """
    names = [name.strip() for name in method.split(",")]
    last = [names.pop()] if names[-1] == TUNE else []
    if names[-2:] == ["awq", "gptq"]:
        names[-2:] = ["awq,gptq"]
    if last and (not names or names[-1] not in GRID_ROUNDERS):
        raise RecipeError(
            f"compress.method={method}: {TUNE} moves the grids of a rounding (expected rtn, gptq, "
            "awq or awq,gptq right before it)"
        )
    for name in names:
        if name not in (*CHANGERS, *ROUNDERS):
            known = (*CHANGERS, *(each for each in ROUNDERS if "," not in each), TUNE)
            accepted = ", ".join(known)
            raise RecipeError(
                f"compress.method={method}: {name!r} is no step (expected some of {accepted}, "
                "separated by commas)"
            )
    for name in names[:-1]:
        if name in ROUNDERS:
            raise RecipeError(
                f"compress.method={method}: only {TUNE} can follow {name}, which rounds (expected "
                f"one of {', '.join(each for each in ROUNDERS if ',' not in each)}, or awq,gptq, "
                "at the end)"
            )
    return (*names, *last)


def _rounder(steps: tuple[str, ...]) -> str | None:
    return next((step for step in steps if step in ROUNDERS), None)


def _fill_in(given: Any, name: str, steps: tuple[str, ...], document: dict[str, Any]) -> Any:
    """Return a step's configuration with what follows from the other steps."""
    if isinstance(given, Config):
        given = given.model_dump(exclude_unset=True)
    if not isinstance(given or {}, dict):
        return given
    follows: dict[str, Any] = {}
    if name == "prune":
        pruners = [step for step in steps if step in ("wanda", "magnitude")]
        method = (given or {}).get("method", pruners[0])
        if method in ("wanda", "magnitude") and method not in pruners:
            raise RecipeError(
                f"compress.prune.method={method} contradicts compress.method={','.join(steps)} "
                f"(expected {' or '.join(pruners)}); leave it out"
            )
        follows = {"method": pruners[0]}
    elif name == "quantized_training":
        defaults = {"bits": DEFAULT_BITS, "group_size": DEFAULT_GROUP_SIZE}
        follows = {key: document.get(key, value) for key, value in defaults.items()}
    return follows | (given or {})


def _refuse_other(document: dict[str, Any], name: str, fixed: int | None, method: str) -> None:
    """Refuse a value that the method leaves no choice of; nothing is silently dropped."""
    given = document.get(name)
    if given is not None and given != fixed:
        accepted = "none" if fixed is None else str(fixed)
        raise RecipeError(
            f"compress.{name}={given} is not for compress.method={method} (expected {accepted}); "
            "leave it out"
        )


class TextConfig(Config):
    """How much text a method looks at, and how much its result is measured on."""

    window_tokens: int = Field(default=256, ge=16)
    """Tokens of a window."""
    calibration_windows: int = Field(default=64, ge=1)
    """Windows that methods look at, spread over the first four fifths of the text."""
    heldout_windows: int = Field(default=48, ge=2)
    """Windows of the last fifth, which no method sees, that the loss is measured on."""
