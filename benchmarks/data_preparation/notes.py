"""Notes made up of sentences with identifiers, and of sentences with numbers that are none.

Brazilian Portuguese and English, half of each. Every identifier's place is known. Check digits are
computed here from the issuers' rules, not by the library that recognises them. What is not an
identifier: lots, protocols, doses, laboratory values, dates of visits, codes of diseases, ranges of
years, prices, versions, sections, chassis and process numbers. No name, place or number is of a
real person; all are drawn at random.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """A text and what stands in it."""

    text: str
    spans: tuple[tuple[int, int, str], ...]
    """Start, end, type."""


def make_notes(num_notes: int, seed: int = 0) -> list[Note]:
    """Return notes of some sentences, every other one in Portuguese."""
    random_ = random.Random(seed)
    return [_note(random_, "pt" if index % 2 else "en") for index in range(num_notes)]


def _note(random_: random.Random, language: str) -> Note:
    told, traps, plain = SENTENCES[language]
    sentences = (
        [random_.choice(told) for _ in range(random_.randint(1, 5))]
        + [random_.choice(traps) for _ in range(random_.randint(2, 6))]
        + [random_.choice(plain) for _ in range(random_.randint(3, 8))]
    )
    random_.shuffle(sentences)
    text, spans = "", []
    for sentence in sentences:
        for piece in re.split(r"(\{\w+\})", sentence):
            if piece.startswith("{"):
                name = piece[1:-1]
                value = (IDENTIFIERS.get(name) or FILLERS[name])(random_)
                if name in IDENTIFIERS:
                    spans.append((len(text), len(text) + len(value), name))
                text += value
            else:
                text += piece
        text += random_.choice((" ", " ", " ", "\n"))
    return Note(text.strip(), tuple(spans))


def _digits(random_: random.Random, count: int, first: str = "0123456789") -> str:
    return random_.choice(first) + "".join(random_.choice("0123456789") for _ in range(count - 1))


def _form(digits: str, form: str) -> str:
    """Put digits into a form such as '###.###.###-##'."""
    left = iter(digits)
    return "".join(next(left) if sign == "#" else sign for sign in form)


def _words(text: str) -> list[str]:
    return text.split()


def _mod_11(values: Sequence[int], weights: Sequence[int]) -> int:
    """Return the check digit of Brazilian documents: 11 minus the remainder, 10 and 11 give 0."""
    rest = sum(value * weight for value, weight in zip(values, weights, strict=True)) % 11
    return 0 if rest < 2 else 11 - rest


def _cpf(random_: random.Random) -> str:
    values = list(map(int, _digits(random_, 9)))
    for length in (10, 11):
        values.append(_mod_11(values, range(length, 1, -1)))
    return _form("".join(map(str, values)), random_.choice(("###.###.###-##",) * 3 + ("#" * 11,)))


def _cnpj(random_: random.Random) -> str:
    alphabet = "0123456789" if random_.random() < 0.6 else "0123456789ABCDEFGHJKLMNPRSTVWXYZ"
    root = "".join(random_.choice(alphabet) for _ in range(8)) + "0001"
    values = [ord(sign) - 48 for sign in root]
    weights = [5, 4, 3, 2, 9, 8, 7, 6, 5, 4, 3, 2]
    values.append(_mod_11(values, weights))
    values.append(_mod_11(values, [6, *weights]))
    return _form(root + "".join(map(str, values[12:])), "##.###.###/####-##")


def _cns(random_: random.Random) -> str:
    """Of the provisional kind: the weighted sum of all fifteen digits is a multiple of 11."""
    while True:
        digits = _digits(random_, 14, "789")
        total = sum(int(d) * w for d, w in zip(digits, range(15, 1, -1), strict=True))
        last = -total % 11
        if last < 10:
            form = random_.choice(("### #### #### ####", "#" * 15))
            return _form(f"{digits}{last}", form)


def _pis(random_: random.Random) -> str:
    digits = _digits(random_, 10, "12")
    last = _mod_11(list(map(int, digits)), (3, 2, 9, 8, 7, 6, 5, 4, 3, 2))
    return _form(f"{digits}{last}", "###.#####.##-#")


def _titulo(random_: random.Random) -> str:
    """Eight digits, the state (01 and 02 have a rule of their own), two check digits."""
    digits = _digits(random_, 8, "0123")
    state = f"{random_.randint(3, 28):02d}"
    first = sum(int(d) * w for d, w in zip(digits, range(2, 10), strict=True)) % 11 % 10
    second = (int(state[0]) * 7 + int(state[1]) * 8 + first * 9) % 11 % 10
    return _form(f"{digits}{state}{first}{second}", random_.choice(("#### #### ####", "#" * 12)))


def _cnh(random_: random.Random) -> str:
    return _digits(random_, 11)


def _rg(random_: random.Random) -> str:
    digits = _digits(random_, 8, "123456")
    total = sum(int(d) * w for d, w in zip(digits, range(2, 10), strict=True))
    last = (11 - total % 11) % 11
    return _form(digits, "##.###.###-") + ("X" if last == 10 else str(last))


def _crm(random_: random.Random) -> str:
    return _digits(random_, random_.choice((5, 6)), "123456789")


def _cep(random_: random.Random) -> str:
    return _form(_digits(random_, 8, "01234568"), "#####-###")


def _phone_br(random_: random.Random) -> str:
    area = random_.choice(("11", "21", "31", "41", "51", "61", "71", "81", "85", "92", "19", "48"))
    mobile = "9" + _digits(random_, 8, "6789")
    fixed = _digits(random_, 8, "2345")
    return random_.choice(
        (
            f"({area}) {_form(mobile, '#####-####')}",
            f"({area}) {_form(fixed, '####-####')}",
            f"+55 {area} {_form(mobile, '#####-####')}",
            f"{area} {_form(mobile, '#####-####')}",
        )
    )


def _phone_us(random_: random.Random) -> str:
    digits = _digits(random_, 3, "23456789") + _digits(random_, 7, "23456789")
    forms = ("(###) ###-####", "###-###-####", "###.###.####", "+1 ### ### ####")
    return _form(digits, random_.choice(forms))


def _email(random_: random.Random) -> str:
    word = "".join(random_.choice("abcdefghijklmnoprstuvz") for _ in range(random_.randint(4, 9)))
    host = random_.choice(("example.org", "clinica.com.br", "mail.example.co.uk", "hosp.gov.br"))
    return f"{word}{random_.choice(('', '.', '_'))}{_digits(random_, 2)}@{host}"


def _iban(random_: random.Random) -> str:
    country, form = random_.choice((("GB", "A#14"), ("DE", "#18"), ("PT", "#21"), ("FR", "#23")))
    if form == "A#14":
        account = "".join(random_.choice("ABCDEFGHKLMNW") for _ in range(4)) + _digits(random_, 14)
    else:
        account = _digits(random_, int(form[1:]))
    number = "".join(str(int(sign, 36)) for sign in f"{account}{country}00")
    whole = f"{country}{98 - int(number) % 97:02d}{account}"
    spaced = " ".join(whole[i : i + 4] for i in range(0, len(whole), 4))
    return random_.choice((whole, spaced))


def _card(random_: random.Random) -> str:
    digits = random_.choice("45") + _digits(random_, 14)
    doubled = [int(d) * (2 if i % 2 == 0 else 1) for i, d in enumerate(digits)]
    total = sum(d - 9 if d > 9 else d for d in doubled)
    return _form(f"{digits}{-total % 10}", random_.choice(("#### #### #### ####", "#" * 16)))


def _ssn(random_: random.Random) -> str:
    return (
        f"{random_.randint(1, 665):03d}-{random_.randint(1, 99):02d}-{random_.randint(1, 9999):04d}"
    )


def _ip(random_: random.Random) -> str:
    return ".".join(str(random_.randint(10, 254)) for _ in range(4))


def _url(random_: random.Random) -> str:
    word = "".join(random_.choice("abcdefgh") for _ in range(6))
    return f"https://{word}.example.org/p/{_digits(random_, 5)}?x={word}"


MONTHS = {
    "pt": _words(
        """janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro
        dezembro"""
    ),
    "en": _words(
        """January February March April May June July August September October November
        December"""
    ),
}


def _birth_pt(random_: random.Random) -> str:
    day, month, year = random_.randint(1, 28), random_.randint(1, 12), random_.randint(1931, 2015)
    months = MONTHS["pt"]
    return random_.choice(
        (f"{day:02d}/{month:02d}/{year}", f"{day} de {months[month - 1]} de {year}")
    )


def _birth_en(random_: random.Random) -> str:
    day, month, year = random_.randint(1, 28), random_.randint(1, 12), random_.randint(1931, 2015)
    months = MONTHS["en"]
    return random_.choice(
        (
            f"{month:02d}/{day:02d}/{year}",
            f"{months[month - 1]} {day}, {year}",
            f"{year}-{month:02d}-{day:02d}",
        )
    )


def _mac(random_: random.Random) -> str:
    return ":".join(f"{random_.randrange(256):02x}" for _ in range(6))


def _secret(random_: random.Random) -> str:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    many = "".join(random_.choice(letters) for _ in range(40))
    return random_.choice((f"AKIA{many[:16].upper()}", f"ghp_{many[:36]}", f"sk-{many[:32]}"))


def _record(random_: random.Random) -> str:
    return _digits(random_, random_.randint(6, 9), "123456789")


Make = Callable[[random.Random], str]
IDENTIFIERS: dict[str, Make] = {
    "CPF": _cpf,
    "CNPJ": _cnpj,
    "CNS": _cns,
    "PIS": _pis,
    "TITULO": _titulo,
    "CNH": _cnh,
    "RG": _rg,
    "CRM": _crm,
    "CEP": _cep,
    "PHONE": lambda random_: random_.choice((_phone_br, _phone_us))(random_),
    "EMAIL": _email,
    "IBAN": _iban,
    "CREDIT_CARD": _card,
    "SSN": _ssn,
    "IP": _ip,
    "URL": _url,
    "DATE_OF_BIRTH": lambda random_: random_.choice((_birth_pt, _birth_en))(random_),
    "MAC": _mac,
    "SECRET": _secret,
    "MRN": _record,
}

FILLERS: dict[str, Make] = {
    "n1": lambda random_: _digits(random_, 1, "123456789"),
    "n2": lambda random_: _digits(random_, 2, "123456789"),
    "n3": lambda random_: _digits(random_, 3, "123456789"),
    "n4": lambda random_: _digits(random_, 4, "123456789"),
    "n5": lambda random_: _digits(random_, 5, "123456789"),
    "n6": lambda random_: _digits(random_, 6, "123456789"),
    "n7": lambda random_: _digits(random_, 7, "123456789"),
    "n8": lambda random_: _digits(random_, 8, "123456789"),
    "n11": lambda random_: _digits(random_, 11, "123456789"),
    "n12": lambda random_: _digits(random_, 12, "123456789"),
    "n15": lambda random_: _digits(random_, 15, "123456789"),
    "n20": lambda random_: _digits(random_, 20, "123456789"),
    "cid": lambda random_: (
        f"{random_.choice('ABCDEFGIJKMNS')}{_digits(random_, 2)}.{_digits(random_, 1)}"
    ),
    "date": lambda random_: (
        f"{random_.randint(1, 28):02d}/{random_.randint(1, 12):02d}/20{random_.randint(10, 25)}"
    ),
    "year": lambda random_: str(random_.randint(1990, 2025)),
    "wrong_cpf": lambda random_: _wrong(_cpf, random_),
    "wrong_card": lambda random_: _wrong(_card, random_),
    "lot": lambda random_: f"{random_.choice('ABCLX')}{_digits(random_, 6)}",
}


def _wrong(make: Make, random_: random.Random) -> str:
    """Return a number whose last check digit is wrong."""
    value = make(random_)
    return value[:-1] + str((int(value[-1]) + random_.randint(1, 9)) % 10)


_TOLD_PT = """
Paciente portador do CPF {CPF}, acompanhado pela filha.
CPF: {CPF}. RG: {RG} SSP/SP.
Cartão SUS {CNS} conferido na recepção.
CNS: {CNS}
Empresa conveniada inscrita no CNPJ {CNPJ}.
O fornecedor ({CNPJ}) enviou a nota.
Trabalhador com PIS {PIS}.
PIS/PASEP nº {PIS} anotado.
Título de eleitor {TITULO}, zona 12.
CNH {CNH}, categoria B, válida.
Carteira de motorista nº {CNH}.
Identidade {RG}, expedida em São Paulo.
Assinado pelo Dr. responsável, CRM/SP {CRM}.
CRM-MG nº {CRM}, plantonista.
Mora na Rua das Flores, 120, CEP {CEP}.
Endereço atualizado, {CEP}, Recife.
Contato: {PHONE}.
Ligar para {PHONE} antes da alta.
Telefone do acompanhante {PHONE} (recado).
E-mail informado: {EMAIL}.
Enviar laudo para {EMAIL} até sexta.
Data de nascimento: {DATE_OF_BIRTH}.
Nascida em {DATE_OF_BIRTH}, natural de Olinda.
Prontuário nº {MRN}.
Pagamento no cartão {CREDIT_CARD}.
Conta {IBAN} para reembolso.
Acesso feito de {IP} às 10h.
Resultado em {URL}.
O aparelho {MAC} ficou fora da rede.
Chave exposta no log: {SECRET}.
"""

_TOLD_EN = """
SSN {SSN} on file.
Her social security number is {SSN}.
Reach the daughter at {PHONE}.
Phone: {PHONE}, leave a message.
Mail results to {EMAIL}, please.
{EMAIL} wrote on Monday.
DOB: {DATE_OF_BIRTH}.
She was born on {DATE_OF_BIRTH} in Leeds.
MRN {MRN}, transferred from the north wing.
Medical record number: {MRN}.
Paid with card {CREDIT_CARD}.
Refund to {IBAN} within ten days.
Login from {IP} was refused.
The scan is at {URL}.
Device {MAC} lost its link.
The key {SECRET} was found in a script.
The visitor showed a Brazilian CPF, {CPF}.
The supplier's CNPJ is {CNPJ}.
"""

_TRAPS_PT = """
Dipirona 500 mg, {n1} comprimidos de 6/6 h por {n2} dias.
Hb {n2},{n1} g/dL, plaquetas {n3}.000/mm3, ureia {n2}, creatinina 1,{n1}.
Lote {lot}, validade {date}.
Protocolo {n4}.{n6}-{n2} aberto na ouvidoria.
Protocolo nº {n12} registrado.
CID {cid} e CID {cid}.
Retorno em {date} às 14:30, sala {n3}.
Processo {n7}-{n2}.{year}.8.26.{n4}.
Estudo de {year}-{year} com {n5} participantes, p < 0,0{n2}.
Nota fiscal {n8}, valor R$ {n1}.{n3},{n2}.
Número de série {n15} do respirador.
Consulta {n11} agendada pelo sistema.
Conferir o item {n1}.{n1}.{n1}.{n1} do regulamento.
PA {n3}x{n2} mmHg, FC {n2}, peso {n2},{n1} kg.
Pedido {wrong_cpf} do almoxarifado.
O código de barras {n20} não foi lido.
Glicemia de jejum {n2}, {n2} e {n3} mg/dL em três dias.
Insulina 10-12-{n2} UI, conforme esquema.
"""

_TRAPS_EN = """
Amoxicillin 500 mg every 8 h for {n1} days; insulin 10-12 units.
Platelets {n3},000/mm3, sodium {n3}, potassium 4.{n1}.
Lot {lot}, expires {date}.
Ticket {n8} was closed; order {n12} shipped.
ICD {cid}; PMID {n8}; NCT0{n7}.
Follow-up on {date} at 10:30, room {n3}.
A cohort of {year}-{year} with {n5} people, HR 1.{n2} (95% CI 1.1-1.{n1}).
Version {n1}.{n1}.{n1}.{n1} of the protocol, section {n1}.{n1}.
Serial number {n15}, invoice {n6}-{n2}.
Parcel {n4} {n4} {n4} {n3} is late.
The reference {wrong_card} was refused.
BP {n3}/{n2} mm Hg, weight {n2}.{n1} kg, height {n3} cm.
Pages {n3}-{n3}, volume {n2}({n1}).
Accession {lot}.{n1}, doi 10.{n4}/abc.{year}.{n5}.
The budget was {n1},{n3},{n3}.{n2} dollars.
"""

_PLAIN_PT = """
Paciente refere dor abdominal há três dias, sem febre.
Nega alergias e usa apenas vitaminas.
Exame físico sem alterações dignas de nota.
Orientada a manter repouso e retornar se houver piora.
Familiares cientes do quadro e de acordo com a conduta.
Solicitados exames de rotina e avaliação da cardiologia.
Aguarda vaga na enfermaria desde a manhã.
O médico explicou o procedimento e seus riscos.
"""

_PLAIN_EN = """
The patient slept well and reports no pain.
She denies fever, cough or weight loss.
Lungs are clear and the abdomen is soft.
We discussed the plan with the family, who agree.
He will stay overnight for observation.
The wound is dry and heals as expected.
Physiotherapy starts tomorrow morning.
No changes to the medication were made today.
"""


def _lines(text: str) -> list[str]:
    return text.strip().splitlines()


SENTENCES = {
    "pt": (_lines(_TOLD_PT), _lines(_TRAPS_PT), _lines(_PLAIN_PT)),
    "en": (_lines(_TOLD_EN), _lines(_TRAPS_EN), _lines(_PLAIN_EN)),
}
"""By language: those with identifiers, those with other numbers, those with neither."""
