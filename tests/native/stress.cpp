// Both I/O engines and the AdamW kernels under many threads, for the sanitizers: scripts/sanitize.sh builds and runs
// it. Every byte that is read is compared with what was written, every update with that of one thread.
//
//     stress FOLDER      on a real drive: a tmpfs takes O_DIRECT without enforcing it
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "adam_kernels.hpp"
#include "io_queue.hpp"

using namespace fuyou;

#define CHECK(what)                                                 \
    do {                                                            \
        if (!(what)) {                                              \
            std::fprintf(stderr, "line %d: %s\n", __LINE__, #what); \
            std::exit(1);                                           \
        }                                                           \
    } while (false)

namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kShare = 64 * kPage;  // of one thread
constexpr int kThreads = 4;

IoQueue::Clock::time_point in(double seconds) {
    return IoQueue::Clock::now() +
           std::chrono::duration_cast<IoQueue::Clock::duration>(std::chrono::duration<double>(seconds));
}

struct Memory {
    explicit Memory(uint64_t nbytes) : nbytes(nbytes) {
        address =
            static_cast<char*>(::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        CHECK(address != MAP_FAILED);
    }
    ~Memory() { ::munmap(address, nbytes); }
    char* address;
    uint64_t nbytes;
};

std::unique_ptr<Backend> make(const std::string& kind, IoQueue& queue) {
    return kind == "threads" ? make_thread_backend(queue, 3) : make_uring_backend(queue, 3);
}

// One thread's own part of the file: random writes and reads against a model of it, flushes, deadlines of no time.
void churn(IoQueue& queue, Backend& backend, int file, int number) {
    std::mt19937 draw(static_cast<unsigned>(number));
    Memory buffer(kShare), whole(kShare);
    std::vector<char> model(kShare, 0);
    const uint64_t base = static_cast<uint64_t>(number) * kShare;
    const bool registered = backend.register_buffer(reinterpret_cast<uintptr_t>(buffer.address), kShare / 2);
    auto submit = [&](Kind kind, uint64_t offset, char* address, uint64_t nbytes) {
        auto op = queue.submit(kind, file, base + offset, address, nbytes);
        backend.wake();
        return op;
    };
    std::memset(buffer.address, 0, kShare);
    submit(Kind::write, 0, buffer.address, kShare)->wait(in(60));
    for (int turn = 0; turn < 60; ++turn) {
        const uint64_t first = draw() % (kShare / kPage);
        const uint64_t count = 1 + draw() % (kShare / kPage - first);
        const uint64_t offset = first * kPage, nbytes = count * kPage;
        std::memset(buffer.address + offset, static_cast<int>(draw()), nbytes);
        std::memcpy(model.data() + offset, buffer.address + offset, nbytes);
        auto written = submit(Kind::write, offset, buffer.address + offset, nbytes);
        auto read = submit(Kind::read, 0, whole.address, kShare);
        auto flushed = submit(Kind::flush, 0, nullptr, 0);
        if (turn % 3 == 0) read->wait(in(0));
        if (turn % 5 == 0) queue.in_flight();
        CHECK(read->wait(in(60)) && written->done());
        CHECK(std::memcmp(whole.address, model.data(), kShare) == 0);
        CHECK(written->wait(in(60)) && flushed->wait(in(60)));
        if (turn % 7 == 0) queue.take_finished();
    }
    bool failed = false;  // past the end of the file: an error, told to its own waiter only
    try {
        auto op = queue.submit(Kind::read, file, uint64_t{1} << 40, whole.address, kPage);
        backend.wake();
        op->wait(in(60));
    } catch (const IoError& error) {
        failed = error.error == ENODATA;
    }
    CHECK(failed);
    if (registered) backend.unregister_buffer(reinterpret_cast<uintptr_t>(buffer.address));
}

void stress_io(const std::string& kind, const std::string& folder) {
    for (int round = 0; round < 3; ++round) {
        IoQueue queue(2 * kPage, round == 0 ? 0 : 8 * kPage);
        std::shared_ptr<Backend> backend;
        try {
            backend = make(kind, queue);
        } catch (const IoError& error) {
            std::printf("%s: not here (%s)\n", kind.c_str(), error.text.c_str());
            return;
        }
        const std::string path = folder + "/stress-" + kind;
        const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_DIRECT, 0600);
        CHECK(fd >= 0);
        auto file = queue.add_file(fd, path, kPage);
        backend->file_added(*file);
        std::atomic<bool> going{true};
        std::vector<std::thread> threads;
        for (int i = 0; i < kThreads; ++i) {
            threads.emplace_back([&, i] { churn(queue, *backend, file->id, i); });
        }
        std::thread files([&] {  // files come and go, and are asked about, while the others are used
            const std::string other = path + "-other";
            Memory page(kPage);
            while (going) {
                const int own = ::open(other.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_DIRECT, 0600);
                CHECK(own >= 0);
                auto added = queue.add_file(own, other, kPage);
                backend->file_added(*added);
                auto op = queue.submit(Kind::write, added->id, 0, page.address, kPage);
                backend->wake();
                auto removed = queue.remove_file(added->id, in(60));
                CHECK(removed != nullptr && op->done());
                backend->file_removed(*removed);
                ::close(own);
                backend->note();
            }
            ::unlink(other.c_str());
        });
        for (std::thread& thread : threads) thread.join();
        going = false;
        files.join();
        queue.refuse_new();
        CHECK(queue.drain(in(60)) && queue.in_flight().empty());
        backend->stop();
        ::close(fd);
        ::unlink(path.c_str());
    }
    std::printf("%s: clean\n", kind.c_str());
}

struct Numbers {
    std::vector<float> param, exp_avg, exp_avg_sq, grad;
    std::vector<uint16_t> hi, lo, grad16;
    explicit Numbers(size_t count)
        : param(count), exp_avg(count), exp_avg_sq(count), grad(count), hi(count), lo(count), grad16(count) {
        std::mt19937 draw(7);
        std::normal_distribution<float> normal;
        for (size_t i = 0; i < count; ++i) {
            param[i] = normal(draw);
            exp_avg[i] = 0.1f * normal(draw);
            exp_avg_sq[i] = 0.01f * std::abs(normal(draw));
            grad[i] = normal(draw);
            uint32_t bits;
            std::memcpy(&bits, &grad[i], sizeof(bits));
            grad16[i] = static_cast<uint16_t>(bits >> 16);
        }
    }
    bool operator==(const Numbers& other) const {
        auto same = [](const auto& a, const auto& b) {
            return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
        };
        return same(param, other.param) && same(exp_avg, other.exp_avg) && same(exp_avg_sq, other.exp_avg_sq) &&
               same(hi, other.hi) && same(lo, other.lo);
    }
};

void update(Numbers& n, int count_of_threads, const AdamPath& path) {
    AdamThreads threads;
    threads.count = count_of_threads;
    const size_t count = n.param.size();
    const AdamHyper hyper{1e-3, 0.9, 0.999, 1e-8, 0.01, true, 3};
    const std::vector<float> scales{0.5f};  // the coefficients point into it
    const AdamCoefficients coefficients(hyper, scales);
    CHECK(!adam_step(Fp32Range{n.param.data(), n.exp_avg.data(), n.exp_avg_sq.data(), n.grad.data()}, count, count % 8,
                     coefficients, threads, path));
    CHECK(!adam_step(
        CopyRange{n.param.data(), n.hi.data(), n.exp_avg.data(), n.exp_avg_sq.data(), n.grad16.data(), false}, count,
        count % 8, coefficients, threads, path));
    MasterRange master{n.param.data(), n.hi.data(), n.lo.data(), n.exp_avg_sq.data()};
    adam_split_master(master, count, threads, path);
    const SplitRange split{n.hi.data(), n.lo.data(), n.exp_avg.data(), n.exp_avg_sq.data(), n.grad16.data()};
    CHECK(!adam_step(split, count, count % 8, coefficients, threads, path));
    n.grad16[count / 2] = 0x7f80;  // an infinity, which one of the threads meets
    CHECK(adam_step(split, count, count % 8, coefficients, threads, path));
    adam_merge_master(master, count, threads, path);
}

void stress_adam() {
    for (const AdamPath* path : adam_paths()) {
        const size_t counts[] = {1, 15, 4097, 300007};
        for (const size_t count : counts) {
            Numbers alone(count);
            update(alone, 1, *path);
            std::vector<std::thread> callers;  // several callers at once, each with several threads
            for (int i = 0; i < 3; ++i) {
                callers.emplace_back([&, i] {
                    Numbers own(count);
                    update(own, 2 + i, *path);
                    CHECK(own == alone);
                });
            }
            for (std::thread& caller : callers) caller.join();
        }
        std::printf("adam %s: clean\n", path->name);
    }
}

}  // namespace

int main(int count, char** arguments) {
    CHECK(count == 2);
    std::setvbuf(stdout, nullptr, _IOLBF, 0);
    stress_io("threads", arguments[1]);
    stress_io("io_uring", arguments[1]);
    stress_adam();
    std::puts("OK");
}
