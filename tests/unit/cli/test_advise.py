"""What the command says where an option is wrong, before anything is measured."""

from __future__ import annotations

import sys

import pytest

from mutirao.cli import main
from mutirao.cli.advise import _share, _split
from mutirao.errors import InputError


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.02", 0.02), (" 0.5 % ", 0.005)])
def test_shares(text, value):
    assert _share(text, "--loss-budget") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "two", "-1%", "0", "nan", "1e9", "2", "100"])
def test_what_is_no_share_is_told(text):
    with pytest.raises(InputError, match=r"--loss-budget .* is not understood"):
        _share(text, "--loss-budget")


def test_methods_in_a_list():
    assert _split("rtn, gptq,gptq+tune") == ["rtn", "gptq", "gptq,tune"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "magic"], "advise: methods"),
        (["--memory", "much"], "size 'much' is not understood"),
        (["--price", "-5"], "--price -5 is not accepted"),
        (["--requests", "-5"], "outlook: num_requests=-5.0 is not accepted"),
    ],
)
def test_one_sentence(options, said, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("words " * 10)
    arguments = ["mutirao", "advise", str(tmp_path), "--text", str(tmp_path / "text.txt")]
    monkeypatch.setattr(sys, "argv", [*arguments, *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == InputError.exit_code
    error = capsys.readouterr().err
    assert said in error.replace("\n", " ")
    assert "Traceback" not in error
