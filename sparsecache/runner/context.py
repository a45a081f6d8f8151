"""The context of a run: its checkpoint, method, device, dtype and prompts, known before weights are read.

It is made of the settings in this order: model, method, devices, checkpoint, window, dtype, calibration text. It then
gives the prompts, the identity of the run, and the engine, which reads the weights.
"""

import copy
import os
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sparsecache.cache import CacheMethod
from sparsecache.engine.base import Engine
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.devices import find_device, find_devices
from sparsecache.engine.families import load_family
from sparsecache.engine.families.base import Architecture
from sparsecache.engine.generator import Generator
from sparsecache.engine.loading import DTYPES, Checkpoint
from sparsecache.engine.model_registry import Model, checkpoint_folder, find_model
from sparsecache.engine.rope import Rope
from sparsecache.engine.weights import Weights
from sparsecache.errors import UsageError, one_line
from sparsecache.longbench.prompts import Prompter
from sparsecache.longbench.tasks import Task
from sparsecache.longbench.wrapping import CLOCK
from sparsecache.methods import make_method, method_identity, option_errors, options_identity, parse_options
from sparsecache.methods.vanilla import Vanilla
from sparsecache.runner.calibration import Calibrations
from sparsecache.runner.calibration_text import CalibrationText
from sparsecache.runner.checks import check_chat, check_dtype, check_family, check_model_type, find_window
from sparsecache.runner.detokenizer import Detokenizer
from sparsecache.runner.settings import Settings
from sparsecache.versions import tokenizing_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsecache.engine.general import CachedModel, GeneralEngine
    from sparsecache.engine.reference import TransformersEngine


class LoadedModel(NamedTuple):
    """The weights of a checkpoint on their devices, and what else a decoder needs of it."""

    architecture: Architecture
    weights: Weights
    rope: Rope


class RunContext:
    """The checkpoint, method, device, dtype and prompts of one run.

    The constructor raises UsageError for settings that do not fit: the method's options, the device, the window, the
    checkpoint's format, family, model_type or attention.

    served_layers: how many layers the method serves, and how many there are. one_slot_reason: why prompts are decoded
    one at a time, whatever --batch_size says. Both are None until an engine over transformers is loaded.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.model: Model = find_model(settings.model)
        self._set_method()
        # With workers, each finds its own GPUs.
        self.device = torch.device(settings.device) if settings.on_ray else find_device(settings.device)
        self.devices = [self.device]
        if not settings.on_ray:
            self.devices = find_devices(self.device, settings.gpus_per_worker, "--gpus_per_worker")
        folder = checkpoint_folder(self.model, settings.offline)
        self.checkpoint = Checkpoint(folder, settings.allow_pickle)
        self.window = find_window(settings, self.model, self.checkpoint)
        self.served_layers: tuple[int, int] | None = None
        self.one_slot_reason: str | None = None
        self._calibrations: Calibrations | None = None
        check_model_type(settings, self.model, self.checkpoint)
        self.checkpoint.check_format(settings.engine)
        check_dtype(settings, self.dtype_name, self.devices)
        self.checkpoint.check_vocabulary()
        check_chat(settings, self.model, self.checkpoint, self.chat)
        if settings.engine == "sparsecache":
            check_family(settings, self.checkpoint, self.window)
        self._check_method()

    def with_method(self, settings: Settings) -> "RunContext":
        """Return the context of a run whose settings differ only in method, options and name.

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
        """Make the method, and its identity at once: files that it read may change while it decodes."""
        settings = self.settings
        self.options: dict[str, Any] = parse_options(settings.method, settings.options)
        self.method = self.make_method()
        self._method_identity = {
            "method": method_identity(settings.method),
            "options": options_identity(settings.method, self.options),
        }

    def make_method(self) -> CacheMethod:
        """Return a new instance of the method; subclasses may override it."""
        return make_method(self.settings.method, self.options)

    @property
    def checkpoint_location(self) -> str:
        """Return the hub id of the checkpoint, or its absolute path."""
        return self.model.hub or os.path.abspath(self.checkpoint.path)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of weights and cache."""
        return DTYPES[self.dtype_name]

    @property
    def dtype_name(self) -> str:
        """Return the name of the dtype of weights and cache."""
        if self.settings.dtype != "auto":
            return self.settings.dtype
        in_fp8 = self.checkpoint.is_fp8 and self.settings.engine == "sparsecache"
        own = "fp8" if in_fp8 else str(self.checkpoint.dtype).removeprefix("torch.")
        return (self.model.dtype or own) if self.device.type == "cuda" else "float32"

    @property
    def slots(self) -> int:
        """Return the number of sequences decoded together at most."""
        return self.settings.slots(self.device.type)

    @property
    def chat(self) -> str:
        """Return the chat wrapper (wrapping.Wrapper): from --chat, else the model's table, else the tokenizer."""
        for stated in (self.settings.chat, self.model.chat):
            if stated is not None:
                return stated
        return "template" if self.checkpoint.tokenizer.chat_template else "none"

    @cached_property
    def prompter(self) -> Prompter:
        """Return the builder of this run's prompts."""
        return Prompter(
            tokenizer=self.checkpoint.tokenizer,
            window=self.window,
            max_length=self.settings.max_length or self.model.max_length,
            chat=self.chat,
            chat_template_args=tuple(sorted(self.model.chat_template_args.items())),
        )

    @cached_property
    def detokenizer(self) -> Detokenizer:
        """Return the decoder of new tokens."""
        return Detokenizer(self.checkpoint.tokenizer)

    def stop_ids(self, task: Task) -> tuple[int, ...]:
        """Return the token ids that end a prediction of this dataset."""
        newline = self.checkpoint.tokenizer.encode("\n", add_special_tokens=False)[-1:] if task.newline_stop else []
        return tuple(sorted({*self.checkpoint.stop_ids, *newline}))

    @property
    def stop_tokens(self) -> list[str]:
        """Return the tokens that end a prediction of any dataset."""
        tokens: list[str] = self.checkpoint.tokenizer.convert_ids_to_tokens(self.checkpoint.stop_ids)
        return tokens

    def fetch_weights(self) -> None:
        """Download weights that are on the hub and not cached. Raises UsageError if that fails."""
        checkpoint_folder(self.model, self.settings.offline, weights=True, allow_pickle=self.settings.allow_pickle)

    def check_weights(self) -> None:
        """Compare the stored weights with the configuration, without reading data. Raises UsageError if they differ."""
        self.checkpoint.check_weights(self._architecture() if self.settings.engine == "sparsecache" else None)

    def engine(self, max_rows: int) -> Engine:
        """Load and return the engine, with at most `max_rows` slots. Raises UsageError if the weights do not fit."""
        if self.settings.engine == "transformers":
            self.check_weights()  # our own loader compares them by itself
            return self._transformers_engine(self.method, min(self.slots, max_rows))
        return self.generator(Decoder(*self.load_model(), self.method), max_rows)

    def load_model(self) -> LoadedModel:
        """Read the weights. Raises UsageError if they do not fit the devices."""
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
        """Calibrate the method of this context, which the decoder has; return the engine over the decoder."""
        self._calibrate(self.method, decoder)
        return Generator(decoder, min(self.slots, max_rows))

    def _calibrate(self, method: CacheMethod, decoder: "Decoder | CachedModel") -> None:
        """Calibrate a method that has a calibration text."""
        if self.calibration_text is not None:
            fingerprint = self.checkpoint.fingerprint + (" in fp8" if self.dtype_name == "fp8" else "")
            self.calibration_text.calibrate(method, decoder, self.window, fingerprint, self._calibrations)

    def reference(self) -> "TransformersEngine | GeneralEngine":
        """Load and return transformers with the same checkpoint, method and options, to compare with."""
        return self._transformers_engine(self.make_method(), 1)

    def _transformers_engine(self, method: CacheMethod, slots: int) -> "TransformersEngine | GeneralEngine":
        """Load the general engine; for vanilla with one slot, or that no cache can serve, transformers' own generate.

        Raises UsageError for a model that another method's caches cannot serve.
        """
        from sparsecache.engine.reference import TransformersEngine

        path, config = self.checkpoint.path, self.checkpoint.config
        engine = TransformersEngine.load(path, self.devices, self.dtype, self.settings.allow_pickle, config)
        if not isinstance(method, Vanilla) or method.offload:
            return self._general_engine(engine.model, method, slots)
        if slots > 1:
            own_attention = engine.model.config._attn_implementation
            with suppress(UsageError):
                general = self._general_engine(engine.model, method, slots)
                if self.one_slot_reason is None:
                    return general
            engine.model.set_attn_implementation(own_attention)
        self.served_layers, self.one_slot_reason = None, "transformers' own generate decodes it"
        return engine

    def _general_engine(self, pretrained: "PreTrainedModel", method: CacheMethod, slots: int) -> "GeneralEngine":
        """Return the engine over a transformers model. Raises UsageError if the caches cannot serve it."""
        from sparsecache.engine.general import CachedModel, GeneralEngine

        model = CachedModel(pretrained, method, self.window)
        with option_errors(self.settings.method):
            method.check(model.shape)
        self._calibrate(method, model)
        model.check()
        self.served_layers, self.one_slot_reason = (model.shape.layers, model.num_layers), model.one_slot_reason
        return GeneralEngine(model, slots)

    def identity(self) -> dict[str, Any]:
        """Return what rows of one file must share, besides data and tasks."""
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
            "calibration_sha256": self.calibration_text and self.calibration_text.sha256,
        }

    def model_record(self) -> dict[str, Any]:
        """Return the entry of the checkpoint in run.json."""
        return {
            "name": self.model.name,
            "path": os.path.abspath(self.checkpoint.path),
            "hub": self.model.hub,
            "table": self.model.table,
            "format": "huggingface" if self.checkpoint.gguf is None else "gguf",
            "quantization": self.checkpoint.gguf and self.checkpoint.gguf.quantization,
            "model_type": self.checkpoint.model_type,
            "stop_tokens": self.stop_tokens,
            "note": self.model.note,
        }

    def _architecture(self) -> Architecture:
        return load_family(self.checkpoint.model_type).architecture(self.checkpoint.config)

    def _check_method(self) -> None:
        """Compare the method with the model's shape, and read its calibration text."""
        # The shape of another engine's model is known once it is loaded.
        shape = self._architecture().shape if self.settings.engine == "sparsecache" else None
        with option_errors(self.settings.method):
            if shape is not None:
                self.method.check(shape)
                if self.method.uses_rope:
                    Rope(self.checkpoint.config, torch.device("cpu")).rotation_of()
            text = self.method.calibration_text()
        self.calibration_text = None if text is None else CalibrationText.tokenize(text, self.checkpoint.tokenizer)
        if self.calibration_text is not None and shape is not None:
            self.calibration_text.check_length(shape)
