"""Shamir's sharing against an independent interpolation (Newton's divided differences)."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutirao.errors import ProtocolError
from mutirao.federated.secure.shares import PRIME, SHARE_BYTES, recover_secret, split_secret

SECRETS = st.binary(min_size=32, max_size=32)


def newton_coefficients(points: list[tuple[int, int]]) -> list[int]:
    """Divided differences of points (x, y) modulo the prime."""
    table = [y for _, y in points]
    for order in range(1, len(points)):
        for row in range(len(points) - 1, order - 1, -1):
            distance = points[row][0] - points[row - order][0]
            table[row] = (table[row] - table[row - 1]) * pow(distance, PRIME - 2, PRIME) % PRIME
    return table


def newton_value(points: list[tuple[int, int]], x: int) -> int:
    coefficients = newton_coefficients(points)
    value = 0
    for coefficient, (node, _) in zip(reversed(coefficients), reversed(points), strict=True):
        value = (value * (x - node) + coefficient) % PRIME
    return value


def split(secret: bytes, threshold: int, num_shares: int, seed: int) -> tuple[bytes, ...]:
    return split_secret(
        secret,
        threshold=threshold,
        num_shares=num_shares,
        random_bytes=random.Random(seed).randbytes,
    )


@settings(max_examples=60)
@given(SECRETS, st.integers(1, 12), st.integers(0, 6), st.integers(0, 99), st.randoms())
def test_any_threshold_shares_bring_the_secret_back(secret, threshold, spare, seed, chance):
    shares = split(secret, threshold, threshold + spare, seed)
    chosen = chance.sample(range(len(shares)), threshold)
    assert recover_secret({number: shares[number] for number in chosen}) == secret
    points = [(number + 1, int.from_bytes(shares[number], "big")) for number in chosen]
    assert newton_value(points, 0).to_bytes(32, "big") == secret
    assert recover_secret(dict(enumerate(shares))) == secret


@settings(max_examples=30)
@given(SECRETS, st.integers(2, 8), st.integers(0, 99))
def test_the_polynomial_has_the_degree_that_hides_the_secret(secret, threshold, seed):
    shares = split(secret, threshold, threshold + 3, seed)
    points = [(n + 1, int.from_bytes(share, "big")) for n, share in enumerate(shares)]
    differences = newton_coefficients(points)
    assert differences[threshold - 1] != 0  # fewer shares lie on no polynomial of lower degree
    assert differences[threshold:] == [0] * 3


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_extreme_secrets(secret):
    shares = split(secret, 3, 5, 0)
    assert {len(share) for share in shares} == {SHARE_BYTES}
    assert recover_secret({4: shares[4], 0: shares[0], 2: shares[2]}) == secret


def test_fewer_shares_fit_every_secret():
    shares = split(b"s" * 32, 3, 5, 0)
    held = [(1, int.from_bytes(shares[0], "big")), (4, int.from_bytes(shares[3], "big"))]
    for other in (bytes(32), b"x" * 32, b"\xff" * 32):
        points = [*held, (0, int.from_bytes(other, "big"))]
        third = newton_value(points, 3).to_bytes(SHARE_BYTES, "big")
        assert recover_secret({0: shares[0], 3: shares[3], 2: third}) == other


def test_one_share_is_uniform_whatever_the_secret():
    tops = [
        int.from_bytes(split(bytes(32), 2, 2, seed)[0], "big") * 16 // PRIME
        for seed in range(4_000)
    ]
    counts = [tops.count(value) for value in range(16)]
    assert sum((count - 250) ** 2 / 250 for count in counts) < 37.7  # 0.1 % of chi-square, 15 d.f.


def test_a_wrong_share_gives_a_wrong_secret_and_no_crash():
    shares = dict(enumerate(split(b"s" * 32, 3, 3, 0)))
    shares[1] = bytes(SHARE_BYTES)
    assert recover_secret(shares) != b"s" * 32


@pytest.mark.parametrize("bad", [b"", bytes(32), b"\xff" * SHARE_BYTES, PRIME.to_bytes(33, "big")])
def test_what_is_no_share_is_refused(bad):
    with pytest.raises(ProtocolError, match="field"):
        recover_secret({0: bad})


def test_what_is_no_secret_is_refused():
    with pytest.raises(ProtocolError, match="fit no secret"):
        recover_secret({0: (2**256).to_bytes(SHARE_BYTES, "big")})


def test_the_prime_is_prime():
    """Miller–Rabin with 20 bases; that no number between 2**256 and it is one, too."""

    def is_prime(number: int) -> bool:
        odd, twos = number - 1, 0
        while odd % 2 == 0:
            odd, twos = odd // 2, twos + 1
        for base in range(2, 22):
            powers = [pow(base, odd << shift, number) for shift in range(twos)]
            if powers[0] != 1 and number - 1 not in powers:
                return False
        return True

    assert is_prime(PRIME)
    assert not any(is_prime(2**256 + offset) for offset in range(1, 297, 2))
