// The contract of both I/O engines, written once: what an operation is, in which order operations run, how a request is
// cut into pieces, and what becomes of a piece's result. A backend only takes pieces, runs them and returns results.
//
// [Note: io order] Operations of one file whose byte ranges overlap run in the order of their submission: a read waits
// for earlier writes, a write for earlier reads and writes, a flush for all earlier writes. Submitting never blocks: an
// operation with unfinished predecessors is kept aside and becomes ready when the last of them ends, failed or not.
//
// [Note: io lock] `IoQueue::mutex` guards every Op and IoFile. Between take() and finish() a piece belongs to the
// backend, which reads only fields that do not change after submission (kind, file, addresses). An operation ends only
// when no piece of it is with the backend, so nobody touches its memory after that.
//
// [Note: io completion] An operation's result stands behind a lock of its own, so that a waiter is woken by its own
// operation alone and never meets the queue's lock (with one lock and one condition for all, a waiter slept and woke
// seven times for each 16 MiB). So a backend ends operations in three steps: finish() under the queue's lock,
// announce() without it, retire() under it again. Until the last, drain() and remove_file() still wait.
//
// [Note: io bursts] Reads and writes wait in a line each. While both have something, one kind is carved for
// `burst_bytes`, then the other: a drive that is slower when mixed is not mixed more than that, and neither kind waits
// longer than one burst of the other. Within a kind, the oldest operation is carved first.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace fuyou {

enum class Kind { read, write, flush };

class Op;

struct IoFile {
    int id = -1;
    int fd = -1;          // belongs to the caller, who closes it after remove_file
    int fixed_slot = -1;  // index among the ring's registered files; -1: not registered
    uint64_t alignment_bytes = 1;
    std::string path;
    std::vector<Op*> active;  // submitted, not ended
    size_t open_count = 0;    // operations submitted, not retired
};

struct Failure {
    int error = 0;           // errno; ENODATA when the file ends before the range does
    uint64_t at_offset = 0;  // where in the file it went wrong: everything before it was transferred
};

class Op {
  public:
    // For its waiters; see [Note: io completion]. wait() is false when the deadline passed first, and throws IoError.
    bool done() const { return done_.load(std::memory_order_acquire); }
    bool wait(std::chrono::steady_clock::time_point deadline);
    void announce();

    // For the queue.
    uint64_t id = 0;
    Kind kind = Kind::read;
    std::shared_ptr<IoFile> file;
    uint64_t offset = 0;
    char* address = nullptr;
    uint64_t nbytes = 0;

    uint64_t carved_bytes = 0;  // handed out as pieces so far
    bool all_carved = false;
    size_t running_pieces = 0;  // with the backend, or waiting for a retry
    size_t blockers = 0;        // unfinished predecessors
    std::vector<Op*> successors;
    bool failed = false;  // this and `failure` no longer change once it is announced
    Failure failure;
    std::chrono::steady_clock::time_point began;  // its first piece was handed out
    std::chrono::steady_clock::time_point ended;  // no longer changes once it is announced

  private:
    std::atomic<bool> done_{false};
    std::mutex mutex_;
    std::condition_variable announced_;
};

using Ops = std::vector<std::shared_ptr<Op>>;

struct Piece {
    Op* op = nullptr;
    uint64_t offset = 0;
    char* address = nullptr;
    uint64_t nbytes = 0;
    unsigned stalls = 0;  // results without progress in a row (EINTR, EAGAIN, 0 bytes written)
    bool plain = false;   // do not use a registered buffer for it
};

// An errno with its text, for the binding to turn into an exception.
struct IoError {
    int error;
    std::string text;
};

// The engine was used in a state that does not allow it (closed, unknown handle, forked child).
struct IoStateError {
    std::string text;
};

std::string errno_text(int error);

class IoQueue {
  public:
    using Clock = std::chrono::steady_clock;

    IoQueue(uint64_t piece_bytes, uint64_t burst_bytes) : piece_bytes_(piece_bytes), burst_bytes_(burst_bytes) {}

    // For callers. Each takes the mutex itself.
    std::shared_ptr<IoFile> add_file(int fd, std::string path, uint64_t alignment_bytes);
    // Waits for the file's operations; nullptr when they have not ended at the deadline.
    std::shared_ptr<IoFile> remove_file(int file, Clock::time_point deadline);
    std::shared_ptr<Op> submit(Kind kind, int file, uint64_t offset, char* address, uint64_t nbytes);
    std::vector<uint64_t> take_finished();  // ids of operations retired since the last call
    std::vector<std::string> in_flight();
    void refuse_new() {
        std::lock_guard<std::mutex> lock(mutex);
        closed_ = true;
    }
    bool drain(Clock::time_point deadline);

    // For backends, with `mutex` held.
    std::mutex mutex;
    bool has_work() const { return !lines_[0].empty() || !lines_[1].empty() || !retries_.empty(); }
    bool take(Piece& piece);
    void finish(Piece piece, int64_t result);
    Ops take_ended() { return std::exchange(ended_, {}); }
    void retire(const Ops& announced);

  private:
    IoFile& file_of(int file);
    std::deque<Op*>& line_of(const Op& op) { return lines_[op.kind == Kind::read ? 0 : 1]; }
    std::deque<Op*>& next_line();
    void piece_failed(const Piece& piece, int error, uint64_t at_offset);
    void piece_ended(Op& op);
    void end(Op& op);

    const uint64_t piece_bytes_;
    const uint64_t burst_bytes_;
    std::condition_variable retired_;  // some operations have been retired
    std::map<int, std::shared_ptr<IoFile>> files_;
    std::map<uint64_t, std::shared_ptr<Op>> ops_;  // until they end; by id = in order of submission
    std::deque<Op*> lines_[2];  // reads; writes and flushes: no predecessors left, pieces left to carve
    size_t current_line_ = 0;
    uint64_t burst_left_bytes_ = 0;
    std::deque<Piece> retries_;
    Ops ended_;  // not announced yet
    std::vector<uint64_t> finished_;
    size_t open_count_ = 0;  // submitted, not retired
    uint64_t next_op_ = 1;
    int next_file_ = 0;
    bool closed_ = false;
};

// Without the mutex, between take_ended() and retire().
inline void announce(const Ops& ended) {
    for (const std::shared_ptr<Op>& op : ended) op->announce();
}

// Runs the pieces of a queue. Construction throws IoError when the machine does not allow it.
class Backend {
  public:
    virtual ~Backend() = default;
    virtual void wake() = 0;  // there may be work; called without the mutex
    virtual void stop() = 0;  // after the queue has been drained: joins the threads; once more does nothing
    virtual void file_added(IoFile&) {}
    virtual void file_removed(IoFile&) {}
    virtual bool register_buffer(uintptr_t, uint64_t) { return false; }
    virtual void unregister_buffer(uintptr_t) {}
    virtual std::string note() { return ""; }  // why registration was refused, if it was
};

std::unique_ptr<Backend> make_thread_backend(IoQueue& queue, unsigned thread_count);
std::unique_ptr<Backend> make_uring_backend(IoQueue& queue, unsigned queue_depth);

}  // namespace fuyou
