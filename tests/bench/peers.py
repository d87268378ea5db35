# SPDX-License-Identifier: MIT
"""polars, DuckDB and pandas: how they are had, and the one question of ours they can answer.

Which MMIO accesses are to the page, in the generation, that their vCPU put into its cache last?
`python -m tests.bench.peers NAME FILE` prints how many.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from kvmprobe.errors import KvmprobeError
from kvmprobe.probes.schema import Type
from tests.bench.cost import cost

LOCK = Path(__file__).with_name("peers.lock")
_FILL, _MMIO = int(Type.FILL), int(Type.MMIO)
_COLUMNS = ["vm", "vcpu", "type", "addr", "gen"]


@contextmanager
def installed() -> Iterator[dict[str, str]]:
    """Install the peers for a time: the environment in which they are found.

    Raises:
        KvmprobeError: they can't be had.

    """
    with TemporaryDirectory(prefix="kvmprobe-peers-") as folder:
        pip = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input"]
        options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
        try:
            cost([*pip, "install", *options, "--target", folder, "-r", LOCK], 180)
        except KvmprobeError as error:
            raise KvmprobeError(f"polars and DuckDB can't be installed: {error}") from None
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        yield {"PYTHONPATH": path}


def _polars(path: str) -> int:
    pl = import_module("polars")
    own, fill = ["vm", "vcpu"], pl.col("type") == _FILL
    question = (
        pl.scan_parquet(path)
        .select(_COLUMNS)
        .with_columns(
            pl.when(fill).then(pl.col(name)).forward_fill().over(own).alias(f"cached_{name}")
            for name in ("addr", "gen")
        )
        .filter(
            pl.col("type") == _MMIO,
            pl.col("addr") == pl.col("cached_addr"),
            pl.col("gen") == pl.col("cached_gen"),
        )
        .select(pl.len())
    )
    return int(question.collect(engine="streaming").item())


def _duckdb(path: str) -> int:
    duckdb = import_module("duckdb")
    window = "over (partition by vm, vcpu order by seq rows unbounded preceding)"
    cached = ", ".join(
        f"last_value(case when type = {_FILL} then {name} end ignore nulls) {window} cached_{name}"
        for name in ("addr", "gen")
    )
    ((found,),) = duckdb.sql(
        f"select count(*) from (select type, addr, gen, {cached} from read_parquet('{path}')) "
        f"where type = {_MMIO} and addr = cached_addr and gen = cached_gen"
    ).fetchall()
    return int(found)


def _pandas(path: str) -> int:
    import pandas as pd

    # Signed, for pandas makes floats of unsigned numbers with gaps.
    frame = pd.read_parquet(path, columns=_COLUMNS).astype("i8")
    cached = frame[["addr", "gen"]].where(frame["type"] == _FILL)
    cached = cached.groupby([frame["vm"], frame["vcpu"]], sort=False).ffill()
    believed = (cached["addr"] == frame["addr"]) & (cached["gen"] == frame["gen"])
    return int((believed & (frame["type"] == _MMIO)).sum())


PEERS: dict[str, Callable[[str], int]] = {
    "polars, streaming": _polars,
    "DuckDB": _duckdb,
    "pandas": _pandas,
}


if __name__ == "__main__":
    print(PEERS[sys.argv[1]](sys.argv[2]))
