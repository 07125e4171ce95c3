"""Has NVIDIA's own compiler compile a kernel's text, for which no device is needed; says what it says.

usage: nvidia_compiler.py FOLDER SOURCE OPTION...     FOLDER has lib/ and include/ of the wheels nvidia-cuda-nvrtc and nvidia-cuda-runtime
"""

import ctypes
import pathlib
import sys


def library(folder, name):
    # Beside it lies one for other hosts (alt).
    found = sorted(folder.glob(f"lib/{name}.so.*"))
    if not found:
        sys.exit(f"{folder}: no lib/{name}.so")
    return ctypes.CDLL(str(found[-1]), mode=ctypes.RTLD_GLOBAL)


def main(folder, source, *options):
    folder = pathlib.Path(folder)
    # NVRTC opens this one by its name: it is there already.
    library(folder, "libnvrtc-builtins")
    nvrtc = library(folder, "libnvrtc")
    program = ctypes.c_void_p()
    text = pathlib.Path(source).read_bytes()
    if code := nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, None, 0, None, None):
        sys.exit(f"nvrtcCreateProgram: {code}")
    words = [word.encode() for word in (*options, f"--include-path={folder}/include")]
    code = nvrtc.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    print(log.value.decode(), end="")
    sys.exit(code)


main(*sys.argv[1:])
