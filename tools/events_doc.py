# SPDX-License-Identifier: MIT
"""Write docs/events.md from probes/events.h: python tools/events_doc.py, from the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs/events.md"

#: The enums in the order of the page: C name, title, and the column that holds it.
ENUMS = (
    ("kvmprobe_type", "Observations", "`type`"),
    ("kvmprobe_site", "Sites", "`site`"),
    ("kvmprobe_flag", "Flags", "`flags`, one bit each"),
    ("kvmprobe_fault_result", "Fault results", "`kind` of FAULT"),
    ("kvmprobe_faultin_result", "Faultin results", "`kind` of FAULTIN"),
    ("kvmprobe_mmio_type", "MMIO types", "`kind` of MMIO"),
    ("kvmprobe_spte_change", "SPTE changes", "`kind` of SPTE"),
    ("kvmprobe_memslot_change", "Memslot changes", "`kind` of MEMSLOT"),
    ("kvmprobe_lifecycle_change", "Lifecycle changes", "`kind` of LIFECYCLE"),
    ("kvmprobe_loss_cause", "Loss causes", "`len` of LOSS"),
)


def render() -> str:
    """The page as text."""
    from kvmprobe.probes import schema

    lines = [
        "<!-- SPDX-License-Identifier: MIT -->",
        "<!-- made by tools/events_doc.py from probes/events.h: do not edit -->",
        "# Events",
        "",
        f"Schema {schema.SCHEMA_MAJOR}.{schema.SCHEMA_MINOR}. An event is {schema.EVENT.itemsize} "
        "bytes, little endian, without padding. A capture holds one column a field, under the "
        "same name.",
        "",
        "## Fields",
        "",
    ]
    offsets = schema.EVENT.fields
    if offsets is None:
        raise SystemExit("the event has no fields")
    lines += table(
        ("field", "type", "offset", "what it holds"),
        [
            (
                f"`{f.name}`",
                schema.EVENT[f.name].name,
                str(offsets[f.name][1]),
                f.doc,
            )
            for f in schema.FIELDS
        ],
    )
    lines += ["", "## What the fields say, by observation", "", '"-" is 0.', ""]
    lines += table(*observations(schema.HEADER.read_text(encoding="utf-8")))
    for name, title, column in ENUMS:
        lines += ["", f"## {title}", "", f"In {column}.", ""]
        value = "0x{:x}" if name == "kvmprobe_flag" else "{}"
        lines += table(
            ("name", "value", "what it says"),
            [(m.name, value.format(m.value), m.doc) for m in schema.ENUMS[name]],
        )
    lines += ["", "## Memslot ids of KVM's own", ""]
    lines += table(
        ("id", "memslot"),
        [
            (str(schema.SLOT_TSS), "the hidden TSS (kvm_intel)"),
            (str(schema.SLOT_APIC), "the APIC access page"),
            (str(schema.SLOT_IDENTITY), "the identity map (kvm_intel)"),
        ],
    )
    return "\n".join(lines) + "\n"


def observations(header: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The head and the rows of the table in the header's comment."""
    lines = [line.removeprefix(" * ") for line in header.splitlines() if line.startswith(" * |")]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]
    return rows[0], rows[2:]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    TARGET.write_text(render(), encoding="utf-8")
