# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The table of architectures."""

from __future__ import annotations

from tritonlora.architectures.families import ARCHITECTURES, Leaf
from tritonlora.architectures.lora_modules import BY_NAME


def test_families_disagree_only_about_names_that_need_the_base_model() -> None:
    """Of every other layer the path alone says which modules it is."""
    seen: dict[tuple[str, str], set[Leaf]] = {}
    for architecture in ARCHITECTURES.values():
        for stem in architecture.family.stems:
            for tail, leaf in architecture.family.leaves.items():
                seen.setdefault((stem, tail), set()).add(leaf)

    assert {"mlp.up_proj", "attn.c_attn", "mlp.c_fc"} == {tail for (_, tail), leaves in seen.items() if len(leaves) > 1}


def test_every_module_in_the_table_is_one_of_the_engine() -> None:
    """Names of modules are spelt as in the engine's table."""
    for architecture in ARCHITECTURES.values():
        for leaf in architecture.family.leaves.values():
            assert {*leaf.modules, *leaf.fused_order, *([leaf.fused] if leaf.fused else [])} <= BY_NAME.keys()
