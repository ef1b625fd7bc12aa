from __future__ import annotations

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import atomr_accel_flashattn as fa
from atomr_accel_flashattn import errors

STUB = ast.parse(Path(fa.__file__).with_suffix(".pyi").read_text())
MODULE_OF = {alias.name: node.module for node in ast.walk(STUB) if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_every_public_name_stands_in_the_stub_once():
    names = [alias.name for node in ast.walk(STUB) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert len(names) == len(set(names))
    assert set(fa.__all__) == set(names)
    assert {"run", "flash_attn_func", "FlashAttnActor"} <= set(dir(fa))


@pytest.mark.parametrize("name", fa.__all__)
def test_every_public_name_is_there_and_listed_by_its_module(name: str):
    assert getattr(fa, name) is not None
    if MODULE_OF[name] is not None:
        module = importlib.import_module(f"atomr_accel_flashattn.{MODULE_OF[name]}")
        assert name in module.__all__, f"{name} is no public name of {module.__name__}"


def test_an_unknown_name_is_an_attribute_error_that_says_it():
    with pytest.raises(AttributeError, match="no attribute 'flash_attn_fun'"):
        fa.flash_attn_fun  # noqa: B018


def test_import_takes_neither_torch_nor_cuda_nor_time():
    code = (
        "import sys, time; start = time.perf_counter(); import atomr_accel_flashattn as fa; bare = time.perf_counter() - start; "
        "fa.flash_attn_func, fa.run, fa.lookup; "
        "heavy = [m for m in sys.modules if m.partition('.')[0] in {'torch', 'cuda', 'cupy', 'jax', 'matplotlib', 'rich', 'typer'}]; "
        "assert not heavy, heavy; assert bare < 0.4, bare"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_error_tree_in_the_docstring_is_the_error_tree():
    drawn, path = {}, []
    for line in errors.__doc__.splitlines():
        name = line.strip(" │├└─").split()[0] if line.strip(" │├└─") else ""
        if not name.endswith(("Error", "Warning")) or name not in errors.__all__:
            continue
        depth = line.index(name) // 4
        path = [*path[: depth - 1], name]
        drawn[name] = path[-2] if len(path) > 1 else None
    assert set(drawn) == set(errors.__all__)
    for name, parent in drawn.items():
        kind = getattr(errors, name)
        assert issubclass(kind, Exception)
        # DeviceLostError is drawn beside LaunchError, whose child it is: who catches the launch error catches it as well
        assert parent is None or issubclass(kind, getattr(errors, parent)), f"{name} is drawn under {parent}"


def test_builtin_bases_are_those_that_callers_expect():
    assert issubclass(errors.ConstructionError, ValueError)
    assert issubclass(errors.ArrayTypeError, TypeError)
    assert issubclass(errors.RuntimeFlashAttnError, RuntimeError)
    assert issubclass(errors.CacheWarning, UserWarning)


def test_errors_carry_what_programs_need():
    refused = pickle.loads(pickle.dumps(errors.FeatureNotBuiltError("paged", "pack it")))  # noqa: S301 - our own bytes
    assert (refused.feature, refused.reason) == ("paged", "pack it")
    assert "paged" in str(refused)
    failed = errors.CompileError("NVRTC refused it", spec="fa2_fwd", log="error: x", source_path=None)
    assert "fa2_fwd" in str(failed)
    assert "error: x" in str(failed)
    lost = errors.DeviceLostError("sticky", kernel_name="fa2_fwd", cuda_error="CUDA_ERROR_ILLEGAL_ADDRESS")
    assert (lost.kernel_name, lost.cuda_error) == ("fa2_fwd", "CUDA_ERROR_ILLEGAL_ADDRESS")
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in str(lost)


def test_the_padding_module_is_reached_by_its_name():
    assert fa.bert_padding.unpad_input is fa.unpad_input


class Unprintable:
    """An array of a GPU, which is not to be waited for."""

    shape, dtype, device = (2, 3), np.dtype(np.float16), "cuda:1"

    def __repr__(self) -> str:
        raise AssertionError("the array was printed")


def test_what_holds_arrays_names_them_and_does_not_print_them():
    q = np.zeros((1, 4, 2, 16), np.float16)
    request = fa.Fa2FwdRequest(q, q, q, bias=fa.PositionBias.alibi(np.ones(2, np.float32)), options=fa.AttentionOptions(softcap=5.0))
    shown = repr(fa.FlashAttnMsg.Forward(request))
    assert shown.startswith("FlashAttnMsg.Forward(request=Fa2FwdRequest(q=float16[1, 4, 2, 16]")
    assert "slopes=float32[2]" in shown
    assert "softcap=5.0" in shown
    assert repr(fa.Output(Unprintable())) == "Output(out=float16[2, 3] on cuda:1, lse=None, dropout_mask=None, rng=None)"
    packed = fa.CumulativeSeqlens(np.array([0, 1, 4], np.int32))
    assert repr(fa.VarlenFwdRequest(q[0], q[0], q[0], cu_seqlens_q=packed)).count("[4, 2, 16]") == 3
    assert "int32[3]" in repr(packed)
    assert repr(fa.DenseFwdRequest(q, q, q)).startswith("DenseFwdRequest(q=")
    assert repr(fa.Fa3FwdRequest(q, q, q)).startswith("Fa3FwdRequest(q=")
