"""Run every golden case on a CUDA device with the reference bodies, and write the numbers as JSON.

Not a test that pytest collects: it runs on machines that have torch, transformers and little else.

    PYTHONPATH=src:. python tests/gpu/golden_h200.py --output golden.json

What passes: in fp32 (TF32 off), logits within 1e-4 of transformers' on the CPU at every position, and
every greedy token equal to `generate`'s. In bf16, a relative error of logits below 1e-2, or no more
than transformers itself has in bf16 on the same device; tokens are reported, not judged, for a
rounding may turn any of them. Preemptions, prefix hits and mixed steps must have happened, and the
cache must be empty afterwards. Sampling on the device draws what it draws on the CPU, but for draws
that a rounding decides. Exit code 1 if anything fails.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.engine import golden
from tests.engine.driving import SHAPES, Setup
from tests.engine.golden import Numbers

MAX_ABS_ERROR = 1e-4
MAX_RELATIVE_ERROR = 1e-2
MAX_DIFFERING_DRAWS = 0.005

Judge = Callable[[Numbers], bool]


def judge_logits(setup: Setup, numbers: Numbers) -> bool:
    """Whether logits are near enough for the dtype."""
    if setup.dtype == "float32":
        return numbers["max_abs_error"] < MAX_ABS_ERROR
    theirs = numbers["transformers_relative_error"]
    return numbers["relative_error"] < max(MAX_RELATIVE_ERROR, theirs)


def judge_tokens(setup: Setup, case: str, numbers: Numbers) -> bool:
    """Whether what the case is about happened, and in fp32 every token is right."""
    happened = case not in golden.MUST_HAPPEN or numbers[golden.MUST_HAPPEN[case]] > 0
    right = setup.dtype != "float32" or numbers["num_wrong_tokens"] == 0
    return happened and right and numbers["kv_usage_at_end"] == 0


def judge_sampling(numbers: Numbers) -> bool:
    """Whether nothing forbidden was drawn, and almost every draw is the CPU's."""
    few = numbers["num_differing"] <= MAX_DIFFERING_DRAWS * numbers["num_draws"]
    return few and numbers["num_forbidden"] == 0


def cases(device: str) -> Iterator[tuple[dict[str, str], Callable[[], Numbers], Judge]]:
    """Labels, the measurement and the judgement of every case."""
    yield {"kind": "sampling"}, functools.partial(golden.sampling_case, device), judge_sampling
    for dtype in ("float32", "bfloat16"):
        for layout in ("pages", "slots"):
            setup = Setup(device, dtype, "reference", layout)
            for shape in SHAPES:
                yield from _cases_of(setup, shape)


def _cases_of(
    setup: Setup, shape: str
) -> Iterator[tuple[dict[str, str], Callable[[], Numbers], Judge]]:
    labels = {"shape": shape, "dtype": setup.dtype, "layout": setup.layout, "ops": setup.ops}
    near = functools.partial(judge_logits, setup)
    for schedule in golden.SCHEDULES:
        measure = functools.partial(golden.logits_case, schedule, shape, setup)
        yield {"kind": "logits", "case": schedule, **labels}, measure, near
    measure = functools.partial(golden.shared_prefix_case, shape, setup)
    yield {"kind": "logits", "case": "shared prefix", **labels}, measure, near
    for case, run in golden.TOKEN_CASES.items():
        right = functools.partial(judge_tokens, setup, case)
        labels_of_case = {"kind": "tokens", "case": case, **labels}
        yield labels_of_case, functools.partial(run, shape, setup), right


def run_case(
    labels: dict[str, str], measure: Callable[[], Numbers], judge: Judge
) -> dict[str, Any]:
    """One entry of the result."""
    try:
        numbers = measure()
    except Exception:  # noqa: BLE001 -- the other cases are still worth running
        return {**labels, "passed": False, "error": traceback.format_exc()}
    return {**labels, "passed": judge(numbers), "numbers": numbers}


def machine(device: str) -> dict[str, str]:
    """Where and with what this ran."""
    is_cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or "cpu",
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def main() -> int:
    """Run everything, write the JSON, print a line per failure and a summary."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    start = time.monotonic()
    results = [run_case(*case) for case in cases(arguments.device)]
    failed = [entry for entry in results if not entry["passed"]]
    report = {
        **machine(arguments.device),
        "command": " ".join(["python", *sys.argv]),
        "seconds": round(time.monotonic() - start, 1),
        "passed": not failed,
        "num_cases": len(results),
        "num_failed": len(failed),
        "cases": results,
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [f"FAILED {json.dumps(entry)}" for entry in failed]
    num_passed = len(results) - len(failed)
    lines.append(f"{num_passed} of {len(results)} cases passed on {report['device']}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
