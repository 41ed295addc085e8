/* A disk that fails, for LD_PRELOAD: system calls on files below a folder return an error, or write less than asked.

   FAULT_ROOT     the folder (absolute); without it, nothing fails
   FAULT_OPS      which calls count, e.g. "write,fsync,rename,open,mkdir,unlink"
   FAULT_AT       the number of the call that fails, from 1; 0: only count
   FAULT_ERRNO    the error; 0: a write writes half of what it was asked to, which is not an error
   FAULT_LASTING  1: every later call fails as well
   FAULT_SERIAL   a new value resets the counter

   The variables are read at every call, so a process can change them with setenv. `fault_count` returns the counter. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static atomic_long counter;
static atomic_long serial = -1;

long fault_count(void) { return atomic_load(&counter); }

static long number(const char *name) {
  const char *text = getenv(name);
  return text ? atol(text) : 0;
}

static int below(const char *path) {
  const char *root = getenv("FAULT_ROOT");
  if (!root || !*root || !path) return 0;
  char whole[PATH_MAX * 2];
  if (path[0] != '/') {
    char here[PATH_MAX];
    if (!getcwd(here, sizeof here)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", here, path);
    path = whole;
  }
  return strncmp(path, root, strlen(root)) == 0;
}

/* Whether this call is the one that fails. */
static int due(const char *operation, const char *path) {
  const char *operations = getenv("FAULT_OPS");
  if (!operations || !strstr(operations, operation) || !below(path)) return 0;
  long now = number("FAULT_SERIAL");
  if (atomic_exchange(&serial, now) != now) atomic_store(&counter, 0);
  long count = atomic_fetch_add(&counter, 1) + 1, at = number("FAULT_AT");
  return at && (count == at || (count > at && number("FAULT_LASTING")));
}

static int due_fd(const char *operation, int fd) {
  if (!getenv("FAULT_ROOT")) return 0;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return due(operation, path);
}

static int fail(void) {
  errno = (int)number("FAULT_ERRNO");
  return -1;
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
  REAL(write);
  if (due_fd("write", fd)) {
    if (number("FAULT_ERRNO")) return fail();
    if (size > 1) size = size > 2 ? size / 2 : 1;
  }
  return real(fd, data, size);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
  REAL(pwrite);
  if (due_fd("write", fd)) {
    if (number("FAULT_ERRNO")) return fail();
    if (size > 1) size = size / 2;
  }
  return real(fd, data, size, offset);
}

int fsync(int fd) {
  REAL(fsync);
  return due_fd("fsync", fd) ? fail() : real(fd);
}

int fdatasync(int fd) {
  REAL(fdatasync);
  return due_fd("fsync", fd) ? fail() : real(fd);
}

int ftruncate(int fd, off_t length) {
  REAL(ftruncate);
  return number("FAULT_ERRNO") && due_fd("write", fd) ? fail() : real(fd, length);
}

int rename(const char *from, const char *to) {
  REAL(rename);
  return due("rename", from) ? fail() : real(from, to);
}

int unlink(const char *path) {
  REAL(unlink);
  return due("unlink", path) ? fail() : real(path);
}

int mkdir(const char *path, mode_t mode) {
  REAL(mkdir);
  return due("mkdir", path) ? fail() : real(path, mode);
}

#define OPENS(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR))

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = va_arg(rest, mode_t); \
    va_end(rest); \
    return OPENS(flags) && due("open", path) ? fail() : real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    REAL(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = va_arg(rest, mode_t); \
    va_end(rest); \
    return OPENS(flags) && folder == AT_FDCWD && due("open", path) ? fail() : real(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)
