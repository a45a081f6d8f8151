"""Bounds of the channels of keys, per page of tokens, as in Quest and ArkVale. In plain torch."""

import torch
from torch import Tensor


def channel_bounds(keys: Tensor, is_used: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest value of each channel in pages: [.., D] each.

    keys: [.., page, D]; is_used: [.., page] bool, the tokens that a page has so far, at least one. mean: instead of the
    extremes, return their centre less, and plus, the mean distance of the keys from it.
    """
    is_free = ~is_used[..., None]
    lowest, highest = keys.masked_fill(is_free, torch.inf).amin(-2), keys.masked_fill(is_free, -torch.inf).amax(-2)
    if not mean:
        return lowest, highest
    centre = (lowest.float() + highest.float()) / 2
    distances = (keys - centre.unsqueeze(-2)).abs_().masked_fill_(is_free, 0)
    distance = distances.sum(-2) / is_used.sum(-1, keepdim=True)
    return centre - distance, centre + distance


def store_page_bounds(k: Tensor, lowest: Tensor, highest: Tensor, page: int, mean: bool) -> None:
    """Store the bounds of a prompt's pages, as `channel_bounds` gives them, in the first rows of lowest and highest.

    k: [G, L, D]; lowest, highest: [G, P, D]; page: tokens in a page. The last page may be incomplete.
    """
    length = k.shape[1]
    whole = length // page
    if whole:  # views, without a mask: a prompt's keys are read, and not copied
        keys = k[:, : whole * page].view(len(k), whole, page, -1)
        lowest[:, :whole], highest[:, :whole] = _bounds_of_whole_pages(keys, mean)
    if whole * page < length:
        lowest[:, whole], highest[:, whole] = _bounds_of_whole_pages(k[:, whole * page :], mean)


def _bounds_of_whole_pages(keys: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """Return `channel_bounds` of pages [.., page, D] of which all tokens are used."""
    lowest, highest = keys.amin(-2), keys.amax(-2)
    if not mean:
        return lowest, highest
    centre = (lowest.float() + highest.float()) / 2
    distance = (keys - centre.unsqueeze(-2)).abs_().sum(-2) / keys.shape[-2]
    return centre - distance, centre + distance
