#include "io_queue.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace fuyou {

namespace {

constexpr unsigned kMostStalls = 1000;

const char* verb(Kind kind) {
    switch (kind) {
        case Kind::read:
            return "read";
        case Kind::write:
            return "write";
        default:
            return "flush";
    }
}

std::string describe(const Op& op) {
    if (op.kind == Kind::flush) return "flush of " + op.file->path;
    return std::string(verb(op.kind)) + " " + std::to_string(op.nbytes) + " bytes at " + std::to_string(op.offset) +
           " of " + op.file->path;
}

std::string failure_text(const Op& op) {
    const Failure& failure = op.failure;
    std::string text = describe(op) + " failed";
    if (op.kind == Kind::flush) return text + ": " + errno_text(failure.error);
    text += " at offset " + std::to_string(failure.at_offset) + ": ";
    text += failure.error == ENODATA ? "the file ends there" : errno_text(failure.error);
    return text + "; expected " + std::to_string(op.nbytes) + " bytes, got " +
           std::to_string(failure.at_offset - op.offset);
}

// See [Note: io order].
bool must_wait(const Op& later, const Op& earlier) {
    if (earlier.kind == Kind::flush) return false;
    if (later.kind == Kind::flush) return earlier.kind == Kind::write;
    if (later.kind == Kind::read && earlier.kind == Kind::read) return false;
    return later.offset < earlier.offset + earlier.nbytes && earlier.offset < later.offset + later.nbytes;
}

}  // namespace

std::string errno_text(int error) {
    return std::string(std::strerror(error)) + " (errno " + std::to_string(error) + ")";
}

bool Op::wait(std::chrono::steady_clock::time_point deadline) {
    if (!done()) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!announced_.wait_until(lock, deadline, [&] { return done(); })) return false;
    }
    if (failed) throw IoError{failure.error, failure_text(*this)};
    return true;
}

void Op::announce() {
    std::lock_guard<std::mutex> lock(mutex_);
    ended = std::chrono::steady_clock::now();
    done_.store(true, std::memory_order_release);  // under the lock: a waiter looks, then sleeps, under it too
    announced_.notify_all();
}

IoFile& IoQueue::file_of(int file) {
    auto found = files_.find(file);
    if (found == files_.end()) throw IoStateError{"unknown or removed file " + std::to_string(file)};
    return *found->second;
}

std::shared_ptr<IoFile> IoQueue::add_file(int fd, std::string path, uint64_t alignment_bytes) {
    auto file = std::make_shared<IoFile>();
    file->fd = fd;
    file->path = std::move(path);
    file->alignment_bytes = alignment_bytes;
    std::lock_guard<std::mutex> lock(mutex);
    if (closed_) throw IoStateError{"the I/O engine is closed"};
    file->id = next_file_++;
    files_[file->id] = file;
    return file;
}

std::shared_ptr<IoFile> IoQueue::remove_file(int id, Clock::time_point deadline) {
    std::unique_lock<std::mutex> lock(mutex);
    file_of(id);
    std::shared_ptr<IoFile> file = files_[id];
    if (!retired_.wait_until(lock, deadline, [&] { return file->open_count == 0; })) return nullptr;
    files_.erase(id);
    return file;
}

std::shared_ptr<Op> IoQueue::submit(Kind kind, int file, uint64_t offset, char* address, uint64_t nbytes) {
    auto op = std::make_shared<Op>();
    op->kind = kind;
    op->offset = offset;
    op->address = address;
    op->nbytes = nbytes;
    std::lock_guard<std::mutex> lock(mutex);
    if (closed_) throw IoStateError{"the I/O engine is closed"};
    file_of(file);
    op->file = files_[file];
    op->id = next_op_++;
    for (Op* earlier : op->file->active) {
        if (!must_wait(*op, *earlier)) continue;
        earlier->successors.push_back(op.get());
        ++op->blockers;
    }
    // Raw pointers to an operation live in `active`, `successors` and `lines_` only until end(), when `ops_` lets it
    // go.
    op->file->active.push_back(op.get());
    ++op->file->open_count;
    ++open_count_;
    ops_[op->id] = op;
    if (op->blockers == 0) line_of(*op).push_back(op.get());
    return op;
}

std::vector<uint64_t> IoQueue::take_finished() {
    std::lock_guard<std::mutex> lock(mutex);
    std::vector<uint64_t> finished;
    finished.swap(finished_);
    return finished;
}

std::vector<std::string> IoQueue::in_flight() {
    std::lock_guard<std::mutex> lock(mutex);
    std::vector<std::string> texts;
    for (const auto& [id, op] : ops_) {
        std::string text = describe(*op);
        if (op->blockers > 0) text += " (waits for " + std::to_string(op->blockers) + " earlier)";
        texts.push_back(std::move(text));
    }
    return texts;
}

bool IoQueue::drain(Clock::time_point deadline) {
    std::unique_lock<std::mutex> lock(mutex);
    return retired_.wait_until(lock, deadline, [&] { return open_count_ == 0; });
}

// See [Note: io bursts].
std::deque<Op*>& IoQueue::next_line() {
    const size_t other = 1 - current_line_;
    if (!lines_[other].empty() && (lines_[current_line_].empty() || burst_left_bytes_ == 0)) {
        current_line_ = other;
        burst_left_bytes_ = burst_bytes_;
    }
    return lines_[current_line_];
}

bool IoQueue::take(Piece& piece) {
    if (!retries_.empty()) {
        piece = retries_.front();
        retries_.pop_front();
        return true;
    }
    std::deque<Op*>& line = next_line();
    if (line.empty()) return false;
    Op& op = *line.front();
    if (op.carved_bytes == 0) op.began = Clock::now();
    piece = Piece{};
    piece.op = &op;
    piece.offset = op.offset + op.carved_bytes;
    piece.address = op.address + op.carved_bytes;
    piece.nbytes = std::min(piece_bytes_, op.nbytes - op.carved_bytes);
    op.carved_bytes += piece.nbytes;
    burst_left_bytes_ -= std::min(burst_left_bytes_, piece.nbytes);
    ++op.running_pieces;
    if (op.carved_bytes == op.nbytes) {  // at once for a flush, whose size is 0
        op.all_carved = true;
        line.pop_front();
    }
    return true;
}

void IoQueue::finish(Piece piece, int64_t result) {
    Op& op = *piece.op;
    if (op.kind != Kind::flush && result > static_cast<int64_t>(piece.nbytes)) result = -EIO;  // no kernel does this
    const bool again = result == -EINTR || result == -EAGAIN;
    if (again && ++piece.stalls <= kMostStalls) {
        retries_.push_back(piece);
        return;
    }
    if (result < 0) {
        piece_failed(piece, static_cast<int>(-result), piece.offset);
    } else if (op.kind != Kind::flush && static_cast<uint64_t>(result) != piece.nbytes) {
        // A short transfer is continued. O_DIRECT wants an aligned start, so a partly transferred sector is done again.
        const uint64_t moved = static_cast<uint64_t>(result);
        const uint64_t kept = moved - moved % op.file->alignment_bytes;
        if (kept > 0) {  // even when the operation has failed elsewhere: the lowest offset's own error is what counts
            piece.offset += kept;
            piece.address += kept;
            piece.nbytes -= kept;
            piece.stalls = 0;
            retries_.push_back(piece);
            return;
        }
        if (op.kind == Kind::read) {
            piece_failed(piece, ENODATA, piece.offset + moved);  // end of file inside this sector, or right here
        } else if (++piece.stalls <= kMostStalls) {
            retries_.push_back(piece);
            return;
        } else {
            piece_failed(piece, EIO, piece.offset);
        }
    }
    piece_ended(op);
}

void IoQueue::piece_failed(const Piece& piece, int error, uint64_t at_offset) {
    Op& op = *piece.op;
    if (!op.failed || at_offset < op.failure.at_offset) op.failure = Failure{error, at_offset};
    op.failed = true;
    if (!op.all_carved) {  // nothing more of it is started; what runs is waited for
        op.all_carved = true;
        std::deque<Op*>& line = line_of(op);
        line.erase(std::find(line.begin(), line.end(), &op));
    }
}

void IoQueue::piece_ended(Op& op) {
    --op.running_pieces;
    if (op.running_pieces == 0 && op.all_carved) end(op);
}

void IoQueue::end(Op& op) {
    auto& active = op.file->active;
    active.erase(std::find(active.begin(), active.end(), &op));
    for (Op* successor : op.successors) {
        if (--successor->blockers == 0) line_of(*successor).push_back(successor);
    }
    op.successors.clear();
    auto owned = ops_.find(op.id);
    ended_.push_back(std::move(owned->second));
    ops_.erase(owned);
}

void IoQueue::retire(const Ops& announced) {
    for (const std::shared_ptr<Op>& op : announced) {
        finished_.push_back(op->id);
        --op->file->open_count;
    }
    open_count_ -= announced.size();
    if (!announced.empty()) retired_.notify_all();
}

}  // namespace fuyou
