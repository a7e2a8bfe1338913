"""Kernels are compiled for GPUs that are not there: what they take of a GPU is known before one runs them."""

import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import json, re, subprocess, sys, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from eunoe_kernels._attention_rows import log_sum_exp_kernel
from eunoe_kernels.attention_received import attention_received_kernel
from eunoe_kernels.attention_spectrogram import attention_spectrogram_kernel
from eunoe_kernels.compressive_memory import compressive_memory_read_kernel, compressive_memory_write_kernel
from eunoe_kernels.kv_compaction import kv_compaction_kernel

shape = {"group_size": 3, "head_dim": 64, "padded_dim": 64, "widens": False}
spectrum = shape | {"hop": 16, "num_bins": 17, "padded_bins": 32, "block_keys": 32}
dims, all_of = {"block_dim": 32}, {"has_weights": True, "is_delta": True, "uses_gamma": True}
tail = {"is_causal": False, "has_tail": True, "loads_tail": True}
KERNELS = {
    "log_sum_exp": (log_sum_exp_kernel, "bf16", shape | {"block_rows": 64, "block_keys": 64}),
    "attention_received": (
        attention_received_kernel, "bf16", shape | {"block_rows": 32, "block_keys": 64, "is_causal": True}),
    "attention_spectrogram": (attention_spectrogram_kernel, "bf16", spectrum | tail),
    "kv_compaction": (kv_compaction_kernel, "i32", {"block_slots": 32, "block_words": 16}),
    "compressive_memory_write": (compressive_memory_write_kernel, "bf16", dims | all_of | {"block_tokens": 16}),
}
for size in (32, 64, 128):
    KERNELS[f"compressive_memory_read_{size}"] = (
        compressive_memory_read_kernel, "bf16", dims | {"key_dim": size, "block_rows": 32})
POINTERS = {"out_pointer": "fp32", "log_sum_pointer": "fp32", "given_tail_pointer": "fp32", "transform_pointer": "fp32",
            "tail_pointer": "fp32", "memory_pointer": "fp32", "normalizer_pointer": "fp32", "gamma_pointer": "fp32",
            "weight_pointer": "fp32", "stored_pointer": "fp32", "kept_pointer": "i64", "num_kept_pointer": "i64"}
name, found = sys.argv[1], {}
kernel, dtype, constants = KERNELS[name]
signature = {}
for argument in kernel.arg_names:
    if argument in constants:
        signature[argument] = "constexpr"
    elif argument.endswith("_pointer"):
        signature[argument] = "*" + POINTERS.get(argument, dtype)
    else:
        is_float = argument in ("scale_log2", "decay", "normalizer_epsilon", "gamma_epsilon")
        signature[argument] = "fp32" if is_float else "i32"
for capability in (80, 90, 100):
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"])
        ptx.flush()
        target = re.search(r"\\.target (\\w+)", compiled.asm["ptx"])[1]
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={target}", ptx.name, "-o", "/dev/null"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\\d+) registers", told), re.findall(r"(\\d+) bytes spill", told)
    found[capability] = {"registers": int(registers[1]), "spilled": sum(map(int, spilled)),
                         "shared_bytes": compiled.metadata.shared, "told": len(spilled)}
print(json.dumps(found))
"""

KERNELS = [
    "log_sum_exp",
    "attention_received",
    "attention_spectrogram",
    "kv_compaction",
    "compressive_memory_read_32",
    "compressive_memory_read_64",
    "compressive_memory_read_128",
    "compressive_memory_write",
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_fits_every_gpu_without_spilling(kernel: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)

    command = [sys.executable, "-c", COMPILE, kernel]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    print(f"{kernel}: {done.stdout}")
    found = json.loads(done.stdout)
    for needs in found.values():
        assert needs["told"]
        assert needs["spilled"] == 0
        assert needs["registers"] <= 255
        # What an A100 gives to one block.
        assert needs["shared_bytes"] <= 163 * 1024
