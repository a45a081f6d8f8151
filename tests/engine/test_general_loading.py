"""How transformers is asked to place a model: on one device, over several, and from quantised weights."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsecache.engine.general import loading
from sparsecache.engine.general.loading import load_model
from sparsecache.errors import UsageError

GPUS = [torch.device("cuda", index) for index in (1, 2)]


@pytest.fixture
def asked(monkeypatch) -> list[dict[str, Any]]:
    """Return the arguments of from_pretrained, which loads nothing here."""
    found: list[dict[str, Any]] = []

    def from_pretrained(path: Any, **arguments: Any) -> Any:
        found.append(arguments)
        return torch.nn.Linear(1, 1), {"missing_keys": [], "unexpected_keys": []}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000 + device.index, 2000))
    return found


def test_several_gpus_share_a_model_by_their_free_memory(asked, make_checkpoint) -> None:
    load_model(make_checkpoint(), GPUS, torch.bfloat16)
    assert asked[0]["device_map"] == "balanced" and asked[0]["max_memory"] == {1: 1001, 2: 1002}
    assert asked[0]["dtype"] == torch.bfloat16 and asked[0]["trust_remote_code"] is False


def test_quantised_weights_are_loaded_where_they_run(asked, folder) -> None:
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace("{", '{"quantization_config": {"quant_method": "fp8"}, ', 1)
    )
    load_model(folder, GPUS[:1], torch.bfloat16)
    assert asked[0]["device_map"] == {"": GPUS[0]}


def test_plain_weights_on_one_device_need_no_accelerate(asked, make_checkpoint, monkeypatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    load_model(make_checkpoint(), [torch.device("cpu")], torch.float32)
    assert "device_map" not in asked[0]
    with pytest.raises(UsageError, match=r"needs the package accelerate\. Install it: pip install"):
        load_model(make_checkpoint(), GPUS, torch.float32)
