"""Times vLLM in a process of its own: `python -P vllm_worker.py RESULTS < JOB.json`. Imports nothing of this project.

The job names the checkpoint, the arguments of vllm.LLM, and the runs to time: token ids of each prompt, and its new
tokens. RESULTS gets one JSON line when the engine is ready, and one per run with the fewest seconds of its repeats.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

_ENVIRONMENT = {  # unless the caller says otherwise
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # greedy decoding needs no sampler, and flashinfer may be missing
}
_WARM_UP_LENGTHS = (8, 100, 700, 2000, 5000, 9000, 17000, 31000)


def run(job: dict[str, Any], results: TextIO) -> None:
    """Start vLLM, and write a line when it is ready and a line per run."""
    began = time.perf_counter()
    vllm: Any = importlib.import_module("vllm")
    engine = vllm.LLM(**job["arguments"])

    def generate(prompts: list[list[int]], new_tokens: list[int]) -> float:
        """Return the seconds of all prompts, each with exactly its new tokens."""
        parameters = [
            vllm.SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
            for count in new_tokens
        ]
        began = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        seconds = time.perf_counter() - began
        if [len(each.outputs[0].token_ids) for each in outputs] != new_tokens:
            raise RuntimeError("vLLM returned fewer new tokens than it was asked for.")
        return seconds

    def write(**line: Any) -> None:
        results.write(json.dumps(line) + "\n")
        results.flush()

    write(vllm=vllm.__version__, ready_s=time.perf_counter() - began)
    longest = max((prompt for each in job["runs"] for prompt in each["prompts"]), key=len)
    lengths = [length for length in _WARM_UP_LENGTHS if length <= len(longest)]
    generate([longest[:length] for length in lengths], [4 + at for at in range(len(lengths))])  # compiles
    for each in job["runs"]:
        generate(each["prompts"][:2], [min(4, count) for count in each["new_tokens"][:2]])
        seconds: list[float] = []
        while not seconds or (len(seconds) < each["repeats"] and sum(seconds) < job["max_seconds"]):
            seconds.append(generate(each["prompts"], each["new_tokens"]))
        write(seconds=min(seconds))


if __name__ == "__main__":
    for _name, _value in _ENVIRONMENT.items():
        os.environ.setdefault(_name, _value)
    with Path(sys.argv[1]).open("w") as _results:
        run(json.load(sys.stdin), _results)
    sys.stderr.flush()
    os._exit(0)  # a CUDA process may take long to end
