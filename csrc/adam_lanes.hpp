// The arithmetic of adam_kernels.hpp, written once over a `Lanes` type and compiled once per vector path: each
// adam_<path>.cpp switches its instruction set on, defines its lanes, and includes this file. Everything here is in
// an unnamed namespace and calls no inline function of the standard library, so that the linker cannot merge code
// built for one instruction set into another path.
//
// A Lanes type has `width`, `F` (floats), `U` (32-bit integers) and the operations used below; each float operation
// rounds once.
#pragma once

#include "adam_kernels.hpp"

#if defined(__GNUC__) || defined(__clang__)
#define FUYOU_INLINE inline __attribute__((always_inline))
#else
#define FUYOU_INLINE inline
#endif

namespace fuyou {
namespace {

struct ScalarLanes {
    static constexpr size_t width = 1;
    using F = float;
    using U = uint32_t;

    static FUYOU_INLINE F set(float x) { return x; }
    static FUYOU_INLINE U set_bits(uint32_t x) { return x; }
    static FUYOU_INLINE F load(const float* p) { return *p; }
    static FUYOU_INLINE void store(float* p, F x) { *p = x; }
    static FUYOU_INLINE U load_u16(const uint16_t* p) { return *p; }
    static FUYOU_INLINE void store_u16(uint16_t* p, U x) { *p = static_cast<uint16_t>(x); }
    static FUYOU_INLINE U bits(F x) {
        U u;
        __builtin_memcpy(&u, &x, sizeof u);
        return u;
    }
    static FUYOU_INLINE F floats(U u) {
        F x;
        __builtin_memcpy(&x, &u, sizeof x);
        return x;
    }
    static FUYOU_INLINE F add(F a, F b) { return a + b; }
    static FUYOU_INLINE F sub(F a, F b) { return a - b; }
    static FUYOU_INLINE F mul(F a, F b) { return a * b; }
    static FUYOU_INLINE F div(F a, F b) { return a / b; }
    static FUYOU_INLINE F sqrt(F a) { return __builtin_sqrtf(a); }
    static FUYOU_INLINE F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
    static FUYOU_INLINE U add(U a, U b) { return a + b; }
    static FUYOU_INLINE U sub(U a, U b) { return a - b; }
    static FUYOU_INLINE U bit_and(U a, U b) { return a & b; }
    static FUYOU_INLINE U bit_or(U a, U b) { return a | b; }
    template <int N>
    static FUYOU_INLINE U shift_left(U a) {
        return a << N;
    }
    template <int N>
    static FUYOU_INLINE U shift_right(U a) {
        return a >> N;
    }
    // Lane by lane: a > b (both below 2^31) ? x : y, and a == b ? x : y.
    static FUYOU_INLINE U if_greater(U a, U b, U x, U y) { return a > b ? x : y; }
    static FUYOU_INLINE U if_equal(U a, U b, U x, U y) { return a == b ? x : y; }
};

constexpr uint32_t kSign = 0x80000000u;
constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kQuiet = 0x00400000u;

// Bits of x rounded to bf16, to nearest even, in the upper half; a NaN stays one, made quiet.
template <class L>
FUYOU_INLINE typename L::U round_to_bf16(typename L::U x) {
    const auto odd = L::bit_and(L::template shift_right<16>(x), L::set_bits(1));
    const auto rounded = L::add(L::add(x, L::set_bits(0x7fff)), odd);
    const auto quieted = L::bit_or(x, L::set_bits(kQuiet));
    const auto is_nan_of = L::bit_and(x, L::set_bits(kMagnitude));
    const auto upper = L::if_greater(is_nan_of, L::set_bits(kInfinity), quieted, rounded);
    return L::bit_and(upper, L::set_bits(0xffff0000u));
}

// hi, lo and the tie bit (all in the low halves but the tie, which is the sign bit) to the fp32 master's bits.
template <class L>
FUYOU_INLINE typename L::U merge_bits(typename L::U hi, typename L::U lo, typename L::U tie_sign) {
    const auto tie = L::template shift_right<31>(tie_sign);
    const auto rounded_up = L::template shift_right<16>(L::add(L::add(lo, tie), L::set_bits(0x7fff)));
    return L::bit_or(L::template shift_left<16>(L::sub(hi, rounded_up)), lo);
}

template <class L>
struct Split {
    typename L::U hi, lo, tie_sign;
};

template <class L>
FUYOU_INLINE Split<L> split_bits(typename L::U master) {
    const auto magnitude = L::bit_and(master, L::set_bits(kMagnitude));
    const auto low = L::bit_and(master, L::set_bits(0xffff));
    Split<L> s;
    s.hi = L::template shift_right<16>(round_to_bf16<L>(master));
    s.lo = L::if_greater(magnitude, L::set_bits(kInfinity), L::set_bits(0), low);
    s.tie_sign =
        L::if_equal(L::bit_and(master, L::set_bits(0x1ffff)), L::set_bits(0x18000), L::set_bits(kSign), L::set_bits(0));
    return s;
}

// One update of L::width elements; g is already scaled. See [Note: torch's bits].
template <class L, bool kTail>
FUYOU_INLINE void update(const AdamCoefficients& k, typename L::F g, typename L::F& p, typename L::F& m,
                         typename L::F& v) {
    if (k.l2)
        g = L::fma(p, L::set(k.weight_decay), g);
    else
        p = L::mul(p, L::set(k.decay));
    m = L::fma(L::set(k.lerp), L::sub(g, m), k.lerp_small ? m : g);
    const auto weighted = L::mul(L::set(k.one_minus_beta2), g);
    const auto beta2 = L::set(k.beta2);
    v = kTail ? L::fma(v, beta2, L::mul(weighted, g)) : L::fma(weighted, g, L::mul(v, beta2));
    const auto denominator = L::add(L::div(L::sqrt(v), L::set(k.bias2_sqrt)), L::set(k.eps));
    p = L::add(p, L::div(L::mul(L::set(k.negative_step_size), m), denominator));
}

template <class L, bool kTail>
FUYOU_INLINE void fp32_at(const Fp32Range& r, const AdamCoefficients& k, size_t i) {
    auto g = L::load(r.grad + i);
    for (size_t s = 0; s < k.scale_count; ++s) g = L::mul(g, L::set(k.scales[s]));
    auto p = L::load(r.param + i);
    auto m = L::load(r.exp_avg + i);
    auto v = L::load(r.exp_avg_sq + i);
    update<L, kTail>(k, g, p, m, v);
    L::store(r.param + i, p);
    L::store(r.exp_avg + i, m);
    L::store(r.exp_avg_sq + i, v);
}

template <class L, bool kTail>
FUYOU_INLINE void split_at(const SplitRange& r, const AdamCoefficients& k, size_t i) {
    auto g = L::floats(L::template shift_left<16>(L::load_u16(r.grad + i)));
    for (size_t s = 0; s < k.scale_count; ++s) g = L::floats(round_to_bf16<L>(L::bits(L::mul(g, L::set(k.scales[s])))));
    const auto v_bits = L::bits(L::load(r.exp_avg_sq + i));
    auto v = L::floats(L::bit_and(v_bits, L::set_bits(kMagnitude)));
    auto m = L::load(r.exp_avg + i);
    auto p = L::floats(merge_bits<L>(L::load_u16(r.hi + i), L::load_u16(r.lo + i), v_bits));
    update<L, kTail>(k, g, p, m, v);
    const auto s = split_bits<L>(L::bits(p));
    L::store_u16(r.hi + i, s.hi);
    L::store_u16(r.lo + i, s.lo);
    L::store(r.exp_avg + i, m);
    L::store(r.exp_avg_sq + i, L::floats(L::bit_or(L::bit_and(L::bits(v), L::set_bits(kMagnitude)), s.tie_sign)));
}

template <class L>
FUYOU_INLINE void split_master_at(const MasterRange& r, size_t i) {
    const auto s = split_bits<L>(L::bits(L::load(r.master + i)));
    const auto v = L::bit_and(L::bits(L::load(r.exp_avg_sq + i)), L::set_bits(kMagnitude));
    L::store_u16(r.hi + i, s.hi);
    L::store_u16(r.lo + i, s.lo);
    L::store(r.exp_avg_sq + i, L::floats(L::bit_or(v, s.tie_sign)));
}

template <class L>
FUYOU_INLINE void merge_master_at(const MasterRange& r, size_t i) {
    const auto tie_sign = L::bits(L::load(r.exp_avg_sq + i));
    L::store(r.master + i, L::floats(merge_bits<L>(L::load_u16(r.hi + i), L::load_u16(r.lo + i), tie_sign)));
}

// Whole vectors, then single elements, then the tail by its own formula.
template <class L>
void run_fp32(const Fp32Range& r, const AdamCoefficients& k, size_t begin, size_t end, size_t tail_begin) {
    const AdamCoefficients c = k;  // a local copy: the stores below cannot alias it
    const size_t body_end = tail_begin < end ? tail_begin : end;
    size_t i = begin;
    for (; i + L::width <= body_end; i += L::width) fp32_at<L, false>(r, c, i);
    for (; i < body_end; ++i) fp32_at<ScalarLanes, false>(r, c, i);
    for (; i < end; ++i) fp32_at<ScalarLanes, true>(r, c, i);
}

template <class L>
void run_split(const SplitRange& r, const AdamCoefficients& k, size_t begin, size_t end, size_t tail_begin) {
    const AdamCoefficients c = k;
    const size_t body_end = tail_begin < end ? tail_begin : end;
    size_t i = begin;
    for (; i + L::width <= body_end; i += L::width) split_at<L, false>(r, c, i);
    for (; i < body_end; ++i) split_at<ScalarLanes, false>(r, c, i);
    for (; i < end; ++i) split_at<ScalarLanes, true>(r, c, i);
}

template <class L>
void run_split_master(const MasterRange& r, size_t begin, size_t end) {
    size_t i = begin;
    for (; i + L::width <= end; i += L::width) split_master_at<L>(r, i);
    for (; i < end; ++i) split_master_at<ScalarLanes>(r, i);
}

template <class L>
void run_merge_master(const MasterRange& r, size_t begin, size_t end) {
    size_t i = begin;
    for (; i + L::width <= end; i += L::width) merge_master_at<L>(r, i);
    for (; i < end; ++i) merge_master_at<ScalarLanes>(r, i);
}

template <class L>
constexpr AdamPath make_path(const char* name) {
    return {name, run_fp32<L>, run_split<L>, run_split_master<L>, run_merge_master<L>};
}

}  // namespace
}  // namespace fuyou
