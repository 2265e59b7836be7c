/* A stub of a clock that goes wrong: a test host has its kernel's clock and none of its own, so what jumps is the time of day that the programs
   with this library in LD_PRELOAD see. It is off by the seconds in the file that STUB_CLOCK names (one int64_t, mapped: a change is seen at
   once, by processes that run too). The monotonic clock stays as it is, and so does what waits in the kernel. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int64_t off(void)
{
    /* at first use: not every compiler's library has a constructor */
    static volatile int64_t *seconds;
    static volatile int looked;
    if (!looked) {
        const char *path = getenv("STUB_CLOCK");
        int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        void *place = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *seconds, PROT_READ, MAP_SHARED, file, 0);
        if (place != MAP_FAILED)
            seconds = place;
        if (file >= 0)
            close(file);
        looked = 1;
    }
    return seconds ? *seconds : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += off();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec read;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &read))
        return -1;
    now->tv_sec = read.tv_sec;
    now->tv_usec = read.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *copy)
{
    struct timespec read;
    if (clock_gettime(CLOCK_REALTIME, &read))
        return -1;
    if (copy)
        *copy = read.tv_sec;
    return read.tv_sec;
}
