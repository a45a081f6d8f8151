"""The baseline vLLM: the same prompts over the same weights, in a process of its own.

It runs in the dtype of the model, and with fp8 weights and activations. The process finds vLLM by its
PYTHONPATH. The weights are saved for it as a checkpoint in a temporary folder.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sparsecache.bench.models import BenchModel
from sparsecache.bench.timing import free_memory
from sparsecache.bench.workload import Workload
from sparsecache.engine.base import Request
from sparsecache.errors import one_line

_WORKER = Path(__file__).with_name("vllm_worker.py")
_FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_MAX_RUNS, _MAX_SECONDS = 3, 8.0  # as in timing.measure
_FREE_BYTES = 12 * 2**30  # GPU memory that vLLM does not get: it uses more than its limit

Seconds = dict[str, float]
"""Seconds by name: "vllm bf16", "vllm fp8"."""


@dataclass(frozen=True)
class Vllm:
    """vLLM as a Python interpreter finds it."""

    python: str = sys.executable

    def decode_step_s(self, model: BenchModel, workloads: Sequence[Workload]) -> dict[Workload, Seconds]:
        """Return the seconds of a decode step of each workload.

        They are the difference between two runs over the workload's new tokens. Both decode so many tokens before them
        that all sequences are in flight.
        """
        runs, few_tokens = [], []
        for workload in workloads:
            few = 16 + workload.batch * workload.tokens // 4096
            few_tokens.append(few)
            requests = workload.requests(model.vocab_size)
            runs += [_run(requests, few), _run(requests, few + workload.new_tokens)]
        times: dict[Workload, Seconds] = {workload: {} for workload in workloads}
        for name, seconds in self._measure(model, runs).items():
            for workload, few_s, many_s in zip(workloads, seconds[::2], seconds[1::2], strict=False):
                times[workload][name] = (many_s - few_s) / workload.new_tokens
        return times

    def first_token_s(self, model: BenchModel, workloads: Sequence[Workload]) -> dict[Workload, Seconds]:
        """Return the seconds from one prompt of each workload's length to its first token."""
        runs = [_run(Workload(each.tokens, 1).requests(model.vocab_size), 1) for each in workloads]
        times: dict[Workload, Seconds] = {workload: {} for workload in workloads}
        for name, seconds in self._measure(model, runs).items():
            for workload, first_s in zip(workloads, seconds, strict=False):
                times[workload][name] = first_s
        return times

    def replay_s(self, model: BenchModel, requests: Sequence[Request]) -> Seconds:
        """Return the seconds of all requests, given to vLLM at once."""
        run = _run(requests, None) | {"repeats": 1}
        return {name: seconds[0] for name, seconds in self._measure(model, [run]).items() if seconds}

    def _measure(self, model: BenchModel, runs: list[dict[str, Any]]) -> dict[str, list[float]]:
        """Return the seconds of each run, fewer if one failed, by dtype. Print why on stderr."""
        names = {f"vllm {_DTYPES[model.dtype]}": False, "vllm fp8": True}
        measured: dict[str, list[float]] = {}
        with TemporaryDirectory() as scratch:
            folder, results = Path(scratch) / "checkpoint", Path(scratch) / "results"
            try:
                if subprocess.run([self.python, "-P", "-c", _FIND], check=False).returncode:
                    _report(f"{self.python} finds no module vllm. Put its folder on PYTHONPATH, or give --vllm_python.")
                    return {}
                model.save(folder)
                free_memory()
                for name, fp8 in names.items():
                    arguments = _arguments(model, folder, runs, fp8)
                    job = {"arguments": arguments, "runs": runs, "max_seconds": _MAX_SECONDS}
                    measured[name] = self._start(name, job, results)
            except OSError as error:  # no such Python, or a full disk
                _report(one_line(error))
        return measured

    def _start(self, name: str, job: dict[str, Any], results: Path) -> list[float]:
        """Run a job in a process of its own and return its times, also those before a failure."""
        print(f"{name}: starting, {len(job['runs'])} runs.", file=sys.stderr)
        results.unlink(missing_ok=True)
        command = [self.python, "-P", str(_WORKER), str(results)]
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        if done.returncode:
            _report(one_line(RuntimeError(f"the process of {name} failed: {done.stderr[-1000:]}")))
        else:
            print(f"{name}: vLLM {lines[0]['vllm']} was ready after {lines[0]['ready_s']:.0f} s.", file=sys.stderr)
        return [line["seconds"] for line in lines if "seconds" in line]


def _run(requests: Sequence[Request], new_tokens: int | None) -> dict[str, Any]:
    """Return a run over requests, each with `new_tokens`; None: with its own number."""
    return {
        "prompts": [each.token_ids for each in requests],
        "new_tokens": [new_tokens or each.max_new_tokens for each in requests],
        "repeats": _MAX_RUNS,
    }


def _arguments(model: BenchModel, folder: Path, runs: list[dict[str, Any]], fp8: bool) -> dict[str, Any]:
    """Return the arguments of vllm.LLM: its defaults, without a prefix cache, in the memory that is free."""
    lengths = [len(ids) + new for run in runs for ids, new in zip(run["prompts"], run["new_tokens"], strict=True)]
    share = 0.9
    if model.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(model.device)
        share = round((free - _FREE_BYTES) / total, 3)
    arguments = {
        "model": str(folder),
        "dtype": str(model.dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_model_len": -(-(max(lengths) + 1) // 256) * 256,
        "gpu_memory_utilization": share,
        "seed": 0,
    }
    return arguments | ({"quantization": "fp8"} if fp8 else {})


def _report(problem: str) -> None:
    print(f"Could not measure vllm: {problem}", file=sys.stderr)
