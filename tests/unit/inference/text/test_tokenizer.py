"""The tokenizer against the tokenizers library on the same files, and its own rules."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_vocabularies import CHAT_TEMPLATE, EDGES, byte_level, sentencepiece

from mutirao.errors import FormatError, InputError
from mutirao.formats.gguf_tokenizer import merges_from_scores
from mutirao.formats.pre_tokenizers import PRE_TOKENIZERS
from mutirao.inference.text.token_tables import TokenTables, build_tables, word_hash
from mutirao.inference.text.tokenizer import Tokenizer
from mutirao.inference.text.tokenizer_files import write_tokenizer

TEXTS = st.text(
    st.one_of(
        st.sampled_from("aeotf is0129.\n\t'▁ãé😀日\u0301"),
        st.characters(codec="utf-8", exclude_characters="<"),  # names of control tokens are none
    ),
    max_size=60,
)
MESSAGES = [{"role": "user", "content": "fever?"}]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Write metadata as a tokenizer and open it: ours, and the library's."""

    def write(metadata):
        folder = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(folder / "model.gguf", folder, metadata)
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return Tokenizer.open(folder), library

    return write


@pytest.fixture(scope="module")
def smollm(opened):
    return opened(byte_level("smollm"))


@pytest.fixture(scope="module")
def llama3(opened):
    return opened(byte_level("llama-bpe"))


@pytest.fixture(scope="module")
def llama2(opened):
    return opened(sentencepiece())


@pytest.fixture(scope="module")
def gemma(opened):
    return opened(sentencepiece("gemma3"))


KINDS = ("smollm", "llama3", "llama2", "gemma")


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_way_of_cutting_agrees_with_the_library(opened, pre):
    ours, library = opened(byte_level(pre))
    for text in EDGES:
        for special in (True, False):
            expected = library.encode(text, add_special_tokens=special).ids
            assert ours.encode(text, special=special) == expected, text
        assert ours.decode(expected) == library.decode(expected), text


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_any_text_is_encoded_as_by_the_library(request, kind, text):
    ours, library = request.getfixturevalue(kind)
    assert ours.encode(text) == library.encode(text).ids
    assert ours.encode(text, special=False) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(request, kind, text):
    ours, library = request.getfixturevalue(kind)
    ids = ours.encode(text)
    if kind in ("llama2", "gemma"):  # these write a space so, and cannot tell the two apart
        text = text.replace("▁", " ")
    assert ours.decode(ids) == library.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_edges_come_back(request, kind):
    ours, library = request.getfixturevalue(kind)
    for text in EDGES:
        ids = ours.encode(text)
        assert ids == library.encode(text).ids, text
        assert ours.decode(ids, skip_special=False) == library.decode(
            ids, skip_special_tokens=False
        ), text


def test_a_word_may_be_a_token_before_merges(smollm, llama3):
    fevers = smollm[0].tables.vocab_size - 2
    assert smollm[0].encode("fevers") != [fevers]
    assert llama3[0].encode("fevers", special=False) == [fevers]
    assert llama3[0].encode("fevers\nfevers", special=False).count(fevers) == 2


def test_words_that_share_a_hash_are_told_apart(monkeypatch, tmp_path):
    # Reached only by an unlikely vocabulary, so it is brought about: all words share one.
    from mutirao.inference.text import token_tables, tokenizer

    for module in (token_tables, tokenizer):
        monkeypatch.setattr(module, "word_hash", lambda text: 7)
    write_tokenizer(tmp_path / "model.gguf", tmp_path, byte_level("llama-bpe"))
    ours = Tokenizer.open(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in EDGES:
        assert ours.encode(text) == library.encode(text).ids
    assert word_hash(b"a") != 7


def test_begin_of_text_where_the_model_wants_it(smollm, llama3, llama2, opened):
    assert smollm[0].encode("a")[0] != 1
    assert llama3[0].encode("a")[0] == llama2[0].encode("a")[0] == 1
    assert llama3[0].encode("") == [1]
    assert opened(byte_level("smollm", add_bos_token=True))[0].encode("")[0] == 1
    assert 1 not in opened(byte_level("llama-bpe", add_bos_token=False))[0].encode("a")


def test_a_space_goes_before_each_text_of_llama_2(llama2):
    ours = llama2[0]
    for text in ("fever", " fever", "fever</s>fever"):
        ids = ours.encode(text, special=False)
        assert ours.decode(ids, skip_special=False) == text.replace("</s>", "</s> ")
    assert ours.encode("fever", special=False) == ours.encode("</s>fever", special=False)[1:]


def test_runs_of_spaces_and_lines_are_tokens_of_gemma(gemma):
    ours = gemma[0]
    assert len(ours.encode("   ", special=False)) == 1
    assert len(ours.encode("\n\n\n", special=False)) == 1
    assert ours.encode(" fever", special=False) != ours.encode("fever", special=False)


def test_tokens_may_go_over_a_space(opened, llama2):
    """Then text cannot be cut before spaces, which is otherwise exact and faster."""
    plain = sentencepiece()
    tokens = [*plain["tokenizer.ggml.tokens"], "r▁", "r▁a"]
    ours, library = opened(
        sentencepiece(
            tokens=tokens,
            token_type=[*plain["tokenizer.ggml.token_type"], 1, 1],
            scores=[*plain["tokenizer.ggml.scores"], 1.0, 0.5],
        )
    )
    assert llama2[0].tables.space_id >= 0 > ours.tables.space_id
    for text in [*EDGES, "fever and fever"]:
        assert ours.encode(text) == library.encode(text).ids, text
    assert len(tokens) - 1 in ours.encode("fever and fever")


def test_scores_make_merges():
    tokens = ["a", "b", "c", "ab", "bc", "abc", "<s>", "<"]
    types = [1, 1, 1, 1, 1, 1, 3, 1]
    scores = [0, 0, 0, -2.0, -1.0, -3.0, 0, 0]
    assert merges_from_scores(tokens, types, scores) == [
        ("b", "c"),
        ("a", "b"),
        ("ab", "c"),
        ("a", "bc"),
    ]


def test_ends_of_generation(smollm, opened):
    assert smollm[0].eos_ids == {0, 2}  # <|endoftext|> too, though the file does not name it
    assert smollm[0].special_ids == {0, 1, 2}
    more = opened(byte_level("smollm", eot_token_id=5))[0]
    assert more.eos_ids == {0, 2, 5}
    plain = byte_level("smollm", token_type=[1] * len(byte_level()["tokenizer.ggml.tokens"]))
    assert opened(plain)[0].eos_ids == {2}


def test_ids_beyond_the_vocabulary_are_nothing(smollm):
    ours = smollm[0]
    assert ours.decode([ours.vocab_size, 10**6, -1]) == ""
    assert len(ours.token_bytes(ours.vocab_size - 1)) > 0


def test_bytes_that_are_no_text(smollm):
    ours = smollm[0]
    half = ours.encode("é")[:1] if len(ours.encode("é")) > 1 else ours.encode("日")[:1]
    assert ours.decode(half) == "\ufffd"


def test_half_a_surrogate_pair_is_refused(smollm):
    with pytest.raises(InputError, match="character 2 of the text is half a surrogate pair"):
        smollm[0].encode("ab\ud800")


def test_chat_template(smollm, gemma):
    ours = smollm[0]
    assert ours.has_chat_template
    assert ours.apply_chat_template(MESSAGES) == (
        "<|im_start|>user\nfever?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ours.apply_chat_template(MESSAGES, False).endswith("fever?<|im_end|>\n")
    assert not gemma[0].has_chat_template
    with pytest.raises(InputError, match="no chat template"):
        gemma[0].apply_chat_template(MESSAGES)


def with_template(opened, source):
    metadata = byte_level("smollm")
    metadata["tokenizer.chat_template"] = source
    return opened(metadata)[0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}|{{ unk_token }}", "<|im_start|>|"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "fever?"}]'),
        ("{{ {'a': '<é>'} | tojson(indent=1) }}", '{\n "a": "<é>"\n}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}x{{ 1 + 1 }}{% endgeneration %}", "x2"),
        ("  {% if tools is none %}\n a{% endif %}", " a"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_templates_find_what_they_expect(opened, source, expected):
    assert with_template(opened, source).apply_chat_template(MESSAGES) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('turns must alternate') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[7].content }}",
        "{% include '/etc/passwd' %}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_templates_cannot_reach_out(opened, source):
    with pytest.raises(InputError, match="refuses these messages"):
        with_template(opened, source).apply_chat_template(MESSAGES)


def test_a_broken_template(opened):
    with pytest.raises(FormatError, match="chat template is broken"):
        with_template(opened, "{% for %}").apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "tokenizer.ggml.model=None is not supported"),
        ({"tokenizer.ggml.model": "t5"}, "'t5' is not supported \\(expected 'gpt2' or 'llama'"),
        (byte_level("klingon"), "pre='klingon' is not supported \\(expected one of codeshell"),
        (byte_level(pre=None), "does not say how text is cut"),
        (byte_level(tokens=[]), "0 tokens came with"),
        (byte_level(tokens=None), "no vocabulary"),
        (byte_level(tokens=["a", "a"]), "two of its tokens are the same"),
        (byte_level(token_type=[1]), "came with 1 types"),
        (byte_level(merges=None), "no list of merges"),
        (byte_level(merges=["ab"]), "no list of merges"),
        (byte_level(merges=["Ġ qqq"]), "names no token"),
        (byte_level(eos_token_id=99999), "eos_token_id=99999 is no token"),
        (byte_level(bos_token_id=-1), "bos_token_id=-1 is no token"),
        (sentencepiece(scores=None), "no scores"),
        (sentencepiece(scores=[1.0]), "no scores"),
    ],
)
def test_what_is_refused(tmp_path, metadata, message):
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(FormatError, match=message) as caught:
        write_tokenizer(tmp_path / "model.gguf", tmp_path / "out", metadata)
    assert str(tmp_path / "model.gguf") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_begin_of_text_that_is_not_named(tmp_path):
    metadata = byte_level("llama-bpe")
    del metadata["tokenizer.ggml.bos_token_id"]
    with pytest.raises(FormatError, match="add_bos_token\\) that the file does not name"):
        write_tokenizer(tmp_path / "model.gguf", tmp_path, metadata)


def test_a_directory(tiny_model_directory, tmp_path):
    write_tokenizer(tiny_model_directory, tmp_path)
    ours = Tokenizer.open(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tiny_model_directory / "tokenizer.json"))
    for text in EDGES:
        assert ours.encode(text) == library.encode(text).ids
    assert ours.eos_ids == {library.token_to_id("<|im_end|>")}
    assert ours.bos_id == library.token_to_id("<|im_start|>")
    assert ours.apply_chat_template(MESSAGES).startswith("<|im_start|>user\nfever?")


@pytest.fixture
def model_directory(tiny_model_directory, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_directory, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_a_directory_says_what_ends_a_generation(model_directory, tmp_path):
    (model_directory / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    write_tokenizer(model_directory, tmp_path / "out")
    assert Tokenizer.open(tmp_path / "out").eos_ids == {0, 2, 7}


@pytest.mark.parametrize("form", ["text", "list", "file"])
def test_where_a_directory_keeps_its_template(model_directory, tmp_path, form):
    path = model_directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    (model_directory / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    config["chat_template"] = {"text": CHAT_TEMPLATE, "list": named, "file": "not this one"}[form]
    config["eos_token"] = {"content": "<|im_end|>", "lstrip": False}
    path.write_text(json.dumps(config))
    if form == "file":
        (model_directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_tokenizer(model_directory, tmp_path / "out")
    ours = Tokenizer.open(tmp_path / "out")
    assert ours.apply_chat_template(MESSAGES, False) == "<|im_start|>user\nfever?<|im_end|>\n"
    assert 2 in ours.eos_ids


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "it has no tokenizer.json"),
        ("tokenizer.json", b"{", "tokenizer.json cannot be read"),
        ("tokenizer.json", b"[]", "tokenizer.json is damaged"),
        ("tokenizer.json", b"{}", "the tokenizer is damaged: KeyError: 'model'"),
        ("tokenizer.json", b"[" * 100000, "tokenizer.json cannot be read"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id='x' is not accepted"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja cannot be read"),
    ],
)
def test_damaged_directories(model_directory, tmp_path, name, content, message):
    path = model_directory / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        write_tokenizer(model_directory, tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"vocab": {"a": -1}},
        {"vocab": {"a": 1 << 40}},
        {"vocab": {"a": None}},
        {"vocab": None},
        {"type": "Unigram", "vocab": [["a"]]},
        {"merges": [["a"]]},
        {"merges": 3},
    ],
)
def test_damaged_models(smollm, change):
    content = json.loads((smollm[0].directory / "tokenizer.json").read_text())
    with pytest.raises(FormatError, match="the tokenizer is damaged"):
        build_tables({**content, "model": {**content["model"], **change}})


def test_a_decoder_that_is_not_known(smollm):
    content = json.loads((smollm[0].directory / "tokenizer.json").read_text())
    with pytest.raises(FormatError, match="decoder WordPiece is not supported"):
        build_tables({**content, "decoder": {"type": "WordPiece"}})


@pytest.mark.parametrize(
    "change", [{"end_of_word_suffix": "</w>"}, {"dropout": 0.0}, {"continuing_subword_prefix": ""}]
)
def test_unusual_merges_are_left_to_the_library(smollm, change):
    content = json.loads((smollm[0].directory / "tokenizer.json").read_text())
    tables = build_tables({**content, "model": {**content["model"], **change}})
    assert (len(tables.splitter) == 0) == any(change.values())


def test_damaged_tables_are_refused(smollm, tmp_path):
    path = tmp_path / "tokenizer.tables"
    data = (smollm[0].directory / "tokenizer.tables").read_bytes()
    intact = TokenTables.load(smollm[0].directory / "tokenizer.tables")
    for position in [*range(0, 400, 7), *range(400, len(data), 997)]:
        path.write_bytes(data[:position] + bytes([data[position] ^ 32]) + data[position + 1 :])
        try:
            loaded = TokenTables.load(path)
        except FormatError:
            continue
        # A space of the header's padding may turn into nothing but another blank.
        assert loaded.text.tobytes() == intact.text.tobytes(), position
        assert loaded.strips_space == intact.strips_space
    for size in (0, 10, 30, 300, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match="missing or damaged"):
            TokenTables.load(path)
    with pytest.raises(FormatError, match="missing or damaged"):
        TokenTables.load(tmp_path / "none")


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"{}", b'{"eos_token_ids": 3}'])
def test_a_damaged_configuration_is_refused(smollm, tmp_path, content):
    shutil.copytree(smollm[0].directory, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer_config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=r"tokenizer_config.json is missing or damaged"):
        Tokenizer.open(tmp_path / "copy")


def test_the_engine_needs_no_framework_to_read_text(smollm):
    code = (
        "import pathlib, sys\n"
        "from mutirao.inference import sampling\n"
        "from mutirao.inference.text import text_stream, tokenizer\n"
        f"t = tokenizer.Tokenizer.open(pathlib.Path({str(smollm[0].directory)!r}))\n"
        "t.encode('fever'); t.apply_chat_template([{'role': 'user', 'content': 'a'}])\n"
        "print(sorted(set(sys.modules) & {'torch', 'transformers', 'pydantic', 'pandas', 'scipy',"
        " 'numpy.random', 'httpx', 'rich'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
