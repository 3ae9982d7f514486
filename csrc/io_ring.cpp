#include "io_ring.hpp"

#ifdef FUYOU_HAVE_URING

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "io_queue.hpp"

#ifndef __NR_io_uring_setup  // the same numbers on every architecture
#define __NR_io_uring_setup 425
#define __NR_io_uring_enter 426
#define __NR_io_uring_register 427
#endif

namespace fuyou {

namespace {

// From the best to what every kernel knows. See [Note: one thread]; before Linux 6.1, COOP_TASKRUN at least spares the
// interrupt that would tell a thread which sleeps in the kernel anyway.
constexpr unsigned kSetups[] = {
#ifdef IORING_SETUP_DEFER_TASKRUN
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
#endif
#ifdef IORING_SETUP_COOP_TASKRUN
    IORING_SETUP_COOP_TASKRUN,
#endif
    0};

constexpr long kPatience_ns = 20000000;  // of a wait for several completions: what a slow drive needs for a few

int ring_setup(unsigned entry_count, io_uring_params& params) {
    const long result = ::syscall(__NR_io_uring_setup, entry_count, &params);
    return result < 0 ? -errno : static_cast<int>(result);
}

int ring_register(int fd, unsigned opcode, const void* argument, unsigned count) {
    const long result = ::syscall(__NR_io_uring_register, fd, opcode, argument, count);
    return result < 0 ? -errno : static_cast<int>(result);
}

}  // namespace

Ring::Ring(unsigned depth) {
    unsigned entry_count = 1;
    while (entry_count < depth + 2) entry_count *= 2;
    io_uring_params params{};
    fd_ = -EINVAL;
    for (const unsigned flags : kSetups) {  // EINVAL: a kernel that does not know these flags
        params = io_uring_params{};
        params.flags = flags;
        fd_ = ring_setup(entry_count, params);
        if (fd_ != -EINVAL) break;
    }
#ifdef IORING_SETUP_DEFER_TASKRUN
    deferred_ = (params.flags & IORING_SETUP_DEFER_TASKRUN) != 0 && (params.features & IORING_FEAT_EXT_ARG) != 0;
#endif
    if (fd_ < 0) throw IoError{-fd_, "io_uring_setup failed: " + errno_text(-fd_)};
    const unsigned needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_RW_CUR_POS | IORING_FEAT_NODROP;
    if ((params.features & needed) != needed) {
        ::close(fd_);
        throw IoError{ENOSYS, "this kernel's io_uring is older than Linux 5.6"};
    }

    rings_bytes_ = std::max(params.sq_off.array + params.sq_entries * sizeof(unsigned),
                            params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
    const int protection = PROT_READ | PROT_WRITE;
    const int flags = MAP_SHARED | MAP_POPULATE;
    void* rings = ::mmap(nullptr, rings_bytes_, protection, flags, fd_, IORING_OFF_SQ_RING);
    rings_ = rings == MAP_FAILED ? nullptr : static_cast<char*>(rings);
    void* entries = rings_ ? ::mmap(nullptr, entries_bytes_, protection, flags, fd_, IORING_OFF_SQES) : MAP_FAILED;
    entries_ = entries == MAP_FAILED ? nullptr : static_cast<io_uring_sqe*>(entries);
    if (rings_ == nullptr || entries_ == nullptr) {
        const int error = errno;
        unmap();
        throw IoError{error, "cannot map the io_uring rings: " + errno_text(error)};
    }
    // A forked child has no business with them, and must not see the parent's completions.
    ::madvise(rings_, rings_bytes_, MADV_DONTFORK);
    ::madvise(entries_, entries_bytes_, MADV_DONTFORK);

    sq_head_ = reinterpret_cast<unsigned*>(rings_ + params.sq_off.head);
    sq_tail_ = reinterpret_cast<unsigned*>(rings_ + params.sq_off.tail);
    sq_array_ = reinterpret_cast<unsigned*>(rings_ + params.sq_off.array);
    sq_mask_ = params.sq_entries - 1;
    cq_head_ = reinterpret_cast<unsigned*>(rings_ + params.cq_off.head);
    cq_tail_ = reinterpret_cast<unsigned*>(rings_ + params.cq_off.tail);
    completions_ = reinterpret_cast<io_uring_cqe*>(rings_ + params.cq_off.cqes);
    cq_mask_ = params.cq_entries - 1;
}

Ring::~Ring() { unmap(); }

void Ring::unmap() {
    if (entries_ != nullptr) ::munmap(entries_, entries_bytes_);
    if (rings_ != nullptr) ::munmap(rings_, rings_bytes_);
    if (fd_ >= 0) ::close(fd_);
    entries_ = nullptr;
    rings_ = nullptr;
    fd_ = -1;
}

io_uring_sqe* Ring::next_entry() {
    const unsigned tail = *sq_tail_;  // only we write it
    const unsigned index = tail & sq_mask_;
    sq_array_[index] = index;
    io_uring_sqe* entry = &entries_[index];
    std::memset(entry, 0, sizeof(*entry));
    // The kernel looks at it no earlier than our own io_uring_enter, after the caller has filled it in.
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    return entry;
}

int Ring::submit_and_wait(unsigned least) {
    const unsigned unsubmitted = *sq_tail_ - __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE);
    const unsigned flags = IORING_ENTER_GETEVENTS;
    long result = 0;
#ifdef IORING_ENTER_EXT_ARG
    if (deferred_ && least > 1) {
        __kernel_timespec patience{0, kPatience_ns};
        io_uring_getevents_arg argument{};
        argument.ts = reinterpret_cast<uintptr_t>(&patience);
        result = ::syscall(__NR_io_uring_enter, fd_, unsubmitted, least, flags | IORING_ENTER_EXT_ARG, &argument,
                           sizeof(argument));
        // Out of patience: go on with what there is, or sleep on for the first. All has been submitted by now.
        if (result >= 0 || errno != ETIME) return result < 0 ? -errno : 0;
        if (*cq_head_ != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) return 0;
        return submit_and_wait(1);
    }
#endif
    result = ::syscall(__NR_io_uring_enter, fd_, unsubmitted, 1u, flags, nullptr, 0);
    return result < 0 ? -errno : 0;  // what was not taken is counted again by the next call
}

bool Ring::reap(uint64_t& user_data, int32_t& result) {
    const unsigned head = *cq_head_;  // only we write it
    // Acquire: the completion, and the data that a read brought, are visible once the tail is.
    if (head == __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) return false;
    const io_uring_cqe& completion = completions_[head & cq_mask_];
    user_data = completion.user_data;
    result = completion.res;
    __atomic_store_n(cq_head_, head + 1, __ATOMIC_RELEASE);
    return true;
}

int Ring::make_buffer_table(unsigned count) {
#ifdef IORING_RSRC_REGISTER_SPARSE
    io_uring_rsrc_register request{};
    request.nr = count;
    request.flags = IORING_RSRC_REGISTER_SPARSE;
    return ring_register(fd_, IORING_REGISTER_BUFFERS2, &request, sizeof(request));
#else
    (void)count;
    return -ENOSYS;
#endif
}

int Ring::set_buffer(unsigned slot, const iovec& range) {
#ifdef IORING_RSRC_REGISTER_SPARSE
    io_uring_rsrc_update2 request{};
    request.offset = slot;
    request.data = reinterpret_cast<uintptr_t>(&range);
    request.nr = 1;
    const int result = ring_register(fd_, IORING_REGISTER_BUFFERS_UPDATE, &request, sizeof(request));
    return result < 0 ? result : 0;
#else
    (void)slot;
    (void)range;
    return -ENOSYS;
#endif
}

int Ring::make_file_table(unsigned count) {
    const std::vector<int> empty(count, -1);
    return ring_register(fd_, IORING_REGISTER_FILES, empty.data(), count);
}

int Ring::set_file(unsigned slot, int fd) {
    io_uring_files_update request{};
    request.offset = slot;
    request.fds = reinterpret_cast<uintptr_t>(&fd);
    const int result = ring_register(fd_, IORING_REGISTER_FILES_UPDATE, &request, 1);
    return result < 0 ? result : 0;
}

void Ring::drop_tables() {
    ring_register(fd_, IORING_UNREGISTER_BUFFERS, nullptr, 0);
    ring_register(fd_, IORING_UNREGISTER_FILES, nullptr, 0);
}

}  // namespace fuyou

#endif
