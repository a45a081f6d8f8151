"""The datasets of LongBench, LongBench-E, LongBench v2 and RULER as tasks (configs/*.toml), and tasks of one's own."""

import hashlib
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sparsecache.configs import read_tables, read_tables_of
from sparsecache.errors import UsageError, short

CATEGORIES = ("single_doc_qa", "multi_doc_qa", "summarization", "few_shot", "synthetic", "code")
LANGUAGES = ("en", "zh", "code")
BENCHMARKS = ("longbench", "longbench_v2", "ruler")
OWN = "own"  # the group of the tasks that are in no benchmark
ROW_FIELDS = ("input", "context", "answers", "length", "dataset", "language", "all_classes", "_id")
CHOICE_FIELDS = ("choice_A", "choice_B", "choice_C", "choice_D")
_CATEGORIES = (*CATEGORIES, "multiple_choice", "ruler", OWN)
_FILE, _RULER_FILE = "configs/datasets.toml", "configs/ruler.toml"
_RULER_ROWS = 500  # per task and length, as published
_GROUPS = ("all", "en", "zh", *CATEGORIES, "ruler", OWN)


@dataclass(frozen=True)
class Task:
    """One dataset and its rules in the protocol. configs/datasets.toml documents the fields.

    length: tokens of prompt and answer together, of a task of RULER; its prompts are never cut. source: the file that
    defines it, for messages.
    """

    name: str
    template: str
    max_new_tokens: int
    metric: str
    category: str = OWN
    language: str = "en"
    rows: int | None = None
    rows_e: int | None = None
    chat: bool = True
    first_line: bool = False
    newline_stop: bool = False
    join_halves: bool = False
    benchmark: str = BENCHMARKS[0]
    answer_prefix: str = ""
    answer_template: str = ""
    answer_max_new_tokens: int | None = None
    length: int | None = None
    source: str = field(default=_FILE, compare=False)

    def __post_init__(self) -> None:
        for name, allowed in (("category", _CATEGORIES), ("language", LANGUAGES), ("benchmark", BENCHMARKS)):
            if (value := getattr(self, name)) not in allowed:
                raise self._error(f"{name} {value!r} is none of {', '.join(allowed)}")
        for name in ("template", "metric", "answer_prefix", "answer_template"):
            if not isinstance(value := getattr(self, name), str):
                raise self._error(f"{name} is {value!r}; it must be a text")
        for name in ("chat", "first_line", "newline_stop", "join_halves"):
            if not isinstance(value := getattr(self, name), bool):
                raise self._error(f"{name} is {value!r}; it must be true or false")
        for name in ("max_new_tokens", "answer_max_new_tokens", "rows", "rows_e"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise self._error(f"{name} is {value!r}; it must be a whole number, 1 or more")
        if bool(self.answer_template) != (self.answer_max_new_tokens is not None):
            raise self._error("answer_template and answer_max_new_tokens belong together; give both or neither")
        if not self._check_fields("template", self.template, self.row_fields):
            raise self._error("the template uses no field of a row, as in {input}, so all prompts would be the same")
        self._check_fields("answer_prefix", self.answer_prefix, self.row_fields)
        asked = self._check_fields("answer_template", self.answer_template, (*self.row_fields, "reasoning"))
        if self.answer_template and "reasoning" not in asked:
            raise self._error("the answer_template must use {reasoning}")

    def _check_fields(self, what: str, text: str, known: tuple[str, ...]) -> set[str]:
        """Return the fields that a template uses. Raises UsageError for others, and for formats such as {input:>9}."""
        try:
            parts = [part for part in string.Formatter().parse(text) if part[1] is not None]
            used = {str(name) for _, name, _, _ in parts}
        except ValueError as error:
            raise self._error(f"the {what} is not a valid str.format template ({error})") from error
        if unknown := used - set(known):
            raise self._error(
                f"the {what} uses {', '.join(sorted(name or '{}' for name in unknown))}; a row has {', '.join(known)}"
            )
        if formatted := sorted({str(name) for _, name, spec, conversion in parts if spec or conversion}):
            raise self._error(f"the {what} formats {', '.join(formatted)}; a field is its name alone, as in {{input}}")
        return used

    def _error(self, problem: str) -> UsageError:
        return UsageError(f"{self.source} [{self.name}]: {problem}.")

    @property
    def row_fields(self) -> tuple[str, ...]:
        """The fields of a row that the template may use."""
        more = {"longbench_v2": CHOICE_FIELDS, "ruler": ("examples",)}
        return (*ROW_FIELDS, *more.get(self.benchmark, ()))

    @property
    def group(self) -> str:
        """The datasets that share a mean with this one: those of its benchmark, or `own`.

        The two variants of LongBench v2 have the same questions, so each has a mean of its own.
        """
        if self.rows is None:
            return OWN
        return self.name if self.benchmark == "longbench_v2" else self.benchmark

    @property
    def template_sha256(self) -> str:
        """The SHA-256 of the UTF-8 bytes of the template and the other texts of prompts, as recorded in run.json."""
        parts = [self.template, *filter(None, (self.answer_prefix, self.answer_template))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def short_answer(self) -> bool:
        """Whether answers are short, so that a prediction that ends by length is suspicious."""
        return self.category not in ("summarization", "code", "ruler", OWN)

    @property
    def base_name(self) -> str:
        """The name without the length of a task of RULER."""
        return self.name if self.length is None else self.name.removesuffix(f"_{self.length}")

    def file_stem(self, e: bool) -> str:
        """Return the stem of data and prediction files: `qasper`, `qasper_e` for LongBench-E."""
        return f"{self.name}_e" if e else self.name

    def published_rows(self, e: bool) -> int | None:
        """Return the published number of rows; None outside LongBench (or LongBench-E)."""
        return self.rows_e if e else self.rows


def load_tasks() -> dict[str, Task]:
    """Return the tasks of configs/datasets.toml by dataset name, in file order.

    Raises UsageError for an invalid file.
    """
    return _make_tasks(read_tables("datasets.toml"), _FILE, {"category", "language"})


def ruler_names() -> list[str]:
    """Return the names of RULER's tasks without their lengths, in file order."""
    return list(read_tables("ruler.toml"))


def load_ruler_tasks(lengths: Iterable[int]) -> dict[str, Task]:
    """Return the tasks of configs/ruler.toml in each length, by names such as `vt_4096`.

    Raises UsageError for an invalid file.
    """
    more = {"category": "ruler", "benchmark": "ruler", "rows": _RULER_ROWS}
    return {
        f"{name}_{length}": replace(task, name=f"{name}_{length}", length=length)
        for length in lengths
        for name, task in _make_tasks(
            {name: {**table, **more} for name, table in read_tables("ruler.toml").items()}, _RULER_FILE, set()
        ).items()
    }


def find_ruler_tasks(stems: Iterable[str]) -> dict[str, Task]:
    """Return the tasks of RULER among names such as `vt_4096`, by name; other names are left out."""
    parts = {stem: stem.rpartition("_") for stem in stems}
    found = {stem: int(end) for stem, (name, _, end) in parts.items() if name in ruler_names() and _is_length(end)}
    tasks = load_ruler_tasks(sorted(set(found.values())))
    return {name: task for name, task in tasks.items() if name in found}


def _is_length(text: str) -> bool:
    return re.fullmatch("[1-9][0-9]{0,8}", text) is not None


def load_own_tasks(path: Path | None) -> dict[str, Task]:
    """Return the tasks of a file of one's own (`--tasks`) by name; none for None.

    Raises UsageError for an invalid file.
    """
    return {} if path is None else make_own_tasks(read_tables_of(path), str(path))


def make_own_tasks(tables: dict[str, Any], source: str) -> dict[str, Task]:
    """Return tasks of one's own from tables in the form of configs/datasets.toml.

    `category` and `language` may be absent. Raises UsageError for an invalid table, for one with the fields of
    published datasets, and for a name that is taken or unfit for a file.
    """
    taken = {stem for task in load_tasks().values() for stem in (task.name, f"{task.name}_e")} | set(_GROUPS)
    taken |= {*ruler_names(), *find_ruler_tasks(tables)}
    for name, table in tables.items():
        if name in taken:
            raise UsageError(f"{source} [{short(name)}]: the name is taken by a dataset or group. Choose another name.")
        if not re.fullmatch(r"\w[\w.-]{0,99}", name):
            raise UsageError(
                f"{source} [{short(name)}]: the name must be 1 to 100 letters, digits, dots, dashes and underscores, "
                f"since it names files."
            )
        if not isinstance(table, dict):
            raise UsageError(f"{source}: {name} is not a table of a task.")
        if published := {"rows", "rows_e", "benchmark"} & table.keys():
            raise UsageError(
                f"{source} [{name}]: {', '.join(sorted(published))} describes published datasets only. Remove it."
            )
    return _make_tasks(tables, source, set())


def own_table(task: Task) -> dict[str, Any]:
    """Return the table of an own task, as `make_own_tasks` reads it."""
    left_out = ("name", "source", "rows", "rows_e", "benchmark", "length")
    return {each.name: getattr(task, each.name) for each in fields(Task) if each.name not in left_out}


def _make_tasks(tables: dict[str, dict[str, Any]], source: str, also_needed: set[str]) -> dict[str, Task]:
    known = {each.name for each in fields(Task)} - {"name", "source", "length"}
    needed = {each.name for each in fields(Task) if each.default is MISSING} - {"name"} | also_needed
    for name, table in tables.items():
        for problem, keys in (("unknown fields", table.keys() - known), ("no", needed - table.keys())):
            if keys:
                raise UsageError(f"{source} [{name}] has {problem} {', '.join(sorted(keys))}.")
    return {name: Task(name=name, source=source, **table) for name, table in tables.items()}


def select_tasks(
    names: str, e: bool = False, own: dict[str, Task] | None = None, ruler_lengths: Sequence[int] = (4096,)
) -> list[Task]:
    """Return the tasks of a `--datasets` value: comma-separated datasets, `all`, `en`, `zh`, categories, `own`.

    own: the tasks of `--tasks`; the group `own` is all of these. ruler_lengths: the lengths of RULER's tasks; the group
    `ruler` is all of these. The other groups hold the datasets of LongBench only, or of LongBench-E with `e`; `en`
    includes code. Other datasets must be named. Raises UsageError for an unknown name, and for a dataset that
    LongBench-E lacks.
    """
    own = own or {}
    ruler = load_ruler_tasks(ruler_lengths)
    tasks = load_tasks() | ruler | own
    available = {name: task for name, task in tasks.items() if not e or task.rows_e is not None}
    chosen: dict[str, Task] = {}
    for name in (part.strip() for part in names.split(",")):
        group = _group(name, available)
        if name in available:
            chosen[name] = available[name]
        elif group:
            chosen.update(group)
        elif name == OWN and own and not e:
            chosen.update(own)
        elif (name == "ruler" or name in ruler_names()) and not e:
            chosen.update({key: task for key, task in ruler.items() if name in ("ruler", task.base_name)})
        elif name in ("ruler", *ruler_names(), *tasks) or _group(name, tasks) or (name == OWN and own):
            raise UsageError(f"{name!r} is not part of LongBench-E. Its datasets: {', '.join(available)}.")
        else:
            datasets = [key for key in available if key not in ruler]
            raise UsageError(
                f"There is no dataset {short(name)!r}. Datasets: {', '.join(datasets)}. "
                f"Groups: all, en, zh, {', '.join(CATEGORIES)}, own for the tasks of --tasks, and ruler for "
                f"{', '.join(ruler_names())}."
            )
    return [task for name, task in tasks.items() if name in chosen]


def _group(name: str, tasks: dict[str, Task]) -> dict[str, Task]:
    languages = {"all": LANGUAGES, "en": ("en", "code"), "zh": ("zh",)}.get(name, ())
    return {
        key: task
        for key, task in tasks.items()
        if task.group == "longbench" and (task.language in languages or task.category == name)
    }
