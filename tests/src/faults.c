/* Faults for one process, by LD_PRELOAD: its clock of the day jumps, and its disk is full. Both are steered while it runs, by the
 * numbers (little-endian, 8 bytes each) at the beginning of the file that FAULTS names:
 *
 *   0: seconds that are added to the clock of the day (CLOCK_REALTIME)
 *   1: if not 0, writes to files whose path holds FAULTS_PATH fail with ENOSPC
 *   2: how many writes have failed so
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t nothing[3];
static volatile int64_t *steer = nothing;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FAULTS");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *shared = mmap(NULL, sizeof nothing, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared != MAP_FAILED) steer = shared;
    close(file);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = REAL(clock_gettime)(clock, time);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) time->tv_sec += steer[0];
    return result;
}

int gettimeofday(struct timeval *restrict time, void *restrict zone) {
    int result = REAL(gettimeofday)(time, zone);
    if (!result) time->tv_sec += steer[0];
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

static int full(int file) {
    if (!steer[1]) return 0;
    const char *part = getenv("FAULTS_PATH");
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0 || !part) return 0;
    path[length] = 0;
    if (!strstr(path, part)) return 0;
    __atomic_fetch_add(&steer[2], 1, __ATOMIC_SEQ_CST);
    errno = ENOSPC;
    return 1;
}

ssize_t write(int file, const void *bytes, size_t count) { return full(file) ? -1 : REAL(write)(file, bytes, count); }

ssize_t writev(int file, const struct iovec *parts, int count) { return full(file) ? -1 : REAL(writev)(file, parts, count); }

ssize_t pwrite64(int file, const void *bytes, size_t count, off64_t at) {
    return full(file) ? -1 : REAL(pwrite64)(file, bytes, count, at);
}
