#!/bin/bash
# Builds llama.cpp with CUDA from the source distribution of PyPI's llama-cpp-python, for bench_llama_cpp.py.
#
#   pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
#   llama_cpp.sh trim  llama_cpp_python-0.3.36.tar.gz llama.tar.xz   # only what the two programs need: 2 MB
#   llama_cpp.sh build llama.tar.xz FOLDER                           # FOLDER/bin; about 80 minutes of one core
#   llama_cpp.sh pack  FOLDER PIECES                                 # the programs, stripped, in pieces of 15 MiB
#   llama_cpp.sh unpack PIECES FOLDER
#
# ARCHITECTURES (90-real, an H100, by default) are CMake's names of GPUs; OPTIONS are further options for CMake:
# -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON builds for any processor, as llama.cpp's releases,
# and -DGGML_CUDA=OFF for the CPU alone.
set -euo pipefail

trim() {
    local folder
    folder=$(mktemp -d)
    tar -xzf "$1" -C "$folder"
    cd "$folder"/*/vendor/llama.cpp
    # The backends other than the CPU's and CUDA's, and the tools other than the benchmarks.
    printf '%s\n' 'find_package(Threads REQUIRED)' 'llama_add_compile_flags()' \
        'add_subdirectory(llama-bench)' 'add_subdirectory(batched-bench)' > tools/CMakeLists.txt
    tar -cJf "$2" --exclude='*.md' CMakeLists.txt LICENSE cmake common include src vendor \
        tools/CMakeLists.txt tools/llama-bench tools/batched-bench \
        ggml/CMakeLists.txt ggml/cmake ggml/include ggml/src/{*.*,ggml-cpu,ggml-cuda}
    rm -rf "$folder"
}

build() {
    mkdir -p "$2/source"
    tar -xJf "$1" -C "$2/source"
    cmake -S "$2/source" -B "$2" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
        -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=$ORIGIN' \
        -DCMAKE_INSTALL_RPATH_USE_LINK_PATH=ON -DCMAKE_EXE_LINKER_FLAGS=-Wl,--allow-shlib-undefined \
        -DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="${ARCHITECTURES:-90-real}" \
        -DGGML_CUDA_NCCL=OFF -DGGML_CCACHE=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_ALL_WARNINGS=OFF ${OPTIONS:-}
    nice cmake --build "$2" --parallel "${JOBS:-$(nproc)}" --target llama-bench llama-batched-bench
    rm -rf "$2/source"
    touch "$2/built"
}

pack() {
    mkdir -p "$2"
    cd "$1/bin"
    strip --strip-unneeded ./*
    tar -c . | xz -3 -T0 | split -b 15M - "$2/llama.part."
}

unpack() {
    mkdir -p "$2/bin"
    cat "$1"/llama.part.* | xz -d -T0 | tar -x -C "$2/bin"
}

"$1" "$(realpath -m "$2")" "$(realpath -m "$3")"
