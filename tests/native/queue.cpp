// The queue fed with results that no drive gives on request. Prints OK, or the line of the first check that failed.
#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "io_queue.hpp"
using namespace fuyou;
#define CHECK(what)                                    \
    if (!(what)) {                                     \
        std::printf("line %d: %s\n", __LINE__, #what); \
        std::exit(1);                                  \
    }
static char memory[65536];
static auto soon() { return IoQueue::Clock::now(); }
static IoError error_of(Op& op) {
    try {
        op.wait(soon());
    } catch (const IoError& error) {
        return error;
    }
    return IoError{0, ""};
}
static void finish(IoQueue& queue, const Piece& piece, int64_t result) {  // as a backend does
    queue.finish(piece, result);
    const Ops ended = queue.take_ended();
    announce(ended);
    queue.retire(ended);
}
int main() {
    IoQueue queue(16384, 1 << 20);
    int file = queue.add_file(3, "/f", 4096)->id;
    Piece a, b, c;
    // Cut into pieces; a short transfer goes on from its last whole sector; EINTR and EAGAIN are tried again.
    auto op = queue.submit(Kind::read, file, 4096, memory, 32768);
    CHECK(queue.take(a) && a.offset == 4096 && a.nbytes == 16384 && a.address == memory);
    CHECK(queue.take(b) && b.offset == 4096 + 16384 && b.address == memory + 16384 && !queue.has_work());
    finish(queue, a, 9000);
    CHECK(queue.take(a) && a.offset == 4096 + 8192 && a.nbytes == 8192 && a.address == memory + 8192);
    finish(queue, b, 16384);
    finish(queue, a, -EINTR);
    CHECK(queue.take(a) && a.nbytes == 8192);
    finish(queue, a, -EAGAIN);
    CHECK(!op->done() && !op->wait(soon()) && queue.take(a) && a.offset == 4096 + 8192);
    finish(queue, a, 8192);
    CHECK(op->done() && op->wait(soon()));
    // EAGAIN for ever is an error in the end, not a hang.
    op = queue.submit(Kind::read, file, 0, memory, 4096);
    int turns = 0;
    while (queue.take(a)) {
        finish(queue, a, -EAGAIN);
        CHECK(++turns < 100000);
    }
    CHECK(error_of(*op).error == EAGAIN);
    // A write that moves nothing for ever, too.
    op = queue.submit(Kind::write, file, 0, memory, 4096);
    for (turns = 0; queue.take(a);) {
        finish(queue, a, 0);
        CHECK(++turns < 100000);
    }
    CHECK(error_of(*op).error == EIO);
    // An error: what runs is waited for, nothing more is started, the lowest offset is reported.
    op = queue.submit(Kind::write, file, 0, memory, 65536);
    CHECK(queue.take(a) && queue.take(b));
    finish(queue, b, -ENOSPC);
    CHECK(!queue.has_work() && !op->done());
    finish(queue, a, 4096);  // short: its own error is still looked for
    CHECK(queue.take(a) && a.offset == 4096 && !queue.has_work());
    finish(queue, a, -EIO);
    CHECK(op->done() && error_of(*op).error == EIO);
    CHECK(error_of(*op).text.find("write 65536 bytes at 0 of /f failed at offset 4096") == 0);
    // Order: read, then a write over it, then a read of that; a read elsewhere waits for none of them.
    auto r1 = queue.submit(Kind::read, file, 0, memory, 8192);
    auto w = queue.submit(Kind::write, file, 4096, memory, 8192);
    auto r2 = queue.submit(Kind::read, file, 8192, memory, 4096);
    auto r3 = queue.submit(Kind::read, file, 12288, memory, 4096);
    auto f = queue.submit(Kind::flush, file, 0, nullptr, 0);
    CHECK(queue.take(a) && a.op == r1.get() && queue.take(b) && b.op == r3.get() && !queue.has_work());
    finish(queue, b, 4096);
    CHECK(r3->done() && !queue.has_work());
    finish(queue, a, 8192);
    CHECK(queue.take(a) && a.op == w.get() && !queue.has_work());
    finish(queue, a, -EIO);  // its successors run all the same; the flush is of the kind whose burst is not over
    CHECK(queue.take(c) && c.op == f.get() && c.nbytes == 0 && queue.take(b) && b.op == r2.get());
    finish(queue, c, 0);
    finish(queue, b, 4096);
    CHECK(r2->done() && f->done() && queue.in_flight().empty() && queue.drain(soon()));
    // Until an operation is announced its waiters sleep, and until it is retired its file and the queue are in use.
    op = queue.submit(Kind::read, file, 0, memory, 4096);
    CHECK(!queue.drain(soon()) && queue.in_flight().size() == 1 && !queue.remove_file(file, soon()));
    CHECK(queue.take(a));
    queue.finish(a, 4096);
    const Ops ended = queue.take_ended();
    CHECK(!op->done() && ended.size() == 1 && ended[0] == op && !queue.drain(soon()));
    announce(ended);
    CHECK(op->done() && !queue.drain(soon()) && !queue.remove_file(file, soon()));
    queue.take_finished();
    queue.retire(ended);
    CHECK(queue.drain(soon()) && queue.take_finished() == std::vector<uint64_t>{op->id} &&
          queue.remove_file(file, soon()));
    // Bursts: three pieces of one kind, three of the other, oldest first within a kind; then what is left.
    IoQueue turns_queue(4096, 3 * 4096);
    file = turns_queue.add_file(3, "/f", 4096)->id;
    for (int i = 0; i < 4; ++i) {
        turns_queue.submit(Kind::read, file, i * 8192, memory, 8192);
        turns_queue.submit(Kind::write, file, 65536 + i * 4096, memory, 4096);
    }
    std::string order;
    while (turns_queue.take(a)) {
        order += a.op->kind == Kind::read ? 'r' : 'w';
        finish(turns_queue, a, 4096);
    }
    CHECK(order == "wwwrrrwrrrrr" || (std::puts(order.c_str()), false));
    std::puts("OK");
}
