# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Which sources a command may use, and whether it may use the network.

The command's options, the environment and each config file can forbid sources. None of them can allow a source that
another one forbids.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import platformdirs
import yaml

from tritonlora.errors import SourceError
from tritonlora.sources.location import Location

CONFIG_VARIABLE = "TRITONLORA_CONFIG"
_KEYS = {"allow_sources", "offline"}


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules for one command. A directory or an archive on this machine is always allowed."""

    offline: bool = False  # use only what earlier downloads left on this machine
    allowed: tuple[tuple[str, tuple[str, ...]], ...] = ()  # (who says it, beginnings of the locations that it allows)

    def check(self, location: Location) -> None:
        """Raise SourceError if the location is not allowed, naming the option or the file that does not allow it."""
        if not location.scheme:
            return
        for who, beginnings in self.allowed:
            if not any(_begins(location.text, beginning) for beginning in beginnings):
                listed = ", ".join(beginnings) or "none"
                raise SourceError(f"{location.text} is not a source that {who} allows; allowed: {listed}")
        if location.scheme == "http" and not self.allowed and not _is_loopback(location.text):
            raise SourceError(
                f"{location.text} comes over plain http, which others on the network can change; give https://, or "
                "name the server with --allow-source"
            )


def policy(*, offline: bool = False, allowed: Sequence[str] = ()) -> Policy:
    """The rules from a command's options, the environment and the config files. SourceError for a malformed file."""
    rules: list[tuple[str, tuple[str, ...]]] = [("--allow-source", tuple(allowed))] if allowed else []
    offline = offline or _is_true(os.environ.get("HF_HUB_OFFLINE", ""))
    for path in _config_files():
        config = _read_config(path)
        offline = offline or bool(config.get("offline"))
        if config.get("allow_sources") is not None:
            rules.append((f"allow_sources in {path}", tuple(config["allow_sources"])))
    return Policy(offline, tuple(rules))


def _is_true(value: str) -> bool:
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def _config_files() -> Iterator[Path]:
    """The config files that there are. A file that TRITONLORA_CONFIG names must be there."""
    if named := os.environ.get(CONFIG_VARIABLE):
        yield Path(named)
    for directory in (platformdirs.site_config_path("tritonlora"), platformdirs.user_config_path("tritonlora")):
        if (directory / "config.yaml").is_file():
            yield directory / "config.yaml"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not YAML"
        raise SourceError(f"cannot read {path}: {reason}; put the file right") from None
    config = {} if config is None else config
    beginnings = config.get("allow_sources") if isinstance(config, dict) else None
    if (
        not isinstance(config, dict)
        or config.keys() - _KEYS
        or not isinstance(beginnings, list | None)
        or not all(isinstance(one, str) for one in beginnings or ())
        or not isinstance(config.get("offline"), bool | None)
    ):
        raise SourceError(f"{path}: expected allow_sources with a list of beginnings, offline with true or false")
    return dict(config)


def _begins(location: str, beginning: str) -> bool:
    """Whether `location` is `beginning`, or is below it: hf://org allows hf://org/name, and not hf://organisation/name."""
    whole = beginning.rstrip("/@")
    return bool(whole) and (location == whole or location.startswith((f"{whole}/", f"{whole}@")))


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
