"""Builds the compiled module with CMake and Ninja; everything else is in pyproject.toml and CMakeLists.txt."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """`cmake`, `ninja`, and the module lands where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.check_call(
                [
                    "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
                    f"-DPython_EXECUTABLE={sys.executable}",
                    f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
                ]
            )  # fmt: skip
            subprocess.check_call(["cmake", "--build", str(build)])
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"kdkernels could not compile its native module ({error}). It needs a C++20 compiler (g++ >= 11 or "
                "clang >= 14). To install without it, on plain PyTorch: KDKERNELS_NATIVE=off pip install ."
            ) from error


native = os.environ.get("KDKERNELS_NATIVE", "on") != "off"
setup(
    ext_modules=[Extension("kdkernels._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
