// The AVX2 path: 8 elements at a time. Only called where the CPU has these instructions (adam_dispatch.cpp).
#if defined(__x86_64__)

#include <immintrin.h>

#include "adam_kernels.hpp"  // and the standard headers with it, before the instruction set is switched on

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "adam_lanes.hpp"

namespace fuyou {
namespace {

struct Avx2Lanes {
    static constexpr size_t width = 8;
    using F = __m256;
    using U = __m256i;
    using M = __m256i;

    static FUYOU_INLINE F set(float x) { return _mm256_set1_ps(x); }
    static FUYOU_INLINE U set_bits(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
    static FUYOU_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
    static FUYOU_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static FUYOU_INLINE U load_u16(const uint16_t* p) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static FUYOU_INLINE U load_i16(const uint16_t* p) {
        return _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static FUYOU_INLINE __m128i low_halves(U x) {
        const U order = _mm256_set_epi64x(0, 0x0d0c090805040100, 0, 0x0d0c090805040100);
        return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_shuffle_epi8(x, order), 0x08));
    }
    static FUYOU_INLINE void store_u16(uint16_t* p, U x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low_halves(x));
    }
    static FUYOU_INLINE void stream_u16(uint16_t* p, U x) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), low_halves(x));
    }
    static FUYOU_INLINE void stream_end() { _mm_sfence(); }
    static FUYOU_INLINE U bits(F x) { return _mm256_castps_si256(x); }
    static FUYOU_INLINE F floats(U x) { return _mm256_castsi256_ps(x); }
    static FUYOU_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
    static FUYOU_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static FUYOU_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static FUYOU_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
    static FUYOU_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
    static FUYOU_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static FUYOU_INLINE U add(U a, U b) { return _mm256_add_epi32(a, b); }
    static FUYOU_INLINE U sub(U a, U b) { return _mm256_sub_epi32(a, b); }
    static FUYOU_INLINE U bit_and(U a, U b) { return _mm256_and_si256(a, b); }
    static FUYOU_INLINE U bit_or(U a, U b) { return _mm256_or_si256(a, b); }
    template <int N>
    static FUYOU_INLINE U shift_left(U a) {
        return _mm256_slli_epi32(a, N);
    }
    template <int N>
    static FUYOU_INLINE U shift_right(U a) {
        return _mm256_srli_epi32(a, N);
    }
    static FUYOU_INLINE F taint(F sum, F x) { return _mm256_fmadd_ps(x, _mm256_setzero_ps(), sum); }
    static FUYOU_INLINE M equal(U a, U b) { return _mm256_cmpeq_epi32(a, b); }
    static FUYOU_INLINE M is_nan(F a) { return _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
    static FUYOU_INLINE M either(M a, M b) { return _mm256_or_si256(a, b); }
    static FUYOU_INLINE bool any(M m) { return _mm256_testz_si256(m, m) == 0; }
    static FUYOU_INLINE U select(M m, U x, U y) { return _mm256_blendv_epi8(y, x, m); }
};

}  // namespace

const AdamPath adam_avx2_path = make_path<Avx2Lanes>("avx2");

}  // namespace fuyou

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
