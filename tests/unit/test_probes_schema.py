# SPDX-License-Identifier: MIT
"""events.h as a C compiler sees it, against what schema.py read from its text."""

import ctypes
import enum
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kvmprobe.probes import schema

TYPES = "".join(
    f"typedef unsigned {base} u{bits};\ntypedef signed {base} s{bits};\n"
    for bits, base in ((8, "char"), (16, "short"), (32, "int"), (64, "long long"))
)
PREFIXES = {
    "kvmprobe_type": "KVMPROBE_",
    "kvmprobe_site": "KVMPROBE_AT_",
    "kvmprobe_flag": "KVMPROBE_F_",
    "kvmprobe_fault_result": "KVMPROBE_FAULT_",
    "kvmprobe_faultin_result": "KVMPROBE_FAULTIN_",
    "kvmprobe_mmio_type": "KVMPROBE_MMIO_",
    "kvmprobe_spte_change": "KVMPROBE_SPTE_",
    "kvmprobe_memslot_change": "KVMPROBE_MEMSLOT_",
    "kvmprobe_lifecycle_change": "KVMPROBE_",
    "kvmprobe_loss_cause": "KVMPROBE_LOST_",
}
CLASSES: dict[str, type[enum.IntEnum] | type[enum.IntFlag]] = {
    "kvmprobe_type": schema.Type,
    "kvmprobe_site": schema.Site,
    "kvmprobe_flag": schema.Flag,
    "kvmprobe_fault_result": schema.FaultResult,
    "kvmprobe_faultin_result": schema.FaultinResult,
    "kvmprobe_mmio_type": schema.MmioType,
    "kvmprobe_spte_change": schema.SpteChange,
    "kvmprobe_memslot_change": schema.MemslotChange,
    "kvmprobe_lifecycle_change": schema.LifecycleChange,
    "kvmprobe_loss_cause": schema.LossCause,
}
DEFINES = {
    "KVMPROBE_SCHEMA_MAJOR": schema.SCHEMA_MAJOR,
    "KVMPROBE_SCHEMA_MINOR": schema.SCHEMA_MINOR,
    "KVMPROBE_SLOT_TSS": schema.SLOT_TSS,
    "KVMPROBE_SLOT_APIC": schema.SLOT_APIC,
    "KVMPROBE_SLOT_IDENTITY": schema.SLOT_IDENTITY,
}


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("no C compiler: apt install gcc")
    return found


@pytest.fixture(scope="module")
def compiled(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a program that includes events.h says of it."""
    directory = tmp_path_factory.mktemp("events")
    constants = [
        PREFIXES[name] + member.name for name, members in schema.ENUMS.items() for member in members
    ]
    lines = [f'printf("%s \\"{n}\\": %lld", s, (long long){n}); s = ",";' for n in constants]
    lines += [f'printf("%s \\"{n}\\": %lld", s, (long long){n});' for n in DEFINES]
    event = "struct kvmprobe_event"
    fields = [
        f'printf(", \\".{f.name}\\": [%zu, %zu, %d]", offsetof({event}, {f.name}), '
        f"sizeof((({event} *)0)->{f.name}), (typeof((({event} *)0)->{f.name}))-1 < 0);"
        for f in schema.FIELDS
    ]
    source = (
        f"#include <stddef.h>\n#include <stdio.h>\n{TYPES}"
        f'#include "{schema.HEADER}"\n'
        'int main(void) { const char *s = "{";\n'
        + "\n".join([*lines, *fields])
        + f'printf(", \\"size\\": %zu}}\\n", sizeof({event})); return 0; }}\n'
    )
    program = directory / "events"
    subprocess.run(
        [compiler, "-Wall", "-Werror", "-x", "c", "-", "-o", str(program)],
        input=source,
        text=True,
        check=True,
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_an_event_is_56_bytes_without_padding(compiled: dict[str, Any]) -> None:
    assert compiled["size"] == schema.EVENT.itemsize == 56
    assert sum(schema.EVENT[f.name].itemsize for f in schema.FIELDS) == 56


def test_every_field_lies_where_the_dtype_says(compiled: dict[str, Any]) -> None:
    for field in schema.FIELDS:
        dtype, offset = schema.EVENT.fields[field.name][:2]  # type: ignore[index]
        signed = int(dtype.kind == "i")
        assert compiled[f".{field.name}"] == [offset, dtype.itemsize, signed], field.name
        assert dtype.byteorder in "<|="


def test_every_constant_has_the_compilers_value(compiled: dict[str, Any]) -> None:
    for name, members in schema.ENUMS.items():
        for member in members:
            assert compiled[PREFIXES[name] + member.name] == member.value
    for name, value in DEFINES.items():
        assert compiled[name] == value


def test_schema_knows_every_enumerator_of_the_header(compiler: str) -> None:
    """The preprocessed header is read by other means than schema.py's: no member is missed."""
    text = subprocess.run(
        [compiler, "-E", "-P", str(schema.HEADER)], capture_output=True, text=True, check=True
    ).stdout
    seen: dict[str, list[str]] = {}
    for part in text.split("enum ")[1:]:
        name, _, rest = part.partition("{")
        body = rest.partition("}")[0]
        seen[name.strip()] = [m.partition("=")[0].strip() for m in body.split(",") if m.strip()]
    assert seen == {
        name: [PREFIXES[name] + m.name for m in members] for name, members in schema.ENUMS.items()
    }


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_python_enums_are_the_headers(name: str) -> None:
    members = {m.name: m.value for m in schema.ENUMS[name]}
    assert {m.name: m.value for m in CLASSES[name]} == members
    assert len(set(members.values())) == len(members)


def test_every_enum_has_its_class() -> None:
    assert set(CLASSES) == set(PREFIXES) == set(schema.ENUMS)


def test_arrow_schema_has_the_same_columns() -> None:
    arrow = schema.arrow_schema()
    assert arrow.names == [f.name for f in schema.FIELDS]
    for column in arrow:
        assert column.type == pa.from_numpy_dtype(schema.EVENT[column.name])
        assert not column.nullable


def test_rows_and_columns_are_inverse() -> None:
    raw = np.random.default_rng(1).integers(0, 256, 56 * 100, "u1")
    rows = raw.view(schema.EVENT)
    columns = schema.columns(rows)
    assert all(column.flags.c_contiguous for column in columns.values())
    assert schema.rows(columns).tobytes() == raw.tobytes()


def test_a_c_struct_of_an_event_has_the_same_bytes() -> None:
    kinds = {"u1": ctypes.c_uint8, "u2": ctypes.c_uint16, "i2": ctypes.c_int16}
    kinds |= {"u4": ctypes.c_uint32, "u8": ctypes.c_uint64}

    class Event(ctypes.Structure):
        _fields_ = tuple((f.name, kinds[f.dtype.lstrip("<")]) for f in schema.FIELDS)

    values = {f.name: i + 1 for i, f in enumerate(schema.FIELDS)}
    row = np.zeros(1, schema.EVENT)
    for name, value in values.items():
        row[name] = value
    assert bytes(Event(**values)) == row.tobytes()


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("\tu64 ts; ", "\tlong ts; "),
        ("\tu8 type; ", "\tu8 type, sort; "),
        ("KVMPROBE_FILL = 3, ", "KVMPROBE_FILL, "),
        ("struct kvmprobe_event {", "struct event {"),
        ("enum kvmprobe_site {", "enum site {"),
        (f"#define KVMPROBE_SCHEMA_MINOR {schema.SCHEMA_MINOR}", ""),
    ],
)
def test_a_header_that_is_not_understood_is_refused(tmp_path: Path, good: str, bad: str) -> None:
    """At import, before anything is recorded with a wrong schema."""
    text = schema.HEADER.read_text()
    assert good in text
    (tmp_path / "events.h").write_text(text.replace(good, bad))
    (tmp_path / "schema.py").write_text(Path(schema.__file__).read_text())
    done = subprocess.run(
        [sys.executable, "-c", "import schema"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "events.h" in done.stderr
