# SPDX-License-Identifier: MIT
"""Captures of the guests in and out of SMM, and of overwritten SPTEs, on real kernels.

siblings-NAME.txt is what the guests printed: which row of which recipe ended when, whether memory
is there, and what the VMM saw.  tests/lab/siblings.py holds what each row must do.
"""

from pathlib import Path

import numpy as np
import pytest

from kvmprobe.analysis.run import analyze
from kvmprobe.probes.schema import Flag, SpteChange, Type, rows
from kvmprobe.store.reader import CaptureReader
from tests.lab.siblings import (
    KERNELS,
    MISREADS,
    PARTS,
    convictions,
    judge,
    read_parts,
    read_pids,
    read_rows,
)

GOLDEN = Path(__file__).parents[1] / "data/golden"
#: Capture: the kernel's package.
CAPTURES = {
    "siblings-6.12.107": "linux-image-6.12.107+deb13-amd64",
    "siblings-6.12.117": "linux-image-6.12.117+deb13-amd64",
    "siblings-6.12.74": "linux-image-6.12.74+deb12-amd64",
    "siblings-6.18.12": "linux-image-6.18.12+deb13-amd64",
    "siblings-7.2.11": "linux-image-7.2.11+deb13-amd64",
    "siblings-7.2.13": "linux-image-7.2.13+deb14-amd64",
}
NESTED, SHADOW = PARTS


def capture_of(stem: str) -> Path:
    return GOLDEN / f"{stem}.kvmprobe"


def output_of(stem: str, part: str) -> str:
    return read_parts((GOLDEN / f"{stem}.txt").read_text())[part]


def test_every_capture_is_described() -> None:
    assert {path.stem for path in GOLDEN.glob("siblings-*.kvmprobe")} == set(CAPTURES)


@pytest.mark.parametrize("stem", CAPTURES)
def test_each_row_is_found_as_expected(stem: str) -> None:
    (known,) = (known for known in KERNELS if known.spec.endswith(f"/{CAPTURES[stem]}"))
    with CaptureReader(capture_of(stem)) as reader:
        document = analyze([reader], jit=False).to_document()
    assert document["lost"] == 0
    output = (GOLDEN / f"{stem}.txt").read_text()
    cells = list(judge(known, output, capture_of(stem), document))
    assert [(cell.part, cell.what, cell.found) for cell in cells] == [
        (cell.part, cell.what, cell.expected) for cell in cells
    ]


def events_of(stem: str, part: str, vm: str) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """The events of one guest."""
    with CaptureReader(capture_of(stem)) as reader:
        events = np.concatenate([rows(batch) for batch in reader.batches()])
    pid = read_pids(output_of(stem, part))[vm]
    seen = events[(events["type"] == Type.LIFECYCLE) & (events["aux"] == pid)]
    mine: np.ndarray[tuple[int], np.dtype[np.void]] = events[events["vm"] == seen["vm"][0]]
    return mine


@pytest.mark.parametrize(
    ("stem", "generation"),
    [("siblings-6.12.107", Flag.GEN_IS_AS0), ("siblings-6.12.117", Flag.GEN_IS_CURRENT)],
)
def test_fills_in_smm_tell_the_kernels_apart(stem: str, generation: Flag) -> None:
    events = events_of(stem, NESTED, "reverse")
    fills = events[(events["type"] == Type.FILL) & ((events["flags"] & Flag.SMM) != 0)]
    assert len(fills) == 1  # V3
    both = Flag.GEN_IS_AS0 | Flag.GEN_IS_CURRENT
    assert Flag(int(fills["flags"][0])) & both == generation


def test_verdict_comes_before_any_misread() -> None:
    stem = "siblings-6.12.107"
    output = output_of(stem, NESTED)
    guest_rows = read_rows(output)["reverse"]
    found = list(convictions(capture_of(stem), read_pids(output)["reverse"], guest_rows))
    assert found[0] == ("V3", "address-space-generation")
    assert [row for row, rule in found if rule == "address-space-mixup"] == ["V5", "V6"]


def test_overwritten_entry_was_present_and_the_control_was_not() -> None:
    present = {}
    for vm in ("present", "control"):
        events = events_of("siblings-6.18.12", SHADOW, vm)
        marked = events[(events["type"] == Type.SPTE) & (events["kind"] == SpteChange.MARKED)]
        present[vm] = [bool(flags & Flag.PRESENT) for flags in marked["flags"].tolist()]
    assert present == {"present": [True], "control": [False]}


@pytest.mark.parametrize("part", PARTS)
def test_rows_of_the_fixed_kernel_are_right(part: str) -> None:
    found = read_rows(output_of("siblings-6.12.117", part))
    assert set(found) == set(MISREADS)
    assert [row.name for each in found.values() for row in each if row.memory == row.mmio] == []
