// WAN link between two network namespaces, in user space.
//
// Decides when each packet arrives and which packets do not. Either direction is
//
//   random loss -> drop-tail queue (bytes) -> serialisation at `rate` -> delay line (+ jitter) -> peer
//
// One thread serves both directions and the control socket, so nothing is locked and a counter is never torn.
// Each namespace has a TUN device with TSO: one read moves up to 64 KiB, yet loss, queue drops and serialisation
// time are computed for each MTU segment, and a super-packet is cut around the segments that are dropped.
//
// It must not reorder or duplicate, and never delivers early; that it delivered late (a busy machine) it counts.
// Outside fact: on a TUN device with checksum offload the TCP checksum is neither computed nor verified, so the
// `corrupt` fault reaches the application: only a checksum of the application's own can see it.
//
// Usage: emulator NS_A IF_A NS_B IF_B CONTROL_SOCKET     (root; writes "ready" to stdout; ends on SIGTERM)
// Control, one datagram each way, JSON answers:
//   set a2b|b2a|both KEY=NUMBER ...     all keys or none; units: bit/s, seconds, bytes, probabilities
//   stats | reset                       counters since the start or the last reset
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <math.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    PACKET_MAX = 65536 + 256,
    HEADER_MAX = 128,
    WIRE_OVERHEAD = 38,    // Ethernet header, FCS, preamble and gap of one segment
    BATCH = 64,            // packets moved before the other direction gets its turn
    CONTROL_EVERY = 1000000, // ns between looks at the control socket while packets flow
    MTU = 1500,
};
#define ARENA_BYTES (128ull << 20) // payload in queue and flight, each direction; pages are touched as needed
#define ENTRIES (1ull << 16)       // packets in queue and flight, each direction

struct settings {
    double rate_bps;      // on the wire, overhead included; 0: no limit
    double delay_s;       // one way
    double jitter_s;      // standard deviation of an extra delay (cut off at 3 of them)
    double jitter_step_s; // that extra delay moves to a new random value in this time
    double loss;          // probability of a segment
    double loss_burst;    // mean length of a run of lost segments (Gilbert-Elliott); 1: independent
    double corrupt;       // probability that a segment has one bit of payload flipped
    double queue_bytes;   // drop-tail limit, in bytes on the wire
    double up;            // 0: every packet is dropped, those in flight too
    double drop_port;     // packets of this TCP or UDP port, at either end, are dropped as they come; 0: none
    double outage_every_s, outage_s; // the last outage_s of every outage_every_s are down; 0: never
    double lump_s;        // serialisation time that may be delivered in one write
    double quantum_s;     // pause after each round of work: saves CPU, adds up to as much delay under load
    double seed;          // restarts the random numbers
};

static const struct key { const char *name; size_t at; double min, max; } KEYS[] = {
#define KEY(field, low, high) {#field, offsetof(struct settings, field), low, high}
    KEY(rate_bps, 0, 1e12), KEY(delay_s, 0, 10), KEY(jitter_s, 0, 10), KEY(jitter_step_s, 1e-5, 100),
    KEY(loss, 0, 1), KEY(loss_burst, 1, 1e6), KEY(corrupt, 0, 1), KEY(queue_bytes, 0, 1e9), KEY(up, 0, 1),
    KEY(drop_port, 0, 65535), KEY(outage_every_s, 0, 1e6), KEY(outage_s, 0, 1e6), KEY(lump_s, 0, 1), KEY(quantum_s, 0, 0.1),
    KEY(seed, 0, 9e15),
};
#define KEY_COUNT (sizeof KEYS / sizeof *KEYS)

static const struct settings DEFAULTS = {
    .rate_bps = 1e9, .delay_s = 0.01, .jitter_step_s = 0.01, .loss_burst = 1, .queue_bytes = 2.5e6, .up = 1,
    .lump_s = 250e-6, .quantum_s = 200e-6, .seed = 1,
};

struct counters {
    uint64_t in_segments, in_bytes, out_segments, out_bytes, out_writes; // bytes: IP packets, no link overhead
    uint64_t lost, queue_dropped, down_dropped, port_dropped, corrupted;
    uint64_t overrun, write_errors, late_writes, late_max_ns; // the emulator's own failures; late: over 1 ms
    uint64_t queue_max_bytes;
};

struct entry {                 // one packet to write: a whole super-packet or a run of its segments
    double arrival, due;       // due is set when serialisation ends
    uint8_t *payload;
    uint64_t arena_end;        // arena position that is free once this entry is written
    uint32_t payload_len, wire;
    uint16_t header_len, segments;
    struct virtio_net_hdr vnet;
    uint8_t header[HEADER_MAX];
};

struct direction {
    const char *name;
    int in, out;
    struct settings set;
    struct counters count;
    struct entry *ring;        // [head, sent): in the delay line; [sent, tail): in the queue
    uint64_t head, sent, tail;
    uint8_t *arena;            // mapped twice in a row, so a packet never wraps
    uint64_t arena_head, arena_tail;
    double queued;             // wire bytes in [sent, tail)
    double free_at, last_due;  // ns: serialiser idle from, newest delivery
    double outage_from;        // ns: start of the first outage cycle
    uint64_t loss_rng, jitter_rng, corrupt_rng;
    int bad;                   // Gilbert-Elliott state
    double jitter_at, jitter_a, jitter_b;
};

static double cpu_reset;
static int realtime;

static void die(const char *what) {
    fprintf(stderr, "emulator: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double clock_ns(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}
static double now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

// ---- random numbers: one stream for each use, so that the losses depend on the seed and the segment count only

static uint64_t splitmix(uint64_t *x) {
    uint64_t z = (*x += 0x9e3779b97f4a7c15ull);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}
static double uniform(uint64_t *rng) { return (splitmix(rng) >> 11) * 0x1p-53; }

static double gaussian(uint64_t *rng) {
    double u = uniform(rng) + 0x1p-54, v = uniform(rng), g = sqrt(-2 * log(u)) * cos(2 * M_PI * v);
    return g > 3 ? 3 : g < -3 ? -3 : g;
}

static void reseed(struct direction *d) {
    uint64_t x = (uint64_t)d->set.seed * 2 + (d->name[0] == 'b');
    d->loss_rng = splitmix(&x);
    d->jitter_rng = splitmix(&x);
    d->corrupt_rng = splitmix(&x);
    d->bad = 0;
    d->jitter_at = d->jitter_a = d->jitter_b = 0;
}

// Gilbert-Elliott with no loss in the good state and nothing else in the bad one: mean run = loss_burst,
// long-run share = loss. Both cannot hold when loss > burst / (burst + 1): the good state then lasts one segment.
static int lose(struct direction *d) {
    double p = d->set.loss, burst = d->set.loss_burst;
    if (p <= 0) return d->bad = 0;
    if (p >= 1) return 1;
    if (burst <= 1) return uniform(&d->loss_rng) < p;
    return d->bad = uniform(&d->loss_rng) < (d->bad ? 1 - 1 / burst : p / (burst * (1 - p)));
}

// Piecewise linear between independent values, divided by the factor that interpolation takes off their spread.
static double jitter_ns(struct direction *d, double t) {
    if (d->set.jitter_s <= 0) return 0;
    double step = d->set.jitter_step_s * 1e9, from = t - d->jitter_at;
    if (from >= step) {
        double whole = floor(from / step);
        d->jitter_a = whole > 1 ? gaussian(&d->jitter_rng) : d->jitter_b;
        d->jitter_b = gaussian(&d->jitter_rng);
        d->jitter_at += whole * step;
        from = t - d->jitter_at;
    }
    double g = (d->jitter_a + (d->jitter_b - d->jitter_a) * from / step) / sqrt(2. / 3);
    return d->set.jitter_s * 1e9 * (g > 3 ? 3 : g < -3 ? -3 : g);
}

static int is_up(const struct direction *d, double t) {
    if (d->set.up == 0) return 0;
    double every = d->set.outage_every_s, down = d->set.outage_s;
    return every <= 0 || down <= 0 || fmod((t - d->outage_from) / 1e9, every) < every - down;
}

// ---- packet headers

static uint32_t sum16(const uint8_t *b, int n) {
    uint32_t sum = 0;
    for (; n > 1; n -= 2, b += 2) sum += b[0] << 8 | b[1];
    return sum;
}
static uint16_t fold(uint32_t sum) {
    while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
    return sum;
}
static void put16(uint8_t *b, uint32_t v) { b[0] = v >> 8, b[1] = v; }

// Bytes before the payload, or 0 when the packet is not one whose payload we can find.
static uint32_t header_length(const struct virtio_net_hdr *v, const uint8_t *packet, uint32_t len) {
    if (!(v->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)) return 0;
    uint32_t l4 = v->csum_start, n = 0;
    if (v->csum_offset == 16 && l4 + 20 <= len) n = l4 + (packet[l4 + 12] >> 4) * 4;
    if (v->csum_offset == 6 && l4 + 8 <= len) n = l4 + 8;
    return n <= len && n <= HEADER_MAX ? n : 0;
}

// Whether a packet comes from or goes to `port`. Not by the offload fields: a reset has none. IPv6 extension
// headers and later fragments hide the ports; neither occurs on a link of this MTU.
static int has_port(const uint8_t *packet, uint32_t len, uint32_t port) {
    int v6 = packet[0] >> 4 == 6;
    uint32_t l4 = v6 ? 40 : (packet[0] & 15) * 4;
    if (len < l4 + 4) return 0;
    uint8_t protocol = packet[v6 ? 6 : 9];
    if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP) return 0;
    const uint8_t *at = packet + l4;
    return (uint32_t)(at[0] << 8 | at[1]) == port || (uint32_t)(at[2] << 8 | at[3]) == port;
}

// Makes the header of segments [first, last) of a TCP super-packet of `total` segments.
static void rewrite(struct entry *e, uint32_t first, uint32_t last, uint32_t total) {
    uint8_t *ip = e->header, *tcp = ip + e->vnet.csum_start;
    uint32_t tcp_len = e->header_len - e->vnet.csum_start + e->payload_len, pseudo, seq;
    memcpy(&seq, tcp + 4, 4);
    seq = htonl(ntohl(seq) + first * e->vnet.gso_size);
    memcpy(tcp + 4, &seq, 4);
    if (last < total) tcp[13] &= ~0x09; // FIN and PSH belong to the last segment,
    if (first > 0) tcp[13] &= ~0x80;    // CWR to the first
    if (ip[0] >> 4 == 6) {
        put16(ip + 4, e->header_len - 40 + e->payload_len);
        pseudo = sum16(ip + 8, 32);
    } else {
        put16(ip + 2, e->header_len + e->payload_len);
        put16(ip + 4, (ip[4] << 8 | ip[5]) + first);
        put16(ip + 10, 0);
        put16(ip + 10, (uint16_t)~fold(sum16(ip, (ip[0] & 15) * 4)));
        pseudo = sum16(ip + 12, 8);
    }
    put16(tcp + 16, fold(pseudo + IPPROTO_TCP + tcp_len)); // what CHECKSUM_PARTIAL expects there
    e->vnet.hdr_len = e->header_len;
    if (last - first == 1) e->vnet.gso_type = VIRTIO_NET_HDR_GSO_NONE, e->vnet.gso_size = 0;
}

// ---- the path of a packet

static double service_ns(const struct direction *d, double bytes) {
    return d->set.rate_bps > 0 ? bytes * 8e9 / d->set.rate_bps : 0;
}

// Moves what has been serialised by `now` from the queue to the delay line.
static void serialise(struct direction *d, double now) {
    for (; d->sent != d->tail; d->sent++) {
        struct entry *e = &d->ring[d->sent % ENTRIES];
        double start = fmax(e->arrival, d->free_at), end = start + service_ns(d, e->wire);
        if (end > now) return;
        d->free_at = end;
        d->queued -= e->wire;
        e->due = fmax(fmax(end, end + d->set.delay_s * 1e9 + jitter_ns(d, end)), d->last_due);
        d->last_due = e->due;
    }
}

static double backlog(const struct direction *d, double now) {
    if (d->sent == d->tail || d->set.rate_bps <= 0) return 0;
    double start = fmax(d->ring[d->sent % ENTRIES].arrival, d->free_at);
    return d->queued - fmax(0, now - start) * d->set.rate_bps / 8e9;
}

// When the next packet may be due. A little early is harmless, late is not.
static double next_due(const struct direction *d) {
    if (d->head != d->sent) return d->ring[d->head % ENTRIES].due;
    if (d->sent == d->tail) return INFINITY;
    const struct entry *e = &d->ring[d->sent % ENTRIES];
    double end = fmax(e->arrival, d->free_at) + service_ns(d, e->wire);
    return end + fmax(0, d->set.delay_s - 3 * d->set.jitter_s) * 1e9;
}

struct packet {
    struct virtio_net_hdr vnet;
    uint8_t *bytes;
    uint32_t len, header_len, segment; // payload bytes of one segment
    uint32_t segments;
};

// Appends segments [first, last) as one entry.
static void append(struct direction *d, const struct packet *p, uint32_t first, uint32_t last, uint32_t wire,
                   double now) {
    struct entry *e = &d->ring[d->tail++ % ENTRIES];
    uint32_t from = p->header_len + first * p->segment;
    uint32_t to = last == p->segments ? p->len : p->header_len + last * p->segment;
    e->arrival = now;
    e->vnet = p->vnet;
    e->segments = last - first;
    e->wire = wire;
    e->payload = p->bytes + from;
    e->payload_len = to - from;
    e->header_len = p->header_len;
    e->arena_end = d->arena_tail;
    memcpy(e->header, p->bytes, p->header_len);
    if (last - first < p->segments) rewrite(e, first, last, p->segments);
    d->queued += wire;
}

static void enqueue(struct direction *d, struct packet *p, double now) {
    uint32_t payload = p->len - p->header_len;
    d->count.in_segments += p->segments;
    d->count.in_bytes += p->len;
    if (!is_up(d, now)) { d->count.down_dropped += p->segments; return; }
    if (d->set.drop_port && has_port(p->bytes, p->len, d->set.drop_port)) {
        d->count.port_dropped += p->segments;
        return;
    }
    serialise(d, now);
    double waiting = backlog(d, now); // grows by what this packet adds
    double lump = d->set.rate_bps > 0 ? d->set.rate_bps / 8 * d->set.lump_s : INFINITY;
    uint32_t first = 0, wire = 0;
    for (uint32_t i = 0; i <= p->segments; i++) {
        int drop = 0;
        uint32_t cost = 0;
        if (i < p->segments) {
            uint32_t part = i + 1 < p->segments ? p->segment : payload - i * p->segment;
            cost = p->header_len + part + WIRE_OVERHEAD;
            if (lose(d)) drop = 1, d->count.lost++;
            else if (waiting > 0 && waiting + cost > d->set.queue_bytes) drop = 1, d->count.queue_dropped++;
            else {
                if (d->set.rate_bps > 0) waiting += cost;
                if (waiting > d->count.queue_max_bytes) d->count.queue_max_bytes = waiting;
                if (p->header_len && part && d->set.corrupt > 0 && uniform(&d->corrupt_rng) < d->set.corrupt) {
                    uint32_t bit = uniform(&d->corrupt_rng) * part * 8;
                    p->bytes[p->header_len + i * p->segment + bit / 8] ^= 1 << bit % 8;
                    d->count.corrupted++;
                }
            }
        }
        if (i == p->segments || drop || (wire && wire + cost > lump)) { // the run [first, i) ends here
            if (wire) append(d, p, first, i, wire, now);
            first = i + drop, wire = 0;
        }
        if (!drop) wire += cost;
    }
}

// Reads what the near side sends. Returns the number of packets.
static int take(struct direction *d) {
    static uint8_t scratch[PACKET_MAX];
    int n = 0;
    for (; n < BATCH; n++) {
        if (d->head == d->tail) d->arena_head = d->arena_tail = 0; // stay on warm pages
        // a super-packet becomes one entry for each of its segments at most
        int room = d->arena_tail + PACKET_MAX - d->arena_head <= ARENA_BYTES && d->tail - d->head + 64 <= ENTRIES;
        struct packet p = {.bytes = room ? d->arena + d->arena_tail % ARENA_BYTES : scratch, .segments = 1};
        struct iovec v[2] = {{&p.vnet, sizeof p.vnet}, {p.bytes, PACKET_MAX}};
        ssize_t r = readv(d->in, v, 2);
        if (r <= (ssize_t)sizeof p.vnet) break;
        p.len = r - sizeof p.vnet;
        p.header_len = header_length(&p.vnet, p.bytes, p.len);
        p.segment = p.len - p.header_len;
        if (p.vnet.gso_type != VIRTIO_NET_HDR_GSO_NONE && p.vnet.gso_size && p.header_len && p.segment) {
            p.segment = p.vnet.gso_size;
            p.segments = (p.len - p.header_len + p.segment - 1) / p.segment;
        }
        if (!room || p.segments > 64) { d->count.overrun += p.segments; continue; }
        uint64_t before = d->tail;
        d->arena_tail += p.len;
        enqueue(d, &p, now_ns());
        if (d->tail == before) d->arena_tail -= p.len;
    }
    return n;
}

// Writes what is due to the far side. Returns the number of packets.
static int deliver(struct direction *d, double now) {
    int n = 0;
    serialise(d, now);
    for (; n < BATCH && d->head != d->sent; n++, d->head++) {
        struct entry *e = &d->ring[d->head % ENTRIES];
        if (e->due > now) break;
        d->arena_head = e->arena_end;
        if (!is_up(d, now)) { d->count.down_dropped += e->segments; continue; }
        if (now - e->due > d->count.late_max_ns) d->count.late_max_ns = now - e->due;
        if (now - e->due > 1e6) d->count.late_writes++;
        struct iovec v[3] = {{&e->vnet, sizeof e->vnet}, {e->header, e->header_len}, {e->payload, e->payload_len}};
        if (writev(d->out, v, 3) < 0) { d->count.write_errors++; continue; }
        d->count.out_segments += e->segments;
        d->count.out_bytes += e->header_len + e->payload_len;
        d->count.out_writes++;
    }
    return n;
}

// ---- control

struct text { char at[8192]; size_t len; };

__attribute__((format(printf, 2, 3))) static void say(struct text *t, const char *format, ...) {
    va_list a;
    va_start(a, format);
    int n = vsnprintf(t->at + t->len, sizeof t->at - t->len, format, a);
    va_end(a);
    t->len = n < 0 || t->len + n >= sizeof t->at ? sizeof t->at - 1 : t->len + n;
}

// Returns NULL, or what is wrong with KEY=NUMBER.
static const char *assign(struct settings *s, char *word) {
    char *value = strchr(word, '='), *end;
    if (!value) return "not KEY=NUMBER";
    *value++ = 0;
    for (size_t k = 0; k < KEY_COUNT; k++) {
        if (strcmp(word, KEYS[k].name)) continue;
        double x = strtod(value, &end);
        if (end == value || *end || !(x >= KEYS[k].min && x <= KEYS[k].max)) return "value out of range";
        memcpy((char *)s + KEYS[k].at, &x, sizeof x);
        return NULL;
    }
    return "unknown key";
}

static void set(struct direction *d, char *rest, struct text *answer) {
    char *save, *which = strtok_r(rest, " ", &save);
    int chosen[2] = {which && (!strcmp(which, "a2b") || !strcmp(which, "both")),
                     which && (!strcmp(which, "b2a") || !strcmp(which, "both"))};
    if (!chosen[0] && !chosen[1]) { say(answer, "{\"error\": \"set a2b|b2a|both KEY=NUMBER ...\"}"); return; }
    struct settings next[2] = {d[0].set, d[1].set};
    int new_outage = 0, new_seed = 0;
    for (char *word; (word = strtok_r(NULL, " ", &save));) {
        new_outage |= !strncmp(word, "outage", 6);
        new_seed |= !strncmp(word, "seed=", 5);
        for (int i = 0; i < 2; i++) {
            char copy[128];
            snprintf(copy, sizeof copy, "%s", word);
            const char *wrong = chosen[i] ? assign(&next[i], copy) : NULL;
            if (wrong) { say(answer, "{\"error\": \"%s: %s\"}", copy, wrong); return; }
        }
    }
    double now = now_ns();
    for (int i = 0; i < 2; i++) {
        if (!chosen[i]) continue;
        deliver(&d[i], now); // up to now the old settings hold
        if (d[i].sent != d[i].tail && d[i].set.rate_bps > 0 && next[i].rate_bps > 0) {
            // the packet in service keeps the share that has been sent
            struct entry *e = &d[i].ring[d[i].sent % ENTRIES];
            double start = fmax(e->arrival, d[i].free_at);
            if (start < now) d[i].free_at = e->arrival = now - (now - start) * d[i].set.rate_bps / next[i].rate_bps;
        }
        d[i].set = next[i];
        if (new_outage) d[i].outage_from = now;
        if (new_seed) reseed(&d[i]);
    }
    say(answer, "{\"ok\": true}");
}

static void stats(struct direction *d, struct text *t) {
    double now = now_ns();
    say(t, "{\"realtime\": %s, \"cpu_s\": %.6f", realtime ? "true" : "false",
        (clock_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu_reset) / 1e9);
    for (int i = 0; i < 2; i++, d++) {
        struct counters *c = &d->count;
        serialise(d, now);
        say(t, ", \"%s\": {\"settings\": {", d->name);
        for (size_t k = 0; k < KEY_COUNT; k++)
            say(t, "%s\"%s\": %.15g", k ? ", " : "", KEYS[k].name, *(double *)((char *)&d->set + KEYS[k].at));
        say(t, "}, \"link_up\": %s, \"queue_bytes\": %.0f, \"in_flight\": %lu", is_up(d, now) ? "true" : "false",
            fmax(0, backlog(d, now)), d->tail - d->head);
#define SHOW(field) say(t, ", \"" #field "\": %lu", c->field)
        SHOW(in_segments); SHOW(in_bytes); SHOW(out_segments); SHOW(out_bytes); SHOW(out_writes);
        SHOW(lost); SHOW(queue_dropped); SHOW(down_dropped); SHOW(port_dropped); SHOW(corrupted);
        SHOW(overrun); SHOW(write_errors); SHOW(late_writes); SHOW(late_max_ns); SHOW(queue_max_bytes);
        say(t, "}");
    }
    say(t, "}");
}

static void control(int fd, struct direction *d) {
    char line[1024];
    struct sockaddr_un from;
    socklen_t from_len = sizeof from;
    ssize_t r = recvfrom(fd, line, sizeof line - 1, MSG_DONTWAIT, (struct sockaddr *)&from, &from_len);
    if (r < 0) return;
    line[r] = 0;
    struct text answer = {.len = 0};
    if (!strncmp(line, "set ", 4)) set(d, line + 4, &answer);
    else if (!strcmp(line, "stats")) stats(d, &answer);
    else if (!strcmp(line, "reset")) {
        for (int i = 0; i < 2; i++) memset(&d[i].count, 0, sizeof d[i].count);
        cpu_reset = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
        say(&answer, "{\"ok\": true}");
    } else say(&answer, "{\"error\": \"unknown command\"}");
    if (from_len > sizeof(sa_family_t)) sendto(fd, answer.at, answer.len, MSG_DONTWAIT, (struct sockaddr *)&from, from_len);
}

// ---- start

static int open_tun(const char *namespace, const char *interface) {
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", namespace);
    int there = open(path, O_RDONLY | O_CLOEXEC), home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    if (there < 0 || home < 0 || setns(there, CLONE_NEWNET) < 0) die(path);
    struct ifreq r = {.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
    snprintf(r.ifr_name, sizeof r.ifr_name, "%s", interface);
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0) die("/dev/net/tun");
    if (ioctl(fd, TUNSETIFF, &r) < 0) die(interface);
    if (ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6) < 0) die("TUNSETOFFLOAD");
    if (setns(home, CLONE_NEWNET) < 0) die("setns");
    close(there);
    close(home);
    return fd;
}

static void open_direction(struct direction *d, const char *name, int in, int out) {
    int anonymous = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    *d = (struct direction){.name = name, .in = in, .out = out, .set = DEFAULTS};
    d->ring = mmap(NULL, sizeof(struct entry) * ENTRIES, PROT_READ | PROT_WRITE, anonymous, -1, 0);
    // a packet may start at the last byte of the first copy, hence the slack after the second
    d->arena = mmap(NULL, 2 * ARENA_BYTES, PROT_NONE, anonymous, -1, 0);
    int memory = memfd_create("wan-arena", MFD_CLOEXEC);
    if (d->ring == MAP_FAILED || d->arena == MAP_FAILED || memory < 0 || ftruncate(memory, ARENA_BYTES) < 0) die("memory");
    for (int i = 0; i < 2; i++)
        if (mmap(d->arena + i * ARENA_BYTES, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory, 0) == MAP_FAILED)
            die("mmap");
    close(memory);
    reseed(d);
}

static int open_control(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) { errno = ENAMETOOLONG; die(path); }
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0) die(path);
    return fd;
}

int main(int argc, char **argv) {
    if (argc != 6) { fprintf(stderr, "usage: emulator NS_A IF_A NS_B IF_B CONTROL_SOCKET\n"); return 2; }
    static struct direction d[2];
    int a = open_tun(argv[1], argv[2]), b = open_tun(argv[3], argv[4]);
    open_direction(&d[0], "a2b", a, b);
    open_direction(&d[1], "b2a", b, a);
    int socket = open_control(argv[5]);
    struct sched_param priority = {.sched_priority = 1}; // punctual on a busy machine
    prctl(PR_SET_TIMERSLACK, 1);
    realtime = sched_setscheduler(0, SCHED_RR, &priority) == 0;
    if (!realtime) setpriority(PRIO_PROCESS, 0, -15);
    if (write(STDOUT_FILENO, "ready\n", 6) != 6) die("stdout");

    double looked = 0;
    for (;;) {
        int most = 0, moved = 0;
        for (int i = 0; i < 2; i++) {
            int out = deliver(&d[i], now_ns()), in = take(&d[i]);
            moved += in + out;
            most = in > most ? in : out > most ? out : most;
        }
        double now = now_ns();
        if (moved && now - looked > CONTROL_EVERY) control(socket, d), looked = now;
        if (most == BATCH) continue;
        struct timespec pause = {0, 0};
        double quantum = fmax(d[0].set.quantum_s, d[1].set.quantum_s);
        if (moved && quantum > 0) {
            pause.tv_nsec = (long)(quantum * 1e9);
            nanosleep(&pause, NULL);
            continue;
        }
        double wait = fmin(fmin(next_due(&d[0]), next_due(&d[1])) - now, 1e9 - 1);
        pause.tv_nsec = wait > 0 ? (long)wait : 0;
        struct pollfd f[3] = {{a, POLLIN, 0}, {b, POLLIN, 0}, {socket, POLLIN, 0}};
        if (ppoll(f, 3, &pause, NULL) <= 0) continue;
        if ((f[0].revents | f[1].revents) & POLLERR) return 0; // a namespace is gone, and its device with it
        if (f[2].revents) control(socket, d), looked = now;
    }
}
