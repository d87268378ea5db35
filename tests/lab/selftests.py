# SPDX-License-Identifier: MIT
"""`python -m tests.lab.selftests`: KVM's own selftests under a recording.

They are a load that nobody here wrote.  They are built from Debian's linux-source package of the
very kernel that runs them, in a throwaway root of its release; none of their code is in the
project.
"""

import argparse
import json
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.lab.base import (
    CHECKOUT,
    LabError,
    built,
    cache_dir,
    content_key,
    find_program,
    run_program,
    say,
)
from tests.lab.kernels import Kernel, get_kernel, parse_spec
from tests.lab.matrix import EMULATORS
from tests.lab.packages import Release
from tests.lab.rootfs import bootstrap, get_root
from tests.lab.vm import Job, run_job

_TOOLS = ("gcc", "make", "libc6-dev", "linux-libc-dev")
_INSIDE = Path(__file__).with_name("selftests_inside.py")
# What building needs of the kernel's source, which is 1.5 GB.
_PARTS = (
    "scripts",
    "tools/arch/x86",
    "tools/build",
    "tools/include",
    "tools/lib",
    "tools/scripts",
    "tools/testing/selftests/*.h",
    "tools/testing/selftests/kvm",
    "tools/testing/selftests/lib*",
    "tools/testing/selftests/rseq",
)
# The uapi headers are those of linux-libc-dev, which is built from the same source.
_BUILD = """set -e
cd /linux
rm -rf usr/include; mkdir -p usr/include
ln -s /usr/include/linux /usr/include/asm-generic usr/include
ln -s /usr/include/x86_64-linux-gnu/asm usr/include
make -k -j2 -C tools/testing/selftests/kvm ARCH=x86_64 LDFLAGS='-static -pthread' \
    KHDR_INCLUDES='-isystem /linux/usr/include' >/log 2>&1 || true
"""
# kvmprobe's observations, by the histogram of the kernel's that counts the same.
_COMPARED = {
    "kvm/kvm_emulate_insn": "EMULATE",
    "lab/fault": "FAULT",
}


def get_selftests(kernel: Kernel, release_name: str) -> Path:
    """Return the folder of this kernel's KVM selftests, static programs, built if need be.

    Raises MissingError when the mirror no longer holds the kernel's source, LabError when less
    than a few of them compile.
    """
    folder = cache_dir() / "selftests"
    key = content_key(kernel.folder.name, _TOOLS, _PARTS, _BUILD)
    programs = folder / f"{kernel.package_version}-{key}"
    release = Release(release_name)
    with built(programs, 4000) as scratch:
        if scratch is not None:
            # "6.1.0-56-amd64" and "6.12.117+deb13-amd64" are of linux-source-6.1 and -6.12.
            series = ".".join(kernel.release.split(".")[:2])
            package = release.show(f"linux-source-{series}", kernel.package_version)
            say(f"building the selftests of {package.version}; takes minutes")
            deb = release.fetch(package)
            tree = scratch / "tree"
            bootstrap(release_name, _TOOLS, tree)
            _unpack(deb, series, scratch / "source", tree / "linux")
            run_program([find_program("chroot", "coreutils"), str(tree), "sh", "-c", _BUILD])
            _collect(tree / "linux/tools/testing/selftests/kvm", scratch / programs.name)
    return programs


def _unpack(deb: Path, series: str, scratch: Path, target: Path) -> None:
    run_program([find_program("dpkg-deb", "dpkg"), "-x", str(deb), str(scratch)])
    name = f"linux-source-{series}"
    archive = scratch / "usr/src" / f"{name}.tar.xz"
    patterns = [f"{name}/{part}" for part in _PARTS]
    command = [find_program("tar", "tar"), "-x", "-f", str(archive), "-C", str(scratch)]
    run_program([*command, "--wildcards", *patterns])
    (scratch / name).rename(target)
    shutil.rmtree(scratch)


def _collect(source: Path, target: Path) -> None:
    """Copy the programs, which have no suffix and are executable, under flat names."""
    target.mkdir()
    for path in sorted(source.rglob("*")):
        if path.is_file() and not path.suffix and path.stat().st_mode & 0o111:
            name = "-".join(path.relative_to(source).parts)
            shutil.copy(path, target / name)
            run_program([find_program("strip", "binutils"), str(target / name)])
    if len(list(target.iterdir())) < 20:
        raise LabError(f"only {len(list(target.iterdir()))} of KVM's selftests compile")


def compare(out: Path) -> tuple[list[str], list[str]]:
    """Return what was seen, and what of it is wrong, one line each.

    Wrong are: a finding above info, a selftest whose result the recording changed, and a number of
    events that with what was lost isn't the kernel's own count.  A selftest that reached its time
    limit in either run has no result.  Raises OSError, ValueError or KeyError when the run did not
    get so far.
    """
    before, recorded, document = (
        json.loads((out / name).read_text())
        for name in ("before.json", "recorded.json", "analysis.json")
    )
    seen, wrong = [], []
    results: dict[str, list[str]] = {}
    for name, (result, _, _) in recorded["tests"].items():
        results.setdefault(result, []).append(name)
        earlier = before["tests"][name][0]
        if earlier != result and "limit" not in (earlier, result):
            wrong.append(f"{name}: {earlier} without a recording, {result} under it")
    seen += [f"{result}: {len(names)}: {' '.join(names)}" for result, names in results.items()]
    lost: dict[str, int] = {}
    for loss in document["captures"][0]["losses"]:
        lost[loss["observation"]] = lost.get(loss["observation"], 0) + loss["records"]
    for event, observation in _COMPARED.items():
        calls = sum(recorded["counts"][event].values())
        events, missing = document["observations"].get(observation, 0), lost.get(observation, 0)
        line = f"{observation}: {events} seen + {missing} lost, {calls} by the kernel's count"
        (seen if events + missing == calls else wrong).append(line)
    verdicts = ", ".join(f"{f} {said['verdict']}" for f, said in document["verdicts"].items())
    seen.append(f"{document['events']} events, {document['lost']} lost; {verdicts}")
    for finding in document["findings"]:
        line = f"{finding['severity']}: {finding['rule']}"
        (seen if finding["severity"] == "info" else wrong).append(line)
    return seen, wrong


def _script(seconds: float, tests: list[str]) -> str:
    names = shlex.join(tests)
    run = "python3 /lab/selftests_inside.py /lab/selftests"
    capture = "/out/selftests.kvmprobe"
    return (
        f"{run} /out/before.json {seconds} {names}\n"
        f"kvmprobe record -o {capture} -- {run} /out/recorded.json {seconds} {names}\n"
        f"kvmprobe analyze --json {capture} >/out/analysis.json\n"
    )


def main() -> int:
    """Run the command line; the exit status: 0 when nothing is wrong."""
    parser = argparse.ArgumentParser(prog="tests.lab.selftests", description=__doc__)
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--vendor", default="amd", choices=sorted(EMULATORS))
    parser.add_argument("--seconds", type=float, default=20.0, help="limit of each (default 20)")
    parser.add_argument("tests", nargs="*", metavar="TEST", help="default: all that compile")
    parser.add_argument("--memory", type=int, default=2048, help="MiB")
    parser.add_argument("--code", type=Path, help="checkout to run (default: this)")
    parser.add_argument("--results", type=Path, help="folder for captures, output and console")
    arguments = parser.parse_args()
    results = arguments.results or Path(tempfile.mkdtemp(prefix="kvmprobe-lab-"))
    # As at Ctrl-C, what was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        kernel, release = get_kernel(arguments.kernel), parse_spec(arguments.kernel)[0]
        programs = get_selftests(kernel, release)
        job = Job(
            kernel,
            get_root(release),
            arguments.vendor,
            _script(arguments.seconds, arguments.tests),
            code=(arguments.code or CHECKOUT).resolve(),
            extra={"selftests": programs, _INSIDE.name: _INSIDE},
            memory=arguments.memory,
            limit=600 + 2 * (arguments.seconds + 5) * len(list(programs.iterdir())),
        )
        say(f"booting {kernel.release} ({kernel.package_version}) on {arguments.vendor}")
        outcome = run_job(job, EMULATORS[arguments.vendor], results)
        say(f"done after {outcome.seconds:.0f} s; results in {results}")
        seen, wrong = compare(outcome.out)
    except (LabError, OSError, ValueError, KeyError) as error:
        say(f"error: {error}")
        return 1
    for line in seen:
        print(line)
    for line in wrong:
        print(f"WRONG {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
