"""Builds ``effnet_kernels._native`` with CMake; without a working compiler the package installs as pure Python.

``EFFNET_KERNELS_REQUIRE_NATIVE=1`` turns a failed build into a failed installation.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FAILURE_FILE = "_native_build_failure.txt"


class BuildError(Exception):
    """Why the extension could not be built, in the words of the program that failed."""


def tool(name: str) -> str:
    """The program from its package in the build environment, which need not be on PATH, or the system's."""
    try:
        module = __import__(name)
        folder = Path(module.BIN_DIR if name == "ninja" else module.CMAKE_BIN_DIR)
        found = shutil.which(name, path=str(folder))
    except ImportError:
        found = None
    found = found or shutil.which(name)
    if found is None:
        raise BuildError(f"{name} was not found")
    return found


def run(*command: str) -> None:
    """Runs a program, passing its output on, and keeps that output for the error."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    print(done.stdout, flush=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\nfailed with status {done.returncode}:\n{done.stdout}")


class CMakeBuild(build_ext):
    def run(self) -> None:
        # setuptools builds in place by building elsewhere and copying, so this is where the wish is still visible.
        self.package_dirs = [Path(self.build_lib) / "effnet_kernels"]
        if self.inplace:
            self.package_dirs.append(ROOT / "effnet_kernels")
        super().run()

    def build_extension(self, ext: Extension) -> None:
        for folder in self.package_dirs:
            (folder / FAILURE_FILE).unlink(missing_ok=True)
        try:
            self.build_with_cmake(ext)
        except BuildError as error:
            if os.environ.get("EFFNET_KERNELS_REQUIRE_NATIVE", "0") not in ("", "0"):
                raise
            self.record_failure(ext, error)

    def build_with_cmake(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise BuildError(f"pybind11 was not found: {error}") from error
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # A file of an earlier build must not pass for this one's.
        target.unlink(missing_ok=True)
        work = Path(self.build_temp).resolve() / "native"
        # CMake's cache remembers programs that lived in another build's isolated environment.
        shutil.rmtree(work, ignore_errors=True)
        cmake = tool("cmake")
        arguments = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY_RELEASE={target.parent}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        # On Windows CMake's default generator finds the compiler, which Ninja expects to be on PATH.
        if sys.platform != "win32":
            arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
        run(cmake, "-S", str(ROOT / "csrc"), "-B", str(work), *arguments)
        run(cmake, "--build", str(work), "--config", "Release", "--parallel")
        if not target.exists():
            raise BuildError(f"expected the build to make {target.name}, got {os.listdir(target.parent)}")

    def record_failure(self, ext: Extension, error: BuildError) -> None:
        # pip shows no output of a build that succeeds, so the reason travels in the package.
        for folder in self.package_dirs:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FAILURE_FILE).write_text(f"{error}\n", encoding="utf-8")
        self.warn(f"{ext.name} was not built, the package will run without its CPU kernels: {error}")
        # Without this, an editable installation fails to copy the missing file.
        ext.optional = True


setup(
    ext_modules=[
        Extension(
            "effnet_kernels._native",
            sources=[],
            # A source distribution contains what an extension depends on.
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()),
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
