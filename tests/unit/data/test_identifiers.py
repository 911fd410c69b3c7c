import itertools
import random
import re
import time

import pytest

from mutirao.data import Identifier, find_identifiers, redact
from mutirao.data.identifiers.recognisers import RECOGNISERS
from mutirao.data.identifiers.search import _can_match, _find, _numbers, _regions, count_types


def types(text):
    return [(item.type, text[item.start : item.end]) for item in find_identifiers(text)]


def cpf_digits(first_nine):
    """Receita Federal's rule, written out here independently of the library."""
    digits = [int(digit) for digit in first_nine]
    for length in (10, 11):
        total = sum(d * w for d, w in zip(digits, range(length, 1, -1), strict=True))
        digits.append((total * 10) % 11 % 10)
    return "".join(map(str, digits))


@pytest.mark.parametrize(
    ("text", "type_", "value"),
    [
        ("CPF 123.456.789-09, retorno", "CPF", "123.456.789-09"),
        ("o cpf 12345678909 consta", "CPF", "12345678909"),
        ("CPF: 123.456.789-00 (digitado)", "CPF", "123.456.789-00"),
        ("empresa 11.222.333/0001-81.", "CNPJ", "11.222.333/0001-81"),
        ("CNPJ 12.ABC.345/01DE-35", "CNPJ", "12.ABC.345/01DE-35"),
        ("CNS 700 0000 0000 0005", "CNS", "700 0000 0000 0005"),
        ("PIS 120.54123.72-4", "PIS", "120.54123.72-4"),
        ("CEP 01310100, Brasil", "CEP", "01310100"),
        ("Av. Paulista, 01310-100", "CEP", "01310-100"),
        ("ligue (11) 98765-4321 hoje", "PHONE", "(11) 98765-4321"),
        ("tel. 11 3456 7890", "PHONE", "11 3456 7890"),
        ("at +55 11 98765-4321.", "PHONE", "+55 11 98765-4321"),
        ("+44 20 7946 0958 is", "PHONE", "+44 20 7946 0958"),
        ("reach 202-555-0143 now", "PHONE", "202-555-0143"),
        ("phone: 2025550143", "PHONE", "2025550143"),
        ("or 001-202-555-0143x123.", "PHONE", "001-202-555-0143x123"),
        ("Phone:\n358 0594", "PHONE", "358 0594"),
        ("call me at 01.84.17.61.18?", "PHONE", "01.84.17.61.18"),
        ("416 60 039 office", "PHONE", "416 60 039"),
        ("desk +46 (0)8 928 571 38 today", "PHONE", "+46 (0)8 928 571 38"),
        ("my iban is gb42nawi04454264788619", "IBAN", "gb42nawi04454264788619"),
        ("my credit card number is 675984103431?", "CREDIT_CARD", "675984103431"),
        ("mail ana.souza+x@clinica.com.br.", "EMAIL", "ana.souza+x@clinica.com.br"),
        ("SSN 078-05-1120", "SSN", "078-05-1120"),
        ("social security number 078051120", "SSN", "078051120"),
        ("card 4111 1111 1111 1111,", "CREDIT_CARD", "4111 1111 1111 1111"),
        ("from 192.168.10.7.", "IP", "192.168.10.7"),
        ("from 2001:db8:85a3::8a2e:370:7334 today", "IP", "2001:db8:85a3::8a2e:370:7334"),
        ("see https://example.org/a?b=1.", "URL", "https://example.org/a?b=1"),
        ("DOB: 03/07/1961", "DATE_OF_BIRTH", "03/07/1961"),
        ("born on March 7, 1961 in", "DATE_OF_BIRTH", "March 7, 1961"),
        ("nascida em 7 de março de 1961.", "DATE_OF_BIRTH", "7 de março de 1961"),
        ("nascimento: 1961-03-07", "DATE_OF_BIRTH", "1961-03-07"),
        ("MRN 4471203", "MRN", "4471203"),
        ("prontuário nº 12345/2020", "MRN", "12345/2020"),
        ("medical record number: A-88213", "MRN", "A-88213"),
        ("RG 12.345.678-9 SSP/SP", "RG", "12.345.678-9"),
        ("RG nº MG-12.345.678,", "RG", "MG-12.345.678"),
        ("identidade: 1234567", "RG", "1234567"),
        ("portador do 36.482.795-6, residente", "RG", "36.482.795-6"),
        ("CNH 04567891234 categoria B", "CNH", "04567891234"),
        ("carteira de motorista nº 04567891234", "CNH", "04567891234"),
        ("título de eleitor 2288 9321 0566", "TITULO", "2288 9321 0566"),
        ("Dr. Souza, CRM/SP 123456.", "CRM", "123456"),
        ("CRM-MG nº 45.678", "CRM", "45.678"),
        ("CRM 98765-RJ", "CRM", "98765-RJ"),
        ("from 00:1A:2b:3c:4D:5e today", "MAC", "00:1A:2b:3c:4D:5e"),
        ("nic 001a.2b3c.4d5e", "MAC", "001a.2b3c.4d5e"),
        ("key AKIAIOSFODNN7EXAMPLE.", "SECRET", "AKIAIOSFODNN7EXAMPLE"),
        ("ghp_0123456789abcdefghijABCDEFGHIJ012345", "SECRET", None),
        ("senha: Verao2024!", "SECRET", "Verao2024!"),
        ('{"api_key": "0f3a9c77d1"}', "SECRET", "0f3a9c77d1"),
        ("-----BEGIN PRIVATE KEY-----\nMIIE\nvQ==\n-----END PRIVATE KEY-----", "SECRET", None),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmN", "SECRET", None),
        ("IBAN GB82 WEST 1234 5698 7654 32", "IBAN", "GB82 WEST 1234 5698 7654 32"),
    ],
)
def test_identifier_is_found_whole(text, type_, value):
    assert types(text) == [(type_, value or text)]


@pytest.mark.parametrize(
    "text",
    [
        "Amoxicillin 500 mg 8/8 h for 7 days; insulin 10-12 units; 0.9% saline 1000 mL.",
        "Hb 12.3 g/dL, Na 140, K 4.1, platelets 45,000/mm3, LDH 1658 U/L, BP 120/80 mm Hg.",
        "odds ratio 1.60 (95% CI 1.45-1.80), P < 0.001, p = 0.0399, n = 1994.",
        "Data from 2009-2012 and 1998-2004 in 12 2009-2012 cohorts; 65-year-old man.",
        "PMID 23456789, PMC1234567, NCT01234567, doi 10.1001/jama.2013.284427.",
        "Pectin methylesterase (EC 3.1.1.11) at 38.4 °C (101.1 °F), 183 cm, 80 kg.",
        "Appointment on 12/03/2019 at 10:30:15, room 204; pages 1123-1130; section 6.1.2.2.",
        "Cohort of 15 000 000 people and 123 456 789 00 counts; 1,234,567.89 dollars.",
        "Lote 12.345.678-0, protocolo 2024.000123-45, CID F32.1, senha: paciente aguarda.",
        "A CRM de 2024 trouxe 12 casos; token of gratitude; key: value; horas 10:20:30:40.",
        "Veja a Seção 11.7.3.2 e a versão 2.14.3.1 do manual.",
        "CPF 12 cells, SSN channel 3, call 911, card 12.",
    ],
)
def test_clinical_numbers_are_left_alone(text):
    assert types(text) == []


def test_every_valid_cpf_is_found_and_every_altered_one_is_not():
    random_ = random.Random(7)
    for _ in range(200):
        number = cpf_digits(f"{random_.randrange(10**9):09d}")
        if len(set(number)) == 1:
            continue
        formatted = f"{number[:3]}.{number[3:6]}.{number[6:9]}-{number[9:]}"
        assert types(f"x {formatted} y") == [("CPF", formatted)]
        altered = formatted[:-1] + str((int(formatted[-1]) + 1) % 10)
        assert types(f"x {altered} y") == []


def test_overlaps_are_resolved_by_score_then_length():
    text = "http://ana@example.org/x and CPF 123.456.789-09"
    found = find_identifiers(text)
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))
    assert ("CPF", "123.456.789-09") in types(text)


def test_redaction_replaces_by_type_and_leaves_nothing_to_find():
    text = "Ana, CPF 123.456.789-09, e-mail ana@x.org, tel. (11) 98765-4321"
    clean = redact(text, find_identifiers(text))
    assert clean == "Ana, CPF [CPF], e-mail [EMAIL], tel. [PHONE]"
    assert find_identifiers(clean) == []
    assert count_types(find_identifiers(text)) == {"CPF": 1, "EMAIL": 1, "PHONE": 1}


def test_redaction_takes_identifiers_in_any_order():
    items = [Identifier(4, 5, "B", 1.0), Identifier(0, 1, "A", 1.0)]
    assert redact("a--- b", [items[1], items[0]]) == redact("a--- b", items) == "[A]---[B]b"


def test_names_are_not_found():
    assert find_identifiers("Dr. Maria da Silva met John Smith at Rua Augusta 100.") == []


HOSTILE_UNITS = """1|1 |1.1-|a@|a.|(|+1 (1) |tel 1|CPF |AB12 |1:|http://|born on |12/|123-
tel 12345678-|medical record |a-.|\u0661|cel(((((|jan|nº|1-|A1|::|@|card 1 """


@pytest.mark.parametrize("unit", re.split(r"[|\n]", HOSTILE_UNITS))
def test_time_grows_linearly_with_hostile_text(unit):
    def seconds(num_characters):
        text = (unit * num_characters)[:num_characters]
        start = time.process_time()
        find_identifiers(text)
        return time.process_time() - start

    # Quadratic time would be a hundred times the shorter run's, and minutes in all.
    shorter = max(*(seconds(10_000) for _ in range(3)), 0.01)
    assert seconds(100_000) < 60 * shorter


NEIGHBOURS = """.|-|/|(|)|+|:|,|x|@| |a|A|CPF |RG |tel. |CRM/SP |a@b.co|www.a|CNPJ |senha: |born |
MRN |EC |card |título |CEP |DOB |SSN |PIS |CNH |social security """
VALUES = """123.456.789-09|12345678909|11.222.333/0001-81|700 0000 0000 0005|120.54123.72-4|
01310-100|(11) 98765-4321|+55 11 98765-4321|+5511987654321|202-555-0143x12|4111 1111 1111 1111|
192.168.10.7|078-05-1120|2288 9321 0566|04567891234|36.482.795-6|123456|45.678|12/03/1961|
001a.2b3c.4d5e|11 3456-7890|11 98765-4321|11222333000181|2001:db8:85a3::8a2e:370:7334|
12.ABC.345/01DE-35|00:1A:2b:3c:4D:5e|AKIAIOSFODNN7EXAMPLE"""


def test_where_it_looks_changes_nothing():
    """Numbers are looked for in rows of digits, other things where a word of theirs stands."""
    random_ = random.Random(0)
    words, values = (each.replace("\n", "").split("|") for each in (NEIGHBOURS, VALUES))
    found = set()
    for _ in range(100):
        text = "".join(
            random_.choice(random_.choice((words, values, values, "0123456789", [" "])))
            for _ in range(1500)
        )
        numbers = list(_numbers(text))
        for recogniser in RECOGNISERS:
            whole = set(_find(recogniser, text, [(0, len(text))]))
            assert set(_find(recogniser, text, _regions(recogniser, text, numbers))) == whole
            assert not whole or _can_match(recogniser, text, text.lower())
            found |= {recogniser} if whole else set()
    missed = [each for each in RECOGNISERS if each.least_digits and each not in found]
    assert not missed
