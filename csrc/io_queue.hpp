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
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace fuyou {

enum class Kind { read, write, flush };

struct Op;

struct IoFile {
    int id = -1;
    int fd = -1;          // belongs to the caller, who closes it after remove_file
    int fixed_slot = -1;  // index among the ring's registered files; -1: not registered
    uint64_t alignment_bytes = 1;
    std::string path;
    std::vector<Op*> active;  // submitted, not ended
};

struct Failure {
    int error = 0;           // errno; ENODATA when the file ends before the range does
    uint64_t at_offset = 0;  // where in the file it went wrong: everything before it was transferred
};

struct Op {
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
    bool done = false;
    bool failed = false;
    bool released = false;  // forgotten by its owner before it ended
    Failure failure;
};

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

    explicit IoQueue(uint64_t piece_bytes) : piece_bytes_(piece_bytes) {}

    // For callers. Each takes the mutex itself.
    std::shared_ptr<IoFile> add_file(int fd, std::string path, uint64_t alignment_bytes);
    // Waits for the file's operations; nullptr when they have not ended at the deadline.
    std::shared_ptr<IoFile> remove_file(int file, Clock::time_point deadline);
    uint64_t submit(Kind kind, int file, uint64_t offset, char* address, uint64_t nbytes);
    bool poll(uint64_t op);
    // False when the deadline passed first. Throws IoError when the operation failed.
    bool wait(uint64_t op, Clock::time_point deadline);
    void release(uint64_t op);
    std::vector<uint64_t> take_finished();
    std::vector<std::string> in_flight();
    void refuse_new() {
        std::lock_guard<std::mutex> lock(mutex);
        closed_ = true;
    }
    bool drain(Clock::time_point deadline);

    // For backends, with `mutex` held.
    std::mutex mutex;
    bool has_work() const { return !ready_.empty() || !retries_.empty(); }
    bool take(Piece& piece);
    void finish(Piece piece, int64_t result);

  private:
    IoFile& file_of(int file);
    std::shared_ptr<Op> op_of(uint64_t op);
    void piece_failed(const Piece& piece, int error, uint64_t at_offset);
    void piece_ended(Op& op);
    void end(Op& op);

    const uint64_t piece_bytes_;
    std::condition_variable ended_;  // an operation has ended
    std::map<int, std::shared_ptr<IoFile>> files_;
    std::map<uint64_t, std::shared_ptr<Op>> ops_;  // until released; by id = in order of submission
    std::deque<Op*> ready_;                        // no predecessors left, pieces left to carve
    std::deque<Piece> retries_;
    std::vector<uint64_t> finished_;
    size_t active_count_ = 0;
    uint64_t next_op_ = 1;
    int next_file_ = 0;
    bool closed_ = false;
};

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
