"""AUROC against the Mann-Whitney U of scipy: exact, ties included."""

from __future__ import annotations

import numpy as np
import pytest

from mutirao.evaluate.outcomes import auroc

stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_u_over_the_number_of_pairs(seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([0, 1], [30, 17]))
    scores = np.round(rng.normal(size=47) + 0.5 * labels, 1)
    u = stats.mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic
    assert auroc(scores, labels) == pytest.approx(u / (30 * 17), abs=1e-12)
