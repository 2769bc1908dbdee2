/* GPT-2's byte-level BPE: UTF-8 in, uint16 token ids out, the same ids as tiktoken's encode_ordinary.
 *
 * A text is divided into pieces by the pattern
 *
 *     '(?:[sdmt]|ll|ve|re) |  ?\p{L}++ |  ?\p{N}++ |  ?[^\s\p{L}\p{N}]++ | \s++$ | \s+(?!\S) | \s
 *
 * and the bytes of each piece are merged: repeatedly, of the neighbours whose concatenation is a token, those with the
 * lowest id (leftmost on ties) become that token. The results of short pieces are cached, because text repeats.
 *
 * Tables are constant and shared by threads; a Worker is used by one thread at a time.
 * Input must be valid UTF-8; other bytes give unspecified ids, but no access outside the buffers.
 */
#define _DEFAULT_SOURCE /* madvise */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define EOT 50256
#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

enum { OTHER, LETTER, NUMBER, SPACE };
enum { NO_MEMORY = -1, PIECE_TOO_LONG = -2 };

typedef struct {
    const uint8_t *class_of; /* [0x110000]; owned by the caller */
    uint64_t *pairs;         /* open addressing: (left << 16 | right) << 16 | merged, EMPTY */
    uint64_t pair_mask;
    uint16_t byte_id[256];
    uint16_t byte_pair[65536]; /* token of two bytes; 0 for none, as token 0 is a byte */
} Tables;

/* Cached pieces. The key is the piece's bytes, zero-padded, with its length in the last byte; length 0 is a free slot. */
typedef struct {
    uint64_t key[2];
    uint16_t n, id[7];
} Short; /* up to 15 bytes and 7 ids: two in a cache line */

typedef struct {
    uint64_t key[4];
    uint16_t n, id[15];
} Long; /* up to 31 bytes and 15 ids */

#define SHORTS (1u << 19) /* 16 MiB per worker */
#define LONGS (1u << 16)  /* 4 MiB */

typedef struct {
    const Tables *tables;
    Short *shorts;
    Long *longs;
    int64_t error;
} Worker;

/* ------------------------------------------------------------------------------------------------------- tables */

#define HUGE_PAGE (2u << 20)

/* Memory for random access: huge pages, if available, reduce TLB misses. */
static void *alloc_huge(size_t size) {
    void *memory = aligned_alloc(HUGE_PAGE, (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
#ifdef MADV_HUGEPAGE
    if (memory) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return memory;
}

#define EMPTY UINT64_MAX

static inline uint64_t pair_slot(uint32_t pair, uint64_t mask) {
    return (pair * 0x9E3779B97F4A7C15ull >> 32) & mask;
}

/* The token of two neighbours, or -1. Ids are ranks: lower ids are merged first. */
static inline int32_t merged(const Tables *t, uint16_t left, uint16_t right) {
    uint32_t pair = (uint32_t)left << 16 | right;
    for (uint64_t slot = pair_slot(pair, t->pair_mask);; slot = (slot + 1) & t->pair_mask) {
        uint64_t entry = t->pairs[slot];
        if (entry == EMPTY) return -1;
        if (entry >> 16 == pair) return (int32_t)(entry & 0xFFFF);
    }
}

void bpe_tables_free(Tables *t) {
    if (t) free(t->pairs);
    free(t);
}

Tables *bpe_tables_new(const uint8_t *class_of, const uint16_t *byte_id, const uint32_t *pair, const uint16_t *id, uint64_t n) {
    Tables *t = calloc(1, sizeof *t);
    if (!t) return NULL;
    uint64_t size = 4;
    while (size < 2 * n + 2) size *= 2;
    t->class_of = class_of;
    t->pair_mask = size - 1;
    memcpy(t->byte_id, byte_id, sizeof t->byte_id);
    t->pairs = alloc_huge(size * sizeof *t->pairs);
    if (!t->pairs) {
        bpe_tables_free(t);
        return NULL;
    }
    memset(t->pairs, 0xFF, size * sizeof *t->pairs);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t slot = pair_slot(pair[i], t->pair_mask);
        while (t->pairs[slot] != EMPTY) slot = (slot + 1) & t->pair_mask;
        t->pairs[slot] = (uint64_t)pair[i] << 16 | id[i];
    }
    for (uint32_t i = 0; i < 65536; i++) {
        int32_t rank = merged(t, byte_id[i >> 8], byte_id[i & 0xFF]);
        t->byte_pair[i] = rank < 0 ? 0 : (uint16_t)rank;
    }
    return t;
}

void bpe_worker_free(Worker *w) {
    if (w) {
        free(w->shorts);
        free(w->longs);
    }
    free(w);
}

Worker *bpe_worker_new(const Tables *tables) {
    Worker *w = calloc(1, sizeof *w);
    if (!w) return NULL;
    w->tables = tables;
    w->shorts = alloc_huge(SHORTS * sizeof(Short));
    w->longs = alloc_huge(LONGS * sizeof(Long));
    if (!w->shorts || !w->longs) {
        bpe_worker_free(w);
        return NULL;
    }
    memset(w->shorts, 0, SHORTS * sizeof(Short));
    memset(w->longs, 0, LONGS * sizeof(Long));
    return w;
}

/* ------------------------------------------------------------------------------------------------------ merging */

#define SCAN_MAX 256
#define NONE UINT32_MAX

static inline uint32_t candidate(const Tables *t, uint16_t left, uint16_t right, uint32_t at) {
    int32_t rank = merged(t, left, right);
    return rank < 0 ? NONE : (uint32_t)rank << 8 | at; /* orders by rank, then by position */
}

/* Up to SCAN_MAX bytes: scan all remaining pairs for the best one at each merge. */
static uint32_t merge_scan(const Tables *t, const uint8_t *s, uint32_t n, uint16_t *out) {
    uint16_t id[SCAN_MAX], next[SCAN_MAX + 1], previous[SCAN_MAX + 1];
    uint32_t pair[SCAN_MAX]; /* of the token at byte i and the next one; NONE if no token begins there */
    for (uint32_t i = 0; i < n; i++) {
        id[i] = t->byte_id[s[i]];
        next[i] = (uint16_t)(i + 1);
        previous[i] = (uint16_t)(i - 1);
    }
    for (uint32_t i = 0; i + 1 < n; i++) {
        uint32_t rank = t->byte_pair[s[i] << 8 | s[i + 1]];
        pair[i] = rank ? rank << 8 | i : NONE;
    }
    pair[n - 1] = NONE;
    for (;;) {
        uint32_t best = NONE;
        for (uint32_t i = 0; i < n; i++) best = pair[i] < best ? pair[i] : best;
        if (best == NONE) break;
        uint32_t at = best & 0xFF, right = next[at], after = next[right];
        id[at] = (uint16_t)(best >> 8);
        next[at] = (uint16_t)after;
        previous[after] = (uint16_t)at;
        pair[right] = NONE;
        pair[at] = after < n ? candidate(t, id[at], id[after], at) : NONE;
        if (at) pair[previous[at]] = candidate(t, id[previous[at]], id[at], previous[at]);
    }
    uint32_t count = 0;
    for (uint32_t i = 0; i < n; i = next[i]) out[count++] = id[i];
    return count;
}

/* A min-heap of rank << 32 | position. */
static void sift_down(uint64_t *heap, uint64_t n, uint64_t i) {
    uint64_t value = heap[i];
    for (uint64_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= value) break;
        heap[i] = heap[child];
    }
    heap[i] = value;
}

static void heap_push(uint64_t *heap, uint64_t *n, uint64_t value) {
    uint64_t i = (*n)++;
    for (; i && heap[(i - 1) / 2] > value; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = value;
}

/* Any length below 4 GiB: a linked list of tokens and a heap of pairs, which may hold stale pairs. */
static int64_t merge_heap(const Tables *t, const uint8_t *s, uint64_t n, uint16_t *out) {
    if (n >= UINT32_MAX) return PIECE_TOO_LONG;
    uint32_t *next = malloc(n * sizeof *next), *previous = malloc(n * sizeof *previous);
    uint64_t *heap = malloc(2 * n * sizeof *heap), heaped = 0; /* n - 1 initially; each merge removes one and adds up to two */
    uint16_t *id = out; /* has room for n */
    int64_t count = NO_MEMORY;
    if (next && previous && heap) {
        for (uint64_t i = 0; i < n; i++) {
            id[i] = t->byte_id[s[i]];
            next[i] = (uint32_t)(i + 1);
            previous[i] = (uint32_t)(i - 1);
        }
        for (uint64_t i = 0; i + 1 < n; i++) {
            int32_t rank = merged(t, id[i], id[i + 1]);
            if (rank >= 0) heap[heaped++] = (uint64_t)rank << 32 | i;
        }
        for (uint64_t i = heaped / 2; i-- > 0;) sift_down(heap, heaped, i);
        while (heaped) {
            uint64_t top = heap[0];
            heap[0] = heap[--heaped];
            if (heaped) sift_down(heap, heaped, 0);
            uint32_t left = (uint32_t)top, right;
            if (next[left] == 0) continue; /* merged into its left neighbour */
            right = next[left];
            if (right >= n || merged(t, id[left], id[right]) != (int32_t)(top >> 32)) continue; /* stale */
            id[left] = (uint16_t)(top >> 32);
            next[left] = next[right];
            next[right] = 0;
            if (next[left] < n) {
                previous[next[left]] = left;
                int32_t rank = merged(t, id[left], id[next[left]]);
                if (rank >= 0) heap_push(heap, &heaped, (uint64_t)rank << 32 | left);
            }
            if (left) {
                int32_t rank = merged(t, id[previous[left]], id[left]);
                if (rank >= 0) heap_push(heap, &heaped, (uint64_t)rank << 32 | previous[left]);
            }
        }
        count = 0;
        for (uint64_t i = 0; i < n; i = next[i]) out[count++] = id[i];
    }
    free(next);
    free(previous);
    free(heap);
    return count;
}

/* ------------------------------------------------------------------------------------------- caching pieces */

static inline uint64_t mix(uint64_t a, uint64_t b) {
    __uint128_t product = (__uint128_t)(a ^ 0xA0761D6478BD642Full) * (b ^ 0xE7037ED1A0B428DBull);
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

typedef struct {
    const uint8_t *start;
    uint64_t length;
    uint64_t key[2]; /* of a short piece */
    Short *slot;     /* two candidate slots; NULL for a longer piece */
} Piece;

static __attribute__((noinline)) uint16_t *merge_short(Worker *w, const Piece *p, uint16_t *out) {
    uint16_t id[16];
    uint32_t n = merge_scan(w->tables, p->start, (uint32_t)p->length, id);
    if (n <= 7) {
        /* The first piece keeps its slot, as it is likely common; the second slot holds the latest. */
        Short *slot = p->slot + (p->slot->key[1] != 0);
        slot->key[0] = p->key[0];
        slot->key[1] = p->key[1];
        slot->n = (uint16_t)n;
        memcpy(slot->id, id, n * sizeof *id);
    }
    memcpy(out, id, n * sizeof *id);
    return out + n;
}

static __attribute__((noinline)) uint16_t *merge_long(Worker *w, const uint8_t *s, uint64_t length, uint16_t *out) {
    if (length <= 31) {
        uint64_t key[4] = {0};
        memcpy(key, s, length);
        key[3] |= length << 56;
        Long *slot = w->longs + ((mix(key[0], key[1]) ^ mix(key[2], ~key[3])) & (LONGS - 1));
        if (memcmp(slot->key, key, sizeof key) == 0) {
            memcpy(out, slot->id, sizeof slot->id);
            return out + slot->n;
        }
        uint32_t n = merge_scan(w->tables, s, (uint32_t)length, out);
        if (n <= 15) {
            memcpy(slot->key, key, sizeof key);
            slot->n = (uint16_t)n;
            memcpy(slot->id, out, n * sizeof *out);
        }
        return out + n;
    }
    if (length <= SCAN_MAX) return out + merge_scan(w->tables, s, (uint32_t)length, out);
    int64_t n = merge_heap(w->tables, s, length, out);
    if (n < 0) {
        w->error = n;
        return out;
    }
    return out + n;
}

static uint16_t *emit(Worker *w, const Piece *p, uint32_t n, uint16_t *out) {
    for (const Piece *end = p + n; p < end; p++) {
        const Short *slot = p->slot;
        if (UNLIKELY(!slot)) {
            out = merge_long(w, p->start, p->length, out);
            continue;
        }
        uint64_t first = (slot[0].key[0] ^ p->key[0]) | (slot[0].key[1] ^ p->key[1]);
        uint64_t second = (slot[1].key[0] ^ p->key[0]) | (slot[1].key[1] ^ p->key[1]);
        if (UNLIKELY(first != 0 && second != 0)) {
            out = merge_short(w, p, out);
            continue;
        }
        slot += first != 0;
        memcpy(out, slot->id, sizeof slot->id); /* always 7: one store without a branch */
        out += slot->n;
    }
    return out;
}

static const uint64_t LOW[9] = {0, 0xFF, 0xFFFF, 0xFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFF, 0xFFFFFFFFFFFF, 0xFFFFFFFFFFFFFF, UINT64_MAX};

/* Compute a piece's key and prefetch its slots; `limit` is the end of readable memory. */
static inline void prepare(Worker *w, Piece *p, const uint8_t *start, uint64_t length, const uint8_t *limit) {
    p->start = start;
    p->length = length;
    if (UNLIKELY(length > 15)) {
        p->slot = NULL;
        return;
    }
    uint64_t low, high;
    if (LIKELY(limit - start >= 16)) {
        memcpy(&low, start, 8);
        memcpy(&high, start + 8, 8);
    } else {
        uint8_t padded[16] = {0};
        memcpy(padded, start, length);
        memcpy(&low, padded, 8);
        memcpy(&high, padded + 8, 8);
    }
    uint64_t in_low = length < 8 ? length : 8;
    p->key[0] = low & LOW[in_low];
    p->key[1] = (high & LOW[length - in_low]) | length << 56;
    p->slot = w->shorts + (mix(p->key[0], p->key[1]) & (SHORTS - 2));
    __builtin_prefetch(p->slot);
}

/* ------------------------------------------------------------------------------------------------------- pieces */

/* Decode one character: returns the code point, sets *length. Does not read at or after `end`, which is > p. */
static inline uint32_t character(const uint8_t *p, const uint8_t *end, uint32_t *length) {
    uint32_t a = p[0];
    if (a < 0x80) return *length = 1, a;
    if (a < 0xE0 && end - p >= 2) return *length = 2, (a & 0x1F) << 6 | (p[1] & 0x3F);
    if (a < 0xF0 && end - p >= 3) return *length = 3, (a & 0x0F) << 12 | (uint32_t)(p[1] & 0x3F) << 6 | (p[2] & 0x3F);
    if (end - p >= 4) {
        uint32_t c = (a & 0x07) << 18 | (uint32_t)(p[1] & 0x3F) << 12 | (uint32_t)(p[2] & 0x3F) << 6 | (p[3] & 0x3F);
        return *length = 4, c < 0x110000 ? c : 0xFFFD;
    }
    return *length = 1, 0xFFFD;
}

static inline uint8_t class_at(const uint8_t *class_of, const uint8_t *p, const uint8_t *end) {
    uint32_t length;
    return class_of[character(p, end, &length)];
}

/* Classes of 64 bytes; bit i is byte i. */
typedef struct {
    uint64_t letter, number, space; /* initially of ASCII only */
    uint64_t blank, apostrophe, high; /* ' ', '\'', >= 0x80 */
} Masks;

static inline Masks masks(const uint8_t *p) {
    Masks m = {0, 0, 0, 0, 0, 0};
#if defined(__SSE2__) && !defined(PORTABLE)
#define BETWEEN(low, count) _mm_cmpeq_epi8(_mm_min_epu8(_mm_sub_epi8(v, _mm_set1_epi8(low)), _mm_set1_epi8((count) - 1)), _mm_sub_epi8(v, _mm_set1_epi8(low)))
#define BITS(x) ((uint64_t)(uint32_t)_mm_movemask_epi8(x) << 16 * i)
    for (int i = 0; i < 4; i++) {
        __m128i v = _mm_loadu_si128((const __m128i *)p + i);
        __m128i blank = _mm_cmpeq_epi8(v, _mm_set1_epi8(' '));
        m.blank |= BITS(blank);
        m.space |= BITS(_mm_or_si128(blank, BETWEEN('\t', 5)));
        m.number |= BITS(BETWEEN('0', 10));
        m.apostrophe |= BITS(_mm_cmpeq_epi8(v, _mm_set1_epi8('\'')));
        m.high |= BITS(v);
        v = _mm_or_si128(v, _mm_set1_epi8(0x20));
        m.letter |= BITS(BETWEEN('a', 26));
    }
#else
    for (int i = 0; i < 64; i++) {
        uint8_t c = p[i];
        m.letter |= (uint64_t)((uint8_t)((c | 0x20) - 'a') < 26) << i;
        m.number |= (uint64_t)((uint8_t)(c - '0') < 10) << i;
        m.space |= (uint64_t)(c == ' ' || (uint8_t)(c - '\t') < 5) << i;
        m.blank |= (uint64_t)(c == ' ') << i;
        m.apostrophe |= (uint64_t)(c == '\'') << i;
        m.high |= (uint64_t)(c >= 0x80) << i;
    }
#endif
    return m;
}

/* State from one block of 64 bytes to the next. */
typedef struct {
    uint64_t letter, number, space, other, blank; /* bit 0: class of the last byte; 0 before a document */
    uint64_t clear, set;                          /* borders that a contraction moves into the next block */
    uint32_t rest;                                /* bytes of a character that continues in the next block */
    uint8_t class;                                /* its class */
} Carry;

/* The borders of a block: bit i is set where byte i begins a piece. `from` holds a readable copy of the 64 bytes at p, of
 * which those before `end` are text. Equivalent to the pattern, without trying its alternatives:
 * a piece begins where the class changes; a ' ' before another class belongs to the piece that follows; any other last
 * character of a run of white space is a separate piece, unless the text ends there. */
static inline uint64_t borders(const uint8_t *class_of, const uint8_t *from, const uint8_t *p, const uint8_t *end, Carry *carry) {
    Masks m = masks(from);
    uint64_t last_high = 0; /* lead bytes of non-ASCII white space at the end of a run */
    uint64_t valid = end - p >= 64 ? UINT64_MAX : (1ull << (end - p)) - 1;
    if (UNLIKELY((m.high & valid) != 0)) {
        uint64_t todo = m.high & valid;
        uint32_t rest = carry->rest;
        uint8_t class = carry->class;
        uint64_t bytes = rest ? (1ull << rest) - 1 : 0;
        carry->rest = 0;
        for (;;) {
            /* continuation bytes get the class of their character, so no piece begins at them */
            if (class == LETTER) m.letter |= bytes;
            if (class == NUMBER) m.number |= bytes;
            if (class == SPACE) m.space |= bytes;
            todo &= ~bytes;
            if (!todo) break;
            uint32_t at = (uint32_t)__builtin_ctzll(todo), length;
            class = class_of[character(p + at, end, &length)];
            bytes = ((1ull << length) - 1) << at;
            if (at + length > 64) {
                carry->rest = at + length - 64;
                carry->class = class;
            }
            if (class == SPACE && p + at + length < end && class_at(class_of, p + at + length, end) != SPACE)
                last_high |= 1ull << at;
        }
    } else {
        carry->rest = 0;
    }
    uint64_t space = m.space | ~valid; /* a run of white space continues past the text's end */
    uint64_t other = ~(m.letter | m.number | space);
    uint64_t space_after = space >> 1;
    if (end - p <= 64 || class_at(class_of, p + 64, end) == SPACE) space_after |= 1ull << 63;
    uint64_t after_space = space << 1 | carry->space, after_blank = m.blank << 1 | carry->blank;
    uint64_t changed = (m.letter & ~(m.letter << 1 | carry->letter)) | (m.number & ~(m.number << 1 | carry->number)) |
                       (other & ~(other << 1 | carry->other));
    uint64_t border = (space & ~after_space) | (space & ~m.high & ~space_after) | last_high |
                      (~space & after_space & ~after_blank) | (changed & ~after_space);
    carry->letter = m.letter >> 63;
    carry->number = m.number >> 63;
    carry->space = space >> 63;
    carry->other = other >> 63;
    carry->blank = m.blank >> 63;
    border = (border & ~carry->clear) | carry->set;
    carry->clear = carry->set = 0;
    for (uint64_t quotes = m.apostrophe & border & valid; quotes; quotes &= quotes - 1) { /* '(?:[sdmt]|ll|ve|re) */
        uint32_t at = (uint32_t)__builtin_ctzll(quotes), length = 0;
        const uint8_t *q = p + at;
        uint8_t a = end - q >= 2 ? q[1] : 0, b = end - q >= 3 ? q[2] : 0;
        if (a == 's' || a == 't' || a == 'd' || a == 'm') length = 2;
        if ((a == 'l' && b == 'l') || (a == 'v' && b == 'e') || (a == 'r' && b == 'e')) length = 3;
        if (!length) continue;
        if (at + 1 < 64) border &= ~(1ull << (at + 1));
        else carry->clear = 1;
        if (at + length < 64) border |= 1ull << (at + length);
        else carry->set = 1ull << (at + length - 64);
    }
    return border & valid;
}

#define AHEAD 256 /* pieces prepared together, so that prefetches complete before use */

static uint16_t *pieces(Worker *w, const uint8_t *const *start, uint32_t n, const uint8_t *limit, uint16_t *out) {
    Piece piece[AHEAD];
    for (uint32_t i = 0; i < n; i++) prepare(w, &piece[i], start[i], (uint64_t)(start[i + 1] - start[i]), limit);
    return emit(w, piece, n, out);
}

/* Encode one document to `out`; returns the end of its ids. `limit` >= end is the end of readable memory. */
static uint16_t *document(Worker *w, const uint8_t *p, const uint8_t *end, const uint8_t *limit, uint16_t *out) {
    const uint8_t *start[AHEAD + 64 + 8];
    uint32_t n = 0;
    Carry carry = {0};
    carry.set = 1; /* a piece begins with the text */
    for (; p < end; p += 64) {
        uint8_t padded[64];
        const uint8_t *from = p;
        if (UNLIKELY(limit - p < 64)) {
            memset(padded, 0, sizeof padded);
            memcpy(padded, p, (size_t)(limit - p));
            from = padded;
        }
        uint64_t border = borders(w->tables->class_of, from, p, end, &carry);
        uint32_t count = (uint32_t)__builtin_popcountll(border);
        for (uint32_t i = 0; i < count; i += 8) /* eight at a time: fewer branch mispredictions */
            for (uint32_t j = 0; j < 8; j++, border &= border - 1) start[n + i + j] = p + __builtin_ctzll(border | 1ull << 63);
        n += count;
        if (n > AHEAD) {
            out = pieces(w, start, AHEAD, limit, out);
            n -= AHEAD;
            memmove(start, start + AHEAD, n * sizeof *start);
        }
    }
    start[n] = end;
    return n ? pieces(w, start, n, limit, out) : out;
}

/* Encode n documents, document i being data[offsets[i] .. offsets[i + 1]), with EOT before each; before the first only if
 * `begins`, that is if it does not continue an earlier document. `out` needs room for bytes + documents + 16 ids.
 * Returns the number of ids, or a negative error. */
int64_t bpe_encode(Worker *w, const uint8_t *data, const int64_t *offsets, int64_t n, int begins, uint16_t *out) {
    uint16_t *first = out;
    const uint8_t *limit = data + offsets[n];
    w->error = 0;
    for (int64_t i = 0; i < n && !w->error; i++) {
        if (i || begins) *out++ = EOT;
        out = document(w, data + offsets[i], data + offsets[i + 1], limit, out);
    }
    return w->error ? w->error : out - first;
}

/* The first token i whose bytes do not merge into i; -1 if none. tiktoken looks up a piece that is a token without merging
 * it; that is equivalent only if this function returns -1. */
int64_t bpe_first_unmergeable(const Tables *t, const uint8_t *data, const int64_t *offsets, int64_t n) {
    uint16_t out[SCAN_MAX];
    for (int64_t i = 0; i < n; i++) {
        int64_t length = offsets[i + 1] - offsets[i];
        if (length < 1 || length > SCAN_MAX) return i;
        if (merge_scan(t, data + offsets[i], (uint32_t)length, out) != 1 || out[0] != i) return i;
    }
    return -1;
}
