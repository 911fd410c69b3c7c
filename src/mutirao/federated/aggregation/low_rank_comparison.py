"""All rules of low-rank aggregation on the same factors: error and bytes of each.

For the benchmark and the documentation. What a rule loses by itself is measured with float32 on
both ways; with another codec the same call gives what the codec adds. Bytes are those of encoded
tensors, of all sites together in one round; names and framing are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mutirao.federated.aggregation.low_rank import (
    Factors,
    Matrix,
    concatenate,
    fedex,
    ffa,
    mean_product,
    product_norm,
    separate_means,
    stacked,
    to_float32,
)
from mutirao.federated.codec import CodecConfig, count_payload_bytes, decode_tensor, encode_tensor

FLOAT32 = CodecConfig(format="fp32")
SiteFactors = Mapping[str, Factors]
"""Factors of one layer by site."""


@dataclass(frozen=True)
class RuleReport:
    """What one rule costs in one round."""

    relative_error: float
    """Distance to the mean of products, all layers together, relative to it; Frobenius norm."""
    bytes_down: int
    """Bytes to all sites."""
    bytes_up: int
    """Bytes from all sites."""


@dataclass
class _Sums:
    gap: float = 0.0
    norm: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0

    def report(self) -> RuleReport:
        empty = math.inf if self.gap else 0.0
        error = self.gap / self.norm if self.norm else empty
        return RuleReport(error, self.bytes_down, self.bytes_up)


def compare_rules(
    factors: Mapping[str, SiteFactors],
    weights: Mapping[str, float],
    *,
    upload: CodecConfig = FLOAT32,
    download: CodecConfig = FLOAT32,
    starts: Mapping[str, SiteFactors] | None = None,
) -> dict[str, RuleReport]:
    """Return error and bytes of each rule that these factors allow.

    'ffa' is left out unless all sites share A, 'fedex' where ranks differ; 'separate' fills
    smaller ranks up with zeros.

    Args:
        factors: trained factors by layer and site.
        weights: by site.
        upload: how sites write theirs.
        download: how results are written.
        starts: what the sites trained from; then the difference is written, as rounds do it.
            None writes trained factors themselves.
    """
    sums: dict[str, _Sums] = {}
    for layer, by_site in factors.items():
        sites = sorted(by_site)
        shares = [weights[site] for site in sites]
        meant = [by_site[site] for site in sites]
        began = [starts[layer][site] if starts else zeros_like(by_site[site]) for site in sites]
        came = [_arrive(one, start, upload) for one, start in zip(meant, began, strict=True)]
        exact = stacked(meant, shares)
        norm = product_norm(exact)
        for rule, parts in _results(meant, came, shares, began[0], download).items():
            only_b = rule == "ffa"
            total = sums.setdefault(rule, _Sums())
            gap = product_norm(concatenate([*parts, exact.scaled(-1.0)]))
            total.gap, total.norm = math.hypot(total.gap, gap), math.hypot(total.norm, norm)
            total.bytes_up += sum(_count(each, upload, only_b) for each in meant)
            total.bytes_down += len(sites) * sum(_count(each, download, only_b) for each in parts)
    return {rule: each.report() for rule, each in sums.items()}


def zeros_like(factors: Factors) -> Factors:
    """Return factors of the same shapes that are zero."""
    return Factors(np.zeros_like(factors.b), np.zeros_like(factors.a), factors.scale)


def _results(
    meant: Sequence[Factors],
    came: Sequence[Factors],
    shares: list[float],
    start: Factors,
    download: CodecConfig,
) -> dict[str, list[Factors]]:
    """Return what each rule brings to the sites: pairs of factors whose products are added."""

    def go_on(letter: str, mean: Matrix) -> Matrix:
        began = start.b if letter == "B" else start.a
        return began + _code(mean - began, download)

    first = meant[0]
    plain = separate_means(came, shares)
    stack = mean_product(zip(came, shares, strict=True)).factors
    results = {"separate": [_arrive(plain, zeros_like(plain), download)]}
    results["stacked"] = [_arrive(stack, zeros_like(stack), download)]
    if all(np.array_equal(each.a, first.a) for each in meant):
        own = [Factors(each.b, first.a, each.scale) for each in came]  # A never travels
        results["ffa"] = [Factors(_code(ffa(own, shares).b, download), first.a)]
    if len({(each.rank, each.scale) for each in came}) == 1:
        means, residual = fedex(came, shares, carry=go_on)
        results["fedex"] = [means, _arrive(residual, zeros_like(residual), download)]
    return results


def _arrive(factors: Factors, start: Factors, codec: CodecConfig) -> Factors:
    """Return factors as they are after they travelled as a difference from a start."""
    return Factors(
        start.b + _code(factors.b - start.b, codec),
        start.a + _code(factors.a - start.a, codec),
        factors.scale,
    )


def _code(values: Matrix, codec: CodecConfig) -> NDArray[np.float64]:
    payload = encode_tensor("factor", to_float32(values), codec)
    return decode_tensor("factor", payload, values.shape, codec).astype(np.float64)


def _count(factors: Factors, codec: CodecConfig, only_b: bool) -> int:
    size_a = 0 if only_b else count_payload_bytes(factors.a.shape, codec)
    return count_payload_bytes(factors.b.shape, codec) + size_a
