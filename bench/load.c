/*
 * Load for tunnels: the same client and server for every candidate, cheap enough to leave the machine to the tunnel.
 *
 *   load server PORT                       listen on 127.0.0.1 (0: any port); says "port N"; serves until killed
 *   load bulk PORT BYTES STREAMS up|down   move BYTES in all, divided among STREAMS connections
 *   load echo PORT ROUNDS                  ROUNDS round trips of one byte on one connection
 *   load connect PORT COUNT                COUNT times: connect, one byte there and back, close
 *   load hold PORT COUNT                   open COUNT connections, say so, wait for a line, try each again, close
 *   load busy PORT COUNT SECONDS SIZE      COUNT connections, each sending SIZE bytes and waiting for them, again and again
 *   load first PORT SECONDS                try every millisecond until one byte came back; says when
 *
 * Each client mode prints one line of JSON. Exit status 0: every byte was as expected.
 *
 * A connection starts with 16 bytes from the client: magic, operation, length. The server answers 'K' so that
 * a measurement begins on an established path, then
 *   'U' counts and checks LENGTH bytes and answers with count and digest (16 bytes);
 *   'D' sends LENGTH bytes;
 *   'E' returns what it gets.
 * Content is a pattern whose length is prime, so that bytes lost, repeated or swapped by whole blocks show; every
 * 509th byte is checked and digested.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 256 * 1024, PERIOD = 524287 /* prime */, STEP = 509, PATIENCE = 60 /* seconds without progress */ };

static const char MAGIC[7] = "peerld1";
static unsigned char pattern[PERIOD + BLOCK];

struct header {
    char magic[7];
    char operation;
    uint64_t length; /* little-endian: both ends are this machine */
};

struct digest {
    uint64_t count;
    uint64_t hash;
};

struct check {
    struct digest digest;
    uint64_t next; /* position of the next byte to look at */
    int wrong;
};

static void fail(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void make_pattern(void) {
    uint64_t x = 0x9e3779b97f4a7c15u;
    for (size_t i = 0; i < PERIOD; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        pattern[i] = (unsigned char)(x >> 32);
    }
    memcpy(pattern + PERIOD, pattern, BLOCK);
}

static void check_block(struct check *c, const unsigned char *data, size_t length) {
    uint64_t end = c->digest.count + length;
    for (; c->next < end; c->next += STEP) {
        unsigned char byte = data[c->next - c->digest.count];
        c->wrong |= byte != pattern[c->next % PERIOD];
        c->digest.hash = (c->digest.hash ^ byte) * 0x100000001b3u;
    }
    c->digest.count = end;
}

static struct digest expected_digest(uint64_t length) {
    struct digest d = {length, 0};
    for (uint64_t at = 0; at < length; at += STEP) d.hash = (d.hash ^ pattern[at % PERIOD]) * 0x100000001b3u;
    return d;
}

static void tune(int fd) {
    int one = 1;
    struct timeval patience = {PATIENCE, 0};
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
}

/* 0, or -1 when the connection ended or stalled. */
static int send_all(int fd, const void *data, size_t length) {
    const char *p = data;
    while (length) {
        ssize_t n = send(fd, p, length, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return -1;
        p += n, length -= (size_t)n;
    }
    return 0;
}

static int receive_all(int fd, void *data, size_t length) {
    char *p = data;
    while (length) {
        ssize_t n = recv(fd, p, length, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return -1;
        p += n, length -= (size_t)n;
    }
    return 0;
}

static int send_pattern(int fd, uint64_t length) {
    for (uint64_t at = 0; at < length;) {
        size_t n = length - at < BLOCK ? (size_t)(length - at) : BLOCK;
        if (send_all(fd, pattern + at % PERIOD, n)) return -1;
        at += n;
    }
    return 0;
}

static int receive_pattern(int fd, uint64_t length, struct check *c, unsigned char *buffer) {
    while (c->digest.count < length) {
        uint64_t left = length - c->digest.count;
        ssize_t n = recv(fd, buffer, left < BLOCK ? (size_t)left : BLOCK, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return -1;
        check_block(c, buffer, (size_t)n);
    }
    return 0;
}

/* ---- server ---- */

static void *serve(void *argument) {
    int fd = (int)(intptr_t)argument;
    struct header h;
    tune(fd);
    if (receive_all(fd, &h, sizeof h) || memcmp(h.magic, MAGIC, sizeof MAGIC) || send_all(fd, "K", 1)) goto done;
    struct timeval forever = {0, 0}; /* an idle connection is held, not given up */
    if (h.operation == 'E') setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof forever);
    if (h.operation == 'U') {
        unsigned char *buffer = malloc(BLOCK);
        struct check c = {0};
        if (buffer && !receive_pattern(fd, h.length, &c, buffer)) send_all(fd, &c.digest, sizeof c.digest);
        free(buffer);
    } else if (h.operation == 'D') {
        send_pattern(fd, h.length);
    } else if (h.operation == 'E') {
        unsigned char buffer[16 * 1024];
        ssize_t n;
        while ((n = recv(fd, buffer, sizeof buffer, 0)) > 0)
            if (send_all(fd, buffer, (size_t)n)) break;
    }
    if (h.operation != 'E') { /* let the other side close first, so that nothing in flight is cut off */
        char rest;
        shutdown(fd, SHUT_WR);
        while (recv(fd, &rest, 1, 0) > 0) {}
    }
done:
    close(fd);
    return NULL;
}

static pthread_t spawn(void *(*function)(void *), void *argument) {
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 128 * 1024);
    if ((errno = pthread_create(&thread, &attributes, function, argument))) fail("pthread_create");
    pthread_attr_destroy(&attributes);
    return thread;
}

_Noreturn static void run_server(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    socklen_t length = sizeof address;
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) fail("listen");
    if (getsockname(fd, (struct sockaddr *)&address, &length)) fail("getsockname");
    printf("port %d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int client = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
        if (client < 0) {
            if (errno == EINTR || errno == ECONNABORTED) continue;
            fail("accept");
        }
        pthread_detach(spawn(serve, (void *)(intptr_t)client));
    }
}

/* ---- client ---- */

static int try_open(int port, char operation, uint64_t length) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    struct header h = {.operation = operation, .length = length};
    char answer;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    memcpy(h.magic, MAGIC, sizeof MAGIC);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    tune(fd);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) || send_all(fd, &h, sizeof h) ||
        receive_all(fd, &answer, 1) || answer != 'K') {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

static int round_trip(int fd, unsigned char byte) {
    unsigned char back;
    return send_all(fd, &byte, 1) || receive_all(fd, &back, 1) || back != byte ? -1 : 0;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double percentile(const double *sorted, size_t count, double p) {
    size_t at = (size_t)(p * (double)(count - 1) + 0.5);
    return count ? sorted[at] : 0.0;
}

static void print_times(const char *mode, double *seconds, size_t count, size_t failures) {
    qsort(seconds, count, sizeof *seconds, ascending);
    printf("{\"mode\":\"%s\",\"count\":%zu,\"failures\":%zu,\"p50\":%.9f,\"p90\":%.9f,\"p99\":%.9f,\"max\":%.9f}\n", mode,
           count, failures, percentile(seconds, count, .50), percentile(seconds, count, .90),
           percentile(seconds, count, .99), percentile(seconds, count, 1.0));
}

struct transfer {
    int fd;
    int down;
    uint64_t length;
    int ok;
    double seconds; /* from the common start to the last byte confirmed */
    pthread_barrier_t *barrier;
    double *started;
};

static void *run_transfer(void *argument) {
    struct transfer *t = argument;
    struct digest expected = expected_digest(t->length), answer;
    unsigned char *buffer = malloc(BLOCK);
    struct check c = {0};
    if (!buffer) fail("malloc");
    pthread_barrier_wait(t->barrier);
    if (t->down)
        t->ok = !receive_pattern(t->fd, t->length, &c, buffer) && !c.wrong && c.digest.hash == expected.hash;
    else
        t->ok = !send_pattern(t->fd, t->length) && !receive_all(t->fd, &answer, sizeof answer) &&
                answer.count == expected.count && answer.hash == expected.hash;
    t->seconds = now() - *t->started;
    free(buffer);
    return NULL;
}

static int run_bulk(int port, uint64_t bytes, int streams, int down) {
    struct transfer *transfers = calloc((size_t)streams, sizeof *transfers);
    pthread_t *threads = calloc((size_t)streams, sizeof *threads);
    pthread_barrier_t barrier;
    double started = 0, last = 0;
    int ok = 1;
    uint64_t each = bytes / (uint64_t)streams;
    if (!transfers || !threads) fail("calloc");
    pthread_barrier_init(&barrier, NULL, (unsigned)streams + 1);
    for (int i = 0; i < streams; i++) {
        /* A download flows as soon as it is asked for, so its clock starts before the first connection. */
        if (down && i == 0) started = now();
        int fd = try_open(port, down ? 'D' : 'U', each);
        if (fd < 0) fail("connect");
        transfers[i] = (struct transfer){fd, down, each, 0, 0, &barrier, &started};
        threads[i] = spawn(run_transfer, &transfers[i]);
    }
    if (!down) started = now();
    pthread_barrier_wait(&barrier);
    for (int i = 0; i < streams; i++) {
        pthread_join(threads[i], NULL);
        close(transfers[i].fd);
        ok &= transfers[i].ok;
        if (transfers[i].seconds > last) last = transfers[i].seconds;
    }
    printf("{\"mode\":\"bulk\",\"ok\":%s,\"bytes\":%llu,\"seconds\":%.6f,\"each\":[", ok ? "true" : "false",
           (unsigned long long)(each * (uint64_t)streams), last);
    for (int i = 0; i < streams; i++) printf("%s%.6f", i ? "," : "", transfers[i].seconds);
    printf("]}\n");
    return ok ? 0 : 1;
}

static int run_echo(int port, size_t rounds) {
    double *seconds = calloc(rounds, sizeof *seconds);
    int fd = try_open(port, 'E', 0);
    if (fd < 0) fail("connect");
    if (!seconds) fail("calloc");
    for (int i = 0; i < 100; i++)
        if (round_trip(fd, (unsigned char)i)) fail("echo");
    for (size_t i = 0; i < rounds; i++) {
        double start = now();
        if (round_trip(fd, (unsigned char)i)) fail("echo");
        seconds[i] = now() - start;
    }
    print_times("echo", seconds, rounds, 0);
    return 0;
}

static int run_connect(int port, size_t count) {
    double *seconds = calloc(count, sizeof *seconds);
    size_t good = 0;
    if (!seconds) fail("calloc");
    for (size_t i = 0; i < count; i++) {
        double start = now();
        int fd = try_open(port, 'E', 0);
        if (fd >= 0) {
            seconds[good++] = now() - start;
            close(fd);
        }
    }
    print_times("connect", seconds, good, count - good);
    return good == count ? 0 : 1;
}

static int run_hold(int port, int count) {
    int *fds = calloc((size_t)count, sizeof *fds), open_ones = 0, alive = 0;
    double start = now();
    char line[16];
    if (!fds) fail("calloc");
    for (int i = 0; i < count; i++) {
        fds[i] = try_open(port, 'E', 0);
        if (fds[i] >= 0 && round_trip(fds[i], (unsigned char)i)) close(fds[i]), fds[i] = -1;
        open_ones += fds[i] >= 0;
    }
    printf("{\"mode\":\"held\",\"asked\":%d,\"open\":%d,\"seconds\":%.6f}\n", count, open_ones, now() - start);
    fflush(stdout);
    if (!fgets(line, sizeof line, stdin)) return 1;
    for (int i = 0; i < count; i++) {
        alive += fds[i] >= 0 && !round_trip(fds[i], (unsigned char)(i + 1));
        if (fds[i] >= 0) close(fds[i]);
    }
    printf("{\"mode\":\"hold\",\"asked\":%d,\"open\":%d,\"alive\":%d}\n", count, open_ones, alive);
    return alive == count ? 0 : 1;
}

struct talker {
    int port;
    size_t size;
    uint64_t rounds;
    int failed;
    double worst;
    pthread_barrier_t *barrier;
    atomic_int *stop;
};

static void *run_talker(void *argument) {
    struct talker *t = argument;
    unsigned char *back = malloc(t->size);
    int fd = try_open(t->port, 'E', 0);
    uint64_t at = (uint64_t)(intptr_t)argument % PERIOD;
    t->failed = fd < 0 || !back;
    pthread_barrier_wait(t->barrier);
    while (!t->failed && !atomic_load(t->stop)) {
        double start = now(), elapsed;
        if (send_all(fd, pattern + at, t->size) || receive_all(fd, back, t->size) || memcmp(pattern + at, back, t->size))
            t->failed = 1;
        else
            t->rounds++;
        elapsed = now() - start;
        if (elapsed > t->worst) t->worst = elapsed;
        at = (at + t->size) % PERIOD;
    }
    if (fd >= 0) close(fd);
    free(back);
    return NULL;
}

static int run_busy(int port, int count, double seconds, size_t size) {
    struct talker *talkers = calloc((size_t)count, sizeof *talkers);
    pthread_t *threads = calloc((size_t)count, sizeof *threads);
    double *rounds = calloc((size_t)count, sizeof *rounds);
    pthread_barrier_t barrier;
    atomic_int stop = 0;
    double start, elapsed, sum = 0, squares = 0, worst = 0;
    int failures = 0;
    if (!talkers || !threads || !rounds || size < 1 || size > BLOCK) fail("busy");
    pthread_barrier_init(&barrier, NULL, (unsigned)count + 1);
    for (int i = 0; i < count; i++) {
        talkers[i] = (struct talker){port, size, 0, 0, 0, &barrier, &stop};
        threads[i] = spawn(run_talker, &talkers[i]);
    }
    pthread_barrier_wait(&barrier);
    start = now();
    struct timespec pause = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&pause, NULL);
    atomic_store(&stop, 1);
    for (int i = 0; i < count; i++) {
        pthread_join(threads[i], NULL);
        rounds[i] = (double)talkers[i].rounds;
        sum += rounds[i], squares += rounds[i] * rounds[i];
        failures += talkers[i].failed;
        if (talkers[i].worst > worst) worst = talkers[i].worst;
    }
    elapsed = now() - start;
    qsort(rounds, (size_t)count, sizeof *rounds, ascending);
    printf("{\"mode\":\"busy\",\"count\":%d,\"failures\":%d,\"seconds\":%.6f,\"size\":%zu,\"round_trips\":%.0f,\"least\":%.0f,"
           "\"median\":%.0f,\"most\":%.0f,\"jain\":%.6f,\"worst\":%.6f}\n",
           count, failures, elapsed, size, sum, rounds[0], percentile(rounds, (size_t)count, .5), rounds[count - 1],
           squares > 0 ? sum * sum / ((double)count * squares) : 0.0, worst);
    return failures ? 1 : 0;
}

static int run_first(int port, double seconds) {
    double deadline = now() + seconds;
    struct timespec pause = {0, 1000000};
    while (now() < deadline) {
        int fd = try_open(port, 'E', 0);
        if (fd >= 0 && !round_trip(fd, 1)) {
            printf("{\"mode\":\"first\",\"at\":%.6f}\n", now());
            close(fd);
            return 0;
        }
        if (fd >= 0) close(fd);
        nanosleep(&pause, NULL);
    }
    fprintf(stderr, "load: nothing came back within %g s\n", seconds);
    return 1;
}

int main(int argc, char **argv) {
    const char *mode = argc > 2 ? argv[1] : "";
    int port = argc > 2 ? atoi(argv[2]) : 0;
    struct rlimit files;
    signal(SIGPIPE, SIG_IGN);
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    make_pattern();
    if (!strcmp(mode, "server") && argc == 3) run_server(port);
    if (!strcmp(mode, "bulk") && argc == 6 && atoi(argv[4]) > 0)
        return run_bulk(port, strtoull(argv[3], NULL, 10), atoi(argv[4]), !strcmp(argv[5], "down"));
    if (!strcmp(mode, "echo") && argc == 4) return run_echo(port, strtoull(argv[3], NULL, 10));
    if (!strcmp(mode, "connect") && argc == 4) return run_connect(port, strtoull(argv[3], NULL, 10));
    if (!strcmp(mode, "hold") && argc == 4) return run_hold(port, atoi(argv[3]));
    if (!strcmp(mode, "busy") && argc == 6 && atoi(argv[3]) > 0)
        return run_busy(port, atoi(argv[3]), atof(argv[4]), strtoull(argv[5], NULL, 10));
    if (!strcmp(mode, "first") && argc == 4) return run_first(port, atof(argv[3]));
    fprintf(stderr, "usage: load server|bulk|echo|connect|hold|busy|first PORT ... (see the head of load.c)\n");
    return 2;
}
