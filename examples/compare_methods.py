"""Compare cache methods on the bundled checkpoint and print one line per method.

    python examples/compare_methods.py

Replace "demo" by a checkpoint of your own and "sample" by a folder of LongBench rows.
"""

import sys

from sparsecache import LLM, compare, evaluate

PRED_DIR = sys.argv[1] if len(sys.argv) > 1 else "pred/examples"

llm = LLM("demo", method="infinigen", budget=64)
print(llm.generate("Question: What is in the box?\nAnswer:", max_new_tokens=8)[0].report)

results = []
for method in ("vanilla", "infinigen", "snapkv", "examples/knorm.py"):
    budget = {} if method == "vanilla" else {"budget": 64}
    data = {"data": "sample", "sample_tokens": 512, "datasets": ["qasper", "trec"]}
    results.append(evaluate("demo", method, pred_dir=PRED_DIR, **data, **budget))
print(compare(*results))
