# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The archives of this checkout."""

from __future__ import annotations

import pytest

from archives import Archives, build
from environments import ROOT


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """Built once."""
    return build(ROOT, tmp_path_factory.mktemp("dist"))
