"""Compile what the launchers launch, for GPUs that are not there, and look at the machine code.

    python tests/kernels/ahead_of_time.py wkv7 --targets sm_90 --json report.json

A case is a call of a launcher on tensors of the "meta" device: every kernel that it launches, with
the types, constants and options it gives, is compiled instead of run, so that nothing has to be
declared twice. A family's cases stand in `cases_<family>.py`; its `SPILLS` are what kernels may
spill that a GPU has run faster so than with options that do not. Exits with 1 and a line for every
problem: shared memory beyond the limit, spilled registers, a product of matrices without matrix
instructions, a launch that may begin early and does not wait. Needs an uninterpreted process (no
TRITON_INTERPRET).
"""

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from inspect import Parameter, signature
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rwkvx_kernels.tools.triton_device import GFX942, SM_80, SM_90, SM_100, Device, pretend

sys.path.insert(0, str(Path(__file__).parent))

TARGETS = {"sm_80": SM_80, "sm_90": SM_90, "sm_100": SM_100, "gfx942": GFX942}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
MATRIX = {"cuda": r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)", "hip": r"\b(v_mfma)"}
# Triton falls back to multiplying and adding where no matrix instruction fits the types: exact
# products of float32 do that on NVIDIA.
EXACT_DOT = r"tt\.dot .*inputPrecision = ieee.*: tensor<[^>]*xf32>"


@dataclass(frozen=True)
class Case:
    """A call of launchers.

    Attributes:
        name: for the report. call: launches kernels on tensors of device "meta".
        quick: whether it is part of the short run.
    """

    name: str
    call: Callable[[], object]
    quick: bool = False


@dataclass
class Launch:
    """What a launcher asked for: the kernel with its argument types, constants and options."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: list[int]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        parts = (self.types, self.constants, self.aligned, self.options)
        return f"{self.kernel.__name__} {parts}"


@dataclass
class Compiled:
    """What became of a launch, and what is wrong with it."""

    case: str
    target: str
    kernel: str
    options: dict[str, Any]
    shared_bytes: int
    registers: int | None
    spills: int | None
    matrix: list[str]
    problems: list[str]


def record(call: Callable[[], object], device: Device) -> list[Launch]:
    """The different launches that `call` makes when it thinks it runs on `device`."""
    launches: dict[str, Launch] = {}

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = _launch(kernel, args, kwargs)
        launches.setdefault(launch.key, launch)

    with pretend(device), patch.object(JITFunction, "run", run):
        call()
    return list(launches.values())


def _launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    parameters = signature(kernel.fn).parameters
    options = {name: x for name, x in kwargs.items() if name not in parameters}
    named = {name: x for name, x in kwargs.items() if name in parameters}
    bound = signature(kernel.fn).bind(*args, **named)
    bound.apply_defaults()
    frozen = {p.name for p in kernel.params if p.do_not_specialize}
    types, constants, aligned = {}, {}, []
    for index, (name, value) in enumerate(bound.arguments.items()):
        types[name] = _type(parameters[name], value, name in frozen)
        multiple = isinstance(value, int) and value % 16 == 0 and name not in frozen
        if types[name] == "constexpr":
            constants[name] = value
        elif multiple or isinstance(value, torch.Tensor):  # torch aligns what it allocates
            aligned.append(index)
    return Launch(kernel, types, constants, aligned, options)


def _type(parameter: Parameter, value: Any, frozen: bool) -> str:
    """The type that Triton's own specialisation of arguments gives."""
    if "constexpr" in str(parameter.annotation) or value is None or isinstance(value, bool):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        assert value.is_meta, f"{parameter.name} is not on the meta device"
        return POINTERS[value.dtype]
    if isinstance(value, int):
        if value == 1 and not frozen:
            return "constexpr"
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def compile_launch(launch: Launch, case: str, target: str, spills: int = 0) -> Compiled:
    """Compile for a target and judge the machine code, which may spill so much."""
    device = TARGETS[target]
    source = ASTSource(
        launch.kernel,
        signature=launch.types,
        constexprs=launch.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    gpu = GPUTarget(device.backend, device.arch, device.warp)
    binary = triton.compile(source, target=gpu, options=launch.options)
    assembly = binary.asm["ptx" if device.backend == "cuda" else "amdgcn"]
    usage = _usage_nvidia(binary) if device.backend == "cuda" else _usage_amd(assembly)
    matrix = sorted(set(re.findall(MATRIX[device.backend], assembly)))
    problems = []
    if binary.metadata.shared > device.shared_bytes:
        problems.append(f"{binary.metadata.shared} bytes of shared memory > {device.shared_bytes}")
    if (usage["spills"] or 0) > spills and target == "sm_90":
        problems.append(f"spills registers: {usage['spills']} loads and stores")
    dots = re.findall(r"tt\.dot .*", binary.asm["ttir"])
    exact = device.backend == "cuda" and all(re.search(EXACT_DOT, dot) for dot in dots)
    if dots and not matrix and not exact:
        problems.append("multiplies matrices without matrix instructions")
    if launch.options.get("launch_pdl") and "griddepcontrol.wait" not in assembly:
        problems.append("begins before what it reads is written, and does not wait")
    return Compiled(
        case=case,
        target=target,
        kernel=launch.kernel.__name__,
        options=launch.options,
        shared_bytes=binary.metadata.shared,
        matrix=matrix,
        problems=problems,
        **usage,
    )


def _usage_nvidia(binary: Any) -> dict[str, int | None]:
    """Registers of a cubin, and instructions that put one aside into memory or fetch it.

    A stack alone says nothing: some kernels ask for 8 bytes of it and never touch them.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.check_output([tool, option, file.name], text=True)
            for option in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage)[1]  # type: ignore[index]
    return {"registers": int(registers), "spills": len(re.findall(r"\b(?:STL|LDL)\b", code))}


def _usage_amd(assembly: str) -> dict[str, int | None]:
    def number(name: str) -> int | None:
        found = re.search(rf"{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else None

    return {"registers": number(r"\.vgpr_count"), "spills": number(r"\.vgpr_spill_count")}


def _cases(family: str, quick: bool) -> list[Case]:
    cases: list[Case] = importlib.import_module(f"cases_{family}").CASES
    return [case for case in cases if case.quick or not quick]


def _run(task: tuple[str, str, bool, int, int]) -> Compiled:
    """Compile one launch in a process of its own: where LLVM aborts, only that one is lost."""
    family, target, quick, i_case, i_launch = task
    case = _cases(family, quick)[i_case]
    launch = record(case.call, TARGETS[target])[i_launch]
    allowed: dict[str, int] = getattr(importlib.import_module(f"cases_{family}"), "SPILLS", {})
    spills = allowed.get(launch.kernel.__name__, 0)
    processes = multiprocessing.get_context("fork")
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=_compile, args=(sender, launch, case.name, target, spills))
    child.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = ""
    child.join()
    if isinstance(found, Compiled):
        return found
    words = f"does not compile: {found or f'the compiler ended with {child.exitcode}'}"
    return Compiled(
        case.name, target, launch.kernel.__name__, launch.options, 0, None, None, [], [words]
    )


def _compile(sender: Connection, launch: Launch, case: str, target: str, spills: int) -> None:
    try:
        sender.send(compile_launch(launch, case, target, spills))
    except Exception as error:
        sender.send(" ".join(str(error).split())[:500])


def tasks(
    families: list[str], targets: list[str], quick: bool, kernels: list[str] | None = None
) -> Iterator[tuple[Any, ...]]:
    """Every different launch of the cases, or those of some kernels, once for each target."""
    for family in families:
        for target in targets:
            seen: set[str] = set()
            for i_case, case in enumerate(_cases(family, quick)):
                for i_launch, launch in enumerate(record(case.call, TARGETS[target])):
                    wanted = kernels is None or launch.kernel.__name__ in kernels
                    if wanted and launch.key not in seen:
                        seen.add(launch.key)
                        yield family, target, quick, i_case, i_launch


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("families", nargs="+", metavar="FAMILY", help="such as wkv7")
    parser.add_argument("--targets", default=",".join(TARGETS), help="of: %(default)s")
    parser.add_argument("--kernels", help="only these, such as _best_kernel,_score_kernel")
    parser.add_argument("--quick", action="store_true", help="only the cases marked quick")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="at a time")
    parser.add_argument("--json", type=Path, help="write what was found here")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("nothing can be compiled under TRITON_INTERPRET")
    results = []
    with ProcessPoolExecutor(options.jobs) as pool:
        targets, kernels = options.targets.split(","), options.kernels
        kernels = kernels.split(",") if kernels else None
        work = list(tasks(options.families, targets, options.quick, kernels))
        for result in pool.map(_run, work):
            results.append(result)
            words = "; ".join(result.problems) or "ok"
            print(
                f"{result.target:7} {result.kernel:28} {result.case:34} "
                f"shared {result.shared_bytes:6} registers {result.registers} "
                f"spills {result.spills} {','.join(result.matrix)} {words}",
                flush=True,
            )
    if options.json:
        report = {"triton": triton.__version__, "results": [asdict(x) for x in results]}
        options.json.write_text(json.dumps(report, indent=1))
    print(f"Triton {triton.__version__}: {len(results)} compilations")
    return 1 if any(x.problems for x in results) else 0


if __name__ == "__main__":
    sys.exit(main())
