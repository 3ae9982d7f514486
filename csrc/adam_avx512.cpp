// The AVX-512 path: 16 elements at a time. Only called where the CPU has these instructions (adam_dispatch.cpp).
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns of its own intrinsics (gcc PR 105593)
#endif

#include <immintrin.h>

#include "adam_kernels.hpp"  // and the standard headers with it, before the instruction set is switched on

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx2,fma")
#endif

#include "adam_lanes.hpp"

namespace fuyou {
namespace {

struct Avx512Lanes {
    static constexpr size_t width = 16;
    using F = __m512;
    using U = __m512i;
    using M = __mmask16;

    static FUYOU_INLINE F set(float x) { return _mm512_set1_ps(x); }
    static FUYOU_INLINE U set_bits(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    static FUYOU_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
    static FUYOU_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static FUYOU_INLINE U load_u16(const uint16_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static FUYOU_INLINE U load_i16(const uint16_t* p) {
        return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static FUYOU_INLINE void store_u16(uint16_t* p, U x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
    }
    static FUYOU_INLINE void stream_u16(uint16_t* p, U x) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
    }
    static FUYOU_INLINE void stream_end() { _mm_sfence(); }
    static FUYOU_INLINE U bits(F x) { return _mm512_castps_si512(x); }
    static FUYOU_INLINE F floats(U x) { return _mm512_castsi512_ps(x); }
    static FUYOU_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    static FUYOU_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static FUYOU_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static FUYOU_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
    static FUYOU_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
    static FUYOU_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static FUYOU_INLINE U add(U a, U b) { return _mm512_add_epi32(a, b); }
    static FUYOU_INLINE U sub(U a, U b) { return _mm512_sub_epi32(a, b); }
    static FUYOU_INLINE U bit_and(U a, U b) { return _mm512_and_si512(a, b); }
    static FUYOU_INLINE U bit_or(U a, U b) { return _mm512_or_si512(a, b); }
    template <int N>
    static FUYOU_INLINE U shift_left(U a) {
        return _mm512_slli_epi32(a, N);
    }
    template <int N>
    static FUYOU_INLINE U shift_right(U a) {
        return _mm512_srli_epi32(a, N);
    }
    static FUYOU_INLINE F taint(F sum, F x) { return _mm512_fmadd_ps(x, _mm512_setzero_ps(), sum); }
    static FUYOU_INLINE M equal(U a, U b) { return _mm512_cmpeq_epi32_mask(a, b); }
    static FUYOU_INLINE M is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
    static FUYOU_INLINE M either(M a, M b) { return static_cast<M>(a | b); }
    static FUYOU_INLINE bool any(M m) { return m != 0; }
    static FUYOU_INLINE U select(M m, U x, U y) { return _mm512_mask_blend_epi32(m, y, x); }
};

}  // namespace

const AdamPath adam_avx512_path = make_path<Avx512Lanes>("avx512");

}  // namespace fuyou

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
