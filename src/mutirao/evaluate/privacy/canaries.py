"""Canaries: random secrets put into the training text, and how far the model gives them away.

A canary is a sentence that ends in a secret drawn at random from a known space. Its
exposure says how much further up the secret stands among all that might have been drawn,
by the model's probability, than it would by chance: log2 of the space less log2 of its
rank (Carlini, Liu, Erlingsson, Kos, Song 2019, arXiv:1802.08232). A secret that the model
never saw has 1.4 bits on average; log2 of the space means that it comes first.

Ranks are taken among sampled alternatives; what lies beyond the sample may be extrapolated.
Extraction writes the secret down, greedily. Canaries stand for random secrets, not for
ordinary text, which ``membership`` looks at. Extraction chooses among the alphabet alone,
since the protocol knows no whole vocabulary: easier than with free generation.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mutirao.config import Config
from mutirao.data.tokenization import Example
from mutirao.errors import DataError, InputError
from mutirao.models.protocol import LanguageModel

DIGITS = "0123456789"
LABEL_LENGTH = 4
"""Letters that tell canaries of one template apart: half a million of them."""


@dataclass(frozen=True)
class Canary:
    """A secret and where it stands."""

    context: str
    """What comes before the secret; the attacker knows it."""
    secret: str
    """Drawn at random, character by character."""
    alphabet: str
    """Characters that were drawn from."""
    num_repetitions: int
    """How often the sentence is put into the text; 0 makes a control."""

    @property
    def space_bits(self) -> float:
        """Logarithm to base 2 of how many secrets could have been drawn."""
        return len(self.secret) * math.log2(len(self.alphabet))


@dataclass(frozen=True)
class Exposure:
    """How far up a canary's secret stands."""

    canary: Canary
    rank: int
    """1 where the secret is more probable than every alternative; ties count against it."""
    num_alternatives: int
    """Other secrets that were sampled."""
    bits: float
    """Exposure by rank, at most log2(num_alternatives + 1)."""
    extrapolated_bits: float
    """Exposure by the skew-normal fit, at most the whole space; a guess where it is above
    ``bits``."""


class ExposureSummary(Config):
    """Exposure of the canaries that were repeated equally often."""

    num_repetitions: int
    """How often each was in the text."""
    num_canaries: int
    """How many."""
    mean_bits: float
    """Mean exposure by rank."""
    largest_bits: float
    """Most exposed one, by rank."""
    mean_extrapolated_bits: float
    """Mean exposure by the fit."""
    share_first: float
    """Share whose secret came before every alternative."""
    most_bits: float
    """Exposure that the sample can show."""


def make_canaries(
    template: str,
    num_repetitions: Iterable[int],
    *,
    num_each: int,
    num_characters: int = 6,
    alphabet: str = DIGITS,
    seed: int,
) -> list[Canary]:
    """Draw canaries, each with a label of its own so that none shares another's context.

    Args:
        template: holds {label}, and ends with {secret}.
        num_repetitions: counts that are wanted, 0 for controls.
        num_each: canaries of each count.
        num_characters: length of a secret.
        alphabet: what secrets are drawn from, without repeats.
        seed: of labels and secrets.

    Raises:
        InputError: the template, the alphabet or a number is not accepted.
    """
    if "{label}" not in template or not template.endswith("{secret}"):
        raise InputError(f"template {template!r} has to hold {{label}} and to end with {{secret}}")
    if len(set(alphabet)) < max(2, len(alphabet)):
        raise InputError(f"alphabet {alphabet!r} (expected two or more different characters)")
    counts = list(num_repetitions)
    if num_each < 1 or num_characters < 1 or any(count < 0 for count in counts):
        raise InputError(
            f"num_each={num_each}, num_characters={num_characters}, num_repetitions={counts} "
            "(expected at least one canary of one character, and counts from 0)"
        )
    rng = random.Random(f"canaries:{seed}")
    before = template.removesuffix("{secret}")
    return [
        Canary(
            context=before.replace("{label}", _draw(string.ascii_uppercase, LABEL_LENGTH, rng)),
            secret=_draw(alphabet, num_characters, rng),
            alphabet=alphabet,
            num_repetitions=count,
        )
        for count in counts
        for _ in range(num_each)
    ]


def canary_example(model: LanguageModel, canary: Canary) -> Example:
    """Return the canary as something to train on, encoded just as it is scored."""
    context = model.encode(canary.context)
    return Example((*context, *model.encode(canary.secret), model.eos_id), 1)


def measure_exposure(
    model: LanguageModel, canaries: Sequence[Canary], *, num_alternatives: int = 255, seed: int
) -> list[Exposure]:
    """Rank each canary's secret among random ones, by the model's probability.

    Args:
        model: the model under attack.
        canaries: what to look for.
        num_alternatives: sampled per canary, fewer where the space is smaller.
        seed: of the sample.

    Raises:
        DataError: a canary's context or secret has no token.
        InputError: num_alternatives is below 2.
    """
    if num_alternatives < 2:
        raise InputError(f"num_alternatives={num_alternatives} (expected at least 2)")
    rng = random.Random(f"alternatives:{seed}")
    exposures = []
    for canary in canaries:
        alternatives = _alternatives(canary, num_alternatives, rng)
        own, *others = _secret_logprobs(model, canary, [canary.secret, *alternatives])
        rank = 1 + sum(other >= own for other in others)
        exposures.append(
            Exposure(
                canary,
                rank,
                len(others),
                math.log2(len(others) + 1) - math.log2(rank),
                min(canary.space_bits, -math.log2(skew_normal_tail(np.asarray(others), own))),
            )
        )
    return exposures


def extract_secrets(model: LanguageModel, canaries: Sequence[Canary]) -> list[str]:
    """Write down each secret as the model would, one most probable character at a time.

    Args:
        model: the model under attack.
        canaries: contexts, alphabets and lengths; the secrets themselves are not looked at.

    Raises:
        DataError: a character of an alphabet is not one token of this model's.
    """
    found = []
    for canary in canaries:
        tokens = [model.encode(character) for character in canary.alphabet]
        if any(len(ids) != 1 for ids in tokens):
            raise DataError(
                f"secrets of {canary.alphabet!r} cannot be extracted from {model.name}: not every "
                "character is a token; use measure_exposure"
            )
        candidates = [ids[0] for ids in tokens]
        context, written = model.encode(canary.context), ""
        for _ in canary.secret:
            (logprobs,) = model.next_token_logprobs([context], [candidates])
            best = int(np.argmax(logprobs))
            context = [*context, candidates[best]]
            written += canary.alphabet[best]
        found.append(written)
    return found


def summarize_exposures(exposures: Sequence[Exposure]) -> list[ExposureSummary]:
    """Group exposures by how often the canaries were repeated, fewest first."""
    summaries = []
    for count in sorted({exposure.canary.num_repetitions for exposure in exposures}):
        chosen = [each for each in exposures if each.canary.num_repetitions == count]
        summaries.append(
            ExposureSummary(
                num_repetitions=count,
                num_canaries=len(chosen),
                mean_bits=float(np.mean([each.bits for each in chosen])),
                largest_bits=max(each.bits for each in chosen),
                mean_extrapolated_bits=float(np.mean([each.extrapolated_bits for each in chosen])),
                share_first=float(np.mean([each.rank == 1 for each in chosen])),
                most_bits=max(math.log2(each.num_alternatives + 1) for each in chosen),
            )
        )
    return summaries


def skew_normal_tail(sample: NDArray[np.float64], value: float) -> float:
    """Return the probability of ``value`` or more under a skew-normal fitted by moments.

    Args:
        sample: (N,) at least two numbers.
        value: where the tail begins.

    Returns:
        At least 1e-300; a step from 1 to there where the sample does not vary.

    References:
        Carlini et al. 2019, section 4.3, for this shape; Azzalini 1985, Scandinavian Journal
        of Statistics 12, 171-178, for its moments.
    """
    mean, deviation = float(sample.mean()), float(sample.std())
    if deviation == 0:
        return 1e-300 if value > mean else 1.0
    # The family ends at a skewness of 0.995, where its shape is infinite.
    skewness = float(np.clip(((sample - mean) ** 3).mean() / deviation**3, -0.95, 0.95))
    root = abs(skewness) ** (2 / 3)
    delta = math.copysign(
        math.sqrt(math.pi / 2 * root / (root + ((4 - math.pi) / 2) ** (2 / 3))), skewness
    )
    scale = deviation / math.sqrt(1 - 2 * delta**2 / math.pi)
    shape = delta / math.sqrt(1 - delta**2)
    start = (value - mean) / scale + delta * math.sqrt(2 / math.pi)
    z = np.linspace(start, max(start, 0.0) + 12.0, 6001)
    below = np.array([0.5 * math.erfc(-shape * each / math.sqrt(2)) for each in z.tolist()])
    density = math.sqrt(2 / math.pi) * np.exp(-z * z / 2) * below
    return min(1.0, max(1e-300, float(np.trapezoid(density, z))))


def _draw(alphabet: str, num: int, rng: random.Random) -> str:
    return "".join(rng.choice(alphabet) for _ in range(num))


def _alternatives(canary: Canary, num: int, rng: random.Random) -> list[str]:
    """Return different secrets of the same kind, in the order they were drawn."""
    num = min(num, len(canary.alphabet) ** len(canary.secret) - 1)
    found: dict[str, None] = {}
    while len(found) < num:
        drawn = _draw(canary.alphabet, len(canary.secret), rng)
        if drawn != canary.secret:
            found[drawn] = None
    return list(found)


def _secret_logprobs(model: LanguageModel, canary: Canary, secrets: Sequence[str]) -> list[float]:
    context = model.encode(canary.context)
    encoded = [model.encode(secret) for secret in secrets]
    if not context or not all(encoded):
        raise DataError(f"canary {canary.context!r} has no token before or in its secret")
    sequences = [context + ids for ids in encoded]
    scores = model.token_logprobs(sequences, [len(context)] * len(sequences))
    return [float(logprobs.sum()) for logprobs in scores]
