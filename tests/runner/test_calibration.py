"""Calibration: made once, saved, restored by later runs, and refused if it does not fit.

In one file because every test looks at the same calibration file.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparsecache.runner.calibration
from longbench_pred import main
from sparsecache.cache import Shape
from sparsecache.engine.decoder import Decoder
from sparsecache.engine.loading import Checkpoint
from sparsecache.errors import UsageError
from sparsecache.files import cache_folder
from sparsecache.methods.infinigen import InfiniGen
from sparsecache.runner.calibration import MOST_TOKENS, calibrate
from sparsecache.runner.context import RunContext
from sparsecache.runner.settings import Settings
from sparsecache.testing.random_checkpoint import make_random_checkpoint

SHAPE = Shape(layers=2, heads=4, kv_heads=2, head_dim=8)
TEXT = list(range(50))


class _Decoder:
    """Shows queries that depend on the text, and counts how often it is asked to."""

    def __init__(self, shape: Shape = SHAPE, dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype, self.device = shape, dtype, torch.device("cpu")
        self.texts: list[list[int]] = []
        self.method: Any = None

    def calibrate(self, token_ids: Tensor, on_layer: Callable[[int], None]) -> None:
        self.texts.append(token_ids.tolist())
        generator = torch.Generator().manual_seed(int(token_ids.sum()))
        for layer in range(self.shape.layers):
            size = (self.shape.kv_heads, self.shape.heads // self.shape.kv_heads, 30, self.shape.head_dim)
            q = torch.randn(size, generator=generator)
            self.method.calibrate(layer, q, torch.randn(size[0], *size[2:], generator=generator))
            on_layer(1)


def _calibrate(
    text: list[int] = TEXT, fingerprint: str = "model", *, kind: type[InfiniGen] = InfiniGen, **decoder: Any
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """What a fresh method has learned, and the texts that the decoder was shown for it."""
    method, made = kind(), _Decoder(**decoder)
    made.method = method
    calibrate(method, made, text, fingerprint)  # type: ignore[arg-type]
    return method.calibration(), made.texts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The path of a cache folder that does not exist yet."""
    monkeypatch.setenv("SPARSECACHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files(cache) -> Callable[[], list[Path]]:
    """The kept files; nothing else may lie beside them."""

    def find() -> list[Path]:
        found = sorted((cache / "calibration").iterdir())
        assert all(file.suffix == ".safetensors" and file.is_file() for file in found)
        return found

    return find


def test_it_is_made_once_and_used_by_the_second_run(files) -> None:
    first, texts = _calibrate()
    assert texts == [TEXT] and len(files()) == 1
    written = files()[0].stat().st_mtime_ns
    second, texts = _calibrate()
    assert texts == []
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert [file.stat().st_mtime_ns for file in files()] == [written]


def test_the_first_2048_tokens_are_shown_and_the_others_do_not_matter(files) -> None:
    long = list(range(3000))
    _, texts = _calibrate(long)
    assert texts == [long[:2048]] and MOST_TOKENS == 2048
    assert _calibrate(long[:2500])[1] == []
    assert _calibrate(long[:2047])[1] == [long[:2047]]
    assert len(files()) == 2


class _Raised(InfiniGen):
    calibration_version = InfiniGen.calibration_version + 1


class _Other(InfiniGen):
    pass


@pytest.mark.parametrize(
    "other",
    [
        {"text": [*TEXT, 7]},
        {"text": [*TEXT[:-1], 50]},
        {"fingerprint": "another model"},
        {"dtype": torch.bfloat16},
        {"kind": _Raised},
        {"kind": _Other},
    ],
    ids=["more text", "another token", "another checkpoint", "another dtype", "another version", "another method"],
)
def test_what_it_is_made_of_makes_another_file(other, files) -> None:
    _calibrate()
    _, texts = _calibrate(**other)
    assert len(texts) == 1 and len(files()) == 2
    assert _calibrate(**other)[1] == _calibrate()[1] == []


def _truncate(file: Path, nbytes: int) -> None:
    file.write_bytes(file.read_bytes()[:nbytes])


def _another_key(file: Path) -> None:
    save_file(load_file(file), file, metadata={"key": "0" * 64})


def _no_key(file: Path) -> None:
    save_file(load_file(file), file)


def _change(change: Callable[[Tensor], Tensor], name: str = "skewing_matrix") -> Callable[[Path], None]:
    """Another tensor under the right key."""

    def spoil(file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        save_file({name: change(load_file(file)["skewing_matrix"]).contiguous()}, file, metadata=metadata)

    return spoil


def _spoil_one(matrices: Tensor) -> Tensor:
    matrices[-1, -1, 3, 4] += 0.1
    return matrices


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.write_bytes(b"no tensors at all"), "header"),
        (lambda file: file.write_bytes(b""), "header"),
        (lambda file: _truncate(file, 20), "header"),
        (lambda file: _truncate(file, -50), "not fully covered"),
        (_another_key, "belongs to another checkpoint, text or version"),
        (_no_key, "belongs to another checkpoint, text or version"),
        (_change(lambda m: m[:1]), r"\(1, 2, 8, 8\); this model needs \(2, 2, 8, 8\)"),
        (_change(lambda m: m[:, :1]), r"\(2, 1, 8, 8\); this model needs \(2, 2, 8, 8\)"),
        (_change(lambda m: m[..., :4]), r"\(2, 2, 8, 4\); this model needs"),
        (_change(lambda m: m, name="other"), "shape None"),
        (_change(lambda m: 2 * m), "not orthogonal"),
        (_change(_spoil_one), "not orthogonal"),
        (_change(lambda m: m * torch.nan), r"it holds NaN or infinite values \(skewing_matrix\)"),
        (_change(lambda m: m / 0), "it holds NaN or infinite values"),
        (_change(lambda m: (m * 2).double()), "not orthogonal"),
    ],
    ids=["garbage", "empty", "cut in the header", "cut at the end", "another key", "no key", "fewer layers",
         "fewer heads", "fewer columns", "another name", "scaled", "one entry", "nan", "infinite", "scaled, float64"],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_and_left_alone(spoil, said, files) -> None:
    _calibrate()
    (file,) = files()
    spoil(file)
    content = file.read_bytes()
    with pytest.raises(UsageError, match=said) as refused:
        _calibrate()
    told = str(refused.value)
    assert told.startswith(f"The calibration in {file} cannot be used: ")
    assert told.endswith(". Delete the file; the next run calibrates again.")
    assert file.read_bytes() == content and files() == [file]
    file.unlink()
    assert _calibrate()[1] == [TEXT]


def test_a_named_pipe_is_refused_without_waiting_for_its_writer(files) -> None:
    _calibrate()
    (file,) = files()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UsageError, match=r"named pipe, not a regular file\. Delete the file"):
        _calibrate()


def test_a_file_that_may_not_be_read_is_refused(files, monkeypatch) -> None:
    _calibrate()

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sparsecache.runner.calibration, "safe_open", refuse)
    with pytest.raises(UsageError, match=r"Permission denied\. Delete the file"):
        _calibrate()


def _in_place_of_the_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file where the folder should be")


def _full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(sparsecache.runner.calibration, "save_file", fail)


def _read_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)


def _not_to_be_searched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", refuse)
    _read_only(cache, monkeypatch)


@pytest.mark.parametrize("spoil", [_in_place_of_the_folder, _full_disk, _read_only, _not_to_be_searched])
def test_a_cache_folder_that_cannot_be_written_only_warns(spoil, cache, tmp_path, monkeypatch, capsys) -> None:
    expected, _ = _calibrate()
    monkeypatch.setenv("SPARSECACHE_CACHE", str(cache := tmp_path / "other"))
    for _ in range(2):
        with monkeypatch.context() as patch:
            spoil(cache, patch)
            found, texts = _calibrate()
        assert texts == [TEXT], "every run makes it anew"
        assert torch.equal(found["skewing_matrix"], expected["skewing_matrix"])
        told = capsys.readouterr()
        assert f"Warning: the calibration could not be written to {cache}" in told.err and told.out == ""
    assert not list(tmp_path.rglob("other/**/*.safetensors"))


def test_the_cache_folder_is_the_one_that_is_named(monkeypatch, tmp_path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SPARSECACHE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "sparsecache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "sparsecache"


# Whole runs.


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint with a sparse layer."""
    return make_random_checkpoint(
        tmp_path_factory.mktemp("calibrated") / "tiny",
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
    )


@pytest.fixture
def predict(tiny, tmp_path) -> Callable[..., Result]:
    """One row of the sample by InfiniGen with half of the channels, into a run of its own."""

    def run(name: str, *options: str) -> Result:
        return CliRunner().invoke(
            main,
            [
                *("--model", str(tiny), "--datasets", "qasper", "--data", "sample", "--sample_rows", "1"),
                *("--sample_tokens", "256", "--device", "cpu", "--pred_dir", str(tmp_path / "pred"), "--name", name),
                *("--method", "infinigen", "-o", "dense_layers=1", "-o", "partial_weight_ratio=0.5"),
                *(part for option in options for part in ("-o", option)),
            ],
        )

    return run


@pytest.fixture
def shown(monkeypatch) -> list[int]:
    """How many tokens the decoder was calibrated with, each time."""
    found: list[int] = []
    real = Decoder.calibrate

    def note(self: Decoder, token_ids: Tensor, on_layer: Callable[[int], None]) -> None:
        found.append(len(token_ids))
        real(self, token_ids, on_layer)

    monkeypatch.setattr(Decoder, "calibrate", note)
    return found


def test_a_second_run_does_not_calibrate_and_gives_the_same_row(predict, shown, files, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The lighthouse keeper counted the ships. " * 9, encoding="utf-8")
    results = [predict(name, f"calibration_file={text}") for name in ("first", "second")]
    assert [result.exit_code for result in results] == [0, 0], results[0].output
    assert len(shown) == 1 and len(files()) == 1
    first, second = (
        json.loads((tmp_path / "pred" / "tiny" / name / "qasper.jsonl").read_text()) for name in ("first", "second")
    )
    for row in (first, second):
        del row["prefill_s"], row["decode_s"]
    assert first == second and 0 < first["kept"] < 1
    assert predict("bundled").exit_code == 0
    assert len(shown) == 2 and len(files()) == 2


def test_without_skew_no_text_is_read_nor_shown(predict, shown, cache, tmp_path) -> None:
    told = predict("plain", "skew=false", f"calibration_file={tmp_path / 'missing.txt'}")
    assert told.exit_code == 0, told.output
    assert shown == [] and not cache.exists()


def test_a_kept_file_that_does_not_fit_ends_the_run_with_a_sentence(predict, files, tmp_path) -> None:
    assert predict("first").exit_code == 0
    (file,) = files()
    file.write_bytes(b"garbage")
    told = predict("second")
    assert told.exit_code == 2
    assert f"The calibration in {file} cannot be used" in told.stderr
    assert "Delete the file; the next run calibrates again." in told.stderr and "Traceback" not in told.stderr


@pytest.mark.parametrize("content", [None, b"caf\xe9", "folder", "pipe", b"\xff\xfe\x00"])
def test_a_text_that_cannot_be_read_is_refused_before_weights_are_read(content, predict, tmp_path, monkeypatch) -> None:
    path = tmp_path / "text.txt"
    if content == "folder":
        path.mkdir()
    elif content == "pipe":
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "load", refuse)
    told = predict("refused", f"calibration_file={path}")
    assert told.exit_code == 2
    assert f"calibration_file={path} cannot be read as UTF-8 text" in told.stderr
    assert not (tmp_path / "pred" / "tiny" / "refused").exists()


@pytest.mark.parametrize("text", ["", " \n\t"], ids=repr)
def test_an_empty_text_is_refused_before_anything_is_loaded(text, tiny, tmp_path) -> None:
    (tmp_path / "text.txt").write_text(text)
    options = {"dense_layers": "1", "partial_weight_ratio": "0.5", "calibration_file": str(tmp_path / "text.txt")}
    with pytest.raises(UsageError, match="calibration text is empty"):
        RunContext(Settings(model=str(tiny), method="infinigen", options=options, device="cpu"))


@pytest.mark.parametrize(
    ("method", "engine"), [("infinigen", "sparsecache"), ("duoattention", "sparsecache"), ("loki", "transformers")]
)
def test_a_text_of_fewer_tokens_than_a_head_has_channels_is_refused(method, engine, tiny, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("x")
    options = {"calibration_file": str(tmp_path / "text.txt")}
    if method == "infinigen":
        options["partial_weight_ratio"] = "0.5"
    settings = Settings(model=str(tiny), method=method, options=options, device="cpu", engine=engine)
    with pytest.raises(UsageError, match=r"text has 2 tokens, fewer than the 16 channels of a head of this model\."):
        RunContext(settings).engine(1)


def test_the_text_is_part_of_what_a_run_is(tiny, tmp_path) -> None:
    def identity(text: str) -> dict[str, Any]:
        (tmp_path / "text.txt").write_text(text)
        options = {"calibration_file": str(tmp_path / "text.txt"), "partial_weight_ratio": "0.5"}
        return RunContext(Settings(model=str(tiny), method="infinigen", options=options, device="cpu")).identity()

    first, second, third = (identity(f"{text} " * 20) for text in ("one text", "another", "one text"))
    assert first == third and first != second
    assert first["calibration_sha256"] != second["calibration_sha256"]
