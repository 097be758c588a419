# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""routing.py: which adapter a request means."""

from __future__ import annotations

import contextlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from time import sleep, time

import pytest

from table import TABLE, entry
from tritonlora.errors import AdapterTableError, AdapterUnavailable, InvalidRequest, RequestError, UnknownAdapter
from tritonlora.serving.adapter_table import AdapterTable, Problem, with_adapter, with_alias
from tritonlora.serving.adapter_table_json import TableReader, render
from tritonlora.serving.parameters import MOST_JSON_CHARACTERS, check_parameters, parameters_of
from tritonlora.serving.routing import Route, resolve, resolve_rows
from tritonlora.serving.shares import choose
from tritonlora.serving.table_file import TableFile

PIRATE = Route("pirate", TABLE.entries["pirate"])


# Which adapter


def test_a_request_that_names_nothing_is_for_the_base_model() -> None:
    """None is the base model, and nothing else is."""
    assert resolve(TABLE, None, None) is None


@pytest.mark.parametrize(("name", "task_id"), [(b"pirate", None), ("pirate", None), (None, 1), (b"pirate", 1)])
def test_an_adapter_is_found_by_name_by_id_or_by_both(name: bytes | str | None, task_id: int | None) -> None:
    """Three ways to say the same."""
    assert resolve(TABLE, name, task_id) == PIRATE


@pytest.mark.parametrize(
    ("name", "task_id", "error", "message"),
    [
        (b"nobody", None, UnknownAdapter, "unknown LoRA adapter 'nobody'; available: haiku, pirate"),
        (b"Pirate", None, UnknownAdapter, "unknown LoRA adapter 'Pirate'"),
        (None, 7, UnknownAdapter, "unknown lora_task_id 7; available"),
        (None, 0, UnknownAdapter, "unknown lora_task_id 0"),
        (b"", None, InvalidRequest, "lora_name is empty; to ask the base model, leave it out"),
        (b"\xff", None, InvalidRequest, "not UTF-8"),
        (b"a b", None, InvalidRequest, "not a legal adapter name"),
        (b"x" * 10_000_000, None, InvalidRequest, "not a legal adapter name"),
        (b"pirate", 2, InvalidRequest, "lora_name 'pirate' has lora_task_id 1, but the request says 2"),
    ],
)
def test_what_is_not_an_adapter_is_an_error(
    name: bytes | None, task_id: int | None, error: type[RequestError], message: str
) -> None:
    """Never the base model."""
    with pytest.raises(error, match=message) as raised:
        resolve(TABLE, name, task_id)

    assert len(str(raised.value)) < 500


def test_an_alias_is_as_good_as_the_adapters_name() -> None:
    """The route is the adapter's own, so that nothing behind it knows of aliases."""
    table = with_alias(TABLE, "prod", "pirate")

    assert PIRATE == resolve(table, b"prod", None)
    assert PIRATE == resolve(table, b"prod", 1)
    with pytest.raises(UnknownAdapter, match="unknown LoRA adapter 'nobody'; available: haiku, pirate, prod"):
        resolve(table, b"nobody", None)


@pytest.mark.parametrize("name", [b"broken", b"prod"])
def test_an_adapter_with_a_malformed_entry_is_unavailable(name: bytes) -> None:
    """By its name or an alias of it, with what is wrong but not what was got: it may be a path."""
    broken = {"broken": (Problem("'dtype' must be one of …", "'/etc'"), Problem("'warm' must be true or false"))}
    table = replace(TABLE, aliases={"prod": {"broken": 100}}, unavailable=broken)

    with pytest.raises(AdapterUnavailable, match="'broken': .* malformed: 'dtype' must .*; 'warm' must be") as raised:
        resolve(table, name, None)

    assert "/etc" not in str(raised.value)


DIVIDED = with_alias(TABLE, "prod", {"pirate": 90, "haiku": 10})


def test_a_divided_alias_is_resolved_by_the_key() -> None:
    """Each key gets the adapter that `choose` says, in a batch, too. The route has the adapter's own name."""
    keys = [str(number).encode() for number in range(100)]
    routes = [resolve(DIVIDED, b"prod", None, key) for key in keys]

    assert routes == [resolve(DIVIDED, "prod", None, key) for key in keys]
    assert [choose(DIVIDED.aliases["prod"], key) for key in keys] == [route.lora_name for route in routes if route]
    assert routes == resolve_rows(DIVIDED, [b"prod"] * 100, None, 100, keys)


def test_a_key_changes_nothing_where_nothing_is_divided() -> None:
    """For an adapter's own name, an id, or the base model."""
    assert PIRATE == resolve(DIVIDED, b"pirate", None, b"user") == resolve(DIVIDED, None, 1, b"user")
    assert resolve(DIVIDED, None, None, b"user") is None


@pytest.mark.parametrize(("task_id", "name"), [(1, "pirate"), (2, "haiku")])
def test_an_id_beside_a_divided_alias_chooses(task_id: int, name: str) -> None:
    """Both adapters are right for the name."""
    routes = [resolve(DIVIDED, b"prod", task_id, key) for key in (None, b"1", b"2", b"3", b"4", b"5", b"6", b"7")]

    assert [Route(name, TABLE.entries[name])] * 8 == routes


def test_an_id_that_is_not_of_a_divided_alias_disagrees() -> None:
    """As with any other name."""
    with pytest.raises(InvalidRequest, match="but the request says 3; send one"):
        resolve(with_adapter(DIVIDED, "other", entry(3)), b"prod", 3)


@pytest.mark.parametrize("name", [b"prod", b"pirate", None])
def test_an_empty_key_is_refused(name: bytes | None) -> None:
    """All clients without a user would get one adapter."""
    with pytest.raises(InvalidRequest, match="lora_split_key is empty; to get one of the adapters at random, leave it"):
        resolve(DIVIDED, name, None, b"")


def test_each_row_has_a_key_of_its_own() -> None:
    """As many keys as rows."""
    with pytest.raises(InvalidRequest, match="lora_split_key has 1 elements, expected one for each of the 2 rows"):
        resolve_rows(DIVIDED, [b"prod", b"prod"], None, 2, [b"user"])


def test_a_malformed_adapter_of_a_divided_alias_is_not_replaced_by_another() -> None:
    """Its share of the requests is refused, and the others go on."""
    shares = {"broken": 50, "pirate": 50}
    table = replace(TABLE, aliases={"prod": shares}, unavailable={"broken": (Problem("'dtype' must be …"),)})
    keys = {choose(shares, key): key for key in (b"1", b"2", b"3", b"4", b"5", b"6")}

    assert PIRATE == resolve(table, b"prod", None, keys["pirate"])
    with pytest.raises(AdapterUnavailable, match="'broken': its entry in adapters.json on the server is malformed"):
        resolve(table, b"prod", None, keys["broken"])


def test_the_codes_are_those_of_triton() -> None:
    """The router looks them up in pb_utils.TritonError."""
    assert ("NOT_FOUND", "INVALID_ARG", "UNAVAILABLE") == (
        UnknownAdapter.code,
        InvalidRequest.code,
        AdapterUnavailable.code,
    )


def test_each_row_of_a_batch_names_its_own_adapter() -> None:
    """Names per row."""
    routes = resolve_rows(TABLE, [b"pirate", b"haiku"], None, 2)

    assert [PIRATE, Route("haiku", TABLE.entries["haiku"])] == routes


def test_a_batch_for_the_base_model_has_no_routes() -> None:
    """Nothing named, in every row."""
    assert [None, None] == resolve_rows(TABLE, None, None, 2)


def test_a_batch_that_mixes_base_and_adapter_rows_is_refused() -> None:
    """The engine's inputs cannot say it."""
    with pytest.raises(InvalidRequest, match="mixes rows for the base model and for adapters"):
        resolve_rows(TABLE, [b"pirate", b""], None, 2)


def test_a_tensor_with_the_wrong_number_of_rows_is_refused() -> None:
    """One name for each row."""
    with pytest.raises(InvalidRequest, match="lora_name has 1 elements, expected one for each of the 2 rows"):
        resolve_rows(TABLE, [b"pirate"], None, 2)


# The table on disk


@pytest.fixture
def failures() -> list[str]:
    """What the table file reported."""
    return []


LONG_AGO = 1_700_000_000.0


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.replace(path)


def test_a_changed_table_is_seen_at_once(tmp_path: Path, failures: list[str]) -> None:
    """No restart."""
    path = tmp_path / "adapters.json"
    path.write_text(render(TABLE))
    file = TableFile(path, failures.append)
    changed = with_adapter(TABLE, "new", entry(3))
    _replace(path, render(changed))

    assert changed == file.table()
    assert failures == []


def test_threads_read_a_changed_table_once(
    tmp_path: Path, failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that ask while it is read get the same table."""
    path = tmp_path / "adapters.json"
    path.write_text(render(TABLE))
    file = TableFile(path, failures.append)
    _replace(path, render(with_adapter(TABLE, "new", entry(3))))
    os.utime(path, (1, 1))  # it was not changed just now
    together, read, texts = Barrier(8), TableReader.read, list[str]()

    def slow(reader: TableReader, text: str) -> AdapterTable:
        texts.append(text)
        sleep(0.05)  # the others come meanwhile
        return read(reader, text)

    monkeypatch.setattr(TableReader, "read", slow)
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(lambda _: (together.wait(), file.table())[1], range(8))]

    assert 1 == len(texts) == len({id(table) for table in found})
    assert "new" in found[0].entries


@pytest.mark.parametrize("damage", ["{", None])
def test_a_bad_table_leaves_the_last_good_one_and_is_reported_once(
    tmp_path: Path, failures: list[str], damage: str | None
) -> None:
    """Malformed or gone; and the next good one counts again."""
    path = tmp_path / "adapters.json"
    path.write_text(render(TABLE))
    file = TableFile(path, failures.append)
    if damage is None:
        path.unlink()
    else:
        _replace(path, damage)

    assert TABLE == file.table()
    assert TABLE == file.table()
    assert 1 == len(failures)
    assert "keeping the last good adapters.json" in failures[0]

    _replace(path, render(AdapterTable()))

    assert AdapterTable() == file.table()


def test_a_malformed_entry_is_reported_once_and_the_others_are_served(tmp_path: Path, failures: list[str]) -> None:
    """Also when the table changes elsewhere; and again when it was right in between."""
    path = tmp_path / "adapters.json"
    whole = json.loads(render(TABLE))
    whole["adapters"]["pirate"]["dtype"] = "int8"
    path.write_text(json.dumps(whole))
    file = TableFile(path, failures.append)
    whole["next_lora_task_id"] = 10
    _replace(path, json.dumps(whole))

    assert TABLE.entries["haiku"] == file.table().entries["haiku"]
    assert 1 == len(failures)
    assert "adapter 'pirate': 'dtype' must be one of bfloat16, float16, float32, got 'int8'" in failures[0]

    _replace(path, render(TABLE))
    file.table()
    _replace(path, json.dumps(whole))
    file.table()

    assert failures[:1] * 2 == failures


def test_many_malformed_entries_are_a_bounded_report(tmp_path: Path, failures: list[str]) -> None:
    """Twenty of them, and a count."""
    path = tmp_path / "adapters.json"
    whole = json.loads(render(TABLE))
    whole["adapters"] = {f"n{number}": None for number in range(100)}
    path.write_text(json.dumps(whole))
    TableFile(path, failures.append)

    assert 22 == len(failures[0].splitlines())
    assert failures[0].endswith("and 80 more")


def test_a_table_that_is_put_right_is_the_same_for_all(tmp_path: Path, failures: list[str]) -> None:
    """Also for who began with one in which an id was another adapter's by mistake."""
    path = tmp_path / "adapters.json"
    wrong = {**TABLE.entries, "pirate": replace(TABLE.entries["pirate"], lora_weights_sha256="c" * 64)}
    path.write_text(render(replace(TABLE, entries=wrong)))
    file = TableFile(path, failures.append)
    _replace(path, render(TABLE))

    assert TABLE == file.table()


def test_there_must_be_a_good_table_to_begin_with(tmp_path: Path, failures: list[str]) -> None:
    """A router without a table does not start."""
    with pytest.raises(AdapterTableError, match="cannot read"):
        TableFile(tmp_path / "adapters.json", failures.append)


def test_a_table_that_is_no_file_leaves_the_last_good_one(tmp_path: Path, failures: list[str]) -> None:
    """To open a FIFO would be to wait for ever."""
    path = tmp_path / "adapters.json"
    path.write_text(render(TABLE))
    file = TableFile(path, failures.append)
    path.unlink()
    os.mkfifo(path)

    assert file.table() == TABLE
    assert "keeping the last good adapters.json: cannot read" in failures[0]


def test_the_stat_of_an_unchanged_table_is_all_that_a_request_costs(
    tmp_path: Path, failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same object comes back as long as the file is the same."""
    path = tmp_path / "adapters.json"
    path.write_text(render(TABLE))
    now = time() + 1
    monkeypatch.setattr("tritonlora.serving.file_version.time.time", lambda: now)
    file = TableFile(path, failures.append)
    monkeypatch.delattr("tritonlora.serving.table_file.open_file")

    assert file.table() is file.table()


def test_a_table_that_is_put_right_in_the_same_moment_is_seen(
    tmp_path: Path, failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel counts time in ticks nothing tells the two apart; what is wrong is still said only once."""
    path = tmp_path / "adapters.json"
    path.write_text(render(TABLE))
    file = TableFile(path, failures.append)
    monkeypatch.setattr("tritonlora.serving.table_file.version_of", lambda found: found.st_ino)
    path.write_text("{")
    monkeypatch.setattr("tritonlora.serving.file_version.time.time", lambda: path.stat().st_ctime)
    assert TABLE == file.table()
    assert TABLE == file.table()
    assert 1 == len(failures)
    path.write_text(render(AdapterTable()))

    assert AdapterTable() == file.table()


def test_a_table_that_is_gone_is_not_looked_for_again(
    tmp_path: Path, failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until one is there."""
    path = tmp_path / "adapters.json"
    path.write_text(render(TABLE))
    file = TableFile(path, failures.append)
    path.unlink()
    file.table()
    monkeypatch.delattr("tritonlora.serving.table_file.open_file")

    assert file.table() == TABLE


def test_two_changes_within_a_tick_of_the_clock_are_both_seen(
    tmp_path: Path, failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, in place: the same version of the same file. What is read again unchanged is no new table."""
    monkeypatch.setattr("tritonlora.serving.table_file.version_of", lambda _: "a clock that stands still")
    path = tmp_path / "adapters.json"
    path.write_text(render(TABLE))
    monkeypatch.setattr("tritonlora.serving.file_version.time.time", lambda: path.stat().st_ctime + 0.001)
    file = TableFile(path, failures.append)
    changed = replace(TABLE, next_lora_task_id=TABLE.next_lora_task_id + 1)
    path.write_text(render(changed))

    assert changed == file.table()
    assert file.table() is file.table()

    monkeypatch.setattr("tritonlora.serving.file_version.time.time", lambda: path.stat().st_ctime + 1)

    assert file.table() is file.table()


def test_a_table_with_the_times_of_the_one_before_is_seen(
    tmp_path: Path, failures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tools put one there that copy in place and keep the time of modification."""
    monkeypatch.setattr("tritonlora.serving.file_version.time.time", lambda: time() + 1)
    path = tmp_path / "adapters.json"
    path.write_text(render(TABLE))
    os.utime(path, (LONG_AGO, LONG_AGO))
    file = TableFile(path, failures.append)
    changed = replace(TABLE, next_lora_task_id=TABLE.next_lora_task_id + 1)
    path.write_text(render(changed))
    os.utime(path, (LONG_AGO, LONG_AGO))

    assert changed == file.table()


PEERS = (
    "lora_name", "LoRA-Name", "loraName", "lora_weights", "lora_path", "lora_request", "lora", "x-lora-id", "useLoRA",
    "adapter_id", "merged_adapters", "mergedAdapters", "ADAPTER", "model", "Model_Name",
)  # fmt: skip
HARMLESS = {"priority": 1, "exploration": "x", "Flora": "y", "model": "llama", "b": ["pirate"], "c": "[INST] lora"}


@pytest.mark.parametrize("name", PEERS)
def test_an_adapter_among_the_parameters_is_refused(name: str) -> None:
    """Triton makes parameters of what it knows no input for: the base model would answer instead."""
    check_parameters(TABLE, HARMLESS)

    with pytest.raises(InvalidRequest, match=f"{name}: not taken as a parameter; name the adapter with the input lora"):
        check_parameters(TABLE, {"priority": 1, name: "pirate"})


def within(name: str, depth: int) -> object:
    """A member of that name, in objects and lists."""
    found: object = {"temperature": 0.5, name: "pirate"}
    for _ in range(depth):
        found = {"extra": [1, found], "z": None}
    return found


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("depth", [0, 1, 5])
@pytest.mark.parametrize("times", [1, 2])
def test_an_adapter_in_a_parameter_that_is_json_is_refused(name: str, depth: int, times: int) -> None:
    """However deep, in JSON within JSON, too; Triton's vLLM backend takes sampling_parameters so."""
    asked, harmless = within(name, depth), within("llama", depth)
    for _ in range(times):
        asked, harmless = ({"more": json.dumps(one)} for one in (asked, harmless))
    check_parameters(TABLE, {"sampling_parameters": json.dumps(harmless)})

    with pytest.raises(InvalidRequest, match="^sampling_parameters: not taken as a parameter; name the adapter with"):
        check_parameters(TABLE, {"sampling_parameters": f" {json.dumps(asked)}", "b": 1})


@pytest.mark.parametrize(
    ("text", "is_refused"),
    [
        ('{"lora_name": "nobody"}', True),
        ('{"lora_request": {"name": "x", "id": 1}}', True),
        ('{"lora": [{"id": 0}]}', True),
        ('{"lora_int_id": 1}', True),
        (r'{"\u006cora_name": "pirate"}', True),
        ('[{"model": ["llama", "pirate"]}]', True),
        ('{"lora_name": null}', False),
        ('{"model": "lora"}', False),
        ('{"stop": ["lora_name", "pirate"]}', False),
        ("{'lora_name': 'pirate'}", True),
        ('{"lora_name": "pirate",}', True),
        ('{"lora_name": NaN}', True),
        ("[lora] {adapter}", False),
        ("{", False),
        ("[" * 100_000 + '"adapter_id"', True),
        ("[" * 100_000, False),
        ('{"a": ' + "9" * 100_000 + "}", False),
        ("", False),
    ],
)
def test_json_is_read_as_those_who_take_it_read_it(text: str, is_refused: bool) -> None:
    """What names no adapter is none of the router's business; what is broken, or too deep, may name one."""
    with pytest.raises(InvalidRequest) if is_refused else contextlib.nullcontext():
        check_parameters(TABLE, {"sampling_parameters": text})


def test_a_bounded_part_of_the_parameters_is_read_as_json() -> None:
    """All of them together; what is no JSON may be of any length."""
    half = json.dumps(["x" * (MOST_JSON_CHARACTERS // 2 - 4)])
    check_parameters(TABLE, {"a": half, "b": half, "c": "x" * MOST_JSON_CHARACTERS * 2})

    for more in ({"c": "[]"}, {"c": json.dumps([half])}):
        with pytest.raises(InvalidRequest, match=f"^[abc]: at most {MOST_JSON_CHARACTERS} characters of JSON are read"):
            check_parameters(TABLE, {"a": half, "b": half} | more)


class Undecodable:
    """A request of which one thing is no UTF-8."""

    def __init__(self, what: str, parameters: str = "{}") -> None:
        self._what = what
        self._parameters = parameters

    def _read(self, what: str, text: str) -> str:
        return (b"\xff" if what == self._what else text.encode()).decode()

    def request_id(self) -> str:
        return self._read("id", "1")

    def correlation_id(self) -> int | str:
        return self._read("correlation id", "2")

    def parameters(self) -> str:
        return self._read("parameters", self._parameters)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Undecodable("id"), "the request's id is not UTF-8"),
        (Undecodable("correlation id"), "the request's correlation id is not UTF-8"),
        (Undecodable("parameters"), "the request's parameters are not UTF-8, or cannot be read"),
        (Undecodable("", '{"a": '), "the request's parameters are not UTF-8, or cannot be read"),
    ],
)
def test_what_is_no_text_is_the_client_s_error(request_: Undecodable, message: str) -> None:
    """Of its parameters and its ids; sound ones are read."""
    assert {"a": 1, "b": "x"} == parameters_of(Undecodable("", '{"a": 1, "b": "x"}'))
    assert {} == parameters_of(Undecodable(""))

    with pytest.raises(InvalidRequest, match=message):
        parameters_of(request_)


@pytest.mark.parametrize("name", ["alias", "broken"])
def test_a_parameter_model_with_any_registered_name_is_refused(name: str) -> None:
    """An alias, and an adapter whose entry is malformed, too."""
    table = replace(TABLE, aliases={"alias": {"pirate": 100}}, unavailable={"broken": ()})

    with pytest.raises(InvalidRequest, match="model: not taken as a parameter"):
        check_parameters(table, {"model": name})
