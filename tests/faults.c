/* Faults of the system beneath a process, for LD_PRELOAD: tests/faults.py compiles it and arms it after a fork.

   fault_arm(op, folder, at, action): of the calls of kind `op` on files below `folder`, the one numbered `at` (from 1)
   fails or is cut short. fault_record(descriptor): write a line for each such call of every kind. fault_clock(seconds):
   the wall clock jumps. fault_memory(): the next tensor's memory is not to be had. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { READ = 'r', WRITE = 'w', SYNC = 's', RENAME = 'm' };
enum { FULL = 'f', FAIL = 'e', SHORT = 's', TORN = 't' };

static char folder[PATH_MAX];
static int kind, action, recorder = -1, fired, no_memory;
static long left, offset;
static size_t least_bytes = 4096;

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static ssize_t real_write(int descriptor, const void *content, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return real(descriptor, content, size);
}

void fault_arm(int op, const char *below, long at, int what) {
    strncpy(folder, below, sizeof folder - 1);
    kind = op, action = what, left = at;
}
void fault_record(const char *below, int descriptor) {
    strncpy(folder, below, sizeof folder - 1);
    recorder = descriptor;
}
void fault_clock(long seconds) { offset = seconds; fired = 1; }
void fault_memory(size_t size) { least_bytes = size; no_memory = 1; }
int fault_fired(void) { return fired; }

/* Whether this call is to fail. */
static int due_path(int op, const char *path) {
    if (!folder[0] || strncmp(path, folder, strlen(folder))) return 0;
    if (recorder >= 0) {
        char line[PATH_MAX + 16];
        int size = snprintf(line, sizeof line, "%c %s\n", op, path);
        real_write(recorder, line, size);
    }
    if (op != kind || __atomic_sub_fetch(&left, 1, __ATOMIC_SEQ_CST)) return 0;
    fired = 1;
    return 1;
}

static int due(int op, int descriptor) {
    int before = errno;
    char link[64], path[PATH_MAX];
    if (!folder[0] || descriptor == recorder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size < 0) return 0;
    path[size] = 0;
    return due_path(op, path);
}

static int fail(void) {
    errno = action == FULL ? ENOSPC : EIO;
    return -1;
}

#define READER(name, parameters, arguments) \
    ssize_t name parameters { \
        REAL(ssize_t, #name, PARAMETERS parameters); \
        return due(READ, descriptor) ? fail() : real arguments; \
    }
#define PARAMETERS(...) __VA_ARGS__
READER(read, (int descriptor, void *room, size_t size), (descriptor, room, size))
READER(pread, (int descriptor, void *room, size_t size, off_t at), (descriptor, room, size, at))
READER(pread64, (int descriptor, void *room, size_t size, off64_t at), (descriptor, room, size, at))
READER(preadv, (int descriptor, const struct iovec *rooms, int count, off_t at), (descriptor, rooms, count, at))
READER(preadv64, (int descriptor, const struct iovec *rooms, int count, off64_t at), (descriptor, rooms, count, at))

ssize_t write(int descriptor, const void *content, size_t size) {
    if (!due(WRITE, descriptor)) return real_write(descriptor, content, size);
    if (action != SHORT && action != TORN) return fail();
    ssize_t written = real_write(descriptor, content, (size + 1) / 2);
    if (action == TORN) kill(getpid(), SIGKILL);
    return written;
}

int fsync(int descriptor) {
    REAL(int, "fsync", int);
    return due(SYNC, descriptor) ? fail() : real(descriptor);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    return due_path(RENAME, to) ? fail() : real(from, to);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int answer = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec += offset;
    return answer;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    REAL(int, "gettimeofday", struct timeval *, void *);
    int answer = real(now, zone);
    now->tv_sec += offset;
    return answer;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}

int posix_memalign(void **room, size_t alignment, size_t size) {
    REAL(int, "posix_memalign", void **, size_t, size_t);
    if (size >= least_bytes && __atomic_exchange_n(&no_memory, 0, __ATOMIC_SEQ_CST)) {
        fired = 1;
        return ENOMEM;
    }
    return real(room, alignment, size);
}
