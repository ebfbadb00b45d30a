"""A device ``sim`` that computes on the CPU, and refuses what a GPU would.

An operation on a tensor of the device and a CPU tensor fails, and so does a CPU generator. Tensors
of the device hold a CPU tensor, on which every operation is run. To be imported in a process of its
own: torch takes one further device per process.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "sim"
aten = torch.ops.aten
# Operations that copy from one device to another.
COPIES = {aten.copy_.default, aten._to_copy.default}
# Operations whose indices may be on the CPU.
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Backend:
    """The functions of ``torch.cuda`` that torch asks a device for."""

    is_available = is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    set_device = manual_seed_all = staticmethod(lambda _: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


_setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
# Autocast leaves all operations as they are.
AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
AUTOCAST.fallback(torch.library.fallthrough_kernel)
# torch.tensor(..., device="sim") makes a CPU tensor first, whose copy the mode sees.
torch._C._set_only_lift_cpu_tensors(True)


class SimTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        with torch.inference_mode(mode=False):
            return torch.Tensor._make_wrapper_subclass(
                cls,
                inner.shape,
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=torch.device(NAME, 0),
            )

    def __init__(self, inner):
        self.held = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        return self.held.tolist()

    def __deepcopy__(self, memo):
        copied = SimTensor(self.held.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)


class Simulation(TorchDispatchMode):
    """Has tensors created on the device while the block runs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled() and func._can_decompose():
            # Without autograd, compound operations arrive whole.
            with self:
                return func.decompose(*args, **kwargs or {})
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Runs an operation on the CPU tensors inside."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, SimTensor)]
    target = kwargs.get("device")
    to_us = bool(ours) if target is None else torch.device(target).type == NAME
    if func is aten.copy_.default:
        to_us = isinstance(args[0], SimTensor)
    elif func is not aten._to_copy.default:
        check_devices(func, args, tensors, to_us=to_us, generator=kwargs.get("generator"))
    if to_us and target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner = tree_map(lambda leaf: getattr(leaf, "held", leaf), (args, kwargs))
    with _disable_current_modes():
        result = func(*inner[0], **inner[1])
    wrappers = {id(tensor.held): tensor for tensor in ours}

    def wrapped(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        # A tensor changed in place is returned itself.
        return (
            wrappers.get(id(leaf)) if id(leaf) in wrappers else SimTensor(leaf) if to_us else leaf
        )

    return tree_map(wrapped, result)


def check_devices(func, args, tensors, *, to_us, generator):
    """Refuses to mix devices, as CUDA does; a CPU scalar is taken."""
    theirs = [tensor for tensor in tensors if not isinstance(tensor, SimTensor) and tensor.ndim]
    if func in INDEXED and isinstance(args[0], SimTensor):
        theirs = [tensor for tensor in theirs if len(args) > 2 and tensor is args[2]]
    if to_us and theirs:
        shapes = [tuple(tensor.shape) for tensor in theirs]
        raise RuntimeError(f"{func}: tensors on {NAME} and, of shapes {shapes}, on the CPU")
    if to_us and generator is not None:
        raise RuntimeError(f"{func}: a generator of the CPU for a tensor on {NAME}")
