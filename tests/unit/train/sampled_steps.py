"""Steps on sampled units, and their privacy loss written out, for the tests of the accountant."""

import math

import numpy as np

from mutirao.train.accountant import Phase


def run(q, sigma, num_steps):
    return Phase(sampling_probability=q, noise_multiplier=sigma, num_steps=num_steps)


def loss_at(z, q, sigma):
    """Privacy loss log P(z) / Q(z) of the mixture with the unit against the noise alone."""
    return np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
