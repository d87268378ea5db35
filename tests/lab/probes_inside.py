# SPDX-License-Identifier: MIT
"""Runs inside the lab's VM: what the function probes do when exits are missed, and what they leave.

probes_inside.py missed CAPTURE        record with one kretprobe instance, which vCPU 0 holds
probes_inside.py blocked               the load for it: vCPU 0 waits in a fault, vCPU 1 faults
probes_inside.py second-tool           another BPF tool on the same functions, until /tmp/over
probes_inside.py again TIMES BACKEND   attach and detach again and again; what is left
"""

import ctypes
import fcntl
import json
import os
import re
import select
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kvmprobe.capture.session import Filters, Session
from kvmprobe.cli.main import main as kvmprobe_main
from kvmprobe.guests.vmm import PAGE, Halt, Machine, Mmio, Slot, Vcpu
from kvmprobe.host.bccload import load_bcc
from kvmprobe.host.headers import header_directory

TRACEFS = Path("/sys/kernel/tracing")
KPROBES = Path("/sys/kernel/debug/kprobes/list")
CODE, OTHER_CODE, WAITING, HOLE = 0x1000, 0x1100, 0xA000, 0xF000
ACCESSES = 200

_SYS_USERFAULTFD, _SYS_BPF = 323, 321
_UFFD_API, _UFFD_REGISTER, _UFFD_ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04
_PROG_GET_NEXT_ID = 11


def missed(capture: str) -> int:
    """Record the load `blocked` with kretprobes that can follow one call at a time."""
    bcc = load_bcc().module
    attach = bcc.BPF.attach_kretprobe

    def attach_one(self: object, event: bytes, fn_name: bytes) -> None:
        attach(self, event=event, fn_name=fn_name, maxactive=1)

    bcc.BPF.attach_kretprobe = attach_one
    load = [sys.executable, str(Path(__file__).resolve()), "blocked"]
    sys.argv = ["kvmprobe", "record", "--backend", "kprobe", "-o", capture, "--", *load]
    kvmprobe_main()
    return 0


class _Waiting:
    """Memory whose first touch waits until `give` is called (userfaultfd)."""

    def __init__(self, slot: Slot) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(self._fd, _UFFD_API, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(slot.memory))
        register = struct.pack("QQQQ", self._start, PAGE, 1, 0)
        fcntl.ioctl(self._fd, _UFFD_REGISTER, bytearray(register))

    def wait(self) -> None:
        """Return when somebody waits for the memory."""
        if not select.select([self._fd], [], [], 60)[0]:
            raise TimeoutError("vCPU 0 doesn't fault")

    def give(self) -> None:
        """Let it go on, with zeros."""
        zero = struct.pack("QQQq", self._start, PAGE, 0, 0)
        fcntl.ioctl(self._fd, _UFFD_ZEROPAGE, bytearray(zero))


def _add_kprobe(line: str) -> None:
    """Add a line to kprobe_events, which can't be sought in as Python's append mode does."""
    fd = os.open(TRACEFS / "kprobe_events", os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, line.encode() + b"\n")
    finally:
        os.close(fd)


def blocked() -> int:
    """Let vCPU 1 fault ACCESSES times while vCPU 0 is inside one fault; count calls with ftrace."""
    _add_kprobe("p:lab/fault kvm_mmu_page_fault")
    enable = TRACEFS / "events/lab/fault/enable"
    enable.write_text("1")
    with Machine() as machine:
        machine.set_tss_addr()
        machine.set_identity_map_addr()
        memory = machine.add_slot(0, CODE, PAGE).memory
        waiting = _Waiting(machine.add_slot(1, WAITING, PAGE))
        memory[0:4] = b"\xa1" + struct.pack("<H", WAITING) + b"\xf4"  # mov ax, [WAITING]; hlt
        code = b"\xb9" + struct.pack("<H", ACCESSES)  # mov cx, ACCESSES
        code += b"\xa2" + struct.pack("<H", HOLE) + b"\xe2\xfb\xf4"  # mov [HOLE], al; loop; hlt
        memory[0x100 : 0x100 + len(code)] = code
        first, second = machine.add_vcpu(0), machine.add_vcpu(1)
        first.start_at(CODE)
        second.start_at(OTHER_CODE)
        thread = threading.Thread(target=_run_to_halt, args=(first,))
        thread.start()
        waiting.wait()
        writes = _run_to_halt(second)
        waiting.give()
        thread.join()
    enable.write_text("0")
    profile = (TRACEFS / "kprobe_profile").read_text()
    calls = int(re.search(r"^\s+fault\s+(\d+)", profile, re.M)[1])  # type: ignore[index]
    _add_kprobe("-:lab/fault")
    Path("blocked.json").write_text(json.dumps({"calls": calls, "writes": writes}))
    print(f"blocked: {writes} MMIO writes of vCPU 1, {calls} calls of kvm_mmu_page_fault")
    return 0


def _run_to_halt(vcpu: Vcpu) -> int:
    writes = 0
    while not isinstance(seen := vcpu.step(), Halt):
        writes += isinstance(seen, Mmio)
    return writes


_TOOL = """
BPF_HASH(calls, u64, u64, 65536);
int entry(struct pt_regs *ctx)
{
	u64 key = bpf_ktime_get_ns(), value = 1;

	calls.update(&key, &value);
	return 0;
}
"""


def second_tool() -> int:
    """Probe the functions kvmprobe probes, and read a big map all the time on every CPU.

    While a process reads a map the kernel skips BPF programs of kprobes on its CPU.  It reads
    from /tmp/go on, so that kvmprobe's own start has the processors to itself.
    """
    bcc = load_bcc().module
    with header_directory() as headers:
        os.environ["BCC_KERNEL_SOURCE"] = str(headers)
        tool = bcc.BPF(text=_TOOL.encode())
    for function in ("kvm_mmu_page_fault", "kvm_faultin_pfn"):
        tool.attach_kprobe(event=function.encode(), fn_name=b"entry")
        tool.attach_kretprobe(event=function.encode(), fn_name=b"entry")
    table = tool["calls"]
    for key in range(60000):
        table[ctypes.c_uint64(key)] = ctypes.c_uint64(0)
    for cpu in range((os.cpu_count() or 1) - 1):
        if os.fork() == 0:
            os.sched_setaffinity(0, {cpu + 1})
            break
    else:
        os.sched_setaffinity(0, {0})
    Path("/tmp/second-tool").touch()
    while not Path("/tmp/go").exists():
        time.sleep(0.2)
    while not Path("/tmp/over").exists():
        for _ in table.items_lookup_batch():
            pass
    return 0


def _programs() -> int:
    """Return how many BPF programs are loaded on this machine."""
    libc = ctypes.CDLL(None, use_errno=True)
    attr = ctypes.create_string_buffer(128)
    count = number = 0
    while True:
        struct.pack_into("<II", attr, 0, number, 0)
        if libc.syscall(_SYS_BPF, _PROG_GET_NEXT_ID, attr, 128):
            return count
        (number,) = struct.unpack_from("<I", attr, 4)
        count += 1


def _lines(path: Path) -> int:
    """Return how many lines a file of the kernel has; 0 where the kernel has no kprobes."""
    return len(path.read_text().splitlines()) if path.exists() else 0


def _state() -> dict[str, int]:
    """Return what a tracing program may leave behind, or let grow, as numbers."""
    status = Path("/proc/self/status").read_text()
    return {
        "kprobe_events": _lines(TRACEFS / "kprobe_events"),
        "kprobes": _lines(KPROBES),
        "programs": _programs(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "rss_kib": int(re.search(r"^VmRSS:\s+(\d+)", status, re.M)[1]),  # type: ignore[index]
    }


def again(times: int, backend: str) -> int:
    """Attach and detach one session's programs `times` times, then close; print all states."""
    states: dict[str, Any] = {"start": _state()}
    with Session(Filters(), backend=backend) as session:
        session.prepare()
        program, prefix = session._need(), session._fentry_prefix
        methods = sorted({str(a.method) for a in session.plan.active()})
        for turn in range(times):
            program.attach(session.plan, prefix)
            if turn == 0:
                states["attached"] = _state()
            program.detach()
            if turn in (0, 9, times - 1):
                states[f"detached {turn + 1}"] = _state()
    # The kernel frees programs a moment after their last descriptor.
    deadline = time.monotonic() + 10
    while _programs() > states["start"]["programs"] and time.monotonic() < deadline:
        time.sleep(0.1)
    states["closed"] = _state()
    Path(f"again-{backend}.json").write_text(json.dumps(states | {"methods": methods}))
    print("methods", *methods)
    for name, state in states.items():
        print(name, *(f"{key}={value}" for key, value in state.items()))
    return 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["missed", capture]:
            sys.exit(missed(capture))
        case ["blocked"]:
            sys.exit(blocked())
        case ["second-tool"]:
            sys.exit(second_tool())
        case ["again", times, backend]:
            sys.exit(again(int(times), backend))
        case _:
            sys.exit(__doc__)
