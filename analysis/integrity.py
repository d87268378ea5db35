# SPDX-License-Identifier: MIT
"""Is the stream whole, and can a kernel have made it?  Losses, gaps and anomalies.

Rules don't look at this: it says how far their silence can be trusted.  What they find on a vCPU
whose events no kernel can have made is no finding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.analysis.jit import available
from kvmprobe.analysis.sequences import Sequences, small
from kvmprobe.probes.schema import NO_VCPU, Columns, Flag, LifecycleChange, LossCause, Type

#: Events before the loop is worth its compiling.
_COMPILE_AFTER = 1_000_000
#: Gaps and anomalies are listed up to so many; their totals are exact.
LIST_LIMIT = 100

_OF_LOSS = ("vm", "kind", "aux", "len", "addr")
_REPEATS = "repeats"
_GOES_BACK = "goes back"
_NO_VM = "belongs to no VM"
#: Flags that contradict each other -> the anomaly's kind.
_CONTRADICTIONS = (
    ((Flag.L2, Flag.LEVEL_KNOWN), "L2 without a known level"),
    ((Flag.SMM, Flag.AS_KNOWN), "SMM without a known address space"),
    ((Flag.SMM, Flag.TWO_AS), "SMM with one address space"),
    ((Flag.GEN_IS_AS0, Flag.GEN_KNOWN), "a compared generation that isn't known"),
    ((Flag.GEN_IS_CURRENT, Flag.GEN_KNOWN), "a compared generation that isn't known"),
    ((Flag.OTHER_AS, Flag.FILL_AS_KNOWN), "another address space that isn't known"),
)


def _impossible() -> NDArray[np.uint8]:
    """For each small number, 1 + the index of the contradiction in it; 0: none."""
    table = np.zeros(1 << 10, np.uint8)
    number = np.arange(len(table))
    for i, ((one, other), _) in reversed(tuple(enumerate(_CONTRADICTIONS))):
        alone = ((number & small(int(one))) != 0) & ((number & small(int(other))) == 0)
        table[alone] = i + 1
    return table


_IMPOSSIBLE = _impossible()
_UNSEEN = np.int64(-2)  # before a vCPU's first event; -1 is before its sequence number 0


def name_of(enum: type[Type] | type[LossCause], value: int) -> str:
    """Name a value of a capture, which may be one that this version doesn't know."""
    try:
        return enum(value).name
    except ValueError:
        return f"{enum.__name__.lower()}-{value}"


@dataclass(frozen=True)
class Gap:
    """Records of one vCPU that are missing between `after` and the next event, at time `ts`."""

    vm: int
    vcpu: int
    after: int
    records: int
    ts: int


@dataclass(frozen=True)
class Anomaly:
    """An event that no kernel can make, by `kind`.

    A sequence number "repeats" or "goes back", flags contradict each other, or a vCPU "belongs to
    no VM".
    """

    kind: str
    vm: int
    vcpu: int
    seq: int
    ts: int


@dataclass
class VmDoubts:
    """What speaks against the silence of one VM (0: of every VM).

    `lost` records by the observation's number, as LOSS events say; `missing` records as gaps say;
    `anomalies` events that no kernel makes.
    """

    lost: Counter[int] = field(default_factory=Counter)
    missing: int = 0
    anomalies: int = 0

    def any(self) -> bool:
        """Whether there is a doubt at all."""
        return bool(self.lost or self.missing or self.anomalies)


class Integrity:
    """Follows each vCPU's sequence over batches and adds up LOSS events.

    A LOSS event with a VM concerns that VM only, one of VM 0 all of them; a gap concerns its VM.
    """

    def __init__(self, *, from_first: bool = False, jit: bool = False) -> None:
        """Start with nothing seen.

        Args:
            from_first: each vCPU's sequence begins at 0, as probes number it: what is missing
                before its first event was lost.  Otherwise it may begin anywhere.
            jit: go through whole batches by a compiled loop once many events were seen, where numba
                is installed.

        """
        self._compile_after = _COMPILE_AFTER if jit and available() else None
        self._sequences: Sequences | None = None
        self._loaded = False
        self._before_first = np.int64(-1 if from_first else _UNSEEN)
        self._last: dict[int, int] = {}
        #: VMs seen, by number; 0 is there always and holds what concerns every VM.
        self.vms: dict[int, VmDoubts] = {0: VmDoubts()}
        #: Those of them that were destroyed, in that order.
        self.gone: dict[int, None] = {}
        #: Events seen, by type.
        self.events: Counter[int] = Counter()
        #: Records lost, by (observation, CPU, cause, VM or 0) as numbers.
        self.lost: Counter[tuple[int, int, int, int]] = Counter()
        #: The first gaps, and how many records all gaps are.
        self.gaps: list[Gap] = []
        self.missing = 0
        #: The first anomalies, and how many there are of each kind.
        self.anomalies: list[Anomaly] = []
        self.anomaly_counts: Counter[str] = Counter()
        self._doubtful: set[int] = set()
        self._forgotten = 0

    @property
    def total(self) -> int:
        """Events seen, LOSS events not counted."""
        return self.events.total() - self.events[Type.LOSS]

    @property
    def lost_total(self) -> int:
        """Records lost: as LOSS events say, or as gaps say where those are more."""
        return max(self.lost.total(), self.missing)

    @property
    def unexplained(self) -> int:
        """Records missing from the sequence that no LOSS event accounts for."""
        own = (max(0, vm.missing - vm.lost.total()) for n, vm in self.vms.items() if n)
        return max(0, sum(own, self._forgotten) - self.vms[0].lost.total())

    def unexplained_in(self, vm: int) -> int:
        """Records missing from a VM's sequences that no LOSS event accounts for."""
        doubts = self.vms[vm]
        return max(0, doubts.missing - doubts.lost.total() - self.vms[0].lost.total())

    def lost_by_observation(self, vm: int | None = None) -> dict[str, int]:
        """Return the records lost, by name of the observation.

        Args:
            vm: only those that concern this VM; None: all.

        """
        lost: Counter[str] = Counter()
        for (observation, _, _, of), records in self.lost.items():
            if vm is None or of in (0, vm):
                lost[name_of(Type, observation)] += records
        return dict(lost)

    def forget(self, vms: Collection[int]) -> None:
        """Drop what is known of VMs that are gone: they stay in all totals."""
        for vm in vms:
            del self.gone[vm]
            doubts = self.vms.pop(vm)
            self._forgotten += max(0, doubts.missing - doubts.lost.total())
        self._last = {k: seq for k, seq in self._last.items() if k >> 16 in self.vms}

    def forgive(self, vm: int) -> None:
        """Drop what was lost of a VM (0: of all at once), or of VMs that were forgotten.

        A watch that runs for months is judged by what it lost lately.  Anomalies stay: no kernel
        makes them.
        """
        doubts = self.vms.get(vm)
        if doubts is None:
            self._forgotten = 0
        else:
            doubts.lost.clear()
            doubts.missing = 0
        for key in [key for key in self.lost if key[3] == vm]:
            del self.lost[key]

    def feed(self, columns: Columns) -> None:
        """Take in one batch.

        Args:
            columns: a batch with `vm`, `vcpu`, `seq`, `type`, `flags`; `ts`, `addr`, `aux`, `kind`
                and `len` are taken only when something is told by them.

        """
        if self._taken_whole(columns):
            return
        kinds = columns["type"]
        counts = np.bincount(kinds, minlength=Type.LOSS + 1)
        self.events.update({int(t): int(counts[t]) for t in np.flatnonzero(counts)})
        self._check(columns)
        lossy = bool(counts[Type.LOSS])
        if lossy:
            self._add_losses({k: columns[k][kinds == Type.LOSS] for k in _OF_LOSS})
        own = columns["vcpu"] != NO_VCPU
        if lossy:
            own &= kinds != Type.LOSS
        if len(own) and own.all():
            self._follow(columns, slice(None))
        else:
            self._meet(columns["vm"][~own & (kinds != Type.LOSS)])
            if own.any():
                self._follow(columns, own)
        if counts[Type.LIFECYCLE]:
            gone = (kinds == Type.LIFECYCLE) & (columns["kind"] == LifecycleChange.VM_GONE)
            ended = np.unique(columns["vm"][gone]).tolist()
            self.gone.update(dict.fromkeys(vm for vm in ended if vm in self.vms))

    def _taken_whole(self, columns: Columns) -> bool:
        """Whether the compiled loop took the batch in; brings what it keeps up to date."""
        if self._compile_after is None or self.events.total() < self._compile_after:
            return False
        if self._sequences is None:
            self._sequences = Sequences(_IMPOSSIBLE)
        if not self._loaded:
            self._sequences.load(self._last, self.vms)
        counts = self._sequences.take(columns)
        if counts is not None:
            self.events.update({int(t): int(counts[t]) for t in np.flatnonzero(counts)})
        elif self._loaded:
            self._last = self._sequences.last()
        self._loaded = counts is not None
        return self._loaded

    def _meet(self, vms: NDArray[Any]) -> None:
        """Note VMs, by their numbers."""
        for vm in np.unique(vms).tolist():
            if vm not in self.vms:
                self.vms[vm] = VmDoubts()

    def _add_losses(self, losses: Columns) -> None:
        for vm, observation, cpu, cause, records in zip(
            *(losses[name].tolist() for name in _OF_LOSS), strict=True
        ):
            self.lost[observation, cpu, cause, vm] += records
            self.vms.setdefault(vm, VmDoubts()).lost[observation] += records

    def trusts(self, vm: int, vcpu: int) -> bool:
        """Whether a kernel can have made all events of a vCPU (NO_VCPU: of a VM) so far."""
        return vm << 16 | vcpu not in self._doubtful

    def _check(self, columns: Columns) -> None:
        """Look for events that can't be, each by itself."""
        if _may_contradict(columns["flags"]):
            wrong = _IMPOSSIBLE.take(small(columns["flags"]))
            for i in np.unique(wrong[wrong != 0]).tolist():
                self._doubt(_CONTRADICTIONS[i - 1][1], columns, np.flatnonzero(wrong == i))
        homeless = columns["vm"] == 0
        if homeless.any():
            homeless = homeless & (columns["type"] != Type.LOSS)
            self._doubt(_NO_VM, columns, np.flatnonzero(homeless))

    def _doubt(self, kind: str, columns: Columns, rows: NDArray[np.intp]) -> None:
        """Count anomalies of one kind, list the first, and remember whose they are."""
        if not len(rows):
            return
        self.anomaly_counts[kind] += len(rows)
        vm, vcpu = columns["vm"][rows], columns["vcpu"][rows]
        numbers, counts = np.unique(vm, return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            self.vms.setdefault(number, VmDoubts()).anomalies += count
        self._doubtful.update(np.unique(vm.astype(np.int64) << 16 | vcpu).tolist())
        for i in range(min(len(rows), LIST_LIMIT - len(self.anomalies))):
            seq, ts = int(columns["seq"][rows[i]]), int(columns["ts"][rows[i]])
            self.anomalies.append(Anomaly(kind, int(vm[i]), int(vcpu[i]), seq, ts))

    def _follows(
        self,
        seq: NDArray[np.uint32],
        key: NDArray[np.int64],
        first: NDArray[np.intp],
        last: NDArray[np.intp],
    ) -> bool:
        """Take the sequences in if nothing is missing and no vCPU is new."""
        goes_on = seq[1:] - seq[:-1] == 1
        goes_on[first[1:] - 1] = True
        known = [self._last.get(k) for k in key[first].tolist()]
        heads = seq[first].tolist()
        if not goes_on.all() or any(
            k is None or (k + 1) % 2**32 != s for k, s in zip(known, heads, strict=True)
        ):
            return False
        self._last.update(zip(key[first].tolist(), seq[last].tolist(), strict=True))
        return True

    def _follow(self, columns: Columns, own: slice | NDArray[np.bool_]) -> None:
        """Compare each event's sequence number, of vCPUs' `own`, with the one before it."""
        order, key = _by_vcpu(columns["vm"][own], columns["vcpu"][own])
        first = np.flatnonzero(np.diff(key, prepend=-1))
        last = np.append(first[1:], len(key)) - 1
        lifecycle = columns["type"][own][order] == Type.LIFECYCLE
        numbers = columns["seq"][own][order]
        if not lifecycle.any() and self._follows(numbers, key, first, last):
            return
        ts = columns["ts"][own][order]
        seq = numbers.astype(np.int64)
        change = columns["kind"][own][order]
        ends = lifecycle & (change == LifecycleChange.VCPU_GONE)
        # A vCPU's end may be told when its address is taken again, long after its VM was forgotten.
        alone = np.flatnonzero(ends[first] & (first == last))
        late = [i for i in alone.tolist() if int(key[first[i]]) >> 16 not in self.vms]
        self._meet(np.delete(key[first], late) >> 16)
        before = np.empty_like(seq)
        before[1:] = np.where(ends[:-1], self._before_first, seq[:-1])
        before[first] = [self._last.get(k, self._before_first) for k in key[first].tolist()]
        before[first[late]] = _UNSEEN
        seen = lifecycle & (change == LifecycleChange.VCPU_SEEN)
        before[seen] = self._before_first
        self._last.update(zip(key[last].tolist(), seq[last].tolist(), strict=True))
        for k in key[last[ends[last]]].tolist():
            del self._last[k]
        # A u32 that wraps: the signed distance is the one that counts.
        step = (seq - before + 2**31) % 2**32 - 2**31
        step[before == _UNSEEN] = 1
        odd = np.flatnonzero(step != 1)
        if not len(odd):
            return
        jumps = odd[step[odd] > 1]
        self.missing += int((step[jumps] - 1).sum())
        for vm, records in zip((key[jumps] >> 16).tolist(), step[jumps].tolist(), strict=True):
            self.vms[vm].missing += records - 1
        for i in jumps[: LIST_LIMIT - len(self.gaps)].tolist():
            vm, vcpu = int(key[i]) >> 16, int(key[i]) & 0xFFFF
            self.gaps.append(Gap(vm, vcpu, int(before[i]), int(step[i]) - 1, int(ts[i])))
        sorted_columns = {"vm": key >> 16, "vcpu": key & 0xFFFF, "seq": seq, "ts": ts}
        self._doubt(_REPEATS, sorted_columns, np.flatnonzero(step == 0))
        self._doubt(_GOES_BACK, sorted_columns, np.flatnonzero(step < 0))


def _by_vcpu(
    vm: NDArray[np.uint32], vcpu: NDArray[np.uint16]
) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Order events by vCPU, each vCPU's as they came; also return the keys in that order."""
    low, width = int(vm.min()), int(vcpu.max()) + 1
    if (int(vm.max()) - low + 1) * width <= 1 << 16:
        # numpy sorts 16-bit keys by radix: ten times faster.
        narrow = (vm - np.uint32(low)) * np.uint32(width) + vcpu
        narrow = narrow.astype(np.uint16)
        order = np.argsort(narrow, kind="stable")
        wide = np.arange(int(narrow.max()) + 1)
        return order, ((wide // width + low) << 16 | wide % width).take(narrow[order])
    key = vm.astype(np.int64) << 16 | vcpu
    order = np.argsort(key, kind="stable")
    return order, key[order]


def _may_contradict(flags: NDArray[np.uint32]) -> bool:
    """Whether two flags may contradict each other in some event; quick, and no for most batches."""
    any_has, all_have = int(np.bitwise_or.reduce(flags)), int(np.bitwise_and.reduce(flags))
    return any(any_has & one and not all_have & other for (one, other), _ in _CONTRADICTIONS)
