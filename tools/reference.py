# SPDX-License-Identifier: MIT
"""Write the manual's reference pages from the code: python tools/reference.py, from the checkout.

One page a command, which is also its man page, and one each for the metrics, the JSON documents and
the configuration of the watch.  tests/docs holds the pages against the code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/reference"
HEAD = (
    "<!-- SPDX-License-Identifier: MIT -->",
    "<!-- made by tools/reference.py from the code: do not edit -->",
)

#: What to try first with a command: lines behind a prompt, each with what it does.
EXAMPLES = {
    "record": (
        ("sudo kvmprobe record -d 30 -o host.kvmprobe", "All VMs of this host, for 30 seconds."),
        ("sudo kvmprobe record --vm build-7", "One VM, by its name, until Ctrl-C."),
        ("sudo kvmprobe record -- virsh start build-7", "While a command runs."),
        ("sudo kvmprobe record --dry-run", "Which probes would be attached, and why."),
    ),
    "analyze": (
        ("kvmprobe analyze host.kvmprobe", "Findings and a verdict."),
        ("kvmprobe analyze --json host.kvmprobe", "The same for a program."),
        ("kvmprobe analyze --fail-on warning host.kvmprobe", "The answer as the exit status."),
    ),
    "report": (("kvmprobe report host.kvmprobe -o host.html", "One page to look at and to send."),),
    "info": (("kvmprobe info host.kvmprobe", "What is in a capture, and what it lost."),),
    "stat": (
        ("sudo kvmprobe stat -d 10", "Counts and times of this host, for 10 seconds."),
        ("sudo kvmprobe stat --interval 1", "A line a second, until Ctrl-C."),
        ("kvmprobe stat host.kvmprobe", "Counts of a capture; needs no root."),
    ),
    "export": (
        ("kvmprobe export host.kvmprobe -o host.perfetto", "For the Perfetto viewer."),
        ("kvmprobe export host.kvmprobe -o host.parquet", "For pandas."),
        ("kvmprobe export --anonymize host.kvmprobe --to capture -o public.kvmprobe", "To share."),
    ),
    "compact": (
        ("kvmprobe compact host.kvmprobe", "host.parquet, which takes less room."),
        ("kvmprobe compact -d archive monday.kvmprobe tuesday.kvmprobe", "Several, elsewhere."),
    ),
    "rules": (
        ("kvmprobe rules", "All rules."),
        ("kvmprobe rules internal-slot-hit", "One rule: what it proves, and what to do."),
    ),
    "doctor": (("sudo kvmprobe doctor", "What this host is and what can be observed."),),
    "verify": (("sudo kvmprobe verify", "Does this host's KVM have the faults?"),),
    "check": (
        ("sudo kvmprobe check", "One line and a status, as monitoring plugins answer."),
        ("sudo kvmprobe check --textfile /var/lib/node-exporter/kvmprobe.prom", "Also as metrics."),
    ),
    "watch": (
        ("sudo kvmprobe watch", "The service, in the foreground."),
        ("kvmprobe watch --check-config -c watch.toml", "Is this configuration good?"),
    ),
    "ack": (
        ("sudo kvmprobe ack", "Findings that nobody has taken note of."),
        ('sudo kvmprobe ack ID --reason "TICKET-1234"', "End the alarm of one."),
    ),
    "fleet analyze": (
        ("kvmprobe fleet analyze captures -o result", "All hosts below a folder, on this machine."),
        (
            "kvmprobe fleet analyze s3://bucket/captures --scheduler tcp://cluster:8786 -o result",
            "From an object store, on a cluster.",
        ),
    ),
    "fleet report": (
        ("kvmprobe fleet report result -o fleet.html", "One page of all hosts, to send."),
    ),
    "fleet simulate": (
        (
            "kvmprobe fleet simulate try --hosts 1000 --events 100000000",
            "A fleet to try a cluster with.",
        ),
    ),
    "import": (
        ("kvmprobe import kvm.txt -o kvm.kvmprobe", "Text of ftrace."),
        ("kvmprobe import trace.dat -o kvm.kvmprobe", "A file of trace-cmd."),
    ),
}  # fmt: skip

#: The end of a command's exit statuses; those whose help has a list of its own are left out.
STATUS = {
    "analyze": ("3", "with `--fail-on`: the verdict is inconclusive"),
    "record": ("other", "with `-- COMMAND`: the status of the command"),
}
OWN_STATUS = ("check", "verify")


def pages() -> dict[str, str]:
    """All pages: path below docs/reference, text."""
    made = {f"commands/{name}.md": text for name, text in commands().items()}
    made["metrics.md"] = metrics()
    made["json.md"] = documents()
    made["configuration.md"] = configuration()
    return made


def commands() -> dict[str, str]:
    """The page of each command by its name; "kvmprobe" is the page of the whole."""
    import typer

    from kvmprobe.cli.main import app

    group: Any = typer.main.get_command(app)
    context = group.context_class(group, info_name="kvmprobe", **group.context_settings)
    made, rows = {}, []
    for name, command, below in _leaves(group, context):
        rows.append((name, _first_sentence(command.help)))
        made[file_name(name)] = _command_page(name, command, below)
    made["kvmprobe"] = _overview_page(group, context, rows)
    return made


def file_name(command: str) -> str:
    """The name of a command's page, of "fleet analyze" fleet-analyze."""
    return command.replace(" ", "-")


def _leaves(group: Any, context: Any, before: str = "") -> Iterator[tuple[str, Any, Any]]:  # noqa: ANN401
    """Every command, with its name and its context; those of a group by both names."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        below = command.context_class(command, info_name=name, parent=context)
        if hasattr(command, "list_commands"):
            yield from _leaves(command, below, f"{before}{name} ")
        else:
            yield before + name, command, below


def _command_page(name: str, command: Any, context: Any) -> str:  # noqa: ANN401 - of typer's own
    params = command.get_params(context)
    operands = [p for p in params if p.param_type_name == "argument"]
    words = " ".join(_operand(p, context) for p in operands)
    lines = [*HEAD, f"# kvmprobe {name}", ""]
    lines += [
        "## Synopsis",
        "",
        "```text",
        f"kvmprobe {name} [OPTIONS] {words}".rstrip(),
        "```",
        "",
    ]
    lines += ["## Description", "", *_prose(command.help)]
    if operands:
        lines += ["## Arguments", "", *_definitions(_records(operands, context))]
    options = [p for p in params if p.param_type_name == "option"]
    lines += ["## Options", "", *_definitions(_records(options, context))]
    if name in EXAMPLES:
        lines += ["## Examples", ""]
        for line, does in EXAMPLES[name]:
            lines += [does, "", "```console", f"$ {line}", "```", ""]
    if name not in OWN_STATUS:
        lines += ["## Exit status", "", *_statuses(name)]
    return "\n".join(lines).rstrip() + "\n"


def _overview_page(group: Any, context: Any, rows: list[tuple[str, str]]) -> str:  # noqa: ANN401
    options = [p for p in group.get_params(context) if p.param_type_name == "option"]
    lines = [*HEAD, "# kvmprobe", ""]
    lines += ["## Synopsis", "", "```text", "kvmprobe [OPTIONS] COMMAND [ARGS]...", "```", ""]
    lines += ["## Description", "", _escape(group.help), ""]
    lines += ["## Commands", ""]
    for name, says in rows:
        lines += [f"[kvmprobe {name}]({file_name(name)}.md)", f": {_escape(says)}", ""]
    lines += ["## Options", "", *_definitions(_records(options, context))]
    lines += ["## Exit status", "", *_statuses("")]
    lines += [
        "`kvmprobe check` and `kvmprobe verify` answer by statuses of their own: see their pages.",
        "",
        "## Environment",
        "",
        "`NO_COLOR`",
        ": If it is set, nothing is coloured. Nothing is coloured when the output is no terminal.",
    ]
    return "\n".join(lines).rstrip() + "\n"


def _statuses(name: str) -> list[str]:
    rows = [("0", "fine"), ("1", "failed; one line on stderr says why"), ("2", "wrong usage")]
    if name in STATUS:
        rows.append(STATUS[name])
    if name == "analyze":
        rows.append(("4", "with `--fail-on`: a finding of this severity or above"))
    rows.append(("130", "ended by Ctrl-C"))
    if name == "record":
        rows[-1] = ("130", "ended by a second Ctrl-C; the first one ends the recording with 0")
    return [line for status, says in rows for line in (f"{status}", f": {says}", "")]


def _operand(param: Any, context: Any) -> str:  # noqa: ANN401
    """An argument in a synopsis: what typer calls it, in brackets if it may be left out."""
    word = param.get_help_record(context)[0].partition(" <")[0].strip("[]")
    word = word if word.startswith("--") else word.upper()
    return word if param.required else f"[{word}]"


def _records(params: list[Any], context: Any) -> list[tuple[str, str]]:  # noqa: ANN401
    return [record for p in params if (record := p.get_help_record(context)) is not None]


def _definitions(records: list[tuple[str, str]]) -> list[str]:
    return [
        line
        for term, says in records
        for line in (f"`{term}`", f": {_escape(' '.join(says.split()))}", "")
    ]


def _prose(text: str) -> list[str]:
    r"""Paragraphs of a help text; one that begins with \b is shown as it stands."""
    lines: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        if paragraph.startswith("\b"):
            lines += ["```text", *paragraph.removeprefix("\b").strip("\n").splitlines(), "```", ""]
        else:
            lines += [_escape(" ".join(paragraph.split())), ""]
    return lines


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph)[0]


def _escape(text: str) -> str:
    """Text as Markdown shows it unchanged; what stands between back quotes stays code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_\[\]<>|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def metrics() -> str:
    """The page of what `watch` serves and what `check --textfile` writes."""
    lines = [*HEAD, "# Metrics", ""]
    lines += [
        "No label holds anything that a guest or a VMM chose.",
        "",
        "## kvmprobe watch",
        "",
        "Prometheus metrics at `http://127.0.0.1:9973/metrics`. `kvmprobe_probe_run*` are there "
        "while the kernel counts (`sysctl kernel.bpf_stats_enabled=1`).",
        "The usual `process_*` and `python_info` of Prometheus' client come with them.",
        "",
    ]
    lines += _table(("metric", "type", "labels", "says"), list(_served()))
    lines += ["", "## kvmprobe check --textfile", ""]
    lines += _table(("metric", "type", "labels", "says"), list(_written()))
    return "\n".join(lines) + "\n"


def _served() -> Iterator[tuple[str, ...]]:
    """Rows of the watch's metrics: its own collector is asked, with one of everything."""
    from kvmprobe.analysis.rules import FAULTS
    from kvmprobe.capture.plan import Row
    from kvmprobe.watch.metrics import Numbers, _Collector
    from kvmprobe.watch.status import FaultVerdict, Status

    status = Status(
        schema="", version="", boot_id="", pid=1, written_ns=0, since="", seconds=0.0,
        state="watching", reason=None, verdict="", vms=(), vms_seen=0, vms_left_out=0, findings=(),
        verdicts={FAULTS[0]: FaultVerdict("", (), ())}, findings_left_out=0, events={"MMIO": 0},
        lost={"MMIO": 0}, attached=(), metrics=None,
    )  # fmt: skip
    row = Row(observation="MMIO", site="MMIO", attachment="", attached=True, reason="")
    numbers = Numbers(
        status=status, plan=(row,), findings={}, errors={"log": 0}, evidence=0, attachments=0,
        config_good=True, config_loaded=0.0, expired_ignores=0, drained=0.0,
        runs={"tp_kvm_entry": (1, 1)},
    )  # fmt: skip
    for family in _Collector(lambda: numbers).collect():
        sample = family.samples[0]
        yield f"`{sample.name}`", family.type, _labels(sample.labels), _escape(family.documentation)


def _written() -> Iterator[tuple[str, ...]]:
    """Rows of the text file's metrics: one is made and read back."""
    from prometheus_client.parser import text_string_to_metric_families

    from kvmprobe.check.model import Code, Found, Result, Seen
    from kvmprobe.check.output import textfile

    found = Found(("rule",), "warning", "fault", "VM", 1)
    attached = (("MMIO", "MMIO", True),)
    seen = Seen("live", lost={"MMIO": 0}, found=(found,), attached=attached)
    text = textfile(Result(Code.OK, "", {"f": "fixed"}, ()), seen, 0.0)
    for family in text_string_to_metric_families(text):
        labels = _labels(family.samples[0].labels)
        yield f"`{family.name}`", family.type, labels, _escape(family.documentation)


def _labels(labels: dict[str, str]) -> str:
    return ", ".join(f"`{name}`" for name in labels)


def documents() -> str:
    """The page of the JSON documents: each schema as a table of its properties."""
    import json

    lines = [*HEAD, "# JSON documents", ""]
    lines += [
        "Each command with `--json` prints one document, and a running watch writes one: its "
        "status. A JSON Schema (2020-12) in the program's own folders describes each. Additions "
        "keep the number behind the name; a removal or a new meaning makes the next one. Readers "
        "must accept properties that they don't know.",
        "",
        "`[]` behind a name: each element of a list. `*`: each key of an object. `?`: may be "
        "missing.",
        "",
    ]
    for path in schemas():
        schema = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"## {schema['$id']}", "", f"{_escape(schema['title'])}.", ""]
        lines += [f"Schema: `{path.relative_to(ROOT)}`.", ""]
        lines += [*_table(("property", "type", "says"), list(_properties(schema, ""))), ""]
    return "\n".join(lines).rstrip() + "\n"


def schemas() -> list[Path]:
    """All JSON Schemas of the program."""
    # kvmprobe/analysis is a link to analysis
    return [ROOT / "analysis/schema/analysis-1.json", *sorted(ROOT.glob("kvmprobe/[!a]*/schema/*"))]


def _properties(schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    required = schema.get("required", [])
    below = [
        (key, value, key not in required) for key, value in schema.get("properties", {}).items()
    ]
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        below.append(("*", extra, False))
    for key, value, optional in below:
        path = f"{prefix}{key}"
        yield (
            f"`{path}{'?' if optional else ''}`",
            _type(value),
            _escape(value.get("description", "")),
        )
        yield from _inside(value, path)


def _inside(schema: dict[str, Any], path: str) -> Iterator[tuple[str, str, str]]:
    for choice in (schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _properties(choice, f"{path}.")
        if isinstance(choice.get("items"), dict):
            yield from _inside(choice["items"], f"{path}[]")


def _type(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{'null' if each is None else each}`" for each in schema["enum"])
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(dict.fromkeys(_type(choice) for choice in choices))
    kind = schema.get("type", "any")
    kinds = [kind] if isinstance(kind, str) else kind
    if "array" in kinds and isinstance(schema.get("items"), dict):
        kinds = [f"list of {_type(schema['items'])}" if k == "array" else k for k in kinds]
    return " or ".join(kinds)


def configuration() -> str:
    """The page of `watch`'s configuration file."""
    from kvmprobe.watch.config import CONFIG_FILE, Config

    example = (ROOT / "packaging/kvmprobe-watch.toml").read_text(encoding="utf-8").strip()
    lines = [*HEAD, "# Configuration of the watch", ""]
    lines += [
        f"`{CONFIG_FILE}`: TOML, every key optional. `kvmprobe watch --check-config` checks it. "
        "An unknown key or a wrong value is an error that names it.",
        "",
        f"```toml\n{example}\n```",
        "",
        "## Keys",
        "",
        "`[]` behind a name: one of the tables of a list, written `[[ignore]]`.",
        "",
    ]
    schema = Config.model_json_schema()
    lines += _table(("key", "type", "bounds", "default"), list(_keys(schema, schema, "")))
    return "\n".join(lines) + "\n"


def _keys(root: dict[str, Any], table: dict[str, Any], prefix: str) -> Iterator[tuple[str, ...]]:
    for key, value in table["properties"].items():
        items = value.get("items", {})
        reference = value.get("$ref") or items.get("$ref")
        if reference:
            inner = root["$defs"][reference.rpartition("/")[2]]
            yield from _keys(root, inner, f"{prefix}{key}{'[]' if items else ''}.")
            continue
        limits = (value, *value.get("anyOf", ()))
        bounds = ", ".join(
            f"{word} {limit[name]}"
            for limit in limits
            for name, word in (
                ("minimum", "at least"),
                ("maximum", "at most"),
                ("maxLength", "characters at most"),
            )
            if name in limit
        )
        default = value.get("default", "")
        kinds = [k for limit in limits if (k := limit.get("format", limit.get("type"))) != "null"]
        kind = " or ".join(k for k in kinds if k)
        shown = "must be given" if key in table.get("required", ()) else f"`{default}`"
        if default is None or (default == "" and shown != "must be given"):
            shown = "none"
        yield f"`{prefix}{key}`", kind, bounds, shown


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for name, text in pages().items():
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_text(text, encoding="utf-8")
