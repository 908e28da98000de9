"""What a bug report contains: versions, processor and GPUs, which kernels run on them, and a self-test.

    python -m selfforcing_ext.info [--json]

The exit code is 1 when the compiled part cannot be used or an op misses its tolerance.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import selfforcing_ext

if TYPE_CHECKING:
    import torch

    from selfforcing_ext.selftest import Result

SETTINGS = ("SELFFORCING_CPU_ISA", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report and returns the exit code."""
    parser = argparse.ArgumentParser("python -m selfforcing_ext.info", description="Prints what a bug report contains.")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    as_json = parser.parse_args(arguments).json

    report = environment()
    results: list[Result] = []
    try:
        report |= compiled_part()
    except (ImportError, RuntimeError) as error:
        report["error"] = str(error)
    else:
        results = self_test(report["gpus"])
        report["self_test"] = [asdict(result) | {"passed": result.passed} for result in results]
    passed = "error" not in report and all(result.passed for result in results)
    if as_json:
        print(json.dumps(report | {"passed": passed}, indent=1))
    else:
        print("\n".join([*_report_lines(report), *_test_lines(results)]))
    return int(not passed)


def environment() -> dict[str, Any]:
    """What can be said without the compiled part."""
    try:
        torch_version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch_version = None
    return {
        "selfforcing_ext": selfforcing_ext.__version__,
        "folder": str(Path(selfforcing_ext.__file__).parent),
        "python": platform.python_version(),
        "torch": torch_version,
        "platform": platform.platform(),
        "processor": _processor(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def compiled_part() -> dict[str, Any]:
    """What was built, and what of it runs here.

    Raises:
        ImportError, RuntimeError: it cannot be loaded or used, in one sentence.
    """
    import torch

    from selfforcing_ext import _C, gpu, library

    return {
        "torch": torch.__version__,  # with what was built into it, which the package's metadata may leave out
        "compiler": _C.compiler,
        "built_with_torch": _C.torch_version,
        "cuda_toolkit": _C.cuda_toolkit or None,
        "cuda_architectures": [gpu.capability_name(name) for name in library.BUILT_ARCHITECTURES],
        "torch_cuda": torch.version.cuda,
        "cuda_ops_loaded": library.HAS_CUDA,
        "threads": torch.get_num_threads(),
        "cpu_kernels": _C.cpu_isa(),
        "cpu_isas": _C.cpu_isas(),
        "gpus": [_gpu(torch.device("cuda", index)) for index in range(torch.cuda.device_count())],
    }


def self_test(gpus: list[dict[str, Any]]) -> list[Result]:
    """Results on the CPU and on every GPU that kernels run on."""
    import torch

    from selfforcing_ext import selftest

    usable = [torch.device("cuda", index) for index, gpu in enumerate(gpus) if gpu["obstacle"] is None]
    return list(selftest.run((torch.device("cpu"), *usable)))


def _gpu(device: torch.device) -> dict[str, Any]:
    import torch

    from selfforcing_ext import gpu, library

    capability = torch.cuda.get_device_capability(device)
    architecture = gpu.architecture_for(capability, library.BUILT_ARCHITECTURES)
    return {
        "name": torch.cuda.get_device_name(device),
        "capability": "{}.{}".format(*capability),
        "kernels": None if architecture is None else gpu.capability_name(architecture),
        "obstacle": gpu.obstacle(device),
    }


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        names = []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} logical cores"


def _report_lines(report: dict[str, Any]) -> list[str]:
    rows = [
        ("selfforcing_ext", f"{report['selfforcing_ext']} in {report['folder']}"),
        ("python", report["python"]),
        ("torch", report["torch"] or "not installed"),
        ("platform", report["platform"]),
        ("processor", report["processor"]),
        ("settings", " ".join(f"{name}={value}" for name, value in report["settings"].items()) or "none"),
    ]
    if "error" in report:
        rows.append(("error", report["error"]))
    else:
        cuda = "without CUDA"
        if report["cuda_toolkit"]:
            cuda = f"CUDA {report['cuda_toolkit']} for compute capability {', '.join(report['cuda_architectures'])}"
        rows += [
            ("built with", f"{report['compiler']}, torch {report['built_with_torch']}, {cuda}"),
            ("CPU kernels", f"{report['cpu_kernels']} of {', '.join(report['cpu_isas'])}"),
            ("threads", report["threads"]),
            ("CUDA kernels", _cuda_ops_text(report)),
        ]
        for index, gpu in enumerate(report["gpus"]):
            does = gpu["obstacle"] or f"runs the kernels for {gpu['kernels']}"
            rows.append((f"GPU {index}", f"{gpu['name']}, compute capability {gpu['capability']}: {does}"))
    return [f"{name:<16}{value}" for name, value in rows]


def _cuda_ops_text(report: dict[str, Any]) -> str:
    if report["cuda_toolkit"] is None:
        return "not built"
    if not report["cuda_ops_loaded"]:
        return "built, but this torch has no CUDA"
    return f"loaded, under torch's CUDA {report['torch_cuda']}; {len(report['gpus']) or 'no'} GPUs seen"


def _test_lines(results: list[Result]) -> list[str]:
    """A table per device: an op in a row, the errors of a dtype in two columns."""
    lines = []
    for device in dict.fromkeys(result.device for result in results):
        here = [result for result in results if result.device == device]
        dtypes = list(dict.fromkeys(result.dtype for result in here))
        lines += ["", f"Self-test on {device}: ||result - exact|| / ||exact||, forward and backward"]
        lines.append(" " * 24 + "".join(f"{dtype:<20}" for dtype in dtypes).rstrip())
        for op in dict.fromkeys(result.op for result in here):
            errors = [_errors_text(result) for result in here if result.op == op]
            lines.append(f"{op:<24}" + "".join(f"{text:<20}" for text in errors).rstrip())
    failed = [result for result in results if not result.passed]
    for result in failed:
        why = result.failure or f"error above {result.tolerance:g}"
        lines.append(f"FAILED: {result.op}, {result.dtype}, {result.device}: {why}")
    if results:
        lines += ["", f"{len(results) - len(failed)} passed, {len(failed)} failed"]
    return lines


def _errors_text(result: Result) -> str:
    numbers = [f"{error:.1e}" for error in (result.forward, result.backward) if error is not None]
    return " ".join(numbers) + ("" if result.passed else "!")


if __name__ == "__main__":
    raise SystemExit(main())
