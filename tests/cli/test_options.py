"""Tests of options that commands share."""

import pytest

from dybit.cli import options


@pytest.mark.parametrize(
    ("words", "chains"),
    [
        ([], []),
        (["rtn,gptq"], ["rtn", "gptq"]),
        (["rtn+smooth,gptq"], ["rtn", "smooth,gptq"]),
        (["auto, rtn", "gptq", "rtn"], ["auto", "rtn", "gptq"]),
        (["smooth,rtn,gptq"], ["smooth,rtn,gptq"]),  # two ways of rounding in one chain: an error where it is read
        (["gptw", "rtn+"], ["gptw", "rtn", ""]),
    ],
)
def test_chains_apart(words, chains):
    assert options.alternatives(words) == chains
