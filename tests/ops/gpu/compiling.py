"""Compile every kernel that a function launches, for GPUs that need not be there.

The launchers run on CPU tensors with their kernels replaced by recorders, so what is compiled is
what they launch: the types of the arguments, the constants, the alignment.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
TYPES = {
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """One kernel as it was launched."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def compile(self, target: str) -> str:
        """Give the assembly."""
        attributes = {(i,): [["tt.divisibility", 16]] for i in self.aligned}
        source = ASTSource(self.kernel, self.signature, self.constants, attributes)
        compiled = triton.compile(source, target=TARGETS[target], options=self.options)
        return str(compiled.asm.get("ptx") or compiled.asm["amdgcn"])


@dataclass
class Recorder:
    """Stands for a kernel."""

    kernel: Any
    launches: list[Launch]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.record

    def record(self, *arguments: Any, **options: Any) -> None:
        signature, constants, aligned = {}, {}, []
        values = dict(zip(self.kernel.arg_names, arguments, strict=False)) | options
        for i, parameter in enumerate(self.kernel.params):
            value = values.get(parameter.name, parameter.default)
            if parameter.is_constexpr:
                constants[parameter.name] = value
                signature[parameter.name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    aligned.append(i)
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        kept = {name: values[name] for name in OPTIONS if name in values}
        self.launches.append(Launch(self.kernel, signature, constants, tuple(aligned), kept))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches of all kernels of shardwise, which do not run."""
    launches: list[Launch] = []
    modules = [m for name, m in sys.modules.items() if name.startswith("shardwise.ops.")]
    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.runtime.JITFunction)
    ]
    for module, name, kernel in kernels:
        setattr(module, name, Recorder(kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
