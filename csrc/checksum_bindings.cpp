// Python's way to the checksum: an address as an integer; what it points to is the caller's word.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "checksum.hpp"

namespace py = pybind11;

namespace {

using namespace fuyou;

uint32_t crc32c(uintptr_t address, size_t nbytes, uint32_t value, const std::string& path) {
    if (address == 0 && nbytes != 0) throw std::invalid_argument("crc32c: the address is null");
    return checksum_path(path).crc32c(value, reinterpret_cast<const unsigned char*>(address), nbytes);
}

std::vector<std::string> path_names() {
    std::vector<std::string> names;
    for (const ChecksumPath* path : checksum_paths()) names.emplace_back(path->name);
    return names;
}

}  // namespace

void bind_checksum(py::module_& m) {
    using py::arg;
    m.def("crc32c", &crc32c, py::call_guard<py::gil_scoped_release>(), arg("address"), arg("nbytes"), arg("value") = 0,
          arg("path") = "auto", "CRC-32C of `nbytes` at `address`, going on from `value` (0: from the start).");
    m.def("crc32c_paths", &path_names, "Ways to compute it that this CPU has, best first.");
}
