# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""How many problems become one message."""

from __future__ import annotations

import pytest

from tritonlora.errors import merge_layers, one_message


@pytest.mark.parametrize(
    ("problems", "lines"),
    [
        (["no"], ["no"]),
        (["'h.0.fc': no", "'h.2.fc': no"], ["'h.0.fc': no (the same in layer 2)"]),
        (["'h.10.fc': no", "'h.9.fc': no", "'h.8.fc': no"], ["'h.8.fc': no (the same in layers 9, 10)"]),
        (["'h.0.fc': no", "'h.0.fc': 2", "'h.1.fc': 2"], ["'h.0.fc': no", "'h.0.fc': 2 (the same in layer 1)"]),
        (["'h.3.experts.0.w': no", "'h.3.experts.1.w': no"], ["'h.3.experts.0.w': no (the same 1 times more)"]),
        ([f"'{number}': no" for number in range(102)], [*(f"'{number}': no" for number in range(100)), "and 2 more"]),
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
