# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""How many problems become one message."""

from __future__ import annotations

import pytest

from tritonlora.errors import (
    AdapterUnavailable,
    ConfigError,
    InvalidAdapter,
    RepositoryError,
    ServerError,
    TritonLoraError,
    layer_names,
    merge_layers,
    one_message,
)


@pytest.mark.parametrize(
    ("problems", "lines"),
    [
        (["no"], ["no"]),
        (["'h.0.fc': no", "'h.2.fc': no"], ["'h.0.fc': no (the same in layer 2)"]),
        (["'h.10.fc': no", "'h.9.fc': no", "'h.8.fc': no"], ["'h.8.fc': no (the same in layers 9, 10)"]),
        (["'h.0.fc': no", "'h.0.fc': 2", "'h.1.fc': 2"], ["'h.0.fc': no", "'h.0.fc': 2 (the same in layer 1)"]),
        (["'h.3.experts.0.w': no", "'h.3.experts.1.w': no"], ["'h.3.experts.0.w': no (the same 1 times more)"]),
    ],
)
def test_same_problem_in_many_layers_is_one_line(problems: list[str], lines: list[str]) -> None:
    """The first layer's name stays as it is, so that it can be searched for."""
    assert lines == merge_layers(problems)


def test_name_of_megabytes_does_not_fill_the_message() -> None:
    """Both ends of the line stay, which say what is wrong, and so do the other lines."""
    message = one_message("no", [f"'{'a' * 5_000_000}': not a LoRA tensor\n  and more"])

    assert message.startswith("no: 'aaa")
    assert message.endswith("aaa': not a LoRA tensor\n  and more")
    assert len(message) < 11_000


def test_one_cause_is_one_line_for_all_modules_and_layers() -> None:
    """The same reason for two modules in three layers; another reason is a line of its own."""
    problems = [f"'layers.{layer}.{name}': no" for layer in range(3) for name in ("k_proj", "q_proj")]

    assert [
        "'layers.0.k_proj', 'layers.0.q_proj': no (the same in layers 1, 2)",
        "'layers.0.v_proj': why",
    ] == merge_layers([*problems, "'layers.0.v_proj': why"])
    assert "k, q in layers 0 to 2; v in layer 1" == layer_names(
        [("v", 1), *((name, layer) for name in "qk" for layer in range(3))]
    )


def test_a_hundred_problems_are_told_and_the_others_counted() -> None:
    """The heading and the first of them say what kind of thing is wrong."""
    lines = one_message("no", (f"'{number}': no" for number in range(102))).splitlines()

    assert ["no:", *(f"  '{number}': no" for number in range(100)), "  and 2 more"] == lines


@pytest.mark.parametrize(
    "kind", [TritonLoraError, InvalidAdapter, RepositoryError, ConfigError, ServerError, AdapterUnavailable]
)
@pytest.mark.parametrize(
    "message",
    [
        "a" * 20_000_000,
        "\n".join(map(str, range(1_000_000))),
        "\n".join(["b" * 9_000] * 150),
        one_message("all", ["\n".join(["c" * 20_000] * 50)] * 200_000),
    ],
    ids=["a long line", "many lines", "many long lines", "many long problems of many lines"],
)
def test_no_error_has_a_message_of_megabytes(kind: type[TritonLoraError], message: str) -> None:
    """However it was put together. Its beginning and its end stay."""
    found = str(kind(message))

    assert len(found) < 51_000
    assert len(found.splitlines()) <= 200
    assert (message[:100], message[-100:]) == (found[:100], found[-100:])


def test_an_error_of_ordinary_length_is_told_as_it_is() -> None:
    """All of its lines."""
    message = one_message("no", [f"{number}: {'x' * 100}" for number in range(100)])

    assert message == str(RepositoryError(message))
    assert 101 == len(message.splitlines())
