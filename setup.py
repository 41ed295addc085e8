"""Build the two compiled libraries: delib_fast._C (C++, linked with torch) and libdelib_fast_cuda.so (CUDA only).

Both are optional. Two environment variables and the installed toolchain decide what is built; whether a GPU is present
does not matter.

    DELIB_FAST_CPP  = auto | 0 | 1    auto: build if torch, Python.h and a C++ compiler are installed
    DELIB_FAST_CUDA = auto | 0 | 1    auto: build if nvcc is installed

With 0 the library is not built. With 1 a missing toolchain is an error. The rest of the packaging is in pyproject.toml.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as setuptools_build_ext

ROOT = Path(__file__).resolve().parent
CSRC = "csrc"
CUDA_TARGETS = ("80", "90a")  # A100, and Hopper with thread block clusters; newer GPUs use the PTX below
WITHOUT_CPP = (
    "delib_fast is installed without its C++ extension ({why}). Everything works, but on a CPU the loss runs on plain "
    "torch and packs are planned in Python, which is slower."
)


def build_flag(name: str) -> str:
    """Return the value of the environment variable `name`: "auto" (the default), "0" or "1"."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}={value!r} is not valid; it must be auto, 0 or 1")
    return value


def cpp_compiler() -> str:
    """Return the command of the C++ compiler, or "" if there is none."""
    return os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), "")


def why_no_cpp() -> str | None:
    """Return the reason that C++ is not compiled, or None. Compiles a small file to test the compiler and Python.h."""
    if build_flag("DELIB_FAST_CPP") == "0":
        return "DELIB_FAST_CPP=0"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return "torch cannot be imported during the build; install torch first and pass --no-build-isolation"
    compiler = cpp_compiler()
    if not compiler:
        return "no C++ compiler was found; install g++"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <vector>\nint main() { return 0; }\n")
        include = sysconfig.get_path("include")
        command = [*shlex.split(compiler), f"-I{include}", "-c", str(source), "-o", str(source.with_suffix(".o"))]
        try:
            probe = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"the C++ compiler {compiler!r} cannot be run: {error.strerror}"
    if probe.returncode:
        first_line = next((line for line in probe.stderr.splitlines() if "error" in line), "unknown error")
        return f"the C++ compiler {compiler!r} cannot compile a file that includes Python.h: {first_line.strip()}"
    return None


def find_nvcc() -> str | None:
    """Return the path of nvcc: from CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, in this order."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (nvcc := shutil.which("nvcc", path=str(Path(home, "bin")))):
            return nvcc
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def sources(*suffixes: str) -> list[str]:
    """Return the files below csrc with these suffixes, relative to the root and sorted."""
    found = (path for suffix in suffixes for path in (ROOT / CSRC).rglob(f"*{suffix}"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


class CudaLibrary(Extension):
    """A plain shared library with a C interface. Python loads it with ctypes, so it depends on no ABI of torch."""

    def __init__(self, nvcc: str):
        # no sources for setuptools, which would pass .cu files to the C++ compiler
        super().__init__("delib_fast.libdelib_fast_cuda", sources=[], depends=sources(".cu", ".cuh", ".h"))
        self.nvcc = nvcc
        self.cu_sources = sources(".cu")

    def compile(self, output: Path, scratch: Path) -> None:
        """Compile each .cu file to an object file in `scratch`, and link them to `output`."""
        scratch.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        targets = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in CUDA_TARGETS]
        targets.append("-gencode=arch=compute_80,code=compute_80")  # PTX for newer GPUs
        # -ftz: without subnormal numbers an exponential takes 2 instructions instead of 4
        common = [self.nvcc, *targets, "-O3", "-std=c++17", "-ftz=true", "-Xcompiler=-fPIC", f"-I{ROOT / CSRC}"]
        objects = []
        for source in self.cu_sources:
            objects.append(str(scratch / (source.replace("/", "_") + ".o")))
            subprocess.run([*common, "-c", str(ROOT / source), "-o", objects[-1]], check=True)
        subprocess.run([*common, "-shared", "-cudart=static", *objects, "-o", str(output)], check=True)


def cpp_extension() -> Extension:
    """Return the extension delib_fast._C."""
    from torch.utils.cpp_extension import CppExtension

    # No -march=native: loops for AVX2 and AVX-512 are selected at run time (csrc/for_each_simd_target.h).
    flags = ["-O3", "-fvisibility=hidden", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    return CppExtension(
        "delib_fast._C",
        sources(".cpp"),
        include_dirs=[str(ROOT / CSRC)],
        depends=sources(".h"),
        extra_compile_args={"cxx": flags},
        extra_link_args=["-fopenmp", "-Wl,--strip-all"],
    )


def extensions() -> list[Extension]:
    """Return the extensions to build. Exits with an error if a requested one cannot be built."""
    found: list[Extension] = []
    why = why_no_cpp()
    if why is None:
        found.append(cpp_extension())
    elif build_flag("DELIB_FAST_CPP") == "1":
        raise SystemExit(f"DELIB_FAST_CPP=1, but the C++ extension cannot be built: {why}")
    else:
        print(WITHOUT_CPP.format(why=why), file=sys.stderr)
    nvcc = find_nvcc()
    if build_flag("DELIB_FAST_CUDA") == "1" and nvcc is None:
        raise SystemExit("DELIB_FAST_CUDA=1, but nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda")
    if build_flag("DELIB_FAST_CUDA") != "0" and nvcc is not None and sources(".cu"):
        found.append(CudaLibrary(nvcc))
    return found


def build_command(found: list[Extension]) -> type:
    """Return the build_ext command that also builds a CudaLibrary."""
    base: type = setuptools_build_ext
    if any(not isinstance(extension, CudaLibrary) for extension in found):
        from torch.utils.cpp_extension import BuildExtension

        base = BuildExtension

    class BuildWithCuda(base):  # type: ignore[valid-type, misc]
        def get_ext_filename(self, name: str) -> str:
            if name.rpartition(".")[2] == "libdelib_fast_cuda":
                return str(Path(*name.split("."))) + ".so"
            return super().get_ext_filename(name)

        def finalize_options(self) -> None:
            super().finalize_options()
            # A linker that is killed leaves a part of a library, which is newer than its sources: always link again.
            # Ninja knows which object files are complete.
            self.force = True

        def build_extension(self, extension: Extension) -> None:
            if isinstance(extension, CudaLibrary):
                scratch = Path(self.build_temp).resolve() / "cuda"
                extension.compile(Path(self.get_ext_fullpath(extension.name)).resolve(), scratch)
            else:
                super().build_extension(extension)

    return BuildWithCuda


EXTENSIONS = extensions()
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": build_command(EXTENSIONS)})
