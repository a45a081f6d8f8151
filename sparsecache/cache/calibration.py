"""What calibrated methods share: the text, and the check of a matrix per layer and KV head that came from a file."""

from pathlib import Path

from torch import Tensor

from sparsecache.cache.base import Shape

_BUNDLED = Path(__file__).parent / "calibration.txt"


def read_calibration_text(path: str | None) -> str:
    """Return the text of a file, the option `calibration_file`; None: the bundled one. Raises ValueError."""
    file = _BUNDLED if path is None else Path(path)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"calibration_file={file} cannot be read as UTF-8 text ({error}).") from error


def check_matrices(name: str, matrices: Tensor | None, shape: Shape) -> Tensor:
    """Return a calibration's matrices as float32: [layers, G, D, D].

    name: of the tensor in the calibration. Raises ValueError if it is missing, of another shape, or not finite.
    """
    expected = (shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim)
    if matrices is None or tuple(matrices.shape) != expected:
        found = None if matrices is None else tuple(matrices.shape)
        raise ValueError(f"its {name} has the shape {found}; this model needs {expected}.")
    if not matrices.isfinite().all():
        raise ValueError(f"its {name} has values that are not finite.")
    return matrices.float()
