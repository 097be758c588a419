# SPDX-FileCopyrightText: the tritonlora authors
# SPDX-License-Identifier: Apache-2.0
"""Benchmark conversion: time and memory, as ratios of one run on one machine.

The adapter is one of a Llama 8B, in bfloat16, on all seven linear layers. Three ways are timed, each from the adapter's
files to a new file. All files are in the same in-memory file system, so that no disk is measured:

    convert          reading the adapter, every check, and writing lora_weights
    copy             copying that file, padding included (`shutil.copyfile`)
    straightforward  in torch, without a check: load, cast, scale, flatten, pad, stack, write

Each rank is timed in a process of its own, in which the three ways take turns. A time is the shortest of all rounds,
since other load on the machine can only lengthen a round. Smaller ranks have more rounds, since a disturbance is a
larger part of their time. The peak memory of each way is measured in one more process, without memory of other ways.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (a file system in memory is what is meant)
LAYERS = 32
LLAMA_8B: Mapping[str, tuple[int, int]] = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 14336),
    "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """The results for one rank.

    Seconds are minima over all rounds. A peak is the resident memory, mapped pages included, above that after imports.
    """

    rank: int
    input_nbytes: int
    output_nbytes: int
    convert_seconds: float
    copy_seconds: float
    straightforward_seconds: float
    convert_peak_nbytes: int
    straightforward_peak_nbytes: int

    @property
    def ratio_to_copy(self) -> float:
        """The time of a conversion over that of copying its output; 1 is as fast as the copy."""
        return self.convert_seconds / self.copy_seconds

    @property
    def speedup(self) -> float:
        """The time of the straightforward way over that of a conversion."""
        return self.straightforward_seconds / self.convert_seconds

    @property
    def peak_to_output(self) -> float:
        """Peak memory over the output's size."""
        return self.convert_peak_nbytes / self.output_nbytes


def run(ranks: Sequence[int], *, rounds: int, layers: int = LAYERS, directory: Path = SHARED_MEMORY) -> list[Measured]:
    """Measure each rank, with `directory` on an in-memory file system that has room for three times the output."""
    return [_measure(rank, rounds, layers, directory) for rank in ranks]


def table(results: Sequence[Measured]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| rank | output | convert | copy | straightforward | of copy | speedup | peak | of output | straightforward |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.rank} | {_mib(r.output_nbytes)} | {_ms(r.convert_seconds)} | {_ms(r.copy_seconds)} "
        f"| {_ms(r.straightforward_seconds)} | {r.ratio_to_copy:.2f} | {r.speedup:.1f} | {_mib(r.convert_peak_nbytes)} "
        f"| {r.peak_to_output:.2f} | {_mib(r.straightforward_peak_nbytes)} |"
        for r in results
    ]
    return "\n".join(lines)


def draw(results: Sequence[Measured], path: Path) -> None:
    """The times as bars beside those of the copy, into a PNG file."""
    import matplotlib as mpl

    mpl.use("agg")  # no display
    from matplotlib import pyplot

    ways = ("copy", "convert", "straightforward")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for offset, way in enumerate(ways):
        ratios = [getattr(result, f"{way}_seconds") / result.copy_seconds for result in results]
        bars = axes.bar([number + 0.27 * (offset - 1) for number in range(len(results))], ratios, 0.25, label=way)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(results)), [f"r = {result.rank}\n{_mib(result.output_nbytes)}" for result in results])
    axes.set_ylabel("time, as a multiple of copying the output")
    axes.set_title("Converting a Llama 8B adapter, all linear layers, bfloat16")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def make_adapter(
    directory: Path,
    rank: int,
    layers: int = LAYERS,
    shapes: Mapping[str, tuple[int, int]] = LLAMA_8B,
    *,
    seed: int = 0,
) -> None:
    """Write a random adapter of `rank` for the linear layers of these (in, out), as PEFT names its tensors."""
    import torch
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for name, (in_features, out_features) in shapes.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            for matrix, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                tensors[f"{path}.lora_{matrix}.weight"] = torch.randn(shape, generator=random).bfloat16()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "use_rslora": True, "base_model_name_or_path": "llama"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def convert(adapter: Path, out: Path) -> None:
    """Convert as `tritonlora convert` does."""
    from tritonlora.conversion.layout import plan_layout
    from tritonlora.conversion.tensors import convert_file
    from tritonlora.peft.adapter import load_adapter

    loaded = load_adapter(adapter)
    convert_file(loaded, plan_layout(loaded, dtype="bfloat16"), out)


def straightforward(adapter: Path, out: Path) -> None:
    """Convert in the straightforward way in torch, without any check."""
    import torch
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"] ** 0.5
    tensors = load_file(adapter / "adapter_model.safetensors")
    rows = []
    for key in sorted(key for key in tensors if ".lora_A." in key):
        lora_a = tensors[key].to(torch.bfloat16)
        lora_b = (tensors[key.replace(".lora_A.", ".lora_B.")].float() * scaling).to(torch.bfloat16)
        rows.append(torch.cat([lora_a.flatten(), lora_b.flatten()]))
    width = max(row.numel() for row in rows)
    padded = [torch.nn.functional.pad(row, (0, width - row.numel())) for row in rows]
    torch.stack(padded).view(torch.int16).numpy().tofile(out)


def _measure(rank: int, rounds: int, layers: int, directory: Path) -> Measured:
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        adapter = Path(scratch) / "adapter"
        adapter.mkdir()
        make_adapter(adapter, rank, layers)
        seconds = _in_process("times", scratch, str(rounds * max(1, 32 // rank)))
        convert_peak, straightforward_peak = (
            _in_process("peak", scratch, way) for way in ("convert", "straightforward")
        )
        return Measured(
            rank=rank,
            input_nbytes=(adapter / "adapter_model.safetensors").stat().st_size,
            output_nbytes=(Path(scratch) / "reference").stat().st_size,
            convert_seconds=seconds["convert"],
            copy_seconds=seconds["copy"],
            straightforward_seconds=seconds["straightforward"],
            convert_peak_nbytes=int(convert_peak["nbytes"]),
            straightforward_peak_nbytes=int(straightforward_peak["nbytes"]),
        )


def _in_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tritonlora.bench.convert", *arguments]
    answer: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return answer


def _times(scratch: Path, rounds: int) -> dict[str, float]:
    adapter, reference, out = scratch / "adapter", scratch / "reference", scratch / "out"
    straightforward(adapter, reference)
    ways: dict[str, Callable[[], object]] = {
        "convert": lambda: convert(adapter, out),
        "copy": lambda: shutil.copyfile(reference, out),
        "straightforward": lambda: straightforward(adapter, out),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            out.unlink(missing_ok=True)
            start = time.perf_counter()
            way()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in seconds.items()}


def _peak(scratch: Path, way: Callable[[Path, Path], None]) -> dict[str, float]:
    import safetensors.torch  # noqa: F401  (imported here so that it is not measured)

    import tritonlora.conversion.tensors  # noqa: F401

    # Linux: forget the peak of the imports.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    way(scratch / "adapter", scratch / "out")
    return {"nbytes": _status("VmHWM") - before}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.0f} MiB"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _main(arguments: Sequence[str]) -> None:
    what, scratch, detail = arguments
    if what == "times":
        answer = _times(Path(scratch), int(detail))
    else:
        answer = _peak(Path(scratch), {"convert": convert, "straightforward": straightforward}[detail])
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main(sys.argv[1:])
