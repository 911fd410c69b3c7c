"""Readers of each kind of file, and what becomes of files that are damaged or made to harm."""

import base64
import bz2
import gzip
import json
import lzma
import random

import pyarrow
import pytest
from pyarrow import parquet

from mutirao.data.readers import opening
from mutirao.data.readers.folder import list_files, read_folder
from mutirao.data.readers.problems import CountedProblems
from mutirao.errors import DataError

ROWS = [{"text": "coração partido", "patient": "p1"}, {"text": "second"}, {"text": "third"}]


def read(folder):
    """Return the records of a folder, and its problems."""
    problems = CountedProblems()
    return list(read_folder(folder, problems)), problems


def texts(folder):
    records, problems = read(folder)
    assert not problems.counts
    return [record.text for record in records]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252"])
def test_a_table_gives_a_record_a_row(tmp_path, separator, encoding):
    lines = [
        ["patient", "text"],
        ["p1", "dor no coração há três dias, sem febre"],
        ["p2", '"a""b\nc"'],
    ]
    content = "\r\n".join(separator.join(line) for line in lines)
    content = content.replace(
        "dor no coração há três dias, sem febre", '"dor no coração há três dias, sem febre"'
    )
    (tmp_path / "a.csv").write_bytes(content.encode(encoding))
    records, problems = read(tmp_path)
    assert not problems.counts
    assert [record.text for record in records] == [
        "dor no coração há três dias, sem febre",
        'a"b\nc',
    ]
    assert [record.id for record in records] == ["a.csv:2", "a.csv:3"]
    assert records[0].unit
    assert records[0].unit != records[1].unit


def test_broken_rows_are_counted_and_the_rest_read(tmp_path):
    content = 'text,patient\nfine,1\ntoo,many,columns\n"a"b,2\nalso fine,3\n,4\n'
    (tmp_path / "a.csv").write_text(content)
    records, problems = read(tmp_path)
    assert [record.text for record in records] == ["fine", "also fine"]
    assert problems.counts == {"broken table row": 2, "row of another shape": 1}
    assert problems.places["broken table row"] == ["a.csv:3", "a.csv:4"]


def test_parquet_gives_a_record_a_row(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert texts(tmp_path) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files_are_read_as_they_were(tmp_path, compress):
    suffix = {gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}[compress]
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(content))
    (tmp_path / f"b.txt{suffix}").write_bytes(compress("não".encode("cp1252")))
    assert texts(tmp_path) == [row["text"] for row in ROWS] + ["não"]


def test_a_page_gives_its_visible_text(tmp_path):
    page = """<html><head><title>no</title><style>p {}</style></head><body>
    <h1>Alta</h1><p>Paciente <b>estável</b>,<br>sem dor.</p><script>var x = 1</script>
    <ul><li>um</li><li>dois &amp; três</li></ul></body></html>"""
    (tmp_path / "a.html").write_text(page)
    (text,) = texts(tmp_path)
    assert (
        text.split() == "Alta Paciente estável , sem dor. um dois & três".replace(" ,", ",").split()
    )
    assert "sem dor." in text.split("\n")


def _pdf(text):
    """A PDF of one page, written by hand after ISO 32000-1, 7.5."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode("latin-1")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    out, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    start = len(out)
    out += b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % o for o in offsets)
    return out + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % start


def test_a_pdf_gives_its_text_layer(tmp_path):
    (tmp_path / "a.pdf").write_bytes(_pdf("Laudo: cora\xe7\xe3o normal."))
    assert texts(tmp_path) == ["Laudo: coração normal."]


def test_a_scan_and_a_damaged_pdf_are_told(tmp_path):
    (tmp_path / "damaged.pdf").write_bytes(b"%PDF-1.4\n" + bytes(range(256)))
    (tmp_path / "scan.pdf").write_bytes(_pdf(""))
    records, problems = read(tmp_path)
    assert not records
    assert problems.counts == {"damaged file": 1, "no text layer": 1}


def test_a_bundle_gives_the_text_of_its_resources(tmp_path):
    note = base64.b64encode("<p>Evolução: <b>melhor</b></p>".encode()).decode()
    resources = [
        {"resourceType": "Patient", "id": "7", "name": [{"family": "Silva"}]},
        {
            "resourceType": "Condition",
            "subject": {"reference": "Patient/7"},
            "text": {"status": "generated", "div": "<div xmlns='x'>Asma <i>leve</i></div>"},
            "note": [{"text": "Usa bombinha."}],
        },
        {
            "resourceType": "DocumentReference",
            "subject": {"reference": "Patient/7"},
            "content": [{"attachment": {"contentType": "text/html; charset=utf-8", "data": note}}],
        },
        {"resourceType": "DiagnosticReport", "conclusion": "Sem achados.", "subject": {}},
        {"resourceType": "Observation", "valueQuantity": {"value": 7}},
        {
            "resourceType": "DocumentReference",
            "content": [{"attachment": {"contentType": "text/plain", "data": "%%%"}}],
        },
    ]
    bundle = {"resourceType": "Bundle", "entry": [{"resource": each} for each in resources]}
    (tmp_path / "a.json").write_text(json.dumps(bundle))
    records, problems = read(tmp_path)
    assert [" ".join(each.text.split()) for each in records] == [
        "Asma leve Usa bombinha.",
        "Evolução: melhor",
        "Sem achados.",
    ]
    assert [each.id for each in records] == ["a.json#2", "a.json#3", "a.json#4"]
    assert records[0].unit == records[1].unit != ""
    assert records[2].unit == ""
    assert problems.counts == {"damaged attachment": 1}


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', "[" * 100_000])
def test_json_of_another_kind_is_told(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    records, problems = read(tmp_path)
    assert not records
    assert problems.counts.total() == 1
    with pytest.raises(DataError, match=r"a\.json is no"):
        list(read_folder(tmp_path))


def test_broken_lines_are_counted_and_the_rest_read(tmp_path):
    lines = [
        b'{"text": "one"}',
        b"broken",
        b'{"text": "cora\xe7\xe3o"}',
        b'{"x": 1}',
        b'{"text": "two"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    records, problems = read(tmp_path)
    assert [record.text for record in records] == ["one", "two"]
    assert problems.counts == {"broken JSON line": 1, "invalid UTF-8": 1, "row of another shape": 1}
    assert problems.places == {
        "broken JSON line": ["a.jsonl:2"],
        "invalid UTF-8": ["a.jsonl:3"],
        "row of another shape": ["a.jsonl:4"],
    }


def test_a_line_that_is_too_long_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "LINE_BYTES", 1000)
    rows = ['{"text": "one"}', '{"text": "' + "x" * 5000 + '"}', '{"text": "two"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    records, problems = read(tmp_path)
    assert [record.id for record in records] == ["a.jsonl:1", "a.jsonl:3"]
    assert problems.places == {"line too long": ["a.jsonl:2"]}


def test_a_file_that_was_made_to_harm_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "BOMB_BYTES", 1_000_000)
    line = json.dumps({"text": "a" * 1000}) + "\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode() * 5_000))
    (tmp_path / "b.txt").write_text("fine")
    records, problems = read(tmp_path)
    assert records[-1].text == "fine"
    assert len(records) < 4_900
    assert problems.counts == {"decompression bomb": 1}


@pytest.mark.parametrize("keep", [5, 30, -1])
def test_a_damaged_archive_gives_what_it_has(tmp_path, keep):
    content = "".join(json.dumps(row) + "\n" for row in ROWS * 100).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content)[:keep])
    records, problems = read(tmp_path)
    assert problems.counts["damaged file"] == 1
    assert len(records) <= 300


def test_utf16_and_unknown_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes("ação".encode("utf-16"))
    (tmp_path / "b.txt").write_bytes("não há ação sem coração".encode("cp1252"))
    assert texts(tmp_path) == ["ação", "não há ação sem coração"]


def test_a_damaged_place_in_utf8_is_told_and_no_other_encoding_guessed(tmp_path):
    lines = ["O paciente é idoso.", "Ele não dorme.", "Coração normal."]
    damaged = [line.encode() for line in lines]
    damaged[1] = lines[1].encode("latin-1")
    (tmp_path / "a.txt").write_bytes(b"\n".join(damaged))
    records, problems = read(tmp_path)
    assert [record.text for record in records] == [f"{lines[0]}\n{lines[2]}"]
    assert problems.places == {"invalid UTF-8": ["a.txt:2"]}


def test_a_whole_file_that_is_too_large_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "FILE_BYTES", 100)
    (tmp_path / "a.html").write_text("x" * 101)
    assert read(tmp_path)[1].counts == {"file too large": 1}


def test_links_in_a_circle_are_not_followed(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "again").symlink_to(tmp_path)
    assert [path.name for path in list_files(tmp_path)] == ["a.txt"]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.csv", "a.html", "a.pdf", "a.json", "a.parquet", "a.txt.gz"]
)
def test_noise_is_told_and_never_breaks(tmp_path, name, seed):
    draw = random.Random(seed)
    good = {
        "a.jsonl": b'{"text": "one"}\n',
        "a.csv": b"text,patient\none,1\n",
        "a.html": b"<p>one</p>",
        "a.pdf": _pdf("one"),
        "a.json": b'{"resourceType": "Bundle", "entry": []}',
        "a.parquet": b"PAR1",
        "a.txt.gz": gzip.compress(b"one"),
    }[name]
    data = bytearray(good * 3)
    for _ in range(draw.randint(1, 12)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    (tmp_path / name).write_bytes(bytes(data))
    read(tmp_path)


def test_empty_files_and_nul_characters_are_noted(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "a\0b", "completion": "c\0"}) + "\n")
    records, problems = read(tmp_path)
    assert [(each.context, each.completion) for each in records] == [("ab", "c")]
    assert problems.counts == {"empty file": 1, "NUL characters removed": 1}
    assert len(list(read_folder(tmp_path))) == 1
