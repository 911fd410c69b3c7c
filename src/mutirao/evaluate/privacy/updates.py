"""What the server reads from an update: which tokens a site trained on, and which site did.

The gradient of an input embedding has a row for each token, and a token that was not in
the text has a row of zeros; AdamW without weight decay then leaves the row as it was. So
the rows that changed are the tokens that were trained on, even after many local steps
(for gradients: Melis et al. 2019, arXiv:1805.04049, section 4.1). In the output head, in tied
embeddings and in low-rank factors beside them every row changes; but tokens that were not
in the text are all pushed the same way, so that rows that differ from the common one tell.

Under secure aggregation the server has the sum: it sees that somebody had the token. Who
did is asked of ``evaluate_attribution``, whose chance level is one over the number of
sites. Order and text are left out: reconstructing batches from gradients of single steps
is possible (DAGER, Petrov et al. 2024, arXiv:2405.15586) and is not attempted here.

Shapes: V tokens of the vocabulary, S sites.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mutirao.config import Config
from mutirao.errors import DataError, ShapeError
from mutirao.evaluate.outcomes import auroc
from mutirao.evaluate.privacy.intervals import clopper_pearson

Vector = NDArray[np.float64]


class PresenceResult(Config):
    """How well an update tells which tokens were trained on."""

    num_present: int
    """Tokens that were."""
    num_absent: int
    """Tokens that were not."""
    auc: float
    """Probability that a random present token has more evidence than a random absent one."""
    precision: float
    """Share of the tokens with any evidence that were present; 1 where there are none."""
    recall: float
    """Share of the present tokens that have any evidence."""


class AttributionResult(Config):
    """How well it is told which site had a token that only one site had."""

    num_tokens: int
    """Tokens asked about."""
    accuracy: float
    """Share of them that the right site was named for."""
    low: float
    """Lower end of accuracy's 95 % Clopper-Pearson interval."""
    high: float
    """Upper end."""
    chance: float
    """Accuracy of guessing: one over the number of sites."""


def token_evidence(update: Tensor, *, token_axis: int = 0) -> Vector:
    """Return how much of an update belongs to each token: the norm of its row.

    Args:
        update: difference of a matrix that has one row (or column) per token: the input
            embedding, the output head, or the low-rank factor beside one of them that is
            as long as the vocabulary.
        token_axis: the axis that is.

    Returns:
        (V,) float64; exactly 0 where nothing changed.

    Raises:
        ShapeError: the update is no matrix.
    """
    return _norms(_rows(update, token_axis))


def token_deviation(update: Tensor, *, token_axis: int = 0) -> Vector:
    """Return how far each token's row lies from the common one, the median of all rows.

    For matrices of which every row changes; less than half of the vocabulary may have been
    trained on, or else the common row is theirs. See ``token_evidence``.

    Returns:
        (V,) float64.

    Raises:
        ShapeError: the update is no matrix.
    """
    rows = _rows(update, token_axis)
    return _norms(rows - rows.median(dim=0).values)


def trained_tokens(update: Tensor, *, token_axis: int = 0) -> frozenset[int]:
    """Return the tokens whose row changed; see ``token_evidence``."""
    return frozenset(np.flatnonzero(token_evidence(update, token_axis=token_axis)).tolist())


def evaluate_presence(evidence_V: Vector, present: Collection[int]) -> PresenceResult:
    """Hold the evidence against what was trained on.

    Args:
        evidence_V: (V,) as of ``token_evidence``.
        present: tokens that were input to the model in training.

    Raises:
        DataError: all tokens were present, or none.
    """
    is_present = np.zeros(len(evidence_V), bool)
    is_present[list(present)] = True
    has_evidence = evidence_V > 0
    area = auroc(evidence_V.tolist(), is_present.astype(int).tolist())
    num_seen = int(has_evidence.sum())
    num_right = int((has_evidence & is_present).sum())
    return PresenceResult(
        num_present=int(is_present.sum()),
        num_absent=int((~is_present).sum()),
        auc=area,
        precision=num_right / num_seen if num_seen else 1.0,
        recall=num_right / int(is_present.sum()),
    )


def attribute_sites(evidence_SV: Vector, *, seed: int) -> NDArray[np.int64]:
    """Name for each token the site with the most evidence; ties are drawn.

    Args:
        evidence_SV: (S, V) what is known of each site. Who sees a sum alone has the same
            row for each site that is in it.
        seed: of the draws among ties.
    """
    shaken = np.random.default_rng(seed).random(evidence_SV.shape)
    is_most = evidence_SV == evidence_SV.max(axis=0)
    return np.asarray(np.where(is_most, shaken, -1.0).argmax(axis=0), np.int64)


def evaluate_attribution(
    evidence_SV: Vector, owners: Mapping[int, int], *, seed: int = 0
) -> AttributionResult:
    """Measure how often the right site is named.

    Args:
        evidence_SV: see ``attribute_sites``.
        owners: the site of each token that a single site had; see ``sole_owners``.
        seed: of the draws among ties.

    Raises:
        DataError: there is no such token.
    """
    if not owners:
        raise DataError("no token was at one site alone, so none can be attributed")
    named = attribute_sites(evidence_SV, seed=seed)
    num_right = sum(int(named[token]) == site for token, site in owners.items())
    low, high = clopper_pearson(num_right, len(owners))
    return AttributionResult(
        num_tokens=len(owners),
        accuracy=num_right / len(owners),
        low=low,
        high=high,
        chance=1 / len(evidence_SV),
    )


def sole_owners(tokens_by_site: Collection[Collection[int]]) -> dict[int, int]:
    """Return the site of each token that exactly one site trained on."""
    holders: dict[int, list[int]] = {}
    for site, tokens in enumerate(tokens_by_site):
        for token in set(tokens):
            holders.setdefault(token, []).append(site)
    return {token: sites[0] for token, sites in sorted(holders.items()) if len(sites) == 1}


def _rows(update: Tensor, token_axis: int) -> Tensor:
    """(V, D) float64 on the CPU."""
    if update.ndim != 2:
        raise ShapeError(f"an update of shape {tuple(update.shape)} came (expected a matrix)")
    return update.detach().cpu().double().movedim(token_axis, 0)


def _norms(rows: Tensor) -> Vector:
    return np.asarray(rows.norm(dim=1).numpy(), np.float64)
