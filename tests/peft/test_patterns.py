# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""patterns.py against Python's `re`, which PEFT matches with; and patterns that `re` would never be done with."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import faults
from adapters import lora_pair, write_adapter
from tritonlora.errors import InvalidAdapter
from tritonlora.peft.adapter import load_adapter
from tritonlora.peft.patterns import Paths, matches, parse

LEAVES = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)
PATHS = [f"model.layers.{layer}.{leaf}" for layer in (0, 1, 2, 10, 11, 21) for leaf in LEAVES]
PATHS += ["q_proj", "transformer.h.0.attn.c_attn", "a", "aa", "ab.ab", ".", "..a"]


def by_re(pattern: str, paths: Sequence[str]) -> list[str]:
    """What PEFT's rule gives (get_pattern_key in peft/utils/other.py)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [path for path in paths if re.match(rf"(.*\.)?({pattern})$", path)]


def by_us(pattern: str, paths: Sequence[str]) -> list[str]:
    """What we say."""
    return [paths[number] for number in Paths(paths).matched_by(pattern)]


ATOMS = (
    *("a", "b", ".", r"\.", r"\d", r"\w", r"\W", r"\D", r"\s", r"\x61", "\\u0061", r"\141", r"\0", "q_proj"),
    *("proj", "layers", "model", "[ab]", "[^a]", "[]a]", "[^]a]", "[a-z_]", r"[\d.]", r"[\]a-b]", r"[^\W\d]"),
    *("0", "1", "}", "_", "{", "]", "self_attn", r"mlp\.", "(?#no)", "{}", "{a}", "[(]", "[|]"),
)
REPEATS = (
    *("", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{0}", "{1,2}", "{,2}", "{2,}", "{,}", "{0,0}", "{1,90}"),
    *("{3,}?", "*+"),
)
ANCHORS = ("^", "$", r"\A", r"\Z", r"\b", r"\B")
BEHIND = ("a", r"\.", "a|b", r"\bq", "^", "rs", "[ab].")  # of one length, as re wants it


def _one_of(*choices: str) -> st.SearchStrategy[str]:
    return st.sampled_from(choices)


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    several = st.lists(inner, max_size=3)
    return st.one_of(
        st.tuples(_one_of("(", "(?:"), inner, _one_of(")", ")", ")?", ")??")).map("".join),
        st.tuples(_one_of("(?=", "(?!"), inner, _one_of(")", ")?")).map("".join),
        st.tuples(_one_of("(?<=", "(?<!"), _one_of(*BEHIND), st.just(")")).map("".join),
        several.map("".join),
        several.map("|".join),
    )


PARTS = st.one_of(st.tuples(_one_of(*ATOMS), _one_of(*REPEATS)).map("".join), _one_of(*ATOMS), _one_of(*ANCHORS))
PATTERNS = st.recursive(PARTS, _grown, max_leaves=12)


def _refusal(pattern: str) -> str:
    try:
        parse(pattern)
    except ValueError as error:
        return str(error)
    return ""


@settings(max_examples=2000, deadline=None)
@given(pattern=PATTERNS)
def test_a_pattern_matches_what_re_matches(pattern: str) -> None:
    """Whatever it is made of. What re takes and we refuse is a group that is repeated, or depends on how it matches."""
    refusal = _refusal(pattern)
    try:
        expected = by_re(pattern, PATHS)
    except re.error:
        assert refusal
        return
    if refusal:
        assert re.search(r"\)[*+{]", pattern) if "repeated group" in refusal else "*+" in pattern
        return

    assert expected == by_us(pattern, PATHS)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.layers\.1\..*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$",
        r"model\.layers\.(0|1|2)\.self_attn\.(q|k)_proj",
        r"^model.layers.\d+.mlp.(gate|up)_proj",
        r"layers\.(?!1\b)\d+\.mlp\.down_proj",
        r"(?<=layers\.)1\d?\..*",
        r".*(?=proj$)proj",
        r"((q|k)_)?proj",
        r"[^.]*_proj",
        "",
        "|q_proj",
        r"(a*)?(a*)?b",
    ],
)
def test_a_pattern_that_people_write_matches_what_re_matches(pattern: str) -> None:
    """Those of axolotl among them: a regular expression for each layer."""
    assert by_re(pattern, PATHS) == by_us(pattern, PATHS)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(a)*", "a repeated group"),
        ("(?i)a", "flags"),
        ("(?P<x>a)", "flags"),
        ("a" * 1001, "too long"),
        ("(", "not a regular expression"),
        ("*", "not a regular expression"),
        (r"(a)\1", "a reference"),
        (r"(a)?b(?(1)c|d)", "a condition"),
        ("a*+a", "gives nothing back|not a regular expression"),
        ("(?>a*)a", "gives nothing back|not a regular expression"),
        ("(" * 60 + "a" + ")" * 60, "nested more than 50 deep"),
        ("(" * 400 + "a" + ")" * 400, "nested more than 50 deep|not a regular expression"),
    ],
)
def test_what_depends_on_how_it_matches_is_refused(pattern: str, reason: str) -> None:
    """With the reason."""
    with pytest.raises(ValueError, match=reason):
        parse(pattern)


def test_values_come_in_the_order_of_the_patterns() -> None:
    """PEFT takes the first."""
    found = matches({"k_proj": 1, "q_proj": 2, r"layers\.1\..*": 3, "q_pro.": 4}, PATHS[:14])

    assert [2, 3, 4] == found["model.layers.1.self_attn.q_proj"]
    assert [2, 4] == found["model.layers.0.self_attn.q_proj"]
    assert "model.layers.0.mlp.up_proj" not in found
    assert {} == matches({}, PATHS) == matches({"a": 1}, [])


# Time


HOSTILE = {
    "repetitions": {".*" * 400 + "x": 1},
    "options": {"(m?o?d?e?l?)?" * 60 + "x": 1},
    "alternatives": {"(.|.|.)" * 100 + "x": 1},
    "alternatives that overlap": {"()" * 26 + "(.|[a-z_.0-9])" * 30 + "X": 1},
    "counted": {"(a{0,9}b{0,9}.{0,9}){0,1}".replace("){0,1}", ")?") * 38 + "x": 1},
    "looks ahead": {"(?=.*.*.*x)?" * 80 + "x": 1},
    "looks ahead in each other": {"(?=.*" * 50 + "x" + ")" * 50: 1},
    "many": {f"x{number}.*.*.*.*q_proj": 1 for number in range(2000)},
    "many long ones": {f"x{number:04}" + ".*" * 20 + "x": 1 for number in range(4000)},
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("layers", [80, 2000])
def test_no_pattern_takes_for_ever(tmp_path: Path, name: str, layers: int) -> None:
    """Python's re would: the process that converts ends by itself, long before it is given up."""
    tensors = {
        key: tensor
        for layer in range(layers)
        for key, tensor in lora_pair(f"model.layers.{layer}.self_attn.q_proj", in_features=2, out_features=2).items()
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, alpha_pattern=HOSTILE[name])

    assert faults.complete(["convert", str(adapter), str(tmp_path / "out")]) in (0, 1)


def test_more_patterns_than_any_model_needs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what matching them would take, and before it begins."""

    def never(*_: object) -> list[int]:
        raise AssertionError

    monkeypatch.setattr(Paths, "matched_by", never)
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(10_000)]
    for many in ({f"x{number}": 1 for number in range(4000)}, {f"x{number}{'a*' * 400}": 1 for number in range(300)}):
        problem = f"{len(many)} patterns for 10000 layers are more than any model needs"
        with pytest.raises(InvalidAdapter, match=problem):
            matches(many, paths)


def test_a_pattern_for_each_layer_of_the_largest_models_is_taken(tmp_path: Path) -> None:
    """As axolotl writes them: a regular expression for each of 126 layers, with all seven names in each."""
    tensors = {
        key: tensor
        for layer in range(126)
        for leaf in LEAVES
        for key, tensor in lora_pair(f"model.layers.{layer}.{leaf}", in_features=2, out_features=2).items()
    }
    names = "|".join(leaf.rpartition(".")[2] for leaf in LEAVES)
    alphas = {rf".*\.layers\.{layer}\..*({names})$": layer + 1 for layer in range(126)}
    adapter = load_adapter(write_adapter(tmp_path / "adapter", tensors, alpha_pattern=alphas))

    assert 126 * 7 == len(adapter.modules)
    assert all((module.layer + 1) / 2 == module.scaling for module in adapter.modules.values())


@pytest.mark.parametrize("key", ["1." * 500_000 + "\n", "a" * 1_000_000, "base_model.model." + "lora_A." * 100_000])
def test_no_name_takes_for_ever(tmp_path: Path, key: str) -> None:
    """A tensor's name goes through regular expressions, too."""
    adapter = write_adapter(tmp_path / "adapter", {f"{key}.lora_A.weight": torch.zeros(2, 2)}, prefix="")
    log = tmp_path / "log"

    assert 1 == faults.complete(["convert", str(adapter), str(tmp_path / "out")], log=log)
    assert "characters, which no layer has" in log.read_text()
    assert len(log.read_text()) < 50_000
