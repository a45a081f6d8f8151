"""What a run's cache costs: its memory, and the share of past tokens that the whole model attends to."""

from dataclasses import dataclass

from sparsecache.longbench.score_types import RunScore


@dataclass(frozen=True)
class CacheCosts:
    """The cache of a run; None where it is not recorded.

    nbytes: allocated per token that a sequence has room for, over all layers, on devices and host. host_nbytes: of them
    in host memory. full_nbytes: of the full cache. layers: of the model. dense_layers: those of them that attend to
    everything.
    """

    nbytes: float | None
    host_nbytes: float | None
    full_nbytes: float | None
    layers: int | None
    dense_layers: int | None

    def model_share(self, kept: float | None) -> float | None:
        """Return the share of past tokens attended to over all layers; kept: that of the sparse layers."""
        if self.layers is None or self.dense_layers is None or self.dense_layers > self.layers:
            return None
        if self.dense_layers == self.layers:
            return 1.0
        return None if kept is None else (self.dense_layers + (self.layers - self.dense_layers) * kept) / self.layers


def cache_costs(run: RunScore) -> CacheCosts:
    """Return the costs that run.json and the rows of a run record. A run whose rows report no `kept` is all dense."""
    record = run.run.cache
    parts = [dataset.kept for dataset in run.datasets if dataset.kept is not None]
    dense = frozenset().union(*(part.dense_layers for part in parts))
    layers = record.layers
    both = None if record.token_nbytes is None else record.token_nbytes + (record.host_token_nbytes or 0)
    return CacheCosts(
        nbytes=both,
        host_nbytes=record.host_token_nbytes,
        full_nbytes=record.full_token_nbytes,
        layers=layers,
        dense_layers=layers if not parts else next(iter(dense)) if len(dense) == 1 else None,
    )
