/* LD_PRELOAD shim of the durability tests: writes down what a process does to the files below one directory, so that the
 * disk as a power loss at any moment leaves it can be rebuilt afterwards (tests/src/power); and makes syncs slow or
 * failing while a control file says so.
 *
 *   FAULTFS_ROOT     the directory that is watched (absolute, no symbolic links)
 *   FAULTFS_JOURNAL  where to write records; one file for all processes, opened with O_APPEND, so that it has one order
 *   FAULTFS_NODE     number of this process in the records
 *   FAULTFS_CONTROL  directory of control files, each a decimal number:
 *                      delay_ms     each fsync and fdatasync takes this long, or until the file is gone
 *                      sync_errno   each fsync and fdatasync fails with this errno
 *                      write_errno  each write fails with this errno
 *
 * Order: a change is recorded after it was made and before the call returns; a sync is recorded before it begins and
 * after it has ended, and makes durable what was recorded before its beginning. Both err on the side of losing more.
 * Changes of names are made one at a time, so that their records are in the order in which they happened.
 *
 * What stdio writes is not seen (RocksDB's LOG, which nobody reads back). Ways of writing that are not recorded but can
 * be done without (copy_file_range, sendfile) are refused, so that the caller falls back to write; one that can't
 * (a shared writable mapping) is recorded as such and fails the test. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum kind {
    CREATE = 1, TRUNCATE, WRITE, SYNC_BEGIN, SYNC_END, DIRSYNC_BEGIN, DIRSYNC_END, RENAME, UNLINK, LINK, MKDIR, RMDIR,
    MARK, UNSUPPORTED
};

struct header {
    uint32_t magic;
    uint8_t kind;
    uint8_t node;
    uint16_t unused;
    uint64_t a;
    uint64_t b;
    uint32_t len1;
    uint32_t len2;
};
#define MAGIC 0x46544c46u

#define FDS 65536
struct tracked {
    int kind; /* 0 not ours, 1 file, 2 directory */
    uint64_t ino;
    char *path; /* of a directory, below the root */
};
static struct tracked fds[FDS];
static char root[PATH_MAX];
static size_t root_len;
static char control[PATH_MAX];
static int journal = -1;
static int node;
static uint64_t next_sync;
static pthread_mutex_t names = PTHREAD_MUTEX_INITIALIZER;

#define REAL(ret, name, ...) \
    static ret (*real_##name)(__VA_ARGS__); \
    if (!real_##name) *(void **)&real_##name = dlsym(RTLD_NEXT, #name)

__attribute__((constructor)) static void begin(void) {
    const char *value = getenv("FAULTFS_ROOT");
    if (!value || strlen(value) >= sizeof root) return;
    strcpy(root, value);
    root_len = strlen(root);
    while (root_len > 1 && root[root_len - 1] == '/') root[--root_len] = 0;
    if ((value = getenv("FAULTFS_CONTROL")) && strlen(value) < sizeof control - 16) strcpy(control, value);
    if ((value = getenv("FAULTFS_NODE"))) node = atoi(value);
    next_sync = ((uint64_t)getpid()) << 32;
    if ((value = getenv("FAULTFS_JOURNAL")))
        journal = (int)syscall(SYS_openat, AT_FDCWD, value, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
}

static void record(enum kind kind, uint64_t a, uint64_t b, const void *d1, size_t l1, const void *d2, size_t l2) {
    if (journal < 0) return;
    int saved = errno;
    struct header h = {MAGIC, (uint8_t)kind, (uint8_t)node, 0, a, b, (uint32_t)l1, (uint32_t)l2};
    struct iovec parts[3] = {{&h, sizeof h}, {(void *)d1, l1}, {(void *)d2, l2}};
    ssize_t done = syscall(SYS_writev, journal, parts, 3);
    if (done != (ssize_t)(sizeof h + l1 + l2)) {
        static const char why[] = "faultfs: the journal can't be written\n";
        syscall(SYS_write, 2, why, sizeof why - 1);
        abort();
    }
    errno = saved;
}
static void record_path(enum kind kind, uint64_t a, uint64_t b, const char *path) {
    record(kind, a, b, path, strlen(path), 0, 0);
}

/* The path below the root, or 0. `out` has PATH_MAX bytes. */
static const char *below(int dirfd, const char *path, char *out) {
    if (!root_len || !path) return 0;
    char full[PATH_MAX * 2];
    if (path[0] == '/') {
        if (strlen(path) >= PATH_MAX) return 0;
        strcpy(full, path);
    } else {
        char link[64];
        ssize_t n;
        if (dirfd == AT_FDCWD) {
            if (!getcwd(full, PATH_MAX)) return 0;
            n = (ssize_t)strlen(full);
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
            n = readlink(link, full, PATH_MAX - 1);
            if (n < 0) return 0;
        }
        snprintf(full + n, sizeof full - (size_t)n, "/%s", path);
    }
    /* "//" and "/./" go, ".." is not used by anybody we watch. */
    size_t at = 0;
    for (const char *p = full; *p && at < PATH_MAX - 1;) {
        if (*p == '/' && (p[1] == '/' || !p[1])) { p++; continue; }
        if (*p == '/' && p[1] == '.' && (p[2] == '/' || !p[2])) { p += 2; continue; }
        out[at++] = *p++;
    }
    out[at] = 0;
    if (strncmp(out, root, root_len) || (out[root_len] != '/' && out[root_len])) return 0;
    return out[root_len] ? out + root_len + 1 : "";
}

static void track(int fd, int created, int truncated, const char *path) {
    if (fd < 0 || fd >= FDS) return;
    struct stat st;
    if (fstat(fd, &st)) return;
    if (S_ISDIR(st.st_mode)) {
        fds[fd].path = strdup(path);
        fds[fd].kind = 2;
    } else if (S_ISREG(st.st_mode)) {
        fds[fd].ino = st.st_ino;
        fds[fd].kind = 1;
        if (created) record_path(CREATE, st.st_ino, 0, path);
        else if (truncated) record(TRUNCATE, st.st_ino, 0, 0, 0, 0, 0);
    }
}

static int open_any(int dirfd, const char *path, int flags, mode_t mode) {
    char buffer[PATH_MAX];
    const char *ours = below(dirfd, path, buffer);
    if (!ours) return (int)syscall(SYS_openat, dirfd, path, flags, mode);
    if (!(flags & (O_CREAT | O_TRUNC))) {
        int fd = (int)syscall(SYS_openat, dirfd, path, flags, mode);
        int saved = errno;
        track(fd, 0, 0, ours);
        errno = saved;
        return fd;
    }
    pthread_mutex_lock(&names);
    struct stat st;
    int there = !fstatat(dirfd, path, &st, 0);
    int fd = (int)syscall(SYS_openat, dirfd, path, flags, mode);
    int saved = errno;
    track(fd, !there, there && (flags & O_TRUNC) && st.st_size > 0, ours);
    pthread_mutex_unlock(&names);
    errno = saved;
    return fd;
}
#define MODE_OF(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list args; va_start(args, flags); mode = va_arg(args, mode_t); va_end(args); }
int open(const char *path, int flags, ...) { MODE_OF(flags) return open_any(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE_OF(flags) return open_any(AT_FDCWD, path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE_OF(flags) return open_any(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE_OF(flags) return open_any(dir, path, flags, mode); }
int __open_2(const char *path, int flags) { return open_any(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_any(AT_FDCWD, path, flags, 0); }
int __openat_2(int dir, const char *path, int flags) { return open_any(dir, path, flags, 0); }
int __openat64_2(int dir, const char *path, int flags) { return open_any(dir, path, flags, 0); }
int creat(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open_any(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* The C library closes by itself what was handed to fdopen (RocksDB's LOG) or fdopendir, and the number is used again for
   a socket, say: what it names now must still be what it named when it was opened. */
static struct tracked *of(int fd, int kind) {
    if (fd < 0 || fd >= FDS || fds[fd].kind != kind) return 0;
    int saved = errno;
    struct stat st;
    int same = !fstat(fd, &st) && (kind == 1 ? S_ISREG(st.st_mode) && st.st_ino == fds[fd].ino : S_ISDIR(st.st_mode));
    errno = saved;
    if (same) return &fds[fd];
    fds[fd].kind = 0;
    return 0;
}

int close(int fd) {
    if (fd >= 0 && fd < FDS && fds[fd].kind) {
        fds[fd].kind = 0;
        free(fds[fd].path);
        fds[fd].path = 0;
    }
    return (int)syscall(SYS_close, fd);
}

/* A control file's number, 0 if it is not there. */
static long asked(const char *name) {
    if (!control[0]) return 0;
    char path[PATH_MAX + 32];
    snprintf(path, sizeof path, "%s/%s", control, name);
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0) return 0;
    char text[32] = {0};
    ssize_t n = syscall(SYS_read, fd, text, sizeof text - 1);
    syscall(SYS_close, fd);
    return n > 0 ? atol(text) : 0;
}

static int write_fails(int fd) {
    if (!control[0] || !of(fd, 1)) return 0;
    long code = asked("write_errno");
    if (code) errno = (int)code;
    return code != 0;
}
static void wrote(int fd, uint64_t offset, const void *data, ssize_t n) {
    struct tracked *t = of(fd, 1);
    if (t && n > 0) record(WRITE, t->ino, offset, data, (size_t)n, 0, 0);
}
static void wrote_at_end(int fd, const void *data, ssize_t n) {
    if (journal < 0 || n <= 0 || !of(fd, 1)) return;
    int saved = errno;
    wrote(fd, (uint64_t)(lseek(fd, 0, SEEK_CUR) - n), data, n);
    errno = saved;
}
ssize_t write(int fd, const void *data, size_t len) {
    if (write_fails(fd)) return -1;
    ssize_t n = syscall(SYS_write, fd, data, len);
    wrote_at_end(fd, data, n);
    return n;
}
static ssize_t pwrite_any(int fd, const void *data, size_t len, off_t offset) {
    if (write_fails(fd)) return -1;
    ssize_t n = syscall(SYS_pwrite64, fd, data, len, offset);
    wrote(fd, (uint64_t)offset, data, n);
    return n;
}
ssize_t pwrite(int fd, const void *data, size_t len, off_t offset) { return pwrite_any(fd, data, len, offset); }
ssize_t pwrite64(int fd, const void *data, size_t len, off64_t offset) { return pwrite_any(fd, data, len, offset); }
/* One part at a time: a short write is allowed. */
ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (!of(fd, 1)) return syscall(SYS_writev, fd, parts, count);
    for (int i = 0; i < count; i++) if (parts[i].iov_len) return write(fd, parts[i].iov_base, parts[i].iov_len);
    return 0;
}
static ssize_t pwritev_any(int fd, const struct iovec *parts, int count, off_t offset) {
    if (!of(fd, 1)) return syscall(SYS_pwritev, fd, parts, count, offset, 0);
    for (int i = 0; i < count; i++)
        if (parts[i].iov_len) return pwrite_any(fd, parts[i].iov_base, parts[i].iov_len, offset);
    return 0;
}
ssize_t pwritev(int fd, const struct iovec *p, int c, off_t o) { return pwritev_any(fd, p, c, o); }
ssize_t pwritev64(int fd, const struct iovec *p, int c, off64_t o) { return pwritev_any(fd, p, c, o); }

static int ftruncate_any(int fd, off_t size) {
    int code = (int)syscall(SYS_ftruncate, fd, size);
    struct tracked *t = of(fd, 1);
    if (t && !code) record(TRUNCATE, t->ino, (uint64_t)size, 0, 0, 0, 0);
    return code;
}
int ftruncate(int fd, off_t size) { return ftruncate_any(fd, size); }
int ftruncate64(int fd, off64_t size) { return ftruncate_any(fd, size); }
static int fallocate_any(int fd, int mode, off_t offset, off_t len) {
    int code = (int)syscall(SYS_fallocate, fd, mode, offset, len);
    struct tracked *t = of(fd, 1);
    if (t && !code && !(mode & FALLOC_FL_KEEP_SIZE)) record_path(UNSUPPORTED, 0, 0, "fallocate that changes the size");
    return code;
}
int fallocate(int fd, int mode, off_t offset, off_t len) { return fallocate_any(fd, mode, offset, len); }
int fallocate64(int fd, int mode, off64_t offset, off64_t len) { return fallocate_any(fd, mode, offset, len); }
int posix_fallocate(int fd, off_t offset, off_t len) {
    return fallocate_any(fd, 0, offset, len) ? errno : 0;
}

static int sync_any(int fd, long call) {
    struct tracked *t = of(fd, 1), *d = of(fd, 2);
    if (!t && !d) return (int)syscall(call, fd);
    long delay = asked("delay_ms");
    uint64_t id = __atomic_add_fetch(&next_sync, 1, __ATOMIC_RELAXED);
    uint64_t ino = t ? t->ino : 0;
    char *path = d ? strdup(d->path) : 0;
    if (t) record(SYNC_BEGIN, ino, id, 0, 0, 0, 0);
    else record_path(DIRSYNC_BEGIN, 0, id, path);
    for (long waited = 0; waited < delay; waited += 10) {
        struct timespec slice = {0, 10 * 1000 * 1000};
        nanosleep(&slice, 0);
        if (!asked("delay_ms")) break;
    }
    long code = asked("sync_errno");
    int result = -1;
    if (code) errno = (int)code;
    else result = (int)syscall(call, fd);
    if (!result) {
        if (t) record(SYNC_END, ino, id, 0, 0, 0, 0);
        else record_path(DIRSYNC_END, 0, id, path);
    }
    int saved = errno;
    free(path);
    errno = saved;
    return result;
}
int fsync(int fd) { return sync_any(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_any(fd, SYS_fdatasync); }
/* sync_file_range promises nothing about durability, so it is not recorded. */

static int two_names(enum kind kind, int code, int d1, const char *p1, int d2, const char *p2) {
    char b1[PATH_MAX], b2[PATH_MAX];
    const char *o1 = below(d1, p1, b1), *o2 = below(d2, p2, b2);
    if (code || (!o1 && !o2)) return code;
    if (!o1 || !o2) record_path(UNSUPPORTED, 0, 0, "a name that leaves or enters the watched directory");
    else record(kind, 0, 0, o1, strlen(o1), o2, strlen(o2));
    return code;
}
static int one_name(enum kind kind, int code, int dir, const char *path) {
    char buffer[PATH_MAX];
    const char *ours = below(dir, path, buffer);
    if (!code && ours) record_path(kind, 0, 0, ours);
    return code;
}
#define NAMES(call) \
    pthread_mutex_lock(&names); \
    int code = (call); \
    int saved = errno; \
    pthread_mutex_unlock(&names); \
    errno = saved; \
    return code
int renameat2(int d1, const char *p1, int d2, const char *p2, unsigned flags) {
    if (flags) { errno = EINVAL; return -1; }
    NAMES(two_names(RENAME, (int)syscall(SYS_renameat2, d1, p1, d2, p2, 0), d1, p1, d2, p2));
}
int rename(const char *p1, const char *p2) { return renameat2(AT_FDCWD, p1, AT_FDCWD, p2, 0); }
int renameat(int d1, const char *p1, int d2, const char *p2) { return renameat2(d1, p1, d2, p2, 0); }
int linkat(int d1, const char *p1, int d2, const char *p2, int flags) {
    NAMES(two_names(LINK, (int)syscall(SYS_linkat, d1, p1, d2, p2, flags), d1, p1, d2, p2));
}
int link(const char *p1, const char *p2) { return linkat(AT_FDCWD, p1, AT_FDCWD, p2, 0); }
int unlinkat(int dir, const char *path, int flags) {
    NAMES(one_name(flags & AT_REMOVEDIR ? RMDIR : UNLINK, (int)syscall(SYS_unlinkat, dir, path, flags), dir, path));
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path) {
    int code = unlinkat(AT_FDCWD, path, 0);
    return code && errno == EISDIR ? rmdir(path) : code;
}
int mkdirat(int dir, const char *path, mode_t mode) {
    NAMES(one_name(MKDIR, (int)syscall(SYS_mkdirat, dir, path, mode), dir, path));
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int truncate(const char *path, off_t size) {
    char buffer[PATH_MAX];
    if (below(AT_FDCWD, path, buffer)) {
        int fd = open_any(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
        if (fd < 0) return -1;
        int code = ftruncate_any(fd, size);
        close(fd);
        return code;
    }
    return (int)syscall(SYS_truncate, path, size);
}

ssize_t copy_file_range(int in, off64_t *oin, int out, off64_t *oout, size_t len, unsigned flags) {
    if (of(out, 1)) { errno = ENOSYS; return -1; }
    return syscall(SYS_copy_file_range, in, oin, out, oout, len, flags);
}
ssize_t sendfile(int out, int in, off_t *offset, size_t len) {
    if (of(out, 1)) { errno = EINVAL; return -1; }
    return syscall(SYS_sendfile, out, in, offset, len);
}
ssize_t sendfile64(int out, int in, off64_t *offset, size_t len) { return sendfile(out, in, (off_t *)offset, len); }

void *mmap(void *addr, size_t len, int prot, int flags, int fd, off_t offset) {
    if ((prot & PROT_WRITE) && (flags & MAP_SHARED) && of(fd, 1))
        record_path(UNSUPPORTED, 0, 0, "a shared writable mapping");
    return (void *)syscall(SYS_mmap, addr, len, prot, flags, fd, offset);
}
void *mmap64(void *addr, size_t len, int prot, int flags, int fd, off64_t offset) {
    return mmap(addr, len, prot, flags, fd, offset);
}
