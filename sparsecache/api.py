"""The Python API: decodes texts with a cache method, and evaluates methods on LongBench.

    from sparsecache import LLM, compare, evaluate

    model = "qwen2.5-coder-1.5b-instruct.gguf"
    llm = LLM(model, method="infinigen", budget=256)
    print(llm.generate("The capital of France is", max_new_tokens=8)[0].text)

    full = evaluate(model, datasets="qasper", data="rows/")
    sparse = evaluate(model, method="snapkv", budget=256, datasets="qasper", data="rows/")
    print(sparse.mean, sparse.kept, sparse.scores)
    print(compare(full, sparse))

Keyword arguments are the options of longbench_pred.py (fields of Settings) and of the method. If both have an option of
the same name, such as `window`, pass the method's in `options`.
"""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from io import StringIO
from numbers import Integral
from pathlib import Path
from typing import Any, cast

from sparsecache.engine.base import Completion, Request
from sparsecache.errors import UsageError, did_you_mean, short
from sparsecache.longbench.compare import compare as compare_runs
from sparsecache.longbench.compare_tables import compare_document
from sparsecache.longbench.score_types import RunScore
from sparsecache.longbench.scores import score_run
from sparsecache.longbench.tables import FORMATS, render
from sparsecache.longbench.wrapping import encode
from sparsecache.methods import load_method, method_options
from sparsecache.options import LARGEST, show
from sparsecache.runner.context import RunContext
from sparsecache.runner.run import run
from sparsecache.runner.settings import DTYPE_CHOICES, ENGINES, MINIMA, Settings

_CHOICES = {"dtype": DTYPE_CHOICES, "engine": ENGINES}
_SETTINGS = {field.name for field in fields(Settings)}
_RUN_ONLY = {
    "datasets",
    "tasks",
    "max_new_tokens",
    "name",
    "e",
    "data",
    "ruler_length",
    "ruler_rows",
    "ruler_seed",
    "ruler_essays",
    "ruler_squad",
    "ruler_hotpotqa",
    "max_samples",
    "overwrite",
    "pred_dir",
    "verify",
    "workers",
    "ray_address",
}


@dataclass(frozen=True)
class Generation:
    """A generated text.

    token_ids: new tokens, the stop token included. finish_reason: "stop" or "length". prefill_s, decode_s: seconds to
    the first token, and from the first to the last one. report: the method's facts about the cache, such as `kept`,
    the mean share of past tokens that sparse layers attended to. error: the reason if decoding failed, else None; the
    other fields are then empty.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    prefill_s: float
    decode_s: float
    report: dict[str, Any]
    error: str | None = None


class LLM:
    """A checkpoint with a cache method.

    model: a checkpoint's folder, a GGUF file, a name of configs/models.toml or a hub id. method: a built-in method, a
    path to a .py file, or the dotted name of an installed module. Raises UsageError for invalid arguments.
    """

    def __init__(
        self, model: str | Path, method: str | Path = "vanilla", options: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        settings = make_settings(model, method, options, **more)
        if unused := _RUN_ONLY & more.keys():
            raise UsageError(f"LLM takes no {', '.join(sorted(unused))}; evaluate() does.")
        self._context = RunContext(settings)
        self._context.fetch_weights()
        self._engine = self._context.engine(self._context.slots)
        self._reserved = (0, 0)  # most tokens and most new tokens of a sequence

    def generate(
        self, prompts: str | Iterable[str | list[int]], max_new_tokens: int = 64, chat: bool = False
    ) -> list[Generation]:
        """Continue prompts greedily; return a Generation per prompt, in their order.

        prompts: texts, or lists of token ids. chat: wrap texts with the checkpoint's chat template, as the user's turn.
        Raises UsageError for a prompt that does not fit the window with its new tokens.
        """
        if not _is_count(max_new_tokens) or max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={short(max_new_tokens)} must be a whole number, 1 or more.")
        if not isinstance(prompts, Iterable):
            raise UsageError(f"prompts={short(prompts)} must be a text, or a list of texts and of lists of token ids.")
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        stop_ids = tuple(self._context.checkpoint.stop_ids)
        requests = [
            Request(at, self._token_ids(prompt, at, max_new_tokens, chat), max_new_tokens, stop_ids)
            for at, prompt in enumerate(given)
        ]
        if requests:
            self._reserve(max(len(request.token_ids) for request in requests) + max_new_tokens, max_new_tokens)
        done = {completion.key: self._generation(completion) for completion in self._engine.generate(requests)}
        return [done[at] for at in range(len(given))]

    def _reserve(self, max_tokens: int, max_new_tokens: int) -> None:
        """Reserve for such sequences, unless an earlier call has: on a GPU that captures graphs anew."""
        largest = max(max_tokens, self._reserved[0]), max(max_new_tokens, self._reserved[1])
        if largest != self._reserved:
            self._engine.reserve(*largest)
            self._reserved = largest

    def _token_ids(self, prompt: str | list[int], at: int, max_new_tokens: int, chat: bool) -> list[int]:
        wrapper, tokenizer = self._context.prompter.wrapper, self._context.checkpoint.tokenizer
        if not isinstance(prompt, str):
            token_ids = self._checked_ids(prompt, at)
        elif chat:
            token_ids = wrapper.encode(wrapper.wrap(prompt))
        else:
            token_ids = encode(tokenizer, prompt)
        if not token_ids:
            raise UsageError(f"Prompt {at} is empty. Give at least one token.")
        if len(token_ids) + max_new_tokens > self._context.window:
            raise UsageError(
                f"Prompt {at} has {len(token_ids)} tokens; with {max_new_tokens} new ones it exceeds the window of "
                f"{self._context.window}. Shorten it, or lower max_new_tokens."
            )
        return token_ids

    def _checked_ids(self, prompt: Any, at: int) -> list[int]:
        """Return the token ids of a prompt. Raises UsageError for others than those of the model's embedding."""
        rows = getattr(self._context.checkpoint.config.get_text_config(), "vocab_size", LARGEST)
        token_ids: list[Any] = list(prompt) if isinstance(prompt, Iterable) else [None]
        if wrong := [each for each in token_ids if not _is_count(each) or not 0 <= each < rows]:
            found = f"holds {short(wrong[0])}" if isinstance(prompt, Iterable) else f"is {short(prompt)}"
            raise UsageError(f"Prompt {at} {found}. Give a text, or a list of token ids from 0 to {rows - 1}.")
        return [int(each) for each in token_ids]

    def _generation(self, done: Completion) -> Generation:
        return Generation(
            text="" if done.error else self._context.detokenizer.decode(done.token_ids),
            token_ids=done.token_ids,
            prompt_tokens=len(done.request.token_ids),
            finish_reason=done.finish_reason,
            prefill_s=done.prefill_s,
            decode_s=done.decode_s,
            report=done.report,
            error=done.error,
        )


@dataclass(frozen=True)
class Evaluation:
    """A finished run and its scores.

    folder: the folder of the predictions. run: all scores. exit_code: 0, or 1 if a row failed or if a sparse method
    dropped nothing though prompts were longer than its budget. log: the output of the run.
    """

    folder: Path
    run: RunScore
    exit_code: int
    log: str

    def __repr__(self) -> str:
        return f"Evaluation({str(self.folder)!r}, mean={self.mean}, kept={self.kept}, exit_code={self.exit_code})"

    @property
    def scores(self) -> dict[str, float | None]:
        """Return the score per dataset, 0 to 100."""
        return {dataset.task.name: dataset.summary.score for dataset in self.run.datasets}

    @property
    def mean(self) -> float | None:
        """Return the mean score of LongBench's datasets; without these, of LongBench v2, RULER or own tasks."""
        return self.run.headline.score

    @property
    def kept(self) -> float | None:
        """Return the mean share of past tokens that sparse layers attended to; None for a dense method."""
        return self.run.headline.kept


def evaluate(
    model: str | Path, method: str | Path = "vanilla", options: Mapping[str, Any] | None = None, **more: Any
) -> Evaluation:
    """Decode LongBench rows as longbench_pred.py does, and score them. Resumes a stopped run.

    datasets: names as a list or comma-separated, "all" by default. data: "hub", "sample", a folder, a zip or a .jsonl
    file. tasks: a file of own tasks. max_new_tokens: most new tokens per answer, in place of the datasets' limits.
    Returns the scores of all rows in the run's folder. Rows that fail count 0, and a warning says how many there are.
    Raises UsageError for invalid arguments.
    """
    evaluation = evaluate_settings(make_settings(model, method, options, **more))
    scored = evaluation.run
    if scored.num_failed:
        message = f"{scored.num_failed} of {scored.num_rows} rows failed and count 0. The evaluation's log says why."
        warnings.warn(message, stacklevel=2)
    return evaluation


def compare(*evaluations: Evaluation, format: str = "terminal") -> str:
    """Return what `longbench_eval.py compare` prints: a line per evaluation, with its difference to the first one.

    format: "terminal", "markdown", "csv", "latex" or "json". Raises UsageError without two evaluations and common rows.
    """
    if len(evaluations) < 2:
        raise UsageError(f"compare takes two evaluations or more, the reference first, not {len(evaluations)}.")
    if wrong := [each for each in evaluations if not isinstance(each, Evaluation)]:
        raise UsageError(f"{short(wrong[0])} is not an Evaluation. compare takes what evaluate() returns.")
    if format not in FORMATS:
        raise UsageError(f"format={short(format)} is not one of {', '.join(FORMATS)}.")
    return render(compare_document(compare_runs([each.run for each in evaluations])), format)


def evaluate_settings(settings: Settings, make_context: Any = RunContext) -> Evaluation:
    """Do what `evaluate` does, for settings. make_context: RunContext, or a subclass that makes another engine."""
    log = StringIO()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(log))
        stack.enter_context(redirect_stderr(log))
        settings.check()
        exit_code = run(settings, make_context)
    folder = settings.run_folder
    return Evaluation(folder, score_run(folder, settings.e), exit_code, log.getvalue())


def make_settings(
    model: str | Path, method: str | Path = "vanilla", options: Mapping[str, Any] | None = None, **more: Any
) -> Settings:
    """Return the settings of a run from keyword arguments: fields of Settings, and options of the method."""
    given = {key: value for key, value in more.items() if key not in _SETTINGS}
    for key in given:
        hint = did_you_mean(key, _SETTINGS, cutoff=0.8)
        if hint and key not in method_options(load_method(str(method))):
            raise UsageError(f"There is no argument {key!r}{hint}")
    if twice := given.keys() & (options or {}).keys():
        raise UsageError(f"{', '.join(sorted(twice))} is given twice, in `options` and as an argument. Give it once.")
    values = {key: value for key, value in more.items() if key in _SETTINGS}
    for key in ("datasets", "ruler_length"):
        if not isinstance(value := values.get(key), str | None):
            values[key] = ",".join(map(str, value if isinstance(value, Iterable) else [value]))
    if values.get("data") is not None:
        values["data"] = str(values["data"])
    for key in ("pred_dir", "tasks", "ruler_essays", "ruler_squad", "ruler_hotpotqa"):
        if isinstance(values.get(key), str):
            values[key] = Path(values[key])
    texts = {key: show(value) for key, value in {**given, **(options or {})}.items()}
    settings = replace(Settings(model=str(model), method=str(method), options=texts), **values)
    _check_values(settings)
    return settings


def _check_values(settings: Settings) -> None:
    """Raise UsageError for a value that the command line would refuse: of another type, out of range, no choice."""
    for each in fields(settings):
        name, value, kind = each.name, getattr(settings, each.name), cast(Any, each.type)
        is_right = isinstance(value, bool) == (kind is bool) and (name == "options" or isinstance(value, kind))
        if not is_right:
            wanted = getattr(kind, "__name__", kind)
            raise UsageError(f"{name}={short(value)} is of the type {type(value).__name__}; it must be {wanted}.")
        if value is not None and name in MINIMA and value < MINIMA[name]:
            raise UsageError(f"{name}={value} must be {MINIMA[name]} or more.")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UsageError(f"{name}={short(value)} is not one of {', '.join(_CHOICES[name])}.")


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's are Integral, too
