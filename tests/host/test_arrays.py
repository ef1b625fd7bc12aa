from __future__ import annotations

import sys
import types
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.arrays import new, read as arrays, streams
from atomr_accel_flashattn.arrays.new import empty_like_framework, unbind
from atomr_accel_flashattn.arrays.read import as_numpy, read_array
from atomr_accel_flashattn.problem import ArrayInfo

ALL_TYPES = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int32", "int64", "bool"]


def numbers(dtype: str, *shape: int) -> np.ndarray:
    return np.arange(int(np.prod(shape))).reshape(shape).astype(arrays.numpy_dtype(dtype))


@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_numpy_views_are_read_with_their_strides_and_given_back(dtype: str):
    array = numbers(dtype, 4, 6, 8)[1:, ::-2]
    info = read_array(array, "q")
    assert (info.ptr, info.shape, info.dtype_name) == (array.ctypes.data, array.shape, dtype)
    assert info.strides == tuple(step // array.itemsize for step in array.strides)
    view = as_numpy(info)
    assert view.dtype == array.dtype
    np.testing.assert_array_equal(view.view(f"u{array.itemsize}"), array.view(f"u{array.itemsize}"))
    view[...] = 0
    assert not array.astype(bool).any()


def test_a_description_is_passed_through():
    info = read_array(np.zeros(3), "q")
    assert read_array(info, "q") is info


def test_an_empty_array_has_plain_strides_whatever_numpy_says():
    info = read_array(np.broadcast_to(np.zeros((1, 0), np.float32), (4, 0)), "q")
    assert (info.shape, info.strides) == ((4, 0), (1, 1))
    assert as_numpy(info).shape == (4, 0)


def test_host_memory_of_a_gpu_array_is_refused():
    info = read_array(np.zeros(3), "q")
    with pytest.raises(fa.DeviceMismatchError, match="array on cuda:0 has no NumPy view; allowed are arrays in host memory"):
        as_numpy(ArrayInfo(info.ptr, info.shape, info.strides, info.dtype, info.dtype_name, fa.Device("cuda", 0), None))


class Lent:
    """Only DLPack, of another object or of a made-up device."""

    def __init__(self, array: Any, device: tuple[int, int] | None = None) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.device or self.array.__dlpack_device__()


class TestDlpack:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "int64", "bool"])
    def test_numpy_through_dlpack(self, dtype: str):
        array = numbers(dtype, 4, 6, 8)[1:, ::2]
        info, plain = read_array(Lent(array), "q"), read_array(array, "q")
        assert (info.ptr, info.shape, info.strides, info.dtype, info.dtype_name, info.device) == (
            plain.ptr,
            plain.shape,
            plain.strides,
            plain.dtype,
            dtype,
            plain.device,
        )
        np.testing.assert_array_equal(as_numpy(info), array)

    @pytest.mark.torch
    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16"])
    def test_types_that_numpy_lacks(self, dtype: str):
        import torch

        tensor = torch.arange(24).float().reshape(4, 6).to(getattr(torch, dtype))
        info = read_array(Lent(tensor), "q")
        assert (info.dtype_name, info.ptr) == (dtype, tensor.data_ptr())
        np.testing.assert_array_equal(as_numpy(info).astype(np.float32), tensor.float().numpy())

    def test_the_producer_is_kept_alive(self):
        view = as_numpy(read_array(Lent(np.arange(1000.0)), "q"))
        waste = [np.zeros(1000) for _ in range(50)]
        np.testing.assert_array_equal(view, np.arange(1000.0))
        assert len(waste) == 50

    def test_a_producer_that_refuses_is_named_with_its_argument(self):
        read_only = np.zeros(3)
        broken = Lent(read_only)
        broken.array = object()
        with pytest.raises(fa.ArrayTypeError, match="k: Lent could not be exported through DLPack"):
            read_array(broken, "k")

    def test_other_devices_are_refused(self):
        with pytest.raises(fa.DeviceMismatchError, match=r"v: got DLPack device type 10; allowed are host memory \(1, 3\) and CUDA memory"):
            read_array(Lent(np.zeros(3), (10, 0)), "v")

    def test_complex_numbers_are_no_attention_inputs(self):
        q = Lent(np.zeros((1, 2, 2, 8), np.complex64))
        with pytest.raises(fa.DTypeError, match="q: got type complex64; allowed are float16"):
            fa.flash_attn_func(q, q, q)


class FakeCupy(types.ModuleType):
    """As much of CuPy as is asked for, in host memory."""

    class ndarray:  # noqa: N801 - CuPy's name
        def __init__(self, array: np.ndarray) -> None:
            self.array = array
            self.shape, self.strides, self.dtype = array.shape, array.strides, array.dtype
            self.data = types.SimpleNamespace(ptr=array.ctypes.data)
            self.device = types.SimpleNamespace(id=1)

        def __getitem__(self, index: Any) -> Any:
            return type(self)(self.array[index])

    class Device:
        current: int | None = None

        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            FakeCupy.Device.current = self.index

        def __exit__(self, *_: object) -> None:
            FakeCupy.Device.current = None

    def __init__(self) -> None:
        super().__init__("cupy")
        self.cuda = types.SimpleNamespace(
            Device=self.Device, get_current_stream=lambda: types.SimpleNamespace(ptr=90 + (self.Device.current or 0))
        )
        self.random = types.SimpleNamespace(randint=lambda _low, _high, size, dtype: self.ndarray(np.zeros(size, dtype)))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        assert self.Device.current == 1
        return self.ndarray(np.empty(shape, dtype))

    def asarray(self, array: np.ndarray) -> Any:
        return self.ndarray(array)


class TestCupy:
    @pytest.fixture
    def cupy(self, monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
        module = FakeCupy()
        monkeypatch.setitem(sys.modules, "cupy", module)
        return module

    def test_read_make_stream_and_draw_on_its_device(self, cupy: FakeCupy):
        source = np.zeros((2, 6, 4), np.float16)[:, ::2]
        info = read_array(cupy.ndarray(source), "q")
        assert (info.ptr, info.strides, info.device) == (source.ctypes.data, (24, 8, 1), fa.Device("cuda", 1))
        made = empty_like_framework(info, (3, 4), "float32")
        assert isinstance(made.source, cupy.ndarray)
        assert (made.shape, made.dtype_name, made.device) == ((3, 4), "float32", info.device)
        assert streams.current_stream(info) == 91
        assert new.draw_seed_and_offset(info).shape == (2,)
        assert [part.shape for part in unbind(info, 1)] == [(2, 4)] * 3

    def test_offsets_of_lengths(self, cupy: FakeCupy):
        like = cupy.ndarray(np.zeros((2, 2, 8), np.float16))
        assert fa.CumulativeSeqlens.from_lengths([2, 3], like=like).offsets.array.tolist() == [0, 2, 5]


class TestCudaArrayInterface:
    class Holder:
        def __init__(self, **changes: Any) -> None:
            self.__cuda_array_interface__ = {
                "version": 3,
                "shape": (2, 0, 4),
                "typestr": "<f2",
                "data": (0, False),
                "strides": None,
                **changes,
            }

    def test_read(self):
        info = read_array(self.Holder(stream=5), "q")
        assert (info.shape, info.dtype_name, info.device) == ((2, 0, 4), "float16", fa.Device("cuda", 0))
        assert streams.current_stream(info) == 5
        assert streams.current_stream(read_array(self.Holder(), "q")) == streams.LEGACY_DEFAULT_STREAM

    def test_a_mask_is_refused(self):
        with pytest.raises(fa.ArrayTypeError, match="with a mask, which would be ignored; allowed are plain arrays"):
            read_array(self.Holder(mask=object()), "q")

    def test_raw_bytes_are_refused(self):
        with pytest.raises(fa.DTypeError, match=r"type '\|V2'; allowed are floats and integers \(bfloat16 needs __dlpack__\)"):
            read_array(self.Holder(typestr="|V2"), "q")


class TestUnbind:
    def test_descriptions_of_slices_where_the_library_cannot_slice(self):
        packed = np.arange(2 * 3 * 4.0).reshape(2, 3, 4)
        parts = unbind(read_array(Lent(packed), "qkv"), 1)
        for number, part in enumerate(parts):
            assert isinstance(part, ArrayInfo)
            np.testing.assert_array_equal(as_numpy(part), packed[:, number])


class TestDeviceArray:
    def test_what_it_says_of_itself(self):
        array = fa.DeviceArray(4096, (2, 3), "bfloat16", 1, owner=None)
        info = read_array(array, "q")
        assert (info.ptr, info.shape, info.strides, info.dtype, info.device) == (4096, (2, 3), (3, 1), fa.DType.BF16, fa.Device("cuda", 1))
        assert array.nbytes == 12
        assert array.__cuda_array_interface__["typestr"] == "<u2"
        assert repr(array) == "DeviceArray(shape=(2, 3), dtype=bfloat16, device=cuda:1)"

    def test_empty_arrays_need_no_gpu(self):
        array = fa.DeviceArray.from_numpy(np.zeros((0, 3), ml_dtypes.bfloat16))
        assert (array.ptr, array.shape, array.numpy().dtype) == (0, (0, 3), ml_dtypes.bfloat16)

    def test_bad_arguments(self):
        with pytest.raises(fa.ShapeError, match=r"got \(2, -1\); allowed are sizes >= 0"):
            fa.DeviceArray.empty((2, -1), "float16")
        with pytest.raises(fa.DTypeError, match="got 'half-ish'; allowed are NumPy's names and bfloat16"):
            fa.DeviceArray.empty((2,), "half-ish")
        with pytest.raises(fa.ArrayTypeError, match="got list; allowed is a NumPy array"):
            fa.DeviceArray.from_numpy([1.0])


def test_large_strides_are_whole_numbers_beyond_32_bits():
    base = np.lib.stride_tricks.as_strided(np.zeros(16, np.float16), (2, 3, 2, 8), (2**40, 2**36, 16, 2))
    problem = fa.Fa2FwdRequest(base, base, base).problem
    assert problem.q_strides == (2**39, 2**35, 8)
