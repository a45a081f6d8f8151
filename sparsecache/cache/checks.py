"""Checks of options that several methods have. Each raises ValueError, in a full sentence, for a value out of range."""

_MAX_PAGE = 1024  # a page is padded to its whole size


def check_page_size(page: int) -> None:
    """Raise ValueError unless `page` is a valid page size."""
    if not 1 <= page <= _MAX_PAGE:
        raise ValueError(f"page={page} must be 1 to {_MAX_PAGE} tokens.")


def check_token_counts(**counts: int) -> None:
    """Raise ValueError unless every option, by name, is 0 tokens or more."""
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name}={count} must be 0 tokens or more.")


def check_budget_shares(**shares: float) -> None:
    """Raise ValueError unless the options, by name, are shares of the budget, at most 1 together."""
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must be a share of the budget, 0 to 1.")
    if sum(shares.values()) > 1:
        named = " and ".join(f"{name}={share}" for name, share in shares.items())
        raise ValueError(f"{named} must be at most 1 together.")
