"""Check digits and forms: whether a value can be what its recogniser takes it for.

Brazilian documents by validate-docbr, cards by Luhn's sum (ISO/IEC 7812-1), IBAN by ISO 13616,
addresses by the standard library. A general register (RG) has no national rule: the check is São
Paulo's, a weighted sum modulo 11.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from validate_docbr import CNPJ, DocumentBase

Check = Callable[[str], bool]

_SECTION = 40
"""Below it are the numbers of sections; assumption."""

_SECRET_CHARACTERS = 20
"""From this length, a password may be of lower-case letters only; assumption."""


def passes(document: DocumentBase) -> Check:
    """Return a check by validate-docbr, of a value's digits."""
    return lambda value: bool(document.validate(_digits(value)))


def has_digits(least: int, most: int) -> Check:
    """Return a check of the number of digits."""
    return lambda value: least <= len(_digits(value)) <= most


def is_cnpj(value: str) -> bool:
    """Check a company's number, old or alphanumeric (Receita Federal, from July 2026)."""
    return bool(CNPJ().validate("".join(filter(str.isalnum, value)).upper()))


def is_rg(value: str) -> bool:
    """Check São Paulo's digit: the weights of eight digits are 2 to 9, ten is written X."""
    digits = "".join(filter(str.isalnum, value)).upper()
    if len(digits) != 9 or len(set(digits)) == 1:
        return False
    total = sum(int(digit) * weight for digit, weight in zip(digits, range(2, 10), strict=False))
    last = (11 - total % 11) % 11
    return digits[-1] == ("X" if last == 10 else str(last))


_ISSUED = re.compile(
    r"""4\d{12}(?:\d{3}){0,2}                                      # Visa
    |(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}  # Mastercard
    |3[47]\d{13}                                                 # American Express
    |3(?:0[0-5]|[68]\d)\d{11}                                    # Diners Club
    |(?:2131|1800|35\d\d\d)\d{11}                                # JCB
    |6(?:011|5\d\d|4[4-9]\d)\d{12}                               # Discover
    |(?:50[0-9]|5[678]\d|63\d|67\d)\d{9,16}                      # Maestro, Elo
    |60\d{14}|62\d{14,17}                                        # Hipercard, UnionPay
    """,
    re.VERBOSE,
)
"""Lengths and first digits of issuers (ISO/IEC 7812 registry, as published by the schemes)."""


def is_card(value: str) -> bool:
    """Whether a number without a telling word has an issuer's form and a check digit."""
    return _ISSUED.fullmatch(_digits(value)) is not None and is_luhn(value)


def is_luhn(value: str) -> bool:
    """Check Luhn's sum."""
    digits = [int(digit) for digit in _digits(value)]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(value: str) -> bool:
    """Check an account's length and its remainder modulo 97."""
    compact = value.replace(" ", "").upper()
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def is_address(value: str) -> bool:
    """Whether it is an internet address and looks like one."""
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    if address.version == 4:
        parts = list(address.packed)
        # Four small numbers are far more often those of a section, except in 10.0.0.0/8.
        return parts[0] == 10 or not all(0 < part < _SECTION for part in parts)
    return sum(map(bool, value.split(":"))) >= 3


def is_landline(value: str) -> bool:
    """Whether the last two groups are not a range of years."""
    return not all(1900 <= int(year) <= 2099 for year in re.findall(r"\d{4}", value))


def is_secret(value: str) -> bool:
    """Whether what follows 'password:' is one, rather than the next word of a sentence."""
    has_letter = any(map(str.isalpha, value))
    return (has_letter and any(map(str.isdecimal, value))) or len(value) >= _SECRET_CHARACTERS


def has_letter(value: str) -> bool:
    """Whether there is a letter among the digits."""
    return any(map(str.isalpha, value))


def _digits(value: str) -> str:
    return "".join(character for character in value if character.isdecimal())
