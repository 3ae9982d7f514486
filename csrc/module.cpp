// fuyou._native: pointers, sizes and scalars only. It never links to torch, so one build serves every torch version.
#include "bindings.hpp"

PYBIND11_MODULE(_native, module) {
    module.doc() = "fuyou's native parts: asynchronous I/O engines, AdamW kernels and checksums";
    bind_io(module);
    bind_adam(module);
    bind_checksum(module);
}
