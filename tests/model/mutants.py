# SPDX-License-Identifier: MIT
"""Mutants of rules and detector, made by machine: does the suite notice each?

    python -m tests.model.mutants --jobs 2 [--only steps.py] [--every 10]

Each mutant is one change of one comparison, boolean operator, bit operator or constant in a
function of `FILES`.  Each runs in a child of its own that sees the changed source in place of the
file, forked from a process that has imported what the suite needs but nothing of the project.
Nothing is compiled but `_COMPILED`.  A line a mutant: killed or SURVIVED.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.machinery
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import CodeType
from typing import cast

ROOT = Path(__file__).parents[2]
#: What mutants are made of.
FILES = (
    *(f"analysis/rules/{p.name}" for p in sorted((ROOT / "analysis/rules").glob("*.py"))
      if p.name != "reference.py"),
    "analysis/steps.py",
    "analysis/detector.py",
    "analysis/candidates.py",
    "analysis/judge.py",
    "analysis/verdict.py",
    "analysis/integrity.py",
    "analysis/sequences.py",
)  # fmt: skip
#: The suite, the quick part first: the second stage runs only for what the first didn't notice.
STAGES = (
    ("tests/model/test_model_tables.py", "tests/unit/test_rules_smm.py",
     "tests/unit/test_rules.py"),
    ("tests/model/test_model_runs.py", "tests/model/test_model_gaps.py",
     "tests/unit/test_verdict.py", "tests/unit/test_rules_golden.py",
     "tests/unit/test_verdict_vms.py", "tests/unit/test_detector.py"),
)  # fmt: skip
#: What is tried first on a file's mutants: its own tests.
_OWN = {
    "analysis/candidates.py": ("tests/unit/test_detector_candidates.py",),
    "analysis/integrity.py": ("tests/unit/test_detector_integrity.py",),
    "analysis/judge.py": ("tests/unit/test_verdict_vms.py",),
    "analysis/sequences.py": ("tests/unit/test_detector_sequences.py",),
    "analysis/verdict.py": ("tests/unit/test_verdict.py", "tests/unit/test_verdict_vms.py"),
}
#: Compiled code by its nature: its tests compile it.
_COMPILED = ("analysis/sequences.py",)
#: What children find imported.
_PRELOAD = ("pytest", "numpy", "hypothesis", "hypothesis.extra.numpy")
#: Where the suite runs; so many random runs of the model must a mutant survive.
ENVIRONMENT = {
    "KVMPROBE_NO_JIT": "1", "KVMPROBE_MODEL_RUNS": "120", "KVMPROBE_MODEL_MUTANTS": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip
TIME_LIMIT = 300  #: seconds; a mutant that hangs is noticed

_COMPARE: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,),
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
}  # fmt: skip
_BITS: dict[type[ast.operator], type[ast.operator]] = {
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.Add: ast.Sub, ast.Sub: ast.Add,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One changed file."""

    file: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        """Name it: file, line, and what was changed."""
        return f"{self.file}:{self.line}: {self.before}  ->  {self.after}"


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """Make every changed form of one node."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in _COMPARE[type(op)]:
                changed = copy.deepcopy(node)
                changed.ops[i] = other()
                yield changed
    elif isinstance(node, ast.BoolOp):
        changed_bool = copy.deepcopy(node)
        changed_bool.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield changed_bool
        for i in range(len(node.values)):
            left = [copy.deepcopy(v) for n, v in enumerate(node.values) if n != i]
            yield left[0] if len(left) == 1 else ast.BoolOp(node.op, left)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield copy.deepcopy(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _BITS:
        changed_bits = copy.deepcopy(node)
        changed_bits.op = _BITS[type(node.op)]()
        yield changed_bits
    elif isinstance(node, ast.AugAssign) and type(node.op) in _BITS:
        changed_augmented = copy.deepcopy(node)
        changed_augmented.op = _BITS[type(node.op)]()
        yield changed_augmented
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)


class _Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, changed: ast.AST) -> None:
        self.target, self.changed = target, changed

    def visit(self, node: ast.AST) -> ast.AST:
        return self.changed if node is self.target else self.generic_visit(node)


def _in_functions(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node of a function's body, annotations and defaults left out, each once."""
    seen: set[int] = set()
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for statement in function.body:
                for node in ast.walk(statement):
                    if id(node) not in seen:
                        seen.add(id(node))
                        yield node


def mutants(file: str, text: str, every: int = 1) -> Iterator[Mutant]:
    """Make the mutants of one file, or each N-th of them."""
    tree = ast.parse(text)
    changes = ((node, changed) for node in _in_functions(tree) for changed in _changes(node))
    for node, changed in islice(changes, 0, None, every):
        new = _Replace(node, changed).visit(copy.copy(_parse_again(tree, node)))
        line = getattr(node, "lineno", 0)
        yield Mutant(file, line, ast.unparse(node), ast.unparse(changed), ast.unparse(new))


def _parse_again(tree: ast.Module, node: ast.AST) -> ast.Module:
    """Copy the tree along the way to `node`, which itself stays the same object."""
    memo = {id(node): node}
    return copy.deepcopy(tree, memo)


class _Mutated(importlib.machinery.SourceFileLoader):
    """Loads the mutant's source for its file, and every other file as it is."""

    mutant: Mutant

    def get_code(self, fullname: str) -> CodeType | None:
        """Compile the mutant for its file, past any compiled file that is kept."""
        path = self.get_filename(fullname)
        if Path(path).resolve() == ROOT / self.mutant.file:
            return self.source_to_code(self.mutant.source, path)
        return cast(CodeType, super().get_code(fullname))


def _suite(mutant: Mutant | None, stage: tuple[str, ...], said: str) -> None:
    """Run a stage of the suite on a mutant; for a child of its own, which it ends."""
    import pytest

    with Path(said).open("w", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    if mutant:
        if mutant.file in _COMPILED:
            # A shared place is refused, so nothing is kept: numba would take one for another.
            os.environ |= {"KVMPROBE_NO_JIT": "0", "CACHE_DIRECTORY": tempfile.gettempdir()}
        _Mutated.mutant = mutant
        machinery = importlib.machinery
        extensions = machinery.ExtensionFileLoader, machinery.EXTENSION_SUFFIXES
        found = machinery.FileFinder.path_hook(extensions, (_Mutated, [".py"]))
        sys.path_hooks.insert(0, found)
        sys.path_importer_cache.clear()
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", *stage]))


def noticed(mutant: Mutant | None) -> str | None:
    """Run the suite on a mutant; return what noticed it, or None."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", prefix="kvmprobe-mutant-") as said:
        own = _OWN.get(mutant.file) if mutant else None
        for stage in (own, *STAGES) if own else STAGES:
            child = context.Process(target=_suite, args=(mutant, stage, said.name))
            child.start()
            child.join(TIME_LIMIT)
            if child.is_alive():
                child.kill()
                child.join()
                return "it hangs"
            if child.exitcode:
                said.seek(0)
                told = [ln for ln in said if ln.startswith(("FAILED", "ERROR"))]
                return told[0].strip() if told else f"pytest ended with {child.exitcode}"
    return None


def run_all(wanted: list[Mutant], jobs: int) -> list[Mutant]:
    """Try mutants, print a line each, and return the survivors."""
    survivors = []
    with ThreadPoolExecutor(jobs) as pool:
        for mutant, by in zip(wanted, pool.map(noticed, wanted), strict=True):
            print(f"{'killed' if by else 'SURVIVED'}  {mutant}  {by or ''}", flush=True)
            if by is None:
                survivors.append(mutant)
    return survivors


def main() -> int:
    """Make and try mutants; 1 if any survived."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--every", type=int, default=1, help="only each N-th of a file")
    parser.add_argument("--list", action="store_true", help="list the mutants, try none")
    args = parser.parse_args()
    wanted = [
        mutant
        for file in FILES
        if args.only in file
        for mutant in mutants(file, (ROOT / file).read_text(encoding="utf-8"), args.every)
    ]
    if args.list:
        print(*wanted, sep="\n")
        return 0
    # Set before the server starts: its children inherit it.
    os.environ |= ENVIRONMENT
    survivors = run_all(wanted, args.jobs)
    print(f"{len(wanted)} mutants, {len(survivors)} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
