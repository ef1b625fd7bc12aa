"""Requests that are copied, pickled or sent to another process, and arrays whose memory moved: right, or refused by name."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.arrays.read import read_array
from atomr_accel_flashattn.problem import ArrayInfo
from atomr_accel_flashattn.reference import attention
from atomr_accel_flashattn.runtime import execute
from atomr_accel_flashattn.runtime.staleness import NO_ARRAYS, Fingerprint


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))  # noqa: S301 - our own bytes


WAYS: dict[str, Callable[[Any], Any]] = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickled}
KINDS = ("dense", "fa2", "fa3", "varlen")


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def request_of(kind: str, wrap: Callable[[np.ndarray], Any] = lambda array: array, **options: Any) -> Any:
    """One with every part that holds an array; ``wrap`` makes them arrays of a library."""
    common = {
        "mask": fa.MaskKind.sliding_causal(4),
        "bias": fa.PositionBias.alibi(wrap(np.array([0.5, 0.25], np.float32))),
        "sink_tokens": 1,
        "options": fa.AttentionOptions(softcap=20.0, learned_sink=wrap(np.array([0.5, -1.0], np.float32)), **options),
    }
    if kind == "varlen":
        ends = wrap(np.array([0, 4, 9], np.int32))
        arrays = [wrap(numbers(9, 2, 8, seed=seed)) for seed in range(3)]
        return fa.VarlenFwdRequest(*arrays, cu_seqlens_q=fa.CumulativeSeqlens(ends), out=wrap(numbers(9, 2, 8)), **common)
    arrays = [wrap(numbers(2, 5, 2, 8, seed=seed)) for seed in range(3)]
    if kind == "fa3":
        common["persistent"] = fa.PersistentMode.Persistent(3)
    classes = {"dense": fa.DenseFwdRequest, "fa2": fa.Fa2FwdRequest, "fa3": fa.Fa3FwdRequest}
    return classes[kind](*arrays, out=wrap(numbers(2, 5, 2, 8)), **common)


def infos_of(request: Any) -> dict[str, ArrayInfo]:
    problem = request.problem
    found = {each.name: getattr(problem, each.name) for each in fields(problem)}
    found |= {"out": request.out_array, "rng": problem.dropout and problem.dropout.rng}
    return {name: info for name, info in found.items() if isinstance(info, ArrayInfo)}


class TestCopies:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_copy_describes_its_own_arrays_and_gives_the_same_answer(self, kind: str, way: str):
        request = request_of(kind)
        made = WAYS[way](request)
        assert type(made) is type(request)
        for name, info in infos_of(made).items():
            before = infos_of(request)[name]
            assert info == read_array(info.source, name), "an address of another array"
            assert (info.ptr == before.ptr) is (way == "copy"), name
        assert made.mask == request.mask
        np.testing.assert_array_equal(fa.run(made).out, fa.run(request).out)
        made.q[...] = 0
        assert fa.run(made).out is made.out
        assert (request.q == 0).all() == (way == "copy")

    @pytest.mark.parametrize("way", WAYS)
    def test_a_copy_is_run_after_its_original_and_its_arrays_are_gone(self, way: str):
        request = request_of("varlen")
        expected = fa.run(request).out.copy()
        made = WAYS[way](request)
        del request
        waste = [numbers(9, 2, 8, seed=seed) for seed in range(50)]
        np.testing.assert_array_equal(fa.run(made).out, expected)
        assert len(waste) == 50

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("way", WAYS)
    def test_a_copy_drops_what_its_original_drops(self, kind: str, way: str):
        request = request_of(kind, dropout_p=0.5)
        expected = fa.run(request).out.copy()
        state = np.random.get_state()[1].copy()  # noqa: NPY002 - the generator that dropout draws from
        made = WAYS[way](request)
        np.testing.assert_array_equal(fa.run(made).out, expected)
        np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
        assert request.options.rng is None

    @pytest.mark.parametrize("way", WAYS)
    def test_lengths_that_are_copied_describe_their_own_offsets(self, way: str):
        lengths = fa.CumulativeSeqlens(np.array([0, 4, 9], np.int32), 7, name="cu_seqlens_q")
        made = WAYS[way](lengths)
        assert made.array == read_array(made.offsets, "offsets")
        assert (made.max_seqlen, made.batch, made.name) == (7, 2, "cu_seqlens_q")
        assert (made.array.ptr == lengths.array.ptr) is (way == "copy")

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_arrays_that_are_one_stay_one(self, way: str):
        q = numbers(1, 5, 2, 8)
        lengths = fa.CumulativeSeqlens(np.array([0, 5], np.int32))
        made = WAYS[way](fa.DenseFwdRequest(q, q, q))
        assert made.q is made.k is made.v
        packed = WAYS[way](fa.VarlenFwdRequest(q[0], q[0], q[0], cu_seqlens_q=lengths, cu_seqlens_k=lengths))
        assert packed.cu_seqlens_q is packed.cu_seqlens_k

    def test_in_another_process_a_request_has_the_arrays_of_that_process(self):
        request = request_of("varlen", dropout_p=0.5)
        code = (
            "import pickle, sys; import atomr_accel_flashattn as fa; from atomr_accel_flashattn.arrays.read import read_array; "
            "request = pickle.load(sys.stdin.buffer); assert request.problem.q == read_array(request.q, 'q'); "
            "sys.stdout.buffer.write(pickle.dumps(fa.run(request).out))"
        )
        done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(request), capture_output=True, check=True)
        np.testing.assert_array_equal(pickle.loads(done.stdout), fa.run(request).out)  # noqa: S301 - our own bytes

    @pytest.mark.parametrize("way", WAYS)
    def test_a_subclass_of_the_caller_keeps_its_attributes(self, way: str):
        class Own(fa.DenseFwdRequest):
            """With a dictionary, as classes without slots have one."""

        q = numbers(1, 5, 2, 8)
        request = Own(q, q, q)
        object.__setattr__(request, "note", [3])
        if way == "pickle":
            globals()["Own"] = Own
            Own.__qualname__ = "Own"
        made: Any = WAYS[way](request)
        assert (type(made), made.note) == (Own, [3])

    @pytest.mark.parametrize("way", WAYS)
    def test_a_description_of_an_array_is_refused_by_name(self, way: str):
        info = read_array(numbers(3), "q")
        with pytest.raises(fa.ArrayTypeError, match=r"ArrayInfo: got a request to copy or pickle it.*made anew from its arrays"):
            WAYS[way](info)
        if way != "copy":
            with pytest.raises(fa.ArrayTypeError, match="ArrayInfo"):
                WAYS[way](request_of("dense").problem)

    @pytest.mark.parametrize("way", WAYS)
    def test_values_are_copied_as_values(self, way: str):
        for value in (fa.MaskKind.sliding_causal(4), fa.PersistentMode.Persistent(2), fa.DispatchKey(fa.SmArch.SM_90, fa.DType.F16, 64)):
            assert WAYS[way](value) == value
        options = WAYS[way](fa.AttentionOptions(softmax_scale=0.5, softcap=3.0, dropout_p=0.25))
        assert (options.softmax_scale, options.softcap, options.dropout_p) == (0.5, 3.0, 0.25)


class FakeMemory:
    """As much of the driver as DeviceArray asks for, in host memory; ``freed`` are addresses."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.freed: list[int] = []

    def cuMemAlloc(self, size: int) -> tuple[int, int]:  # noqa: N802 - CUDA's name
        block = np.empty(size, np.uint8)
        self.blocks[block.ctypes.data] = block
        return 0, block.ctypes.data

    def cuMemFree(self, ptr: int) -> tuple[int]:  # noqa: N802
        self.freed.append(ptr)
        return (0,)

    def cuMemcpyHtoD(self, to: int, source: int, size: int) -> tuple[int]:  # noqa: N802
        import ctypes

        ctypes.memmove(to, source, size)
        return (0,)

    cuMemcpyDtoH = cuMemcpyHtoD  # noqa: N815

    def cuStreamSynchronize(self, _stream: int) -> tuple[int]:  # noqa: N802
        return (0,)


class TestDeviceArray:
    @pytest.fixture
    def memory(self, monkeypatch: pytest.MonkeyPatch) -> FakeMemory:
        import contextlib

        from atomr_accel_flashattn.arrays import device_array

        memory = FakeMemory()
        monkeypatch.setattr(device_array, "driver", lambda: memory)
        monkeypatch.setattr(device_array, "check", lambda result, *_: result[1] if len(result) > 1 else None)
        monkeypatch.setattr(device_array, "current_context", lambda _index: contextlib.nullcontext())
        return memory

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
    def test_a_copy_has_memory_of_its_own_that_is_freed_once(self, memory: FakeMemory, way: str, dtype: str):
        from atomr_accel_flashattn.arrays.read import numpy_dtype

        values = (numbers(2, 3) * 4).astype(numpy_dtype(dtype))
        array = fa.DeviceArray.from_numpy(values, 1)
        made = WAYS[way](array)
        assert (made.shape, made.dtype_name, made.device_index) == ((2, 3), dtype, 1)
        assert made.ptr != array.ptr
        np.testing.assert_array_equal(made.numpy().view(np.uint8), values.view(np.uint8))
        taken = sorted((array.ptr, made.ptr))
        del array, made
        assert sorted(memory.freed) == taken

    def test_a_shallow_copy_shares_memory_that_is_freed_once(self, memory: FakeMemory):
        array = fa.DeviceArray.from_numpy(numbers(3))
        made = copy.copy(array)
        assert made.ptr == array.ptr
        del array
        assert not memory.freed
        del made
        assert len(memory.freed) == 1


def resize(array: np.ndarray) -> None:
    array.resize((40, *array.shape[1:]), refcheck=False)


class TestNumpyInHostMemory:
    @pytest.mark.parametrize("name", ["q", "k", "v", "out"])
    @pytest.mark.parametrize(
        "change", [resize, lambda x: setattr(x, "shape", x.shape[::-1]), lambda x: x.resize((1, 2, 2, 8), refcheck=False)]
    )
    def test_an_array_that_was_resized_is_named(self, name: str, change: Callable[[Any], None]):
        request = request_of("dense")
        fa.run(request)
        change(getattr(request, name))
        with pytest.raises(fa.StaleArrayError, match=rf"{name}: its memory changed since the request was made.*make the request anew"):
            fa.run(request)

    @pytest.mark.parametrize(
        ("name", "array_of"),
        [
            ("alibi_slopes", lambda request: request.bias.slopes),
            ("learned_sink", lambda request: request.options.learned_sink),
            ("cu_seqlens_q", lambda request: request.cu_seqlens_q.offsets),
        ],
    )
    def test_so_are_the_other_arrays(self, name: str, array_of: Callable[[Any], Any]):
        request = request_of("varlen")
        fa.run(request)
        array_of(request).resize(1000, refcheck=False)
        with pytest.raises(fa.StaleArrayError, match=f"{name}: its memory changed"):
            fa.run(request)

    def test_a_seed_too(self):
        rng = np.array([1, 2])
        request = request_of("fa2", dropout_p=0.5, rng=rng)
        fa.run(request)
        rng.resize(1000, refcheck=False)
        with pytest.raises(fa.StaleArrayError, match="rng: its memory changed"):
            fa.run(request)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_a_view_of_memory_that_was_resized(self, reverse: bool):
        base, q = numbers(100), numbers(1, 5, 2, 8)
        view = base[:80].reshape(1, 5, 2, 8)
        request = fa.DenseFwdRequest(q, view[:, ::-1] if reverse else view, q)
        fa.run(request)
        base.resize(10**7, refcheck=False)
        with pytest.raises(fa.StaleArrayError, match="k: its memory changed"):
            fa.run(request)

    def test_lengths_whose_offsets_were_resized_are_not_read(self):
        offsets = np.array([0, 5], np.int32)
        lengths = fa.CumulativeSeqlens(offsets)
        offsets.resize(10**6, refcheck=False)
        q = numbers(5, 2, 8)
        with pytest.raises(fa.StaleArrayError, match="cu_seqlens_q: its memory changed since it was read"):
            fa.VarlenFwdRequest(q, q, q, cu_seqlens_q=lengths)

    def test_offsets_that_were_written_to_are_taken_or_refused(self):
        offsets = np.array([0, 2, 5], np.int32)
        q = numbers(5, 2, 8)
        request = fa.VarlenFwdRequest(q, q, q, cu_seqlens_q=fa.CumulativeSeqlens(offsets, 4))
        offsets[1] = 3
        again = fa.VarlenFwdRequest(q, q, q, cu_seqlens_q=fa.CumulativeSeqlens(offsets, 4))
        np.testing.assert_array_equal(fa.run(request).out, fa.run(again).out)
        for wrong in ([0, 2, 6], [0, -1, 5], [1, 2, 5], [0, 5, 5], [0, 3, 2]):
            offsets[...] = wrong
            with pytest.raises(fa.CuSeqlensError, match=r"cu_seqlens_q: got \[.*other values than were checked"):
                fa.run(request)

    def test_while_it_is_computed_numpy_resizes_no_array_of_a_run(self, monkeypatch: pytest.MonkeyPatch):
        base = numbers(3, 1, 5, 2, 8)
        request = fa.DenseFwdRequest(*base, out=np.empty((1, 5, 2, 8), np.float32))
        expected = fa.run(request).out.copy()
        refused: list[str] = []
        forward = attention.forward

        def elsewhere() -> None:
            for array in (base, request.out):
                try:
                    array.resize(10**7, refcheck=False)
                except ValueError as error:
                    refused.append(str(error))

        def racing(*arguments: Any) -> None:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            forward(*arguments)

        monkeypatch.setattr(execute.reference, "forward", racing)
        np.testing.assert_array_equal(fa.run(request).out, expected)
        assert len(refused) == 2
        monkeypatch.undo()
        request.out.resize(10**7, refcheck=False)  # and afterwards it does

    def test_an_array_that_stays_where_it_is_may_have_other_values(self):
        request = request_of("dense")
        first = fa.run(request).out.copy()
        request.v[...] *= 2
        np.testing.assert_allclose(fa.run(request).out, 2 * first, rtol=1e-5)

    @pytest.mark.parametrize(
        "q", [np.empty((2, 0, 2, 8), np.float32), np.broadcast_to(numbers(1, 5, 1, 8), (2, 5, 2, 8)), numbers(2, 2, 5, 8).swapaxes(1, 2)]
    )
    def test_unusual_arrays_are_fresh(self, q: np.ndarray):
        request = fa.DenseFwdRequest(q, q, q)
        for _ in range(2):
            assert fa.run(request).out.shape == q.shape


def test_a_fingerprint_is_of_a_moment():
    request = request_of("dense")
    found = Fingerprint.of(request)
    found.check()
    NO_ARRAYS.check()
    resize(request.k)
    with pytest.raises(fa.StaleArrayError, match="k: its memory changed between ask and reply"):
        found.check()
    with pytest.raises(fa.StaleArrayError, match="k: its memory changed since the request was made"):
        Fingerprint.of(request)


def backward_of(kind: str, wrap: Callable[[np.ndarray], Any] = lambda array: array) -> Any:
    """The gradients of :func:`request_of` without its ``out``, with arrays to write them to."""
    forward = request_of(kind, wrap, dropout_p=0.5, rng=wrap(np.array([1, 2])))
    made = fa.run(forward)
    shape = (9, 2, 8) if kind == "varlen" else (2, 5, 2, 8)
    more = {"cu_seqlens_q": forward.cu_seqlens_q} if kind == "varlen" else {}
    classes = {"dense": fa.DenseBwdRequest, "fa2": fa.Fa2BwdRequest, "varlen": fa.VarlenBwdRequest}
    return classes[kind](
        *(forward.q, forward.k, forward.v, made.out, wrap(numbers(*shape, seed=7)), made.lse),
        mask=forward.mask,
        bias=forward.bias,
        sink_tokens=forward.sink_tokens,
        options=forward.options,
        dq=wrap(numbers(*shape)),
        dk=wrap(numbers(*shape)),
        dv=wrap(numbers(*shape)),
        **more,
    )


class TestBackward:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", ["dense", "fa2", "varlen"])
    def test_a_copy_has_its_own_arrays_and_gives_the_same_gradients(self, kind: str, way: str):
        request = backward_of(kind)
        made = WAYS[way](request)
        for name in ("out", "lse", "dout"):
            info = getattr(made.problem, name)
            assert info == read_array(getattr(made, name), name)
            assert (info.ptr == getattr(request.problem, name).ptr) is (way == "copy")
        first, second = (fa.run(each) for each in (request, made))
        for name in ("dq", "dk", "dv", "dsink"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))

    @pytest.mark.parametrize("name", ["q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv"])
    def test_an_array_that_was_resized_is_named(self, name: str):
        request = backward_of("dense")
        fa.run(request)
        resize(getattr(request, name))
        with pytest.raises(fa.StaleArrayError, match=f"{name}: its memory changed since the request was made"):
            fa.run(request)

    def test_offsets_that_were_written_to_are_refused(self):
        request = backward_of("varlen")
        request.cu_seqlens_q.offsets[-1] = 1000
        with pytest.raises(fa.CuSeqlensError, match="other values than were checked"):
            fa.run(request)

    @pytest.mark.parametrize("name", ["dq", "dk", "dv"])
    def test_gradients_are_not_written_to_read_only_memory(self, name: str):
        array = numbers(1, 5, 2, 8)
        array.flags.writeable = False
        with pytest.raises(fa.OutputError, match=f"{name}: got a read-only NumPy array"):
            fa.DenseBwdRequest(*[array] * 3, dout=array, recompute=True, **{name: array})
