// What the library of a kernel exports; KERNEL_NAME is the kernel's function, whose source stands before.
#pragma once

#include "cuda_emulator.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {
void call_kernel(void **arguments) { emulator::call(KERNEL_NAME, arguments); }
const char *last_error = "";
typedef const char *Function(const unsigned *geometry, size_t shared, void **arguments);
} // namespace

EXPORTED int emulated_arity() { return emulator::arity(KERNEL_NAME); }
EXPORTED void emulated_backwards(int on) { emulator::backwards = on; }

// Runs this kernel; `geometry`: grid and block. Returns null, or what went wrong.
EXPORTED const char *emulated_function(const unsigned *geometry, size_t shared, void **arguments) {
    emulator::body = call_kernel;
    emulator::arguments = arguments;
    int count = 0;
    while (arguments[count]) ++count;
    if (count != emulated_arity()) {
        snprintf(emulator::error, sizeof emulator::error, "it has %d arguments, not %d", emulated_arity(), count);
        return emulator::error;
    }
    const uint3 grid = {geometry[0], geometry[1], geometry[2]}, block = {geometry[3], geometry[4], geometry[5]};
    return emulator::run(grid, block, shared) ? emulator::error : nullptr;
}

// As cuLaunchKernel, of any kernel's `emulated_function`; the list of arguments ends with a null.
EXPORTED int emulated_launch(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared, void *, void **arguments, void **) {
    const unsigned geometry[] = {grid_x, grid_y, grid_z, block_x, block_y, block_z};
    const char *error = ((Function *)function)(geometry, shared, arguments);
    last_error = error ? error : "";
    return error != nullptr;
}

// As cuGetErrorString.
EXPORTED int emulated_error_string(int, const char **text) {
    *text = last_error;
    return 0;
}
