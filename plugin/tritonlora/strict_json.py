# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""JSON, read so that no key that occurs twice is lost unheard.

The standard library's parser keeps the last of several values of a key. Of the parsers that are quicker, orjson has no
hook for the pairs of an object, so that it cannot say which key is repeated. adapters.json is read in
`serving.adapter_table_json`, which is copied into model repositories and stands alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any


def parse(
    text: str | bytes,
    *,
    parse_int: Callable[[str], Any] | None = None,
    parse_float: Callable[[str], Any] | None = None,
) -> tuple[Any, list[str]]:
    """The value of a JSON text, and the keys that occur more than once in one object.

    ValueError when the text is no JSON, and RecursionError when it nests too deep.
    """
    repeated: list[str] = []

    def as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            repeated.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return found

    text = text if isinstance(text, str) else text.decode()
    return json.loads(text, object_pairs_hook=as_dict, parse_int=parse_int, parse_float=parse_float), repeated
