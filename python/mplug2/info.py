"""What mplug2 finds on this machine: versions, CPU, devices, compiled libraries, and the layer each op would run in.

`python -m mplug2.info [--json] [--explain]` is the same as `mplug2 info`.
"""

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mplug2 import _library, proofs

PACKAGES = (
    "mplug2", "torch", "numpy", "av", "pillow", "tokenizers", "safetensors", "huggingface_hub", "typer", "rich",
)  # fmt: skip
# Names as the Linux kernel spells them.
CPU_FEATURES = {
    "x86_64": ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    "aarch64": ("asimd", "asimdhp", "bf16", "sve", "sve2", "i8mm"),
}


def report() -> dict[str, Any]:
    """Everything that `mplug2 info` prints, as plain data that json can write.

    Returns:
        versions: name -> version, None where a package is not installed.
        cpu: model, cores, threads (what torch uses), features: name -> present.
        devices: one dict per CUDA device: name, capability, memory_bytes; empty without CUDA.
        libraries: one dict per compiled library: name, path (None: not loaded), reason.
        ops: one dict per op: op, layer, reason; empty where `_cpu` did not load.
        kernels: what `explain` says of the CUDA kernels; empty where `_cuda` did not load.
    """
    libraries = [vars(library) for library in _library.libraries()]
    devices = [_device(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "cpu": _cpu(),
        "devices": devices,
        "libraries": libraries,
        "ops": _ops() if libraries[0]["path"] else [],
        "kernels": _kernels({device["capability"] for device in devices}) if libraries[2]["path"] else [],
    }


def explain(
    instances: list[proofs.Instance], records: list[proofs.Record], capabilities: set[str]
) -> list[dict[str, str]]:
    """For every kernel instance on GPUs of every capability that it is made for: op, instance, capability, layer that
    runs, and why."""
    known = {record.key: record for record in records}
    rows = []
    for instance in instances:
        short = instance.digest[:12]
        for capability in filter(instance.is_made_for, sorted(capabilities)):
            record = known.get((instance.name, instance.digest, capability))
            others = sorted(r.capability for r in records if (r.instance, r.digest) == (instance.name, instance.digest))
            if capability not in instance.proven:
                elsewhere = f" (on {', '.join(others)} it is)" if others else ""
                reason = f"sources {short} are not proven on {capability}{elsewhere}: run `mplug2 doctor`"
            else:
                by = f", {record.device}, {record.date}" if record else ""
                reason = f"sources {short} are proven on {capability}{by}"
            layer = "portable" if capability in instance.proven else "reference"
            if layer == "portable" and capability in instance.slower:
                layer, reason = "reference", f"{reason}, but there the reference was measured to be faster"
            row = {"op": instance.op, "instance": instance.name, "capability": capability}
            rows.append(row | {"layer": layer, "reason": reason})
    return rows


def show(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Every CUDA kernel: does it serve, and why.")] = False,
) -> None:
    """Print versions, CPU features, devices, compiled libraries, and for every op which layer would run and why."""
    facts = report()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console = Console(highlight=False)
    cpu = facts["cpu"]
    features = ", ".join(name for name, present in cpu["features"].items() if present) or "none of those known"
    absent = ", ".join(name for name, present in cpu["features"].items() if not present)
    console.print(
        _table("Versions", ["package", "version"], [(k, v or "absent") for k, v in facts["versions"].items()])
    )
    machine = [
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads"),
        ("CPU features", features + (f" (absent: {absent})" if absent else "")),
    ]
    for device in facts["devices"]:
        memory = device["memory_bytes"] / 2**30
        machine.append(("CUDA device", f"{device['name']}, capability {device['capability']}, {memory:.0f} GiB"))
    if not facts["devices"]:
        machine.append(("CUDA device", "none"))
    console.print(_table("Machine", ["part", "what"], machine))
    rows = [(library["name"], library["path"] or "not loaded", library["reason"]) for library in facts["libraries"]]
    console.print(_table("Compiled libraries", ["library", "path", "reason"], rows))
    rows = [(op["op"], op["layer"], op["reason"]) for op in facts["ops"]]
    console.print(_table("Ops", ["op", "layer", "reason"], rows))
    if explain:
        rows = [tuple(kernel.values()) for kernel in facts["kernels"]]
        if not rows:
            library = facts["libraries"][2]
            why = "no CUDA device" if library["path"] else library["reason"]
            rows = [("all", "none", "none", "reference", why)]
        console.print(_table("CUDA kernels", ["op", "kernel", "capability", "layer", "reason"], rows))


def _table(title: str, columns: list[str], rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # plain: a reason may hold brackets, which rich would take for markup
    return table


def _version(package: str) -> str | None:
    if package == "torch":  # its metadata drops the build (+cpu, +cu130)
        return torch.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")  # absent outside Linux: then no feature counts as present
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    present = fields.get("flags", fields.get("Features", "")).split()
    return {
        "model": fields.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": {name: name in present for name in CPU_FEATURES.get(platform.machine(), ())},
    }


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _ops() -> list[dict[str, str]]:
    from mplug2 import ops  # needs `_cpu`, which the report must be able to do without

    return [{"op": op, "layer": layer, "reason": reason} for op, layer, reason in ops.layers()]


def _kernels(capabilities: set[str]) -> list[dict[str, str]]:
    records = []
    for file in (proofs.SHIPPED, proofs.user_cache()):
        try:
            records += proofs.read(file)
        except ValueError:
            continue  # the library's own reason names the file
    return explain(proofs.instances(torch.ops.mplug2_cuda), records, capabilities)


if __name__ == "__main__":
    typer.run(show)
