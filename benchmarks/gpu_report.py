"""The report of a GPU run: rows of benchmarks beside their targets, what the other parts said, as Markdown and JSON.

    python benchmarks/gpu_report.py WORK RESULT     for scripts/gpu_check.sh: reads what lies in the folder WORK so far,
                                                    writes RESULT.json and RESULT.md

Needs the standard library alone, so that a report can be written after every part, whatever the parts do.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Peer:
    """Another way to do the same work, or as much.

    Attributes:
        milliseconds: median; None if it did not run.
        ratio: rate of ours over the peer's; with the same work the peer's time over ours.
        error: largest difference of our outputs from the peer's, over the peer's largest value.
        note: why it did not run, or what else is to be said.
    """

    name: str
    milliseconds: float | None = None
    ratio: float | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One of our kernels on one problem, beside its peers.

    Attributes:
        path: "mma", "hopper", or "" where there is one path.
        milliseconds, rate, unit: median time, and work per second: TFLOP/s, GB/s, blocks/s.
        ceiling: which ceiling was measured in the same turns; ceiling_rate: what it reached, in the same unit.
        judged_by: the peer whose ratio has a target; at_least, aim: that ratio. aim_rate: the rate that is aimed at.
        note: why ours did not run.
    """

    case: str
    path: str = ""
    milliseconds: float | None = None
    rate: float | None = None
    unit: str = ""
    ceiling: str = ""
    ceiling_rate: float | None = None
    judged_by: str = ""
    at_least: float | None = None
    aim: float | None = None
    aim_rate: float | None = None
    note: str = ""
    peers: list[Peer] = field(default_factory=list)

    @property
    def of_ceiling(self) -> float | None:
        return self.rate / self.ceiling_rate if self.rate and self.ceiling_rate else None

    @property
    def value(self) -> float | None:
        """What is held against the target."""
        return next((peer.ratio for peer in self.peers if peer.name == self.judged_by), None)

    @property
    def verdict(self) -> str:
        if self.at_least is None or self.aim is None:
            return ""
        if self.value is None:
            return "not measured"
        if self.value < self.at_least:
            return "below"
        fast_enough = self.aim_rate is None or (self.rate or 0) >= self.aim_rate
        return "aim" if self.value >= self.aim and fast_enough else "at least"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"of_ceiling": self.of_ceiling, "value": self.value, "verdict": self.verdict}

    @staticmethod
    def from_json(saved: dict[str, Any]) -> Row:
        fields = {name: saved[name] for name in Row.__dataclass_fields__ if name != "peers"}
        return Row(**fields, peers=[Peer(**peer) for peer in saved["peers"]])


HEADINGS = ("case", "path", "ours, ms", "rate", "of ceiling", "against", "ms", "ratio", "at least", "aim", "", "error")


def benchmark_table(rows: list[Row]) -> str:
    """A line per row and peer; value, target and aim stand side by side in the line of the peer that judges."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- | --- |" + " ---: |" * 3 + " --- |" + " ---: |" * 6]
    for row in rows:
        rate = (
            ""
            if row.rate is None
            else f"{row.rate:,.0f} {row.unit}"
            if row.rate >= 10
            else f"{row.rate:.2f} {row.unit}"
        )
        share = "" if row.of_ceiling is None else f"{row.of_ceiling:.0%} of {row.ceiling}"
        ours = [row.case, row.path, row.note or _number(row.milliseconds, 3), rate, share]
        for peer in row.peers or [Peer("")]:
            judges = peer.name == row.judged_by and row.at_least is not None
            target = ["", "", ""]
            if judges:
                rate_too = "" if row.aim_rate is None else f", {row.aim_rate:g} {row.unit}"
                target = [_number(row.at_least, 2), _number(row.aim, 2) + rate_too, row.verdict]
            error = "" if peer.error is None else f"{peer.error:.1e}"
            time = ", ".join(filter(None, [_number(peer.milliseconds, 3), peer.note]))
            lines.append(_line([*ours, peer.name, time, _number(peer.ratio, 2), *target, error]))
            ours = ["", "", "", "", ""]
    return "\n".join(lines)


#: What is asked of ncu, and how the table calls it: name, factor, decimals.
NCU_METRICS = {
    "gpu__time_duration.sum": ("ms", 1e-6, 3),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("tensor pipe, %", 1.0, 1),
    "dram__bytes.sum": ("DRAM, MB", 1e-6, 1),
    "launch__registers_per_thread": ("registers", 1.0, 0),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy, %", 1.0, 1),
}


def ncu_rows(text: str) -> list[dict[str, Any]]:
    """Kernels of ``ncu --csv --page raw --print-units base``: lines of ncu and of the program come before the header,
    a line of units after it."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    header, _, *values = csv.reader(lines)
    kernels = []
    for line in values:
        named = dict(zip(header, line, strict=False))
        kernel: dict[str, Any] = {"kernel": named.get("Kernel Name", "")}
        for metric, (name, factor, _) in NCU_METRICS.items():
            value = named.get(metric, "").replace(",", "")  # "n/a", or nothing where ncu does not know the metric
            kernel[name] = factor * float(value) if value[:1].isdigit() else None
        kernels.append(kernel)
    return kernels


def ncu_table(kernels: list[dict[str, Any]]) -> str:
    columns = list(NCU_METRICS.values())
    lines = ["| kernel | " + " | ".join(name for name, _, _ in columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [
        _line([kernel["kernel"][:100], *(_number(kernel[name], decimals) for name, _, decimals in columns)])
        for kernel in kernels
    ]
    return "\n".join(lines)


def parts_table(parts: list[dict[str, Any]]) -> str:
    lines = ["| part | outcome | time | last line |", "| --- | --- | ---: | --- |"]
    lines += [_line([part["name"], part["outcome"], f"{part['seconds']} s", part["last_line"][:120]]) for part in parts]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def _number(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:.{decimals}f}"


def collect(work: Path) -> dict[str, Any]:
    """What the parts have left in the folder so far: facts.json, parts.tsv (name, outcome, seconds), a log per part,
    benchmarks*.json and ncu.csv."""
    parts = []
    if (work / "parts.tsv").exists():
        for line in (work / "parts.tsv").read_text().splitlines():
            name, outcome, seconds = line.split("\t")
            log = work / f"{name.replace(' ', '-')}.log"
            text = log.read_text(errors="replace").strip() if log.exists() else ""
            last_line = text.splitlines()[-1].strip() if text else ""
            parts.append({"name": name, "outcome": outcome, "seconds": int(seconds), "last_line": last_line})
    facts = work / "facts.json"
    benchmarks = [row for path in sorted(work.glob("benchmarks*.json")) for row in json.loads(path.read_text())]
    profile = work / "ncu.csv"
    return {
        **(json.loads(facts.read_text()) if facts.exists() else {}),
        "parts": parts,
        "benchmarks": benchmarks,
        "kernels": ncu_rows(profile.read_text(errors="replace")) if profile.exists() else [],
    }


def markdown(report: dict[str, Any]) -> str:
    facts = [f"{name} {report[name]}" for name in ("torch", "cuda", "architecture") if name in report]
    title = [f"# {report.get('device', 'unknown device')}", f"commit {report.get('commit', 'unknown')}"]
    sections = [
        ", ".join([*title, report.get("date", "")]),
        ", ".join(facts),
        parts_table(report["parts"]),
    ]
    if report["benchmarks"]:
        rows = [Row.from_json(row) for row in report["benchmarks"]]
        sections += [
            "Medians of runs in turns in one process; a ratio above 1 says that ours is faster.",
            benchmark_table(rows),
        ]
    if report["kernels"]:
        sections += ["Attention kernels under ncu:", ncu_table(report["kernels"])]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_whole(path: Path, text: str) -> None:
    """The file appears whole or not at all: the machine may be taken away at any moment."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    temporary.rename(path)


def main() -> None:
    work, result = Path(sys.argv[1]), sys.argv[2]
    report = collect(work)
    Path(result).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(f"{result}.json"), json.dumps(report, indent=1) + "\n")
    write_whole(Path(f"{result}.md"), markdown(report))


if __name__ == "__main__":
    main()
