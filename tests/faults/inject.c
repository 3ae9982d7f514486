// Loaded before everything else (LD_PRELOAD): makes chosen reads, writes and flushes of files fail, come short, ask to
// be tried again, or stand still. Reads and writes by system call are answered here; those of an io_uring are changed
// in its submission ring, so that a short transfer is a short transfer of the kernel's own, and what "fails" is not
// done at all.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

enum { READ, WRITE, FLUSH };
enum { FAIL = 1, SHORT, HANG };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t released = PTHREAD_COND_INITIALIZER;
static struct {
    int action;       // 0: nothing
    long value;       // errno, or bytes
    long skip, left;  // of the operations of this kind: not these first ones; then so many
    long period;      // and of those only every so-manieth
    long seen, done;
} plan[3];
static char part[256];  // of the paths that count
static int bell = -1;   // readable once what hangs may go on

void fuyou_inject(const char* path_part, int kind, int action, long value, long skip, long count, long period) {
    pthread_mutex_lock(&lock);
    snprintf(part, sizeof(part), "%s", path_part);
    if (bell < 0) bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    uint64_t drained;
    if (action == HANG && read(bell, &drained, sizeof(drained)) < 0) errno = 0;
    plan[kind].action = action;
    plan[kind].value = value;
    plan[kind].skip = skip;
    plan[kind].left = count;
    plan[kind].period = period;
    plan[kind].seen = plan[kind].done = 0;
    pthread_mutex_unlock(&lock);
}

long fuyou_injected(int kind) {
    pthread_mutex_lock(&lock);
    const long done = plan[kind].done;
    pthread_mutex_unlock(&lock);
    return done;
}

void fuyou_release(void) {
    const uint64_t one = 1;
    pthread_mutex_lock(&lock);
    for (int kind = 0; kind < 3; ++kind) plan[kind].action = 0;
    if (write(bell, &one, sizeof(one)) < 0) errno = 0;
    pthread_cond_broadcast(&released);
    pthread_mutex_unlock(&lock);
}

// What to do with the next operation of this kind. Under the lock.
static int next_action(int kind, long* value) {
    if (!plan[kind].action) return 0;
    const long number = plan[kind].seen++;
    if (number < plan[kind].skip || plan[kind].left <= 0) return 0;
    if ((number - plan[kind].skip) % plan[kind].period) return 0;
    --plan[kind].left;
    ++plan[kind].done;
    *value = plan[kind].value;
    return plan[kind].action;
}

static int counts(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t length = readlink(link, path, sizeof(path) - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return part[0] && strstr(path, part) != NULL;
}

// The transfer's size to use, or -1 with errno set, or `nbytes` after standing still.
static ssize_t judge(int fd, int kind, size_t nbytes) {
    if (!plan[kind].action) return (ssize_t)nbytes;
    const int before = errno;
    if (!counts(fd)) {
        errno = before;
        return (ssize_t)nbytes;
    }
    long value = 0;
    pthread_mutex_lock(&lock);
    const int action = next_action(kind, &value);
    while (action == HANG && plan[kind].action == HANG) pthread_cond_wait(&released, &lock);
    pthread_mutex_unlock(&lock);
    errno = before;
    if (action == FAIL) {
        errno = (int)value;
        return -1;
    }
    return action == SHORT && (size_t)value < nbytes ? value : (ssize_t)nbytes;
}

#define REAL(type, name, ...)         \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define AT(name, mode, memory, kind)                                                 \
    ssize_t name(int fd, memory data, size_t nbytes, off_t offset) {                 \
        REAL(ssize_t, #name, int, memory, size_t, off_t);                            \
        const ssize_t size = judge(fd, kind, nbytes);                                \
        return size < 0 ? -1 : size == 0 ? 0 : real(fd, data, (size_t)size, offset); \
    }
AT(pread, read, void*, READ)
AT(pread64, read, void*, READ)
AT(pwrite, write, const void*, WRITE)
AT(pwrite64, write, const void*, WRITE)

ssize_t read(int fd, void* data, size_t nbytes) {
    REAL(ssize_t, "read", int, void*, size_t);
    const ssize_t size = judge(fd, READ, nbytes);
    return size < 0 ? -1 : size == 0 ? 0 : real(fd, data, (size_t)size);
}

ssize_t write(int fd, const void* data, size_t nbytes) {
    REAL(ssize_t, "write", int, const void*, size_t);
    const ssize_t size = judge(fd, WRITE, nbytes);
    return size < 0 ? -1 : size == 0 ? 0 : real(fd, data, (size_t)size);
}

int fdatasync(int fd) {
    REAL(int, "fdatasync", int);
    return judge(fd, FLUSH, 1) < 0 ? -1 : real(fd);
}

// ---- io_uring, through syscall(2) and mmap(2) of the ring's descriptor

static struct Ring {
    int fd;
    struct io_uring_params params;
    char* rings;
    struct io_uring_sqe* entries;
    unsigned scanned, reaped;
    struct {
        uint64_t user_data;
        int result, used;
    } changed[4096];  // completions to be given another result
} ring = {.fd = -1};

static void change(uint64_t user_data, int result) {
    for (unsigned i = 0; i < 4096; ++i) {
        if (ring.changed[i].used) continue;
        ring.changed[i].user_data = user_data;
        ring.changed[i].result = result;
        ring.changed[i].used = 1;
        return;
    }
}

static void before_submission(struct io_uring_sqe* entry) {
    int kind;
    switch (entry->opcode) {
        case IORING_OP_READ:
        case IORING_OP_READ_FIXED:
            kind = READ;
            break;
        case IORING_OP_WRITE:
        case IORING_OP_WRITE_FIXED:
            kind = WRITE;
            break;
        case IORING_OP_FSYNC:
            kind = FLUSH;
            break;
        default:
            return;
    }
    long value = 0;
    const int action = next_action(kind, &value);
    const uint64_t user_data = entry->user_data;
    if (action == SHORT && kind != FLUSH && value > 0) {
        if ((unsigned long)value < entry->len) entry->len = (unsigned)value;
    } else if (action == FAIL || action == SHORT) {
        memset(entry, 0, sizeof(*entry));
        entry->opcode = IORING_OP_NOP;
        entry->user_data = user_data;
        change(user_data, action == FAIL ? -(int)value : 0);
    } else if (action == HANG) {  // it waits for the bell, and then is to be tried again
        memset(entry, 0, sizeof(*entry));
        entry->opcode = IORING_OP_POLL_ADD;
        entry->fd = bell;
        entry->poll32_events = POLLIN;
        entry->user_data = user_data;
        change(user_data, -EAGAIN);
    }
}

static void before_enter(void) {
    const struct io_sqring_offsets* at = &ring.params.sq_off;
    const unsigned tail = *(unsigned*)(ring.rings + at->tail), mask = ring.params.sq_entries - 1;
    const unsigned* array = (unsigned*)(ring.rings + at->array);
    for (; ring.scanned != tail; ++ring.scanned) before_submission(&ring.entries[array[ring.scanned & mask]]);
}

static void after_enter(void) {
    const struct io_cqring_offsets* at = &ring.params.cq_off;
    const unsigned tail = __atomic_load_n((unsigned*)(ring.rings + at->tail), __ATOMIC_ACQUIRE);
    struct io_uring_cqe* completions = (struct io_uring_cqe*)(ring.rings + at->cqes);
    for (; ring.reaped != tail; ++ring.reaped) {
        struct io_uring_cqe* completion = &completions[ring.reaped & (ring.params.cq_entries - 1)];
        for (unsigned i = 0; i < 4096; ++i) {
            if (!ring.changed[i].used || ring.changed[i].user_data != completion->user_data) continue;
            completion->res = ring.changed[i].result;
            ring.changed[i].used = 0;
            break;
        }
    }
}

long syscall(long number, ...) {
    long a[6];
    va_list list;
    va_start(list, number);
    for (int i = 0; i < 6; ++i) a[i] = va_arg(list, long);
    va_end(list);
    static long (*real)(long, ...);
    if (!real) real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    const int ours = number == SYS_io_uring_enter && (int)a[0] == ring.fd && ring.rings && ring.entries;
    if (ours) {
        pthread_mutex_lock(&lock);
        before_enter();
        pthread_mutex_unlock(&lock);
    }
    const long result = real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    const int error = errno;
    if (number == SYS_io_uring_setup && result >= 0) {
        pthread_mutex_lock(&lock);
        memset(&ring, 0, sizeof(ring));
        ring.fd = (int)result;
        memcpy(&ring.params, (void*)a[1], sizeof(ring.params));
        pthread_mutex_unlock(&lock);
    } else if (ours) {
        pthread_mutex_lock(&lock);
        after_enter();
        pthread_mutex_unlock(&lock);
    }
    errno = error;
    return result;
}

static void mapped(int fd, off_t offset, void* address) {
    if (fd < 0 || fd != ring.fd || address == MAP_FAILED) return;
    if (offset == (off_t)IORING_OFF_SQ_RING) ring.rings = address;
    if (offset == (off_t)IORING_OFF_SQES) ring.entries = address;
}

#define MAP(name)                                                                               \
    void* name(void* address, size_t length, int protection, int flags, int fd, off_t offset) { \
        REAL(void*, #name, void*, size_t, int, int, int, off_t);                                \
        void* result = real(address, length, protection, flags, fd, offset);                    \
        mapped(fd, offset, result);                                                             \
        return result;                                                                          \
    }
MAP(mmap)
MAP(mmap64)
