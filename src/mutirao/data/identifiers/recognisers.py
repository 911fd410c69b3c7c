"""What identifiers look like: one row for each way to recognise one type.

A row has a pattern, a check of what it matched (see ``checks``), and sometimes words that must
stand shortly before. A number that could as well be a dose, a laboratory value, a year range or an
article number is taken only beside such a word. Every pattern is bounded in length and
unambiguous, so that time grows linearly with the text whatever it holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from validate_docbr import CNS, CPF, PIS, TituloEleitoral

from mutirao.data.identifiers.checks import (
    Check,
    has_digits,
    has_letter,
    is_address,
    is_card,
    is_cnpj,
    is_iban,
    is_landline,
    is_luhn,
    is_rg,
    is_secret,
    passes,
)


@dataclass(frozen=True, slots=True)
class Recogniser:
    """One way to recognise one type; a group named 'value' narrows what is replaced."""

    type: str
    pattern: re.Pattern[str]
    score: float
    check: Check | None = None
    context: re.Pattern[str] | None = None
    """What the text right before must end with."""
    unless: re.Pattern[str] | None = None
    """What it must not end with: words that say that a number is another."""
    words: tuple[str, ...] = ()
    """In lower case; a text that has none of them has no match. Empty: any text may."""
    hint: re.Pattern[str] | None = None
    """Found faster than the pattern; a text without it has no match. None: any text may."""
    least_digits: int = 0
    """Of a number, which begins with a digit, a plus or a bracket, is at least six long, and has
    only digits, spaces, x and .()/+- in it: it is looked for in such rows only, if they have as
    many digits. 0: no number."""


_LEAST_DIGITS = {
    "CPF": 11,
    "CNPJ": 14,
    "CNS": 15,
    "PIS": 11,
    "TITULO": 12,
    "CNH": 11,
    "CEP": 8,
    "PHONE": 7,
    "IP": 4,
    "SSN": 9,
    "CREDIT_CARD": 12,
}


def _number(
    type_: str, pattern: str, score: float, check: Check | None = None, after: str = ""
) -> Recogniser:
    """Return a recogniser of rows of digits: right after words, or not after those of others."""
    context, unless = (_after(after), None) if after else (None, _OTHER_NUMBERS)
    least = _LEAST_DIGITS[type_]
    return Recogniser(type_, re.compile(pattern), score, check, context, unless, least_digits=least)


def _after(words: str) -> re.Pattern[str]:
    """Match words that end shortly before the value, with hardly more than marks between."""
    return re.compile(
        rf"\b(?:{words})\b(?: is| é)?[^\w\n]{{0,4}}(?:(?:n[uú]mero|n[ºo°]?[.:]?)\s?)?[(+#:]?\s?$",
        re.IGNORECASE,
    )


_OTHER_NUMBERS = _after(
    r"lote?|batch|s[eé]rie|serial(?: number| no)?|protocolo?|pedido|order|invoice|nota fiscal"
    r"|NF-?e?|processo|case|ticket|chamado|c[oó]digo(?: de barras)?|barcode|IMEI|chassi|PMID"
    r"|ISBN|EAN|tracking|parcel|guia|refer[eê]ncia|reference"
)

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
_RECORD_WORDS = (
    r"\b(?:MRN|(?:medical|hospital|patient) (?:record|id)(?: number| no\.?)?"
    r"|prontu[aá]rio|registro hospitalar|chart (?:number|no\.?))"
    r"(?: n[uú]mero| n[ºo°]\.?)?\W{0,3}"
)
_PHONE_WORDS = (
    r"tel|telefone|telephone|fone|phone|cel|cell|celular|mobile|whatsapp|fax|ramal|desk|direct"
    r"|contato|contact|call|ligar para|phone number"
    r"|(?:call|text|ring|phone|reach)(?: me| us| him| her| them)? (?:on|at)"
)
_STATES = "AC|AL|AM|AP|BA|CE|DF|ES|GO|MA|MG|MS|MT|PA|PB|PE|PI|PR|RJ|RN|RO|RR|RS|SC|SE|SP|TO"
_SECRET_WORDS = (
    r"password|passwd|pwd|senha|secret|client[_ -]secret|token|api[_ -]?key|chave (?:de |da )?api"
    r"|access[_ -]key|secret[_ -]key|auth[_ -]token"
)

_BRAZIL = (
    # In their own punctuation, or bare beside their name.
    _number(
        "CPF",
        r"(?<![\w.,/-])\d{3}[. ]?\d{3}[. ]?\d{3}[- ]?\d{2}(?![\w/-]|[.,]\d)",
        0.9,
        passes(CPF()),
    ),
    # A mistyped number beside its name still points to a person.
    _number(
        "CPF",
        r"(?<!\d)\d{3}[. ]?\d{3}[. ]?\d{3}[-/ ]?\d{2}(?!\d)",
        0.85,
        after="CPF(?:/MF)?",
    ),
    Recogniser(
        "CNPJ",
        re.compile(
            r"(?<![\w./-])[0-9A-Z]{2}\.?[0-9A-Z]{3}\.?[0-9A-Z]{3}/[0-9A-Z]{4}-?\d{2}(?![\w/-])"
        ),
        0.95,
        is_cnpj,
        hint=re.compile(r"/[0-9A-Z]{4}-?\d\d"),
    ),
    Recogniser(
        "CNPJ",
        re.compile(r"(?<!\w)[0-9A-Z]{12}\d{2}(?!\w)"),
        0.9,
        is_cnpj,
        _after("CNPJ(?:/MF)?"),
        words=("cnpj",),
    ),
    _number("CNPJ", r"(?<![\w.,/-])\d{14}(?![\w/-]|[.,]\d)", 0.6, is_cnpj),
    _number(
        "CNS",
        r"(?<![\w.,/-])[12789]\d{2}[ .]?\d{4}[ .]?\d{4}[ .]?\d{4}(?![\w/-]|[.,]\d)",
        0.85,
        passes(CNS()),
    ),
    _number("PIS", r"(?<![\w.,/-])\d{3}\.\d{5}\.\d{2}-\d(?![\w-])", 0.9, passes(PIS())),
    _number(
        "PIS",
        r"(?<!\d)\d{3}[. ]?\d{5}[. ]?\d{2}[- ]?\d(?!\d)",
        0.95,
        passes(PIS()),
        after="PIS(?:/PASEP)?|PASEP|NIS|NIT",
    ),
    _number(
        "TITULO",
        r"(?<!\d)\d{4}[ .]?\d{4}[ .]?\d{4}(?!\d)",
        0.9,
        passes(TituloEleitoral()),
        after=r"t[ií]tulo(?: de eleitor(?:a)?| eleitoral)?|t\.? ?eleitor",
    ),
    _number(
        "CNH",
        r"(?<!\d)\d{11}(?!\d)",
        0.95,
        after=r"CNH|habilita[cç][aã]o|carteira (?:nacional )?de (?:habilita[cç][aã]o|motorista)",
    ),
    Recogniser(
        "RG",
        re.compile(
            rf"(?<![\w.])(?:(?:{_STATES})[- ]?)?\d{{1,2}}\.?\d{{3}}\.?\d{{3}}"
            r"(?:[- ]?[\dXx](?!\d))?(?!\w|[.,]\d)"
        ),
        0.88,
        context=_after(
            r"R\.?G\.?|registro geral|identidade|carteira de identidade|c[eé]dula de identidade"
        ),
        words=("rg", "r.g", "registro geral", "identidade"),
    ),
    Recogniser(
        "RG",
        re.compile(r"(?<![\w.,/-])\d{2}\.\d{3}\.\d{3}-[\dXx](?![\w/-]|[.,]\d)"),
        0.6,
        is_rg,
    ),
    Recogniser(
        "CRM",
        re.compile(
            rf"\bCRM(?:[ /-]{{0,2}}(?:{_STATES})\b)?[ :./-]{{0,3}}(?:n[ºo°]?\.?:?|n[uú]mero:?)? ?"
            rf"(?P<value>(?:\d{{2,3}}\.\d{{3}}|\d{{3,7}})(?:[ /-]?(?:{_STATES})\b)?)"
            r"(?!\w|[.,]\d)",
            re.IGNORECASE,
        ),
        0.9,
        words=("crm",),
    ),
    _number("CEP", r"(?<![\w.,/-])\d{2}\.?\d{3}-\d{3}(?![\w/-]|[.,]\d)", 0.6),
    _number("CEP", r"(?<!\d)\d{2}\.?\d{3}-?\d{3}(?!\d)", 0.9, after="CEP"),
)

_PHONES = (
    # With a country code, with an area code in a national form, or by context.
    _number(
        "PHONE",
        r"(?<![\w+])\+\d{1,7}(?:[ .-]?\(\d{1,4}\)[ .-]?\d{1,5}|[ .-]\d{2,5})"
        r"(?:[ .-]\d{2,5}){0,4}(?:x\d{1,6})?(?!\w)",
        0.85,
        has_digits(9, 21),
    ),
    _number("PHONE", r"(?<![\w+])\+\d{9,15}(?!\w)", 0.8),
    _number("PHONE", r"(?<![\w(])\(0?[1-9][1-9]\) ?9?\d{4}[- ]?\d{4}(?!\w|-\d)", 0.85),
    _number("PHONE", r"(?<![\w.,/-])0?[1-9][1-9] 9\d{4}[- ]\d{4}(?![\w/-]|[.,]\d)", 0.7),
    _number(
        "PHONE",
        r"(?<![\w.,/-])0?[1-9][1-9] [2-5]\d{3}-\d{4}(?![\w/-]|[.,]\d)",
        0.6,
        is_landline,
    ),
    _number(
        "PHONE",
        r"(?<![\w.,/-])(?:(?:001|1)[ .-])?"
        r"(?:\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}([.-])\d{3}\1\d{4})(?:x\d{1,6})?(?![\w/-]|[.,]\d)",
        0.8,
    ),
    _number(
        "PHONE",
        r"(?<![\w(+.])(?:\d{8,13}|\(\d{2,4}\)[ -]?\d{8,9}"
        r"|(?:\(\d{2,4}\)[ -]?\d{3,5}|\d{2,5})(?:[ .-]\d{2,5}){1,4})(?:x\d{1,6})?(?!\w)",
        0.75,
        has_digits(7, 21),
        after=_PHONE_WORDS,
    ),
    Recogniser(
        "PHONE",
        re.compile(
            r"(?<![\w(+.-])(?:\(\d{2,4}\)[ -]?)?\d{2,5}(?:[ .-]\d{2,5}){1,4}"
            r"(?=[ -]{1,2}(?:office|mobile|cell|fax|home|work|celular|recado|ramal)\b)",
            re.IGNORECASE,
        ),
        0.75,
        has_digits(7, 21),
        words=("office", "mobile", "cell", "fax", "home", "work", "celular", "recado", "ramal"),
    ),
)

_INTERNATIONAL = (
    Recogniser(
        "EMAIL",
        re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,6}(?<![-.])"),
        0.95,
        words=("@",),
    ),
    Recogniser(
        "URL",
        re.compile(r"\b(?:https?://|www\.)[^\s<>\"]{1,2000}(?<![.,;:!?)\]'])", re.IGNORECASE),
        0.9,
        words=("http", "www."),
    ),
    # "EC 3.1.1.11" is an enzyme.
    _number(
        "IP",
        r"(?<![\w.])(?<!EC )(?<!EC: )\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)",
        0.7,
        is_address,
    ),
    Recogniser(
        "IP",
        re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){3,7}[0-9A-Fa-f]{0,4}(?![\w:])"),
        0.8,
        is_address,
        hint=re.compile(":[0-9A-Fa-f]{0,4}:"),
    ),
    Recogniser(
        "MAC",
        re.compile(
            r"(?<![\w:.-])[0-9A-Fa-f]{2}([:-])[0-9A-Fa-f]{2}(?:\1[0-9A-Fa-f]{2}){4}(?![\w:-])"
        ),
        0.9,
        hint=re.compile("[:-][0-9A-Fa-f]{2}[:-][0-9A-Fa-f]{2}[:-]"),
    ),
    Recogniser(
        "MAC",
        re.compile(r"(?<![\w.-])[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}\.[0-9A-Fa-f]{4}(?![\w-]|\.\w)"),
        0.8,
        has_letter,
        hint=re.compile(r"\.[0-9A-Fa-f]{4}\."),
    ),
    _number(
        "SSN",
        r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-]|\.\d)",
        0.85,
    ),
    _number(
        "SSN",
        r"(?<!\d)\d{3}[- ]?\d{2}[- ]?\d{4}(?!\d)",
        0.9,
        after="SSN|social security(?: number| no)?",
    ),
    _number("CREDIT_CARD", r"(?<![\w.,/-])\d(?:[ -]?\d){12,18}(?![\w/-]|[.,]\d)", 0.8, is_card),
    _number(
        "CREDIT_CARD",
        r"(?<![\w.,/-])\d(?:[ -]?\d){11,18}(?![\w/-]|[.,]\d)",
        0.9,
        is_luhn,
        after=r"card|cc|card number|cart[aã]o|visa|mastercard|amex",
    ),
    Recogniser(
        "IBAN",
        re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"),
        0.95,
        is_iban,
    ),
    Recogniser(
        "IBAN",
        re.compile(r"(?<!\w)[a-z]{2}\d{2}[a-z0-9]{11,30}(?!\w)"),
        0.95,
        is_iban,
        words=("iban",),
    ),
    Recogniser(
        "DATE_OF_BIRTH",
        re.compile(_BIRTH + _DATE, re.IGNORECASE),
        0.9,
        words=("dob", "d.o.b", "do.b", "d.ob", "birth", "born", "nasc", "d.n."),
    ),
    Recogniser(
        "MRN",
        re.compile(
            _RECORD_WORDS + r"(?P<value>[A-Z]{0,4}-?\d{4,12}(?:[-/.]\d{1,6}){0,2})(?!\w)",
            re.IGNORECASE,
        ),
        0.9,
        words=("mrn", "record", "hospital id", "patient id", "prontu", "registro", "chart"),
    ),
)

_SECRETS = (
    Recogniser(
        "SECRET",
        re.compile(
            r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[\w+/=\s\\,:-]{0,8000}?"
            r"(?:-----END [A-Z ]{0,30}PRIVATE KEY-----|(?=[^\w+/=\s\\,:-])|\Z)"
        ),
        0.99,
        words=("private key",),
    ),
    # Keys that issuers mark: AWS, GitHub, GitLab, Slack, Google, Stripe, Hugging Face, models'.
    Recogniser(
        "SECRET",
        re.compile(
            r"(?<![\w-])(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[oprsu]_[A-Za-z0-9]{36,255}"
            r"|github_pat_\w{22,255}|glpat-[\w-]{20,100}|xox[abeoprs]-[A-Za-z0-9-]{10,250}"
            r"|AIza[\w-]{35}|[rs]k_(?:live|test)_[A-Za-z0-9]{16,250}|hf_[A-Za-z0-9]{30,100}"
            r"|sk-[\w-]{20,250})(?![\w-])"
        ),
        0.97,
        words=(
            "akia",
            "asia",
            "gh",
            "glpat-",
            "xox",
            "aiza",
            "k_live",
            "k_test",
            "hf_",
            "sk-",
        ),
    ),
    Recogniser(
        "SECRET",
        re.compile(r"(?<![\w.-])eyJ[\w-]{8,4000}\.eyJ[\w-]{8,4000}\.[\w-]{8,4000}(?![\w-])"),
        0.97,
        words=("eyj",),
    ),
    Recogniser(
        "SECRET",
        re.compile(
            rf"(?<![A-Za-z])(?:{_SECRET_WORDS})[\"']?\s{{0,3}}[:=]\s{{0,3}}[\"']?"
            r"(?P<value>[^\s\"',;]{6,200}?)(?=[\s\"',;]|[.)]?(?:\s|\Z))",
            re.IGNORECASE,
        ),
        0.85,
        is_secret,
        words=("passw", "pwd", "senha", "secret", "token", "key", "chave"),
    ),
)

RECOGNISERS: tuple[Recogniser, ...] = (*_INTERNATIONAL, *_BRAZIL, *_PHONES, *_SECRETS)
"""Every recogniser; of two that find the same span, the one with the higher score names it."""
