"""Print how fast copydesk trains and reads, beside what a user would pick instead, in one run.

Run `make bench`, or `python -m bench.speed [--model DIR] [--repeats 5] [--quick] [--only PART …] [--output FILE]`, on a
machine that does nothing else: numbers hold within one run only. Sides take turns; what is printed are medians.
"""

import argparse
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.speed.apart import Side
from bench.speed.cost import peak
from bench.speed.growth import growth_rows, start_rows
from bench.speed.measure import Row, number, table
from bench.speed.prediction import engine_rows, prediction_rows
from bench.speed.setup import QUICK, ROOT, Setup, Sizes, save_stock
from bench.speed.steps import step_rows
from bench.speed.training import training_rows

log = logging.getLogger("bench.speed")

PARTS: Mapping[str, Callable[[Setup], list[Row]]] = {
    "training": training_rows,
    "prediction": prediction_rows,
    "engines": engine_rows,
    "steps": step_rows,
    "growth": growth_rows,
    "start": start_rows,
}


def main() -> None:
    """Measure, print, and end with 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "released"))
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--quick", action="store_true", help="once, on few pages, judging nothing: to see that it runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}, expected at least 1")
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    log.setLevel(logging.INFO)
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}  # for the processes of the sides
    with tempfile.TemporaryDirectory() as folder:
        sizes, repeats = (QUICK, 1) if options.quick else (Sizes(), options.repeats)
        setup = Setup(options.model, Path(folder), sizes, repeats)
        try:
            save_stock(setup)
        except (ValueError, OSError) as error:  # ModelError, EncoderError
            parser.exit(2, f"{error}\n")
        facts = machine(sizes)
        rows = {part: measured(part, setup) for part in options.only}
    judged = not options.quick
    everything = [row for found in rows.values() for row in found or ()]
    print(f"{described(facts)}. {'Quick: nothing is judged' if options.quick else f'Medians of {repeats}'}.\n")
    print(table(everything, judged=judged))
    if options.output:
        content = {"machine": facts, "repeats": repeats, "rows": [row.as_dict(judged=judged) for row in everything]}
        options.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if failed := [part for part, found in rows.items() if found is None]:
        sys.exit(f"not measured: {', '.join(failed)}; the reason stands above the table")


def measured(part: str, setup: Setup) -> list[Row] | None:
    """Measure a part; None, and the reason in the log, if it fails: the others are measured all the same."""
    log.info("measuring %s", part)
    try:
        return PARTS[part](setup)
    except RuntimeError as error:
        log.error("%s failed: %s", part, error)  # noqa: TRY400 (the error holds the trace of its process)
        return None


def machine(sizes: Sizes) -> dict[str, Any]:
    """Return what the numbers were measured on."""
    with Side(peak, sizes.matrices, sizes.peak_seconds) as side:
        peaks = side()
    names = [line.partition(":")[2].strip() for line in _processor_lines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "float32_gflops": peaks["float32"],
        "bfloat16_gflops": peaks.get("bfloat16"),
        "int8_gflops": peaks.get("int8"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _processor_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def described(facts: Mapping[str, Any]) -> str:
    """Return the machine in a sentence."""
    peaks = f"{number(facts['float32_gflops'])} GFLOP/s in float32"
    for precision in ("bfloat16", "int8"):
        rate = facts[f"{precision}_gflops"]
        peaks += f", {number(rate)} in {precision}" if rate else f", no native {precision}"
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, matmul peak {peaks}; "
        f"torch {facts['torch']}, transformers {facts['transformers']}, Python {facts['python']}"
    )


if __name__ == "__main__":
    main()
