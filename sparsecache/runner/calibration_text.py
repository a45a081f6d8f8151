"""The text that a run calibrates its method with."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsecache.cache import CacheMethod, Shape
from sparsecache.engine.decoder import Decoder
from sparsecache.errors import UsageError
from sparsecache.runner.calibration import Calibrations, calibrate

if TYPE_CHECKING:
    from sparsecache.engine.general import CachedModel

_OTHER_TEXT = "Name another file with -o calibration_file, of about 2,000 tokens."


@dataclass(frozen=True)
class CalibrationText:
    """A calibration text. token_ids: of the whole text. sha256: of its UTF-8 bytes."""

    token_ids: list[int]
    sha256: str

    @classmethod
    def tokenize(cls, text: str, tokenizer: Any) -> "CalibrationText":
        """Return the text with its tokens. Raises UsageError for an empty text."""
        if not text.strip():
            raise UsageError(f"The calibration text is empty. {_OTHER_TEXT}")
        token_ids = tokenizer(text, verbose=False)["input_ids"]
        return cls(token_ids, hashlib.sha256(text.encode()).hexdigest())

    def check_length(self, shape: Shape) -> None:
        """Raise UsageError for a text of fewer tokens than a head has channels.

        It does not determine a matrix over these channels.
        """
        if len(self.token_ids) < shape.head_dim:
            raise UsageError(
                f"The calibration text has {len(self.token_ids)} tokens, fewer than the {shape.head_dim} "
                f"channels of a head of this model. {_OTHER_TEXT}"
            )

    def calibrate(
        self,
        method: CacheMethod,
        decoder: "Decoder | CachedModel",
        window: int,
        fingerprint: str,
        known: Calibrations | None,
    ) -> None:
        """Calibrate the method with the tokens of the text that fit the window.

        fingerprint: of the weights. known: as in `calibration.calibrate`. Raises UsageError for a text that is too
        short, and as `calibration.calibrate` does.
        """
        self.check_length(decoder.shape)
        calibrate(method, decoder, self.token_ids[:window], fingerprint, known)
