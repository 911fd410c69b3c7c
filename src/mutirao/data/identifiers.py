"""Find identifiers of people in text, and put their type in their place.

**NAMES ARE NOT FOUND, and so are NOT removed: nor are street addresses, employers, rare
diagnoses, or anything else that no checksum, fixed form or telling word beside it gives
away.** Text that has passed here is not anonymous; it holds fewer direct identifiers.

Each recogniser is a row of ``RECOGNISERS``: a pattern, a check (Brazilian check digits by
validate-docbr, Luhn, ISO 13616 for IBAN, the standard library for IP addresses), and
sometimes words that must stand shortly before. A number that could as well be a dose, a
laboratory value, a year range or an article number is taken only beside such a word.

Every pattern is bounded in length and unambiguous, so that time grows linearly with the
text whatever it holds.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from validate_docbr import CNPJ, CNS, CPF, PIS, TituloEleitoral

NOT_REMOVED = (
    "Names of people are NOT found and NOT removed, nor are street addresses, employers or "
    "anything that only its meaning gives away: this text is not anonymous."
)
"""To be shown wherever the counts of removed identifiers are."""

_CONTEXT_CHARACTERS = 32
"""How far before a value its telling word may stand; assumption."""


@dataclass(frozen=True, slots=True)
class Identifier:
    """Where an identifier stands in a text, and what it seems to be."""

    start: int
    """First character, from 0."""
    end: int
    """One past the last character."""
    type: str
    """For instance 'CPF'; see ``RECOGNISERS``."""
    score: float
    """How sure the recogniser is, 0 to 1; orders overlapping finds, is no probability."""


@dataclass(frozen=True, slots=True)
class Recogniser:
    """One way to recognise one type; a group named 'value' narrows what is replaced."""

    type: str
    pattern: re.Pattern[str]
    score: float
    check: Callable[[str], bool] | None = None
    context: re.Pattern[str] | None = None


def find_identifiers(text: str) -> list[Identifier]:
    """Return the identifiers of a text in order; none overlaps another.

    Of finds that overlap the higher score stays, then the longer, then the earlier.
    """
    found = [item for recogniser in RECOGNISERS for item in _find(recogniser, text)]
    found.sort(key=lambda item: (-item.score, item.start - item.end, item.start))
    kept: list[Identifier] = []
    taken = bytearray(len(text)) if found else bytearray()
    for item in found:
        if not any(taken[item.start : item.end]):
            taken[item.start : item.end] = b"\x01" * (item.end - item.start)
            kept.append(item)
    return sorted(kept, key=lambda item: item.start)


def redact(text: str, identifiers: Iterable[Identifier]) -> str:
    """Return the text with each identifier replaced by its type in brackets: '[CPF]'.

    Args:
        text: the text in which they were found.
        identifiers: not overlapping, in any order.
    """
    pieces, position = [], 0
    for item in sorted(identifiers, key=lambda item: item.start):
        pieces += [text[position : item.start], f"[{item.type}]"]
        position = item.end
    return "".join([*pieces, text[position:]])


def count_types(identifiers: Iterable[Identifier]) -> dict[str, int]:
    """Return how many identifiers there are of each type, types in alphabetic order."""
    return dict(sorted(Counter(item.type for item in identifiers).items()))


def _find(recogniser: Recogniser, text: str) -> Iterable[Identifier]:
    for match in recogniser.pattern.finditer(text):
        start, end = match.span("value" if "value" in recogniser.pattern.groupindex else 0)
        if recogniser.context is not None:
            before = text[max(0, start - _CONTEXT_CHARACTERS) : start]
            if not recogniser.context.search(before):
                continue
        if recogniser.check is None or recogniser.check(text[start:end]):
            yield Identifier(start, end, recogniser.type, recogniser.score)


def _digits(value: str) -> str:
    return "".join(character for character in value if character.isdecimal())


def _passes(document: CPF | CNPJ | CNS | PIS | TituloEleitoral) -> Callable[[str], bool]:
    return lambda value: bool(document.validate(_digits(value)))


def _is_cnpj(value: str) -> bool:
    return bool(CNPJ().validate("".join(filter(str.isalnum, value)).upper()))


def _is_card(value: str) -> bool:
    """Whether a number without a telling word has an issuer's prefix and a check digit."""
    return value[0] in "23456" and _is_luhn(value)


def _is_iban(value: str) -> bool:
    compact = value.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def _is_address(value: str) -> bool:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    if address.version == 4:
        # Four single digits are far more often the number of a section.
        return len(value) > len("1.1.1.1")
    return sum(map(bool, value.split(":"))) >= 3


def _is_luhn(value: str) -> bool:
    digits = [int(digit) for digit in _digits(value)]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_landline(value: str) -> bool:
    """Whether the last two groups are not a range of years."""
    return not all(1900 <= int(year) <= 2099 for year in re.findall(r"\d{4}", value))


def _has_digits(least: int, most: int) -> Callable[[str], bool]:
    return lambda value: least <= len(_digits(value)) <= most


def _words(pattern: str) -> re.Pattern[str]:
    """Words that must end shortly before the value, with nothing but marks between."""
    return re.compile(rf"\b(?:{pattern})\b[^\w\n]{{0,4}}(?:n[ºo°]?[.:]?\s?)?[(+#]?$", re.IGNORECASE)


_MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|fev|abr|mai|ago|set|out|dez"
_DATE = (
    r"(?P<value>\d{1,2}[/.-]\d{1,2}[/.-](?:\d{4}|\d{2})\b|\d{4}[/-]\d{1,2}[/-]\d{1,2}\b"
    rf"|(?:{_MONTHS})\w{{0,7}}\.? \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}\b"
    rf"|\d{{1,2}}[ºo]?(?: de)? (?:{_MONTHS})\w{{0,7}}\.?,?(?: de)? \d{{4}}\b)"
)
_BIRTH = (
    r"\b(?:d\.?o\.?b\b\.?|date of birth|birth ?date|born(?: on)?|data de nascimento"
    r"|nascid[oa](?: em| no dia)?|nasceu em|nascimento|d\.n\.)\W{0,4}"
)
_PHONE_WORDS = _words(
    r"tel|telefone|telephone|fone|phone|cel|cell|celular|mobile|whatsapp|fax|ramal"
    r"|contato|contact|call|ligar para|phone number"
)
_RECORD_WORDS = (
    r"\b(?:MRN|(?:medical|hospital|patient) (?:record|id)(?: number| no\.?)?"
    r"|prontu[aá]rio|registro hospitalar|chart (?:number|no\.?))"
    r"(?: n[uú]mero| n[ºo°]\.?)?\W{0,3}"
)

RECOGNISERS: tuple[Recogniser, ...] = (
    Recogniser(
        "EMAIL",
        re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,6}(?<![-.])"),
        0.95,
    ),
    Recogniser("URL", re.compile(r"\b(?:https?://|www\.)[^\s<>\"]{1,2000}(?<![.,;:!?)\]'])"), 0.9),
    Recogniser(
        "IP",
        re.compile(  # "EC 3.1.1.11" is an enzyme.
            r"(?<![\w.])(?<!EC )(?<!EC: )\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)"
        ),
        0.7,
        _is_address,
    ),
    Recogniser(
        "IP",
        re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){3,7}[0-9A-Fa-f]{0,4}(?![\w:])"),
        0.8,
        _is_address,
    ),
    # Brazilian documents: in their own punctuation, or bare beside their name.
    Recogniser(
        "CPF",
        re.compile(r"(?<![\w.,/-])\d{3}[. ]?\d{3}[. ]?\d{3}[- ]?\d{2}(?![\w/-]|[.,]\d)"),
        0.9,
        _passes(CPF()),
    ),
    Recogniser(
        "CPF",
        re.compile(r"(?<!\d)\d{3}[. ]?\d{3}[. ]?\d{3}[-/ ]?\d{2}(?!\d)"),
        0.85,
        # A mistyped number beside its name still points to a person.
        context=_words("CPF(?:/MF)?"),
    ),
    Recogniser(
        "CNPJ",
        re.compile(
            r"(?<![\w./-])[0-9A-Z]{2}\.?[0-9A-Z]{3}\.?[0-9A-Z]{3}/[0-9A-Z]{4}-?\d{2}(?![\w/-])"
        ),
        0.95,
        _is_cnpj,
    ),
    Recogniser(
        "CNPJ",
        re.compile(r"(?<!\w)[0-9A-Z]{12}\d{2}(?!\w)"),
        0.9,
        _is_cnpj,
        _words("CNPJ(?:/MF)?"),
    ),
    Recogniser("CNPJ", re.compile(r"(?<![\w.,/-])\d{14}(?![\w/-]|[.,]\d)"), 0.6, _is_cnpj),
    Recogniser(
        "CNS",
        re.compile(r"(?<![\w.,/-])[12789]\d{2}[ .]?\d{4}[ .]?\d{4}[ .]?\d{4}(?![\w/-]|[.,]\d)"),
        0.85,
        _passes(CNS()),
    ),
    Recogniser(
        "PIS",
        re.compile(r"(?<![\w.,/-])\d{3}\.\d{5}\.\d{2}-\d(?![\w-])"),
        0.9,
        _passes(PIS()),
    ),
    Recogniser(
        "PIS",
        re.compile(r"(?<!\d)\d{3}[. ]?\d{5}[. ]?\d{2}[- ]?\d(?!\d)"),
        0.95,
        _passes(PIS()),
        _words("PIS(?:/PASEP)?|PASEP|NIS|NIT"),
    ),
    Recogniser(
        "TITULO",
        re.compile(r"(?<!\d)\d{4} ?\d{4} ?\d{4}(?!\d)"),
        0.9,
        _passes(TituloEleitoral()),
        _words("t[ií]tulo(?: de eleitor| eleitoral)?"),
    ),
    Recogniser("CEP", re.compile(r"(?<![\w.,/-])\d{2}\.?\d{3}-\d{3}(?![\w/-]|[.,]\d)"), 0.6),
    Recogniser("CEP", re.compile(r"(?<!\d)\d{5}-?\d{3}(?!\d)"), 0.9, context=_words("CEP")),
    # Telephones: with a country code, with an area code in a national form, or by context.
    Recogniser(
        "PHONE",
        re.compile(
            r"(?<![\w+])\+\d{1,4}(?:[ .-]?\(\d{1,4}\)[ .-]?\d{2,5}|[ .-]\d{2,5})"
            r"(?:[ .-]\d{2,5}){0,4}(?:x\d{1,6})?(?!\w)"
        ),
        0.85,
        _has_digits(9, 21),
    ),
    Recogniser("PHONE", re.compile(r"(?<![\w+])\+\d{9,15}(?!\w)"), 0.8),
    Recogniser(
        "PHONE",
        re.compile(r"(?<![\w(])\(0?[1-9][1-9]\) ?9?\d{4}[- ]?\d{4}(?!\w|-\d)"),
        0.85,
    ),
    Recogniser(
        "PHONE",
        re.compile(r"(?<![\w.,/-])0?[1-9][1-9] 9\d{4}[- ]\d{4}(?![\w/-]|[.,]\d)"),
        0.7,
    ),
    Recogniser(
        "PHONE",
        re.compile(r"(?<![\w.,/-])0?[1-9][1-9] [2-5]\d{3}-\d{4}(?![\w/-]|[.,]\d)"),
        0.6,
        _is_landline,
    ),
    Recogniser(
        "PHONE",
        re.compile(
            r"(?<![\w.,/-])(?:(?:001|1)[ .-])?"
            r"(?:\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}([.-])\d{3}\1\d{4})(?:x\d{1,6})?(?![\w/-]|[.,]\d)"
        ),
        0.8,
    ),
    Recogniser(
        "PHONE",
        re.compile(
            r"(?<![\w(+.])(?:\d{8,13}|\(\d{2,4}\)[ -]?\d{8,9}"
            r"|(?:\(\d{2,4}\)[ -]?\d{3,5}|\d{2,5})(?:[ .-]\d{2,5}){1,4})(?:x\d{1,6})?(?!\w)"
        ),
        0.75,
        _has_digits(8, 21),
        _PHONE_WORDS,
    ),
    Recogniser(
        "SSN",
        re.compile(r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-]|\.\d)"),
        0.85,
    ),
    Recogniser(
        "SSN",
        re.compile(r"(?<!\d)\d{3}[- ]?\d{2}[- ]?\d{4}(?!\d)"),
        0.9,
        context=_words("SSN|social security(?: number| no)?"),
    ),
    Recogniser(
        "CREDIT_CARD",
        re.compile(r"(?<![\w.,/-])\d(?:[ -]?\d){12,18}(?![\w/-]|[.,]\d)"),
        0.8,
        _is_card,
    ),
    Recogniser(
        "CREDIT_CARD",
        re.compile(r"(?<![\w.,/-])\d(?:[ -]?\d){11,18}(?![\w/-]|[.,]\d)"),
        0.9,
        _is_luhn,
        _words(r"card|card number|cart[aã]o|visa|mastercard|amex"),
    ),
    Recogniser(
        "IBAN",
        re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"),
        0.95,
        _is_iban,
    ),
    Recogniser("DATE_OF_BIRTH", re.compile(_BIRTH + _DATE, re.IGNORECASE), 0.9),
    Recogniser(
        "MRN",
        re.compile(
            _RECORD_WORDS + r"(?P<value>[A-Z]{0,4}-?\d{4,12}(?:[-/.]\d{1,6}){0,2})(?!\w)",
            re.IGNORECASE,
        ),
        0.9,
    ),
)
"""Every recogniser; of two that find the same span, the one with the higher score names it."""
