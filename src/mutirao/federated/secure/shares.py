"""Shamir's secret sharing of 32-byte secrets: any ``threshold`` shares bring one back.

Shamir 1979, "How to share a secret" (doi:10.1145/359168.359176): the secret is the value
at zero of a random polynomial over a prime field; a share is its value at a site's number
plus one. Fewer shares say nothing about the secret. A wrong share gives a wrong secret,
not an error: callers compare with a commitment.

The arithmetic is Python's and takes time that depends on the numbers; an observer who can
time a site's process to the microsecond is not in the threat model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mutirao.errors import ProtocolError

PRIME = 2**256 + 297
"""The smallest prime above 2**256 (found by search; a test checks that it is prime)."""
SECRET_BYTES = 32
SHARE_BYTES = 33
_COEFFICIENT_BYTES = 48
"""128 bits more than the prime, so that the remainder is uniform to within 2**-128."""


def split_secret(
    secret: bytes, *, threshold: int, num_shares: int, random_bytes: Callable[[int], bytes]
) -> tuple[bytes, ...]:
    """Return the shares of a secret, in the order of the sites' numbers.

    Args:
        secret: 32 bytes.
        threshold: shares that bring it back, at least 1.
        num_shares: shares in all.
        random_bytes: returns as many secret, uniform bytes as it is asked for.

    Returns:
        ``num_shares`` shares of 33 bytes.
    """
    assert len(secret) == SECRET_BYTES
    assert 1 <= threshold <= num_shares < PRIME
    random = random_bytes(_COEFFICIENT_BYTES * (threshold - 1))
    coefficients = [int.from_bytes(secret, "big")]
    for start in range(0, len(random), _COEFFICIENT_BYTES):
        drawn = int.from_bytes(random[start : start + _COEFFICIENT_BYTES], "big")
        coefficients.append(drawn % PRIME)
    values = (_evaluate(coefficients, number + 1) for number in range(num_shares))
    return tuple(value.to_bytes(SHARE_BYTES, "big") for value in values)


def recover_secret(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of ``threshold`` or more shares.

    Args:
        shares: by the number of the site that held them.

    Raises:
        ProtocolError: a share is not in the field, or they fit no 32-byte secret.
    """
    weights = _weights_at_zero(tuple(number + 1 for number in shares))
    total = 0
    for weight, share in zip(weights, shares.values(), strict=True):
        value = int.from_bytes(share, "big")
        if len(share) != SHARE_BYTES or value >= PRIME:
            raise ProtocolError("a share is not an element of the field")
        total = (total + weight * value) % PRIME
    if total >= 2 ** (8 * SECRET_BYTES):
        raise ProtocolError("the shares fit no secret")
    return total.to_bytes(SECRET_BYTES, "big")


def _evaluate(coefficients: list[int], x: int) -> int:
    """Value of a polynomial, constant term first (Horner)."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def _weights_at_zero(points: tuple[int, ...]) -> list[int]:
    """Lagrange's weights: sum of weight · value at each point is the polynomial at zero."""
    weights = []
    for x in points:
        numerator, denominator = 1, 1
        for other in points:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        weights.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return weights
