"""Devices that this machine has not: tensors that say they lie on one, compute on the CPU, and refuse to be mixed.

An operation on tensors of two devices raises as it does on GPUs, with the same exceptions: copies, one-element
tensors of the CPU, and indices of the CPU. ``FakeDevices`` must be entered, so that functions without a tensor argument
(``torch.arange(device=...)``) are seen too.
"""

import types

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["FIRST", "SECOND", "FakeDevices"]

# torch keeps this type for devices it does not know; indexing asks for a guard, which has nothing to do here.
FIRST, SECOND = torch.device("privateuseone", 0), torch.device("privateuseone", 1)
torch._C._acc.register_python_privateuseone_device_guard(torch.utils.backend_registration._DummyDeviceGuard())
torch._register_device_module(
    "privateuseone",
    types.SimpleNamespace(_lazy_init=lambda: None, _is_in_bad_fork=lambda: False, manual_seed_all=lambda seed: None),
)
aten = torch.ops.aten
_COPIES = {aten._to_copy.default, aten.copy_.default}
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class _OnDevice(Tensor):
    """``inner``, a tensor of the CPU, under the name of another device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, classes, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class FakeDevices(TorchDispatchMode):
    """While entered, tensors may be made on and moved to ``FIRST`` and ``SECOND``."""

    def __init__(self):
        super().__init__()
        self.moved_bytes = {}  # by (from, to), of copies between devices

    def __enter__(self):
        self._lifting = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(data, device=...) is made on the CPU and copied
        return super().__enter__()

    def __exit__(self, *raised):
        torch._C._set_only_lift_cpu_tensors(self._lifting)
        return super().__exit__(*raised)

    def __torch_dispatch__(self, function, classes, args=(), kwargs=None):
        return _run(function, args, kwargs or {}, self.moved_bytes)


def _run(function, args, kwargs, moved=None):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    target = kwargs.get("device") or (tensors[0].device if tensors else torch.device("cpu"))
    target = torch.device(target)
    if function in _COPIES:
        source = tensors[-1]
        if moved is not None and source.device != target:
            route = (str(source.device), str(target))
            moved[route] = moved.get(route, 0) + source.numel() * source.element_size()
    else:
        target = _one_device(function, args, tensors, target)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": None if kwargs["device"] is None else torch.device("cpu")}
    inner = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, _OnDevice)}
    out = function(*tree_map(_inside, args), **tree_map(_inside, kwargs))

    def named(leaf):
        if not isinstance(leaf, Tensor) or target.type != FIRST.type:
            return leaf
        return inner.get(id(leaf)) if id(leaf) in inner else _OnDevice(leaf, target)

    return tree_map(named, out)


def _inside(leaf):
    return leaf.inner if isinstance(leaf, _OnDevice) else leaf


def _one_device(function, args, tensors: list[Tensor], target: torch.device) -> torch.device:
    if function in _INDEXED:
        index = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
        tensors = [tensor for tensor in tensors if all(tensor is not other for other in index)]
    devices = {tensor.device for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
    if len(devices) > 1:
        names = sorted(map(str, devices))
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, but found {names}")
    return devices.pop() if devices else target
