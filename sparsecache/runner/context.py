"""The context of a run: its checkpoint, method, device, dtype and prompts, before weights are read.

In one file because the checks compare the settings, the checkpoint and the method with one another.
"""

import copy
import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sparsecache.cache import CacheMethod
from sparsecache.cache.base import Shape
from sparsecache.engine.base import Engine
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.devices import find_device, find_devices
from sparsecache.engine.families import load_family
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.fp8 import check_fp8_devices
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import DTYPES, Checkpoint
from sparsecache.engine.model_registry import Model, checkpoint_folder, find_model
from sparsecache.engine.rope import Rope
from sparsecache.engine.weights import Weights
from sparsecache.errors import UsageError, one_line
from sparsecache.longbench.prompts import Prompter
from sparsecache.longbench.reasoning import END, START
from sparsecache.longbench.tasks import Task
from sparsecache.longbench.wrapping import CLOCK
from sparsecache.methods import make_method, method_identity, option_errors, options_identity, parse_options
from sparsecache.methods.vanilla import Vanilla
from sparsecache.options import show
from sparsecache.runner.calibration import Calibrations, calibrate
from sparsecache.runner.settings import Settings
from sparsecache.versions import tokenizing_versions

if TYPE_CHECKING:
    from sparsecache.engine.general.engine import GeneralEngine
    from sparsecache.engine.general.model import CachedModel
    from sparsecache.engine.reference import TransformersEngine

_OTHER_TEXT = "Name another file with -o calibration_file, of about 2,000 tokens."


class LoadedModel(NamedTuple):
    """The weights of a checkpoint on their devices, and what else a decoder needs of it."""

    architecture: Architecture
    weights: Weights
    rope: Rope


class RunContext:
    """The checkpoint, method, device, dtype and prompts of one run.

    The constructor raises UsageError for settings that do not fit: the method's options, the device, the window, the
    checkpoint's format, family, model_type or attention.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.model: Model = find_model(settings.model)
        self._set_method()
        # With workers, each finds its own GPUs.
        self.device = torch.device(settings.device) if settings.on_ray else find_device(settings.device)
        self.devices = (
            [self.device]
            if settings.on_ray
            else find_devices(self.device, settings.gpus_per_worker, "--gpus_per_worker")
        )
        folder = checkpoint_folder(self.model, settings.offline)
        self.checkpoint = Checkpoint(folder, settings.allow_pickle)
        self.window = self._window()
        self.calibration_text: str | None = None
        self._calibration_ids: list[int] = []
        self._calibrations: Calibrations | None = None
        self._served_layers: tuple[int, int] | None = None  # layers that the method serves, all layers
        self._one_slot_reason: str | None = None  # why prompts are decoded one at a time, whatever --batch_size says
        self._check_model_type()
        self.checkpoint.check_format(settings.engine)
        self._check_dtype()
        self.checkpoint.check_vocabulary()
        self._check_chat()
        if settings.engine == "sparsecache":
            self._check_family()
        self._check_method()

    def with_method(self, settings: Settings) -> "RunContext":
        """Returns the context of a run whose settings differ only in method, options and name.

        It shares the checkpoint, the prompts and calibrations with this one. Raises UsageError for options that do not
        fit the method or the checkpoint.
        """
        if self._calibrations is None:
            self._calibrations = {}
        self.prompter.wrapper  # noqa: B018 (made once for all)
        other = copy.copy(self)
        other.settings = settings
        other._set_method()
        other._check_method()
        return other

    def _set_method(self) -> None:
        """Makes the method, and its identity at once: files that it read may change while it decodes."""
        settings = self.settings
        self.options: dict[str, Any] = parse_options(settings.method, settings.options)
        self.method = self.make_method()
        self._method_identity = {
            "method": method_identity(settings.method),
            "options": options_identity(settings.method, self.options),
        }

    def make_method(self) -> CacheMethod:
        """Returns a new instance of the method; subclasses may override it."""
        return make_method(self.settings.method, self.options)

    @property
    def checkpoint_location(self) -> str:
        """The hub id of the checkpoint, or its absolute path."""
        return self.model.hub or os.path.abspath(self.checkpoint.path)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and cache."""
        return DTYPES[self.dtype_name]

    @property
    def dtype_name(self) -> str:
        """The name of the dtype of weights and cache."""
        if self.settings.dtype != "auto":
            return self.settings.dtype
        in_fp8 = self.checkpoint.is_fp8 and self.settings.engine == "sparsecache"
        own = "fp8" if in_fp8 else str(self.checkpoint.dtype).removeprefix("torch.")
        return (self.model.dtype or own) if self.device.type == "cuda" else "float32"

    @property
    def slots(self) -> int:
        """The number of sequences decoded together at most."""
        return self.settings.slots(self.device.type)

    @property
    def chat(self) -> str:
        """The chat wrapper (wrapping.Wrapper): from --chat, else the model's table, else the tokenizer."""
        for stated in (self.settings.chat, self.model.chat):
            if stated is not None:
                return stated
        return "template" if self.checkpoint.tokenizer.chat_template else "none"

    @cached_property
    def prompter(self) -> Prompter:
        """Returns the builder of this run's prompts."""
        return Prompter(
            tokenizer=self.checkpoint.tokenizer,
            window=self.window,
            max_length=self.settings.max_length or self.model.max_length,
            chat=self.chat,
            chat_template_args=tuple(sorted(self.model.chat_template_args.items())),
        )

    def check_ruler_length(self, task: Task) -> None:
        """Raises UsageError for a task of RULER that is longer than the window."""
        if task.length is not None and task.length > self.window:
            raise UsageError(
                f"--ruler_length {task.length} is longer than the window of {self.window} tokens. Pass at most "
                f"--ruler_length {self.window}, or a larger --window if the checkpoint has one."
            )

    def check_lengths(self, task: Task) -> None:
        """Raises UsageError if the window leaves no tokens for a prompt of this dataset, or fewer than --max_length."""
        capacity, wanted = self.prompter.capacity(task), self.settings.max_length
        if wanted is not None and wanted > capacity and task.length is None:
            raise UsageError(
                f"--max_length {wanted} is too long: of the window of {self.window} tokens, {task.name} leaves "
                f"{capacity} for the raw prompt, after {task.max_new_tokens} new tokens and the chat wrapper. Pass at "
                f"most --max_length {capacity}, or a larger --window."
            )

    def stop_ids(self, task: Task) -> tuple[int, ...]:
        """Returns the token ids that end a prediction of this dataset."""
        newline = self.checkpoint.tokenizer.encode("\n", add_special_tokens=False)[-1:] if task.newline_stop else []
        return tuple(sorted({*self.checkpoint.stop_ids, *newline}))

    def decode(self, token_ids: list[int]) -> str:
        """Returns the text of new tokens, without special tokens other than `<think>` and `</think>`."""
        parts: list[str] = []
        start = 0
        for at, token_id in enumerate(token_ids):
            if token_id in self._reasoning_marks:
                parts += [self._decode(token_ids[start:at]), self._reasoning_marks[token_id]]
                start = at + 1
        return "".join([*parts, self._decode(token_ids[start:])])

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self.checkpoint.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    @cached_property
    def _reasoning_marks(self) -> dict[int, str]:
        """The ids of the marks of reasoning that are special tokens, which decoding would leave out."""
        vocabulary = self.checkpoint.tokenizer.get_vocab()
        marks = {vocabulary[mark]: mark for mark in (START, END) if mark in vocabulary}
        return {token_id: mark for token_id, mark in marks.items() if not self._decode([token_id])}

    def fetch_weights(self) -> None:
        """Downloads weights that are on the hub and not cached. Raises UsageError if that fails."""
        checkpoint_folder(self.model, self.settings.offline, weights=True, allow_pickle=self.settings.allow_pickle)

    def check_weights(self) -> None:
        """Compares the stored weights with the configuration; reads no data. Raises UsageError if they differ."""
        ours = self.settings.engine == "sparsecache"
        self.checkpoint.check_weights(self._architecture() if ours else None)

    def engine(self, max_rows: int) -> Engine:
        """Loads and returns the engine, with at most `max_rows` slots. Raises UsageError if the weights do not fit."""
        if self.settings.engine == "transformers":
            self.check_weights()  # our own loader compares them by itself
            return self._transformers_engine(self.method, min(self.slots, max_rows))
        return self.generator(Decoder(*self.load_model(), self.method), max_rows)

    def load_model(self) -> LoadedModel:
        """Reads the weights. Raises UsageError if they do not fit the devices."""
        architecture = self._architecture()
        try:
            weights = self.checkpoint.load(architecture, self.devices, self.dtype)
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"The weights of {self.checkpoint.path} in {self.dtype_name} do not fit "
                f"{' and '.join(map(str, self.devices))}: {one_line(error)} Choose another --device, a smaller --dtype "
                f"or more --gpus_per_worker."
            ) from error
        return LoadedModel(architecture, weights, Rope(self.checkpoint.config, self.device))

    def generator(self, decoder: Decoder, max_rows: int) -> Generator:
        """Calibrates the method of this context, which the decoder has; returns the engine over the decoder."""
        self._calibrate(self.method, decoder)
        return Generator(decoder, min(self.slots, max_rows))

    def _calibrate(self, method: CacheMethod, decoder: "Decoder | CachedModel") -> None:
        if self.calibration_text is not None:
            self._check_calibration(decoder.shape)
            token_ids = self._calibration_ids[: self.window]
            weights = self.checkpoint.fingerprint + (" in fp8" if self.dtype_name == "fp8" else "")
            calibrate(method, decoder, token_ids, weights, self._calibrations)

    def reference(self) -> "TransformersEngine | GeneralEngine":
        """Loads and returns transformers with the same checkpoint, method and options, to compare with."""
        return self._transformers_engine(self.make_method(), 1)

    def _transformers_engine(self, method: CacheMethod, slots: int) -> "TransformersEngine | GeneralEngine":
        """Loads the general engine with at most `slots` slots; for vanilla, transformers' own generate.

        Raises UsageError for a model that the method's caches cannot serve.
        """
        from sparsecache.engine.general.engine import GeneralEngine
        from sparsecache.engine.general.model import CachedModel
        from sparsecache.engine.reference import TransformersEngine

        path, config = self.checkpoint.path, self.checkpoint.config
        engine = TransformersEngine.load(path, self.devices, self.dtype, self.settings.allow_pickle, config)
        if isinstance(method, Vanilla) and not method.offload:
            self._one_slot_reason = "transformers' own generate decodes it"
            return engine
        model = CachedModel(engine.model, method, self.window)
        with option_errors(self.settings.method):
            method.check(model.shape)
        self._calibrate(method, model)
        model.check()
        self._served_layers, self._one_slot_reason = (model.shape.layers, model.num_layers), model.one_slot_reason
        return GeneralEngine(model, slots)

    def identity(self) -> dict[str, Any]:
        """Returns what rows of one file must share, besides data and tasks."""
        return {
            "checkpoint": self.checkpoint.fingerprint,
            **self._method_identity,
            "engine": self.settings.engine,
            "dtype": self.dtype_name,
            "window": self.window,
            "max_length": self.prompter.max_length,
            "chat": self.chat,
            "chat_template_args": dict(self.prompter.chat_template_args),
            "chat_wrapper": self.prompter.wrapper.text,
            "chat_clock": CLOCK.date().isoformat(),
            "probe_ids_sha256": self.prompter.wrapper.probe_sha256(),
            **tokenizing_versions(),
            "stop_ids": self.checkpoint.stop_ids,
            "calibration_sha256": self.calibration_text and hashlib.sha256(self.calibration_text.encode()).hexdigest(),
        }

    def model_record(self) -> dict[str, Any]:
        """Returns the entry of the checkpoint in run.json."""
        model = self.model
        return {
            "name": model.name,
            "path": os.path.abspath(self.checkpoint.path),
            "hub": model.hub,
            "table": model.table,
            "format": "huggingface" if self.checkpoint.gguf is None else "gguf",
            "quantization": self.checkpoint.gguf and self.checkpoint.gguf.quantization,
            "model_type": self.checkpoint.model_type,
            "stop_tokens": self._stop_tokens(),
            "note": model.note,
        }

    def describe(self) -> Iterator[str]:
        """Yields the lines that describe the run before its first row."""
        table = f"settings of [{self.model.table}]" if self.model.table else "no table in configs/models.toml"
        chat = {"template": "the tokenizer's template", "none": "none"}.get(self.chat, repr(self.chat))
        if self.prompter.wrapper.content_is_list:
            chat += ", which renders content as a list of parts"
        stop_tokens = [f"{token} ({i})" for token, i in zip(self._stop_tokens(), self.checkpoint.stop_ids, strict=True)]
        options = ", ".join(f"{key}={show(value)}" for key, value in self.options.items())
        yield f"checkpoint  {self.checkpoint.path} ({self.checkpoint.model_type}, {table})"
        devices = " and ".join(map(str, self.devices))
        yield f"decoding    {self.settings.method} ({options or 'no options'}), {self.dtype_name} on {devices}"
        length = self.prompter.max_length
        long = "longer prompts" if length is None else f"prompts of more than {length} tokens (max_length)"
        yield f"prompts     window {self.window} tokens; {long} are cut in the middle"
        yield f"chat        {chat}; stop tokens: {', '.join(stop_tokens) or 'none'}"

    def describe_loaded(self) -> Iterator[str]:
        """Yields lines about the layers that the method serves, and a batch size that has no effect."""
        served, layers = self._served_layers or (0, 0)
        if served < layers:
            yield (
                f"layers      {served} of {layers} have full attention: the method and `kept` are about these, counted "
                f"from 0; the others keep transformers' own cache"
            )
        if self._one_slot_reason is not None and self.slots > 1:
            yield f"prompts     decoded one at a time, since {self._one_slot_reason}"

    def warnings(self) -> Iterator[str]:
        """Yields warnings to show before the first row."""
        yield from getattr(self.checkpoint.tokenizer, "notes", ())
        looks_instructed = any(mark in self.model.name.lower() for mark in ("chat", "instruct", "-it"))
        if self.chat == "none" and looks_instructed:
            yield (
                f"{self.model.name} looks instruction-tuned but has no chat template, so prompts are not wrapped; "
                f"pass --chat, or give it a table with `chat` in configs/models.toml."
            )
        if not self.checkpoint.stop_ids:
            yield "the checkpoint names no end-of-text token, so every prediction ends by length."

    def _architecture(self) -> Architecture:
        return load_family(self.checkpoint.model_type).architecture(self.checkpoint.config)

    def _stop_tokens(self) -> list[str]:
        tokens: list[str] = self.checkpoint.tokenizer.convert_ids_to_tokens(self.checkpoint.stop_ids)
        return tokens

    def _window(self) -> int:
        """Tokens for prompt and answer: --window, else the model's table, else the checkpoint's own."""
        wanted, longest = self.settings.window, self.model.window or self.checkpoint.window
        if wanted is not None and longest is not None and wanted > longest:
            raise UsageError(
                f"--window {wanted} is beyond the {longest} tokens that {self.checkpoint.path} is made for. Pass at "
                f"most --window {longest}. For a checkpoint that can do more, state `window` in a table of "
                f"configs/models.toml, or RoPE scaling in its config.json."
            )
        if wanted is None and longest is None:
            raise UsageError(
                f"{self.checkpoint.config_source} states no max_position_embeddings. Pass --window, the number of "
                f"tokens for prompt and answer together."
            )
        window = wanted or longest
        assert window is not None
        return window

    def _check_chat(self) -> None:
        if self.chat == "template" and not self.checkpoint.tokenizer.chat_template:
            source = "--chat" if self.settings.chat else f"`chat` of [{self.model.table}] in configs/models.toml"
            raise UsageError(
                f'{self.checkpoint.path} has no chat template, but {source} is "template". Pass --chat none, or a text '
                f"with {{prompt}} in it."
            )

    def _check_dtype(self) -> None:
        if self.dtype_name != "fp8":
            return
        if self.settings.engine == "transformers" or self.settings.verify:
            raise UsageError(
                "--dtype fp8 needs --engine sparsecache without --verify, since transformers does not decode in fp8. "
                "Use --dtype bfloat16."
            )
        if not self.settings.on_ray:  # on Ray, each worker checks its own devices
            check_fp8_devices(self.devices)

    def _check_model_type(self) -> None:
        wanted, found = self.settings.model_type or self.model.model_type, self.checkpoint.model_type
        if wanted is not None and wanted != found:
            raise UsageError(
                f"{self.checkpoint.config_source} says model_type {found!r}, not {wanted!r}. "
                f"Pass --model_type {found}, leave it out, or correct configs/models.toml."
            )

    def _check_method(self) -> None:
        """Compares the method with the model's shape, and reads its calibration text."""
        # The shape of another engine's model is known once it is loaded.
        shape = self._architecture().shape if self.settings.engine == "sparsecache" else None
        with option_errors(self.settings.method):
            if shape is not None:
                self.method.check(shape)
                if self.method.uses_rope:
                    Rope(self.checkpoint.config, torch.device("cpu")).rotation_of()
            self.calibration_text = self.method.calibration_text()
        if self.calibration_text is None:
            return
        if not self.calibration_text.strip():
            raise UsageError(f"The calibration text is empty. {_OTHER_TEXT}")
        self._calibration_ids = self.checkpoint.tokenizer(self.calibration_text, verbose=False)["input_ids"]
        if shape is not None:
            self._check_calibration(shape)

    def _check_calibration(self, shape: Shape) -> None:
        """Raises UsageError for a calibration text of fewer tokens than a head has channels.

        It does not determine a matrix over these channels.
        """
        if len(self._calibration_ids) < shape.head_dim:
            raise UsageError(
                f"The calibration text has {len(self._calibration_ids)} tokens, fewer than the {shape.head_dim} "
                f"channels of a head of this model. {_OTHER_TEXT}"
            )

    def _check_family(self) -> None:
        family = load_family(self.checkpoint.model_type)
        shape = family.architecture(self.checkpoint.config).shape
        if self.settings.gpus_per_worker > shape.layers:
            raise UsageError(
                f"--gpus_per_worker {self.settings.gpus_per_worker} is more than the {shape.layers} layers of "
                f"{self.checkpoint.path}."
            )
        try:
            Rope(self.checkpoint.config, torch.device("cpu"))
        except UsageError:
            raise
        except Exception as error:  # values of config.json that no rotation can be made of
            raise UsageError(
                f"{self.checkpoint.config_source} states RoPE parameters that cannot be used: {one_line(error)}"
            ) from error
        sliding = family.sliding_window(self.checkpoint.config)
        if sliding is not None and sliding < self.window:
            raise UsageError(
                f"{self.checkpoint.path} has layers with sliding-window attention over {sliding} tokens, which are "
                f"not decoded here beyond that window. Keep within it with --window {sliding}, or use "
                f"--engine transformers."
            )
