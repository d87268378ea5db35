# SPDX-License-Identifier: MIT
"""The detector: batches in, findings out, state carried in between."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis import steps
from kvmprobe.analysis.candidates import Selection
from kvmprobe.analysis.findings import Acquittal, Cause, Finding
from kvmprobe.analysis.jit import Scan, compiled_scan
from kvmprobe.analysis.jit import available as jit_available
from kvmprobe.analysis.rules import RULES
from kvmprobe.analysis.rules.internal_slot_fill import RULE as FILL_RULE
from kvmprobe.probes.schema import EVENT, Columns, Type

#: Columns that a batch must have; the rest of the event is evidence.
COLUMNS: tuple[str, ...] = EVENT.names or ()

_PAGE_SHIFT = np.uint64(12)
#: What the steps see of an event, beside its page.
STEPPED: tuple[str, ...] = ("ts", "type", "site", "flags", "slot", "kind")
_FIRST_CAPACITY = 64


#: The events that are stepped over.
WATCHED = Selection({Type.LIFECYCLE, *(kind for rule in RULES for kind in rule.watches)})


@dataclass
class _Evidence:
    """What a (vm, vcpu, rule) has shown so far: rows of dtype EVENT, the first a cause or not."""

    cited: bool
    rows: list[NDArray[Any]] = field(default_factory=list)


class Detector:
    """Finds faults in a stream of events.

    Feed it batches in the order in which they were drained; where they are cut makes no difference,
    nor does the order between vCPUs.  It may be fed the CANDIDATE rows alone.  Memory is bounded by
    the vCPUs that live and those with findings.
    """

    def __init__(self, *, jit: bool = False, compile_after: int = 0) -> None:
        """Make a detector that has seen nothing.

        Args:
            jit: compile the step loop if numba is there and KVMPROBE_NO_JIT isn't set.  Without
                it numba is never imported.
            compile_after: do so once this many events were stepped over: importing numba and
                compiling cost more time than a small capture does.

        """
        self._scan: Scan = steps.scan
        self._compile_after = compile_after if jit and jit_available() else None
        self._stepped = 0
        self._compile_when_due()
        seed = np.array([secrets.randbits(29) * 2 + 1 for _ in range(2)], np.int64)
        self._places = steps.new_places(_FIRST_CAPACITY, seed)
        self._used = 0
        self._room = steps.Room(0)
        self._causes = np.zeros(_FIRST_CAPACITY, EVENT)
        self._evidence: dict[tuple[int, int], _Evidence] = {}
        self._acquitting: dict[tuple[int, int], np.void] = {}  # VM, rule: the first
        self._acquitted: Counter[tuple[int, int]] = Counter()  # of VMs without a place

    @property
    def compiled(self) -> bool:
        """Whether the step loop runs compiled."""
        return self._scan is not steps.scan

    @property
    def tracked(self) -> int:
        """How many VMs and vCPUs are kept in memory."""
        return self._used

    @property
    def occurrences(self) -> int:
        """Events that convicted so far: it grows when there is something new to tell."""
        return int(self._places.counts[: self._used].sum())

    def feed(self, columns: Columns) -> None:
        """Take in one batch.

        Args:
            columns: every field of the event; contiguous or not, read-only or not.  `type`, `flags`
                and `slot` say which others are taken.

        """
        chosen = WATCHED.pick(columns)
        if not len(chosen):
            return
        if len(chosen) > len(self._room.rows.key):
            self._room = steps.Room(len(chosen))
        rows, out = self._room.cut(len(chosen))
        _fill(rows, columns, chosen)
        self._stepped += len(chosen)
        done = 0
        while True:
            done, self._used = self._scan(rows, self._places, out, done, self._used)
            if done == len(chosen):
                break
            self._make_room()
        self._collect(columns, chosen, out)
        self._forget()
        self._compile_when_due()

    def findings(self) -> list[Finding]:
        """Return what was found so far, sorted by (first time, vm, vcpu, seq)."""
        found = [self._finding(place, r) for place, r in self._evidence]
        rank = {rule.id: n for n, rule in enumerate(RULES)}
        return sorted(found, key=lambda f: (*f.order, rank[f.rule.id]))

    def acquittals(self) -> list[Acquittal]:
        """Return the proofs of a right kernel seen so far, in the order of the rules and VMs."""
        counts = self._acquitted + self._counted_acquittals(np.arange(self._used))
        return [
            Acquittal(RULES[r], vm, first, counts[vm, r])
            for (vm, r), first in sorted(self._acquitting.items(), key=lambda kv: kv[0][::-1])
        ]

    def convicted(self, vm: int) -> bool:
        """Whether there is a finding about a VM."""
        return any(int(self._places.key[place]) >> 16 == vm for place, _ in self._evidence)

    def forget(self, vm: int) -> None:
        """Drop what is known of a VM that is gone, but for its findings."""
        for r in range(len(RULES)):
            self._acquitting.pop((vm, r), None)
            self._acquitted.pop((vm, r), None)

    def _compile_when_due(self) -> None:
        if self._compile_after is not None and self._stepped >= self._compile_after:
            self._scan = compiled_scan()

    def _finding(self, place: int, r: int) -> Finding:
        places, shown = self._places, self._evidence[place, r]
        key = int(places.key[place])
        first_ts = int(places.first[place, r])
        evidence = np.concatenate(shown.rows)
        cause = None
        if shown.cited:
            fills = int(places.counts[place, RULES.index(FILL_RULE)])
            age = first_ts - int(evidence["ts"][0])
            cause = Cause(FILL_RULE.id, evidence[0], age, fills)
        return Finding(
            rule=RULES[r],
            vm=key >> 16,
            vcpu=key & 0xFFFF,
            first=evidence[1 if shown.cited else 0],
            first_ts=first_ts,
            last_ts=int(places.last[place, r]),
            count=int(places.counts[place, r]),
            evidence=evidence,
            evidence_total=int(places.total[place, r]),
            cause=cause,
        )

    def _collect(self, columns: Columns, chosen: NDArray[np.intp], out: steps.Out) -> None:
        """Take evidence out of the batch, and the causes that later events may cite."""
        shown = np.flatnonzero(out.keep | out.acquit)
        for r in range(len(RULES) if len(shown) else 0):
            bit = np.uint64(1 << r)
            for row in _rows(columns, chosen[shown[(out.acquit[shown] & bit) != 0]]):
                self._acquit(r, row)
            kept = shown[(out.keep[shown] & bit) != 0]
            if len(kept):
                self._keep(r, columns, chosen, kept, out)
        cause = self._places.cause[: self._used]
        new = np.flatnonzero(cause >= 0)
        if len(new):
            self._causes[new] = _rows(columns, chosen[cause[new]])
            cause[new] = steps.KEPT_CAUSE

    def _keep(
        self,
        r: int,
        columns: Columns,
        chosen: NDArray[np.intp],
        kept: NDArray[np.intp],
        out: steps.Out,
    ) -> None:
        """Add the rows `kept`, each after the cause it cites, to the evidence of rule `r`."""
        place = out.place[kept]
        rows = _rows(columns, chosen[kept])
        cites = np.flatnonzero(out.cite[kept] & np.uint64(1 << r))
        if len(cites):
            at = out.cause[kept[cites]]
            earlier = at == steps.KEPT_CAUSE
            causes = _rows(columns, chosen[np.where(earlier, 0, at)])
            causes[earlier] = self._causes[place[cites[earlier]]]
            rows = np.insert(rows, cites, causes)
            place = np.insert(place, cites, place[cites])
        is_cause = np.zeros(len(rows), np.bool_)
        is_cause[cites + np.arange(len(cites))] = True
        order = np.argsort(place, kind="stable")
        starts = np.flatnonzero(np.diff(place[order], prepend=-1))
        for own in np.split(order, starts[1:]):
            key = int(place[own[0]]), r
            if key not in self._evidence:
                self._evidence[key] = _Evidence(cited=bool(is_cause[own[0]]))
            self._evidence[key].rows.append(rows[own])

    def _acquit(self, r: int, row: np.void) -> None:
        of = int(row["vm"]), r
        known = self._acquitting.get(of)
        if known is None or _order(row) < _order(known):
            self._acquitting[of] = row.copy()

    def _counted_acquittals(self, places: NDArray[np.intp]) -> Counter[tuple[int, int]]:
        """Return the acquittals counted at these places, by (VM, rule)."""
        counts = self._places.acquittals[places]
        total: Counter[tuple[int, int]] = Counter()
        for i, r in np.argwhere(counts).tolist():
            total[int(self._places.key[places[i]]) >> 16, r] += int(counts[i, r])
        return total

    def _make_room(self) -> None:
        self._move(np.arange(self._used), 2 * len(self._places.key))

    def _forget(self) -> None:
        """Drop vCPUs and VMs that are gone and have no findings, once they are the most."""
        used, places = self._used, self._places
        if used < _FIRST_CAPACITY:
            return
        vm = places.vm[:used]
        gone = places.gone[:used] | places.gone[vm] | (places.epoch[:used] != places.epoch[vm])
        keep = ~gone | places.counts[:used].any(axis=1)
        keep[vm[keep]] = True
        if keep.sum() <= used // 2:
            kept = np.flatnonzero(keep)
            self._move(kept, max(_FIRST_CAPACITY, 2 * len(kept)))

    def _move(self, keep: NDArray[np.intp], capacity: int) -> None:
        dropped = np.setdiff1d(np.arange(self._used), keep)
        for of, count in self._counted_acquittals(dropped).items():
            if of in self._acquitting:
                self._acquitted[of] += count
        causes = np.zeros(capacity, EVENT)
        causes[: len(keep)] = self._causes[keep]
        now = {old: new for new, old in enumerate(keep.tolist())}
        self._evidence = {(now[place], r): shown for (place, r), shown in self._evidence.items()}
        self._places = steps.move(self._places, keep, capacity)
        self._used = len(keep)
        self._causes = causes


def is_placeless(kinds: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Say which of these types have no address that a rule looks at."""
    placeless: NDArray[np.bool_] = (kinds == Type.GENERATION) | (kinds == Type.LIFECYCLE)
    return placeless


def _fill(rows: steps.Rows, columns: Columns, chosen: NDArray[np.intp]) -> None:
    """Put the chosen events into `rows`, of their number."""
    rows.key[:] = columns["vm"].take(chosen)
    rows.key[:] <<= 16
    rows.key[:] |= columns["vcpu"].take(chosen)
    for name in STEPPED:
        # In this mode nothing is put between; all indices are good.
        columns[name].take(chosen, out=getattr(rows, name), mode="clip")
    # A batch's addresses are not touched where no event has one.
    if is_placeless(rows.type).all():
        rows.gfn[:] = 0
    else:
        columns["addr"].take(chosen, out=rows.gfn, mode="clip")
        rows.gfn[:] >>= _PAGE_SHIFT


def _rows(columns: Columns, chosen: NDArray[np.intp]) -> NDArray[Any]:
    rows = np.empty(len(chosen), EVENT)
    for name in COLUMNS:
        rows[name] = columns[name][chosen]
    return rows


def _order(row: np.void) -> tuple[int, int, int, int]:
    return int(row["ts"]), int(row["vm"]), int(row["vcpu"]), int(row["seq"])
