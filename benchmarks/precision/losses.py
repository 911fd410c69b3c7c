"""The loss of a model that is not trained yet: L = E + A N^-α + B D^-β, fitted to fitted runs.

Hoffmann et al. 2022 (arXiv:2203.15556), equation 2. Priors: α 0.35 ± 0.2 and β 0.5 ± 0.3 (between
Hoffmann's 0.28 and Kumar's 0.50, and wide, since such small models learn fast at first), E 0.8 ±
0.3 nats per byte (assumption); without them two numbers of tokens do not tell E from β.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import least_squares

from mutirao.precision.forms import CENTER
from mutirao.precision.rows import Measurement, Query

PRIORS = {"alpha": (0.35, 0.2), "beta": (0.5, 0.3), "floor": (0.8, 0.3)}
SPREAD = 0.01
"""Nats by which runs of one size differ."""


def fit_losses(rows: Sequence[Measurement]) -> Callable[[Query], float]:
    """Return what foretells the loss from N and D."""
    points = sorted({(row.query.num_params, row.query.num_tokens, row.query.loss) for row in rows})
    sizes, lengths, losses = np.array(points, dtype=float).T

    def foretell(values: np.ndarray, num_params: object, num_tokens: object) -> np.ndarray:
        floor, of_size, alpha, of_length, beta = values
        sizes = np.asarray(num_params) / CENTER.num_params
        lengths = np.asarray(num_tokens) / CENTER.num_tokens
        result: np.ndarray = floor + of_size * sizes**-alpha + of_length * lengths**-beta
        return result

    def left(values: np.ndarray) -> np.ndarray:
        pulls = [
            (values[at] - PRIORS[name][0]) / PRIORS[name][1]
            for at, name in ((2, "alpha"), (4, "beta"), (0, "floor"))
        ]
        return np.append((foretell(values, sizes, lengths) - losses) / SPREAD, pulls)

    found = least_squares(left, [0.8, 0.2, 0.35, 0.4, 0.5]).x
    return lambda query: float(foretell(found, query.num_params, query.num_tokens))
