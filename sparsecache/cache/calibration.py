"""The text that methods calibrate with."""

from pathlib import Path

_BUNDLED = Path(__file__).parent / "calibration.txt"


def read_calibration_text(path: str | None) -> str:
    """Return the text of a file, the option `calibration_file`; None: the bundled one. Raises ValueError."""
    file = _BUNDLED if path is None else Path(path)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"calibration_file={file} cannot be read as UTF-8 text ({error}).") from error
