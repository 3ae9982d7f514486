// A thin, checked layer over the io_uring system calls: no liburing. Only fuyou's own I/O thread submits and reaps.
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
    // Hands everything prepared to the kernel and sleeps until at least one completion is there. 0 or -errno.
    int submit_and_wait();
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
