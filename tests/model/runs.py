# SPDX-License-Identifier: MIT
"""Random runs of the model: some VMs of one kind of kernel, and what their guests and VMMs do.

A run is made by a `random.Random` alone: a seed for a plain one, or one that Hypothesis steers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmprobe.probes.schema import SLOT_APIC, SLOT_IDENTITY, SLOT_TSS
from tests.model.kernel import Vcpu
from tests.model.memslots import Change, Kind, Slot, Vm
from tests.model.probes import Probes
from tests.model.terms import Fate, How
from tests.model.truth import APIC_GFN, PFN_ERROR, Truth

TSS_GFN, IDENTITY_GFN = 0xFFFBD, 0xFFFBC
RAM, ROM, SMRAM, NORMAL_RAM, HOLE, LATER = 0x180, 0xF0, 0xA0, 0xC0, 0x300, 0x400
PAGES = (RAM, ROM, SMRAM, NORMAL_RAM, HOLE, LATER, LATER + 1, TSS_GFN, TSS_GFN + 2, IDENTITY_GFN,
         APIC_GFN, 0)  # fmt: skip
#: As far as generations go in a VM that is old: around 2**53 and the SPTEs' wrap.
AGES = (0, 0, 1, 5, (1 << 18) - 4, (1 << 19) - 3, (1 << 52) - 1, (1 << 61) + 3)


#: How often a VM does what, and how it reaches pages, added up.
_ACTS = tuple(accumulate((12, 3, 1, 2, 1, 1, 1)))
_WAYS, _WAYS_AS_OFTEN = tuple(How), tuple(accumulate((6, 4, 2, 1)))


def random_kind(random: Random) -> Kind:
    """Choose a kind of kernel and host; one in twelve has a fault that no kernel has."""
    invented = random.randrange(24)
    hides = random.random() < 0.5
    kind = Kind(
        hides_internal=hides,
        as0_generation=random.random() < 0.5,
        overwrites_spte=random.random() < 0.5,
        tdp=random.random() < 0.7,
        intel=random.random() < 0.5,
        mmio_caching=random.random() < 0.8,
        address_spaces=1 + (random.random() < 0.6),
        first_pfn=0 if hides else PFN_ERROR,
    )
    if invented == 0:
        return replace(kind, hides_from_l1=True, address_spaces=1)
    if invented == 1:  # by itself, so that nothing else explains what it does
        return replace(kind, keeps_entries=True, address_spaces=1)
    return kind


@dataclass
class Run:
    """One recording of some VMs: what was emitted, and what happened."""

    kind: Kind
    probes: Probes
    truth: Truth
    vms: list[Vm] = field(default_factory=list)
    rows: NDArray[Any] = field(default_factory=lambda: np.zeros(0))

    @property
    def number(self) -> dict[int, int]:
        """The capture's number of each VM that was seen."""
        return self.probes.vms


class Driver:
    """Lets one VM do random things."""

    def __init__(self, run: Run, random: Random, kvm: int) -> None:
        """Make a VM with its memslots and vCPUs; nothing has run yet."""
        self.random, self.run, kind = random, run, run.kind
        age = random.choice(AGES), random.choice(AGES)
        self.vm = Vm(kvm, kind, run.probes, run.truth, age, apicv=random.random() < 0.7)
        run.vms.append(self.vm)
        vm = self.vm
        spaces = range(kind.address_spaces)
        start = [Change(a, None, Slot(0, RAM, 0x40)) for a in spaces]
        start += [Change(a, None, Slot(1, ROM, 4, readonly=True)) for a in spaces]
        start.append(Change(0, None, Slot(2, NORMAL_RAM, 4)))
        if kind.address_spaces > 1:
            start.append(Change(1, None, Slot(3, SMRAM, 4)))
        self.internal = [] if kind.keeps_entries else self._internal_slots()
        if random.random() < 0.7:
            start += self.internal
            self.internal = []
        vm.begin(*start)
        vm.settle()
        for number in range(random.randint(1, 2)):
            Vcpu(vm, number)
        #: Most of what a run does, it does to a few pages.
        self.hot = random.sample(PAGES, 2)
        self.smm = kind.address_spaces > 1 and random.random() < 0.6

    def _internal_slots(self) -> list[Change]:
        slots = [Slot(SLOT_TSS, TSS_GFN, 3), Slot(SLOT_IDENTITY, IDENTITY_GFN, 1),
                 Slot(SLOT_APIC, APIC_GFN, 1)]  # fmt: skip
        chosen = [s for s in slots if self.random.random() < 0.8]
        return [Change(a, None, s) for s in chosen for a in range(self.run.kind.address_spaces)]

    def act(self) -> None:
        """Do something."""
        random, vm = self.random, self.vm
        if random.random() < 0.1:
            vm.race, vm.race_steps = random.randrange(12), random.randint(1, 3)
        acts: tuple[Callable[[Vcpu], None], ...] = (
            self._access, self._nest, self._manage, self._memslot, self._idle, self._step,
            self._odd,
        )  # fmt: skip
        act = random.choices(acts, cum_weights=_ACTS)[0]
        act(random.choice(vm.vcpus))
        vm.race = -1

    def _page(self) -> int:
        return self.random.choice(self.hot if self.random.random() < 0.7 else PAGES)

    def _access(self, vcpu: Vcpu) -> None:
        random = self.random
        how = random.choices(_WAYS, cum_weights=_WAYS_AS_OFTEN)[0]
        fate = Fate(
            stale=random.random() < 0.1,
            device=random.random() < 0.2,
            poisoned=random.random() < 0.03,
            invalidated=random.random() < 0.05,
        )
        gva = vcpu.gva(self._page()) + random.choice((0, 8, 0xFF8))
        vcpu.access(how, gva, random.random() < 0.4, fate)

    def _nest(self, vcpu: Vcpu) -> None:
        if vcpu.smm:
            vcpu.idle()
        elif vcpu.l2:
            vcpu.leave_l2()
        else:
            vcpu.enter_l2(self.random.random() < 0.4)

    def _manage(self, vcpu: Vcpu) -> None:
        if vcpu.smm:
            vcpu.leave_smm()
        elif self.smm:
            vcpu.enter_smm()

    def _idle(self, vcpu: Vcpu) -> None:
        vcpu.idle()

    def _step(self, vcpu: Vcpu) -> None:
        self.vm.step()

    def _memslot(self, vcpu: Vcpu) -> None:
        random, vm = self.random, self.vm
        vm.settle()
        as_id = random.randrange(vm.kind.address_spaces)
        later = next((s for s in vm.slots[as_id] if s.id == 5), None)
        if self.internal and random.random() < 0.3:
            vm.begin(*self.internal)
            self.internal = []
        elif later is None:
            vm.begin(Change(as_id, None, Slot(5, LATER, 2)))
        elif random.random() < 0.3:
            vm.begin(Change(as_id, later, None))
        elif random.random() < 0.3:
            vm.begin(Change(as_id, later, replace(later, base=2 * LATER + 1 - later.base)))
        else:
            vm.begin(Change(as_id, later, replace(later, logged=not later.logged)))
        if random.random() < 0.6:
            vm.settle()

    def _odd(self, vcpu: Vcpu) -> None:
        """What happens rarely."""
        random, vm = self.random, self.vm
        choice = random.randrange(4)
        if choice == 0:
            vcpu.tid += 100  # another thread runs the vCPU
        elif choice == 1 and not vm.kind.tdp:
            # The VMM rewrites a PTE of the guest, which KVM doesn't see.
            gva = vcpu.gva(RAM + 1)
            vcpu.tables[gva >> 12] = RAM + 1, False
            vcpu.access(How.PLAIN, gva, False)
            vcpu.tables[gva >> 12] = HOLE, True
            vcpu.access(How.PLAIN, gva, True)
            del vcpu.tables[gva >> 12]
            vcpu.clear_gva()
            vm.roots.clear()
        elif choice == 2 and len(vm.vcpus) > 1 and random.random() < 0.3:
            vm.vcpus.remove(vcpu)
            vm.trace.vcpu_destroy(vcpu)

    def end(self) -> None:
        """Settle everything, so that nothing waits any more; the VM may go."""
        self.vm.settle()
        for vcpu in self.vm.vcpus:
            vcpu.idle()
        if self.random.random() < 0.3:
            for vcpu in self.vm.vcpus:
                self.vm.trace.vcpu_destroy(vcpu)
            self.vm.trace.vm_destroy(self.vm)


def random_run(random: Random, actions: int = 40, *, whole: bool = False) -> Run:
    """Make a run of about so many actions; `whole`: no exit is missed."""
    skip = 0.0 if whole or random.random() < 0.8 else 0.1
    probes = Probes(
        functions=random.random() < 0.8,
        start=0 if random.random() < 0.6 else random.randrange(8 * actions),
        skip_exits=skip,
        random=random,
    )
    run = Run(random_kind(random), probes, Truth(on=False))
    drivers = [Driver(run, random, kvm + 1) for kvm in range(1 + (random.random() < 0.25))]
    for _ in range(actions):
        random.choice(drivers).act()
    for driver in drivers:
        driver.end()
    run.rows = probes.finish()
    return run
