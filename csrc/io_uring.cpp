// The io_uring engine: one thread submits pieces and sleeps in io_uring_enter until one completes or a caller wakes it
// through an eventfd. Only this thread submits, because the kernel cancels what a thread has in flight when it exits.
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
#include <system_error>
#include <thread>

namespace fuyou {

namespace {

constexpr uint64_t kMostBytesPerBuffer = uint64_t{1} << 30;  // the kernel refuses more with EFAULT
constexpr unsigned kBufferSlots = 4096;
constexpr unsigned kFileSlots = 64;
constexpr uint64_t kWakeUp = ~uint64_t{0};  // user_data of the eventfd's poll; others are indices of `pieces_`

class UringBackend final : public Backend {
  public:
    UringBackend(IoQueue& queue, unsigned depth) : queue_(queue), ring_(depth), pieces_(depth) {
        for (unsigned i = depth; i > 0; --i) free_pieces_.push_back(i - 1);
        make_tables();
        event_fd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (event_fd_ < 0) throw IoError{errno, "cannot make an eventfd: " + errno_text(errno)};
        try {
            thread_ = std::thread([this] { work(); });
        } catch (const std::system_error& error) {
            ::close(event_fd_);
            throw IoError{error.code().value(), "cannot start the io_uring thread"};
        }
    }

    ~UringBackend() override {
        stop();
        ::close(event_fd_);
    }

    void wake() override {
        {
            std::lock_guard<std::mutex> lock(queue_.mutex);
            if (!sleeping_) return;  // it looks at the queue again before it sleeps
            sleeping_ = false;
        }
        ring_the_bell();
    }

    void stop() override {
        {
            std::lock_guard<std::mutex> lock(queue_.mutex);
            stopping_ = true;
        }
        ring_the_bell();
        if (!thread_.joinable()) return;
        thread_.join();
        // A forked child that still lives holds the ring open: its pinned pages and files must not wait for it.
        ring_.drop_tables();
    }

    void file_added(IoFile& file) override {
        std::lock_guard<std::mutex> lock(tables_mutex_);
        if (free_file_slots_.empty()) return;
        const unsigned slot = free_file_slots_.back();
        if (ring_.set_file(slot, file.fd) < 0) return;  // e.g. EBADF: the operation itself will say so
        free_file_slots_.pop_back();
        file.fixed_slot = static_cast<int>(slot);  // no operation of it has been submitted yet
    }

    void file_removed(IoFile& file) override {
        std::lock_guard<std::mutex> lock(tables_mutex_);
        if (file.fixed_slot < 0) return;
        const unsigned slot = static_cast<unsigned>(file.fixed_slot);
        if (ring_.set_file(slot, -1) == 0) free_file_slots_.push_back(slot);
    }

    bool register_buffer(uintptr_t address, uint64_t nbytes) override;
    void unregister_buffer(uintptr_t address) override;

    std::string note() override {
        std::lock_guard<std::mutex> lock(tables_mutex_);
        return note_;
    }

  private:
    struct Registered {
        uint64_t nbytes;
        unsigned slot;
        uintptr_t region;  // the address that the caller registered
    };

    void make_tables() {
        const int buffers = ring_.make_buffer_table(kBufferSlots);
        if (buffers < 0) note_ = "registered buffers are not available: " + errno_text(-buffers);
        for (unsigned i = kBufferSlots; buffers >= 0 && i > 0; --i) free_buffer_slots_.push_back(i - 1);
        const int files = ring_.make_file_table(kFileSlots);
        for (unsigned i = kFileSlots; files >= 0 && i > 0; --i) free_file_slots_.push_back(i - 1);
    }

    void ring_the_bell() {
        const uint64_t one = 1;
        ssize_t written = ::write(event_fd_, &one, sizeof(one));  // fails only when it has been rung already
        (void)written;
    }

    void arm_bell() {
        io_uring_sqe* entry = ring_.next_entry();
        entry->opcode = IORING_OP_POLL_ADD;
        entry->fd = event_fd_;
        entry->poll_events = POLLIN;
        entry->user_data = kWakeUp;
    }

    void prepare(unsigned index);
    void work();
    void fail_everything(int error);

    IoQueue& queue_;
    Ring ring_;
    int event_fd_ = -1;
    std::thread thread_;
    bool stopping_ = false;  // under queue_.mutex
    bool sleeping_ = false;  // under queue_.mutex

    std::vector<Piece> pieces_;  // with the kernel, by index; only the I/O thread touches these two
    std::vector<unsigned> free_pieces_;

    std::mutex tables_mutex_;  // taken after queue_.mutex, never before it
    std::map<uintptr_t, Registered> buffers_;
    std::vector<unsigned> free_buffer_slots_;
    std::vector<unsigned> free_file_slots_;
    std::string note_;
};

bool UringBackend::register_buffer(uintptr_t address, uint64_t nbytes) {
    for (uint64_t done = 0; done < nbytes;) {
        const uint64_t part = std::min(kMostBytesPerBuffer, nbytes - done);
        unsigned slot = 0;
        {
            std::lock_guard<std::mutex> lock(tables_mutex_);
            if (free_buffer_slots_.empty()) {
                if (note_.empty()) note_ = "all " + std::to_string(kBufferSlots) + " buffer slots are in use";
                return false;
            }
            slot = free_buffer_slots_.back();
            free_buffer_slots_.pop_back();
        }
        // Pinning takes a while (a GiB: tens of ms or more); the lock is free meanwhile, so that I/O goes on.
        const iovec range{reinterpret_cast<void*>(address + done), part};
        const int result = ring_.set_buffer(slot, range);
        std::lock_guard<std::mutex> lock(tables_mutex_);
        if (result < 0) {
            free_buffer_slots_.push_back(slot);
            note_ =
                "registering " + std::to_string(part) + " bytes as an io_uring buffer failed: " + errno_text(-result);
            if (result == -ENOMEM) note_ += "; the memlock limit (ulimit -l) is too small";
            return false;  // parts registered before stay in use: they are good
        }
        buffers_[address + done] = Registered{part, slot, address};
        done += part;
    }
    return true;
}

void UringBackend::unregister_buffer(uintptr_t address) {
    std::lock_guard<std::mutex> lock(tables_mutex_);
    for (auto it = buffers_.begin(); it != buffers_.end();) {
        if (it->second.region != address) {
            ++it;
            continue;
        }
        // An entry prepared with this slot but not yet submitted gets EFAULT and is repeated without the slot.
        const iovec nothing{nullptr, 0};
        if (ring_.set_buffer(it->second.slot, nothing) == 0) free_buffer_slots_.push_back(it->second.slot);
        it = buffers_.erase(it);
    }
}

void UringBackend::prepare(unsigned index) {
    Piece& piece = pieces_[index];
    const IoFile& file = *piece.op->file;
    io_uring_sqe* entry = ring_.next_entry();
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
    std::lock_guard<std::mutex> lock(tables_mutex_);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(piece.address);
    auto it = buffers_.upper_bound(begin);
    if (it == buffers_.begin()) return;
    --it;
    if (begin + piece.nbytes > it->first + it->second.nbytes) return;
    entry->opcode = reading ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
    entry->buf_index = static_cast<uint16_t>(it->second.slot);
}

void UringBackend::work() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);  // signals belong to the program's own threads
    pthread_setname_np(pthread_self(), "fuyou-uring");
    arm_bell();
    for (;;) {
        {
            std::lock_guard<std::mutex> lock(queue_.mutex);
            while (!free_pieces_.empty() && queue_.has_work()) {
                const unsigned index = free_pieces_.back();
                free_pieces_.pop_back();
                queue_.take(pieces_[index]);
                prepare(index);
            }
            if (stopping_ && free_pieces_.size() == pieces_.size()) return;
            sleeping_ = true;  // with the queue seen empty under the same lock: a later submission rings
        }
        const int entered = ring_.submit_and_wait();
        if (entered < 0 && entered != -EINTR && entered != -EAGAIN && entered != -EBUSY) {
            return fail_everything(-entered);
        }
        if (entered == -EAGAIN) ::usleep(1000);  // the kernel is short of memory for requests

        bool rung = false;
        {
            std::lock_guard<std::mutex> lock(queue_.mutex);
            sleeping_ = false;
            uint64_t user_data = 0;
            int32_t result = 0;
            while (ring_.reap(user_data, result)) {
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
        }
        if (rung) {
            uint64_t count = 0;
            ssize_t got = ::read(event_fd_, &count, sizeof(count));
            (void)got;
            arm_bell();
        }
    }
}

// The ring itself is gone (somebody closed its descriptor): say so to every waiter rather than hang.
void UringBackend::fail_everything(int error) {
    std::unique_lock<std::mutex> lock(queue_.mutex);
    std::vector<bool> idle(pieces_.size(), false);
    for (unsigned index : free_pieces_) idle[index] = true;
    for (size_t i = 0; i < pieces_.size(); ++i) {
        if (!idle[i]) queue_.finish(pieces_[i], -error);
    }
    while (!stopping_) {
        Piece piece;
        while (queue_.take(piece)) queue_.finish(piece, -error);
        lock.unlock();
        ::usleep(10000);
        lock.lock();
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
