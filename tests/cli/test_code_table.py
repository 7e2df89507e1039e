import re

import pytest
from command_line import invoke, run


def test_table_of_a_width_shows_the_plain_variants_side_by_side():
    text = invoke("table", "4").stdout
    assert re.search(r"111 +0111 +1\.75 +0111 +3 +0111 +4", text)
    assert "s4r2mid" in text and "and +2.5 (spare)" in text


def test_table_of_one_format():
    text = invoke("table", "2").stdout
    assert "spare (negative zero becomes 2)" in text and "and +2 (spare)" in text
    text = invoke("table", "2", "--spare").stdout
    assert "s2spare" in text and re.search(r"2 +10 +2 +2\b", text)
    text = invoke("table", "4", "--max-run", "2", "--spare").stdout
    assert "s4r2spare" in text and re.search(r"8 +1000 +10 +2\.5", text)
    assert "± 0.125" in invoke("table", "dybit4mid").stdout
    assert re.search(r"15 +1111 +1\n", invoke("table", "nf4").stdout)
    assert "unused" in invoke("table", "e4m3fn").stdout


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sign", ["--signed", "--unsigned"])
def test_table_of_every_width(bits, sign):
    result = invoke("table", str(bits), sign)
    assert result.exit_code == 0 and max(map(len, result.stdout.splitlines())) <= 160


def test_table_without_an_argument_lists_the_formats():
    lines = invoke("table").stdout.splitlines()
    assert [line.split()[0] for line in lines[:7]] == list("2345678")
    for name in lines[2].split()[2:]:
        assert invoke("table", name).exit_code == 0, name
    assert "nf4" in lines[2] and "uint4" in invoke("table", "--unsigned").stdout


def test_table_options_go_with_widths():
    result = invoke("table", "nf4", "--spare")
    assert result.exit_code == 2 and "not with the name 'nf4'" in result.stderr


def test_table_does_not_lose_bits_of_codes_at_any_width_of_the_terminal():
    text = run("table", "4", COLUMNS="80").stdout
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
