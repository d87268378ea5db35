# SPDX-License-Identifier: MIT
"""Is what was found of a simulated fleet what there is to be found?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kvmprobe.analysis.words import INCONCLUSIVE, VULNERABLE
from kvmprobe.fleet.simulate import TRUTH


def rows(result: Path, table: str) -> list[dict[str, Any]]:
    """The rows of a table; times are ns since 1970."""
    columns = pq.read_table(result / f"{table}.parquet")
    for number, field in enumerate(columns.schema):
        if str(field.type).startswith("timestamp"):
            columns = columns.set_column(number, field.name, columns.column(number).cast("int64"))
    return list(columns.to_pylist())


def differences(fleet: Path, result: Path) -> list[str]:
    """Say where a result differs from the fleet's truth, a line each; none: found is truth."""
    truth = {host["host"]: host for host in json.loads((fleet / TRUTH).read_text())["hosts"]}
    hosts = {host["host"]: host for host in rows(result, "hosts")}
    found: dict[str, list[tuple[Any, ...]]] = {}
    for f in rows(result, "findings"):
        # A finding of info doesn't accuse; all that a simulation holds do.
        key = f["rule"], f["kernel"], f["vm"], f["vcpu"], f["count"], f["first"], f["last"]
        found.setdefault(f["host"], []).append(key)
    verdicts = {
        (v["host"], v["fault"]): (v["verdict"], v["began"]) for v in rows(result, "verdicts")
    }
    lost: dict[str, int] = {}
    for loss in rows(result, "losses"):
        lost[loss["host"]] = lost.get(loss["host"], 0) + loss["records"]
    wrong = [f"{name} is in one only" for name in sorted(truth.keys() ^ hosts.keys())]
    for name in truth.keys() & hosts.keys():
        there, got = truth[name], hosts[name]
        wanted = [
            (f["rule"], f["kernel"], f["vm"], f["vcpu"], f["count"], f["first_ns"], f["last_ns"])
            for f in there["findings"]
        ]
        began = min((f["first_ns"] for f in there["findings"]), default=None)
        overall = got["verdict"] in (VULNERABLE, INCONCLUSIVE)
        for what, is_, was in (
            ("findings", sorted(found.get(name, [])), sorted(wanted)),
            ("verdict", verdicts[name, "internal-slot"], (there["verdict"], began)),
            ("overall", overall, there["verdict"] in (VULNERABLE, INCONCLUSIVE)),
            ("events", got["events"], there["events"]),
            ("losses", (got["lost"], lost.get(name, 0)), (there["lost"], there["lost"])),
            ("kernels", sorted(got["kernels"]), sorted(there["kernels"])),
            ("problems", (got["done"], got["problems"]), (True, [])),
        ):
            if is_ != was:
                wrong.append(f"{name}: {what}: found {is_}, truth {was}")
    return sorted(wrong)
