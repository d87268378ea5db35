# SPDX-License-Identifier: MIT
"""A real module's split BTF, damaged: answers or BtfError, nothing else."""

import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmprobe.errors import BtfError
from kvmprobe.host.btf import Btf, Member, Prototype

DATA = Path(__file__).parents[1] / "data" / "btf"


@pytest.fixture(scope="module")
def split() -> tuple[Btf, bytes]:
    directory = DATA / "6.1"
    base, data = (
        lzma.decompress((directory / f"{name}.xz").read_bytes())
        for name in ("vmlinux", "kvm_intel")
    )
    return Btf.parse(base, None, "vmlinux"), data


@given(
    cut=st.one_of(st.none(), st.integers(0, 49_000)),
    changes=st.lists(st.tuples(st.integers(0, 49_000), st.integers(0, 255)), max_size=8),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_split_btf_gives_answers_or_errors(
    split: tuple[Btf, bytes], cut: int | None, changes: list[tuple[int, int]]
) -> None:
    base, whole = split
    data = bytearray(whole if cut is None else whole[:cut])
    for at, value in changes:
        if at < len(data):
            data[at] = value
    btf = _answer(lambda: Btf.parse(bytes(data), base, "kvm_intel"))
    if not isinstance(btf, Btf):
        assert "(byte " in str(btf)
        return
    for answer, expected in (
        (_answer(lambda: btf.member("vcpu_vmx", "vcpu.arch.mmio_gfn")), Member),
        (_answer(lambda: btf.size("kvm_vmx")), int),
        (_answer(lambda: btf.enumerators("VMX")), dict),
        (_answer(lambda: btf.function("handle_ept_violation")), Prototype | None),
        (_answer(lambda: btf.function("vmx_set_tss_addr")), Prototype | None),
        (_answer(lambda: btf.tracepoint("kvm_entry")), Prototype | None),
    ):
        assert isinstance(answer, expected | BtfError)


def _answer(ask: Callable[[], object]) -> object:
    try:
        return ask()
    except BtfError as error:
        return error
