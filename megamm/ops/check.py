"""Checks of an op's arguments, with both sides in the message. They read shapes and types only: no synchronisation."""

from torch import Tensor


def check_same_kind(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all have the dtype and the device of the first."""
    (first, x), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != x.dtype:
            raise ValueError(f"{op}: {name} is {dtype_name(tensor)}, {first} is {dtype_name(x)}; they must be the same")
    check_same_device(op, **tensors)


def check_same_device(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all are on the device of the first."""
    (first, x), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} is on {x.device}; they must be the same")


def dtype_name(tensor: Tensor) -> str:
    """The name of a dtype, such as "float32"."""
    return str(tensor.dtype).removeprefix("torch.")
