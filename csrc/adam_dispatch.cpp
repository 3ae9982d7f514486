// Coefficients, and the choice of path.
#include <cmath>

#include "adam_kernels.hpp"

namespace fuyou {

AdamCoefficients::AdamCoefficients(const AdamHyper& hyper, const std::vector<float>& gradient_scales)
    : scales(gradient_scales.data()), scale_count(gradient_scales.size()) {
    const double steps = static_cast<double>(hyper.step);
    const double bias1 = 1 - std::pow(hyper.beta1, steps);
    const double bias2 = 1 - std::pow(hyper.beta2, steps);
    const float one_minus_beta1 = static_cast<float>(1 - hyper.beta1);
    const bool decays = hyper.weight_decay != 0;

    decay = decays && hyper.decoupled ? static_cast<float>(std::fma(-hyper.lr, hyper.weight_decay, 1.0)) : 1.0f;
    l2 = decays && !hyper.decoupled;
    weight_decay = static_cast<float>(hyper.weight_decay);
    lerp_small = std::fabs(one_minus_beta1) < 0.5f;
    lerp = lerp_small ? one_minus_beta1 : one_minus_beta1 - 1.0f;
    beta2 = static_cast<float>(hyper.beta2);
    one_minus_beta2 = static_cast<float>(1 - hyper.beta2);
    negative_step_size = static_cast<float>(-(hyper.lr / bias1));
    bias2_sqrt = static_cast<float>(std::sqrt(bias2));
    eps = static_cast<float>(hyper.eps);
}

std::vector<const AdamPath*> adam_paths() {
    std::vector<const AdamPath*> paths;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f")) paths.push_back(&adam_avx512_path);
    if (avx2) paths.push_back(&adam_avx2_path);
#endif
    paths.push_back(&adam_scalar_path);
    return paths;
}

const AdamPath& adam_path(const std::string& name) {
    std::string known;
    for (const AdamPath* path : adam_paths()) {
        if (name == "auto" || name == path->name) return *path;
        known += std::string(known.empty() ? "" : ", ") + path->name;
    }
    throw std::invalid_argument("no Adam kernel path '" + name + "' on this CPU; there are auto, " + known);
}

bool adam_step(const Fp32Range& range, size_t count, size_t tail, const AdamCoefficients& k, const AdamThreads& threads,
               const AdamPath& path) {
    return deal(count, threads,
                [&](size_t begin, size_t end) { return path.fp32(range, k, begin, end, count - tail); });
}

// Streaming stores pay for the copy, which nobody reads until it has left the caches: 8 to 11 % of a step at 50M
// elements, since an ordinary store first reads the line. For what the step reads anyway they cost 40 %.
bool adam_step(const CopyRange& range, size_t count, size_t tail, const AdamCoefficients& k, const AdamThreads& threads,
               const AdamPath& path) {
    CopyRange r = range;
    r.stream = reinterpret_cast<uintptr_t>(r.copy) % 32 == 0;
    return deal(count, threads, [&](size_t begin, size_t end) { return path.copy(r, k, begin, end, count - tail); });
}

bool adam_step(const SplitRange& range, size_t count, size_t tail, const AdamCoefficients& k,
               const AdamThreads& threads, const AdamPath& path) {
    return deal(count, threads,
                [&](size_t begin, size_t end) { return path.split(range, k, begin, end, count - tail); });
}

void adam_split_master(const MasterRange& range, size_t count, const AdamThreads& threads, const AdamPath& path) {
    deal(count, threads, [&](size_t begin, size_t end) { return path.split_master(range, begin, end), false; });
}

void adam_merge_master(const MasterRange& range, size_t count, const AdamThreads& threads, const AdamPath& path) {
    deal(count, threads, [&](size_t begin, size_t end) { return path.merge_master(range, begin, end), false; });
}

}  // namespace fuyou
