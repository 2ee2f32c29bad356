"""Networks that a loss uses but does not train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

__all__ = ["FrozenNetworks"]


class FrozenNetworks(nn.Module):
    """Moves networks together with the module that contains this one, and keeps them out of that module's state.

    The networks are frozen and in evaluation mode. They are neither parameters nor part of a state_dict, because
    their weights never change and may exceed those of the trained network. Their keys in a loaded state_dict, which
    earlier versions wrote, are ignored.

    Args:
        networks: networks to hold, without copies; duplicates count once.
    """

    def __init__(self, networks: Iterable[nn.Module]):
        super().__init__()
        self._networks = tuple(dict.fromkeys(networks))  # a tuple, which nn.Module does not register
        for network in self._networks:
            network.requires_grad_(False)
        self.eval()

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._networks)

    def __len__(self) -> int:
        return len(self._networks)

    def train(self, mode: bool = True) -> FrozenNetworks:
        """Keeps the networks in evaluation mode, whatever `mode` is."""
        for network in self._networks:
            network.eval()
        return super().train(False)

    def _apply(self, fn, recurse=True):  # behind .to, .cuda, .half and the like
        for network in self._networks:
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args) -> None:
        """Ignores the keys below this module."""
