# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""bindings.py: an id means one content, for as long as the server lives."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from table import TABLE
from tritonlora.errors import AdapterUnavailable, SharedMemoryError
from tritonlora.serving import server_process
from tritonlora.serving.bindings import Bindings, content_of, contents_of
from tritonlora.serving.routing import Route

PIRATE, HAIKU = (Route(name, TABLE.entries[name]) for name in ("pirate", "haiku"))
OTHER = Route("pirate", replace(PIRATE.entry, lora_weights_sha256="c" * 64))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of the bindings."""
    return tmp_path / server_process.name_for("lora_resolver")


def test_an_id_that_is_bound_to_other_content_is_unavailable(path: Path) -> None:
    """Whoever asks first binds it."""
    bindings = Bindings(path, {})
    bindings.check(OTHER)
    bindings.bind(PIRATE)
    bindings.bind(PIRATE)

    for refused in (bindings.check, bindings.bind):
        with pytest.raises(AdapterUnavailable, match="'pirate': lora_task_id 1 was given to other .* tritonlora add"):
            refused(OTHER)
    assert {1: content_of(PIRATE.entry)} == bindings.contents()


def test_the_next_resolver_of_the_server_knows_the_bindings(path: Path) -> None:
    """What it believes itself to be the start does not count then."""
    first = Bindings(path, {2: "as-the-engine-was-started"})
    first.bind(PIRATE)
    first.close()
    again = Bindings(path, {1: "another"})

    assert {1: content_of(PIRATE.entry), 2: "as-the-engine-was-started"} == again.contents()
    with pytest.raises(AdapterUnavailable):
        again.check(HAIKU)


def test_a_line_that_was_not_written_to_its_end_is_left_out(path: Path) -> None:
    """As of a resolver that was killed."""
    path.write_text("1 one\n2 tw")

    bindings = Bindings(path, {})
    bindings.bind(HAIKU)

    assert {1: "one", 2: content_of(HAIKU.entry)} == bindings.contents() == Bindings(path, {}).contents()


def test_the_engine_is_started_with_the_warm_adapters(path: Path) -> None:
    """And a running one may have got any of the table."""
    assert {1: content_of(PIRATE.entry)} == contents_of(TABLE, only_warm=True)
    assert {1: content_of(PIRATE.entry), 2: content_of(HAIKU.entry)} == contents_of(TABLE, only_warm=False)


def test_a_file_that_others_can_write_to_is_not_read(path: Path) -> None:
    """It would decide whose weights answer."""
    path.write_text("1 another\n")
    path.chmod(0o666)

    with pytest.raises(SharedMemoryError, match="with mode 666; expected a file of user"):
        Bindings(path, {})


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    """Wherever it leads."""
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    path.symlink_to(victim)

    with pytest.raises(SharedMemoryError, match="cannot be read and written"):
        Bindings(path, {})
    assert "as it was" == victim.read_text()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_read(path: Path, make: object) -> None:
    """To read from a FIFO would be to wait for ever."""
    assert callable(make)
    make(path)

    with pytest.raises(SharedMemoryError):
        Bindings(path, {})


def test_what_servers_have_left_behind_is_removed(path: Path, tmp_path: Path) -> None:
    """Not what is of a living one, of another namespace, or of somebody else."""
    _, namespace, ticks, pid, model = path.name.split("-")
    dead = tmp_path / f"tritonlora-{namespace}-1-{pid}-{model}"
    others = [
        tmp_path / f"tritonlora-{namespace}-{ticks}-{pid}-another",
        tmp_path / f"tritonlora-1-1-{pid}-{model}",
        tmp_path / "tritonlora-notes",
    ]
    for file in (dead, *others):
        file.write_text("")
    Bindings(path, {})

    assert not dead.exists()
    assert all(file.exists() for file in others)
