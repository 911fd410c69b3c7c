"""Values of the same form in the place of identifiers: the same value, the same surrogate.

What stands for a value follows from a secret key of the site, the type and the value's letters and
digits, so that a person keeps one pseudonym in all records, however the number is punctuated, and
nobody without the key can tell whose it is or match two sites. Signs, spaces and lengths stay.
Surrogates point to nobody: numbers with check digits fail their check, addresses are of ranges for
documentation or that nobody uses (RFC 1112, 2606, 3849), cards and accounts cannot exist, social
security numbers are of a range that is never issued.

A telephone keeps its country and area, a date of birth its decade, as far as it moves by two years
at most. Short numbers are few: two people may share a surrogate. Secrets have nothing that is worth
learning, and are redacted in this mode, too.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import secrets
import string
from collections.abc import Callable, Iterator
from pathlib import Path

from validate_docbr import CNS, CPF, PIS, TituloEleitoral

from mutirao.data.identifiers.checks import Check, is_cnpj, is_iban, is_luhn, is_rg, passes
from mutirao.errors import DataError

KEY_BYTES = 32
_PHONE_DIGITS = 7
"""Of a telephone, how many at the end are replaced; assumption: those of a subscriber."""
_YEARS = 2
"""By how much a year of birth moves, at most."""

_CHECKS: dict[str, Check] = {
    "CPF": passes(CPF()),
    "CNPJ": is_cnpj,
    "CNS": passes(CNS()),
    "PIS": passes(PIS()),
    "TITULO": passes(TituloEleitoral()),
    "RG": is_rg,
    "CREDIT_CARD": is_luhn,
    "IBAN": is_iban,
}
"""What a surrogate must fail."""


class _Draw:
    """Numbers that follow from a key and a value."""

    def __init__(self, key: bytes, type_: str, value: str) -> None:
        self._seed = hmac.digest(key, f"{type_}\0{_normal(value)}".encode(), "sha256")
        self._numbers = self._generate()

    def below(self, limit: int) -> int:
        """Return the next number from 0 to ``limit`` - 1."""
        return next(self._numbers) % limit

    def _generate(self) -> Iterator[int]:
        block = 0
        while True:
            data = hmac.digest(self._seed, block.to_bytes(8, "big"), "sha256")
            # Four bytes at a time: no remainder below 100 is more likely by a millionth.
            yield from (int.from_bytes(data[i : i + 4], "big") for i in range(0, 32, 4))
            block += 1


def surrogate(type_: str, value: str, key: bytes) -> str:
    """Return what stands for a value.

    Args:
        type_: see ``recognisers.RECOGNISERS``.
        value: as it stands in the text.
        key: the site's own, ``KEY_BYTES`` random bytes.
    """
    draw = _Draw(key, type_, value)
    made = _MAKERS.get(type_, _scrambled)(value, draw)
    check = _CHECKS.get(type_)
    if check is not None and check(made):
        made = _broken(made, check)
    return made


def value_hash(type_: str, value: str, key: bytes) -> str:
    """Return what an audit knows a value by: alike for the same value, nothing without the key."""
    return hmac.digest(key, f"audit\0{type_}\0{_normal(value)}".encode(), "sha256").hex()[:32]


def site_key(path: Path) -> bytes:
    """Return a site's key; one is drawn the first time, readable by its owner only.

    Raises:
        DataError: the file cannot be read or written, is no key, or others may read it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(KEY_BYTES) + "\n")
        if path.stat().st_mode & 0o077:
            raise DataError(f"others may read the site's key: chmod 600 {path}")
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not in hexadecimal digits"
        raise DataError(f"the site's key {path} cannot be used: {reason}") from None
    if len(key) != KEY_BYTES:
        raise DataError(f"{path} holds {len(key)} bytes (expected a key of {KEY_BYTES})")
    return key


def _normal(value: str) -> str:
    return "".join(filter(str.isalnum, value)).upper()


def _scrambled(value: str, draw: _Draw) -> str:
    return "".join(_like(sign, draw) for sign in value)


def _like(sign: str, draw: _Draw) -> str:
    """Return a sign of the same kind."""
    if sign.isdecimal():
        return str(draw.below(10)) if sign == "0" else str(1 + draw.below(9))
    if sign.isalpha():
        letters = string.ascii_uppercase if sign.isupper() else string.ascii_lowercase
        return letters[draw.below(len(letters))]
    return sign


def _broken(value: str, check: Check) -> str:
    """Change the last digit until the check fails; of ten, one or two pass."""
    place = max(i for i, sign in enumerate(value) if sign.isdecimal() or sign in "Xx")
    for digit in string.digits:
        made = value[:place] + digit + value[place + 1 :]
        if not check(made):
            return made
    raise AssertionError(f"a check that no last digit fails: {check}")


def _email(value: str, draw: _Draw) -> str:
    return _scrambled(value.partition("@")[0], draw) + "@example.org"


def _url(value: str, draw: _Draw) -> str:
    scheme = "https://" if value.lower().startswith("https") else "http://"
    return f"{scheme}example.org/{draw.below(2**32):08x}"


def _address(value: str, draw: _Draw) -> str:
    if ":" in value:
        return f"2001:db8::{draw.below(2**16):x}:{draw.below(2**16):x}"
    return ".".join(map(str, (240 + draw.below(15), *(draw.below(256) for _ in range(3)))))


def _hardware_address(value: str, draw: _Draw) -> str:
    """Return a locally administered one."""
    made = re.sub("[0-9A-Fa-f]", lambda _: "0123456789abcdef"[draw.below(16)], value)
    return "02" + made[2:]


def _ssn(value: str, draw: _Draw) -> str:
    return "9" + _scrambled(value[1:], draw)


def _iban(value: str, draw: _Draw) -> str:
    """Return one of the same country with check digits that no account has."""
    return value[:2] + "00" + _scrambled(value[4:], draw)


def _phone(value: str, draw: _Draw) -> str:
    places = [i for i, sign in enumerate(value) if sign.isdecimal()]
    changed = set(places[1:][-_PHONE_DIGITS:])
    return "".join(_like(sign, draw) if i in changed else sign for i, sign in enumerate(value))


def _date(value: str, draw: _Draw) -> str:
    """Move the year a little; days and months become any that every month and order allows."""

    def move(match: re.Match[str]) -> str:
        if len(match[0]) == 4:
            return str(int(match[0]) - _YEARS + draw.below(2 * _YEARS + 1))
        return f"{1 + draw.below(12):0{len(match[0])}d}"[-2:]

    return re.sub(r"\d+", move, value)


def _redacted(_: str, __: _Draw) -> str:
    return "[SECRET]"


_MAKERS: dict[str, Callable[[str, _Draw], str]] = {
    "EMAIL": _email,
    "URL": _url,
    "IP": _address,
    "MAC": _hardware_address,
    "SSN": _ssn,
    "IBAN": _iban,
    "PHONE": _phone,
    "DATE_OF_BIRTH": _date,
    "SECRET": _redacted,
}
"""How the surrogates of a type are made; others keep the kind of every sign."""
