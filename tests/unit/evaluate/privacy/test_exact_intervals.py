"""Binomial arithmetic against scipy."""

import numpy as np
import pytest
from scipy import stats

from mutirao.errors import InputError
from mutirao.evaluate.privacy.intervals import binomial_masses, clopper_pearson


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("num", [0, 1, 7, 2000])
def test_masses(num, share):
    expected = stats.binom.pmf(np.arange(num + 1), num, share)
    np.testing.assert_allclose(binomial_masses(num, share), expected, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
@pytest.mark.parametrize(
    ("num_right", "num"), [(0, 1), (1, 1), (0, 50), (50, 50), (3, 50), (999, 2000)]
)
def test_interval(num_right, num, confidence):
    expected = stats.binomtest(num_right, num).proportion_ci(confidence, "exact")
    assert clopper_pearson(num_right, num, confidence) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("num_right", "num", "confidence"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)]
)
def test_bad_input(num_right, num, confidence):
    with pytest.raises(InputError):
        clopper_pearson(num_right, num, confidence)
