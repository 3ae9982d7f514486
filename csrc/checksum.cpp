// CRC-32C by the CPU's own instruction, or by tables.
//
// [Note: three streams] The instruction takes 8 bytes a cycle but answers after three, so three neighbouring pieces are
// run through it side by side. A CRC is linear: that of A followed by B is (A's, carried over as many zero bytes as B
// has) XOR B's from zero. "Carried over n zero bytes" is a linear map on 32 bits, so four tables of 256 do it. (The way
// of Mark Adler's crc32c.c.)
#include "checksum.hpp"

#include <cstring>
#include <stdexcept>

namespace fuyou {

namespace {

constexpr uint32_t kPolynomial = 0x82f63b78u;  // reversed: the lowest bit is the highest power

// bytes[k][b]: what byte b does to a CRC that k more zero bytes follow ("slicing by 8").
struct Tables {
    uint32_t bytes[8][256];

    Tables() {
        for (uint32_t b = 0; b < 256; ++b) {
            uint32_t crc = b;
            for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
            bytes[0][b] = crc;
        }
        for (int k = 1; k < 8; ++k) {
            for (uint32_t b = 0; b < 256; ++b) bytes[k][b] = zero_byte(bytes[k - 1][b]);
        }
    }

    uint32_t zero_byte(uint32_t crc) const { return bytes[0][crc & 0xff] ^ (crc >> 8); }
};

const Tables& tables() {
    static const Tables made;
    return made;
}

uint32_t by_tables(uint32_t value, const unsigned char* p, size_t nbytes) {
    const auto& t = tables().bytes;
    uint32_t crc = ~value;
    for (; nbytes >= 8; nbytes -= 8, p += 8) {  // byte by byte, so that it is the same on a big-endian machine
        crc ^= p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24;
        crc = t[7][crc & 0xff] ^ t[6][(crc >> 8) & 0xff] ^ t[5][(crc >> 16) & 0xff] ^ t[4][crc >> 24] ^ t[3][p[4]] ^
              t[2][p[5]] ^ t[1][p[6]] ^ t[0][p[7]];
    }
    for (; nbytes > 0; --nbytes, ++p) crc = t[0][(crc ^ *p) & 0xff] ^ (crc >> 8);
    return ~crc;
}

const ChecksumPath kTables{"tables", by_tables};

#if defined(__x86_64__)

constexpr size_t kPiece = 4096;  // of each of the three streams: a multiple of 8

// Carries a CRC over kPiece zero bytes.
struct Carry {
    uint32_t bytes[4][256];

    Carry() {
        uint32_t image[32];  // of each bit alone
        for (int bit = 0; bit < 32; ++bit) {
            uint32_t crc = 1u << bit;
            for (size_t i = 0; i < kPiece; ++i) crc = tables().zero_byte(crc);
            image[bit] = crc;
        }
        for (int k = 0; k < 4; ++k) {
            for (uint32_t b = 0; b < 256; ++b) {
                bytes[k][b] = 0;
                for (int bit = 0; bit < 8; ++bit) bytes[k][b] ^= (b >> bit & 1) ? image[8 * k + bit] : 0;
            }
        }
    }

    uint32_t operator()(uint32_t crc) const {
        return bytes[0][crc & 0xff] ^ bytes[1][(crc >> 8) & 0xff] ^ bytes[2][(crc >> 16) & 0xff] ^ bytes[3][crc >> 24];
    }
};

const Carry& carry() {
    static const Carry made;
    return made;
}

uint64_t word(const unsigned char* p) {
    uint64_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

__attribute__((target("sse4.2"))) uint32_t by_instruction(uint32_t value, const unsigned char* p, size_t nbytes) {
    const Carry& over = carry();
    uint64_t crc = static_cast<uint32_t>(~value);
    for (; nbytes >= 3 * kPiece; nbytes -= 3 * kPiece, p += 3 * kPiece) {  // see [Note: three streams]
        uint64_t second = 0, third = 0;
        for (size_t i = 0; i < kPiece; i += 8) {
            crc = __builtin_ia32_crc32di(crc, word(p + i));
            second = __builtin_ia32_crc32di(second, word(p + kPiece + i));
            third = __builtin_ia32_crc32di(third, word(p + 2 * kPiece + i));
        }
        crc = over(static_cast<uint32_t>(crc)) ^ second;
        crc = over(static_cast<uint32_t>(crc)) ^ third;
    }
    for (; nbytes >= 8; nbytes -= 8, p += 8) crc = __builtin_ia32_crc32di(crc, word(p));
    for (; nbytes > 0; --nbytes, ++p) crc = __builtin_ia32_crc32qi(static_cast<uint32_t>(crc), *p);
    return ~static_cast<uint32_t>(crc);
}

const ChecksumPath kInstruction{"sse4.2", by_instruction};

#endif

}  // namespace

std::vector<const ChecksumPath*> checksum_paths() {
    std::vector<const ChecksumPath*> paths;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2")) paths.push_back(&kInstruction);
#endif
    paths.push_back(&kTables);
    return paths;
}

const ChecksumPath& checksum_path(const std::string& name) {
    std::string known;
    for (const ChecksumPath* path : checksum_paths()) {
        if (name == "auto" || name == path->name) return *path;
        known += std::string(known.empty() ? "" : ", ") + path->name;
    }
    throw std::invalid_argument("no checksum path '" + name + "' on this CPU; there are auto, " + known);
}

}  // namespace fuyou
