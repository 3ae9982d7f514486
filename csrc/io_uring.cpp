// The io_uring engine: one thread owns the ring (see [Note: one thread]), submits pieces and sleeps in io_uring_enter
// until some complete or a caller wakes it through an eventfd. Whoever wants something registered asks this thread.
#include <cerrno>

#include "io_queue.hpp"
#include "io_ring.hpp"

#ifdef FUYOU_HAVE_URING

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <future>
#include <system_error>
#include <thread>

namespace fuyou {

namespace {

constexpr uint64_t kMostBytesPerBuffer = uint64_t{1} << 30;  // the kernel refuses more with EFAULT
constexpr unsigned kBufferSlots = 4096;
constexpr unsigned kFileSlots = 64;
constexpr unsigned kBatchShare = 4;         // the thread sleeps until a quarter of what is in flight has come back
constexpr uint64_t kWakeUp = ~uint64_t{0};  // user_data of the eventfd's poll; others are indices of `pieces_`

class UringBackend final : public Backend {
  public:
    UringBackend(IoQueue& queue, unsigned depth) : queue_(queue), depth_(depth), pieces_(depth) {
        for (unsigned i = depth; i > 0; --i) free_pieces_.push_back(i - 1);
        event_fd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (event_fd_ < 0) throw IoError{errno, "cannot make an eventfd: " + errno_text(errno)};
        // The thread owns the promise: ours could be gone while it is still telling us.
        std::promise<void> promise;
        std::future<void> made = promise.get_future();
        try {
            thread_ = std::thread([this](std::promise<void> tell) { work(tell); }, std::move(promise));
        } catch (const std::system_error& error) {
            ::close(event_fd_);
            throw IoError{error.code().value(), "cannot start the io_uring thread"};
        }
        try {
            made.get();
        } catch (...) {
            thread_.join();
            ::close(event_fd_);
            throw;
        }
    }

    ~UringBackend() override {
        stop();
        ::close(event_fd_);
    }

    void wake() override {
        // It goes to sleep under the queue's lock, having seen the queue empty. Our caller held that lock to fill the
        // queue: either the bell is wanted and we see so here, or the thread will see what is new.
        if (sleeping_.exchange(false)) ring_the_bell();
    }

    void stop() override {
        {
            std::lock_guard<std::mutex> lock(queue_.mutex);
            stopping_ = true;
        }
        ring_the_bell();
        if (thread_.joinable()) thread_.join();
    }

    void file_added(IoFile& file) override {
        in_ring_thread([&](Ring& ring) {
            if (free_file_slots_.empty()) return;
            const unsigned slot = free_file_slots_.back();
            if (ring.set_file(slot, file.fd) < 0) return;  // e.g. EBADF: the operation itself will say so
            free_file_slots_.pop_back();
            file.fixed_slot = static_cast<int>(slot);  // no operation of it has been submitted yet
        });
    }

    void file_removed(IoFile& file) override {
        in_ring_thread([&](Ring& ring) {
            if (file.fixed_slot < 0) return;
            const unsigned slot = static_cast<unsigned>(file.fixed_slot);
            if (ring.set_file(slot, -1) == 0) free_file_slots_.push_back(slot);
        });
    }

    bool register_buffer(uintptr_t address, uint64_t nbytes) override;
    void unregister_buffer(uintptr_t address) override;

    std::string note() override {
        std::lock_guard<std::mutex> lock(note_mutex_);
        return note_;
    }

  private:
    struct Registered {
        uint64_t nbytes;
        unsigned slot;
        uintptr_t region;  // the address that the caller registered
    };

    using Request = std::function<void(Ring&)>;

    // Runs `request` in the ring's thread, between two looks at the queue, and returns when it has run. Where that
    // thread has ended, nothing runs: there is nothing left to register with.
    void in_ring_thread(Request request) {
        std::packaged_task<void(Ring&)> task(std::move(request));
        std::future<void> ran = task.get_future();
        {
            std::lock_guard<std::mutex> lock(queue_.mutex);
            if (stopping_) return;
            requests_.push_back(std::move(task));
        }
        ring_the_bell();
        ran.get();
    }

    void make_tables(Ring& ring) {
        const int buffers = ring.make_buffer_table(kBufferSlots);
        if (buffers < 0) set_note("registered buffers are not available: " + errno_text(-buffers));
        for (unsigned i = kBufferSlots; buffers >= 0 && i > 0; --i) free_buffer_slots_.push_back(i - 1);
        const int files = ring.make_file_table(kFileSlots);
        for (unsigned i = kFileSlots; files >= 0 && i > 0; --i) free_file_slots_.push_back(i - 1);
    }

    void set_note(std::string text) {
        std::lock_guard<std::mutex> lock(note_mutex_);
        note_ = std::move(text);
    }

    void ring_the_bell() {
        const uint64_t one = 1;
        ssize_t written = ::write(event_fd_, &one, sizeof(one));  // fails only when it has been rung already
        (void)written;
    }

    void arm_bell(Ring& ring) {
        io_uring_sqe* entry = ring.next_entry();
        entry->opcode = IORING_OP_POLL_ADD;
        entry->fd = event_fd_;
        entry->poll_events = POLLIN;
        entry->user_data = kWakeUp;
    }

    void prepare(Ring& ring, unsigned index);
    bool register_part(Ring& ring, uintptr_t address, uint64_t nbytes, uintptr_t region);
    void work(std::promise<void>& made);
    void run_requests(Ring& ring);
    void serve(Ring& ring);
    void fail_everything(Ring& ring, int error);

    IoQueue& queue_;
    const unsigned depth_;
    int event_fd_ = -1;
    std::thread thread_;
    std::atomic<bool> sleeping_{false};
    bool stopping_ = false;                                  // under queue_.mutex
    std::vector<std::packaged_task<void(Ring&)>> requests_;  // under queue_.mutex
    std::mutex note_mutex_;
    std::string note_;

    // Only the ring's thread touches these.
    std::vector<Piece> pieces_;  // with the kernel, by index
    std::vector<unsigned> free_pieces_;
    std::map<uintptr_t, Registered> buffers_;
    std::vector<unsigned> free_buffer_slots_;
    std::vector<unsigned> free_file_slots_;
};

bool UringBackend::register_buffer(uintptr_t address, uint64_t nbytes) {
    bool registered = true;
    for (uint64_t done = 0; done < nbytes && registered; done += kMostBytesPerBuffer) {
        // Pinning takes a while (a GiB: tens of ms or more): between two parts I/O goes on.
        const uint64_t part = std::min(kMostBytesPerBuffer, nbytes - done);
        registered = false;
        in_ring_thread([&](Ring& ring) { registered = register_part(ring, address + done, part, address); });
    }
    return registered;  // where it is false, parts registered before stay in use: they are good
}

bool UringBackend::register_part(Ring& ring, uintptr_t address, uint64_t nbytes, uintptr_t region) {
    if (free_buffer_slots_.empty()) {
        if (note().empty()) set_note("all " + std::to_string(kBufferSlots) + " buffer slots are in use");
        return false;
    }
    const unsigned slot = free_buffer_slots_.back();
    const int result = ring.set_buffer(slot, iovec{reinterpret_cast<void*>(address), nbytes});
    if (result < 0) {
        set_note("registering " + std::to_string(nbytes) + " bytes as an io_uring buffer failed: " +
                 errno_text(-result) + (result == -ENOMEM ? "; the memlock limit (ulimit -l) is too small" : ""));
        return false;
    }
    free_buffer_slots_.pop_back();
    buffers_[address] = Registered{nbytes, slot, region};
    return true;
}

void UringBackend::unregister_buffer(uintptr_t address) {
    in_ring_thread([&](Ring& ring) {
        for (auto it = buffers_.begin(); it != buffers_.end();) {
            if (it->second.region != address) {
                ++it;
                continue;
            }
            // An entry prepared with this slot but not yet submitted gets EFAULT and is repeated without the slot.
            if (ring.set_buffer(it->second.slot, iovec{nullptr, 0}) == 0) free_buffer_slots_.push_back(it->second.slot);
            it = buffers_.erase(it);
        }
    });
}

void UringBackend::prepare(Ring& ring, unsigned index) {
    Piece& piece = pieces_[index];
    const IoFile& file = *piece.op->file;
    io_uring_sqe* entry = ring.next_entry();
    entry->user_data = index;
    entry->fd = file.fd;
    if (file.fixed_slot >= 0) {
        entry->fd = file.fixed_slot;
        entry->flags |= IOSQE_FIXED_FILE;
    }
    if (piece.op->kind == Kind::flush) {
        entry->opcode = IORING_OP_FSYNC;
        entry->fsync_flags = IORING_FSYNC_DATASYNC;
        return;
    }
    const bool reading = piece.op->kind == Kind::read;
    entry->opcode = reading ? IORING_OP_READ : IORING_OP_WRITE;
    entry->addr = reinterpret_cast<uintptr_t>(piece.address);
    entry->len = static_cast<uint32_t>(piece.nbytes);
    entry->off = piece.offset;
    if (piece.stalls > 0) entry->flags |= IOSQE_ASYNC;  // a kernel worker blocks where we would get EAGAIN again
    if (piece.plain) return;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(piece.address);
    auto it = buffers_.upper_bound(begin);
    if (it == buffers_.begin()) return;
    --it;
    if (begin + piece.nbytes > it->first + it->second.nbytes) return;
    entry->opcode = reading ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
    entry->buf_index = static_cast<uint16_t>(it->second.slot);
}

void UringBackend::work(std::promise<void>& made) {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);  // signals belong to the program's own threads
    pthread_setname_np(pthread_self(), "fuyou-uring");
    std::unique_ptr<Ring> ring;
    try {
        ring = std::make_unique<Ring>(depth_);
    } catch (...) {
        return made.set_exception(std::current_exception());
    }
    make_tables(*ring);
    made.set_value();
    serve(*ring);
    run_requests(*ring);  // whoever asked before we stopped is waiting
    // A forked child that still lives holds the ring open: our pinned pages and files must not wait for it.
    ring->drop_tables();
}

void UringBackend::run_requests(Ring& ring) {
    std::vector<std::packaged_task<void(Ring&)>> requests;
    {
        std::lock_guard<std::mutex> lock(queue_.mutex);
        requests.swap(requests_);
    }
    for (auto& request : requests) request(ring);
}

void UringBackend::serve(Ring& ring) {
    arm_bell(ring);
    Ops ended;
    for (;;) {
        unsigned in_flight = 0;
        {
            std::lock_guard<std::mutex> lock(queue_.mutex);
            queue_.retire(ended);
            ended.clear();
            while (!free_pieces_.empty() && queue_.has_work()) {
                const unsigned index = free_pieces_.back();
                free_pieces_.pop_back();
                queue_.take(pieces_[index]);
                prepare(ring, index);
            }
            in_flight = static_cast<unsigned>(pieces_.size() - free_pieces_.size());
            if (stopping_ && in_flight == 0) return;
            // Seen under the same lock as the queue: a later submission rings, unless nothing more can be started
            // before something comes back, which wakes us anyway.
            sleeping_ = !free_pieces_.empty();
        }
        const int entered = ring.submit_and_wait(std::max(1u, in_flight / kBatchShare));
        if (entered < 0 && entered != -EINTR && entered != -EAGAIN && entered != -EBUSY) {
            return fail_everything(ring, -entered);
        }
        if (entered == -EAGAIN) ::usleep(1000);  // the kernel is short of memory for requests

        bool rung = false;
        {
            std::lock_guard<std::mutex> lock(queue_.mutex);
            sleeping_ = false;
            uint64_t user_data = 0;
            int32_t result = 0;
            while (ring.reap(user_data, result)) {
                if (user_data == kWakeUp) {
                    rung = true;
                    continue;
                }
                const unsigned index = static_cast<unsigned>(user_data);
                Piece piece = pieces_[index];
                free_pieces_.push_back(index);
                if (result == -EFAULT && !piece.plain) {  // perhaps its registration has just gone
                    piece.plain = true;
                    result = -EAGAIN;
                }
                queue_.finish(piece, result);
            }
            ended = queue_.take_ended();
        }
        announce(ended);
        if (rung) {
            uint64_t count = 0;
            ssize_t got = ::read(event_fd_, &count, sizeof(count));
            (void)got;
            run_requests(ring);
            arm_bell(ring);
        }
    }
}

// The ring itself is gone (somebody closed its descriptor): say so to every waiter rather than hang.
void UringBackend::fail_everything(Ring& ring, int error) {
    std::unique_lock<std::mutex> lock(queue_.mutex);
    std::vector<bool> idle(pieces_.size(), false);
    for (unsigned index : free_pieces_) idle[index] = true;
    for (size_t i = 0; i < pieces_.size(); ++i) {
        if (!idle[i]) queue_.finish(pieces_[i], -error);
    }
    while (!stopping_) {
        Piece piece;
        while (queue_.take(piece)) queue_.finish(piece, -error);
        const Ops ended = queue_.take_ended();
        lock.unlock();
        announce(ended);
        run_requests(ring);  // each fails, but nobody is left waiting
        ::usleep(10000);
        lock.lock();
        queue_.retire(ended);
    }
}

}  // namespace

std::unique_ptr<Backend> make_uring_backend(IoQueue& queue, unsigned queue_depth) {
    return std::make_unique<UringBackend>(queue, queue_depth);
}

}  // namespace fuyou

#else

namespace fuyou {

std::unique_ptr<Backend> make_uring_backend(IoQueue&, unsigned) {
    throw IoError{ENOSYS, "built without io_uring: the kernel headers are older than Linux 5.6"};
}

}  // namespace fuyou

#endif
