"""Tensors that stand for those of devices which are not here."""

import torch


class OnAccelerator(torch.Tensor):
    """Stands for a number on an accelerator, for which reading it has to wait."""

    device = torch.device("cuda")

    def __int__(self):
        raise AssertionError("this waits for the accelerator")


class OnMps(torch.Tensor):
    """Stands for a tensor on a device without 64 bits."""

    device = torch.device("mps")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        found = super().__torch_function__(function, types, args, kwargs)
        return found.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else found
