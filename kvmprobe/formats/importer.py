# SPDX-License-Identifier: MIT
"""From files of other tools to a capture: the one call behind `kvmprobe import`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kvmprobe.errors import CaptureError
from kvmprobe.formats import lines
from kvmprobe.formats.compiled import Loops, LoopTranslator, TextLoop, loops_for
from kvmprobe.formats.detect import Source, open_trace
from kvmprobe.formats.ftrace import ANY_CPU, TextReader
from kvmprobe.formats.perfdata import PerfDataReader, UnsupportedError
from kvmprobe.formats.perfscript import perf_script
from kvmprobe.formats.plan import plan_of
from kvmprobe.formats.records import Block, Tally
from kvmprobe.formats.slots import Slot
from kvmprobe.formats.tracedat import TraceDatReader
from kvmprobe.formats.translate import Translator
from kvmprobe.probes.schema import EVENT, NO_VCPU, LossCause, Site, Type
from kvmprobe.store.files import write_error
from kvmprobe.store.format import MAX_ROWS, new_header
from kvmprobe.store.writer import CaptureWriter


@dataclass
class Imported:
    """What an import did: files by kind, what the readers met, events written.

    `ended` says why a file gave less than it should, with `salvage`; `doubts` what would be a fault
    if a presumed slot were known to be there.
    """

    tally: Tally = field(default_factory=Tally)
    kinds: list[str] = field(default_factory=list)
    events: int = 0
    ended: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def blocks(
    source: Source, tally: Tally, *, salvage: bool = False, loops: Loops | None = None
) -> Iterator[Block]:
    """Read a trace of any kind; with `loops` by compiled code.

    Raises:
        CaptureError: it is damaged; without `salvage` also when it only ends early.

    """
    parse = lines.parse if loops is None else TextLoop(loops)
    if source.kind == "trace.dat":
        reader = TraceDatReader(source.file, tally, salvage=salvage, loops=loops)
        yield from reader
        if reader.ended is not None:
            raise reader.ended
    elif source.kind == "perf.data":
        try:
            perf = PerfDataReader(source.file, tally, salvage=salvage, loops=loops)
            yield from perf
        except UnsupportedError as error:
            if tally.read:
                raise CaptureError(f"{error} in the middle of the file: use perf script") from error
            with perf_script(source.file, str(error)) as text:
                yield from TextReader(text, tally, parse)
            return
        if perf.ended is not None:
            raise perf.ended
    else:
        yield from TextReader(source.stream, tally, parse)


def import_traces(
    paths: Sequence[Path],
    output: Path,
    *,
    slots: tuple[Slot, ...] = (),
    strict: bool = False,
    salvage: bool = False,
    force: bool = False,
) -> Imported:
    """Turn traces, parts of one recording in order, into one capture.

    Args:
        paths: the files.
        output: the capture to write; it is there whole or not at all.
        slots: KVM's own slots as the user states them.
        strict: fail on lines or records that are not understood.
        salvage: keep what stands before damage, instead of failing.
        force: replace `output`.

    Raises:
        CaptureError: a file is damaged or no trace; nothing was read; `strict`.

    """
    done = Imported()
    loops = loops_for(_size(paths))
    translator = Translator(slots) if loops is None else LoopTranslator(slots, loops)
    with ExitStack() as opened:
        spool = _Spool(output)
        opened.callback(spool.close)
        for path in paths:
            source = open_trace(path)
            opened.callback(source.file.close)
            done.kinds.append(source.kind)
            try:
                for block in blocks(source, done.tally, salvage=salvage, loops=loops):
                    spool.write(translator.feed(block))
            except CaptureError as error:
                if spool.failed:
                    raise
                if not salvage:
                    raise CaptureError(f"{path}: {error}") from error
                done.ended.append(f"{path}: {error}")
            spool.write(translator.finish())
        done.events = spool.events
        _check(done, strict)
        spool.write(_losses(done.tally, translator))
        done.doubts = _doubts(translator)
        _write(spool, output, _header(done, paths, slots), force)
    return done


def _size(paths: Sequence[Path]) -> int:
    """How many bytes the files have; a file that can't be read is told of later."""
    size = 0
    for path in paths:
        with suppress(OSError):
            size += path.stat().st_size
    return size


class _Spool:
    """Events set aside: the capture's header, its first bytes, is known at the end only."""

    def __init__(self, output: Path) -> None:
        """Make a file without a name where the capture will be; raises CaptureError."""
        self._output = output
        self.events = 0
        self.failed = False
        with self._told():
            self._file: BinaryIO = tempfile.TemporaryFile(dir=output.parent)  # noqa: SIM115

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = True
            raise write_error(self._output, error) from error

    def write(self, events: NDArray[Any]) -> None:
        """Set events aside; raises CaptureError."""
        with self._told():
            self._file.write(events.data if len(events) else b"")
        self.events += len(events)

    def read(self) -> Iterator[NDArray[Any]]:
        """Give all events, from the first; raises CaptureError."""
        with self._told():
            self._file.seek(0)
        while data := self._file.read(MAX_ROWS * EVENT.itemsize):
            yield np.frombuffer(data, EVENT)

    def close(self) -> None:
        """Drop what was set aside; it may not even fit the disk."""
        with suppress(OSError):
            self._file.close()


def _check(done: Imported, strict: bool) -> None:
    tally = done.tally
    shown = "".join(f"; for example: {sample}" for sample in tally.samples[:1])
    if strict and tally.unknown:
        raise CaptureError(f"{tally.unknown} lines or records not understood (--strict){shown}")
    if not tally.read and not done.ended:
        raise CaptureError(f"no event in it: not a trace, or an empty one{shown}")
    if done.ended and not done.events:
        raise CaptureError(f"nothing to salvage: {done.ended[0]}")


def _losses(tally: Tally, translator: Translator) -> NDArray[Any]:
    """Losses for what was recorded and can't be judged: silence about it means nothing.

    That is events of ours that could not be read, events of threads whose vCPU no event says, and
    events at a well-known address of KVM's slots of which the trace doesn't show whether there is a
    slot.
    """
    counts: dict[int, int] = {0: tally.garbled}
    unused = translator.doubtful + translator.unplaced
    counts.update((int(kind), count) for kind, count in unused.items())
    lost = [(kind, count) for kind, count in counts.items() if count]
    events = np.zeros(len(lost), EVENT)
    events["vcpu"], events["type"], events["site"] = NO_VCPU, Type.LOSS, Site.DRAIN
    events["aux"], events["len"] = ANY_CPU, LossCause.READ
    for event, (kind, count) in zip(events, lost, strict=True):
        event["kind"], event["addr"] = kind, count
    return events


def _doubts(translator: Translator) -> list[str]:
    """Say what rests on nothing but a well-known address, or that nothing could be told."""
    threads, kept = ("some threads run", "theirs are not") if translator.vcpus else (
        "a thread runs", "nothing is"
    )  # fmt: skip
    unknown = (
        f"no event says which vCPU {threads}, so {kept} kept, and what would tell something counts "
        "as lost: record kvm_entry, kvm_exit or kvm_page_fault too"
    )
    return ([unknown] if translator.unplaced or not translator.vcpus else []) + [
        f"accesses at {page << 12:#x}, a well-known address of KVM's own memory, look like the "
        "fault, but the trace shows no memory there: with unrestricted guest it is a hole; where "
        "KVM has a slot there, state it with --internal-slot"
        for page in sorted(translator.doubtful_pages)
    ]


def _header(done: Imported, paths: Sequence[Path], slots: tuple[Slot, ...]) -> dict[str, Any]:
    header = new_header("converted")
    kinds = ", ".join(dict.fromkeys(done.kinds))
    known = (
        "KVM's own memslots as stated: "
        + ", ".join(f"{slot.id} at {slot.base:#x}, {slot.pages} pages" for slot in slots)
        if slots
        else "KVM's own memslots presumed at their well-known addresses"
    )
    note = f"converted from {kinds}; memslots are not in such a trace: {known}"
    header["source"]["note"] = "; ".join([note, *done.ended, *done.doubts])
    header["host"]["kernel"] = done.tally.kernel
    header["plan"] = plan_of(done.tally)
    header["command"] = ["kvmprobe", "import", *(path.name for path in paths)]
    return header


def _write(spool: _Spool, output: Path, header: dict[str, Any], force: bool) -> None:
    batches = spool.read()
    first = next(batches, np.empty(0, EVENT))
    if len(first):
        header["clock"]["monotonic_ns"] = min(int(first["ts"][0]), (1 << 63) - 1)
    with CaptureWriter(output, header, force=force, whole=True) as writer:
        for events in chain([first], batches):
            writer.write(events)
