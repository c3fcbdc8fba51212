/* Preloaded into a program: one of its writes ends short, as on a disk that fills up in the middle of it. Half of the
 * bytes reach the file, and the count is told.
 *
 * SHORT_LOG  gets a line for each write to a file (`7 PATH`: the seventh of the process), or, where one is to end short,
 *            for that one.
 * SHORT_AT   its number; with a `+` behind it, no file takes any byte from then on (ENOSPC).
 *
 * The standard streams are left alone: what a program says is not the matter here. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int log_fd = -1;
static unsigned at, for_good;
static atomic_uint writes;
static atomic_int full;

__attribute__((constructor)) static void begin(void) {
    const char *log = getenv("SHORT_LOG"), *number = getenv("SHORT_AT");
    if (log) log_fd = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (number) {
        char *end;
        at = (unsigned)strtoul(number, &end, 10);
        for_good = *end == '+';
    }
}

static int is_file(int fd) {
    struct stat file;
    return fd > 2 && fd != log_fd && fstat(fd, &file) == 0 && S_ISREG(file.st_mode);
}

static void note(unsigned n, int fd) {
    char link[32], path[4096], line[4200];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path);
    if (length < 0) length = 0;
    int bytes = snprintf(line, sizeof line, "%u %.*s\n", n, (int)length, path);
    if (log_fd >= 0 && bytes > 0) (void)!syscall(SYS_write, log_fd, line, (size_t)bytes);
}

/* How many of `bytes` this write may take; -1: none, the disk is full. */
static ssize_t taken(int fd, size_t bytes) {
    int saved = errno;
    ssize_t take = (ssize_t)bytes;
    if (is_file(fd)) {
        unsigned n = atomic_fetch_add(&writes, 1) + 1;
        if (!at || n == at) note(n, fd);
        if (atomic_load(&full)) {
            take = -1;
        } else if (n == at && bytes > 0) {
            if (for_good) atomic_store(&full, 1);
            take = bytes > 1 ? (ssize_t)(bytes / 2) : for_good ? -1 : 1;
        }
    }
    errno = take < 0 ? ENOSPC : saved;
    return take;
}

ssize_t write(int fd, const void *from, size_t bytes) {
    ssize_t take = taken(fd, bytes);
    return take < 0 ? -1 : syscall(SYS_write, fd, from, (size_t)take);
}

ssize_t pwrite64(int fd, const void *from, size_t bytes, off64_t where) {
    ssize_t take = taken(fd, bytes);
    return take < 0 ? -1 : syscall(SYS_pwrite64, fd, from, (size_t)take, where);
}

ssize_t pwrite(int fd, const void *from, size_t bytes, off_t where) { return pwrite64(fd, from, bytes, where); }

ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t bytes, unsigned flags) {
    ssize_t take = taken(out, bytes);
    return take < 0 ? -1 : syscall(SYS_copy_file_range, in, in_at, out, out_at, (size_t)take, flags);
}
