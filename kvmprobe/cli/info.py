# SPDX-License-Identifier: MIT
"""`kvmprobe info`: what a capture holds, without judging it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer


def info(
    capture: Annotated[Path, typer.Argument(help="A capture.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show what a capture holds: host, plan, events by observation, losses, damage."""
    from kvmprobe.analysis.vms import printable
    from kvmprobe.cli.tables import columns, plan_lines

    found = _gather(capture)
    if as_json:
        json.dump(found, sys.stdout, indent=2)
        print()
        return
    header = found["header"]
    host = header["host"]
    source = header["source"]
    facts = [
        ("capture", str(capture)),
        ("started", header["started"] or "unknown"),
        ("seconds", f"{found['seconds']:.3f}"),
        ("schema", f"{header['schema']['major']}.{header['schema']['minor']}"),
        ("made by", f"{header['tool']['name']} {header['tool']['version']}"),
        ("source", source["kind"] + (f": {source['note']}" if source["note"] else "")),
        ("command", " ".join(header["command"]) or "-"),
        ("kernel", host["kernel"] or "unknown"),
        ("vendor", host["vendor"] or "unknown"),
        ("VMs", str(found["vms"])),
        ("vCPUs", str(found["vcpus"])),
        ("batches", str(found["batches"])),
        ("events", f"{found['events']:,}"),
        ("lost", f"{found['lost']:,}"),
    ]
    if found["truncated"]:
        facts.append(("cut off", found["truncated"]))
    facts += [("damaged", f"batch {d['batch']}: {d['reason']}") for d in found["damaged"]]
    lines = columns([(name, printable(value)) for name, value in facts])
    lines += ["", "events by observation:"]
    lines += columns([(name, f"{n:,}") for name, n in found["observations"].items()], "  ")
    lines += ["", *(printable(line) for line in plan_lines(header["plan"]))]
    print("\n".join(lines))


def _gather(path: Path) -> dict[str, Any]:
    import numpy as np

    from kvmprobe.probes.schema import NO_VCPU, Type
    from kvmprobe.store.reader import CaptureReader

    types: Counter[int] = Counter()
    vcpus: set[int] = set()
    lost = batches = 0
    first = last = None
    with CaptureReader(path) as reader:
        for batch in reader.batches(["ts", "vm", "vcpu", "type", "addr"]):
            if not len(batch["ts"]):
                continue
            batches += 1
            types.update(dict(enumerate(np.bincount(batch["type"]).tolist())))
            lost += int(batch["addr"][batch["type"] == Type.LOSS].sum())
            vcpus.update(
                np.unique(batch["vm"].astype(np.uint64) << np.uint64(16) | batch["vcpu"]).tolist()
            )
            first = int(batch["ts"].min()) if first is None else min(first, int(batch["ts"].min()))
            last = int(batch["ts"].max()) if last is None else max(last, int(batch["ts"].max()))
        return {
            "capture": str(path),
            "header": reader.header,
            "seconds": (last - first) / 1e9 if first is not None and last is not None else 0.0,
            "batches": batches,
            "events": sum(n for kind, n in types.items() if kind != Type.LOSS),
            "lost": lost,
            "vms": len({key >> 16 for key in vcpus} - {0}),
            "vcpus": len({key for key in vcpus if key & 0xFFFF != NO_VCPU}),
            "observations": {Type(k).name: n for k, n in sorted(types.items()) if n},
            "truncated": reader.truncated,
            "damaged": [
                {"batch": d.batch_index, "events": d.events, "offset": d.offset, "reason": d.reason}
                for d in reader.damaged
            ],
            "unknown": {str(kind): n for kind, n in reader.unknown_events.items()},
        }
