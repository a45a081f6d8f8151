"""The settings of a run and their defaults, with the checks that need neither torch nor a checkpoint."""

import hashlib
import re
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from sparsecache.engine.model_registry import DTYPES, find_model
from sparsecache.errors import UsageError, short
from sparsecache.longbench.tasks import OWN, Task, load_own_tasks, select_tasks
from sparsecache.methods import check_method_name, short_name
from sparsecache.ruler.texts import RulerTexts, check_ruler_size
from sparsecache.synthetic.source import check_sample_size

ENGINES = ("sparsecache", "transformers")
GPU_SLOTS = 16  # what decode kernels take at once; fewer where memory does not suffice
RULER_LENGTHS = range(512, 2**20 + 1)
_LONGEST_NAME = 120  # characters; file systems allow 255 bytes
DTYPE_CHOICES = ("auto", *DTYPES)
MINIMA = {
    **dict.fromkeys(("sample_rows", "ruler_rows", "max_new_tokens", "max_samples", "batch_size"), 1),
    **dict.fromkeys(("workers", "gpus_per_worker"), 1),
    "max_length": 2,
    "window": 8,
    "verify": 0,
}
"""The smallest allowed value of each setting that is a count, on the command line and in Python."""


@dataclass(frozen=True)
class Settings:
    """The settings of one run: the fields are the command line's options, with their defaults."""

    model: str = "demo"
    datasets: str | None = None
    tasks: Path | None = None
    max_new_tokens: int | None = None
    method: str = "vanilla"
    options: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    model_name: str | None = None
    e: bool = False
    data: str | None = None
    data_revision: str | None = None
    sample_rows: int = 2
    sample_tokens: int = 2048
    sample_seed: int = 0
    ruler_length: str = "4096"
    ruler_rows: int = 20
    ruler_seed: int = 42
    ruler_essays: Path | None = None
    ruler_squad: Path | None = None
    ruler_hotpotqa: Path | None = None
    offline: bool = False
    max_samples: int | None = None
    max_length: int | None = None
    window: int | None = None
    batch_size: int | None = None
    workers: int = 1
    ray_address: str | None = None
    gpus_per_worker: int = 1
    dtype: str = "auto"
    device: str = "auto"
    engine: str = "sparsecache"
    model_type: str | None = None
    chat: str | None = None
    allow_pickle: bool = False
    verify: int = 0
    quiet: bool = False
    overwrite: bool = False
    pred_dir: Path = Path("pred")

    @property
    def run_name(self) -> str:
        """Return the folder of the run below the model's: `name`, or the method and the options that were given."""
        return self.name or default_run_name(self.method, self.options)

    @property
    def run_folder(self) -> Path:
        """Return the folder of the run: `pred_dir`, the model's name, the run's name."""
        return self.pred_dir / (self.model_name or find_model(self.model).name) / self.run_name

    def wanted_tasks(self) -> list[Task]:
        """Return the tasks of `datasets`, by default all of LongBench, or those of `tasks`, in their own limits.

        Raises UsageError for an unknown dataset and for an invalid file of tasks.
        """
        own = load_own_tasks(self.tasks)
        default = "all" if self.tasks is None else OWN
        return select_tasks(default if self.datasets is None else self.datasets, self.e, own, self.ruler_lengths)

    @property
    def ruler_lengths(self) -> list[int]:
        """Return the lengths of RULER's tasks, in ascending order. Raises UsageError for an invalid `ruler_length`."""
        parts = [part.strip() for part in self.ruler_length.split(",")]
        if not all(re.fullmatch("[0-9]{3,7}", part) and int(part) in RULER_LENGTHS for part in parts):
            raise UsageError(
                f"--ruler_length {short(self.ruler_length)} must be a number of tokens from {RULER_LENGTHS[0]} to "
                f"{RULER_LENGTHS[-1]}, or several of them separated by commas."
            )
        return sorted(set(map(int, parts)))

    @property
    def ruler_texts(self) -> RulerTexts:
        """Return the texts that RULER's tasks need."""
        return RulerTexts(self.ruler_essays, self.ruler_squad, self.ruler_hotpotqa)

    def limited(self, task: Task) -> Task:
        """Return a task with `max_new_tokens` for its limit of new tokens, if that is given."""
        return task if self.max_new_tokens is None else replace(task, max_new_tokens=self.max_new_tokens)

    @property
    def data_source(self) -> str:
        """Return where rows come from: `data`, else the model's table, else the hub."""
        return self.data if self.data is not None else find_model(self.model).data or "hub"

    def slots(self, device_type: str) -> int:
        """Return the most sequences decoded together: `batch_size`, or the engine's default on this type of device."""
        if self.batch_size is not None:
            return self.batch_size
        return GPU_SLOTS if device_type == "cuda" else 1

    @property
    def on_ray(self) -> bool:
        """Return whether workers of a Ray cluster decode instead of this process."""
        return self.workers > 1 or self.ray_address is not None

    def check(self) -> None:
        """Raise UsageError for a name that does not exist or values that exclude each other.

        Reads configs/ and file names only: nothing heavy is imported and no checkpoint is opened.
        """
        tasks = self.wanted_tasks()
        own = [task.name for task in tasks if task.group == OWN]
        if own and self.data_source in ("hub", "sample"):
            raise UsageError(
                f"--data {self.data_source} has no rows of {', '.join(own)}. Name the rows with --data: a .jsonl file, "
                f"or a folder of <dataset>.jsonl files."
            )
        if ruler := [task for task in tasks if task.benchmark == "ruler"]:
            check_ruler_size(self.ruler_rows, self.ruler_lengths[-1])
            self.ruler_texts.check(ruler)
        check_method_name(self.method)
        find_model(self.model)
        for option, name in (("--name", self.name), ("--model_name", self.model_name)):
            if name is not None and (name in ("", ".", "..") or "/" in name or not name.isprintable()):
                raise UsageError(f"{option} {short(name)!r} must be the name of one folder, without a slash.")
        if self.data_source == "sample":
            check_sample_size(self.sample_rows, self.sample_tokens)
        if self.engine == "transformers" and self.verify:
            raise UsageError(
                "--verify compares --engine sparsecache with transformers. Leave out --engine transformers or --verify."
            )
        if self.gpus_per_worker > 1 and self.device == "cpu":
            raise UsageError(
                f"--gpus_per_worker {self.gpus_per_worker} splits a model over GPUs. Leave out --device cpu."
            )
        if self.on_ray:
            self._check_ray()

    def _check_ray(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(
                f"--device {self.device!r} cannot be given with --workers or --ray_address, where Ray gives every "
                f"worker GPUs of its own. Allowed: auto, cpu, cuda."
            )
        if self.verify:
            raise UsageError(
                "--verify compares within one process. Run it first without --workers and --ray_address, then rerun "
                "with them under the same --name."
            )
        host, _, port = (self.ray_address or "auto").rpartition(":")
        if self.ray_address not in (None, "auto") and not (host and "/" not in host and port.isdecimal()):
            raise UsageError(
                f"--ray_address {self.ray_address!r} is no address of a cluster. Give HOST:PORT of its head, as "
                f"`ray start --head` prints it, or auto for the one that runs on this machine."
            )
        check_for_ray()


def default_run_name(method: str, options: dict[str, str]) -> str:
    """Return the method and its options by name, as in `infinigen-budget=256`, as the name of one folder.

    Characters that are not safe in file names become `_`. A long name is cut and ends in a hash of the whole.
    """
    name = "-".join([short_name(method), *(f"{key}={value}" for key, value in sorted(options.items()))])
    safe = re.sub(r"[^\w.,=+-]", "_", name, flags=re.ASCII)
    if len(safe) > _LONGEST_NAME:
        safe = f"{safe[:_LONGEST_NAME]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"
    return safe


def check_for_ray() -> None:
    """Raise UsageError, saying how to install it, where there is no Ray."""
    if find_spec("ray") is None or find_spec("psutil") is None:
        raise UsageError(
            "--workers (and --ray_address) need Ray. Install it: pip install -c constraints.txt -e '.[ray]'"
        )
