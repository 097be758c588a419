# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""The client of the route benchmark: HTTP streams, in a process of its own that takes little processor time.

Ways to ask take turns, round after round, so that other load on the machine affects all of them alike. A round opens
its streams together and ends with the last of them. While the clock runs, responses are only searched for their end.
They are parsed afterwards.
"""

from __future__ import annotations

import json
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from types import MappingProxyType
from typing import Any

from tritonlora.bench.measured import MICRO
from tritonlora.bench.processes import processor_seconds
from tritonlora.errors import ServerError

STREAMING = b"HTTP/1.1 200"
ANSWER = b"data: "  # Triton's generate_stream: server-sent events in HTTP chunks
END = b"\r\n0\r\n\r\n"
TIMEOUT_SECONDS = 120.0
PROMPT = "hello"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to ask: a model, and JSON bodies of generate_stream, which streams and rounds use in turn."""

    model: str
    bodies: Sequence[Mapping[str, object]]
    answers: int  # the least number of responses to each stream
    url: str = ""  # HOST:PORT of another server than the one of `ask`
    path: str = ""  # another one than that of generate_stream


@dataclass(frozen=True, slots=True)
class Times:
    """The times of one way to ask, in seconds."""

    first: list[float] = field(default_factory=list)  # each stream, up to its first response
    whole: list[float] = field(default_factory=list)  # each stream, up to its end
    rounds: list[float] = field(default_factory=list)  # each round, up to the end of its last stream
    client: list[float] = field(default_factory=list)  # processor time of the client's process in each round
    processor: dict[str, float] = field(default_factory=dict)  # the same of each group of processes, in all rounds

    def spent(self, count: int) -> str:
        """The processor time in µs that each group of processes took for one of `count`, where it is at least one."""
        micros = {name: MICRO * seconds / count for name, seconds in self.processor.items()}
        return ", ".join(f"{name} {micro:.0f}" for name, micro in micros.items() if micro >= 1)


def body(tokens: int, prompt: str = PROMPT) -> dict[str, Any]:
    """The inputs of the engine's model for a response of `tokens` tokens, as generate_stream takes them."""
    ids = list(prompt.encode())
    return {"input_ids": ids, "input_lengths": len(ids), "request_output_len": tokens, "streaming": True}


def ask(
    url: str,
    ways: Mapping[str, Way],
    *,
    rounds: int,
    streams: int = 1,
    discarded: int = 0,
    pause: float = 0.0,
    processes: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> dict[str, Times]:
    """Time `rounds` of each way against the server at `url` (HOST:PORT), after `discarded` rounds that do not count.

    With a `pause` in seconds the client looks for responses only so often; this saves processor time if only the end
    counts. `processes` are groups of process ids whose processor time is measured for each way.
    Raises ServerError when a stream ends with an error, or with fewer responses than its way has.
    """
    job = {
        "url": url,
        "ways": {name: asdict(way) for name, way in ways.items()},
        "rounds": rounds,
        "streams": streams,
        "discarded": discarded,
        "pause": pause,
        "processes": dict(processes),
    }
    return {name: Times(**times) for name, times in in_process("tritonlora.bench.load", job).items()}


# What the benchmark's clients share


def in_process(module: str, job: object) -> Any:
    """Run `module` in a process of its own, and return its result. `job`, its input, and the result are JSON."""
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, input=json.dumps(job), text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise ServerError(done.stdout.strip() or f"the client ended with status {done.returncode}")
    return json.loads(done.stdout)


def main(do: Callable[[Any], object]) -> int:
    """The main function of a module that `in_process` runs: write the result of `do`, or its error, to stdout.

    Returns the exit status.
    """
    try:
        result = do(json.load(sys.stdin))
    except (OSError, ServerError) as error:
        sys.stdout.write(str(error))
        return 1
    json.dump(result, sys.stdout)
    return 0


def is_whole(received: bytes | bytearray) -> bool:
    """Whether an HTTP response has arrived to its end. Streams are in chunks; some errors have a Content-Length."""
    if received.startswith(STREAMING):
        return received.endswith(END)
    head, _, content = received.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: (\d+)", head.lower())
    return received.endswith(END) or (length is not None and len(content) >= int(length[1]))


class Stream:
    """A connection for one request after another."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), timeout=TIMEOUT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = bytearray()


def request_bytes(url: str, model: str, body: Mapping[str, object], path: str = "") -> bytes:
    """A request of generate_stream, or of another `path`, as it goes over the wire."""
    content = json.dumps(body).encode()
    head = f"POST {path or f'/v2/models/{model}/generate_stream'} HTTP/1.1\r\nHost: {url}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


# The client itself


def _check(stream: Stream, way: Way) -> None:
    head, _, body = bytes(stream.received).partition(b"\r\n\r\n")
    if not head.startswith(STREAMING) or b'"error"' in body or body.count(ANSWER) < way.answers:
        raise ServerError(f"{way.model} answered: {stream.received[-500:].decode(errors='replace')}")


def _round(streams: Sequence[Stream], requests: Sequence[bytes], times: Times, pause: float) -> None:
    """Send a request on each stream, and read all responses to their end. The times are added to `times`."""
    poll = select.epoll()
    open_streams = {}
    for stream in streams:
        stream.received.clear()
        poll.register(stream.socket.fileno(), select.EPOLLIN)
        open_streams[stream.socket.fileno()] = stream
    processor = time.process_time()
    start = time.perf_counter()
    began, first = {}, {}
    for (number, stream), request in zip(open_streams.items(), requests, strict=True):
        began[number] = time.perf_counter()
        stream.socket.sendall(request)
    while open_streams:
        ready = poll.poll(TIMEOUT_SECONDS)
        now = time.perf_counter()
        if not ready:
            raise ServerError(f"no answer for {TIMEOUT_SECONDS:.0f} s")
        for number, _ in ready:
            stream = open_streams[number]
            piece = stream.socket.recv(1 << 16)
            if number not in first and (ANSWER in piece or not piece):
                first[number] = now - began[number]
            stream.received += piece
            if not piece or is_whole(stream.received):
                times.whole.append(now - began[number])
                poll.unregister(number)
                del open_streams[number]
        if pause:
            time.sleep(pause)
    times.rounds.append(time.perf_counter() - start)
    times.client.append(time.process_time() - processor)
    times.first.extend(first.values())
    poll.close()


def _run(
    url: str,
    ways: Mapping[str, Way],
    *,
    rounds: int,
    streams: int,
    discarded: int,
    pause: float,
    processes: Mapping[str, Sequence[int]],
) -> dict[str, Times]:
    connections = {name: [_stream(way.url or url) for _ in range(streams)] for name, way in ways.items()}
    times = {name: Times() for name in ways}
    order = list(ways)
    random = Random(0)  # noqa: S311
    for number in range(discarded + rounds):
        random.shuffle(order)  # Triton's cleaning up after one way falls into each of the other ways equally often
        for name in order:
            way, kept = ways[name], times[name] if number >= discarded else Times()
            bodies = [way.bodies[(number + stream) % len(way.bodies)] for stream in range(streams)]
            requests = [request_bytes(way.url or url, way.model, body, way.path) for body in bodies]
            before = processor_seconds(processes)
            _round(connections[name], requests, kept, pause)
            for group, seconds in processor_seconds(processes).items():
                kept.processor[group] = kept.processor.get(group, 0.0) + seconds - before[group]
            for stream in connections[name]:
                _check(stream, way)
    return times


def _stream(url: str) -> Stream:
    host, port = url.rsplit(":", 1)
    return Stream(host, int(port))


def _do(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    ways = {name: Way(**way) for name, way in job.pop("ways").items()}
    return {name: asdict(one) for name, one in _run(ways=ways, **job).items()}


if __name__ == "__main__":
    raise SystemExit(main(_do))
