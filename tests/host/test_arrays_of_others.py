"""Arrays of other libraries: none is written that may not be, and what comes out is of the library that went in."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.arrays.dlpack import BorrowedTensor, read_dlpack
from atomr_accel_flashattn.arrays.new import in_library_of
from atomr_accel_flashattn.arrays.read import numpy_dtype, read_array, why_not_written
from atomr_accel_flashattn.problem import ArrayInfo
from atomr_accel_flashattn.requests.checks import check_out

Q = np.random.default_rng(0).standard_normal((1, 9, 2, 16), np.float32)
ENDS = np.array([0, 4, 9], np.int32)


class Lent:
    """Only DLPack, as ``version`` of it; ``device`` is what it says of itself."""

    def __init__(self, array: Any, version: tuple[int, int] | None = (1, 0), device: tuple[int, int] | None = None) -> None:
        self.array, self.version, self.device = array, version, device

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None) -> Any:
        if self.version is None and max_version is not None:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        return self.array.__dlpack__(max_version=self.version)

    def __dlpack_device__(self) -> Any:
        return self.device or self.array.__dlpack_device__()


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


class Holder:
    """Only ``__cuda_array_interface__``."""

    def __init__(self, array: np.ndarray, *, read_only: bool) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, read_only),
            "strides": None,
        }


def immutable(package: str) -> Any:
    """An array of a package whose arrays never change, which says nothing of it in DLPack."""
    return type("ArrayImpl", (Lent,), {"__module__": f"{package}._core"})(np.empty_like(Q), None)


READ_ONLY: dict[str, tuple[Callable[[], Any], str]] = {
    "numpy": (lambda: read_only(Q), "a read-only NumPy array"),
    "a view of a read-only array": (lambda: read_only(Q)[:, ::1], "a read-only NumPy array"),
    "DLPack's flag": (lambda: Lent(read_only(Q)), "an array that DLPack calls read-only"),
    "jax": (lambda: immutable("jax"), "is immutable and so read-only"),
    "jaxlib": (lambda: immutable("jaxlib"), "is immutable and so read-only"),
    "tensorflow": (lambda: immutable("tensorflow"), "is immutable and so read-only"),
}


class TestReadOnly:
    @pytest.mark.parametrize("name", READ_ONLY)
    def test_an_out_that_may_not_be_written_is_refused_and_left_alone(self, name: str):
        make, why = READ_ONLY[name]
        out = make()
        memory = np.asarray(getattr(out, "array", out))
        before = memory.copy()
        flat = fa.CumulativeSeqlens(ENDS)
        calls = (
            lambda: fa.flash_attn_func(Q, Q, Q, out=out),
            lambda: fa.flash_attn_func(Q, Q, np.concatenate([Q, Q], -1)[..., :16], out=out),
            lambda: fa.flash_attn_func(Q[..., :13], Q[..., :13], Q, out=out),
            lambda: fa.DenseFwdRequest(Q, Q, Q, out=out),
            lambda: fa.Fa3FwdRequest(Q, Q, Q, out=out),
        )
        for call in calls:
            with pytest.raises(fa.OutputError, match=f"out: got .*{why}.*; allowed is a writeable array; pass a copy"):
                call()
        if isinstance(out, np.ndarray):
            with pytest.raises(fa.OutputError, match=why):
                fa.VarlenFwdRequest(Q[0], Q[0], Q[0], cu_seqlens_q=flat, out=out[0])
        np.testing.assert_array_equal(memory, before)

    def test_a_padded_out_too(self):
        with pytest.raises(fa.OutputError, match="a read-only NumPy array"):
            fa.flash_attn_func(Q[..., :13], Q[..., :13], Q[..., :13], out=read_only(Q[..., :13]))

    @pytest.mark.parametrize("flag", [False, True])
    def test_the_bit_of_the_cuda_array_interface(self, flag: bool, monkeypatch: pytest.MonkeyPatch):
        from atomr_accel_flashattn.arrays import read

        monkeypatch.setattr(read, "_device_of_pointer", lambda _ptr, _name: 0)
        half = Q.astype(np.float16)
        inputs = tuple(read_array(Holder(half.copy(), read_only=True), name) for name in "qkv")
        out = Holder(half.copy(), read_only=flag)
        if flag:
            with pytest.raises(fa.OutputError, match="__cuda_array_interface__ calls read-only"):
                check_out(out, Q.shape, inputs)
        else:
            assert check_out(out, Q.shape, inputs).source is out

    def test_the_interface_counts_beside_dlpack(self):
        class Both(Lent):
            __cuda_array_interface__ = {"data": (0, True)}  # noqa: RUF012 - a protocol

        assert "__cuda_array_interface__" in why_not_written(read_array(Both(Q), "out"))

    def test_a_producer_that_gives_a_copy_is_no_output(self):
        """What was written would be lost."""
        info = read_array(Lent(Q), "out")
        capsule = info.source.capsule
        pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
        flags = ctypes.c_uint64.from_address(pointer(capsule, b"dltensor_versioned") + 24)
        assert flags.value == 0

        class Copying(Lent):
            def __dlpack__(self, **_: Any) -> Any:
                return capsule

        flags.value = 2
        with pytest.raises(fa.OutputError, match="of which DLPack gives a copy"):
            fa.flash_attn_func(Q.copy(), Q.copy(), Q.copy(), out=Copying(Q))

    @pytest.mark.parametrize("version", [(1, 0), None])
    def test_what_may_be_written_is_written(self, version: tuple[int, int] | None):
        out = Lent(np.full_like(Q, np.nan), version)
        assert fa.flash_attn_func(Q, Q, Q, out=out) is out
        np.testing.assert_array_equal(out.array, fa.flash_attn_func(Q, Q, Q))

    def test_inputs_may_be_read_only(self):
        expected = fa.flash_attn_func(Q, Q, Q)
        for make, _ in READ_ONLY.values():
            given = make()
            memory = getattr(given, "array", given)
            if memory.flags.writeable:
                memory[...] = Q
            np.testing.assert_array_equal(np.asarray(fa.flash_attn_func(given, given, given)), expected)


class TestDlpackVersions:
    @pytest.mark.parametrize("version", [(1, 0), None])
    @pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "bool"])
    def test_both_structs_say_the_same(self, version: tuple[int, int] | None, dtype: str):
        array = np.arange(48).reshape(2, 4, 6).astype(dtype)[:, 1:, ::2]
        view = read_dlpack(Lent(array, version), "q")
        assert (view.ptr, view.shape, view.dtype_name) == (array.ctypes.data, array.shape, dtype)
        assert view.strides == tuple(step // array.itemsize for step in array.strides)

    def test_the_producer_is_told_when_we_are_done(self):
        array = np.zeros(3)
        before = sys.getrefcount(array)
        views = [read_dlpack(Lent(array, version), "q") for version in ((1, 0), None)]
        assert sys.getrefcount(array) > before
        del views
        assert sys.getrefcount(array) == before

    def test_an_error_of_the_producer_is_told(self):
        class Broken(Lent):
            def __dlpack__(self, **_: Any) -> Any:
                raise TypeError("not today")

        with pytest.raises(fa.ArrayTypeError, match=r"q: .*Broken could not be exported through DLPack: not today"):
            read_array(Broken(Q), "q")


class TestLibrariesThatWeCannotAllocateWith:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_numpy_comes_out_of_host_memory(self, dtype: str):
        array = Q.astype(dtype)
        plain = fa.flash_attn_func(array, array, array, causal=True, return_attn_probs=True)
        for version in ((1, 0), None):
            q, k, v = (Lent(array.copy(), version) for _ in "qkv")
            out, lse, pattern = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
            assert type(out) is type(lse) is np.ndarray
            assert (out.dtype, lse.dtype, pattern) == (dtype, np.float32, None)
            np.testing.assert_array_equal(out, plain[0])
            np.testing.assert_array_equal(lse, plain[1])
            output = fa.run(fa.DenseFwdRequest(q, k, v, mask=fa.MaskKind.causal()))
            np.testing.assert_array_equal(output.out, plain[0])

    def test_packed_and_odd_and_strided_forms(self):
        expected = fa.flash_attn_func(Q, Q, Q)
        np.testing.assert_array_equal(fa.flash_attn_qkvpacked_func(Lent(np.stack([Q] * 3, 2))), expected)
        np.testing.assert_array_equal(fa.flash_attn_kvpacked_func(Lent(Q), Lent(np.stack([Q] * 2, 2))), expected)
        odd = np.ascontiguousarray(Q[..., :13])
        np.testing.assert_array_equal(fa.flash_attn_func(*[Lent(odd)] * 3), fa.flash_attn_func(odd, odd, odd))
        turned = Lent(np.asfortranarray(Q))
        np.testing.assert_array_equal(fa.flash_attn_func(turned, turned, turned), expected)

    def test_a_seed_comes_out_as_it_went_in(self):
        rng = Lent(np.array([1, 2]))
        output = fa.run(fa.DenseFwdRequest(Q, Q, Q, options=fa.AttentionOptions(dropout_p=0.5, rng=rng)))
        assert output.rng is rng

    def test_an_array_of_a_device_comes_out_of_a_gpu(self, monkeypatch: pytest.MonkeyPatch):
        from atomr_accel_flashattn.arrays import new

        monkeypatch.setattr(new.DeviceArray, "empty", lambda shape, name, index: fa.DeviceArray(4096, shape, name, index, owner=None))
        like = ArrayInfo(64, (2, 3), (3, 1), fa.DType.BF16, "bfloat16", fa.Device("cuda", 1), BorrowedTensor(object(), None))
        made = new.empty_like_framework(like, (4, 5))
        assert isinstance(made.source, fa.DeviceArray)
        assert (made.shape, made.dtype_name, made.device) == ((4, 5), "bfloat16", like.device)
        assert in_library_of(like, made) is made.source


class FakeJax(types.ModuleType):
    """As much of JAX as is asked for: immutable arrays in host memory."""

    def __init__(self) -> None:
        super().__init__("jax")
        self.put: list[Any] = []
        module = self

        class ArrayImpl(Lent):
            committed = True

            def devices(self) -> set[str]:
                return {"cpu:0"}

            @property
            def dtype(self) -> Any:
                return self.array.dtype

            def __getitem__(self, index: Any) -> Any:
                return type(self)(self.array[index], None)

            def view(self, name: str) -> Any:
                return type(self)(self.array.view(numpy_dtype(name)), None)

        ArrayImpl.__module__ = "jaxlib._jax"
        self.kind = ArrayImpl

        def device_put(array: np.ndarray, device: Any) -> Any:
            module.put.append(device)
            return ArrayImpl(array, None)

        self.device_put = device_put
        self.numpy = types.SimpleNamespace(asarray=lambda array: ArrayImpl(array, None))


class TestStandInForJax:
    @pytest.fixture
    def jax(self, monkeypatch: pytest.MonkeyPatch) -> FakeJax:
        module = FakeJax()
        monkeypatch.setitem(sys.modules, "jax", module)
        return module

    def test_its_arrays_come_out(self, jax: FakeJax):
        q, k, v = (jax.kind(Q.copy(), None) for _ in "qkv")
        plain = fa.flash_attn_func(Q, Q, Q, causal=True, return_attn_probs=True)
        made = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        for ours, theirs in zip(made[:2], plain[:2], strict=True):
            assert type(ours) is jax.kind
            assert ours.array.ctypes.data % 64 == 0, "JAX takes no other memory over without a copy"
            np.testing.assert_array_equal(ours.array, theirs)
        assert jax.put == ["cpu:0"] * 2
        output = fa.run(fa.DenseFwdRequest(q, k, v, options=fa.AttentionOptions(dropout_p=0.5, rng=np.array([1, 2]))), dropout_mask=True)
        assert [type(each) for each in (output.out, output.lse, output.dropout_mask)] == [jax.kind] * 3
        q.committed = k.committed = False
        fa.flash_attn_func(q, k, v)
        assert jax.put[-1] is None

    @pytest.mark.parametrize("head_dims", [(13, 13), (16, 13), (13, 16)], ids=str)
    @pytest.mark.parametrize("probs", [False, True])
    def test_of_odd_head_dims_too(self, jax: FakeJax, head_dims: tuple[int, int], probs: bool):
        arrays = [np.ascontiguousarray(Q[..., :size]) for size in (head_dims[0], *head_dims)]
        made = fa.flash_attn_func(*(jax.kind(x, None) for x in arrays), return_attn_probs=probs)
        expected = fa.flash_attn_func(*arrays, return_attn_probs=probs)
        for ours, theirs in zip(made[:2] if probs else [made], expected[:2] if probs else [expected], strict=True):
            assert type(ours) is jax.kind
            np.testing.assert_array_equal(ours.array, theirs)

    def test_of_packed_forms_too(self, jax: FakeJax):
        expected = fa.flash_attn_func(Q, Q, Q)
        made = fa.flash_attn_qkvpacked_func(jax.kind(np.stack([Q] * 3, 2), None))
        assert type(made) is jax.kind
        np.testing.assert_array_equal(made.array, expected)
        ends = jax.kind(ENDS.copy(), None)
        made = fa.flash_attn_varlen_func(*[jax.kind(Q[0], None)] * 3, ends, ends, 5, 5)
        assert type(made) is jax.kind
        np.testing.assert_array_equal(made.array, fa.flash_attn_varlen_func(Q[0], Q[0], Q[0], ENDS, ENDS, 5, 5))

    def test_so_do_gradients(self, jax: FakeJax):
        made = fa.run(fa.DenseBwdRequest(*[jax.kind(Q, None)] * 3, dout=Q, recompute=True))
        expected = fa.run(fa.DenseBwdRequest(Q, Q, Q, dout=Q, recompute=True))
        for name in ("dq", "dk", "dv"):
            assert type(getattr(made, name)) is jax.kind
            np.testing.assert_array_equal(getattr(made, name).array, getattr(expected, name))

    def test_an_out_decides_what_comes_out(self, jax: FakeJax):
        out = np.empty_like(Q)
        made, lse, _ = fa.flash_attn_func(*[jax.kind(Q, None)] * 3, out=out, return_attn_probs=True)
        assert made is out
        assert type(lse) is np.ndarray

    @pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "bool"])
    def test_gpu_memory_is_handed_over_with_its_type(self, jax: FakeJax, name: str):
        class OnGpu(fa.DeviceArray):
            """The bits that its interface shows."""

            array = np.zeros((2, 3), "u2" if name == "bfloat16" else name)

        def asarray(array: Any) -> Any:
            return jax.kind(array.array, None)

        jax.numpy.asarray = asarray
        device = fa.Device("cuda", 0)
        like = ArrayInfo(64, (2, 3), (3, 1), None, name, device, BorrowedTensor(jax.kind(Q, None), None))
        made = ArrayInfo(4096, (2, 3), (3, 1), None, name, device, OnGpu(4096, (2, 3), name, 0, owner=None))
        assert in_library_of(like, made).dtype == numpy_dtype(name)

    def test_without_jax_its_arrays_give_numpy(self, jax: FakeJax, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delitem(sys.modules, "jax")
        assert type(fa.flash_attn_func(*[jax.kind(Q, None)] * 3)) is np.ndarray

    def test_a_tracer_is_told_where_to_go(self):
        tracer = type("DynamicJaxprTracer", (), {"__module__": "jax._src.interpreters.partial_eval"})()
        with pytest.raises(fa.ArrayTypeError, match=r"q: got jax\._src.*; call it outside of jax\.jit"):
            fa.flash_attn_func(tracer, tracer, tracer)


class TestJax:
    @pytest.fixture
    def jax(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        return pytest.importorskip("jax")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("head_dim", [16, 13])
    def test_arrays_come_out_with_their_type_and_device(self, jax: Any, dtype: str, head_dim: int):
        arrays = [Q[..., :head_dim].astype(numpy_dtype(dtype)) for _ in "qkv"]
        made = fa.flash_attn_func(*map(jax.numpy.asarray, arrays), causal=True, return_attn_probs=True)
        expected = fa.flash_attn_func(*arrays, causal=True, return_attn_probs=True)
        for ours, theirs in zip(made[:2], expected[:2], strict=True):
            assert isinstance(ours, jax.Array)
            assert ours.devices() == jax.numpy.zeros(1).devices()
            np.testing.assert_array_equal(np.asarray(ours).astype(np.float32), theirs.astype(np.float32))
        assert made[0].dtype.name == dtype

    def test_what_comes_out_is_not_copied(self, jax: Any):
        q = jax.numpy.asarray(np.random.default_rng(1).standard_normal((1, 64, 4, 64), np.float32))
        info = read_array(q, "q")
        from atomr_accel_flashattn.arrays.new import empty_like_framework

        made = empty_like_framework(info, q.shape)
        assert in_library_of(info, made).unsafe_buffer_pointer() == made.ptr

    def test_packed_and_sequences(self, jax: Any):
        expected = fa.flash_attn_func(Q, Q, Q)
        made = fa.flash_attn_qkvpacked_func(jax.numpy.stack([jax.numpy.asarray(Q)] * 3, 2))
        assert isinstance(made, jax.Array)
        np.testing.assert_array_equal(made, expected)
        ends = jax.numpy.asarray(ENDS)
        q = jax.numpy.asarray(Q[0])
        longest = jax.numpy.diff(ends).max()
        np.testing.assert_array_equal(
            fa.flash_attn_varlen_func(q, q, q, ends, ends, longest, longest), fa.flash_attn_varlen_func(Q[0], Q[0], Q[0], ENDS, ENDS, 5, 5)
        )

    @pytest.mark.parametrize("view", [lambda x: x, np.asarray, lambda x: np.asarray(x)[:, ::1], np.from_dlpack])
    def test_an_array_and_its_views_are_never_written(self, jax: Any, view: Callable[[Any], Any]):
        array = jax.numpy.asarray(Q) * 3
        before = np.array(array)
        with pytest.raises(fa.OutputError, match="read-only"):
            fa.flash_attn_func(Q, Q, Q, out=view(array))
        np.testing.assert_array_equal(array, before)

    def test_in_jit_and_grad_it_says_so(self, jax: Any):
        q = jax.numpy.asarray(Q)
        gradient = jax.grad(lambda q, k, v: fa.flash_attn_func(q, k, v).sum())
        for transformed in (jax.jit(fa.flash_attn_func), gradient, jax.vmap(fa.flash_attn_func)):
            with pytest.raises(fa.ArrayTypeError, match=r"outside of jax\.jit"):
                transformed(q, q, q)

    def test_bfloat16_of_ml_dtypes_is_that_of_jax(self, jax: Any):
        q = Q.astype(ml_dtypes.bfloat16)
        assert fa.flash_attn_func(*[jax.numpy.asarray(q)] * 3).dtype == ml_dtypes.bfloat16


@pytest.mark.torch
class TestTorchThroughDlpack:
    def test_an_out_of_torch_that_is_lent(self):
        torch = pytest.importorskip("torch")

        class OfTorch(Lent):
            def __dlpack__(self, **more: Any) -> Any:
                return self.array.__dlpack__(**more)

        out = torch.full(Q.shape, torch.nan)
        lent = OfTorch(out)
        assert fa.flash_attn_func(Q, Q, Q, out=lent) is lent
        np.testing.assert_array_equal(out.numpy(), fa.flash_attn_func(Q, Q, Q))
        for dtype in ("bfloat16", "float16"):
            q = OfTorch(torch.from_numpy(Q).to(getattr(torch, dtype)))
            assert fa.flash_attn_func(q, q, q).dtype == numpy_dtype(dtype)
