"""The engine as it is used: texts, errors, figures; what it imports; and without a kernel.

Models are synthetic. Those that are streamed are read through the page cache, so that these
tests need no fast disk.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from synthetic_gguf import (
    child_environment,
    engine_home,
    least_memory,
    model_bytes,
    write_synthetic_gguf,
)

from mutirao.errors import FormatError, InferenceError, InputError, MissingKernelError
from mutirao.inference import Chat, Engine
from mutirao.inference.conversation import Generation
from mutirao.inference.native import library
from mutirao.inference.planning import planner
from mutirao.inference.reference import ReferenceBackend
from mutirao.inference.sampling import Sampling

PROMPT = "The patient was admitted"
MESSAGES = [{"role": "user", "content": "fever?"}]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with engine_home(tmp_path_factory.mktemp("home") / "mutirao") as home:
        yield home


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model of 0.7 MB."""
    return write_synthetic_gguf(tmp_path_factory.mktemp("model") / "small.gguf")


@pytest.fixture(scope="module")
def engine(home, path):
    with Engine.open(path, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def larger_path(tmp_path_factory):
    """A model of 26 MB."""
    path = tmp_path_factory.mktemp("model") / "larger.gguf"
    return write_synthetic_gguf(path, hidden=1024, inner=2816, num_layers=4)


@pytest.fixture(scope="module")
def larger(home, larger_path):
    """It, wholly in memory, and what it writes after PROMPT."""
    with Engine.open(larger_path, speculation="off") as engine:
        yield model_bytes(engine), engine.generate(PROMPT, max_new_tokens=12)


def oracle_tokens(engine, prompt_ids, num):
    oracle, tokens = ReferenceBackend(engine.store), list(prompt_ids)
    row = oracle.run(tokens, 0)[0]
    for _ in range(num):
        tokens.append(int(row.argmax()))
        row = oracle.run(tokens[-1:], len(tokens) - 1)[0]
    return tokens[len(prompt_ids) :]


# --- Texts -----------------------------------------------------------------------------------


def test_the_tokens_are_the_oracles(engine):
    """Float sums differ, so a choice between near equals could; with this model none does."""
    ids = engine.encode_prompt(PROMPT)
    tokens = list(engine.generate_tokens(ids, max_new_tokens=10))
    assert tokens == oracle_tokens(engine, ids, len(tokens))
    assert len(tokens) == 10
    text = engine.generate(PROMPT, max_new_tokens=10).text
    assert text == engine.tokenizer.decode(tokens)


def test_pieces_join_to_the_text(engine):
    with engine.stream(PROMPT, max_new_tokens=40) as stream:
        pieces = list(stream)
    assert len(pieces) > 5
    generation = stream.finish("".join(pieces))
    assert generation.text == engine.generate(PROMPT, max_new_tokens=40).text


def test_every_field_of_a_generation(engine):
    generation = engine.generate(PROMPT, max_new_tokens=20)
    assert generation.num_tokens == 20
    assert 0 < generation.time_to_first_token_s < generation.seconds < 60
    after_first_s = generation.seconds - generation.time_to_first_token_s
    assert generation.tokens_per_s == pytest.approx(19 / after_first_s)
    assert generation.plan == "all resident"
    assert generation.predicted_tokens_per_s is None
    assert 2**20 < generation.peak_memory_bytes < 2**40
    assert json.loads(generation.to_json()) == dataclasses.asdict(generation)
    assert {field.name for field in dataclasses.fields(Generation)} == set(
        json.loads(generation.to_json())
    )


def test_a_single_token(engine):
    generation = engine.generate(PROMPT, max_new_tokens=1)
    assert generation.num_tokens == 1
    assert generation.tokens_per_s == pytest.approx(1 / generation.seconds)
    assert generation.text == engine.generate(PROMPT, max_new_tokens=5).text[:1]


def test_texts_depend_on_nothing_but_the_request(home, path, engine):
    requests = [
        {"prompt": PROMPT, "max_new_tokens": 15},
        {"prompt": "x", "max_new_tokens": 15, "temperature": 1.0, "seed": 3},
        {"prompt": PROMPT + " with", "max_new_tokens": 15, "temperature": 0.5, "top_p": 0.9},
        {"prompt": MESSAGES, "max_new_tokens": 15},
    ]
    expected = [engine.generate(**request).text for request in requests]
    assert len(set(expected)) == len(requests)
    for order in ((3, 2, 1, 0), (1, 1, 0, 3)):
        assert [engine.generate(**requests[i]).text for i in order] == [expected[i] for i in order]
    for threads, speculation in ((2, "off"), (3, "on"), (1, "auto")):
        with Engine.open(path, threads=threads, speculation=speculation) as other:
            # Drawn tokens have the same distribution with drafts, but are others.
            which = (0, 1, 2, 3) if speculation == engine_default(engine) else (0, 3)
            assert [other.generate(**requests[i]).text for i in which] == [
                expected[i] for i in which
            ]


def engine_default(engine):
    return "auto" if engine.decoder.max_draft else "off"


def test_seeds_and_temperature(engine):
    def text(**settings):
        return engine.generate(PROMPT, max_new_tokens=20, **settings).text

    assert text(temperature=1.0, seed=1) == text(temperature=1.0, seed=1)
    assert text(temperature=1.0, seed=1) != text(temperature=1.0, seed=2)
    assert text(temperature=1.0, top_p=1e-9, seed=1) == text() == text(temperature=0.0, seed=5)


def test_text_ends_before_a_stop(engine):
    whole = engine.generate(PROMPT, max_new_tokens=30).text
    stop = whole[6:9]
    generation = engine.generate(PROMPT, max_new_tokens=30, stop=[stop, "never\n"])
    assert generation.text == whole.split(stop)[0]
    assert generation.num_tokens < 30


def test_text_ends_with_the_token_that_ends_texts(home, tmp_path, engine):
    tokens = list(engine.generate_tokens(engine.encode_prompt(PROMPT), max_new_tokens=30))
    index, eos = next((i, t) for i, t in enumerate(tokens) if i >= 4 and t not in tokens[:i])
    other = write_synthetic_gguf(tmp_path / "eos.gguf", eos=eos)
    for speculation in ("off", "on"):
        with Engine.open(other, speculation=speculation) as ending:
            ids = ending.encode_prompt(PROMPT)
            came = list(ending.generate_tokens(ids, max_new_tokens=30))
            assert came == tokens[: index + 1]
            assert ending.generate(PROMPT, max_new_tokens=30).num_tokens == index + 1


def test_generations_that_are_given_up_and_the_next(engine):
    expected = engine.generate(PROMPT, max_new_tokens=12).text
    for num in (0, 1, 3):
        with engine.stream(PROMPT, max_new_tokens=100) as stream:
            assert "".join(itertools.islice(stream, num)) in expected + "x" * 100
        assert list(stream) == []
        assert engine.generate(PROMPT, max_new_tokens=12).text == expected


def test_a_conversation_is_as_with_a_fresh_engine(home, path, engine):
    chat = Chat(engine, system="Answer.")
    answers = ["".join(chat.say(text, max_new_tokens=12)) for text in ("One?", "Two?", "Three?")]
    for turn in range(3):
        with Engine.open(path, threads=1) as fresh:
            messages = chat.messages[: 2 * turn + 2]
            assert fresh.generate(messages, max_new_tokens=12).text == answers[turn]


# --- Settings --------------------------------------------------------------------------------


def test_prompts_up_to_the_context(home, path):
    with Engine.open(path, context=40) as engine:
        assert engine.context == 40
        longest = "x" * 39
        assert len(engine.encode_prompt(longest)) == 39
        assert engine.generate(longest, max_new_tokens=50).num_tokens == 1
        assert engine.generate("x" * 30, max_new_tokens=50).num_tokens == 10
        with pytest.raises(InputError, match=r"40 tokens, too long .*at most 39"):
            engine.generate("x" * 40)
        with pytest.raises(InputError, match="too long"):
            list(engine.generate_tokens([1] * 40))
    with Engine.open(path, context=10**6) as engine:
        assert engine.context == 512


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "prompt is empty"),
        ("x", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("x", {"max_new_tokens": -3}, "max_new_tokens=-3"),
        ("x", {"temperature": -0.1}, "temperature=-0.1"),
        ("x", {"temperature": float("nan")}, "temperature=nan"),
        ("x", {"top_p": 0.0}, "top_p=0"),
        ("x", {"top_p": 1.5}, "top_p=1.5"),
        ("\ud800", {}, "surrogate"),
    ],
)
def test_requests_that_are_refused(engine, prompt, settings, message):
    with pytest.raises(InputError, match=message):
        engine.generate(prompt, **settings)
    with pytest.raises(InputError, match=message):
        engine.stream(prompt, **settings)
    assert engine.generate(PROMPT, max_new_tokens=2).num_tokens == 2


def test_messages_need_a_chat_template(home, tmp_path, engine):
    assert engine.has_chat_template
    rendered = "<|im_start|>user\nfever?<|im_end|>\n<|im_start|>assistant\n"
    assert engine.encode_prompt(MESSAGES) == engine.tokenizer.encode(rendered, special=False)
    path = write_synthetic_gguf(tmp_path / "plain.gguf", chat_template=None)
    with Engine.open(path) as plain:
        assert not plain.has_chat_template
        with pytest.raises(InputError, match="no chat template"):
            plain.generate(MESSAGES)
        assert plain.generate(PROMPT, max_new_tokens=2).num_tokens == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": 0},
        {"memory": -5},
        {"memory": "lots"},
        {"memory": "-600MB"},
        {"memory": "600XB"},
        {"threads": -1},
        {"threads": 10**6},
        {"context": -1},
        {"context": 0},
        {"speculation": "sometimes"},
    ],
)
def test_settings_that_no_engine_has(home, path, settings):
    with pytest.raises(InputError):
        Engine.open(path, **settings).close()


def test_models_that_are_none(home, tmp_path):
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "empty").mkdir()
    for name in ("none.gguf", "text.gguf", "empty"):
        with pytest.raises(FormatError, match=name):
            Engine.open(tmp_path / name)


def test_a_closed_engine_says_so(home, path):
    engine = Engine.open(path)
    stream = engine.stream(PROMPT, max_new_tokens=50)
    next(stream)
    engine.close()
    engine.close()
    with pytest.raises(InferenceError, match="closed"):
        list(stream)
    with pytest.raises(InferenceError, match="closed"):
        engine.generate(PROMPT)
    with pytest.raises(InferenceError, match="closed"):
        engine.statistics()


def test_a_hugging_face_directory(home, tiny_model_directory):
    with Engine.open(tiny_model_directory) as engine:
        ids = engine.encode_prompt([{"role": "user", "content": "cough"}])
        tokens = list(engine.generate_tokens(ids, max_new_tokens=10))
        assert tokens == oracle_tokens(engine, ids, len(tokens))
        with Engine.open(engine.store.directory) as again:
            assert list(again.generate_tokens(ids, max_new_tokens=10)) == tokens


# --- Memory ----------------------------------------------------------------------------------
# The memory of this process comes and goes by some megabytes, so figures leave room for them;
# integration/test_engine_memory.py takes them at their word.

ROOM = 4_000_000


@pytest.fixture
def short_read_ahead(monkeypatch):
    """Read ahead in the way that takes least memory: the model is small."""
    monkeypatch.setattr(planner, "STREAMING", planner.STREAMING[-1:])


@pytest.mark.parametrize("speculation", ["auto", "on", "off"])
def test_the_least_memory_that_is_named_works(
    home, larger_path, larger, speculation, short_read_ahead
):
    size, whole = larger
    settings = {"speculation": speculation, "direct": False}
    memory = least_memory(larger_path, **settings) + ROOM
    with Engine.open(larger_path, memory=memory, **settings) as engine:
        assert engine.opened.choice.streamed_bytes > 0.5 * size
        assert whole.text.startswith(engine.generate(PROMPT, max_new_tokens=4).text)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.8, 1.2, 10.0])
@pytest.mark.parametrize("speculation", ["on", "off"])
def test_any_memory_gives_the_same_text(
    home, larger_path, larger, share, speculation, short_read_ahead
):
    size, whole = larger
    settings = {"speculation": speculation, "direct": False}
    memory = least_memory(larger_path, **settings) + int(share * size)
    with Engine.open(larger_path, memory=memory, **settings) as engine:
        generation = engine.generate(PROMPT, max_new_tokens=12)
        assert generation.text == whole.text
        choice = engine.opened.choice
        assert choice.resident_bytes + choice.streamed_bytes == size
        assert sum(engine.opened.memory.values()) <= memory
        assert generation.predicted_tokens_per_s > 0
        assert generation.plan == engine.opened.plan
        statistics = engine.statistics()
    assert (choice.streamed_bytes == 0) == ("all resident" in generation.plan)
    if share > 1:
        assert choice.streamed_bytes == 0
        assert generation.bytes_read_per_token < 0.01 * size
    else:
        assert "MB streamed per pass" in generation.plan
        assert statistics["streamed_bytes_per_pass"] == choice.streamed_bytes > 0
        assert statistics["bytes_read"] >= choice.streamed_bytes
        if speculation == "off":
            assert generation.bytes_read_per_token >= 0.9 * choice.streamed_bytes
    # Less than that does not hold the upper planes.
    assert engine.opened.has_draft == (speculation == "on" and share == 0.8)


def test_drafts_by_the_resident_planes(home, larger_path, larger, short_read_ahead):
    size, whole = larger
    settings = {"speculation": "on", "direct": False}
    memory = least_memory(larger_path, **settings) + int(0.8 * size)
    with Engine.open(larger_path, memory=memory, **settings) as engine:
        assert engine.opened.has_draft
        assert (engine.store.directory / "calibration.json").is_file()
        prompts = [PROMPT, "a b c d", "zzzzzzzz"]
        drafted = [engine.generate(prompt, max_new_tokens=16) for prompt in prompts]
        assert engine.generate(PROMPT, max_new_tokens=12).text == whole.text
    with Engine.open(larger_path, speculation="off") as engine:
        for prompt, generation in zip(prompts, drafted, strict=True):
            assert engine.generate(prompt, max_new_tokens=16).text == generation.text
    assert all(0 <= each.acceptance <= 1 for each in drafted if each.acceptance is not None)


def test_statistics(engine):
    engine.generate(PROMPT, max_new_tokens=3)
    statistics = engine.statistics()
    assert statistics["plan"] == "all resident"
    assert statistics["kernels"] in ("avx512", "avx2", "scalar")
    assert statistics["streamed_bytes_per_pass"] == 0
    assert statistics["resident_bytes"] == model_bytes(engine)
    assert statistics["op_seconds"]["MatMul"] > 0
    assert json.loads(json.dumps(statistics)) == statistics


# --- Imports, and no kernel ------------------------------------------------------------------

CHILD = """
import sys
from mutirao.errors import InputError
from mutirao.inference.planning import planner
from mutirao.inference.engine import Engine

path, extra = sys.argv[1], int(sys.argv[2])
settings = {}
if extra:
    planner.STREAMING = planner.STREAMING[-1:]
    settings = {"direct": False, "speculation": "on"}
    for _ in range(2):  # the first time it calibrates, and this process grows
        try:
            Engine.open(path, memory=1, **settings)
        except InputError as error:
            memory = error.least_bytes + extra
        Engine.open(path, memory=memory, **settings).close()
    settings["memory"] = memory
with Engine.open(path, **settings) as engine:
    list(engine.generate_tokens(engine.encode_prompt("The"), max_new_tokens=3))
    engine.generate([{"role": "user", "content": "x"}], max_new_tokens=2)
    print(engine.opened.plan)
heavy = ("torch", "transformers", "pandas", "scipy", "gguf", "matplotlib", "pydantic")
print([name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize("kind", ["gguf", "hf", "calibrated"])
def test_the_engines_path_imports_no_framework(
    kind, home, tmp_path, larger_path, tiny_model_directory
):
    """Building a store and calibrating a draft included."""
    path, extra, plan = write_synthetic_gguf(tmp_path / "new.gguf"), 0, "all resident"
    if kind == "hf":
        path = shutil.copytree(tiny_model_directory, tmp_path / "hf")
    elif kind == "calibrated":
        path, extra, plan = larger_path, 21_000_000, "self-speculation"
        for file in (home / "cache" / "stores").glob("*/calibration.json"):
            file.unlink()
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(extra)],
        env=child_environment(home),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(plan)
    assert result.stdout.endswith("\n[]\n")
    if kind == "calibrated":
        assert list((home / "cache" / "stores").glob("larger-*/calibration.json"))


def test_without_a_kernel_the_oracle_runs(home, path, engine, monkeypatch, capsys):
    expected = list(engine.generate_tokens(engine.encode_prompt(PROMPT), max_new_tokens=6))
    monkeypatch.setenv("MUTIRAO_KERNELS", "none")
    library.load_library.cache_clear()
    try:
        with Engine.open(path) as slow:
            assert slow.opened.plan == "in plain PyTorch"
            ids = slow.encode_prompt(PROMPT)
            assert list(slow.generate_tokens(ids, max_new_tokens=6)) == expected
            generation = slow.generate(PROMPT, max_new_tokens=6)
            assert generation.text == slow.tokenizer.decode(expected)
            assert slow.statistics()["bytes_read"] == 0
        assert "in plain PyTorch, slowly" in capsys.readouterr().err.replace("\n", " ")
        with pytest.raises(MissingKernelError, match="MUTIRAO_KERNELS=none"):
            Engine.open(path, memory="600MB")
    finally:
        library.load_library.cache_clear()


def test_sampling_settings_reach_the_decoder(engine):
    ids = engine.encode_prompt(PROMPT)
    sampling = Sampling(temperature=1.0, top_k=1, seed=4)
    drawn = list(engine.generate_tokens(ids, max_new_tokens=8, sampling=sampling))
    assert drawn == list(engine.generate_tokens(ids, max_new_tokens=8))
    assert np.unique(drawn).size > 1
