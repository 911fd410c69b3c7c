"""Synthetic measurements: a known law, luck of each run, luck within it, and evaluation error."""

import math

import numpy as np

from mutirao.precision.rows import Measurement, Query

SIZES = (1e5, 2e5, 4.5e5, 9e5, 1.8e6)
TOKENS = (1e6, 4e6, 16e6, 64e6)
LAW = {"log_c[rtn]": math.log(0.5), "gamma_d": 0.5, "gamma_n": 0.35, "bit_rate": 1 / 0.59}


def true_degradation(query):
    return (
        0.5
        * query.num_tokens**0.5
        / query.num_params**0.35
        * math.exp(-query.bits * LAW["bit_rate"])
    )


def synthetic_rows(
    seed,
    sizes=SIZES,
    tokens=TOKENS,
    *,
    num_seeds=3,
    between=0.08,
    within=0.04,
    relative_error=0.03,
    bits=(3, 4, 5, 6),
    trunk=True,
    groups=(32,),
):
    """Rows of the law above. With a trunk, all D of one N and seed are one run."""
    rng = np.random.default_rng(seed)
    rows = []
    for size in sizes:
        for each in range(num_seeds):
            trunk_luck = rng.normal()
            for num_tokens in tokens:
                luck = between * (trunk_luck if trunk else rng.normal())
                run = f"{seed}-{size:g}-{each}" + ("" if trunk else f"-{num_tokens:g}")
                for num_bits in bits:
                    for group in groups:
                        query = Query(size, num_tokens, num_bits, "rtn", group)
                        real = true_degradation(query) * math.exp(luck + within * rng.normal())
                        seen = real * (1 + relative_error * rng.normal())
                        rows.append(Measurement(query, seen, relative_error * real, run))
    return rows
