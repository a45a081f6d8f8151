"""What calibrated methods share: the text, and the check of a matrix per layer and KV head that came from a file."""

from pathlib import Path

from torch import Tensor

from sparsecache.cache.base import Shape
from sparsecache.errors import UsageError
from sparsecache.files import read_file

_BUNDLED = Path(__file__).parent / "calibration.txt"
_MAX_BYTES = 2**26


def read_calibration_text(path: str | None) -> str:
    """Return the text of a file, the option `calibration_file`; None: the bundled one.

    Raises ValueError for a file that cannot be read, that is not text, or that is no regular file.
    """
    file = _BUNDLED if path is None else Path(path)
    try:
        return read_file(file, _MAX_BYTES).decode()
    except (UsageError, UnicodeDecodeError) as error:
        raise ValueError(f"calibration_file={file} cannot be read as UTF-8 text ({str(error).rstrip('.')}).") from error


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
