/* Preloaded: every TCP socket of the process starts with the congestion control of $BENCH_DEFAULT_CC, as on a
 * host whose default that is. (The kernel takes a restricted one as a default of the first namespace only.) */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

int socket(int family, int type, int protocol) {
    static int (*next)(int, int, int);
    if (!next) next = (int (*)(int, int, int))dlsym(RTLD_NEXT, "socket");
    int made = next(family, type, protocol);
    const char *name = getenv("BENCH_DEFAULT_CC");
    if (made >= 0 && name && (family == AF_INET || family == AF_INET6) && (type & 0xf) == SOCK_STREAM)
        setsockopt(made, IPPROTO_TCP, TCP_CONGESTION, name, strlen(name));
    return made;
}
