"""What a run is asked to do, and the checks that need no heavy import. Knows nothing of how it is done."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from sparsecache.engine.model_registry import DTYPES, find_model
from sparsecache.errors import UsageError
from sparsecache.longbench.tasks import select_tasks
from sparsecache.methods import check_method_name, short_name

ENGINES = ("sparsecache", "transformers")
GPU_SLOTS = 16  # what decode kernels take at once; fewer where memory does not suffice
DTYPE_CHOICES = ("auto", *DTYPES)


@dataclass(frozen=True)
class Settings:
    """One run; the command line's options are these fields, and these are their defaults."""

    model: str = "demo"
    datasets: str = "all"
    method: str = "vanilla"
    options: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    e: bool = False
    data: str | None = None
    data_revision: str | None = None
    sample_rows: int = 2
    sample_tokens: int = 2048
    sample_seed: int = 0
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
    overwrite: bool = False
    pred_dir: Path = Path("pred")

    @property
    def run_name(self) -> str:
        """The folder of the run below the model's: `name`, or the method's short name."""
        return self.name or short_name(self.method)

    @property
    def data_source(self) -> str:
        """Where rows come from: `data`, else what the model's table says, else the hub."""
        return self.data if self.data is not None else find_model(self.model).data or "hub"

    def slots(self, device_type: str) -> int:
        """Sequences decoded together at most: `batch_size`, or what suits our engine on a device of this type."""
        if self.batch_size is not None:
            return self.batch_size
        return GPU_SLOTS if device_type == "cuda" and self.engine == "sparsecache" else 1

    @property
    def on_ray(self) -> bool:
        """Whether workers of a Ray cluster decode, instead of this process."""
        return self.workers > 1 or self.ray_address is not None

    def check(self) -> None:
        """Raises UsageError for a name that does not exist or values that exclude each other.

        Reads configs/ and file names only: nothing heavy is imported and no checkpoint is opened.
        """
        select_tasks(self.datasets, self.e)
        check_method_name(self.method)
        find_model(self.model)
        if self.run_name in (".", "..") or "/" in self.run_name or not self.run_name.isprintable():
            raise UsageError(f"--name {self.run_name!r} must be the name of one folder, without a slash.")
        if self.engine == "transformers" and self.method != "vanilla":
            raise UsageError(f"--engine transformers decodes vanilla only, not --method {self.method}.")
        if self.engine == "transformers" and self.verify:
            raise UsageError("--verify compares with transformers, so --engine transformers has nothing to verify.")
        if self.engine == "transformers" and self.batch_size not in (None, 1):
            raise UsageError(f"--engine transformers decodes one prompt at a time, not --batch_size {self.batch_size}.")
        if self.gpus_per_worker > 1 and (self.engine == "transformers" or self.device == "cpu"):
            what = "--engine transformers" if self.engine == "transformers" else "--device cpu"
            raise UsageError(f"--gpus_per_worker {self.gpus_per_worker} splits our own engine over GPUs, not {what}.")
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
                "--verify compares within one process: run it first, without --workers and --ray_address, and go on "
                "with them under the same --name."
            )
        host, _, port = (self.ray_address or "auto").rpartition(":")
        if self.ray_address not in (None, "auto") and not (host and "/" not in host and port.isdecimal()):
            raise UsageError(
                f"--ray_address {self.ray_address!r} is no address of a cluster. Give HOST:PORT of its head, as "
                f"`ray start --head` prints it, or auto for the one that runs on this machine."
            )
        check_for_ray()


def check_for_ray() -> None:
    """Raises UsageError, saying how to install it, where there is no Ray."""
    if find_spec("ray") is None or find_spec("psutil") is None:
        raise UsageError(
            "--workers (and --ray_address) need Ray. Install it: pip install -c constraints.txt -e '.[ray]'"
        )
