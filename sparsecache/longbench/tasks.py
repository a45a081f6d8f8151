"""The datasets of LongBench and LongBench-E as tasks, read from configs/datasets.toml."""

import hashlib
import string
from dataclasses import MISSING, dataclass, fields

from sparsecache.configs import read_tables
from sparsecache.errors import UsageError

CATEGORIES = ("single_doc_qa", "multi_doc_qa", "summarization", "few_shot", "synthetic", "code")
LANGUAGES = ("en", "zh", "code")
ROW_FIELDS = ("input", "context", "answers", "length", "dataset", "language", "all_classes", "_id")
_FILE = "configs/datasets.toml"


@dataclass(frozen=True)
class Task:
    """One dataset and its rules in the protocol. configs/datasets.toml documents the fields."""

    name: str
    template: str
    max_new_tokens: int
    metric: str
    category: str
    language: str
    rows: int | None = None
    rows_e: int | None = None
    chat: bool = True
    first_line: bool = False
    newline_stop: bool = False

    def __post_init__(self) -> None:
        if self.category not in CATEGORIES:
            raise UsageError(f"{_FILE} [{self.name}]: category {self.category!r} is none of {', '.join(CATEGORIES)}.")
        if self.language not in LANGUAGES:
            raise UsageError(f"{_FILE} [{self.name}]: language {self.language!r} is none of {', '.join(LANGUAGES)}.")
        for name in ("max_new_tokens", "rows", "rows_e"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{_FILE} [{self.name}]: {name} is {value!r}; it must be a whole number, 1 or more.")
        try:
            used = {name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None}
        except ValueError as error:
            raise UsageError(
                f"{_FILE} [{self.name}]: the template is not a valid str.format template ({error})."
            ) from error
        if unknown := used - set(ROW_FIELDS):
            raise UsageError(
                f"{_FILE} [{self.name}]: the template uses {', '.join(sorted(name or '{}' for name in unknown))}; "
                f"a row has {', '.join(ROW_FIELDS)}."
            )

    @property
    def template_sha256(self) -> str:
        """The SHA-256 of the template's UTF-8 bytes, as recorded in run.json."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    @property
    def short_answer(self) -> bool:
        """Whether answers are short, so that a prediction that ends by length is suspicious."""
        return self.category not in ("summarization", "code")

    def file_stem(self, e: bool) -> str:
        """Return the stem of data and prediction files: `qasper`, `qasper_e` for LongBench-E."""
        return f"{self.name}_e" if e else self.name

    def published_rows(self, e: bool) -> int | None:
        """Return the published number of rows; None outside LongBench (or LongBench-E)."""
        return self.rows_e if e else self.rows


def load_tasks() -> dict[str, Task]:
    """Return all tasks by dataset name, in file order.

    Raises UsageError for an invalid configs/datasets.toml.
    """
    known = {field.name for field in fields(Task)} - {"name"}
    needed = {field.name for field in fields(Task) if field.default is MISSING} - {"name"}
    for name, table in read_tables("datasets.toml").items():
        for problem, keys in (("unknown fields", table.keys() - known), ("no", needed - table.keys())):
            if keys:
                raise UsageError(f"{_FILE} [{name}] has {problem} {', '.join(sorted(keys))}.")
    return {name: Task(name=name, **table) for name, table in read_tables("datasets.toml").items()}


def select_tasks(names: str, e: bool = False) -> list[Task]:
    """Return the tasks of a `--datasets` value: comma-separated datasets, `all`, `en`, `zh`, categories.

    The groups hold the datasets of LongBench only, or of LongBench-E with `e`; `en` includes code. Other datasets must
    be named. Raises UsageError for an unknown name, and for a dataset that LongBench-E lacks.
    """
    tasks = load_tasks()
    available = {name: task for name, task in tasks.items() if not e or task.rows_e is not None}
    chosen: dict[str, Task] = {}
    for name in (part.strip() for part in names.split(",")):
        group = _group(name, available)
        if name in available:
            chosen[name] = available[name]
        elif group:
            chosen.update(group)
        elif name in tasks or _group(name, tasks):
            raise UsageError(f"{name!r} is not part of LongBench-E. Its datasets: {', '.join(available)}.")
        else:
            raise UsageError(
                f"There is no dataset {name!r}. Datasets: {', '.join(available)}. "
                f"Groups: all, en, zh, {', '.join(CATEGORIES)}."
            )
    return [task for name, task in tasks.items() if name in chosen]


def _group(name: str, tasks: dict[str, Task]) -> dict[str, Task]:
    languages = {"all": LANGUAGES, "en": ("en", "code"), "zh": ("zh",)}.get(name, ())
    return {
        key: task
        for key, task in tasks.items()
        if task.rows is not None and (task.language in languages or task.category == name)
    }
