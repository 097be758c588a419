# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""How much memory conversion takes does not depend on how large the adapter is."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

from adapters import write_adapter

# The peak of anonymous memory has no counter of its own in Linux, so a thread looks at it all the time.
_CONVERT_AND_WATCH = """
import sys, threading
from pathlib import Path

from tritonlora.conversion.layout import plan_layout
from tritonlora.conversion.tensors import convert_file
from tritonlora.peft.adapter import load_adapter

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

def watch():
    while not done.wait(0.002):
        seen.append(anonymous())

before, seen, done = anonymous(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
adapter = load_adapter(Path(sys.argv[1]))
convert_file(adapter, plan_layout(adapter, dtype="bfloat16"), Path(sys.argv[2]))
done.set()
watcher.join()
print(max(seen) - before)
"""


def write_sparse_adapter(directory: Path, *, layers: int, r: int, features: int) -> int:
    """An adapter of zeros that takes no room on the disk, with q_proj in every layer; its bytes."""
    write_adapter(directory, {}, r=r)
    header, end = {}, 0
    for layer in range(layers):
        for matrix, shape in (("A", [r, features]), ("B", [features, r])):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{matrix}.weight"
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + 2 * r * features]}
            end += 2 * r * features
    text = json.dumps(header).encode()
    with (directory / "adapter_model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def test_large_adapter_converts_in_little_memory(tmp_path: Path) -> None:
    """Half a GiB of adapter takes the memory of some of its modules, 8 MiB each."""
    nbytes = write_sparse_adapter(tmp_path / "adapter", layers=64, r=256, features=8192)
    out = tmp_path / "out"
    ran = subprocess.run(
        [sys.executable, "-c", _CONVERT_AND_WATCH, tmp_path / "adapter", out], check=True, stdout=subprocess.PIPE
    )
    size = out.stat().st_size
    out.unlink()

    assert 512 << 20 == nbytes == size
    assert int(ran.stdout) < 64 << 20
