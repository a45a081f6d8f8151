"""What a run allocates for its caches."""

import json

from sparsecache.cache import PromptEvictionCache
from sparsecache.longbench.tasks import load_tasks


def test_an_evicting_cache_has_capacity_for_its_budget_and_new_tokens_alone(predict, tmp_path, monkeypatch) -> None:
    """Not for whole prompts, or eviction would save no memory."""
    capacities, init = [], PromptEvictionCache.__init__

    def recording_init(self, method, layer, config) -> None:
        init(self, method, layer, config)
        capacities.append(self.kv.keys.shape[2])

    monkeypatch.setattr(PromptEvictionCache, "__init__", recording_init)
    budget = ["--method", "snapkv", "-o", "budget=16", "-o", "dense_layers=0"]
    done = predict(*budget, "--batch_size", "2")
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "pred").glob("*/*/qasper.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(row["prompt_tokens"] > 100 for row in rows)
    assert set(capacities) == {16 + load_tasks()["qasper"].max_new_tokens}
