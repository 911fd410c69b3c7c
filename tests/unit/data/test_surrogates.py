import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from mutirao.data.identifiers.recognisers import RECOGNISERS
from mutirao.data.identifiers.surrogates import site_key, surrogate, value_hash
from mutirao.errors import DataError

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from data_preparation.notes import IDENTIFIERS

KEY = bytes(range(32))
TYPES = sorted({each.type for each in RECOGNISERS})


def shape(value):
    return re.sub("[a-z]", "a", re.sub("[A-Z]", "A", re.sub(r"\d", "0", value)))


@pytest.mark.parametrize("type_", TYPES)
def test_the_form_stays_and_the_value_does_not(type_):
    draw = random.Random(0)
    made = []
    for _ in range(200):
        value = IDENTIFIERS[type_](draw)
        other = surrogate(type_, value, KEY)
        assert other == surrogate(type_, value, KEY)
        assert other != value
        if type_ not in ("EMAIL", "URL", "IP", "MAC", "SECRET", "DATE_OF_BIRTH"):
            assert shape(other).replace("X", "0").replace("A", "0") == shape(value).replace(
                "X", "0"
            ).replace("A", "0")
        made.append(other)
    if type_ != "SECRET":
        assert len(set(made)) > 190


@pytest.mark.parametrize(
    ("type_", "one", "other"),
    [
        ("CPF", "123.456.789-09", "12345678909"),
        ("PHONE", "(11) 98765-4321", "11 98765-4321"),
        ("EMAIL", "Ana@example.com", "ana@example.com"),
        ("IBAN", "GB82 WEST 1234 5698 7654 32", "GB82WEST12345698765432"),
    ],
)
def test_a_value_has_one_surrogate_however_it_is_written(type_, one, other):
    def plain(value):
        return "".join(filter(str.isalnum, surrogate(type_, value, KEY))).lower()

    assert plain(one) == plain(other)


def test_another_key_gives_another_surrogate():
    made = {surrogate("CPF", "123.456.789-09", bytes([i]) * 32) for i in range(50)}
    assert len(made) == 50


@pytest.mark.parametrize("type_", ["CPF", "CNPJ", "CNS", "PIS", "TITULO", "CREDIT_CARD", "IBAN"])
def test_no_surrogate_can_be_a_real_number(type_):
    """By the very checks that recognise real ones, none of which may pass."""
    checks = [each.check for each in RECOGNISERS if each.type == type_ and each.check]
    draw = random.Random(1)
    for _ in range(500):
        made = surrogate(type_, IDENTIFIERS[type_](draw), KEY)
        assert not any(check(made) for check in checks)


def test_addresses_are_those_of_documentation():
    assert surrogate("EMAIL", "ana.souza@clinica.com.br", KEY).endswith("@example.org")
    assert surrogate("URL", "https://x.com/a?b", KEY).startswith("https://example.org/")
    assert re.match(r"2[45]\d\.\d+\.\d+\.\d+$", surrogate("IP", "10.1.2.3", KEY))
    assert surrogate("IP", "2001:4860:4860::8888", KEY).startswith("2001:db8::")
    assert surrogate("SSN", "078-05-1120", KEY).startswith("9")
    assert surrogate("MAC", "00:1A:2b:3c:4D:5e", KEY).startswith("02:")
    assert surrogate("SECRET", "AKIAIOSFODNN7EXAMPLE", KEY) == "[SECRET]"


def test_dates_are_dates_in_either_order_and_stay_near():
    for year in range(1930, 2020):
        made = surrogate("DATE_OF_BIRTH", f"17/11/{year}", KEY)
        first, second, last = made.split("/")
        assert 1 <= int(first) <= 12
        assert 1 <= int(second) <= 12
        assert abs(int(last) - year) <= 2
    assert re.fullmatch(
        r"\d+ de março de \d{4}", surrogate("DATE_OF_BIRTH", "7 de março de 1961", KEY)
    )


def test_digits_are_drawn_evenly():
    digits = Counter("".join(surrogate("MRN", f"{i:08d}", KEY)[-1] for i in range(1, 20_000, 10)))
    assert max(digits.values()) < 1.5 * min(digits.values())


def test_an_audit_knows_a_value_only_with_the_key():
    assert value_hash("CPF", "123.456.789-09", KEY) == value_hash("CPF", "12345678909", KEY)
    assert value_hash("CPF", "12345678909", KEY) != value_hash("PIS", "12345678909", KEY)
    assert value_hash("CPF", "12345678909", KEY) != value_hash("CPF", "12345678909", KEY[::-1])


def test_a_key_is_drawn_once_and_is_its_owners(tmp_path):
    path = tmp_path / "keys" / "identifiers"
    key = site_key(path)
    assert len(key) == 32
    assert site_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(DataError, match="chmod 600"):
        site_key(path)


@pytest.mark.parametrize("content", ["", "abcd", "not hexadecimal", "ab" * 31])
def test_what_is_no_key_is_refused(tmp_path, content):
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(DataError, match="key"):
        site_key(path)
