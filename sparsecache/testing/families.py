"""Check families of transformers with every method in the general engine, and write the table of docs/models.md.

    python -m sparsecache.testing.families --out docs/models.md

Models are tiny and have random weights. With options that drop nothing, a method must give the text of transformers'
generate. With options that drop tokens, it must decode and keep to its budget.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from sparsecache.cache.base import CacheMethod
from sparsecache.cli import report_usage_errors
from sparsecache.engine.base import Engine, Request
from sparsecache.engine.general import CachedModel, GeneralEngine
from sparsecache.engine.reference import TransformersEngine
from sparsecache.errors import UsageError
from sparsecache.methods import method_names
from sparsecache.methods.vanilla import Vanilla
from sparsecache.testing.cache_checks import CPU, require
from sparsecache.testing.method_under_test import MethodUnderTest

WINDOW = 256
PROMPT_LENGTHS = (40, 3)
NEW_TOKENS = 10
CALIBRATION = torch.arange(3, 203)
_SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": WINDOW, "initializer_range": 0.3,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SLIDING = {"sliding_window": 8, "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {
    "num_hidden_layers": 6, "layer_types": ["linear_attention", "full_attention"] * 3, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16, **_EXPERTS,
}  # fmt: skip
_INPUT = {"guess": "input"}  # for infinigen, since every family has this hidden state
FAMILIES: dict[str, dict[str, Any]] = {
    "phi3": {"partial_rotary_factor": 0.5},
    "gemma3_text": _SLIDING,
    "glm4": {"partial_rotary_factor": 0.5},
    "granite": {"attention_multiplier": 0.6, "residual_multiplier": 0.5},
    "smollm3": {"no_rope_layer_interval": 2},
    "olmo2": {},
    "qwen3_moe": _EXPERTS,
    "mixtral": {"num_local_experts": 4},
    "cohere2": _SLIDING,
    "qwen3_next": _LINEAR,
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": WINDOW},
}  # fmt: skip
"""Model types that the general engine serves, and fields of their tiny configurations."""
_MLA = {
    "head_dim": 8, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
_SHARED = {
    **_SLIDING, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 16,
    "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 6,
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "gemma2": _SLIDING,
    "gpt_oss": {"num_local_experts": 4, **_SLIDING},
    "deepseek_v3": _MLA,
    "gemma3n_text": _SHARED,
    "bloom": {"n_layer": 2, "n_head": 2},
}
"""Model types that the general engine refuses with a cache method."""


def make_model(model_type: str, fields: dict[str, Any]) -> Any:
    """Return a tiny random model in float32, with other fields than the common sizes."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **{**_SIZES, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms of ones would hide one that is left out
                parameter += torch.randn(parameter.shape) * 0.2
        model.get_input_embeddings().weight.normal_()
    return model


def make_engine(model: Any, method: CacheMethod, window: int, slots: int = 1) -> GeneralEngine:
    """Return the general engine over a loaded model, calibrated if the method needs it."""
    cached = CachedModel(model, method, window)
    method.check(cached.shape)
    if method.calibration_text() is not None:
        with torch.inference_mode():
            cached.calibrate(CALIBRATION.to(cached.device), lambda layers: None)
    cached.check()
    return GeneralEngine(cached, slots)


def requests(new_tokens: int = NEW_TOKENS) -> list[Request]:
    """Return requests with prompts of random tokens."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    return [Request(at, prompt, new_tokens, ()) for at, prompt in enumerate(prompts)]


def decode(engine: Engine, wanted: list[Request]) -> list[tuple[list[int], dict[str, Any]]]:
    """Return the tokens and the report of each request, whose keys are 0, 1, ... Fails on an error."""
    done = sorted(engine.generate(wanted), key=lambda completion: int(completion.key))
    require(not any(each.error for each in done), f"decoding failed: {[each.error for each in done if each.error]}")
    return [(each.token_ids, each.report) for each in done]


class Family:
    """A family with its tiny model, which is made once."""

    def __init__(self, model_type: str, device: torch.device = CPU) -> None:
        self.model = make_model(model_type, FAMILIES[model_type]).to(device)
        self.served = CachedModel(self.model, Vanilla(), WINDOW)

    @cached_property
    def expected(self) -> list[list[int]]:
        """Return the texts of transformers' generate."""
        texts = [token_ids for token_ids, _ in decode(TransformersEngine(self.model, self.model.device), requests())]
        require(len(set(texts[0])) > 3, "the model repeats itself, so the check shows nothing")
        return texts

    def check(self, name: str) -> None:
        """Check a method: lossless options give the text of transformers, and others keep to their budget.

        Both prompts are decoded together where the family allows it. Raises AssertionError.
        """
        subject = _subject(name)
        if subject.lossless is not None:
            done = decode(make_engine(self.model, subject.make(subject.lossless), WINDOW, 2), requests())
            require([text for text, _ in done] == self.expected, f"{subject.lossless}: the text is not transformers'")
        (_, report), _ = decode(make_engine(self.model, subject.make(subject.tight), WINDOW, 2), requests())
        if subject.tight.get("budget") == 4.0:
            steps = NEW_TOKENS - 1
            most = 4 + (steps if getattr(subject.make({}), "budget_excludes_generated", False) else 0)
            kept, capped = report["kept"], report["capped_steps"]
            require(kept is not None, f"{subject.tight}: no layer is sparse")
            require(0 < kept <= most / PROMPT_LENGTHS[0], f"{subject.tight}: kept {kept}, over {most} tokens")
            require(capped == report["sparse_steps"] == steps, f"{subject.tight}: capped {capped} of {steps} steps")


def refusal(model_type: str) -> str:
    """Return why a model type of REFUSED is refused."""
    try:
        CachedModel(make_model(model_type, REFUSED[model_type]), Vanilla(), WINDOW)
    except UsageError as error:
        return str(error)
    raise AssertionError(f"{model_type} is not refused")


def page(names: list[str] | None = None) -> Iterator[str]:
    """Yield the lines of docs/models.md. names: of the methods, by default all."""
    versions = f"transformers {transformers.__version__} and torch {torch.__version__.partition('+')[0]}"
    yield "# Models\n"
    yield "`--engine transformers` runs any method with these families and others. The tables are written by\n"
    yield "```bash\npython -m sparsecache.testing.families --out docs/models.md\n```\n"
    yield f"with {versions}, on tiny models with random weights in float32.\n"
    families = {model_type: Family(model_type) for model_type in FAMILIES}
    yield "## Families\n"
    yield "Served layers: those with full attention, which keep keys and values in the method's caches.\n"
    yield "| model type | served layers of the tiny model | prompts |\n|---|---|---|"
    for model_type, family in families.items():
        served = f"{family.served.shape.layers} of {family.served.num_layers}"
        reason = family.served.one_slot_reason
        prompts = "together" if reason is None else f"one at a time: {reason}"
        yield f"| {model_type} | {served} | {prompts} |"
    yield "\n## Methods\n"
    yield "yes: with options that drop nothing, the text equals that of transformers' `generate`; with a budget of 4"
    yield "tokens, the method keeps to it. `infinigen` runs with `guess=input`. Its default `residual` is refused with"
    yield "cohere2 and gpt2, whose layers have no known place after attention. `expected_attention` and"
    yield "`shadowkv` need the same RoPE in all layers, which pairs the halves of a head.\n"
    yield f"| method | {' | '.join(families)} |\n|---|{'---|' * len(families)}"
    for name in names or method_names():
        yield f"| `{name}` | {' | '.join(cell(family, name) for family in families.values())} |"
    yield "\n## Refused\n"
    yield "These run with `--method vanilla` only, which is transformers' own `generate`.\n"
    yield "| model type | error |\n|---|---|"
    for model_type in REFUSED:
        yield f"| {model_type} | {refusal(model_type)} |"


def _subject(name: str) -> MethodUnderTest:
    """Return a method to check; `infinigen` speculates from the attention input, which every family has."""
    subject = MethodUnderTest.of(name)
    if name != "infinigen":
        return subject
    return replace(subject, lossless={**(subject.lossless or {}), **_INPUT}, tight={**subject.tight, **_INPUT})


def cell(family: Family, name: str) -> str:
    """Return "yes" if a method passes the checks with a family, else "no"."""
    try:
        family.check(name)
    except (AssertionError, UsageError, ValueError) as error:
        click.echo(f"{family.model.config.model_type}, {name}: {error}", err=True)
        return "no"
    return "yes"


@click.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="File to write. Default: print the page.")
def main(out: Path | None) -> None:
    """Check every method with every family, in a few minutes, and write the page of results."""
    with report_usage_errors():
        text = "\n".join(page()) + "\n"
    if out is None:
        click.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
