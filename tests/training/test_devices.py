"""common/devices.py: the device and the precision of matrix products, chosen and refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mask_diffusion
import train
from common import devices
from common.cli import UserError
from common.devices import NATIVE_BFLOAT16, choose_device, choose_dtype, has_bfloat16
from inference.parts import Parts

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[2]


@pytest.mark.parametrize("flags, native", [
    ("fpu avx2 avx512f", False), ("avx512f avx512_bf16 amx_tile", True), ("fp asimd bf16 i8mm", True),
    ("notbf16", False), ("", False)])
def test_bfloat16_is_native_where_processor_and_onednn_have_it(flags, native, monkeypatch):
    assert bool(re.search(NATIVE_BFLOAT16, flags)) == native
    monkeypatch.setattr(devices, "processor_flags", lambda: flags)
    assert has_bfloat16(CPU) in {native, False}                  # oneDNN of an older machine says no to all


def test_onednn_held_to_avx2_means_float32():
    script = "import torch; from common import devices; print(devices.choose_dtype('auto', torch.device('cpu')))"
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True,
                           env={"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert shown.stdout.strip() == "('float32', 'this CPU has no native bfloat16')"


def test_what_stays_in_float32_beside_bfloat16_is_tf32_on_a_gpu_alone():
    before = torch.get_float32_matmul_precision()
    try:
        for device, dtype, precision in (("cpu", "bfloat16", before), ("cuda", "float32", before),
                                         ("cuda", "bfloat16", "high")):
            devices.allow_tf32(torch.device(device), dtype)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_dtype_follows_the_device_unless_it_is_given(monkeypatch):
    for native, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(devices, "has_bfloat16", lambda device, native=native: native)
        assert choose_dtype("auto", CPU)[0] == expected
        assert {choose_dtype(name, CPU)[0] for name in ("float32", "bfloat16")} == {"float32", "bfloat16"}
    with pytest.raises(UserError, match="use --dtype float32"):
        choose_dtype("bfloat16", torch.device("mps"))


def test_shipped_weights_are_held_in_bfloat16_where_it_is_native(monkeypatch):
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("inference.parts.has_bfloat16", lambda device, native=native: native)
        assert Parts(keep=False).dtype == dtype
        assert Parts(keep=False, dtype=torch.float32).dtype == torch.float32


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert choose_device("auto") == expected and choose_device("cpu") == "cpu"
        for name, there in (("cuda", cuda), ("mps", mps)):
            if there:
                assert choose_device(name) == name
            else:
                with pytest.raises(UserError, match=f"--device {name}: .* use --device cpu"):
                    choose_device(name)


def test_several_processes_leave_mps_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert choose_device("auto") == "cpu"
    with pytest.raises(UserError, match="several processes"):
        choose_device("mps")


def test_the_sampler_asks_mps_for_nothing_wider_than_float32(monkeypatch):
    """With every exact number in float32 the sampler still draws the law that it is given, to 1 %."""
    assert mask_diffusion.exact_dtype(torch.device("mps")) == torch.float32
    assert mask_diffusion.exact_dtype(CPU) == torch.float64
    monkeypatch.setattr(mask_diffusion, "exact_dtype", lambda device: torch.float32)
    law = torch.tensor([0.1, 0.2, 0.7, 0.0])
    ids = mask_diffusion.sample(lambda ids: law.log().expand(*ids.shape, 4), torch.full((400, 50), 3), 3, 4,
                                torch.Generator().manual_seed(0))
    shares = torch.bincount(ids.flatten(), minlength=4) / ids.numel()
    assert torch.allclose(shares, law, atol=0.01)


@pytest.mark.parametrize("native, dtype", [(True, "bfloat16"), (False, "float32")])
def test_a_run_says_its_dtype_and_why_and_trains_in_it(native, dtype, tiny, small_tar, tmp_path, monkeypatch,
                                                       capsys):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: native)
    dtypes, plain = set(), torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear",
                        lambda *args: (out := plain(*args), dtypes.add(out.dtype))[0])
    train.main(["--init", str(tiny), "--image-data", small_tar, "--out", str(tmp_path / "run"), "--steps", "1",
                "--image-batch", "4", "--text-batch", "4", "--eval-every", "0", "--sample-every", "0",
                "--device", "cpu"])
    assert f"matrix products in {dtype}: this CPU" in capsys.readouterr().out
    assert (torch.bfloat16 in dtypes) == native
    assert json.loads((tmp_path / "run" / "train.json").read_text())["dtype"] == dtype


def test_without_file_locks_training_is_refused_in_a_line_and_drawing_is_not(tiny, small_tar, tmp_path):
    """As on Windows, which has neither fcntl nor resource."""
    script = ("import sys; sys.modules.update(fcntl=None, resource=None); from common import cli; import {0}; "
              "sys.argv[0] = '{0}.py'; cli.run({0}.main)")
    run = lambda program, *flags: subprocess.run([sys.executable, "-c", script.format(program), *map(str, flags)],
                                                 cwd=ROOT, capture_output=True, text=True)
    refused = run("train", "--init", tiny, "--image-data", small_tar, "--out", tmp_path / "run", "--steps", 1)
    assert refused.returncode == 1 and "WSL" in refused.stderr and refused.stderr.count("\n") == 1
    drawn = run("sample", "--checkpoint", tiny, "--prompt", "red apple", "--steps", 1, "--out",
                tmp_path / "a.png")
    assert drawn.returncode == 0 and (tmp_path / "a.png").exists()
