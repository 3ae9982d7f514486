// CRC-32C (Castagnoli; RFC 3720, appendix B.4) of raw memory: the checksum of what a commit names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fuyou {

// One way to compute it; all give the same number. `value` is the checksum of what comes before `data`, 0 for nothing.
struct ChecksumPath {
    const char* name;
    uint32_t (*crc32c)(uint32_t value, const unsigned char* data, size_t nbytes);
};

// Paths that this CPU runs, best first; the one with tables, for any CPU, is always the last.
std::vector<const ChecksumPath*> checksum_paths();

// The path of that name, or the best one for "auto". Throws std::invalid_argument naming those there are.
const ChecksumPath& checksum_path(const std::string& name);

}  // namespace fuyou
