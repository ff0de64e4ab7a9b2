"""Prove on this machine that training over several processes is training in one.

Small models with sparse experts are trained for three steps in one process, then in several, in
every way to spread their experts, in float64; everything that comes out must be equal to 1e-10.
Exit code 1 if something is not.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines.parity import TOLERANCE, WORLDS, Finding, cases, compare, refer
from pipelines.terminal import Terminal

EXAMPLE = "mone verify-parallel --worlds 1 2 4"


def main(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    """Run the command."""
    parser.add_argument(
        "--worlds",
        type=int,
        nargs="+",
        choices=WORLDS,
        default=[1, 2],
        metavar="N",
        help=f"numbers of processes, of {', '.join(map(str, WORLDS))} (default 1 2)",
    )
    parser.add_argument("--json", action="store_true", help="print every comparison as JSON")
    args = parser.parse_args(arguments)
    terminal = Terminal()
    findings = _verify(terminal, sorted(set(args.worlds)))
    if args.json:
        print(json.dumps(as_plain(findings)))
    else:
        show_findings(terminal, findings)
    return 0 if all(each.equal for each in findings) else 1


def _verify(terminal: Terminal, worlds: Sequence[int]) -> list[Finding]:
    """The whole grid in one process, then in so many."""
    chosen = tuple(cases())
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="mone-parity-") as folder:
        with terminal.meter("one process alone", "cases") as meter:
            refer(Path(folder), chosen, meter.update)
        for world in worlds:
            name = "1 process as many" if world == 1 else f"{world} processes"
            with terminal.meter(name, "comparisons") as meter:
                findings += compare(Path(folder), world, chosen, meter.update)
    return findings


def show_findings(terminal: Terminal, findings: Sequence[Finding]) -> None:
    """The worst of every mesh and routing, then what it comes to."""
    rows = []
    for (mesh, routing), group in groupby(findings, key=lambda of: (of.mesh, of.case.routing)):
        quantity, error = max((each.worst for each in group), key=lambda worst: worst[1])
        rows.append((f"{mesh.data} x {mesh.expert}", routing, f"{error:.1e}", quantity))
    terminal.table(
        "largest relative difference from one process",
        ("mesh", "routing", "difference", "in"),
        rows,
    )
    terminal.say(
        "mesh: data x expert ranks; over four loads of the experts, with and without drops"
    )
    terminal.say(verdict(findings))


def verdict(findings: Sequence[Finding]) -> str:
    """One line: equal, or what differs most."""
    worst = max(findings, key=lambda of: of.worst[1])
    quantity, error = worst.worst
    if worst.equal:
        return (
            f"parallel training equals one process: {len(findings)} comparisons, worst {error:.1e}"
        )
    wrong = sum(not each.equal for each in findings)
    return (
        f"parallel training differs from one process in {wrong} of {len(findings)} comparisons: "
        f"{quantity} by {error:.1e} on {worst.mesh.data} x {worst.mesh.expert} ranks, "
        f"{worst.case.name}"
    )


def as_plain(findings: Sequence[Finding]) -> dict[str, Any]:
    """For JSON; a difference that is not finite is null."""
    return {
        "equal": all(each.equal for each in findings),
        "tolerance": TOLERANCE,
        "comparisons": [
            {
                "data": of.mesh.data,
                "expert": of.mesh.expert,
                "routing": of.case.routing,
                "load": of.case.load,
                "drops": of.case.drops,
                "differences": {
                    name: error if math.isfinite(error) else None
                    for name, error in of.errors.items()
                },
            }
            for of in findings
        ],
    }
