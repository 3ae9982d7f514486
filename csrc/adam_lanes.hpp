// The arithmetic of adam_kernels.hpp, written once over a `Lanes` type and compiled once per vector path: each
// adam_<path>.cpp switches its instruction set on, defines its lanes, and includes this file. Everything here is in
// an unnamed namespace and calls no inline function of the standard library, so that the linker cannot merge code
// built for one instruction set into another path.
//
// A Lanes type has `width`, `F` (floats), `U` (32-bit integers), `M` (one truth a lane) and the operations used below.
// Each float operation rounds once; store_u16 and stream_u16 take the low halves;
// stream_u16 wants a multiple of 2 * width bytes, and stream_end() before anyone else reads; `taint` is `sum` where `x`
// is finite, else NaN.
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
    using M = bool;

    static FUYOU_INLINE F set(float x) { return x; }
    static FUYOU_INLINE U set_bits(uint32_t x) { return x; }
    static FUYOU_INLINE F load(const float* p) { return *p; }
    static FUYOU_INLINE void store(float* p, F x) { *p = x; }
    static FUYOU_INLINE U load_u16(const uint16_t* p) { return *p; }
    static FUYOU_INLINE U load_i16(const uint16_t* p) { return static_cast<U>(static_cast<int16_t>(*p)); }
    static FUYOU_INLINE void store_u16(uint16_t* p, U x) { *p = static_cast<uint16_t>(x); }
    static FUYOU_INLINE void stream_u16(uint16_t* p, U x) { store_u16(p, x); }
    static FUYOU_INLINE void stream_end() {}
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
    static FUYOU_INLINE F taint(F sum, F x) { return sum + (x - x); }
    static FUYOU_INLINE M equal(U a, U b) { return a == b; }
    static FUYOU_INLINE M is_nan(F a) { return a != a; }
    static FUYOU_INLINE M either(M a, M b) { return a || b; }
    static FUYOU_INLINE bool any(M m) { return m; }
    static FUYOU_INLINE U select(M m, U x, U y) { return m ? x : y; }
};

constexpr uint32_t kSign = 0x80000000u;
constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kQuiet = 0x00400000u;

// Bits of x rounded to bf16, to nearest even, in the upper half, garbage in the lower; a NaN stays one, made quiet.
template <class L>
FUYOU_INLINE typename L::U round_to_bf16(typename L::F x) {
    const auto bits = L::bits(x);
    const auto odd = L::bit_and(L::template shift_right<16>(bits), L::set_bits(1));
    const auto rounded = L::add(L::add(bits, L::set_bits(0x7fff)), odd);
    const auto nan = L::is_nan(x);
    if (__builtin_expect(L::any(nan), 0)) return L::select(nan, L::bit_or(bits, L::set_bits(kQuiet)), rounded);
    return rounded;
}

// hi, lo and the tie bit (the sign of `tie_sign`) to the fp32 master's bits; lo comes with its sign extended. Where lo
// is no tie, adding it as a signed number undoes the rounding up. Ties are one in 65,536: a branch, not arithmetic.
template <class L>
FUYOU_INLINE typename L::U merge_bits(typename L::U hi, typename L::U lo, typename L::U tie_sign) {
    const auto master = L::add(L::template shift_left<16>(hi), lo);
    const auto tie = L::equal(lo, L::set_bits(0xffff8000u));
    if (__builtin_expect(L::any(tie), 0)) {
        const auto not_rounded_up = L::sub(L::set_bits(1), L::template shift_right<31>(tie_sign));
        return L::select(tie, L::add(master, L::template shift_left<16>(not_rounded_up)), master);
    }
    return master;
}

template <class L>
struct Split {
    typename L::U hi, lo, tie_sign;  // of hi and lo the low halves count
};

// Where the low half is neither a tie nor part of a NaN, rounding to nearest is adding half and cutting off.
template <class L>
FUYOU_INLINE Split<L> split_bits(typename L::F x) {
    const auto master = L::bits(x);
    const auto upper = L::add(master, L::set_bits(0x8000));
    Split<L> s{L::template shift_right<16>(upper), master, L::set_bits(0)};
    const auto nan = L::is_nan(x);
    const auto tie = L::equal(L::template shift_left<16>(master), L::set_bits(kSign));
    if (__builtin_expect(L::any(L::either(nan, tie)), 0)) {
        s.hi = L::template shift_right<16>(round_to_bf16<L>(x));
        s.lo = L::select(nan, L::set_bits(0), master);
        const auto rounded_up = L::equal(L::bit_and(master, L::set_bits(0x1ffff)), L::set_bits(0x18000));
        s.tie_sign = L::select(rounded_up, L::set_bits(kSign), L::set_bits(0));
    }
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

template <class L>
FUYOU_INLINE typename L::F scaled_bf16(const uint16_t* grad, const AdamCoefficients& k) {
    auto g = L::floats(L::template shift_left<16>(L::load_u16(grad)));
    for (size_t s = 0; s < k.scale_count; ++s) {
        const auto rounded = round_to_bf16<L>(L::mul(g, L::set(k.scales[s])));
        g = L::floats(L::bit_and(rounded, L::set_bits(0xffff0000u)));
    }
    return g;
}

// One step of L::width elements from i on, for each kind of range; `tainted` is that of [Note: non-finite gradients].
template <class L, bool kTail>
FUYOU_INLINE void step_at(const Fp32Range& r, const AdamCoefficients& k, size_t i, typename L::F& tainted) {
    auto g = L::load(r.grad + i);
    for (size_t s = 0; s < k.scale_count; ++s) g = L::mul(g, L::set(k.scales[s]));
    tainted = L::taint(tainted, g);
    auto p = L::load(r.param + i);
    auto m = L::load(r.exp_avg + i);
    auto v = L::load(r.exp_avg_sq + i);
    update<L, kTail>(k, g, p, m, v);
    L::store(r.param + i, p);
    L::store(r.exp_avg + i, m);
    L::store(r.exp_avg_sq + i, v);
}

template <class L, bool kTail>
FUYOU_INLINE void step_at(const CopyRange& r, const AdamCoefficients& k, size_t i, typename L::F& tainted) {
    auto g = scaled_bf16<L>(r.grad + i, k);
    tainted = L::taint(tainted, g);
    auto p = L::load(r.param + i);
    auto m = L::load(r.exp_avg + i);
    auto v = L::load(r.exp_avg_sq + i);
    update<L, kTail>(k, g, p, m, v);
    L::store(r.param + i, p);
    L::store(r.exp_avg + i, m);
    L::store(r.exp_avg_sq + i, v);
    const auto copy = L::template shift_right<16>(round_to_bf16<L>(p));
    if (r.stream)
        L::stream_u16(r.copy + i, copy);
    else
        L::store_u16(r.copy + i, copy);
}

template <class L, bool kTail>
FUYOU_INLINE void step_at(const SplitRange& r, const AdamCoefficients& k, size_t i, typename L::F& tainted) {
    auto g = scaled_bf16<L>(r.grad + i, k);
    tainted = L::taint(tainted, g);
    const auto v_bits = L::bits(L::load(r.exp_avg_sq + i));
    auto v = L::floats(L::bit_and(v_bits, L::set_bits(kMagnitude)));
    auto m = L::load(r.exp_avg + i);
    auto p = L::floats(merge_bits<L>(L::load_u16(r.hi + i), L::load_i16(r.lo + i), v_bits));
    update<L, kTail>(k, g, p, m, v);
    const auto s = split_bits<L>(p);
    L::store_u16(r.hi + i, s.hi);
    L::store_u16(r.lo + i, s.lo);
    L::store(r.exp_avg + i, m);
    L::store(r.exp_avg_sq + i, L::floats(L::bit_or(L::bit_and(L::bits(v), L::set_bits(kMagnitude)), s.tie_sign)));
}

template <class L>
FUYOU_INLINE void split_master_at(const MasterRange& r, size_t i) {
    const auto s = split_bits<L>(L::load(r.master + i));
    const auto v = L::bit_and(L::bits(L::load(r.exp_avg_sq + i)), L::set_bits(kMagnitude));
    L::store_u16(r.hi + i, s.hi);
    L::store_u16(r.lo + i, s.lo);
    L::store(r.exp_avg_sq + i, L::floats(L::bit_or(v, s.tie_sign)));
}

template <class L>
FUYOU_INLINE void merge_master_at(const MasterRange& r, size_t i) {
    const auto tie_sign = L::bits(L::load(r.exp_avg_sq + i));
    L::store(r.master + i, L::floats(merge_bits<L>(L::load_u16(r.hi + i), L::load_i16(r.lo + i), tie_sign)));
}

// Whole vectors, then single elements, then the tail by its own formula.
template <class L, class Range>
bool run_step(const Range& range, const AdamCoefficients& k, size_t begin, size_t end, size_t tail_begin) {
    const Range r = range;  // local copies: the stores below cannot alias them
    const AdamCoefficients c = k;
    const size_t body_end = tail_begin < end ? tail_begin : end;
    auto tainted = L::set(0);
    float tainted_single = 0;
    size_t i = begin;
    for (; i + L::width <= body_end; i += L::width) step_at<L, false>(r, c, i, tainted);
    for (; i < body_end; ++i) step_at<ScalarLanes, false>(r, c, i, tainted_single);
    for (; i < end; ++i) step_at<ScalarLanes, true>(r, c, i, tainted_single);
    L::stream_end();
    return L::any(L::is_nan(tainted)) || ScalarLanes::is_nan(tainted_single);
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
    return {name,
            run_step<L, Fp32Range>,
            run_step<L, CopyRange>,
            run_step<L, SplitRange>,
            run_split_master<L>,
            run_merge_master<L>};
}

}  // namespace
}  // namespace fuyou
