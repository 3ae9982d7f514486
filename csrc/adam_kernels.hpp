// AdamW and Adam over raw ranges of host memory, with the bits of torch's fused CPU kernel.
//
// [Note: torch's bits] Found by experiment against torch 2.13 (x86-64, gcc, its AVX2 build, which it also runs on
// AVX-512 machines). All constants are made in double and cast to float once:
//   c1 = 1 - beta1, c2 = 1 - beta2, step_size = lr / (1 - beta1^t), bias2_sqrt = sqrt(1 - beta2^t),
//   decay = fma(-lr, weight_decay, 1)                     (contracted by torch's compiler, in double)
// then, in float, each operation rounded once and `fma` only where written:
//   AdamW  p = p * decay                                  (skipped when weight_decay == 0)
//   Adam   g = fma(p, weight_decay, g)                    (skipped when weight_decay == 0)
//   d = g - m;  |c1| < 0.5:  m = fma(c1, d, m)
//               else body:   m = fma(c1 - 1, d, g)        tail: m = fma(-d, 1 - c1, g), the same bits
//   body  v = fma(c2 * g, g, v * beta2)
//   tail  v = fma(v, beta2, (c2 * g) * g)
//   p = p - (step_size * m) / (sqrt(v) / bias2_sqrt + eps)
// "Tail" is the last numel % 8 elements of a tensor, whatever the number of threads: torch deals its threads whole
// cache lines. So bits depend neither on our chunk edges nor on our vector width nor on our threads.
//
// [Note: split master] An fp32 master is kept as `hi`, its bf16 copy rounded to nearest even, and `lo`, its 16 low
// bits. hi is the upper half of the master, plus one if it was rounded up, which lo tells except for an exact tie
// (lo == 0x8000): then the sign bit of exp_avg_sq, never negative, is set if it was rounded up. A NaN is kept as a
// quiet bf16 NaN with lo == 0, so it comes back as a NaN, though its low payload bits do not.
//
// [Note: non-finite gradients] Every step tells whether any element of the gradient, after its scales, was infinite or
// NaN; the update is the same either way, as torch's is. Each vector's gradient times zero is added up: a sum of zeros,
// or NaN for good. One instruction a vector, lost in the wait for memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "adam_threads.hpp"

namespace fuyou {

struct AdamHyper {
    double lr, beta1, beta2, eps, weight_decay;
    bool decoupled;  // true: AdamW, false: Adam with L2
    int64_t step;    // 1-based, after the increment
};

// What one call needs of the hyperparameters, cast to float once. See [Note: torch's bits].
struct AdamCoefficients {
    float decay;  // what the parameter is multiplied with; 1 when there is nothing to decay
    bool l2;      // add weight_decay * parameter to the gradient
    float weight_decay;
    bool lerp_small;  // |1 - beta1| < 0.5
    float lerp;       // 1 - beta1, less 1 where it is not small
    float beta2, one_minus_beta2;
    float negative_step_size, bias2_sqrt, eps;
    const float* scales;  // the gradient is multiplied with each in order, rounding to its dtype after each
    size_t scale_count;

    AdamCoefficients(const AdamHyper& hyper, const std::vector<float>& gradient_scales);
};

// fp32 state and gradient. No two arrays may overlap.
struct Fp32Range {
    float* param;
    float* exp_avg;
    float* exp_avg_sq;
    const float* grad;
};

// fp32 state, bf16 gradient, and a bf16 compute copy that is written and never read.
struct CopyRange {
    float* param;
    uint16_t* copy;
    float* exp_avg;
    float* exp_avg_sq;
    const uint16_t* grad;
    bool stream;  // write `copy` past the caches; chosen by adam_step(), wants it at a multiple of 32 bytes
};

// bf16 compute copy, split master and bf16 gradient. See [Note: split master].
struct SplitRange {
    uint16_t* hi;
    uint16_t* lo;
    float* exp_avg;
    float* exp_avg_sq;  // its sign bit belongs to the split master
    const uint16_t* grad;
};

struct MasterRange {
    float* master;
    uint16_t* hi;
    uint16_t* lo;
    float* exp_avg_sq;  // only its sign bit is used
};

// One vector path. Each function treats elements [begin, end), begin a multiple of 16; those from `tail_begin` on by
// the tail formula. A step returns whether the gradient held anything that is not finite.
struct AdamPath {
    const char* name;
    bool (*fp32)(const Fp32Range&, const AdamCoefficients&, size_t begin, size_t end, size_t tail_begin);
    bool (*copy)(const CopyRange&, const AdamCoefficients&, size_t begin, size_t end, size_t tail_begin);
    bool (*split)(const SplitRange&, const AdamCoefficients&, size_t begin, size_t end, size_t tail_begin);
    void (*split_master)(const MasterRange&, size_t begin, size_t end);
    void (*merge_master)(const MasterRange&, size_t begin, size_t end);
};

extern const AdamPath adam_scalar_path;
#if defined(__x86_64__)
extern const AdamPath adam_avx2_path;
extern const AdamPath adam_avx512_path;
#endif

// Paths that this CPU runs, best first; the scalar one is always the last.
std::vector<const AdamPath*> adam_paths();

// The path of that name, or the best one for "auto". Throws std::invalid_argument naming those there are.
const AdamPath& adam_path(const std::string& name);

// Each runs on `threads` (fewer for a short range, or where the system gives none) and returns when all of the range is
// done. See [Note: non-finite gradients] for what a step returns.
bool adam_step(const Fp32Range&, size_t count, size_t tail, const AdamCoefficients&, const AdamThreads&,
               const AdamPath&);
bool adam_step(const CopyRange&, size_t count, size_t tail, const AdamCoefficients&, const AdamThreads&,
               const AdamPath&);
bool adam_step(const SplitRange&, size_t count, size_t tail, const AdamCoefficients&, const AdamThreads&,
               const AdamPath&);
void adam_split_master(const MasterRange&, size_t count, const AdamThreads&, const AdamPath&);
void adam_merge_master(const MasterRange&, size_t count, const AdamThreads&, const AdamPath&);

}  // namespace fuyou
