"""How setuptools builds the native scan: each instruction set with its own flags, and no failure is an error."""

import platform
import tempfile
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

X86 = platform.machine().lower() in ("x86_64", "amd64")
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]
INSTRUCTION_SETS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"],
}


class BuildNative(build_ext):
    """Builds ``timm_mamba_pkd/ops/_scan.*.so``, with OpenMP where the compiler has it; without a compiler, nothing."""

    def build_extension(self, ext: Extension) -> None:
        for openmp in (["-fopenmp"], []):
            try:
                self._build(ext, openmp)
                return
            except Exception as error:
                reason = error
        self.warn(f"no native selective scan, PyTorch's operators serve instead: {reason}")

    def _build(self, ext: Extension, openmp: list[str]) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            objects = []
            for source in ext.sources:
                flags = INSTRUCTION_SETS.get(Path(source).stem, []) if X86 else []
                objects += self.compiler.compile(
                    [source], output_dir=folder, extra_postargs=[*FLAGS, *openmp, *flags], depends=ext.depends
                )
            self.compiler.link_shared_object(objects, str(output), extra_postargs=openmp, target_lang="c++")
