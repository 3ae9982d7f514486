// The engine of plain threads: each takes a piece, does pread, pwrite or fdatasync, and gives the result back.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <system_error>
#include <thread>

#include "io_queue.hpp"

namespace fuyou {

namespace {

int64_t run_piece(const Piece& piece) {
    const Op& op = *piece.op;
    const off_t offset = static_cast<off_t>(piece.offset);
    int64_t result = 0;
    switch (op.kind) {
        case Kind::read:
            result = ::pread(op.file->fd, piece.address, piece.nbytes, offset);
            break;
        case Kind::write:
            result = ::pwrite(op.file->fd, piece.address, piece.nbytes, offset);
            break;
        case Kind::flush:
            result = ::fdatasync(op.file->fd);
            break;
    }
    return result < 0 ? -errno : result;
}

class ThreadBackend final : public Backend {
  public:
    ThreadBackend(IoQueue& queue, unsigned thread_count) : queue_(queue) {
        threads_.reserve(thread_count);
        try {
            for (unsigned i = 0; i < thread_count; ++i) threads_.emplace_back([this] { work(); });
        } catch (const std::system_error& error) {
            stop();
            throw IoError{error.code().value(), "cannot start I/O thread " + std::to_string(threads_.size() + 1) +
                                                    " of " + std::to_string(thread_count)};
        }
    }

    ~ThreadBackend() override { stop(); }

    void wake() override { work_.notify_one(); }

    void stop() override {
        {
            std::lock_guard<std::mutex> lock(queue_.mutex);
            stopping_ = true;
        }
        work_.notify_all();
        for (std::thread& thread : threads_) {
            if (thread.joinable()) thread.join();
        }
        threads_.clear();
    }

  private:
    void work() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, nullptr);  // signals belong to the program's own threads
        pthread_setname_np(pthread_self(), "fuyou-io");
        std::unique_lock<std::mutex> lock(queue_.mutex);
        for (;;) {
            work_.wait(lock, [&] { return stopping_ || queue_.has_work(); });
            Piece piece;
            if (!queue_.take(piece)) return;  // stopping and nothing left
            // One wake-up per submission is enough: whoever takes a piece and leaves more behind wakes the next.
            if (queue_.has_work()) work_.notify_one();
            lock.unlock();
            const int64_t result = run_piece(piece);
            lock.lock();
            queue_.finish(piece, result);
            const Ops ended = queue_.take_ended();
            if (ended.empty()) continue;
            lock.unlock();
            announce(ended);
            lock.lock();
            queue_.retire(ended);
        }
    }

    IoQueue& queue_;
    std::condition_variable work_;
    bool stopping_ = false;  // under queue_.mutex
    std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Backend> make_thread_backend(IoQueue& queue, unsigned thread_count) {
    return std::make_unique<ThreadBackend>(queue, thread_count);
}

}  // namespace fuyou
