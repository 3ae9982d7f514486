// Python's way to the Adam kernels: addresses as integers, checked here; what they point to is the caller's word.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "adam_kernels.hpp"
#include "bindings.hpp"

namespace py = pybind11;

namespace {

using namespace fuyou;

constexpr int kMostCpus = 1 << 16;  // more than the kernel is built for anywhere

template <class T>
T* pointer(uintptr_t address, size_t count, const char* name) {
    if (address == 0 && count != 0) throw std::invalid_argument(std::string(name) + ": the address is null");
    if (address % sizeof(T) != 0)
        throw std::invalid_argument(std::string(name) + ": address " + std::to_string(address) +
                                    " is not a multiple of its element's " + std::to_string(sizeof(T)) + " bytes");
    return reinterpret_cast<T*>(address);
}

AdamThreads checked(int threads, const std::vector<int>& cpus) {
    if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + ", at least 1 is needed");
    for (int cpu : cpus)
        if (cpu < 0 || cpu >= kMostCpus) throw std::invalid_argument("there is no CPU " + std::to_string(cpu));
    return {threads, cpus};
}

// What every step takes beside its arrays.
struct Step {
    AdamCoefficients k;
    AdamThreads threads;
    const AdamPath& path;

    Step(size_t count, size_t tail, const std::vector<float>& scales, const AdamHyper& hyper, int thread_count,
         const std::vector<int>& cpus, const std::string& path_name)
        : k(checked_hyper(count, tail, hyper), scales),
          threads(checked(thread_count, cpus)),
          path(adam_path(path_name)) {}

    static const AdamHyper& checked_hyper(size_t count, size_t tail, const AdamHyper& hyper) {
        if (tail > count)
            throw std::invalid_argument("tail of " + std::to_string(tail) + " elements in a range of " +
                                        std::to_string(count));
        if (hyper.step < 1) throw std::invalid_argument("step is " + std::to_string(hyper.step) + ", it counts from 1");
        return hyper;
    }
};

bool step_fp32(uintptr_t param, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t grad, size_t count, size_t tail,
               const std::vector<float>& scales, double lr, double beta1, double beta2, double eps, double weight_decay,
               bool decoupled, int64_t step, int threads, const std::vector<int>& cpus, const std::string& path) {
    const Step s(count, tail, scales, {lr, beta1, beta2, eps, weight_decay, decoupled, step}, threads, cpus, path);
    const Fp32Range range{pointer<float>(param, count, "param"), pointer<float>(exp_avg, count, "exp_avg"),
                          pointer<float>(exp_avg_sq, count, "exp_avg_sq"), pointer<float>(grad, count, "grad")};
    return adam_step(range, count, tail, s.k, s.threads, s.path);
}

bool step_copy(uintptr_t param, uintptr_t copy, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t grad, size_t count,
               size_t tail, const std::vector<float>& scales, double lr, double beta1, double beta2, double eps,
               double weight_decay, bool decoupled, int64_t step, int threads, const std::vector<int>& cpus,
               const std::string& path) {
    const Step s(count, tail, scales, {lr, beta1, beta2, eps, weight_decay, decoupled, step}, threads, cpus, path);
    const CopyRange range{pointer<float>(param, count, "param"),     pointer<uint16_t>(copy, count, "copy"),
                          pointer<float>(exp_avg, count, "exp_avg"), pointer<float>(exp_avg_sq, count, "exp_avg_sq"),
                          pointer<uint16_t>(grad, count, "grad"),    false};
    return adam_step(range, count, tail, s.k, s.threads, s.path);
}

bool step_split(uintptr_t hi, uintptr_t lo, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t grad, size_t count,
                size_t tail, const std::vector<float>& scales, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool decoupled, int64_t step, int threads, const std::vector<int>& cpus,
                const std::string& path) {
    const Step s(count, tail, scales, {lr, beta1, beta2, eps, weight_decay, decoupled, step}, threads, cpus, path);
    const SplitRange range{pointer<uint16_t>(hi, count, "hi"), pointer<uint16_t>(lo, count, "lo"),
                           pointer<float>(exp_avg, count, "exp_avg"), pointer<float>(exp_avg_sq, count, "exp_avg_sq"),
                           pointer<uint16_t>(grad, count, "grad")};
    return adam_step(range, count, tail, s.k, s.threads, s.path);
}

MasterRange master_range(uintptr_t master, uintptr_t hi, uintptr_t lo, uintptr_t exp_avg_sq, size_t count) {
    return {pointer<float>(master, count, "master"), pointer<uint16_t>(hi, count, "hi"),
            pointer<uint16_t>(lo, count, "lo"), pointer<float>(exp_avg_sq, count, "exp_avg_sq")};
}

void split_master(uintptr_t master, uintptr_t hi, uintptr_t lo, uintptr_t exp_avg_sq, size_t count, int threads,
                  const std::vector<int>& cpus, const std::string& path) {
    adam_split_master(master_range(master, hi, lo, exp_avg_sq, count), count, checked(threads, cpus), adam_path(path));
}

void merge_master(uintptr_t hi, uintptr_t lo, uintptr_t exp_avg_sq, uintptr_t master, size_t count, int threads,
                  const std::vector<int>& cpus, const std::string& path) {
    adam_merge_master(master_range(master, hi, lo, exp_avg_sq, count), count, checked(threads, cpus), adam_path(path));
}

std::vector<std::string> path_names() {
    std::vector<std::string> names;
    for (const AdamPath* path : adam_paths()) names.emplace_back(path->name);
    return names;
}

}  // namespace

void bind_adam(py::module_& m) {
    using py::arg;
    const auto release = py::call_guard<py::gil_scoped_release>();
    const std::vector<int> no_cpus;

    m.def(
        "adam_fp32", &step_fp32, release, arg("param"), arg("exp_avg"), arg("exp_avg_sq"), arg("grad"), arg("count"),
        arg("tail"), arg("scales"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"), arg("weight_decay"),
        arg("decoupled"), arg("step"), arg("threads") = 1, arg("cpus") = no_cpus, arg("path") = "auto",
        "One Adam or AdamW step over `count` fp32 elements at these addresses, in place; `grad` is only read. Returns "
        "whether the scaled gradient held an inf or a nan.");
    m.def("adam_copy", &step_copy, release, arg("param"), arg("copy"), arg("exp_avg"), arg("exp_avg_sq"), arg("grad"),
          arg("count"), arg("tail"), arg("scales"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"),
          arg("weight_decay"), arg("decoupled"), arg("step"), arg("threads") = 1, arg("cpus") = no_cpus,
          arg("path") = "auto", "The same with a bf16 gradient; `copy` becomes param rounded to bf16.");
    m.def("adam_split", &step_split, release, arg("hi"), arg("lo"), arg("exp_avg"), arg("exp_avg_sq"), arg("grad"),
          arg("count"), arg("tail"), arg("scales"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"),
          arg("weight_decay"), arg("decoupled"), arg("step"), arg("threads") = 1, arg("cpus") = no_cpus,
          arg("path") = "auto",
          "The same on a split master (bf16 hi, 16-bit lo, tie in the sign of exp_avg_sq) and a bf16 gradient.");
    m.def("split_master", &split_master, release, arg("master"), arg("hi"), arg("lo"), arg("exp_avg_sq"), arg("count"),
          arg("threads") = 1, arg("cpus") = no_cpus, arg("path") = "auto",
          "fp32 master -> hi and lo, and the tie bit in exp_avg_sq set or cleared.");
    m.def("merge_master", &merge_master, release, arg("hi"), arg("lo"), arg("exp_avg_sq"), arg("master"), arg("count"),
          arg("threads") = 1, arg("cpus") = no_cpus, arg("path") = "auto",
          "The inverse of split_master; exp_avg_sq is only read.");
    m.def("adam_paths", &path_names, "Vector paths that this CPU runs, best first.");
}
