"""The few functions of torch on the steady-state path: looked up once, some of them private, each with a way that does without.

And what torch has to be told and asked: that an array was written, who records, and when it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import wrapt

__all__ = [
    "Hooks",
    "NewTensor",
    "answer_compiler",
    "array_of",
    "autocast_changes",
    "autocast_is_on",
    "below_autograd",
    "empty_at",
    "empty_on",
    "guard_of",
    "hooks",
    "is_kept_by_compilers",
    "is_random_to_compilers",
    "is_transformed",
    "is_watched",
    "keep_out_of_graphs",
    "maker_of",
    "mapped_gradient_check",
    "may_have_tangents",
    "meet_torch",
    "once_flops_are_counted",
    "once_torch_is_there",
    "one_level",
    "recorder",
    "tangent_of",
    "tell_written",
]

# (shape, strides, dtype)
NewTensor: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], Any]


def _no_device() -> int:
    return -1


def _no() -> bool:
    return False


class _NoForwardMode:
    """Stands for torch.autograd.forward_ad where there is no torch."""

    _current_level = -1


@dataclass(slots=True)
class Hooks:
    """The few functions of torch on the steady-state path, bound once. Tests put stand-ins here.

    ``guard`` is the class of tensor guards; ``empty_on_current(shape, strides, dtype)`` allocates on the current GPU, which is the right
    one if ``device_count()`` is 1 or ``current_device()`` says so. torch's own compiler lives on them. Where they are missing, calls go by
    their keys and outputs come from ``Tensor.new_empty_strided``.
    """

    plain_types: frozenset[type] = frozenset()
    is_grad_enabled: Any = None
    raw_stream: Any = None
    guard: Any = None
    empty_on_current: Any = None
    current_device: Any = _no_device
    device_count: Any = None
    forward_ad: Any = _NoForwardMode
    increment_version: Any = None
    count_modes: Any = int  # dispatch modes of torch that are active in this thread
    is_compiling: Any = _no


hooks = Hooks()


def meet_torch() -> None:
    """Bind the hooks once torch is there; calls before that have no torch tensors."""
    torch = sys.modules.get("torch")
    if torch is None or hooks.plain_types or not hasattr(torch, "nn"):
        return
    private = torch._C  # the public call costs 8 us for the stream, 1.5 us more for an output
    guards: Any = getattr(getattr(private, "_dynamo", None), "guards", None)
    hooks.is_grad_enabled = torch.is_grad_enabled
    hooks.count_modes = getattr(private, "_len_torch_dispatch_stack", int)
    hooks.forward_ad, hooks.increment_version = torch.autograd.forward_ad, torch.autograd.graph.increment_version
    hooks.raw_stream = getattr(private, "_cuda_getCurrentRawStream", None)
    hooks.guard = _trusted(torch, getattr(guards, "TensorGuards", None))
    if hasattr(guards, "_empty_strided_cuda") and hasattr(private, "_cuda_getDevice"):
        hooks.empty_on_current, hooks.current_device = guards._empty_strided_cuda, private._cuda_getDevice
        hooks.device_count = torch.cuda.device_count
    hooks.plain_types = frozenset({torch.Tensor, torch.nn.Parameter})


def _trusted(torch: Any, guard: Any) -> Any:
    """``guard`` if it tells apart what keys tell apart, else None: no torch promises what a private name does."""
    with torch.inference_mode(False), torch.enable_grad():
        first, second = (torch.empty((2, 3), device="cpu") for _ in range(2))
        others = (
            torch.empty((3, 2), device="cpu"),
            torch.empty((2, 4), device="cpu")[:, :3],
            torch.empty((2, 3, 1), device="cpu"),
            torch.empty((2, 3), device="cpu", dtype=torch.float16),
            torch.empty((2, 3), device="meta"),
            torch.empty((2, 3), device="cpu", requires_grad=True),
            torch.nn.Parameter(first, requires_grad=False),
        )
        try:
            same = guard_of(guard, (first, second))
            good = same(torch.empty_like(first), second) and not any(same(other, second) or same(first, other) for other in others)
        except (RuntimeError, SystemError, TypeError):
            return None
    return guard if good else None


def guard_of(guard: Any, tensors: tuple[Any, ...]) -> Any:
    """The function of a ``guard`` made for ``tensors`` that tells whether as many others are like them."""
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    return guard(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def maker_of(array: NewTensor | None) -> Any:
    """A function that makes such a tensor where there is one GPU; None where one has to look which is current, or for None."""
    one_gpu = hooks.device_count is not None and hooks.device_count() == 1
    return partial(hooks.empty_on_current, *array) if one_gpu and array is not None else None


def array_of(tensor: Any) -> NewTensor:
    """What a tensor like it is made from."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def empty_on(device_index: int, like: Any, array: NewTensor) -> Any:
    """A new torch tensor (shape, strides, dtype) on the GPU of ``like``, which has this index; quick where it is the current one."""
    if hooks.current_device() == device_index:
        return hooks.empty_on_current(*array)
    shape, strides, dtype = array
    return like.new_empty_strided(shape, strides, dtype=dtype)


def empty_at(device_index: int, array: NewTensor) -> Any:
    """The same without a tensor that is there already."""
    if hooks.current_device() == device_index:
        return hooks.empty_on_current(*array)
    shape, strides, dtype = array
    return sys.modules["torch"].empty_strided(shape, strides, dtype=dtype, device=f"cuda:{device_index}")


def tell_written(array: Any) -> None:
    """Let autograd know that ``array`` was written, if it is a torch tensor: a backward that saved it raises."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        torch.autograd.graph.increment_version(array)


def tangent_of(tensor: Any) -> Any:
    """The tangent of a dual tensor of forward-mode autograd; None of any other."""
    torch = sys.modules["torch"]
    forward_ad = torch.autograd.forward_ad
    return forward_ad.unpack_dual(tensor).tangent if forward_ad._current_level >= 0 else None


def recorder() -> str:
    """What records the operations of torch just now and would miss a call that is none: "torch.jit.trace", "make_fx", or nothing."""
    private = sys.modules["torch"]._C
    if private._get_tracing_state() is not None:
        return "torch.jit.trace"
    if private._len_torch_dispatch_stack() and private._get_dispatch_mode(private._TorchDispatchModeKey.PROXY) is not None:
        return "make_fx"
    return "make_fx" if private._dispatch_tls_is_dispatch_key_included(private.DispatchKey.PreDispatch) else ""


def autocast_is_on() -> bool:
    """Whether torch.autocast is on for tensors of a GPU."""
    return bool(sys.modules["torch"].is_autocast_enabled("cuda"))


def autocast_changes(tensors: tuple[Any, ...]) -> bool:
    """Whether it wants another type than that of these tensors, which are on a GPU."""
    if not autocast_is_on():
        return False
    wanted = sys.modules["torch"].get_autocast_dtype("cuda")
    return any(tensor.dtype != wanted for tensor in tensors)


def is_watched() -> bool:
    """Whether operations of torch are recorded just now, or go through a dispatch mode or a transform of torch.func."""
    private = sys.modules["torch"]._C  # each backward asks: 0.3 us
    return bool(
        private._len_torch_dispatch_stack()
        or private._functorch.peek_interpreter_stack() is not None
        or private._get_tracing_state() is not None
        or private._dispatch_tls_is_dispatch_key_included(private.DispatchKey.PreDispatch)
    )


def is_transformed() -> bool:
    """Whether a transform of torch.func is active."""
    return sys.modules["torch"]._C._functorch.peek_interpreter_stack() is not None


def mapped_gradient_check() -> Callable[[Any], bool]:
    """Says of a gradient whether it is one of many, which ``torch.autograd.grad(is_grads_batched=True)`` maps by a vmap of its own."""
    check: Callable[[Any], bool] = getattr(sys.modules["torch"]._C._functorch, "is_legacy_batchedtensor", lambda _gradient: False)
    return check


def below_autograd() -> AbstractContextManager[None]:
    """Operators that are called here go past autograd; levels of torch.func that lie further out still record them."""
    past: AbstractContextManager[None] = sys.modules["torch"]._C._AutoDispatchBelowAutograd()
    return _in_a_transform(past) if is_transformed() else past


@contextmanager
def _in_a_transform(past: AbstractContextManager[None]) -> Iterator[None]:
    """Inside of a Function, which records nothing of what it calls."""
    torch = sys.modules["torch"]
    with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True), past:
        yield


def may_have_tangents() -> bool:
    """Whether forward-mode autograd is on."""
    return bool(sys.modules["torch"].autograd.forward_ad._current_level >= 0)


def one_level() -> AbstractContextManager[None]:
    """Where an operation of autograd belongs to the innermost level of torch.func, as those of torch do."""
    if not is_transformed():
        return nullcontext()
    from torch._functorch.utils import enable_single_level_autograd_function

    made: AbstractContextManager[None] = enable_single_level_autograd_function()
    return made


def once_torch_is_there(act: Callable[[Any], None]) -> None:
    """Call ``act`` with torch: now, or at the end of its import, as many import it after us."""
    wrapt.register_post_import_hook(act, "torch")


def once_flops_are_counted(act: Callable[[Any], None]) -> None:
    """Call ``act`` with torch.utils.flop_counter, once something imports it."""
    wrapt.register_post_import_hook(act, "torch.utils.flop_counter")


def keep_out_of_graphs(functions: tuple[Callable[..., Any], ...]) -> None:
    """Have torch.compile break its graph before calls of ``functions``, which are no operators, and not look into what they call.

    This is what ``torch.compiler.disable`` does, without its wrapper and without the import of torch's compiler, which takes seconds.
    It is done once torch is there, as many import it after us. A torch without the private names is left as it is.
    """

    def mark(torch: Any) -> None:
        frames: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
        if not hasattr(frames, "set_code_exec_strategy"):
            return
        skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)
        for function in functions:
            described: Any = function
            described._torchdynamo_disable = True
            described._torchdynamo_disable_msg = "calls of atomr_accel_flashattn on a KV cache or on fp8 are no operators of torch yet"
            frames.set_code_exec_strategy(function.__code__, skip)

    once_torch_is_there(mark)


def is_random_to_compilers(operator: Any) -> None:
    """Have the partitioner of torch.compile keep equal calls of ``operator`` apart; it goes by a list of its own, not by tags."""

    def add(utils: Any) -> None:
        listed = getattr(utils, "rand_ops", None)
        if isinstance(listed, list):
            listed.append(operator)

    wrapt.register_post_import_hook(add, "torch._functorch.compile_utils")


def is_kept_by_compilers(name: str, library: Any) -> None:
    """Have the partitioner of torch.compile keep what the operator ``name`` gives, and never call it anew for the backward.

    It knows random operators of its own by a list; to others it gives no tag and, under a memory budget, the value of one operation in
    float32 beside products of millions. With a budget of 0 it keeps nothing but inputs: there the operator is marked as one to be called
    again, for which torch keeps the state of the generator. What a user marks, as a policy of checkpointing, stays.
    """
    if not hasattr(sys.modules["torch"].library, "register_torch_dispatch"):
        return

    def act(proxies: Any) -> None:
        torch = sys.modules["torch"]
        policies = torch.utils.checkpoint.CheckpointPolicy

        def record(mode: Any, operator: Any, types: Any, arguments: Any, options: Any) -> Any:
            nodes = mode.tracer.graph.nodes
            before = len(nodes)
            made = mode.__torch_dispatch__(operator, types, arguments, options)
            for node in islice(reversed(nodes), len(nodes) - before):
                if node.target is operator:
                    policy = policies.MUST_SAVE if _memory_budget(node) > 0 else policies.MUST_RECOMPUTE
                    node.meta.setdefault("recompute", policy)
            return made

        torch.library.register_torch_dispatch(name, proxies.ProxyTorchDispatchMode, record, lib=library)

    wrapt.register_post_import_hook(act, "torch.fx.experimental.proxy_tensor")


def _memory_budget(node: Any) -> float:
    """Of the graph that a node is recorded in: that of its region, else that of torch.compile."""
    of_region: Any = getattr(sys.modules.get("torch.fx.traceback"), "_get_memory_budget_annotation", None)
    budget: Any = None if of_region is None else of_region(node)
    of_all: Any = getattr(sys.modules.get("torch._functorch.config"), "activation_memory_budget", 1.0)
    return float(of_all if budget is None else budget)


def answer_compiler(torch: Any) -> None:
    """Let ``hooks.is_compiling`` be what torch.compile takes for True where it traces; it costs eager calls 40 ns."""
    hooks.is_compiling = getattr(getattr(torch, "compiler", None), "is_dynamo_compiling", _no)
