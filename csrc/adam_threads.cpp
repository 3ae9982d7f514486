// [Note: threads for one call] Threads live for one call. Waking a thread that sleeps in a pool takes as long as
// starting one where the other core is idle (57 against 56 us on a 2-core virtual machine: the core's own wake-up is
// most of both), and nothing is left behind for a fork, an exit or another thread's call to break. Threads take pieces
// as they get to them, so one that starts late, or shares its core with I/O or Python, does less and nobody waits for
// it.
#include "adam_threads.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>

namespace fuyou {

namespace {

constexpr size_t kPieceLeast = size_t{1} << 16;   // elements, some 35 us of work: the last to end ends soon after
constexpr size_t kThreadLeast = size_t{1} << 17;  // elements for each thread: less is done before another has started

void enter_thread(const std::vector<int>& cpus) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "fuyou-adam");
    if (cpus.empty()) return;
    const int most = *std::max_element(cpus.begin(), cpus.end());
    cpu_set_t* set = CPU_ALLOC(most + 1);
    if (set == nullptr) return;
    const size_t bytes = CPU_ALLOC_SIZE(most + 1);
    CPU_ZERO_S(bytes, set);
    for (int cpu : cpus) CPU_SET_S(cpu, bytes, set);
    pthread_setaffinity_np(pthread_self(), bytes, set);  // fails where those CPUs were taken away since: then unbound
    CPU_FREE(set);
#else
    (void)cpus;
#endif
}

}  // namespace

bool deal(size_t count, const AdamThreads& threads, const std::function<bool(size_t, size_t)>& task) {
    const size_t useful = std::max<size_t>(1, count / kThreadLeast);
    const size_t most = std::min<size_t>(useful, static_cast<size_t>(std::max(threads.count, 1)));
    if (most == 1) return task(0, count);

    std::atomic<size_t> next{0};
    std::atomic<bool> any{false};
    const auto work = [&] {
        size_t begin = next.load(std::memory_order_relaxed);
        while (begin < count) {
            // Long pieces first and short ones last: few of them, and nobody waits for long at the end.
            const size_t piece = std::max(kPieceLeast, (count - begin) / (4 * most) / 16 * 16);
            if (!next.compare_exchange_weak(begin, begin + piece, std::memory_order_relaxed)) continue;
            if (task(begin, std::min(begin + piece, count))) any.store(true, std::memory_order_relaxed);
            begin = next.load(std::memory_order_relaxed);
        }
    };

    std::vector<std::thread> others;
    others.reserve(most - 1);
    try {
        while (others.size() < most - 1) {
            others.emplace_back([&] {
                enter_thread(threads.cpus);
                work();
            });
        }
    } catch (const std::system_error&) {  // EAGAIN: no thread to be had
    }
    work();
    for (auto& other : others) other.join();  // orders what they wrote before what the caller does next
    return any.load(std::memory_order_relaxed);
}

}  // namespace fuyou
