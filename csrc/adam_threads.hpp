// Dealing a range of elements to threads.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

namespace fuyou {

struct AdamThreads {
    int count = 1;          // the caller's own and those started beside it
    std::vector<int> cpus;  // what those are bound to, all of them to all of these; empty: wherever the caller may run
};

// Calls task(begin, end) for pieces of [0, count), each beginning at a multiple of 16, on up to `threads.count`
// threads, and returns, when all is done, whether any call returned true. Where the system gives no thread the others
// do its share.
bool deal(size_t count, const AdamThreads& threads, const std::function<bool(size_t begin, size_t end)>& task);

}  // namespace fuyou
