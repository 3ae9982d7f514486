// A thin, checked layer over the io_uring system calls: no liburing.
//
// [Note: one thread] A ring belongs to the thread that made it: only that thread submits, reaps and registers. The
// kernel then defers a completion's work until that thread asks for it (IORING_SETUP_DEFER_TASKRUN, Linux 6.1), and
// so a thread that waits for eight completions sleeps through the first seven.
#pragma once

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif
#endif

// IORING_FEAT_RW_CUR_POS came with Linux 5.6, as did IORING_OP_READ: older headers (and kernels) cannot build this.
#if defined(IORING_FEAT_RW_CUR_POS) && defined(IORING_FEAT_SINGLE_MMAP)
#define FUYOU_HAVE_URING 1
#endif

#ifdef FUYOU_HAVE_URING

#include <sys/uio.h>

#include <cstdint>

namespace fuyou {

class Ring {
  public:
    // Room for `depth` operations at a time, one more for the wake-up. Throws IoError.
    explicit Ring(unsigned depth);
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    // The next free entry, zeroed. The caller holds no more than `depth + 1` unreaped, so there always is one.
    io_uring_sqe* next_entry();
    // Hands everything prepared to the kernel and sleeps until `least` completions are there, or at least one and
    // kPatience_ns have passed (`least` above 1 counts only where deferred()). 0 or -errno.
    int submit_and_wait(unsigned least);
    // Completions wait for us to ask for them: see [Note: one thread].
    bool deferred() const { return deferred_; }
    bool reap(uint64_t& user_data, int32_t& result);

    // Tables with empty places to be filled one by one. 0 or -errno.
    int make_buffer_table(unsigned count);
    int set_buffer(unsigned slot, const iovec& range);  // iov_base == nullptr empties it
    int make_file_table(unsigned count);
    int set_file(unsigned slot, int fd);  // -1 empties it
    void drop_tables();

  private:
    void unmap();

    int fd_ = -1;
    bool deferred_ = false;
    char* rings_ = nullptr;
    size_t rings_bytes_ = 0;
    io_uring_sqe* entries_ = nullptr;
    size_t entries_bytes_ = 0;
    unsigned* sq_head_ = nullptr;
    unsigned* sq_tail_ = nullptr;
    unsigned* sq_array_ = nullptr;
    unsigned sq_mask_ = 0;
    unsigned* cq_head_ = nullptr;
    unsigned* cq_tail_ = nullptr;
    io_uring_cqe* completions_ = nullptr;
    unsigned cq_mask_ = 0;
};

}  // namespace fuyou

#endif
