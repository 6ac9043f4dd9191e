/* Loaded into every process of a server (LD_PRELOAD), this makes the clock of the day jump: by as many seconds as the
 * file $JUMPING_CLOCK holds (one 64-bit number), as soon as they are written there. The monotonic clock stays.
 *
 * Waits until a time of day are translated back, so that they end when they should, which is what a kernel does whose
 * clock was set before the wait began. A wait that is under way when the clock jumps keeps its length; there a kernel
 * would end it at once, or after as long as the clock was set back. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define NEXT(name) dlsym(RTLD_NEXT, name)

static const volatile int64_t *jumped_s;
static const volatile int64_t no_jump;

__attribute__((constructor)) static void open_clock(void) {
    const char *path = getenv("JUMPING_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    jumped_s = page == MAP_FAILED ? &no_jump : page;
    if (file >= 0) close(file);
}

static int64_t jump(void) { return jumped_s ? *jumped_s : 0; }

/* A monotonic clock counts from the machine's start, the time of day from 1970: no mistaking one for the other. */
static struct timespec real(const struct timespec *until) {
    struct timespec shifted = *until;
    if (until->tv_sec > 600000000) shifted.tv_sec -= jump();
    return shifted;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*next)(clockid_t, struct timespec *);
    if (!next) next = NEXT("clock_gettime");
    int result = next(clock, now);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += jump();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec precise;
    int result = clock_gettime(CLOCK_REALTIME, &precise);
    if (!result) {
        now->tv_sec = precise.tv_sec;
        now->tv_usec = precise.tv_nsec / 1000;
    }
    return result;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex, const struct timespec *until) {
    static int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!next) next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!next) next = NEXT("pthread_cond_timedwait");
    struct timespec shifted = real(until);
    return next(cond, mutex, &shifted);
}

int pthread_cond_clockwait(pthread_cond_t *cond, pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until) {
    static int (*next)(pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    if (!next) next = NEXT("pthread_cond_clockwait");
    struct timespec shifted = real(until);
    return next(cond, mutex, clock, &shifted);
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until) {
    static int (*next)(pthread_mutex_t *, const struct timespec *);
    if (!next) next = NEXT("pthread_mutex_timedlock");
    struct timespec shifted = real(until);
    return next(mutex, &shifted);
}

int pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const struct timespec *until) {
    static int (*next)(pthread_mutex_t *, clockid_t, const struct timespec *);
    if (!next) next = NEXT("pthread_mutex_clocklock");
    struct timespec shifted = real(until);
    return next(mutex, clock, &shifted);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    static int (*next)(sem_t *, const struct timespec *);
    if (!next) next = NEXT("sem_timedwait");
    struct timespec shifted = real(until);
    return next(semaphore, &shifted);
}

int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *until) {
    static int (*next)(sem_t *, clockid_t, const struct timespec *);
    if (!next) next = NEXT("sem_clockwait");
    struct timespec shifted = real(until);
    return next(semaphore, clock, &shifted);
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *length, struct timespec *left) {
    static int (*next)(clockid_t, int, const struct timespec *, struct timespec *);
    if (!next) next = NEXT("clock_nanosleep");
    if (!(flags & TIMER_ABSTIME)) return next(clock, flags, length, left);
    struct timespec shifted = real(length);
    return next(clock, flags, &shifted, left);
}
