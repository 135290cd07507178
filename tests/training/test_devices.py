"""common/devices.py: the device and the precision of matrix products."""

import json

import pytest
import torch

import mask_diffusion
import train
from common import devices
from common.cli import UserError
from common.devices import choose_device, choose_dtype, has_bfloat16
from helpers import run_fresh
from inference.parts import Parts

CPU = torch.device("cpu")


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("flags, native", [
    ("fpu avx2 avx512f", False), ("avx512f avx512_bf16 amx_tile", True),
    ("fp asimd bf16 i8mm", True),
    ("notbf16", False), ("", False)])
def test_bfloat16_is_native_where_processor_and_onednn_have_it(flags, native, onednn, monkeypatch):
    monkeypatch.setattr(devices, "processor_flags", lambda: flags)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert has_bfloat16(CPU) == (native and onednn)


PROBE = """
import sys, torch
from common.devices import choose_dtype
def main():
    sys.stderr.write(choose_dtype("auto", torch.device("cpu"))[0])
"""


def test_onednn_limited_to_avx2_means_float32(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    dtype = run_fresh(("probe", []), folder=tmp_path,
                      environment={"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert dtype == (0, "float32")


def test_tf32_is_allowed_only_beside_bfloat16_on_a_gpu():
    before = torch.get_float32_matmul_precision()
    cases = (("cpu", "bfloat16", before), ("cuda", "float32", before), ("cuda", "bfloat16", "high"))
    try:
        for device, dtype, precision in cases:
            devices.allow_tf32(torch.device(device), dtype)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_dtype_follows_the_device_unless_given(monkeypatch):
    for native, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(devices, "has_bfloat16", lambda device, native=native: native)
        assert choose_dtype("auto", CPU)[0] == expected
        for name in ("float32", "bfloat16"):
            assert choose_dtype(name, CPU)[0] == name
    with pytest.raises(UserError, match="--dtype float32"):
        choose_dtype("bfloat16", torch.device("mps"))


def test_shipped_weights_are_bfloat16_where_that_is_native(monkeypatch):
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("inference.parts.has_bfloat16", lambda device, native=native: native)
        assert Parts(keep=False).dtype == dtype
        assert Parts(keep=False, dtype=torch.float32).dtype == torch.float32


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert choose_device("auto") == expected and choose_device("cpu") == "cpu"
        for name, available in (("cuda", cuda), ("mps", mps)):
            if available:
                assert choose_device(name) == name
            else:
                with pytest.raises(UserError, match=f"--device {name}: .* --device cpu"):
                    choose_device(name)


def test_a_device_may_have_a_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == "cuda:1"
    for name in ("gpu", "cuda:2", "cuda:x"):
        with pytest.raises(UserError, match=f"--device {name}: "):
            choose_device(name)


def test_compiling_needs_a_compiler_on_a_cpu(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    devices.check_compiler(torch.device("cuda"))
    with pytest.raises(UserError, match="--compile"):
        devices.check_compiler(CPU)


def test_several_processes_do_not_use_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_device("auto") == "cpu"
    with pytest.raises(UserError, match="--device mps: .* several processes"):
        choose_device("mps")


def test_mps_samples_in_float32_from_the_right_distribution(monkeypatch):
    """On other devices tokens are drawn in float64, which MPS lacks."""
    assert mask_diffusion.exact_dtype(torch.device("mps")) == torch.float32
    assert mask_diffusion.exact_dtype(CPU) == torch.float64
    monkeypatch.setattr(mask_diffusion, "exact_dtype", lambda device: torch.float32)
    distribution = torch.tensor([0.1, 0.2, 0.7, 0.0])
    ids = mask_diffusion.sample(lambda ids: distribution.log().expand(*ids.shape, 4),
                                torch.full((400, 50), 3), 3, 4, torch.Generator().manual_seed(0))
    shares = torch.bincount(ids.flatten(), minlength=4) / ids.numel()
    # 3 standard errors of 20,000 draws at 0.7: one seed in 400 would exceed them, this one does not
    assert torch.allclose(shares, distribution, atol=0.01)


@pytest.mark.parametrize("native, dtype", [(True, "bfloat16"), (False, "float32")])
def test_run_prints_its_dtype_and_trains_in_it(
        native, dtype, tiny, small_tar, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: native)
    dtypes, linear = set(), torch.nn.functional.linear

    def watched_linear(*args):
        output = linear(*args)
        dtypes.add(output.dtype)
        return output
    monkeypatch.setattr(torch.nn.functional, "linear", watched_linear)
    train.main(["--init", str(tiny), "--image-data", small_tar, "--out", str(tmp_path / "run"),
                "--steps", "1", "--image-batch", "4", "--text-batch", "4", "--eval-every", "0",
                "--sample-every", "0", "--device", "cpu"])
    assert f"in {dtype}: this CPU" in capsys.readouterr().out
    assert (torch.bfloat16 in dtypes) == native
    assert json.loads((tmp_path / "run" / "train.json").read_text())["dtype"] == dtype


NO_LOCKS = ("fcntl", "resource")                                 # as on Windows


def test_training_without_file_locks_is_refused(tiny, small_tar, tmp_path):
    flags = ["--init", tiny, "--image-data", small_tar, "--out", tmp_path / "run", "--steps", 1]
    code, errors = run_fresh(("train", flags), missing=NO_LOCKS)
    assert code == 1 and "WSL" in errors and errors.count("\n") == 1


def test_sampling_works_without_file_locks(tiny, tmp_path):
    image = tmp_path / "a.png"
    flags = ["--checkpoint", tiny, "--prompt", "red apple", "--steps", 1, "--out", image]
    code, errors = run_fresh(("sample", flags), missing=NO_LOCKS)
    assert code == 0 and image.exists(), errors
