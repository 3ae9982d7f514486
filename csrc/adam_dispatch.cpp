// Coefficients, choice of path, and threads. The threads live for one call: at a chunk's tens of MiB, starting one
// (tens of microseconds) is lost in the milliseconds of the update, and nothing is left behind for a fork to break.
#include <algorithm>
#include <cmath>
#include <system_error>
#include <thread>

#include "adam_kernels.hpp"

namespace fuyou {

namespace {

constexpr size_t kThreadUnit = 16;                // elements: edges between threads are edges of whole vectors
constexpr size_t kThreadLeast = size_t{1} << 15;  // elements below which another thread costs more than it does

// Runs task(begin, end) over [0, count). What the system has no thread for runs here.
template <class Task>
void for_each_part(size_t count, int threads, const Task& task) {
    const size_t useful = std::max<size_t>(1, count / kThreadLeast);
    const size_t parts = std::min<size_t>(useful, static_cast<size_t>(std::max(threads, 1)));
    const size_t units = (count + kThreadUnit - 1) / kThreadUnit;
    const auto edge = [&](size_t part) { return std::min(count, units * part / parts * kThreadUnit); };

    std::vector<std::thread> workers;
    workers.reserve(parts);
    size_t begun = 1;  // part 0 is this thread's
    try {
        for (; begun < parts; ++begun) workers.emplace_back(task, edge(begun), edge(begun + 1));
    } catch (const std::system_error&) {  // EAGAIN: no thread to be had
    }
    task(edge(0), edge(1));
    if (begun < parts) task(edge(begun), count);
    for (auto& worker : workers) worker.join();
}

}  // namespace

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

void adam_fp32(const Fp32Range& range, size_t count, size_t tail, const AdamCoefficients& k, int threads,
               const AdamPath& path) {
    for_each_part(count, threads, [&](size_t begin, size_t end) { path.fp32(range, k, begin, end, count - tail); });
}

void adam_split(const SplitRange& range, size_t count, size_t tail, const AdamCoefficients& k, int threads,
                const AdamPath& path) {
    for_each_part(count, threads, [&](size_t begin, size_t end) { path.split(range, k, begin, end, count - tail); });
}

void adam_split_master(const MasterRange& range, size_t count, int threads, const AdamPath& path) {
    for_each_part(count, threads, [&](size_t begin, size_t end) { path.split_master(range, begin, end); });
}

void adam_merge_master(const MasterRange& range, size_t count, int threads, const AdamPath& path) {
    for_each_part(count, threads, [&](size_t begin, size_t end) { path.merge_master(range, begin, end); });
}

}  // namespace fuyou
