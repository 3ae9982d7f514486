// What each part of the extension adds to the module `fuyou._native`.
#pragma once

#include <pybind11/pybind11.h>

void bind_io(pybind11::module_& module);        // io_bindings.cpp
void bind_adam(pybind11::module_& module);      // adam_bindings.cpp
void bind_checksum(pybind11::module_& module);  // checksum_bindings.cpp
